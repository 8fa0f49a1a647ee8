"""How many commands one logical unit is given at a time, once it has said that it was given too many.

At first there is no limit but the session's window. A target that answers TASK SET FULL, or BUSY, had more than it
takes: then the limit is half of what the unit had, and commands wait here for their turn, in the order in which they
came. What was sent before that answer came says nothing new, so it doesn't halve the limit again. As long as
nothing is refused the limit grows by a quarter each second, by one at least. Once it is where it all began it is
gone.

This is for the good of throughput, not a promise: who has waited here for as long as a command may take goes on
without a turn, so that nobody's end depends on others. The deadline of a command is kept by `Commander`.

Source: SAM-5 §5.3.1 (BUSY, TASK SET FULL), §8.
"""

import logging

import trio

from iscsifuse.initiator.commander import Executor
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi.status import Status

__all__ = ["GROW_EVERY", "QueueDepth"]

log = logging.getLogger(__name__)

GROW_EVERY = 1.0
"""Seconds without a refusal after which the limit grows."""
_REFUSALS = frozenset({Status.BUSY, Status.TASK_SET_FULL})


class QueueDepth:
    """An executor for one logical unit that keeps to what the unit takes.

    Args:
        executor: carries out the commands.
        label: for the log: "LUN 1 of iqn...".
        patience: seconds that a command waits for its turn at most.

    Attributes:
        limited: whether there is a limit now.
        limit: commands at a time, where there is one.
        under_way: commands that the target has, or may have, now. While there is no limit, others may carry out
            commands by themselves: they count here, then call `note` and `left`.
    """

    def __init__(self, executor: Executor, *, label: str, patience: float) -> None:
        self.limited = False
        self.limit = 0
        self.under_way = 0
        self._executor = executor
        self._label = label
        self._patience = patience
        self._began_at = 0  # the depth that was refused first
        self._changed_at = 0.0
        self._waiting = trio.lowlevel.ParkingLot()

    async def execute(
        self,
        cdb: bytes,
        *,
        lun: bytes,
        buffer_in: memoryview | None = None,
        buffer_out: memoryview | None = None,
        exact: bool = False,
    ) -> Task:
        """Carry out one command when it is its turn; see `Executor`.

        Cancellation: while it waits for its turn at once, later as the executor has it.
        """
        await self._take_turn()
        try:
            task = await self._executor.execute(cdb, lun=lun, buffer_in=buffer_in, buffer_out=buffer_out, exact=exact)
            self.note(task)
        finally:
            self.left()
        return task

    async def _take_turn(self) -> None:
        """Wait until there is room, but not for ever, and count as under way."""
        if self._waiting or (self.limited and self.under_way >= self.limit):
            with trio.move_on_after(self._patience):
                await self._waiting.park()
                return  # counted by who let it go, so that nobody takes its place before it runs
        self.under_way += 1

    def note(self, task: Task) -> None:
        """Learn from how a command ended; it still counts as under way."""
        if task.status in _REFUSALS:
            if task.started >= self._changed_at:
                self._lower()
        elif self.limited and trio.current_time() - self._changed_at >= GROW_EVERY:
            self._raise()

    def left(self) -> None:
        """A command is not under way any more: the next one's turn."""
        self.under_way -= 1
        if self.limited:  # else nobody waits
            self._let_go()

    def _lower(self) -> None:
        if not self.limited:
            self.limited = True
            self._began_at = self.limit = self.under_way
        before, self.limit = self.limit, max(1, min(self.under_way, self.limit) // 2)
        self._changed_at = trio.current_time()
        if self.limit < before:
            log.info("%s refuses commands: it is given %d at a time", self._label, self.limit)

    def _raise(self) -> None:
        self.limit += max(1, self.limit // 4)
        self._changed_at = trio.current_time()
        if self.limit >= self._began_at:
            self.limited = False
            log.info("%s takes commands as before", self._label)
        self._let_go()

    def _let_go(self) -> None:
        room = self.limit - self.under_way if self.limited else len(self._waiting)
        if room > 0:
            self.under_way += len(self._waiting.unpark(count=room))
