"""What can be set about a cache, and what it can tell about itself."""

from dataclasses import dataclass

__all__ = ["CacheSettings", "CacheStats"]


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """How one LUN is cached.

    Attributes:
        read_ahead: largest read-ahead window of a sequential stream, in bytes; 0 for none. Never more than half of
            the pool, shared by the streams.
        write_behind: acknowledge writes from the buffer (True) or after the target's status (False).
        direct: cache nothing at all; the other settings mean nothing then.
        max_dirty: bytes of this LUN's extents that may hold unwritten data before writers wait; 0 for half of the
            pool. Whole extents are counted, however few of their blocks are dirty; at least one is granted.
        write_back_delay: seconds that a partly dirtied extent waits for more writes before it is written back.
        keep_strays: whether a small read of a place where nothing was read or written of late is cached at once
            (True), or only when somebody comes back to that place (False). Requests that lie all over a disk are not
            worth the room, and cost less when none is made for them.
        depth: write-back commands in flight at once, and likewise read-ahead commands; at least 1.
    """

    read_ahead: int = 8 << 20
    write_behind: bool = True
    direct: bool = False
    max_dirty: int = 0
    write_back_delay: float = 0.2
    keep_strays: bool = True
    depth: int = 64


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of one LUN since its mount, and its present state.

    Attributes:
        hits: read requests that were answered from memory, with no waiting.
        misses: read requests that had to wait for the device.
        uncached_reads: of the misses, those that were read past the cache (strays, no room, no luck with shared
            fills).
        fill_commands: device reads that a reader or a partial write waited for.
        fill_bytes: bytes of these.
        read_ahead_commands: device reads made ahead of a sequential reader.
        read_ahead_bytes: bytes of these that arrived.
        read_ahead_errors: of these commands, those that failed (their readers tried again).
        writes: write requests.
        write_back_commands: device writes, write-through ones included.
        write_back_bytes: bytes of these.
        write_back_errors: of these commands, those that failed.
        flushes: calls of the device's flush.
        dirty_bytes: acknowledged and not yet on the device, now.
        unsynced_bytes: on the device, and not yet covered by a flush, now: kept to be written again if the device
            loses it.
        losses: how often the device may have lost such bytes.
        cached_bytes: valid bytes of this LUN in the pool, now.
        pool_bytes: size of the pool, which all LUNs of a mount share.
        evictions: extents that were thrown out of the pool, all LUNs together.
    """

    hits: int = 0
    misses: int = 0
    uncached_reads: int = 0
    fill_commands: int = 0
    fill_bytes: int = 0
    read_ahead_commands: int = 0
    read_ahead_bytes: int = 0
    read_ahead_errors: int = 0
    writes: int = 0
    write_back_commands: int = 0
    write_back_bytes: int = 0
    write_back_errors: int = 0
    flushes: int = 0
    dirty_bytes: int = 0
    unsynced_bytes: int = 0
    losses: int = 0
    cached_bytes: int = 0
    pool_bytes: int = 0
    evictions: int = 0
