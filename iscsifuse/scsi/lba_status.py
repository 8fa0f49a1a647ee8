"""GET LBA STATUS: which blocks of a thin provisioned logical unit have anything behind them.

The answer is used to leave out reads (a deallocated extent may read as zeros, see LBPRZ), so a wrong one
would put zeros where data is. It is believed only as far as it is what was asked: it starts at the block
asked about, every extent starts where the one before ended, and nothing reaches past the end of the medium.
Of a list that goes wrong on the way, the part before is kept; a list with no usable extent at all is an
error. A provisioning status that isn't known counts as mapped, which costs a read and nothing else.

Source: SBC-3 §5.4.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi._fields import Buffer, pack, require

__all__ = ["Extent", "Provisioning", "decode", "encode"]

# The length field counts what follows it: four reserved bytes and the descriptors.
_HEADER = struct.Struct(">I4x")
_LENGTH_FIELD = 4
_DESCRIPTOR = struct.Struct(">QIB3x")


class Provisioning(IntEnum):
    """Provisioning status of an extent. Source: SBC-3 §5.4.3."""

    MAPPED = 0
    DEALLOCATED = 1
    ANCHORED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A run of blocks of the same kind.

    Attributes:
        lba: first block.
        blocks: how many, never 0.
        provisioning: what is behind them.
    """

    lba: int
    blocks: int
    provisioning: Provisioning

    @property
    def mapped(self) -> bool:
        """Whether there is data; neither deallocated nor anchored blocks have any."""
        return self.provisioning is Provisioning.MAPPED


def decode(data: Buffer, *, lba: int, capacity_blocks: int) -> tuple[Extent, ...]:
    """Reads the data of GET LBA STATUS.

    Args:
        data: what was received; may be cut by the allocation length.
        lba: the block that was asked about.
        capacity_blocks: blocks that the logical unit has; extents are cut there.

    Returns:
        One extent or more, without gaps, the first beginning at ``lba``.

    Raises:
        ParameterDataError: no extent, or one that doesn't begin at ``lba`` or lies beyond the medium.

    Source: SBC-3 §5.4.2.
    """
    received = require(data, length=_HEADER.size, what="GET LBA STATUS")
    end = min(_HEADER.unpack_from(received)[0] + _LENGTH_FIELD, len(received))
    extents: list[Extent] = []
    expected = lba
    for offset in range(_HEADER.size, end - _DESCRIPTOR.size + 1, _DESCRIPTOR.size):
        start, blocks, status = _DESCRIPTOR.unpack_from(received, offset)
        blocks = min(blocks, capacity_blocks - start)
        if start != expected or blocks <= 0:
            break
        extents.append(Extent(lba=start, blocks=blocks, provisioning=_provisioning(status & 0x0F)))
        expected += blocks
    if not extents:
        raise ParameterDataError(f"GET LBA STATUS: the answer says nothing about block {lba}")
    return tuple(extents)


def _provisioning(status: int) -> Provisioning:
    try:
        return Provisioning(status)
    except ValueError:
        return Provisioning.MAPPED


def encode(extents: Iterable[Extent]) -> bytes:
    """Data of GET LBA STATUS.

    Args:
        extents: in the order in which they lie on the medium.

    Returns:
        The whole answer; cut it at the allocation length.

    Raises:
        ValueError: an extent doesn't fit its fields (split those of 2^32 blocks and more).
    """
    descriptors = b"".join(pack(_DESCRIPTOR, extent.lba, extent.blocks, extent.provisioning) for extent in extents)
    return _HEADER.pack(_HEADER.size - _LENGTH_FIELD + len(descriptors)) + descriptors
