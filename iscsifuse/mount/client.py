"""``umount`` and ``status``: what is asked of a daemon from outside.

**umount** unmounts first and asks later, because that is the order in which nothing can be lost unseen: where a
program has a disk open, the kernel refuses (EBUSY) and nothing has changed; where it doesn't, every close() has been
told what became of its writes, and the kernel sends the daemon what is still in mapped pages. The daemon then writes
everything back, which is bounded in time, and says how that went. It is this that the exit code tells.

It works whatever the daemon and the target are doing. A dead daemon's mount is detached; a daemon that outlives its
own deadline is asked to end, to hurry, then killed. To hurry costs what isn't written back yet; the daemon says so,
and it is listened to as long as it lives.

Neither command sends a request through the mount as long as the daemon can be reached otherwise.
"""

import json
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from iscsifuse.errors import MountError, UsageError
from iscsifuse.mount.attach import BusyError, unmount
from iscsifuse.mount.channel import Line
from iscsifuse.mount.kernel import abort_connection
from iscsifuse.mount.mountinfo import MountEntry, find_mount, is_dead
from iscsifuse.mount.occupants import occupants
from iscsifuse.mount.tree import HIDDEN_DIRECTORY, STATUS_FILE

__all__ = ["status", "umount"]

log = logging.getLogger(__name__)

_ANSWER_LIMIT = 10.0
_DEFAULT_STOP = 200.0
_ORDERLY = 180.0
"""Seconds for a daemon to end after a signal: more than its limits (see ``filesystem``) and the end of a command that
nothing can cut short come to."""
_HURRY = 90.0
_KILLED = 10.0
_BURIED = 1.0
_DYING = 1.0


def status(mountpoint: str | os.PathLike[str]) -> dict[str, object]:
    """The status document of a mount (see ``report``).

    Raises:
        UsageError: nothing of ours is mounted there.
        MountError: the daemon is dead, or doesn't answer.
        PermissionError: not this user's mount.
    """
    entry = _our_mount(mountpoint)
    try:
        with Line(entry.device) as line:
            if line.is_trusted(entry.owner):
                document = line.next(timeout=_ANSWER_LIMIT)
                if document is not None:
                    return document
    except TimeoutError as error:
        raise MountError(f"the daemon of {entry.mountpoint} doesn't answer") from error
    except OSError as error:
        log.debug("no line to the daemon: %s", error)
    return _status_file(entry)


def umount(mountpoint: str | os.PathLike[str]) -> int:
    """Write back, log out, unmount; returns when the daemon is gone.

    Returns:
        0.

    Raises:
        UsageError: nothing of ours is mounted there.
        BusyError: a program uses it; nothing has changed.
        PermissionError: not this user's mount.
        MountError: it is unmounted, but something could not be written back; or it can't be unmounted.
    """
    entry = _our_mount(mountpoint)
    line = _connect(entry)
    if line is None:
        return _without_daemon(entry)
    with line:
        if _is_half_dead(line.pid):
            return _abort(entry)
        try:
            document = line.next(timeout=_ANSWER_LIMIT) or {}
        except TimeoutError:
            document = {}  # Stuck, or too busy; what follows has deadlines of its own.
            if _is_half_dead(line.pid):
                return _abort(entry)
        with _process(line.pid) as process:
            _unmount(entry)
            limit = document.get("stop_timeout")
            deadline = time.monotonic() + (float(limit) if isinstance(limit, int | float) else _DEFAULT_STOP)
            errors = _see_off(entry, line.pid, process, line, deadline)
    if errors:
        raise MountError(f"{entry.mountpoint} is unmounted, but data is lost: {'; '.join(errors)}")
    return 0


# -- finding --------------------------------------------------------------------------------------------------------


def _our_mount(mountpoint: str | os.PathLike[str]) -> MountEntry:
    entry = find_mount(mountpoint)
    if entry is None:
        raise UsageError(f"nothing is mounted on {os.fspath(mountpoint)}")
    if not entry.is_ours:
        raise UsageError(f"{entry.mountpoint} is a mount of type {entry.fs_type}, not one of iscsifuse's")
    return entry


def _connect(entry: MountEntry) -> Line | None:
    """A line to the daemon, or None where nobody is at the other end."""
    try:
        line = Line(entry.device)
    except OSError as error:
        log.debug("no line to the daemon: %s", error)
        return None
    if not line.is_trusted(entry.owner):
        line.close()
        return None
    return line


def _daemon_by_descriptor(entry: MountEntry) -> int | None:
    """The process that serves a FUSE connection, where the kernel tells (6.12 and later) and we may look."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                if os.readlink(descriptor) != "/dev/fuse":  # noqa: PTH115 - text wanted
                    continue
                info = (process / "fdinfo" / descriptor.name).read_text()
                if f"fuse_connection:\t{entry.connection}\n" in info:
                    return int(process.name)
        except OSError:
            continue
    return None


def _status_file(entry: MountEntry) -> dict[str, object]:
    """The document from the file in the mount. A thread reads it: the mount may never answer."""
    found: list[dict[str, object]] = []
    problems: list[OSError | ValueError] = []

    def read() -> None:
        try:
            text = Path(entry.mountpoint, HIDDEN_DIRECTORY, STATUS_FILE).read_bytes()
            found.append(json.loads(text))
        except (OSError, ValueError) as error:
            problems.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(_ANSWER_LIMIT)
    if found:
        return found[0]
    if not problems:
        raise MountError(f"the daemon of {entry.mountpoint} doesn't answer")
    if isinstance(problems[0], PermissionError):
        raise problems[0]
    raise MountError(
        f"the daemon of {entry.mountpoint} is gone; 'iscsifuse umount {entry.mountpoint}' clears it up"
    ) from problems[0]


# -- unmounting -----------------------------------------------------------------------------------------------------


def _unmount(entry: MountEntry) -> None:
    try:
        unmount(entry.mountpoint)
    except BusyError as error:
        who = occupants(entry.mountpoint)
        raise BusyError(
            f"{entry.mountpoint} is busy: {'; '.join(who)}" if who else f"{entry.mountpoint} is busy"
        ) from error


def _without_daemon(entry: MountEntry) -> int:
    """Unmount where there is no line: the daemon is dead, or in another network name space."""
    pid = _daemon_by_descriptor(entry)
    if pid is None:
        unmount(entry.mountpoint, lazy=is_dead(entry.mountpoint))
        return 0
    with _process(pid) as process:
        _unmount(entry)
        _see_off(entry, pid, process, None, time.monotonic() + _DEFAULT_STOP)
    return 0


def _abort(entry: MountEntry) -> int:
    """Unmount where the daemon is dead, and the kernel hasn't noticed."""
    if not abort_connection(entry.connection, entry):
        # A lazy unmount would do, too; but then nobody could find any more what waits there.
        raise MountError(
            f"the daemon of {entry.mountpoint} is dead, but the kernel waits for it; "
            f"as root, 'umount -f {entry.mountpoint}' ends that"
        )
    left = find_mount(entry.mountpoint)
    if left is not None and left.device == entry.device:
        unmount(entry.mountpoint, lazy=True)
    return 0


def _farewell(line: Line, deadline: float) -> list[str] | None:
    """What the daemon says in the end: sentences about what could not be written back. None: nothing so far."""
    while True:
        try:
            last = line.next(timeout=max(0.1, deadline - time.monotonic()))
        except TimeoutError:
            return None
        if last is None:
            return ["the daemon ended without saying whether everything was written back"]
        errors = last.get("errors")
        if isinstance(errors, list):
            return [str(error) for error in errors]
        # The status, which came too late: that isn't the end. But it says how long that may take.
        limit = last.get("stop_timeout")
        if isinstance(limit, int | float):
            deadline = max(deadline, time.monotonic() + float(limit))


@contextmanager
def _process(pid: int) -> Iterator[int | None]:
    """A descriptor of a process, which can't become another process's; None where it is gone already."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _see_off(entry: MountEntry, pid: int, process: int | None, line: Line | None, deadline: float) -> list[str]:
    """Wait for the farewell and the end of a daemon whose mount is unmounted; see to it that it ends.

    Args:
        entry: what was its mount.
        pid: its process.
        process: descriptor of that; None: it is gone, or can't be watched.
        line: where it says how it went, if it can be heard.
        deadline: until when it ends on its own.

    Returns:
        Sentences about what could not be written back.

    Raises:
        MountError: nobody knows what could be written back, or it had to be killed.
    """
    errors: list[str] | None = None
    steps: list[tuple[signal.Signals | None, float]] = [(None, deadline - time.monotonic())]
    if process is not None:
        steps += [(signal.SIGTERM, _ORDERLY), (signal.SIGTERM, _HURRY), (signal.SIGKILL, _KILLED)]
    hurried = False
    for step, (number, patience) in enumerate(steps):
        hurried = step > 1
        if process is not None and number is not None:
            with suppress(ProcessLookupError):  # It has ended just now.
                signal.pidfd_send_signal(process, number)
        # What is written back already doesn't need that long.
        end = time.monotonic() + (patience if errors is None else min(patience, _HURRY))
        if line is not None and errors is None and number != signal.SIGKILL:
            errors = _farewell(line, end)
        if process is None or _ends(process, end - time.monotonic()):
            break
    if number == signal.SIGKILL:
        lost = "what it had not written back is lost"
        if errors is not None:
            lost = "; ".join(errors) or "everything had been written back"
        raise MountError(
            f"{entry.mountpoint} is unmounted, but its daemon (pid {pid}) did not come to an end and was killed; "
            f"{lost}"
        )
    if line is not None and errors is None:
        errors = _farewell(line, 0.0)  # These may have been its last words.
    if errors is None and (line is not None or hurried):
        raise MountError(
            f"{entry.mountpoint} is unmounted, but its daemon (pid {pid}) took too long, and did not say whether "
            "everything was written back"
        )
    if process is not None:
        _wait_until_buried(pid)
    return errors or []


def _is_half_dead(pid: int) -> bool:
    """Whether a process was killed, and can't die: a thread of it waits in the kernel (see ``invalidation``)."""
    with _process(pid) as process:
        return process is not None and _is_zombie(pid) and not _ends(process, _DYING)


def _is_zombie(pid: int) -> bool:
    try:
        # The field after the name, which is in parentheses and may hold anything.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False


def _wait_until_buried(pid: int) -> None:
    """A dead process is seen until init has noticed; not by those who ask for it when this has returned.

    The first process of some containers never notices, hence not for long.
    """
    deadline = time.monotonic() + _BURIED
    while time.monotonic() < deadline and _is_zombie(pid):
        time.sleep(0.005)


def _ends(process: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout) * 1000))
