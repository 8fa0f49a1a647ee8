"""What is mounted where, from /proc/self/mountinfo: without one request to the file systems themselves.

Everything that has to find a mount goes through here, and not through stat(2), which would wait for a daemon that may
be stuck, dead, or the very process that asks. ``is_dead`` is the exception, and has a thread for it.

Source: proc_pid_mountinfo(5).
"""

import errno
import logging
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FS_TYPE", "SUBTYPE", "MountEntry", "find_mount", "is_dead", "parse_mountinfo", "read_mounts", "where"]

log = logging.getLogger(__name__)

SUBTYPE = "iscsifuse"
FS_TYPE = f"fuse.{SUBTYPE}"

_LOOK_LIMIT = 5.0
"""Seconds for looking at what may be a file system that doesn't answer."""
_ESCAPE = re.compile(rb"\\([0-7]{3})")
_USER_ID = re.compile(r"(?:^|,)user_id=([0-9]+)(?:,|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class MountEntry:
    """One mount.

    Attributes:
        device: ``major:minor``, the st_dev of its files; "0:40".
        mountpoint: absolute path, as it was mounted.
        fs_type: "ext4", "fuse.iscsifuse".
        source: what was mounted.
        options: of the mount, and of the file system.
    """

    device: str
    mountpoint: str
    fs_type: str
    source: str
    options: str

    @property
    def is_ours(self) -> bool:
        """Whether it is a mount of iscsifuse."""
        return self.fs_type == FS_TYPE

    @property
    def connection(self) -> int:
        """Number of the FUSE connection, as in /sys/fs/fuse/connections: the minor number."""
        return int(self.device.partition(":")[2])

    @property
    def owner(self) -> int | None:
        """Who mounted it: the user whose id FUSE noted."""
        found = _USER_ID.search(self.options)
        return int(found.group(1)) if found else None


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match.group(1), 8)]), field))


def parse_mountinfo(lines: Iterable[bytes]) -> list[MountEntry]:
    """The mounts that a mountinfo file lists, in its order; lines that aren't understood are left out."""
    found = []
    for line in lines:
        before, separator, after = line.partition(b" - ")
        fields, system = before.split(), after.split(b" ")
        if not separator or len(fields) < 6 or len(system) < 3 or not re.fullmatch(rb"[0-9]+:[0-9]+", fields[2]):
            continue
        found.append(
            MountEntry(
                device=fields[2].decode(),
                mountpoint=_unescape(fields[4]),
                fs_type=_unescape(system[0]),
                source=_unescape(system[1]),
                options=os.fsdecode(fields[5] + b"," + system[2].strip()),
            )
        )
    return found


def read_mounts(path: Path = Path("/proc/self/mountinfo")) -> list[MountEntry]:
    """The mounts that this process sees, the oldest first."""
    with path.open("rb") as file:
        return parse_mountinfo(file)


def where(path: str | os.PathLike[str]) -> str:
    """A path as the mount table has it: absolute, all but its last part resolved.

    The last part is not looked at, for it may be a mount that never answers.
    """
    absolute = os.path.abspath(path)  # noqa: PTH100 - Path.absolute() leaves ".." in
    parent, name = os.path.split(absolute)
    return os.path.join(os.path.realpath(parent), name)  # noqa: PTH118 - text in, text out


def find_mount(path: str | os.PathLike[str], mounts: Iterable[MountEntry] | None = None) -> MountEntry | None:
    """The topmost mount at exactly this path; a symbolic link to a mount point is followed.

    Args:
        path: of a mount point.
        mounts: the mount table; by default that of this process.
    """
    table = list(read_mounts() if mounts is None else mounts)
    wanted = where(path)
    for entry in reversed(table):
        if entry.mountpoint == wanted:
            return entry
    resolved = os.path.realpath(wanted)  # Not a mount itself, so this may look at it.
    if resolved == wanted:
        return None
    return next((entry for entry in reversed(table) if entry.mountpoint == resolved), None)


def is_dead(mountpoint: str) -> bool:
    """Whether nobody serves a FUSE mount any more. One of which that can't be found out is taken to live.

    stat(2) wouldn't do: the kernel answers it from what it remembers, long after the daemon has died.
    """
    found: list[int | None] = []

    def look() -> None:
        try:
            os.close(os.open(mountpoint, os.O_RDONLY))
        except OSError as error:
            found.append(error.errno)

    thread = threading.Thread(target=look, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # This user may have no more threads.
        log.warning("can't look whether %s is dead: %s", mountpoint, error)
        return False
    thread.join(_LOOK_LIMIT)
    return found in ([errno.ENOTCONN], [errno.ECONNABORTED])
