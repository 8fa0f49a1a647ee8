"""What must be true of a cache at every checkpoint, and when nothing is going on."""

from iscsifuse.cache import BlockCache, BufferPool


def check_invariants(cache: BlockCache, pool: BufferPool) -> None:
    write_back = cache._write_back
    unclean = 0
    for index, extent in cache._extents.items():
        assert extent.index == index
        assert extent.home is cache._extents
        assert pool._owners[extent.slot] is extent
        assert extent.address == extent.slot * pool.slot_size
        assert not extent.dirty & ~extent.valid, "dirty, but not valid"
        assert not extent.writing & ~extent.valid, "writing, but not valid"
        assert not extent.dirty & extent.writing, "dirty and writing"
        assert not extent.filling & extent.valid, "filling and valid"
        assert not extent.unsynced & ~extent.valid, "unsynced, but not valid"
        assert not extent.unsynced & extent.writing, "unsynced and writing"
        assert not extent.flushing & ~extent.unsynced, "covered by a flush, but not unsynced"
        assert (extent in write_back.unsynced.extents) == bool(extent.unsynced)
        assert not (extent.valid | extent.filling) & ~extent.full or extent.full.bit_count() < cache._geometry.blocks
        assert extent.pins >= 0
        busy = bool(extent.dirty or extent.writing)
        assert (extent in write_back.unclean) == busy
        assert (extent in write_back._aging or extent in write_back._ready) == bool(extent.dirty)
        assert not (extent in write_back._aging and extent in write_back._ready)
        assert extent.queue is not None or busy or extent.unsynced, "an extent that nobody could ever evict"
        assert extent.queue is None or extent in extent.queue
        unclean += busy
    assert unclean == len(write_back.unclean)
    assert unclean <= max(write_back.limit, 1) or not cache._behind or write_back.losses
    check_pool(pool)


def check_pool(pool: BufferPool) -> None:
    queued = [extent for queue in (pool._ahead, pool._probation, pool._protected) for extent in queue]
    assert len(queued) == len(set(queued))
    assert all(pool._owners[extent.slot] is extent for extent in queued)
    free = [slot for slot, owner in enumerate(pool._owners) if owner is None]
    assert free == sorted(pool._free)
    assert len(pool._protected) <= pool._most_protected
    for owner in pool._owners:
        if owner is not None:
            assert owner.home[owner.index] is owner


def check_quiet(cache: BlockCache, pool: BufferPool) -> None:
    """Nobody is reading, writing, filling or draining: nothing may be left behind."""
    check_invariants(cache, pool)
    for extent in cache._extents.values():
        assert not extent.pins
        assert not extent.filling
        assert not extent.writing
        assert extent.event is None
        assert extent.fibres is None
    assert not cache._write_back._barriers
    assert pool.wanted is None
    assert cache._write_back._room is None
