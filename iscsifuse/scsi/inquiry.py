"""Standard INQUIRY data: what kind of device answers, and who made it.

A device may answer with as few as five bytes; what is missing counts as absent, never as an error. Vendor,
product and revision are text from the other side: they are shown on terminals and in logs, so nothing but
printable ASCII leaves this module.

Source: SPC-4 §6.6.2.
"""

import struct
from dataclasses import dataclass

from iscsifuse.scsi._fields import Buffer, ascii_field, pack, printable, require

__all__ = ["Inquiry", "device_type_words"]

_SHORTEST = 5
# byte 0 to 7, vendor, product, revision
_LAYOUT = struct.Struct(">BBBBBBBB8s16s4s")
_VERSIONS_OFFSET = 58
_VERSIONS = struct.Struct(">8H")

_TYPES = {
    0x00: "disk",
    0x01: "tape",
    0x02: "printer",
    0x03: "processor",
    0x04: "write-once disk",
    0x05: "CD/DVD",
    0x06: "scanner",
    0x07: "optical disk",
    0x08: "medium changer",
    0x09: "communications device",
    0x0C: "storage array controller",
    0x0D: "enclosure",
    0x0E: "simplified disk",
    0x0F: "optical card reader",
    0x10: "bridge controller",
    0x11: "object storage",
    0x12: "automation drive interface",
    0x13: "security manager",
    0x14: "host managed zoned disk",
    0x1E: "well-known logical unit",
    0x1F: "no device",
}


def device_type_words(n: int) -> str:
    """What a peripheral device type is called: "disk", or "device type 1Ah" where it has no name.

    Source: SPC-4 §6.6.2.
    """
    return _TYPES.get(n) or f"device type {n:02X}h"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inquiry:
    """Standard INQUIRY data.

    Attributes:
        peripheral_qualifier: 0: the device is there; 1: there could be one; 3: there can be none.
        device_type: peripheral device type, see :func:`device_type_words`.
        removable: the medium can be changed.
        version: of SPC that the device claims: 5 is SPC-3, 6 is SPC-4; 0 claims none.
        response_data_format: 2 in all but very old devices.
        normaca: a command with the NACA bit is supported.
        hisup: hierarchical logical unit addresses.
        tpgs: target port group support: 0 none, 1 implicit, 2 explicit, 3 both.
        third_party_copy: EXTENDED COPY and its like are supported.
        protect: protection information is supported.
        multi_port: the device has two ports or more.
        cmdque: commands are queued.
        vendor: T10 vendor identification.
        product: product identification.
        revision: product revision level.
        version_descriptors: the standards that the device claims, as T10's numbers.
    """

    peripheral_qualifier: int = 0
    device_type: int = 0
    removable: bool = False
    version: int = 0
    response_data_format: int = 2
    normaca: bool = False
    hisup: bool = False
    tpgs: int = 0
    third_party_copy: bool = False
    protect: bool = False
    multi_port: bool = False
    cmdque: bool = False
    vendor: str = ""
    product: str = ""
    revision: str = ""
    version_descriptors: tuple[int, ...] = ()

    @property
    def is_disk(self) -> bool:
        """Whether this is a direct-access block device that is there."""
        return self.peripheral_qualifier == 0 and self.device_type == 0

    @classmethod
    def decode(cls, data: Buffer) -> "Inquiry":
        """Reads standard INQUIRY data.

        Raises:
            ParameterDataError: fewer than five bytes.

        Source: SPC-4 §6.6.2.
        """
        received = require(data, length=_SHORTEST, what="INQUIRY")
        # ADDITIONAL LENGTH isn't changed by the allocation length: the data ends where the first of the two
        # does.
        received = received[: _SHORTEST + received[4]]
        kind, byte1, version, byte3, _, byte5, byte6, byte7, vendor, product, revision = _LAYOUT.unpack(
            received[: _LAYOUT.size].ljust(_LAYOUT.size, b"\0")
        )
        versions = _VERSIONS.unpack(
            received[_VERSIONS_OFFSET : _VERSIONS_OFFSET + _VERSIONS.size].ljust(_VERSIONS.size, b"\0")
        )
        return cls(
            peripheral_qualifier=kind >> 5,
            device_type=kind & 0x1F,
            removable=bool(byte1 & 0x80),
            version=version,
            response_data_format=byte3 & 0x0F,
            normaca=bool(byte3 & 0x20),
            hisup=bool(byte3 & 0x10),
            tpgs=byte5 >> 4 & 3,
            third_party_copy=bool(byte5 & 0x08),
            protect=bool(byte5 & 0x01),
            multi_port=bool(byte6 & 0x10),
            cmdque=bool(byte7 & 0x02),
            vendor=printable(vendor),
            product=printable(product),
            revision=printable(revision),
            version_descriptors=tuple(number for number in versions if number),
        )

    def encode(self) -> bytes:
        """Standard INQUIRY data: 36 bytes, or 74 with version descriptors. Cut it at the allocation length.

        Raises:
            ValueError: a value doesn't fit its field, or a text isn't printable ASCII.
        """
        if not (0 <= self.peripheral_qualifier <= 7 and 0 <= self.device_type <= 0x1F and 0 <= self.tpgs <= 3):
            raise ValueError(f"{self}: a value doesn't fit its field")
        if not 0 <= self.response_data_format <= 0x0F or len(self.version_descriptors) > 8:
            raise ValueError(f"{self}: a value doesn't fit its field")
        tail = b""
        if self.version_descriptors:
            padded = (*self.version_descriptors, *(0 for _ in range(8 - len(self.version_descriptors))))
            tail = bytes(_VERSIONS_OFFSET - _LAYOUT.size) + pack(_VERSIONS, *padded)
        return (
            pack(
                _LAYOUT,
                self.peripheral_qualifier << 5 | self.device_type,
                self.removable << 7,
                self.version,
                self.normaca << 5 | self.hisup << 4 | self.response_data_format,
                _LAYOUT.size - _SHORTEST + len(tail),
                self.tpgs << 4 | self.third_party_copy << 3 | self.protect,
                self.multi_port << 4,
                self.cmdque << 1,
                ascii_field(self.vendor, width=8),
                ascii_field(self.product, width=16),
                ascii_field(self.revision, width=4),
            )
            + tail
        )
