"""From a plan to disks, on targets that are made up: who is left out, and what is said of it."""

# ruff: noqa: ARG002 - the signatures are those of what is replaced

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from iscsifuse.cache import BlockDevice, BlockFile
from iscsifuse.cache import block_file as make_file
from iscsifuse.errors import (
    AuthenticationError,
    ConnectError,
    IscsifuseError,
    MountError,
    NothingFoundError,
    ParameterDataError,
    WriteBackError,
)
from iscsifuse.fibres import own_task
from iscsifuse.initiator.groups import plain_errors
from iscsifuse.initiator.settings import DiscoveredTarget, Portal, SessionSettings, TargetPortal
from iscsifuse.initiator.statistics import CommandStatistics
from iscsifuse.mount import assembly
from iscsifuse.mount.assembly import Assembly, assemble, portals_of
from iscsifuse.mount.plan import MountPlan
from iscsifuse.mount.tree import Disk

HERE = Portal("10.0.0.1")
THERE = Portal("10.0.0.2")
NAMES = [f"iqn.2004-04.com.example:disk{number}" for number in range(4)]
PLAN = MountPlan(
    source="iscsi://10.0.0.1/",
    portal=HERE,
    target_name=None,
    lun=None,
    mountpoint=Path("/mnt"),
    session=SessionSettings(initiator_name="iqn.2004-04.com.example:us"),
)


@dataclass
class Inquiry:
    vendor: str = "IET"
    product: str = "VIRTUAL-DISK"
    revision: str = "1"


@dataclass
class Lun:
    """Looks like a LunDescription."""

    lun: int
    is_disk: bool = True
    problem: str | None = None
    write_protected: bool = False
    block_length: int = 512
    serial: str = "S"
    type_words: str = "storage array controller"
    inquiry: Inquiry = field(default_factory=Inquiry)

    @property
    def usable(self) -> bool:
        return self.is_disk and self.problem is None


class Unit:
    """Looks like a LogicalUnit."""

    def __init__(self, nexus: "Nexus", description: Lun) -> None:
        self.label = f"LUN {description.lun} of {nexus.target_name}"
        self.block_length = description.block_length
        self.block_count = 8
        self.volatile = True
        self.on_change: Callable[[], None] | None = None
        self.on_loss: Callable[[], None] | None = None
        self.on_inventory: Callable[[], None] | None = None
        self.on_deferred: Callable[[WriteBackError], None] | None = None
        self.write_burst = 1 << 18
        self.latency = 0.0
        self.looks = 0
        self.written: list[tuple[int, bytes]] = []
        nexus.units.append(self)

    async def look(self) -> None:
        await trio.lowlevel.checkpoint()
        self.looks += 1

    async def read_into(self, buffer: memoryview, *, lba: int) -> None:
        raise AssertionError("not used")

    async def write(self, buffer: memoryview, *, lba: int, fua: bool = False) -> None:
        await own_task()
        await trio.lowlevel.checkpoint()
        self.written.append((lba, bytes(buffer)))

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()


class Nexus:
    def __init__(self, target_name: str) -> None:
        self.target_name = target_name
        self.units: list[Unit] = []
        self.guards: list[Callable[[Any], Awaitable[bool]]] = []
        self.breaks = trio.Event()

    def add_guard(self, guard: Callable[[Any], Awaitable[bool]]) -> None:
        self.guards.append(guard)

    def report(self) -> dict[str, object]:
        return {"target": self.target_name}


class San:
    """The targets behind a portal."""

    def __init__(self) -> None:
        self.targets: dict[str, list[Lun] | IscsifuseError] = {}
        self.listed: list[str] | None = None
        self.logged_in: list[str] = []
        self.nexuses: dict[str, Nexus] = {}
        self.settings: SessionSettings | None = None
        self.login_takes = 0.0
        self.most_at_once = self._at_once = 0
        self.slow: set[str] = set()
        self.slow_to_begin: set[str] = set()
        self.clumsy: set[str] = set()
        self.scans = 0
        self.told: list[list[int]] = []
        self.heard: list[list[int]] = []
        self.while_told: Callable[[], None] | None = None

    async def discover(self, portal: Portal, settings: SessionSettings) -> list[DiscoveredTarget]:
        assert portal == HERE
        await trio.lowlevel.checkpoint()
        names = self.listed if self.listed is not None else list(self.targets)
        return [DiscoveredTarget(name, (TargetPortal(HERE, 1),)) for name in names]

    @asynccontextmanager
    async def open_nexus(
        self,
        target_name: str,
        portals: Sequence[Portal],
        settings: SessionSettings,
        *,
        statistics: CommandStatistics | None = None,
    ) -> AsyncIterator[Nexus]:
        assert portals == (HERE,)
        assert statistics is not None
        self.settings = settings
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await trio.sleep(0.01 if target_name in self.slow_to_begin else self.login_takes)
        self._at_once -= 1
        content = self.targets[target_name]
        if isinstance(content, IscsifuseError):
            raise content
        self.logged_in.append(target_name)
        self.nexuses[target_name] = nexus = Nexus(target_name)

        async def run() -> None:
            await nexus.breaks.wait()
            raise ZeroDivisionError("a mistake in the nexus")

        try:
            with plain_errors():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run)
                    yield nexus
                    if target_name in self.clumsy:
                        raise ZeroDivisionError("a mistake at the end")
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=target_name not in self.slow):
                await trio.sleep(1000 if target_name in self.slow else 0)
                self.logged_in.remove(target_name)

    async def scan(
        self, nexus: Nexus, *, only: Collection[int] | None = None, without: Collection[int] = ()
    ) -> list[Lun]:
        await trio.lowlevel.checkpoint()
        self.scans += 1
        content = self.targets[nexus.target_name]
        if isinstance(content, IscsifuseError):
            raise content
        return [lun for lun in content if lun.lun not in without and (only is None or lun.lun in only)]

    async def hear_tgtd(self, nexus: Nexus, units: Collection[Lun]) -> None:
        assert nexus is self.nexuses[nexus.target_name]
        self.heard.append([unit.lun for unit in units])

    async def make_room_in_tgtd(self, nexus: Nexus, units: Iterable[Lun]) -> bool:
        assert nexus is self.nexuses[nexus.target_name]
        await trio.lowlevel.checkpoint()
        self.told.append([unit.lun for unit in units])
        if self.while_told is not None:
            self.while_told()
        return self.while_told is not None


@pytest.fixture
def san(monkeypatch: pytest.MonkeyPatch) -> San:
    made = San()
    monkeypatch.setattr(assembly, "discover", made.discover)
    monkeypatch.setattr(assembly, "open_nexus", made.open_nexus)
    monkeypatch.setattr(assembly, "scan", made.scan)
    monkeypatch.setattr(assembly, "make_room_in_tgtd", made.make_room_in_tgtd)
    monkeypatch.setattr(assembly, "hear_tgtd", made.hear_tgtd)
    monkeypatch.setattr(assembly, "LogicalUnit", Unit)
    return made


def only(name: str, **changes: object) -> MountPlan:
    return replace(PLAN, target_name=name, **changes)  # type: ignore[arg-type]


async def test_all_disks_of_all_targets_in_order(san: San) -> None:
    san.login_takes = 0.01
    san.targets = {NAMES[1]: [Lun(0, is_disk=False), Lun(1), Lun(2)], NAMES[0]: [Lun(1)]}
    async with assemble(PLAN) as made:
        assert [(disk.target, disk.lun, disk.writable) for disk in made.disks] == [
            (NAMES[1], 1, False),
            (NAMES[1], 2, False),
            (NAMES[0], 1, False),
        ]
        assert not made.partial
        assert [session.report()["target"] for session in made.sessions] == [NAMES[1], NAMES[0]]
        assert made.details[made.disks[0]]["vendor"] == "IET"
        assert sorted(san.logged_in) == sorted(NAMES[:2])
        assert made.disks[0].file.size == 8 * 512
        assert san.settings is not None
        assert san.settings.read_only
    assert san.logged_in == []
    assert san.most_at_once == 2


async def test_logins_are_bounded(san: San) -> None:
    san.login_takes = 0.001
    san.targets = {f"{NAMES[0]}-{number}": [Lun(1)] for number in range(50)}
    async with assemble(PLAN) as made:
        assert len(made.disks) == 50
    assert san.most_at_once == 16


async def test_read_write_is_for_disks_that_are_not_protected(san: San, caplog: pytest.LogCaptureFixture) -> None:
    san.targets = {NAMES[0]: [Lun(1), Lun(2)]}
    async with assemble(only(NAMES[0], read_write=True)) as made:
        assert [disk.writable for disk in made.disks] == [True, True]
        assert san.settings is not None
        assert not san.settings.read_only
    assert not caplog.records


@pytest.mark.expect_log("is write-protected: it can only be read")
async def test_protected_disks_can_be_read(san: San) -> None:
    san.targets = {NAMES[0]: [Lun(1, write_protected=True)]}
    async with assemble(only(NAMES[0], read_write=True)) as made:
        assert not made.disks[0].writable
        assert not made.partial


@pytest.mark.expect_log("disk0 is left out: wrong secret")
async def test_a_target_that_fails_leaves_the_others(san: San) -> None:
    san.targets = {NAMES[0]: AuthenticationError("wrong secret"), NAMES[1]: [Lun(1)]}
    async with assemble(PLAN) as made:
        assert [disk.target for disk in made.disks] == [NAMES[1]]
        assert made.partial


async def test_where_all_fail_the_first_failure_is_told(san: San) -> None:
    san.targets = {NAMES[0]: AuthenticationError("wrong secret"), NAMES[1]: ConnectError("gone"), NAMES[2]: []}
    with pytest.raises(AuthenticationError, match="wrong secret"):
        async with assemble(PLAN):
            raise AssertionError("not reached")
    assert san.logged_in == []


@pytest.mark.parametrize(
    ("luns", "lun", "words"),
    [
        ([Lun(0, is_disk=False), Lun(1)], 7, "has no LUN 7; the LUNs it shows: 0, 1"),
        ([], 7, "the LUNs it shows: none"),
        ([Lun(0, is_disk=False)], 0, "LUN 0 of .* is not a disk, but a storage array controller"),
        ([Lun(1, problem="no medium")], 1, "LUN 1 of .* can't be used: no medium"),
        ([], None, "has no disk$"),
        ([Lun(0, is_disk=False)], None, "has no disk: LUN 0 of .* is not a disk"),
    ],
)
async def test_what_is_not_there_is_told(san: San, luns: list[Lun], lun: int | None, words: str) -> None:
    san.targets = {NAMES[0]: luns}
    with pytest.raises(NothingFoundError, match=words):
        async with assemble(only(NAMES[0], lun=lun)):
            raise AssertionError("not reached")
    assert san.logged_in == []


async def test_one_lun(san: San) -> None:
    san.targets = {NAMES[0]: [Lun(0, is_disk=False), Lun(1), Lun(2)]}
    async with assemble(only(NAMES[0], lun=2)) as made:
        assert [disk.lun for disk in made.disks] == [2]
        assert not made.partial


@pytest.mark.expect_log("no target has a usable disk with LUN 9")
async def test_a_list_of_luns(san: San) -> None:
    san.targets = {NAMES[0]: [Lun(1), Lun(2), Lun(3)], NAMES[1]: [Lun(3)]}
    async with assemble(replace(PLAN, luns=(3, 1))) as made:
        assert [(disk.target, disk.lun) for disk in made.disks] == [(NAMES[0], 1), (NAMES[0], 3), (NAMES[1], 3)]
        assert not made.partial
    async with assemble(replace(PLAN, luns=(2, 9))) as made:
        assert [disk.lun for disk in made.disks] == [2]
        assert made.partial
    with pytest.raises(NothingFoundError, match="no usable disk with LUN 8, 9"):
        async with assemble(replace(PLAN, luns=(8, 9))):
            raise AssertionError("not reached")


@pytest.mark.expect_log("can't be used: (no medium|blocks)")
async def test_disks_that_are_not_ready_are_left_out(san: San, monkeypatch: pytest.MonkeyPatch) -> None:
    san.targets = {NAMES[0]: [Lun(1, problem="no medium"), Lun(2), Lun(3, block_length=1 << 30)]}

    def block_file(device: BlockDevice, **arguments: object) -> object:
        if device.block_length > 4096:
            raise ParameterDataError("blocks of that size")
        return make_file(device, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(assembly, "block_file", block_file)
    async with assemble(PLAN) as made:
        assert [disk.lun for disk in made.disks] == [2]
        assert made.partial


@pytest.mark.conformance("B6")
@pytest.mark.expect_log("offers a target that can't be shown")
async def test_names_that_can_not_be_shown_are_left_out(san: San) -> None:
    san.targets = {NAMES[0]: [Lun(1)]}
    san.listed = ["../../etc", NAMES[0], NAMES[0]]
    async with assemble(PLAN) as made:
        assert len(made.disks) == 1
        assert made.partial


async def test_a_portal_without_targets(san: San) -> None:
    with pytest.raises(NothingFoundError, match="offers no target to iqn"):
        async with assemble(PLAN):
            raise AssertionError("not reached")
    assert san.logged_in == []


async def test_changes_drop_the_cache_and_are_passed_on(san: San, monkeypatch: pytest.MonkeyPatch) -> None:
    san.targets = {NAMES[0]: [Lun(1)]}
    seen: list[str] = []
    async with assemble(PLAN) as made:
        (unit,) = san.nexuses[NAMES[0]].units
        assert unit.on_change is not None
        unit.on_change()  # nobody is interested yet
        monkeypatch.setattr(made.disks[0].file, "invalidate", lambda: seen.append("invalidated"))
        made.on_change = lambda disk: seen.append(disk.name)
        unit.on_change()
    assert seen == ["invalidated", "lun-1"]


# --- what is new ---


@pytest.mark.conformance(107)
@pytest.mark.expect_log("LUN 7 of .* is new; it has 4096 bytes")
async def test_a_lun_that_is_new_becomes_a_disk(san: San, autojump_clock: MockClock) -> None:  # noqa: ARG001
    """The target tells of it by one of its disks; what isn't usable isn't shown; what is known stays as it is."""
    san.targets = {NAMES[0]: [Lun(1)], NAMES[1]: [Lun(1)]}
    told: list[Disk] = []
    async with assemble(replace(PLAN, read_write=True)) as made:
        before = list(made.disks)
        made.on_new = told.append
        san.targets[NAMES[0]] = [Lun(0, is_disk=False), Lun(1), Lun(7), Lun(8, problem="no medium")]
        news = san.nexuses[NAMES[0]].units[0].on_inventory
        assert news is not None
        news()
        await trio.sleep(0.01)
        (new,) = told
        assert (new.target, new.lun, new.writable) == (NAMES[0], 7, True)
        assert made.disks == [*before, new]
        assert made.details[new]["vendor"] == "IET"
        assert new.file.open() is not None
        news()
        await trio.sleep(5)
        assert len(told) == 1
        # It tells of changes of its own, and of further ones.
        assert san.nexuses[NAMES[0]].units[-1].on_change is not None
        assert san.nexuses[NAMES[0]].units[-1].on_inventory is not None


@pytest.mark.expect_log("LUN 2 of .* is new")
async def test_a_lun_that_is_new_before_anybody_listens_is_there(
    san: San,
    autojump_clock: MockClock,  # noqa: ARG001
) -> None:
    san.targets = {NAMES[0]: [Lun(1)]}
    async with assemble(PLAN) as made:
        san.targets = {NAMES[0]: [Lun(1), Lun(2)]}
        (guard,) = san.nexuses[NAMES[0]].guards
        assert await guard(None) is True  # a new session, which tells of nothing
        await trio.sleep(0.01)
        assert [disk.lun for disk in made.disks] == [1, 2]


@pytest.mark.parametrize(("lun", "shown"), [(None, [1, 2]), (1, [1])])
@pytest.mark.expect_log("LUN 2 of .* is new")
async def test_a_lun_that_is_new_when_a_command_takes_the_notice_away_is_there(
    san: San,
    autojump_clock: MockClock,  # noqa: ARG001
    lun: int | None,
    shown: list[int],
) -> None:
    """tgtd tells of no change that it had before it was asked for its LUNs, for whatever reason."""
    san.targets = {NAMES[0]: [Lun(1)]}

    def add() -> None:
        san.targets = {NAMES[0]: [Lun(1), Lun(2)]}

    san.while_told = add
    async with assemble(only(NAMES[0], lun=lun)) as made:
        await trio.sleep(0.01)
        assert san.told == [[1]]
        assert [disk.lun for disk in made.disks] == shown


@pytest.mark.parametrize(
    ("plan", "shown"),
    [(replace(PLAN, luns=(1, 3)), [1, 3]), (only(NAMES[0], lun=1), [1]), (only(NAMES[0]), [1, 2, 3])],
)
@pytest.mark.expect_log("is new; it has|no target has a usable disk with LUN 3")
async def test_only_what_was_asked_for_appears(
    san: San,
    autojump_clock: MockClock,  # noqa: ARG001
    plan: MountPlan,
    shown: list[int],
) -> None:
    san.targets = {NAMES[0]: [Lun(1)]}
    async with assemble(plan) as made:
        san.targets = {NAMES[0]: [Lun(1), Lun(2), Lun(3)]}
        scans = san.scans
        news = san.nexuses[NAMES[0]].units[0].on_inventory
        assert news is not None
        news()
        await trio.sleep(5)
        assert [disk.lun for disk in made.disks] == shown
        assert (san.scans == scans) == (plan.lun is not None)


async def test_disks_are_looked_at_now_and_then(san: San, autojump_clock: MockClock) -> None:  # noqa: ARG001
    san.targets = {NAMES[0]: [Lun(1), Lun(2)]}
    async with assemble(PLAN):
        units = san.nexuses[NAMES[0]].units
        scans = san.scans
        await trio.sleep(assembly.LOOK_EVERY * 3.5)
        assert [unit.looks for unit in units] == [3, 3]
        assert san.heard == [[1, 2]] * 3
        assert san.scans == scans


async def test_a_target_that_tells_of_a_change_whenever_it_is_asked_is_not_asked_all_the_time(
    san: San,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,  # noqa: ARG001
) -> None:
    """Also where one LUN is mounted, and nothing is scanned."""
    asked = 0

    async def make_room_in_tgtd(nexus: Nexus, _: Iterable[Lun]) -> bool:
        nonlocal asked
        asked += 1
        assert asked < 100  # without pauses the clock would stand still
        await trio.lowlevel.checkpoint()
        for unit in nexus.units:
            if unit.on_inventory is not None:
                unit.on_inventory()
        return True

    monkeypatch.setattr(assembly, "make_room_in_tgtd", make_room_in_tgtd)
    san.targets = {NAMES[0]: [Lun(1)]}
    async with assemble(only(NAMES[0], lun=1)):
        await trio.sleep(10)
        assert 1 < asked <= 10 / assembly.SCAN_PAUSE + 2


@pytest.mark.conformance("B10")
async def test_a_target_that_keeps_telling_of_changes_is_not_asked_all_the_time(
    san: San,
    autojump_clock: MockClock,  # noqa: ARG001
) -> None:
    san.targets = {NAMES[0]: [Lun(1)]}
    async with assemble(PLAN):
        news = san.nexuses[NAMES[0]].units[0].on_inventory
        assert news is not None
        scans = san.scans
        for _ in range(1000):
            news()
            await trio.sleep(0.01)
        assert san.scans - scans <= 10 / assembly.SCAN_PAUSE + 1


async def test_a_target_is_told_in_each_session_what_it_should_know(
    san: San,
    autojump_clock: MockClock,  # noqa: ARG001
) -> None:
    san.targets = {NAMES[0]: [Lun(1), Lun(2)]}
    async with assemble(only(NAMES[0], lun=2)):
        await trio.sleep(1)
        assert san.told == [[2]]
        (guard,) = san.nexuses[NAMES[0]].guards
        assert await guard(None)
        await trio.sleep(1)
        assert san.told == [[2], [2]]


@pytest.mark.expect_log("its LUNs can't be listed again: gone")
async def test_a_list_that_cannot_be_had_changes_nothing(san: San, autojump_clock: MockClock) -> None:  # noqa: ARG001
    san.targets = {NAMES[0]: [Lun(1)]}
    async with assemble(PLAN) as made:
        san.targets = {NAMES[0]: ConnectError("gone")}
        news = san.nexuses[NAMES[0]].units[0].on_inventory
        assert news is not None
        news()
        await trio.sleep(5)
        assert [disk.lun for disk in made.disks] == [1]


async def test_errors_of_the_body_pass_as_they_are(san: San) -> None:
    san.targets = {NAMES[0]: [Lun(1)]}
    with pytest.raises(KeyError, match="mine"):
        async with assemble(PLAN):
            raise KeyError("mine")
    assert san.logged_in == []


async def test_a_login_can_be_interrupted(san: San) -> None:
    san.targets = {NAMES[0]: [Lun(1)]}
    san.login_takes = 1000
    with trio.move_on_after(0.01) as scope:
        async with assemble(PLAN):
            raise AssertionError("not reached")
    assert scope.cancelled_caught


async def test_a_logout_has_an_end(san: San, autojump_clock: MockClock) -> None:  # noqa: ARG001
    san.targets = {NAMES[0]: [Lun(1)]}
    san.slow = {NAMES[0]}
    with trio.fail_after(20):
        async with assemble(PLAN):
            pass


# --- mistakes of our own ---


@asynccontextmanager
async def what_is_dirty_is_kept(san: San, target: str) -> AsyncIterator[Assembly]:
    """Two targets; what has been written to this one's disk before the body must still get there afterwards."""
    san.targets = {name: [Lun(1)] for name in NAMES[:2]}
    data = b"precious" * 64
    async with assemble(replace(PLAN, read_write=True)) as made:
        (disk,) = (disk for disk in made.disks if disk.target == target)
        await disk.file.write(512, data)
        assert disk.file.stats().dirty_bytes == 512
        yield made
        await trio.lowlevel.checkpoint()
        assert disk.file.stats().dirty_bytes == 512
        await disk.file.sync()
        assert san.nexuses[target].units[0].written == [(1, data)]


@pytest.mark.expect_log("the mount broke down, and ends")
async def test_a_nexus_that_breaks_down_takes_no_other_target_along(san: San) -> None:
    async with what_is_dirty_is_kept(san, NAMES[1]) as made:
        assert not made.breakdown.happened.is_set()
        made.breakdown.check()
        san.nexuses[NAMES[0]].breaks.set()
        with trio.fail_after(5):
            await made.breakdown.happened.wait()
        with pytest.raises(MountError, match="the mount broke down: ZeroDivisionError"):
            made.breakdown.check()
    assert san.logged_in == []


@pytest.mark.expect_log("the mount broke down, and ends")
async def test_a_cache_that_breaks_down_takes_no_other_along(san: San, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks = trio.Event()

    def block_file(device: BlockDevice, **arguments: object) -> BlockFile:
        file = make_file(device, **arguments)  # type: ignore[arg-type]
        if not san.nexuses.keys() - {NAMES[0]}:

            async def run(*, task_status: trio.TaskStatus[None]) -> None:
                task_status.started()
                await breaks.wait()
                raise ZeroDivisionError("a mistake in the cache")

            monkeypatch.setattr(file, "run", run)
        return file

    monkeypatch.setattr(assembly, "block_file", block_file)
    san.slow_to_begin = {NAMES[1]}
    async with what_is_dirty_is_kept(san, NAMES[1]) as made:
        breaks.set()
        with trio.fail_after(5):
            await made.breakdown.happened.wait()
    assert san.logged_in == []


@pytest.mark.expect_log("a mistake of ours: new disks of .*disk0, and new sizes, aren't looked for any more")
async def test_a_mistake_in_looking_around_costs_nothing_else(san: San, monkeypatch: pytest.MonkeyPatch) -> None:
    async def make_room_in_tgtd(nexus: Nexus, _: Iterable[Lun]) -> bool:
        await trio.lowlevel.checkpoint()
        if nexus.target_name == NAMES[0]:
            raise ZeroDivisionError("a mistake")
        return False

    monkeypatch.setattr(assembly, "make_room_in_tgtd", make_room_in_tgtd)
    async with what_is_dirty_is_kept(san, NAMES[0]) as made:
        await trio.sleep(0.05)
        assert not made.breakdown.happened.is_set()


async def test_a_mistake_at_the_end_is_told(san: San) -> None:
    san.targets = {NAMES[0]: [Lun(1)]}
    san.clumsy = {NAMES[0]}
    with pytest.raises(ZeroDivisionError):
        async with assemble(PLAN):
            pass


async def test_what_a_target_lost_later_is_an_error_of_the_file(san: San) -> None:
    """Also of a file that nobody flushes any more."""
    san.targets = {NAMES[0]: [Lun(1)]}
    async with assemble(PLAN) as made:
        (unit,) = san.nexuses[NAMES[0]].units
        assert unit.on_deferred is not None
        made.disks[0].file.check()
        unit.on_deferred(WriteBackError("lost after all"))
        with pytest.raises(WriteBackError, match="lost after all"):
            made.disks[0].file.check()
        made.disks[0].file.check()


@pytest.mark.parametrize(
    ("listed", "typed", "order"),
    [
        ([HERE, THERE], THERE, [THERE, HERE]),
        ([HERE, THERE], Portal("san.example"), [Portal("san.example"), HERE, THERE]),
        ([HERE, THERE, HERE], Portal("192.0.2.1"), [HERE, THERE, Portal("192.0.2.1")]),
        ([], HERE, [HERE]),
        ([Portal("fe80::1")], Portal("fe80::1"), [Portal("fe80::1")]),
    ],
)
def test_order_of_portals(listed: list[Portal], typed: Portal, order: list[Portal]) -> None:
    target = DiscoveredTarget(NAMES[0], tuple(TargetPortal(portal, 1) for portal in listed))
    assert portals_of(target, typed) == tuple(order)
