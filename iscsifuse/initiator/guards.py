"""Guards: who looks at a new session before commands flow, and again until it is clear whose disk answers.

A guard is a coroutine that may use the session it is given, and must not raise but SessionLostError. It bars and
unbars its disk (`Nexus.bar`), and returns whether that is settled. If not, it is asked again after a while: a slow
disk holds up no other, and targets often let in before all of their disks are there. Nor does one that doesn't answer
at all: its guard bars it first of all, and goes on when the others are in use.
"""

from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress

import trio

from iscsifuse.errors import SessionLostError
from iscsifuse.initiator.session import Session

__all__ = ["ASK_AGAIN_AFTER", "Guard", "Guards"]

ASK_AGAIN_AFTER = 5.0
"""Seconds until a guard that couldn't prove its disk is asked again; at first less."""
FIRST_ASK_AGAIN = 0.25
MOST_WAIT = 3.0
"""Seconds that all disks wait after a login for those that don't answer."""
MOST_ROUNDS = 10
"""How often all are asked about one session, while the target has news, before that session is given up."""

Guard = Callable[[Session], Awaitable[bool]]


class Guards:
    """The guards of one nexus.

    Invariant: a guard that couldn't settle things on the session in use is asked again, until it can, or that session
    has ended (the next one's guards come before any command), or the nexus.
    """

    def __init__(self) -> None:
        self._guards: list[Guard] = []
        self._unsettled: list[Guard] = []  # on the session that was proved last
        self._nursery: trio.Nursery | None = None  # while the nexus lives
        self._news = 0  # of what all disks have to prove themselves for

    def start(self, nursery: trio.Nursery) -> None:
        """Where guards are asked from now on."""
        self._nursery = nursery

    def stop(self) -> None:
        """The nexus is at its end: nobody needs to be asked any more."""
        self._nursery = None

    def add(self, guard: Guard) -> None:
        """One more."""
        self._guards.append(guard)

    def note_news(self) -> None:
        """Something was told about all disks: who was asked about a session that isn't in use yet, is once more."""
        self._news += 1

    async def prove(self, session: Session) -> None:
        """Ask all of them, side by side, about a session that isn't in use yet; those that are added meanwhile, too.

        Once more, if there was news meanwhile; a disk that proved itself before that may be another one now.

        Raises:
            SessionLostError: it ended meanwhile.
        """
        unsettled: list[Guard] = []
        running: set[Guard] = set()
        for _ in range(MOST_ROUNDS):
            asked, news = 0, self._news
            unsettled.clear()
            while asked < len(self._guards):
                some, asked = self._guards[asked:], len(self._guards)
                await self._ask([guard for guard in some if guard not in running], session, unsettled, running)
            if news == self._news:
                break
        else:
            raise SessionLostError("the target changes its list of units all the time")
        self._unsettled = unsettled

    async def _ask(
        self, guards: Collection[Guard], session: Session, unsettled: list[Guard], running: set[Guard]
    ) -> None:
        """Ask some, for as long as the others may wait for them; those that aren't done by then go on by themselves.

        Args:
            guards: whom to ask.
            session: about which.
            unsettled: gets those that couldn't settle things, of those that are done in time.
            running: has those that aren't done, as long as they aren't.
        """
        left = set(guards)
        lost: list[SessionLostError] = []
        done = trio.Event()
        over = False

        async def ask(guard: Guard) -> None:
            settled = False
            with suppress(SessionLostError):
                try:
                    settled = await guard(session)
                except SessionLostError as error:
                    lost.append(error)
                    settled = True  # the guards look at the next one anyway
                    raise
                finally:
                    left.discard(guard)
                    running.discard(guard)
                    if lost or not left:
                        done.set()
            if not settled and over:
                await self._ask_again(guard, session)
            elif not settled:
                unsettled.append(guard)

        if self._nursery is None:
            raise SessionLostError("the nexus is at its end")
        for guard in guards:
            running.add(guard)
            self._nursery.start_soon(ask, guard)
        if left:
            with trio.move_on_after(MOST_WAIT):
                await done.wait()
        over = True
        if lost:
            raise lost[0]

    def go_on(self, session: Session) -> None:
        """The session that was proved is in use now: ask those again that couldn't settle things."""
        if self._nursery is not None:
            for guard in self._unsettled:
                self._nursery.start_soon(self._ask_again, guard, session)

    def prove_soon(self, guard: Guard, session: Session, *, then: Callable[[], None]) -> None:
        """Have a guard look at the session in use, in a task of its own; see `Nexus.prove_soon`."""
        if self._nursery is None:
            then()
        else:
            self._nursery.start_soon(self._prove_again, guard, session, then)

    async def _prove_again(self, guard: Guard, session: Session, then: Callable[[], None]) -> None:
        with suppress(SessionLostError):  # the guards look at the next one anyway
            try:
                settled = await guard(session)
            finally:
                then()
            if not settled:
                await self._ask_again(guard, session)

    async def _ask_again(self, guard: Guard, session: Session) -> None:
        pause = FIRST_ASK_AGAIN
        with suppress(SessionLostError):
            while session.error is None and self._nursery is not None:
                await trio.sleep(min(pause, ASK_AGAIN_AFTER))
                pause *= 2
                if session.error is None and await guard(session):
                    return
