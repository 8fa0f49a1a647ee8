"""Drain and sync: what they wait for, who shares a flush, and who hears of a failure."""

import errno

import pytest
import trio
import trio.testing
from cache_fakes import FakeDevice, Gate, bad_block, flushes, writes
from cache_running import EXTENT, running

from iscsifuse.cache import BlockCache, Handle
from iscsifuse.errors import IscsifuseError, NoSpaceError, WriteBackError

blocked = trio.testing.wait_all_tasks_blocked


# -- drain and sync -----------------------------------------------------------------------------------------------


async def test_a_sync_ends_however_busily_others_write(autojump_clock: trio.testing.MockClock) -> None:
    device = FakeDevice()
    device.delay = lambda _command: 0.05
    async with running(device, slots=64) as cache, trio.open_nursery() as nursery:

        async def busy() -> None:
            number = 0
            while True:
                number += 1
                await cache.write(number * 7 % 60 * 512, b"b" * 512)
                await trio.sleep(0.001)

        nursery.start_soon(busy)
        await trio.sleep(1)
        await cache.write(400 * 512, b"mine" * 128)
        started = trio.current_time()
        with trio.fail_after(5):
            await cache.sync()
        assert device.data[400 * 512 : 401 * 512] == b"mine" * 128
        assert trio.current_time() - started < 1
        nursery.cancel_scope.cancel()
    assert autojump_clock.current_time() < 10


async def test_a_block_is_reached_however_often_others_before_it_come_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    device = FakeDevice()
    device.delay = lambda _command: 0.01
    async with running(device, depth=1) as cache, trio.open_nursery() as nursery:
        for lba in (0, 2, 4, 6):
            await cache.write(lba * 512, b"w" * 512)

        async def hot(lba: int) -> None:
            while True:
                await cache.write(lba * 512, b"h" * 512)
                await trio.sleep(0.001)

        nursery.start_soon(cache.drain)
        for lba in (0, 2, 4):
            nursery.start_soon(hot, lba)
        await trio.sleep(0.045)
        assert [command.lba for command in device.log][:4] == [0, 2, 4, 6]
        nursery.cancel_scope.cancel()
    assert autojump_clock.current_time() < 1


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("lbas", [(0, 2, 4, 6), (1, 3, 5, 7)], ids=str)
async def test_hot_blocks_keep_no_other_extent_from_the_disk(
    autojump_clock: trio.testing.MockClock, lbas: tuple[int, ...], depth: int
) -> None:
    """More of them than workers, dirtied again as fast as they are written."""
    device = FakeDevice()
    device.delay = lambda _command: 0.01
    async with running(device, depth=depth) as cache, trio.open_nursery() as nursery:

        async def hot(lba: int) -> None:
            while True:
                await cache.write(lba * 512, b"h" * 512)
                await trio.sleep(0.001)

        for lba in lbas:
            nursery.start_soon(hot, lba)
        await trio.sleep(0.5)
        for lba in (100, 200):
            await cache.write(lba * 512, b"m" * 512)
        with trio.fail_after(0.2):
            await cache.sync()
        for lba in (100, 200):
            assert device.data[lba * 512 : (lba + 1) * 512] == b"m" * 512
        # Neither does it starve itself.
        count = len(device.log)
        await trio.sleep(0.5)
        assert {command.lba for command in device.log[count:] if command.kind == "write"} == set(lbas)
        nursery.cancel_scope.cancel()
    assert autojump_clock.current_time() < 5


async def test_what_is_written_once_is_written_front_to_back_in_the_order_of_its_extents() -> None:
    device = FakeDevice(write_burst=1024)
    gate = Gate(device, writes)
    async with running(device, depth=1) as cache:
        for index in (3, 1, 2):
            await cache.write(index * EXTENT, b"w" * EXTENT)
        await blocked()
        for _ in range(12):
            gate.release()
            await blocked()
        gate.open()
        order = [command.lba for command in device.commands("write")]
        assert order == [*range(24, 32, 2), *range(8, 16, 2), *range(16, 24, 2)]
        # Also where a part of it was written before.
        await cache.write(5 * EXTENT + 1024, b"w" * 1024)
        await cache.drain()
        gate.hold = writes
        await cache.write(5 * EXTENT, b"v" * EXTENT)
        await cache.write(7 * EXTENT, b"v" * EXTENT)
        await blocked()
        for _ in range(8):
            gate.release()
            await blocked()
        gate.open()
        order = [command.lba for command in device.commands("write")][13:]
        assert order == [*range(40, 48, 2), *range(56, 64, 2)]


async def test_a_drain_waits_for_what_is_already_on_its_way() -> None:
    device = FakeDevice()
    gate = Gate(device, writes)
    drained = []
    async with running(device) as cache, trio.open_nursery() as nursery:
        await cache.write(0, b"w" * EXTENT)
        await blocked()
        assert len(gate.held) == 1

        async def drain() -> None:
            await cache.drain()
            drained.append(bytes(device.data[:EXTENT]))

        nursery.start_soon(drain)
        await blocked()
        assert not drained
        await cache.write(EXTENT, b"later" * 100)
        gate.hold = lambda command: command.lba >= 8
        gate.release()
        await blocked()
        assert drained == [b"w" * EXTENT]
        gate.open()


async def test_a_cancelled_drain_leaves_the_writing_to_the_background() -> None:
    device = FakeDevice()
    gate = Gate(device, writes)
    async with running(device) as cache:
        await cache.write(0, b"w" * 512)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.drain)
            await blocked()
            nursery.cancel_scope.cancel()
        gate.open()
        await blocked()
        assert device.data[:512] == b"w" * 512
        assert not cache._write_back._barriers


async def test_a_flush_is_shared_only_by_those_it_began_after() -> None:
    device = FakeDevice()
    gate = Gate(device, flushes)
    done: list[str] = []

    async def sync(cache: BlockCache, name: str) -> None:
        await cache.sync()
        done.append(name)

    async with running(device) as cache, trio.open_nursery() as nursery:
        nursery.start_soon(sync, cache, "first")
        await blocked()
        await cache.write(0, b"w" * 512)
        for name in ("second", "third", "fourth"):
            nursery.start_soon(sync, cache, name)
        await blocked()
        assert device.data[:512] == b"w" * 512
        assert len(gate.held) == 1
        gate.release()
        await blocked()
        assert done == ["first"]
        assert len(gate.held) == 1
        gate.release()
        await blocked()
        assert sorted(done) == ["first", "fourth", "second", "third"]
    assert cache.stats().flushes == len(device.commands("flush")) == 2


async def test_a_cancelled_flush_is_done_by_the_next_in_line() -> None:
    device = FakeDevice()
    gate = Gate(device, flushes)
    async with running(device) as cache, trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                await cache.sync()

        nursery.start_soon(cancelled)
        await blocked()
        nursery.start_soon(cache.sync)
        nursery.start_soon(cache.sync)
        await blocked()
        gate.hold = lambda _command: False
        scope.cancel()
    assert len(device.commands("flush")) == 2


async def test_a_failed_flush_fails_all_who_shared_it_and_is_remembered_for_the_others() -> None:
    device = FakeDevice()
    gate = Gate(device, flushes)
    failed = []
    async with running(device) as cache:
        caller, companion, bystander = cache.open(), cache.open(), cache.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.sync)  # in the way, so that the next two share one
            await blocked()

            async def sync(name: str, handle: Handle | None) -> None:
                with pytest.raises(WriteBackError, match="power"):
                    await cache.sync(handle)
                failed.append(name)

            nursery.start_soon(sync, "caller", caller)
            nursery.start_soon(sync, "twice", caller)  # the same handle, at the same time
            nursery.start_soon(sync, "companion", companion)
            nursery.start_soon(sync, "nobody", None)
            await blocked()
            gate.release()
            await blocked()
            device.fault = lambda command: IscsifuseError("power") if command.kind == "flush" else None
            gate.open()
        assert sorted(failed) == ["caller", "companion", "nobody", "twice"]
        device.fault = None
        await cache.sync(caller)
        await cache.sync(companion)
        with pytest.raises(WriteBackError, match="power"):
            await cache.drain(bystander)
        with pytest.raises(WriteBackError, match="power"):
            await cache.sync(bystander)
        await cache.sync(bystander)
        await cache.sync(cache.open())


# -- failures -----------------------------------------------------------------------------------------------------


async def test_a_failed_write_back_is_told_to_each_handle_once_and_its_data_is_gone() -> None:
    device = FakeDevice()
    before = bytes(device.data)
    async with running(device) as cache:
        one, two = cache.open(), cache.open()
        await cache.write(0, b"w" * 512)
        await cache.write(512, b"v" * 512)
        await cache.write(EXTENT, b"u" * 512)
        device.fault = lambda command: NoSpaceError("full", status=2) if command.lba == 0 else None
        with pytest.raises(WriteBackError, match=r"LBA 0 to 1 .* full") as caught:
            await cache.drain(one)
        assert caught.value.errno == errno.ENOSPC
        assert isinstance(caught.value.__cause__, NoSpaceError)
        device.fault = None
        assert await cache.read(512, 512) == device.data[512:1024] == before[512:1024]
        assert await cache.read(EXTENT, 512) == b"u" * 512
        await cache.drain(one)
        with pytest.raises(WriteBackError):
            await cache.sync(one)  # the drain may have been a close of which nobody read the answer
        await cache.sync(one)
        with pytest.raises(WriteBackError):
            await cache.sync(two)
        await cache.sync(two)
        assert cache.stats().write_back_errors == 1
        await cache.write(0, b"again" * 100)
        await cache.drain(one)
        assert device.data[:500] == b"again" * 100


async def test_a_drain_hides_no_error_from_a_sync() -> None:
    """A handle belongs to an open file, and each close of its descriptors drains: of a dup, and at a child's end."""
    device = FakeDevice()
    async with running(device) as cache:
        handle = cache.open()
        await cache.write(0, b"w" * 512)
        device.fault = lambda command: bad_block(0) if command.kind == "write" else None
        with pytest.raises(WriteBackError):
            await cache.drain(handle)
        device.fault = None
        await cache.drain(handle)
        with pytest.raises(WriteBackError, match="LBA 0 to 0"):
            await cache.sync(handle)
        await cache.sync(handle)
        await cache.drain(handle)
        # What a sync has told, no close needs to tell again; and somebody has been told.
        cache.report(IscsifuseError("deferred"))
        with pytest.raises(WriteBackError, match="deferred"):
            await cache.sync(handle)
        await cache.drain(handle)
        await cache.sync(cache.open())


async def test_a_writer_who_waited_for_a_write_that_failed_starts_from_what_is_on_the_disk() -> None:
    device = FakeDevice()
    before = bytes(device.data)
    gate = Gate(device, writes)
    failures = []
    async with running(device) as cache:
        await cache.write(0, b"1" * 512)

        async def drain() -> None:
            with pytest.raises(WriteBackError):
                await cache.drain()
            failures.append(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            await blocked()
            nursery.start_soon(cache.write, 100, b"2" * 100)
            await blocked()
            device.fault = lambda command: bad_block(0) if command.kind == "write" else None
            gate.open()
            await blocked()
            device.fault = None
        assert failures == [1]
        await cache.drain()
        assert device.data[:512] == before[:100] + b"2" * 100 + before[200:512]


async def test_an_error_reported_by_the_device_later_fails_the_next_sync() -> None:
    device = FakeDevice()
    async with running(device) as cache:
        handle = cache.open()
        cache.report(IscsifuseError("deferred"))
        with pytest.raises(WriteBackError, match="deferred"):
            await cache.sync(handle)
        assert not device.log
        cache.report(WriteBackError("as it is"))
        with pytest.raises(WriteBackError, match="as it is"):
            await cache.drain()
        with pytest.raises(WriteBackError, match="as it is"):
            await cache.drain(handle)
