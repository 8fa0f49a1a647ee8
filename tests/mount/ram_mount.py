"""Mounts disks that are in memory: ``python ram_mount.py JSON``. Everything but the initiator is real.

The folder ``control`` commands the disks: the file ``fail-N`` holds the errno that transfers of LUN N fail with,
``stall-N`` makes them wait for as long as it exists, ``grow-N`` holds a new number of blocks, ``report-N`` what was
lost after it had been written. ``accident`` is a mistake in what the disks stand on. With ``no-threads`` the daemon
can't have one more. What happened to a disk is written to ``log-N``.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from iscsifuse.cache import BufferPool, CacheSettings, block_file
from iscsifuse.errors import CommandTimeoutError, IscsifuseError, NothingFoundError, WriteBackError
from iscsifuse.fibres import own_task
from iscsifuse.initiator.settings import Portal, SessionSettings
from iscsifuse.initiator.statistics import CommandStatistics
from iscsifuse.iscsi.tasks import Task
from iscsifuse.mount import assembly, daemon, filesystem
from iscsifuse.mount.assembly import Assembly
from iscsifuse.mount.operations import DiskOperations
from iscsifuse.mount.plan import MountPlan
from iscsifuse.mount.tree import Disk
from iscsifuse.scsi import cdb as cdbs

TARGET = "iqn.2026-11.com.example:ram"


class RamDisk:
    """A block device of bytes, under the command of files."""

    def __init__(self, lun: int, blocks: int, block_length: int, control: Path) -> None:
        self.lun = lun
        self.block_length = block_length
        self.block_count = blocks
        self.write_burst = 1 << 18
        self.latency = 0.0
        self.volatile = False
        self.data = bytearray(blocks * block_length)
        self.statistics = CommandStatistics()
        self._control = control

    async def _obey(self) -> None:
        stall = self._control / f"stall-{self.lun}"
        for _ in range(100_000):
            if not stall.exists():
                break
            await trio.sleep(0.01)
        fail = self._control / f"fail-{self.lun}"
        if fail.exists():
            raise (
                OSError(int(fail.read_text()), "as commanded")
                if fail.read_text()
                else CommandTimeoutError("timed out")
            )

    def _note(self, what: str) -> None:
        with (self._control / f"log-{self.lun}").open("a") as file:
            file.write(what + "\n")

    async def read_into(self, buffer: memoryview, *, lba: int) -> None:
        await own_task()
        await trio.lowlevel.checkpoint()
        await self._obey()
        start = lba * self.block_length
        buffer[:] = self.data[start : start + len(buffer)]
        task = Task(cdbs.read(lba=lba, blocks=len(buffer) // self.block_length), lun=bytes(8), buffer_in=buffer)
        task.received = len(buffer)
        task.finish(status=0, residual=0, underflow=False, overflow=False)
        self.statistics.count(task, 0.001)

    async def write(self, buffer: memoryview, *, lba: int, fua: bool = False) -> None:  # noqa: ARG002
        await own_task()
        await trio.lowlevel.checkpoint()
        await self._obey()
        start = lba * self.block_length
        self.data[start : start + len(buffer)] = buffer
        self._note(f"write {lba} {len(buffer)}")

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        await self._obey()
        self._note("flush")


class Session:
    def report(self) -> dict[str, object]:
        return {"target": TARGET, "state": "logged in"}


def plan_of(options: dict[str, object]) -> MountPlan:
    fields = dict(options)
    for name in (
        "control",
        "disks",
        "block_length",
        "targets",
        "blow_up",
        "fail_login",
        "delay",
        "partial",
        "break_loop",
        "may_abort",
        "note_opens",
        "break_invalidations",
        "break_release",
        "stop_timeout",
    ):
        fields.pop(name, None)
    fields["mountpoint"] = Path(str(fields["mountpoint"]))
    session = SessionSettings(initiator_name="iqn.2026-11.com.example:us", reconnect_timeout=2, timeout=2)
    return MountPlan(
        **{  # type: ignore[arg-type]
            "source": "iscsi://ram,disk/",
            "portal": Portal("ram"),
            "target_name": TARGET,
            "lun": None,
            "session": session,
            **fields,
        }
    )


def main() -> int:
    options = json.loads(sys.argv[1])
    control = Path(options["control"])
    logging.basicConfig(level=logging.DEBUG if os.environ.get("DEBUG") else logging.INFO, format="%(message)s")

    @asynccontextmanager
    async def assemble(plan: MountPlan) -> AsyncIterator[Assembly]:
        if options.get("fail_login"):
            raise NothingFoundError("there is no such LUN")
        if options.get("delay"):
            await trio.sleep(options["delay"])
        if options.get("blow_up"):
            os.abort()
        pool = BufferPool(plan.cache_size)
        settings = CacheSettings(
            read_ahead=plan.read_ahead, write_behind=plan.write_behind, direct=plan.direct_io, keep_strays=False
        )
        made = Assembly(partial=bool(options.get("partial")), sessions=[Session()])
        async with trio.open_nursery() as nursery:
            disks = []
            for lun, blocks in enumerate(options.get("disks", [32768])):
                device = RamDisk(lun, blocks, options.get("block_length", 512), control)
                device.statistics = made.statistics
                file = block_file(device, pool=pool, settings=settings)
                await nursery.start(file.run)
                disk = Disk(TARGET, lun, file, writable=plan.read_write)
                disks.append(disk)

                async def grow(device: RamDisk = device, disk: Disk = disk) -> None:
                    order = control / f"grow-{device.lun}"
                    while True:
                        await trio.sleep(0.02)
                        if order.exists():
                            count = int(order.read_text())
                            order.unlink()
                            more = bytes([count % 251]) * (max(0, count - device.block_count) * device.block_length)
                            device.data.extend(more)
                            device.block_count = count
                            disk.file.invalidate()
                            if made.on_change:
                                made.on_change(disk)
                        report = control / f"report-{device.lun}"
                        if report.exists():
                            disk.file.report(WriteBackError(report.read_text()))
                            report.unlink()
                        if (control / "accident").exists() and made.breakdown.error is None:
                            made.breakdown.note(ZeroDivisionError("a mistake"))

                nursery.start_soon(grow)
            made.disks = disks
            if (control / "busy").exists():

                async def be_busy() -> None:
                    while True:
                        await trio.sleep(0.001)
                        time.sleep(0.1)  # noqa: ASYNC251 - on purpose

                nursery.start_soon(be_busy)
            try:
                yield made
            finally:
                nursery.cancel_scope.cancel()
                with contextlib.suppress(OSError):
                    (control / "logged-out").touch()

    if options.get("break_loop"):
        sound = pyfuse3.main

        async def break_down(min_tasks: int = 1, max_tasks: int = 99) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sound, min_tasks, max_tasks)
                while not (control / "break").exists():  # noqa: ASYNC110
                    await trio.sleep(0.01)
                raise OSError(5, "as commanded")

        pyfuse3.main = break_down
    if options.get("break_release"):
        sound_main = pyfuse3.main
        calls = []

        async def break_down_later(min_tasks: int = 1, max_tasks: int = 99) -> None:
            calls.append(max_tasks)
            try:
                await sound_main(min_tasks, max_tasks)
            finally:
                if len(calls) > 1:
                    raise OSError(5, "as commanded")

        pyfuse3.main = break_down_later
    if options.get("break_invalidations"):

        def fail(*_: object) -> None:
            raise ZeroDivisionError("a mistake")

        vars(pyfuse3)["invalidate_inode"] = fail
    sound_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if (control / "no-threads").exists():
            raise RuntimeError("can't start new thread")
        sound_start(thread)

    vars(threading)["Thread"].start = start
    if "stop_timeout" in options:
        report = vars(filesystem)["StatusReport"]

        def impatient(**fields: Any) -> Any:
            return report(**{**fields, "stop_timeout": options["stop_timeout"]})

        vars(filesystem)["StatusReport"] = impatient
    if options.get("may_abort") is False:
        vars(filesystem)["abort_connection"] = lambda *_: False
    if options.get("note_opens"):
        sound_open = DiskOperations.open

        async def noted(self: DiskOperations, *arguments: Any) -> Any:
            with (control / "opens").open("a") as file:
                file.write("open\n")
            return await sound_open(self, *arguments)

        vars(filesystem)["DiskOperations"].open = noted
    assembly.assemble = assemble
    try:
        return daemon.mount(plan_of(options))
    except (IscsifuseError, WriteBackError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 99


if __name__ == "__main__":
    sys.exit(main())
