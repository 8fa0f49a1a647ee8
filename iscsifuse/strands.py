"""Strands: coroutines that are fibres while they can be, and tasks where they must.

A fibre (`iscsifuse.fibres`) costs a call where a task costs a round of the event loop, but may await little. So a
*strand* is a coroutine that begins as a fibre and is given a task when it awaits `own_task`, until it is idle again::

    NEW ──> IDLE ──(there is work)──> RUNNING ──(awaits `idle`)──> IDLE
                                       │  ^
                    waits for a command│  │woken, by the session's reader
                                       v  │
                                     SLEEPING, DOZING
                                       │
      RUNNING ──(awaits `own_task`)──> IN A TASK ──(awaits `idle`)──> IDLE

A `Team` is strands that do the same work, with one task, its *server*, that sees to them: pyfuse3's workers are one
(`iscsifuse.mount.crew`), write-back and read-ahead of a disk are two (`iscsifuse.cache.workers`).

Invariants:

* A strand is in exactly one of these states; ``idle`` holds those who are IDLE.
* One that fails ends the team. When the server has ended, however it does, no strand waits for anything as a fibre.
  Who waits for a command of his own can't be cancelled, since it uses memory; its deadline bounds that. Who waits
  for somebody else's (DOZING) is given a task, and cancelled like those who have one.
"""

import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

import trio

from iscsifuse.fibres import DOZE, OWN_TASK, SLEEP, here

__all__ = ["Strand", "Team", "idle"]

_IDLE = "idle"


@types.coroutine
def idle() -> Generator[str, None, None]:
    """Awaited by a strand that wants work; returns when its team has some, and runs it.

    Raises:
        trio.ClosedResourceError: there will be no more.
    """
    yield _IDLE


class Strand:
    """One of a team's; a `Fibre`.

    Attributes:
        awaits: SLEEP or DOZE as long as it does that, as a fibre; else None.
    """

    __slots__ = ("_coroutine", "_here", "_team", "awaits")

    def __init__(self, team: "Team", coroutine: Coroutine[Any, Any, object]) -> None:
        self._here = here()
        self._team = team
        self._coroutine = coroutine
        self.awaits: str | None = None

    def wake(self) -> None:
        """See ``Fibre``."""
        if self.awaits is not None:  # else it was given a task meanwhile
            self._here.ready.append(self)

    def go_on(self) -> None:
        """See ``Fibre``; also for one that is NEW or IDLE."""
        self.awaits = None
        self._here.fibre = self
        try:
            trap = self._coroutine.send(None)
        except StopIteration:
            self._team.left()
            return
        except BaseException as error:
            self._team.failed(error)
            return
        finally:
            self._here.fibre = None
        if trap is _IDLE:
            self._team.rest(self)
        elif trap is SLEEP:
            self.awaits = trap
        elif trap is DOZE:
            self.awaits = trap
            self._team.tell_server()  # who may be about to end
        elif trap is OWN_TASK:
            self._team.needs_a_task(self._in_a_task)
        else:
            self._team.failed(RuntimeError(f"a fibre awaited {trap!r} without a task of its own"))

    def rouse(self) -> None:
        """If it dozes, it is to go on in a task, which can be cancelled."""
        if self.awaits is DOZE and self not in self._here.ready:
            self.awaits = None
            self._team.needs_a_task(self._in_a_task)

    def dismiss(self) -> None:
        """There is no more work for it, which is idle."""
        try:
            self._coroutine.throw(trio.ClosedResourceError())
        except (StopIteration, trio.ClosedResourceError):
            self._team.left()
        except BaseException as error:
            self._team.failed(error)

    async def _in_a_task(self) -> None:
        await _Carried(self._team, self, self._coroutine)


class _Carried:
    """Awaited by a task that carries a strand until it is idle again."""

    __slots__ = ("_coroutine", "_strand", "_team")

    def __init__(self, team: "Team", strand: Strand, coroutine: Coroutine[Any, Any, object]) -> None:
        self._team = team
        self._strand = strand
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, None]:
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                trap = self._coroutine.send(value) if error is None else self._coroutine.throw(error)
            except StopIteration:
                self._team.left()
                return
            except Exception as failure:
                self._team.failed(failure)
                return
            if trap is _IDLE:
                self._team.rest(self._strand)
                return
            value = error = None
            try:
                value = yield trap
            except BaseException as news:
                error = news


class Team:
    """Strands, and the task that sees to them.

    Attributes:
        idle: those who wait for work.
        nursery: for those who need a task; the server's own, or one around it.
    """

    def __init__(self) -> None:
        self.idle: list[Strand] = []
        self.nursery: trio.Nursery
        self._strands: list[Strand] = []
        self._over = False  # no more work
        self._error: BaseException | None = None
        self._server: trio.lowlevel.Task | None = None  # while it waits for news of a strand

    def _hire(self, coroutine: Coroutine[Any, Any, object]) -> Strand:
        """One more, which is NEW: somebody has to call its `Strand.go_on`."""
        strand = Strand(self, coroutine)
        self._strands.append(strand)
        return strand

    # -- what becomes of strands ------------------------------------------------------------------------------------

    def rest(self, strand: Strand) -> None:
        """A strand is idle."""
        self.idle.append(strand)
        if self._server is not None:  # this comes by with each request
            self.tell_server()

    def needs_a_task(self, carry: Callable[[], Awaitable[None]]) -> None:
        """A strand can't go on as a fibre."""
        self.nursery.start_soon(carry)
        self.tell_server()

    def left(self) -> None:
        """A strand has ended."""
        self.tell_server()

    def failed(self, error: BaseException) -> None:
        """A strand broke down."""
        self._over = True
        if self._error is None:
            self._error = error
        self.tell_server()

    def tell_server(self) -> None:
        """Something has become of a strand: the server may wait for that."""
        if self._server is not None:
            trio.lowlevel.reschedule(self._server)
            self._server = None

    # -- what the server does ---------------------------------------------------------------------------------------

    async def _wait_for_news(self) -> None:
        """Wait until something becomes of a strand."""
        self._server = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._server = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def _let_sleepers_end(self) -> None:
        """Wait until nobody waits as a fibre. Nobody may be left asleep: what wakes him later would find no team."""
        with trio.CancelScope(shield=True):
            while self._rouse():
                await self._wait_for_news()

    def _rouse(self) -> bool:
        """Let no strand doze; whether one is still asleep."""
        for strand in self._strands:
            strand.rouse()
        return any(strand.awaits is not None for strand in self._strands)

    def _dismiss_idlers(self) -> None:
        while self.idle:
            self.idle.pop().dismiss()
