"""Who has a file system open: for the sentence that explains EBUSY.

Only what this user may see: of other users' processes root sees everything, everybody else nothing.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from iscsifuse.mount.mountinfo import read_mounts

__all__ = ["occupants"]

_MOST = 5


def occupants(mountpoint: str, *, proc: Path = Path("/proc"), sysfs: Path = Path("/sys")) -> list[str]:
    """What keeps a mount busy, as phrases: "/mnt/san/lun-0 is open by dd (pid 123)"; a handful at most.

    Args:
        mountpoint: as the mount table has it.
        proc: where procfs is mounted.
        sysfs: where sysfs is mounted.
    """
    found: list[str] = []
    for phrase in _phrases(mountpoint, proc, sysfs):
        if phrase not in found:
            found.append(phrase)
        if len(found) == _MOST:
            break
    return found


def _phrases(mountpoint: str, proc: Path, sysfs: Path) -> Iterator[str]:
    for loop in sorted(sysfs.glob("block/loop*/loop/backing_file")):
        backing = _text(loop)
        if _inside(backing, mountpoint):
            yield f"{backing} is attached to /dev/{loop.parent.parent.name}"
    for entry in read_mounts(proc / "self/mountinfo"):
        if entry.mountpoint != mountpoint and _inside(entry.mountpoint, mountpoint):
            yield f"something is mounted on {entry.mountpoint}"
    for process in sorted(proc.glob("[0-9]*"), key=lambda path: int(path.name)):
        who = f"{_text(process / 'comm') or 'a process'} (pid {process.name})"
        for place in _open_paths(process):
            if _inside(place, mountpoint):
                yield f"{place} is open by {who}"
        if _inside(_link(process / "cwd"), mountpoint):
            yield f"it is the working directory of {who}"


def _open_paths(process: Path) -> Iterator[str]:
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:
        descriptors = []
    for descriptor in descriptors:
        yield _link(descriptor)
    try:
        maps = (process / "maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        maps = []
    for line in maps:
        yield line[73:] if line[73:74] == "/" else ""


def _inside(path: str, mountpoint: str) -> bool:
    return path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/")


def _link(path: Path) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115 - text wanted; some targets are no paths
    except OSError:
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape").strip()
    except OSError:
        return ""
