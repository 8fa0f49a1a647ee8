"""Reads past the cache: into memory of the reader's own, for whom there is no room, or who isn't worth any.

* **Strays.** A small read of a place where nobody was of late is not cached: no room is made for it. The second time
  somebody comes there, it is.
* **No slot, or no progress** (shared fills failed under a reader, or the medium keeps changing): such a read ends the
  reader's waiting in any case.

What is valid in memory wins over what was read, before and after. So a write that was acknowledged before the read
began is seen (its block was valid, or is on the device already); one that is acknowledged before it ends may be.
"""

import mmap

import trio

from iscsifuse.cache.device import BlockDevice
from iscsifuse.cache.extent import runs, span
from iscsifuse.cache.file import Buffer
from iscsifuse.cache.filling import Filler
from iscsifuse.fibres import own_task

__all__ = ["LONGEST_STRAY", "AsideReader"]

LONGEST_STRAY = 64 * 1024
"""Bytes of a read that may be a stray."""
# Reads past the cache, of this LUN, that may be under way at once; each takes at most 1 MiB, the longest request.
# Small ones don't count: they are many where a block is dying, and shouldn't queue for its timeouts.
_MOST_ASIDE = 6
_SMALL = 64 * 1024


class AsideReader:
    """Reads of one LUN past its cache.

    Invariant: it changes nothing in the cache; and it waits for device reads only, but for large reads, which also
    wait for each other. So readers never wait for a slot.

    Args:
        device: the disk.
        filler: of its cache.
        keep_strays: whether all reads are worth their room.

    Attributes:
        reads: how many were made.
        commands: that they took.
        arrived: bytes that these brought.
        visited: extents that aren't cached, where a stray was read; oldest first. (For `take_stray`, too.)
    """

    def __init__(self, device: BlockDevice, *, filler: Filler, keep_strays: bool) -> None:
        self.reads = self.commands = self.arrived = 0
        self._device = device
        self._extents = filler.extents
        self._geometry = filler.geometry
        self._pool = filler.pool
        self._keep_strays = keep_strays
        self.visited: dict[int, None] = {}
        self._turns = trio.Semaphore(_MOST_ASIDE)

    def is_stray(self, index: int) -> bool:
        """Whether a place is not to be cached yet, since nobody has asked for it of late; now somebody has."""
        if self._keep_strays:
            return False
        visited = self.visited
        if index in visited:
            del visited[index]
            return False
        if len(visited) >= self._pool.slots:
            del visited[next(iter(visited))]
        visited[index] = None
        return True

    async def read_stray(self, memory: memoryview, offset: int) -> Buffer:
        """`read`, for whole blocks within an extent that isn't cached, where that is known already.

        Args:
            memory: where to: writable, contiguous, a multiple of ``block_length`` bytes.
            offset: of the first byte on the disk; the beginning of a block.

        Returns:
            ``memory``, filled.

        Raises:
            IscsifuseError: the device's own; the content of ``memory`` is undefined.

        Cancellation: as `BlockDevice.read_into`.
        """
        self.reads += 1
        self.commands += 1
        geometry = self._geometry
        first = offset // geometry.block_length
        await self._device.read_into(memory, lba=first)
        self.arrived += len(memory)
        if first // geometry.blocks in self._extents:
            self._overlay(memory, first, first + len(memory) // geometry.block_length)
        return memory

    async def read_in_turn(self, offset: int, stop: int) -> Buffer:
        """A read for which there is no other way; large ones are limited in number, since they take memory."""
        if stop - offset <= _SMALL:
            return await self.read(offset, stop)
        await own_task()
        # The LUN's own turn first: a disk that hangs can hold a few of the common ones, and never all of them.
        async with self._turns, self._pool.aside:
            return await self.read(offset, stop)

    async def read(self, offset: int, stop: int) -> Buffer:
        """Read the bytes ``offset`` to ``stop - 1`` at once.

        Raises:
            IscsifuseError: the device's own.
        """
        block = self._geometry.block_length
        first, last = offset // block, -(-stop // block)
        buffer = _memory((last - first) * block)
        blocks = self._geometry.blocks
        if first // blocks not in self._extents and (last - 1) // blocks == first // blocks:
            # The usual stray: all of it is on the device, and only there.
            await self.read_stray(buffer, first * block)
            return buffer[offset - first * block : stop - first * block]
        self.reads += 1
        missing = self._overlay(buffer, first, last)
        for begin, end in runs(missing):
            self.commands += 1
            await self._device.read_into(buffer[begin * block : end * block], lba=first + begin)
            self.arrived += (end - begin) * block
        self._overlay(buffer, first, last)
        return buffer[offset - first * block : stop - first * block]

    def _overlay(self, buffer: memoryview, first: int, last: int) -> int:
        """Copy what is valid of the blocks ``first`` to ``last - 1`` into their buffer; returns what isn't."""
        geometry = self._geometry
        missing = span(0, last - first)
        for index in range(first // geometry.blocks, -(-last // geometry.blocks)):
            extent = self._extents.get(index)
            if extent is None:
                continue
            base = index * geometry.blocks
            valid = extent.valid & span(max(0, first - base), min(geometry.blocks, last - base))
            for begin, end in runs(valid):
                source, target = begin * geometry.block_length, (base + begin - first) * geometry.block_length
                size = (end - begin) * geometry.block_length
                buffer[target : target + size] = extent.view[source : source + size]
                missing &= ~span(base + begin - first, base + end - first)
        return missing


def _memory(size: int) -> memoryview:
    """Memory for one read: straight from the kernel if it is much, for on the heap it would leave holes."""
    if size <= _SMALL:
        return memoryview(bytearray(size))
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
