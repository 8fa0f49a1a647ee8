"""Mode parameters: whether the medium is write-protected, and whether there is a volatile cache.

MODE SENSE answers with a header (of four bytes or eight), block descriptors, and mode pages. The header is
believed as soon as it came, whatever its length field says: a write-protect bit is not to be lost to a
wrong length. Pages are taken as far as length field and data both reach; a page is kept whole, header
included, so that the offsets in it are the standards'. The last page may be cut.

Source: SPC-4 §7.5, SBC-3 §6.5.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi._fields import Buffer, pack, require

__all__ = ["ALL_PAGES", "CACHING_PAGE", "CONTROL_PAGE", "CachingPage", "ModeParameters"]

CACHING_PAGE = 0x08
CONTROL_PAGE = 0x0A
ALL_PAGES = 0x3F

# mode data length, medium type, device-specific parameter, block descriptor length
_HEADER_6 = struct.Struct(">BBBB")
_HEADER_10 = struct.Struct(">HBBxxH")
_WP = 0x80
_DPOFUA = 0x10
_SPF = 0x40


@dataclass(frozen=True, slots=True, kw_only=True)
class CachingPage:
    """Mode page 08h, the part of it that matters to an initiator.

    Attributes:
        wce: write cache enabled: GOOD comes before data is on the medium, unless FUA is set.
        rcd: read cache disabled.
        dra: no read-ahead.
        nv_dis: a non-volatile cache is disabled.
    """

    wce: bool
    rcd: bool = False
    dra: bool = False
    nv_dis: bool = False

    @classmethod
    def decode(cls, page: Buffer) -> "CachingPage":
        """Reads the page; of a short one, what is missing after WCE and RCD is False.

        Args:
            page: whole, header included.

        Raises:
            ParameterDataError: this is not that page, or it ends before WCE.

        Source: SBC-3 §6.5.5.
        """
        received = require(page, length=3, what="mode page 08h")
        if received[0] & ~0x80 != CACHING_PAGE:
            raise ParameterDataError(f"mode page 08h: the answer is page {received[0] & 0x3F:02X}h")
        flags = received[12] if len(received) > 12 else 0
        return cls(
            wce=bool(received[2] & 0x04),
            rcd=bool(received[2] & 0x01),
            dra=bool(flags & 0x20),
            nv_dis=bool(flags & 0x01),
        )

    def encode(self) -> bytes:
        """The page, 20 bytes."""
        page = bytearray(20)
        page[0] = CACHING_PAGE
        page[1] = len(page) - 2
        page[2] = self.wce << 2 | self.rcd
        page[12] = self.dra << 5 | self.nv_dis
        return bytes(page)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeParameters:
    """The answer to MODE SENSE.

    Attributes:
        medium_type: 0 for a disk.
        write_protected: WP: writes will be refused.
        dpofua: the DPO and FUA bits of READ and WRITE are supported.
        block_descriptors: raw.
        pages: whole pages by page code and subpage code.
    """

    medium_type: int = 0
    write_protected: bool = False
    dpofua: bool = False
    block_descriptors: bytes = b""
    pages: Mapping[tuple[int, int], bytes] = field(default_factory=dict)

    @property
    def caching(self) -> CachingPage | None:
        """The caching page, or None where there is none, or not enough of it to tell WCE."""
        page = self.pages.get((CACHING_PAGE, 0), b"")
        return CachingPage.decode(page) if len(page) > 2 and not page[0] & _SPF else None

    @classmethod
    def decode_6(cls, data: Buffer) -> "ModeParameters":
        """Reads the data of MODE SENSE(6).

        Raises:
            ParameterDataError: fewer than four bytes.

        Source: SPC-4 §7.5.5.
        """
        received = require(data, length=_HEADER_6.size, what="MODE SENSE(6)")
        length, medium, device, descriptors = _HEADER_6.unpack_from(received)
        return cls._decode(received[: 1 + length], _HEADER_6.size, medium, device, descriptors)

    @classmethod
    def decode_10(cls, data: Buffer) -> "ModeParameters":
        """Reads the data of MODE SENSE(10).

        Raises:
            ParameterDataError: fewer than eight bytes.

        Source: SPC-4 §7.5.5.
        """
        received = require(data, length=_HEADER_10.size, what="MODE SENSE(10)")
        length, medium, device, descriptors = _HEADER_10.unpack_from(received)
        return cls._decode(received[: 2 + length], _HEADER_10.size, medium, device, descriptors)

    @classmethod
    def _decode(cls, received: bytes, header: int, medium: int, device: int, descriptors: int) -> "ModeParameters":
        pages: dict[tuple[int, int], bytes] = {}
        for key, page in _pages(received[header + descriptors :]):
            pages.setdefault(key, page)
        return cls(
            medium_type=medium,
            write_protected=bool(device & _WP),
            dpofua=bool(device & _DPOFUA),
            block_descriptors=received[header : header + descriptors],
            pages=pages,
        )

    def encode_6(self) -> bytes:
        """Data of MODE SENSE(6). Cut it at the allocation length.

        Raises:
            ValueError: it doesn't fit 256 bytes.
        """
        body = self.block_descriptors + b"".join(self.pages.values())
        length = _HEADER_6.size - 1 + len(body)
        return pack(_HEADER_6, length, self.medium_type, self._device(), len(self.block_descriptors)) + body

    def encode_10(self) -> bytes:
        """Data of MODE SENSE(10). Cut it at the allocation length.

        Raises:
            ValueError: it doesn't fit 65537 bytes.
        """
        body = self.block_descriptors + b"".join(self.pages.values())
        length = _HEADER_10.size - 2 + len(body)
        return pack(_HEADER_10, length, self.medium_type, self._device(), len(self.block_descriptors)) + body

    def _device(self) -> int:
        return (_WP if self.write_protected else 0) | (_DPOFUA if self.dpofua else 0)


def _pages(data: bytes) -> Iterator[tuple[tuple[int, int], bytes]]:
    offset = 0
    while offset + 2 <= len(data):
        code = data[offset] & 0x3F
        if code == 0:
            # Page 00h has no format of its own and comes last; zeros after the last page look the same.
            return
        if data[offset] & _SPF:
            if offset + 4 > len(data):
                return
            subpage = data[offset + 1]
            size = 4 + int.from_bytes(data[offset + 2 : offset + 4], "big")
        else:
            subpage = 0
            size = 2 + data[offset + 1]
        yield (code, subpage), data[offset : offset + size]
        offset += size
