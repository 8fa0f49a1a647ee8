"""The PDUs that an initiator sends. Source: RFC 7143 §11.3, 11.5, 11.7, 11.10, 11.12, 11.14, 11.16, 11.18.

Each class packs and unpacks the 48 bytes of its own section; the fields are the standard's.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from iscsifuse.iscsi.pdu import FINAL, IMMEDIATE, NO_LUN, RESERVED_TAG, Opcode, Pdu, register

__all__ = [
    "DataOut",
    "LoginRequest",
    "LogoutReason",
    "LogoutRequest",
    "NopOut",
    "ScsiCommand",
    "SnackRequest",
    "Stage",
    "TaskAttribute",
    "TaskFunction",
    "TaskManagementRequest",
    "TextRequest",
]

_SCSI_COMMAND = struct.Struct(">BB2xI8sIIII16s")
_TASK_MANAGEMENT = struct.Struct(">BB2xI8sIIIIII8x")
_LOGIN = struct.Struct(">BBBBI6sHIH2xII16x")
_TEXT = struct.Struct(">BB2xI8sIIII16x")
_DATA_OUT = struct.Struct(">BB2xI8sII4xI4xII4x")
_LOGOUT = struct.Struct(">BB2xI8xIH2xII16x")
_SNACK = struct.Struct(">BB2xI8sII4xI8xII")

_CONTINUE = 0x40
_READ = 0x40
_WRITE = 0x20


class TaskAttribute(IntEnum):
    """ATTR of a SCSI Command. Source: RFC 7143 §11.3.1."""

    UNTAGGED = 0
    SIMPLE = 1
    ORDERED = 2
    HEAD_OF_QUEUE = 3
    ACA = 4


class TaskFunction(IntEnum):
    """Function of a Task Management Function Request. Source: RFC 7143 §11.5.1."""

    ABORT_TASK = 1
    ABORT_TASK_SET = 2
    CLEAR_ACA = 3
    CLEAR_TASK_SET = 4
    LOGICAL_UNIT_RESET = 5
    TARGET_WARM_RESET = 6
    TARGET_COLD_RESET = 7
    TASK_REASSIGN = 8


class LogoutReason(IntEnum):
    """Reason Code of a Logout Request. Source: RFC 7143 §11.14.1."""

    CLOSE_SESSION = 0
    CLOSE_CONNECTION = 1
    REMOVE_CONNECTION_FOR_RECOVERY = 2


class Stage(IntEnum):
    """CSG and NSG of the login phase. Source: RFC 7143 §11.12.3."""

    SECURITY_NEGOTIATION = 0
    LOGIN_OPERATIONAL_NEGOTIATION = 1
    FULL_FEATURE_PHASE = 3


def _opcode(opcode: Opcode, *, immediate: bool) -> int:
    return opcode | IMMEDIATE if immediate else opcode


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class ScsiCommand(Pdu):
    """SCSI Command, RFC 7143 §11.3.

    Attributes:
        attribute: the raw three bits of ATTR.
        expected_data_transfer_length: bytes that the command moves.
        cdb: 16 bytes; shorter ones are padded with zeros.
    """

    OPCODE = Opcode.SCSI_COMMAND

    immediate: bool = False
    final: bool = True
    read: bool = False
    write: bool = False
    attribute: int = TaskAttribute.SIMPLE
    lun: bytes = NO_LUN
    expected_data_transfer_length: int = 0
    cmd_sn: int = 0
    exp_stat_sn: int = 0
    cdb: bytes = bytes(16)

    def header(self) -> bytes:
        """The basic header segment."""
        flags = self.attribute
        flags |= (FINAL if self.final else 0) | (_READ if self.read else 0) | (_WRITE if self.write else 0)
        return _SCSI_COMMAND.pack(
            _opcode(self.OPCODE, immediate=self.immediate), flags, self.lengths, self.lun, self.itt,
            self.expected_data_transfer_length, self.cmd_sn, self.exp_stat_sn, self.cdb,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        op, flags, _, lun, itt, length, cmd_sn, exp_stat_sn, cdb = _SCSI_COMMAND.unpack(header)
        return cls(
            immediate=bool(op & IMMEDIATE), final=bool(flags & FINAL), read=bool(flags & _READ),
            write=bool(flags & _WRITE), attribute=flags & 7, lun=lun, itt=itt, expected_data_transfer_length=length,
            cmd_sn=cmd_sn, exp_stat_sn=exp_stat_sn, cdb=cdb, ahs=ahs, data=data,
        )  # fmt: skip


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class TaskManagementRequest(Pdu):
    """Task Management Function Request, RFC 7143 §11.5.

    Attributes:
        referenced_task_tag: ITT of the task that ABORT TASK means.
        ref_cmd_sn: CmdSN of that task.
    """

    OPCODE = Opcode.TASK_MANAGEMENT_REQUEST

    immediate: bool = True
    function: int = TaskFunction.ABORT_TASK
    lun: bytes = NO_LUN
    referenced_task_tag: int = RESERVED_TAG
    cmd_sn: int = 0
    exp_stat_sn: int = 0
    ref_cmd_sn: int = 0
    exp_data_sn: int = 0

    def header(self) -> bytes:
        """The basic header segment."""
        return _TASK_MANAGEMENT.pack(
            _opcode(self.OPCODE, immediate=self.immediate), FINAL | self.function, self.lengths, self.lun, self.itt,
            self.referenced_task_tag, self.cmd_sn, self.exp_stat_sn, self.ref_cmd_sn, self.exp_data_sn,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        op, flags, _, lun, itt, rtt, cmd_sn, exp_stat_sn, ref, exp_data_sn = _TASK_MANAGEMENT.unpack(header)
        return cls(
            immediate=bool(op & IMMEDIATE), function=flags & 0x7F, lun=lun, itt=itt, referenced_task_tag=rtt,
            cmd_sn=cmd_sn, exp_stat_sn=exp_stat_sn, ref_cmd_sn=ref, exp_data_sn=exp_data_sn, ahs=ahs, data=data,
        )  # fmt: skip


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class LoginRequest(Pdu):
    """Login Request, RFC 7143 §11.12. It is always immediate.

    Attributes:
        transit: the T bit.
        cont: the C bit: the text goes on in the next PDU.
        csg: current stage.
        nsg: next stage, meaningful with T only.
        isid: 6 bytes.
    """

    OPCODE = Opcode.LOGIN_REQUEST

    transit: bool = False
    cont: bool = False
    csg: int = Stage.SECURITY_NEGOTIATION
    nsg: int = Stage.SECURITY_NEGOTIATION
    version_max: int = 0
    version_min: int = 0
    isid: bytes = bytes(6)
    tsih: int = 0
    cid: int = 0
    cmd_sn: int = 0
    exp_stat_sn: int = 0

    def header(self) -> bytes:
        """The basic header segment."""
        flags = (FINAL if self.transit else 0) | (_CONTINUE if self.cont else 0) | self.csg << 2 | self.nsg
        return _LOGIN.pack(
            self.OPCODE | IMMEDIATE, flags, self.version_max, self.version_min, self.lengths, self.isid, self.tsih,
            self.itt, self.cid, self.cmd_sn, self.exp_stat_sn,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        _, flags, vmax, vmin, _, isid, tsih, itt, cid, cmd_sn, exp_stat_sn = _LOGIN.unpack(header)
        return cls(
            transit=bool(flags & FINAL), cont=bool(flags & _CONTINUE), csg=flags >> 2 & 3, nsg=flags & 3,
            version_max=vmax, version_min=vmin, isid=isid, tsih=tsih, itt=itt, cid=cid, cmd_sn=cmd_sn,
            exp_stat_sn=exp_stat_sn, ahs=ahs, data=data,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _TextLike(Pdu):
    """What Text Request and NOP-Out share: LUN, TTT, CmdSN and ExpStatSN in the same places."""

    immediate: bool = False
    final: bool = True
    cont: bool = False
    lun: bytes = NO_LUN
    ttt: int = RESERVED_TAG
    cmd_sn: int = 0
    exp_stat_sn: int = 0

    def header(self) -> bytes:
        """The basic header segment."""
        flags = (FINAL if self.final else 0) | (_CONTINUE if self.cont else 0)
        return _TEXT.pack(
            _opcode(self.OPCODE, immediate=self.immediate), flags, self.lengths, self.lun, self.itt, self.ttt,
            self.cmd_sn, self.exp_stat_sn,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        op, flags, _, lun, itt, ttt, cmd_sn, exp_stat_sn = _TEXT.unpack(header)
        return cls(
            immediate=bool(op & IMMEDIATE), final=bool(flags & FINAL), cont=bool(flags & _CONTINUE), lun=lun, itt=itt,
            ttt=ttt, cmd_sn=cmd_sn, exp_stat_sn=exp_stat_sn, ahs=ahs, data=data,
        )  # fmt: skip


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest(_TextLike):
    """Text Request, RFC 7143 §11.10."""

    OPCODE = Opcode.TEXT_REQUEST


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class NopOut(_TextLike):
    """NOP-Out, RFC 7143 §11.18: a ping, or the answer to a target's ping."""

    OPCODE = Opcode.NOP_OUT


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class DataOut(Pdu):
    """SCSI Data-Out, RFC 7143 §11.7."""

    OPCODE = Opcode.DATA_OUT

    final: bool = True
    lun: bytes = NO_LUN
    ttt: int = RESERVED_TAG
    exp_stat_sn: int = 0
    data_sn: int = 0
    buffer_offset: int = 0

    def header(self) -> bytes:
        """The basic header segment."""
        return _DATA_OUT.pack(
            self.OPCODE, FINAL if self.final else 0, self.lengths, self.lun, self.itt, self.ttt, self.exp_stat_sn,
            self.data_sn, self.buffer_offset,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        _, flags, _, lun, itt, ttt, exp_stat_sn, data_sn, offset = _DATA_OUT.unpack(header)
        return cls(
            final=bool(flags & FINAL), lun=lun, itt=itt, ttt=ttt, exp_stat_sn=exp_stat_sn, data_sn=data_sn,
            buffer_offset=offset, ahs=ahs, data=data,
        )  # fmt: skip


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class LogoutRequest(Pdu):
    """Logout Request, RFC 7143 §11.14."""

    OPCODE = Opcode.LOGOUT_REQUEST

    immediate: bool = True
    reason: int = LogoutReason.CLOSE_SESSION
    cid: int = 0
    cmd_sn: int = 0
    exp_stat_sn: int = 0

    def header(self) -> bytes:
        """The basic header segment."""
        return _LOGOUT.pack(
            _opcode(self.OPCODE, immediate=self.immediate), FINAL | self.reason, self.lengths, self.itt, self.cid,
            self.cmd_sn, self.exp_stat_sn,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        op, flags, _, itt, cid, cmd_sn, exp_stat_sn = _LOGOUT.unpack(header)
        return cls(
            immediate=bool(op & IMMEDIATE), reason=flags & 0x7F, itt=itt, cid=cid, cmd_sn=cmd_sn,
            exp_stat_sn=exp_stat_sn, ahs=ahs, data=data,
        )  # fmt: skip


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class SnackRequest(Pdu):
    """SNACK Request, RFC 7143 §11.16. Decoded for the sake of captures: error recovery level 0 has no use for it."""

    OPCODE = Opcode.SNACK_REQUEST

    snack_type: int = 0
    lun: bytes = NO_LUN
    ttt: int = RESERVED_TAG
    exp_stat_sn: int = 0
    beg_run: int = 0
    run_length: int = 0

    def header(self) -> bytes:
        """The basic header segment."""
        return _SNACK.pack(
            self.OPCODE, FINAL | self.snack_type, self.lengths, self.lun, self.itt, self.ttt, self.exp_stat_sn,
            self.beg_run, self.run_length,
        )  # fmt: skip

    @classmethod
    def parse(cls, header: bytes, *, ahs: bytes, data: bytes) -> Self:
        """From the basic header segment."""
        _, flags, _, lun, itt, ttt, exp_stat_sn, beg_run, run_length = _SNACK.unpack(header)
        return cls(
            snack_type=flags & 0x0F, lun=lun, itt=itt, ttt=ttt, exp_stat_sn=exp_stat_sn, beg_run=beg_run,
            run_length=run_length, ahs=ahs, data=data,
        )  # fmt: skip
