"""Mounts of disks in memory, as the tests use them; see ram_mount.py."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from iscsifuse.mount.mountinfo import find_mount

HELPER = Path(__file__).with_name("ram_mount.py")


def wait_for(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def write_at(path: Path, data: bytes, offset: int = 0) -> None:
    with path.open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), data, offset) == len(data)


def read_at(path: Path, size: int, offset: int = 0) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


class Ram:
    """A mount of disks in memory, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.control = folder / "control"
        self.control.mkdir()
        self.point = folder / "mnt"
        self.point.mkdir()
        self.process: subprocess.Popen[str] | None = None
        self.said = ""

    def start(self, **options: object) -> int:
        """Mount in the background; the exit code."""
        done = subprocess.run(
            self._command(options), capture_output=True, text=True, timeout=60, check=False, env=self._env()
        )
        self.said = done.stderr
        return done.returncode

    def start_in_front(self, **options: object) -> None:
        self.process = subprocess.Popen(
            self._command({"foreground": True, **options}), stderr=subprocess.PIPE, text=True, env=self._env()
        )
        wait_for(self.is_mounted)
        self.point.stat()

    def _command(self, options: dict[str, object]) -> list[str]:
        everything = {"control": str(self.control), "mountpoint": str(self.point), **options}
        return [sys.executable, str(HELPER), json.dumps(everything)]

    @staticmethod
    def _env() -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def is_mounted(self) -> bool:
        return find_mount(self.point) is not None

    def order(self, what: str, value: str = "") -> None:
        new = self.control / f".{what}"
        new.write_text(value)
        new.rename(self.control / what)

    def revoke(self, what: str) -> None:
        (self.control / what).unlink()

    def log(self, lun: int = 0) -> list[str]:
        path = self.control / f"log-{lun}"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def lun(self) -> Path:
        return self.point / "lun-0"

    def clean_up(self) -> None:
        for stall in self.control.glob("stall-*"):
            stall.unlink()
        for _ in range(3):
            if self.is_mounted():
                subprocess.run(["fusermount3", "-u", "-z", str(self.point)], check=False, capture_output=True)
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
