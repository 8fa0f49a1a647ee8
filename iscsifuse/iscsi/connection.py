"""The full feature phase of one connection: commands in, buffers out; bytes in, events out.

This is the protocol object between the login and the logout: what leaves is here (the numbering, the window, what
waits for it, and the order of all of it), what comes is judged in `Incoming`. It owns no socket: `submit` and
`request` put buffers into ``output``, which somebody sends in order; received bytes go where `buffers` says, and
`received` returns what happened.

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

from iscsifuse.errors import IscsifuseError, ProtocolError, SessionLostError
from iscsifuse.iscsi.dataout import Buffer, data_out_burst
from iscsifuse.iscsi.digest import crc32c_bytes
from iscsifuse.iscsi.incoming import Event, Incoming
from iscsifuse.iscsi.numbers import Numbers
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import FINAL, RESERVED_TAG, Opcode, padding
from iscsifuse.iscsi.request import LogoutRequest, NopOut, TaskAttribute, TaskManagementRequest, TextRequest
from iscsifuse.iscsi.serial import MASK
from iscsifuse.iscsi.tasks import Task
from iscsifuse.iscsi.window import CommandWindow
from iscsifuse.quick import start_read

__all__ = ["Connection", "Request"]

Request = NopOut | TaskManagementRequest | LogoutRequest | TextRequest

_COMMAND = struct.Struct(">BBHI8sIIII16s")
_SIMPLE = FINAL | int(TaskAttribute.SIMPLE)
_SCSI_COMMAND = int(Opcode.SCSI_COMMAND)
_READ = 0x40
_WRITE = 0x20


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
        self._numbers = Numbers(exp_stat_sn=exp_stat_sn, next_itt=first_itt)
        self._requests: dict[int, Opcode] = {}
        self._held: deque[Request] = deque()  # non-immediate requests that wait for the window
        self._logged_out = False
        self._unanswered: dict[int, int] = {}  # R2Ts by tag whose data is still in ``output``
        self._last_answer: tuple[int, Buffer | None] = (0, None)  # where in it, and what, the last one's data begins
        p = parameters
        self._immediate_limit = (
            min(p.first_burst_length, p.target_max_recv_data_segment_length) if p.immediate_data else 0
        )
        self._header_digest = p.header_digest
        self._incoming = Incoming(
            parameters,
            window=self.window,
            tasks=self.tasks,
            requests=self._requests,
            numbers=self._numbers,
            answering=self,
        )
        self._receiver = self._incoming.receiver
        self._state = (self.window, self._numbers, self.tasks, self._requests)  # as `start_read` wants it

    # -- sending ---------------------------------------------------------------------------------------------------

    @property
    def exp_stat_sn(self) -> int:
        """StatSN that is expected next; everything before it is acknowledged by whatever we send."""
        return self._numbers.exp_stat_sn

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

    def start_read(
        self, buffer: memoryview, *, lun: bytes, lba: int, blocks: int, started: float
    ) -> tuple[Task, bytes] | None:
        """Make a READ(10) and encode it, in the usual case: `submit` in fewer steps; see `iscsifuse.quick`.

        Args:
            buffer: where the blocks go: writable, contiguous; as many bytes as ``blocks`` have.
            lun: 8 bytes.
            lba: first block.
            blocks: how many.
            started: the task's.

        Returns:
            The task, sent in all but this: the bytes are to be sent before anything else is put into ``output``.
            None where `submit` has to be used, and nothing has happened.
        """
        if start_read is None or self.output or self.queue or self._logged_out or self._header_digest:
            return None
        return start_read(self._state, lun, lba, blocks, buffer, started)

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
        self._stop_sending()
        self._incoming.forget_all()
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
        self._incoming.forget(task)
        task.fail(error)

    def new_itt(self) -> int:
        """An Initiator Task Tag that is not in use. Source: RFC 7143 §11.2.1.8."""
        itt = self._numbers.next_itt
        while itt in self.tasks or itt in self._requests or itt == RESERVED_TAG:
            itt = (itt + 1) & MASK
        self._numbers.next_itt = (itt + 1) & MASK
        return itt

    def _send_request(self, pdu: Request) -> None:
        cmd_sn = self.window.cmd_sn if pdu.immediate else self.window.take()
        full = replace(pdu, cmd_sn=cmd_sn, exp_stat_sn=self._numbers.exp_stat_sn)
        self.output.append(
            full.encode(header_digest=self.parameters.header_digest, data_digest=self.parameters.data_digest)
        )
        if isinstance(pdu, LogoutRequest):
            self._stop_sending()

    def _stop_sending(self) -> None:
        self._logged_out = True
        self._incoming.stop_answering()

    def _send_command(self, task: Task) -> None:
        """Encode a command and the data that may go with it unasked (RFC 7143 §4.2.5.2, §13.10-13.14)."""
        itt = task.itt = self.new_itt()
        self.tasks[itt] = task
        task.cmd_sn = cmd_sn = self.window.take()
        payload = task.buffer_out
        flags = _SIMPLE
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
        stat_sn = self._numbers.exp_stat_sn
        header = _COMMAND.pack(
            _SCSI_COMMAND, flags, 0, immediate, task.lun, itt, task.expected, cmd_sn, stat_sn, task.cdb
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

    def answer_r2t(self, task: Task, piece: memoryview, *, ttt: int, offset: int) -> None:
        """For `Incoming`: send what an R2T asks for, unless too many are unanswered. Source: RFC 7143 §13.17.

        An R2T is surely unanswered while its data is still here; once that is handed over nobody can tell any more.
        """
        position, buffer = self._last_answer
        if position >= len(self.output) or self.output[position] is not buffer:
            self._unanswered.clear()
        count = self._unanswered[task.itt] = self._unanswered.get(task.itt, 0) + 1
        if count > self.parameters.max_outstanding_r2t:
            raise ProtocolError(
                f"{count} R2Ts at once for one command, where {self.parameters.max_outstanding_r2t} were agreed"
            )
        position = len(self.output)
        self._send_data(task, piece, ttt=ttt, offset=offset)
        self._last_answer = position, self.output[position]

    def _send_data(self, task: Task, piece: memoryview, *, ttt: int, offset: int) -> None:
        self.output += data_out_burst(
            piece,
            lun=task.lun,
            itt=task.itt,
            ttt=ttt,
            exp_stat_sn=self._numbers.exp_stat_sn,
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
        incoming = self._incoming
        events = incoming.events
        if not events:
            return []
        incoming.events = []
        return events
