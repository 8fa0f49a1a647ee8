"""Write-through: data that is on the device before its writer goes on, and in the cache for who reads it next.

The data is copied into extents, as many neighbouring ones as can be had without waiting for a slot, and written from
there: valid and ``writing``, so that nobody changes it, and readers see it. If the write fails or is cancelled, the
blocks are dropped, since nobody knows what is on the device then; the writer gets the error himself. If the disk was
reset meanwhile, it may have lost what it had accepted there before, from others, too: that is an error for everybody.
"""

import functools

from iscsifuse.cache.extent import Extent, Transfer
from iscsifuse.cache.filling import Filler
from iscsifuse.cache.writeback import WriteBack

__all__ = ["WriteThrough"]


class WriteThrough:
    """Writes of one LUN that don't wait in a buffer."""

    def __init__(self, *, filler: Filler, write_back: WriteBack) -> None:
        self._filler = filler
        self._write_back = write_back

    async def write(self, offset: int, data: memoryview) -> int:
        """Write a part of the data, up to the end of an extent or of the data at least.

        Args:
            offset: of the first byte.
            data: not empty, and not beyond the end of the device.

        Returns:
            How many bytes were written.

        Raises:
            IscsifuseError: of the device.
        """
        filler = self._filler
        length = filler.geometry.length
        while True:
            extents: list[Extent] = []
            try:
                for index in range(offset // length, -(-(offset + len(data)) // length)):
                    extent = filler.extents.get(index) or filler.allocate(index)
                    if extent is None:
                        break
                    extent.pins += 1
                    extents.append(extent)
                if extents:
                    return await self._write_to(extents, offset, data)
            finally:
                for extent in extents:
                    extent.pins -= 1
                if extents:  # Else nothing has changed: two who wait for a slot would wake each other for ever.
                    filler.pool.notify()
            await filler.pool.wait_for_room()  # Holding nothing.

    async def _write_to(self, extents: list[Extent], offset: int, data: memoryview) -> int:
        """Write as much of the data as lies in these pinned extents before one that is busy."""
        geometry = self._filler.geometry
        length = geometry.length
        base = extents[0].index * length
        stop = min(offset + len(data), base + len(extents) * length)
        while True:
            free: list[tuple[Extent, int, int, int]] = []
            lacking: list[tuple[Extent, int]] = []
            for number, extent in enumerate(extents):
                start = max(0, offset - base - number * length)
                end = min(length, stop - base - number * length)
                blocks = geometry.blocks_of(start, end)
                # Dirty: only while a write-behind cache is being stopped or started, or after the disk has lost
                # something; those blocks go, or are written.
                if (extent.filling | extent.writing | extent.dirty) & blocks:
                    break
                partial = geometry.partial_blocks(start, end) & ~extent.valid
                if partial:
                    lacking.append((extent, partial))
                free.append((extent, start, end, blocks))
            if not free:
                await extents[0].changed()
            elif lacking:
                await self._filler.demand_all(lacking)
            else:
                break
        # No await since the loop over the extents: all blocks are still free, and are ours from here on.
        position = 0
        transfers: list[Transfer] = []
        for extent, start, end, blocks in free:
            extent.view[start:end] = data[position : position + end - start]
            position += end - start
            extent.valid |= blocks
            self._write_back.start_writing(extent, blocks)
            first, last = start // geometry.block_length, -(-end // geometry.block_length)
            if not (transfers and transfers[-1].add(geometry, extent, first, last)):
                transfers.append(Transfer.of(geometry, extent, first, last))
        since = self._write_back.losses
        await self._filler.each(
            transfers,
            functools.partial(self._write_back.write_through, since=since),
            functools.partial(self._write_back.abandon, since=since),
        )
        return position
