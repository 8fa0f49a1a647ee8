"""How large a logical unit is, and in what blocks.

Everything above trusts these two numbers: they become a file's size, and block addresses are made from
them. So what a target says is checked here once (a block length that no disk has; a size that doesn't fit a
file offset) and is believed from then on.

READ CAPACITY(10) says FFFFFFFFh where the last LBA doesn't fit 32 bits; :attr:`Capacity.needs_16` tells of
it.

Source: SBC-3 §5.15, §5.16.
"""

import struct
from dataclasses import dataclass

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi._fields import Buffer, pack, require

__all__ = ["MAX_BLOCK_LENGTH", "MAX_SIZE", "MIN_BLOCK_LENGTH", "Capacity"]

#: Bytes. Disks have 512, 520, 528 or 4096; anything far from that is a broken or hostile target.
MIN_BLOCK_LENGTH = 256
MAX_BLOCK_LENGTH = 1 << 20
#: The largest file offset there is, in bytes.
MAX_SIZE = (1 << 63) - 1

_TEN = struct.Struct(">II")
# last LBA, block length, P_TYPE/PROT_EN, P_I_EXPONENT/LBPPBE, LBPME/LBPRZ/lowest aligned LBA
_SIXTEEN = struct.Struct(">QIBBH16x")
_SHORTEST_16 = 12
_BEYOND_10 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The answer to READ CAPACITY.

    Attributes:
        last_lba: address of the last block.
        block_length: bytes in a block, without protection information.
        needs_16: True where READ CAPACITY(10) couldn't say it: ``last_lba`` is only a lower bound then.
        protection_type: 0 for none, or 1 to 3: blocks carry 8 bytes of protection information besides.
        p_i_exponent: 2^this is the number of protection information intervals in a block.
        lbpme: logical block provisioning management enabled: the unit is thin provisioned.
        lbprz: unmapped blocks read as zeros.
        logical_per_physical_exponent: 2^this is the number of logical blocks in a physical one.
        lowest_aligned_lba: first block that lies at the start of a physical one.
    """

    last_lba: int
    block_length: int
    needs_16: bool = False
    protection_type: int = 0
    p_i_exponent: int = 0
    lbpme: bool = False
    lbprz: bool = False
    logical_per_physical_exponent: int = 0
    lowest_aligned_lba: int = 0

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.last_lba + 1

    @property
    def size(self) -> int:
        """Bytes."""
        return self.blocks * self.block_length

    @property
    def physical_block_length(self) -> int:
        """Bytes in a physical block: writes of whole ones are quickest."""
        return self.block_length << self.logical_per_physical_exponent

    @classmethod
    def decode_10(cls, data: Buffer) -> "Capacity":
        """Reads the data of READ CAPACITY(10).

        Raises:
            ParameterDataError: fewer than 8 bytes, or a block length or size that can't be.

        Source: SBC-3 §5.15.2.
        """
        last_lba, block_length = _TEN.unpack_from(require(data, length=_TEN.size, what="READ CAPACITY(10)"))
        return _checked(
            cls(last_lba=last_lba, block_length=block_length, needs_16=last_lba == _BEYOND_10), command="10"
        )

    @classmethod
    def decode_16(cls, data: Buffer) -> "Capacity":
        """Reads the data of READ CAPACITY(16). What is missing after the first 12 bytes counts as 0.

        Raises:
            ParameterDataError: fewer than 12 bytes, or a block length or size that can't be.

        Source: SBC-3 §5.16.2.
        """
        received = require(data, length=_SHORTEST_16, what="READ CAPACITY(16)")
        last_lba, block_length, protection, exponents, provisioning = _SIXTEEN.unpack_from(
            received.ljust(_SIXTEEN.size, b"\0")
        )
        return _checked(
            cls(
                last_lba=last_lba,
                block_length=block_length,
                # P_TYPE counts from 0 and means something only with PROT_EN.
                protection_type=(protection >> 1 & 7) + 1 if protection & 1 else 0,
                p_i_exponent=exponents >> 4,
                lbpme=bool(provisioning & 0x8000),
                lbprz=bool(provisioning & 0x4000),
                logical_per_physical_exponent=exponents & 0x0F,
                lowest_aligned_lba=provisioning & 0x3FFF,
            ),
            command="16",
        )

    def encode_10(self) -> bytes:
        """Data of READ CAPACITY(10), FFFFFFFFh where the last LBA doesn't fit.

        Raises:
            ValueError: a value doesn't fit its field.
        """
        return pack(_TEN, min(self.last_lba, _BEYOND_10), self.block_length)

    def encode_16(self) -> bytes:
        """Data of READ CAPACITY(16), 32 bytes.

        Raises:
            ValueError: a value doesn't fit its field.
        """
        for value, limit in (
            (self.protection_type, 8),
            (self.p_i_exponent, 15),
            (self.logical_per_physical_exponent, 15),
            (self.lowest_aligned_lba, 0x3FFF),
        ):
            if not 0 <= value <= limit:
                raise ValueError(f"{self}: {value} doesn't fit its field")
        return pack(
            _SIXTEEN,
            self.last_lba,
            self.block_length,
            (self.protection_type - 1) << 1 | 1 if self.protection_type else 0,
            self.p_i_exponent << 4 | self.logical_per_physical_exponent,
            self.lbpme << 15 | self.lbprz << 14 | self.lowest_aligned_lba,
        )


def _checked(capacity: Capacity, *, command: str) -> Capacity:
    if not MIN_BLOCK_LENGTH <= capacity.block_length <= MAX_BLOCK_LENGTH:
        raise ParameterDataError(
            f"READ CAPACITY({command}): a block length of {capacity.block_length} bytes is not plausible"
        )
    if capacity.size > MAX_SIZE:
        raise ParameterDataError(
            f"READ CAPACITY({command}): {capacity.blocks} blocks of {capacity.block_length} bytes "
            "are more than a file can hold"
        )
    return capacity
