"""The eight bytes that address a logical unit, and the list of them that REPORT LUNS returns.

A target names its logical units in one of several *address methods*; a person knows them by number. Two
rules keep the one from being taken for the other:

- an address that came from a target goes back verbatim: :attr:`LunAddress.raw` is what is put into a PDU,
  and the number beside it is for names and messages only;
- a number becomes an address only where the usual form of it is known (peripheral device addressing below
  256, flat space addressing below 16384), and is refused otherwise. A masked number is another disk.

A target may list one number by two methods; they are two addresses here, since SAM doesn't say that they
are one unit.

Source: SAM-5 §4.7, SPC-4 §6.33.2.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi._fields import Buffer, require

__all__ = [
    "MAX_NUMBER",
    "MAX_REPORT_LENGTH",
    "AddressMethod",
    "LunAddress",
    "ReportLuns",
    "decode",
    "decode_report_luns",
    "encode",
    "encode_report_luns",
]

#: The largest number that :func:`encode` takes.
MAX_NUMBER = 0x3FFF
#: Bytes. A longer REPORT LUNS answer (65536 logical units) isn't asked for: the length field is not believed.
MAX_REPORT_LENGTH = 8 + 8 * 65536

_SIZE = 8
_HEADER = struct.Struct(">I4x")
_FLAT = 0x4000
_NOT_SPECIFIED = b"\xff" * _SIZE
_WELL_KNOWN = {
    0x01: "REPORT LUNS",
    0x02: "ACCESS CONTROLS",
    0x03: "TARGET LOG PAGES",
    0x04: "SECURITY PROTOCOL",
    0x05: "MANAGEMENT PROTOCOL",
}


class AddressMethod(IntEnum):
    """The upper two bits of a logical unit number. Source: SAM-5 §4.7.7.1."""

    PERIPHERAL = 0
    FLAT = 1
    LOGICAL_UNIT = 2
    EXTENDED = 3


@dataclass(frozen=True, slots=True)
class LunAddress:
    """The address of a logical unit.

    Attributes:
        raw: the eight bytes, verbatim.
        number: what people call it, or None where the address is more than a plain number.
        method: how the first level of the address is written.
        well_known: True for a well-known logical unit (which is never a disk).
    """

    raw: bytes
    number: int | None
    method: AddressMethod
    well_known: bool = False

    def describe(self) -> str:
        """Words for it: "LUN 5", "LUN 0x0102000000000000", "well-known logical unit REPORT LUNS"."""
        if self.well_known:
            return f"well-known logical unit {_WELL_KNOWN.get(self.raw[1], f'{self.raw[1]:02X}h')}"
        if self.number is not None:
            return f"LUN {self.number}"
        return f"LUN 0x{self.raw.hex()}"


@dataclass(frozen=True, slots=True)
class ReportLuns:
    """The answer to REPORT LUNS.

    Attributes:
        luns: the addresses that were received, in order, each once.
        total_length: bytes that the whole answer has, header included, as the target said.
        received: bytes that came.
    """

    luns: tuple[LunAddress, ...]
    total_length: int
    received: int

    @property
    def needs_length(self) -> int | None:
        """Allocation length to ask again with, or None where all of it came, or where the length is nonsense."""
        if self.received < self.total_length <= MAX_REPORT_LENGTH and self.total_length % _SIZE == 0:
            return self.total_length
        return None


def encode(lun: int) -> bytes:
    """The address of the logical unit with a number, as targets usually write it.

    Args:
        lun: 0 to 16383.

    Returns:
        Eight bytes: peripheral device addressing below 256, flat space addressing from there.

    Raises:
        ValueError: the number has no address of these kinds.

    Source: SAM-5 §4.7.7.2, §4.7.7.3.
    """
    if not 0 <= lun <= MAX_NUMBER:
        raise ValueError(f"LUN {lun} is out of range (0 to {MAX_NUMBER})")
    return (lun if lun < 256 else _FLAT | lun).to_bytes(2, "big") + bytes(6)


def decode(addr: Buffer) -> LunAddress:
    """What an address means.

    Args:
        addr: eight bytes.

    Raises:
        ParameterDataError: these aren't eight bytes.

    Source: SAM-5 §4.7.
    """
    if len(addr) != _SIZE:
        raise ParameterDataError(f"a logical unit's address has {_SIZE} bytes, not {len(addr)}")
    raw = bytes(addr)
    method = AddressMethod(raw[0] >> 6)
    # Extended addressing: length in bits 5-4, the kind in bits 3-0. A well-known unit is the short form of
    # kind 1.
    well_known = raw[0] == 0xC1
    return LunAddress(raw=raw, number=_number(raw), method=method, well_known=well_known)


def _number(raw: bytes) -> int | None:
    """The number of an address that has one level only; what follows that level has to be 0."""
    first = raw[0]
    if first == 0:
        value, used = raw[1], 2
    elif first >> 6 == AddressMethod.FLAT:
        value, used = int.from_bytes(raw[:2], "big") & MAX_NUMBER, 2
    elif first == 0xD2:
        value, used = int.from_bytes(raw[1:4], "big"), 4
    elif first == 0xE2:
        value, used = int.from_bytes(raw[1:6], "big"), 6
    else:
        return None
    return None if any(raw[used:]) else value


def decode_report_luns(data: Buffer) -> ReportLuns:
    """Reads the data of REPORT LUNS.

    The list ends where the length field says or where the data ends, whichever comes first; half an address
    at the end is left out, and so are repetitions and "not specified" (all bits set).

    Args:
        data: what was received; may be cut by the allocation length.

    Raises:
        ParameterDataError: not even the header came.

    Source: SPC-4 §6.33.2.
    """
    received = require(data, length=_HEADER.size, what="REPORT LUNS")
    total = _HEADER.unpack_from(received)[0] + _HEADER.size
    end = min(total, len(received))
    # A dictionary keeps the order and drops what is there already.
    addresses = dict.fromkeys(
        received[start : start + _SIZE] for start in range(_HEADER.size, end - _SIZE + 1, _SIZE)
    )
    addresses.pop(_NOT_SPECIFIED, None)
    return ReportLuns(
        luns=tuple(decode(address) for address in addresses), total_length=total, received=len(received)
    )


def encode_report_luns(addresses: Iterable[bytes]) -> bytes:
    """Data of REPORT LUNS.

    Args:
        addresses: eight bytes each, see :func:`encode`.

    Returns:
        The whole answer; cut it at the allocation length.

    Raises:
        ValueError: an address doesn't have eight bytes.
    """
    listed = list(addresses)
    if any(len(address) != _SIZE for address in listed):
        raise ValueError(f"a logical unit's address has {_SIZE} bytes")
    return _HEADER.pack(_SIZE * len(listed)) + b"".join(listed)
