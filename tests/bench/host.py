"""What the benchmark asks the machine: what it is, what processes cost, and to be told of their end."""

import contextlib
import ctypes
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from support.process import sbin_path

__all__ = ["adopt_orphans", "bury", "cpu_seconds", "describe", "peak_memory", "take_back_memory"]

_TICKS = os.sysconf("SC_CLK_TCK")
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of daemons that are started here; `bury` has to be called for each of them.

    The init of some containers takes seconds to notice that an orphan is dead, and ``iscsifuse umount`` waits for it.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def bury(pid: int) -> None:
    """Be told of the end of an adopted daemon at once, whenever that is."""

    def wait() -> None:
        with contextlib.suppress(ChildProcessError):  # it stayed with its own parent
            os.waitpid(pid, 0)

    threading.Thread(target=wait, name=f"bury-{pid}", daemon=True).start()


def running_with(argument: Path) -> list[int]:
    """The processes that have this argument; one that is dead has none any more."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(argument) in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of these processes and all their threads, so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def peak_memory(pids: Iterable[int]) -> int:
    """The most resident memory that these processes ever had, in bytes, taken together."""
    total = 0
    for pid in pids:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert found is not None
        total += int(found[1]) * 1024
    return total


def take_back_memory(size: int) -> None:
    """Have the kernel get memory back from the host of this machine.

    Memory that was free for two seconds may belong to the host (free page reporting). Who wants it next waits for the
    host, which can take longer than all that is to be measured; and who that is, is chance. The kernel takes what it
    needs from where it likes: so three times as much is had back, or half of what is free, if that is less.
    """
    length = min(3 * size, _available_memory() // 2)
    mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def _available_memory() -> int:
    return int(_after_colon("/proc/meminfo", "MemAvailable").split()[0]) * 1024


def describe(qsd: Path | None) -> dict[str, str]:
    """The machine, and the version of everything that takes part (``qsd``: the newer qemu-storage-daemon)."""
    about = {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": _after_colon("/proc/cpuinfo", "model name"),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / (1 << 30):.0f} GiB",
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "Linux"),
        "python": platform.python_version(),
        "trio": _package("trio"),
        "pyfuse3": _package("pyfuse3"),
        "tgtd": _said("tgtd", "--version"),
        "qemu": _said("qemu-storage-daemon", "--version"),
        "libnbd": _said("nbdfuse", "--version"),
        "libiscsi": _debian_version("libiscsi7"),
        "fio": _said("fio", "--version"),
        "sleuthkit": _said("fls", "-V"),
    }
    if qsd is not None:
        about["qsd-new"] = _said(str(qsd), "--version")
    return about


def _commit() -> str:
    here = Path(__file__).resolve().parent
    commit = _said("git", "-C", str(here), "rev-parse", "--short=12", "HEAD")
    if commit == "-":
        return commit
    changed = subprocess.run(
        ["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    return f"{commit} with changes" if changed.stdout.strip() else commit


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def _said(program: str, *arguments: str) -> str:
    """The version in the first line that a program prints, or the line itself; "-" when it isn't there."""
    path = shutil.which(program, path=sbin_path())
    if path is None:
        return "-"
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False, timeout=20, cwd="/")
    line = (done.stdout.strip() or done.stderr.strip() or "-").splitlines()[0]
    if program == "git":
        return line if done.returncode == 0 else "-"
    found = re.search(r"\d+(?:\.\d+)+.*", line)
    return found[0] if found else line


def _debian_version(package: str) -> str:
    """Of a library that has no program to ask: what dpkg says, also for the name with the suffix of 64-bit time."""
    if shutil.which("dpkg-query") is None:
        return "-"
    for name in (package, f"{package}t64"):
        done = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Version}", name], capture_output=True, text=True, check=False, timeout=20
        )
        if done.returncode == 0 and done.stdout:
            return done.stdout
    return "-"


def _after_colon(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return sys.platform
