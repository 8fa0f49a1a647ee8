"""No cache at all: rounding, and read-modify-write under a range lock."""

import errno

import pytest
import trio
import trio.testing
from cache_fakes import FakeDevice, Gate, bad_block, reads, writes

from iscsifuse.cache import DirectFile, EndOfDeviceError
from iscsifuse.errors import IscsifuseError, MediumError, WriteBackError

blocked = trio.testing.wait_all_tasks_blocked


@pytest.mark.parametrize("block", [512, 520, 4096])
async def test_any_offset_and_length(block: int) -> None:
    device = FakeDevice(block, 20)
    expected = bytearray(device.data)
    file = DirectFile(device)
    for offset in (0, 1, block - 1, block, 3 * block, 3 * block + 7):
        for length in (1, block - 1, block, block + 1, 2 * block, 5 * block + 3):
            data = bytes([(offset + length) % 251]) * length
            assert await file.write(offset, data) == length
            expected[offset : offset + length] = data
            assert device.data == expected
            assert await file.read(offset, length) == data
    assert await file.read(0, file.size + 5) == expected


async def test_nothing_is_kept() -> None:
    device = FakeDevice()
    file = DirectFile(device)
    first = bytes(await file.read(100, 100))
    device.data[:] = b"n" * len(device.data)
    assert await file.read(100, 100) == b"n" * 100 != first
    file.invalidate()
    assert [(c.kind, c.lba, c.blocks) for c in device.log] == [("read", 0, 1)] * 2
    stats = file.stats()
    assert (stats.misses, stats.hits, stats.pool_bytes) == (2, 0, 0)


async def test_whole_blocks_are_written_without_reading_or_copying() -> None:
    device = FakeDevice()
    file = DirectFile(device)
    await file.write(1024, b"w" * 2048)
    assert [command.kind for command in device.log] == ["write"]
    await file.write(1024, b"w" * 100)
    await file.write(1000, b"w" * 1048)
    await file.write(1024, b"w" * 2000)
    kinds = [(command.kind, command.lba, command.blocks) for command in device.log[1:]]
    assert kinds == [
        ("read", 2, 1),
        ("write", 2, 1),
        ("read", 1, 1),
        ("write", 1, 3),
        ("read", 5, 1),
        ("write", 2, 4),
    ]


async def test_the_ends() -> None:
    device = FakeDevice(512, 10)
    file = DirectFile(device)
    assert await file.read(5000, 1000) == device.data[5000:]
    assert await file.read(5120, 10) == b""
    assert await file.read(0, 0) == b""
    assert await file.write(5000, b"e" * 1000) == 120
    assert await file.write(0, b"") == 0
    with pytest.raises(EndOfDeviceError) as caught:
        await file.write(5120, b"x")
    assert caught.value.errno == errno.ENOSPC


async def test_two_parts_of_one_block() -> None:
    device = FakeDevice(4096, 4)
    before = bytes(device.data)
    file = DirectFile(device)
    gate = Gate(device, reads)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.write, 0, b"1" * 10)
        nursery.start_soon(file.write, 100, b"2" * 10)
        nursery.start_soon(file.write, 4096, b"3" * 4096)
        await blocked()
        assert len(gate.held) == 1, "one after the other"
        assert device.data[4096:8192] == b"3" * 4096, "but not those elsewhere"
        gate.open()
    assert device.data[:4096] == b"1" * 10 + before[10:100] + b"2" * 10 + before[110:4096]


async def test_who_gives_up_waiting_lets_the_others_pass() -> None:
    device = FakeDevice()
    file = DirectFile(device)
    gate = Gate(device, writes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.write, 0, b"1" * 1024)
        await blocked()
        scope = trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                await file.write(512, b"2" * 1024)

        nursery.start_soon(cancelled)
        await blocked()
        nursery.start_soon(file.write, 1024, b"3" * 512)  # waits for the second only
        await blocked()
        assert len(gate.held) == 1
        scope.cancel()
        await blocked()
        assert [command.lba for command in gate.held] == [0, 2]
        gate.open()
    assert device.data[:1536] == b"1" * 1024 + b"3" * 512
    assert len(file._lock) == 0
    assert not file._waiting


async def test_errors_are_the_callers_own() -> None:
    device = FakeDevice(bad={3})
    file = DirectFile(device)
    handle = file.open()
    with pytest.raises(MediumError):
        await file.read(0, 4096)
    with pytest.raises(MediumError):
        await file.write(3 * 512 + 1, b"x")
    assert await file.read(0, 3 * 512) == device.data[: 3 * 512]
    device.fault = lambda command: bad_block(command.lba) if command.kind == "write" else None
    with pytest.raises(MediumError):
        await file.write(0, b"x" * 512)
    assert file.stats().write_back_errors == 1
    device.fault = None
    await file.sync(handle)
    assert len(device.commands("flush")) == 1
    file.report(IscsifuseError("later"))
    with pytest.raises(WriteBackError, match="later"):
        await file.drain(handle)
    with pytest.raises(WriteBackError, match="later"):
        await file.sync(handle)
    device.fault = lambda _command: IscsifuseError("no flush")
    with pytest.raises(WriteBackError, match="no flush"):
        await file.sync(handle)


async def test_it_runs_until_cancelled() -> None:
    file = DirectFile(FakeDevice())
    async with trio.open_nursery() as nursery:
        await nursery.start(file.run)
        await file.sync()
        nursery.cancel_scope.cancel()
