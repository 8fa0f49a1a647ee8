"""Reading and writing 4 KiB at random places with O_DIRECT, so many at a time."""

import json
from collections.abc import Mapping
from pathlib import Path

from bench import shell
from bench.contender import Contender, FileContender, Opened
from bench.contents import changed_blocks, fill
from bench.peers import Libiscsi
from bench.shell import ContenderError, WrongBytesError
from bench.stage import Disk, Stage
from bench.work import Metric, Work

__all__ = ["RandomRead", "RandomWrite"]

BLOCK = 4096
IOPS = Metric("iops", "IOPS", higher_is_better=True)
_PATTERN = 0xA5
_APART = 257 * BLOCK  # steps of qemu-img bench, which knows no chance: far apart, and around the disk many times


class _Random(Work):
    """What reading and writing share.

    Up to 16 in flight there are so many threads, which do one at a time (psync); above that, one thread keeps so many
    in flight (libaio). Each thread has a part of the disk for itself: so it is known which blocks were written.
    """

    metrics = (IOPS,)
    is_writing: bool

    def __init__(self, stage: Stage, depth: int) -> None:
        super().__init__(stage)
        verb = "write" if self.is_writing else "read"
        self.depth = depth
        self.jobs = depth if depth <= 16 else 1
        self.name = f"random-{verb}-{depth}"
        engine = "psync" if depth == self.jobs else "libaio"
        self.title = f"random 4 KiB {verb}s, O_DIRECT, {depth} in flight ({engine})"
        self._engine = engine
        self._reads_to_check = round(2000 * stage.sizes.fio_seconds)

    def takes(self, contender: Contender) -> bool:
        return super().takes(contender) or isinstance(contender, Libiscsi)

    def fio(self, opened: Opened, disk: Disk) -> tuple[float, list[int]]:
        """Operations per second of all threads together, and how many each of them did.

        The time of writing includes a final fsync: otherwise a daemon could keep some of it for later.
        """
        seconds = self.stage.sizes.fio_seconds
        command: list[str | Path] = [
            "fio",
            "--name=job",
            "--filename=" + str(opened.path).replace(":", "\\:"),
            f"--rw={'randwrite' if self.is_writing else 'randread'}",
            f"--bs={BLOCK}",
            "--direct=1",
            f"--ioengine={self._engine}",
            f"--iodepth={self.depth // self.jobs}",
            f"--numjobs={self.jobs}",
            "--thread",
            f"--size={disk.size // self.jobs}",
            f"--offset_increment={disk.size // self.jobs}",
            "--time_based",
            f"--runtime={round(seconds * 1000)}ms",
            f"--buffer_pattern={_PATTERN:#x}",
            *(["--end_fsync=1"] if self.is_writing else []),
            "--allow_file_create=0",
            "--output-format=json",
        ]
        ran = shell.run(
            opened.command(*command), timeout=self.patience, folder=self.stage.folder, statuses=range(256)
        )
        complaint, brace, rest = ran.out.partition("{")
        errors = [line for line in complaint.splitlines() if line.startswith("fio: ")]  # before its report
        if errors or not brace:
            raise ContenderError(errors[0] if errors else f"fio said {ran.err.strip()!r}")
        report = json.loads(brace + rest)
        side = "write" if self.is_writing else "read"
        done = [int(job[side]["total_ios"]) for job in report["jobs"]]
        if len(done) != self.jobs or any(job["error"] for job in report["jobs"]) or not all(done):
            raise ContenderError(f"fio: {[job['error'] for job in report['jobs']]}, operations: {done}")
        return sum(float(job[side]["iops"]) for job in report["jobs"]), done

    def bare(self, contender: Libiscsi, disk: Disk, *, pattern: int | None) -> Mapping[str, float]:
        """The same by qemu-img bench, first for a moment to know how many of them take long enough."""
        count = 256

        def once() -> float:
            seconds, _ = contender.bench(
                disk, depth=self.depth, size=BLOCK, count=count, step=_APART, pattern=pattern
            )
            return seconds

        count = max(256, round(256 / max(once(), 0.005) * self.stage.sizes.fio_seconds))
        return {"iops": count / max(once(), 0.001)}


class RandomRead(_Random):
    """Reads of a disk of random bytes."""

    is_writing = False

    def prepare(self) -> None:
        assert self.stage.data.size

    def measure(self, contender: Contender) -> Mapping[str, float]:
        disk = self.stage.data
        if isinstance(contender, Libiscsi):
            return self.bare(contender, disk, pattern=None)
        assert isinstance(contender, FileContender)
        with contender.open([disk]) as opened:
            opened.forget()
            iops, _ = self.fio(opened, disk)
            if self.wants_check:
                script = Path(__file__).with_name("check_reads.py")
                words: list[str | Path] = [
                    "python3",
                    script,
                    opened.path,
                    disk.backing,
                    str(self.depth),
                    str(self._reads_to_check),
                ]
                try:
                    shell.run(opened.command(*words), timeout=self.patience)
                except ContenderError as error:
                    raise WrongBytesError(str(error)) from error
                self.was_checked = True
        return {"iops": iops}


class RandomWrite(_Random):
    """Writes to a disk of zeros, each of a pattern; afterwards so many blocks are the pattern, and all else zeros."""

    is_writing = True

    def prepare(self) -> None:
        assert self.stage.scratch.size

    def measure(self, contender: Contender) -> Mapping[str, float]:
        disk = self.stage.scratch
        fill(disk.backing)
        if isinstance(contender, Libiscsi):
            figures = self.bare(contender, disk, pattern=_PATTERN)
            changed_blocks(disk.backing, block=BLOCK, pattern=bytes([_PATTERN]) * BLOCK)
            self.was_checked = True
            return figures
        assert isinstance(contender, FileContender)
        with contender.open([disk]) as opened:
            opened.forget()
            iops, done = self.fio(opened, disk)
        self._check(disk, done)
        self.was_checked = True
        return {"iops": iops}

    def _check(self, disk: Disk, done: list[int]) -> None:
        """A thread comes to no block twice before it has been at all blocks of its part."""
        found = changed_blocks(disk.backing, block=BLOCK, pattern=bytes([_PATTERN]) * BLOCK)
        part = disk.size // self.jobs // BLOCK
        expected = sum(min(each, part) for each in done)
        # What is in flight when the time is over is done, and may not be counted.
        if not expected <= found <= expected + self.depth:
            raise WrongBytesError(f"random writes: {expected} blocks were written, {found} blocks have changed")
