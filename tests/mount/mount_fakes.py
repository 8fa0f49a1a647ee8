"""A file that is a list of bytes, for tests of what stands on it."""

# ruff: noqa: ARG002 - the signatures are the protocol's

from collections.abc import Callable

import trio

from iscsifuse.cache import BlockFile, Buffer, CacheStats


class MemoryDevice:
    """A disk of 512 byte blocks."""

    def __init__(self, size: int) -> None:
        self.block_length = 512
        self.write_burst = 1 << 18
        self.latency = 0.0
        self.volatile = False
        self.data = bytearray(size)
        self.flushes = 0
        self.flush_error: Exception | None = None

    @property
    def block_count(self) -> int:
        return len(self.data) // 512

    async def read_into(self, buffer: memoryview, *, lba: int) -> None:
        raise AssertionError("not used")

    async def write(self, buffer: memoryview, *, lba: int, fua: bool = False) -> None:
        raise AssertionError("not used")

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.flush_error is not None:
            raise self.flush_error
        self.flushes += 1


class MemoryFile(BlockFile):
    """A file in memory.

    ``error`` is raised by reads and writes; ``answer`` replaces what a read returns; a write waits for ``hold``.
    """

    def __init__(self, size: int = 4096) -> None:
        self.device = MemoryDevice(size)
        super().__init__(self.device)
        self.error: BaseException | None = None
        self.answer: Callable[[bytes], bytes] = bytes
        self.hold: trio.Event | None = None
        self.drains = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    async def read(self, offset: int, length: int) -> Buffer:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return self.answer(bytes(self.device.data[offset : offset + length]))

    async def write(self, offset: int, data: Buffer) -> int:
        await trio.lowlevel.checkpoint()
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        count = min(len(data), self.size - offset)
        self.device.data[offset : offset + count] = bytes(data)[:count]
        return count

    def invalidate(self) -> None:
        raise AssertionError("not used")

    def stats(self) -> CacheStats:
        return CacheStats(hits=3, pool_bytes=1000, dirty_bytes=7, evictions=2)

    async def _drain(self) -> None:
        await trio.lowlevel.checkpoint()
        self.drains += 1
