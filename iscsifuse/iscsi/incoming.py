"""What the target says in the full feature phase: each PDU is judged, then takes effect.

::

    header ──on_header──> numbers judged, task looked up ──> its memory, while data arrives ──on_data──┐
                │                                                                                     v
                └──(no data)────────────────────────────────────────> done: an event, or an answer of ours

A PDU with an Initiator Task Tag belongs to a `Task` (SCSI commands) or to a request (NOP-Out, task management,
logout, text); an unknown tag belongs to nobody and completes nothing: its data goes to a sink.

Source: RFC 7143 §4.2, §7, §11.
"""

import struct
from collections.abc import Callable
from typing import Protocol

from iscsifuse.errors import DigestError, FormatError, ProtocolError, TransferError
from iscsifuse.iscsi.framing import FrameReceiver
from iscsifuse.iscsi.numbers import Numbers
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import FINAL, RESERVED_TAG, Opcode, Pdu, decode
from iscsifuse.iscsi.request import DataOut, NopOut
from iscsifuse.iscsi.response import (
    AsyncMessage,
    LogoutResponse,
    NopIn,
    Reject,
    RejectReason,
    TaskManagementResponse,
    TextResponse,
)
from iscsifuse.iscsi.serial import MASK
from iscsifuse.iscsi.tasks import Task
from iscsifuse.iscsi.window import CommandWindow
from iscsifuse.quick import take_reads

__all__ = ["MAX_TEXT_LENGTH", "Answering", "Event", "Incoming"]

Event = Task | NopIn | TaskManagementResponse | LogoutResponse | TextResponse | AsyncMessage | Reject
"""What `Incoming.events` holds: a task that is done, or a PDU that someone has to act on."""

MAX_TEXT_LENGTH = 1 << 20
"""Longest data segment that isn't Data-In, in bytes: sense data, text, ping data, rejected headers are all small."""

_DATA_IN = struct.Struct(">BBBBI8sIIIIIIII")
_RESPONSE = struct.Struct(">BBBBI8xIIIIIIII")
_R2T = struct.Struct(">BBHI8sIIIIIIII")
_DATA_IN_OPCODE = int(Opcode.DATA_IN)
_STATUS = 0x01
_UNDERFLOW = 0x02
_OVERFLOW = 0x04
_GOOD = 0x00
_CHECK_CONDITION = 0x02


class Answering(Protocol):
    """Who sends what the target asks for."""

    def answer_r2t(self, task: Task, piece: memoryview, *, ttt: int, offset: int) -> None:
        """Send the part of a write that an R2T asks for.

        Args:
            task: the write.
            piece: what was asked for.
            ttt: tag of the R2T.
            offset: where in the command's data the piece begins, in bytes.

        Raises:
            ProtocolError: too many R2Ts for this command are unanswered already.
        """
        ...

    def request(self, pdu: NopOut) -> int:
        """Send the answer to a ping; see `Connection.request`."""
        ...


class Incoming:
    """The receiving side of one connection; the handler of its own `FrameReceiver`.

    Invariants:

    * A response counts only in the order of its StatSN; anything else raises, and the connection is finished.
    * Memory of a task is written to only while the task is in ``tasks``; whoever takes one out calls `forget`.
    * Each task is taken out of ``tasks`` here once, when its status and all of its data are there, and is then an
      event. A request is taken out of ``requests`` by its answer or its rejection.

    Args:
        parameters: what the login negotiated.
        window: every PDU tells it how far commands may go.
        tasks: SCSI commands that were sent, by tag; shared with whoever sends them.
        requests: opcodes of the other requests, by tag; likewise.
        numbers: the StatSN that is due; shared with whoever acknowledges it.
        answering: sends what PDUs ask for, until `stop_answering`.

    Attributes:
        receiver: takes the bytes.
        events: what happened, in order; whoever takes them out takes the list.
    """

    def __init__(
        self,
        parameters: NegotiatedParameters,
        *,
        window: CommandWindow,
        tasks: dict[int, Task],
        requests: dict[int, Opcode],
        numbers: Numbers,
        answering: Answering,
    ) -> None:
        self.events: list[Event] = []
        self._numbers = numbers
        self._window = window
        self._tasks = tasks
        self._requests = requests
        self._answering: Answering | None = answering
        self._max_burst_length = parameters.max_burst_length
        self._longest_answer = parameters.target_max_recv_data_segment_length
        self._max_data = max(parameters.max_recv_data_segment_length, 8192)
        self.receiver = FrameReceiver(
            self,
            header_digest=parameters.header_digest,
            data_digest=parameters.data_digest,
            max_data=self._max_data,
            take=self._short_cut(parameters),
        )
        # The frame whose data segment is being received:
        self._header = b""
        self._segment: bytearray | None = None
        self._data_in: Task | None = None
        self._data_in_status: tuple[int, int, int] | None = None  # flags, status, residual count
        self._response: Task | None = None

    def _short_cut(self, parameters: NegotiatedParameters) -> Callable[[memoryview, int, int], int] | None:
        """How to take in frames without the steps below, as long as each brings all of a read, and its end."""
        if take_reads is None or parameters.header_digest or parameters.data_digest:
            return None
        take, state = take_reads, (self._window, self._numbers, self._tasks, self._requests)
        return lambda staging, start, end: take(state, staging, start, end, self.events, self._max_data)

    def stop_answering(self) -> None:
        """Nothing that the target asks for is sent any more: R2Ts and pings are ignored."""
        self._answering = None

    def forget(self, task: Task) -> None:
        """A task isn't in ``tasks`` any more: its memory is not touched once this returns."""
        if self._data_in is task:
            self.receiver.divert()
            self._data_in = None
        if self._response is task:
            self._response = None

    def forget_all(self) -> None:
        """No task is there any more."""
        self.receiver.divert()
        self._data_in = self._response = None

    def on_header(self, header: memoryview, ahs_length: int, data_length: int) -> memoryview | None:
        """For the `FrameReceiver`: begin a frame."""
        opcode = header[0] & 0x3F
        if ahs_length:
            raise FormatError(f"additional headers in a PDU of opcode {opcode:#04x}")  # RFC 7143 §11.2.1.5
        if opcode == _DATA_IN_OPCODE:
            return self._on_data_in(header, data_length)
        if opcode == Opcode.SCSI_RESPONSE:
            return self._on_response(header, data_length)
        if opcode == Opcode.R2T:
            if data_length:
                raise FormatError("an R2T with a data segment")
            self._on_r2t(header)
            return None
        if data_length > MAX_TEXT_LENGTH:
            raise FormatError(f"a data segment of {data_length} bytes in a PDU of opcode {opcode:#04x}")
        self._header = bytes(header)
        if not data_length:
            self._on_other(b"")
            return None
        self._segment = bytearray(data_length)
        return memoryview(self._segment)

    def on_data(self, *, intact: bool) -> None:
        """For the `FrameReceiver`: a data segment is complete."""
        segment, self._segment = self._segment, None
        if segment is None:
            task, self._data_in = self._data_in, None
            status, self._data_in_status = self._data_in_status, None
            if task is None:
                return
            if not intact and task.error is None:
                task.error = DigestError("the data digest of a Data-In doesn't match", header=False)
            if status is not None:
                self._finish(task, flags=status[0], status=status[1], residual=status[2])
            return
        if not intact:
            raise DigestError("the data digest of a response doesn't match", header=False)
        if self._header:
            self._on_other(bytes(segment))
            return
        task, self._response = self._response, None
        status, self._data_in_status = self._data_in_status, None
        if task is not None and status is not None:
            task.take_sense(bytes(segment))
            self._finish(task, flags=status[0], status=status[1], residual=status[2])

    def _take_stat_sn(self, stat_sn: int) -> None:
        """A response that uses up a StatSN. At level 0 a gap can only be repaired by a new session (§7.9)."""
        if stat_sn != self._numbers.exp_stat_sn:
            raise ProtocolError(f"StatSN {stat_sn} came where {self._numbers.exp_stat_sn} was due")
        self._numbers.exp_stat_sn = (stat_sn + 1) & MASK

    def _finish(self, task: Task, *, flags: int, status: int, residual: int) -> None:
        del self._tasks[task.itt]
        task.finish(
            status=status,
            residual=residual,
            underflow=bool(flags & _UNDERFLOW),
            overflow=bool(flags & _OVERFLOW),
        )
        self.events.append(task)

    def _on_data_in(self, header: memoryview, data_length: int) -> memoryview | None:
        (_, flags, _, status, _, _, itt, _, stat_sn, exp_cmd_sn, max_cmd_sn, data_sn, offset,
         residual) = _DATA_IN.unpack_from(header)  # fmt: skip
        self._window.update(exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn)
        has_status = flags & _STATUS
        if has_status:
            if not flags & FINAL:
                raise ProtocolError("a Data-In that carries status but isn't the final one")
            if status == _CHECK_CONDITION:
                raise ProtocolError("a Data-In that carries CHECK CONDITION, which needs a response with sense data")
            self._take_stat_sn(stat_sn)
        task = self._tasks.get(itt)
        memory: memoryview | None = None
        if task is not None:
            memory = task.place(data_sn=data_sn, offset=offset, length=data_length)
        if not data_length:
            if task is not None and has_status:
                self._finish(task, flags=flags, status=status, residual=residual)
            return None
        self._data_in = task
        self._data_in_status = (flags, status, residual) if task is not None and has_status else None
        return memoryview(bytearray(data_length)) if memory is None else memory

    def _on_response(self, header: memoryview, data_length: int) -> memoryview | None:
        (_, flags, response, status, _, itt, _, stat_sn, exp_cmd_sn, max_cmd_sn, exp_data_sn, _,
         residual) = _RESPONSE.unpack_from(header)  # fmt: skip
        if data_length > MAX_TEXT_LENGTH:
            raise FormatError(f"a SCSI Response with a data segment of {data_length} bytes")
        self._window.update(exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn)
        self._take_stat_sn(stat_sn)
        task = self._tasks.get(itt)
        if task is not None:
            if response != 0:
                task.error = TransferError(f"the target gave up the command (iSCSI response code {response:#04x})")
            elif status == _CHECK_CONDITION and not data_length:
                raise FormatError("CHECK CONDITION without sense data")
            elif status == _GOOD and task.buffer_in is not None and exp_data_sn != task.next_data_sn:
                raise ProtocolError(f"{task.next_data_sn} Data-In PDUs came, but the target sent {exp_data_sn}")
            if not data_length:
                self._finish(task, flags=flags, status=status, residual=residual)
                return None
        elif not data_length:
            return None
        self._header = b""
        self._response = task
        self._data_in_status = (flags, status, residual)
        self._segment = bytearray(data_length)
        return memoryview(self._segment)

    def _on_r2t(self, header: memoryview) -> None:
        _, _, _, _, lun, itt, ttt, _, exp_cmd_sn, max_cmd_sn, r2t_sn, offset, length = _R2T.unpack_from(header)
        self._window.update(exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn)
        task = self._tasks.get(itt)
        if task is None or self._answering is None:
            return
        if ttt == RESERVED_TAG or lun != task.lun:
            raise ProtocolError("an R2T with a reserved tag or another LUN than its command")
        piece = task.take_r2t(r2t_sn=r2t_sn, offset=offset, length=length, max_burst_length=self._max_burst_length)
        self._answering.answer_r2t(task, piece, ttt=ttt, offset=offset)

    def _on_other(self, segment: bytes) -> None:
        """Everything that isn't the daily traffic of reads and writes."""
        header = self._header
        pdu: Pdu = decode(header, data=segment)
        self._header = b""
        match pdu:
            case NopIn():
                self._window.update(exp_cmd_sn=pdu.exp_cmd_sn, max_cmd_sn=pdu.max_cmd_sn)
                self._on_nop_in(pdu)
            case AsyncMessage() | Reject():
                self._window.update(exp_cmd_sn=pdu.exp_cmd_sn, max_cmd_sn=pdu.max_cmd_sn)
                self._take_stat_sn(pdu.stat_sn)
                if isinstance(pdu, AsyncMessage) or self._is_news(pdu):
                    self.events.append(pdu)
            case TaskManagementResponse() | LogoutResponse() | TextResponse():
                self._window.update(exp_cmd_sn=pdu.exp_cmd_sn, max_cmd_sn=pdu.max_cmd_sn)
                self._take_stat_sn(pdu.stat_sn)
                if self._answers(pdu):
                    self.events.append(pdu)
            case _:
                raise ProtocolError(f"a PDU of opcode {pdu.OPCODE:#04x} has no place in the full feature phase")

    def _is_news(self, pdu: Reject) -> bool:
        """Whether somebody has to hear of a Reject. Source: RFC 7143 §7.3.

        Of a data PDU only what makes a difference: its command is ended by a response in any case, and a success has
        to account for the data that was thrown away. A request that was rejected gets no answer.
        """
        rejected = pdu.rejected
        if isinstance(rejected, DataOut):
            task = self._tasks.get(rejected.itt)
            counted = task is not None and task.take_back(offset=rejected.buffer_offset, length=pdu.rejected_length)
            return counted or pdu.reason == RejectReason.WAITING_FOR_LOGOUT
        if rejected is not None and self._requests.get(rejected.itt) == rejected.OPCODE:
            del self._requests[rejected.itt]
        return True

    def _answers(self, pdu: Pdu) -> bool:
        """Whether a PDU answers a request of ours; the request is then over."""
        asked = self._requests.pop(pdu.itt, None)
        if asked is None:
            return False
        if asked | 0x20 != pdu.OPCODE:
            raise ProtocolError(f"a PDU of opcode {pdu.OPCODE:#04x} answers a request of opcode {asked:#04x}")
        return True

    def _on_nop_in(self, pdu: NopIn) -> None:
        """Source: RFC 7143 §11.19. Only an answer (valid tag) uses up a StatSN."""
        if pdu.itt == RESERVED_TAG:
            if pdu.ttt != RESERVED_TAG and self._answering is not None:
                data = pdu.data[: self._longest_answer]
                self._answering.request(NopOut(immediate=True, lun=pdu.lun, ttt=pdu.ttt, data=data))
            return
        if pdu.ttt != RESERVED_TAG:
            raise FormatError("a NOP-In with both tags valid")
        self._take_stat_sn(pdu.stat_sn)
        if self._answers(pdu):
            self.events.append(pdu)
