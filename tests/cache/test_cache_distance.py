"""What is read in vain where a round trip is long, and that nothing is where it is short."""

import random

import pytest
import trio
from cache_fakes import Command, FakeDevice
from cache_running import running
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from iscsifuse.cache import BlockCache, BufferPool
from iscsifuse.cache.distance import (
    ASSUMED_RATE,
    FAR,
    FEWEST,
    NEAR,
    PLACE,
    PROOF,
    READERS,
    SEEN,
    Leaps,
    Places,
    worth,
)
from iscsifuse.cache.readahead import NEAR as NEAR_STREAM
from iscsifuse.cache.readahead import ReadAhead, Stream

KIB = 1024
MIB = 1 << 20
SIZE = 1 << 30

# --- what a request is worth ---


def test_a_request_is_worth_half_of_what_the_line_carries_meanwhile() -> None:
    assert worth(0.025, 125e6) == 1_562_500
    assert worth(0.025, 12.5e6) == 156_250


@pytest.mark.parametrize("latency", [0.0, NEAR / 10, NEAR * 0.99])
def test_a_near_target_is_worth_nothing(latency: float) -> None:
    assert worth(latency, 2e9) == 0


def test_a_line_that_is_not_known_is_taken_for_a_usual_one() -> None:
    assert worth(0.025, 0.0) == worth(0.025, ASSUMED_RATE) > 2 * FAR


# --- who leaps ---


def leap(leaps: Leaps, requests: list[tuple[int, int]], worth: int = MIB) -> list[int | None]:
    return [leaps.observe(offset, offset + length, worth) for offset, length in requests]


def test_after_some_leaps_a_reader_is_one_who_leaps() -> None:
    requests = [(5 * MIB + hop * 170 * KIB, 64 * KIB) for hop in range(PROOF + 2)]
    assert leap(Leaps(), requests) == [None] * PROOF + [5 * MIB, None]


def test_leaps_that_cost_more_than_they_save_are_none() -> None:
    requests = [(hop * 170 * KIB, 64 * KIB) for hop in range(20)]
    assert set(leap(Leaps(), requests, worth=80 * KIB)) == {None}
    assert set(leap(Leaps(), requests, worth=110 * KIB)) != {None}


def test_several_may_leap_at_once() -> None:
    leaps = Leaps()
    requests = [
        (reader * 100 * MIB + hop * 100 * KIB, 4 * KIB) for hop in range(PROOF + 1) for reader in range(READERS)
    ]
    assert leap(leaps, requests)[-READERS:] == [reader * 100 * MIB for reader in range(READERS)]


@pytest.mark.parametrize("step", [-100 * KIB, 0, 3 * MIB])
def test_who_goes_back_or_far_away_does_not_leap(step: int) -> None:
    assert set(leap(Leaps(), [(500 * MIB + step * hop, 4 * KIB) for hop in range(50)])) == {None}


# --- which place is asked for ---


def test_a_place_is_read_as_soon_as_the_waits_have_cost_as_much() -> None:
    places = Places()
    offsets = [40 * PLACE + 1, 7 * PLACE, 40 * PLACE + 100 * KIB, 41 * PLACE - 1]
    assert [places.observe(offset, PLACE // 3 + 1) for offset in offsets] == [None, None, None, 40 * PLACE]
    assert places.left is None


def test_a_few_requests_make_no_place() -> None:
    places = Places()
    assert [places.observe(offset, 10 * PLACE) for offset in range(FEWEST)] == [None] * (FEWEST - 1) + [0]


def test_a_place_that_was_read_is_left_when_many_others_were() -> None:
    places = Places()
    for place in range(SEEN + 1):
        found = [places.observe(place * PLACE, PLACE) for _ in range(FEWEST + 1)]
        assert found == [None] * (FEWEST - 1) + [place * PLACE, None]
        assert places.left == (0 if place == SEEN else None)


def test_what_was_long_ago_does_not_count() -> None:
    places = Places()
    offsets = [place * PLACE for place in range(1000)] * FEWEST
    assert {places.observe(offset, PLACE) for offset in offsets} == {None}


# --- what the policy makes of it ---


class Reader:
    """A policy, and what it had read."""

    def __init__(self, worth: int, *, largest: int = 8 * MIB, budget: int = 32 * MIB) -> None:
        self.worth = worth
        self.passed: list[tuple[int, int]] = []
        self.policy = ReadAhead(
            largest=largest,
            budget=budget,
            extent=256 * KIB,
            worth=lambda: self.worth,
            passed=lambda start, stop: self.passed.append((start, stop)),
        )
        self.ranges: list[tuple[int, int]] = []
        self.waits = 0
        self._there: set[int] = set()  # blocks of 4 KiB
        self.streams: set[Stream] = set()

    def read(self, requests: list[tuple[int, int]], *, size: int = SIZE) -> None:
        for offset, length in requests:
            if not self._there.issuperset(range(offset // 4096, -(-(offset + length) // 4096))):
                self.waits += 1
            plan = self.policy.observe(offset, offset + length, size=size)
            if plan is not None:
                stream, start, stop = plan
                self.streams.add(stream)
                self.ranges.append((start, stop))
                self._there.update(range(start // 4096, stop // 4096))

    @property
    def fetched(self) -> int:
        """Bytes, each counted once."""
        return len(self._there) * 4096


HOPS = [(hop * 170 * KIB, 64 * KIB) for hop in range(1000)]


def test_far_away_a_leaping_reader_hardly_waits() -> None:
    reader = Reader(MIB)
    reader.read(HOPS)
    assert reader.waits < 20
    assert reader.fetched < HOPS[-1][0] + 12 * MIB
    # All that it has passed is given up, so that it doesn't fill the memory.
    assert sum(stop - start for start, stop in reader.passed) > HOPS[-1][0] - 4 * MIB


@pytest.mark.parametrize("worth", [0, FAR - 1])
def test_leaps_that_are_not_worth_it_get_nothing(worth: int) -> None:
    reader = Reader(worth)
    reader.read(HOPS)
    assert reader.waits == len(HOPS)
    assert reader.fetched == 0


def test_a_target_that_comes_nearer_is_treated_so() -> None:
    reader = Reader(MIB)
    hops = [(offset, 4 * KIB) for offset, _ in HOPS]
    reader.read(hops[:200])
    assert reader.waits < 20
    reader.worth = 0
    ranges = len(reader.ranges)
    reader.read(hops[200:])
    assert len(reader.ranges) == ranges
    assert not reader.policy.streams


def test_what_a_dead_stream_had_read_ahead_is_given_up() -> None:
    reader = Reader(0)
    reader.read([(offset, 128 * KIB) for offset in range(0, 4 * MIB, 128 * KIB)])
    (stream,) = reader.streams
    reader.passed.clear()
    reader.policy.reset()
    assert stream.dead
    assert reader.passed == [(stream.end, stream.issued)]


def test_a_stream_that_leaps_out_of_its_window_gives_up_what_it_leapt_over_and_no_more() -> None:
    reader = Reader(0)
    reader.read([(offset, 128 * KIB) for offset in range(0, MIB, 128 * KIB)])
    (stream,) = reader.streams
    end = stream.issued + NEAR_STREAM // 2
    reader.passed.clear()
    reader.read([(end - 4 * KIB, 4 * KIB)])
    assert stream.dead
    assert reader.passed == [(stream.passed, end)]


def neighbours(seed: int) -> list[tuple[int, int]]:
    """The files of six directories, in no order."""
    chance = random.Random(seed)
    return [
        (directory * 50 * MIB + chance.randrange(0, 12 * MIB, 4 * KIB), 4 * KIB)
        for directory in range(6)
        for _ in range(100)
    ]


def test_far_away_a_neighbourhood_is_read_as_a_whole() -> None:
    near, far = Reader(0), Reader(3 * MIB)
    near.read(neighbours(1))
    far.read(neighbours(1))
    assert near.waits == 600
    assert near.fetched == 0
    assert far.waits < 150
    assert far.fetched < 3 * 6 * 12 * MIB


@pytest.mark.parametrize("size", [1 << 30, 1 << 40])
def test_random_reads_of_a_large_disk_get_next_to_nothing(size: int) -> None:
    chance = random.Random(size)
    reader = Reader(MIB)
    reader.read([(chance.randrange(0, size // 4096) * 4096, 4096) for _ in range(3000)], size=size)
    assert reader.waits > 2900
    assert reader.fetched <= (100 * MIB if size == SIZE else 0)


def test_little_memory_and_a_short_read_ahead_are_respected() -> None:
    for reader in (Reader(MIB, budget=8 * MIB), Reader(MIB, largest=MIB)):
        reader.read(neighbours(2))
        assert all(stop - start <= min(8 * MIB, reader.policy._largest) for start, stop in reader.ranges)
        assert not any(stream.begun == stream.end for stream in reader.streams)


def test_forgetting_is_complete() -> None:
    reader = Reader(MIB)
    for first in range(0, len(HOPS), FEWEST - 1):
        reader.read(HOPS[first : first + FEWEST - 1])
        reader.policy.reset()
    assert not reader.ranges


@given(
    st.integers(1, 16 * MIB),
    st.integers(1, 64 * MIB),
    st.lists(st.tuples(st.integers(0, 16 * MIB), st.integers(1, MIB)), max_size=60),
    st.sampled_from([0, FAR, MIB, 1 << 40]),
)
def test_ranges_are_sane_whatever_comes(
    largest: int, budget: int, requests: list[tuple[int, int]], worth: int
) -> None:
    size = 12 * MIB
    passed: list[tuple[int, int]] = []
    policy = ReadAhead(
        largest=largest,
        budget=budget,
        extent=256 * KIB,
        worth=lambda: worth,
        passed=lambda start, stop: passed.append((start, stop)),
    )
    for offset, length in requests:
        end = min(size, offset + length)
        if offset < end:
            plan = policy.observe(offset, end, size=size)
            if plan is not None:
                assert 0 <= plan[1] < plan[2] <= size
                assert plan[2] <= plan[0].end + largest
        assert all(key == stream.end for key, stream in policy.streams.items())
    assert all(0 <= start <= stop <= size for start, stop in passed)


# --- a cache on a disk that is far away ---

LATENCY = 0.025


def far_device(*, blocks: int = 1 << 17, latency: float = LATENCY) -> FakeDevice:
    """It answers each command after a round trip, and carries 125 MB/s."""

    def takes(command: Command) -> float:
        return latency + command.blocks * 512 / 125e6

    return FakeDevice(block_count=blocks, delay=takes, latency=latency)


async def hop_through(cache: BlockCache, device: FakeDevice, step: int = 200 * KIB) -> float:
    began = trio.current_time()
    for offset in range(0, cache.size - 4096, step):
        assert bytes(await cache.read(offset, 4096)) == device.data[offset : offset + 4096]
    return trio.current_time() - began


async def test_a_far_disk_is_hopped_through_in_a_fraction_of_the_round_trips(autojump_clock: MockClock) -> None:  # noqa: ARG001
    device = far_device()
    async with running(device, pool=BufferPool(64 * MIB), read_ahead=8 * MIB) as cache:
        took = await hop_through(cache, device)
        stats = cache.stats()
    hops = cache.size // (200 * KIB)
    assert took < hops * LATENCY / 4
    assert stats.read_ahead_bytes < 1.2 * cache.size


async def test_a_near_disk_is_hopped_through_without_anything_in_vain(autojump_clock: MockClock) -> None:  # noqa: ARG001
    device = far_device(latency=0.0002)
    async with running(device, pool=BufferPool(64 * MIB), read_ahead=8 * MIB) as cache:
        await hop_through(cache, device)
        assert cache.stats().read_ahead_commands == 0


async def test_what_was_read_in_vain_does_not_stop_the_read_ahead(autojump_clock: MockClock) -> None:  # noqa: ARG001
    """Most of what is read ahead is never asked for, and it is four times as much as the cache holds."""
    device = far_device(blocks=1 << 18, latency=0.1)
    step = MIB + 512 * KIB
    async with running(device, pool=BufferPool(32 * MIB), read_ahead=8 * MIB) as cache:
        took = await hop_through(cache, device, step)
    assert took < cache.size // step * 0.1 / 4
