"""The SCSI commands of a session, from their arrival to their status.

A command is first shown to the engine's first door, which may end it at once. A write then collects its data, beside
all the others. What is complete becomes ready (after the configured latency), and one executor performs what is
ready: first come, first served; or, with ``reorder``, in random order, by a seeded generator. A command that waits
for its data holds up no other one. Even a command that ended at once waits for the end of its unsolicited data, and
for its turn.

A task that was dropped (aborted, reset, session over) is on no list any more and will not be answered, nor executed;
data for it is ignored.

Source: RFC 7143 §4.2.5, §11.3, §11.4, §11.7, §11.8.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial

import trio

from iscsifuse.iscsi.request import DataOut, ScsiCommand
from iscsifuse.iscsi.response import R2T, DataIn, ScsiResponse
from iscsifuse.scsi.cdb import Opcode
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import sense_segment
from iscsifuse.testing.config import TargetConfig
from iscsifuse.testing.disk import FileBacking
from iscsifuse.testing.keys import Agreed
from iscsifuse.testing.lengths import Lengths
from iscsifuse.testing.numbers import Numbers
from iscsifuse.testing.outcome import Outcome
from iscsifuse.testing.scsi_engine import ScsiEngine
from iscsifuse.testing.transfer import Collector, segments
from iscsifuse.testing.wire import Incoming, Wire

__all__ = ["Task", "TaskSet"]

_SYNCHRONIZES = frozenset({Opcode.SYNCHRONIZE_CACHE_10, Opcode.SYNCHRONIZE_CACHE_16})


@dataclass(slots=True, eq=False)
class Task:
    """A SCSI command that isn't done.

    Attributes:
        command: the command.
        moves: what it moves by its CDB.
        delay: seconds that it has to wait once its data is there.
        collector: its data, where it is a write.
        outcome: how it ended already, before it was executed.
        response: iSCSI response code that a script wants.
        complete: all of its data is there.
    """

    command: ScsiCommand
    moves: Lengths
    delay: float
    collector: Collector | None = None
    outcome: Outcome | None = None
    response: int = 0
    complete: bool = False


class TaskSet:
    """The commands of one session.

    Args:
        wire: where answers go.
        numbers: of the session.
        engine: the disks.
        nexus: who asks.
        agreed: what was negotiated.
        config: how to behave.
        next_ttt: where Target Transfer Tags come from.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        numbers: Numbers,
        engine: ScsiEngine,
        nexus: Hashable,
        agreed: Agreed,
        config: TargetConfig,
        next_ttt: Iterator[int],
    ) -> None:
        self._wire = wire
        self._numbers = numbers
        self._engine = engine
        self._nexus = nexus
        self._agreed = agreed
        self._config = config
        self._next_ttt = next_ttt
        self._tasks: dict[int, Task] = {}
        self._ready: deque[Task] = deque()
        self._random = None if config.reorder is None else random.Random(config.reorder)  # noqa: S311 - repeatable
        self._something_ready = trio.Event()
        self._delayed: list[tuple[float, int, Task]] = []
        self._something_delayed = trio.Event()
        self._arrivals = itertools.count()

    # -- arriving --------------------------------------------------------------------------------------------------

    def begin(self, pdu: ScsiCommand, incoming: Incoming) -> bool:
        """A command's turn has come.

        Returns:
            False where its tag belongs to another task.
        """
        if pdu.itt in self._tasks:
            return False
        task = Task(
            pdu,
            self._engine.lengths(lun=pdu.lun, cdb=pdu.cdb) or Lengths(),
            delay=self._config.latency + incoming.late,
        )
        if incoming.answer is not None:
            answer = incoming.answer
            task.outcome, task.response = Outcome(status=answer.status, sense=answer.sense), answer.response
        else:
            task.outcome = self._engine.check(nexus=self._nexus, lun=pdu.lun, cdb=pdu.cdb)
        if pdu.write or not pdu.final:
            wanted = 0 if task.outcome else min(pdu.expected_data_transfer_length, task.moves.data_out)
            task.collector = Collector(pdu, wanted=wanted, agreed=self._agreed, reverse=self._config.reverse_r2t)
        self._tasks[pdu.itt] = task
        self._numbers.outstanding = len(self._tasks)
        self._advance(task)
        return True

    def data_out(self, pdu: DataOut) -> Task | None:
        """Data came.

        Returns:
            The task, where the data is not what was asked of it; else None. Data for a task that is over is ignored.
        """
        task = self._tasks.get(pdu.itt)
        if task is None or task.collector is None:
            return None
        if not task.collector.feed(pdu):
            return task
        self._advance(task)
        return None

    def _advance(self, task: Task) -> None:
        """Ask for more of a task's data, or let it become ready."""
        if task.collector is not None:
            for asked in task.collector.solicit(self._next_ttt):
                self._wire.send(
                    R2T(
                        itt=task.command.itt,
                        lun=task.command.lun,
                        ttt=asked.ttt,
                        stat_sn=self._numbers.stat_sn,
                        exp_cmd_sn=self._numbers.exp_cmd_sn,
                        max_cmd_sn=self._numbers.max_cmd_sn,
                        r2t_sn=asked.r2t_sn,
                        buffer_offset=asked.offset,
                        desired_data_transfer_length=asked.length,
                    )
                )
            if not task.collector.complete:
                return
        if task.complete:
            return
        task.complete = True
        if task.delay:
            due = trio.current_time() + task.delay
            heapq.heappush(self._delayed, (due, next(self._arrivals), task))
            self._something_delayed.set()
        else:
            self._become_ready(task)

    async def _release_delayed(self) -> None:
        """One task for all delays: what is due at the same moment becomes ready in the order of arrival."""
        while True:
            self._something_delayed = trio.Event()
            if not self._delayed:
                await self._something_delayed.wait()
                continue
            with trio.move_on_at(self._delayed[0][0]):
                # One that came meanwhile may be due earlier.
                await self._something_delayed.wait()
            while self._delayed and self._delayed[0][0] <= trio.current_time():
                self._become_ready(heapq.heappop(self._delayed)[2])

    def _become_ready(self, task: Task) -> None:
        if self._tasks.get(task.command.itt) is not task:
            return  # it was dropped meanwhile
        if task.command.immediate:
            self._ready.appendleft(task)
        else:
            self._ready.append(task)
        self._something_ready.set()

    # -- leaving ---------------------------------------------------------------------------------------------------

    def find(self, itt: int) -> Task | None:
        """The task with this tag."""
        return self._tasks.get(itt)

    def drop(self, task: Task) -> None:
        """Take a task off the lists; it may be off already."""
        if self._tasks.get(task.command.itt) is task:
            del self._tasks[task.command.itt]
            self._numbers.outstanding = len(self._tasks)
        if task in self._ready:
            self._ready.remove(task)

    def drop_all(self, matches: Callable[[Task], bool] = lambda _: True) -> None:
        """Take all matching tasks off the lists."""
        for task in [task for task in self._tasks.values() if matches(task)]:
            self.drop(task)

    # -- executing -------------------------------------------------------------------------------------------------

    async def execute(self) -> None:
        """Perform tasks until cancelled. Exactly one task of the session does this.

        Cancellation: between two commands only.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._release_delayed)
            while True:
                if not self._ready:
                    # Nothing can become ready between the look and this line: neither awaits.
                    self._something_ready = trio.Event()
                    await self._something_ready.wait()
                    continue
                task = self._ready[0] if self._random is None else self._random.choice(self._ready)
                self.finish(task, task.outcome or await self._perform(task))
                await self._wire.room()
                await trio.lowlevel.checkpoint()

    async def _perform(self, task: Task) -> Outcome:
        command = task.command
        data = b"" if task.collector is None else task.collector.data
        perform = partial(self._engine.perform, nexus=self._nexus, lun=command.lun, cdb=command.cdb, data=data)
        disk = self._engine.find(command.lun)
        if command.cdb[0] in _SYNCHRONIZES and disk is not None and isinstance(disk.backing, FileBacking):
            # fdatasync may take seconds; pings have to be answered meanwhile.
            return await trio.to_thread.run_sync(perform)
        return perform()

    def finish(self, task: Task, outcome: Outcome) -> None:
        """Send a command's data and status, and forget it. Nothing is sent for a task that was dropped."""
        if self._tasks.get(task.command.itt) is not task:
            return
        self.drop(task)
        command = task.command
        good = outcome.status == Status.GOOD and not task.response
        if command.write:
            # Of a write that failed nothing counts as moved.
            data, available = b"", task.moves.data_out if good else 0
        else:
            data, available = outcome.data_in if command.read else b"", len(outcome.data_in)
        expected = command.expected_data_transfer_length
        overflow, underflow, residual = available > expected, available < expected, abs(available - expected)
        count = min(len(data), expected)
        collapsed = self._config.status_in_data and good and count > 0
        data_sn = 0
        for segment in segments(length=count, agreed=self._agreed):
            last = collapsed and segment.offset + segment.length == count
            self._wire.send(
                DataIn(
                    itt=command.itt,
                    final=segment.final,
                    stat_sn=self._numbers.next_stat_sn() if last else 0,
                    exp_cmd_sn=self._numbers.exp_cmd_sn,
                    max_cmd_sn=self._numbers.max_cmd_sn,
                    data_sn=data_sn,
                    buffer_offset=segment.offset,
                    has_status=last,
                    status=Status.GOOD,
                    overflow=last and overflow,
                    underflow=last and underflow,
                    residual_count=residual if last else 0,
                    data=data[segment.offset : segment.offset + segment.length],
                )
            )
            data_sn += 1
        if not collapsed:
            self._wire.send(
                ScsiResponse(
                    itt=command.itt,
                    stat_sn=self._numbers.next_stat_sn(),
                    exp_cmd_sn=self._numbers.exp_cmd_sn,
                    max_cmd_sn=self._numbers.max_cmd_sn,
                    response=task.response,
                    status=outcome.status,
                    exp_data_sn=data_sn,
                    overflow=overflow,
                    underflow=underflow,
                    residual_count=residual,
                    data=sense_segment(outcome.sense),
                )
            )
