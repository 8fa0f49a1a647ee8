"""The loads: `chaos.writer` and fio, on the raw disks and in the file system; and what they say in the end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.writer import SECTOR, who
from support.process import sbin_path

__all__ = ["FioLoad", "WriterLoad", "compare"]

_TOP = Path(__file__).resolve().parents[1]


def compare(expected: Path, found: Path, *, what: str) -> tuple[int, int, list[str]]:
    """Two files, sector by sector: bytes compared, bytes that differ, and where."""
    checked = lost = 0
    told: list[str] = []
    with expected.open("rb") as one, found.open("rb") as other:
        while want := one.read(SECTOR):
            have = other.read(SECTOR)
            if want != have:
                lost += SECTOR
                if len(told) < 50:
                    told.append(f"{what}: sector {checked // SECTOR} has {who(have)} instead of {who(want)}")
            checked += SECTOR
    return checked, lost, told


class WriterLoad:
    """A `chaos.writer` on one file.

    Attributes:
        expected: what has to be there once it has ended well.
    """

    def __init__(self, name: str, file: Path, *, size: int, seed: int, folder: Path, may_fail: bool) -> None:
        self.name = name
        self.expected = folder / f"{name}.expected"
        self.log = folder / f"{name}.log"
        self.may_fail = may_fail
        self._report = folder / f"{name}.json"
        command = [sys.executable, "-P", "-m", "chaos.writer", str(file), "--size", str(size), "--seed", str(seed)]
        command += ["--report", str(self._report), "--expected", str(self.expected), "--log", str(self.log)]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(_TOP)},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=(folder / f"{name}.out").open("wb"),
            stderr=subprocess.STDOUT,
        )

    def stop(self) -> None:
        """Ask it to come to an end."""
        self._process.send_signal(signal.SIGTERM)

    def result(self, patience: float) -> tuple[dict[str, Any], list[str]]:
        """What it did, and what was wrong."""
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            stack = Path(f"/proc/{self._process.pid}/stack")
            where = stack.read_text() if os.geteuid() == 0 else ""
            self._process.kill()
            return {}, [f"{self.name}: still running after {patience:.0f} s {where}"]
        if not self._report.exists():
            return {}, [f"{self.name}: ended with {self._process.returncode}"]
        totals: dict[str, Any] = json.loads(self._report.read_text())
        wrong = [f"{self.name}: {told}" for told in totals["wrong"]]
        if not totals["finished"]:
            wrong.append(f"{self.name}: could not fsync in the end")
        if totals["errors_reported"] and not self.may_fail:
            wrong.append(f"{self.name}: {totals['errors_reported']} errors, see {self.log}")
        return totals, wrong

    def kill(self) -> None:
        """Whatever it does."""
        if self._process.poll() is None:
            self._process.kill()


@dataclass
class FioLoad:
    """fio, again and again, each time with other bytes, verified each time.

    Attributes:
        name: of the load.
        file: what is written.
        size: bytes of it.
        direct: O_DIRECT.
    """

    name: str
    file: Path
    size: int
    seed: int
    folder: Path
    direct: bool = False
    rounds: int = 0
    bytes_verified: int = 0
    bytes_written: int = 0
    wrong: list[str] = field(default_factory=list)
    _process: "subprocess.Popen[str] | None" = None
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def _arguments(self, seed: int, file: Path) -> list[str]:
        # --thinktime would make fio 3.33 hang; the rate is limited instead.
        return [
            *("fio", f"--name={self.name}", "--filename=" + str(file).replace(":", "\\:"), f"--size={self.size}"),
            *("--rw=randwrite", "--bsrange=512-128k", "--blockalign=512", "--ioengine=psync"),
            *("--verify=crc32c", "--verify_fatal=1", f"--randseed={seed}"),
            *("--fsync=64", "--end_fsync=1", "--output-format=json", "--rate=4m,4m,4m"),
            *(["--direct=1"] if self.direct else []),
        ]

    def _run(self) -> None:
        while not self._stopping.is_set() and not self.wrong:
            seed = self.seed * 1000 + self.rounds
            self._process = subprocess.Popen(
                self._arguments(seed, self.file),
                env={**os.environ, "PATH": sbin_path()},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            said, _ = self._process.communicate()
            if self._stopping.is_set() and self._process.returncode:
                return
            try:
                job = json.loads(said[said.index("{") :])["jobs"][0]
            except (ValueError, KeyError):
                job = {"error": said[-2000:]}
            if self._process.returncode or job.get("error"):
                self.wrong.append(
                    f"{self.name}, round {self.rounds}: fio ended with {job.get('error')}: {said[:2000]}"
                )
                return
            self.rounds += 1
            self.bytes_verified += job["read"]["io_bytes"]
            self.bytes_written += job["write"]["io_bytes"]

    def stop(self) -> None:
        """No further round; the one that is running comes to its end."""
        self._stopping.set()

    def result(self, patience: float) -> list[str]:
        """What was wrong."""
        assert self._thread is not None
        end = time.monotonic() + patience
        self._thread.join(patience)
        if self._thread.is_alive():
            self.kill()
            return [*self.wrong, f"{self.name}: still running after {patience + time.monotonic() - end:.0f} s"]
        return self.wrong

    def verify(self, file: Path) -> list[str]:
        """Have fio look for what the last round wrote in another file: the one behind the disk."""
        if not self.rounds:
            return [f"{self.name}: not one round"]
        done = subprocess.run(
            [*self._arguments(self.seed * 1000 + self.rounds - 1, file), "--verify_only=1", "--rate=0"],
            env={**os.environ, "PATH": sbin_path()},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            return [f"{self.name}: the file behind the disk fails fio's verification: {done.stdout[:1000]}"]
        self.bytes_verified += self.size
        return []

    def kill(self) -> None:
        """Whatever it does."""
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
