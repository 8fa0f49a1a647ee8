"""Exceptions of concurrent work, as the plain exceptions that callers expect."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio

__all__ = ["plain_errors"]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise the first exception of a group instead of the group.

    For nurseries whose tasks fail for one reason, or for reasons of which one is enough to tell; what isn't an
    Exception (KeyboardInterrupt, SystemExit) goes first. A group that holds cancellations only passes through, since
    it belongs to a cancel scope further out.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        _, rest = group.split(trio.Cancelled)
        if rest is None:
            raise
        _, urgent = rest.split(Exception)
        leaf: BaseException = rest if urgent is None else urgent
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        # Its own cause is kept; the group would only repeat it.
        raise leaf from leaf.__cause__
