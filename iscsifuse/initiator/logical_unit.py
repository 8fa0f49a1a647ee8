"""A logical unit as a block device: whole blocks in, whole blocks out.

Transfers are split where the target or a CDB has a limit, and the pieces run side by side. What comes back is judged
by `Commander`; here is what only the unit knows: its size, and whether it has a volatile cache.

**Identity and capacity** are asked for anew whenever they may have changed: see `proof`. The target tells of that
with the next command. Who does nothing hears nothing, so `look` asks now and then.

**Power.** A disk with a volatile cache loses what was written and not flushed when it is reset or loses its power,
and says so (UNIT ATTENTION 29h), mostly to the first command of a new session. ``on_loss`` is called then, before any
other command is let through, so that what was lost can be written again before anybody reads it. It is called when
the status arrives (`Nexus.watch`): a flush that ended well a moment later must not be believed by somebody who is
awake earlier.

**Deferred errors.** A target that finds out after its GOOD status that a write failed says so with some later
command. That one is tried again; the next `flush` fails, also one that is under way.

Source: SBC-3 §5.8-5.20, SPC-4 §7.8.
"""

import logging
import math
from collections.abc import Callable
from functools import partial

import trio

from iscsifuse.errors import (
    CommandError,
    IscsifuseError,
    WriteBackError,
)
from iscsifuse.fibres import own_task
from iscsifuse.initiator.commander import Commander, Executor
from iscsifuse.initiator.depth import QueueDepth
from iscsifuse.initiator.groups import plain_errors
from iscsifuse.initiator.inventory import LunDescription
from iscsifuse.initiator.nexus import Nexus, Started
from iscsifuse.initiator.policy import Change, judge
from iscsifuse.initiator.proof import Proof
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.sense import SenseKey

__all__ = ["LogicalUnit"]

log = logging.getLogger(__name__)

MAX_TRANSFER = 1 << 20
"""Bytes in one command at most. More would only hold up its neighbours: throughput comes from commands in flight."""
LEAST_BURST = 128 << 10
"""Bytes in a write, where the target's bursts are so short that one command for each would be worse."""
_INVALID_OPCODE = 0x20
_GOOD = 0x00


class LogicalUnit:
    """One disk.

    Args:
        nexus: the session with its target.
        description: as `inventory.scan` found it; it has a capacity.

    Attributes:
        lun: its number.
        label: name for messages: LUN 1 of iqn...
        description: as it was found.
        block_length: bytes of a logical block.
        block_count: how many it has now.
        on_change: called after the capacity or the medium changed, and when the unit is gone.
        on_loss: called when what was written and not flushed may be lost; must not wait.
        on_deferred: called when the target failed a write after it had accepted it; must not wait. Where there is
            none, the next `flush` tells.
        on_inventory: called after the target said that its list of units changed.
    """

    def __init__(self, nexus: Nexus, description: LunDescription) -> None:
        if description.capacity is None:
            raise ValueError("a disk without a capacity")
        self.lun = description.lun
        self.description = description
        self.block_length = description.capacity.block_length
        self.block_count = description.capacity.blocks
        self.label = f"LUN {description.lun} of {nexus.target_name}"
        self.on_change: Callable[[], None] | None = None
        self.on_loss: Callable[[], None] | None = None
        self.on_deferred: Callable[[WriteBackError], None] | None = None
        self.on_inventory: Callable[[], None] | None = None
        self._nexus = nexus
        self._address = description.address
        self._deferred: WriteBackError | None = None
        self._max_blocks = self._largest_transfer()
        self._has_volatile_cache = description.caching is None or description.caching.wce
        self._queue = QueueDepth(nexus, label=self.label, patience=nexus.settings.timeout)
        self._commander = self.make_commander(self._queue)
        self._proof = Proof(nexus, self)
        nexus.watch(self._address, self._note_trouble, doubt=self._proof.doubt)

    @property
    def write_burst(self) -> int:
        """Bytes of a write that go on one R2T (MaxBurstLength); see ``BlockDevice``. Source: RFC 7143 §13.13."""
        return max(LEAST_BURST, self._nexus.negotiated.max_burst_length)

    @property
    def latency(self) -> float:
        """Seconds that the quickest command of the session took; see ``BlockDevice``."""
        latency = self._nexus.session.latency
        return latency if latency < math.inf else 0.0

    @property
    def volatile(self) -> bool:
        """Whether what was written may be lost until `flush`. Source: SBC-3 §6.5.5 (WCE)."""
        return self._has_volatile_cache

    async def read_into(self, buffer: memoryview, *, lba: int) -> None:
        """Read whole blocks.

        Args:
            buffer: writable, contiguous, a multiple of ``block_length`` bytes; its content is undefined unless this
                returns.
            lba: first block.

        Raises:
            MediumError: a block can't be read; it says which.
            IscsifuseError: anything else that keeps even one byte from being right.

        Cancellation: takes effect when no command uses the buffer any more.
        """
        length = self.block_length
        blocks = len(buffer) // length
        if blocks <= self._max_blocks:
            # The usual case in few steps: one plain call, one sleep. `Commander` is for all others.
            started = None
            queue = self._queue
            if not queue.limited:
                started = self._nexus.start_read(buffer, lun=self._address, lba=lba, blocks=blocks)
                if started is None:
                    cdb = cdbs.read(lba=lba, blocks=blocks)
                    started = self._nexus.start(cdb, lun=self._address, buffer_in=buffer, exact=True)
            if started is not None:
                session, task = started
                queue.under_way += 1
                await session.until_done(task)
                if task.status == _GOOD and task.error is None:
                    queue.left()
                    return
                queue.note(task)
                queue.left()
            await own_task()
            cdb = started[1].cdb if started else cdbs.read(lba=lba, blocks=blocks)
            await self._carry_on(cdb, started, lba=lba, buffer_in=buffer)
            return
        await own_task()
        step = self._max_blocks
        with plain_errors():
            async with trio.open_nursery() as nursery:
                for first in range(0, blocks, step):
                    piece = buffer[first * length : (first + step) * length]
                    nursery.start_soon(partial(self.read_into, piece, lba=lba + first))

    async def write(self, buffer: memoryview, *, lba: int, fua: bool = False) -> None:
        """Write whole blocks; the target has accepted them when this returns.

        Args:
            buffer: contiguous, a multiple of ``block_length`` bytes; must not change until this returns or raises.
            lba: first block.
            fua: have them on stable storage, too, where the unit can do that.

        Raises:
            IscsifuseError: nothing is known about any of the blocks.

        Cancellation: takes effect when no command uses the buffer any more.
        """
        length = self.block_length
        blocks = len(buffer) // length
        if blocks <= self._max_blocks:
            cdb = cdbs.write(lba=lba, blocks=blocks, fua=fua and self.description.dpofua)
            started = None
            queue = self._queue
            if not queue.limited:
                started = self._nexus.start(cdb, lun=self._address, buffer_out=buffer, exact=True)
            if started is not None:
                session, task = started
                queue.under_way += 1
                await session.until_done(task)
                if task.status == _GOOD and task.error is None:
                    queue.left()
                    return
                queue.note(task)
                queue.left()
            await own_task()
            await self._carry_on(cdb, started, lba=lba, buffer_out=buffer)
            return
        await own_task()
        step = self._max_blocks
        with plain_errors():
            async with trio.open_nursery() as nursery:
                for first in range(0, blocks, step):
                    piece = buffer[first * length : (first + step) * length]
                    nursery.start_soon(partial(self.write, piece, lba=lba + first, fua=fua))

    async def flush(self) -> None:
        """Bring everything that was written to stable storage (SYNCHRONIZE CACHE, where there is a volatile cache).

        Raises:
            WriteBackError: the target failed a write after it had accepted it; told once, here or by `on_deferred`.
            IscsifuseError: it can't be said that everything is there.
        """
        if self._nexus.settings.read_only:
            return  # nothing was written
        if self._has_volatile_cache:
            await self._synchronize()
        deferred, self._deferred = self._deferred, None
        if deferred is not None:
            raise deferred

    async def look(self) -> None:
        """Let the target tell what it has to tell: a unit that nobody uses doesn't learn that it has changed.

        Fails in silence: what is wrong with the unit is for those who use it.
        """
        if self._proof.is_held_back:
            return  # there is no question, or it is being asked
        try:
            await self.make_commander(self._nexus, limit=0.0, may_start=False).run(cdbs.test_unit_ready())
        except IscsifuseError as error:
            log.debug("%s", error)

    async def _synchronize(self) -> None:
        try:
            await self._commander.run(cdbs.synchronize_cache())
        except CommandError as error:
            if error.sense_key != SenseKey.ILLEGAL_REQUEST or error.asc != _INVALID_OPCODE:
                raise
            if self.description.caching is not None and self.description.caching.wce:
                raise  # it says that it has a volatile cache, and can't flush it
            log.info("%s has no SYNCHRONIZE CACHE and tells of no cache: taken for write-through", self.label)
            self._has_volatile_cache = False

    async def _carry_on(
        self,
        cdb: bytes,
        started: Started | None,
        *,
        lba: int,
        buffer_in: memoryview | None = None,
        buffer_out: memoryview | None = None,
    ) -> None:
        """Whatever isn't plain success at the first attempt, if there was one: judge it, try again, or raise."""
        first = None
        if started is not None:
            first = self._nexus.execute(
                cdb, lun=self._address, buffer_in=buffer_in, buffer_out=buffer_out, exact=True, first=started
            )
        place = f" at LBA {lba}"
        await self._commander.run(
            cdb, buffer_in=buffer_in, buffer_out=buffer_out, exact=True, place=place, first=first
        )

    # -- splitting -------------------------------------------------------------------------------------------------

    def _largest_transfer(self) -> int:
        """Blocks in one command at most. Source: SBC-3 §6.6.3 (MAXIMUM TRANSFER LENGTH; 0: not reported)."""
        own = max(1, MAX_TRANSFER // self.block_length)
        limits = self.description.block_limits
        reported = limits.max_transfer if limits is not None else 0
        return min(own, reported) if reported else own

    # -- changes ---------------------------------------------------------------------------------------------------

    def make_commander(
        self, executor: Executor, *, notice: bool = True, limit: float | None = None, may_start: bool = True
    ) -> Commander:
        """Who tries commands of this unit as often as they deserve.

        Args:
            executor: carries them out.
            notice: whether changes that are reported meanwhile are acted on before the next attempt.
            limit: seconds for a command; by default ``timeout``.
            may_start: whether the unit may be started, if it may be written to.
        """
        return Commander(
            executor,
            address=self.description.address,
            label=self.label,
            limit=self._nexus.settings.timeout if limit is None else limit,
            may_start=may_start and not self._nexus.settings.read_only,
            on_change=self._on_change if notice else None,
        )

    def _note_trouble(self, task: Task) -> None:
        """A status that isn't GOOD has just arrived: does it say that something is lost, or another disk there?"""
        change = judge(task.status, task.sense, what="").change
        if change & Change.CAPACITY:
            self._proof.announce_capacity()
        if change & Change.MODE:
            self._has_volatile_cache = True  # For all we know. A flush that isn't needed costs little.
        if change & Change.INVENTORY:
            self._nexus.doubt_all()
        elif change & (Change.MEDIUM | Change.ABSENT):
            self._proof.doubt()
        if change & Change.DEFERRED:
            sentence = f"{self.label}: the target failed a write after it had accepted it"
            log.error("%s", sentence)
            error = WriteBackError(sentence)
            if self.on_deferred is not None:
                self.on_deferred(error)
            else:
                self._deferred = error
        if change & Change.RESET and self.on_loss is not None:
            if self._has_volatile_cache:
                log.info("%s was reset: what it was given since its last flush is written again", self.label)
            self.on_loss()

    async def _on_change(self, change: Change) -> None:
        """The target reported something while a command was tried; for what mustn't wait see `_note_trouble`."""
        if change & (Change.MEDIUM | Change.INVENTORY | Change.ABSENT):
            await self._proof.wait()
        if change & (Change.INVENTORY | Change.ABSENT) and self.on_inventory is not None:
            self.on_inventory()
        if change & Change.MEDIUM and self.on_change is not None:
            self.on_change()
        if change & Change.CAPACITY:
            await self._proof.refresh_capacity()
