"""What programs have open, and who of them goes through the kernel's page cache.

**Past the page cache.** A program that opens a disk only to write to it (``dd of=``, ``cp``, ``cat >``) has no use
for copies of what it wrote. Where the kernel makes none, that takes less time, and what others have read stays in
memory. So such a file is opened with FOPEN_DIRECT_IO, as all files are in a mount with ``direct_io``; but what
arrives here is cached and written behind as ever.

The kernel keeps its copies right for those who use them, and doesn't look at those who don't: a page that is read
while somebody writes past it may stay old for good. Hence the invariant: **nobody goes through the page cache of a
disk while somebody may write past it.** A writer goes past it if nobody goes through; who comes while he is there
goes past it, too, whatever for. Such a file can be mapped privately, not shared (mmap(2): ENODEV), and pages get into
the page cache by that, or by readahead(2): so the next one who goes through it has it dropped first.

Only near by: what was written far away is worth its copy. And only where writes are acknowledged from memory: what
the kernel tears on this way has to wait for its other half (`iscsifuse.mount.seam`).

Source: fs/fuse/file.c of Linux (fuse_open, fuse_direct_io, fuse_file_mmap).
"""

import errno
import os
import re
from collections.abc import Awaitable, Callable
from typing import NoReturn

from pyfuse3 import FUSEError

from iscsifuse.cache import BlockFile, Buffer, Handle
from iscsifuse.mount.seam import Seam

__all__ = ["DiskUse", "OpenDisk", "OpenFile", "OpenStatus", "Refusing"]

_PAGE = 4096
_DROPS_SINCE = (6, 6)
"""Linux that drops the pages of a range that is written past the page cache; before, all have to be dropped first."""


def _kernel_drops_pages(release: str) -> bool:
    version = re.match(r"(\d+)\.(\d+)", release)
    return version is not None and (int(version[1]), int(version[2])) >= _DROPS_SINCE


class OpenDisk:
    """A disk that a program has opened.

    Attributes:
        peek, read, write: the file's own, with nothing in between; or what goes past the page cache.
        use: of the disk, by all.
        size: bytes that it had when it was opened; the most that it ever had, where all share it.
        writable: whether it may be written to.
        direct: whether it was opened with O_DIRECT.
        past: whether it goes past the kernel's page cache.
        keep_cache: whether what is in there may stay, now that it was opened.
    """

    __slots__ = (
        "direct", "file", "handle", "keep_cache", "past", "peek", "read", "size", "use", "writable", "write"
    )  # fmt: skip

    def __init__(self, use: "DiskUse", *, writable: bool, direct: bool, past: bool, keep_cache: bool) -> None:
        self.use = use
        self.file = file = use.file
        sews = past and use.page_cache  # with ``direct_io`` nothing waits
        self.peek: Callable[[int, int], Buffer | None] = use.peek if sews else file.peek
        self.read: Callable[[int, int], Awaitable[Buffer]] = use.read if sews else file.read
        self.write: Callable[[int, bytes], Awaitable[int]] = use.seam.write if sews else file.write
        self.handle: Handle = file.open()
        self.size = file.size
        self.writable = writable
        self.direct = direct
        self.past = past
        self.keep_cache = keep_cache

    def may_end(self, at: int, *, wanted: int) -> bool:
        """Whether a read of the bytes before ``wanted`` may have ended before ``at``.

        Only at the end of the disk; and not at the end of one that has shrunk since it was opened, but for the rest
        of a page, which the kernel asks for with its first bytes.
        """
        return at >= self.file.size and (at >= self.size or wanted <= -(-at // _PAGE) * _PAGE)


class DiskUse:
    """One disk, as all use it who have it open.

    Args:
        file: the disk.
        page_cache: whether the kernel may cache anything of it.
        release: the kernel's (``uname -r``).

    Attributes:
        file, page_cache: as given.
        seam: for those who write past the page cache.
        written: how many writes it has had.
        synced: how many of them a successful fsync has covered.
    """

    def __init__(self, file: BlockFile, *, page_cache: bool, release: str | None = None) -> None:
        self.file = file
        self.seam = Seam(file)
        self.written = self.synced = 0
        self.page_cache = page_cache
        self._drops_pages = _kernel_drops_pages(os.uname().release if release is None else release)
        self._through = 0  # go through the page cache
        self._past = 0  # go past it, and may write
        self._is_old = False  # there may be pages in it that are older than the disk

    def open(self, flags: int) -> OpenDisk:
        """One more; `close` is to be called for it.

        Args:
            flags: of open(2).
        """
        access = flags & os.O_ACCMODE
        direct = bool(flags & os.O_DIRECT)
        past, keep_cache = True, False
        if not self.page_cache:
            direct = False  # the kernel passes on what such a file answers, be it short
        elif self._past:
            self._is_old = True
        elif access == os.O_WRONLY and not direct and not self._through and self._is_worth_it():
            keep_cache = self._drops_pages
        else:
            past, keep_cache, self._is_old = False, not self._is_old, False
        opened = OpenDisk(self, writable=access != os.O_RDONLY, direct=direct, past=past, keep_cache=keep_cache)
        self._count(opened, 1)
        return opened

    def close(self, opened: OpenDisk) -> None:
        """One less."""
        self._count(opened, -1)

    def _count(self, opened: OpenDisk, step: int) -> None:
        if not opened.past:
            self._through += step
        elif opened.writable:
            self._past += step

    def _is_worth_it(self) -> bool:
        return self.file.writes_behind and self.file.is_near

    # -- past the page cache ----------------------------------------------------------------------------------------

    def peek(self, offset: int, size: int) -> Buffer | None:
        """See ``BlockFile.peek``."""
        return None if self.seam.is_open else self.file.peek(offset, size)

    async def read(self, offset: int, size: int) -> Buffer:
        """See ``BlockFile.read``."""
        await self.seam.close()
        return await self.file.read(offset, size)

    async def drain(self, handle: Handle) -> None:
        """See ``BlockFile.drain``."""
        await self.seam.close()
        await self.file.drain(handle)

    async def sync(self, handle: Handle) -> None:
        """See ``BlockFile.sync``."""
        covered = self.written
        await self.seam.close()
        await self.file.sync(handle)
        self.synced = max(self.synced, covered)


class OpenStatus:
    """The status file as it was when a program opened it."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def peek(self, offset: int, size: int) -> Buffer | None:
        """Part of it, at once, fewer bytes only at its end."""
        return self._data[offset : offset + size]

    async def read(self, offset: int, size: int) -> Buffer:
        """See `peek`."""
        return self._data[offset : offset + size]

    def may_end(self, at: int, *, wanted: int) -> bool:  # noqa: ARG002 - a disk's
        """Whether a read may have ended before ``at``."""
        return at >= len(self._data)


OpenFile = OpenDisk | OpenStatus


class Refusing(dict[int, OpenFile]):
    """What is open, where nothing is to be read any more."""

    def __missing__(self, fh: int) -> NoReturn:
        raise FUSEError(errno.EIO)
