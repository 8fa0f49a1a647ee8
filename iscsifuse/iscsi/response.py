"""The PDUs that a target sends. Source: RFC 7143 §11.4, 11.6-11.9, 11.11, 11.13, 11.15, 11.17, 11.19.

Each class packs and unpacks the 48 bytes of its own section; the fields are the standard's.
"""

import struct
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from iscsifuse.errors import FormatError
from iscsifuse.iscsi.pdu import BHS_LENGTH, FINAL, NO_LUN, RESERVED_TAG, Opcode, Pdu, decode, register

__all__ = [
    "R2T",
    "AsyncEvent",
    "AsyncMessage",
    "DataIn",
    "LoginResponse",
    "LogoutResponse",
    "NopIn",
    "Reject",
    "RejectReason",
    "ScsiResponse",
    "TargetPdu",
    "TaskManagementResponse",
    "TaskResponse",
    "TextResponse",
]

_SCSI_RESPONSE = struct.Struct(">BBBBI8xIIIIIIII")
_TASK_MANAGEMENT = struct.Struct(">BBBxI8xI4xIII12x")
_LOGIN = struct.Struct(">BBBBI6sHI4xIIIBB10x")
_TEXT = struct.Struct(">BB2xI8sIIIII12x")
_DATA_IN = struct.Struct(">BBxBI8sIIIIIIII")
_LOGOUT = struct.Struct(">BBBxI8xI4xIII4xHH4x")
_R2T = struct.Struct(">BB2xI8sIIIIIIII")
_ASYNC = struct.Struct(">BB2xI8sI4xIIIBBHHH4x")
_REJECT = struct.Struct(">BBBxI8xI4xIIII8x")

_CONTINUE = 0x40
_ACKNOWLEDGE = 0x40
_BIDI_OVERFLOW = 0x10
_BIDI_UNDERFLOW = 0x08
_OVERFLOW = 0x04
_UNDERFLOW = 0x02
_STATUS = 0x01


class TaskResponse(IntEnum):
    """Response of a Task Management Function Response. Source: RFC 7143 §11.6.1."""

    FUNCTION_COMPLETE = 0
    TASK_DOES_NOT_EXIST = 1
    LUN_DOES_NOT_EXIST = 2
    TASK_STILL_ALLEGIANT = 3
    REASSIGNMENT_NOT_SUPPORTED = 4
    FUNCTION_NOT_SUPPORTED = 5
    AUTHORIZATION_FAILED = 6
    FUNCTION_REJECTED = 255


class AsyncEvent(IntEnum):
    """AsyncEvent of an Asynchronous Message. Source: RFC 7143 §11.9.1."""

    SCSI_EVENT = 0
    LOGOUT_REQUESTED = 1
    CONNECTION_DROPPED = 2
    SESSION_DROPPED = 3
    NEGOTIATION_REQUESTED = 4
    TASKS_TERMINATED = 5
    VENDOR_SPECIFIC = 255


class RejectReason(IntEnum):
    """Reason of a Reject. Source: RFC 7143 §11.17.1."""

    RESERVED = 0x01
    DATA_DIGEST_ERROR = 0x02
    SNACK_REJECT = 0x03
    PROTOCOL_ERROR = 0x04
    COMMAND_NOT_SUPPORTED = 0x05
    IMMEDIATE_COMMAND_REJECT = 0x06
    TASK_IN_PROGRESS = 0x07
    INVALID_DATA_ACK = 0x08
    INVALID_PDU_FIELD = 0x09
    LONG_OPERATION_REJECT = 0x0A
    NEGOTIATION_RESET = 0x0B
    WAITING_FOR_LOGOUT = 0x0C


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPdu(Pdu):
    """What all PDUs of a target carry: StatSN and the command window."""

    stat_sn: int = 0
    exp_cmd_sn: int = 0
    max_cmd_sn: int = 0


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class ScsiResponse(TargetPdu):
    """SCSI Response, RFC 7143 §11.4. The data segment holds SenseLength and sense data."""

    OPCODE = Opcode.SCSI_RESPONSE

    bidi_overflow: bool = False
    bidi_underflow: bool = False
    overflow: bool = False
    underflow: bool = False
    response: int = 0
    status: int = 0
    snack_tag: int = 0
    exp_data_sn: int = 0
    bidi_residual_count: int = 0
    residual_count: int = 0

    def header(self) -> bytes:
        """The basic header segment."""
        flags = (
            FINAL | (_BIDI_OVERFLOW if self.bidi_overflow else 0) | (_BIDI_UNDERFLOW if self.bidi_underflow else 0)
        )
        flags |= (_OVERFLOW if self.overflow else 0) | (_UNDERFLOW if self.underflow else 0)
        return _SCSI_RESPONSE.pack(
            self.OPCODE, flags, self.response, self.status, self.lengths, self.itt, self.snack_tag, self.stat_sn,
            self.exp_cmd_sn, self.max_cmd_sn, self.exp_data_sn, self.bidi_residual_count, self.residual_count,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        (_, flags, response, status, _, itt, snack_tag, stat_sn, exp_cmd_sn, max_cmd_sn, exp_data_sn, bidi,
         residual) = _SCSI_RESPONSE.unpack(header)  # fmt: skip
        return cls(
            bidi_overflow=bool(flags & _BIDI_OVERFLOW), bidi_underflow=bool(flags & _BIDI_UNDERFLOW),
            overflow=bool(flags & _OVERFLOW), underflow=bool(flags & _UNDERFLOW), response=response, status=status,
            itt=itt, snack_tag=snack_tag, stat_sn=stat_sn, exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn,
            exp_data_sn=exp_data_sn, bidi_residual_count=bidi, residual_count=residual, ahs=ahs, data=data,
        )  # fmt: skip


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class TaskManagementResponse(TargetPdu):
    """Task Management Function Response, RFC 7143 §11.6."""

    OPCODE = Opcode.TASK_MANAGEMENT_RESPONSE

    response: int = TaskResponse.FUNCTION_COMPLETE

    def header(self) -> bytes:
        """The basic header segment."""
        return _TASK_MANAGEMENT.pack(
            self.OPCODE, FINAL, self.response, self.lengths, self.itt, self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        _, _, response, _, itt, stat_sn, exp_cmd_sn, max_cmd_sn = _TASK_MANAGEMENT.unpack(header)
        return cls(
            response=response, itt=itt, stat_sn=stat_sn, exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn, ahs=ahs,
            data=data,
        )  # fmt: skip


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class LoginResponse(TargetPdu):
    """Login Response, RFC 7143 §11.13.

    Attributes:
        status_class: 0 success, 1 redirection, 2 initiator error, 3 target error.
        status_detail: within the class.
    """

    OPCODE = Opcode.LOGIN_RESPONSE

    transit: bool = False
    cont: bool = False
    csg: int = 0
    nsg: int = 0
    version_max: int = 0
    version_active: int = 0
    isid: bytes = bytes(6)
    tsih: int = 0
    status_class: int = 0
    status_detail: int = 0

    def header(self) -> bytes:
        """The basic header segment."""
        flags = (FINAL if self.transit else 0) | (_CONTINUE if self.cont else 0) | self.csg << 2 | self.nsg
        return _LOGIN.pack(
            self.OPCODE, flags, self.version_max, self.version_active, self.lengths, self.isid, self.tsih, self.itt,
            self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn, self.status_class, self.status_detail,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        (_, flags, vmax, vactive, _, isid, tsih, itt, stat_sn, exp_cmd_sn, max_cmd_sn, status_class,
         status_detail) = _LOGIN.unpack(header)  # fmt: skip
        return cls(
            transit=bool(flags & FINAL), cont=bool(flags & _CONTINUE), csg=flags >> 2 & 3, nsg=flags & 3,
            version_max=vmax, version_active=vactive, isid=isid, tsih=tsih, itt=itt, stat_sn=stat_sn,
            exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn, status_class=status_class, status_detail=status_detail,
            ahs=ahs, data=data,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _TextLike(TargetPdu):
    """What Text Response and NOP-In share: LUN and TTT in the same places."""

    final: bool = True
    cont: bool = False
    lun: bytes = NO_LUN
    ttt: int = RESERVED_TAG

    def header(self) -> bytes:
        """The basic header segment."""
        flags = (FINAL if self.final else 0) | (_CONTINUE if self.cont else 0)
        return _TEXT.pack(
            self.OPCODE, flags, self.lengths, self.lun, self.itt, self.ttt, self.stat_sn, self.exp_cmd_sn,
            self.max_cmd_sn,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        _, flags, _, lun, itt, ttt, stat_sn, exp_cmd_sn, max_cmd_sn = _TEXT.unpack(header)
        return cls(
            final=bool(flags & FINAL), cont=bool(flags & _CONTINUE), lun=lun, itt=itt, ttt=ttt, stat_sn=stat_sn,
            exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn, ahs=ahs, data=data,
        )  # fmt: skip


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class TextResponse(_TextLike):
    """Text Response, RFC 7143 §11.11."""

    OPCODE = Opcode.TEXT_RESPONSE


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class NopIn(_TextLike):
    """NOP-In, RFC 7143 §11.19: the answer to a ping, a target's ping, or just news of the window."""

    OPCODE = Opcode.NOP_IN


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class DataIn(TargetPdu):
    """SCSI Data-In, RFC 7143 §11.7.

    Attributes:
        acknowledge: the A bit.
        has_status: the S bit: status, StatSN and residual count are valid.
    """

    OPCODE = Opcode.DATA_IN

    final: bool = True
    acknowledge: bool = False
    overflow: bool = False
    underflow: bool = False
    has_status: bool = False
    status: int = 0
    lun: bytes = NO_LUN
    ttt: int = RESERVED_TAG
    data_sn: int = 0
    buffer_offset: int = 0
    residual_count: int = 0

    def header(self) -> bytes:
        """The basic header segment."""
        flags = (FINAL if self.final else 0) | (_ACKNOWLEDGE if self.acknowledge else 0)
        flags |= (_OVERFLOW if self.overflow else 0) | (_UNDERFLOW if self.underflow else 0)
        flags |= _STATUS if self.has_status else 0
        return _DATA_IN.pack(
            self.OPCODE, flags, self.status, self.lengths, self.lun, self.itt, self.ttt, self.stat_sn,
            self.exp_cmd_sn, self.max_cmd_sn, self.data_sn, self.buffer_offset, self.residual_count,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        (_, flags, status, _, lun, itt, ttt, stat_sn, exp_cmd_sn, max_cmd_sn, data_sn, offset,
         residual) = _DATA_IN.unpack(header)  # fmt: skip
        return cls(
            final=bool(flags & FINAL), acknowledge=bool(flags & _ACKNOWLEDGE), overflow=bool(flags & _OVERFLOW),
            underflow=bool(flags & _UNDERFLOW), has_status=bool(flags & _STATUS), status=status, lun=lun, itt=itt,
            ttt=ttt, stat_sn=stat_sn, exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn, data_sn=data_sn,
            buffer_offset=offset, residual_count=residual, ahs=ahs, data=data,
        )  # fmt: skip


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class LogoutResponse(TargetPdu):
    """Logout Response, RFC 7143 §11.15.

    Attributes:
        time2wait: seconds before a new login may be tried.
        time2retain: seconds that tasks are kept.
    """

    OPCODE = Opcode.LOGOUT_RESPONSE

    response: int = 0
    time2wait: int = 0
    time2retain: int = 0

    def header(self) -> bytes:
        """The basic header segment."""
        return _LOGOUT.pack(
            self.OPCODE, FINAL, self.response, self.lengths, self.itt, self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn,
            self.time2wait, self.time2retain,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        _, _, response, _, itt, stat_sn, exp_cmd_sn, max_cmd_sn, wait, retain = _LOGOUT.unpack(header)
        return cls(
            response=response, itt=itt, stat_sn=stat_sn, exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn, time2wait=wait,
            time2retain=retain, ahs=ahs, data=data,
        )  # fmt: skip


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class R2T(TargetPdu):
    """Ready To Transfer, RFC 7143 §11.8."""

    OPCODE = Opcode.R2T

    lun: bytes = NO_LUN
    ttt: int = RESERVED_TAG
    r2t_sn: int = 0
    buffer_offset: int = 0
    desired_data_transfer_length: int = 0

    def header(self) -> bytes:
        """The basic header segment."""
        return _R2T.pack(
            self.OPCODE, FINAL, self.lengths, self.lun, self.itt, self.ttt, self.stat_sn, self.exp_cmd_sn,
            self.max_cmd_sn, self.r2t_sn, self.buffer_offset, self.desired_data_transfer_length,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        _, _, _, lun, itt, ttt, stat_sn, exp_cmd_sn, max_cmd_sn, r2t_sn, offset, length = _R2T.unpack(header)
        return cls(
            lun=lun, itt=itt, ttt=ttt, stat_sn=stat_sn, exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn, r2t_sn=r2t_sn,
            buffer_offset=offset, desired_data_transfer_length=length, ahs=ahs, data=data,
        )  # fmt: skip


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncMessage(TargetPdu):
    """Asynchronous Message, RFC 7143 §11.9. Event 0 carries sense data like a SCSI Response."""

    OPCODE = Opcode.ASYNC_MESSAGE

    lun: bytes = NO_LUN
    event: int = AsyncEvent.SCSI_EVENT
    vendor_code: int = 0
    parameter1: int = 0
    parameter2: int = 0
    parameter3: int = 0

    def header(self) -> bytes:
        """The basic header segment."""
        return _ASYNC.pack(
            self.OPCODE, FINAL, self.lengths, self.lun, self.itt, self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn,
            self.event, self.vendor_code, self.parameter1, self.parameter2, self.parameter3,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        _, _, _, lun, itt, stat_sn, exp_cmd_sn, max_cmd_sn, event, vcode, p1, p2, p3 = _ASYNC.unpack(header)
        return cls(
            lun=lun, itt=itt, stat_sn=stat_sn, exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn, event=event,
            vendor_code=vcode, parameter1=p1, parameter2=p2, parameter3=p3, ahs=ahs, data=data,
        )  # fmt: skip


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Reject(TargetPdu):
    """Reject, RFC 7143 §11.17. The data segment holds the header of the rejected PDU."""

    OPCODE = Opcode.REJECT

    reason: int = RejectReason.PROTOCOL_ERROR
    data_sn: int = 0

    @property
    def rejected(self) -> Pdu | None:
        """The rejected PDU without its data segment; None where what came of its header says nothing."""
        with suppress(FormatError):
            if len(self.data) >= BHS_LENGTH:
                return decode(self.data[:4] + bytes(4) + self.data[8:BHS_LENGTH])
        return None

    @property
    def rejected_length(self) -> int:
        """Bytes of the data segment that the rejected PDU had; 0 where its header didn't come whole."""
        return int.from_bytes(self.data[5:8], "big") if len(self.data) >= BHS_LENGTH else 0

    def header(self) -> bytes:
        """The basic header segment."""
        return _REJECT.pack(
            self.OPCODE, FINAL, self.reason, self.lengths, self.itt, self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn,
            self.data_sn,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        _, _, reason, _, itt, stat_sn, exp_cmd_sn, max_cmd_sn, data_sn = _REJECT.unpack(header)
        return cls(
            reason=reason, itt=itt, stat_sn=stat_sn, exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn, data_sn=data_sn,
            ahs=ahs, data=data,
        )  # fmt: skip
