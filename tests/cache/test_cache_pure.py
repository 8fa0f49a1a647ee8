"""The parts with no waiting in them: bit sets, ranges, errors."""

import errno
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.cache.errseq import (
    ErrorSequence,
    WriteBackNoSpaceError,
    WriteBackReadOnlyError,
    write_back_error,
)
from iscsifuse.cache.extent import Extent, Geometry, Transfer, next_run, runs, span
from iscsifuse.cache.rangelock import RangeLock, Ticket
from iscsifuse.errors import DataProtectError, IscsifuseError, NoSpaceError, WriteBackError

bits = st.integers(0, (1 << 80) - 1)


@given(bits)
def test_runs_are_the_maximal_runs(blocks: int) -> None:
    found = list(runs(blocks))
    assert sum(span(first, stop) for first, stop in found) == blocks
    assert all(first < stop for first, stop in found)
    assert all(stop < first for (_, stop), (first, _) in itertools.pairwise(found))


@given(st.integers(0, 100), st.integers(0, 100))
def test_span(first: int, length: int) -> None:
    assert [i for i in range(300) if span(first, first + length) >> i & 1] == list(range(first, first + length))


@given(bits.filter(bool), st.integers(0, 79))
def test_next_run_goes_round(blocks: int, cursor: int) -> None:
    first, stop = next_run(blocks, cursor)
    assert blocks & span(first, stop) == span(first, stop)
    assert not blocks >> stop & 1
    if blocks >> cursor:
        assert first == min(i for i in range(cursor, 80) if blocks >> i & 1)
    else:
        assert (first, stop) == next(runs(blocks))


@given(st.integers(1, 5000), st.data())
def test_geometry(block: int, data: st.DataObject) -> None:
    geometry = Geometry.of(block, 32768)
    assert geometry.length == geometry.blocks * block <= 32768 < geometry.length + block
    start = data.draw(st.integers(0, geometry.length - 1))
    stop = data.draw(st.integers(start + 1, geometry.length))
    touched = [i for i in range(start // block, geometry.blocks) if i * block < stop and (i + 1) * block > start]
    assert geometry.blocks_of(start, stop) == sum(1 << i for i in touched)
    partial = [i for i in touched if i * block < start or (i + 1) * block > stop]
    assert geometry.partial_blocks(start, stop) == sum(1 << i for i in touched if i in partial)


@pytest.mark.parametrize(
    ("block", "blocks"), [(512, 512), (4096, 64), (520, 504), (4104, 63), (262144, 1), (300000, 0)]
)
def test_extents_are_about_256_kib(block: int, blocks: int) -> None:
    assert Geometry.of(block, 262144).blocks == blocks


def make_extent(index: int, slot: int, geometry: Geometry) -> Extent:
    return Extent({}, index, slot=slot, address=slot * 4096, view=memoryview(b""), full=span(0, geometry.blocks))


def test_a_transfer_grows_only_where_disk_and_memory_are_neighbours() -> None:
    geometry = Geometry.of(512, 4096)
    left, right = make_extent(7, 3, geometry), make_extent(8, 4, geometry)
    transfer = Transfer.of(geometry, left, 2, 8)
    assert (transfer.lba, transfer.begin, transfer.end) == (58, 3 * 4096 + 1024, 4 * 4096)
    assert not transfer.add(geometry, right, 1, 2), "a hole"
    assert not transfer.add(geometry, make_extent(8, 5, geometry), 0, 2), "elsewhere in memory"
    assert not transfer.add(geometry, make_extent(9, 4, geometry), 0, 2), "elsewhere on disk"
    assert transfer.add(geometry, right, 0, 2)
    assert transfer.end == 4 * 4096 + 1024
    assert transfer.parts == [(left, span(2, 8)), (right, span(0, 2))]


def test_a_transfer_of_odd_blocks_ends_with_the_extent() -> None:
    geometry = Geometry.of(520, 4096)
    transfer = Transfer.of(geometry, make_extent(0, 0, geometry), 0, 7)
    assert not transfer.add(geometry, make_extent(1, 1, geometry), 0, 1), "there is a gap between the extents"


@given(st.lists(st.one_of(st.tuples(st.integers(0, 20), st.integers(1, 6)), st.integers(0, 30)), max_size=60))
def test_range_lock_is_exclusive_fair_and_complete(script: list[tuple[int, int] | int]) -> None:
    lock = RangeLock()
    alive: list[Ticket] = []  # oldest first

    def overlap(a: Ticket, b: Ticket) -> bool:
        return a.start < b.stop and b.start < a.stop

    for step in [*script, *[0] * 60]:
        if isinstance(step, tuple):
            alive.append(lock.request(step[0], step[0] + step[1]))
        elif alive:
            ticket = alive.pop(step % len(alive))  # held or not: waiting can be given up
            waiting = [other for other in alive if not other.held]
            granted = lock.release(ticket)
            assert granted == [other for other in waiting if other.held]
        for position, ticket in enumerate(alive):
            assert ticket.held == (not any(overlap(ticket, other) for other in alive[:position]))
    assert not alive
    assert len(lock) == 0


def lost(text: str = "lost") -> WriteBackError:
    return write_back_error(IscsifuseError(text))


def test_each_open_handle_is_told_once() -> None:
    errors = ErrorSequence()
    one, two = errors.open(), errors.open()
    errors.record(lost())
    for handle in (one, two):
        with pytest.raises(WriteBackError, match="lost"):
            errors.check(handle)
        errors.check(handle)
    errors.check(errors.open())  # opened after somebody was told


def test_an_error_that_nobody_was_told_of_waits_for_the_next_handle() -> None:
    errors = ErrorSequence()
    errors.open()  # closed without a question
    errors.record(lost())
    late, later = errors.open(), errors.open()
    with pytest.raises(WriteBackError):
        errors.check(late)
    with pytest.raises(WriteBackError):
        errors.check(later)  # was open when nobody had been told yet
    errors.check(errors.open())


def test_what_a_drain_tells_a_sync_tells_again_and_not_the_other_way_round() -> None:
    errors = ErrorSequence()
    handle = errors.open()
    for sync_first in (False, True):
        errors.record(lost())
        for drain, tells in ((False, True), (True, False)) if sync_first else ((True, True), (False, True)):
            if tells:
                with pytest.raises(WriteBackError):
                    errors.check(handle, drain=drain)
            errors.check(handle, drain=drain)
        errors.check(handle, drain=True)
    errors.check(errors.open())  # somebody has been told


def test_the_first_of_several_errors_is_told() -> None:
    errors = ErrorSequence()
    handle = errors.open()
    errors.record(lost("cause"))
    errors.record(lost("consequence"))
    with pytest.raises(WriteBackError, match="cause"):
        errors.check(handle)
    errors.check(handle)
    errors.record(lost("another"))
    with pytest.raises(WriteBackError, match="another"):
        errors.check(handle)


def test_two_who_share_a_handle_and_wait_at_the_same_time_both_fail() -> None:
    errors = ErrorSequence()
    handle = errors.open()
    since = errors.count
    errors.record(lost())
    for _ in range(2):
        with pytest.raises(WriteBackError):
            errors.check(handle, since=since)
    errors.check(handle, since=errors.count)


def test_every_report_is_an_exception_of_its_own_with_the_cause_behind_it() -> None:
    errors = ErrorSequence()
    cause = NoSpaceError("full", status=2)
    handles = [errors.open(), errors.open()]
    errors.record(write_back_error(cause, what="a write"))
    raised = []
    for handle in handles:
        with pytest.raises(WriteBackNoSpaceError, match="a write: full") as caught:
            errors.check(handle)
        raised.append(caught.value)
    assert raised[0] is not raised[1]
    assert raised[0].__cause__ is raised[1].__cause__ is cause


@pytest.mark.parametrize(
    ("cause", "kind", "number"),
    [
        (NoSpaceError("full", status=2), WriteBackNoSpaceError, errno.ENOSPC),
        (DataProtectError("protected", status=2), WriteBackReadOnlyError, errno.EROFS),
        (IscsifuseError("other"), WriteBackError, errno.EIO),
        (ValueError(), WriteBackError, errno.EIO),
    ],
)
def test_errno_of_the_cause(cause: Exception, kind: type[WriteBackError], number: int) -> None:
    error = write_back_error(cause)
    assert type(error) is kind
    assert error.errno == number
    assert str(error)
