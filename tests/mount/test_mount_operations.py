"""The operations, called as pyfuse3 calls them; what the kernel makes of them is in test_mount_fuse.py."""

import errno
import json
import os
from collections.abc import Awaitable
from typing import Any, TypeVar, cast

import pyfuse3
import pytest
import trio
import trio.testing
from mount_fakes import MemoryFile
from pyfuse3 import EntryAttributes, FileHandleT, FlagT, FUSEError, InodeT, RequestContext, SetattrFields

from iscsifuse.errors import CommandTimeoutError
from iscsifuse.mount.operations import DiskOperations
from iscsifuse.mount.tree import ROOT_INODE, Disk, Permissions, Tree

TARGET = "iqn.2004-04.com.example:one"
CTX = cast("RequestContext", None)
T = TypeVar("T")


class Fields:
    update_mode = update_uid = update_gid = update_size = update_mtime = False

    def __init__(self, **wanted: bool) -> None:
        vars(self).update(wanted)


class Rig:
    def __init__(
        self,
        *,
        read_write: bool = True,
        writable: bool = True,
        direct_io: bool = False,
        on_file: bool = False,
        size: int = 4096,
    ) -> None:
        self.file = MemoryFile(size)
        self.disk = Disk(TARGET, 0, self.file, writable=writable)
        owner = Permissions(uid=7, gid=8)
        self.tree = (
            Tree.of_file(self.disk, owner) if on_file else Tree.of_directory([self.disk], owner, by_target=False)
        )
        self.snapshots = 0
        self.operations = DiskOperations(
            self.tree, status=self._status, read_only=not read_write, direct_io=direct_io
        )
        node = self.tree.root if on_file else self.tree.lookup(ROOT_INODE, b"lun-0")
        assert node is not None
        self.inode = InodeT(node.inode)

    def _status(self) -> bytes:
        self.snapshots += 1
        return json.dumps({"number": self.snapshots}).encode()

    async def open(self, flags: int = os.O_RDWR) -> FileHandleT:
        return (await self.operations.open(self.inode, FlagT(flags), CTX)).fh


async def refused(awaitable: Awaitable[object]) -> int:
    with pytest.raises(FUSEError) as caught:
        await awaitable
    return caught.value.errno


async def test_lookup_and_getattr() -> None:
    rig = Rig()
    entry = await rig.operations.lookup(InodeT(ROOT_INODE), pyfuse3.FileNameT(b"lun-0"), CTX)
    assert (entry.st_ino, entry.st_size, entry.st_blocks, entry.st_mode) == (rig.inode, 4096, 8, 0o100600)
    assert (entry.st_uid, entry.st_gid, entry.st_mtime_ns, entry.st_blksize) == (7, 8, 0, 4096)
    assert entry.attr_timeout == entry.entry_timeout >= 60
    assert (await rig.operations.getattr(rig.inode, CTX)).st_size == 4096
    missing = await rig.operations.lookup(InodeT(1), pyfuse3.FileNameT(b"x"), CTX)
    assert missing.st_ino == 0  # no such name ...
    assert 0 < missing.entry_timeout <= 1  # ... and the kernel may remember that for a moment
    assert await refused(rig.operations.getattr(InodeT(99), CTX)) == errno.ESTALE


@pytest.mark.parametrize(
    ("fields", "values", "number"),
    [
        ({"update_size": True}, {"st_size": 0}, 0),
        ({"update_mtime": True}, {"st_mtime_ns": 5}, 0),
        ({"update_mode": True}, {"st_mode": 0o100600}, 0),
        ({"update_mode": True}, {"st_mode": 0o100644}, errno.EPERM),
        ({"update_uid": True}, {"st_uid": 7}, 0),
        ({"update_uid": True}, {"st_uid": 0}, errno.EPERM),
        ({"update_gid": True}, {"st_gid": 9}, errno.EPERM),
    ],
)
async def test_setattr(fields: dict[str, bool], values: dict[str, int], number: int) -> None:
    rig = Rig()
    wanted = EntryAttributes()
    for name, value in values.items():
        setattr(wanted, name, value)
    change = rig.operations.setattr(rig.inode, wanted, cast("SetattrFields", Fields(**fields)), None, CTX)
    if number:
        assert await refused(change) == number
    else:
        after = await change
        assert (after.st_size, after.st_mode, after.st_mtime_ns) == (4096, 0o100600, 0)


async def test_listings_leave_out_what_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    listed: list[tuple[bytes, int]] = []

    def reply(_token: object, name: bytes, _attributes: object, next_id: int) -> bool:
        listed.append((name, next_id))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    handle = await rig.operations.opendir(InodeT(ROOT_INODE), CTX)
    token = cast("Any", None)
    await rig.operations.readdir(handle, 0, token)
    await rig.operations.readdir(handle, 1, token)
    assert listed == [(b"lun-0", 1)]
    monkeypatch.setattr(pyfuse3, "readdir_reply", lambda *_: False)
    await rig.operations.readdir(handle, 0, token)
    await rig.operations.releasedir(handle)
    assert await refused(rig.operations.opendir(rig.inode, CTX)) == errno.ENOTDIR


async def test_open_files() -> None:
    rig = Rig()
    info = await rig.operations.open(rig.inode, FlagT(os.O_RDWR), CTX)
    assert (info.keep_cache, info.direct_io) == (True, False)
    assert (await rig.open()) != info.fh
    assert await refused(rig.operations.open(InodeT(ROOT_INODE), FlagT(0), CTX)) == errno.EISDIR
    info = await Rig(direct_io=True).operations.open(rig.inode, FlagT(os.O_RDONLY), CTX)
    assert (info.keep_cache, info.direct_io) == (False, True)
    rig.operations.closing = True
    assert await refused(rig.open()) == errno.ESHUTDOWN


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC])
async def test_read_only_disks_are_not_opened_for_writing(flags: int) -> None:
    for rig in (Rig(read_write=False), Rig(writable=False)):
        assert await refused(rig.open(flags)) == errno.EROFS
        await rig.open(os.O_RDONLY)


async def test_reads() -> None:
    rig = Rig()
    rig.file.device.data[:] = bytes(range(256)) * 16
    handle = await rig.open(os.O_RDONLY)
    assert await rig.operations.read(handle, 10, 5) == bytes(range(10, 15))
    assert await rig.operations.read(handle, 4090, 100) == bytes(range(250, 256))
    assert await rig.operations.read(handle, 4096, 100) == b""
    assert await rig.operations.read(handle, 1 << 40, 1) == b""


@pytest.mark.expect_log("read failed")
async def test_a_read_is_whole_or_an_error() -> None:
    rig = Rig()
    handle = await rig.open()
    rig.file.answer = lambda data: data[:-1]
    assert await refused(rig.operations.read(handle, 0, 512)) == errno.EIO
    rig.file.error = CommandTimeoutError("slow")
    assert await refused(rig.operations.read(handle, 0, 512)) == errno.EIO
    assert await refused(rig.operations.read(FileHandleT(999), 0, 512)) == errno.EIO


@pytest.mark.conformance(130)
async def test_a_disk_that_shrank_ends_with_an_error_for_who_opened_it_before() -> None:
    rig = Rig(size=16384)
    handle = await rig.open()

    def shrink(data: bytes) -> bytes:
        del rig.file.device.data[5120:]
        return data[:5120]

    rig.file.answer = shrink
    # What is asked for is gone in part, or as a whole; it was there when the file was opened.
    assert await refused(rig.operations.read(handle, 0, 16384)) == errno.EIO
    assert await refused(rig.operations.read(handle, 8192, 4096)) == errno.EIO
    # The page that the disk ends in now is asked for as a whole, and has 1024 bytes.
    assert len(await rig.operations.read(handle, 4096, 4096)) == 1024
    assert len(await rig.operations.read(handle, 0, 8192)) == 5120
    # Who opens it now sees a disk of that size.
    handle = await rig.open()
    assert len(await rig.operations.read(handle, 0, 16384)) == 5120
    assert bytes(await rig.operations.read(handle, 8192, 4096)) == b""


async def test_a_disk_that_grew_ends_at_its_new_end() -> None:
    rig = Rig()
    handle = await rig.open()
    rig.file.device.data.extend(bytes(1024))
    assert len(await rig.operations.read(handle, 0, 8192)) == 5120
    rig.file.answer = lambda data: data[:4096]
    assert await refused(rig.operations.read(handle, 0, 8192)) == errno.EIO


async def test_a_read_across_the_end_of_a_disk_that_grows_meanwhile() -> None:
    rig = Rig()
    rig.file.device.data[:] = b"o" * 4096
    handle = await rig.open()

    def grow(data: bytes) -> bytes:
        rig.file.device.data.extend(b"n" * 1024)
        rig.file.answer = bytes
        return data  # cut where the end was

    rig.file.answer = grow
    assert await rig.operations.read(handle, 2048, 3072) == b"o" * 2048 + b"n" * 1024
    rig.file.answer = grow
    assert await rig.operations.read(handle, 4096, 8192) == b"n" * 2048
    # Bytes that the file doesn't have are nobody's.
    rig.file.answer = lambda data: data[:-1]
    assert await refused(rig.operations.read(handle, 4096, 8192)) == errno.EIO


NEVER_OPENED = FileHandleT(0)


async def test_a_read_only_file_is_never_opened() -> None:
    """The kernel is told once, and reads without a handle from then on."""
    rig = Rig(read_write=False, writable=False, on_file=True)
    rig.file.device.data[:] = bytes(range(256)) * 16
    assert await refused(rig.open(os.O_RDONLY)) == errno.ENOSYS
    assert await rig.operations.read(NEVER_OPENED, 4090, 100) == bytes(range(250, 256))
    assert await refused(rig.open(os.O_RDWR)) == errno.EROFS
    await rig.operations.fsync(NEVER_OPENED, False)
    rig.operations.refuse_all()
    assert await refused(rig.operations.read(NEVER_OPENED, 0, 512)) == errno.EIO
    assert await refused(rig.open(os.O_RDONLY)) == errno.ESHUTDOWN


@pytest.mark.expect_log("read failed")
@pytest.mark.parametrize(
    "options",
    [{}, {"read_write": False, "on_file": False}, {"read_write": False, "on_file": True, "direct_io": True}],
    ids=["writable", "in a directory", "uncached"],
)
async def test_other_files_are_opened(options: dict[str, bool]) -> None:
    """Where errors of writes are told to a handle, a handle says which disk is meant, or how it is to be read."""
    rig = Rig(**{"on_file": True, **options})
    assert await rig.open(os.O_RDONLY) == 1
    assert await refused(rig.operations.read(NEVER_OPENED, 0, 512)) == errno.EIO


async def test_a_disk_without_handles_that_shrank_ends_with_an_error() -> None:
    rig = Rig(read_write=False, writable=False, on_file=True, size=16384)
    rig.file.device.data.extend(bytes(8192))  # it grows, which the kernel is told of, and asks for its size
    assert (await rig.operations.getattr(rig.inode, CTX)).st_size == 24576
    del rig.file.device.data[20480:]
    assert await refused(rig.operations.read(NEVER_OPENED, 16384, 8192)) == errno.EIO
    assert len(await rig.operations.read(NEVER_OPENED, 16384, 4096)) == 4096
    del rig.file.device.data[8192:]
    assert await refused(rig.operations.read(NEVER_OPENED, 0, 16384)) == errno.EIO
    assert len(await rig.operations.read(NEVER_OPENED, 4096, 4096)) == 4096


async def test_writes() -> None:
    rig = Rig()
    handle = await rig.open()
    assert await rig.operations.write(handle, 4000, b"x" * 200) == 96
    for offset in (4096, 5000):
        assert await refused(rig.operations.write(handle, offset, b"x")) == errno.ENOSPC
    direct = await rig.open(os.O_RDWR | os.O_DIRECT)
    assert await refused(rig.operations.write(direct, 3584, b"x" * 1024)) == errno.ENOSPC
    assert await rig.operations.write(direct, 3584, b"y" * 512) == 512
    own = Rig(direct_io=True)
    assert await own.operations.write(await own.open(os.O_RDWR | os.O_DIRECT), 3584, b"x" * 1024) == 512


async def test_a_read_only_mount_has_no_use_for_flush() -> None:
    rig = Rig(read_write=False)
    assert await refused(rig.operations.flush(await rig.open(os.O_RDONLY))) == errno.ENOSYS  # "never again"


@pytest.mark.expect_log("failed with EIO")
async def test_flush_and_fsync() -> None:
    rig = Rig()
    handle, reader = await rig.open(), await rig.open(os.O_RDONLY)
    await rig.operations.flush(reader)
    assert rig.file.drains == 0  # nobody who only reads waits for others' writes
    await rig.operations.flush(handle)
    assert (rig.file.drains, rig.file.device.flushes) == (1, 0)
    await rig.operations.fsync(handle, False)
    assert rig.file.device.flushes == 1
    await rig.operations.fsync(reader, True)
    assert rig.file.device.flushes == 2
    rig.file.report(CommandTimeoutError("lost"))
    for other in (handle, reader):
        assert await refused(rig.operations.fsync(other, False)) == errno.EIO
        await rig.operations.fsync(other, False)
    rig.file.report(CommandTimeoutError("lost"))
    assert await refused(rig.operations.flush(handle)) == errno.EIO
    await rig.operations.flush(handle)
    assert await refused(rig.operations.fsync(handle, False)) == errno.EIO
    await rig.operations.fsync(handle, False)


async def test_read_only_mounts_never_sync() -> None:
    rig = Rig(read_write=False)
    await rig.operations.fsync(await rig.open(os.O_RDONLY), False)
    assert rig.file.device.flushes == 0


@pytest.mark.expect_log("fsync failed")
async def test_unsynced_disks_are_known() -> None:
    rig = Rig()
    handle = await rig.open()
    assert rig.operations.unsynced() == []
    await rig.operations.write(handle, 0, b"x")
    assert rig.operations.unsynced() == [rig.disk]
    rig.file.device.flush_error = CommandTimeoutError("slow")
    assert await refused(rig.operations.fsync(handle, False)) == errno.EIO
    assert rig.operations.unsynced() == [rig.disk]
    rig.file.device.flush_error = None
    await rig.operations.fsync(handle, False)
    assert rig.operations.unsynced() == []


async def test_a_write_that_ends_after_a_sync_is_unsynced() -> None:
    rig = Rig()
    handle = await rig.open()
    await rig.operations.write(handle, 0, b"x")
    rig.file.hold = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.operations.write, handle, 0, b"y")
        await trio.testing.wait_all_tasks_blocked()
        await rig.operations.fsync(handle, False)
        rig.file.hold.set()
    assert rig.operations.unsynced() == [rig.disk]
    await rig.operations.fsync(handle, False)
    assert rig.operations.unsynced() == []


async def test_release_forgets() -> None:
    rig = Rig()
    handle = await rig.open()
    await rig.operations.release(handle)
    await rig.operations.release(handle)
    await rig.operations.flush(handle)
    await rig.operations.fsync(handle, False)
    assert rig.file.drains == 0


async def test_status_is_one_snapshot_for_each_open() -> None:
    rig = Rig()
    hidden = rig.tree.lookup(ROOT_INODE, b".iscsifuse")
    assert hidden is not None
    node = rig.tree.lookup(hidden.inode, b"status.json")
    assert node is not None
    infos = [await rig.operations.open(InodeT(node.inode), FlagT(os.O_RDONLY), CTX) for _ in range(2)]
    assert all(info.direct_io and not info.keep_cache for info in infos)
    for number in (2, 1, 2):
        data = await rig.operations.read(infos[number - 1].fh, 0, 4096)
        assert json.loads(bytes(data)) == {"number": number}
    assert await rig.operations.read(infos[0].fh, 1, 3) == b'"nu'
    await rig.operations.flush(infos[0].fh)
    await rig.operations.release(infos[0].fh)
    assert await refused(rig.operations.open(InodeT(node.inode), FlagT(os.O_RDWR), CTX)) == errno.EACCES


async def test_what_can_not_be_done() -> None:
    for rig, number in ((Rig(), errno.EPERM), (Rig(read_write=False), errno.EROFS)):
        do, root, name = rig.operations, InodeT(ROOT_INODE), pyfuse3.FileNameT(b"x")
        for attempt in (
            do.mknod(root, name, pyfuse3.ModeT(0o100644), 0, CTX),
            do.create(root, name, pyfuse3.ModeT(0o100644), FlagT(0), CTX),
            do.mkdir(root, name, pyfuse3.ModeT(0o755), CTX),
            do.symlink(root, name, name, CTX),
            do.link(rig.inode, root, name, CTX),
            do.unlink(root, name, CTX),
            do.rmdir(root, name, CTX),
            do.rename(root, name, root, name, FlagT(0), CTX),
        ):
            assert await refused(attempt) == number


async def test_extended_attributes_are_never_asked_for_again() -> None:
    rig = Rig()
    name = pyfuse3.XAttrNameT(b"security.capability")
    assert await refused(rig.operations.getxattr(rig.inode, name, CTX)) == errno.ENOSYS


async def test_statfs_and_the_rest() -> None:
    rig = Rig()
    data = await rig.operations.statfs(CTX)
    assert (data.f_frsize * data.f_blocks, data.f_bfree, data.f_namemax, data.f_files) == (4096, 0, 255, 4)
    await rig.operations.forget([(rig.inode, 1)])
    assert not rig.operations.connected.is_set()
    rig.operations.init()
    assert rig.operations.connected.is_set()
