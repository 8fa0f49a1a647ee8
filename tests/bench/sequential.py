"""Reading and writing from the beginning to the end, as dd and cat do."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench import shell
from bench.contender import SPARE, Contender, FileContender, Opened
from bench.contents import fill, require_pattern, require_same
from bench.host import cpu_seconds, peak_memory, take_back_memory
from bench.peers import Libiscsi
from bench.shell import ContenderError, WrongBytesError
from bench.stage import Disk, Stage
from bench.work import CPU, MB, MEMORY, RATE, Work, compare_with_backing
from support.disks import MIB

__all__ = ["Readers", "SequentialRead", "SequentialWrite", "WarmRead", "count_bytes"]

GIB = 1 << 30


class SequentialRead(Work):
    """The beginning of a disk is read once, from a fresh mount.

    So nothing is cached, neither in the kernel nor in the daemon. CPU time is that of the daemon alone: what the
    reading program costs is the same for all.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        title: str,
        command: Sequence[str],
        *,
        length: int,
        direct: bool = False,
        fresh: bool = False,
    ) -> None:
        """Prepare.

        Args:
            stage: where.
            name: see `Work`.
            title: see `Work`.
            command: has ``FILE`` for the file.
            length: bytes of it that the command reads.
            direct: whether it does so with O_DIRECT.
            fresh: whether each measurement has a tgtd of its own; see `Stage.fresh`.
        """
        super().__init__(stage)
        self.name = name
        self.title = title
        self.metrics = (RATE, CPU, MEMORY)
        self._command = command
        self._length = length
        self._direct = direct
        self._fresh = fresh

    def takes(self, contender: Contender) -> bool:
        is_bare = isinstance(contender, Libiscsi) and self.name in ("read-1m", "read-1m-fresh")
        return super().takes(contender) or is_bare

    def prepare(self) -> None:
        assert self.stage.data.size >= self._length

    def measure(self, contender: Contender) -> Mapping[str, float]:
        with maybe_fresh(self.stage, self.stage.data, fresh=self._fresh) as portal:
            if isinstance(contender, Libiscsi):
                return self._measure_bare(contender, portal)
            assert isinstance(contender, FileContender)
            return self._measure_file(contender, portal)

    def _measure_file(self, contender: FileContender, portal: str | None) -> Mapping[str, float]:
        disk = self.stage.data
        with contender.open([disk], portal=portal) as opened:
            opened.forget(room=self._length + SPARE)
            cpu = cpu_seconds(opened.pids)
            words = [word.replace("FILE", str(opened.path)) for word in self._command]
            ran = shell.run(opened.command(*words), output=Path("/dev/null"), timeout=self.patience)
            cpu = cpu_seconds(opened.pids) - cpu
            memory = peak_memory(opened.pids)
            if self.wants_check:
                self._check(opened, disk)
        return {
            "rate": self._length / ran.seconds / MB,
            "cpu": cpu / self._length * GIB,
            "memory": memory / MIB,
        }

    def _check(self, opened: Opened, disk: Disk) -> None:
        if not self._direct:
            compare_with_backing(self, opened, opened.path, disk.backing, self._length)
            return
        copy = self.stage.new_path("copy")
        try:
            words = ["dd", f"if={opened.path}", f"of={copy}", "bs=1M", "iflag=direct", *count_bytes(self._length)]
            shell.run(opened.command(*words), timeout=self.patience)
            require_same(copy, disk.backing, self._length, "O_DIRECT reads")
            self.was_checked = True
        finally:
            copy.unlink(missing_ok=True)

    def _measure_bare(self, contender: Libiscsi, portal: str | None) -> Mapping[str, float]:
        disk = self.stage.data
        seconds, ran = contender.bench(disk, depth=8, size=MIB, count=self._length // MIB, portal=portal)
        if self.wants_check:
            contender.check(disk, portal)
            self.was_checked = True
        return {"rate": self._length / seconds / MB, "cpu": ran.cpu / self._length * GIB}


class SequentialWrite(Work):
    """The beginning of a disk is written once, up to the return of fsync, and its backing file is looked at.

    The file held zeros before, and its memory was allocated.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        title: str,
        *,
        block: str,
        length: int,
        flags: Sequence[str] = (),
        fresh: bool = False,
    ) -> None:
        super().__init__(stage)
        self.name = name
        self.title = title
        self.metrics = (RATE, CPU)
        self._block = block
        self._length = length
        self._flags = flags
        self._fresh = fresh

    def takes(self, contender: Contender) -> bool:
        is_bare = isinstance(contender, Libiscsi) and self.name in ("write-1m", "write-1m-fresh")
        return super().takes(contender) or is_bare

    def prepare(self) -> None:
        assert min(self.stage.data.size, self.stage.scratch.size) >= self._length

    def measure(self, contender: Contender) -> Mapping[str, float]:
        fill(self.stage.scratch.backing)
        with maybe_fresh(self.stage, self.stage.scratch, fresh=self._fresh) as portal:
            if isinstance(contender, Libiscsi):
                return self._measure_bare(contender, portal)
            assert isinstance(contender, FileContender)
            return self._measure_file(contender, portal)

    def _measure_bare(self, contender: Libiscsi, portal: str | None) -> Mapping[str, float]:
        disk = self.stage.scratch
        take_back_memory(self._length + SPARE)
        count = self._length // MIB
        seconds, ran = contender.bench(disk, depth=8, size=MIB, count=count, pattern=0x5A, portal=portal)
        require_pattern(disk.backing, self._length, 0x5A, "writes")
        self.was_checked = True
        return {"rate": self._length / seconds / MB, "cpu": ran.cpu / self._length * GIB}

    def _measure_file(self, contender: FileContender, portal: str | None) -> Mapping[str, float]:
        disk = self.stage.scratch
        with contender.open([disk], portal=portal) as opened:
            opened.forget(room=self._length + SPARE)
            cpu = cpu_seconds(opened.pids)
            words = ["dd", f"if={self.stage.data.backing}", f"of={opened.path}", f"bs={self._block}"]
            words += ["conv=fsync,notrunc", *self._flags, *count_bytes(self._length)]
            ran = shell.run(opened.command(*words), timeout=self.patience)
            cpu = cpu_seconds(opened.pids) - cpu
            # What fsync has promised is there now, not only after the unmount.
            require_same(disk.backing, self.stage.data.backing, self._length, "writes")
            self.was_checked = True
        return {"rate": self._length / ran.seconds / MB, "cpu": cpu / self._length * GIB}


class WarmRead(Work):
    """A file is read three times that was read before, so that the kernel has all of it."""

    name = "warm-read"
    title = "read again, in the page cache: dd bs=1M"

    def measure(self, contender: Contender) -> Mapping[str, float]:
        assert isinstance(contender, FileContender)
        disk = self.stage.data
        length = self.stage.sizes.half
        with contender.open([disk]) as opened:
            command = opened.command("dd", f"if={opened.path}", "of=/dev/null", "bs=1M", *count_bytes(length))
            shell.run(command, timeout=self.patience)
            seconds = sum(shell.run(command, timeout=self.patience).seconds for _ in range(3))
            if self.wants_check:
                compare_with_backing(self, opened, opened.path, disk.backing, length)
        return {"rate": 3 * length / seconds / MB}


class Readers(Work):
    """Four programs read at once, each a quarter: of a disk of its own, or all of the same one."""

    def __init__(self, stage: Stage, *, luns: int) -> None:
        super().__init__(stage)
        self.name = f"readers-{luns}-lun" + ("s" if luns > 1 else "")
        self.title = f"four readers at once on {luns} LUN{'s' if luns > 1 else ''}: dd bs=1M"
        self._luns = luns

    def prepare(self) -> None:
        assert len(self.stage.four) == 4

    def measure(self, contender: Contender) -> Mapping[str, float]:
        assert isinstance(contender, FileContender)
        disks = self.stage.four[: self._luns]
        quarter = self.stage.sizes.full // 4
        with contender.open(disks) as opened:
            opened.forget(room=4 * quarter + SPARE)
            paths = [opened.paths[number % self._luns] for number in range(4)]
            starts = [number * quarter for number in range(4)]
            commands = [
                opened.command("dd", f"if={path}", "of=/dev/null", "bs=1M", *count_bytes(quarter, skip=start))
                for path, start in zip(paths, starts, strict=True)
            ]
            seconds = shell.run_together(commands, timeout=self.patience)
            if self.wants_check:
                checks = [
                    opened.command("cmp", "-n", str(quarter), "-i", str(start), path, disks[0].backing)
                    for path, start in zip(paths, starts, strict=True)
                ]
                try:
                    shell.run_together(checks, timeout=self.patience)
                except ContenderError as error:
                    raise WrongBytesError(str(error)) from error
                self.was_checked = True
        return {"rate": 4 * quarter / seconds / MB}


@contextmanager
def maybe_fresh(stage: Stage, disk: Disk, *, fresh: bool) -> Iterator[str | None]:
    """Where to log in for a disk: at a tgtd that has just been started, or (None) at the one that all share."""
    if not fresh:
        yield None
        return
    with stage.fresh(disk) as portal:
        yield portal


def count_bytes(length: int, *, skip: int = 0) -> list[str]:
    """How dd is told to move so many bytes, whatever its block size."""
    words = [f"count={length}", "iflag=count_bytes"]
    return [*words, f"skip={skip}", "iflag=skip_bytes"] if skip else words
