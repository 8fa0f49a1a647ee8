"""The I_T nexus with one target: a session that comes back when it is lost.

::

                 login ok                      session ends
    (opening) ─────────────> LOGGED_IN ─────────────────────> LOST ──┐
                                 ^                              │    │ attempt fails: back off, try the next portal
                                 └──── login ok, disks proven ──┘<───┘
                                                                └──────> REFUSED: every portal said no for good
                                 close() from anywhere ──> CLOSED

A command that is carried out while the session is lost waits for the next one, and one that was under way is sent
again there: reads and writes of whole blocks are idempotent, and nobody overlaps a write that hasn't ended (the cache
and the range lock see to that), so a replay can't overtake. The new login carries the same ISID and TSIH 0, which
makes the target end the old session and its tasks before it answers (RFC 7143 §6.3.5): that is the barrier. Where
writes were under way, it is asked once more to end what is left of them (ABORT TASK SET): a second barrier, for
targets that answer the login first and abort later.

Before commands flow again, every disk in use is proven to be the one it was (`add_guard`). A disk that isn't, or that
can't be examined, is barred (`bar`): nothing reaches it any more, what is to be sent again least of all. One that
can't be examined holds up no other; it is asked again from time to time, and its commands wait for it as they wait
for a session: targets often let in before all of their disks are there.

Waiting has an end: ``reconnect_timeout`` seconds after the session was lost, waiters get an error, and later ones get
it at once, until a login works again. A command whose sessions are lost again and again has as long, from the first
loss on; one under which the target breaks the protocol each time is given up earlier. The attempts go on; the mount
heals by itself. But a portal that refuses the login by a status of class 2 (the fault is ours, it says) isn't asked
again; when none is left, that is the end.

Source: RFC 7143 §6.3.5, §7.4-7.6, §11.13.5.
"""

import logging
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from enum import Enum

import trio

from iscsifuse.errors import (
    DigestError,
    IdentityError,
    IscsifuseError,
    LoginError,
    NothingFoundError,
    ProtocolError,
    SessionLostError,
)
from iscsifuse.initiator.groups import plain_errors
from iscsifuse.initiator.login import (
    LoggedIn,
    log_in,
    log_in_somewhere,
    login_config,
    make_isid,
    refuses_us,
)
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
FIRST_BACK_OFF = 0.1
LAST_BACK_OFF = 5.0
LASTING = 5.0
"""Seconds after which a session counts as one that lasts; after one that doesn't the next login waits a little."""
LONGEST_TIME2WAIT = 3600.0
"""Most seconds that a target may have us wait before a login (RFC 7143 §13.15)."""
LAST_WORDS = 5.0
"""Seconds that a session lives on after a cancellation, for commands under way and the logout."""
ASK_AGAIN_AFTER = 5.0
"""Seconds until a guard that couldn't prove its disk is asked again; at first less."""
FIRST_ASK_AGAIN = 0.25

Guard = Callable[[Session], Awaitable[bool]]
Started = tuple[Session, Task]
Watcher = Callable[[Task], None]
"""A command that is on its way, and the session that carries it."""


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
        self.state = NexusState.LOGGED_IN
        self._portals = list(portals)
        self._isid = isid
        self._guards: list[Guard] = []
        self._watchers: dict[bytes, Watcher] = {}
        self._barred: dict[bytes, tuple[IscsifuseError, float]] = {}  # and until when commands wait
        self._bar_changed = trio.Event()  # replaced at each change of a bar, and of state
        self._session = Session(login, settings, statistics)
        self._session.on_trouble = self._note_trouble
        self._changed = trio.Event()  # replaced at each change of state
        self._since = time.time()
        self._give_up_at = 0.0  # on trio's clock; meaningful while LOST
        self._logged_in_at = trio.current_time()
        self._pause = 0.0  # before the next login, after sessions that didn't last
        self._unfinished: set[bytes] = set()  # LUNs on which old sessions may still write
        self._answers_task_management = True
        self._last_error: str | None = None
        self._nursery: trio.Nursery | None = None
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

    def watch(self, lun: bytes, watcher: Watcher) -> None:
        """Have a plain function called for each command of a logical unit whose status isn't GOOD, as it arrives.

        Whoever waits for these commands, or for others that ended with them, goes on later, and in any order. So this
        is for what they must not overtake: that the disk has lost something.
        """
        self._watchers[lun] = watcher

    def _note_trouble(self, task: Task) -> None:
        watcher = self._watchers.get(task.lun)
        if watcher is not None:
            watcher(task)

    def add_guard(self, guard: Guard) -> None:
        """Have a coroutine called on each new session before commands flow again.

        It may use the session, and must not raise but SessionLostError. It bars and unbars its disk, and returns
        whether that is settled: if not, it is called again after a while, as long as the session lives.
        """
        self._guards.append(guard)

    def prove_soon(self, guard: Guard, *, then: Callable[[], None]) -> None:
        """Have a guard look at the session in use, in a task of the nexus's own, and again until things are settled.

        Args:
            guard: see `add_guard`.
            then: called when it has looked for the first time, or when the session was lost under it.
        """
        if self._nursery is None or self.state is NexusState.CLOSED:
            then()
        else:
            self._nursery.start_soon(self._prove_again, guard, self._session, then)

    async def _prove_again(self, guard: Guard, session: Session, then: Callable[[], None]) -> None:
        with suppress(SessionLostError):  # the guards look at the next one anyway
            try:
                settled = await guard(session)
            finally:
                then()
            if not settled:
                await self._ask_again(guard, session)

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
            self._barred.pop(lun, None)
        else:
            self._barred[lun] = error, until
        self._bar_changed.set()
        self._bar_changed = trio.Event()

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
        while True:
            session = self._session
            if self.state is not NexusState.LOGGED_IN:
                session = await self._wait_for_session(give_up_at)
            if lun in self._barred and first is None and cdb[0] != cdbs.Opcode.REPORT_LUNS:
                # Invariant: nothing is awaited between this look and the submission.
                await self._until_unbarred(lun)
                if self._session is not session or self.state is not NexusState.LOGGED_IN:
                    now = trio.current_time()
                    give_up_at = min(give_up_at, now + self._patience)
                    if now >= give_up_at:
                        raise SessionLostError(f"{self.target_name}: sessions don't last long enough to find a disk")
                continue
            try:
                if first is not None:
                    (session, task), first = first, None
                    return session.settle(task)
                return await session.execute(cdb, lun=lun, buffer_in=buffer_in, buffer_out=buffer_out, exact=exact)
            except SessionLostError:
                # Who was cancelled meanwhile, but couldn't be told while the target had the command, is told so.
                await trio.lowlevel.checkpoint_if_cancelled()
                now = trio.current_time()
                give_up_at = min(give_up_at, now + self._patience)
                violations += _breaks_protocol(session.error)
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

    async def close(self) -> None:
        """Log out if there is a session; end all waiting. Bounded in time."""
        if self.state is NexusState.CLOSED:
            return
        session = self._session
        self._enter(NexusState.CLOSED)
        try:
            await session.logout()
        finally:
            self._scope.cancel()

    def report(self) -> dict[str, object]:
        """State for people and programs, JSON-able."""
        window = self._session.connection.window
        return {
            "target": self.target_name,
            "portal": str(self.portal),
            "state": self.state.value,
            "since": self._since,
            "reconnects": self.reconnects,
            "last_error": self._last_error,
            "isid": self._isid.hex(),
            "tsih": self._session.tsih,
            "in_flight": len(self._session.connection.tasks),
            "queued": len(self._session.connection.queue),
            "window": window.room,
            "keys": self.negotiated.as_keys(),
        }

    # -- keeping it alive ------------------------------------------------------------------------------------------

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

    @property
    def _patience(self) -> float:
        limit = self.settings.reconnect_timeout
        return limit if limit >= 0 else math.inf

    async def _run_sessions(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._session.run)
                    while True:
                        session = self._session
                        await session.wait_ended()
                        if self.state is NexusState.CLOSED:
                            break
                        self._lost(session)
                        if not await self._re_establish(nursery, session.time2wait):
                            break
                    nursery.cancel_scope.cancel()
        finally:
            self._nursery = None
            self._enter(NexusState.CLOSED)  # nobody shall wait for a session that won't come
            self._over.set()

    def _lost(self, session: Session) -> None:
        now = trio.current_time()
        self._give_up_at = now + self._patience
        if now - self._logged_in_at >= LASTING:
            self._pause = 0.0
        else:
            self._pause = min(max(FIRST_BACK_OFF, 2 * self._pause), LAST_BACK_OFF / 5)
        self._unfinished |= session.unfinished
        self._last_error = str(session.error)
        self._enter(NexusState.LOST)
        log.warning("%s: session lost: %s", self.target_name, session.error)

    def _enter(self, state: NexusState) -> None:
        self.state = state
        self._since = time.time()
        self._changed.set()
        self._changed = trio.Event()
        self._bar_changed.set()
        self._bar_changed = trio.Event()

    async def _wait_for_session(self, give_up_at: float) -> Session:
        """The session, once there is one."""
        with trio.CancelScope(deadline=min(give_up_at, self._give_up_at)):
            while self.state is NexusState.LOST:
                await self._changed.wait()
        if self.state is NexusState.LOGGED_IN:
            return self._session
        why = "it was closed" if self.state is NexusState.CLOSED else self._last_error
        raise SessionLostError(f"no session with {self.target_name}: {why}")

    async def _until_unbarred(self, lun: bytes) -> None:
        """Wait until nothing holds back the commands to a unit, or the session is lost; raise what they fail with."""
        while self.state is NexusState.LOGGED_IN and lun in self._barred:
            error, until = self._barred[lun]
            if trio.current_time() >= until:
                raise type(error)(*error.args)
            with trio.move_on_at(until):
                await self._bar_changed.wait()

    async def _re_establish(self, nursery: trio.Nursery, time2wait: float) -> bool:
        """Log in again, however long it takes; whether it worked before `close`."""
        wait_until = trio.current_time() + max(_jittered(self._pause), min(time2wait, LONGEST_TIME2WAIT))
        delay = FIRST_BACK_OFF
        portals = deque(self._portals)  # but for those that said that they won't have us
        while True:
            with trio.CancelScope(deadline=wait_until):
                await self._changed.wait()  # close() interrupts the wait
            if self.state is not NexusState.LOST:
                return False
            try:
                login = await log_in(
                    portals[0],
                    login_config(self.settings, self.target_name),
                    isid=self._isid,
                    limit=self.settings.login_timeout,
                )
            except IscsifuseError as error:
                self._note_failure(error)
                if self._is_final(error):
                    portals.popleft()
                    if not portals:
                        await self._refused()
                        return False
                    continue
                if isinstance(error, NothingFoundError):
                    delay = LAST_BACK_OFF
            else:
                if await self._resume(nursery, login):
                    return True
            portals.rotate(-1)
            wait_until = trio.current_time() + _jittered(delay)
            delay = min(delay * 2, LAST_BACK_OFF)

    def _is_final(self, error: IscsifuseError) -> bool:
        """Whether a portal that answered so is not to be asked again. Source: RFC 7143 §11.13.5, status class 2.

        "Not found" is never final: it had the target once, and a target daemon that is started again listens before
        its targets are there, however long it was away. So it is asked again, seldom.
        """
        return refuses_us(error) and not isinstance(error, NothingFoundError)

    async def _refused(self) -> None:
        """No portal will have us any more: everybody is told at once, and nothing is tried until `close`."""
        self._enter(NexusState.REFUSED)
        log.error("%s: the target refuses us, so no more logins are tried; unmount it", self.target_name)
        while self.state is NexusState.REFUSED:
            await self._changed.wait()

    def _note_failure(self, error: IscsifuseError) -> None:
        words = str(error)
        if words != self._last_error:
            level = logging.ERROR if isinstance(error, LoginError) else logging.INFO
            log.log(level, "%s: can't log in again: %s", self.target_name, words)
        self._last_error = words

    async def _resume(self, nursery: trio.Nursery, login: LoggedIn) -> bool:
        """Prove the disks on a new session, then let commands flow; whether it worked."""
        session = Session(login, self.settings, self.statistics)
        session.on_trouble = self._note_trouble
        nursery.start_soon(session.run)
        unsettled: list[Guard] = []

        async def prove(guard: Guard) -> None:
            if not await guard(session):
                unsettled.append(guard)

        try:
            with plain_errors():
                await self._end_old_writes(session)
                async with trio.open_nursery() as guards:
                    for guard in self._guards:
                        guards.start_soon(prove, guard)
        except SessionLostError as error:
            self._note_failure(error)
            session.fail(error)
        if session.error is not None or self.state is not NexusState.LOST:
            session.fail(SessionLostError("the session is not needed any more"))
            await session.wait_ended()
            return False
        self._session = session
        self.portal = login.portal
        self._logged_in_at = trio.current_time()
        self.reconnects += 1
        self._enter(NexusState.LOGGED_IN)
        log.warning("%s: logged in again at %s", self.target_name, login.portal)
        for guard in unsettled:
            nursery.start_soon(self._ask_again, guard, session)
        return True

    async def _end_old_writes(self, session: Session) -> None:
        """The second barrier; see the head of this file. A target that can't do it has had the first one."""

        async def end(lun: bytes) -> None:
            if await session.clearing.abort_task_set(lun) is None:
                log.info("%s: no answer to ABORT TASK SET", self.target_name)
                self._answers_task_management = False
            self._unfinished.discard(lun)

        if not self._answers_task_management:
            self._unfinished.clear()
        try:
            async with trio.open_nursery() as nursery:
                for lun in list(self._unfinished):
                    nursery.start_soon(end, lun)
        finally:
            if _breaks_protocol(session.error):  # it rejects what it doesn't know
                self._answers_task_management = False

    async def _ask_again(self, guard: Guard, session: Session) -> None:
        """Call a guard until it has settled things, or the session is lost (the next one calls it anyway)."""
        pause = FIRST_ASK_AGAIN
        with suppress(SessionLostError):
            while session.error is None and self.state is not NexusState.CLOSED:
                await trio.sleep(min(pause, ASK_AGAIN_AFTER))
                pause *= 2
                if session.error is None and await guard(session):
                    return


def _breaks_protocol(error: IscsifuseError | None) -> bool:
    """Whether a session ended by the target's doing, and not by the line's."""
    return isinstance(error, ProtocolError) and not isinstance(error, DigestError)


def _jittered(seconds: float) -> float:
    """About so many, so that not all initiators of a target come back at the same moment."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - no secret


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
