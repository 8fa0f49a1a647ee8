"""Every exception of an operation becomes a bare FUSEError that can be answered, or belongs to somebody else."""

import errno
import logging

import pytest
import trio
from pyfuse3 import FUSEError

from iscsifuse.errors import (
    CommandTimeoutError,
    DataProtectError,
    IscsifuseError,
    NoSpaceError,
    ReservationConflictError,
    WriteBackError,
)
from iscsifuse.mount.translate import errno_of, never_enosys, translated, worst_leaf


class EnosysError(IscsifuseError):
    errno = errno.ENOSYS


class OfItsOwnError(IscsifuseError):
    """Tells its errno by an attribute of the instance."""

    def __init__(self, number: int) -> None:
        super().__init__("special")
        vars(self)["errno"] = number


class Operations:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    @translated
    async def read(self, offset: int, *, size: int) -> int:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return offset + size

    @never_enosys
    async def flush(self) -> None:
        assert self.error is not None
        raise self.error


SENTENCES = [
    (CommandTimeoutError("slow"), errno.EIO),
    (DataProtectError("wp", status=2), errno.EROFS),
    (NoSpaceError("full", status=2), errno.ENOSPC),
    (ReservationConflictError("taken", status=0x18), errno.EBUSY),
    (OfItsOwnError(errno.ENOMEDIUM), errno.ENOMEDIUM),
    (OfItsOwnError(0), errno.EIO),
    (OfItsOwnError(-5), errno.EIO),
    (OfItsOwnError(512), errno.EIO),
    (EnosysError("x"), errno.EIO),
    (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
    (OSError(errno.EAGAIN, "again"), errno.EIO),
    (OSError(errno.EINTR, "interrupted"), errno.EIO),
    (OSError("no number"), errno.EIO),
    (MemoryError(), errno.ENOMEM),
    (KeyError("bug"), errno.EIO),
    (trio.BrokenResourceError(), errno.EIO),
]


@pytest.mark.parametrize(("error", "number"), SENTENCES)
def test_errno_of(error: Exception, number: int) -> None:
    assert errno_of(error) == number


async def test_results_and_arguments_pass() -> None:
    assert await Operations(None).read(3, size=4) == 7
    assert Operations.read.__name__ == "read"


@pytest.mark.expect_log("read failed")
@pytest.mark.parametrize(("error", "number"), SENTENCES)
async def test_exceptions_become_bare_fuse_errors(error: Exception, number: int) -> None:
    with pytest.raises(FUSEError) as caught:
        await Operations(error).read(0, size=0)
    assert type(caught.value) is FUSEError
    assert caught.value.errno == number
    assert caught.value.__cause__ is None


async def test_fuse_errors_pass_silently() -> None:
    with pytest.raises(FUSEError) as caught:
        await Operations(FUSEError(errno.ENOSYS)).read(0, size=0)
    assert caught.value.errno == errno.ENOSYS


@pytest.mark.expect_log("flush failed")
@pytest.mark.parametrize(
    "error",
    [
        FUSEError(errno.ENOSYS),
        EnosysError("x"),
        OSError(errno.ENOSYS, "x"),
        ExceptionGroup("x", [FUSEError(errno.ENOSYS)]),
    ],
)
async def test_flush_and_fsync_never_say_enosys(error: Exception) -> None:
    with pytest.raises(FUSEError) as caught:
        await Operations(error).flush()
    assert caught.value.errno == errno.EIO


@pytest.mark.expect_log("flush failed")
async def test_other_errors_of_flush_pass() -> None:
    for error, number in ((FUSEError(errno.ENOSPC), errno.ENOSPC), (WriteBackError("lost"), errno.EIO)):
        with pytest.raises(FUSEError) as caught:
            await Operations(error).flush()
        assert caught.value.errno == number


async def test_cancellation_passes() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await Operations(None).read(0, size=0)
    assert scope.cancelled_caught


async def test_cancellation_in_a_group_passes() -> None:
    class Slow:
        @translated
        async def read(self) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(trio.sleep_forever)

    with trio.move_on_after(0) as scope:
        await Slow().read()
    assert scope.cancelled_caught


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
async def test_what_is_no_error_passes(error: BaseException) -> None:
    with pytest.raises(type(error)):
        await Operations(error).read(0, size=0)
    with pytest.raises(BaseExceptionGroup):
        await Operations(BaseExceptionGroup("x", [error, KeyError()])).read(0, size=0)


async def cancelled() -> trio.Cancelled:
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.sleep_forever()
        except trio.Cancelled as error:
            caught = error
            raise
    return caught


@pytest.mark.expect_log("read failed")
async def test_groups_become_their_worst_leaf() -> None:
    full, io = OSError(errno.ENOSPC, "full"), CommandTimeoutError("slow")
    cases: list[tuple[list[BaseException], int]] = [
        ([full], errno.ENOSPC),
        ([full, io], errno.EIO),
        ([FUSEError(errno.ENOENT), full], errno.ENOENT),
        ([FUSEError(errno.ENOENT)], errno.ENOENT),
        ([full, ExceptionGroup("y", [KeyError("bug")])], errno.EIO),
        ([await cancelled(), full], errno.ENOSPC),
    ]
    for leaves, number in cases:
        with pytest.raises(FUSEError) as caught:
            await Operations(BaseExceptionGroup("x", leaves)).read(0, size=0)
        assert caught.value.errno == number, leaves


async def test_worst_leaf_prefers_mistakes() -> None:
    bug, late = KeyError("bug"), await cancelled()
    assert worst_leaf(BaseExceptionGroup("x", [late, OSError(5, "x"), ExceptionGroup("y", [bug])])) is bug
    assert worst_leaf(BaseExceptionGroup("x", [late])) is late


@pytest.mark.expect_log("read failed")
async def test_expected_errors_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FUSEError):
        await Operations(CommandTimeoutError("LUN 1 is slow")).read(0, size=0)
    (record,) = caplog.records
    assert record.getMessage() == "read failed with EIO: LUN 1 is slow"
    assert record.levelno == logging.WARNING
    assert record.exc_info is None


@pytest.mark.expect_log("read failed unexpectedly")
async def test_mistakes_are_logged_with_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FUSEError):
        await Operations(KeyError("bug")).read(0, size=0)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
