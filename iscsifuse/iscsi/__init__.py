"""RFC 7143 without I/O: bytes in, events out; commands in, buffers out.

Nothing in here knows of sockets, clocks, randomness or trio: time and random bytes are arguments.
"""
