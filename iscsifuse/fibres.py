"""Fibres: coroutines that wait without a task of their own.

To wake a trio task costs some microseconds and a round of the event loop; a small read needed that twice, which was a
fifth of all that it cost. A *fibre* is a coroutine that is called again by whoever sees the end of what it waits for:
the price of a call. pyfuse3's workers, write-back and read-ahead are such fibres (`iscsifuse.strands`); what they
call serves tasks, too, and needn't know which of the two runs it, but for one rule.

**The rule.** trio knows tasks only: a cancel scope that a fibre opened would be that of whichever task happens to
call it. So a fibre awaits `asleep`, `doze`, or something that keeps this rule itself, and nothing else of trio's
before it has awaited `own_task`. From then on, until its request is answered, it runs in a task of its own and does
what it likes. Time may have passed when `own_task` returns: whoever has looked at something before looks again.

**Who wakes a fibre** calls `Fibre.wake`, and then, when he is done with what he is at, `run_ready`. Where that is
forgotten or can't be, the event loop does it before it waits for I/O (`iscsifuse.initiator.loop`), which costs more.

In a task ``here().fibre`` is None, and `own_task` does nothing.
"""

import threading
import types
from collections import deque
from collections.abc import Generator
from typing import Protocol

__all__ = ["DOZE", "OWN_TASK", "SLEEP", "Fibre", "Here", "asleep", "doze", "here", "own_task", "run_ready"]

SLEEP = "sleep"
DOZE = "doze"
OWN_TASK = "own task"
"""What a fibre yields to whoever runs it."""


class Fibre(Protocol):
    """As those see it who make it wait, and who run it."""

    def wake(self) -> None:
        """What it sleeps for is there: have it in ``here().ready``. A plain call, anywhere; nothing runs in it."""
        ...

    def go_on(self) -> None:
        """Run it until it waits again. Raises nothing; not to be called while another one runs."""
        ...


class Here:
    """A thread, as its fibres see it.

    Attributes:
        fibre: the one that runs, and has no task of its own.
        ready: those that were woken and haven't gone on yet.
    """

    __slots__ = ("fibre", "ready")

    def __init__(self) -> None:
        self.fibre: Fibre | None = None
        self.ready: deque[Fibre] = deque()


class _Threads(threading.local):
    def __init__(self) -> None:
        self.here = Here()


_threads = _Threads()


def here() -> Here:
    """This thread. Who asks for it with each request, and lives in one thread, had better keep it."""
    return _threads.here


class _Trap:
    __slots__ = ("_word",)

    def __init__(self, word: str) -> None:
        self._word = word

    def __await__(self) -> Generator[str, None, None]:
        yield self._word


_DOZE = _Trap(DOZE)
_OWN_TASK = _Trap(OWN_TASK)


class _Ending(Protocol):
    """What ends some time, and then has somebody's `Fibre.wake` called."""

    done: bool


@types.coroutine
def asleep(ending: _Ending) -> Generator[str, None, None]:
    """For a fibre (see ``here``): stop until something is done. Can't be cancelled.

    Args:
        ending: looked at after each `Fibre.wake`.
    """
    while not ending.done:
        yield SLEEP


async def doze() -> None:
    """Until `Fibre.wake`, or for nothing, and then in a task: in which whoever waits on can be cancelled."""
    await _DOZE


async def own_task() -> bool:
    """Go on in a task of one's own.

    Returns:
        Whether that was necessary: time may have passed, then.
    """
    if here().fibre is None:
        return False
    await _OWN_TASK
    return True


def run_ready() -> None:
    """Let those fibres go on that were woken; not within one of them, whose caller does it then."""
    now = here()
    ready = now.ready
    if ready and now.fibre is None:
        while ready:
            ready.popleft().go_on()
