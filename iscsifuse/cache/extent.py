"""Extents: the unit of memory; blocks: the unit of state.

An extent is a whole number of neighbouring blocks (about 256 KiB) that lives in one slot of the pool's arena. What
is known about its blocks stands in integers used as bit sets, bit *n* for block *n* of the extent:

========= ==================================================================================================
valid     the memory holds the block's current content
dirty     the memory is newer than the device, and nobody is writing it back yet
writing   a device write reads this memory now: it must not change
filling   a device read writes into this memory now: nobody else may touch it
unsynced  the device has accepted this content, or an older one, and no flush has covered it yet (see ``unsynced``)
flushing  of these, what the flush that is under way covers
touched   a reader asked for it while it was here (decides about promotion, nothing else)
========= ==================================================================================================

Invariants, at every checkpoint:

* ``dirty``, ``writing`` and ``unsynced`` are subsets of ``valid``, ``flushing`` is one of ``unsynced``.
* ``dirty & writing == 0``; ``unsynced & writing == 0``; ``filling & valid == 0``.
* Only a successful fill or a write that covers the whole block makes a block valid.
* A bit of ``filling`` or ``writing`` is set by one task, which clears it in every outcome and then wakes those who
  wait for that (`Extent.wake`).
* An extent is evicted only while ``dirty``, ``writing``, ``filling``, ``unsynced`` and ``pins`` are all 0, so whoever
  holds one of these may keep using the object across a checkpoint. Anybody else looks it up again.

The functions are pure; a ``Transfer`` is one device command and the blocks that it is about.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import trio

from iscsifuse.fibres import Fibre, doze, here

__all__ = ["Extent", "Geometry", "Transfer", "next_run", "runs", "span"]


def span(first: int, stop: int) -> int:
    """The set of the blocks ``first`` to ``stop - 1``."""
    return (1 << stop) - (1 << first)


def runs(blocks: int) -> Iterator[tuple[int, int]]:
    """Every maximal run of neighbours in a set of blocks, as (first, stop), ascending."""
    base = 0
    while blocks:
        gap = (blocks & -blocks).bit_length() - 1
        blocks >>= gap
        length = (~blocks & (blocks + 1)).bit_length() - 1
        base += gap
        yield base, base + length
        blocks >>= length
        base += length


def next_run(blocks: int, cursor: int) -> tuple[int, int]:
    """The first run at or after ``cursor``, else the first of all; ``blocks`` must not be empty.

    Going round like an elevator makes sure that a block is reached however often others before it come back.
    """
    return next(runs((blocks >> cursor << cursor) or blocks))


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a device's blocks are cut into extents.

    Attributes:
        block_length: bytes in a block.
        blocks: blocks in an extent.
        length: bytes in an extent.
    """

    block_length: int
    blocks: int
    length: int

    @classmethod
    def of(cls, block_length: int, slot_size: int) -> "Geometry":
        """The largest extent of whole blocks that a slot of ``slot_size`` bytes can hold (0 blocks: none can)."""
        blocks = slot_size // block_length
        return cls(block_length, blocks, blocks * block_length)

    def blocks_of(self, start: int, stop: int) -> int:
        """The set of blocks that the bytes ``start`` to ``stop - 1`` of an extent lie in."""
        length = self.block_length
        return (1 << -(-stop // length)) - (1 << start // length)

    def partial_blocks(self, start: int, stop: int) -> int:
        """The set of blocks that these bytes cover in part only (none, one or two)."""
        first, head = divmod(start, self.block_length)
        last, tail = divmod(stop, self.block_length)
        return (1 << first if head else 0) | (1 << last if tail else 0)


class Extent:
    """Some neighbouring blocks in memory. The module's docstring tells what the bit sets mean.

    Attributes:
        home: the owner's table of extents, by index, which this one is in as long as it lives.
        index: number of the extent on its device.
        slot: number of its slot in the arena.
        address: offset of its first byte in the arena.
        view: its bytes.
        full: the set of all its blocks (fewer at the end of a device).
        pins: tasks that rely on the extent across a checkpoint with no bit of their own in it.
        queue: which of the pool's queues it is in; None while it isn't evictable and was found to be so.
        born: the pool's clock when it was made.
        cursor: where write-back goes on looking for dirty blocks; 0 when its turn begins.
        read_end: byte after the latest read.
        lost: fills that ended without making their blocks valid.
        event: set, and forgotten, when ``filling`` or ``writing`` shrink; made by the first task that waits.
        fibres: those who wait for the same, likewise.
    """

    __slots__ = (
        "address",
        "born",
        "cursor",
        "dirty",
        "event",
        "fibres",
        "filling",
        "flushing",
        "full",
        "home",
        "index",
        "lost",
        "pins",
        "queue",
        "read_end",
        "slot",
        "touched",
        "unsynced",
        "valid",
        "view",
        "writing",
    )

    def __init__(
        self, home: "dict[int, Extent]", index: int, *, slot: int, address: int, view: memoryview, full: int
    ) -> None:
        self.home = home
        self.index = index
        self.slot = slot
        self.address = address
        self.view = view
        self.full = full
        self.valid = self.dirty = self.filling = self.writing = self.touched = 0
        self.unsynced = self.flushing = 0
        self.pins = self.born = self.cursor = self.read_end = self.lost = 0
        self.queue: Any = None  # an OrderedDict[Extent, None] of the pool; compared by identity only
        self.event: trio.Event | None = None
        self.fibres: list[Fibre] | None = None

    async def changed(self) -> None:
        """Wait until some block stops being filled or written; the caller has seen one that is.

        No await lies between the caller's look at the bits and the event's registration, so no wake-up is lost.

        It may return for nothing.
        """
        fibre = here().fibre
        if fibre is None:
            if self.event is None:
                self.event = trio.Event()
            await self.event.wait()
        else:
            if self.fibres is None:
                self.fibres = []
            self.fibres.append(fibre)
            await doze()

    def wake(self) -> None:
        """Let everybody who waits in ``changed`` look again."""
        if self.event is not None:
            self.event.set()
            self.event = None
        if self.fibres is not None:
            for fibre in self.fibres:
                fibre.wake()
            self.fibres = None


class Transfer:
    """One device command: neighbouring blocks that are neighbours in memory too.

    Attributes:
        lba: first block.
        begin: its address in the arena.
        end: address after the last byte.
        parts: the extents concerned, and which of their blocks.
    """

    __slots__ = ("begin", "end", "lba", "parts")

    def __init__(self, *, lba: int, begin: int) -> None:
        self.lba = lba
        self.begin = self.end = begin
        self.parts: list[tuple[Extent, int]] = []

    def add(self, geometry: Geometry, extent: Extent, first: int, stop: int) -> bool:
        """Append the blocks ``first`` to ``stop - 1`` of an extent, if they follow on disk and in memory."""
        length = geometry.block_length
        if (
            extent.address + first * length != self.end
            or (extent.index * geometry.blocks + first - self.lba) * length != self.end - self.begin
        ):
            return False
        self.end += (stop - first) * length
        self.parts.append((extent, span(first, stop)))
        return True

    @classmethod
    def of(cls, geometry: Geometry, extent: Extent, first: int, stop: int) -> "Transfer":
        """A command for the blocks ``first`` to ``stop - 1`` of an extent."""
        transfer = cls(
            lba=extent.index * geometry.blocks + first, begin=extent.address + first * geometry.block_length
        )
        transfer.add(geometry, extent, first, stop)
        return transfer
