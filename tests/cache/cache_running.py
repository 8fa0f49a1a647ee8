"""Caches that run, for tests, in extents of 4 KiB unless told otherwise."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing
from cache_checks import check_invariants, check_quiet
from cache_fakes import FakeDevice

from iscsifuse.cache import BlockCache, BufferPool, CacheSettings
from iscsifuse.errors import WriteBackError

EXTENT = 4096


def small_pool(slots: int) -> BufferPool:
    return BufferPool(slots * EXTENT, slot_size=EXTENT)


@asynccontextmanager
async def running(
    device: FakeDevice, *, slots: int = 16, pool: BufferPool | None = None, **settings: Any
) -> AsyncIterator[BlockCache]:
    """A cache with its background tasks; at the end it must be found at rest."""
    settings.setdefault("read_ahead", 0)
    pool = pool or small_pool(slots)
    cache = BlockCache(device, pool=pool, settings=CacheSettings(**settings))
    async with trio.open_nursery() as nursery:
        await nursery.start(cache.run)
        yield cache
        try:
            await cache.drain()
        except WriteBackError:
            await cache.drain()
        await trio.testing.wait_all_tasks_blocked()
        check_invariants(cache, pool)
        if not any(command.kind == "read" for command in device.in_flight):
            check_quiet(cache, pool)
        nursery.cancel_scope.cancel()
