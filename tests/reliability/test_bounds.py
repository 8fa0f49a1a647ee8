"""Thousands of reconnects, and nothing grows; one disk that hangs stops no other."""

import gc
import logging
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from reliability_kit import BLOCK, bench, config_of, pattern, settings_of

from iscsifuse.errors import CommandTimeoutError
from iscsifuse.initiator import nexus, revival
from iscsifuse.initiator.inventory import scan
from iscsifuse.initiator.logical_unit import LogicalUnit
from iscsifuse.iscsi.pdu import Opcode
from iscsifuse.mount.sparing import BURST, EVERY, SparingFilter
from iscsifuse.testing.actions import Late
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, Rule, all_of, is_a, lun

OURS = [tracemalloc.Filter(True, f"*/iscsifuse/{part}/*") for part in ("initiator", "iscsi", "scsi", "cache")]
MOMENTARY = 65536
"""Bytes by which one moment differs from another: the last session, not yet or no longer there."""
PLACES_THAT_LOG = 3
"""Session lost, logged in again, can't log in again."""


class Lines(logging.Filter):
    """Counts what is logged, and what of it the daemon's log gets. Nobody else gets it: pytest keeps every record."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.passed = 0
        self._sparing = SparingFilter()

    def filter(self, record: logging.LogRecord) -> bool:
        self.all += 1
        self.passed += self._sparing.filter(record)
        return False


@pytest.fixture
def lines() -> Iterator[Lines]:
    counting = Lines()
    for log in (nexus.log, revival.log):
        log.addFilter(counting)
    yield counting
    for log in (nexus.log, revival.log):
        log.removeFilter(counting)


def footprint() -> tuple[int, int, int]:
    """Open descriptors, living tasks, bytes that our code has allocated and keeps."""
    gc.collect()
    snapshot = tracemalloc.take_snapshot().filter_traces(OURS)
    return (
        len(list(Path("/proc/self/fd").iterdir())),
        trio.lowlevel.current_statistics().tasks_living,
        sum(trace.size for trace in snapshot.traces),
    )


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.slow)])
async def test_reconnects_leave_nothing_behind(count: int, lines: Lines) -> None:
    disk = Disk(blocks=64, journal=False)
    began = time.monotonic()
    async with bench(config_of(disk, record=False), within=count * 0.5) as at:

        async def reconnect(number: int) -> None:
            """With a read and a write under way; their data has to be right."""
            await at.file.write(number % 32 * BLOCK, pattern(number))
            memory = memoryview(bytearray(BLOCK))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(at.file.sync)
                nursery.start_soon(lambda: at.unit.read_into(memory, lba=63))
                at.target.drop_connections(reset=number % 2 == 0)
            assert disk.contents(lba=number % 32, blocks=1) == pattern(number)

        tracemalloc.start()
        try:
            for number in range(50):
                await reconnect(number)
            before = footprint()
            for number in range(50, 50 + count):
                await reconnect(number)
            after = footprint()
        finally:
            tracemalloc.stop()
        assert at.nexus.reconnects >= count
        assert at.nexus.report()["reconnects"] == at.nexus.reconnects
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2] + MOMENTARY, (before, after)
    assert lines.all >= 2 * count
    assert lines.passed <= PLACES_THAT_LOG * (BURST + (time.monotonic() - began) / EVERY + 1)


@pytest.mark.expect_log(r"READ\(10\) took longer than 1 seconds: aborting it")
async def test_a_disk_that_hangs_stops_no_other() -> None:
    """Every command to one LUN is taken and not answered; another LUN of the same session goes on."""
    config = config_of(Disk(blocks=64, lun=0), Disk.from_bytes(pattern(1, 64), lun=1))
    async with bench(config, settings=settings_of(timeout=1.0)) as at:
        other = LogicalUnit(at.nexus, (await scan(at.nexus))[1])
        config.script.add(Rule(IN, Late(3600), all_of(is_a(Opcode.SCSI_COMMAND), lun(0)), times=0))
        ended: list[float] = []
        began = trio.current_time()

        async def wait_for_the_hung_one() -> None:
            with pytest.raises(CommandTimeoutError):
                await at.unit.read_into(memoryview(bytearray(BLOCK)), lba=0)
            ended.append(trio.current_time() - began)

        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(wait_for_the_hung_one)
            memory = memoryview(bytearray(BLOCK))
            turns = 0
            while not ended:
                await other.read_into(memory, lba=turns % 64)
                assert bytes(memory) == pattern(1, 64)[turns % 64 * BLOCK :][:BLOCK]
                turns += 1
        assert turns > 10
        assert len(ended) == 40
        assert max(ended) < 1.0 + 10.0  # the deadline, and as long as an abortion may take
        assert at.nexus.reconnects == 0
