"""CRC32C as iSCSI puts it on the wire. Source: RFC 7143 §13.1 and its test vectors in RFC 7143 Appendix A.

The register is seeded with ones and complemented at the end (as the ``crc32c`` package does), and the four
bytes travel with the least significant byte first, unlike every other number of the protocol.
A data digest covers the padding, a header digest the additional header segments.
"""

import struct
from collections.abc import Iterable

import crc32c as _crc32c

__all__ = ["DIGEST_LENGTH", "crc32c", "crc32c_bytes"]

DIGEST_LENGTH = 4
_LITTLE = struct.Struct("<I")


def crc32c(*buffers: bytes | bytearray | memoryview) -> int:
    """CRC32C of the buffers as if they were one.

    Args:
        buffers: contiguous, of any length.

    Source: RFC 7143 §13.1.
    """
    value = 0
    for buffer in buffers:
        value = _crc32c.crc32c(buffer, value)
    return value


def crc32c_bytes(buffers: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """The four bytes that follow the buffers on the wire.

    Args:
        buffers: header and additional headers, or the pieces of a data segment and its padding.

    Source: RFC 7143 §11.2.3.
    """
    return _LITTLE.pack(crc32c(*buffers))
