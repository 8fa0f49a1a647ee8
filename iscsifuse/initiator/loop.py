"""What all sessions of an event loop share: when to send, when to receive, when to sleep, who wakes fibres.

**Sending.** A send of 48 bytes costs several microseconds of kernel time, most of which is the way through TCP and
the waking of the other side; many commands in one send cost little more than one. trio tells instruments when it is
about to wait for I/O, which is when every task that could run has run: the right moment to send (`Loop.put_off`).

**Waiting.** Where just one command is under way, its answer is often there sooner than this process could fall asleep
and be woken. So its task may look at its socket again and again for a few microseconds (`Loop.glance`) before it lets
go of the processor, as QEMU's ``poll-max-ns`` has it. Three things keep that harmless: it ends as soon as any other
descriptor that belongs to us has something to say; nobody does it while more than one command is under way; and how
long it may last (`Glance`) follows from how long the last waits were, down to not at all.

**A round without the event loop.** Where many requests are under way the answers to some are there as soon as the
others have been taken, and two tasks to wake for that, with three system calls, cost as much as two small reads. So
who serves requests, and has none, does what the event loop would do next (`Loop.look_around`): sends what was put
off, and has sockets that are readable received from.

**Fibres** (`iscsifuse.fibres`) that were woken and that nobody has called since go on before the loop waits for I/O.
"""

import contextlib
import os
import select
import time
from collections.abc import Callable

import trio

from iscsifuse.fibres import here, run_ready

__all__ = ["Glance", "Loop"]


class Glance:
    """How long to look before sleeping, learnt from the waits themselves.

    A wait that ended shortly after we fell asleep: looking longer would have paid. One that took long: looking was
    for nothing. (The way of QEMU's ``poll-max-ns``.)

    Args:
        most: nanoseconds to look at most; a wait below this is one worth looking for.

    Attributes:
        limit: nanoseconds to look the next time; 0: don't.
    """

    __slots__ = ("_most", "limit")

    _FIRST = 8_000

    def __init__(self, most: int) -> None:
        # With one processor, whoever we wait for can't work while we look.
        self._most = most if len(os.sched_getaffinity(0)) > 1 else 0
        self.limit = 0

    def learn(self, waited: int) -> None:
        """A wait that ended asleep took so many nanoseconds in all."""
        if waited < self._most:
            self.limit = min(self._most, max(self._FIRST, self.limit * 2))
        elif self.limit:
            self.limit = self.limit // 2 if self.limit > self._FIRST else 0


class Loop(trio.abc.Instrument):
    """One for each ``trio.run``; see `current`.

    Attributes:
        under_way: commands that were sent and aren't done, of all sessions.
    """

    def __init__(self) -> None:
        self.under_way = 0
        self._due: list[Callable[[], None]] = []
        self._token = trio.lowlevel.current_trio_token()
        self._poll = select.poll()
        self._receivers: dict[int, Callable[[], None]] = {}  # by descriptor

    @classmethod
    def current(cls) -> "Loop":
        """That of the running event loop."""
        try:
            return _loop.get()
        except LookupError:
            loop = cls()
            trio.lowlevel.add_instrument(loop)
            _loop.set(loop)
            return loop

    # -- sending ---------------------------------------------------------------------------------------------------

    def put_off(self, function: Callable[[], None]) -> None:
        """Have a function called, once, before the event loop waits for I/O.

        It runs outside of any task: it must not raise, and must wake tasks by `wake_soon` only, since it is decided
        already how long the loop is going to sleep.
        """
        self._due.append(function)

    def wake_soon(self, function: Callable[[], None]) -> None:
        """For functions that were put off: call another one, which may wake tasks, in the next round."""
        self._token.run_sync_soon(function)

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        """The event loop has nothing else to do. See ``trio.abc.Instrument``."""
        self._send_what_was_put_off()
        if here().ready:
            self.wake_soon(run_ready)

    def _send_what_was_put_off(self) -> None:
        if self._due:
            due, self._due = self._due, []
            for function in due:
                function()

    # -- waiting ---------------------------------------------------------------------------------------------------

    def watch(self, fd: int, receive: Callable[[], None] | None = None) -> None:
        """A descriptor whose news must not wait while somebody looks for his own.

        Args:
            fd: it. May be watched already.
            receive: takes in what is there, once. A plain call that raises nothing; where nothing is there after all,
                it does nothing.
        """
        self._poll.register(fd, select.POLLIN)
        if receive is not None:
            self._receivers[fd] = receive

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor, before it is closed; unknown ones are ignored."""
        self._receivers.pop(fd, None)
        with contextlib.suppress(KeyError):
            self._poll.unregister(fd)

    def glance(self, fd: int, limit: int) -> bool:
        """Look until a watched descriptor has news, without letting anybody else run.

        Args:
            fd: the one that the caller waits for.
            limit: nanoseconds to look at most.

        Returns:
            Whether it has news; not if another one has, too.
        """
        end = time.monotonic_ns() + limit
        poll = self._poll.poll
        while True:
            ready = poll(0)
            if ready:
                return len(ready) == 1 and ready[0][0] == fd
            if time.monotonic_ns() >= end:
                return False

    def look_around(self, fd: int) -> bool:
        """Do at once what the event loop would do next, without letting other tasks run.

        Args:
            fd: watched by the caller.

        Returns:
            Whether something was received, or ``fd`` has news: it is worth looking there again. If not, the event
            loop has to have its turn.
        """
        self._send_what_was_put_off()
        found = False
        for ready, _ in self._poll.poll(0):
            receive = self._receivers.get(ready)
            if receive is not None:
                receive()
                found = True
            elif ready == fd:
                found = True
        return found


_loop: trio.lowlevel.RunVar[Loop] = trio.lowlevel.RunVar("iscsifuse loop")
