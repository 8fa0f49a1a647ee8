"""How much the cache itself costs: microseconds per request against a disk that answers at once.

Not collected by pytest. Run: ``python tests/cache/bench_cache.py``.
"""

import sys
import time
from collections.abc import Awaitable, Callable

import trio

from iscsifuse.cache import BlockCache, BufferPool, CacheSettings

MIB = 1 << 20


class Instant:
    """A disk with nothing on it; `copy` makes reads cost what moving the bytes costs."""

    def __init__(self, *, size: int, block_length: int = 512, copy: bool = False) -> None:
        self.block_length = block_length
        self.block_count = size // block_length
        self.write_burst = 1 << 20
        self.latency = 0.0
        self.volatile = False
        self._source = bytes(MIB) if copy else b""
        self.commands = 0

    async def read_into(self, buffer: memoryview, *, lba: int) -> None:  # noqa: ARG002
        self.commands += 1
        if self._source:
            buffer[:] = memoryview(self._source)[: len(buffer)]
            await trio.lowlevel.checkpoint()

    async def write(self, buffer: memoryview, *, lba: int, fua: bool = False) -> None:  # noqa: ARG002
        self.commands += 1
        await trio.lowlevel.checkpoint()

    async def flush(self) -> None:
        pass


Setup = Callable[[BlockCache], Awaitable[int]]


async def measure(
    name: str, setup: Setup, *, read_ahead: int = 0, pool: int = 64 * MIB, copy: bool = False, block: int = 512
) -> None:
    best = 0.0
    count = 0
    for _ in range(3):
        device = Instant(size=1 << 30, copy=copy, block_length=block)
        cache = BlockCache(
            device, pool=BufferPool(pool), settings=CacheSettings(read_ahead=read_ahead, max_dirty=pool // 2)
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            started = time.perf_counter()
            count = await setup(cache)
            spent = time.perf_counter() - started
            await cache.drain()
            nursery.cancel_scope.cancel()
        best = min(best or spent, spent)
    sys.stdout.write(f"{name:44} {best / count * 1e6:9.2f} µs   ({device.commands} commands)\n")


async def hits(cache: BlockCache) -> int:
    for offset in range(0, 16 * MIB, 262144):
        await cache.read(offset, 262144)
    for _ in range(5):
        for offset in range(0, 16 * MIB, 4096):
            await cache.read(offset, 4096)
    return 5 * 4096


async def span_hits(cache: BlockCache) -> int:
    for offset in range(0, 16 * MIB, MIB):
        await cache.read(offset, MIB)
    for _ in range(50):
        for offset in range(0, 16 * MIB, MIB):
            await cache.read(offset, MIB)
    return 16 * 51


async def misses_in_extents(cache: BlockCache) -> int:
    for offset in range(0, 64 * MIB, 4096):
        await cache.read(offset, 4096)
    return 64 * MIB // 4096


async def misses_at_random(cache: BlockCache) -> int:
    size = 1 << 30
    count = 20000
    offset = 0
    for _ in range(count):
        offset = (offset + 611 * MIB + 4096 * 7919) % size
        await cache.read(offset & ~4095, 4096)
    return count


def sequential(length: int, *, total: int = 512 * MIB, yields: bool = True) -> Setup:
    async def setup(cache: BlockCache) -> int:
        for offset in range(0, total, length):
            await cache.read(offset, length)
            if yields:
                await trio.lowlevel.checkpoint()
        return total // length

    return setup


async def nothing(_cache: BlockCache) -> int:
    for _ in range(20000):
        await trio.lowlevel.checkpoint()
    return 20000


def writes(length: int) -> Setup:
    async def setup(cache: BlockCache) -> int:
        data = bytes(length)
        total = 128 * MIB
        for offset in range(0, total, length):
            await cache.write(offset, data)
            await trio.lowlevel.checkpoint()
        return total // length

    return setup


async def main() -> None:
    await measure("a trio checkpoint, for comparison", nothing)
    await measure("4 KiB hit", hits)
    await measure("4 KiB hit, read-ahead on", hits, read_ahead=8 * MIB)
    await measure("1 MiB hit, 4 extents", span_hits)
    await measure("4 KiB miss, extent present", misses_in_extents)
    await measure("4 KiB miss, random, evicting", misses_at_random)
    await measure("4 KiB miss, random, evicting, read-ahead on", misses_at_random, read_ahead=8 * MIB)
    await measure("1 MiB sequential read, no read-ahead", sequential(MIB))
    await measure("1 MiB sequential read, read-ahead", sequential(MIB), read_ahead=8 * MIB)
    await measure("128 KiB sequential read, read-ahead", sequential(131072), read_ahead=8 * MIB)
    await measure("1 MiB sequential read, read-ahead, copying", sequential(MIB), read_ahead=8 * MIB, copy=True)
    await measure(
        "1 MiB sequential, 520 byte blocks, copying", sequential(MIB), read_ahead=8 * MIB, copy=True, block=520
    )
    await measure("4 KiB sequential buffered write", writes(4096))
    await measure("1 MiB sequential buffered write", writes(MIB))


if __name__ == "__main__":
    trio.run(main)
