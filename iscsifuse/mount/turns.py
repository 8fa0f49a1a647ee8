"""How pyfuse3's tasks take turns at ``/dev/fuse``: the event loop's part of the hot path.

pyfuse3 has many tasks that do the same: take a lock, wait until the device is readable, read one request, release
the lock, carry the request out. With trio's own lock and ``wait_readable`` each request costs a task switch to hand
the lock over, a system call to arm epoll and another round of the event loop, although in a busy mount the next
request is there already. So pyfuse3 is given stand-ins for these (it takes ``trio`` from its module's name space,
which is how it works on asyncio, too):

* **The lock** isn't handed over. Who releases it sees to it that *one* other task, the deputy, is scheduled. If the
  releaser comes back first (its request was answered from memory), it takes the lock again, and the deputy goes back
  to sleep; else the deputy takes it.
* **Waiting** asks poll(2) first, and returns at once where a request is there: no arming, no round of the loop. Every
  few times it is a checkpoint nevertheless, so that a stream of hits can't starve the others. Where requests come
  one by one, and nothing else is going on, it looks for the next one for a moment before it goes to sleep (`Loop`).

Invariants:

* At most one task is between ``__aenter__`` and ``__aexit__``: pyfuse3 reads after it has left, but with no
  checkpoint in between, so nobody else can have taken the request that was seen.
* Whenever the lock is free and tasks wait for it, a deputy is scheduled.
* Everything is cancellable where trio's own would be.
"""

import select
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import pyfuse3
import trio

from iscsifuse.initiator.loop import Glance, Loop

__all__ = ["Turns", "taking_turns"]

_IN_A_ROW = 32
"""Requests that may be taken without letting other tasks run."""
_LONGEST_GLANCE = 200_000
"""Nanoseconds to look for the next request before going to sleep."""


class Turns:
    """The right to read the next request: a lock for pyfuse3's tasks, and how they wait once they have it."""

    def __init__(self) -> None:
        self._taken = False
        self._deputy = False  # somebody is scheduled who will look whether it is free
        self._sleepers: deque[trio.lowlevel.Task] = deque()
        self._row = 0
        self._poll = select.poll()
        self._glance = Glance(_LONGEST_GLANCE)
        self._fd = -1
        self._loop: Loop

    def begin(self, fd: int) -> None:
        """A mount begins to take its requests from this descriptor, in the running event loop."""
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._loop = Loop.current()
        self._loop.watch(fd)

    def end(self) -> None:
        """It has ended."""
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            self._fd = -1

    async def __aenter__(self) -> None:
        while self._taken:
            task = trio.lowlevel.current_task()
            self._sleepers.append(task)

            def abort(_: object, task: trio.lowlevel.Task = task) -> trio.lowlevel.Abort:
                self._sleepers.remove(task)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
            self._deputy = False
        self._taken = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._taken = False
        if self._sleepers and not self._deputy:
            self._deputy = True
            # The latest sleeper: what it touches is still in the processor's cache.
            trio.lowlevel.reschedule(self._sleepers.pop())

    async def wait_readable(self, fd: int) -> None:
        """Wait until a request is there; called by who has the turn.

        Raises:
            trio.ClosedResourceError: the descriptor is about to be closed.
        """
        if fd != self._fd:
            self.begin(fd)
        if self._poll.poll(0):
            await self._take()
            return
        began = time.monotonic_ns()
        if not self._loop.under_way:
            limit = self._glance.limit
            if limit and self._loop.glance(fd, limit):
                await self._take()
                return
        self._row = 0
        await trio.lowlevel.wait_readable(fd)
        self._glance.learn(time.monotonic_ns() - began)

    async def _take(self) -> None:
        """A request is there; let the others run first if it is one of many."""
        self._row += 1
        if self._row >= _IN_A_ROW:
            self._row = 0
            await trio.lowlevel.checkpoint()


class _LowLevel:
    """What pyfuse3 takes from ``trio.lowlevel``."""

    current_task = staticmethod(trio.lowlevel.current_task)
    current_trio_token = staticmethod(trio.lowlevel.current_trio_token)
    notify_closing = staticmethod(trio.lowlevel.notify_closing)

    def __init__(self, turns: Turns) -> None:
        self.wait_readable = turns.wait_readable


class _Trio:
    """What pyfuse3 takes from ``trio``."""

    ClosedResourceError = trio.ClosedResourceError
    open_nursery = staticmethod(trio.open_nursery)

    def __init__(self, turns: Turns) -> None:
        self.lowlevel = _LowLevel(turns)
        self._turns = turns

    def Lock(self) -> Turns:  # noqa: N802 - trio's name
        return self._turns


# pyfuse3 makes its lock once in the life of the process, and keeps it.
_TURNS = Turns()
_TRIO = _Trio(_TURNS)


@contextmanager
def taking_turns() -> Iterator[None]:
    """Let ``pyfuse3.main`` work with our stand-ins; they are taken back at the end."""
    before = pyfuse3.__dict__["trio"]
    pyfuse3.__dict__["trio"] = _TRIO
    try:
        yield
    finally:
        pyfuse3.__dict__["trio"] = before
        _TURNS.end()
