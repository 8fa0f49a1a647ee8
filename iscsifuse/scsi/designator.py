"""Designators: the names by which a logical unit, a port or a device can be told from every other one.

A designator tells whether the disk that answers after a reconnect is the one from before. So it has to be
of the right length for its kind, it must not be blank, and the choice between several must not depend on
the order in which the target lists them this time.

Source: SPC-4 §7.8.6.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from iscsifuse.scsi._fields import pack, printable

__all__ = ["DESCRIPTOR", "Association", "CodeSet", "Designator", "DesignatorType", "best_designator"]


class Association(IntEnum):
    """What a designator belongs to. Source: SPC-4 §7.8.6.1."""

    LOGICAL_UNIT = 0
    TARGET_PORT = 1
    TARGET_DEVICE = 2
    RESERVED = 3


class DesignatorType(IntEnum):
    """Kinds of designators. Source: SPC-4 §7.8.6.1, SPC-5."""

    VENDOR_SPECIFIC = 0x0
    T10_VENDOR_ID = 0x1
    EUI_64 = 0x2
    NAA = 0x3
    RELATIVE_TARGET_PORT = 0x4
    TARGET_PORT_GROUP = 0x5
    LOGICAL_UNIT_GROUP = 0x6
    MD5_LOGICAL_UNIT = 0x7
    SCSI_NAME_STRING = 0x8
    PROTOCOL_SPECIFIC_PORT = 0x9
    UUID = 0xA


class CodeSet(IntEnum):
    """How a designator is written. Source: SPC-4 §7.8.6.1."""

    BINARY = 1
    ASCII = 2
    UTF_8 = 3


#: Protocol and code set, association and type, length of the identifier that follows.
DESCRIPTOR = struct.Struct(">BBxB")
_NUMBERED = {
    DesignatorType.RELATIVE_TARGET_PORT: "target port",
    DesignatorType.TARGET_PORT_GROUP: "target port group",
    DesignatorType.LOGICAL_UNIT_GROUP: "logical unit group",
}
_PREFIXED = {
    DesignatorType.EUI_64: "eui.",
    DesignatorType.NAA: "naa.",
    DesignatorType.MD5_LOGICAL_UNIT: "md5.",
    DesignatorType.UUID: "uuid.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Designator:
    """One name of a logical unit, a port or a device.

    Attributes:
        association: what it names, see :class:`Association`.
        designator_type: see :class:`DesignatorType`; may be a number that this doesn't know.
        code_set: see :class:`CodeSet`; likewise.
        identifier: the name itself.
        protocol: protocol identifier of a port's designator (5 is iSCSI), or None.
    """

    association: int
    designator_type: int
    code_set: int
    identifier: bytes
    protocol: int | None = None

    def describe(self) -> str:
        """Words for it: "naa.6000…", "eui.…", "t10.IET 0001", "name iqn…", "target port 1"."""
        kind = self.designator_type
        if kind in _NUMBERED:
            # Two reserved bytes, then the number.
            return f"{_NUMBERED[DesignatorType(kind)]} {int.from_bytes(self.identifier[2:4], 'big')}"
        if kind in _PREFIXED:
            return f"{_PREFIXED[DesignatorType(kind)]}{self.identifier.hex()}"
        if kind == DesignatorType.T10_VENDOR_ID:
            # The vendor's eight bytes are padded with spaces, which are folded into one here.
            return f"t10.{' '.join(self._text().split())}"
        if kind == DesignatorType.SCSI_NAME_STRING:
            return f"name {printable(self.identifier)}"
        label = "vendor" if kind == DesignatorType.VENDOR_SPECIFIC else f"designator type {kind:X}h"
        return f"{label} {self._text()}"

    def _text(self) -> str:
        if self.code_set in (CodeSet.ASCII, CodeSet.UTF_8):
            return printable(self.identifier)
        return self.identifier.hex()

    def encode(self) -> bytes:
        """The designation descriptor. Raises ``ValueError`` where a value doesn't fit its field."""
        fits = 0 <= self.association <= 3 and 0 <= self.designator_type <= 15 and 0 <= self.code_set <= 15
        if not fits or not 0 <= (self.protocol or 0) <= 15:
            raise ValueError(f"{self}: a value doesn't fit its field")
        piv = 0 if self.protocol is None else 0x80
        return (
            pack(
                DESCRIPTOR,
                (self.protocol or 0) << 4 | self.code_set,
                piv | self.association << 4 | self.designator_type,
                len(self.identifier),
            )
            + self.identifier
        )


def best_designator(designators: Iterable[Designator]) -> Designator | None:
    """The designator that says best which logical unit this is.

    Args:
        designators: of page 83h.

    Returns:
        Of those that name the logical unit: NAA (formats 6, 3, 5, 2, in this order), then EUI-64, T10 vendor
        identification, SCSI name string, UUID, MD5; among equals the one that sorts first, whatever the
        page's order. None where there is none; vendor specific ones, empty ones, ones of a wrong length,
        and blank ones (nothing but zeros or spaces) don't count.

    Source: SPC-4 §7.8.6.11.
    """
    ranked = [
        # A name may be listed twice, in two code sets: which of them is taken must not depend on the order either.
        (
            (rank, designator.identifier, designator.code_set, designator.protocol is None, designator.protocol or 0),
            designator,
        )
        for designator in designators
        if designator.association == Association.LOGICAL_UNIT
        and designator.identifier.strip(b" \0")
        and (rank := _rank(designator)) is not None
    ]
    return min(ranked, key=lambda entry: entry[0])[1] if ranked else None


_NAA_LENGTH = {6: 16, 3: 8, 5: 8, 2: 8}
_NAA_RANK = {6: 0, 3: 1, 5: 2, 2: 3}
_RANK = {
    DesignatorType.EUI_64: 4,
    DesignatorType.T10_VENDOR_ID: 5,
    DesignatorType.SCSI_NAME_STRING: 6,
    DesignatorType.UUID: 7,
    DesignatorType.MD5_LOGICAL_UNIT: 8,
}
_LENGTHS = {
    DesignatorType.EUI_64: (8, 12, 16),
    DesignatorType.UUID: (18,),
    DesignatorType.MD5_LOGICAL_UNIT: (16,),
}


def _rank(designator: Designator) -> int | None:
    """How good a designator is, 0 the best; None for one that identifies nothing."""
    size = len(designator.identifier)
    if designator.designator_type == DesignatorType.NAA:
        naa = designator.identifier[0] >> 4
        return _NAA_RANK[naa] if _NAA_LENGTH.get(naa) == size else None
    if designator.designator_type not in _RANK:
        return None
    kind = DesignatorType(designator.designator_type)
    return _RANK[kind] if size in _LENGTHS.get(kind, (size,)) else None
