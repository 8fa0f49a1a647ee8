"""Serial number arithmetic on 32 bits: CmdSN, StatSN, DataSN and R2TSN wrap.

Source: RFC 7143 §4.2.2.1, RFC 1982. Two numbers exactly 2^31 apart can't be ordered; here the first then counts
as *not* less than the second, in both directions, so that a peer that jumps that far never looks like progress.
"""

__all__ = ["HALF", "MASK", "add", "distance", "less", "less_or_equal"]

MASK = 0xFFFFFFFF
HALF = 0x80000000


def add(number: int, increment: int) -> int:
    """``number + increment`` modulo 2^32; the increment may be negative."""
    return (number + increment) & MASK


def distance(start: int, end: int) -> int:
    """How far ``end`` lies ahead of ``start``: -2^31 .. 2^31 - 1."""
    difference = (end - start) & MASK
    return difference - 0x100000000 if difference >= HALF else difference


def less(first: int, second: int) -> bool:
    """Whether ``first`` comes before ``second``."""
    return 0 < ((second - first) & MASK) < HALF


def less_or_equal(first: int, second: int) -> bool:
    """Whether ``first`` is ``second`` or comes before it."""
    return ((second - first) & MASK) < HALF
