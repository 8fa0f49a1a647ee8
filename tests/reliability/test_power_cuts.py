"""Through a real mount: a target forgets what it was not told to keep, each time its power is cut.

The target runs in a thread of the test and knows which blocks are stable; programs are real, and so is the kernel.
"""

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from iscsifuse.scsi.cdb import Opcode as Scsi
from iscsifuse.testing.actions import Call
from iscsifuse.testing.config import LoginAttention, TargetConfig
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Rule, cdb
from iscsifuse.testing.target import LoopbackTarget
from support.cli import Mounted
from support.ports import wait_until

pytestmark = [pytest.mark.fuse, pytest.mark.conformance(104)]

MIB = 1 << 20
SECTOR = 4096
TARGET = TargetConfig.of().nodes[0].name


@contextmanager
def volatile(size: int) -> Iterator[tuple[LoopbackTarget, Disk]]:
    """A target with one disk that is full of zeros, and forgets."""
    disk = Disk.from_bytes(bytes(size))
    config = TargetConfig.of(disk)
    config.login_attention = LoginAttention.POWER_ON
    with LoopbackTarget(config).in_thread() as target:
        yield target, disk
    assert not target.violations, target.violations


def test_what_left_the_kernel_and_was_lost_by_the_disk_is_there_after_fsync(tmp_path: Path) -> None:
    """Written, accepted by the disk, power cut, fsync → stable, all of it."""
    data = random.Random(3).randbytes(2 * MIB)
    with volatile(4 * MIB) as (target, disk), Mounted(target.url(target=TARGET), tmp_path / "m", "--rw") as mounted:
        descriptor = os.open(mounted.lun(0), os.O_RDWR)
        try:
            os.pwrite(descriptor, data, 12345)
            wait_until(
                lambda: disk.unstable_blocks >= len(data) // 512 - 16, timeout=30, what="the disk to have accepted it"
            )
            assert target.call(target.power_cut) > 0
            assert disk.contents() == bytes(4 * MIB)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        assert target.call(disk.stable_contents) == bytes(12345) + data + bytes(4 * MIB - 12345 - len(data))


def test_power_cuts_under_programs_that_write_and_sync(tmp_path: Path) -> None:
    """Four programs write and fsync; the power is cut before flushes, behind them, and in between.

    What an fsync covered is stable from then on, whatever follows; in the end that is everything.
    """
    zones, size = 4, MIB
    wrong: list[str] = []
    lost: list[int] = []

    with volatile(zones * size) as (target, disk):

        def cut() -> None:
            lost.append(target.power_cut())

        for direction, opcode, nth in (
            (IN, Scsi.SYNCHRONIZE_CACHE_10, 3),
            (OUT, Scsi.SYNCHRONIZE_CACHE_10, 6),
            (OUT, Scsi.WRITE_10, 120),
            (IN, Scsi.SYNCHRONIZE_CACHE_10, 13),
        ):
            target.script.add(Rule(direction, Call(cut), cdb(opcode), nth=nth))

        def write(path: Path, zone: int) -> bytes:
            r = random.Random(zone)
            image = bytearray(size)
            with path.open("r+b", buffering=0) as file:
                for _ in range(12):
                    for _ in range(8):
                        at = r.randrange(size - SECTOR)
                        data = r.randbytes(r.randrange(1, SECTOR))
                        os.pwrite(file.fileno(), data, zone * size + at)
                        image[at : at + len(data)] = data
                    os.fsync(file.fileno())
                    if target.call(disk.stable_contents)[zone * size : (zone + 1) * size] != image:
                        wrong.append(f"zone {zone}")
            return bytes(image)

        with (
            Mounted(target.url(target=TARGET), tmp_path / "m", "--rw") as mounted,
            ThreadPoolExecutor(zones) as pool,
        ):
            images = list(pool.map(partial(write, mounted.lun(0)), range(zones)))
        assert len(lost) == 4
        assert sum(lost) > 0
        assert not wrong
        assert target.call(disk.stable_contents) == b"".join(images)
