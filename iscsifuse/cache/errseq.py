"""Errors of writes that were acknowledged before, and who has been told.

Like the kernel's ``errseq_t``: errors are numbered, and each open handle remembers the number up to which it knows.
Every handle that was open at the time is told of an error, each on its own. An error that nobody has been told of yet
is also reported to a handle that is opened later, so that it isn't lost where the only handle was closed before the
write failed.

A handle asks in two ways, and is told once by each. Who syncs wants to know of everything. Who drains may be a
close(2), whose answer hardly anybody reads, and which may be another program's: a handle belongs to an open file,
and that may have several descriptors (dup, fork), each of which is closed on its own, if only by the end of a child.
So what a drain tells, the next sync tells again; what a sync has told, nobody needs to hear twice.

Several errors between two questions are told as one: the first of them since anybody asked, which is most likely
the cause of the others.
"""

import errno as _errno
from collections.abc import Callable

from iscsifuse.errors import IscsifuseError, WriteBackError

__all__ = ["ErrorSequence", "Handle", "WriteBackNoSpaceError", "WriteBackReadOnlyError", "write_back_error"]


class WriteBackNoSpaceError(WriteBackError):
    """An acknowledged write could not be completed because the disk is full."""

    errno = _errno.ENOSPC


class WriteBackReadOnlyError(WriteBackError):
    """An acknowledged write could not be completed because the disk is write-protected."""

    errno = _errno.EROFS


_KINDS: dict[int, type[WriteBackError]] = {
    _errno.ENOSPC: WriteBackNoSpaceError,
    _errno.EROFS: WriteBackReadOnlyError,
}


def write_back_error(cause: Exception, *, what: str = "") -> WriteBackError:
    """What becomes of an error of the device that nobody waited for.

    Args:
        cause: the error; the result is chained from it.
        what: what failed, as a sentence without its end.

    Returns:
        A WriteBackError whose ``errno`` is the cause's where that tells the user what to do (ENOSPC, EROFS; the class
        is one of the two above then), else EIO.
    """
    kind = WriteBackError
    if isinstance(cause, IscsifuseError):
        kind = _KINDS.get(cause.errno, WriteBackError)
    reason = str(cause) or type(cause).__name__
    error = kind(f"{what}: {reason}" if what else reason)
    error.__cause__ = cause
    return error


class Handle:
    """Somebody who has the file open: knows which errors it has been told of.

    Attributes:
        drained: the number up to which some answer told of them.
        synced: the number up to which the answer of a sync did; never more than ``drained``.
    """

    __slots__ = ("drained", "synced")

    def __init__(self, known: int) -> None:
        self.drained = self.synced = known


class ErrorSequence:
    """The errors of one file.

    Attributes:
        count: how many were recorded so far.
        on_record: called for each.
    """

    __slots__ = ("_error", "_told", "count", "on_record")

    def __init__(self) -> None:
        self.count = 0
        self.on_record: Callable[[], None] | None = None
        self._error: WriteBackError | None = None
        self._told = True

    def record(self, error: WriteBackError) -> None:
        """A write that was acknowledged, or a flush, failed."""
        self.count += 1
        if self._told or self._error is None:
            self._error = error
            self._told = False
        if self.on_record is not None:
            self.on_record()

    def open(self) -> Handle:
        """A new handle, which will be told of what nobody has been told of yet."""
        return Handle(self.count if self._told else self.count - 1)

    def check(self, handle: Handle, *, since: int | None = None, drain: bool = False) -> None:
        """Raise what the handle hasn't been told of.

        Args:
            handle: who asks; knows everything afterwards, or everything that a drain has to tell.
            since: ``count`` when a drain began. What failed during the drain is raised even if another task asked
                with the same handle meanwhile: neither of the two may report a success.
            drain: nobody has synced: whoever does will be told again.

        Raises:
            WriteBackError: chained from what was recorded.
        """
        known = handle.drained if drain else handle.synced
        if known == self.count and (since is None or since == self.count):
            return
        handle.drained = self.count
        if not drain:
            handle.synced = self.count
        self._told = True
        error = self._error
        assert error is not None  # noqa: S101  count > 0 says so
        # A copy: tracebacks grow with each raise of an exception, and handles are told independently.
        raise type(error)(*error.args) from error.__cause__
