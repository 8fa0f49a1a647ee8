"""Finds, reports and removes what a test left behind: mounts, loop devices, processes.

Mounts and loop devices are known by the test's folder. Processes are known by a variable in their environment, so
that a daemon is found that has left its parent; it is set for one test at a time (for all it starts) and for the
whole run. Nothing here touches a path below a mount: a dead FUSE mount would hang whoever does.
"""

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from support.process import is_alive

__all__ = ["RUN", "TEST", "Leftovers"]

RUN = "ISCSIFUSE_TEST_RUN"
TEST = "ISCSIFUSE_TEST"


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What is there now.

    Attributes:
        mounts: mount point and type of each mount below the folder, the innermost first.
        loops: device and backing file of loop devices.
        processes: pid and command line.
    """

    mounts: list[tuple[str, str]]
    loops: list[tuple[str, str]]
    processes: list[tuple[int, str]]

    @classmethod
    def find(cls, folder: Path, mark: tuple[str, str]) -> "Leftovers":
        """Look for mounts and loop devices below ``folder``, and for processes whose environment has ``mark``."""
        return cls(_mounts(folder), _loops(folder), _processes(mark))

    @classmethod
    def settle(cls, folder: Path, mark: tuple[str, str], *, grace: float) -> "Leftovers":
        """As `find`, but give what is just about to go ``grace`` seconds to do so."""
        deadline = time.monotonic() + grace
        while (found := cls.find(folder, mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def __bool__(self) -> bool:
        return bool(self.mounts or self.loops or self.processes)

    def __str__(self) -> str:
        lines = [f"a mount of type {kind} on {point}" for point, kind in self.mounts]
        lines += [f"the loop device {device} on {file}" for device, file in self.loops]
        lines += [f"the process {pid}: {command}" for pid, command in self.processes]
        return "\n".join(lines)

    def remove(self) -> None:
        """Remove it all, as gently as it goes: file systems on loop devices, loop devices, FUSE mounts, processes."""
        for point, kind in self.mounts:
            if not kind.startswith("fuse"):
                _quietly("umount", "-l", point)
        for device, _ in self.loops:
            _quietly("losetup", "-d", device)
        for point, kind in self.mounts:
            if kind.startswith("fuse"):
                _quietly("fusermount3", "-u", "-z", point)
                _quietly("umount", "-l", point)  # where fusermount3 isn't there, or was refused
        for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
            alive = [pid for pid, _ in self.processes if is_alive(pid)]
            for pid in alive:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
                    os.kill(pid, signal.SIGCONT)
            deadline = time.monotonic() + patience
            while any(map(is_alive, alive)) and time.monotonic() < deadline:
                time.sleep(0.02)


def _quietly(*command: str) -> None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)


def _is_below(path: str, folder: Path) -> bool:
    return path == str(folder) or path.startswith(f"{folder}/")


def _mounts(folder: Path) -> list[tuple[str, str]]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        point = fields[4].replace(r"\040", " ").replace(r"\011", "\t").replace(r"\012", "\n").replace(r"\134", "\\")
        if _is_below(point, folder):
            found.append((point, fields[fields.index("-") + 1]))
    return found[::-1]  # mountinfo lists a mount after the one that it lies on


def _loops(folder: Path) -> list[tuple[str, str]]:
    found = []
    for device in Path("/sys/block").glob("loop*"):
        try:
            file = (device / "loop" / "backing_file").read_text().strip()
        except OSError:  # not in use
            continue
        if _is_below(file.removesuffix(" (deleted)"), folder):
            found.append((f"/dev/{device.name}", file))
    return found


def _processes(mark: tuple[str, str]) -> list[tuple[int, str]]:
    wanted = "=".join(mark).encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0") and is_alive(int(folder.name)):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append((int(folder.name), command))
        except OSError:  # somebody else's, or gone
            continue
    return found
