"""A target that is far away, behind a line of 1 Gbit/s, and one that wants checksums."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench import shell
from bench.contender import SPARE, Contender, FileContender
from bench.contents import fill, require_pattern, require_same
from bench.ours import Iscsifuse
from bench.peers import Libiscsi
from bench.sequential import count_bytes
from bench.shell import ContenderError, WrongBytesError
from bench.stage import Disk, Stage
from bench.work import MB, RATE, SECONDS, Metric, Work, compare_with_backing
from support.disks import MIB
from support.ports import HOST
from support.relay import Relay

__all__ = ["LINE", "Digests", "DigestsOfQuickTarget", "FarList", "FarRead", "FarWrite"]

LINE = 125_000_000
"""Bytes per second of the line, one way: 1 Gbit/s."""


class _Far(Work):
    """Everything goes through a relay that delays it, and carries no more than the line does.

    Who does one request at a time is slow here, in proportion to the distance: the other programs get less to do,
    because a rate is a rate. libiscsi without a file has 32 requests of 1 MiB in flight.
    """

    metrics = (RATE, Metric("of-line", "of 1 Gbit/s", higher_is_better=True))
    verb: str

    def __init__(self, stage: Stage, round_trip: float) -> None:
        super().__init__(stage)
        self._delay = round_trip / 2
        milliseconds = round(round_trip * 1000)
        self.name = f"far-{milliseconds}ms-{self.verb}"
        self.title = f"{self.verb} over {milliseconds} ms round trip, 1 Gbit/s: dd bs=1M"

    def takes(self, contender: Contender) -> bool:
        return super().takes(contender) or isinstance(contender, Libiscsi)

    def prepare(self) -> None:
        assert self.stage.data.size == self.stage.scratch.size

    def length(self, contender: Contender) -> int:
        """How many bytes a contender has to move."""
        sizes = self.stage.sizes
        return sizes.half if contender.is_ours or isinstance(contender, Libiscsi) else max(sizes.full // 64, MIB)

    def relay(self) -> Relay:
        return Relay(self.stage.server.port, delay=self._delay, rate=LINE)

    @staticmethod
    def figures(length: int, seconds: float) -> Mapping[str, float]:
        return {"rate": length / seconds / MB, "of-line": length / seconds / LINE}


class FarRead(_Far):
    """dd reads the beginning of a disk."""

    verb = "read"

    def measure(self, contender: Contender) -> Mapping[str, float]:
        disk = self.stage.data
        length = self.length(contender)
        with self.relay() as relay:
            portal = f"{HOST}:{relay.port}"
            if isinstance(contender, Libiscsi):
                seconds, _ = contender.bench(disk, depth=32, size=MIB, count=length // MIB, portal=portal)
                return self.figures(length, seconds)
            assert isinstance(contender, FileContender)
            with contender.open([disk], portal=portal) as opened:
                opened.forget()
                words = ["dd", f"if={opened.path}", "of=/dev/null", "bs=1M", *count_bytes(length)]
                seconds = shell.run(opened.command(*words), timeout=self.patience).seconds
                if self.wants_check:
                    compare_with_backing(self, opened, opened.path, disk.backing, length)
        return self.figures(length, seconds)


class FarWrite(_Far):
    """dd writes the beginning of a disk, with fsync."""

    verb = "write"

    def measure(self, contender: Contender) -> Mapping[str, float]:
        disk, source = self.stage.scratch, self.stage.data.backing
        length = self.length(contender)
        fill(disk.backing)
        with self.relay() as relay:
            portal = f"{HOST}:{relay.port}"
            if isinstance(contender, Libiscsi):
                count = length // MIB
                seconds, _ = contender.bench(disk, depth=32, size=MIB, count=count, pattern=0x5A, portal=portal)
                require_pattern(disk.backing, length, 0x5A, "writes")
                self.was_checked = True
                return self.figures(length, seconds)
            assert isinstance(contender, FileContender)
            with contender.open([disk], portal=portal) as opened:
                opened.forget()
                words = ["dd", f"if={source}", f"of={opened.path}", "bs=1M", "conv=fsync,notrunc"]
                seconds = shell.run(opened.command(*words, *count_bytes(length)), timeout=self.patience).seconds
                require_same(disk.backing, source, length, "writes")
                self.was_checked = True
        return self.figures(length, seconds)


class FarList(Work):
    """The list of a quarter of the files of a file system, by Sleuth Kit: small reads, each a little further on."""

    name = "far-25ms-fls"
    title = "fls -r -m / of one directory, over 25 ms round trip, 1 Gbit/s"
    metrics = (SECONDS,)

    def prepare(self) -> None:
        backing = self.stage.evidence.backing
        top = shell.run(["fls", "-D", backing], timeout=self.patience).out
        directories = dict(line.removeprefix("d/d ").split(":\t") for line in top.splitlines())
        self._inode = next(inode for inode, name in directories.items() if name == "one")
        self._expected = shell.run(self._command(backing), timeout=self.patience).out

    def _command(self, image: Path) -> list[str | Path]:
        return ["fls", "-r", "-m", "/", image, self._inode]

    def measure(self, contender: Contender) -> Mapping[str, float]:
        assert isinstance(contender, FileContender)
        with Relay(self.stage.server.port, delay=0.0125, rate=LINE) as relay:
            portal = f"{HOST}:{relay.port}"
            with contender.open([self.stage.evidence], portal=portal, read_only=True) as opened:
                opened.forget()
                ran = shell.run(self._command(opened.path), timeout=self.patience)
        if ran.out != self._expected:
            raise WrongBytesError("fls lists something else")
        self.was_checked = True
        return {"time": ran.seconds}


class Digests(Work):
    """The same sequential read without and with header and data digests, one after the other, for iscsifuse alone.

    libiscsi of the other programs has no data digests.
    """

    name = "digests"
    title = "dd bs=1M with header and data digests, and without"
    metrics = (
        Metric("with", "MB/s", higher_is_better=True),
        Metric("without", "MB/s", higher_is_better=True),
        Metric("kept", "of the rate", higher_is_better=True),
    )

    def takes(self, contender: Contender) -> bool:
        return super().takes(contender) and isinstance(contender, Iscsifuse)

    def prepare(self) -> None:
        assert self.stage.digested.size

    def measure(self, contender: Contender) -> Mapping[str, float]:
        assert isinstance(contender, Iscsifuse)
        return self._compare(contender, self.stage.digested, None)

    def _compare(self, contender: Iscsifuse, disk: Disk, portal: str | None) -> dict[str, float]:
        without = self._rate(contender, disk, portal, "none")
        rate = self._rate(contender, disk, portal, "crc32c")
        return {"with": rate, "without": without, "kept": rate / without}

    def _rate(self, contender: Iscsifuse, disk: Disk, portal: str | None, digest: str) -> float:
        options = ("--header-digest", digest, "--data-digest", digest)
        with contender.open([disk], portal=portal, options=options) as opened:
            keys = contender.status(opened.path.parent)["sessions"][0]["keys"]
            if {keys["HeaderDigest"].lower(), keys["DataDigest"].lower()} != {digest}:
                raise ContenderError(f"the session has not the digests that were asked for: {keys}")
            opened.forget(room=disk.size + SPARE)
            command = opened.command("dd", f"if={opened.path}", "of=/dev/null", "bs=1M", *count_bytes(disk.size))
            seconds = shell.run(command, timeout=self.patience).seconds
            if self.wants_check:
                compare_with_backing(self, opened, opened.path, disk.backing, disk.size)
        return disk.size / seconds / MB


class DigestsOfQuickTarget(Digests):
    """The same with a target that computes CRC32C with the processor's instruction: our own.

    tgtd computes it byte by byte, which takes it two seconds for a GiB; what an initiator can keep of the rate then
    says little about the initiator.
    """

    name = "digests-quick"
    title = "the same with a target whose CRC32C is quick (python -m iscsifuse.testing)"

    def prepare(self) -> None:
        assert self.stage.data.size

    def measure(self, contender: Contender) -> Mapping[str, float]:
        assert isinstance(contender, Iscsifuse)
        disk = replace(self.stage.data, target="iqn.2026-11.example:quick", lun=1)
        with _quick_target(disk) as portal:
            return self._compare(contender, disk, portal)


@contextmanager
def _quick_target(disk: Disk) -> Iterator[str]:
    """The loopback target as a process of its own; yields its portal."""
    command = [sys.executable, "-m", "iscsifuse.testing", "--read-only", "--first-lun", str(disk.lun)]
    command += ["--target", disk.target, str(disk.backing)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            if words[:2] != ["listening", "on"]:
                raise ContenderError(f"the loopback target said {words}")
            yield words[2]
        finally:
            process.kill()
