"""``mount``: from a plan to a process in the background, and an exit code that is true.

The parent forks before there is any thread or event loop, and waits on a pipe. The child becomes a session leader,
logs in and mounts; while it does so it still speaks to the user's standard error. Then it writes one line to the
pipe and lets go of the terminal: "ready", or what went wrong. If the line doesn't come, the child has died, and the
parent says so and clears up.

After that the daemon logs to syslog, where there is one.

Both ends are careful: if the parent is gone when the mount is ready, nobody knows of it, and it is taken down again.
"""

import contextlib
import errno
import json
import logging
import logging.handlers
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

from iscsifuse.errors import IscsifuseError, MountError, UsageError
from iscsifuse.mount.client import status, umount
from iscsifuse.mount.mountinfo import MountEntry, find_mount, is_dead
from iscsifuse.mount.plan import MountPlan
from iscsifuse.mount.sparing import SparingFilter

__all__ = ["mount", "status", "umount"]

log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_INTERRUPTED = 8
EXIT_SOME = 64

_FUSE_CONF = Path("/etc/fuse.conf")
_DEV_LOG = Path("/dev/log")
_EVERYTHING = 2
"""The verbosity of who wants to see all of the log on his terminal, however much that is."""


def mount(plan: MountPlan) -> int:
    """Mount.

    In the foreground this returns when the mount has ended; else when it is usable (the daemon goes on), or can't be.
    To be called in the main thread, with no other thread running.

    Returns:
        0; 64, where something that was asked for could not be mounted; in the foreground also 32, where something
        could not be written back in the end, and 8, where a signal came before anything was mounted.

    Raises:
        UsageError: the plan can't be carried out on this mount point, or by this user.
        IscsifuseError: nothing was mounted.
        OSError: of the system: no process, no pipe.
        KeyboardInterrupt: while it was waiting; nothing was mounted.
    """
    plan = check_mountpoint(plan)
    return _in_front(plan) if plan.foreground else _in_background(plan)


# -- before ---------------------------------------------------------------------------------------------------------


def check_mountpoint(plan: MountPlan) -> MountPlan:
    """Whether a plan's mount point will do; what a dead daemon of ours left there is cleared up.

    Returns:
        The plan with the mount point resolved.

    Raises:
        UsageError, MountError: with what is wrong, and what to do.
    """
    entry = find_mount(plan.mountpoint)
    if entry is not None and entry.is_ours:
        _clear_stale(entry)
    path = Path(os.path.realpath(plan.mountpoint))
    plan = replace(plan, mountpoint=path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            _check_directory(path)
        elif not stat.S_ISREG(mode):
            raise UsageError(f"the mount point {path} is neither a directory nor a regular file")
        elif plan.lun is None:
            raise UsageError(f"the mount point {path} is a file, so the URL has to name one LUN")
    except FileNotFoundError as error:
        raise UsageError(f"the mount point {path} doesn't exist") from error
    except PermissionError as error:
        raise UsageError(f"no permission for the mount point {path}") from error
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise UsageError(
                f"{path} is a mount whose daemon is dead; 'fusermount3 -u {path}' clears it up"
            ) from error
        raise
    _check_fuse(plan)
    return plan


def _check_directory(path: Path) -> None:
    with os.scandir(path) as entries:
        if next(entries, None) is not None:
            raise UsageError(f"the mount point {path} is not empty")
    if not os.access(path, os.W_OK):
        raise UsageError(f"the mount point {path} can't be mounted on, since this user may not write to it")


def _check_fuse(plan: MountPlan) -> None:
    device = Path("/dev/fuse")
    if not device.exists():
        raise MountError("/dev/fuse is missing; 'modprobe fuse' may help")
    if os.geteuid() == 0:
        return
    if not os.access(device, os.R_OK | os.W_OK):
        raise UsageError("this user may not use /dev/fuse")
    from iscsifuse.mount.attach import fusermount

    if fusermount() is None:
        raise MountError("fusermount3 is missing; it comes with the package fuse3")
    if plan.allow_other and not _others_allowed():
        raise UsageError(f"allow_other needs a line 'user_allow_other' in {_FUSE_CONF}")


def _others_allowed() -> bool:
    try:
        lines = _FUSE_CONF.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _clear_stale(entry: MountEntry) -> None:
    """Unmount a mount of ours whose daemon is dead; refuse one whose daemon lives."""
    if not is_dead(entry.mountpoint):
        raise UsageError(f"{entry.source} is mounted on {entry.mountpoint} already")
    log.warning("%s: unmounting what a dead daemon left there", entry.mountpoint)
    from iscsifuse.mount.attach import unmount

    try:
        unmount(entry.mountpoint, lazy=True)
    except PermissionError as error:
        raise UsageError(
            f"{entry.mountpoint} is a mount whose daemon is dead, and another user's to unmount"
        ) from error


# -- in front -------------------------------------------------------------------------------------------------------


def _in_front(plan: MountPlan) -> int:
    partial = False

    def ready(is_partial: bool) -> None:
        nonlocal partial
        partial = is_partial
        log.info("%s is mounted on %s", plan.source, plan.mountpoint)

    if plan.verbosity < _EVERYTHING:
        for handler in logging.getLogger().handlers:
            handler.addFilter(SparingFilter())
    code = _run(plan, ready)
    return code or (EXIT_SOME if partial else EXIT_OK)


def _run(plan: MountPlan, ready: Callable[[bool], None]) -> int:
    import trio

    from iscsifuse.mount.assembly import assemble
    from iscsifuse.mount.filesystem import serve

    _quieten()

    async def main() -> int:
        return await serve(plan, ready=ready, assemble=assemble)

    return trio.run(main)


def _quieten() -> None:
    """pyfuse3 calls it an error when a program didn't wait for its answer; it isn't."""

    def passes(record: logging.LogRecord) -> bool:
        return "fuse_reply_" not in record.msg

    logging.getLogger("pyfuse3").addFilter(passes)


# -- in the background ----------------------------------------------------------------------------------------------


class _Ended(BaseException):
    """A signal for the parent."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _in_background(plan: MountPlan) -> int:
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            os.close(reader)
            code = _child(plan, writer)
        finally:
            logging.shutdown()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        return _parent(plan, pid, pipe.read)


def _parent(plan: MountPlan, pid: int, read: Callable[[], bytes]) -> int:
    """Wait for what the child says. A signal is the child's as well: what it has begun is taken back."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise _Ended(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        line = read()
    except _Ended as ended:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        if ended.number == signal.SIGINT:
            raise KeyboardInterrupt from None
        return EXIT_INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not line:
        raise MountError(f"{plan.mountpoint}: {_sudden_death(plan, pid)}")
    said = json.loads(line)
    if said.get("ready"):
        return EXIT_SOME if said["partial"] else EXIT_OK
    os.waitpid(pid, 0)
    if said.get("errno"):
        raise OSError(said["errno"], said["error"])
    if said.get("interrupted"):
        return EXIT_INTERRUPTED
    raise (UsageError if said.get("usage") else MountError)(said["error"])


def _sudden_death(plan: MountPlan, pid: int) -> str:
    """How a child ended that said nothing. What it may have left mounted is unmounted."""
    _, wait_status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(wait_status)
    entry = find_mount(plan.mountpoint)
    if entry is not None and entry.is_ours and is_dead(entry.mountpoint):
        from iscsifuse.mount.attach import unmount

        try:
            unmount(entry.mountpoint, lazy=True)
        except (IscsifuseError, OSError) as error:
            log.warning("%s", error)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"the daemon {how} before the mount was ready"


def _child(plan: MountPlan, writer: int) -> int:
    """The daemon. Returns its exit status, which nobody may be there to see."""
    os.setsid()
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    told = False

    def tell(message: dict[str, object]) -> None:
        nonlocal told
        if not told:
            told = True
            try:
                os.write(writer, json.dumps(message).encode())
            finally:
                os.close(writer)

    def ready(partial: bool) -> None:
        _log_to_syslog(plan)
        try:
            tell({"ready": True, "partial": partial})
        except BrokenPipeError as error:
            raise MountError("nobody waits for the mount any more") from error
        sys.stderr.flush()
        os.dup2(nothing, 2)

    try:
        code = _run(plan, ready)
    except IscsifuseError as error:
        log.log(logging.ERROR if told else logging.DEBUG, "%s", error, exc_info=error)
        tell({"error": str(error), "usage": isinstance(error, UsageError)})
        return 32
    except OSError as error:
        log.log(logging.ERROR if told else logging.DEBUG, "%s", error, exc_info=error)
        tell({"error": str(error.strerror or error), "errno": error.errno or errno.EIO})
        return 2
    except Exception as error:
        log.exception("the daemon broke down")
        tell({"error": f"this should not have happened: {type(error).__name__}: {error} (-vv shows where)"})
        return 2
    tell({"interrupted": True})
    return code


class _Syslog(logging.handlers.SysLogHandler):
    """Syslog that is never waited for: a daemon that serves disks doesn't stop because a logger does.

    The library's own way, on an error, is to connect anew and to wait; so sending is done here.
    """

    socket: socket.socket  # the library doesn't declare it

    def createSocket(self) -> None:  # noqa: N802 - logging's name
        super().createSocket()
        self.socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line, or lose it."""
        priority = self.encodePriority(self.facility, self.mapPriority(record.levelname))
        line = f"<{priority}>{self.format(record)}\0".encode(errors="replace")
        try:
            self.socket.send(line)
        except BlockingIOError:
            pass  # syslog doesn't keep up
        except OSError:  # it was restarted
            with contextlib.suppress(OSError):
                self.socket.close()
                self.createSocket()
                self.socket.send(line)


def _log_to_syslog(plan: MountPlan) -> None:
    """From now on the log goes to syslog, where there is one."""
    root = logging.getLogger()
    logging.raiseExceptions = False
    handlers: list[logging.Handler] = [logging.NullHandler()]
    if _DEV_LOG.exists():
        try:
            handler = _Syslog(address=str(_DEV_LOG), facility=logging.handlers.SysLogHandler.LOG_DAEMON)
        except OSError as error:
            log.info("no syslog: %s", error)
        else:
            handler.addFilter(SparingFilter())
            handler.setFormatter(logging.Formatter(f"iscsifuse[{os.getpid()}]: {plan.mountpoint}: %(message)s"))
            handlers = [handler]
    for old in root.handlers[:]:
        root.removeHandler(old)
    for new in handlers:
        root.addHandler(new)
