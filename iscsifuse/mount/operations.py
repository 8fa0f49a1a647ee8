"""What the kernel asks for, and the answers: pyfuse3's operations on a ``Tree``.

The hot path is ``read`` and ``write``: one dictionary look-up, one await of the file's own method, and the buffer
goes back to pyfuse3, which copies it to the kernel before anything else runs (that is why a slice of the cache may be
handed out).

Invariants:

* A read is answered with exactly the bytes that were asked for, or with an error; fewer only at the end of the disk.
  A short answer in mid-file would make the kernel believe that the file has shrunk.
* Nothing but ``FUSEError`` leaves an operation (``translate``).
* A disk that shrank ends with an error for who opened it before; an end of file would make half a copy look whole.
* The size of a disk is what its file says at this moment. Truncation, O_TRUNC and growth don't exist: a disk has the
  size it has.
* ``getxattr`` is answered with ENOSYS, once, which means "never again". The kernel would otherwise ask for
  security.capability before *every* write(2), at twice the cost of a small write.
* So is ``flush`` in a mount that is read-only as a whole: no close(2) has anything to wait for or to report there.
  Nowhere else, for the same answer would then hide what a write-behind has lost.
* And ``open``, where such a mount is a single file: there is one disk to be read, whoever opened it how often, and
  the kernel neither asks nor tells about it (its handle is 0 then). That is most of what a program costs that opens
  a disk several times to look at one file of it, as Sleuth Kit's do. Not in a directory, where a handle says which
  disk is meant.
"""

# ruff: noqa: ARG002 - the signatures are pyfuse3's

import errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from iscsifuse.cache import BlockFile, Buffer, Handle
from iscsifuse.fibres import own_task
from iscsifuse.mount.translate import fuse_error, never_enosys, translated
from iscsifuse.mount.tree import Disk, Node, NodeKind, Tree

__all__ = ["DiskOperations"]

ATTRIBUTES_LAST = 3600.0
"""Seconds that the kernel may keep names and attributes. A size that changes is told to it."""
NO_SUCH_NAME_LASTS = 1.0
"""Seconds that the kernel may remember that there is no such name. Some programs look for a companion of a disk image
whenever they start (Sleuth Kit: ``<image>-yaffs2.config``)."""
_BLOCK_SIZE = 4096
"""``st_blksize`` and ``f_bsize``. The same for every disk: the kernel's page cache works with it."""
_SECTOR = 512
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR
_NAME_MAX = 255
_NO_HANDLE = FileHandleT(0)
"""Of files that were never opened."""


class _Writes:
    """How many writes of a disk have ended, and how many of them a successful fsync has covered."""

    __slots__ = ("count", "synced")

    def __init__(self) -> None:
        self.count = self.synced = 0

    async def sync(self, file: BlockFile, handle: Handle) -> None:
        """``BlockFile.sync``, which covers what has ended by now."""
        covered = self.count
        await file.sync(handle)
        self.synced = max(self.synced, covered)


class _OpenDisk:
    """A disk that a program has opened.

    Attributes:
        peek, read: the file's own, with nothing in between.
        durable: whether each write is to be followed by a sync of ours. For O_SYNC and O_DSYNC the kernel asks for
            one, but not where nothing is cached, nor for asynchronous writes with O_DIRECT (fs/fuse/file.c of Linux:
            fuse_direct_write_iter, fuse_aio_complete).
        size: bytes that it had when it was opened; the most that it ever had, where all share it.
    """

    __slots__ = ("direct", "durable", "file", "handle", "peek", "read", "size", "writable", "writes")

    def __init__(
        self, file: BlockFile, writes: _Writes, *, writable: bool, direct: bool, durable: bool = False
    ) -> None:
        self.file = file
        self.peek = file.peek
        self.read = file.read
        self.writes = writes
        self.handle: Handle = file.open()
        self.writable = writable
        self.direct = direct
        self.durable = durable
        self.size = file.size

    def may_end(self, at: int, *, wanted: int) -> bool:
        """Whether a read of the bytes before ``wanted`` may have ended before ``at``.

        Only at the end of the disk; and not at the end of one that has shrunk since it was opened, but for the rest
        of a page, which the kernel asks for with its first bytes.
        """
        return at >= self.file.size and (at >= self.size or wanted <= -(-at // _BLOCK_SIZE) * _BLOCK_SIZE)


class _OpenStatus:
    """The status file as it was when a program opened it."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def peek(self, offset: int, size: int) -> Buffer | None:
        return self._data[offset : offset + size]

    async def read(self, offset: int, size: int) -> Buffer:
        return self._data[offset : offset + size]

    def may_end(self, at: int, *, wanted: int) -> bool:
        return at >= len(self._data)


_Open = TypeVar("_Open")


class _Refusing(dict[int, _Open]):
    """What is open, where nothing is to be read or written any more."""

    def __missing__(self, fh: int) -> NoReturn:
        raise FUSEError(errno.EIO)


class DiskOperations(pyfuse3.Operations):
    """The file system.

    Args:
        tree: names and inodes.
        status: makes the content of the status file.
        read_only: no file may be written to.
        direct_io: the kernel is to cache nothing.

    Attributes:
        connected: set once the kernel has shaken hands: the mount is usable from then on.
        closing: no more files can be opened, since the daemon is about to end.
        moved: reads and writes so far.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False  # It would lose write errors, and let O_TRUNC change the size.

    def __init__(self, tree: Tree, *, status: Callable[[], bytes], read_only: bool, direct_io: bool) -> None:
        super().__init__()
        self.connected = trio.Event()
        self.closing = False
        self.moved = 0
        self._tree = tree
        self._status = status
        self._read_only = read_only
        self._direct_io = direct_io
        self._next = 1
        self._disks: dict[int, _OpenDisk] = {}
        self._writes: dict[Disk, _Writes] = {}
        self._readable: dict[int, _OpenDisk | _OpenStatus] = {}
        self._listings: dict[int, list[Node]] = {}
        self._shared: _OpenDisk | None = None
        if tree.root.disk is not None and read_only and not direct_io:
            self._shared = _OpenDisk(tree.root.disk.file, _Writes(), writable=False, direct=False)
            self._readable[_NO_HANDLE] = self._shared

    def unsynced(self) -> list[Disk]:
        """The disks that were written to since their last successful fsync."""
        return [disk for disk, writes in self._writes.items() if writes.count != writes.synced]

    async def sync(self, disk: Disk, handle: Handle) -> None:
        """fsync(2) for who has a handle of a disk that was written to, and no descriptor.

        Raises:
            WriteBackError: see ``BlockFile.sync``.
        """
        await self._writes[disk].sync(disk.file, handle)

    def init(self) -> None:
        """Called by pyfuse3 when the kernel has connected."""
        self.connected.set()

    # -- names and attributes ---------------------------------------------------------------------------------------

    @translated
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        """A name in a directory."""
        node = self._tree.lookup(parent_inode, name)
        if node is None:
            nothing = EntryAttributes()
            nothing.st_ino = InodeT(0)
            nothing.entry_timeout = NO_SUCH_NAME_LASTS
            return nothing
        return self._attributes(node)

    @translated
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """stat(2)."""
        return self._attributes(self._node(inode))

    @translated
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Truncation and times: accepted, and nothing changes. Modes and owners: only what they are already."""
        node = self._node(inode)
        permissions = self._tree.permissions
        if (
            (fields.update_mode and stat.S_IMODE(attr.st_mode) != stat.S_IMODE(node.mode))
            or (fields.update_uid and attr.st_uid != permissions.uid)
            or (fields.update_gid and attr.st_gid != permissions.gid)
        ):
            raise FUSEError(errno.EPERM)
        return self._attributes(node)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """The kernel forgets inodes; the tree doesn't."""

    @translated
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """A file system that is full: the disks, and no room for anything else."""
        data = StatvfsData()
        data.f_bsize = _BLOCK_SIZE
        data.f_frsize = _SECTOR
        data.f_blocks = self._tree.size // _SECTOR
        data.f_files = sum(1 for _ in self._tree.nodes())
        data.f_namemax = _NAME_MAX
        return data

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        """No extended attributes, and no further questions (see the module)."""
        raise FUSEError(errno.ENOSYS)

    # -- directories ------------------------------------------------------------------------------------------------

    @translated
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        """Open a directory: what it lists is fixed now."""
        node = self._node(inode)
        if node.kind is not NodeKind.DIRECTORY:
            raise FUSEError(errno.ENOTDIR)
        number = self._number()
        self._listings[number] = list(node.listing())
        return FileHandleT(number)

    @translated
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """List a directory, from the entry that follows ``start_id``."""
        for position, node in enumerate(self._listings[fh][start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, FileNameT(node.name.encode()), self._attributes(node), position):
                return

    @translated
    async def releasedir(self, fh: FileHandleT) -> None:
        """Close a directory."""
        self._listings.pop(fh, None)

    # -- files ------------------------------------------------------------------------------------------------------

    @translated
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        """Open a file. O_TRUNC is passed over."""
        node = self._node(inode)
        if self.closing:
            raise FUSEError(errno.ESHUTDOWN)
        if node.kind is NodeKind.DIRECTORY:
            raise FUSEError(errno.EISDIR)
        writable = bool(flags & _WRITE_FLAGS)
        disk = node.disk
        if disk is None:
            if writable:
                raise FUSEError(errno.EACCES)
            number = self._number()
            self._readable[number] = _OpenStatus(self._status())
            return FileInfo(fh=FileHandleT(number), direct_io=True, keep_cache=False)
        if writable and (self._read_only or not disk.writable):
            raise FUSEError(errno.EROFS)
        if self._shared is not None:
            raise FUSEError(errno.ENOSYS)  # once for the whole mount; see the module
        number = self._number()
        direct = bool(flags & os.O_DIRECT) and not self._direct_io
        self._readable[number] = self._disks[number] = _OpenDisk(
            disk.file,
            self._writes.setdefault(disk, _Writes()),
            writable=writable,
            direct=direct,
            durable=bool(flags & (os.O_SYNC | os.O_DSYNC)) and (self._direct_io or direct),
        )
        return FileInfo(fh=FileHandleT(number), direct_io=self._direct_io, keep_cache=not self._direct_io)

    async def read(self, fh: FileHandleT, off: int, size: int) -> Buffer:  # type: ignore[override]
        """Read. Any buffer will do for pyfuse3, whatever its type says."""
        # What ``translated`` does, without its step in between: this is the hottest of all.
        self.moved += 1
        try:
            opened = self._readable[fh]
            data = opened.peek(off, size)
            if data is None:
                data = await opened.read(off, size)
                if len(data) != size and not opened.may_end(off + len(data), wanted=off + size):
                    # The disk may have grown meanwhile: the answer was cut where its end was when the read began.
                    data = await opened.read(off, size)
                    if len(data) != size and not opened.may_end(off + len(data), wanted=off + size):
                        raise FUSEError(errno.EIO)
            return data
        except (Exception, BaseExceptionGroup) as error:
            raise fuse_error("read", error) from None
        except trio.Cancelled:
            # The mount is ending. Unanswered, the read would hold its page, and who waits for that, a little longer.
            raise FUSEError(errno.EIO) from None

    def refuse_all(self) -> None:
        """From now on every open, read, write and fsync is an error."""
        self.closing = True
        self._readable = _Refusing()
        self._disks = _Refusing()

    def _disk(self, fh: int) -> _OpenDisk | None:
        try:
            return self._disks[fh]
        except KeyError:
            return None  # the status file

    @translated
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """Write; cut at the end of the disk, and ENOSPC beyond it."""
        self.moved += 1
        opened = self._disks[fh]
        file = opened.file
        if off >= file.size and buf:
            raise FUSEError(errno.ENOSPC)
        try:
            written = await file.write(off, buf)
        finally:
            opened.writes.count += 1  # Only now: a sync that ended meanwhile may have missed it.
        if opened.durable:
            await self._sync(opened)
        if written < len(buf) and opened.direct:
            # The kernel makes an EIO of a short write with O_DIRECT; this says what it is.
            raise FUSEError(errno.ENOSPC)
        return written

    async def flush(self, fh: FileHandleT) -> None:
        """close(2): wait until everything is written, and tell what failed; an fsync tells that once more."""
        if self._read_only:
            raise FUSEError(errno.ENOSYS)  # once for the whole mount; see the module
        await self._flush(fh)

    @never_enosys
    async def _flush(self, fh: FileHandleT) -> None:
        opened = self._disk(fh)
        if opened is not None and opened.writable:
            await own_task()
            await opened.file.drain(opened.handle)

    @never_enosys
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """Everything that was written is on stable storage, or this is an error."""
        opened = self._disk(fh)
        if opened is not None and not self._read_only:
            await self._sync(opened)

    async def _sync(self, opened: _OpenDisk) -> None:
        await own_task()
        await opened.writes.sync(opened.file, opened.handle)

    @translated
    async def release(self, fh: FileHandleT) -> None:
        """The last file descriptor of an open file is closed. Awaits nothing, so it can't leave anything behind."""
        self._readable.pop(fh, None)
        self._disks.pop(fh, None)

    # -- what can't be done -----------------------------------------------------------------------------------------

    def _refuse(self) -> NoReturn:
        """The tree is what the target has: nothing can be added, removed or renamed, not even by root."""
        raise FUSEError(errno.EROFS if self._read_only else errno.EPERM)

    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Refused."""
        self._refuse()

    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Refused."""
        self._refuse()

    async def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        """Refused."""
        self._refuse()

    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Refused."""
        self._refuse()

    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Refused."""
        self._refuse()

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Refused."""
        self._refuse()

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Refused."""
        self._refuse()

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        """Refused."""
        self._refuse()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _number(self) -> int:
        number = self._next
        self._next += 1
        return number

    def _node(self, inode: int) -> Node:
        node = self._tree.node(inode)
        if node is None:
            raise FUSEError(errno.ESTALE)
        return node

    def _attributes(self, node: Node) -> EntryAttributes:
        if self._shared is not None:  # The kernel asks for attributes when it was told that they have changed.
            self._shared.size = max(self._shared.size, node.size)
        permissions = self._tree.permissions
        attributes = EntryAttributes()
        attributes.st_ino = InodeT(node.inode)
        attributes.st_mode = ModeT(node.mode)
        attributes.st_nlink = node.links
        attributes.st_uid = permissions.uid
        attributes.st_gid = permissions.gid
        attributes.st_size = node.size
        attributes.st_blocks = -(-node.size // _SECTOR)
        attributes.st_blksize = _BLOCK_SIZE
        attributes.entry_timeout = ATTRIBUTES_LAST
        attributes.attr_timeout = ATTRIBUTES_LAST
        return attributes
