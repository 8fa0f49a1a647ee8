"""The initiator on trio: from a portal's address to logical units that are read and written in blocks."""
