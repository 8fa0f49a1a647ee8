"""What a disk may still lose: kept until a flush has covered it, written again when the disk was reset."""

import contextlib

import pytest
import trio
import trio.testing
from cache_fakes import FakeDevice, Gate, bad_block, flushes, writes
from cache_running import EXTENT, running, small_pool

from iscsifuse.cache import BlockCache, CacheSettings, DirectFile
from iscsifuse.errors import IscsifuseError, MediumError, WriteBackError

blocked = trio.testing.wait_all_tasks_blocked


def volatile(**changes: object) -> FakeDevice:
    device = FakeDevice(volatile=True)
    for name, value in changes.items():
        setattr(device, name, value)
    return device


async def settled(cache: BlockCache) -> None:
    """Everything dirty is on the device, flushed or not."""
    await blocked()
    await cache.drain()
    await blocked()


@pytest.mark.conformance(104)
@pytest.mark.parametrize("mode", ["behind", "through"])
async def test_what_was_written_before_a_power_cut_is_written_again(mode: str) -> None:
    device = volatile()
    async with running(device, write_behind=mode == "behind") as cache:
        handle = cache.open()
        await cache.write(0, b"one" * 700)
        await settled(cache)
        assert cache.stats().unsynced_bytes == 5 * 512
        device.cut_power()
        assert device.data[:2100] != b"one" * 700
        cache.lose()
        assert bytes(await cache.read(0, 2100)) == b"one" * 700  # nobody reads what came back from the dead
        await cache.sync(handle)
        assert device.stable[:2100] == b"one" * 700
        assert cache.stats().unsynced_bytes == 0
        assert cache.stats().losses == 1


async def test_a_flush_covers_what_had_its_status_when_it_began() -> None:
    device = volatile()
    async with running(device) as cache, trio.open_nursery() as nursery:
        await cache.write(0, b"1" * 512)
        await settled(cache)
        gate = Gate(device, flushes)
        nursery.start_soon(cache.sync)
        await blocked()
        await cache.write(EXTENT, b"2" * 512)
        await settled(cache)
        gate.open()
        await blocked()
        assert cache.stats().unsynced_bytes == 512  # the second one
        device.cut_power()
        cache.lose()
        await cache.sync()
        assert device.stable[EXTENT : EXTENT + 512] == b"2" * 512


async def test_a_sync_does_not_believe_a_flush_during_which_the_disk_was_reset() -> None:
    device = volatile()
    async with running(device) as cache, trio.open_nursery() as nursery:
        await cache.write(0, b"1" * 512)
        gate = Gate(device, flushes)
        nursery.start_soon(cache.sync)
        await blocked()
        device.cut_power()
        cache.lose()
        gate.open()
        nursery.cancel_scope.deadline = trio.current_time() + 100
    assert not nursery.cancel_scope.cancelled_caught
    assert device.stable[:512] == b"1" * 512


async def test_a_disk_that_is_reset_again_and_again_is_an_error() -> None:
    device = volatile()
    async with running(device) as cache:
        await cache.write(0, b"1" * 512)

        async def reset(command: object) -> None:
            if flushes(command):  # type: ignore[arg-type]
                device.cut_power()
                cache.lose()

        device.gate = reset
        with pytest.raises(WriteBackError, match="again and again"):
            await cache.sync()
        device.gate = None


async def test_memory_is_bounded_by_flushes_of_its_own() -> None:
    device = volatile(block_count=64 * 8)
    device.data = bytearray(64 * EXTENT)
    async with running(device, slots=16) as cache:
        for index in range(64):
            await cache.write(index * EXTENT, bytes([index + 1]) * EXTENT)
        await settled(cache)
        assert cache.stats().unsynced_bytes <= 4 * EXTENT  # a quarter of the pool
        assert 8 <= len(device.commands("flush")) <= 16
        device.cut_power()
        cache.lose()
        await settled(cache)
        assert device.data == b"".join(bytes([index + 1]) * EXTENT for index in range(64))


async def test_one_lun_whose_flush_hangs_does_not_stop_another(autojump_clock: trio.testing.MockClock) -> None:
    pool = small_pool(16)
    stuck, other = volatile(), volatile()
    gate = Gate(stuck, flushes)
    async with running(stuck, pool=pool) as cache, running(other, pool=pool) as lively:

        async def fill() -> None:
            for index in range(100):
                await cache.write(index * EXTENT, b"s" * EXTENT)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            await trio.sleep(10)
            for index in range(100):
                with trio.fail_after(10):
                    await lively.write(index * EXTENT, b"l" * EXTENT)
                    assert await lively.read((99 - index) * EXTENT, 512)
            with trio.fail_after(10):
                await lively.sync()
            assert gate.held
            gate.open()  # and then the first one goes on
    assert autojump_clock.current_time() < 100


async def test_a_flush_that_fails_gives_memory_back_to_who_waits() -> None:
    device = volatile(fault=lambda command: IscsifuseError("no flush") if flushes(command) else None)
    async with running(device, slots=4) as cache:
        handle = cache.open()
        with trio.fail_after(100):
            for index in range(50):
                await cache.write(index * EXTENT, b"x" * EXTENT)
        with pytest.raises(WriteBackError, match="no flush"):
            await cache.drain(handle)


async def test_what_was_given_up_is_not_read_from_memory_once_the_disk_has_lost_it() -> None:
    device = volatile(fault=lambda command: IscsifuseError("no flush") if flushes(command) else None)
    before = bytes(device.data)
    async with running(device, slots=4) as cache:
        handle = cache.open()
        for index in range(6):
            await cache.write(index * EXTENT, b"x" * EXTENT)
        with pytest.raises(WriteBackError, match="no flush"):
            await cache.drain(handle)
        given_up = [index for index, extent in cache._extents.items() if extent.valid and not extent.unsynced]
        assert given_up
        device.cut_power()
        cache.lose()
        for index in given_up:
            at = index * EXTENT
            assert bytes(await cache.read(at, EXTENT)) == before[at : at + EXTENT]
        device.fault = None
        with pytest.raises(WriteBackError, match="may be lost"):
            await cache.drain(handle)
        kept = set(range(6)) - set(given_up)  # or it had left memory before
        for index in range(6):
            at = index * EXTENT
            assert bytes(await cache.read(at, EXTENT)) == device.data[at : at + EXTENT]
        assert any(device.data[index * EXTENT : (index + 1) * EXTENT] == b"x" * EXTENT for index in kept)


async def test_a_block_whose_newer_write_failed_is_an_error_if_the_disk_is_reset() -> None:
    device = volatile()
    async with running(device) as cache:
        handle = cache.open()
        await cache.write(0, b"1" * 512)
        await settled(cache)
        device.fault = lambda command: bad_block(0) if writes(command) else None
        await cache.write(0, b"2" * 512)
        with pytest.raises(WriteBackError):
            await cache.drain(handle)
        device.fault = None
        device.cut_power()  # the first one is lost, which was acknowledged
        cache.lose()
        with pytest.raises(WriteBackError, match="may be lost"):
            await cache.sync(handle)
        await cache.sync(handle)


@pytest.mark.parametrize("mode", ["behind", "through"])
async def test_a_cache_that_was_stopped_can_only_tell(mode: str) -> None:
    device = volatile()
    cache = BlockCache(device, pool=small_pool(8), settings=CacheSettings(write_behind=mode == "behind"))
    await cache.write(0, b"1" * 512)  # nothing runs: it goes through
    handle = cache.open()
    gate = Gate(device, writes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.write, EXTENT, b"2" * 512)
        await blocked()
        cache.lose()
        gate.open()
    with pytest.raises(WriteBackError, match="reset"):
        await cache.sync(handle)


@pytest.mark.parametrize("when", ["written", "being written"])
async def test_a_cache_that_was_stopped_shows_nothing_that_may_be_lost(when: str) -> None:
    device = volatile(eager=True)
    before = bytes(device.data)
    cache = BlockCache(device, pool=small_pool(8), settings=CacheSettings())
    handle = cache.open()
    gate = Gate(device, writes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.write, 0, b"1" * 512)
        await blocked()
        if when == "written":
            gate.open()
            await blocked()
        assert device.data[:512] == b"1" * 512
        device.cut_power()
        cache.lose()
        gate.open()
    assert bytes(await cache.read(0, 512)) == before[:512] == device.data[:512]
    with pytest.raises(WriteBackError, match="reset"):
        await cache.sync(handle)
    await cache.sync(handle)


@pytest.mark.parametrize("how", ["fails", "is cancelled", "is never sent"])
async def test_what_was_below_a_write_through_that_a_reset_met_is_told_to_be_lost(how: str) -> None:
    device = volatile(eager=True)
    before = bytes(device.data)
    async with running(device, write_behind=False, depth=1) as cache:
        handle = cache.open()
        for index in (1, 9, 0):  # apart in memory: several commands
            await cache.write(index * EXTENT, b"1" * EXTENT)
        gate = Gate(device, writes)
        where = EXTENT if how == "is never sent" else 0
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                with contextlib.suppress(MediumError):
                    await cache.write(0, b"2" * (EXTENT + where))

            nursery.start_soon(write)
            await blocked()
            assert len(gate.held) == 1
            device.cut_power()
            cache.lose()
            if how == "fails":
                device.fault = lambda command: bad_block(0) if writes(command) else None
                gate.release()
                gate.hold = lambda _command: False
                await blocked()
                device.fault = None
            else:
                nursery.cancel_scope.cancel()
        gate.open()
        assert bytes(await cache.read(where, EXTENT)) == before[where : where + EXTENT]
        with pytest.raises(WriteBackError, match="during a write that then failed"):
            await cache.sync(handle)
        await cache.sync(handle)
        assert device.stable[9 * EXTENT : 10 * EXTENT] == b"1" * EXTENT


async def test_what_a_disk_had_beyond_its_new_end_is_gone_and_told() -> None:
    device = volatile()
    async with running(device) as cache:
        handle = cache.open()
        for lba in (400, 499, 500, 1000):
            await cache.write(lba * 512, b"x" * 512)
        await settled(cache)
        device.block_count = 500
        cache.invalidate()
        assert cache.peek(1000 * 512, 512) is None
        assert cache.stats().unsynced_bytes == 2 * 512
        with pytest.raises(WriteBackError, match="has shrunk: 1024 bytes"):
            await cache.sync(handle)
        await cache.sync(handle)
        device.data[500 * 512 :] = bytes(524 * 512)
        device.block_count = 1024
        cache.invalidate()
        for lba in (400, 499, 500, 1000):
            assert cache.peek(lba * 512, 512) is None
            assert bytes(await cache.read(lba * 512, 512)) == (b"x" if lba < 500 else b"\0") * 512


async def test_dirty_data_beyond_the_end_of_a_disk_is_not_shown() -> None:
    device = FakeDevice()
    async with running(device, write_back_delay=1e9) as cache:
        handle = cache.open()
        await cache.write(499 * 512, b"d" * 1024)
        device.block_count = 500
        cache.invalidate()
        for lba, length in ((500, 512), (499, 1024), (500, 1)):
            assert cache.peek(lba * 512, length) is None
        assert cache.peek(499 * 512, 512) == b"d" * 512
        assert bytes(await cache.read(499 * 512, 1024)) == b"d" * 512
        with pytest.raises(WriteBackError):
            await cache.sync(handle)


async def test_without_a_volatile_cache_nothing_is_kept() -> None:
    device = FakeDevice()
    async with running(device) as cache:
        await cache.write(0, b"1" * 512)
        await settled(cache)
        assert cache.stats().unsynced_bytes == 0
        before = len(device.log)
        cache.lose()
        await settled(cache)
        assert len(device.log) == before


async def test_a_file_that_keeps_nothing_tells_what_may_be_lost() -> None:
    device = volatile()
    file = DirectFile(device)
    handle = file.open()
    file.lose()
    await file.write(0, b"1" * 1024)
    await file.sync(handle)
    file.lose()
    await file.sync(handle)  # it was flushed
    await file.write(0, b"2" * 1024)
    assert file.stats().unsynced_bytes == 1024
    file.lose()
    with pytest.raises(WriteBackError, match="1024 bytes"):
        await file.sync(handle)
    await file.sync(handle)
    gate = Gate(device, writes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.write, 0, b"3" * 512)
        await blocked()
        file.lose()
        gate.open()
    with pytest.raises(WriteBackError, match="512 bytes"):
        await file.sync(handle)
