"""What the kernel lets us tune about a mount and about this process. All of it is optional: no right, no harm.

Nothing in here asks the mounted file system anything (a stat(2) of the mount from the thread that serves it would
wait for itself, for ever): device numbers come from the mount table.

* **Read-ahead.** A FUSE mount reads ahead 128 KiB; ``read_ahead_kb`` of its backing device information is root's to
  raise. A little more makes fewer requests of a stream. Much more doesn't pay: how far to read ahead is the cache's
  business, which sees the whole stream and measures the line, and the kernel would blow up random reads with it.
* **Requests in the background** (read-ahead, direct I/O): 12 at a time by default, and from 9 on the kernel forgets
  what programs want to be read ahead (``posix_fadvise``, which ``e2fsck`` does a thousand times). Both are numbers in
  fusectl, which isn't mounted everywhere; root then mounts it for a moment where nobody sees it.
* **A lost request.** pyfuse3 waits until /dev/fuse is readable, then reads it with a blocking read. If the program
  whose request it was is killed in between, the kernel takes the request back, and the read blocks: the whole trio
  thread, with all its sessions, until the next request comes. A timer whose signal interrupts the read bounds
  that to a moment; pyfuse3 then simply waits again (see ``keep_awake``).
* **Memory pressure.** The kernel writes dirty pages of the disks through this process. ``PR_SET_IO_FLUSHER`` keeps
  it from waiting for itself when it allocates memory, and a low ``oom_score_adj`` from being killed first.
"""

import contextlib
import ctypes
import errno
import logging
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iscsifuse.mount.mountinfo import MountEntry

__all__ = ["abort_connection", "keep_awake", "prepare_process", "tune_mount", "unmount_call"]

log = logging.getLogger(__name__)

KERNEL_READ_AHEAD = 512 << 10
"""Bytes."""
MAX_BACKGROUND = 256
CONGESTION_THRESHOLD = 2 * MAX_BACKGROUND
"""Never reached: who wants to be read ahead waits for the maximum, and nothing is forgotten."""
OOM_SCORE_ADJ = -900
AWAKE_PERIOD = 0.5
"""Seconds that a lost request may stop the daemon."""

_PR_SET_IO_FLUSHER = 57
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_MOUNT_ATTR_NOTHING_SPECIAL = 2 | 4 | 8  # NOSUID, NODEV, NOEXEC
_MNT_FORCE = 1
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8


def _set(path: Path, value: int) -> bool:
    """Write a number to a file of the kernel's; whether that worked."""
    try:
        path.write_text(f"{value}\n")
    except OSError as error:
        log.debug("%s can't be set to %d: %s", path, value, error.strerror)
        return False
    return True


def tune_mount(entry: MountEntry, *, read_ahead: int, sysfs: Path = Path("/sys")) -> None:
    """Let the kernel ask for more at a time, as far as it lets us.

    Args:
        entry: the mount.
        read_ahead: bytes of the largest read-ahead window; 0 turns the kernel's off as well.
        sysfs: where sysfs is mounted.
    """
    kilobytes = min(read_ahead, KERNEL_READ_AHEAD) // 1024
    _set(sysfs / "class/bdi" / entry.device / "read_ahead_kb", kilobytes)
    with _control(entry.connection, sysfs) as connection:
        _set(connection / "max_background", MAX_BACKGROUND)
        _set(connection / "congestion_threshold", CONGESTION_THRESHOLD)


def prepare_process(proc: Path = Path("/proc/self")) -> None:
    """Make this process fit to be what disks depend on: file descriptors, memory pressure, no core dump.

    A core would hold other people's data and the CHAP secrets.
    """
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    if _libc().prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        log.debug("PR_SET_IO_FLUSHER: %s", os.strerror(ctypes.get_errno()))
    _set(proc / "oom_score_adj", OOM_SCORE_ADJ)


@contextmanager
def keep_awake(period: float = AWAKE_PERIOD) -> Iterator[None]:
    """Interrupt blocking system calls of this thread every now and then (see the module).

    To be used in the main thread. Python's own calls are repeated when they are interrupted, so only libfuse notices.
    """
    before = signal.signal(signal.SIGALRM, lambda _signum, _frame: None)
    signal.setitimer(signal.ITIMER_REAL, period, period)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def unmount_call(mountpoint: str, *, lazy: bool) -> None:
    """umount2(2). May block while the kernel writes pages back: never to be called by the thread that serves them.

    Args:
        mountpoint: absolute path; a symbolic link is not followed.
        lazy: detach now, also if it is busy.

    Raises:
        OSError: with its errno; EBUSY, EPERM, EINVAL (nothing is mounted there) ...
    """
    _umount2(mountpoint, _MNT_DETACH if lazy else 0)


def abort_connection(number: int, entry: MountEntry | None, *, sysfs: Path = Path("/sys")) -> bool:
    """End a FUSE connection, also one whose daemon is dead: all who wait for an answer get an error.

    Args:
        number: of the connection.
        entry: its mount, if there is one still; it may be unmounted by this, where it isn't busy.
        sysfs: where sysfs is mounted.

    Returns:
        Whether it is aborted: by fusectl, whose file belongs to the user who mounted it, or by umount2(2) with
        MNT_FORCE, which is root's.
    """
    with _control(number, sysfs) as connection:
        if _set(connection / "abort", 1):
            return True
    if entry is None:
        return False
    try:
        _umount2(entry.mountpoint, _MNT_FORCE)
    except OSError as error:
        return error.errno == errno.EBUSY  # aborted, and mounted still
    return True


@contextmanager
def _control(number: int, sysfs: Path) -> Iterator[Path]:
    """The folder of a FUSE connection in fusectl, if we may have it."""
    mounted = sysfs / "fs/fuse/connections" / str(number)
    unseen = None if mounted.exists() else _mount_unseen(b"fusectl")
    if unseen is None:
        yield mounted
        return
    try:
        yield Path(f"/proc/self/fd/{unseen}") / str(number)
    finally:
        os.close(unseen)


def _mount_unseen(fs_type: bytes) -> int | None:
    """Mount a file system nowhere; it is gone when the descriptor is closed. None: not ours to do.

    Source: fsopen(2), fsconfig(2), fsmount(2); glibc 2.36, Linux 5.2.
    """
    libc = _libc()
    if not hasattr(libc, "fsmount"):
        return None
    context = libc.fsopen(fs_type, _FSOPEN_CLOEXEC)
    if context < 0:
        return None
    try:
        made = libc.fsconfig(context, _FSCONFIG_CMD_CREATE, None, None, 0) == 0
        mount = libc.fsmount(context, _FSMOUNT_CLOEXEC, _MOUNT_ATTR_NOTHING_SPECIAL) if made else -1
    finally:
        os.close(context)
    return mount if mount >= 0 else None


def _umount2(mountpoint: str, flags: int) -> None:
    if _libc().umount2(os.fsencode(mountpoint), _UMOUNT_NOFOLLOW | flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), mountpoint)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
