"""The full feature phase of one connection: commands in, buffers out; bytes in, events out.

This is the protocol object between the login and the logout. It owns the numbering (CmdSN, StatSN), the task table,
the flow of data in both directions, and every check of what the target sends. It owns no socket: `submit` and
`request` put buffers into ``output``, which somebody sends in order; received bytes go where `buffers` says, and
`received` returns what happened.

**Who is asked.** A PDU with an Initiator Task Tag belongs to a `Task` (SCSI commands) or to a request (NOP-Out, task
management, logout, text); an unknown tag belongs to nobody and completes nothing: its data goes to a sink.

**Error recovery level 0.** Anything that RFC 7143 lets us repair only by recovery within a connection or a command
raises ProtocolError (or DigestError, FormatError) out of `received`. The connection is then finished: the caller
closes the socket and calls `fail_all`. One exception: a data digest error on Data-In fails just its command once its
status has come (RFC 7143 §7.8), since the stream is still in step.

**The window.** Commands that don't fit wait in a queue here, in the order in which they were submitted, and leave by
themselves when a PDU opens the window. Immediate requests pass by.

**The end.** After a Logout Request nothing is sent any more, whoever asks for it; after `fail_all` nobody's memory is
touched any more.

Source: RFC 7143 §4.2, §7, §11.
"""

import struct
from collections import deque
from dataclasses import replace

from iscsifuse.errors import (
    DigestError,
    FormatError,
    IscsifuseError,
    ProtocolError,
    SessionLostError,
    TransferError,
)
from iscsifuse.iscsi.dataout import Buffer, data_out_burst
from iscsifuse.iscsi.digest import crc32c_bytes
from iscsifuse.iscsi.framing import FrameReceiver
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import FINAL, RESERVED_TAG, Opcode, Pdu, decode, padding
from iscsifuse.iscsi.request import (
    DataOut,
    LogoutRequest,
    NopOut,
    TaskAttribute,
    TaskManagementRequest,
    TextRequest,
)
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

__all__ = ["MAX_TEXT_LENGTH", "Connection", "Event", "Request"]

Request = NopOut | TaskManagementRequest | LogoutRequest | TextRequest
Event = Task | NopIn | TaskManagementResponse | LogoutResponse | TextResponse | AsyncMessage | Reject
"""What `Connection.received` returns: a task that is done, or a PDU that someone has to act on."""

MAX_TEXT_LENGTH = 1 << 20
"""Longest data segment that isn't Data-In, in bytes: sense data, text, ping data, rejected headers are all small."""

_COMMAND = struct.Struct(">BBHI8sIIII16s")
_DATA_IN = struct.Struct(">BBBBI8sIIIIIIII")
_RESPONSE = struct.Struct(">BBBBI8xIIIIIIII")
_R2T = struct.Struct(">BBHI8sIIIIIIII")
_SIMPLE = int(TaskAttribute.SIMPLE)
_SCSI_COMMAND = int(Opcode.SCSI_COMMAND)
_DATA_IN_OPCODE = int(Opcode.DATA_IN)
_READ = 0x40
_WRITE = 0x20
_STATUS = 0x01
_UNDERFLOW = 0x02
_OVERFLOW = 0x04
_GOOD = 0x00
_CHECK_CONDITION = 0x02


class Connection:
    """One connection in its full feature phase.

    Args:
        parameters: what the login negotiated.
        cmd_sn: CmdSN of the first command.
        exp_stat_sn: StatSN that the target's next response will carry.
        exp_cmd_sn: from the last Login Response.
        max_cmd_sn: from the last Login Response.
        first_itt: Initiator Task Tag of the first command.

    Attributes:
        parameters: what the login negotiated.
        window: CmdSN and its limits.
        output: buffers to send, in order; whoever sends them takes them out. Payload buffers are views of the
            callers' memory.
        tasks: SCSI commands that were sent and aren't done, by tag, oldest first.
        queue: SCSI commands that wait for the window.
    """

    def __init__(
        self,
        parameters: NegotiatedParameters,
        *,
        cmd_sn: int,
        exp_stat_sn: int,
        exp_cmd_sn: int,
        max_cmd_sn: int,
        first_itt: int = 1,
    ) -> None:
        self.parameters = parameters
        self.window = CommandWindow(cmd_sn=cmd_sn, exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn)
        self.output: list[Buffer] = []
        self.tasks: dict[int, Task] = {}
        self.queue: deque[Task] = deque()
        self._exp_stat_sn = exp_stat_sn
        self._next_itt = first_itt
        self._requests: dict[int, Opcode] = {}
        self._held: deque[Request] = deque()  # non-immediate requests that wait for the window
        self._events: list[Event] = []
        self._logged_out = False
        p = parameters
        self._immediate_limit = (
            min(p.first_burst_length, p.target_max_recv_data_segment_length) if p.immediate_data else 0
        )
        self._header_digest = p.header_digest
        self._receiver = FrameReceiver(
            self,
            header_digest=p.header_digest,
            data_digest=p.data_digest,
            max_data=max(p.max_recv_data_segment_length, 8192),
        )
        # The frame whose data segment is being received:
        self._header = b""
        self._segment: bytearray | None = None
        self._data_in: Task | None = None
        self._data_in_status: tuple[int, int, int] | None = None  # flags, status, residual count
        self._response: Task | None = None
        self._unanswered: dict[int, int] = {}  # R2Ts by tag whose data is still in ``output``
        self._last_answer: tuple[int, Buffer | None] = (0, None)  # where in it, and what, the last one's data begins

    # -- sending ---------------------------------------------------------------------------------------------------

    @property
    def exp_stat_sn(self) -> int:
        """StatSN that is expected next; everything before it is acknowledged by whatever we send."""
        return self._exp_stat_sn

    @property
    def amid(self) -> bool:
        """Whether a PDU has been received in part."""
        return self._receiver.amid

    @property
    def idle(self) -> bool:
        """Whether nothing waits for the target."""
        return not self.tasks and not self.queue and not self._requests

    def submit(self, task: Task) -> None:
        """Send a SCSI command, or queue it until the window opens.

        Its end is announced by `received`, or by `fail_all`.

        Raises:
            SessionLostError: after a logout, or `fail_all`; nothing was sent.
        """
        if self._logged_out:
            raise SessionLostError("the session has ended, or is about to")
        if self.queue or not self.window.is_open:
            self.queue.append(task)
        else:
            self._send_command(task)

    def request(self, pdu: Request) -> int:
        """Send a NOP-Out, task management, logout or text request; the numbers are filled in, and a reserved tag.

        Immediate requests are sent also through a closed window and don't advance CmdSN; others wait for it. The
        answer to a target's ping keeps its reserved tag, and expects no answer. After a logout, or `fail_all`,
        nothing is sent, and no answer will come.

        Returns:
            The Initiator Task Tag that the answer will carry.
        """
        is_answer = isinstance(pdu, NopOut) and pdu.ttt != RESERVED_TAG
        if pdu.itt == RESERVED_TAG and not is_answer:
            pdu = replace(pdu, itt=self.new_itt())
        if self._logged_out:
            return pdu.itt
        if not is_answer:
            self._requests[pdu.itt] = pdu.OPCODE
        if pdu.immediate or (self.window.is_open and not self._held):
            self._send_request(pdu)
        else:
            self._held.append(pdu)
        return pdu.itt

    def fail_all(self, error: IscsifuseError) -> list[Task]:
        """The connection is gone: end every task.

        Returns:
            The tasks that ended, oldest first.
        """
        ended = [*self.tasks.values(), *self.queue]
        self.tasks.clear()
        self.queue.clear()
        self._requests.clear()
        self._held.clear()
        self.output.clear()
        self._logged_out = True
        self._receiver.divert()
        self._data_in = self._response = None
        for task in ended:
            task.fail(error)
        return ended

    def abandon(self, task: Task, error: IscsifuseError) -> None:
        """End a task whose abortion the target confirmed, or that was never sent; a late answer finds nobody.

        Memory of the task is not touched any more once this returns. A task that is done already stays as it is.
        """
        if task.done:
            return
        if self.tasks.pop(task.itt, None) is None and task in self.queue:
            self.queue.remove(task)
        if self._data_in is task:
            self._receiver.divert()
            self._data_in = None
        if self._response is task:
            self._response = None
        task.fail(error)

    def new_itt(self) -> int:
        """An Initiator Task Tag that is not in use. Source: RFC 7143 §11.2.1.8."""
        itt = self._next_itt
        while itt in self.tasks or itt in self._requests or itt == RESERVED_TAG:
            itt = (itt + 1) & MASK
        self._next_itt = (itt + 1) & MASK
        return itt

    def _send_request(self, pdu: Request) -> None:
        cmd_sn = self.window.cmd_sn if pdu.immediate else self.window.take()
        full = replace(pdu, cmd_sn=cmd_sn, exp_stat_sn=self._exp_stat_sn)
        self.output.append(
            full.encode(header_digest=self.parameters.header_digest, data_digest=self.parameters.data_digest)
        )
        if isinstance(pdu, LogoutRequest):
            self._logged_out = True

    def _send_command(self, task: Task) -> None:
        """Encode a command and the data that may go with it unasked (RFC 7143 §4.2.5.2, §13.10-13.14)."""
        itt = task.itt = self.new_itt()
        self.tasks[itt] = task
        task.cmd_sn = cmd_sn = self.window.take()
        payload = task.buffer_out
        flags = FINAL | _SIMPLE
        immediate = 0
        unsolicited = 0
        if payload is not None:
            flags |= _WRITE
            immediate = min(len(payload), self._immediate_limit)
            unsolicited = immediate
            if not self.parameters.initial_r2t:
                unsolicited = min(len(payload), self.parameters.first_burst_length)
                if unsolicited > immediate:
                    flags &= ~FINAL
            task.solicited = unsolicited
        elif task.buffer_in is not None:
            flags |= _READ
        header = _COMMAND.pack(
            _SCSI_COMMAND, flags, 0, immediate, task.lun, itt, task.expected, cmd_sn, self._exp_stat_sn, task.cdb
        )
        if self._header_digest:
            header += crc32c_bytes((header,))
        output = self.output
        output.append(header)
        if payload is None:
            return
        if immediate:
            piece = payload[:immediate]
            output.append(piece)
            tail = padding(immediate)
            if self.parameters.data_digest:
                tail += crc32c_bytes((piece, tail))
            if tail:
                output.append(tail)
        if unsolicited > immediate:
            self._send_data(task, payload[immediate:unsolicited], ttt=RESERVED_TAG, offset=immediate)

    def _send_data(self, task: Task, piece: memoryview, *, ttt: int, offset: int) -> None:
        self.output += data_out_burst(
            piece,
            lun=task.lun,
            itt=task.itt,
            ttt=ttt,
            exp_stat_sn=self._exp_stat_sn,
            buffer_offset=offset,
            segment_length=self.parameters.target_max_recv_data_segment_length,
            header_digest=self.parameters.header_digest,
            data_digest=self.parameters.data_digest,
        )

    def _drain_queue(self) -> None:
        """Send what waits for the window; requests first, since they are few."""
        while self._held and self.window.is_open and not self._logged_out:
            self._send_request(self._held.popleft())
        while self.queue and self.window.is_open and not self._logged_out:
            self._send_command(self.queue.popleft())

    # -- receiving -------------------------------------------------------------------------------------------------

    def buffers(self) -> list[memoryview]:
        """Where received bytes go; see `FrameReceiver.buffers`."""
        return self._receiver.buffers()

    def received(self, count: int) -> list[Event]:
        """Take in bytes that were received into `buffers`.

        Returns:
            What happened, in order. A target's ping has been answered already.

        Raises:
            ProtocolError: the connection can't go on; call `fail_all`. Tasks that got done before are not lost:
                `take_events` has them.
        """
        self._receiver.received(count)
        if self.queue or self._held:
            self._drain_queue()
        return self.take_events()

    def feed(self, data: bytes) -> list[Event]:
        """Take in bytes that were received elsewhere; otherwise like `received`."""
        self._receiver.feed(data)
        if self.queue or self._held:
            self._drain_queue()
        return self.take_events()

    def take_events(self) -> list[Event]:
        """The events since they were last taken."""
        events, self._events = self._events, []
        return events

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
        if stat_sn != self._exp_stat_sn:
            raise ProtocolError(f"StatSN {stat_sn} came where {self._exp_stat_sn} was due")
        self._exp_stat_sn = (stat_sn + 1) & MASK

    def _finish(self, task: Task, *, flags: int, status: int, residual: int) -> None:
        del self.tasks[task.itt]
        task.finish(
            status=status,
            residual=residual,
            underflow=bool(flags & _UNDERFLOW),
            overflow=bool(flags & _OVERFLOW),
        )
        self._events.append(task)

    def _on_data_in(self, header: memoryview, data_length: int) -> memoryview | None:
        (_, flags, _, status, _, _, itt, _, stat_sn, exp_cmd_sn, max_cmd_sn, data_sn, offset,
         residual) = _DATA_IN.unpack_from(header)  # fmt: skip
        self.window.update(exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn)
        has_status = flags & _STATUS
        if has_status:
            if not flags & FINAL:
                raise ProtocolError("a Data-In that carries status but isn't the final one")
            if status == _CHECK_CONDITION:
                raise ProtocolError("a Data-In that carries CHECK CONDITION, which needs a response with sense data")
            self._take_stat_sn(stat_sn)
        task = self.tasks.get(itt)
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
        self.window.update(exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn)
        self._take_stat_sn(stat_sn)
        task = self.tasks.get(itt)
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
        self.window.update(exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn)
        task = self.tasks.get(itt)
        if task is None or self._logged_out:
            return
        if ttt == RESERVED_TAG or lun != task.lun:
            raise ProtocolError("an R2T with a reserved tag or another LUN than its command")
        piece = task.take_r2t(
            r2t_sn=r2t_sn, offset=offset, length=length, max_burst_length=self.parameters.max_burst_length
        )
        self._count_r2t(itt)
        position = len(self.output)
        self._send_data(task, piece, ttt=ttt, offset=offset)
        self._last_answer = position, self.output[position]

    def _count_r2t(self, itt: int) -> None:
        """Refuse more R2Ts for a command than may be unanswered at once. Source: RFC 7143 §13.17.

        An R2T is surely unanswered while its data is still here; once that is handed over nobody can tell any more.
        """
        position, buffer = self._last_answer
        if position >= len(self.output) or self.output[position] is not buffer:
            self._unanswered.clear()
        count = self._unanswered[itt] = self._unanswered.get(itt, 0) + 1
        if count > self.parameters.max_outstanding_r2t:
            raise ProtocolError(
                f"{count} R2Ts at once for one command, where {self.parameters.max_outstanding_r2t} were agreed"
            )

    def _on_other(self, segment: bytes) -> None:
        """Everything that isn't the daily traffic of reads and writes."""
        header = self._header
        pdu: Pdu = decode(header, data=segment)
        self._header = b""
        match pdu:
            case NopIn():
                self.window.update(exp_cmd_sn=pdu.exp_cmd_sn, max_cmd_sn=pdu.max_cmd_sn)
                self._on_nop_in(pdu)
            case AsyncMessage() | Reject():
                self.window.update(exp_cmd_sn=pdu.exp_cmd_sn, max_cmd_sn=pdu.max_cmd_sn)
                self._take_stat_sn(pdu.stat_sn)
                if isinstance(pdu, AsyncMessage) or self._is_news(pdu):
                    self._events.append(pdu)
            case TaskManagementResponse() | LogoutResponse() | TextResponse():
                self.window.update(exp_cmd_sn=pdu.exp_cmd_sn, max_cmd_sn=pdu.max_cmd_sn)
                self._take_stat_sn(pdu.stat_sn)
                if self._answers(pdu):
                    self._events.append(pdu)
            case _:
                raise ProtocolError(f"a PDU of opcode {pdu.OPCODE:#04x} has no place in the full feature phase")

    def _is_news(self, pdu: Reject) -> bool:
        """Whether somebody has to hear of a Reject. Source: RFC 7143 §7.3.

        Of a data PDU only what makes a difference: its command is ended by a response in any case, and a success has
        to account for the data that was thrown away. A request that was rejected gets no answer.
        """
        rejected = pdu.rejected
        if isinstance(rejected, DataOut):
            task = self.tasks.get(rejected.itt)
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
            if pdu.ttt != RESERVED_TAG:
                limit = self.parameters.target_max_recv_data_segment_length
                self.request(NopOut(immediate=True, lun=pdu.lun, ttt=pdu.ttt, data=pdu.data[:limit]))
            return
        if pdu.ttt != RESERVED_TAG:
            raise FormatError("a NOP-In with both tags valid")
        self._take_stat_sn(pdu.stat_sn)
        if self._answers(pdu):
            self._events.append(pdu)
