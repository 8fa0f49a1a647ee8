"""Background work: jobs that are taken as they come.

A worker asks for a job, does it, asks again, and rests when there is none. What is to be done is decided as late as
possible, by the owner's ``take``, when a worker is free: jobs that wait can still grow, shrink or vanish. Workers are
strands (`iscsifuse.strands`): a job that only waits for a command costs no round of the event loop. They are hired
only when there is work for them.

A job must not raise: what goes wrong is the owner's business (invariant: nothing of background work ever escapes
into the nursery, except cancellation).
"""

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from iscsifuse.fibres import here, run_ready
from iscsifuse.strands import Team, idle

__all__ = ["Workers"]

_Job = TypeVar("_Job")


class Workers(Team, Generic[_Job]):
    """Up to ``limit`` strands.

    Args:
        limit: jobs at once; at least 1.
        take: the next job, or None; called without an await before or after it.
        work: does a job, and keeps the rule of fibres.

    Attributes:
        busy: jobs that are being done now.
    """

    def __init__(
        self, limit: int, *, take: Callable[[], _Job | None], work: Callable[[_Job], Awaitable[None]]
    ) -> None:
        super().__init__()
        self.busy = 0
        self._limit = limit
        self._take = take
        self._work = work
        self._kicked = trio.lowlevel.ParkingLot()  # where the server waits
        self._over = True

    def start(self, nursery: trio.Nursery) -> None:
        """Work in this nursery from now on, until it is cancelled.

        Cancellation: no job is begun any more; those that wait for their command's end have that first.

        What a job raises (a mistake of ours), the nursery's task raises. After that, it may be started again.
        """
        self.nursery = nursery
        self._strands.clear()
        self._error = None
        self._over = False
        nursery.start_soon(self._serve)

    def kick(self) -> None:
        """There may be a job: wake or hire a worker. Each worker that leaves jobs behind kicks the next."""
        if self.idle:
            strand = self.idle.pop()
        elif not self._over and len(self._strands) < self._limit:
            strand = self._hire(self._loop())
        else:
            return
        now = here()
        now.ready.append(strand)
        if now.fibre is None:  # else whoever runs that fibre calls `run_ready` next
            self._kicked.unpark()

    def failed(self, error: BaseException) -> None:
        """See ``Team``. The server raises it."""
        super().failed(error)
        self._kicked.unpark()

    async def _serve(self) -> None:
        """Run those who were kicked by a task; see to it that all of them end."""
        try:
            while True:
                run_ready()
                if self._error is not None:
                    raise self._error
                await self._kicked.park()
        finally:
            self._over = True
            run_ready()  # who was kicked, and hasn't begun, ends instead
            await self._let_sleepers_end()
            self._dismiss_idlers()

    async def _loop(self) -> None:
        while not self._over:
            job = self._take()
            if job is None:
                await idle()  # No await since ``take``: a kick can't fall in between.
                continue
            self.busy += 1
            try:
                await self._work(job)
            finally:
                self.busy -= 1
