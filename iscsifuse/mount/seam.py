"""Writes that the kernel tears within a block, sewn together again.

Past the page cache a request has as many bytes as 256 pages of the program's memory hold. A write(2) of more than a
MiB, from memory that doesn't begin with a page, is torn somewhere within a block (and a mebibyte of a Python program
is like that). To read the other half of that block from the disk before it can be written would cost a round trip for
each MiB; and where that block can't be read, overwriting it would fail, though all of it is on its way.

So the last bytes of such a request, less than a block, wait for the next one, which follows at once and begins
with the rest. If it doesn't (the program was killed in between, or has no more memory there), they are written by
themselves: before any other write, before a read past the page cache, at close(2) and fsync(2).

Invariants: what waits was acknowledged, and is forgotten only when it has been written, or when that has failed and
whoever drains or syncs next will hear of it. Nothing newer is written while it is being written.
"""

import trio

from iscsifuse.cache import BlockFile, Buffer
from iscsifuse.fibres import own_task

__all__ = ["Seam"]

_LONGEST_REQUEST = 1 << 20
"""Bytes of a request at most: 256 pages."""
_PAGE = 4096


class Seam:
    """The writes of one disk that come past the page cache. The kernel lets them come one by one.

    Args:
        file: the disk.
    """

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self._offset = 0
        self._thread = b""  # what waits, and begins there
        self._sewing = trio.Lock()

    @property
    def is_open(self) -> bool:
        """Whether something waits, or is just being written by itself."""
        return bool(self._thread) or self._sewing.locked()

    async def write(self, offset: int, data: bytes) -> int:
        """See ``BlockFile.write``."""
        if self.is_open and (self._sewing.locked() or offset != self._offset + len(self._thread)):
            await self.close()
        return await (self._continue(data) if self._thread else self._write(offset, data))

    async def _continue(self, data: bytes) -> int:
        before, self._thread = self._thread, b""
        offset = self._offset
        try:
            written = await self._write(offset, before + data)
        except BaseException:
            self._offset, self._thread = offset, before
            raise
        return max(0, written - len(before))

    async def _write(self, offset: int, data: Buffer) -> int:
        length = len(data)
        loose = (offset + length) % self._file.block_length
        if not loose or length <= _LONGEST_REQUEST - _PAGE or offset + length > self._file.size:
            return await self._file.write(offset, data)
        whole = length - loose
        written = await self._file.write(offset, memoryview(data)[:whole])
        if written < whole:
            return written
        self._offset, self._thread = offset + whole, bytes(data[whole:])
        return length

    async def close(self) -> None:
        """Write what waits by itself. If that fails, it is an error of the next ``drain`` or ``sync`` of each handle.

        Cancellation: it waits on.
        """
        if not self.is_open:
            return
        await own_task()
        async with self._sewing:
            thread, self._thread = self._thread, b""
            if not thread:
                return
            try:
                await self._file.write(self._offset, thread)
            except Exception as error:
                self._file.report(error)
            except BaseException:
                self._thread = thread
                raise
