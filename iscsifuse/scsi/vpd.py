"""Vital product data: the identity of a logical unit, and what it can and likes to do.

Every page starts with its code and its length. A device that doesn't know EVPD may answer with standard
INQUIRY data instead, whose second byte can look like a page code; so a page of another code, or one with a
length that such a page can't have, is an error and not a page. Otherwise pages are taken as far as they go:
the pages of limits have grown from one version of SBC to the next, and what a short one leaves out has its
default, which is "not reported".

Identity is another matter, see :mod:`~iscsifuse.scsi.designator`: half a designator is never used.

Source: SPC-4 §7.8, SBC-3 §6.6.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi._fields import Buffer, ascii_field, pack, printable, require
from iscsifuse.scsi.designator import (
    DESCRIPTOR,
    Association,
    CodeSet,
    Designator,
    DesignatorType,
    best_designator,
)

__all__ = [
    "Association",
    "BlockDeviceCharacteristics",
    "BlockLimits",
    "CodeSet",
    "Designator",
    "DesignatorType",
    "DeviceIdentification",
    "LogicalBlockProvisioning",
    "ProvisioningType",
    "SupportedPages",
    "UnitSerialNumber",
    "VpdPage",
    "best_designator",
]


class VpdPage(IntEnum):
    """Page codes. Source: SPC-4 §7.8.1, SBC-3 §6.6.1."""

    SUPPORTED_PAGES = 0x00
    UNIT_SERIAL_NUMBER = 0x80
    DEVICE_IDENTIFICATION = 0x83
    BLOCK_LIMITS = 0xB0
    BLOCK_DEVICE_CHARACTERISTICS = 0xB1
    LOGICAL_BLOCK_PROVISIONING = 0xB2


_HEADER = struct.Struct(">BBH")
#: Bytes. There are 256 pages at most, and no serial number is as long as this; standard INQUIRY data, taken
#: for one of these pages, has its version and response data format here and so claims 512 bytes or more.
_LONGEST = {VpdPage.SUPPORTED_PAGES: 256, VpdPage.UNIT_SERIAL_NUMBER: 511}


def _payload(data: Buffer, page: VpdPage) -> bytes:
    """What follows the header, as far as it was received."""
    what = f"VPD page {page:02X}h"
    received = require(data, length=_HEADER.size, what=what)
    _, code, length = _HEADER.unpack_from(received)
    if code != page:
        raise ParameterDataError(f"{what}: the answer is page {code:02X}h")
    if length > _LONGEST.get(page, 0xFFFF):
        raise ParameterDataError(f"{what}: a length of {length} bytes can't be")
    return received[_HEADER.size : _HEADER.size + length]


def _page(page: VpdPage, payload: bytes) -> bytes:
    return pack(_HEADER, 0, page, len(payload)) + payload


@dataclass(frozen=True, slots=True)
class SupportedPages:
    """Page 00h: which pages there are.

    Attributes:
        pages: page codes, as listed.
    """

    pages: tuple[int, ...]

    @classmethod
    def decode(cls, data: Buffer) -> "SupportedPages":
        """Reads page 00h.

        Raises:
            ParameterDataError: this is not that page.

        Source: SPC-4 §7.8.18.
        """
        return cls(tuple(_payload(data, VpdPage.SUPPORTED_PAGES)))

    def encode(self) -> bytes:
        """The page. Raises ``ValueError`` where a page code isn't one byte."""
        return _page(VpdPage.SUPPORTED_PAGES, bytes(self.pages))


@dataclass(frozen=True, slots=True)
class UnitSerialNumber:
    """Page 80h.

    Attributes:
        serial: printable ASCII without the spaces around it; may be empty.
    """

    serial: str

    @classmethod
    def decode(cls, data: Buffer) -> "UnitSerialNumber":
        """Reads page 80h.

        Raises:
            ParameterDataError: this is not that page.

        Source: SPC-4 §7.8.19.
        """
        return cls(printable(_payload(data, VpdPage.UNIT_SERIAL_NUMBER)).lstrip())

    def encode(self) -> bytes:
        """The page. Raises ``ValueError`` where the serial number isn't printable ASCII, or too long."""
        return _page(VpdPage.UNIT_SERIAL_NUMBER, ascii_field(self.serial, width=511).rstrip())


@dataclass(frozen=True, slots=True)
class DeviceIdentification:
    """Page 83h.

    Attributes:
        designators: in the order of the page.
    """

    designators: tuple[Designator, ...]

    @classmethod
    def decode(cls, data: Buffer) -> "DeviceIdentification":
        """Reads page 83h. A last designator that the allocation length cut is left out.

        Raises:
            ParameterDataError: this is not that page, or a designator reaches past the page's end.

        Source: SPC-4 §7.8.6.
        """
        payload = _payload(data, VpdPage.DEVICE_IDENTIFICATION)
        whole = len(payload) == int.from_bytes(bytes(data[2:4]), "big")
        designators = []
        offset = 0
        while offset + DESCRIPTOR.size <= len(payload):
            first, second, length = DESCRIPTOR.unpack_from(payload, offset)
            offset += DESCRIPTOR.size
            identifier = payload[offset : offset + length]
            offset += length
            if offset > len(payload):
                if whole:
                    raise ParameterDataError("VPD page 83h: a designator reaches past the end of the page")
                break
            designators.append(
                Designator(
                    association=second >> 4 & 3,
                    designator_type=second & 0x0F,
                    code_set=first & 0x0F,
                    identifier=identifier,
                    protocol=first >> 4 if second & 0x80 else None,
                )
            )
        return cls(tuple(designators))

    def encode(self) -> bytes:
        """The page. Raises ``ValueError`` where a value doesn't fit its field."""
        return _page(VpdPage.DEVICE_IDENTIFICATION, b"".join(designator.encode() for designator in self.designators))


# From byte 4 of the page: flags, compare and write, granularity, maximum, optimal, prefetch, four of UNMAP,
# WRITE SAME, five of WRITE ATOMIC
_BLOCK_LIMITS = struct.Struct(">BBHIIIIIIIQIIIII")
_UGAVALID = 0x80000000


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLimits:
    """Page B0h. All numbers are blocks; 0 is "not reported" everywhere.

    Attributes:
        wsnz: WRITE SAME doesn't take 0 for "to the end".
        max_compare_and_write: the most blocks of COMPARE AND WRITE.
        optimal_granularity: transfers do best as multiples of this.
        max_transfer: the most blocks of one command.
        optimal_transfer: above this, commands get slow.
        max_prefetch: the most blocks of PRE-FETCH.
        max_unmap_lba_count: the most blocks of one UNMAP; 0: there is no UNMAP; FFFFFFFFh: no limit.
        max_unmap_descriptor_count: the most ranges of one UNMAP; as above.
        optimal_unmap_granularity: unmap ranges do best as multiples of this.
        unmap_granularity_alignment: the first block of such a multiple, or None where it isn't valid.
        max_write_same: the most blocks of one WRITE SAME.
        max_atomic_transfer: the most blocks of an atomic write.
        atomic_alignment: alignment of atomic writes.
        atomic_granularity: granularity of atomic writes.
        max_atomic_transfer_with_boundary: the most blocks where an atomic boundary is given.
        max_atomic_boundary: the largest atomic boundary.
    """

    wsnz: bool = False
    max_compare_and_write: int = 0
    optimal_granularity: int = 0
    max_transfer: int = 0
    optimal_transfer: int = 0
    max_prefetch: int = 0
    max_unmap_lba_count: int = 0
    max_unmap_descriptor_count: int = 0
    optimal_unmap_granularity: int = 0
    unmap_granularity_alignment: int | None = None
    max_write_same: int = 0
    max_atomic_transfer: int = 0
    atomic_alignment: int = 0
    atomic_granularity: int = 0
    max_atomic_transfer_with_boundary: int = 0
    max_atomic_boundary: int = 0

    @classmethod
    def decode(cls, data: Buffer) -> "BlockLimits":
        """Reads page B0h; of a short page, what is missing is 0 (a field that was cut, too).

        Raises:
            ParameterDataError: this is not that page.

        Source: SBC-3 §6.6.4, SBC-4.
        """
        payload = _whole_fields(_payload(data, VpdPage.BLOCK_LIMITS), _BLOCK_LIMITS)
        flags, caw, granularity, most, optimal, prefetch, unmap, ranges, unit, align, same, *atomic = (
            _BLOCK_LIMITS.unpack(payload)
        )
        return cls(
            wsnz=bool(flags & 0x01),
            max_compare_and_write=caw,
            optimal_granularity=granularity,
            max_transfer=most,
            optimal_transfer=optimal,
            max_prefetch=prefetch,
            max_unmap_lba_count=unmap,
            max_unmap_descriptor_count=ranges,
            optimal_unmap_granularity=unit,
            unmap_granularity_alignment=align & ~_UGAVALID if align & _UGAVALID else None,
            max_write_same=same,
            max_atomic_transfer=atomic[0],
            atomic_alignment=atomic[1],
            atomic_granularity=atomic[2],
            max_atomic_transfer_with_boundary=atomic[3],
            max_atomic_boundary=atomic[4],
        )

    def encode(self) -> bytes:
        """The page, 64 bytes. Raises ``ValueError`` where a value doesn't fit its field."""
        alignment = self.unmap_granularity_alignment
        if alignment is not None and not 0 <= alignment < _UGAVALID:
            raise ValueError(f"an unmap granularity alignment of {alignment} doesn't fit its field")
        return _page(
            VpdPage.BLOCK_LIMITS,
            pack(
                _BLOCK_LIMITS,
                self.wsnz,
                self.max_compare_and_write,
                self.optimal_granularity,
                self.max_transfer,
                self.optimal_transfer,
                self.max_prefetch,
                self.max_unmap_lba_count,
                self.max_unmap_descriptor_count,
                self.optimal_unmap_granularity,
                0 if alignment is None else alignment | _UGAVALID,
                self.max_write_same,
                self.max_atomic_transfer,
                self.atomic_alignment,
                self.atomic_granularity,
                self.max_atomic_transfer_with_boundary,
                self.max_atomic_boundary,
            ),
        )


def _whole_fields(payload: bytes, layout: struct.Struct) -> bytes:
    """The payload at the layout's length; a field that isn't whole is 0, for half a number is another number."""
    end = 0
    for code in layout.format.lstrip(">"):
        size = struct.calcsize(f">{code}")
        if end + size > len(payload):
            break
        end += size
    return payload[:end].ljust(layout.size, b"\0")


_CHARACTERISTICS = struct.Struct(">HBBB")
_CHARACTERISTICS_LENGTH = 60
_FORM_FACTORS = {1: "5.25 inch", 2: "3.5 inch", 3: "2.5 inch", 4: "1.8 inch", 5: "less than 1.8 inch"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDeviceCharacteristics:
    """Page B1h.

    Attributes:
        rotation_rate: revolutions per minute; 1 is "doesn't rotate", 0 "not reported".
        product_type: of memory cards; 0 is "not given".
        form_factor: see :meth:`form_factor_words`; 0 is "not reported".
        zoned: 0 not reported, 1 host aware, 2 device managed.
        fuab: SYNCHRONIZE CACHE and FUA are meant as SBC-3 says, even with a non-volatile cache.
        vbuls: VERIFY with BYTCHK 10b is supported.
    """

    rotation_rate: int = 0
    product_type: int = 0
    form_factor: int = 0
    zoned: int = 0
    fuab: bool = False
    vbuls: bool = False

    @property
    def is_solid_state(self) -> bool:
        """Whether the device said that nothing in it rotates."""
        return self.rotation_rate == 1

    def form_factor_words(self) -> str:
        """Words such as "3.5 inch"; empty where it isn't reported or not known."""
        return _FORM_FACTORS.get(self.form_factor, "")

    @classmethod
    def decode(cls, data: Buffer) -> "BlockDeviceCharacteristics":
        """Reads page B1h; of a short page, what is missing is 0.

        Raises:
            ParameterDataError: this is not that page.

        Source: SBC-3 §6.6.2.
        """
        payload = _payload(data, VpdPage.BLOCK_DEVICE_CHARACTERISTICS)[: _CHARACTERISTICS.size]
        rate, product, factor, flags = _CHARACTERISTICS.unpack(_whole_fields(payload, _CHARACTERISTICS))
        return cls(
            rotation_rate=rate,
            product_type=product,
            form_factor=factor & 0x0F,
            zoned=flags >> 4 & 3,
            fuab=bool(flags & 0x02),
            vbuls=bool(flags & 0x01),
        )

    def encode(self) -> bytes:
        """The page, 64 bytes. Raises ``ValueError`` where a value doesn't fit its field."""
        if not (0 <= self.form_factor <= 0x0F and 0 <= self.zoned <= 3):
            raise ValueError(f"{self}: a value doesn't fit its field")
        flags = self.zoned << 4 | self.fuab << 1 | self.vbuls
        payload = pack(_CHARACTERISTICS, self.rotation_rate, self.product_type, self.form_factor, flags)
        return _page(VpdPage.BLOCK_DEVICE_CHARACTERISTICS, payload.ljust(_CHARACTERISTICS_LENGTH, b"\0"))


class ProvisioningType(IntEnum):
    """How a logical unit is provisioned. Source: SBC-3 §6.6.5."""

    NOT_REPORTED = 0
    RESOURCE = 1
    THIN = 2


_PROVISIONING = struct.Struct(">BBBB")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalBlockProvisioning:
    """Page B2h.

    Attributes:
        threshold_exponent: 2^this blocks is the unit in which thresholds are counted; 0 for none.
        lbpu: UNMAP is supported.
        lbpws: WRITE SAME(16) can unmap.
        lbpws10: WRITE SAME(10) can unmap.
        lbprz: unmapped blocks read as zeros.
        anc_sup: anchored blocks are supported.
        provisioning_type: see :class:`ProvisioningType`; may be a number that this doesn't know.
    """

    threshold_exponent: int = 0
    lbpu: bool = False
    lbpws: bool = False
    lbpws10: bool = False
    lbprz: bool = False
    anc_sup: bool = False
    provisioning_type: int = 0

    @classmethod
    def decode(cls, data: Buffer) -> "LogicalBlockProvisioning":
        """Reads page B2h; of a short page, what is missing is 0.

        Raises:
            ParameterDataError: this is not that page.

        Source: SBC-3 §6.6.5.
        """
        payload = _payload(data, VpdPage.LOGICAL_BLOCK_PROVISIONING)[: _PROVISIONING.size]
        exponent, flags, kind, _ = _PROVISIONING.unpack(payload.ljust(_PROVISIONING.size, b"\0"))
        return cls(
            threshold_exponent=exponent,
            lbpu=bool(flags & 0x80),
            lbpws=bool(flags & 0x40),
            lbpws10=bool(flags & 0x20),
            # SBC-4 widened the field to three bits; its lowest is SBC-3's bit and says "zeros" in both.
            lbprz=bool(flags & 0x04),
            anc_sup=bool(flags & 0x02),
            provisioning_type=kind & 0x07,
        )

    def encode(self) -> bytes:
        """The page, 8 bytes. Raises ``ValueError`` where a value doesn't fit its field."""
        if not 0 <= self.provisioning_type <= 7:
            raise ValueError(f"{self}: a value doesn't fit its field")
        flags = self.lbpu << 7 | self.lbpws << 6 | self.lbpws10 << 5 | self.lbprz << 2 | self.anc_sup << 1
        return _page(
            VpdPage.LOGICAL_BLOCK_PROVISIONING,
            pack(_PROVISIONING, self.threshold_exponent, flags, self.provisioning_type, 0),
        )
