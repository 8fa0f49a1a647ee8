"""Mounting and unmounting, and what can be said when either fails.

libfuse speaks to standard error, and then reports "failed"; so its words are caught and become the message. As root
it calls mount(2), else ``fusermount3`` does. With ``auto_unmount`` a ``fusermount3`` stays, and unmounts when the
daemon ends, however it ends (SIGKILL included): nobody is left with "Transport endpoint is not connected". (That is
so for root; the fusermount3 of libfuse 3.14 and before can't tell that another user's mount is dead. The next mount
or umount clears that up.)
"""

import contextlib
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import quote

import pyfuse3

from iscsifuse.errors import MountError
from iscsifuse.mount.kernel import unmount_call
from iscsifuse.mount.mountinfo import SUBTYPE
from iscsifuse.mount.plan import MountPlan

__all__ = ["BusyError", "attach", "fusermount", "mount_options", "unmount"]

_SAFE_IN_SOURCE = "!$&'()*+/:;=?@[]~#%"
_PROGRAM = re.compile(r"^(?:\S*/)?(?:fuse|fusermount3): ", re.MULTILINE)
_UNMOUNT_LIMIT = 300.0
"""Seconds for the kernel to write back pages that programs have mapped."""


class BusyError(MountError):
    """The mount is in use."""

    errno = errno.EBUSY


def fusermount() -> str | None:
    """Path of ``fusermount3``, or None."""
    return shutil.which("fusermount3") or shutil.which("fusermount3", path="/usr/local/bin:/usr/bin:/bin")


def mount_options(plan: MountPlan) -> set[str]:
    """What libfuse is told."""
    # A comma or a backslash in the source would end the option.
    options = {
        f"fsname={quote(plan.source, safe=_SAFE_IN_SOURCE)}",
        f"subtype={SUBTYPE}",
        "default_permissions",
        "nosuid",
        "nodev",
        "rw" if plan.read_write else "ro",
    }
    if plan.allow_other:
        options.add("allow_other")
    if fusermount() is not None:
        options.add("auto_unmount")
    return options


def attach(operations: pyfuse3.Operations, plan: MountPlan) -> None:
    """Mount. From here on the kernel's requests wait for ``pyfuse3.main``.

    Raises:
        MountError: with what libfuse said.
    """
    with _standard_streams_caught() as said:
        try:
            pyfuse3.init(operations, str(plan.mountpoint), mount_options(plan))
        except RuntimeError as error:
            words = _PROGRAM.sub("", said()).strip().splitlines()
            reason = "; ".join(line.strip() for line in words if line.strip()) or str(error)
            raise MountError(f"{plan.mountpoint} can't be mounted: {reason}") from error


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount. May wait while the daemon writes; never to be called by the thread that serves the mount.

    Args:
        mountpoint: absolute, resolved.
        lazy: detach now, also where it is busy.

    Raises:
        BusyError: it is in use; nothing has changed.
        PermissionError: not by this user.
        MountError: anything else.
    """
    if os.geteuid() == 0:
        try:
            unmount_call(mountpoint, lazy=lazy)
        except PermissionError:
            raise
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise BusyError(f"{mountpoint} is busy") from error
            raise MountError(f"{mountpoint} can't be unmounted: {error.strerror}") from error
        return
    program = fusermount()
    if program is None:
        raise MountError("fusermount3 is missing; it comes with the package fuse3")
    try:
        result = subprocess.run(  # noqa: S603 - a path of our own finding
            [program, "-u", *(["-z"] if lazy else []), "--", mountpoint],
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=_UNMOUNT_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MountError(f"{mountpoint} can't be unmounted: fusermount3 doesn't come to an end") from error
    if result.returncode == 0:
        return
    words = _PROGRAM.sub("", result.stderr).strip()
    if "busy" in words.lower():
        raise BusyError(f"{mountpoint} is busy")
    if "not permitted" in words.lower() or "not found in" in words.lower():
        raise PermissionError(errno.EPERM, f"not mounted by this user ({words})", mountpoint)
    raise MountError(f"{mountpoint} can't be unmounted: {words or 'fusermount3 failed'}")


@contextmanager
def _standard_streams_caught() -> Iterator[Callable[[], str]]:
    """Standard error goes to memory, the other two nowhere; yields what tells the text.

    A ``fusermount3`` that stays inherits these, and so doesn't hold a pipe that somebody reads to its end.
    """
    memory = os.memfd_create("stderr")
    nothing = os.open(os.devnull, os.O_RDWR)
    saved: dict[int, int] = {}
    try:
        for number, replacement in ((0, nothing), (1, nothing), (2, memory)):
            with contextlib.suppress(OSError):
                saved[number] = os.dup(number)
            os.dup2(replacement, number)

        def said() -> str:
            return os.pread(memory, 1 << 16, 0).decode(errors="backslashreplace")

        yield said
    finally:
        for number in (0, 1, 2):
            if number in saved:
                os.dup2(saved[number], number)
                os.close(saved[number])
            else:
                os.close(number)
        os.close(memory)
        os.close(nothing)
