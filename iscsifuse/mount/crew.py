"""pyfuse3's workers, run as fibres: the event loop's part of the hot path.

pyfuse3 has many workers that do the same: wait until ``/dev/fuse`` is readable, read one request, carry it out. As
tasks of trio's each request would cost two wake-ups and the handing over of a lock. So pyfuse3 is given stand-ins for
what it takes from trio (it takes ``trio`` from its module's name space, which is how it works on asyncio, too), and
its workers become strands (`iscsifuse.strands`) of one `Crew`. They are idle while they wait for a request.

*One* task serves: it waits for the descriptor, hands each request to the latest idler (what that one touches is
still in the processor's cache), and runs whoever was woken meanwhile. It asks poll(2) first: in a busy mount the
next request is there already, or, with commands under way, an answer (`Loop.look_around`). Every few of them it
makes a checkpoint nevertheless, so that a stream of hits can't starve the others. Where requests for data come one
by one, and nothing else is going on, it looks for the next one for a moment before it goes to sleep
(`Loop.glance`). Not after a program has opened or closed a file: what it does next takes long, and a processor that
looks may slow down the one that works. (Sleuth Kit starts anew for each file, and opens the disk five times.)

Invariant: a request is read by who was handed it, with no checkpoint since poll(2) has seen it.
"""

import select
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

import pyfuse3
import trio

from iscsifuse.fibres import run_ready
from iscsifuse.initiator.loop import Glance, Loop
from iscsifuse.strands import Strand, Team, idle

__all__ = ["Crew", "workers_are_fibres"]

_IN_A_ROW = 32
"""Requests and answers that may be taken without letting other tasks run."""
_LONGEST_GLANCE = 200_000
"""Nanoseconds to look for the next request before going to sleep."""


class Crew(Team):
    """All workers of one `pyfuse3.main`, which takes this for a nursery.

    Args:
        moved: how many requests for data there were so far. None: all are.

    Attributes:
        loop: of the running event loop.
    """

    def __init__(self, moved: Callable[[], int] | None = None) -> None:
        super().__init__()
        self.loop = Loop.current()
        self._moved = moved
        self._seen = 0  # of these
        self._new: list[Strand] = []
        self._count = 0  # workers that haven't ended
        self._fd = -1
        self._poll = select.poll()
        self._glance = Glance(_LONGEST_GLANCE)

    # -- what pyfuse3 calls ----------------------------------------------------------------------------------------

    async def __aenter__(self) -> "Crew":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            async with trio.open_nursery() as self.nursery:
                try:
                    await self._serve()
                finally:
                    await self._let_sleepers_end()
        finally:
            if self._fd >= 0:
                self.loop.unwatch(self._fd)
            self._over = True
            self._dismiss_idlers()
        if self._error is not None:
            raise self._error

    def start_soon(
        self,
        function: Callable[..., Coroutine[Any, Any, object]],
        *arguments: object,
        name: object = None,  # noqa: ARG002 - trio's signature
    ) -> None:
        """One more worker."""
        self._count += 1
        self._new.append(self._hire(function(*arguments)))

    def wait_readable(self, fd: int) -> Awaitable[None]:
        """Wait for a request: called by a worker, who is idle then.

        Raises:
            trio.ClosedResourceError: there are no more.
        """
        if self._over:
            raise trio.ClosedResourceError
        if fd != self._fd:
            self._fd = fd
            self._poll.register(fd, select.POLLIN)
            self.loop.watch(fd)
        return idle()

    # -- what becomes of workers -----------------------------------------------------------------------------------

    def left(self) -> None:
        """A worker has ended, which it does only when there are no more requests for anybody."""
        self._count -= 1
        self._over = True
        super().left()

    def failed(self, error: BaseException) -> None:
        """A worker broke down."""
        self._count -= 1
        super().failed(error)
        self.nursery.cancel_scope.cancel()

    # -- the task that serves --------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Hand out requests until there are no more, and every worker has ended."""
        row = 0
        poll = self._poll.poll
        idlers = self.idle
        while self._count:
            while self._new:
                self._new.pop().go_on()
            if self._over:
                self._dismiss_idlers()
            if not idlers:
                if self._count:
                    await self._wait_for_news()
                continue
            if not poll(0):
                if row < _IN_A_ROW and self.loop.under_way and self.loop.look_around(self._fd):
                    row += 1
                    continue
                row = 0
                try:
                    await self._wait_for_requests()
                except trio.ClosedResourceError:
                    self._over = True
                    continue
            idlers.pop().go_on()
            run_ready()
            row += 1
            if row >= _IN_A_ROW:
                row = 0
                await trio.lowlevel.checkpoint()

    async def _wait_for_requests(self) -> None:
        if self._moved is not None:
            seen, self._seen = self._seen, self._moved()
            if seen == self._seen:
                await trio.lowlevel.wait_readable(self._fd)
                return
        began = time.monotonic_ns()
        if not self.loop.under_way:
            limit = self._glance.limit
            if limit and self.loop.glance(self._fd, limit):
                return
        await trio.lowlevel.wait_readable(self._fd)
        self._glance.learn(time.monotonic_ns() - began)


_NOTHING_TO_WAIT_FOR = cast("Generator[Any, Any, None]", iter(()))


class _Done:
    """Awaited for nothing: two of these are cheaper than two coroutines, and each request comes by here."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, None]:
        return _NOTHING_TO_WAIT_FOR


class _NoLock:
    """Workers needn't keep each other away: each reads when it was handed a request."""

    _done = _Done()

    def __aenter__(self) -> Awaitable[None]:
        return self._done

    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Awaitable[None]:
        return self._done


class _LowLevel:
    """What pyfuse3 takes from ``trio.lowlevel``."""

    current_task = staticmethod(trio.lowlevel.current_task)
    current_trio_token = staticmethod(trio.lowlevel.current_trio_token)
    notify_closing = staticmethod(trio.lowlevel.notify_closing)

    def __init__(self, crew: Crew) -> None:
        self.wait_readable = crew.wait_readable


class _Trio:
    """What pyfuse3 takes from ``trio``."""

    ClosedResourceError = trio.ClosedResourceError
    Lock = _NoLock

    def __init__(self, moved: Callable[[], int] | None) -> None:
        self._crew = Crew(moved)
        self.lowlevel = _LowLevel(self._crew)

    def open_nursery(self) -> Crew:
        return self._crew


@contextmanager
def workers_are_fibres(moved: Callable[[], int] | None = None) -> Iterator[None]:
    """Let one ``pyfuse3.main`` work with our stand-ins; they are taken back at the end.

    Args:
        moved: see `Crew`.

    Its ``min_tasks`` and ``max_tasks`` have to be the same number: a worker that ends means that all do.
    """
    before = pyfuse3.__dict__["trio"]
    pyfuse3.__dict__["trio"] = _Trio(moved)
    try:
        yield
    finally:
        pyfuse3.__dict__["trio"] = before
