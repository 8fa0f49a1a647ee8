"""The parameter list of UNMAP: which blocks a thin provisioned logical unit may give up.

How many blocks and how many ranges one command may name is in the block limits page; whether it may be sent
at all is a matter of READ CAPACITY(16) (LBPME) and of the logical block provisioning page (LBPU).

Source: SBC-3 §5.28.2.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi._fields import Buffer, pack, require

__all__ = ["UnmapRange", "decode", "encode"]

_HEADER = struct.Struct(">HH4x")
# The data length counts what follows its own two bytes.
_LENGTH_FIELD = 2
_RANGE = struct.Struct(">QI4x")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmapRange:
    """A run of blocks to give up.

    Attributes:
        lba: first block.
        blocks: how many; 0 is allowed and does nothing.
    """

    lba: int
    blocks: int


def encode(ranges: Iterable[UnmapRange]) -> bytes:
    """The parameter list.

    Raises:
        ValueError: a number doesn't fit its field, or there are more ranges than a list can hold.
    """
    descriptors = b"".join(pack(_RANGE, entry.lba, entry.blocks) for entry in ranges)
    length = len(descriptors)
    return pack(_HEADER, _HEADER.size - _LENGTH_FIELD + length, length) + descriptors


def decode(data: Buffer) -> tuple[UnmapRange, ...]:
    """Reads a parameter list; a range that didn't come whole is not among the result.

    Raises:
        ParameterDataError: not even the header came, or the list is shorter than its length field says: of a
            command that destroys data, nothing is guessed.
    """
    received = require(data, length=_HEADER.size, what="UNMAP")
    length = _HEADER.unpack_from(received)[1]
    if _HEADER.size + length > len(received):
        raise ParameterDataError(f"UNMAP: a list of {length} bytes in {len(received)} bytes of data")
    usable = length - length % _RANGE.size
    return tuple(
        UnmapRange(lba=lba, blocks=blocks)
        for lba, blocks in _RANGE.iter_unpack(received[_HEADER.size : _HEADER.size + usable])
    )
