"""Waiting for the end of one command: asleep, or, where it can't take long, looking for it.

Whoever waits leaves a ``waiter`` at the task, which is called when it is done: it wakes a fibre or a task. Where one
small command alone is under way, its answer may be there before we have fallen asleep; then whoever waits receives in
the reader's place for a moment (`Loop.glance`).

Invariant: nothing is awaited between the look at ``done`` and the sleep, so a task can't be finished unseen.
"""

import time
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from iscsifuse.errors import IscsifuseError
from iscsifuse.fibres import asleep, here
from iscsifuse.initiator.loop import Glance, Loop
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi.tasks import Task

__all__ = ["Waiting"]

_QUICK = 64 * 1024
"""Bytes of a command whose answer may be there before we could fall asleep."""
_LONGEST_GLANCE = 250_000
"""Nanoseconds to look for it."""
_GLANCES_IN_A_ROW = 32
"""Every now and then the others have their turn, however quickly answers come."""


class Waiting:
    """Waits for the commands of one session.

    Args:
        transport: of the session.
        receive: takes in what is there; returns whether it is worth trying again at once.
        fail: ends the session.
    """

    def __init__(
        self, transport: Transport, *, receive: Callable[[], bool], fail: Callable[[IscsifuseError], None]
    ) -> None:
        self._transport = transport
        self._receive = receive
        self._fail = fail
        self._loop = Loop.current()
        self._here = here()
        self._glance = Glance(_LONGEST_GLANCE)
        self._glances = 0

    def until_done(self, task: Task) -> Awaitable[None]:
        """Wait until a task that was started has ended; to be awaited at once.

        Cancellation: is not delivered before.
        """
        fibre = self._here.fibre
        if fibre is None or task.done or (self._loop.under_way == 1 and task.expected <= _QUICK):
            return self._until_done(task)
        task.waiter = fibre.wake
        return asleep(task)

    async def _until_done(self, task: Task) -> None:
        if task.done:
            return
        alone = self._loop.under_way == 1 and task.expected <= _QUICK
        if alone:
            limit = self._glance.limit
            self._glances += 1
            if limit and self._glances % _GLANCES_IN_A_ROW and self._look_for(task, limit):
                return
            began = time.monotonic_ns()
        fibre = self._here.fibre
        if fibre is not None:
            task.waiter = fibre.wake
            await asleep(task)
        else:
            task.waiter = partial(trio.lowlevel.reschedule, trio.lowlevel.current_task())
            await trio.lowlevel.wait_task_rescheduled(_not_now)
        if alone:
            self._glance.learn(time.monotonic_ns() - began)

    def _look_for(self, task: Task, limit: int) -> bool:
        """Receive in the reader's place for a moment; whether the task is done now. See `Loop.glance`.

        The reader sleeps meanwhile. It is woken only by what is still there when we have looked.
        """
        transport = self._transport
        transport.send_now()
        try:
            while not task.done and transport.glance(limit):
                self._receive()
        except IscsifuseError as error:
            self._fail(error)
        return task.done


def _not_now(_: object) -> trio.lowlevel.Abort:
    """A cancellation has to wait until the command has ended."""
    return trio.lowlevel.Abort.FAILED
