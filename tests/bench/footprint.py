"""What a mount costs: seconds until it can be used, and memory under load."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from bench import shell
from bench.contender import Contender, FileContender
from bench.contents import require_same
from bench.host import peak_memory
from bench.ours import Iscsifuse
from bench.sequential import count_bytes
from bench.shell import ContenderError
from bench.stage import Stage, many_target
from bench.work import SECONDS, Metric, Work
from support.disks import MIB
from support.tgt import TgtServer

__all__ = ["CACHE_SIZE", "Memory", "MountTime"]

CACHE_SIZE = 64 * MIB
"""iscsifuse's default ``cache_size``."""


class _Many(Work):
    """Disks of a server of their own, which lives as long as the work."""

    def __init__(self, stage: Stage, luns: int) -> None:
        super().__init__(stage)
        self.luns = luns
        self._stack = contextlib.ExitStack()

    def takes(self, contender: Contender) -> bool:
        return super().takes(contender) and isinstance(contender, Iscsifuse)

    def prepare(self) -> None:
        self.server: TgtServer = self._stack.enter_context(self.stage.many(self.luns))

    def finish(self) -> None:
        self._stack.close()


class MountTime(_Many):
    """From ``iscsifuse mount`` to its return: the files can be used then. The others: until the file is there.

    One disk is a target's only one; more of them are all that a portal has, 16 to a target.
    """

    def __init__(self, stage: Stage, luns: int) -> None:
        super().__init__(stage, luns)
        self.name = f"mount-{luns}"
        self.title = f"mount, until {luns} LUN{'s' if luns > 1 else ''} can be used"
        self.metrics = (SECONDS,)

    def takes(self, contender: Contender) -> bool:
        return super().takes(contender) or (
            self.luns == 1 and isinstance(contender, FileContender) and contender.works is None
        )

    def prepare(self) -> None:
        if self.luns > 1:
            super().prepare()
        else:
            assert self.stage.scratch.size

    def measure(self, contender: Contender) -> Mapping[str, float]:
        assert isinstance(contender, FileContender)
        if self.luns == 1:
            with contender.open([self.stage.scratch]) as opened:
                return {"time": opened.seconds}
        assert isinstance(contender, Iscsifuse)
        with contender.mount(self.server.url(), "--rw", timeout=self.patience) as (point, _, seconds):
            shown = shell.run(["find", point, "-name", "lun-*"], timeout=self.patience).out.split()
            if len(shown) != self.luns:
                raise ContenderError(f"{len(shown)} LUNs of {self.luns} are there")
        return {"time": seconds}


class Memory(_Many):
    """The most resident memory of a daemon that shows 64 disks, so far, after each of several loads."""

    name = "memory"
    title = "most resident memory with 64 LUNs"
    metrics = tuple(
        Metric(name, "MiB", higher_is_better=False) for name in ("mounted", "read", "written", "random", "64-readers")
    )

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage, 64)

    def measure(self, contender: Contender) -> Mapping[str, float]:
        assert isinstance(contender, Iscsifuse)
        sizes = self.stage.sizes
        figures = {}
        with contender.mount(self.server.url(), "--rw", timeout=self.patience) as (point, pid, _):
            here = point / many_target(0)

            def note(name: str) -> None:
                figures[name] = peak_memory([pid]) / MIB

            note("mounted")
            self._run("dd", f"if={here}/lun-1", "of=/dev/null", "bs=1M")
            note("read")
            source = self.stage.data.backing
            words = ["dd", f"if={source}", f"of={here}/lun-2", "bs=1M", "conv=notrunc,fsync"]
            self._run(*words, *count_bytes(sizes.half))
            require_same(self.server.folder / "1.img", source, sizes.half, "writes")
            self.was_checked = True
            note("written")
            self._verified_random_io(here)
            note("random")
            files = [point / many_target(number // 16) / f"lun-{number % 16 + 1}" for number in range(self.luns)]
            each = count_bytes(min(8 * MIB, sizes.full))
            shell.run_together(
                [["dd", f"if={file}", "of=/dev/null", "bs=1M", *each] for file in files], timeout=self.patience
            )
            note("64-readers")
        return figures

    def _verified_random_io(self, folder: Path) -> None:
        """fio reads back what it wrote, six files at once, in pieces of any size at any place."""
        command: list[str | Path] = ["fio", "--rw=randrw", "--bsrange=512-1M", "--bs_unaligned", "--verify=crc32c"]
        command += [f"--size={min(64 * MIB, self.stage.sizes.full)}", "--verify_state_save=0", "--end_fsync=1"]
        for lun in range(3, 9):
            escaped = str(folder / f"lun-{lun}").replace(":", "\\:")
            command += [f"--name=job{lun}", f"--filename={escaped}"]
        self._run(*command)

    def _run(self, *words: str | Path) -> None:
        shell.run(words, timeout=self.patience, folder=self.stage.folder)
