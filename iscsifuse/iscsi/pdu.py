"""What every PDU is made of: 48 bytes of basic header, additional headers, a data segment, digests.

::

    BHS 48 | AHS 0..1020 | header digest 0/4 | data 0..2^24-1 | padding 0..3 | data digest 0/4

A PDU is a frozen dataclass whose fields are the ones of its section in RFC 7143 §11, in the standard's words.
Reserved fields are written as zeros and not looked at when read (RFC 7143 §11.2.1). `request.py` holds what an
initiator sends, `response.py` what a target sends; this file the parts they share and the stream codec.

This codec is for people, for the login phase, and for the loopback target. The full feature phase of the
initiator has a leaner one for data (`framing.py`), which is tested against this.

Source: RFC 7143 §11.1-11.2.
"""

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, Self

from iscsifuse.errors import DigestError, FormatError
from iscsifuse.iscsi.digest import DIGEST_LENGTH, crc32c_bytes

__all__ = [
    "BHS_LENGTH",
    "MAX_DATA_SEGMENT_LENGTH",
    "NO_LUN",
    "RESERVED_TAG",
    "Opcode",
    "Pdu",
    "decode",
    "decode_stream",
    "padding",
    "register",
    "split_lengths",
]

BHS_LENGTH = 48
MAX_DATA_SEGMENT_LENGTH = 0xFFFFFF
RESERVED_TAG = 0xFFFFFFFF
"""An Initiator or Target Transfer Tag that says "none". Source: RFC 7143 §11.2.1.8."""
NO_LUN = bytes(8)
IMMEDIATE = 0x40
FINAL = 0x80

_LENGTHS = struct.Struct(">I")
_PADDING = (b"", bytes(3), bytes(2), bytes(1))


class Opcode(IntEnum):
    """The six bits of an operation code. Source: RFC 7143 §11.2.1.2."""

    NOP_OUT = 0x00
    SCSI_COMMAND = 0x01
    TASK_MANAGEMENT_REQUEST = 0x02
    LOGIN_REQUEST = 0x03
    TEXT_REQUEST = 0x04
    DATA_OUT = 0x05
    LOGOUT_REQUEST = 0x06
    SNACK_REQUEST = 0x10
    NOP_IN = 0x20
    SCSI_RESPONSE = 0x21
    TASK_MANAGEMENT_RESPONSE = 0x22
    LOGIN_RESPONSE = 0x23
    TEXT_RESPONSE = 0x24
    DATA_IN = 0x25
    LOGOUT_RESPONSE = 0x26
    R2T = 0x31
    ASYNC_MESSAGE = 0x32
    REJECT = 0x3F


def padding(length: int) -> bytes:
    """The zero bytes that bring a segment of this many bytes to a multiple of four."""
    return _PADDING[length & 3]


def split_lengths(header: bytes | bytearray | memoryview, start: int = 0) -> tuple[int, int]:
    """The lengths that a basic header declares.

    Args:
        header: at least 8 bytes of it, from ``start`` on.
        start: where it begins.

    Returns:
        Bytes of additional header segments, and of the data segment without padding.

    Source: RFC 7143 §11.2.1.5-6.
    """
    (both,) = _LENGTHS.unpack_from(header, start + 4)
    return (both >> 24) * 4, both & MAX_DATA_SEGMENT_LENGTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Pdu(ABC):
    """One protocol data unit.

    Attributes:
        itt: Initiator Task Tag.
        ahs: additional header segments, raw, a multiple of four bytes.
        data: the data segment, without padding.
    """

    OPCODE: ClassVar[Opcode]

    itt: int = RESERVED_TAG
    ahs: bytes = field(default=b"", repr=False)
    data: bytes = b""

    @abstractmethod
    def header(self) -> bytes:
        """The 48 bytes of the basic header segment, its two lengths included."""

    @classmethod
    @abstractmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """The PDU of this kind whose basic header is ``header`` (48 bytes, the right opcode)."""

    @property
    def lengths(self) -> int:
        """TotalAHSLength and DataSegmentLength as the 32-bit word at offset 4."""
        if len(self.ahs) % 4 or len(self.ahs) > 1020:
            raise ValueError(f"additional headers of {len(self.ahs)} bytes")
        if len(self.data) > MAX_DATA_SEGMENT_LENGTH:
            raise ValueError(f"a data segment of {len(self.data)} bytes")
        return len(self.ahs) // 4 << 24 | len(self.data)

    def encode(self, *, header_digest: bool = False, data_digest: bool = False) -> bytes:
        """The whole PDU as it travels.

        Args:
            header_digest: append CRC32C to the headers.
            data_digest: append CRC32C to the data segment, where there is one.

        Raises:
            ValueError: a segment is longer than its length field can say.
        """
        head = self.header() + self.ahs
        pieces = [head]
        if header_digest:
            pieces.append(crc32c_bytes((head,)))
        if self.data:
            body = bytes(self.data) + padding(len(self.data))
            pieces.append(body)
            if data_digest:
                pieces.append(crc32c_bytes((body,)))
        return b"".join(pieces)


_KINDS: dict[int, type[Pdu]] = {}


def register(kind: type[Pdu]) -> type[Pdu]:
    """Make `decode` know a kind of PDU by its ``OPCODE``."""
    _KINDS[kind.OPCODE] = kind
    return kind


def decode(header: bytes, *, ahs: bytes = b"", data: bytes = b"") -> Pdu:
    """The PDU that these bytes are.

    Args:
        header: the basic header segment, 48 bytes.
        ahs: the additional header segments it declares.
        data: the data segment it declares, without padding.

    Raises:
        FormatError: the opcode is unknown, or the lengths are not the declared ones.
    """
    if len(header) != BHS_LENGTH:
        raise FormatError(f"a basic header of {len(header)} bytes")
    kind = _KINDS.get(header[0] & 0x3F)
    if kind is None:
        raise FormatError(f"unknown opcode {header[0] & 0x3F:#04x}")
    if split_lengths(header) != (len(ahs), len(data)):
        raise FormatError("segments whose lengths are not the ones that the header declares")
    return kind.parse(header, ahs=ahs, data=data)


def decode_stream(
    stream: bytes | bytearray | memoryview,
    *,
    header_digest: bool = False,
    data_digest: bool = False,
    max_data: int = MAX_DATA_SEGMENT_LENGTH,
) -> tuple[Pdu, int] | None:
    """The first PDU of a stream, copied out of it.

    Args:
        stream: received bytes, beginning at a PDU.
        header_digest: whether headers carry a digest.
        data_digest: whether data segments carry one.
        max_data: the longest data segment to accept, in bytes.

    Returns:
        The PDU and how many bytes it took, or None while it isn't complete.

    Raises:
        FormatError: unknown opcode, or a data segment longer than ``max_data`` (told before it is waited for).
        DigestError: a digest doesn't match.
    """
    view = memoryview(stream)
    if len(view) < BHS_LENGTH:
        return None
    ahs_length, data_length = split_lengths(view)
    head_end = BHS_LENGTH + ahs_length
    data_start = head_end + (DIGEST_LENGTH if header_digest else 0)
    if header_digest:
        # Before anything is made of the lengths: where the digest is wrong, they may be too.
        if len(view) < data_start:
            return None
        if crc32c_bytes((view[:head_end],)) != view[head_end:data_start]:
            raise DigestError("the header digest of a PDU doesn't match", header=True)
    if data_length > max_data:
        raise FormatError(f"a data segment of {data_length} bytes, but {max_data} is the limit")
    body_end = data_start + data_length + len(padding(data_length))
    with_digest = data_digest and data_length > 0
    end = body_end + (DIGEST_LENGTH if with_digest else 0)
    if len(view) < end:
        return None
    if with_digest and crc32c_bytes((view[data_start:body_end],)) != view[body_end:end]:
        raise DigestError("the data digest of a PDU doesn't match", header=False)
    pdu = decode(
        bytes(view[:BHS_LENGTH]),
        ahs=bytes(view[BHS_LENGTH:head_end]),
        data=bytes(view[data_start : data_start + data_length]),
    )
    return pdu, end
