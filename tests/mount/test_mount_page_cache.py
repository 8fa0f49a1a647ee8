"""Through the kernel: whoever reads, and however, gets what was written last."""

import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ram_kit import Ram

pytestmark = pytest.mark.fuse

PAGE = 4096
PAGES = 64
MIB = 1 << 20
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
        os.close(self.number)


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
                        mapped[fd] = mmap.mmap(fd, PAGES * PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
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
