"""Through the kernel: whoever reads, and however, gets what was written last, past the page cache or through it."""

import contextlib
import ctypes
import errno
import json
import mmap
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ram_kit import Ram, wait_for

pytestmark = pytest.mark.fuse

PAGE = 4096
PAGES = 64
MIB = 1 << 20
LIBC = ctypes.CDLL(None, use_errno=True)
READER, WRITER, BOTH = os.O_RDONLY, os.O_WRONLY, os.O_RDWR


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Ram]:
    made = Ram(tmp_path)
    yield made
    made.clean_up()


class Fd:
    """A file descriptor that is closed at the end of a ``with`` block."""

    def __init__(self, path: Path, flags: int) -> None:
        self.number = os.open(path, flags | os.O_CLOEXEC)

    def __enter__(self) -> int:
        return self.number

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the mount has ended
            os.close(self.number)


def resident(path: Path, length: int) -> int:
    """How many pages of the beginning of a file the page cache has."""
    with Fd(path, READER) as fd, mmap.mmap(fd, length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as memory:
        first = ctypes.c_char.from_buffer(memory)
        there = (ctypes.c_ubyte * (length // mmap.PAGESIZE))()
        assert LIBC.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(length), there) == 0
        del first
        return sum(page & 1 for page in there)


def test_what_is_only_written_stays_out_of_the_page_cache(ram: Ram) -> None:
    assert ram.start(read_write=True) == 0, ram.said
    with Fd(ram.lun, WRITER) as fd:
        os.write(fd, b"a" * MIB)
    assert resident(ram.lun, MIB) == 0
    assert ram.lun.read_bytes()[:MIB] == b"a" * MIB
    assert resident(ram.lun, MIB) == MIB // mmap.PAGESIZE
    with Fd(ram.lun, BOTH) as fd:
        os.pwrite(fd, b"b" * PAGE, 0)
    assert resident(ram.lun, MIB) == MIB // mmap.PAGESIZE


def test_a_patch_replaces_what_was_cached(ram: Ram) -> None:
    assert ram.start(read_write=True) == 0, ram.said
    with Fd(ram.lun, WRITER) as fd:
        os.write(fd, b"a" * MIB)
    assert ram.lun.read_bytes()[:MIB] == b"a" * MIB
    with Fd(ram.lun, WRITER) as fd:
        os.pwrite(fd, b"hello", 3 * PAGE + 100)
    with Fd(ram.lun, READER) as fd:
        assert os.pread(fd, 7, 3 * PAGE + 99) == b"ahelloa"
        assert os.pread(fd, PAGE, 2 * PAGE) == b"a" * PAGE


def test_a_mapping_sees_what_others_write(ram: Ram) -> None:
    assert ram.start(read_write=True) == 0, ram.said
    with Fd(ram.lun, READER) as reader, mmap.mmap(reader, MIB, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        assert memory[:4] == bytes(4)
        with Fd(ram.lun, WRITER) as writer:
            os.write(writer, b"abcd")
            assert memory[:4] == b"abcd"


def test_beside_a_writer(ram: Ram) -> None:
    assert ram.start(read_write=True) == 0, ram.said
    with Fd(ram.lun, WRITER) as writer, Fd(ram.lun, READER) as reader:
        assert os.pread(reader, 4, 0) == bytes(4)
        with pytest.raises(OSError, match=os.strerror(errno.ENODEV)):
            mmap.mmap(reader, MIB, mmap.MAP_SHARED, mmap.PROT_READ)
        with mmap.mmap(reader, MIB, mmap.MAP_PRIVATE, mmap.PROT_READ) as memory:
            assert memory[:4] == bytes(4)
            os.write(writer, b"abcd")
            assert os.pread(reader, 4, 0) == b"abcd"
    with Fd(ram.lun, READER) as reader, mmap.mmap(reader, MIB, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        assert memory[:4] == b"abcd"


def test_the_end_of_a_disk(ram: Ram) -> None:
    assert ram.start(read_write=True, disks=[16]) == 0, ram.said
    with Fd(ram.lun, WRITER) as fd:
        assert os.pwrite(fd, b"x" * 1000, 16 * 512 - 100) == 100
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            os.pwrite(fd, b"x", 16 * 512)
    assert ram.lun.stat().st_size == 16 * 512
    assert ram.lun.read_bytes() == bytes(16 * 512 - 100) + b"x" * 100


def reads(ram: Ram) -> int:
    """How many READ commands there were."""
    commands = json.loads((ram.point / ".iscsifuse/status.json").read_text())["commands"]
    return sum(row["calls"] for row in commands if row["name"] == "READ(10)")


class Memory:
    """So many random bytes, the first of them 16 bytes behind the beginning of a page."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size + 2 * PAGE)
        self.data = random.Random(size).randbytes(size)
        self._memory[16 : 16 + size] = self.data
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + 16

    def protect(self, offset: int) -> None:
        """Nobody may read the page with that byte."""
        page = (self.address + offset) // PAGE * PAGE
        assert LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0

    def write(self, fd: int, offset: int) -> int:
        """pwrite(2)."""
        size = ctypes.c_size_t(len(self.data))
        return int(LIBC.pwrite64(fd, ctypes.c_void_p(self.address), size, ctypes.c_int64(offset)))


@pytest.mark.parametrize("offset", [0, 512, 77])
def test_memory_that_does_not_begin_with_a_page(ram: Ram, offset: int) -> None:
    assert ram.start(read_write=True) == 0, ram.said
    memory = Memory(4 * MIB)
    with Fd(ram.lun, WRITER) as fd:
        assert memory.write(fd, offset) == 4 * MIB
    # Nothing had to be read for the blocks in which it was torn; only the first and the last one, in part written.
    assert reads(ram) == (2 if offset % 512 else 0)
    assert ram.lun.read_bytes()[offset : offset + 4 * MIB] == memory.data


def was_written(ram: Ram, offset: int) -> bool:
    """Whether the disk was given the block with this byte."""
    writes = [line.split() for line in ram.log() if line.startswith("write ")]
    return any(int(lba) * 512 <= offset < int(lba) * 512 + int(length) for _, lba, length in writes)


@pytest.mark.parametrize("then", ["read", "write", "overwrite", "fsync", "close", "signal"])
def test_a_write_that_ends_where_it_was_torn(ram: Ram, then: str) -> None:
    """The rest of it never comes, since it isn't there; what was said to be written is."""
    assert ram.start(read_write=True) == 0, ram.said
    memory = Memory(2 * MIB)
    memory.protect(MIB)
    data = bytearray(2 * MIB)
    size = MIB - 16
    data[:size] = memory.data[:size]
    with Fd(ram.lun, WRITER) as fd:
        assert memory.write(fd, 0) == size
        assert reads(ram) == 0  # it waits for the rest
        match then:
            case "read":
                with Fd(ram.lun, READER) as reader:
                    assert os.pread(reader, 2 * MIB, 0) == data
            case "write":
                os.pwrite(fd, b"x" * 100, MIB + PAGE)
                data[MIB + PAGE : MIB + PAGE + 100] = b"x" * 100
            case "overwrite":
                os.pwrite(fd, b"x" * 100, size - 50)
                data[size - 50 : size + 50] = b"x" * 100
            case "fsync":
                os.fsync(fd)
                assert was_written(ram, size - 1)
            case "signal":
                pid = json.loads((ram.point / ".iscsifuse/status.json").read_text())["pid"]
                os.kill(pid, signal.SIGTERM)
                wait_for(lambda: not ram.is_mounted())
                assert was_written(ram, size - 1)
    if then != "signal":
        assert ram.lun.read_bytes()[: 2 * MIB] == data


def test_a_loop_device_beside_a_writer(ram: Ram, tmp_path: Path) -> None:
    assert ram.start(read_write=True) == 0, ram.said
    inside = tmp_path / "inside"
    inside.mkdir()
    with Fd(ram.lun, WRITER):
        subprocess.run(["mkfs.ext4", "-q", "-F", ram.lun], check=True, timeout=60)
        subprocess.run(["mount", "-o", "loop", ram.lun, inside], check=True, timeout=60)
    try:
        (inside / "file").write_bytes(b"z" * MIB)
    finally:
        subprocess.run(["umount", inside], check=True, timeout=60)
    subprocess.run(["e2fsck", "-fn", ram.lun], check=True, timeout=60, capture_output=True)
    assert b"z" * MIB in ram.lun.read_bytes()


@pytest.mark.parametrize("seed", range(6))
def test_everybody_reads_what_was_written_last(ram: Ram, seed: int) -> None:
    """Files are opened, closed, read, mapped and written in any order; a list of bytes says what is right."""
    chance = random.Random(seed)
    assert ram.start(read_write=True, disks=[PAGES * PAGE // 512]) == 0, ram.said
    model = bytearray(PAGES * PAGE)
    opened: list[tuple[int, int]] = []
    mapped: dict[int, mmap.mmap] = {}
    try:
        for _ in range(400):
            what = chance.random()
            if what < 0.2 and len(opened) < 4:
                flags = chance.choice([READER, WRITER, WRITER, BOTH])
                opened.append((os.open(ram.lun, flags), flags))
            elif what < 0.4 and opened:
                fd, _ = opened.pop(chance.randrange(len(opened)))
                if fd in mapped:
                    mapped.pop(fd).close()
                os.close(fd)
            elif opened:
                fd, flags = chance.choice(opened)
                offset = chance.randrange(PAGES * PAGE - 1)
                size = min(chance.choice([1, 100, 512, PAGE, 5 * PAGE]), PAGES * PAGE - offset)
                if flags != READER and what < 0.7:
                    data = chance.randbytes(size)
                    assert os.pwrite(fd, data, offset) == size
                    model[offset : offset + size] = data
                elif flags != WRITER:
                    assert os.pread(fd, size, offset) == model[offset : offset + size]
                    if fd not in mapped:
                        try:
                            mapped[fd] = mmap.mmap(fd, PAGES * PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
                        except OSError:  # beside a writer; privately it fills the page cache, and may get old
                            with mmap.mmap(fd, PAGES * PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ) as memory:
                                assert memory[offset : offset + size] == model[offset : offset + size]
                    else:
                        assert mapped[fd][offset : offset + size] == model[offset : offset + size]
            if chance.random() < 0.2:
                with Fd(ram.lun, READER) as fd:
                    assert os.pread(fd, PAGES * PAGE, 0) == model
    finally:
        for memory in mapped.values():
            memory.close()
        for fd, _ in opened:
            os.close(fd)
    assert ram.lun.read_bytes() == model


def test_readers_who_come_while_somebody_writes(ram: Ram) -> None:
    """What is read while it is written may be old or new; what is read afterwards is new, whoever has read before."""
    assert ram.start(read_write=True, disks=[PAGES * PAGE // 512]) == 0, ram.said
    over = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        chance = random.Random(threading.get_ident())
        try:
            while not over.is_set():
                with Fd(ram.lun, READER) as fd:
                    for _ in range(chance.randrange(4)):
                        os.pread(fd, PAGE, PAGE * chance.randrange(PAGES))
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for turn in range(150):
            data = bytes([turn % 251 + 1]) * PAGE * PAGES
            with Fd(ram.lun, WRITER) as fd:
                for page in range(0, PAGES, 4):
                    os.pwrite(fd, data[: 4 * PAGE], page * PAGE)
            with Fd(ram.lun, READER) as fd:
                assert os.pread(fd, PAGE * PAGES, 0) == data, turn
    finally:
        over.set()
        for reader in readers:
            reader.join()
    assert not failures
