"""One session of one login: commands go out, answers come back, until it ends.

**Tasks.** One reader and one writer own the connection; a watchdog owns its clock. None of them raises: whatever ends
the session is kept in ``error``, every waiter gets a SessionLostError of its own, and `run` returns.

**A command** is submitted by whoever wants it, in a plain call that puts it on the wire if window and socket allow
it; then its task sleeps until the reader wakes it. There is no hop through a queue. A caller that is cancelled sleeps
on: the target may still read from or write into the command's memory, so `execute` ends only with the status, the
deadline, or the session (each of which is sure to come).

**Time.** A command past its deadline is aborted (ABORT TASK), one after the other; an abort that is refused, or not
answered, ends the session. A connection on which nothing came for a while is pinged; a ping that isn't answered, by
whatever bytes, ends it too.

**Room.** What a target asks for (data, answers to pings) waits here while it doesn't read; there is a bound to that.

Source: RFC 7143 §4.2, §7, §11.5, §11.9, §11.17-11.18.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import cast

import trio

from iscsifuse.errors import (
    IscsifuseError,
    ProtocolError,
    ReadOnlyError,
    SessionLostError,
)
from iscsifuse.initiator.deadlines import Deadlines
from iscsifuse.initiator.login import LoggedIn
from iscsifuse.initiator.loop import Glance, Loop
from iscsifuse.initiator.settings import SessionSettings
from iscsifuse.initiator.statistics import CommandRow, CommandStatistics
from iscsifuse.iscsi.connection import Connection
from iscsifuse.iscsi.incoming import Event
from iscsifuse.iscsi.request import DataOut, LogoutRequest, NopOut, TaskFunction, TaskManagementRequest
from iscsifuse.iscsi.response import (
    AsyncEvent,
    AsyncMessage,
    LogoutResponse,
    NopIn,
    Reject,
    RejectReason,
    TaskManagementResponse,
)
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.allow import is_harmless

__all__ = ["Session"]

log = logging.getLogger(__name__)

PING_AFTER = 5.0
"""Seconds without a received byte after which the target is pinged."""
PING_LIMIT = 5.0
"""Seconds that it has to answer."""
ABORT_LIMIT = 10.0
"""Seconds that a target has to answer a task management function."""
LOGOUT_LIMIT = 5.0
"""Seconds that it has to answer a logout."""
BACKLOG_LIMIT = 16 << 20
"""Bytes that may wait for a target that doesn't read, besides the data of the writes that are under way."""
_TICK = 1.0
_RECEIVES_PER_TURN = 16
_QUICK = 64 * 1024
"""Bytes of a command whose answer may be there before we could fall asleep."""
_LONGEST_GLANCE = 250_000
"""Nanoseconds to look for it."""
_GLANCES_IN_A_ROW = 32

_GOOD = 0
_SERVICE_ACTIONS = frozenset({0x9E, 0x9F, 0xA3, 0xA4, 0x7F})


class Session:
    """A session in its full feature phase.

    Args:
        login: what the login left; the session owns its transport from now on.
        settings: deadlines, and whether it is read-only.
        statistics: where its commands are counted.

    Attributes:
        connection: the protocol object.
        transport: the bytes.
        error: why it ended; None while it lives.
        time2wait: seconds to wait before the next login, as the target asked.
        on_trouble: called for each command that ends with a status that isn't GOOD, in the order in which these
            arrive, before anybody who waits for one of them goes on. A plain call.
        unfinished: LUNs with writes that ended without a status: nobody knows whether the target is done with them.
    """

    def __init__(self, login: LoggedIn, settings: SessionSettings, statistics: CommandStatistics) -> None:
        result = login.result
        self.transport = login.transport
        self.connection = Connection(
            result.parameters,
            cmd_sn=result.next_cmd_sn,
            exp_stat_sn=result.exp_stat_sn,
            exp_cmd_sn=result.exp_cmd_sn,
            max_cmd_sn=result.max_cmd_sn,
        )
        self.tsih = result.tsih
        self.error: IscsifuseError | None = None
        self.time2wait: float = result.parameters.default_time2wait
        self.on_trouble: Callable[[Task], None] | None = None
        self.unfinished: set[bytes] = set()
        self._read_only = settings.read_only
        self._statistics = statistics
        self._rows: dict[int, CommandRow] = {}
        self._loop = Loop.current()
        self._glance = Glance(_LONGEST_GLANCE)
        self._now = trio.lowlevel.current_clock().current_time  # trio.current_time() in one step
        self._glances = 0
        self._early = login.received
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()
        self._logging_out = False
        self._idle = trio.Event()  # set once nothing is under way any more after the logout began
        self._logged_out = trio.Event()
        self._deadlines = Deadlines(self.connection, limit=settings.timeout, end=self._end)
        self._clearing: dict[int, _Answer] = {}
        self._ping: float | None = None
        self.transport.on_broken = self.fail
        self.transport.reset_on_close()

    # -- for callers -----------------------------------------------------------------------------------------------

    @property
    def takes_commands(self) -> bool:
        """Whether it lives, and isn't logging out."""
        return self.error is None and not self._logging_out

    async def execute(
        self,
        cdb: bytes,
        *,
        lun: bytes,
        buffer_in: memoryview | None = None,
        buffer_out: memoryview | None = None,
        exact: bool = False,
    ) -> Task:
        """Carry out one SCSI command.

        Args:
            cdb: at most 16 bytes.
            lun: 8 bytes.
            buffer_in: where data goes; its content is undefined unless this returns.
            buffer_out: what is written; must not change until this returns or raises.
            exact: whether a success with fewer bytes than ``buffer_in`` holds is an error.

        Returns:
            The task, done, with a status that the caller judges.

        Raises:
            ReadOnlyError: the session is read-only and the command could change the medium; nothing was sent.
            SessionLostError: the session ended; whether the command was executed is unknown.
            CommandTimeoutError: its deadline passed; it was aborted.
            TransferError: GOOD status, but not every byte was moved.
            DigestError: received data was damaged on the way.

        Cancellation: is not delivered before the command has ended, since its memory is in use until then.
        """
        task = self.start(cdb, lun=lun, buffer_in=buffer_in, buffer_out=buffer_out, exact=exact)
        await self.until_done(task)
        return self.settle(task)

    def start(
        self,
        cdb: bytes,
        *,
        lun: bytes,
        buffer_in: memoryview | None = None,
        buffer_out: memoryview | None = None,
        exact: bool = False,
    ) -> Task:
        """The first part of `execute`: put a command on its way, in a plain call.

        Await `until_done` next, then call `settle`.

        Raises:
            ReadOnlyError, SessionLostError: as `execute`; nothing was sent.
        """
        if self._read_only and not is_harmless(cdb):
            raise ReadOnlyError(f"{cdbs.name(cdb)} was held back: the disk is attached read-only")
        if not self.takes_commands:
            raise SessionLostError(self._why())
        task = Task(cdb, lun=lun, buffer_in=buffer_in, buffer_out=buffer_out, exact=exact)
        task.started = self._now()
        self._loop.under_way += 1
        connection = self.connection
        connection.submit(task)
        output = connection.output
        if output:
            connection.output = []
            self.transport.send_soon(output)
        return task

    async def until_done(self, task: Task) -> None:
        """Wait until a task that was started has ended.

        Cancellation: is not delivered before; see `execute`.
        """
        if task.done:
            return
        alone = self._loop.under_way == 1 and task.expected <= _QUICK
        if alone:
            limit = self._glance.limit
            self._glances += 1
            # Every now and then the others have their turn, however quickly answers come.
            if limit and self._glances % _GLANCES_IN_A_ROW and self._look_for(task, limit):
                return
            began = time.monotonic_ns()
        # Invariant: nothing is awaited between the look at ``done`` and the sleep: the reader can't finish it unseen.
        task.waiter = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(_not_now)
        if alone:
            self._glance.learn(time.monotonic_ns() - began)

    def _look_for(self, task: Task, limit: int) -> bool:
        """Receive in the reader's place for a moment; whether the task is done now. See `Loop.glance`.

        The reader sleeps meanwhile. It is woken only by what is still there when we have looked.
        """
        transport = self.transport
        transport.send_now()
        try:
            while not task.done and transport.glance(limit):
                self._receive()
        except IscsifuseError as error:
            self.fail(error)
        return task.done

    def settle(self, task: Task) -> Task:
        """The last part of `execute`: the task, if it has a status; else its error is raised."""
        error = task.error
        if task.buffer_out is not None and (error is not None or task.status != _GOOD) and self.transport.pending:
            # It ended before all of its data was sent. What the target throws away may still wait for the socket.
            self.transport.own_pending()
            self._check_backlog()
        if error is not None:
            if isinstance(error, SessionLostError):
                raise SessionLostError(str(error))
            raise error
        return task

    async def logout(self) -> None:
        """Log out: after the commands that are under way, before any other. Returns when the session has ended.

        Cancellation: ends the session without ceremony.
        """
        if self.error is None and not self._logging_out:
            self._logging_out = True
            await self._log_out(SessionLostError("the session was logged out"), patience=LOGOUT_LIMIT)
        await self._ended.wait()

    async def _log_out(self, reason: SessionLostError, *, patience: float) -> None:
        """Say good-bye once nothing is under way any more, or in the end anyway; the session has failed then."""
        try:
            with trio.move_on_after(LOGOUT_LIMIT):
                with trio.move_on_after(min(patience, 0.8 * LOGOUT_LIMIT)):  # the rest is for the logout
                    if not self.connection.idle:
                        await self._idle.wait()
                if self.error is None:
                    idle = self.connection.idle
                    self.connection.request(LogoutRequest())
                    self._send()
                    if idle:  # else the answers of commands would have to be answered, and nothing may follow
                        await self._logged_out.wait()
        finally:
            self.fail(reason)

    async def abort_task_set(self, lun: bytes) -> int | None:
        """Have the target end all tasks of this nexus on a logical unit: those that an old session left, too.

        Args:
            lun: 8 bytes.

        Returns:
            Its answer (see `TaskResponse`; it needn't support it), or None: it did not answer within ABORT_LIMIT.

        Raises:
            SessionLostError: the session ended first.

        Source: RFC 7143 §11.5.1, SAM-5 §7.3.
        """
        answer = _Answer()
        itt = self.connection.request(TaskManagementRequest(function=TaskFunction.ABORT_TASK_SET, lun=lun))
        self._clearing[itt] = answer
        self._send()
        with trio.move_on_after(ABORT_LIMIT):
            await answer.came.wait()
        del self._clearing[itt]
        if self.error is not None:
            raise SessionLostError(self._why())
        return answer.response

    async def wait_ended(self) -> None:
        """Wait until `run` has returned."""
        await self._ended.wait()

    def fail(self, error: IscsifuseError) -> None:
        """End the session: close the connection and wake everybody with SessionLostError."""
        if self.error is not None:
            return
        self.error = error
        self.transport.close(in_order=self._logged_out.is_set())
        lost = error if isinstance(error, SessionLostError) else SessionLostError(str(error))
        now = trio.current_time()
        for task in self.connection.take_events():
            if isinstance(task, Task):
                self._end(task, now)
        for task in self.connection.fail_all(lost):
            self._end(task, now)
        for answer in self._clearing.values():
            answer.came.set()
        self._idle.set()
        self._logged_out.set()
        self._scope.cancel()

    # -- the tasks of the session ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the session alive until it ends; its reason is then in ``error``. Raises nothing but Cancelled."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._watch)
        finally:
            self.fail(SessionLostError("the session was closed"))
            self._ended.set()

    async def _read(self) -> None:
        try:
            if self._early:
                self._handle(self.connection.feed(self._early))
                self._send()
            await self._read_on()
        except (IscsifuseError, trio.ClosedResourceError) as error:
            self.fail(error if isinstance(error, IscsifuseError) else SessionLostError("the connection was closed"))

    async def _read_on(self) -> None:
        turn = 0
        while self.error is None:
            if self._receive():
                turn += 1
            elif self.error is None:  # an answer of ours may have met a broken connection
                turn = 0
                await self.transport.wait_readable()
            if turn == _RECEIVES_PER_TURN:
                # Those who were woken shall run, even if the target never pauses.
                turn = 0
                await trio.lowlevel.checkpoint()

    def _receive(self) -> bool:
        """Take in what is there, if anything is; whether it is worth trying again at once.

        Raises:
            IscsifuseError: the session is over.
        """
        connection = self.connection
        buffers = connection.buffers()
        count = self.transport.receive_now(buffers)
        if count is None:
            return False
        if count == 0:
            raise SessionLostError(f"{self.transport.portal} closed the connection")
        events = connection.received(count)
        if events:
            self._handle(events)
        if connection.output:
            self._send()
        # Less came than was asked for, and all of it whole PDUs: the socket is empty.
        return len(buffers) > 1 or count == len(buffers[0]) or connection.amid

    async def _write(self) -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            await self.transport.run_writer()

    async def _watch(self) -> None:
        """Deadlines and pings, looked at once a tick: cheaper than a timer for each command."""
        heard = self.transport.bytes_received
        heard_at = trio.current_time()
        while True:
            await trio.sleep(_TICK)
            now = trio.current_time()
            if self.transport.bytes_received != heard:
                heard = self.transport.bytes_received
                heard_at = now
                self._ping = None
            elif self._ping is not None:
                if now - self._ping >= PING_LIMIT:
                    silence = f"{self.transport.portal} has been silent for {now - heard_at:.0f} seconds"
                    self.fail(SessionLostError(silence))
                    return
            elif now - heard_at >= PING_AFTER and not self._logging_out:  # nothing may follow a logout
                self._ping = now
                self.connection.request(NopOut(immediate=True))
                self._send()
            self._expire(now)

    def _expire(self, now: float) -> None:
        """See `Deadlines`; a late command may have had to wait for this look."""
        if not self._deadlines.expire(now, patience=ABORT_LIMIT + _TICK):
            self.fail(SessionLostError(f"{self.transport.portal} did not answer the abortion of a command"))
            return
        self._send()
        self._note_idle()

    def _note_idle(self) -> None:
        if self._logging_out and self.connection.idle:
            self._idle.set()

    # -- what the target says --------------------------------------------------------------------------------------

    def _handle(self, events: list[Event]) -> None:
        """Act on events. Tasks come first: no exception of the others may leave one of them asleep."""
        others: list[Event] = []
        now = self._now()
        for event in events:
            if isinstance(event, Task):
                self._end(event, now)
            else:
                others.append(event)
        for event in others:
            if isinstance(event, NopIn):
                self._ping = None
            elif isinstance(event, TaskManagementResponse):
                waiting = self._clearing.get(event.itt)
                if waiting is not None:
                    waiting.response = event.response
                    waiting.came.set()
                else:
                    self._deadlines.answered(event, now)
            elif isinstance(event, LogoutResponse):
                self._on_logout(event)
            elif isinstance(event, AsyncMessage):
                self._on_async(event)
            elif isinstance(event, Reject):
                self._on_reject(event)
        self._note_idle()

    def _on_reject(self, reject: Reject) -> None:
        """Source: RFC 7143 §7.3, §11.17."""
        if reject.reason == RejectReason.WAITING_FOR_LOGOUT:
            self._leave("the target waits for a logout", within=1.0)
            return
        match reject.rejected:
            case DataOut():  # the command ends with a response of its own
                log.warning("the target rejected data of a write (reason %#04x)", reject.reason)
            case NopOut():  # also a sign of life
                log.info("the target rejected a ping (reason %#04x)", reject.reason)
            case LogoutRequest():
                self._logged_out.set()
            case rejected:
                if isinstance(rejected, TaskManagementRequest):
                    self._deadlines.give_up(self._now())
                # A command's number would stay missing for ever: only a new session gets on.
                raise ProtocolError(f"the target rejected a PDU (reason {reject.reason:#04x})")

    def _on_logout(self, answer: LogoutResponse) -> None:
        self.time2wait = answer.time2wait
        self._logged_out.set()

    def _on_async(self, message: AsyncMessage) -> None:
        """Source: RFC 7143 §11.9.1."""
        match message.event:
            case AsyncEvent.LOGOUT_REQUESTED:
                self._leave("the target asked for a logout", within=message.parameter3)
            case AsyncEvent.CONNECTION_DROPPED | AsyncEvent.SESSION_DROPPED:
                self.time2wait = message.parameter2
                raise SessionLostError("the target announced that it drops the session")
            case AsyncEvent.NEGOTIATION_REQUESTED:
                self._leave("the target asked for a new negotiation", within=message.parameter3)
            case _:
                log.info("asynchronous message, event %d", message.event)

    def _leave(self, why: str, *, within: float) -> None:
        """Log out within so many seconds. What isn't done by half of them is replayed on the next session."""
        if not self._logging_out and self._nursery is not None:
            self._logging_out = True
            log.info("%s: %s", self.transport.portal, why)
            self._nursery.start_soon(partial(self._log_out, SessionLostError(why), patience=within / 2))

    # -- small things ----------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Give the transport what the connection has put out."""
        output = self.connection.output
        if output:
            self.connection.output = []
            self.transport.send(output)
            if self.transport.backlog > BACKLOG_LIMIT:
                self._check_backlog()

    def _check_backlog(self) -> None:
        """End the session if more waits to be sent than the writes that are under way can account for.

        They ask for each byte once; what is asked for again was received before, if the target can be believed.
        """
        waiting = self.transport.backlog
        if waiting > BACKLOG_LIMIT + sum(len(task.buffer_out or b"") for task in self.connection.tasks.values()):
            self.fail(
                SessionLostError(
                    f"{self.transport.portal} asks and asks, but doesn't read the answers "
                    f"({waiting >> 20} MiB of them wait)"
                )
            )

    def _why(self) -> str:
        return str(self.error) if self.error is not None else "the session is being logged out"

    def _end(self, task: Task, now: float) -> None:
        """A task is done: count it, and let its submitter go on."""
        cdb = task.cdb
        opcode = cdb[0]
        key = opcode | (cdb[1] & 0x1F) << 8 if opcode in _SERVICE_ACTIONS else opcode
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = self._statistics.row(cdbs.name(cdb), opcode=opcode)
        if task.status < 0:
            row.lost += 1
            if task.buffer_out is not None:
                self.unfinished.add(task.lun)
        else:
            row.add(
                now - task.started,
                task.received or task.solicited,
                error=task.status != _GOOD or task.error is not None,
            )
            if task.status and self.on_trouble is not None:
                self.on_trouble(task)
        self._loop.under_way -= 1
        waiter, task.waiter = task.waiter, None
        if waiter is not None:
            trio.lowlevel.reschedule(cast("trio.lowlevel.Task", waiter))


class _Answer:
    """Of a target to a task management function, once it has come."""

    __slots__ = ("came", "response")

    def __init__(self) -> None:
        self.came = trio.Event()
        self.response: int | None = None


def _not_now(_: object) -> trio.lowlevel.Abort:
    """A cancellation has to wait until the command has ended."""
    return trio.lowlevel.Abort.FAILED
