"""Write-back: dirty blocks on their way to the device.

An extent's way, seen from here (its blocks' states are in ``extent``)::

    clean --first dirty block--> aging --due, full, pressure, drain--> ready --worker takes a run--> writing --> clean
                                   ^                                     ^                            |
                                   +------- dirtied again while writing other blocks -----------------+
                                                                         +---- lost by the disk ------+

* *aging* extents wait ``delay`` seconds from their first dirty block for more: a hot block costs one command per
  delay, not one per write. An extent all of whose blocks are dirty goes at once, so a sequential stream is
  written in large pieces with no delay.
* What has dirty blocks is either aging or ready, and nothing else is.
* *ready* is first in, first out. A worker takes the next run of dirty blocks of the first extent, together with what
  follows it on disk and in memory among the ready ones, up to a mebibyte. An extent is gone through once, front to
  back, and if it has dirty blocks again then, it goes to the end of the line: so hot blocks hold up no other extent.
* *unclean* has every extent with dirty or writing blocks. Their number is bounded: writers who would add one wait.

Invariants:

* A block that is being written is not dirty, and doesn't change: writers wait. So there is at most one write of a
  block in flight, an old one can't overtake a newer one, and a retransmission sends the same bytes.
* A block leaves *writing* in one of four ways: written (valid, clean, and *unsynced* where the disk has a volatile
  cache), failed (not valid; the error is recorded), cancelled (dirty again), written while the disk lost its cache
  (dirty again: whether before or after, nobody can tell; not valid, and an error, where nothing runs that writes it).
* A barrier holds what was unclean when a drain began, and loses a block when that is written or failed. Blocks that
  are dirtied later are in no older barrier, so a drain ends however busily others write.
* Every completion wakes the extent's waiters, those who wait for room here, and those who wait for a slot.
"""

from collections.abc import Callable

import trio

from iscsifuse.cache.device import BlockDevice
from iscsifuse.cache.errseq import ErrorSequence, write_back_error
from iscsifuse.cache.extent import Extent, Geometry, Transfer, next_run
from iscsifuse.cache.pacing import Pacer
from iscsifuse.cache.pool import BufferPool
from iscsifuse.cache.settings import CacheSettings
from iscsifuse.cache.unsynced import Unsynced
from iscsifuse.cache.workers import Workers
from iscsifuse.errors import WriteBackError
from iscsifuse.fibres import Fibre, doze, here

__all__ = ["LARGEST_TRANSFER", "WriteBack"]

LARGEST_TRANSFER = 1 << 20


class _Barrier:
    __slots__ = ("done", "pending")

    def __init__(self) -> None:
        self.pending: dict[Extent, int] = {}
        self.done = trio.Event()


class WriteBack:
    """The dirty data of one LUN.

    Attributes:
        unclean: every extent with dirty or writing blocks.
        unsynced: what was written, and may still be lost.
        losses: how often the disk has lost what wasn't flushed.
        limit: how many extents may be unclean before writers wait.
        commands: device writes that were started.
        written: bytes that reached the device.
        failures: device writes that failed.
    """

    def __init__(
        self,
        device: BlockDevice,
        *,
        pool: BufferPool,
        settings: CacheSettings,
        geometry: Geometry,
        errors: ErrorSequence,
        want_flush: Callable[[], None],
    ) -> None:
        self.unclean: dict[Extent, None] = {}
        self.unsynced = Unsynced(pool)
        self.losses = 0
        self.limit = max(1, (settings.max_dirty or pool.size // 2) // pool.slot_size)
        self.commands = self.written = self.failures = 0
        self._device = device
        self._pool = pool
        self._geometry = geometry
        self._errors = errors
        self._want_flush = want_flush
        self._running = False
        self._delay = settings.write_back_delay
        self._depth = settings.depth
        self._aging: dict[Extent, float] = {}
        self._ready: dict[Extent, None] = {}
        self._barriers: list[_Barrier] = []
        self._room: trio.Event | None = None
        self._room_fibres: list[Fibre] = []
        self._alarm: trio.Event | None = None
        self._pacer = Pacer()
        self._workers = Workers(settings.depth, take=self._take, work=self._write_back)

    # -- life ---------------------------------------------------------------------------------------------------

    def start(self, nursery: trio.Nursery) -> None:
        """Write back in this nursery from now on; see `Workers.start`."""
        self._running = True
        self._workers.start(nursery)
        nursery.start_soon(self._clock)

    def stop(self) -> None:
        """The tasks are gone: what is still dirty is lost, and that is recorded as the error that it is."""
        self._running = False
        for _ in self.unsynced.take():
            pass  # The disk has it. Whoever wanted more has called ``sync``, and was told.
        lost = 0
        for extent in list(self.unclean):
            blocks = extent.dirty
            if blocks:
                lost += blocks.bit_count()
                extent.dirty = 0
                extent.writing |= blocks
                self._settle(extent, blocks, written=False)
        self._aging.clear()
        self._ready.clear()
        if lost:
            self._errors.record(
                WriteBackError(f"the cache was stopped with {lost * self._geometry.block_length} bytes not written")
            )
        self._wake()

    # -- the bound ----------------------------------------------------------------------------------------------

    def full(self) -> bool:
        """Whether another extent may not become unclean now.

        What is unsynced counts, too, for it can't be evicted either: a disk whose flushes hang must not take all the
        memory. One extent is granted to every LUN, however much the others have; so a writer who is told to wait
        always has a write or a flush of his own LUN to wait for.
        """
        unclean, pool = len(self.unclean), self._pool
        own = unclean + len(self.unsynced.extents)
        return own > 0 and (
            unclean >= self.limit
            or own >= self.limit + pool.most_unsynced
            or pool.unclean + pool.unsynced >= pool.most_unclean
        )

    def enter(self, extent: Extent) -> None:
        """An extent gets dirty or writing blocks."""
        if extent not in self.unclean:
            self.unclean[extent] = None
            self._pool.unclean += 1

    # -- what writers tell --------------------------------------------------------------------------------------

    def first_dirtied(self, extent: Extent) -> None:
        """An extent with no dirty block has just got one."""
        self.enter(extent)
        self._aging[extent] = trio.current_time() + self._delay
        if self._alarm is not None:
            self._alarm.set()
            self._alarm = None
        if len(self._aging) > self.limit // 2 > 0:
            self.make_ready(next(iter(self._aging)))

    def make_ready(self, extent: Extent) -> None:
        """An extent needn't wait any longer: all its blocks are dirty, its time has come, or there is pressure."""
        self._aging.pop(extent, None)
        idle = not self._ready
        self._ready[extent] = None
        if idle:  # Else a worker has been kicked for what stands there, and kicks the next one; or all are busy.
            self._workers.kick()

    def start_writing(self, extent: Extent, blocks: int) -> None:
        """Some valid blocks are being written from now on."""
        extent.dirty &= ~blocks
        extent.writing |= blocks
        self.enter(extent)
        self.unsynced.forget(extent, blocks)

    def lose(self) -> None:
        """The disk may have lost everything that it was given since its last flush: it is dirty again.

        What is being written at this moment is dirty again once that has ended. Where there were orphans, the caller
        drops what is clean in memory, for it may be of these.
        """
        self.losses += 1
        if self.unsynced.has_orphans:
            self._errors.record(WriteBackError("the disk was reset: blocks whose last write failed may be lost"))
        for extent, blocks in self.unsynced.take():
            self._dirty_again(extent, blocks)

    def lose_for_good(self) -> None:
        """`lose`, where nothing runs that would write it again: it can only be told.

        The caller drops what is clean in memory then, for it may be of what was lost.
        """
        self.losses += 1
        if self.unsynced.extents or self.unsynced.has_orphans:
            for _ in self.unsynced.take():
                pass
            self._errors.record(
                WriteBackError("the disk was reset: what was not flushed may be lost, and nobody can write it again")
            )

    def forget_beyond_end(self) -> None:
        """The disk may have shrunk: what it had accepted where it was, and could lose, is lost.

        Kept, it would be read as what the disk has there once it grows again. What is dirty there fails when it is
        written.
        """
        end, blocks = self._device.block_count, self._geometry.blocks
        lost = 0
        for extent in list(self.unsynced.extents):
            within = max(0, end - extent.index * blocks)
            beyond = extent.unsynced >> within << within
            if beyond:
                lost += beyond.bit_count()
                self.unsynced.forget(extent, beyond)
        if lost:
            size = lost * self._geometry.block_length
            self._errors.record(WriteBackError(f"the disk has shrunk: {size} bytes that were not flushed are gone"))
            self._wake()

    def _dirty_again(self, extent: Extent, blocks: int) -> None:
        if not extent.dirty:
            self.first_dirtied(extent)
        extent.dirty |= blocks
        self.make_ready(extent)

    def pressure(self) -> None:
        """Somebody waits for room. If nothing is on its way yet, send the oldest that wait for more."""
        if not self._ready and not self._workers.busy:
            for extent in list(self._aging)[: self._depth]:
                self.make_ready(extent)

    async def wait_for_room(self) -> None:
        """Wait until it is worth looking again whether it is still ``full``.

        No await lies between the caller's look and the registration. Ends with the next completion of a write or of
        a flush, of which at least one is on its way after ``pressure`` and ``want_flush``; or for nothing.
        """
        fibre = here().fibre
        if fibre is not None:
            self._room_fibres.append(fibre)
            self.pressure()
            self._want_flush()
            await doze()
            return
        if self._room is None:
            self._room = trio.Event()
        room = self._room
        self.pressure()
        self._want_flush()
        await room.wait()

    @property
    def _is_awaited(self) -> bool:
        return self._room is not None or bool(self._room_fibres)

    async def drain(self) -> None:
        """Wait until everything that is unclean now has been written or has failed."""
        if not self.unclean:
            return
        barrier = _Barrier()
        for extent in sorted(self.unclean, key=lambda extent: extent.index):  # in disk order: they can be merged
            barrier.pending[extent] = extent.dirty | extent.writing
            if extent.dirty:
                self.make_ready(extent)
        self._barriers.append(barrier)
        try:
            await barrier.done.wait()
        finally:
            self._barriers.remove(barrier)

    # -- writes that don't wait for a worker --------------------------------------------------------------------

    async def write_through(self, transfer: Transfer, *, since: int) -> None:
        """Write blocks that the caller has put into memory and made ``valid`` and ``writing``.

        Args:
            transfer: these blocks.
            since: ``losses`` at that moment, from which on what was in these blocks before is in nobody's memory.

        Raises:
            IscsifuseError: the device's own error. The blocks are not valid any more.

        Cancellation: the blocks are old or new on the device, and not valid any more.
        """
        losses = self.losses
        try:
            await self._send(transfer)
        except BaseException as error:
            self.failures += isinstance(error, Exception)
            self.abandon(transfer, since=since)
            raise
        self._finish(transfer, written=True, losses=losses)

    def abandon(self, transfer: Transfer, *, since: int) -> None:
        """A write that has failed, or that ``write_through`` was never called for."""
        if self._device.volatile and since != self.losses:
            what = "the disk was reset during a write that then failed: what was there before may be lost"
            self._errors.record(WriteBackError(what))
        self._finish(transfer, written=False, losses=since)

    # -- background ---------------------------------------------------------------------------------------------

    async def _clock(self) -> None:
        """Make extents ready when they are old enough; ``_aging`` is in order of time, as the delay is constant."""
        while True:
            if not self._aging:
                self._alarm = trio.Event()
                await self._alarm.wait()
                continue
            extent, due = next(iter(self._aging.items()))
            if due > trio.current_time():
                await trio.sleep_until(due)
                continue  # It may have gone meanwhile.
            self.make_ready(extent)

    def _take(self) -> Transfer | None:
        """The next command; its blocks are ``writing`` from now on.

        None also where enough is under way: each worker that ends a command comes back for the next one.
        """
        if not self._ready or not self._pacer.has_room:
            return None
        geometry = self._geometry
        extent = next(iter(self._ready))
        if not extent.dirty >> extent.cursor:  # Only what was dirtied behind the cursor is left.
            extent.cursor = 0
            del self._ready[extent]
            self._ready[extent] = None
            extent = next(iter(self._ready))
        first, stop = next_run(extent.dirty, extent.cursor)
        # One burst for each command: a far disk asks for the next one only when it has the first.
        longest = min(LARGEST_TRANSFER, self._device.write_burst)
        stop = min(stop, first + max(1, longest // geometry.block_length))
        transfer = Transfer.of(geometry, extent, first, stop)
        self._begin(extent, transfer)
        while stop == geometry.blocks:
            following = extent.home.get(extent.index + 1)
            if following is None or following not in self._ready or not following.dirty & 1:
                break
            extent = following
            stop = next_run(extent.dirty, 0)[1]
            if transfer.end - transfer.begin + stop * geometry.block_length > longest:
                break
            if not transfer.add(geometry, extent, 0, stop):
                break
            self._begin(extent, transfer)
        if self._ready:
            self._workers.kick()
        return transfer

    def _begin(self, extent: Extent, transfer: Transfer) -> None:
        blocks = transfer.parts[-1][1]
        self.start_writing(extent, blocks)
        extent.cursor = blocks.bit_length()
        if not extent.dirty:
            extent.cursor = 0
            self._ready.pop(extent, None)

    async def _write_back(self, transfer: Transfer) -> None:
        size = transfer.end - transfer.begin
        well = False
        losses = self.losses
        begun = self._pacer.begin(size)
        try:
            try:
                await self._send(transfer)
                well = True
            finally:
                self._pacer.end(size, begun, well=well)
        except Exception as error:
            self.failures += 1
            last = transfer.lba + (transfer.end - transfer.begin) // self._geometry.block_length - 1
            what = f"a buffered write of LBA {transfer.lba} to {last} did not reach the disk"
            self._errors.record(write_back_error(error, what=what))
            self._finish(transfer, written=False, losses=losses)
        except BaseException:
            for extent, blocks in transfer.parts:
                extent.writing &= ~blocks
                if not extent.dirty:
                    self.first_dirtied(extent)
                extent.dirty |= blocks
                extent.wake()
            raise
        else:
            self._finish(transfer, written=True, losses=losses)

    async def _send(self, transfer: Transfer) -> None:
        self.commands += 1
        await self._device.write(self._pool.view[transfer.begin : transfer.end], lba=transfer.lba)
        self.written += transfer.end - transfer.begin

    def _finish(self, transfer: Transfer, *, written: bool, losses: int) -> None:
        """A write has ended that began when there had been so many losses."""
        volatile = written and self._device.volatile
        lost = volatile and losses != self.losses
        for extent, blocks in transfer.parts:
            if lost and self._running:
                extent.writing &= ~blocks
                self._dirty_again(extent, blocks)
                extent.wake()
            else:
                if volatile and not lost:
                    self.unsynced.add(extent, blocks)
                self._settle(extent, blocks, written=written and not lost)
        if lost and not self._running:
            self._errors.record(WriteBackError("the disk was reset during a write that nobody can make again"))
        self._wake()

    def flush_begins(self) -> None:
        """The disk is being flushed: what has been written by now is covered if that succeeds."""
        self.unsynced.begin()

    def flush_ends(self, *, well: bool) -> None:
        """That flush has ended."""
        self.unsynced.end(well=well, give_up=self._is_awaited or self._pool.wanted is not None)
        self._wake()

    def _settle(self, extent: Extent, blocks: int, *, written: bool) -> None:
        """Some blocks aren't being written any more; one that failed has lost its content."""
        extent.writing &= ~blocks
        if not written:
            self.unsynced.orphans |= self._device.volatile
            extent.valid &= ~blocks
            extent.touched &= ~blocks
        if not extent.dirty and not extent.writing:
            del self.unclean[extent]
            self._pool.unclean -= 1
            self._pool.settle(extent)
        extent.wake()
        for barrier in self._barriers:
            left = barrier.pending.get(extent, 0) & ~blocks
            if left:
                barrier.pending[extent] = left
            elif barrier.pending.pop(extent, None) is not None and not barrier.pending:
                barrier.done.set()

    def _wake(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None
        if self._room_fibres:
            fibres, self._room_fibres = self._room_fibres, []
            for fibre in fibres:
                fibre.wake()
