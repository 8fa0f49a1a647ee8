"""Memory: who gets a slot, where, and who has to go."""

import random

import pytest
import trio
from cache_checks import check_pool
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.cache.extent import Extent
from iscsifuse.cache.pool import BufferPool

SLOT = 4096


class Owner:
    """A table of extents, and a few words for what a cache does with them."""

    def __init__(self, slots: int, pool: BufferPool | None = None) -> None:
        self.pool = pool or BufferPool(slots * SLOT, slot_size=SLOT)
        self.home: dict[int, Extent] = {}

    def get(self, index: int, *, ahead: bool = False) -> Extent | None:
        return self.home.get(index) or self.pool.allocate(self.home, index, length=SLOT, full=0xFF, ahead=ahead)

    def read(self, index: int, first: int = 0, stop: int = 8) -> Extent:
        extent = self.get(index)
        assert extent is not None
        self.pool.touch(extent, (1 << stop) - (1 << first), start=first * 512, stop=stop * 512)
        return extent


def test_a_small_pool_has_a_handful_of_slots() -> None:
    assert BufferPool(0).slots == BufferPool(4096).slots == 4
    assert BufferPool(64 << 20).slots == 256
    assert BufferPool((1 << 20) + 262144 + 1).size == (1 << 20) + 262144


def test_neighbours_on_disk_are_neighbours_in_memory() -> None:
    owner = Owner(64)
    extents = [owner.get(index) for index in range(100, 120)]
    slots = [extent.slot for extent in extents if extent]
    assert slots == list(range(slots[0], slots[0] + 20))


def test_a_long_stream_stays_contiguous_when_it_goes_round() -> None:
    owner = Owner(64)
    breaks = 0
    last = -1
    for index in range(1000):
        slot = owner.read(index).slot
        breaks += slot != last + 1
        last = slot
    assert breaks <= 1000 // 64 + 1


def test_two_streams_read_in_steps_stay_mostly_contiguous() -> None:
    owner = Owner(64)
    joined = 0
    for step in range(0, 800, 4):
        for base in (0, 10_000):
            for index in range(base + step, base + step + 4):
                before = owner.home.get(index - 1)
                joined += owner.read(index).slot == (before.slot + 1 if before else -1)
    assert joined > 0.7 * 1600


def test_side_by_side_is_not_worth_a_young_extent() -> None:
    owner = Owner(16)
    for index in range(4):
        owner.read(index)
    young = owner.read(100)
    assert young.slot == owner.home[3].slot + 1
    owner.read(4)
    assert owner.home[100] is young


def test_a_scan_leaves_what_was_read_again() -> None:
    owner = Owner(16)
    for _ in range(2):
        for index in range(4):
            owner.read(index)
    for index in range(100, 400):
        for first in range(8):  # in eight requests each: passing through isn't coming back
            owner.read(index, first, first + 1)
    assert set(range(4)) <= set(owner.home)
    check_pool(owner.pool)


def test_requests_within_a_block_are_no_second_reading() -> None:
    owner = Owner(16)
    extent = owner.read(0, 0, 1)
    for start in range(0, 512, 100):
        owner.pool.touch(extent, 1, start=start or 512, stop=start + 100)
    assert extent.queue is owner.pool._probation
    owner.pool.touch(extent, 1, start=0, stop=100)
    assert extent.queue is owner.pool._protected


def test_protected_extents_grow_old_too() -> None:
    owner = Owner(8)
    for index in range(8):
        owner.read(index)
        owner.read(index)
    assert [extent.index for extent in owner.pool._protected] == [2, 3, 4, 5, 6, 7]
    owner.read(2)
    for index in (20, 21, 22):
        owner.read(index)
        owner.read(index)
    assert 2 in owner.home
    assert 3 not in owner.home
    check_pool(owner.pool)


@pytest.mark.parametrize("state", ["dirty", "writing", "filling", "pins"])
def test_busy_extents_stay(state: str) -> None:
    owner = Owner(4)
    held = owner.read(0)
    setattr(held, state, 1)
    for index in range(1, 50):
        owner.read(index)
        check_pool(owner.pool)
    assert owner.home[0] is held
    setattr(held, state, 0)
    owner.pool.settle(held)
    for index in range(50, 60):
        owner.read(index)
    assert 0 not in owner.home


def test_nothing_can_be_had_where_everybody_is_busy() -> None:
    owner = Owner(4)
    for index in range(4):
        owner.read(index).pins = 1
    assert owner.get(9) is None
    assert owner.get(9, ahead=True) is None
    check_pool(owner.pool)


def test_read_ahead_takes_half_at_most_and_nothing_of_worth() -> None:
    owner = Owner(16)
    for _ in range(2):
        for index in range(8):
            owner.read(index)
    dirty = owner.read(8)
    dirty.dirty = 1
    got = [index for index in range(100, 140) if owner.get(index, ahead=True)]
    assert len(got) == 7, "the rest of the slots"
    assert set(range(9)) <= set(owner.home)


def test_read_ahead_never_drives_out_read_ahead() -> None:
    owner = Owner(16)
    one = [index for index in range(100, 140) if owner.get(index, ahead=True)]
    assert len(one) == 8
    other = [index for index in range(200, 210) if owner.get(index, ahead=True)]
    assert other == []
    assert all(index in owner.home for index in one)


def test_demand_prefers_anything_to_unread_read_ahead_but_takes_it_in_the_end() -> None:
    owner = Owner(8)
    for index in range(100, 104):
        owner.get(index, ahead=True)
    for index in range(6):
        owner.read(index)
    assert all(index in owner.home for index in range(100, 104))
    for extent in [extent for index, extent in owner.home.items() if index < 100]:
        extent.pins = 1
    owner.read(50).pins = 1
    assert 100 not in owner.home


def test_forgotten_read_ahead_grows_old() -> None:
    owner = Owner(8)
    for index in range(100, 104):
        owner.get(index, ahead=True)
    for index in range(30):
        owner.read(index)
    assert not any(index in owner.home for index in range(100, 104))
    assert owner.get(200, ahead=True) is not None


def test_consumed_read_ahead_makes_room_for_more() -> None:
    owner = Owner(8)
    ahead = 0
    for index in range(200):
        while ahead < 200 and owner.get(ahead, ahead=True):
            ahead += 1
        assert ahead > index
        assert index in owner.home
        owner.read(index)


async def test_waiting_for_room_calls_for_it() -> None:
    owner = Owner(4)
    for index in range(4):
        owner.read(index).pins = 1

    def pressure() -> None:
        owner.home[2].pins = 0
        owner.pool.notify()

    flushes: list[int] = []

    def flush() -> None:
        flushes.append(1)

    owner.pool.join(pressure, flush)
    with trio.fail_after(1):
        await owner.pool.wait_for_room()
    assert owner.get(9) is not None
    assert flushes == [1]
    owner.pool.leave(pressure, flush)
    owner.pool.notify()


def test_release() -> None:
    owner = Owner(4)
    extent = owner.read(0)
    extent.pins = 1
    owner.pool.release(extent)
    assert 0 in owner.home
    extent.pins = 0
    owner.pool.release(extent)
    assert not owner.home
    assert owner.pool.evictions == 0
    check_pool(owner.pool)


@given(
    st.integers(4, 12),
    st.lists(
        st.tuples(
            st.sampled_from(("read", "ahead", "dirty", "clean", "pin", "unpin", "release")),
            st.integers(0, 1),
            st.integers(0, 30),
        ),
        max_size=120,
    ),
)
def test_whatever_happens_tables_agree_and_busy_extents_stay(slots: int, script: list[tuple[str, int, int]]) -> None:
    first = Owner(slots)
    owners = [first, Owner(slots, first.pool)]
    busy: dict[tuple[int, int], Extent] = {}
    for action, who, index in script:
        owner = owners[who]
        extent = owner.home.get(index)
        if action == "read" and owner.get(index) is not None:
            owner.read(index, 0, random.Random(index).randint(1, 8))
        elif action == "ahead":
            owner.get(index, ahead=True)
        elif extent is None:
            continue
        elif action in ("dirty", "pin"):
            setattr(extent, {"dirty": "dirty", "pin": "pins"}[action], 1)
            busy[who, index] = extent
        elif action == "clean" and extent.dirty:
            extent.dirty = 0
            owner.pool.settle(extent)
        elif action == "unpin":
            extent.pins = 0
        elif action == "release":
            owner.pool.release(extent)
        busy = {key: extent for key, extent in busy.items() if extent.dirty or extent.pins}
        assert all(owners[who].home.get(index) is extent for (who, index), extent in busy.items())
        assert len(first.pool._ahead) <= slots // 2
        check_pool(first.pool)
