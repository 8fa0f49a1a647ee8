"""The whole cache against a model: many tasks or fibres at once, a slow and failing disk, and very little memory.

Every byte that a read returns must have been written by some write (or be the disk's first content) that was not
certainly overwritten: that is, there is no acknowledged write of this byte that began after the other one had ended,
and ended before the read began. Bytes of a block whose write-back failed may have any value that they ever had.
"""

import itertools
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import trio
import trio.testing
from cache_checks import check_invariants, check_pool, check_quiet
from cache_fakes import Command, FakeDevice, bad_block
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iscsifuse.cache import BlockCache, BlockFile, BufferPool, CacheSettings, DirectFile, Handle, block_file
from iscsifuse.cache.extent import runs
from iscsifuse.errors import IscsifuseError, WriteBackError
from support.fibres import as_fibre

T = TypeVar("T")

FOREVER = 1 << 60
PATIENCE = 1000.0
"""Seconds of somebody who cancels nothing."""


@dataclass
class Write:
    start: int
    ended: int
    acked: bool
    offset: int
    data: bytes


@dataclass
class Model:
    """What happened, in the order of a counter."""

    first: bytes
    block_length: int
    now: int = 0
    writes: list[Write] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)

    def tick(self) -> int:
        self.now += 1
        return self.now

    def check(self, offset: int, data: bytes, *, begun: int) -> None:
        """`data` was read at `offset` by a read that began at `begun` and ends now."""
        stop = offset + len(data)
        near = [w for w in self.writes if w.offset < stop and w.offset + len(w.data) > offset]
        # Between the edges of writes, the same writes concern every byte.
        edges = {offset, stop}
        for write in near:
            edges |= {write.offset, write.offset + len(write.data)}
        edges |= set(range(offset - offset % self.block_length, stop, self.block_length))
        inside = sorted(edge for edge in edges if offset <= edge <= stop)
        for low, high in itertools.pairwise(inside):
            here = [w for w in near if w.offset <= low and w.offset + len(w.data) >= high]
            allowed = [Write(-1, 0, True, 0, self.first), *here]
            if low // self.block_length not in self.lost:
                allowed = [
                    w for w in allowed if not any(v.acked and v.start >= w.ended and v.ended <= begun for v in here)
                ]
            candidates = [w.data[low - w.offset : high - w.offset] for w in allowed]
            piece = data[low - offset : high - offset]
            # One write as a whole, mostly; a mixture only where writes ran at the same time.
            if piece not in candidates:
                for position, byte in enumerate(piece):
                    values = {candidate[position] for candidate in candidates}
                    assert byte in values, f"byte {low + position}: {byte} not in {values}"


@dataclass
class Setup:
    block_length: int
    block_count: int
    mode: str
    slots: int
    read_ahead: int
    depth: int
    seed: int
    slowness: float
    faults: str
    luns: int = 1
    keep_strays: bool = True
    volatile: bool = False
    fibres: bool = False

    @property
    def size(self) -> int:
        return self.block_length * self.block_count


@dataclass
class World:
    setup: Setup
    device: FakeDevice
    pool: BufferPool
    file: BlockFile
    model: Model
    random: random.Random
    failures: int = 0  # of background writes, and of flushes
    told: bool = True
    known: dict[Handle, tuple[int, int]] = field(default_factory=dict)  # what drains, and what syncs have told
    tag: int = 0
    at_risk: set[int] = field(default_factory=set)  # blocks that were written through while the power was cut
    cutting: bool = False

    def open(self) -> Handle:
        handle = self.file.open()
        known = self.failures if self.told else self.failures - 1
        self.known[handle] = (known, known)
        return handle

    def note_error(self) -> None:
        """A write-through that had met a cut didn't succeed: what was there before may be lost, and that is told."""
        if self.setup.mode == "through" and not self.cutting:
            self.failures += 1
            self.told = False
            self.model.lost |= self.at_risk

    def check(self) -> None:
        if isinstance(self.file, BlockCache):
            check_invariants(self.file, self.pool)
        else:
            check_pool(self.pool)

    def delay(self, _command: Command) -> float:
        return self.random.choice((0, 0, self.setup.slowness * self.random.random()))

    def fault(self, command: Command) -> Exception | None:
        faults = self.setup.faults
        if command.kind == "flush":
            if faults == "all" and self.random.random() < 0.2:
                self.failures += 1
                self.told = False
                return IscsifuseError("flush")
        elif (command.kind == "write" and faults in ("writes", "all") and self.random.random() < 0.25) or (
            command.kind == "read" and faults in ("reads", "all") and self.random.random() < 0.25
        ):
            if command.kind == "write" and self.setup.mode == "behind":
                self.failures += 1
                self.told = False
                self.model.lost |= set(command.span)
            return bad_block(command.lba)
        return None


async def call(world: World, coroutine: Coroutine[Any, Any, T], patience: float) -> T:
    """As a task or as a fibre; these can't be cancelled while they wait for the disk."""
    if world.setup.fibres and patience == PATIENCE:
        return await as_fibre(coroutine)
    return await coroutine


async def read(file: BlockFile, offset: int, length: int) -> bytes:
    peeked = file.peek(offset, length)
    return bytes(await file.read(offset, length) if peeked is None else peeked)


async def do_read(world: World, offset: int, length: int, patience: float) -> None:
    begun = world.model.tick()
    with trio.move_on_after(patience):
        try:
            peeked = world.file.peek(offset, length)
            found = (
                bytes(peeked) if peeked is not None else await call(world, read(world.file, offset, length), patience)
            )
        except IscsifuseError:
            assert world.setup.faults in ("reads", "all") or world.device.bad
            return
        assert len(found) == max(0, min(length, world.setup.size - offset))
        world.model.check(offset, found, begun=begun)


async def do_write(world: World, offset: int, length: int, patience: float) -> None:
    length = min(length, world.setup.size - offset)
    if length <= 0:
        return
    world.tag = world.tag % 250 + 1
    data = bytes((world.tag + (i & 3)) & 0xFF for i in range(length))
    write = Write(world.model.tick(), FOREVER, False, offset, data)
    world.model.writes.append(write)
    try:
        with trio.move_on_after(patience) as scope:
            assert await call(world, world.file.write(offset, data), patience) == length
            write.acked = True
        assert write.acked or scope.cancelled_caught
    except IscsifuseError:
        assert world.setup.faults != "none" or world.device.bad
    finally:
        write.ended = world.model.tick()


async def do_drain(world: World, handle: Handle, *, sync: bool) -> None:
    before = [w for w in world.model.writes if w.acked]
    since = world.failures
    cuts = world.device.cuts
    error: Exception | None = None
    try:
        await (world.file.sync(handle) if sync else world.file.drain(handle))
    except WriteBackError as caught:
        error = caught
    drained, synced = world.known[handle]
    expected = world.failures != (synced if sync else drained) or world.failures != since
    assert (error is not None) == expected, "an error told twice, or not at all"
    if expected:
        world.told = True
    world.known[handle] = (world.failures, world.failures if sync else synced)
    if error is None and (sync or cuts == world.device.cuts):
        # What was acknowledged before is on the disk now, or something newer is; after a sync it survives power cuts.
        medium = world.device.stable if sync and world.device.volatile else world.device.data
        for write in before:
            image = bytes(medium[write.offset : write.offset + len(write.data)])
            world.model.check(write.offset, image, begun=write.ended)


def do_cut(world: World) -> None:
    """The disk loses its power, and what it had not been told to keep."""
    device, file, length = world.device, world.file, world.setup.block_length
    if not device.volatile:
        return
    assert isinstance(file, BlockCache)
    per_extent = file._geometry.blocks
    held = {
        extent.index * per_extent + block
        for extent in file._extents.values()
        for first, stop in runs(extent.unsynced | extent.dirty | extent.writing)
        for block in range(first, stop)
    }
    gone = {
        block
        for block in range(world.setup.block_count)
        if device.data[block * length : (block + 1) * length] != device.stable[block * length : (block + 1) * length]
    } - held
    if file._write_back.unsynced.has_orphans:
        world.failures += 1
        world.told = False
        world.model.lost |= gone
    else:
        assert not gone, f"nobody could write blocks {gone} again"
    world.at_risk |= {
        extent.index * per_extent + block
        for extent in file._extents.values()
        for first, stop in runs(extent.writing)
        for block in range(first, stop)
    }
    device.cut_power()
    world.cutting = True
    file.lose()
    world.cutting = False
    for extent in file._extents.values():
        for first, stop in runs(extent.valid & ~(extent.dirty | extent.writing)):
            place = (extent.index * per_extent + first) * length
            size = (stop - first) * length
            shown = bytes(extent.view[first * length : stop * length])
            assert shown == device.data[place : place + size], "memory has what the disk has lost"


Step = tuple[str, float, int, int, float]


async def do_step(world: World, step: Step, handles: list[trio.Lock], owners: list[Handle]) -> None:
    kind, wait, where, length, patience = step
    await trio.sleep(wait)
    offset = where % world.setup.size
    if kind == "read":
        await do_read(world, offset, length, patience)
    elif kind == "write":
        await do_write(world, offset, length, patience)
    elif kind in ("drain", "sync"):
        number = where % len(owners)
        async with handles[number]:  # one question at a time, so that the answer is known
            await do_drain(world, owners[number], sync=kind == "sync")
    elif kind == "open":
        owners[where % len(owners)] = (
            world.open() if not handles[where % len(owners)].locked() else owners[where % len(owners)]
        )
    elif kind == "invalidate":
        world.file.invalidate()
    elif kind == "cut":
        do_cut(world)
    elif kind == "scan":
        for position in range(offset, min(offset + 8 * length, world.setup.size), max(1, length)):
            await do_read(world, position, length, patience)
            await trio.sleep(wait / 10)
    world.check()


def make_world(setup: Setup, pool: BufferPool, number: int, bad: set[int]) -> World:
    # Not with failing write-through: what is written again fails in the background, which can't be told apart here.
    volatile = setup.volatile and (
        setup.mode == "behind" or (setup.mode == "through" and setup.faults not in ("writes", "all"))
    )
    device = FakeDevice(setup.block_length, setup.block_count, volatile=volatile, eager=bool(setup.seed & 1))
    file = block_file(
        device,
        pool=pool,
        settings=CacheSettings(
            read_ahead=setup.read_ahead,
            write_behind=setup.mode == "behind",
            direct=setup.mode == "direct",
            depth=setup.depth,
            keep_strays=setup.keep_strays,
        ),
    )
    model = Model(bytes(device.data), setup.block_length)
    world = World(setup, device, pool, file, model, random.Random(setup.seed + number))
    device.delay = world.delay
    device.fault = world.fault
    file.on_error(world.note_error)
    device.bad = {lba % setup.block_count for lba in bad}
    return world


async def play(setup: Setup, steps: list[Step], bad: set[int]) -> None:
    """All steps at once, each after its wait, on LUNs that share a pool; then look what has become of the disks."""
    pool = BufferPool(setup.slots * 4096 * 2, slot_size=4096 * 2)
    worlds = [make_world(setup, pool, number, bad) for number in range(setup.luns)]
    with trio.fail_after(10_000):
        async with trio.open_nursery() as background:
            for world in worlds:
                await background.start(world.file.run)
            async with trio.open_nursery() as nursery:
                for number, world in enumerate(worlds):
                    nursery.start_soon(play_one, world, steps[number :: setup.luns])
            for world in worlds:
                await check_end(world)
            background.cancel_scope.cancel()


async def play_one(world: World, steps: list[Step]) -> None:
    owners = [world.open(), world.open()]
    locks = [trio.Lock(), trio.Lock()]
    async with trio.open_nursery() as nursery:
        for step in steps:
            nursery.start_soon(do_step, world, step, locks, owners)
    # Every handle that is open hears of every error, once.
    for handle in owners:
        for sync in (False, False, True, True):
            await do_drain(world, handle, sync=sync)
    world.device.fault = None
    world.device.bad.clear()
    await trio.sleep(60)  # read-ahead comes to its end
    await world.file.drain()


async def check_end(world: World) -> None:
    image = bytes(world.device.data)
    world.model.check(0, image, begun=world.model.tick())
    for _ in range(2):
        found = b""
        for offset in range(0, world.setup.size, 7777):
            found += bytes(await world.file.read(offset, 7777))
        assert found == image, "memory and disk differ"
        await trio.sleep(60)
        if isinstance(world.file, BlockCache):
            check_quiet(world.file, world.pool)
            assert world.file.stats().dirty_bytes == 0
        world.file.invalidate()
    assert not world.device.in_flight
    assert world.pool.unclean == 0
    if isinstance(world.file, DirectFile):
        assert len(world.file._lock) == 0
        assert not world.file._waiting


def _setups() -> st.SearchStrategy[Setup]:
    return st.builds(
        Setup,
        block_length=st.sampled_from((512, 520, 4096)),
        block_count=st.integers(1, 90),
        mode=st.sampled_from(("behind", "behind", "through", "direct")),
        slots=st.integers(1, 8),
        read_ahead=st.sampled_from((0, 8192, 65536)),
        depth=st.integers(1, 16),
        seed=st.integers(0, 1 << 30),
        slowness=st.sampled_from((0.01, 0.3)),
        faults=st.sampled_from(("none", "none", "reads", "writes", "all")),
        luns=st.integers(1, 3),
        keep_strays=st.booleans(),
        volatile=st.booleans(),
        fibres=st.booleans(),
    )


def _steps() -> st.SearchStrategy[list[Step]]:
    kinds = ("read", "read", "write", "write", "write", "drain", "sync", "open", "invalidate", "scan", "cut")
    step = st.tuples(
        st.sampled_from(kinds),
        st.sampled_from((0.0, 0.0, 0.01, 0.05, 0.2, 0.5, 1.0)),
        st.one_of(st.integers(0, 90 * 4096), st.integers(0, 20000), st.sampled_from((0, 512, 4096, 8192, 16384))),
        st.one_of(st.integers(1, 600), st.integers(1, 30000), st.sampled_from((512, 4096, 8192))),
        st.sampled_from((PATIENCE, PATIENCE, PATIENCE, 0.0, 0.02, 0.2)),
    )
    return st.lists(step, max_size=45)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(setup=_setups(), steps=_steps(), bad=st.sets(st.integers(0, 89), max_size=2))
def test_model(setup: Setup, steps: list[Step], bad: set[int]) -> None:
    trio.run(play, setup, steps, bad, clock=trio.testing.MockClock(autojump_threshold=0))


def _random_play(mode: str, faults: str, seed: int) -> tuple[Setup, list[Step]]:
    r = random.Random(f"{mode}{faults}{seed}")
    setup = Setup(
        r.choice((512, 520, 4096)),
        r.randint(1, 90),
        mode,
        r.randint(1, 8),
        r.choice((0, 65536)),
        r.choice((1, 2, 16)),
        seed,
        r.choice((0.01, 0.3)),
        faults,
        r.choice((1, 1, 2, 5)),
        keep_strays=r.random() < 0.5,
        volatile=seed % 3 > 0,
        fibres=seed % 2 > 0,
    )
    kinds = ("read", "read", "write", "write", "write", "drain", "sync", "open", "invalidate", "scan", "cut")
    steps: list[Step] = [
        (
            r.choice(kinds),
            r.random() * r.choice((0, 0.05, 1, 3)),
            r.choice((r.randrange(90 * 4096), r.randrange(20000), 0)),
            r.choice((r.randint(1, 600), r.randint(1, 30000), 512, 8192)),
            r.choice((PATIENCE, PATIENCE, PATIENCE, 0.02)),
        )
        for _ in range(r.choice((30, 120)))
    ]
    return setup, steps


@pytest.mark.parametrize("faults", ["none", "reads", "writes", "all"])
@pytest.mark.parametrize("mode", ["behind", "through", "direct"])
def test_busy(mode: str, faults: str) -> None:
    """More tasks at once than hypothesis would try."""
    for seed in range(8):
        setup, steps = _random_play(mode, faults, seed)
        trio.run(play, setup, steps, set(), clock=trio.testing.MockClock(autojump_threshold=0))
