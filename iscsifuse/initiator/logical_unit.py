"""A logical unit as a block device: whole blocks in, whole blocks out.

Transfers are split where the target or a CDB has a limit, and the pieces run side by side. What comes back is judged
by `Commander`; here is what only the unit knows: its size, whether it has a volatile cache, and who it is.

**Identity.** When a session was re-established, the unit is examined again before any command is let through. If its
designators, its serial number, its block length or its capacity differ, another disk answers in its place: every
command fails from then on, and stays failed, since a write to the wrong disk can't be taken back. A unit that can't
be examined yet is waited for like a session (``reconnect_timeout``), then its commands fail until it proves itself.
The nexus holds the commands back (`Nexus.bar`), also those that wait in it to be replayed. Who it is is asked too
when the target says that the list of units (to whichever of them: `Nexus.doubt_all`), the medium or the unit changed;
a unit that isn't there any more then fails at once, until it is back. The bar is there when such a status arrives:
what is sent a moment later would already be too late. What is told while the unit is examined has it examined anew.

**Capacity.** A disk may grow or shrink while it is mounted; the target says so (UNIT ATTENTION 2Ah/09h), the capacity
is read again, and ``on_change`` is called. Who does nothing hears nothing, so `look` asks now and then.

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
    DigestError,
    IdentityError,
    IscsifuseError,
    ParameterDataError,
    SessionLostError,
    TransferError,
    WriteBackError,
)
from iscsifuse.fibres import own_task
from iscsifuse.initiator.commander import Commander, Executor
from iscsifuse.initiator.depth import QueueDepth
from iscsifuse.initiator.groups import plain_errors
from iscsifuse.initiator.identity import VitalProductData, examine_identity
from iscsifuse.initiator.inventory import LunDescription, examine_capacity
from iscsifuse.initiator.nexus import Nexus, NexusState, Started
from iscsifuse.initiator.policy import Change, judge
from iscsifuse.initiator.session import Session
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.capacity import Capacity
from iscsifuse.scsi.sense import SenseKey

__all__ = ["LogicalUnit"]

log = logging.getLogger(__name__)

MAX_TRANSFER = 1 << 20
"""Bytes in one command at most. More would only hold up its neighbours: throughput comes from commands in flight."""
LEAST_BURST = 128 << 10
"""Bytes in a write, where the target's bursts are so short that one command for each would be worse."""
PROOF_PATIENCE = 2.0
"""Seconds that a unit has to become ready after a new login: other disks wait for it. It is asked again later."""
_MOST_LOOKS = 10
"""How often a unit is examined anew because it told of changes meanwhile, before it is let alone for a while."""
_INVALID_OPCODE = 0x20
_NOT_SUPPORTED = 0x25
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
        self._identity = description.identity
        self._is_another = False
        self._unproven = ""  # why it can't be told whether it is
        self._proof: trio.Event | None = None  # the end of the one that is under way
        self._examining = False  # held back until a proof tells more
        self._deferred: WriteBackError | None = None
        self._max_blocks = self._largest_transfer()
        self._has_volatile_cache = description.caching is None or description.caching.wce
        self._doubted = False  # since the examination that is under way began to look
        self._refreshing = False
        self._capacity_news = 0  # how often a new capacity was announced
        self._capacity_read = 0  # ... when it was read for the last time
        self._queue = QueueDepth(nexus, label=self.label, patience=nexus.settings.timeout)
        self._commander = self._make_commander(self._queue)
        nexus.watch(self._address, self._note_trouble, doubt=self._doubt)
        nexus.add_guard(self._prove)
        if nexus.reconnects != description.seen_in:
            self._begin_proof(may_resize=False)  # the session in use began before there was a guard

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
        if self._is_another or self._unproven:
            return  # there is no question, or it is being asked
        try:
            await self._make_commander(self._nexus, limit=0.0, may_start=False).run(cdbs.test_unit_ready())
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

    def _make_commander(
        self, executor: Executor, *, notice: bool = True, limit: float | None = None, may_start: bool = True
    ) -> Commander:
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
            self._capacity_news += 1
            self._doubted = True
        if change & Change.MODE:
            self._has_volatile_cache = True  # For all we know. A flush that isn't needed costs little.
        if change & Change.INVENTORY:
            self._nexus.doubt_all()
        elif change & (Change.MEDIUM | Change.ABSENT):
            self._doubt()
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

    def _doubt(self) -> None:
        """From now on it may be another disk that answers: nothing is sent to it before that is known."""
        self._doubted = True
        if self._nexus.state is not NexusState.LOGGED_IN:
            return  # the guards look at the next session before any command
        if self._proof is None and not self._is_another and not self._unproven:
            self._begin_proof(may_resize=True)

    async def _on_change(self, change: Change) -> None:
        """The target reported something while a command was tried; for what mustn't wait see `_note_trouble`."""
        if change & (Change.MEDIUM | Change.INVENTORY | Change.ABSENT):
            while self._proof is not None:  # Else it is held back, or has been examined since.
                await self._proof.wait()
        if change & (Change.INVENTORY | Change.ABSENT) and self.on_inventory is not None:
            self.on_inventory()
        if change & Change.MEDIUM and self.on_change is not None:
            self.on_change()
        if change & Change.CAPACITY and not self._refreshing:
            # Invariant: _refreshing is set before the first await, so commands that meet the same news don't
            # pile up; what they say while it is being read is not lost.
            self._refreshing = True
            try:
                while self._capacity_is_old and await self._refresh_capacity():
                    pass
            finally:
                self._refreshing = False

    @property
    def _capacity_is_old(self) -> bool:
        """Whether another capacity was announced than is known. Stays so where it couldn't be read."""
        return self._capacity_read != self._capacity_news

    def _begin_proof(self, *, may_resize: bool) -> None:
        """In its own task: whoever wants it may be cancelled, and others wait for its end."""
        proof = self._proof = trio.Event()
        self._examining = True
        why = SessionLostError(f"{self.label} is being examined")
        self._nexus.bar(self.description.address, why, until=math.inf)
        self._nexus.prove_soon(partial(self._prove, may_resize=may_resize), then=partial(self._end_proof, proof))

    def _end_proof(self, proof: trio.Event) -> None:
        if self._examining:
            self._unbar()  # the session was lost under it; the next one's guards come before any command
        self._proof = None
        proof.set()

    async def _refresh_capacity(self) -> bool:
        """Read it; whether that worked."""
        news = self._capacity_news
        commander = self._make_commander(self._nexus, notice=False)
        try:
            capacity = await examine_capacity(commander, version=self.description.inquiry.version)
        except (CommandError, ParameterDataError, TransferError, DigestError) as error:
            log.warning("%s: its new capacity can't be read: %s", self.label, error)
            return False
        self._capacity_read = news
        self._resize(capacity)
        return True

    def _resize(self, capacity: Capacity) -> None:
        if capacity.block_length != self.block_length:
            self._fail(f"{self.label} changed its block length from {self.block_length} to {capacity.block_length}")
            return
        log.info("%s: capacity is now %d blocks, was %d", self.label, capacity.blocks, self.block_count)
        self.block_count = capacity.blocks
        if self.on_change is not None:
            self.on_change()

    def _fail(self, sentence: str) -> None:
        """No command from now on, and nothing of what is cached counts."""
        log.error("%s", sentence)
        self._examining = False
        self._is_another = True
        self._nexus.bar(self.description.address, IdentityError(sentence))
        if self.on_change is not None:
            self.on_change()
        if self.on_loss is not None:
            self.on_loss()  # To fail in the open, instead of being served for ever from memory.

    async def _prove(self, session: Session, *, may_resize: bool = False) -> bool:
        """Is this the same disk? See the head of this file.

        Args:
            session: where to ask.
            may_resize: whether another capacity is just that: the mount has seen no gap in which more could change.
                Also where the target had announced one.

        Returns:
            Whether that is settled now.
        """
        if self._is_another:
            return True
        wait = not may_resize
        commander = self._make_commander(session, notice=False, limit=PROOF_PATIENCE if wait else None)
        try:
            for _ in range(_MOST_LOOKS):
                await commander.run(cdbs.test_unit_ready())  # It tells what it has to tell.
                self._doubted = False
                news = self._capacity_news
                identity = await examine_identity(VitalProductData(commander))
                capacity = await examine_capacity(commander, version=self.description.inquiry.version)
                if not self._doubted:
                    break
            else:
                return self._cant_tell(f"{self.label} can't be examined: it changes all the time", wait=wait)
        except SessionLostError:
            raise
        except IscsifuseError as error:
            gone = isinstance(error, CommandError) and error.asc == _NOT_SUPPORTED
            what = "isn't there any more" if gone else "can't be examined any more"
            return self._cant_tell(f"{self.label} {what}: {error}", wait=wait)
        if self._identity.is_missing_in(identity):
            return self._cant_tell(f"{self.label} doesn't say any more who it is", wait=wait)
        if not self._identity.agrees_with(identity):
            self._fail(f"another disk answers where {self.label} was: its identity is not the one that was mounted")
        elif (capacity.block_length, capacity.blocks) == (self.block_length, self.block_count):
            self._capacity_read = news
            self._unbar()
        elif may_resize or self._capacity_is_old:
            self._capacity_read = news
            self._unbar()
            self._resize(capacity)
        else:
            self._fail(
                f"{self.label} came back with {capacity.blocks} blocks of {capacity.block_length} bytes instead of "
                f"{self.block_count} of {self.block_length}"
            )
        if not self._is_another and identity.unread < self._identity.unread:
            self._identity = identity  # it says more than it did at first
        return True

    def _unbar(self) -> None:
        if self._unproven:
            log.warning("%s is there again", self.label)
        self._unproven = ""
        self._examining = False
        self._nexus.bar(self.description.address, None)

    def _cant_tell(self, sentence: str, *, wait: bool) -> bool:
        """No command until the unit has proved itself; those that come wait for that as long as for a session."""
        if sentence != self._unproven:
            log.error("%s", sentence)
        gone = not wait and not self._unproven
        self._unproven = sentence
        self._examining = False
        until = self._nexus.give_up_at if wait else 0.0
        self._nexus.bar(self.description.address, SessionLostError(sentence), until=until)
        if gone and self.on_change is not None:
            self.on_change()
        return False
