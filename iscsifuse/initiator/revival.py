"""Bringing back a lost session: when to try, at which portal, and what has to be so before commands flow again.

::

    lost ──pause, as asked for──> log in ──ok──> old writes ended ──> disks proven ──> a new session
                ^                   │                  │                  │
                └──back off, next───┴──────────────────┴──────session lost┘
                      portal        └──every portal has said no for good──> none

The new login carries the same ISID and TSIH 0, which makes the target end the old session and its tasks before it
answers (RFC 7143 §6.3.5): that is the barrier. Where writes were under way, it is asked once more to end what is left
of them (ABORT TASK SET): a second barrier, for targets that answer the login first and abort later. Then the guards
prove that every disk in use is the one it was.

A portal that refuses the login by a status of class 2 (the fault is ours, it says) isn't asked again for this loss.

Source: RFC 7143 §6.3.5, §7.4-7.6, §11.13.5.
"""

import logging
import random
from collections import deque
from collections.abc import Callable, Sequence

import trio

from iscsifuse.errors import (
    DigestError,
    IscsifuseError,
    LoginError,
    NothingFoundError,
    ProtocolError,
    SessionLostError,
)
from iscsifuse.initiator.groups import plain_errors
from iscsifuse.initiator.guards import Guards
from iscsifuse.initiator.login import LoggedIn, log_in, login_config, refuses_us
from iscsifuse.initiator.session import Session
from iscsifuse.initiator.settings import Portal, SessionSettings

__all__ = ["Revival", "breaks_protocol"]

log = logging.getLogger(__name__)

FIRST_BACK_OFF = 0.1
LAST_BACK_OFF = 5.0
LASTING = 5.0
"""Seconds after which a session counts as one that lasts; after one that doesn't the next login waits a little."""
LONGEST_TIME2WAIT = 3600.0
"""Most seconds that a target may have us wait before a login (RFC 7143 §13.15)."""


class Revival:
    """Finds the next session of a nexus, each time that one was lost.

    Invariant: on a session that `next_session` returns no old write can land any more, as far as the target lets us
    know, and every guard has looked at it; nothing but guards has used it.

    Args:
        target_name: as it logged in.
        portals: tried in order, from the first one at each loss.
        settings: how to log in.
        isid: the same at every login.
        open_session: makes a session of a login.
        guards: prove the disks.

    Attributes:
        last_error: why the last session was lost, or the last attempt failed.
    """

    def __init__(
        self,
        target_name: str,
        portals: Sequence[Portal],
        settings: SessionSettings,
        *,
        isid: bytes,
        open_session: Callable[[LoggedIn], Session],
        guards: Guards,
    ) -> None:
        self.last_error: str | None = None
        self._target_name = target_name
        self._portals = list(portals)
        self._settings = settings
        self._isid = isid
        self._open_session = open_session
        self._guards = guards
        self._began_at = trio.current_time()  # of the session in use
        self._pause = 0.0  # before the next login, after sessions that didn't last
        self._unfinished: set[bytes] = set()  # LUNs on which old sessions may still write
        self._answers_task_management = True

    def note_loss(self, session: Session) -> None:
        """Learn from the session that has just ended."""
        if trio.current_time() - self._began_at >= LASTING:
            self._pause = 0.0
        else:
            self._pause = min(max(FIRST_BACK_OFF, 2 * self._pause), LAST_BACK_OFF / 5)
        self._unfinished |= session.unfinished
        self.last_error = str(session.error)

    async def next_session(self, nursery: trio.Nursery, *, time2wait: float) -> Session | None:
        """Log in again, however long it takes.

        Args:
            nursery: where sessions run.
            time2wait: seconds that the target asked us to wait.

        Returns:
            A session that may be used; None where no portal will have us any more.

        Cancellation: at once.
        """
        wait_until = trio.current_time() + max(_jittered(self._pause), min(time2wait, LONGEST_TIME2WAIT))
        delay = FIRST_BACK_OFF
        portals = deque(self._portals)  # but for those that said that they won't have us
        while True:
            await trio.sleep_until(wait_until)
            try:
                login = await log_in(
                    portals[0],
                    login_config(self._settings, self._target_name),
                    isid=self._isid,
                    limit=self._settings.login_timeout,
                )
            except IscsifuseError as error:
                self._note_failure(error)
                if _is_final(error):
                    portals.popleft()
                    if not portals:
                        return None
                    continue
                if isinstance(error, NothingFoundError):
                    delay = LAST_BACK_OFF
            else:
                session = await self._prove(nursery, login)
                if session is not None:
                    return session
            portals.rotate(-1)
            wait_until = trio.current_time() + _jittered(delay)
            delay = min(delay * 2, LAST_BACK_OFF)

    def _note_failure(self, error: IscsifuseError) -> None:
        words = str(error)
        if words != self.last_error:
            level = logging.ERROR if isinstance(error, LoginError) else logging.INFO
            log.log(level, "%s: can't log in again: %s", self._target_name, words)
        self.last_error = words

    async def _prove(self, nursery: trio.Nursery, login: LoggedIn) -> Session | None:
        """End old writes, and prove the disks, on a new session; None where that was lost meanwhile."""
        session = self._open_session(login)
        nursery.start_soon(session.run)
        try:
            with plain_errors():
                await self._end_old_writes(session)
            await self._guards.prove(session)
        except SessionLostError as error:
            self._note_failure(error)
            session.fail(error)
        if session.error is not None:
            await session.wait_ended()
            return None
        self._began_at = trio.current_time()
        return session

    async def _end_old_writes(self, session: Session) -> None:
        """The second barrier; see the head of this file. A target that can't do it has had the first one."""

        async def end(lun: bytes) -> None:
            if await session.clearing.abort_task_set(lun) is None:
                log.info("%s: no answer to ABORT TASK SET", self._target_name)
                self._answers_task_management = False
            self._unfinished.discard(lun)

        if not self._answers_task_management:
            self._unfinished.clear()
        try:
            async with trio.open_nursery() as nursery:
                for lun in list(self._unfinished):
                    nursery.start_soon(end, lun)
        finally:
            if breaks_protocol(session.error):  # it rejects what it doesn't know
                self._answers_task_management = False


def breaks_protocol(error: IscsifuseError | None) -> bool:
    """Whether a session ended by the target's doing, and not by the line's."""
    return isinstance(error, ProtocolError) and not isinstance(error, DigestError)


def _is_final(error: IscsifuseError) -> bool:
    """Whether a portal that answered so is not to be asked again. Source: RFC 7143 §11.13.5, status class 2.

    "Not found" is never final: it had the target once, and a target daemon that is started again listens before its
    targets are there, however long it was away. So it is asked again, seldom.
    """
    return refuses_us(error) and not isinstance(error, NothingFoundError)


def _jittered(seconds: float) -> float:
    """About so many, so that not all initiators of a target come back at the same moment."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - no secret
