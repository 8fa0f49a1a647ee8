"""Writing through the cache: what reaches the disk, when, in which order, and who hears of a failure."""

import errno

import pytest
import trio
import trio.testing
from cache_checks import check_invariants
from cache_fakes import FakeDevice, Gate, bad_block, reads, writes
from cache_running import EXTENT, running, small_pool

from iscsifuse.cache import BlockCache, BufferPool, CacheSettings, EndOfDeviceError
from iscsifuse.errors import MediumError, WriteBackError

blocked = trio.testing.wait_all_tasks_blocked


def spans(device: FakeDevice, kind: str) -> list[tuple[int, int]]:
    return [(command.lba, command.blocks) for command in device.commands(kind)]


# -- what is written, and when ------------------------------------------------------------------------------------


async def test_a_buffered_write_is_no_checkpoint_and_is_seen_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    device = FakeDevice()
    before = bytes(device.data)
    async with running(device) as cache:
        with trio.testing.assert_no_checkpoints():
            assert await cache.write(1024, b"x" * 1024) == 1024
        assert await cache.read(512, 2048) == before[512:1024] + b"x" * 1024 + before[2048:2560]
        assert device.data == before
        assert cache.stats().dirty_bytes == 1024
        await cache.drain()
        assert device.data[1024:2048] == b"x" * 1024
        assert cache.stats().dirty_bytes == 0
    assert spans(device, "write") == [(2, 2)]
    assert autojump_clock.current_time() < 0.1, "a drain doesn't wait for the delay"


async def test_what_nobody_drains_is_written_after_the_delay(autojump_clock: trio.testing.MockClock) -> None:
    device = FakeDevice()
    async with running(device, write_back_delay=0.2) as cache:
        await cache.write(0, b"a" * 512)
        await trio.sleep(0.15)
        await cache.write(512, b"b" * 512)
        await cache.write(EXTENT, b"c" * 512)
        assert not device.log
        await trio.sleep(0.1)
        assert spans(device, "write") == [(0, 2)]
        await trio.sleep(0.11)
        assert spans(device, "write") == [(0, 2), (8, 1)]
        await trio.sleep(10)
        await cache.write(0, b"d" * 512)
        await trio.sleep(0.25)
    assert spans(device, "write") == [(0, 2), (8, 1), (0, 1)]
    assert autojump_clock.current_time() < 11


async def test_a_sequential_stream_goes_out_at_once_in_large_commands() -> None:
    device = FakeDevice(512, 16 * 2048)
    data = bytes(range(256)) * 4096
    async with running(device, pool=BufferPool(64 << 20), write_back_delay=1e9) as cache:
        for offset in range(0, 16 << 20, 1 << 20):
            await cache.write(offset, data)
            await blocked()
        assert device.data == data * 16
    assert spans(device, "write") == [(lba, 2048) for lba in range(0, 16 * 2048, 2048)]


async def test_a_sequential_stream_of_small_writes_goes_out_by_extents() -> None:
    device = FakeDevice(512, 8 * 10)
    async with running(device, write_back_delay=1e9) as cache:
        for offset in range(0, cache.size, 1000):
            await cache.write(offset, b"s" * min(1000, cache.size - offset))
            await blocked()
        assert device.data == b"s" * cache.size
    assert spans(device, "write") == [(lba, 8) for lba in range(0, 80, 8)]


async def test_blocks_that_nobody_wrote_are_not_written() -> None:
    device = FakeDevice(512, 64)
    async with running(device) as cache:
        await cache.read(0, cache.size)
        for lba in (1, 2, 5, 15, 16, 40):
            await cache.write(lba * 512, b"w" * 512)
        await cache.drain()
    assert sorted(spans(device, "write")) == [(1, 2), (5, 1), (15, 2), (40, 1)]


async def test_a_command_is_a_mebibyte_at_most() -> None:
    device = FakeDevice(512, 16384)
    pool = BufferPool(32 << 20, slot_size=4 << 20)
    async with running(device, pool=pool) as cache:
        await cache.write(0, b"w" * (8 << 20))
        await cache.drain()
    assert {command.blocks for command in device.commands("write")} == {2048}
    assert sum(command.blocks for command in device.commands("write")) == 16384


async def test_so_many_writes_in_flight() -> None:
    device = FakeDevice(520, 700)
    gate = Gate(device, writes)
    async with running(device, slots=200, depth=5, max_dirty=150 * EXTENT) as cache:
        for lba in range(0, 700, 7):
            await cache.write(lba * 520, b"w" * 520)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.drain)
            await blocked()
            assert len(gate.held) == 5
            gate.open()
    assert len(device.commands("write")) == 100


async def test_a_hot_block_costs_a_command_per_delay(autojump_clock: trio.testing.MockClock) -> None:
    device = FakeDevice()
    device.delay = lambda _command: 0.01
    async with running(device, write_back_delay=0.2) as cache:
        for number in range(1000):
            await cache.write(700, bytes([number % 256]) * 100)
            await trio.sleep(0.001)
        await cache.drain()
        assert device.data[700:800] == bytes([999 % 256]) * 100
    assert 4 <= len(device.commands("write")) <= 7
    assert autojump_clock.current_time() < 3


# -- order --------------------------------------------------------------------------------------------------------


async def test_a_write_waits_for_the_fill_of_its_blocks() -> None:
    device = FakeDevice()
    before = bytes(device.data)
    gate = Gate(device, reads)
    async with running(device) as cache, trio.open_nursery() as nursery:
        nursery.start_soon(cache.read, 0, 2048)
        await blocked()
        nursery.start_soon(cache.write, 1024, b"x" * 512)
        nursery.start_soon(cache.write, 3000, b"y" * 72)  # needs block 5 only
        await cache.write(3584, b"z" * 512)  # needs nothing
        await blocked()
        gate.open()
        await blocked()
        expected = before[:1024] + b"x" * 512 + before[1536:3000] + b"y" * 72 + before[3072:3584] + b"z" * 512
        assert await cache.read(0, EXTENT) == expected
        await cache.drain()
        assert device.data[:EXTENT] == expected


async def test_while_a_block_is_written_back_it_can_be_read_but_not_changed() -> None:
    device = FakeDevice()
    gate = Gate(device, writes)
    async with running(device) as cache, trio.open_nursery() as nursery:
        await cache.write(0, b"1" * 1024)
        nursery.start_soon(cache.drain)
        await blocked()
        with trio.testing.assert_no_checkpoints():
            assert await cache.read(0, 1024) == b"1" * 1024
        returned = []

        async def writer(data: bytes) -> None:
            await cache.write(300, data)
            returned.append(data)

        nursery.start_soon(writer, b"2" * 100)
        await cache.write(1024, b"3" * 512)  # another block of the extent
        await blocked()
        assert not returned
        assert await cache.read(0, 1536) == b"1" * 1024 + b"3" * 512
        gate.release()
        await blocked()
        assert returned
        assert device.data[:1024] == b"1" * 1024
        gate.open()
        await cache.drain()
        assert device.data[:1536] == b"1" * 300 + b"2" * 100 + b"1" * 624 + b"3" * 512


async def test_two_parts_of_one_block_from_two_writers() -> None:
    device = FakeDevice(4096, 16)
    before = bytes(device.data)
    gate = Gate(device, reads)
    async with running(device) as cache, trio.open_nursery() as nursery:
        nursery.start_soon(cache.write, 100, b"1" * 1000)
        nursery.start_soon(cache.write, 2000, b"2" * 1000)
        nursery.start_soon(cache.read, 10, 10)
        await blocked()
        assert len(device.log) == 1
        gate.open()
        await blocked()
        await cache.drain()
    expected = before[:100] + b"1" * 1000 + before[1100:2000] + b"2" * 1000 + before[3000:]
    assert device.data == expected


async def test_a_write_needs_its_first_and_last_block_read_and_no_others() -> None:
    device = FakeDevice()
    before = bytes(device.data)
    async with running(device) as cache:
        await cache.write(700, b"w" * 9000)
        await cache.drain()
    assert sorted(spans(device, "read")) == [(1, 1), (18, 1)]
    assert device.data == before[:700] + b"w" * 9000 + before[9700:]


async def test_a_partial_write_to_a_bad_block_fails_and_a_whole_one_does_not() -> None:
    device = FakeDevice(bad={3})
    async with running(device) as cache:
        with pytest.raises(MediumError):
            await cache.write(3 * 512 + 10, b"x")
        assert cache.stats().dirty_bytes == 0
        device.fault = None
        await cache.write(3 * 512, b"x" * 512)
        assert await cache.read(3 * 512, 512) == b"x" * 512
        device.bad.clear()


async def test_writes_at_the_end() -> None:
    device = FakeDevice(512, 20)
    for mode in (True, False):
        async with running(device, write_behind=mode) as cache:
            assert await cache.write(10000, b"e" * 1000) == 240
            assert await cache.write(4000, memoryview(b"f" * 100_000)) == 6240
            for offset in (10240, 10241, 1 << 40):
                with pytest.raises(EndOfDeviceError) as caught:
                    await cache.write(offset, b"x")
                assert caught.value.errno == errno.ENOSPC
            assert await cache.write(10240, b"") == 0
        assert device.data[4000:] == b"f" * 6240


# -- bounds -------------------------------------------------------------------------------------------------------


async def test_writers_wait_where_too_much_is_dirty() -> None:
    device = FakeDevice()
    gate = Gate(device, writes)
    done: list[int] = []
    async with running(device, max_dirty=3 * EXTENT, depth=2) as cache, trio.open_nursery() as nursery:

        async def writer(index: int) -> None:
            await cache.write(index * EXTENT, b"w" * 512)
            done.append(index)

        for index in range(6):
            nursery.start_soon(writer, index)
        await blocked()
        assert len(done) == 3
        assert len(gate.held) == 2, "waiting for room gets things going"
        first = done[0]
        await cache.write(first * EXTENT + 1024, b"w" * 512)  # adds no extent
        for _ in range(5):
            assert cache.stats().dirty_bytes <= 4 * 512
            gate.release()
            await blocked()
        assert sorted(done) == list(range(6))
        gate.open()


@pytest.mark.parametrize("max_dirty", [1, EXTENT])
async def test_the_smallest_bound_still_moves(max_dirty: int) -> None:
    device = FakeDevice()
    async with running(device, max_dirty=max_dirty, slots=4) as cache:
        with trio.fail_after(10):
            for lba in range(0, 512, 5):
                await cache.write(lba * 512 + 7, b"w" * 600)
        await cache.drain()
        for lba in range(0, 512, 5):
            assert device.data[lba * 512 + 7 : lba * 512 + 607] == b"w" * 600


async def test_many_dirtied_extents_are_not_kept_waiting_for_the_delay() -> None:
    device = FakeDevice()
    async with running(device, slots=32, write_back_delay=1e9) as cache:
        for index in range(12):
            await cache.write(index * EXTENT, b"w" * 512)
            await blocked()
        assert spans(device, "write") == [(0, 1), (8, 1), (16, 1), (24, 1)]


async def test_a_lun_whose_disk_is_stuck_does_not_stop_another() -> None:
    pool = small_pool(8)
    stuck, fine = FakeDevice(), FakeDevice()
    gate = Gate(stuck, writes)
    async with (
        running(stuck, pool=pool, max_dirty=100 * EXTENT) as one,
        running(fine, pool=pool) as two,
        trio.open_nursery() as nursery,
    ):
        for index in range(10):
            nursery.start_soon(one.write, index * EXTENT, b"w" * 512)
        await blocked()
        assert pool.unclean == pool.most_unclean == 6
        with trio.fail_after(10):
            for index in range(20):
                offset = index * EXTENT
                await two.write(offset, b"w" * 512)
                assert await two.read(offset, 1024) == b"w" * 512 + fine.data[offset + 512 : offset + 1024]
            await two.drain()
        check_invariants(one, pool)
        gate.open()


async def test_a_writer_without_a_slot_gets_other_luns_going() -> None:
    pool = small_pool(4)
    devices = [FakeDevice() for _ in range(6)]
    async with trio.open_nursery() as nursery:
        caches = []
        for device in devices:
            cache = BlockCache(device, pool=pool, settings=CacheSettings(write_back_delay=1e9))
            caches.append(cache)
            await nursery.start(cache.run)
        with trio.fail_after(10):
            for cache in caches:
                await cache.write(0, b"w" * 512)  # one extent each is granted, but there are only four
        assert sum(len(device.commands("write")) for device in devices) >= 2
        for cache in caches:
            await cache.drain()
        assert all(device.data[:512] == b"w" * 512 for device in devices)
        nursery.cancel_scope.cancel()


# -- write-through, and life without run --------------------------------------------------------------------------


@pytest.mark.parametrize("block", [512, 520, 4096])
async def test_write_through_returns_with_the_status_and_is_cached(block: int) -> None:
    device = FakeDevice(block, 80)
    expected = bytearray(device.data)
    async with running(device, write_behind=False) as cache:
        for offset, length in ((0, 5), (block, block), (3 * block + 7, 30_000), (700, 800)):
            data = bytes([length % 251]) * length
            assert await cache.write(offset, data) == length
            expected[offset : offset + length] = data
            assert device.data == expected
            count = len(device.log)
            assert await cache.read(offset, length) == data
            assert len(device.log) == count
            await cache.drain()
        if block != 520:
            assert max(command.blocks for command in device.commands("write")) == 30_000 // block + 1


async def test_write_through_tells_its_writer_and_nobody_else() -> None:
    device = FakeDevice()
    async with running(device, write_behind=False) as cache:
        handle = cache.open()
        await cache.read(0, 4 * EXTENT)
        device.fault = lambda command: bad_block(command.lba) if command.kind == "write" else None
        with pytest.raises(MediumError):
            await cache.write(100, b"w" * 2 * EXTENT)
        device.fault = None
        assert await cache.read(0, 4 * EXTENT) == device.data[: 4 * EXTENT]
        await cache.sync(handle)


async def test_write_through_one_after_the_other() -> None:
    device = FakeDevice()
    gate = Gate(device, writes)
    async with running(device, write_behind=False) as cache, trio.open_nursery() as nursery:
        nursery.start_soon(cache.write, 0, b"1" * 3 * EXTENT)
        await blocked()
        nursery.start_soon(cache.write, EXTENT + 5, b"2" * EXTENT)
        nursery.start_soon(cache.write, 5 * EXTENT, b"3" * EXTENT)
        await blocked()
        assert [command.lba for command in gate.held] == [0, 40]
        assert await cache.read(0, 3 * EXTENT) == b"1" * 3 * EXTENT
        gate.release()
        await blocked()
        assert [command.lba for command in gate.held] == [8]
        gate.open()
        await blocked()
        assert device.data[: 3 * EXTENT] == b"1" * (EXTENT + 5) + b"2" * EXTENT + b"1" * (EXTENT - 5)


async def test_a_cancelled_write_through_is_forgotten() -> None:
    device = FakeDevice()
    gate = Gate(device, writes)
    pool = small_pool(16)
    async with running(device, pool=pool, write_behind=False, depth=1) as cache:
        for index in (1, 9, 0, 2):  # apart in memory: several commands
            await cache.read(index * EXTENT, 512)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.write, 0, b"w" * 3 * EXTENT)
            await blocked()
            assert len(gate.held) == 1
            nursery.cancel_scope.cancel()
        gate.open()
        check_invariants(cache, pool)
        assert pool.unclean == 0
        assert await cache.read(0, 3 * EXTENT) == device.data[: 3 * EXTENT]


async def test_write_through_goes_on_in_pieces_where_slots_are_few() -> None:
    device = FakeDevice()
    async with running(device, write_behind=False, slots=4) as cache:
        await cache.write(100, b"w" * 20 * EXTENT)
        assert device.data[100 : 100 + 20 * EXTENT] == b"w" * 20 * EXTENT
        gate = Gate(device, reads)
        async with trio.open_nursery() as nursery:
            cache.invalidate()
            for index in range(4):
                nursery.start_soon(cache.read, index * EXTENT, 512)
            await blocked()
            nursery.start_soon(cache.write, 10 * EXTENT, b"x" * 3 * EXTENT)
            nursery.start_soon(cache.write, 20 * EXTENT, b"y" * 3 * EXTENT)
            await blocked()
            gate.open()
        assert device.data[10 * EXTENT : 13 * EXTENT] == b"x" * 3 * EXTENT
        assert device.data[20 * EXTENT : 23 * EXTENT] == b"y" * 3 * EXTENT


async def test_without_run_writes_go_through() -> None:
    device = FakeDevice()
    cache = BlockCache(device, pool=small_pool(8), settings=CacheSettings())
    await cache.write(10, b"w" * 20_000)
    assert device.data[10:20_010] == b"w" * 20_000
    await cache.write(100, b"v" * 10)
    assert device.data[100:110] == b"v" * 10
    await cache.sync(cache.open())


async def test_what_is_dirty_when_run_is_cancelled_is_lost_and_that_is_told() -> None:
    device = FakeDevice()
    before = bytes(device.data)
    pool = small_pool(8)
    cache = BlockCache(device, pool=pool, settings=CacheSettings(write_back_delay=1e9, max_dirty=EXTENT * 2))
    handle = cache.open()
    gate = Gate(device, writes)
    async with trio.open_nursery() as waiting, trio.open_nursery() as nursery:
        await nursery.start(cache.run)
        await cache.write(0, b"w" * EXTENT)
        await blocked()
        await cache.write(EXTENT, b"v" * 512)
        waiting.start_soon(cache.write, 3 * EXTENT, b"x" * 512)  # waits for room
        waiting.start_soon(cache.write, 100, b"y" * 10)  # waits for the write-back
        failed = trio.Event()

        async def drain() -> None:
            with pytest.raises(WriteBackError, match="4608 bytes"):
                await cache.drain(handle)
            failed.set()

        waiting.start_soon(drain)
        await blocked()
        assert not failed.is_set()
        gate.hold = lambda _command: False
        nursery.cancel_scope.cancel()
    assert failed.is_set()
    check_invariants(cache, pool)
    assert pool.unclean == 0
    assert device.data[3 * EXTENT : 3 * EXTENT + 512] == b"x" * 512
    assert device.data[100:110] == b"y" * 10
    assert await cache.read(0, 2 * EXTENT) == device.data[: 2 * EXTENT]
    assert device.data[EXTENT : 2 * EXTENT] == before[EXTENT : 2 * EXTENT]
    await cache.drain(handle)
    with pytest.raises(WriteBackError, match="4608 bytes"):
        await cache.sync(handle)
    # It can run again.
    async with trio.open_nursery() as nursery:
        await nursery.start(cache.run)
        await cache.write(0, b"z" * 512)
        await cache.sync(handle)
        assert device.data[:512] == b"z" * 512
        nursery.cancel_scope.cancel()


async def test_a_write_through_that_meets_dirty_blocks_of_a_cache_that_is_stopping_waits_for_them() -> None:
    device = FakeDevice()
    gate = Gate(device, writes)
    cache = BlockCache(device, pool=small_pool(8), settings=CacheSettings(write_back_delay=1e9))
    async with trio.open_nursery() as waiting:
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            await cache.write(0, b"w" * 512)
            # As in the moment between the end of ``run``'s scope and that of its last worker.
            cache._running = False
            waiting.start_soon(cache.write, 0, b"x" * 512)
            await blocked()
            assert not gate.held
            nursery.cancel_scope.cancel()
        gate.open()
    assert device.data[:512] == b"x" * 512
    with pytest.raises(WriteBackError):
        await cache.drain()
