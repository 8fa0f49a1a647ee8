"""pyfuse3's workers, run as fibres: the event loop's part of the hot path.

pyfuse3 has many workers that do the same: wait until ``/dev/fuse`` is readable, read one request, carry it out. As
tasks of trio's each request would cost two wake-ups and the handing over of a lock. So pyfuse3 is given stand-ins for
what it takes from trio (it takes ``trio`` from its module's name space, which is how it works on asyncio, too), and
its workers become fibres (`iscsifuse.fibres`) of one `Crew`::

    NEW ──> IDLE ──(a request is there)──> RUNNING ──(answered)──> IDLE
                                            │  ^
                          waits for a command│  │woken, by the session's reader
                                            v  │
                                          SLEEPING, DOZING
                                            │
      RUNNING ──(awaits `own_task`)──> IN A TASK ──(answered)──> IDLE

*One* task serves: it waits for the descriptor, hands each request to the latest idler (what that one touches is still
in the processor's cache), and runs whoever was woken meanwhile. It asks poll(2) first: in a busy mount the next
request is there already. Every few requests it makes a checkpoint nevertheless, so that a stream of hits can't starve
the others. Where requests for data come one by one, and nothing else is going on, it looks for the next one for a
moment before it goes to sleep (`Loop.glance`). Not after a program has opened or closed a file: what it does next
takes long, and a processor that looks may slow down the one that works. (Sleuth Kit starts anew for each file, and
opens the disk five times.)

Invariants:

* A request is read by who was handed it, with no checkpoint since poll(2) has seen it.
* A worker is in exactly one of these states; ``idle`` holds those who are IDLE.
* A worker that failed ends the crew. When `pyfuse3.main` ends, however it does, no worker waits for anything. Who
  waits for a command of his own can't be cancelled, since it uses memory; its deadline bounds that. Who waits for
  somebody else's (DOZING) is given a task, and cancelled like those who have one.
"""

import select
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import pyfuse3
import trio

from iscsifuse.fibres import DOZE, OWN_TASK, SLEEP, here, run_ready
from iscsifuse.initiator.loop import Glance, Loop

__all__ = ["Crew", "workers_are_fibres"]

_IN_A_ROW = 32
"""Requests that may be taken without letting other tasks run."""
_LONGEST_GLANCE = 200_000
"""Nanoseconds to look for the next request before going to sleep."""
_IDLE = "idle"


@types.coroutine
def _idle() -> Generator[str, None, None]:
    """Awaited by a worker that wants a request."""
    yield _IDLE


class Worker:
    """One of pyfuse3's; a `Fibre`.

    Attributes:
        awaits: SLEEP or DOZE as long as it does that, as a fibre; else None.
    """

    __slots__ = ("_coroutine", "_crew", "awaits")

    def __init__(self, crew: "Crew", coroutine: Coroutine[Any, Any, object]) -> None:
        self._crew = crew
        self._coroutine = coroutine
        self.awaits: str | None = None

    def wake(self) -> None:
        """See ``Fibre``."""
        if self.awaits is not None:  # else it was given a task meanwhile
            here.ready.append(self)

    def go_on(self) -> None:
        """See ``Fibre``."""
        self.awaits = None
        here.fibre = self
        try:
            trap = self._coroutine.send(None)
        except StopIteration:
            self._crew.left()
            return
        except BaseException as error:
            self._crew.failed(error)
            return
        finally:
            here.fibre = None
        if trap is _IDLE:
            self._crew.rest(self)
        elif trap is SLEEP:
            self.awaits = trap
        elif trap is DOZE:
            self.awaits = trap
            self._crew.tell_server()  # who may be about to end
        elif trap is OWN_TASK:
            self._crew.needs_a_task(self._in_a_task)
        else:
            self._crew.failed(RuntimeError(f"a fibre awaited {trap!r} without a task of its own"))

    def rouse(self) -> None:
        """If it dozes, it is to go on in a task, which can be cancelled."""
        if self.awaits is DOZE and self not in here.ready:
            self.awaits = None
            self._crew.needs_a_task(self._in_a_task)

    def dismiss(self) -> None:
        """There are no more requests for it, which is idle."""
        try:
            self._coroutine.throw(trio.ClosedResourceError())
        except StopIteration:
            self._crew.left()
        except BaseException as error:
            self._crew.failed(error)

    async def _in_a_task(self) -> None:
        await _Carried(self._crew, self, self._coroutine)


class _Carried:
    """Awaited by a task that carries a worker until it is idle again."""

    __slots__ = ("_coroutine", "_crew", "_worker")

    def __init__(self, crew: "Crew", worker: Worker, coroutine: Coroutine[Any, Any, object]) -> None:
        self._crew = crew
        self._worker = worker
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, None]:
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                trap = self._coroutine.send(value) if error is None else self._coroutine.throw(error)
            except StopIteration:
                self._crew.left()
                return
            except Exception as failure:
                self._crew.failed(failure)
                return
            if trap is _IDLE:
                self._crew.rest(self._worker)
                return
            value = error = None
            try:
                value = yield trap
            except BaseException as news:
                error = news


class Crew:
    """All workers of one `pyfuse3.main`, which takes this for a nursery.

    Args:
        moved: how many requests for data there were so far. None: all are.

    Attributes:
        loop: of the running event loop.
        idle: workers that wait for a request.
        nursery: for those who need a task.
    """

    def __init__(self, moved: Callable[[], int] | None = None) -> None:
        self.loop = Loop.current()
        self._moved = moved
        self._seen = 0  # of these
        self.idle: list[Worker] = []
        self.nursery: trio.Nursery
        self._workers: list[Worker] = []
        self._new: list[Worker] = []
        self._count = 0
        self._over = False  # pyfuse3 has seen the end, or somebody else has
        self._error: BaseException | None = None
        self._waiting: trio.lowlevel.Task | None = None  # the server, while it waits for a worker
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
                    # Nobody may be left asleep: what wakes him later would find no crew.
                    with trio.CancelScope(shield=True):
                        while self._rouse():
                            await self._wait_for_workers()
        finally:
            if self._fd >= 0:
                self.loop.unwatch(self._fd)
            self._over = True
            while self.idle:
                self.idle.pop().dismiss()
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
        worker = Worker(self, function(*arguments))
        self._workers.append(worker)
        self._new.append(worker)

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
        return _idle()

    # -- what becomes of workers -----------------------------------------------------------------------------------

    def rest(self, worker: Worker) -> None:
        """A worker is idle."""
        self.idle.append(worker)
        if self._waiting is not None:  # hardly ever, and this comes by with each request
            self.tell_server()

    def needs_a_task(self, carry: Callable[[], Awaitable[None]]) -> None:
        """A worker can't go on as a fibre."""
        self.nursery.start_soon(carry)
        self.tell_server()

    def left(self) -> None:
        """A worker has ended, which it does only when there are no more requests for anybody."""
        self._count -= 1
        self._over = True
        self.tell_server()

    def failed(self, error: BaseException) -> None:
        """A worker broke down."""
        self._count -= 1
        self._over = True
        if self._error is None:
            self._error = error
        self.nursery.cancel_scope.cancel()
        self.tell_server()

    def tell_server(self) -> None:
        """Something has become of a worker."""
        if self._waiting is not None:
            trio.lowlevel.reschedule(self._waiting)
            self._waiting = None

    # -- the task that serves --------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Hand out requests until there are no more, and every worker has ended."""
        row = 0
        poll = self._poll.poll
        idle = self.idle
        while self._count:
            while self._new:
                self._new.pop().go_on()
            if self._over:
                while idle:
                    idle.pop().dismiss()
            if not idle:
                if self._count:
                    await self._wait_for_workers()
                continue
            if not poll(0):
                row = 0
                try:
                    await self._wait_for_requests()
                except trio.ClosedResourceError:
                    self._over = True
                    continue
            idle.pop().go_on()
            run_ready()
            row += 1
            if row >= _IN_A_ROW:
                row = 0
                await trio.lowlevel.checkpoint()

    def _rouse(self) -> bool:
        """Let no worker doze; whether one is still asleep."""
        for worker in self._workers:
            worker.rouse()
        return any(worker.awaits is not None for worker in self._workers)

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

    async def _wait_for_workers(self) -> None:
        """Wait until something becomes of a worker."""
        self._waiting = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiting = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)


class _NoLock:
    """Workers needn't keep each other away: each reads when it was handed a request."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


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
