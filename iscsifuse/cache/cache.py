"""The block cache: bytes of a file on one side, blocks of a device on the other.

How it thinks. All state belongs to one trio thread, and changes only between checkpoints; so every operation is a
loop of *look at everything; if it can be done now, do it with no await in between; else wait for one thing, and look
at everything again*. Locks aren't needed: the bits of an extent (see ``extent``) say who is busy with a block.

* **Read.** All blocks valid: a slice of the arena, at once. Missing blocks are filled, each by one reader, while the
  others wait (``spans``); or they are read past the cache (``aside``). The most common reads have a short way here.
* **Fill.** Blocks become valid if the device read succeeded and ``invalidate`` wasn't called since it began. If it
  failed or was cancelled, they are simply not valid, and whoever waited goes on by himself.
* **Write.** One extent at a time. Blocks that are filling or writing: wait. Covered in part and not valid: fill.
  Too much dirty: wait for room. No slot: wait for a slot, holding nothing. Then copy, valid and dirty.
* **Write through.** As many neighbouring extents at once as can be had without waiting; copy, valid and writing,
  and write from there. It is also what a write-behind cache does while ``run`` isn't running.

Who waits for what: readers and fills for device reads; writers for device reads and writes. Nobody holds a block's
bit while waiting for anything but his own device call; pins are held only while waiting for device calls. Device
calls end. Hence no circles, and no waiting for ever.
"""

import logging
from collections.abc import Coroutine
from typing import Any

import trio

from iscsifuse.cache.aside import LONGEST_STRAY, AsideReader
from iscsifuse.cache.device import BlockDevice, EndOfDeviceError
from iscsifuse.cache.distance import worth
from iscsifuse.cache.extent import Geometry
from iscsifuse.cache.file import BlockFile, Buffer
from iscsifuse.cache.filling import Filler
from iscsifuse.cache.pacing import Pacer
from iscsifuse.cache.pool import BufferPool
from iscsifuse.cache.prefetch import Prefetcher
from iscsifuse.cache.readahead import CANDIDATES, LOOK_EVERY, NEAR, ReadAhead
from iscsifuse.cache.settings import CacheSettings, CacheStats
from iscsifuse.cache.spans import SpanReader
from iscsifuse.cache.through import WriteThrough
from iscsifuse.cache.writeback import WriteBack
from iscsifuse.errors import ParameterDataError
from iscsifuse.fibres import own_task
from iscsifuse.quick import take_stray

__all__ = ["BlockCache"]

log = logging.getLogger(__name__)


class BlockCache(BlockFile):
    """A device as a file, cached.

    Args:
        device: the disk.
        pool: memory, shared with other caches of the same trio thread.
        settings: see there; ``direct`` is not for this class.

    Raises:
        ParameterDataError: a block doesn't fit into a slot of the pool.
    """

    def __init__(self, device: BlockDevice, *, pool: BufferPool, settings: CacheSettings) -> None:
        super().__init__(device)
        self._pool = pool
        self._geometry = geometry = Geometry.of(self._block_length, pool.slot_size)
        if not geometry.blocks:
            raise ParameterDataError(f"blocks of {self._block_length} bytes are too large to be cached")
        self._extent_length = geometry.length
        self._filler = Filler(device, pool=pool, geometry=geometry, depth=settings.depth)
        self._extents = self._filler.extents
        self._behind = settings.write_behind
        self._running = False
        self._write_back = WriteBack(
            device,
            pool=pool,
            settings=settings,
            geometry=geometry,
            errors=self._errors,
            want_flush=self._want_flush,
        )
        self._through = WriteThrough(filler=self._filler, write_back=self._write_back)
        pacer = Pacer()
        self._policy = ReadAhead(
            largest=settings.read_ahead,
            budget=pool.size // 2,
            extent=geometry.length,
            worth=lambda: worth(device.latency, pacer.rate(device.latency)),
            passed=self._filler.pass_over,
        )
        self._reads_ahead = settings.read_ahead > 0
        self._observe = self._policy.observe
        self._prefetcher = Prefetcher(
            self._policy,
            filler=self._filler,
            depth=settings.depth,
            block_count=lambda: device.block_count,
            pacer=pacer,
        )
        self._watching = False
        self._flush_wanted = False
        self._flush_alarm = trio.Event()
        self._hits = self._misses = self._writes = 0
        self._aside = AsideReader(device, filler=self._filler, keep_strays=settings.keep_strays)
        self._strays = None if settings.keep_strays else self._tables_for_strays()
        self._spans = SpanReader(filler=self._filler, aside=self._aside)
        self._read_span = self._spans.read

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write back and read ahead until cancelled; see ``BlockFile.run``."""
        try:
            self._pool.join(self._write_back.pressure, self._want_flush)
            async with trio.open_nursery() as nursery:
                self._write_back.start(nursery)
                self._prefetcher.start(nursery)
                nursery.start_soon(self._flush_early)
                self._running = True
                self._watching = self._reads_ahead
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    self._running = self._watching = False  # From here on writes go through.
        finally:
            self._pool.leave(self._write_back.pressure, self._want_flush)
            self._prefetcher.stop()
            self._write_back.stop()

    def invalidate(self) -> None:
        """Drop all clean data; a fill in flight will not count. See ``BlockFile.invalidate``."""
        self._policy.reset()
        self._write_back.forget_beyond_end()
        self._filler.invalidate()

    def stats(self) -> CacheStats:
        """Counters, and the present state."""
        write_back, prefetcher, aside = self._write_back, self._prefetcher, self._aside
        dirty = sum((extent.dirty | extent.writing).bit_count() for extent in write_back.unclean)
        unsynced = sum(extent.unsynced.bit_count() for extent in write_back.unsynced.extents)
        valid = sum(extent.valid.bit_count() for extent in self._extents.values())
        return CacheStats(
            hits=self._hits + self._spans.hits,
            misses=self._misses + self._spans.misses,
            uncached_reads=aside.reads,
            fill_commands=self._filler.commands + aside.commands,
            fill_bytes=self._filler.filled + aside.arrived,
            read_ahead_commands=prefetcher.commands,
            read_ahead_bytes=prefetcher.arrived,
            read_ahead_errors=prefetcher.failures,
            writes=self._writes,
            write_back_commands=write_back.commands,
            write_back_bytes=write_back.written,
            write_back_errors=write_back.failures,
            flushes=self._flushes,
            dirty_bytes=dirty * self._block_length,
            unsynced_bytes=unsynced * self._block_length,
            losses=self._losses,
            cached_bytes=valid * self._block_length,
            pool_bytes=self._pool.size,
            evictions=self._pool.evictions,
        )

    async def _drain(self) -> None:
        await self._write_back.drain()

    # -- what the disk may lose ---------------------------------------------------------------------------------

    def _lose(self) -> None:
        unsynced = self._write_back.unsynced
        complete = self._running and not unsynced.has_orphans
        if self._running:
            self._write_back.lose()
        else:
            self._write_back.lose_for_good()
        if not complete:
            # What isn't dirty now may be of what the disk has lost: a reader must not be shown what isn't there.
            self._filler.invalidate()

    def _flush_begins(self) -> None:
        self._flush_wanted = False
        self._write_back.flush_begins()

    def _flush_ends(self, *, well: bool) -> None:
        self._write_back.flush_ends(well=well)

    def _want_flush(self) -> None:
        if self._write_back.unsynced.extents and not self._flush_wanted:
            self._flush_wanted = True
            self._flush_alarm.set()

    async def _flush_early(self) -> None:
        """Flush whenever memory is short of slots that may be given away."""
        while True:
            await self._flush_alarm.wait()
            self._flush_alarm = trio.Event()
            await self._flush()

    # -- reading ------------------------------------------------------------------------------------------------

    def peek(self, offset: int, length: int) -> Buffer | None:
        """See ``BlockFile.peek``; only of a single extent."""
        index, start = divmod(offset, self._extent_length)
        extent = self._extents.get(index)
        if extent is None:
            return None
        end = start + length
        block = self._block_length
        wanted = (1 << -(-end // block)) - (1 << start // block)
        if wanted & ~extent.valid or not length:  # what is beyond the extent is never valid
            return None
        stop, size = offset + length, self._device.block_count * block
        if stop > size:  # it has shrunk, and there is dirty data where it was
            return None
        if self._watching:
            try:
                plan = self._observe(offset, stop, size=size)
                if plan is not None:
                    self._prefetcher.submit(*plan)
            except Exception:
                self._do_without_read_ahead()
        self._hits += 1
        self._pool.touch(extent, wanted, start=start, stop=end)
        return extent.view[start:end]

    def read(self, offset: int, length: int) -> Coroutine[Any, Any, Buffer]:
        """See ``BlockFile.read``."""
        if take_stray is not None and self._watching and self._strays is not None:
            memory = take_stray(self._strays, offset, length, self._device.block_count * self._block_length)
            if memory is not None:
                self._misses += 1
                return self._aside.read_stray(memory, offset)
        return self._read(offset, length)

    def _tables_for_strays(self) -> tuple[object, ...]:
        """What `take_stray` compares a read with, and the limits, in the order in which it wants them."""
        policy, aside = self._policy, self._aside
        numbers = (LOOK_EVERY, CANDIDATES, NEAR, LONGEST_STRAY, self._extent_length, self._block_length)
        return (policy.random, policy.streams, self._extents, aside.visited, self._pool.slots, *numbers)

    async def _read(self, offset: int, length: int) -> Buffer:
        block = self._block_length
        size = self._device.block_count * block
        stop = offset + length
        if stop > size:
            stop = size
        if offset >= stop:
            return b""
        if self._watching:
            try:
                plan = self._observe(offset, stop, size=size)
                if plan is not None:
                    self._prefetcher.submit(*plan)
            except Exception:
                self._do_without_read_ahead()
        index, start = divmod(offset, self._extent_length)
        end = start + stop - offset
        if end > self._extent_length:
            return await self._read_span(offset, stop)
        # One extent, which is what most requests are: hit, or a miss of one run, with as few steps as possible.
        extent = self._extents.get(index)
        if extent is None and stop - offset <= LONGEST_STRAY and self._aside.is_stray(index):
            self._misses += 1
            return await self._aside.read(offset, stop)
        wanted = (1 << -(-end // block)) - (1 << start // block)
        if extent is None:
            extent = self._filler.allocate(index)
            if extent is None:
                self._misses += 1
                return await self._aside.read_in_turn(offset, stop)
            missing = wanted
        else:
            missing = wanted & ~extent.valid
            if not missing:
                self._hits += 1
                self._pool.touch(extent, wanted, start=start, stop=end)
                return extent.view[start:end]
        first = (missing & -missing).bit_length() - 1
        last = missing.bit_length()
        if missing & extent.filling or missing != (1 << last) - (1 << first):
            return await self._read_span(offset, stop)
        # What ``Filler.demand`` does, for a single run, with nothing in between.
        self._misses += 1
        filler = self._filler
        filler.commands += 1
        generation = filler.generation
        good = False
        extent.filling |= missing
        try:
            view = extent.view[first * block : last * block]
            await self._device.read_into(view, lba=index * self._geometry.blocks + first)
            good = generation == filler.generation
        finally:
            filler.end(extent, missing, good=good)
        filler.filled += len(view)
        # No await since the fill: what is valid now can't go before the caller's next checkpoint.
        if wanted & ~extent.valid:  # Invalidated meanwhile.
            return await self._read_span(offset, stop, waited=True)
        self._pool.touch(extent, wanted, start=start, stop=end)
        return extent.view[start:end]

    def _do_without_read_ahead(self) -> None:
        """Its policy has made a mistake of ours. It is only advice: no reader shall suffer for it."""
        log.exception("a mistake in the read-ahead: this disk does without from now on")
        self._watching = False

    # -- writing ------------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: Buffer) -> int:
        """See ``BlockFile.write``."""
        length = len(data)
        if not length:
            return 0
        size = self._device.block_count * self._block_length
        if offset + length > size:
            if offset >= size:
                raise EndOfDeviceError(f"a write at byte {offset} begins beyond the end of the disk ({size} bytes)")
            length = size - offset
            data = memoryview(data)[:length]
        self._writes += 1
        index, start = divmod(offset, self._extent_length)
        end = start + length
        if end <= self._extent_length:
            if not (self._behind and self._running and self._store(index, start, end, data)):
                await self._write_piece(offset, data)
            return length
        pieces = memoryview(data)
        position = 0
        while position < length:
            index, start = divmod(offset + position, self._extent_length)
            end = min(self._extent_length, start + length - position)
            piece = pieces[position : position + end - start]
            if self._behind and self._running:
                if not self._store(index, start, end, piece):
                    await self._write_piece(offset + position, piece)
                position += end - start
            else:
                await own_task()
                position += await self._through.write(offset + position, pieces[position:])
        return length

    def _store(self, index: int, start: int, end: int, data: Buffer) -> bool:
        """Put bytes of one extent into the buffer, if that can be done now."""
        write_back = self._write_back
        extent = self._extents.get(index)
        if extent is None:
            extent = None if write_back.full() else self._filler.allocate(index)
            if extent is None:
                return False
        block = self._block_length
        first, head = divmod(start, block)
        last, tail = divmod(end, block)
        if head or tail:
            partial = self._geometry.partial_blocks(start, end)
            if partial & ~extent.valid:
                return False
            if tail:
                last += 1
        blocks = (1 << last) - (1 << first)
        if (extent.filling | extent.writing) & blocks:
            return False
        if not extent.dirty:
            if not extent.writing and write_back.full():
                return False
            write_back.first_dirtied(extent)
        extent.view[start:end] = data
        extent.valid |= blocks
        extent.dirty |= blocks
        if extent.dirty == extent.full and not tail:  # The rest of a block is likely to come.
            write_back.make_ready(extent)
        return True

    async def _write_piece(self, offset: int, data: Buffer) -> None:
        """Write bytes of one extent, waiting for whatever is in the way; one thing at a time, then look again."""
        index, start = divmod(offset, self._extent_length)
        end = start + len(data)
        blocks = self._geometry.blocks_of(start, end)
        partial = self._geometry.partial_blocks(start, end)
        write_back = self._write_back
        while self._behind and self._running:
            if self._store(index, start, end, data):
                return
            extent = self._extents.get(index)
            if (extent is None or not (extent.dirty or extent.writing)) and write_back.full():
                await write_back.wait_for_room()  # Holding nothing: it may take as long as a disk is stuck.
            elif extent is not None and (extent.filling | extent.writing) & blocks:
                await extent.changed()
            elif await own_task():
                continue
            elif extent is None:
                await self._pool.wait_for_room()
            else:
                await self._filler.demand_all([(extent, partial & ~extent.valid)])
        await own_task()
        await self._through.write(offset, memoryview(data))
