"""Background tasks that take jobs as they come.

A worker asks for a job, does it, asks again, and parks when there is none. What is to be done is decided as late as
possible, by the owner's ``take``, when a worker is free: jobs that wait can still grow, shrink or vanish. Waking a
parked worker is much cheaper than starting a task, and workers are started only when there is work for them.

A job must not raise: what goes wrong is the owner's business (invariant: nothing of background work ever escapes
into the nursery, except cancellation).
"""

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from iscsifuse.fibres import run_ready

__all__ = ["Workers"]

_Job = TypeVar("_Job")


class Workers(Generic[_Job]):
    """Up to ``limit`` tasks.

    Args:
        limit: jobs at once; at least 1.
        take: the next job, or None; called without an await before or after it.
        work: does a job.

    Attributes:
        busy: jobs that are being done now.
    """

    def __init__(
        self, limit: int, *, take: Callable[[], _Job | None], work: Callable[[_Job], Awaitable[None]]
    ) -> None:
        self.busy = 0
        self._limit = limit
        self._take = take
        self._work = work
        self._started = 0
        self._parked = trio.lowlevel.ParkingLot()
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery) -> None:
        """Work in this nursery from now on."""
        self._nursery = nursery
        self._started = 0

    def stop(self) -> None:
        """Start no more workers; those that run end with the nursery."""
        self._nursery = None

    def kick(self) -> None:
        """There may be a job: wake or start one worker. Each worker that leaves jobs behind kicks the next."""
        if self._parked:
            self._parked.unpark()
        elif self._nursery is not None and self._started < self._limit:
            self._started += 1
            self._nursery.start_soon(self._loop)

    async def _loop(self) -> None:
        while True:
            run_ready()  # those who waited for the last job
            job = self._take()
            if job is None:
                await self._parked.park()  # No await since ``take``: a kick can't fall in between.
                continue
            self.busy += 1
            try:
                await self._work(job)
            finally:
                self.busy -= 1
