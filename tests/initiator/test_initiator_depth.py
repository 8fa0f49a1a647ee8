"""How a unit's queue depth follows what it refuses, step by step."""

from collections.abc import Callable

import pytest
import trio
from initiator_fakes import LUN_0, jumping

from iscsifuse.errors import SessionLostError
from iscsifuse.initiator.depth import GROW_EVERY, QueueDepth
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.status import Status

READ = cdbs.read(lba=0, blocks=1)


class Disk:
    """Takes some commands at a time, each for a while, and refuses the others at once."""

    def __init__(self, *, takes: int, seconds: float = 1.0, refusal: int = Status.TASK_SET_FULL) -> None:
        self.takes = takes
        self.seconds = seconds
        self.refusal = refusal
        self.has = self.most = self.refused = 0
        self.done: list[int] = []
        self.error: Exception | None = None

    async def execute(
        self,
        cdb: bytes,
        *,
        lun: bytes,
        buffer_in: memoryview | None = None,
        buffer_out: memoryview | None = None,
        exact: bool = False,
    ) -> Task:
        task = Task(cdb, lun=lun, buffer_in=buffer_in, buffer_out=buffer_out, exact=exact)
        task.started = trio.current_time()
        if self.has >= self.takes:
            self.refused += 1
            await trio.sleep(0.001)
            task.status = self.refusal
            return task
        self.has += 1
        self.most = max(self.most, self.has)
        await trio.sleep(self.seconds)
        self.has -= 1
        if self.error is not None:
            raise self.error
        task.status = Status.GOOD
        return task


def _depth(disk: Disk, *, patience: float = 60.0) -> QueueDepth:
    return QueueDepth(disk, label="LUN 0 of iqn.x", patience=patience)


async def _once(depth: QueueDepth) -> int:
    return (await depth.execute(READ, lun=LUN_0)).status


async def _at_once(depth: QueueDepth, count: int, job: Callable[[QueueDepth], object] = _once) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(job, depth)  # type: ignore[arg-type]


@pytest.mark.conformance(109)
@jumping
async def test_depth_without_a_refusal_there_is_no_limit() -> None:
    disk = Disk(takes=1000)
    depth = _depth(disk)
    await _at_once(depth, 300)
    assert (disk.most, depth.limited, depth.under_way) == (300, False, 0)


@pytest.mark.conformance(109)
@pytest.mark.parametrize("refusal", [Status.BUSY, Status.TASK_SET_FULL])
@jumping
async def test_depth_many_refusals_of_one_burst_halve_it_once(refusal: int) -> None:
    disk = Disk(takes=8, refusal=refusal)
    depth = _depth(disk)
    await _at_once(depth, 64)
    assert disk.refused == 56
    assert (depth.limited, depth.limit) == (True, 32)
    await _at_once(depth, 64)  # 32 at first, of which 24 are refused, and so on
    assert depth.limit <= 16
    await _at_once(depth, 64)
    await _at_once(depth, 64)
    assert 4 <= depth.limit <= 12
    before = disk.refused
    await _at_once(depth, 64)
    assert disk.refused - before <= 8
    assert depth.under_way == 0


@pytest.mark.conformance(109)
@jumping
async def test_depth_a_busy_disk_gets_one_at_a_time_at_least() -> None:
    disk = Disk(takes=0)
    depth = _depth(disk)
    for _ in range(5):
        assert await _once(depth) == Status.TASK_SET_FULL
        await trio.sleep(0.01)
    assert depth.limit == 1
    disk.takes = 1
    await trio.sleep(GROW_EVERY)
    assert await _once(depth) == Status.GOOD
    assert not depth.limited  # it began with one


@pytest.mark.conformance(109)
@jumping
async def test_depth_grows_by_a_quarter_a_second_until_it_is_as_before() -> None:
    disk = Disk(takes=10, seconds=0.01)
    depth = _depth(disk)
    await _at_once(depth, 40)
    disk.takes = 1000
    limits = [depth.limit]
    while depth.limited:
        await trio.sleep(GROW_EVERY / 2)
        await _once(depth)
        if depth.limit != limits[-1]:
            limits.append(depth.limit)
    assert limits == [20, 25, 31, 38, 47]
    assert trio.current_time() < 5 * GROW_EVERY
    disk.most = 0
    await _at_once(depth, 40)
    assert disk.most == 40


@pytest.mark.conformance(109)
@jumping
async def test_depth_turns_are_taken_in_order_and_nobody_passes() -> None:
    disk = Disk(takes=2, seconds=0.05)
    depth = _depth(disk)
    await _at_once(depth, 4)
    assert depth.limit == 2
    disk.takes = 1000  # nobody else holds them up
    order: list[int] = []

    async def go(number: int) -> None:
        await trio.sleep(number / 1000)
        await _once(depth)
        order.append(number)

    disk.most = 0
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(go, number)
    assert order == list(range(20))
    assert disk.most == 2


@pytest.mark.conformance(109)
@jumping
async def test_depth_nobody_waits_longer_than_a_command_may_take() -> None:
    disk = Disk(takes=1, seconds=1000)
    depth = _depth(disk, patience=5)
    await depth_of_one(disk, depth)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_once, depth)
        await trio.sleep(0.1)
        began = trio.current_time()
        assert await _once(depth) == Status.TASK_SET_FULL  # the target's own answer
        assert trio.current_time() - began == pytest.approx(5, abs=0.1)
        nursery.cancel_scope.cancel()
    assert depth.under_way == 0


async def depth_of_one(disk: Disk, depth: QueueDepth) -> None:
    disk.takes = 0
    await _at_once(depth, 3)
    disk.takes = 1
    assert depth.limit == 1


@jumping
async def test_depth_who_is_cancelled_or_fails_gives_the_turn_to_the_next() -> None:
    disk = Disk(takes=1)
    depth = _depth(disk)
    await depth_of_one(disk, depth)
    disk.error = SessionLostError("gone")

    async def fail(depth: QueueDepth) -> None:
        with pytest.raises(SessionLostError):
            await _once(depth)

    with trio.move_on_after(0.5):
        await _at_once(depth, 5, fail)
    assert depth.under_way == 0
    disk.has = 0
    await _at_once(depth, 3, fail)
    disk.error = None
    assert await _once(depth) == Status.GOOD
    assert depth.under_way == 0
