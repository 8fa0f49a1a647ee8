"""A LUN with no cache: every read and write is the device's.

Requests of any offset and length are rounded to blocks here. A write that covers a block in part reads the block
first; so that two of them can't undo each other, every write holds an exclusive range of blocks, first come first
served. Reads hold nothing: one that runs together with a write sees each block before or after it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from iscsifuse.cache.device import BlockDevice, EndOfDeviceError
from iscsifuse.cache.file import BlockFile, Buffer
from iscsifuse.cache.rangelock import RangeLock, Ticket
from iscsifuse.cache.settings import CacheStats
from iscsifuse.errors import WriteBackError
from iscsifuse.fibres import own_task

__all__ = ["DirectFile"]


class DirectFile(BlockFile):
    """A device as a file, with nothing in between but the rounding."""

    def __init__(self, device: BlockDevice) -> None:
        super().__init__(device)
        self._lock = RangeLock()
        self._waiting: dict[Ticket, trio.Event] = {}
        self._reads = self._read_bytes = self._writes = 0
        self._commands = self._written = self._failures = 0
        self._unsynced = self._covered = 0  # bytes that no flush has covered; of these, what the present one will

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Nothing is done in the background."""
        task_status.started()
        await trio.sleep_forever()

    async def read(self, offset: int, length: int) -> Buffer:
        """See ``BlockFile.read``; the result belongs to the caller."""
        stop = min(offset + length, self.size)
        if offset >= stop:
            return b""
        block = self._block_length
        first = offset // block
        buffer = memoryview(bytearray((-(-stop // block) - first) * block))
        self._reads += 1
        await self._device.read_into(buffer, lba=first)
        self._read_bytes += len(buffer)
        return buffer[offset - first * block : stop - first * block]

    async def write(self, offset: int, data: Buffer) -> int:
        """See ``BlockFile.write``; returns after the device's status."""
        if not data:
            return 0
        size = self.size
        if offset >= size:
            raise EndOfDeviceError(f"a write at byte {offset} begins beyond the end of the disk ({size} bytes)")
        block = self._block_length
        length = min(len(data), size - offset)
        first, head = divmod(offset, block)
        last = -(-(offset + length) // block)
        self._writes += 1
        async with self._hold(first, last):
            if head or (offset + length) % block:
                buffer = memoryview(bytearray((last - first) * block))
                if head:
                    await self._device.read_into(buffer[:block], lba=first)
                if (offset + length) % block and (last - first > 1 or not head):
                    await self._device.read_into(buffer[-block:], lba=last - 1)
                buffer[head : head + length] = memoryview(data)[:length]
            else:
                buffer = memoryview(data)[:length]
            self._commands += 1
            losses = self._losses
            try:
                await self._device.write(buffer, lba=first)
            except Exception:
                self._failures += 1
                raise
            self._written += len(buffer)
            if self._device.volatile:
                self._unsynced += len(buffer)
                if losses != self._losses:
                    self._lose()
        return length

    def invalidate(self) -> None:
        """Nothing is kept."""

    def _lose(self) -> None:
        if self._unsynced:
            lost, self._unsynced, self._covered = self._unsynced, 0, 0
            self.report(
                WriteBackError(f"the disk was reset: {lost} bytes that were written and not flushed may be lost")
            )

    def _flush_begins(self) -> None:
        self._covered = self._unsynced

    def _flush_ends(self, *, well: bool) -> None:
        if well:
            self._unsynced -= self._covered
        self._covered = 0

    def stats(self) -> CacheStats:
        """Counters; everything is a miss."""
        return CacheStats(
            misses=self._reads,
            uncached_reads=self._reads,
            fill_commands=self._reads,
            fill_bytes=self._read_bytes,
            writes=self._writes,
            write_back_commands=self._commands,
            write_back_bytes=self._written,
            write_back_errors=self._failures,
            unsynced_bytes=self._unsynced,
            losses=self._losses,
            flushes=self._flushes,
        )

    async def _drain(self) -> None:
        pass  # A write that has returned is on the device.

    @asynccontextmanager
    async def _hold(self, first: int, stop: int) -> AsyncIterator[None]:
        ticket = self._lock.request(first, stop)
        try:
            if not ticket.held:
                # No await between the request and this registration: the release that grants it finds it.
                event = self._waiting[ticket] = trio.Event()
                try:
                    await own_task()
                    await event.wait()
                finally:
                    del self._waiting[ticket]
            yield
        finally:
            for granted in self._lock.release(ticket):
                self._waiting[granted].set()
