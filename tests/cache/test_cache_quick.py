"""`note_stray` in C against the Python that it is a short cut through."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from iscsifuse import quick
from iscsifuse.cache.readahead import CANDIDATES, NEAR, Candidate, ReadAhead, Stream
from support.quick import needs_quick, pure

pytestmark = needs_quick

KIB = 1024
MIB = 1 << 20
SIZE = 1 << 42

OFFSETS = (
    st.integers(0, 40).map(lambda n: n * 4 * KIB)
    | st.integers(0, 12).map(lambda n: n * MIB)
    | st.integers(0, SIZE // (4 * KIB) - 1).map(lambda n: n * 4 * KIB)
)
REQUESTS = st.lists(
    st.tuples(OFFSETS, st.sampled_from([512, 4 * KIB, 128 * KIB]), st.integers(1, 5)), min_size=1, max_size=40
)


def seen(policy: ReadAhead) -> list[object]:
    """All that it remembers, in the order in which it remembers it."""

    def stream(s: Stream) -> tuple[object, ...]:
        return tuple(getattr(s, name) for name in Stream.__slots__)

    def candidate(c: Candidate) -> tuple[object, ...]:
        return c.start, c.end, c.continued, policy._starts.get(c.start) is c

    return [
        [(key, stream(s)) for key, s in policy._streams.items()],
        [(key, candidate(c)) for key, c in policy._candidates.items()],
        [(key, candidate(c)) for key, c in policy._starts.items()],
        policy._strays,
    ]


def observed(requests: list[tuple[int, int, int]], worth: int) -> list[object]:
    """What comes of requests, each of which is the first of some that follow each other."""
    policy = ReadAhead(largest=8 * MIB, budget=32 * MIB, extent=256 * KIB, worth=lambda: worth)
    results: list[object] = []
    for offset, length, count in requests:
        for number in range(count):
            begin = offset + number * length
            plan: Any = policy.observe(begin, begin + length, size=SIZE)
            results.append(None if plan is None else plan[1:])
            results.append(seen(policy))
    return results


@given(requests=REQUESTS, worth=st.sampled_from([0, 0, MIB]))
def test_requests_are_remembered_alike(requests: list[tuple[int, int, int]], worth: int) -> None:
    with pure():
        expected = observed(requests, worth)
    assert observed(requests, worth) == expected


def test_random_requests_go_the_short_way() -> None:
    """Else the comparison above would compare the Python with itself. The oldest make room."""
    assert quick.note_stray is not None
    streams: dict[int, Stream] = {}
    candidates: dict[int, Candidate] = {}
    starts: dict[int, Candidate] = {}
    for number in range(CANDIDATES + 5):
        offset = number * 3 * MIB
        assert quick.note_stray(streams, candidates, starts, offset, offset + 4096, NEAR, CANDIDATES)
    assert list(starts) == [number * 3 * MIB for number in range(5, CANDIDATES + 5)]
    assert [candidate.end for candidate in candidates.values()] == list(candidates)
    assert all(starts[candidate.start] is candidate for candidate in candidates.values())


def test_what_is_near_a_stream_is_left_alone() -> None:
    assert quick.note_stray is not None
    stream = Stream(0, 10 * MIB)
    stream.behind = MIB
    for offset, taken in (
        (9 * MIB - 1, True),
        (9 * MIB, False),
        (10 * MIB, False),
        (10 * MIB + NEAR, False),
        (10 * MIB + NEAR + 1, True),
    ):
        assert quick.note_stray({10 * MIB: stream}, {}, {}, offset, offset + 512, NEAR, CANDIDATES) == taken


def test_what_continues_something_is_left_alone() -> None:
    assert quick.note_stray is not None
    known = Candidate(8 * MIB, 9 * MIB)
    for offset, end in ((9 * MIB, 10 * MIB), (7 * MIB, 8 * MIB), (8 * MIB, 10 * MIB), (7 * MIB, 9 * MIB)):
        candidates, starts = {9 * MIB: known}, {8 * MIB: known}
        assert not quick.note_stray({}, candidates, starts, offset, end, NEAR, CANDIDATES)
        assert (candidates, starts) == ({9 * MIB: known}, {8 * MIB: known})


def test_the_oldest_goes_with_its_own_name_only() -> None:
    """Another one may stand where it once began."""
    assert quick.note_stray is not None
    oldest, other = Candidate(8 * MIB, 9 * MIB), Candidate(8 * MIB, 11 * MIB)
    candidates, starts = {9 * MIB: oldest}, {8 * MIB: other}
    assert quick.note_stray({}, candidates, starts, 0, 512, NEAR, 1)
    assert list(candidates) == [512]
    assert starts == {8 * MIB: other, 0: candidates[512]}
