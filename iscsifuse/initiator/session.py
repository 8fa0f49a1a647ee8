"""One session of one login: commands go out, answers come back, until it ends.

**Tasks.** One reader and one writer own the connection; a watchdog owns its clock. None of them raises: whatever ends
the session is kept in ``error``, every waiter gets a SessionLostError of its own, and `run` returns.

**A command** is submitted by whoever wants it, in a plain call that puts it on the wire if window and socket allow
it; then its task sleeps until the reader wakes it. A caller that is cancelled sleeps on: the target may still read
from or write into the command's memory, so `execute` ends only with the status, the deadline (see `deadlines`), or
the session (each of which is sure to come).

**Everything else** has a module of its own: whether the target is there (`liveness`), what it says besides how
commands end (`notices`), the logout (`farewell`), ABORT TASK SET (`clearing`), what waits to be sent (`backlog`), and
how a command is waited for (`waiting`).

Source: RFC 7143 §4.2, §7.
"""

import contextlib
import logging
import math
from collections.abc import Callable
from functools import partial

import trio

from iscsifuse.errors import IscsifuseError, ReadOnlyError, SessionLostError
from iscsifuse.fibres import run_ready
from iscsifuse.initiator.backlog import check_backlog
from iscsifuse.initiator.clearing import ABORT_LIMIT, Clearing
from iscsifuse.initiator.deadlines import Deadlines
from iscsifuse.initiator.farewell import Farewell
from iscsifuse.initiator.liveness import Liveness
from iscsifuse.initiator.login import LoggedIn
from iscsifuse.initiator.loop import Loop
from iscsifuse.initiator.notices import Notices
from iscsifuse.initiator.settings import SessionSettings
from iscsifuse.initiator.statistics import CommandStatistics
from iscsifuse.initiator.waiting import Waiting
from iscsifuse.iscsi.connection import Connection
from iscsifuse.iscsi.incoming import Event
from iscsifuse.iscsi.tasks import Task
from iscsifuse.quick import end_reads
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.allow import is_harmless

__all__ = ["Session"]

log = logging.getLogger(__name__)

_TICK = 1.0
_RECEIVES_PER_TURN = 16
_GOOD = 0


class Session:
    """A session in its full feature phase.

    Args:
        login: what the login left; the session owns its transport from now on.
        settings: deadlines, and whether it is read-only.
        statistics: where its commands are counted.

    Attributes:
        connection: the protocol object.
        transport: the bytes.
        clearing: for barriers.
        error: why it ended; None while it lives.
        takes_commands: whether it lives, and isn't logging out.
        on_trouble: called for each command that ends with a status that isn't GOOD, in the order in which these
            arrive, before anybody who waits for one of them goes on. A plain call.
        unfinished: LUNs with writes that ended without a status: nobody knows whether the target is done with them.
        until_done: see `Waiting`.
        latency: seconds that the quickest command took so far; infinite before there was one.
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
        self.takes_commands = True
        self.on_trouble: Callable[[Task], None] | None = None
        self.unfinished: set[bytes] = set()
        self.latency = math.inf
        self._read_only = settings.read_only
        self._statistics = statistics
        self._loop = Loop.current()
        self._now = trio.lowlevel.current_clock().current_time  # trio.current_time() in one step
        self._early = login.received
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()
        self._deadlines = Deadlines(self.connection, limit=settings.timeout, end=self._end)
        self.clearing = Clearing(self.connection, send=self._send)
        self._farewell = Farewell(self.connection, send=self._send, time2wait=result.parameters.default_time2wait)
        self._notices = Notices(
            deadlines=self._deadlines, clearing=self.clearing, farewell=self._farewell, leave=self._leave
        )
        self.until_done = Waiting(self.transport, receive=self._receive, fail=self.fail).until_done
        self.transport.on_broken = self.fail
        self.transport.reset_on_close()

    # -- for callers -----------------------------------------------------------------------------------------------

    @property
    def time2wait(self) -> float:
        """Seconds to wait before the next login, as the target asked."""
        return self._farewell.time2wait

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
            raise SessionLostError(str(self.error or "the session is being logged out"))
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

    def start_read(self, buffer: memoryview, *, lun: bytes, lba: int, blocks: int) -> Task | None:
        """`start` for the usual READ(10), in fewer steps; None where only `start` will do, and nothing has happened.

        It is exact, and harmless. Its arguments: see `Connection.start_read`.
        """
        if not self.takes_commands:
            return None
        started = self.connection.start_read(buffer, lun=lun, lba=lba, blocks=blocks, started=self._now())
        if started is None:
            return None
        self._loop.under_way += 1
        task, header = started
        self.transport.send_soon((header,))
        return task

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
        if self.takes_commands:
            self.takes_commands = False
            await self._log_out(SessionLostError("the session was logged out"), patience=math.inf)
        await self._ended.wait()

    async def _log_out(self, reason: SessionLostError, *, patience: float) -> None:
        try:
            await self._farewell.say(patience=patience)
        finally:
            self.fail(reason)

    def _leave(self, why: str, *, within: float) -> None:
        """Log out within so many seconds. What isn't done by half of them is replayed on the next session."""
        if self.takes_commands and self._nursery is not None:
            self.takes_commands = False
            log.info("%s: %s", self.transport.portal, why)
            self._nursery.start_soon(partial(self._log_out, SessionLostError(why), patience=within / 2))

    async def wait_ended(self) -> None:
        """Wait until `run` has returned."""
        await self._ended.wait()

    def fail(self, error: IscsifuseError) -> None:
        """End the session: close the connection and wake everybody with SessionLostError."""
        if self.error is not None:
            return
        self.error = error
        self.takes_commands = False
        self.transport.close(in_order=self._farewell.answered)
        lost = error if isinstance(error, SessionLostError) else SessionLostError(str(error))
        now = trio.current_time()
        for task in self.connection.take_events():
            if isinstance(task, Task):
                self._end(task, now)
        for task in self.connection.fail_all(lost):
            self._end(task, now)
        self.clearing.end(lost)
        self._farewell.end()
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
            self.transport.let_others_receive(self._receive_in_between)
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

    def _receive_in_between(self) -> None:
        """For `Loop.look_around`: in the reader's place, which sleeps or is about to."""
        if self.error is None:
            try:
                self._receive()
            except IscsifuseError as error:
                self.fail(error)

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
        liveness = Liveness(self.transport, self.connection, now=self._now())
        while True:
            await trio.sleep(_TICK)
            now = self._now()
            try:
                liveness.look(now, may_ping=self.takes_commands)
                if not self._deadlines.expire(now, patience=ABORT_LIMIT + _TICK):  # it waits for this look
                    raise SessionLostError(f"{self.transport.portal} did not answer the abortion of a command")
            except SessionLostError as error:
                self.fail(error)
                return
            self._send()
            if not self.takes_commands:
                self._farewell.look()

    def _handle(self, events: list[Event]) -> None:
        """Act on events. Tasks come first: no exception of the others may leave one of them asleep."""
        others: list[Event] = []
        now = self._now()
        if end_reads is not None:
            ended, quickest, events = end_reads(events, self._statistics.by_kind, now)
            self._loop.under_way -= ended
            self.latency = min(self.latency, quickest)
        for event in events:
            if isinstance(event, Task):
                self._end(event, now)
            else:
                others.append(event)
        for event in others:
            self._notices.take(event, now)
        if not self.takes_commands:
            self._farewell.look()
        run_ready()

    def _send(self) -> None:
        """Give the transport what the connection has put out."""
        output = self.connection.output
        if output:
            self.connection.output = []
            self.transport.send(output)
            if self.transport.backlog:
                self._check_backlog()

    def _check_backlog(self) -> None:
        try:
            check_backlog(self.transport, self.connection)
        except SessionLostError as error:
            self.fail(error)

    def _end(self, task: Task, now: float) -> None:
        """A task is done: count it, and let its submitter go on."""
        self._statistics.count(task, now)
        status = task.status
        if status:
            if status < 0:
                if task.buffer_out is not None:
                    self.unfinished.add(task.lun)
            elif self.on_trouble is not None:
                self.on_trouble(task)
        elif now - task.started < self.latency:
            self.latency = now - task.started
        self._loop.under_way -= 1
        waiter, task.waiter = task.waiter, None
        if waiter is not None:
            waiter()
