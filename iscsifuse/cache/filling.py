"""Filling: device reads straight into extents, one per block however many ask (single flight).

Whoever finds blocks that are neither valid nor filling *claims* them, all in one step with no await, and owes them a
fill from then on. A fill ends in one of two ways, and both take the mark off and wake who waits:

* the device read succeeded, and ``invalidate`` wasn't called since it began: the blocks are valid;
* anything else (an error, a cancelled task, a changed medium): the blocks are what they were, not valid, and the
  extents' ``lost`` goes up, by which waiters see that waiting did them no good.

Neighbouring blocks that are neighbours in memory are one command, across extents too.
"""

from collections.abc import Awaitable, Callable

import trio

from iscsifuse.cache.device import BlockDevice
from iscsifuse.cache.extent import Extent, Geometry, Transfer, runs, span
from iscsifuse.cache.pool import BufferPool

__all__ = ["Filler"]


class Filler:
    """The extents of one LUN, and how they get their content.

    Attributes:
        extents: those that are in memory, by index.
        geometry: of the LUN.
        pool: where they live.
        generation: goes up with every ``invalidate``.
        commands: fills that somebody waited for.
        filled: bytes that they brought.
    """

    def __init__(self, device: BlockDevice, *, pool: BufferPool, geometry: Geometry, depth: int) -> None:
        self.extents: dict[int, Extent] = {}
        self.geometry = geometry
        self.pool = pool
        self.generation = 0
        self.commands = self.filled = 0
        self._device = device
        self._depth = depth
        self._full = span(0, geometry.blocks)

    def allocate(self, index: int, *, ahead: bool = False) -> Extent | None:
        """A new, empty extent, if there is a slot for it; for read-ahead only if nothing better has to go."""
        blocks = self.geometry.blocks
        rest = self._device.block_count - index * blocks
        full = self._full if rest >= blocks else span(0, max(0, rest))
        return self.pool.allocate(self.extents, index, length=self.geometry.length, full=full, ahead=ahead)

    def pass_over(self, start: int, stop: int) -> None:
        """What was read ahead from byte ``start`` to ``stop - 1``, and nobody asked for, is worth nothing more."""
        length = self.geometry.length
        for index in range(start // length, stop // length):
            extent = self.extents.get(index)
            if extent is not None:
                self.pool.pass_over(extent)

    def invalidate(self) -> None:
        """Drop all clean content, and that of the fills in flight."""
        self.generation += 1
        for extent in list(self.extents.values()):
            extent.valid &= extent.dirty | extent.writing | extent.unsynced
            extent.touched = 0
            if not extent.valid:
                self.pool.release(extent)

    def claim(self, missing: list[tuple[Extent, int]]) -> list[Transfer]:
        """Mark those of some missing blocks that nobody is filling as ours to fill.

        Returns:
            Commands for them, in order; each is owed a ``fill`` or ``demand``, or a ``release``.
        """
        transfers: list[Transfer] = []
        for extent, blocks in missing:
            own = blocks & ~extent.filling
            extent.filling |= own
            for first, stop in runs(own):
                if not (transfers and transfers[-1].add(self.geometry, extent, first, stop)):
                    transfers.append(Transfer.of(self.geometry, extent, first, stop))
        return transfers

    async def fill(self, transfer: Transfer) -> None:
        """Read blocks that are marked ``filling`` into their place.

        Raises:
            IscsifuseError: the device's own.
        """
        generation = self.generation
        good = False
        try:
            await self._device.read_into(self.pool.view[transfer.begin : transfer.end], lba=transfer.lba)
            good = generation == self.generation
        finally:
            for extent, blocks in transfer.parts:
                self.end(extent, blocks, good=good)

    def end(self, extent: Extent, blocks: int, *, good: bool) -> None:
        """A fill of some blocks of an extent is over."""
        extent.filling &= ~blocks
        if good:
            extent.valid |= blocks
        else:
            extent.lost += 1
        if extent.event is not None or extent.fibres is not None:
            extent.wake()
        if self.pool.wanted is not None:
            self.pool.notify()

    async def demand(self, transfer: Transfer) -> None:
        """A ``fill`` that somebody waits for."""
        self.commands += 1
        await self.fill(transfer)
        self.filled += transfer.end - transfer.begin

    async def demand_all(self, missing: list[tuple[Extent, int]]) -> None:
        """Fill those of some missing blocks that nobody is filling.

        Raises:
            IscsifuseError: the first error; the other blocks are valid nevertheless.
        """
        await self.each(self.claim(missing), self.demand, self.release)

    def release(self, transfer: Transfer) -> None:
        """Give up a claim that was never sent."""
        for extent, blocks in transfer.parts:
            extent.filling &= ~blocks
            extent.lost += 1
            extent.wake()
        self.pool.notify()

    async def each(
        self,
        transfers: list[Transfer],
        do: Callable[[Transfer], Awaitable[None]],
        give_up: Callable[[Transfer], None],
    ) -> None:
        """Do all transfers, several at a time, each whatever becomes of the others; raise the first error.

        Cancellation: those that weren't begun are given up.
        """
        if len(transfers) == 1:
            await do(transfers[0])
            return
        errors: list[Exception] = []
        waiting = iter(transfers)

        async def some() -> None:
            for transfer in waiting:
                try:
                    await do(transfer)
                except Exception as error:
                    errors.append(error)

        try:
            async with trio.open_nursery() as nursery:
                for _ in range(min(self._depth, len(transfers))):
                    nursery.start_soon(some)
        finally:
            for transfer in waiting:
                give_up(transfer)
        if errors:
            raise errors[0]
