"""From exceptions to errno: the only thing that may come out of a FUSE operation is a bare ``FUSEError``.

Anything else that leaves an operation ends pyfuse3's main loop, and with it the mount of every LUN. So there is one
decorator, and it lets through only what belongs to somebody else:

* ``trio.Cancelled`` (and the other ``BaseException``: interrupts, GeneratorExit). pyfuse3's worker then ends without
  an answer; the program that waits for one gets an error when the connection is closed, which is what follows a
  cancellation here. It is never turned into a success.
* ``FUSEError`` itself, which an operation raises where the errno *is* the answer.

An errno has to be one that can be answered. 0 would be a success; the kernel refuses one beyond 511, and the program
would wait for ever; ENOSYS means "never ask again" to the kernel, and for flush and fsync "success, for ever"; EINTR
and EAGAIN make programs ask again, for ever. All these become EIO.
"""

import errno
import functools
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import trio
from pyfuse3 import FUSEError

from iscsifuse.errors import IscsifuseError

__all__ = ["errno_of", "fuse_error", "never_enosys", "translated", "worst_leaf"]

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S")

_MAX_ERRNO = 511
"""The kernel takes no answer beyond it (``fuse_dev_do_write``: -512 < error <= 0)."""
_MISLEADING = frozenset({errno.ENOSYS, errno.EINTR, errno.EAGAIN})


def errno_of(error: BaseException) -> int:
    """What a caller of read(2) is told.

    Args:
        error: any exception that isn't a group.

    Returns:
        An errno that can be answered: 1 to 511, and none of the misleading ones (see the module).
    """
    number: object
    if isinstance(error, IscsifuseError | OSError):
        number = error.errno
    elif isinstance(error, MemoryError):
        number = errno.ENOMEM
    else:
        number = errno.EIO
    if not isinstance(number, int) or not 0 < number <= _MAX_ERRNO or number in _MISLEADING:
        return errno.EIO
    return number


def worst_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The exception of a group that is worth telling.

    Something unexpected first, since it hides a mistake; then an EIO, which is what a caller has to hear; then
    whatever comes first. Cancellations only where there is nothing else: beside a failure they are its consequence.
    """

    def leaves(error: BaseException) -> Iterator[BaseException]:
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                yield from leaves(inner)
        else:
            yield error

    def rank(error: BaseException) -> int:
        if isinstance(error, trio.Cancelled):
            return 4
        if not isinstance(error, Exception):
            return 0
        if not isinstance(error, IscsifuseError | OSError | FUSEError):
            return 1
        return 2 if not isinstance(error, FUSEError) and errno_of(error) == errno.EIO else 3

    return min(leaves(group), key=rank)


def translated(
    operation: Callable[Concatenate[_S, _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _R]]:
    """Make an operation of a file system raise nothing but FUSEError (see the module)."""
    name = getattr(operation, "__name__", "operation").lstrip("_")

    @functools.wraps(operation)
    async def wrapper(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return await operation(self, *args, **kwargs)
        except (Exception, BaseExceptionGroup) as error:
            raise fuse_error(name, error) from None

    return wrapper


def fuse_error(name: str, error: Exception | BaseExceptionGroup[BaseException]) -> FUSEError:
    """What the operation ``name`` raises instead of an exception; logs it where it is worth telling.

    Raises:
        BaseExceptionGroup: the given one, where it holds something that is no Exception (a cancellation).
    """
    if isinstance(error, FUSEError):
        return error
    if isinstance(error, BaseExceptionGroup):
        leaf = worst_leaf(error)
        if not isinstance(leaf, Exception):
            raise error
        return leaf if isinstance(leaf, FUSEError) else FUSEError(_told(name, leaf, error))
    return FUSEError(_told(name, error, error))


def never_enosys(
    operation: Callable[Concatenate[_S, _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _R]]:
    """``translated``, for flush and fsync: an ENOSYS of theirs would mean success for the rest of the mount."""
    inner = translated(operation)

    @functools.wraps(operation)
    async def wrapper(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return await inner(self, *args, **kwargs)
        except FUSEError as error:
            if error.errno == errno.ENOSYS:
                raise FUSEError(errno.EIO) from None
            raise

    return wrapper


def _told(name: str, error: Exception, whole: BaseException) -> int:
    """Log an exception, and return the errno for it."""
    number = errno_of(error)
    if isinstance(error, IscsifuseError | OSError):
        log.warning("%s failed with %s: %s", name, errno.errorcode.get(number, number), error)
    else:
        log.error("%s failed unexpectedly", name, exc_info=whole)
    return number
