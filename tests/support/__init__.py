"""Helpers for tests that meet the real world: targets written by others, a packet dissector, disks, processes."""
