"""Any read that isn't a hit in one extent: of several extents, of several runs, of blocks that others are filling.

The reader claims the missing blocks that nobody is filling, reads exactly these into their place, and looks again;
or, where others are filling all that is missing, waits for one of them and looks again. Who makes no progress that
way reads past the cache (`aside`).
"""

from iscsifuse.cache.aside import AsideReader
from iscsifuse.cache.extent import Extent
from iscsifuse.cache.file import Buffer
from iscsifuse.cache.filling import Filler
from iscsifuse.fibres import own_task

__all__ = ["SpanReader"]

# Fruitless rounds of a read (fills under it failed, or didn't count) before it is made past the cache.
_PATIENCE = 1


class SpanReader:
    """Reads of one LUN through its cache, the general way.

    Invariant: the extents of a read are pinned while it waits for their blocks, and it waits for device reads only.
    What it returns from memory is valid at one moment, after which nothing is awaited.

    Args:
        filler: of the cache.
        aside: for who makes no progress.

    Attributes:
        hits: reads that found everything in memory.
        misses: all others.
    """

    def __init__(self, *, filler: Filler, aside: AsideReader) -> None:
        self.hits = self.misses = 0
        self._filler = filler
        self._aside = aside
        self._pool = filler.pool
        self._extents = filler.extents
        self._geometry = filler.geometry
        self._extent_length = filler.geometry.length

    async def read(self, offset: int, stop: int, *, waited: bool = False) -> Buffer:
        """Read the bytes ``offset`` to ``stop - 1``.

        Args:
            offset: of the first byte.
            stop: of the byte after the last one; within the device.
            waited: it is part of a read that has been counted already.

        Raises:
            IscsifuseError: a block of this very range can't be read.
        """
        length = self._extent_length
        patience = _PATIENCE
        lost = self._filler.generation
        pinned: list[Extent] = []
        try:
            for index in range(offset // length, -(-stop // length)):
                extent = self._extents.get(index) or self._filler.allocate(index)
                if extent is None:
                    break
                extent.pins += 1
                pinned.append(extent)
                lost += extent.lost
            else:
                while True:
                    missing, busy = self._missing(pinned, offset, stop)
                    if not missing:
                        if not waited:
                            self.hits += 1
                        return self._join(pinned, offset, stop)
                    if not waited:
                        waited = True
                        self.misses += 1
                    now_lost = self._filler.generation + sum(extent.lost for extent in pinned)
                    if now_lost != lost:
                        lost = now_lost
                        patience -= 1
                        if patience < 0:
                            break
                    # No await since ``_missing``: what it found to be nobody's is claimed here by this task only.
                    transfers = self._filler.claim(missing)
                    if transfers:
                        if len(transfers) > 1:
                            await own_task()
                        await self._filler.each(transfers, self._filler.demand, self._filler.release)
                    else:
                        assert busy is not None  # noqa: S101  missing blocks, and none that was ours to fill
                        await busy.changed()
        finally:
            for extent in pinned:
                extent.pins -= 1
            if pinned:
                self._pool.notify()
        if not waited:
            self.misses += 1
        return await self._aside.read_in_turn(offset, stop)

    def _missing(
        self, extents: list[Extent], offset: int, stop: int
    ) -> tuple[list[tuple[Extent, int]], Extent | None]:
        """What of a range isn't valid: blocks by extent; and some extent where others are filling them."""
        missing: list[tuple[Extent, int]] = []
        busy: Extent | None = None
        length = self._extent_length
        base = extents[0].index * length
        for extent in extents:
            wanted = self._geometry.blocks_of(max(0, offset - base), min(length, stop - base))
            lacking = wanted & ~extent.valid
            if lacking:
                missing.append((extent, lacking))
                if lacking & extent.filling:
                    busy = extent
            base += length
        return missing, busy

    def _join(self, extents: list[Extent], offset: int, stop: int) -> Buffer:
        """The bytes of a range that is valid: one slice if its extents lie side by side, else a short-lived copy."""
        length = self._extent_length
        base = first = extents[0].index * length
        address = follows = extents[0].address
        pieces = []
        side_by_side = True
        for extent in extents:
            start, end = max(0, offset - base), min(length, stop - base)
            self._pool.touch(extent, self._geometry.blocks_of(start, end), start=start, stop=end)
            side_by_side &= extent.address == follows
            follows = extent.address + length
            pieces.append(extent.view[start:end])
            base += length
        if side_by_side:
            return self._pool.view[address + offset - first : address + stop - first]
        return self._pool.gather(pieces)
