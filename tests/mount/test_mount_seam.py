"""Torn writes, as the kernel lets them come, on a file that remembers what it was given."""

import itertools

import pytest
import trio
from mount_fakes import MemoryFile

from iscsifuse.cache import Buffer
from iscsifuse.errors import CommandTimeoutError, WriteBackError
from iscsifuse.mount.seam import Seam

MIB = 1 << 20
TORN = MIB - 16  # what fits into 256 pages
SIZE = 8 * MIB


class Recorder(MemoryFile):
    def __init__(self) -> None:
        super().__init__(SIZE)
        self.pieces: list[tuple[int, int]] = []
        self.reports: list[Exception] = []
        self.hold: trio.Event | None = None

    async def write(self, offset: int, data: Buffer) -> int:
        self.pieces.append((offset, len(data)))
        if self.hold is not None:
            await self.hold.wait()
        return await super().write(offset, data)

    def report(self, error: Exception) -> None:
        self.reports.append(error)
        super().report(error)


def some(size: int, seed: int = 1) -> bytes:
    return bytes(itertools.islice(itertools.cycle(range(seed, seed + 250)), size))


@pytest.fixture
def file() -> Recorder:
    return Recorder()


async def test_the_halves_of_a_block_are_written_together(file: Recorder) -> None:
    seam = Seam(file)
    data = some(4 * MIB)
    for start, end in ((0, TORN), (TORN, TORN + MIB), (TORN + MIB, TORN + 2 * MIB), (TORN + 2 * MIB, 4 * MIB)):
        assert await seam.write(start, data[start:end]) == end - start
    assert file.device.data[: 4 * MIB] == data
    assert all(offset % 512 == 0 and length % 512 == 0 for offset, length in file.pieces)
    assert len(file.pieces) == 4
    assert not seam.is_open


@pytest.mark.parametrize("size", [1, 512, 1000, MIB - 4096, MIB, MIB - 512])
async def test_what_was_not_torn_does_not_wait(file: Recorder, size: int) -> None:
    seam = Seam(file)
    assert await seam.write(0, some(size)) == size
    assert not seam.is_open
    assert file.pieces == [(0, size)]


async def test_who_continues_elsewhere_comes_second(file: Recorder) -> None:
    seam = Seam(file)
    await seam.write(0, some(TORN))
    await seam.write(TORN - 100, b"x" * 200)
    assert not seam.is_open
    assert file.device.data[: TORN + 100] == some(TORN)[:-100] + b"x" * 200
    assert file.pieces[1:] == [(MIB - 512, 496), (TORN - 100, 200)]


async def test_at_the_end_of_the_disk_nothing_waits(file: Recorder) -> None:
    seam = Seam(file)
    assert await seam.write(SIZE - MIB + 4000, some(TORN)) == MIB - 4000
    assert not seam.is_open


async def test_a_failure_is_told_later(file: Recorder) -> None:
    seam = Seam(file)
    await seam.write(0, some(TORN))
    file.error = CommandTimeoutError("slow")
    with pytest.raises(CommandTimeoutError):
        await seam.write(TORN, b"x" * 16)  # the kernel then tells the program of the first part alone
    assert seam.is_open
    handle = file.open()
    await seam.close()
    assert (seam.is_open, file.reports) == (False, [file.error])
    with pytest.raises(WriteBackError, match="slow"):
        await file.drain(handle)


async def test_after_a_failure_it_is_written_all_the_same(file: Recorder) -> None:
    seam = Seam(file)
    await seam.write(0, some(TORN))
    file.error = CommandTimeoutError("slow")
    with pytest.raises(CommandTimeoutError):
        await seam.write(TORN, b"x" * 16)
    file.error = None
    await seam.close()
    assert file.device.data[:TORN] == some(TORN)
    assert not file.reports


async def test_a_newer_write_waits_for_the_older_one(file: Recorder) -> None:
    seam = Seam(file)
    await seam.write(0, some(TORN))
    file.hold = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(seam.close)  # somebody reads
        await trio.testing.wait_all_tasks_blocked()
        assert seam.is_open
        nursery.start_soon(seam.write, TORN, b"x" * 16)
        nursery.start_soon(seam.close)
        await trio.testing.wait_all_tasks_blocked()
        assert file.pieces[1:] == [(MIB - 512, 496)]
        file.hold.set()
    assert file.pieces[1:] == [(MIB - 512, 496), (TORN, 16)]
    assert file.device.data[:MIB] == some(TORN) + b"x" * 16


async def test_who_is_cancelled_loses_nothing(file: Recorder) -> None:
    seam = Seam(file)
    await seam.write(0, some(TORN))
    file.hold = trio.Event()
    for act in (seam.close, lambda: seam.write(TORN, b"x" * 16)):
        with trio.move_on_after(0.01):
            await act()
        assert seam.is_open
    file.hold = None
    await seam.close()
    assert file.device.data[:TORN] == some(TORN)
