"""Background workers: who runs them, how many there are, and how they end."""

from collections import deque

import pytest
import trio
import trio.testing

from iscsifuse.cache.workers import Workers
from iscsifuse.fibres import here, own_task, run_ready
from iscsifuse.strands import Strand, Team
from support.fibres import sleep


class Owner:
    """Jobs are numbers; each worker that does one sleeps until it is woken."""

    def __init__(self, *, limit: int = 2) -> None:
        self.jobs: deque[int] = deque()
        self.begun: list[int] = []
        self.done: list[int] = []
        self.asleep: dict[int, object] = {}
        self.workers: Workers[int] = Workers(limit, take=self.take, work=self.work)

    def take(self) -> int | None:
        if not self.jobs:
            return None
        job = self.jobs.popleft()
        if self.jobs:
            self.workers.kick()
        return job

    async def work(self, job: int) -> None:
        self.begun.append(job)
        self.asleep[job] = here().fibre
        await sleep()
        del self.asleep[job]
        self.done.append(job)

    def give(self, *jobs: int) -> None:
        self.jobs += jobs
        self.workers.kick()

    def wake(self, job: int) -> None:
        self.asleep[job].wake()  # type: ignore[attr-defined]
        run_ready()


async def test_as_many_jobs_at_once_as_may_be_and_the_others_in_their_turn() -> None:
    owner = Owner(limit=2)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            owner.workers.start(nursery)
            owner.give(1, 2, 3, 4)
            assert not owner.begun  # nothing runs in the midst of whoever kicks
            await trio.testing.wait_all_tasks_blocked()
            assert owner.begun == [1, 2]
            assert owner.workers.busy == 2
            owner.wake(1)
            assert owner.begun == [1, 2, 3]
            assert owner.done == [1]
            for job in (2, 3):
                owner.wake(job)
            owner.wake(4)
            assert owner.done == [1, 2, 3, 4]
            assert owner.workers.busy == 0
            owner.give(5)  # whoever rests is woken
            await trio.testing.wait_all_tasks_blocked()
            assert owner.begun[-1] == 5
            owner.wake(5)
            nursery.cancel_scope.cancel()
    assert owner.done[-1] == 5


async def test_kicked_by_a_fibre_they_run_without_a_round_of_the_event_loop() -> None:
    owner = Owner()

    async def kick() -> None:
        owner.give(1)
        seen.append(list(owner.begun))

    seen: list[list[int]] = []
    async with trio.open_nursery() as nursery:
        owner.workers.start(nursery)
        await trio.testing.wait_all_tasks_blocked()
        Strand(Team(), kick()).go_on()  # no await from here on
        run_ready()
        seen.append(list(owner.begun))
        owner.wake(1)
        nursery.cancel_scope.cancel()
    assert seen == [[], [1]]


async def test_cancelled_they_begin_nothing_more_and_wait_for_who_sleeps() -> None:
    owner = Owner(limit=1)
    ended = trio.Event()

    async def run(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        async with trio.open_nursery() as inner:
            owner.workers.start(inner)
            task_status.started(inner.cancel_scope)
        ended.set()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            scope: trio.CancelScope = await nursery.start(run)
            owner.give(1, 2)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert not ended.is_set()
            owner.wake(1)
            await ended.wait()
    assert owner.done == [1]
    assert owner.begun == [1]
    assert list(owner.jobs) == [2]
    owner.workers.kick()  # nobody is there any more
    run_ready()
    assert owner.begun == [1]


async def test_cancelled_who_has_a_task_ends_with_it() -> None:
    seen: list[str] = []

    async def work(job: int) -> None:
        await own_task()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            seen.append(f"{job} was cancelled")
            raise

    jobs = [7]
    workers: Workers[int] = Workers(3, take=lambda: jobs.pop() if jobs else None, work=work)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            workers.start(nursery)
            workers.kick()
            await trio.testing.wait_all_tasks_blocked()
            assert workers.busy == 1
            nursery.cancel_scope.cancel()
    assert seen == ["7 was cancelled"]
    assert workers.busy == 0


@pytest.mark.parametrize("own", [False, True])
async def test_a_mistake_in_a_job_ends_the_nursery(*, own: bool) -> None:
    async def work(_: int) -> None:
        if own:
            await own_task()
        raise RuntimeError("a mistake")

    jobs = [1, 2]
    workers: Workers[int] = Workers(3, take=lambda: jobs.pop() if jobs else None, work=work)
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="a mistake")), trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            workers.start(nursery)
            workers.kick()
            await trio.sleep_forever()
    assert jobs == [1]
    workers.kick()
    run_ready()
    assert jobs == [1]


async def test_who_was_kicked_and_has_not_begun_ends_with_the_others() -> None:
    owner = Owner()
    async with trio.open_nursery() as nursery:
        owner.workers.start(nursery)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        owner.give(1)
    assert not owner.begun
    assert list(owner.jobs) == [1]
    assert not here().ready  # no coroutine is left that nobody awaits


async def test_after_a_mistake_they_can_be_started_again() -> None:
    done: list[int] = []

    async def work(job: int) -> None:
        if job == 1:
            raise RuntimeError("a mistake")
        done.append(job)

    jobs = [1]
    workers: Workers[int] = Workers(1, take=lambda: jobs.pop() if jobs else None, work=work)
    with pytest.RaisesGroup(RuntimeError):
        async with trio.open_nursery() as nursery:
            workers.start(nursery)
            workers.kick()
    jobs.append(2)
    async with trio.open_nursery() as nursery:
        workers.start(nursery)
        workers.kick()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert done == [2]


async def test_they_can_be_started_again() -> None:
    owner = Owner(limit=1)
    for job in (1, 2):
        async with trio.open_nursery() as nursery:
            owner.workers.start(nursery)
            owner.give(job)
            await trio.testing.wait_all_tasks_blocked()
            owner.wake(job)
            nursery.cancel_scope.cancel()
    assert owner.done == [1, 2]
