"""Reading through the cache: what is asked of the disk, and what becomes of shared and failed fills."""

import pytest
import trio
import trio.testing
from cache_checks import check_invariants
from cache_fakes import Command, FakeDevice, Gate, reads
from cache_running import EXTENT, running, small_pool

from iscsifuse.cache import BlockCache, BufferPool, CacheSettings, DirectFile, block_file
from iscsifuse.errors import IscsifuseError, MediumError, ParameterDataError
from support.fibres import as_fibre

blocked = trio.testing.wait_all_tasks_blocked


async def test_a_hit_is_a_slice_of_the_arena_and_no_checkpoint() -> None:
    device = FakeDevice()
    pool = small_pool(8)
    async with running(device, pool=pool) as cache:
        await cache.read(1000, 2000)
        with trio.testing.assert_no_checkpoints():
            found = await cache.read(1111, 1234)
        assert isinstance(found, memoryview)
        assert found.obj is pool.view.obj
        assert found == device.data[1111 : 1111 + 1234]
        assert cache.stats().hits == 1


async def test_a_read_asks_for_its_blocks_and_no_others() -> None:
    device = FakeDevice()
    async with running(device) as cache:
        await cache.read(1000, 2000)  # blocks 1 to 5
        await cache.read(0, 4096)  # 0, 6 and 7 are missing
    assert sorted((c.lba, c.blocks) for c in device.log) == [(0, 1), (1, 5), (6, 2)]


@pytest.mark.expect_log("a mistake in the read-ahead")
async def test_a_mistake_in_the_read_ahead_is_no_error_of_a_read() -> None:
    """It is only advice. What looks on is left alone from then on."""

    def blunder(*_: object, **__: object) -> None:
        raise NameError("forgotten")

    device = FakeDevice()
    for way in ("read", "peek"):
        async with running(device, read_ahead=EXTENT) as cache:
            await cache.read(0, 4096)
            vars(cache)["_observe"] = blunder
            found = await cache.read(1000, 2000) if way == "read" else cache.peek(1000, 2000)
            assert found == device.data[1000:3000]
            assert not cache._watching
            assert await cache.read(5000, 2000) == device.data[5000:7000]


@pytest.mark.parametrize(("block", "commands"), [(512, 1), (4096, 1), (520, 5)])
async def test_a_read_across_extents(block: int, commands: int) -> None:
    device = FakeDevice(block, 64)
    async with running(device) as cache:
        found = await cache.read(100, 4 * EXTENT)
        assert found == device.data[100 : 100 + 4 * EXTENT]
        assert len(device.log) == commands
        assert isinstance(found, memoryview)
        assert (found.obj is cache._pool.view.obj) == (commands == 1)
        with trio.testing.assert_no_checkpoints():
            again = await cache.read(200, 4 * EXTENT - 300)
        assert again == device.data[200 : 4 * EXTENT - 100]
        assert (cache.stats().hits, cache.stats().misses) == (1, 1)


async def test_a_read_across_extents_that_lie_apart_in_memory() -> None:
    device = FakeDevice()
    async with running(device) as cache:
        for index in (1, 9, 0, 2):
            await cache.read(index * EXTENT, EXTENT)
        found = await cache.read(100, 3 * EXTENT - 200)
        assert isinstance(found, memoryview)
        assert found.obj is cache._pool.scratch.obj
        assert found == device.data[100 : 3 * EXTENT - 100]
    assert len(device.log) == 4


async def test_holes_are_filled_in_parallel() -> None:
    device = FakeDevice()
    async with running(device, depth=4) as cache:
        for lba in range(0, 24, 2):
            await cache.read(lba * 512, 512)
        gate = Gate(device, reads)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.read, 0, 24 * 512)
            await blocked()
            assert len(gate.held) == 4
            gate.open()
        assert await cache.read(0, 24 * 512) == device.data[: 24 * 512]


async def test_reads_at_the_end() -> None:
    device = FakeDevice(512, 100)
    async with running(device) as cache:
        assert cache.size == 51200
        assert await cache.read(51200 - 100, 1 << 20) == device.data[-100:]
        assert await cache.read(51200, 1) == b""
        assert await cache.read(60000, 10) == b""
        assert await cache.read(5, 0) == b""


async def test_one_fill_however_many_ask() -> None:
    device = FakeDevice()
    gate = Gate(device, reads)
    found = []
    async with running(device) as cache:

        async def reader(offset: int, length: int) -> None:
            found.append(bytes(await cache.read(offset, length)) == device.data[offset : offset + length])

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(reader, number * 10, 3 * EXTENT)
            await blocked()
            gate.open()
        assert found == [True] * 20
        blocks = [lba for command in device.log for lba in command.span]
        assert len(blocks) == len(set(blocks))
        assert cache.stats().uncached_reads == 0


async def test_many_different_fills_in_one_extent_disturb_nobody() -> None:
    """Each of them wakes who waits in the extent; that isn't a failure."""
    device = FakeDevice()
    gate = Gate(device, lambda command: command.lba == 7)
    async with running(device) as cache:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.read, 7 * 512, 512)
            await blocked()
            nursery.start_soon(cache.read, 7 * 512, 512)
            for lba in range(7):
                await cache.read(lba * 512, 512)
                await blocked()
            gate.open()
        assert cache.stats().uncached_reads == 0
        assert len(device.log) == 8


async def test_a_bad_block_costs_only_who_asks_for_it() -> None:
    device = FakeDevice(bad={5})
    async with running(device) as cache:
        with pytest.raises(MediumError):
            await cache.read(0, 4096)
        for lba in (0, 1, 2, 3, 4, 6, 7):
            assert await cache.read(lba * 512, 512) == device.data[lba * 512 : lba * 512 + 512]
        for _ in range(2):
            with pytest.raises(MediumError):
                await cache.read(5 * 512, 1)
        device.bad.clear()
        assert await cache.read(0, 4096) == device.data[:4096]


async def test_of_several_holes_the_good_ones_stay() -> None:
    device = FakeDevice(bad={4})
    async with running(device) as cache:
        await cache.read(2 * 512, 512)
        await cache.read(6 * 512, 512)
        with pytest.raises(MediumError):
            await cache.read(0, 4096)
        count = len(device.log)
        await cache.read(0, 3 * 512)
        await cache.read(6 * 512, 1024)
        assert len(device.log) == count


async def test_who_waited_for_a_failed_fill_reads_just_his_own() -> None:
    device = FakeDevice(bad={5})
    gate = Gate(device, reads)
    async with running(device) as cache:

        async def unlucky() -> None:
            with pytest.raises(MediumError):
                await cache.read(0, 4096)

        async def lucky() -> None:
            assert await cache.read(512, 1024) == device.data[512:1536]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(unlucky)
            await blocked()
            nursery.start_soon(lucky)
            await blocked()
            assert len(gate.held) == 1
            gate.open()
    assert [(c.lba, c.blocks) for c in device.log] == [(0, 8), (1, 2)]


async def test_many_who_wait_for_a_dying_block_do_not_queue_up(autojump_clock: trio.testing.MockClock) -> None:
    device = FakeDevice(bad={5})
    device.delay = lambda _command: 30.0
    failures = 0
    async with running(device) as cache:

        async def reader() -> None:
            nonlocal failures
            with pytest.raises(MediumError):
                await cache.read(5 * 512, 512)
            failures += 1

        started = autojump_clock.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(reader)
        assert failures == 50
        assert autojump_clock.current_time() - started <= 3 * 30.0 + 1
        device.delay = None


@pytest.mark.parametrize("length", [512, 3 * EXTENT])
async def test_a_cancelled_filler_leaves_the_work_to_the_others(length: int) -> None:
    device = FakeDevice()
    gate = Gate(device, reads)
    async with running(device) as cache:
        found = []
        scope = trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                await cache.read(0, length)

        async def other() -> None:
            found.append(bytes(await cache.read(0, length)) == device.data[:length])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancelled)
            await blocked()
            for _ in range(3):
                nursery.start_soon(other)
            await blocked()
            assert len(gate.held) == 1
            scope.cancel()
            await blocked()
            assert len(gate.held) == 1
            gate.open()
        assert found == [True] * 3
        assert cache.stats().uncached_reads == 0


async def test_cancelled_before_all_holes_were_begun() -> None:
    device = FakeDevice()
    async with running(device, depth=2) as cache:
        for lba in range(0, 24, 2):
            await cache.read(lba * 512, 512)
        gate = Gate(device, reads)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.read, 0, 24 * 512)
            await blocked()
            nursery.cancel_scope.cancel()
        gate.open()
        assert not any(extent.filling for extent in cache._extents.values())
        assert await cache.read(0, 24 * 512) == device.data[: 24 * 512]


async def test_what_was_being_read_when_the_medium_changed_does_not_count() -> None:
    device = FakeDevice()
    gate = Gate(device, reads)
    found = []
    async with running(device) as cache:

        async def reader(offset: int, length: int) -> None:
            found.append(bytes(await cache.read(offset, length)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader, 0, 512)
            nursery.start_soon(reader, EXTENT, 2 * EXTENT)
            await blocked()
            # The disk answers with its old content; before the answer is seen, the medium changes.
            device.data[:] = b"o" * len(device.data)
            gate.open()
            device.gate = None
            device.delay = lambda _command: device.data.__setitem__(slice(None), b"n" * len(device.data)) or 0
            cache.invalidate()
        assert found in ([b"n" * 512, b"n" * 2 * EXTENT], [b"n" * 2 * EXTENT, b"n" * 512])


async def test_an_invalidated_fill_is_read_again_before_its_reader_returns() -> None:
    device = FakeDevice()
    async with running(device) as cache:
        images = [b"1", b"2", b"3"]

        def change(_command: Command) -> float:
            if images:
                device.data[:] = images.pop(0) * len(device.data)
            return 0

        async def gate(_command: Command) -> None:
            if len(images) == 2:
                cache.invalidate()

        device.delay = change
        device.gate = gate
        assert await cache.read(0, 512) == b"1" * 512
        cache.invalidate()
        assert await cache.read(0, 512) == b"3" * 512


async def test_a_medium_that_keeps_changing_can_be_read_still() -> None:
    device = FakeDevice()
    async with running(device) as cache:

        async def gate(_command: Command) -> None:
            cache.invalidate()

        device.gate = gate
        with trio.fail_after(5):
            assert await cache.read(0, 512) == device.data[:512]
            assert await cache.read(EXTENT - 512, 1024) == device.data[EXTENT - 512 : EXTENT + 512]
        assert cache.stats().uncached_reads == 2
        assert len(device.log) < 12


async def test_invalidate_forgets_what_is_clean() -> None:
    device = FakeDevice()
    async with running(device) as cache:
        await cache.read(0, 8192)
        await cache.write(8192 + 512, b"w" * 512)
        await cache.read(8192, 4096)
        device.data[: 3 * EXTENT] = b"n" * 3 * EXTENT
        assert bytes(await cache.read(0, 8192)) != b"n" * 8192
        cache.invalidate()
        assert cache.stats().cached_bytes == 512
        assert len(cache._pool._free) == cache._pool.slots - 1, "empty extents are given back"
        assert await cache.read(0, 8192) == b"n" * 8192
        assert await cache.read(8192, 4096) == b"n" * 512 + b"w" * 512 + b"n" * 3072


async def test_capacity_may_change() -> None:
    device = FakeDevice(512, 100)
    async with running(device) as cache:
        await cache.read(90 * 512, 10 * 512)
        device.block_count = 200
        device.data += b"g" * 100 * 512
        cache.invalidate()
        assert cache.size == 200 * 512
        assert await cache.read(96 * 512, 8 * 512) == device.data[96 * 512 : 104 * 512]
        await cache.write(103 * 512, b"w" * 100)
        device.block_count = 50
        cache.invalidate()
        assert await cache.read(49 * 512, 4096) == device.data[49 * 512 : 50 * 512]
        assert await cache.read(96 * 512, 512) == b""
        with pytest.raises(IscsifuseError):
            await cache.drain()


async def test_readers_get_along_without_a_slot() -> None:
    device = FakeDevice()
    gate = Gate(device, reads)
    pool = small_pool(4)
    async with running(device, pool=pool) as cache:
        async with trio.open_nursery() as nursery:
            for index in range(4):
                nursery.start_soon(cache.read, index * EXTENT, 100)
            await blocked()
            gate.hold = lambda _command: False
            with trio.fail_after(5):
                assert await cache.read(50 * 512, 100) == device.data[50 * 512 : 50 * 512 + 100]
                assert await cache.read(3 * EXTENT + 3072, 2048) == device.data[15360:17408]
            check_invariants(cache, pool)
            gate.open()
        assert cache.stats().uncached_reads == 2
        assert await cache.read(0, 16 * EXTENT) == device.data[: 16 * EXTENT], "more than the pool has"


async def test_an_uncached_read_sees_what_is_only_in_memory() -> None:
    device = FakeDevice()
    async with running(device, slots=4) as cache:
        await cache.write(3 * 512, b"w" * 512)
        gate = Gate(device, lambda command: command.kind == "read" and command.lba == 0)
        found = []

        async def reader() -> None:
            found.append(bytes(await cache.read(0, 6 * EXTENT)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await blocked()
            await cache.write(4 * 512, b"x" * 512)  # while it is being read
            gate.open()
        assert found[0][3 * 512 : 4 * 512] == b"w" * 512
        # Not what came from the disk: that may be torn, if it was written back at the same moment.
        assert found[0][4 * 512 : 5 * 512] == b"x" * 512
        assert found[0][5 * 512 :] == device.data[5 * 512 : 6 * EXTENT]
        assert cache.stats().uncached_reads == 1


async def test_pinned_extents_are_not_evicted_under_their_reader() -> None:
    device = FakeDevice()
    async with running(device, slots=4) as cache:
        await cache.read(0, EXTENT)
        gate = Gate(device, lambda command: command.lba == 8)
        found = []

        async def reader() -> None:
            found.append(bytes(await cache.read(0, 2 * EXTENT)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await blocked()
            for index in range(5, 30):
                await cache.read(index * EXTENT, EXTENT)
            gate.open()
        assert found == [device.data[: 2 * EXTENT]]
        assert [c.lba for c in device.log].count(0) == 1


async def test_sequential_reads_are_fetched_ahead_in_large_commands() -> None:
    device = FakeDevice(512, 64 * 2048)
    pool = BufferPool(32 << 20)
    async with running(device, pool=pool, read_ahead=4 << 20) as cache:
        for offset in range(0, cache.size, 131072):
            assert await cache.read(offset, 131072) == device.data[offset : offset + 131072]
            await blocked()
        stats = cache.stats()
        assert stats.misses == 2
        assert stats.hits == 64 * 8 - 2
        assert stats.read_ahead_bytes == cache.size - 2 * 131072
        assert stats.read_ahead_commands < 64 + 8
        blocks = [lba for command in device.log for lba in command.span]
        assert len(blocks) == len(set(blocks)) == device.block_count


async def test_read_ahead_of_small_requests_and_odd_blocks() -> None:
    device = FakeDevice(520, 4000)
    async with running(device, slots=64, read_ahead=16 * EXTENT) as cache:
        for offset in range(0, cache.size, 1000):
            assert await cache.read(offset, 1000) == device.data[offset : offset + 1000]
            await blocked()
        assert cache.stats().misses < 10


async def test_random_reads_fetch_nothing_ahead() -> None:
    device = FakeDevice(512, 40_000)
    async with running(device, read_ahead=1 << 20) as cache:
        for number in range(500):
            await cache.read(number * 7919 % 4_900 * 4096 + 1024, 4096)
        assert cache.stats().read_ahead_commands == 0
    assert len(device.log) == 500, "each in two extents that lie side by side"


async def test_a_demand_waits_for_the_read_ahead_that_is_on_its_way() -> None:
    device = FakeDevice(512, 8192)
    pool = BufferPool(4 << 20)
    async with running(device, pool=pool, read_ahead=1 << 20) as cache:
        await cache.read(0, 131072)
        gate = Gate(device, lambda command: command.lba >= 512)
        await cache.read(131072, 131072)
        await blocked()
        [ahead] = gate.held
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.read, 262144, 131072)
            await blocked()
            assert sum(ahead.lba in command.span for command in device.log) == 1
            gate.open()
        assert cache.stats().misses == 3


async def test_read_ahead_that_meets_a_bad_block_near_the_end_is_silent() -> None:
    device = FakeDevice(512, 4096, bad={4090})
    pool = BufferPool(8 << 20)
    async with running(device, pool=pool, read_ahead=1 << 20) as cache:
        for offset in range(0, 4088 * 512, 8 * 512):
            assert await cache.read(offset, 8 * 512) == device.data[offset : offset + 8 * 512]
            await blocked()
        assert cache.stats().read_ahead_errors >= 1
        with pytest.raises(MediumError):
            await cache.read(4088 * 512, 8 * 512)
        assert await cache.read(4091 * 512, 5 * 512) == device.data[4091 * 512 :]
        await cache.drain()
        await cache.sync(cache.open())


async def test_read_ahead_is_bounded_in_commands_and_memory() -> None:
    device = FakeDevice(512, 64 * 2048)
    pool = BufferPool(8 << 20)
    gate = Gate(device, lambda command: command.lba >= 8192)
    async with running(device, pool=pool, read_ahead=64 << 20, depth=3) as cache:
        for offset in range(0, 7 << 19, 131072):
            await cache.read(offset, 131072)
            await blocked()
        assert len(gate.held) == 3
        assert len(pool._ahead) <= pool.slots // 2
        gate.open()
        await blocked()
        assert len(pool._ahead) <= pool.slots // 2


async def test_read_ahead_gives_way_where_memory_is_short() -> None:
    device = FakeDevice(512, 4096)
    async with running(device, slots=4, read_ahead=1 << 20) as cache:
        for offset in range(0, cache.size, 1024):
            assert await cache.read(offset, 1024) == device.data[offset : offset + 1024]
            await blocked()
        assert cache.stats().hits > cache.stats().misses


async def stream_until_held(cache: BlockCache, gate: Gate) -> int:
    """Read sequentially until the gate holds a read-ahead; says where the reader is then."""
    for offset in range(0, cache.size, 131072):
        await cache.read(offset, 131072)
        await blocked()
        if gate.held:
            return offset + 131072
    raise AssertionError("nothing was read ahead")


async def test_invalidate_ends_read_ahead() -> None:
    device = FakeDevice(512, 16 * 2048)
    gate = Gate(device, lambda command: command.lba >= 3 * 2048)
    async with running(device, pool=BufferPool(32 << 20), read_ahead=8 << 20, depth=1) as cache:
        await stream_until_held(cache, gate)
        assert cache._prefetcher._ranges
        cache.invalidate()
        before = len(device.log)
        gate.open()
        await blocked()
        assert len(device.log) == before
        assert cache.stats().cached_bytes == 0


async def test_what_a_reader_has_passed_is_not_fetched_for_him_any_more() -> None:
    device = FakeDevice(512, 16 * 2048)
    gate = Gate(device, lambda command: command.lba >= 3 * 2048)
    async with running(device, pool=BufferPool(32 << 20), read_ahead=8 << 20, depth=1) as cache:
        position = await stream_until_held(cache, gate)
        [held] = gate.held
        gate.hold = lambda _command: False
        await cache.read(position + (2 << 20), 1 << 20)  # the rest of the range is queued
        passed = range(held.span.stop, (position + (2 << 20)) // 512)
        assert len(passed) > 100
        gate.open()
        await blocked()
        assert not [command for command in device.log if command.lba in passed]


async def test_after_a_failure_little_is_fetched_ahead() -> None:
    device = FakeDevice(512, 16 * 2048)
    async with running(device, pool=BufferPool(32 << 20), read_ahead=8 << 20) as cache:
        device.bad = {3 * 2048 + 100}
        gate = Gate(device, lambda command: command.lba >= 3 * 2048)
        await stream_until_held(cache, gate)
        [stream] = cache._policy.streams.values()
        assert stream.window >= 1 << 20
        gate.open()
        await blocked()
        assert stream.begun == stream.end


async def test_read_ahead_comes_back_when_there_is_room_again() -> None:
    device = FakeDevice(512, 16 * 2048)
    pool = BufferPool(4 << 20)
    async with running(device, pool=pool, read_ahead=2 << 20) as cache:
        for index in range(12):
            await cache.read((30 + index) * 262144, 512)
            cache._extents[30 + index].pins += 1
        for offset in range(0, 2 << 20, 131072):
            await cache.read(offset, 131072)
            await blocked()
        assert cache.stats().read_ahead_bytes > 0
        for index in range(12):
            cache._extents[30 + index].pins -= 1
        misses = cache.stats().misses
        for offset in range(2 << 20, 4 << 20, 131072):
            await cache.read(offset, 131072)
            await blocked()
        assert cache.stats().misses <= misses + 2


async def test_read_ahead_of_a_cache_that_was_stopped_and_runs_again() -> None:
    device = FakeDevice(512, 16 * 2048)
    gate = Gate(device, lambda command: command.lba >= 3 * 2048)
    cache = BlockCache(device, pool=BufferPool(32 << 20), settings=CacheSettings(depth=1))
    async with trio.open_nursery() as nursery:
        await nursery.start(cache.run)
        position = await stream_until_held(cache, gate)
        nursery.cancel_scope.cancel()
    gate.open()
    await cache.read(position, 131072)
    before = cache.stats().read_ahead_bytes
    async with trio.open_nursery() as nursery:
        await nursery.start(cache.run)
        for offset in range(position, cache.size, 131072):
            assert await cache.read(offset, 131072) == device.data[offset : offset + 131072]
            await blocked()
        assert cache.stats().read_ahead_bytes - before > 4 << 20
        nursery.cancel_scope.cancel()


async def test_a_cache_that_does_not_run_can_be_read() -> None:
    device = FakeDevice()
    cache = BlockCache(device, pool=small_pool(8), settings=CacheSettings())
    for offset in range(0, cache.size, 1000):
        assert await cache.read(offset, 1000) == device.data[offset : offset + 1000]
    assert cache.stats().read_ahead_commands == 0


def test_blocks_larger_than_a_slot_cannot_be_cached() -> None:
    device = FakeDevice(8192, 10)
    with pytest.raises(ParameterDataError, match="8192"):
        BlockCache(device, pool=small_pool(8), settings=CacheSettings())
    file = block_file(device, pool=small_pool(8), settings=CacheSettings(direct=True))
    assert isinstance(file, DirectFile)
    assert isinstance(block_file(FakeDevice(), pool=small_pool(8), settings=CacheSettings()), BlockCache)


async def test_two_caches_share_a_pool() -> None:
    pool = small_pool(8)
    one, two = FakeDevice(), FakeDevice()
    two.data[:] = bytes(reversed(two.data))
    async with running(one, pool=pool) as first, running(two, pool=pool) as second:
        for offset in range(0, 40 * EXTENT, 3000):
            assert await first.read(offset, 3000) == one.data[offset : offset + 3000]
            assert await second.read(offset, 3000) == two.data[offset : offset + 3000]
            check_invariants(first, pool)
            check_invariants(second, pool)
        assert first.stats().evictions > 0
        assert first.stats().cached_bytes + second.stats().cached_bytes <= pool.size


async def test_fibres_take_turns_at_large_reads_past_the_cache() -> None:
    device = FakeDevice(block_count=1024, delay=lambda _: 0.01)
    cache = BlockCache(device, pool=BufferPool(1 << 20), settings=CacheSettings())
    found: list[bytes] = []

    async def read(number: int) -> None:
        begin = number * 512
        found.append(bytes(await as_fibre(cache._aside.read_in_turn(begin, begin + 128 * 1024))))
        assert found[-1] == device.data[begin : begin + 128 * 1024]

    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(read, number)
    assert len(found) == 30
    assert device.most_in_flight == 6
