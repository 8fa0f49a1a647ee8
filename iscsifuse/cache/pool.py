"""The memory of all caches of a mount, and who has to leave it.

One anonymous mapping is cut into slots; each extent lives in one. The kernel gives a page only when it is first
touched, so a large cache costs nothing until it is used. An extent is given the slot right after its predecessor's
where possible: then neighbours on disk are neighbours in memory, a read across them is one slice of the arena, and a
transfer across them is one command.

Every extent that may be evicted is in one of three queues:

* *ahead*: fetched ahead of a sequential reader who has not come yet; at most half of the pool;
* *probation*: first come, first to go. A stream passes through here, in however many requests it reads an extent;
* *protected*: what was read again. Least recently used goes back to probation when the queue is over its share.

So a scan of the whole disk flows through probation and leaves the protected part alone. A demand evicts from
probation, then from ahead, then from protected; read-ahead evicts from probation only. Unconsumed read-ahead
grows old by the clock, which ticks once for each extent made, and becomes probation then.

The queues are lazy: an extent that became dirty stays where it is until eviction comes across it and drops it from
its queue; ``settle`` puts it back once it is clean, and ``remove_unsynced`` once a flush has covered it. Nothing in
here waits, except ``wait_for_room``.
"""

import mmap
from collections import OrderedDict
from collections.abc import Callable

import trio

from iscsifuse.cache.extent import Extent

__all__ = ["BufferPool"]

_FEWEST_SLOTS = 4
_MOST_ASIDE = 12
"""Each takes at most 1 MiB, the longest request."""

_Queue = OrderedDict[Extent, None]


class BufferPool:
    """A bounded arena of slots, shared by the caches of all LUNs of a mount.

    Args:
        size: bytes; rounded down to whole slots, and up to a handful of them.
        slot_size: bytes in a slot, the most that an extent can have.

    Attributes:
        view: the whole arena.
        slots: number of slots.
        slot_size: bytes in a slot.
        size: bytes in the arena.
        evictions: extents thrown out so far.
        unclean: extents with data that isn't on its device yet, of all LUNs.
        most_unclean: how many of these there should be at most: readers need slots, too.
        unsynced: extents with data that its device may still lose, of all LUNs.
        most_unsynced: with how many of these the caches begin to flush on their own.
        wanted: set when somebody waits for a slot; see ``notify``.
        aside: bounds the memory beside the arena: large reads past the cache, of all LUNs, under way at once.
        scratch: for what doesn't lie side by side in the arena but has to, until the next checkpoint of whoever
            puts it there; as long as was needed so far.
    """

    def __init__(self, size: int, *, slot_size: int = 256 * 1024) -> None:
        self.slot_size = slot_size
        self.slots = max(_FEWEST_SLOTS, size // slot_size)
        self.size = self.slots * slot_size
        # Private: shared anonymous memory is shmem, whose page faults cost more.
        arena = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(arena)
        self.scratch = memoryview(bytearray())
        self.evictions = self.unclean = self.unsynced = 0
        self.most_unclean = self.slots - max(2, self.slots // 4)
        self.most_unsynced = max(1, self.slots // 4)
        self.wanted: trio.Event | None = None
        self.aside = trio.Semaphore(_MOST_ASIDE)
        self._owners: list[Extent | None] = [None] * self.slots
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.slots))
        self._ahead: _Queue = OrderedDict()
        self._probation: _Queue = OrderedDict()
        self._protected: _Queue = OrderedDict()
        self._most_protected = self.slots - max(2, self.slots // 4)
        self._most_ahead = self.slots // 2
        self._clock = 0
        self._pressure: list[Callable[[], None]] = []
        self._flush: list[Callable[[], None]] = []

    def join(self, pressure: Callable[[], None], flush: Callable[[], None]) -> None:
        """Register what is called when slots are short.

        Args:
            pressure: should get dirty data going.
            flush: should get a flush going; also called when there is much that is ``unsynced``.
        """
        self._pressure.append(pressure)
        self._flush.append(flush)

    def leave(self, pressure: Callable[[], None], flush: Callable[[], None]) -> None:
        """Undo ``join``."""
        self._pressure.remove(pressure)
        self._flush.remove(flush)

    # -- allocation ---------------------------------------------------------------------------------------------

    def allocate(
        self, home: dict[int, Extent], index: int, *, length: int, full: int, ahead: bool = False
    ) -> Extent | None:
        """Make an extent and enter it into its owner's table; never waits.

        Args:
            home: the owner's table, which must have no extent of this index.
            index: number of the extent on its device.
            length: bytes in an extent of this owner, at most ``slot_size``.
            full: the set of all blocks of this very extent.
            ahead: for read-ahead, which must not drive out anything that is worth more.

        Returns:
            The extent, with nothing valid in it; None where every slot is in use (or too good to give up).
        """
        if self._ahead:
            oldest = next(iter(self._ahead))
            if self._clock - oldest.born > self.slots:
                self._move(oldest, self._probation)
            if ahead and len(self._ahead) >= self._most_ahead:
                return None
        slot = -1
        before = home.get(index - 1)
        if before is not None:
            slot = self._claim(before.slot + 1)
        if slot < 0:
            if self._free:
                slot = self._free.popitem(last=False)[0]
            else:
                victim = self._victim(ahead=ahead)
                if victim is None:
                    return None
                slot = victim.slot
                self._unmake(victim)
                self.evictions += 1
        self._clock += 1
        address = slot * self.slot_size
        extent = Extent(
            home, index, slot=slot, address=address, view=self.view[address : address + length], full=full
        )
        extent.born = self._clock
        queue = self._ahead if ahead else self._probation
        extent.queue = queue
        queue[extent] = None
        self._owners[slot] = home[index] = extent
        return extent

    def release(self, extent: Extent) -> None:
        """Give an extent's slot back at once, if nobody relies on it."""
        if not (extent.dirty or extent.writing or extent.filling or extent.unsynced or extent.pins):
            self._unmake(extent)
            self._free[extent.slot] = None
            self.notify()

    def _claim(self, slot: int) -> int:
        """Take this very slot if it is free, or held by an extent that is next to go anyway; else -1."""
        if slot >= self.slots:
            return -1
        owner = self._owners[slot]
        if owner is None:
            del self._free[slot]
            return slot
        if (
            owner.queue is self._probation
            and self._clock - owner.born > self.slots >> 2
            and not (owner.dirty or owner.writing or owner.filling or owner.unsynced or owner.pins)
        ):
            self._unmake(owner)
            self.evictions += 1
            return slot
        return -1

    def _victim(self, *, ahead: bool) -> Extent | None:
        for queue in (self._probation,) if ahead else (self._probation, self._ahead, self._protected):
            for _ in range(len(queue)):
                extent = next(iter(queue))
                if not (extent.dirty or extent.writing or extent.filling or extent.unsynced or extent.pins):
                    return extent
                if extent.dirty or extent.writing or extent.unsynced:
                    del queue[extent]
                    extent.queue = None
                else:
                    queue.move_to_end(extent)
        return None

    def _unmake(self, extent: Extent) -> None:
        """Take an extent out of all tables; its slot belongs to the caller."""
        if extent.queue is not None:
            del extent.queue[extent]
            extent.queue = None
        del extent.home[extent.index]
        self._owners[extent.slot] = None

    def gather(self, pieces: list[memoryview]) -> memoryview:
        """The bytes of several pieces side by side, in ``scratch``: theirs until the caller's next checkpoint."""
        size = sum(map(len, pieces))
        if len(self.scratch) < size:
            self.scratch = memoryview(bytearray(size))
        position = 0
        for piece in pieces:
            self.scratch[position : position + len(piece)] = piece
            position += len(piece)
        return self.scratch[:size]

    # -- what use tells about worth -----------------------------------------------------------------------------

    def touch(self, extent: Extent, blocks: int, *, start: int, stop: int) -> None:
        """A reader was given the bytes ``start`` to ``stop - 1`` of an extent, which lie in ``blocks``."""
        if blocks & ~extent.touched:
            extent.touched |= blocks
            if extent.queue is self._ahead:
                self._move(extent, self._probation)
        elif start != extent.read_end:  # Not merely the next bytes of a block that was begun.
            protected = self._protected
            if extent.queue is protected:
                protected.move_to_end(extent)
            else:
                self._move(extent, protected)
                if len(protected) > self._most_protected:
                    self._move(next(iter(protected)), self._probation)
        extent.read_end = stop

    def pass_over(self, extent: Extent) -> None:
        """An extent that was read ahead won't be asked for any more."""
        if extent.queue is self._ahead:
            self._move(extent, self._probation)

    def settle(self, extent: Extent) -> None:
        """An extent has become clean."""
        if extent.queue is None:
            extent.queue = self._probation
            self._probation[extent] = None
        self.notify()

    def add_unsynced(self) -> None:
        """One more extent must stay until a flush has covered it."""
        self.unsynced += 1
        if self.unsynced >= self.most_unsynced:
            for flush in self._flush:
                flush()

    def remove_unsynced(self, extent: Extent) -> None:
        """An extent needn't stay any longer, as far as flushes are concerned."""
        self.unsynced -= 1
        if not (extent.dirty or extent.writing):
            self.settle(extent)

    def _move(self, extent: Extent, queue: _Queue) -> None:
        if extent.queue is not None:
            del extent.queue[extent]
        extent.queue = queue
        queue[extent] = None

    # -- waiting ------------------------------------------------------------------------------------------------

    def notify(self) -> None:
        """Some extent may have become evictable: pins, filling or writing went down."""
        if self.wanted is not None:
            self.wanted.set()
            self.wanted = None

    async def wait_for_room(self) -> None:
        """Wait until ``allocate`` is worth another try.

        Whoever calls this holds no pin and no bit in any extent; everybody who does waits for nothing but device
        calls (invariant: no circle of waiters). No await lies between the failed allocation and the registration.
        """
        if self.wanted is None:
            self.wanted = trio.Event()
        event = self.wanted
        for pressure in (*self._pressure, *self._flush):
            pressure()
        await event.wait()
