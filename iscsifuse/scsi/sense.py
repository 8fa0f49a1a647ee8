"""Sense data: what a target says about a command that didn't go well.

Two formats say the same things: *fixed* (response codes 70h and 71h) with everything at its offset, and
*descriptor* (72h and 73h) with a list of typed pieces. 71h and 73h are *deferred*: they tell of an earlier
command, and the one that they came with was not executed.

A target may cut its sense data anywhere. Only the sense key has to be there; what the data doesn't reach is
0 or None. The INFORMATION field, an LBA as a rule, counts only with its VALID bit, since it decides which
blocks are believed good.

7Fh is a vendor's own format: nothing in it can be read, so its key is VENDOR SPECIFIC, which no policy takes for a
success.

Source: SPC-4 §4.5.
"""

import struct
from dataclasses import dataclass, field
from enum import IntEnum

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi import asc as codes
from iscsifuse.scsi._fields import Buffer, pack, require

__all__ = ["Sense", "SenseKey"]

_FIXED = 0x70
_FIXED_DEFERRED = 0x71
_DESCRIPTOR = 0x72
_DESCRIPTOR_DEFERRED = 0x73
_VENDOR = 0x7F

# response code, obsolete, key, INFORMATION, additional length, COMMAND-SPECIFIC, ASC, ASCQ, FRU, sense key
# specific
_FIXED_LAYOUT = struct.Struct(">BxBIBIBBB3s")
# response code, key, ASC, ASCQ, flags, additional length
_DESCRIPTOR_LAYOUT = struct.Struct(">BBBBB2xB")
# The additional length counts what follows byte 7 in both.
_COUNTED = 8

_VALID = 0x80
_FILEMARK = 0x80
_EOM = 0x40
_ILI = 0x20
_OVERFLOW_FIXED = 0x10
_OVERFLOW_DESCRIPTOR = 0x80
_SKSV = 0x80


class _Kind(IntEnum):
    """Descriptor types. Source: SPC-4 §4.5.2.1; SBC-4 for the last."""

    INFORMATION = 0x00
    COMMAND_SPECIFIC = 0x01
    SENSE_KEY_SPECIFIC = 0x02
    FIELD_REPLACEABLE_UNIT = 0x03
    STREAM = 0x04
    BLOCK = 0x05
    DIRECT_ACCESS = 0x0D


# type, additional length, then the value at the offset that the type has it
_NUMBER_PIECE = struct.Struct(">BBBxQ")
_SKS_PIECE = struct.Struct(">BB2x3sx")
_BYTE_PIECE = struct.Struct(">BBxB")


class SenseKey(IntEnum):
    """What kind of thing happened. Source: SPC-4 §4.5.6."""

    NO_SENSE = 0x0
    RECOVERED_ERROR = 0x1
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    HARDWARE_ERROR = 0x4
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    BLANK_CHECK = 0x8
    VENDOR_SPECIFIC = 0x9
    COPY_ABORTED = 0xA
    ABORTED_COMMAND = 0xB
    EQUAL = 0xC
    VOLUME_OVERFLOW = 0xD
    MISCOMPARE = 0xE
    COMPLETED = 0xF


@dataclass(frozen=True, slots=True, kw_only=True)
class Sense:
    """Sense data, whichever format it came in.

    Attributes:
        key: sense key.
        asc: additional sense code.
        ascq: additional sense code qualifier.
        response_code: 70h or 71h (fixed), 72h or 73h (descriptor), 7Fh (vendor specific).
        information: what the INFORMATION field says, or None where it isn't valid; the first bad LBA after
            a medium error.
        command_specific: COMMAND-SPECIFIC INFORMATION, or None where there is none (fixed format can't tell
            0 from none).
        filemark: a tape's filemark.
        eom: end of medium.
        ili: incorrect length indicator.
        overflow: the target had more to say than it could send.
        fru: field replaceable unit, 0 for none.
        sks: the three sense key specific bytes where they are valid (SKSV), else None.
        raw: the data as received; not compared.
    """

    key: SenseKey
    asc: int = 0
    ascq: int = 0
    response_code: int = _FIXED
    information: int | None = None
    command_specific: int | None = None
    filemark: bool = False
    eom: bool = False
    ili: bool = False
    overflow: bool = False
    fru: int = 0
    sks: bytes | None = None
    raw: bytes = field(default=b"", compare=False, repr=False)

    @property
    def deferred(self) -> bool:
        """Whether this tells of an earlier command; the current one was not executed then."""
        return self.response_code in (_FIXED_DEFERRED, _DESCRIPTOR_DEFERRED)

    @property
    def progress(self) -> float | None:
        """How far a format, a self-test or the like has come, 0 to 1, or None. Source: SPC-4 §4.5.2.4.4."""
        if self.sks is None or self.key not in (SenseKey.NO_SENSE, SenseKey.NOT_READY):
            return None
        return int.from_bytes(self.sks[1:], "big") / 65536

    @property
    def field_pointer(self) -> int | None:
        """Of an ILLEGAL REQUEST, the byte that was refused, or None. Source: SPC-4 §4.5.2.4.2."""
        if self.sks is None or self.key is not SenseKey.ILLEGAL_REQUEST:
            return None
        return int.from_bytes(self.sks[1:], "big")

    @classmethod
    def decode(cls, data: Buffer) -> "Sense":
        """Reads sense data.

        Args:
            data: from the response code on (without the length that iSCSI puts in front).

        Raises:
            ParameterDataError: the data ends before the sense key, or its response code isn't one of sense
            data.

        Source: SPC-4 §4.5.1.
        """
        received = require(data, length=1, what="sense data")
        code = received[0] & 0x7F
        if code in (_FIXED, _FIXED_DEFERRED):
            return _decode_fixed(received)
        if code in (_DESCRIPTOR, _DESCRIPTOR_DEFERRED):
            return _decode_descriptors(received)
        if code == _VENDOR:
            return cls(key=SenseKey.VENDOR_SPECIFIC, response_code=code, raw=received)
        raise ParameterDataError(f"sense data with response code {code:02X}h")

    def encode(self) -> bytes:
        """Sense data in the format that ``response_code`` names.

        Raises:
            ValueError: a value doesn't fit its field, or the response code isn't 70h to 73h.

        Source: SPC-4 §4.5.2, §4.5.3.
        """
        if self.sks is not None and not (len(self.sks) == 3 and self.sks[0] & _SKSV):
            raise ValueError("sense key specific data has three bytes, and its first bit is set")
        if self.response_code in (_FIXED, _FIXED_DEFERRED):
            return self._encode_fixed()
        if self.response_code in (_DESCRIPTOR, _DESCRIPTOR_DEFERRED):
            return self._encode_descriptors()
        raise ValueError(f"there is no way to encode response code {self.response_code:02X}h")

    def _encode_fixed(self) -> bytes:
        return pack(
            _FIXED_LAYOUT,
            self.response_code | (_VALID if self.information is not None else 0),
            self.key
            | (_FILEMARK if self.filemark else 0)
            | (_EOM if self.eom else 0)
            | (_ILI if self.ili else 0)
            | (_OVERFLOW_FIXED if self.overflow else 0),
            self.information or 0,
            _FIXED_LAYOUT.size - _COUNTED,
            self.command_specific or 0,
            self.asc,
            self.ascq,
            self.fru,
            self.sks or b"",
        )

    def _encode_descriptors(self) -> bytes:
        pieces = b""
        if self.information is not None:
            pieces += pack(_NUMBER_PIECE, _Kind.INFORMATION, 10, _VALID, self.information)
        if self.command_specific is not None:
            pieces += pack(_NUMBER_PIECE, _Kind.COMMAND_SPECIFIC, 10, 0, self.command_specific)
        if self.sks is not None:
            pieces += pack(_SKS_PIECE, _Kind.SENSE_KEY_SPECIFIC, 6, self.sks)
        if self.fru:
            pieces += pack(_BYTE_PIECE, _Kind.FIELD_REPLACEABLE_UNIT, 2, self.fru)
        if self.filemark or self.eom:
            flags = self.filemark << 7 | self.eom << 6 | self.ili << 5
            pieces += pack(_BYTE_PIECE, _Kind.STREAM, 2, flags)
        elif self.ili:
            pieces += pack(_BYTE_PIECE, _Kind.BLOCK, 2, _ILI)
        return (
            pack(
                _DESCRIPTOR_LAYOUT,
                self.response_code,
                self.key,
                self.asc,
                self.ascq,
                _OVERFLOW_DESCRIPTOR if self.overflow else 0,
                len(pieces),
            )
            + pieces
        )

    def describe(self) -> str:
        """Words for people: "MEDIUM ERROR, unrecovered read error (11h/00h)"."""
        if self.response_code == _VENDOR:
            return f"vendor specific sense data {self.raw[:32].hex()}"
        key = self.key.name.replace("_", " ")
        text = f"{key}, {codes.words(self.asc, self.ascq)} ({self.asc:02X}h/{self.ascq:02X}h)"
        pointer = self.field_pointer
        if self.sks is not None and pointer is not None:
            text += f", byte {pointer} of the {'CDB' if self.sks[0] & 0x40 else 'parameter data'}"
        progress = self.progress
        if progress is not None:
            text += f", {progress:.0%} done"
        return f"deferred error: {text}" if self.deferred else text


def _decode_fixed(received: bytes) -> Sense:
    require(received, length=3, what="sense data")
    end = _COUNTED + received[7] if len(received) > 7 else len(received)
    code, flags, information, _, command_specific, asc, ascq, fru, sks = _FIXED_LAYOUT.unpack(
        received[: min(end, _FIXED_LAYOUT.size)].ljust(_FIXED_LAYOUT.size, b"\0")
    )
    # Half a number is another number: fields that weren't received whole count as absent.
    there = min(end, len(received))
    return Sense(
        key=SenseKey(flags & 0x0F),
        asc=asc,
        ascq=ascq,
        response_code=code & 0x7F,
        information=information if code & _VALID and there >= 7 else None,
        command_specific=(command_specific or None) if there >= 12 else None,
        filemark=bool(flags & _FILEMARK),
        eom=bool(flags & _EOM),
        ili=bool(flags & _ILI),
        overflow=bool(flags & _OVERFLOW_FIXED),
        fru=fru,
        sks=sks if there >= _FIXED_LAYOUT.size and sks[0] & _SKSV else None,
        raw=received,
    )


def _decode_descriptors(received: bytes) -> Sense:
    require(received, length=2, what="sense data")
    code, key, asc, ascq, flags, additional = _DESCRIPTOR_LAYOUT.unpack(
        received[: _DESCRIPTOR_LAYOUT.size].ljust(_DESCRIPTOR_LAYOUT.size, b"\0")
    )
    information: int | None = None
    command_specific: int | None = None
    sks: bytes | None = None
    filemark = eom = ili = False
    fru = 0
    end = min(_COUNTED + additional, len(received))
    offset = _COUNTED
    while offset + 2 <= end:
        kind = received[offset]
        size = 2 + received[offset + 1]
        body = received[offset : min(offset + size, end)]
        offset += size
        # Where two descriptors say the same thing (a direct-access one beside others), the later is taken.
        match kind, len(body):
            case _Kind.INFORMATION, length if length >= 12:
                information = _number(body, 4) if body[2] & _VALID else information
            case _Kind.COMMAND_SPECIFIC, length if length >= 12:
                command_specific = _number(body, 4)
            case _Kind.SENSE_KEY_SPECIFIC, length if length >= 7:
                sks = body[4:7] if body[4] & _SKSV else sks
            case _Kind.FIELD_REPLACEABLE_UNIT, length if length >= 4:
                fru = body[3]
            case _Kind.STREAM, length if length >= 4:
                filemark, eom, ili = (bool(body[3] & bit) for bit in (_FILEMARK, _EOM, _ILI))
            case _Kind.BLOCK, length if length >= 4:
                ili = bool(body[3] & _ILI)
            case _Kind.DIRECT_ACCESS, length if length >= 24:
                information = _number(body, 8) if body[2] & _VALID else information
                command_specific = _number(body, 16)
                sks = body[4:7] if body[4] & _SKSV else sks
                fru = body[7]
                ili = bool(body[2] & _ILI)
            case _:
                pass  # a type that says nothing needed here, or one that was cut
    return Sense(
        key=SenseKey(key & 0x0F),
        asc=asc,
        ascq=ascq,
        response_code=code & 0x7F,
        information=information,
        command_specific=command_specific,
        filemark=filemark,
        eom=eom,
        ili=ili,
        overflow=bool(flags & _OVERFLOW_DESCRIPTOR),
        fru=fru,
        sks=sks,
        raw=received,
    )


def _number(body: bytes, offset: int) -> int:
    return int.from_bytes(body[offset : offset + 8], "big")
