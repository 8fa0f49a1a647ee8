"""A crew at a descriptor that stands for /dev/fuse: a datagram socket, one datagram for each request.

``Kernel`` does what pyfuse3 does with what it takes for trio. That this is what pyfuse3 really does is shown by the
tests that mount.
"""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pyfuse3
import pytest
import trio
import trio.lowlevel
import trio.testing

from iscsifuse.fibres import Fibre, doze, here, own_task, run_ready
from iscsifuse.initiator.loop import Loop
from iscsifuse.mount.crew import Crew, workers_are_fibres
from support.fibres import sleep

STOP = b"stop"
Handle = Callable[[bytes], Awaitable[None]]


class Kernel:
    """The other end, and pyfuse3's part of ours."""

    def __init__(self, *, workers: int = 4) -> None:
        self.far, self.near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.workers = workers
        self.taken: list[bytes] = []
        self.ended = 0
        self.exited = False
        self.handle: Handle = self.answer

    async def answer(self, _: bytes) -> None:
        """From memory."""

    def ask(self, *requests: bytes) -> None:
        for request in requests:
            self.far.send(request)

    async def main(self, task_status: trio.TaskStatus[Crew] = trio.TASK_STATUS_IGNORED) -> None:
        crew = Crew()
        async with crew as nursery:
            for number in range(self.workers):
                nursery.start_soon(self.work, crew, name=f"worker {number}")
            task_status.started(crew)

    async def work(self, crew: Crew) -> None:
        while not self.exited:
            try:
                await crew.wait_readable(self.near.fileno())
            except trio.ClosedResourceError:
                break
            request = self.near.recv(100, socket.MSG_DONTWAIT)  # it must be there
            if request == STOP:
                self.exited = True
                break
            self.taken.append(request)
            await self.handle(request)
        self.ended += 1


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    with kernel.far, kernel.near:
        yield kernel


class Sleepers:
    """Handles a request by sleeping as a fibre does that waits for a command; somebody else wakes it."""

    def __init__(self) -> None:
        self.fibres: dict[bytes, object] = {}
        self.awake: list[bytes] = []

    async def handle(self, request: bytes) -> None:
        assert here().fibre is not None
        self.fibres[request] = here().fibre
        await sleep()
        assert here().fibre is self.fibres.pop(request)
        self.awake.append(request)

    def wake(self, request: bytes) -> None:
        fibre = self.fibres[request]
        fibre.wake()  # type: ignore[attr-defined]


@asynccontextmanager
async def cancellable(kernel: Kernel) -> AsyncIterator[tuple[trio.Nursery, trio.CancelScope]]:
    """A crew at work, the only task of a nursery, and what cancels it."""
    scope = trio.CancelScope()

    async def main() -> None:
        with scope:
            await kernel.main()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(main)
        yield nursery, scope


async def failure(main: Callable[[], Awaitable[None]], meanwhile: Callable[[], Awaitable[None]]) -> Exception | None:
    """What ``main`` raises, while something else is done."""
    errors: list[Exception] = []

    async def run() -> None:
        try:
            await main()
        except Exception as error:
            errors.append(error)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await meanwhile()
    return errors[0] if errors else None


async def test_every_request_is_taken_once(kernel: Kernel) -> None:
    async def ask() -> None:
        for number in range(300):
            kernel.ask(b"%d" % number)
            if number % 7 == 0:
                await trio.sleep(0.001)
            elif number % 3 == 0:
                await trio.lowlevel.checkpoint()
        kernel.ask(STOP)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(kernel.main)
    assert kernel.taken == [b"%d" % number for number in range(300)]
    assert kernel.ended == kernel.workers
    assert here().fibre is None


async def test_sleepers_let_others_be_taken_and_go_on_when_they_are_woken(kernel: Kernel) -> None:
    sleepers = Sleepers()
    kernel.handle = sleepers.handle
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel.main)
            kernel.ask(b"a", b"b", b"c")
            await trio.testing.wait_all_tasks_blocked()
            assert sorted(sleepers.fibres) == [b"a", b"b", b"c"]
            sleepers.wake(b"b")
            sleepers.wake(b"a")
            assert sleepers.awake == []  # not within the call
            run_ready()
            assert sleepers.awake == [b"b", b"a"]
            sleepers.wake(b"c")  # and nobody calls run_ready: the loop does
            await trio.testing.wait_all_tasks_blocked()
            assert sleepers.awake == [b"b", b"a", b"c"]
            kernel.ask(b"d", STOP)
            await trio.testing.wait_all_tasks_blocked()
            assert kernel.exited
            assert kernel.ended == kernel.workers - 1  # the end waits for who sleeps
            sleepers.wake(b"d")
    assert kernel.ended == kernel.workers


async def test_a_fibre_lets_no_other_one_go_on_while_it_runs(kernel: Kernel) -> None:
    sleepers = Sleepers()

    async def handle(request: bytes) -> None:
        if request != b"wake a":
            await sleepers.handle(request)
            return
        sleepers.wake(b"a")
        run_ready()
        assert sleepers.awake == []

    kernel.handle = handle
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel.main)
            kernel.ask(b"a", b"wake a", STOP)
    assert sleepers.awake == [b"a"]


async def test_who_needs_a_task_gets_one_and_others_are_taken(kernel: Kernel) -> None:
    waiting = most = 0
    go = trio.Event()

    async def handle(_: bytes) -> None:
        nonlocal waiting, most
        assert await own_task()
        assert not await own_task()
        assert here().fibre is None
        waiting += 1
        most = max(most, waiting)
        if waiting == 4:
            go.set()
        with trio.move_on_after(60), trio.CancelScope():  # what a fibre couldn't do
            await go.wait()
        waiting -= 1

    kernel.handle = handle
    kernel.ask(*[b"%d" % number for number in range(8)], STOP)
    with trio.fail_after(5):
        await kernel.main()
    assert most == 4
    assert len(kernel.taken) == 8


async def test_a_worker_that_had_a_task_is_a_fibre_again(kernel: Kernel) -> None:
    kernel.workers = 1
    kinds: list[bool] = []

    async def handle(request: bytes) -> None:
        kinds.append(here().fibre is not None)
        if request == b"task":
            await own_task()
            await trio.lowlevel.checkpoint()

    kernel.handle = handle
    kernel.ask(b"task", b"memory", b"task", b"memory", STOP)
    with trio.fail_after(5):
        await kernel.main()
    assert kinds == [True] * 4


async def test_own_task_is_nothing_in_a_task() -> None:
    assert not await own_task()


async def test_a_stream_of_hits_does_not_starve_others(kernel: Kernel) -> None:
    stopped = False

    async def handle(_: bytes) -> None:
        assert len(kernel.taken) < 10_000
        kernel.ask(STOP if stopped else b"again")

    async def somebody_else() -> None:
        nonlocal stopped
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        stopped = True

    kernel.handle = handle
    kernel.ask(b"first")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel.main)
            nursery.start_soon(somebody_else)


async def test_cancelled_it_waits_for_who_sleeps_and_for_nobody_else(kernel: Kernel) -> None:
    sleepers = Sleepers()
    cancelled: list[bytes] = []
    done: list[bytes] = []

    async def handle(request: bytes) -> None:
        if request == b"task":
            await own_task()
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                cancelled.append(request)
                raise
        await sleepers.handle(request)
        if request == b"in the end a task":
            await own_task()
            await trio.lowlevel.cancel_shielded_checkpoint()
        done.append(request)

    kernel.handle = handle
    async with cancellable(kernel) as (nursery, scope):
        with trio.fail_after(5):
            kernel.ask(b"task", b"fibre", b"in the end a task")
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert cancelled == [b"task"]
            assert nursery.child_tasks  # its memory is in use
            sleepers.wake(b"fibre")
            await trio.testing.wait_all_tasks_blocked()
            assert done == [b"fibre"]
            assert nursery.child_tasks
            sleepers.wake(b"in the end a task")
            await trio.testing.wait_all_tasks_blocked()
            assert done == [b"fibre", b"in the end a task"]
            assert not nursery.child_tasks
    assert kernel.ended == 3  # all but the cancelled one came to an end of their own


async def test_cancelled_it_does_not_wait_for_who_waits_for_somebody_else(kernel: Kernel) -> None:
    fibres: dict[bytes, Fibre] = {}
    waits: list[bytes] = []
    seen: list[bytes] = []

    async def handle(request: bytes) -> None:
        for _ in range(3):  # whatever it waits for, it looks again
            fibre = here().fibre
            if fibre is None:
                waits.append(request)
                await trio.sleep_forever()
            else:
                fibres[request] = fibre
                await doze()
                seen.append(request)

    kernel.handle = handle
    async with cancellable(kernel) as (nursery, scope):
        with trio.fail_after(5):
            kernel.ask(b"a", b"b")
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            fibres[b"b"].wake()  # in the very moment
            await trio.testing.wait_all_tasks_blocked()
            assert not nursery.child_tasks
            assert sorted(waits) == [b"a", b"b"]
            assert sorted(seen) == [b"a", b"b", b"b"]
            for fibre in fibres.values():
                fibre.wake()  # by who doesn't know
            assert not here().ready


@pytest.mark.parametrize("where", ["fibre", "woken fibre", "task"])
async def test_a_worker_that_breaks_down_ends_them_all(kernel: Kernel, where: str) -> None:
    sleepers = Sleepers()

    async def handle(request: bytes) -> None:
        if request == b"other":
            await own_task()
            await trio.sleep_forever()
        if where == "task":
            await own_task()
        elif where == "woken fibre":
            await sleepers.handle(request)
        raise OSError(f"broken as a {where}")

    async def meanwhile() -> None:
        kernel.ask(b"other", b"x")
        if where == "woken fibre":
            await trio.testing.wait_all_tasks_blocked()
            sleepers.wake(b"x")

    kernel.handle = handle
    error = await failure(kernel.main, meanwhile)
    assert isinstance(error, OSError)
    assert str(error) == f"broken as a {where}"
    assert kernel.ended == 2


async def test_a_fibre_that_breaks_the_rule_is_told(kernel: Kernel) -> None:
    async def handle(_: bytes) -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()

    kernel.handle = handle
    kernel.ask(b"x")
    with trio.fail_after(5), pytest.raises(RuntimeError, match="without a task of its own"):
        await kernel.main()


async def test_a_worker_that_breaks_down_at_the_end_is_told_of(kernel: Kernel) -> None:
    async def work(crew: Crew) -> None:
        try:
            await crew.wait_readable(kernel.near.fileno())
        except trio.ClosedResourceError:
            raise OSError("broken at the end") from None

    async def main() -> None:
        crew = Crew()
        async with crew:
            crew.start_soon(work, crew)

    async def meanwhile() -> None:
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(kernel.near.fileno())

    error = await failure(main, meanwhile)
    assert isinstance(error, OSError)
    assert str(error) == "broken at the end"


async def test_a_descriptor_that_is_closed_ends_it_when_everybody_has_answered(kernel: Kernel) -> None:
    sleepers = Sleepers()
    kernel.handle = sleepers.handle
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel.main)
            kernel.ask(b"x")
            await trio.testing.wait_all_tasks_blocked()
            trio.lowlevel.notify_closing(kernel.near.fileno())
            await trio.testing.wait_all_tasks_blocked()
            assert kernel.ended == kernel.workers - 1
            sleepers.wake(b"x")
    assert sleepers.awake == [b"x"]
    assert kernel.ended == kernel.workers


async def test_workers_may_be_hired_while_it_runs(kernel: Kernel) -> None:
    kernel.workers = 1
    sleepers = Sleepers()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            crew: Crew = await nursery.start(kernel.main)

            async def handle(request: bytes) -> None:
                crew.start_soon(kernel.work, crew)  # as pyfuse3 does when nobody is idle
                await sleepers.handle(request)

            kernel.handle = handle
            kernel.ask(b"a", b"b", STOP)
            await trio.testing.wait_all_tasks_blocked()
            assert sorted(sleepers.fibres) == [b"a", b"b"]
            sleepers.wake(b"a")
            sleepers.wake(b"b")
    assert kernel.ended == 3


async def test_answers_are_taken_in_by_who_serves(kernel: Kernel) -> None:
    sleepers = Sleepers()
    kernel.handle = sleepers.handle
    far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def receive() -> None:
        sleepers.wake(near.recv(100))
        run_ready()

    with far, near, trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            Loop.current().watch(near.fileno(), receive)
            Loop.current().under_way = 1
            kernel.ask(b"a", b"b")
            far.send(b"a")
            far.send(b"b")
            nursery.start_soon(kernel.main)
            await trio.testing.wait_all_tasks_blocked()
            assert sleepers.awake == [b"a", b"b"]
            Loop.current().unwatch(near.fileno())
            Loop.current().under_way = 0
            kernel.ask(STOP)


async def test_answers_without_end_do_not_starve_others(kernel: Kernel) -> None:
    far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    looked = 0

    def receive() -> None:  # and leave it there
        nonlocal looked
        looked += 1

    with far, near, trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            Loop.current().watch(near.fileno(), receive)
            Loop.current().under_way = 1
            far.send(b"x")
            nursery.start_soon(kernel.main)
            await trio.testing.wait_all_tasks_blocked()
            before = looked
            kernel.ask(b"a")
            await trio.testing.wait_all_tasks_blocked()
            assert kernel.taken == [b"a"]
            assert before < looked <= before + 32
            Loop.current().under_way = 0  # there is nothing to come
            before = looked
            kernel.ask(b"b")
            await trio.testing.wait_all_tasks_blocked()
            assert kernel.taken == [b"a", b"b"]
            assert looked == before
            Loop.current().unwatch(near.fileno())
            Loop.current().under_way = 0
            kernel.ask(STOP)


def looks_in_vain(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The limits, in nanoseconds, of all looks from now on; none of them finds anything."""
    looks: list[int] = []

    def glance(_fd: int, limit: int) -> bool:
        looks.append(limit)
        return False

    monkeypatch.setattr(Loop.current(), "glance", glance)
    return looks


async def test_nobody_looks_for_requests_while_a_command_is_under_way(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop.current()
    looks = looks_in_vain(monkeypatch)
    async with trio.open_nursery() as nursery:
        crew: Crew = await nursery.start(kernel.main)
        for under_way, expected in ((1, 0), (0, 1)):
            loop.under_way = under_way
            await trio.testing.wait_all_tasks_blocked()
            looks.clear()
            crew._glance.limit = 1000  # each wait teaches it how long one takes here and now
            kernel.ask(b"x")
            await trio.testing.wait_all_tasks_blocked()
            assert len(looks) == expected
        kernel.ask(STOP)


async def test_nobody_looks_for_requests_where_no_data_was_asked_for(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = looks_in_vain(monkeypatch)
    moved = 0
    async with trio.open_nursery() as nursery:
        crew: Crew = await nursery.start(kernel.main)
        crew._moved = lambda: moved
        for count, expected in ((0, 0), (1, 1), (1, 0), (3, 1)):
            await trio.testing.wait_all_tasks_blocked()
            looks.clear()
            moved = count
            crew._glance.limit = 1000  # each wait teaches it how long one takes here and now
            kernel.ask(b"x")
            await trio.testing.wait_all_tasks_blocked()
            assert len(looks) == expected
        kernel.ask(STOP)


def test_pyfuse3_gets_its_own_back() -> None:
    before = vars(pyfuse3)["trio"]

    async def main() -> None:
        with workers_are_fibres():
            ours = vars(pyfuse3)["trio"]
            assert ours is not before
            assert isinstance(ours.open_nursery(), Crew)
            async with ours.Lock():
                pass

    trio.run(main)
    assert vars(pyfuse3)["trio"] is before
