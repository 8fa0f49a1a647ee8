"""The policy of read-ahead: who is sequential, and how far ahead."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.cache.readahead import INITIAL, NEAR, STEP, STREAMS, ReadAhead, Stream

KIB = 1024
MIB = 1 << 20
SIZE = 1 << 30


def make(largest: int = 8 * MIB, budget: int = 32 * MIB) -> ReadAhead:
    return ReadAhead(largest=largest, budget=budget, extent=256 * KIB)


def feed(policy: ReadAhead, requests: list[tuple[int, int]], size: int = SIZE) -> list[tuple[Stream, int, int]]:
    plans = [policy.observe(offset, offset + length, size=size) for offset, length in requests]
    return [plan for plan in plans if plan is not None]


def sequential(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    return [(offset, length) for offset in range(start, stop, length)]


def test_large_requests_are_a_stream_from_the_second_on() -> None:
    policy = make()
    assert feed(policy, [(MIB, 128 * KIB)]) == []
    [(stream, start, stop)] = feed(policy, [(MIB + 128 * KIB, 128 * KIB)])
    assert start == stream.end == MIB + 256 * KIB
    assert stop == start + INITIAL


def test_hopping_forward_is_no_stream() -> None:
    policy = make()
    feed(policy, sequential(0, MIB, 128 * KIB))
    assert policy.streams
    hops = [(MIB + hop * 100 * KIB, 4 * KIB) for hop in range(100)]  # from directory to directory
    fetched = sum(stop - start for _, start, stop in feed(policy, hops))
    assert fetched <= 2 * MIB
    assert not policy.streams


def test_a_few_holes_are_forgiven() -> None:
    policy = make()
    requests = [(offset, length) for offset, length in sequential(0, 32 * MIB, 128 * KIB) if offset % MIB]
    fetched = sum(stop - start for _, start, stop in feed(policy, requests))
    assert fetched > 24 * MIB


@pytest.mark.parametrize("length", [4 * KIB, 128 * KIB, MIB])
def test_never_much_more_is_fetched_in_vain_than_was_read(length: int) -> None:
    for count in (2, 3, 5, 8, 13, 30):
        policy = make()
        read = count * length
        fetched = sum(stop - start for _, start, stop in feed(policy, sequential(0, read, length)))
        assert max(0, fetched - read) <= max(INITIAL, read)


def test_small_requests_from_the_third_on() -> None:
    policy = make()
    assert feed(policy, [(0, 4096), (4096, 4096)]) == []
    [(_, start, stop)] = feed(policy, [(8192, 4096)])
    assert (start, stop) == (12288, INITIAL), "ends with an extent"


def test_the_window_doubles_up_to_the_largest_and_stays_nearly_full() -> None:
    policy = make()
    ahead = 0
    lengths = []
    for offset, length in sequential(0, 64 * MIB, 128 * KIB):
        plan = policy.observe(offset, offset + length, size=SIZE)
        if plan is not None:
            stream, start, stop = plan
            assert start == (ahead or stream.end), "nothing twice, nothing left out"
            lengths.append(stop - start)
            ahead = stop
        assert ahead <= offset + length + 8 * MIB
        if offset > 16 * MIB:
            assert ahead >= offset + length + 8 * MIB - STEP - 256 * KIB
    assert lengths[0] == 256 * KIB
    assert set(lengths[-20:]) == {STEP}


def test_the_window_ends_with_the_device() -> None:
    policy = make()
    plans = feed(policy, sequential(0, 2 * MIB, 128 * KIB), size=2 * MIB - 512)
    assert plans[-1][2] == 2 * MIB - 512
    assert all(start < stop for _, start, stop in plans)


@pytest.mark.parametrize("order", [(0, 2, 1, 3, 5, 4), (1, 0, 2, 4, 3, 5), (2, 1, 0, 3, 4, 5), (5, 0, 4, 1, 3, 2)])
def test_the_order_of_arrival_does_not_matter(order: tuple[int, ...]) -> None:
    policy = make()
    plans = feed(policy, [(10 * MIB + number * 128 * KIB, 128 * KIB) for number in order])
    assert plans
    assert len({id(stream) for stream, _, _ in plans}) == 1
    assert feed(policy, [(10 * MIB + 6 * 128 * KIB, 2 * MIB)])[0][0] is plans[0][0]


@given(st.randoms(use_true_random=False))
def test_a_stream_survives_reordering(r: random.Random) -> None:
    policy = make()
    requests = sequential(0, 32 * MIB, 128 * KIB)
    requests.sort(key=lambda request: request[0] + r.randrange(1 * MIB))
    plans = feed(policy, requests)
    assert len({id(stream) for stream, _, _ in plans}) == 1
    assert plans[0][1] < 4 * MIB
    ends = [stop for _, _, stop in plans]
    assert ends == sorted(set(ends))
    # What lies between two ranges was overtaken, and comes by itself.
    assert all(start >= stop for (_, _, stop), (_, start, _) in itertools.pairwise(plans))


def test_interleaved_streams_and_random_reads_in_between() -> None:
    policy = make()
    r = random.Random(1)
    streams = [sequential(base * 32 * MIB, base * 32 * MIB + 4 * MIB, 64 * KIB) for base in range(10)]
    issued: dict[Stream, int] = {}
    for position in range(len(streams[0])):
        for requests in streams:
            for _, start, stop in feed(policy, [requests[position]]):
                issued[policy.streams[sum(requests[position])]] = stop
                assert stop - start <= 8 * MIB
            assert feed(policy, [(r.randrange(512 * MIB, SIZE) & ~4095, 4096)]) == []
    assert len(issued) == 10
    assert all(stop > stream.end for stream, stop in issued.items())


def test_streams_share_the_budget() -> None:
    policy = make(budget=8 * MIB)
    for position in range(200):
        for base in range(4):
            offset = base * 200 * MIB + position * 128 * KIB
            for stream, _, stop in feed(policy, [(offset, 128 * KIB)]):
                if len(policy.streams) == 4:
                    assert stop - stream.end <= 2 * MIB


@given(st.lists(st.tuples(st.integers(0, (1 << 40) // 4096), st.sampled_from((1, 2, 8, 32)))))
def test_random_reads_trigger_nothing(requests: list[tuple[int, int]]) -> None:
    r = random.Random(repr(requests))
    policy = make()
    for page, pages in requests:
        offset = (page * 4096 + r.randrange(1 << 40)) % (1 << 40) & ~4095
        assert policy.observe(offset, offset + pages * 4096, size=1 << 40) is None


def test_reading_backwards_triggers_nothing() -> None:
    assert feed(make(), sequential(0, 8 * MIB, 128 * KIB)[::-1]) == []


def test_reading_the_same_again_triggers_nothing() -> None:
    assert feed(make(), [(MIB, 128 * KIB)] * 20) == []


def test_tables_are_bounded() -> None:
    policy = make()
    r = random.Random(2)
    dropped = []
    for base in range(3 * STREAMS):
        dropped += [plan[0] for plan in feed(policy, sequential(base * 8 * MIB, base * 8 * MIB + MIB, 128 * KIB))]
        feed(policy, [(r.randrange(512 * MIB, SIZE), 100) for _ in range(10)])
    assert len(policy.streams) == STREAMS
    assert len(policy._candidates) == len(policy._starts) == 32
    assert {stream for stream in dropped if not stream.dead} == set(policy.streams.values())


def test_what_was_refused_is_asked_for_again() -> None:
    policy = make()
    plans = feed(policy, sequential(0, 2 * MIB, 128 * KIB))
    stream, _, stop = plans[-1]
    assert stop > 2 * MIB + 512 * KIB
    policy.refused(stream, 2 * MIB + 512 * KIB)
    assert stream.issued == 2 * MIB + 512 * KIB
    again = feed(policy, sequential(2 * MIB, 2 * MIB + 384 * KIB, 128 * KIB))
    assert again[0][1] == 2 * MIB + 512 * KIB, "in time"


def test_after_a_failure_the_window_is_small_again() -> None:
    policy = make()
    stream = feed(policy, sequential(0, 16 * MIB, 128 * KIB))[-1][0]
    policy.failed(stream)
    ahead = stream.issued
    plans = feed(policy, sequential(16 * MIB, 32 * MIB, 128 * KIB))
    assert plans[0][1] == ahead
    assert plans[0][2] - plans[0][0].end < 32 * MIB
    assert plans[-1][2] - plans[-1][1] == STEP


def test_reset_forgets() -> None:
    policy = make()
    stream = feed(policy, sequential(0, MIB, 128 * KIB))[-1][0]
    policy.reset()
    assert stream.dead
    assert feed(policy, [(MIB, 128 * KIB)]) == []


def test_a_jump_within_reach_goes_on_with_the_stream() -> None:
    policy = make()
    first = feed(policy, sequential(0, 4 * MIB, 128 * KIB))[-1][0]
    for plan in feed(policy, [(4 * MIB + NEAR, 128 * KIB), (4 * MIB + NEAR + 128 * KIB, MIB)]):
        assert plan[0] is first
    assert first.end == 4 * MIB + NEAR + 128 * KIB + MIB


@given(
    st.integers(1, 16 * MIB),
    st.integers(1, 64 * MIB),
    st.lists(st.tuples(st.integers(0, 4 * MIB), st.integers(1, MIB)), max_size=40),
    st.integers(1, 5 * MIB),
)
def test_ranges_are_sane_whatever_comes(
    largest: int, budget: int, requests: list[tuple[int, int]], size: int
) -> None:
    policy = ReadAhead(largest=largest, budget=budget, extent=256 * KIB)
    for offset, length in requests:
        end = min(size, offset + length)
        if offset < end:
            plan = policy.observe(offset, end, size=size)
            if plan is not None:
                assert end <= plan[1] < plan[2] <= min(size, plan[0].end + largest)
        assert all(key == stream.end for key, stream in policy.streams.items())
        assert all(key == candidate.end for key, candidate in policy._candidates.items())
        assert all(key == candidate.start for key, candidate in policy._starts.items())
        assert len(policy._candidates) == len(policy._starts)
