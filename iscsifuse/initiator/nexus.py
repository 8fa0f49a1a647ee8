"""The I_T nexus with one target: a session that comes back when it is lost.

::

                 login ok                 session ends
    (opening) ─────────────> LOGGED_IN ────────────────> LOST ──every portal said no for good──> REFUSED
                                 ^                         │
                                 └─a new one (`revival`)───┘     close() from anywhere ──> CLOSED

A command that is carried out while the session is lost waits for the next one, and one that was under way is sent
again there: reads and writes of whole blocks are idempotent, and nobody overlaps a write that hasn't ended (the cache
and the range lock see to that), so a replay can't overtake. What the old session was doing is over before the new
one is used, and every disk in use is proven to be the one it was (`revival`, `guards`). A disk that isn't, or that
can't be examined, is barred (`bars`): nothing reaches it any more, what is to be sent again least of all. One that
can't be examined holds up no other; its commands wait for it as they wait for a session.

Waiting has an end: ``reconnect_timeout`` seconds after the session was lost, waiters get an error, and later ones get
it at once, until a login works again. A command whose sessions are lost again and again has as long, from the first
loss on; one under which the target breaks the protocol each time is given up earlier. The attempts go on; the mount
heals by itself. But when every portal has refused the login for good, that is the end.

Source: RFC 7143 §7.4-7.6.
"""

import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from enum import Enum

import trio

from iscsifuse.errors import IdentityError, SessionLostError
from iscsifuse.initiator.bars import Bars
from iscsifuse.initiator.groups import plain_errors
from iscsifuse.initiator.guards import Guard, Guards
from iscsifuse.initiator.login import LoggedIn, log_in_somewhere, login_config, make_isid
from iscsifuse.initiator.policy import Change, judge
from iscsifuse.initiator.revival import Revival, breaks_protocol
from iscsifuse.initiator.session import Session
from iscsifuse.initiator.settings import Portal, SessionSettings
from iscsifuse.initiator.statistics import CommandStatistics
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import cdb as cdbs

__all__ = ["Nexus", "NexusState", "Started", "open_nexus"]

log = logging.getLogger(__name__)

MAX_REPLAYS = 5
"""How often the target may break the protocol under one command before that is the suspect."""
LAST_WORDS = 5.0
"""Seconds that a session lives on after a cancellation, for commands under way and the logout."""

Started = tuple[Session, Task]
"""A command that is on its way, and the session that carries it."""
Watcher = Callable[[Task], None]


class NexusState(Enum):
    """Where the session is in its life."""

    LOGGED_IN = "logged in"
    LOST = "lost"
    REFUSED = "refused"
    CLOSED = "closed"


class Nexus:
    """A session with a target that survives its connections. Made by `open_nexus`.

    Attributes:
        target_name: as it logged in.
        portal: the one in use, or the last one that was.
        settings: deadlines and rights.
        statistics: of all its commands, across sessions.
        reconnects: how often the session was re-established.
        epoch: how often a disk may have become another one, as far as is known: new sessions, and news.
        replays: how many commands were sent again because their session was lost under them.
        state: see `NexusState`.
    """

    def __init__(
        self,
        target_name: str,
        portals: Sequence[Portal],
        settings: SessionSettings,
        statistics: CommandStatistics,
        login: LoggedIn,
        isid: bytes,
    ) -> None:
        self.target_name = target_name
        self.settings = settings
        self.statistics = statistics
        self.portal = login.portal
        self.reconnects = 0
        self.epoch = 0
        self.replays = 0
        self.state = NexusState.LOGGED_IN
        self._isid = isid
        self._patience = settings.reconnect_timeout if settings.reconnect_timeout >= 0 else math.inf
        self._watchers: dict[bytes, Watcher] = {}
        self._doubters: list[Callable[[], None]] = []
        self._guards = Guards()
        self._bars = Bars()
        self._barred = self._bars.barred  # in one step, for every command
        self._session = self._open_session(login)
        self._revival = Revival(
            target_name, portals, settings, isid=isid, open_session=self._open_session, guards=self._guards
        )
        self._changed = trio.Event()  # replaced at each change of state
        self._since = time.time()
        self._give_up_at = 0.0  # on trio's clock; meaningful while LOST
        self._scope = trio.CancelScope(shield=True)
        self._over = trio.Event()

    @property
    def session(self) -> Session:
        """The session in use, or the last one that was."""
        return self._session

    @property
    def negotiated(self) -> NegotiatedParameters:
        """What the current (or last) login agreed on."""
        return self._session.connection.parameters

    def watch(self, lun: bytes, watcher: Watcher, *, doubt: Callable[[], None]) -> None:
        """Have plain functions called for a logical unit.

        Whoever waits for a command, or for others that ended with it, goes on later, and in any order. So this
        is for what they must not overtake: that the disk has lost something, or may be another one.

        Args:
            lun: 8 bytes.
            watcher: called for each command of the unit whose status isn't GOOD, as it arrives.
            doubt: called by `doubt_all`.
        """
        self._watchers[lun] = watcher
        self._doubters.append(doubt)

    def doubt_all(self) -> None:
        """The list of units has changed: which of them are still those that they were isn't known.

        For a watcher. The target tells one of the units, and then no other any more, once it has been asked for its
        list (SPC-4 §6.33); so all of them have to be held back before anything is sent.
        """
        self.epoch += 1
        self._guards.note_news()
        for doubt in self._doubters:
            doubt()

    def _open_session(self, login: LoggedIn) -> Session:
        session = Session(login, self.settings, self.statistics)
        session.on_trouble = self._note_trouble
        return session

    def _note_trouble(self, task: Task) -> None:
        watcher = self._watchers.get(task.lun)
        if watcher is not None:
            watcher(task)
            return
        change = judge(task.status, task.sense, what="").change  # of one that isn't used, or only just being found
        if change & Change.INVENTORY:
            self.doubt_all()
        elif change & Change.MEDIUM:
            self.epoch += 1

    def add_guard(self, guard: Guard) -> None:
        """Have a coroutine called on each new session before commands flow again; see `guards`."""
        self._guards.add(guard)

    def prove_soon(self, guard: Guard, *, then: Callable[[], None]) -> None:
        """Have a guard look at the session in use, in a task of the nexus's own, and again until things are settled.

        Args:
            guard: see `guards`.
            then: called when it has looked for the first time, or when the session was lost under it.
        """
        self._guards.prove_soon(guard, self._session, then=then)

    @property
    def give_up_at(self) -> float:
        """When the patience with the loss of a session ends, or ended (on trio's clock); 0 if there was no loss."""
        return self._give_up_at

    def bar(self, lun: bytes, error: SessionLostError | IdentityError | None, *, until: float = 0.0) -> None:
        """Hold back every command to a logical unit, those to be replayed too; None lets them through again.

        All but REPORT LUNS, which asks the target, by whichever unit.

        Args:
            lun: 8 bytes.
            error: what the commands fail with (a copy of it).
            until: how long they wait for the end of the bar before they fail, on trio's clock.
        """
        if error is None:
            self._bars.lift(lun)
        else:
            self._bars.put(lun, error, until=until)

    async def execute(
        self,
        cdb: bytes,
        *,
        lun: bytes,
        buffer_in: memoryview | None = None,
        buffer_out: memoryview | None = None,
        exact: bool = False,
        first: Started | None = None,
    ) -> Task:
        """Carry out one SCSI command, on whatever session there is.

        Args:
            cdb: at most 16 bytes.
            lun: 8 bytes.
            buffer_in: where data goes; its content is undefined unless this returns.
            buffer_out: what is written; must not change until this returns or raises.
            exact: whether a success with fewer bytes than ``buffer_in`` holds is an error.
            first: the first attempt, if `start` has begun and the caller has awaited it.

        Returns:
            The task, with a status that the caller judges.

        Raises:
            ReadOnlyError: the command was held back.
            IdentityError: another disk answers where the mounted one was.
            SessionLostError: no session within ``reconnect_timeout``, or nobody knows whose disk answers there.
            CommandTimeoutError: the command took too long.
            TransferError, DigestError: see `Session.execute`.

        Cancellation: while it waits for a session, at once; while the target has the command, when that ended.
        """
        give_up_at = math.inf
        violations = 0
        was_sent = False
        while True:
            session = self._session
            if self.state is not NexusState.LOGGED_IN:
                session = await self._wait_for_session(give_up_at)
            if lun in self._barred and first is None and cdb[0] != cdbs.Opcode.REPORT_LUNS:
                # Invariant: nothing is awaited between this look and the submission.
                while self.state is NexusState.LOGGED_IN and lun in self._barred:
                    await self._bars.wait(lun)
                if self._session is not session or self.state is not NexusState.LOGGED_IN:
                    now = trio.current_time()
                    give_up_at = min(give_up_at, now + self._patience)
                    if now >= give_up_at:
                        raise SessionLostError(f"{self.target_name}: sessions don't last long enough to find a disk")
                continue
            try:
                if first is not None:
                    (session, task), first = first, None
                    was_sent = True
                    return session.settle(task)
                if session.takes_commands:
                    self.replays += was_sent
                    was_sent = True
                return await session.execute(cdb, lun=lun, buffer_in=buffer_in, buffer_out=buffer_out, exact=exact)
            except SessionLostError:
                # Who was cancelled meanwhile, but couldn't be told while the target had the command, is told so.
                await trio.lowlevel.checkpoint_if_cancelled()
                now = trio.current_time()
                give_up_at = min(give_up_at, now + self._patience)
                violations += breaks_protocol(session.error)
                if now >= give_up_at or violations > MAX_REPLAYS:
                    raise
                if self.state is NexusState.LOGGED_IN and self._session is session:
                    # Invariant: run() marks the loss as soon as it is scheduled; until then there is nothing to use.
                    await self._changed.wait()

    def start(
        self,
        cdb: bytes,
        *,
        lun: bytes,
        buffer_in: memoryview | None = None,
        buffer_out: memoryview | None = None,
        exact: bool = False,
    ) -> Started | None:
        """Put a command on its way in a plain call, where nothing stands in its way: the usual case, made short.

        Returns:
            The session and the task. Once it is done (`Session.until_done`), either it has succeeded, or it is to be
            given to `execute` as its first attempt. None where only `execute` can help.
        """
        if self.state is not NexusState.LOGGED_IN or lun in self._barred:
            return None
        session = self._session
        if not session.takes_commands:
            return None
        return session, session.start(cdb, lun=lun, buffer_in=buffer_in, buffer_out=buffer_out, exact=exact)

    def start_read(self, buffer: memoryview, *, lun: bytes, lba: int, blocks: int) -> Started | None:
        """`start` for the usual READ(10), in fewer steps; None where only `start` will do. See the session's."""
        if self.state is not NexusState.LOGGED_IN or lun in self._barred:
            return None
        session = self._session
        task = session.start_read(buffer, lun=lun, lba=lba, blocks=blocks)
        return None if task is None else (session, task)

    async def close(self) -> None:
        """Log out if there is a session; end all waiting. Bounded in time."""
        if self.state is NexusState.CLOSED:
            return
        self._enter(NexusState.CLOSED)
        try:
            await self._session.logout()
        finally:
            self._scope.cancel()

    def report(self) -> dict[str, object]:
        """State for people and programs, JSON-able."""
        connection = self._session.connection
        return {
            "target": self.target_name,
            "portal": str(self.portal),
            "state": self.state.value,
            "since": self._since,
            "reconnects": self.reconnects,
            "replays": self.replays,
            "last_error": self._revival.last_error,
            "isid": self._isid.hex(),
            "tsih": self._session.tsih,
            "in_flight": len(connection.tasks),
            "queued": len(connection.queue),
            "window": connection.window.room,
            "keys": self.negotiated.as_keys(),
        }

    async def run(self) -> None:
        """Run session after session until `close`.

        Cancellation: takes effect after LAST_WORDS seconds, or `close`: commands under way can end until then.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_sessions)
            try:
                await self._over.wait()
            finally:
                self._scope.deadline = trio.current_time() + LAST_WORDS

    async def _run_sessions(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._guards.start(nursery)
                    nursery.start_soon(self._session.run)
                    while True:
                        await self._session.wait_ended()
                        if self.state is NexusState.CLOSED:
                            break
                        self._lost(self._session)
                        session = await self._revival.next_session(nursery, time2wait=self._session.time2wait)
                        if self.state is not NexusState.LOST:  # closed meanwhile
                            break
                        if session is None:
                            await self._refused()
                        else:
                            self._use(session)
                    nursery.cancel_scope.cancel()
        finally:
            self._enter(NexusState.CLOSED)  # nobody shall wait for a session that won't come
            self._over.set()

    def _lost(self, session: Session) -> None:
        self._give_up_at = trio.current_time() + self._patience
        self._revival.note_loss(session)
        self._enter(NexusState.LOST)
        log.warning("%s: session lost: %s", self.target_name, session.error)

    def _use(self, session: Session) -> None:
        self._session = session
        self.portal = session.transport.portal
        self.reconnects += 1
        self.epoch += 1
        self._enter(NexusState.LOGGED_IN)
        log.warning("%s: logged in again at %s", self.target_name, self.portal)
        self._guards.go_on(session)

    async def _refused(self) -> None:
        """No portal will have us any more: everybody is told at once, and nothing is tried until `close`."""
        self._enter(NexusState.REFUSED)
        log.error("%s: the target refuses us, so no more logins are tried; unmount it", self.target_name)
        await trio.sleep_forever()

    def _enter(self, state: NexusState) -> None:
        self.state = state
        if state is NexusState.CLOSED:
            self._guards.stop()
        self._since = time.time()
        self._changed.set()
        self._changed = trio.Event()
        self._bars.wake()

    async def _wait_for_session(self, give_up_at: float) -> Session:
        with trio.CancelScope(deadline=min(give_up_at, self._give_up_at)):
            while self.state is NexusState.LOST:
                await self._changed.wait()
        if self.state is NexusState.LOGGED_IN:
            return self._session
        why = "it was closed" if self.state is NexusState.CLOSED else self._revival.last_error
        raise SessionLostError(f"no session with {self.target_name}: {why}")


@asynccontextmanager
async def open_nexus(
    target_name: str,
    portals: Sequence[Portal],
    settings: SessionSettings,
    *,
    statistics: CommandStatistics | None = None,
) -> AsyncIterator[Nexus]:
    """Log in to a target, and out at the end.

    Args:
        target_name: its iSCSI name.
        portals: tried in order.
        settings: how.
        statistics: counts commands here; by default in a table of its own.

    Raises:
        ConnectError: no portal could be reached.
        LoginError: the target refused; see its subclasses.
        ProtocolError: the target broke the standard.

    Exceptions of the body pass through unchanged, not in a group.

    Cancellation: logs out all the same, bounded in time.
    """
    isid = make_isid()
    config = login_config(settings, target_name)
    login = await log_in_somewhere(portals, config, isid=isid, limit=settings.login_timeout)
    nexus = Nexus(target_name, portals, settings, statistics or CommandStatistics(), login, isid)
    with plain_errors():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nexus.run)
            try:
                yield nexus
            finally:
                with trio.CancelScope(shield=True):
                    await nexus.close()
                nursery.cancel_scope.cancel()
