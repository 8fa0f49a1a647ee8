"""Bars: the logical units whose commands are held back, because nobody knows whose disk answers there.

A bar has a time until which commands wait for its end: the end of the patience with a lost session after a login, and
no time at all for a disk that has gone while the session lives. After it they fail.
"""

import trio

from iscsifuse.errors import IdentityError, SessionLostError

__all__ = ["Bars"]


class Bars:
    """The bars of one nexus, by logical unit.

    Invariant: every change of a bar, and of the nexus (`wake`), wakes all who wait, and they look again; so nobody
    waits for a bar that is gone, nor longer than the present one says.

    Attributes:
        barred: what the commands of a unit fail with, and until when they wait (on trio's clock). Always the same
            dict, to be looked at by whoever sends a command, with no await in between.
    """

    def __init__(self) -> None:
        self.barred: dict[bytes, tuple[SessionLostError | IdentityError, float]] = {}
        self._changed = trio.Event()  # replaced at each change

    def put(self, lun: bytes, error: SessionLostError | IdentityError, *, until: float) -> None:
        """Bar a unit, or bar it in another way; see `Nexus.bar`."""
        self.barred[lun] = error, until
        self.wake()

    def lift(self, lun: bytes) -> None:
        """Let the commands of a unit through."""
        self.barred.pop(lun, None)
        self.wake()

    def wake(self) -> None:
        """Have all who wait look again."""
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, lun: bytes) -> None:
        """Wait for the next change, or for the time of a unit's bar to be over; the caller has seen that it has one.

        Raises:
            SessionLostError, IdentityError: a copy of what the commands fail with; its time is over already.
        """
        error, until = self.barred[lun]
        if trio.current_time() >= until:
            raise type(error)(*error.args)
        with trio.move_on_at(until):
            await self._changed.wait()
