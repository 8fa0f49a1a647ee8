"""What a disk has accepted and may still lose: blocks that were written, and that no flush has covered yet.

A write is acknowledged once the disk has given its status, but a disk with a volatile cache loses it with its power.
So blocks stay in memory until a flush that began after their status has succeeded; if the disk says meanwhile that it
was reset (UNIT ATTENTION 29h), they are written again. It is what NFS clients do with unstable writes.

::

    written ──add──> unsynced ──a flush begins──> unsynced, flushing ──it succeeds──> forgotten
                        │ ^                              │  │
                        │ └──────────it fails────────────┘  │
                        └──the disk lost it (take)──────────┴──> dirty again
                        └──the block is written anew (forget)──> nothing: the newer content counts

A block whose newer write failed is in nobody's memory any more, while what the disk has of it isn't covered by a
flush. If the disk is reset before the next one, content may come back that is older than what was once acknowledged.
Which blocks these are isn't kept, only that there are such *orphans*; the loss is told as an error then, and all that
is clean in memory is dropped, since it may be what the disk had before.

Memory is bounded: beyond `BufferPool.most_unsynced` extents, and whenever somebody waits for a slot, the caches flush
on their own (`BlockCache`). A flush that fails while somebody waits gives up what it should have covered: every open
handle is told of it (see ``errseq``), and memory is not held for a disk that can't be flushed.
"""

from collections.abc import Iterator

from iscsifuse.cache.extent import Extent
from iscsifuse.cache.pool import BufferPool

__all__ = ["Unsynced"]


class Unsynced:
    """The blocks of one LUN that a flush has yet to cover.

    Attributes:
        extents: those that hold such blocks.
        orphans: there are new ones since the last flush began; see ``has_orphans``.
    """

    def __init__(self, pool: BufferPool) -> None:
        self.extents: dict[Extent, None] = {}
        self.orphans = False
        self._orphans_covered = False
        self._pool = pool

    @property
    def has_orphans(self) -> bool:
        """Whether there are blocks that the disk may lose and that nobody would write again."""
        return self.orphans or self._orphans_covered

    def add(self, extent: Extent, blocks: int) -> None:
        """Some valid blocks have reached the disk."""
        if not extent.unsynced:
            self.extents[extent] = None
            self._pool.add_unsynced()
        extent.unsynced |= blocks

    def forget(self, extent: Extent, blocks: int) -> None:
        """Some blocks are being written anew, or aren't valid any more."""
        if extent.unsynced:
            extent.flushing &= ~blocks
            extent.unsynced &= ~blocks
            if not extent.unsynced:
                self._drop(extent)

    def begin(self) -> None:
        """A flush begins: it covers what is here now. There is one at a time."""
        self._orphans_covered = self.orphans
        self.orphans = False
        for extent in self.extents:
            extent.flushing = extent.unsynced

    def end(self, *, well: bool, give_up: bool) -> None:
        """That flush has ended.

        Args:
            well: it covers what it should.
            give_up: if it doesn't, don't keep that any longer.
        """
        give_up = give_up and not well
        self.orphans |= give_up or (self._orphans_covered and not well)
        self._orphans_covered = False
        for extent in list(self.extents):
            covered, extent.flushing = extent.flushing, 0
            if well or give_up:
                extent.unsynced &= ~covered
                if not extent.unsynced:
                    self._drop(extent)

    def take(self) -> Iterator[tuple[Extent, int]]:
        """The disk has lost what is here, maybe: hand it over, extent by extent, and forget it.

        The caller has looked at ``orphans`` before, which are forgotten, too.
        """
        self.orphans = self._orphans_covered = False
        for extent in list(self.extents):
            blocks = extent.unsynced
            extent.unsynced = extent.flushing = 0
            self._drop(extent)
            yield extent, blocks

    def _drop(self, extent: Extent) -> None:
        del self.extents[extent]
        self._pool.remove_unsynced(extent)
