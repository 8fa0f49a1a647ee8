"""`take_stray` in C against the Python that it is a short cut through."""

from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse import quick
from iscsifuse.cache import BlockCache, BufferPool, CacheSettings
from iscsifuse.cache.readahead import CANDIDATES, LOOK_EVERY, NEAR, Candidate, RandomReads, Stream
from support.quick import needs_quick, pure

pytestmark = needs_quick

KIB = 1024
MIB = 1 << 20
SIZE = 1 << 42
EXTENT = 64 * KIB
SLOTS = 8

OFFSETS = (
    st.integers(0, 40).map(lambda n: n * 4 * KIB)
    | st.integers(0, 12).map(lambda n: n * MIB)
    | st.integers(0, SIZE // (4 * KIB) - 1).map(lambda n: n * 4 * KIB)
    | st.integers(SIZE - 8 * KIB, SIZE + 512)
    | st.integers(0, 3 * MIB)
)
LENGTHS = st.sampled_from([0, 512, 4 * KIB, 64 * KIB, 64 * KIB + 512, 128 * KIB]) | st.integers(1, 1024)
READS = st.lists(st.tuples(OFFSETS, LENGTHS, st.integers(1, 5)), min_size=1, max_size=40)


class Disk:
    """Each block says where it lies."""

    block_length = 512
    block_count = SIZE // 512
    write_burst = MIB
    volatile = False

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.reads: list[tuple[int, int]] = []

    async def read_into(self, buffer: memoryview, *, lba: int) -> None:
        self.reads.append((lba, len(buffer)))
        for start in range(0, len(buffer), 512):
            buffer[start : start + 512] = lba.to_bytes(8, "big") * 64
            lba += 1

    async def write(self, buffer: memoryview, *, lba: int, fua: bool = False) -> None:
        raise NotImplementedError

    async def flush(self) -> None:
        raise NotImplementedError


def contents(offset: int, length: int) -> bytes:
    first, last = offset // 512, -(-(offset + length) // 512)
    whole = b"".join(lba.to_bytes(8, "big") * 64 for lba in range(first, last))
    return whole[offset - first * 512 :][:length]


def seen(cache: BlockCache) -> list[object]:
    """All that it remembers of requests, in the order in which it does."""
    policy = cache._policy

    def stream(s: Stream) -> tuple[object, ...]:
        return tuple(getattr(s, name) for name in Stream.__slots__)

    def candidate(c: Candidate) -> tuple[object, ...]:
        return c.start, c.end, c.continued, policy.random.starts.get(c.start) is c

    return [
        [(key, stream(s)) for key, s in policy.streams.items()],
        [(key, candidate(c)) for key, c in policy.random.candidates.items()],
        [(key, candidate(c)) for key, c in policy.random.starts.items()],
        (policy.random.count, policy.random.is_far),
        list(cache._aside.visited),
        [(index, extent.valid) for index, extent in cache._extents.items()],
        cache.stats(),
    ]


def outcome(reads: list[tuple[int, int, int]], latency: float) -> list[object]:
    """What comes of reads, each of which is the first of some that follow each other."""
    disk = Disk(latency)
    pool = BufferPool(SLOTS * EXTENT, slot_size=EXTENT)
    cache = BlockCache(disk, pool=pool, settings=CacheSettings(read_ahead=MIB, keep_strays=False))
    cache._watching = True  # the policy is asked, though nobody carries out its advice
    results: list[object] = []

    async def read() -> None:
        for offset, length, count in reads:
            for number in range(count):
                begin = offset + number * length
                data = bytes(await cache.read(begin, length))
                assert data == contents(begin, max(0, min(length, SIZE - begin)))
                results.append((seen(cache), list(disk.reads)))

    trio.run(read)
    return results


@given(reads=READS, latency=st.sampled_from([0.0, 0.0, 0.03]))
def test_reads_are_remembered_and_served_alike(reads: list[tuple[int, int, int]], latency: float) -> None:
    with pure():
        expected = outcome(reads, latency)
    assert outcome(reads, latency) == expected


class Tables:
    """What the short cut is given."""

    def __init__(self) -> None:
        self.others = RandomReads()
        self.others.count = 1  # at 0, and then again and again, somebody has to look how far the target is
        self.streams: dict[int, Any] = {}
        self.extents: dict[int, object] = {}
        self.visited: dict[int, None] = {}
        self.slots = 1000

    def take(self, offset: int, length: int = 4096, *, size: int = SIZE) -> memoryview | None:
        assert quick.take_stray is not None
        numbers = (LOOK_EVERY, CANDIDATES, NEAR, 64 * KIB, 256 * KIB, 512)
        tables = (self.others, self.streams, self.extents, self.visited, self.slots, *numbers)
        return quick.take_stray(tables, offset, length, size)


def test_random_requests_go_the_short_way() -> None:
    """Else the comparison above would compare the Python with itself. The oldest make room."""
    tables = Tables()
    tables.slots = 10
    offsets = [number * 3 * MIB for number in range(40)]
    for offset in offsets:
        tables.others.count |= 1
        memory = tables.take(offset)
        assert memory is not None
        assert (bytes(memory), memory.readonly, memory.format) == (bytes(4096), False, "B")
    others = tables.others
    assert list(others.starts) == offsets[-CANDIDATES:]
    assert [(c.start, c.end, c.continued) for c in others.candidates.values()] == [
        (offset, offset + 4096, 0) for offset in offsets[-CANDIDATES:]
    ]
    assert all(others.starts[candidate.start] is candidate for candidate in others.candidates.values())
    assert list(tables.visited) == [offset // (256 * KIB) for offset in offsets[-10:]]


def test_now_and_then_the_distance_is_looked_at() -> None:
    tables = Tables()
    for number in range(1, LOOK_EVERY):
        assert tables.take(number * 3 * MIB) is not None
        assert tables.others.count == number + 1
    assert tables.take(1000 * MIB) is None
    tables.others.count += 1
    assert tables.take(1000 * MIB) is not None
    tables.others.is_far = True
    assert tables.take(2000 * MIB) is None


def test_what_is_near_a_stream_is_left_alone() -> None:
    stream = Stream(0, 10 * MIB)
    stream.behind = MIB
    for offset, taken in (
        (9 * MIB - 512, True),
        (9 * MIB, False),
        (10 * MIB, False),
        (10 * MIB + NEAR, False),
        (10 * MIB + NEAR + 512, True),
    ):
        tables = Tables()
        tables.streams[10 * MIB] = stream
        assert (tables.take(offset, 512) is not None) == taken


def test_what_continues_something_is_left_alone() -> None:
    known = Candidate(8 * MIB, 9 * MIB)
    for offset, length in ((9 * MIB, 4096), (8 * MIB - 4096, 4096), (8 * MIB, 512), (9 * MIB - 512, 512)):
        tables = Tables()
        tables.others.candidates[9 * MIB] = known
        tables.others.starts[8 * MIB] = known
        assert tables.take(offset, length) is None
        assert (tables.others.candidates, tables.others.starts) == ({9 * MIB: known}, {8 * MIB: known})
        assert not tables.visited


def test_the_oldest_goes_with_its_own_name_only() -> None:
    """Another one may stand where it once began."""
    tables = Tables()
    others = tables.others
    oldest, other = Candidate(8 * MIB, 9 * MIB), Candidate(8 * MIB, 11 * MIB)
    others.candidates[9 * MIB] = oldest
    others.starts[8 * MIB] = other
    for number in range(CANDIDATES - 1):
        others.candidates[number] = other
    assert tables.take(100 * MIB, 512) is not None
    assert 9 * MIB not in others.candidates
    assert others.starts == {8 * MIB: other, 100 * MIB: others.candidates[100 * MIB + 512]}


@pytest.mark.parametrize(
    ("offset", "length", "size", "taken"),
    [
        (0, 512, SIZE, True),
        (0, 64 * KIB, SIZE, True),
        (0, 64 * KIB + 512, SIZE, False),  # too long
        (0, 0, SIZE, False),
        (1, 512, SIZE, False),  # not whole blocks
        (0, 513, SIZE, False),
        (256 * KIB - 512, 512, SIZE, True),
        (256 * KIB - 512, 1024, SIZE, False),  # two extents
        (SIZE - 512, 512, SIZE, True),
        (SIZE - 512, 1024, SIZE, False),  # beyond the end
        (SIZE, 512, SIZE, False),
        (512, 512, 0, False),
    ],
)
def test_only_whole_blocks_of_one_extent(*, offset: int, length: int, size: int, taken: bool) -> None:
    tables = Tables()
    memory = tables.take(offset, length, size=size)
    assert (memory is not None) == taken
    if memory is not None:
        assert len(memory) == length
    assert bool(tables.visited) == taken


@pytest.mark.parametrize("place", ["extents", "visited"])
def test_what_is_in_memory_or_was_visited_is_left_alone(place: str) -> None:
    tables = Tables()
    getattr(tables, place)[2] = None
    assert tables.take(512 * KIB) is None
    assert tables.others.count == 1
    assert tables.take(256 * KIB) is not None


def test_what_is_none_of_its_tables_is_refused() -> None:
    assert quick.take_stray is not None
    numbers = (1000, LOOK_EVERY, CANDIDATES, NEAR, 64 * KIB, 256 * KIB, 512)
    good: tuple[object, ...] = (RandomReads(), {}, {}, {}, *numbers)
    assert quick.take_stray(good, 0, 512, SIZE) is None
    for position in range(len(good)):
        for wrong in (None, -1, object()):
            with pytest.raises(TypeError, match="other arguments"):
                quick.take_stray((*good[:position], wrong, *good[position + 1 :]), 0, 512, SIZE)
    for position in (5, 9, 10):
        with pytest.raises(TypeError, match="other arguments"):
            quick.take_stray((*good[:position], 0, *good[position + 1 :]), 0, 512, SIZE)
    with pytest.raises(TypeError, match="other arguments"):
        quick.take_stray(good[:-1], 0, 512, SIZE)
    with pytest.raises(TypeError, match="other arguments"):
        quick.take_stray(good, -1, 512, SIZE)


def test_what_is_unusual_in_a_table_is_left_alone() -> None:
    for name in RandomReads.__slots__:
        tables = Tables()
        delattr(tables.others, name)
        assert tables.take(0) is None
        assert not tables.visited
    tables = Tables()
    tables.streams[500 * MIB] = object()
    assert tables.take(0) is None
    tables.streams[500 * MIB] = Stream(0, 500 * MIB)
    assert tables.take(0) is not None
