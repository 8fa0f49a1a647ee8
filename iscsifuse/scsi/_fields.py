"""What the parameter data modules share: text that is safe to show, and packing that never masks.

Parameter data is at most a few kilobytes and is decoded once for each logical unit, so every decoder starts
with an immutable ``bytes`` copy and slices that at ease. User data never comes through here.
"""

import struct

from iscsifuse.errors import ParameterDataError

__all__ = ["Buffer", "ascii_field", "pack", "printable", "require"]

Buffer = bytes | bytearray | memoryview


def printable(field: bytes) -> str:
    """Text of an ASCII field, safe for a terminal, a log line or a table.

    Args:
        field: bytes as they were sent, padded on the right with spaces or NULs.

    Returns:
        The text without its padding; whatever isn't a printable ASCII character (ESC too) is a ``?``.
    """
    return "".join(chr(byte) if 0x20 <= byte <= 0x7E else "?" for byte in field.rstrip(b" \x00"))


def ascii_field(text: str, *, width: int) -> bytes:
    """A left-aligned ASCII field of ``width`` bytes, padded with spaces.

    Raises:
        ValueError: the text is too long, or holds something other than printable ASCII characters.

    Source: SPC-4 §4.3.1.
    """
    if not text.isascii() or not text.isprintable():
        raise ValueError(f"{text!r} is not printable ASCII")
    if len(text) > width:
        raise ValueError(f"{text!r} is longer than the {width} bytes of its field")
    return text.encode("ascii").ljust(width)


def pack(layout: struct.Struct, *values: int | bytes) -> bytes:
    """``layout.pack(*values)``, where a value that doesn't fit its field is a ``ValueError``."""
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise ValueError(f"a value doesn't fit its field: {error}") from error


def require(data: Buffer, *, length: int, what: str) -> bytes:
    """The data as bytes, provided that at least ``length`` of them came.

    Raises:
        ParameterDataError: there are fewer.
    """
    if len(data) < length:
        raise ParameterDataError(f"{what}: {len(data)} bytes came, at least {length} are needed")
    return bytes(data)
