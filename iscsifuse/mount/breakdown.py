"""Mistakes of our own: tasks in the background that end with an exception that nobody expected.

A nursery would cancel everything else for it, and with that what other disks haven't written yet. So what a mount
stands on runs *contained*: the mistake is logged and noted, its neighbours go on, and the mount ends in the usual
order (unmount, write back, log out) before it fails with what went wrong.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from iscsifuse.errors import MountError
from iscsifuse.initiator.groups import plain_errors

__all__ = ["Breakdown"]

log = logging.getLogger(__name__)


class Breakdown:
    """What a mount broke down of, if it did.

    Attributes:
        happened: set once it is time to end.
        error: the first mistake.
    """

    def __init__(self) -> None:
        self.happened = trio.Event()
        self.error: Exception | None = None

    def note(self, error: Exception) -> None:
        """Something ended that should have gone on."""
        log.critical("the mount broke down, and ends", exc_info=error)
        if self.error is None:
            self.error = error
        self.happened.set()

    @contextmanager
    def contained(self) -> Iterator[None]:
        """Note whatever the body raises; only cancellation and what isn't an Exception go on."""
        try:
            with plain_errors():
                yield
        except Exception as error:
            self.note(error)

    def check(self) -> None:
        """Tell.

        Raises:
            MountError: it happened.
        """
        if self.error is not None:
            raise MountError(f"the mount broke down: {self.error!r}") from self.error
