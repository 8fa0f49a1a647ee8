"""What a disk can answer, and what an initiator has to make of it: whole, against the scripted loopback target.

Each case says what the target does (the stimulus) and what has to follow: for the caller, on the wire, and at the
disk. The clock jumps while everybody sleeps, so no back-off is waited for. The target's validator watches the wire,
its ledger tells what was executed, and `Wire` what was sent.
"""

import errno
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ParamSpec, cast

import pytest
import trio
from initiator_kit import DEFAULT_TARGET_NAME, at_once, config_of, pattern, portal_of, serving, settings_of, until
from trio.testing import MockClock

from iscsifuse.errors import (
    CommandError,
    DataProtectError,
    IdentityError,
    IscsifuseError,
    MediumError,
    NoMediumError,
    NoSpaceError,
    ReservationConflictError,
    SessionLostError,
    WriteBackError,
)
from iscsifuse.initiator.inventory import LunDescription, scan
from iscsifuse.initiator.logical_unit import LogicalUnit
from iscsifuse.initiator.nexus import Nexus, NexusState, open_nexus
from iscsifuse.initiator.session import Session
from iscsifuse.iscsi.pdu import Opcode, Pdu
from iscsifuse.iscsi.request import ScsiCommand
from iscsifuse.iscsi.response import DataIn, ScsiResponse
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.capacity import Capacity
from iscsifuse.scsi.cdb import Opcode as Scsi
from iscsifuse.scsi.sense import Sense
from iscsifuse.scsi.sense import SenseKey as K
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import Action, Answer, Change, Late
from iscsifuse.testing.config import TargetConfig
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Match, Rule, Seen, all_of, is_a
from iscsifuse.testing.script import cdb as has_cdb
from iscsifuse.testing.target import LoopbackTarget

P = ParamSpec("P")

BLOCKS = 8192
READ, WRITE = has_cdb(Scsi.READ_10, Scsi.READ_16), has_cdb(Scsi.WRITE_10, Scsi.WRITE_16)
SYNC = has_cdb(Scsi.SYNCHRONIZE_CACHE_10, Scsi.SYNCHRONIZE_CACHE_16)
COMMAND = is_a(Opcode.SCSI_COMMAND)
RECOVERY = "session lost|logged in again|can't log in again|is there again"
DEADLINE = 5.0


# --- the stage ---


def jumping(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """The clock jumps when nothing has come on any socket for a moment, and everybody sleeps."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        trio.run(functools.partial(test, *args, **kwargs), clock=MockClock(autojump_threshold=0.01))

    return run


@pytest.fixture(autouse=True)
def _no_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iscsifuse.initiator.session._TICK", 1.0)


class Wire:
    """The commands that came to the target, in order."""

    def __init__(self, config: TargetConfig) -> None:
        self.commands: list[ScsiCommand] = []
        self.times: list[float] = []
        config.script.add(Rule(IN, Late(0), self._see))

    def _see(self, seen: Seen) -> bool:
        if isinstance(seen.pdu, ScsiCommand):
            self.commands.append(seen.pdu)
            self.times.append(trio.current_time())
        return False

    @property
    def opcodes(self) -> list[int]:
        return [command.cdb[0] for command in self.commands]

    def clear(self) -> None:
        self.commands.clear()
        self.times.clear()


@dataclass
class Stage:
    """A disk that is attached."""

    target: LoopbackTarget
    disk: Disk
    nexus: Nexus
    unit: LogicalUnit
    wire: Wire

    def add(self, action: Action, match: Match, *, times: int = 1, out: bool = False) -> None:
        self.target.script.add(
            Rule(OUT if out else IN, action, match if out else all_of(COMMAND, match), times=times)
        )

    async def read(self, lba: int = 0, blocks: int = 1) -> bytes:
        memory = memoryview(bytearray(blocks * self.unit.block_length))
        await self.unit.read_into(memory, lba=lba)
        return bytes(memory)

    async def write(self, data: bytes = b"!" * 512, lba: int = 0) -> None:
        await self.unit.write(memoryview(data), lba=lba)


@asynccontextmanager
async def on_stage(
    disk: Disk | None = None, *, keys: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[Stage]:
    """A session with a target that has this disk; ``changes`` is its configuration, ``keys`` are our settings."""
    disk = disk or Disk.from_bytes(pattern(BLOCKS * 512))
    config = config_of(disk, **changes)
    wire = Wire(config)
    async with serving(config) as target:
        settings = settings_of(timeout=DEADLINE, **(keys or {}))
        async with open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings) as nexus:
            (description,) = await scan(nexus)
            stage = Stage(target, disk, nexus, LogicalUnit(nexus, description), wire)
            wire.clear()
            target.ledger.clear()
            yield stage


def sense(key: K, asc: int, ascq: int = 0, *, code: int = 0x70, information: int | None = None) -> Answer:
    data = Sense(key=key, asc=asc, ascq=ascq, response_code=code, information=information).encode()
    return Answer(Status.CHECK_CONDITION, data)


# --- answers that pass, and answers that stay ---


@dataclass(frozen=True)
class Case:
    """An answer in place of a command's execution.

    Attributes:
        number: of the conformance case.
        answer: what the target says.
        passes: it says so as many times, and then does what it was asked for; or 0 where one answer is the end.
        attempts: how often the command is sent where the target never says anything else; 0 where only the deadline
            ends it.
        error: what that comes to.
        number_of_error: what a program is told.
    """

    number: int
    answer: Answer
    passes: int
    attempts: int
    error: type[IscsifuseError] = CommandError
    number_of_error: int = errno.EIO


CASES = [
    *[Case(106, sense(K.UNIT_ATTENTION, 0x29, ascq), 5, 11) for ascq in range(8)],
    Case(106, sense(K.UNIT_ATTENTION, 0x47, 0x7F), 5, 11),
    Case(106, sense(K.UNIT_ATTENTION, 0x29, code=0x72), 5, 11),
    Case(108, sense(K.NOT_READY, 0x04, 0x01), 3, 0),
    Case(108, sense(K.NOT_READY, 0x3A), 0, 1, NoMediumError, errno.ENOMEDIUM),
    Case(108, sense(K.NOT_READY, 0x3A, 0x02), 0, 1, NoMediumError, errno.ENOMEDIUM),
    Case(109, Answer(Status.BUSY), 5, 0),
    Case(109, Answer(Status.TASK_SET_FULL), 5, 0),
    Case(110, Answer(Status.RESERVATION_CONFLICT), 2, 4, ReservationConflictError, errno.EBUSY),
    Case(111, sense(K.MEDIUM_ERROR, 0x11, information=0), 0, 1, MediumError),
    Case(111, sense(K.MEDIUM_ERROR, 0x11, information=0, code=0x72), 0, 1, MediumError),
    Case(111, sense(K.MEDIUM_ERROR, 0x11, information=0xDEADBEEF), 0, 1, MediumError),  # an LBA that can't be
    Case(115, sense(K.ABORTED_COMMAND, 0x47, 0x05), 3, 6),
    Case(116, sense(K.DATA_PROTECT, 0x27, 0x00), 0, 1, DataProtectError, errno.EROFS),
    Case(116, sense(K.DATA_PROTECT, 0x27, 0x07), 0, 1, NoSpaceError, errno.ENOSPC),
    Case(117, Answer(Status.TASK_ABORTED), 3, 6),
    Case(117, Answer(Status.ACA_ACTIVE), 3, 6),
]


def marked(cases: list[Case]) -> list[Any]:
    return [
        pytest.param(case, marks=pytest.mark.conformance(case.number), id=f"{case.number}-{number}")
        for number, case in enumerate(cases)
    ]


def check_attempts(stage: Stage, opcode: int, count: int) -> None:
    """So many times the same command went out, each time as a new one."""
    sent = [command for command in stage.wire.commands if command.cdb[0] == opcode]
    assert len(sent) == count
    assert len({command.cdb for command in sent}) == 1
    for number in ("itt", "cmd_sn"):
        assert len({getattr(command, number) for command in sent}) == count


@pytest.mark.parametrize("case", marked([case for case in CASES if case.passes]))
@jumping
async def test_scsi_cases_trouble_that_passes(case: Case) -> None:
    """Read and write are tried again, with new numbers, until they succeed; they are executed once."""
    async with on_stage() as stage:
        stage.add(case.answer, READ, times=case.passes)
        assert await stage.read(lba=7) == pattern(8 * 512)[7 * 512 :]
        check_attempts(stage, Scsi.READ_10, case.passes + 1)
        stage.add(case.answer, WRITE, times=case.passes)
        await stage.write(b"!" * 4096, lba=8)
        check_attempts(stage, Scsi.WRITE_10, case.passes + 1)
        assert (
            stage.disk.contents(lba=7, blocks=10)
            == pattern(8 * 512)[7 * 512 :] + b"!" * 4096 + pattern(17 * 512)[16 * 512 :]
        )
        assert [entry.name for entry in stage.target.ledger] == ["READ(10)", "WRITE(10)"]


@pytest.mark.parametrize("case", marked(CASES))
@jumping
async def test_scsi_cases_trouble_that_stays(case: Case) -> None:
    """A plain error with the right errno, after a bounded number of attempts, in time; then all is as before."""
    async with on_stage() as stage:
        todo: list[tuple[Match, int, Callable[[], Awaitable[object]]]] = [
            (READ, Scsi.READ_10, stage.read),
            (WRITE, Scsi.WRITE_10, functools.partial(stage.write, lba=3)),
        ]
        for match, opcode, action in todo:
            stage.add(case.answer, match, times=0)
            began = trio.current_time()
            with pytest.raises(case.error) as caught:
                await action()
            assert caught.value.errno == case.number_of_error
            assert "of LUN 0 of iqn." in str(caught.value)
            assert trio.current_time() - began <= DEADLINE
            if case.attempts:
                check_attempts(stage, opcode, case.attempts)
            else:
                assert trio.current_time() - began > DEADLINE - 1.1
                times = [
                    time for time, sent in zip(stage.wire.times, stage.wire.opcodes, strict=True) if sent == opcode
                ]
                gaps = [after - before for before, after in pairwise(times)]
                assert 3 < len(times) < 15  # it backs off
                assert all(after > 0.9 * before for before, after in pairwise(gaps))
        assert stage.target.ledger == []
        assert stage.disk.contents() == pattern(BLOCKS * 512)
        stage.target.script.clear()
        await stage.write(lba=3)
        assert await stage.read(lba=3) == b"!" * 512
        assert stage.nexus.reconnects == 0


# --- 107: news ---


@pytest.mark.conformance(107)
@jumping
async def test_scsi_cases_a_capacity_that_changed_is_read_again() -> None:
    """Told to a read, to a write and to a flush; whichever hears of it, the command is tried again."""
    async with on_stage() as stage:
        changes: list[int] = []
        stage.unit.on_change = lambda: changes.append(stage.unit.block_count)
        actions: list[Callable[[], Awaitable[object]]] = [stage.read, stage.write, stage.unit.flush]
        for number, action in enumerate(actions, 1):
            stage.wire.clear()
            stage.disk.resize(BLOCKS + number)
            await action()
            assert stage.wire.opcodes.count(Scsi.SERVICE_ACTION_IN_16) == 1
            assert stage.unit.block_count == BLOCKS + number
        assert changes == [BLOCKS + 1, BLOCKS + 2, BLOCKS + 3]


@pytest.mark.conformance(107)
@pytest.mark.parametrize("read_only", [True, False])
@jumping
async def test_scsi_cases_a_look_brings_the_news(read_only: bool) -> None:
    """One command that changes nothing, where nobody reads or writes; a unit in trouble isn't helped or harmed."""
    async with on_stage(keys={"read_only": read_only}) as stage:
        await stage.unit.look()
        assert stage.wire.opcodes == [Scsi.TEST_UNIT_READY]
        stage.disk.resize(BLOCKS * 2)
        await stage.unit.look()
        assert stage.unit.block_count == BLOCKS * 2
        for trouble in ({"stopped": True}, {"medium_present": False}, {"becoming_ready": 1}):
            for name, value in trouble.items():
                setattr(stage.disk, name, value)
            stage.wire.clear()
            began = trio.current_time()
            await stage.unit.look()
            assert stage.wire.opcodes == [Scsi.TEST_UNIT_READY]
            assert trio.current_time() - began < 0.2
            stage.disk.stopped, stage.disk.medium_present, stage.disk.becoming_ready = False, True, 0


@pytest.mark.conformance(107)
@jumping
async def test_scsi_cases_a_list_that_changed_is_told() -> None:
    async with on_stage() as stage:
        told: list[str] = []
        stage.unit.on_inventory = lambda: told.append("list")
        stage.target.engine().replace(Disk(blocks=8, lun=1))
        assert await stage.read() == pattern(512)
        assert told == ["list"]
        assert [one.lun for one in await scan(stage.nexus, without={0})] == [1]
        assert [one.lun for one in await scan(stage.nexus, only={0, 1}, without={0})] == [1]


@pytest.mark.conformance(107)
@pytest.mark.expect_log("another disk answers")
@jumping
async def test_scsi_cases_nothing_is_written_while_it_is_asked_who_answers() -> None:
    """Another disk comes under the same number, and tells who it is after a second: who writes meanwhile waits."""
    async with on_stage() as stage:
        other = Disk.from_bytes(pattern(BLOCKS * 512), lun=0)
        other.serial = "ANOTHER"
        stage.target.engine().replace(other)
        stage.add(Late(1.0), has_cdb(Scsi.TEST_UNIT_READY, Scsi.INQUIRY), times=0)
        with pytest.raises(IdentityError):
            await stage.read()
        assert other.contents() == pattern(BLOCKS * 512)

    async with on_stage() as stage:
        other = Disk.from_bytes(pattern(BLOCKS * 512), lun=0)
        other.serial = "ANOTHER"
        stage.target.engine().replace(other)
        stage.add(Late(1.0), has_cdb(Scsi.TEST_UNIT_READY, Scsi.INQUIRY), times=0)

        async def write_later(number: int) -> None:
            await trio.sleep(0.3 + number / 10)
            await stage.write(lba=number)

        jobs = [functools.partial(write_later, number) for number in range(20)]
        results = await at_once(stage.read, *jobs, within=60)
        assert [type(result) for result in results] == [IdentityError] * 21
        assert Scsi.WRITE_10 not in stage.wire.opcodes
        assert other.contents() == pattern(BLOCKS * 512)


@pytest.mark.conformance(107)
@jumping
async def test_scsi_cases_one_proof_is_enough_for_all_who_heard_of_it() -> None:
    async with on_stage() as stage:
        stage.add(sense(K.UNIT_ATTENTION, 0x3F, 0x0E), READ, times=30)
        results = await at_once(*[functools.partial(stage.read, number) for number in range(30)], within=60)
        assert [type(result) for result in results] == [bytes] * 30
        assert stage.wire.opcodes.count(Scsi.TEST_UNIT_READY) <= 2


@pytest.mark.conformance(107)
@jumping
async def test_scsi_cases_who_is_cancelled_while_it_is_asked_leaves_no_bar() -> None:
    async with on_stage() as stage:
        stage.add(sense(K.UNIT_ATTENTION, 0x3F, 0x0E), READ)
        stage.add(Late(1.0), has_cdb(Scsi.TEST_UNIT_READY))
        with trio.move_on_after(0.5) as scope:
            await stage.read()
        assert scope.cancelled_caught
        assert await stage.read() == pattern(512)


@pytest.mark.conformance(107)
@pytest.mark.expect_log(RECOVERY)
@jumping
async def test_scsi_cases_a_session_that_is_lost_while_it_is_asked_leaves_no_bar() -> None:
    async with on_stage() as stage:
        stage.add(sense(K.UNIT_ATTENTION, 0x3F, 0x0E), READ)
        stage.add(Late(1.0), has_cdb(Scsi.TEST_UNIT_READY))

        async def cut() -> None:
            await until(lambda: Scsi.TEST_UNIT_READY in stage.wire.opcodes)
            stage.target.drop_connections()

        results = await at_once(stage.read, cut, within=60)
        assert results[0] == pattern(512)
        assert stage.nexus.reconnects == 1


@pytest.mark.conformance(107)
@pytest.mark.expect_log("isn't there any more|is there again")
@jumping
async def test_scsi_cases_a_unit_that_is_gone_fails_at_once_and_comes_back() -> None:
    """LOGICAL UNIT NOT SUPPORTED on a living session: no waiting, one sentence, no command until it is back."""
    async with on_stage() as stage:
        changes: list[str] = []
        stage.unit.on_change = lambda: changes.append("dropped")
        was = stage.target.engine().disks.pop(0)
        results = await at_once(*[functools.partial(stage.write, lba=number) for number in range(10)], within=60)
        assert {type(result) for result in results} <= {SessionLostError, CommandError}
        assert trio.current_time() - stage.wire.times[0] < 1
        with pytest.raises(SessionLostError, match=r"LUN 0 of iqn\S+ isn't there any more: .*25h/00h"):
            await stage.read()
        assert changes == ["dropped"]
        stage.wire.clear()
        for _ in range(10):
            with pytest.raises(SessionLostError):
                await stage.read()
        assert Scsi.READ_10 not in stage.wire.opcodes
        await stage.unit.look()  # somebody else is asking
        stage.target.engine().disks[0] = was
        await trio.sleep(10)
        assert await stage.read() == pattern(512)
        assert was.contents() == pattern(BLOCKS * 512)


# --- a target that is back before its disks are ---


def _absent(stage: Stage) -> Callable[[], None]:
    was = stage.target.engine().disks.pop(0)

    def back() -> None:
        stage.target.engine().disks[0] = was

    return back


def _not_ready(stage: Stage) -> Callable[[], None]:
    stage.disk.becoming_ready = 1 << 30

    def back() -> None:
        stage.disk.becoming_ready = 0

    return back


def _busy(stage: Stage) -> Callable[[], None]:
    stage.target.script.add(Rule(IN, Answer(Status.BUSY), COMMAND, times=0))
    return stage.target.script.clear


@pytest.mark.conformance(99)
@pytest.mark.expect_log(f"{RECOVERY}|any more")
@pytest.mark.parametrize("trouble", [_absent, _not_ready, _busy])
@jumping
async def test_scsi_cases_after_a_login_a_unit_is_waited_for(trouble: Callable[[Stage], Callable[[], None]]) -> None:
    """For as long as for a session. Who waits since the loss, and who comes meanwhile, get what they asked for."""
    async with on_stage(keys={"reconnect_timeout": 60.0}) as stage:
        back = trouble(stage)
        stage.target.drop_connections()

        async def come_later() -> bytes:
            await trio.sleep(10)
            return await stage.read(lba=5)

        async def repair() -> None:
            await trio.sleep(30)
            back()

        results = await at_once(stage.read, come_later, functools.partial(stage.write, lba=9), repair, within=120)
        assert results == [pattern(512), pattern(6 * 512)[5 * 512 :], None, None]
        assert stage.disk.contents(lba=9, blocks=1) == b"!" * 512
        assert stage.nexus.reconnects == 1


@pytest.mark.conformance(105)
@pytest.mark.expect_log(f"{RECOVERY}|any more")
@pytest.mark.parametrize(("trouble", "words"), [(_absent, "isn't there any more"), (_not_ready, "04h/01h")])
@jumping
async def test_scsi_cases_after_a_login_a_unit_is_not_waited_for_longer_than_that(
    trouble: Callable[[Stage], Callable[[], None]], words: str
) -> None:
    async with on_stage(keys={"reconnect_timeout": 60.0}) as stage:
        back = trouble(stage)
        began = trio.current_time()
        stage.target.drop_connections()
        with pytest.raises(SessionLostError, match=words):
            await stage.read()
        assert trio.current_time() - began == pytest.approx(60, abs=3)
        began = trio.current_time()
        with pytest.raises(SessionLostError, match=words):
            await stage.read()
        assert trio.current_time() - began < 0.1
        back()
        await trio.sleep(10)
        assert await stage.read() == pattern(512)


@pytest.mark.conformance(99)
@pytest.mark.expect_log(f"{RECOVERY}|any more")
@jumping
async def test_scsi_cases_a_unit_that_is_not_back_yet_holds_up_no_other() -> None:
    disks = [Disk.from_bytes(pattern(BLOCKS * 512), lun=number) for number in range(2)]
    async with serving(config_of(*disks)) as target:
        settings = settings_of(reconnect_timeout=60.0, timeout=30.0)
        async with open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings) as nexus:
            units = [LogicalUnit(nexus, description) for description in await scan(nexus)]
            disks[0].becoming_ready = 1 << 30
            target.drop_connections()
            began = trio.current_time()
            memory = memoryview(bytearray(512))
            await units[1].read_into(memory, lba=0)
            assert trio.current_time() - began < 5


@pytest.mark.conformance(105)
@pytest.mark.expect_log(f"{RECOVERY}|any more")
@jumping
async def test_scsi_cases_sessions_that_keep_dying_before_the_unit_is_back_are_not_waited_for_for_ever() -> None:
    async with on_stage(keys={"reconnect_timeout": 60.0}) as stage:
        _absent(stage)
        over = trio.Event()

        async def keep_dropping() -> None:
            stage.target.drop_connections()
            while not over.is_set():
                with trio.move_on_after(20):
                    await over.wait()
                stage.target.drop_connections()

        async def wait() -> None:
            try:
                await stage.read()
            finally:
                over.set()

        began = trio.current_time()
        results = await at_once(wait, keep_dropping, within=600)
        assert isinstance(results[0], SessionLostError)
        assert 59 < trio.current_time() - began < 90  # as long as one loss may last, but for the last session's time


@jumping
async def test_scsi_cases_a_nexus_that_is_closed_proves_nothing() -> None:
    async with on_stage() as stage:
        await stage.nexus.close()
        await until(lambda: stage.nexus.state is NexusState.CLOSED and not stage.target.sessions)
        told: list[str] = []

        async def guard(_: Session) -> bool:
            raise AssertionError("not called")

        stage.nexus.prove_soon(guard, then=lambda: told.append("over"))
        assert told == ["over"]


# --- 108: START STOP UNIT ---


@pytest.mark.conformance(108)
@jumping
async def test_scsi_cases_a_stopped_unit_is_started_where_it_may_be_changed() -> None:
    async with on_stage() as stage:
        stage.disk.stopped = True
        assert await stage.read() == pattern(512)
        assert stage.wire.opcodes == [Scsi.READ_10, Scsi.START_STOP_UNIT, Scsi.READ_10]
        assert not stage.disk.stopped


@pytest.mark.conformance(108)
@pytest.mark.expect_log(f"{RECOVERY}|any more")
@jumping
async def test_scsi_cases_a_read_only_session_starts_nothing() -> None:
    """Not when it reads, not when it looks, not when it proves its disk after a new login."""
    async with on_stage(keys={"read_only": True, "reconnect_timeout": 5.0}) as stage:
        stage.disk.stopped = True
        with pytest.raises(CommandError, match="04h/02h"):
            await stage.read()
        await stage.unit.look()
        stage.target.drop_connections()
        with pytest.raises(SessionLostError, match="04h/02h"):
            await stage.read()
        assert await scan(stage.nexus, without={0}) == []  # the list can be had, though LUN 0 is held back
        assert Scsi.START_STOP_UNIT not in stage.wire.opcodes
        assert stage.disk.stopped


# --- 109: too many at a time ---


@pytest.mark.conformance(109)
@pytest.mark.parametrize("status", [Status.TASK_SET_FULL, Status.BUSY])
@jumping
async def test_scsi_cases_a_target_that_takes_few_at_a_time_gets_few(status: int) -> None:
    """It takes 6. At first it gets 64, and refuses most; soon it gets what it takes, and refuses hardly any."""
    async with on_stage(latency=0.1) as stage:
        refused: list[float] = []

        def too_many(_: Seen) -> bool:
            (session,) = stage.target.sessions
            if session.numbers.outstanding < 6:
                return False
            refused.append(trio.current_time())
            return True

        stage.target.script.add(Rule(IN, Answer(status), all_of(COMMAND, too_many), times=0))
        done = 0

        async def keep_reading(number: int) -> None:
            nonlocal done
            for _ in range(6):
                assert await stage.read(lba=number) == pattern((number + 1) * 512)[number * 512 :]
                done += 1

        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(keep_reading, number)
        assert done == 384
        began = stage.wire.times[0]
        late = [time for time in refused if time - began > 3]
        assert len(refused) < 300
        # Every now and then it is tried whether it takes more: a probe a second, of one more at a time.
        assert len(late) <= (stage.wire.times[-1] - began) * 3
        assert stage.wire.times[-1] - began < 384 / 6 * 0.1 * 3
        stage.target.script.clear()


@pytest.mark.conformance(109)
@jumping
async def test_scsi_cases_what_a_target_takes_again_it_gets_again() -> None:
    async with on_stage(latency=0.2) as stage:
        most = 0

        def measure(_: Seen) -> bool:
            nonlocal most
            most = max(most, stage.target.sessions[0].numbers.outstanding)
            return False

        stage.target.script.add(Rule(IN, Answer(Status.TASK_SET_FULL), all_of(COMMAND, READ), times=8))
        stage.target.script.add(Rule(IN, Late(0), measure))

        async def keep_reading(number: int, until_time: float) -> None:
            while trio.current_time() < until_time:
                await stage.read(lba=number)

        async def burst(seconds: float) -> int:
            nonlocal most
            most = 0
            async with trio.open_nursery() as nursery:
                for number in range(32):
                    nursery.start_soon(keep_reading, number, trio.current_time() + seconds)
            return most + 1

        await burst(0.3)
        assert await burst(0.5) <= 20
        await burst(5)
        assert await burst(0.5) == 32


# --- 111-114: sense ---


@pytest.mark.conformance(111)
@pytest.mark.parametrize("descriptor", [False, True])
@jumping
async def test_scsi_cases_blocks_before_a_bad_one_can_be_had(descriptor: bool) -> None:
    disk = Disk.from_bytes(pattern(BLOCKS * 512))
    disk.bad_blocks, disk.descriptor_sense = {100}, descriptor
    async with on_stage(disk) as stage:
        with pytest.raises(MediumError) as caught:
            await stage.read(lba=64, blocks=64)
        assert caught.value.lba == 100
        assert await stage.read(lba=64, blocks=36) == pattern(100 * 512)[64 * 512 :]
        assert await stage.read(lba=101, blocks=20) == pattern(121 * 512)[101 * 512 :]
        with pytest.raises(MediumError):
            await stage.read(lba=100)


NONSENSE = [
    b"\x70",
    b"\x70\x00",
    b"\x72\x03",
    b"\x71\x00\x03",
    b"\x73\x03\x11",
    b"\x7f" + bytes(17),
    b"\x00" * 18,
    b"\xff" * 252,
    bytes([0x72, 3, 0x11, 0, 0, 0, 0, 255]),  # descriptors that aren't there
    bytes([0x72, 3, 0x11, 0, 0, 0, 0, 12, 0, 255]) + bytes(10),  # one that is longer than all
    bytes([0x70, 0, 3, 0, 0, 0, 0, 255]) + bytes(10),
]


@pytest.mark.conformance(112)
@pytest.mark.expect_log("failed a write after it had accepted it")
@pytest.mark.parametrize("data", NONSENSE, ids=[data[:10].hex() for data in NONSENSE])
@jumping
async def test_scsi_cases_sense_that_makes_no_sense_is_a_plain_error(data: bytes) -> None:
    async with on_stage() as stage:
        for match, action in ((READ, stage.read), (WRITE, stage.write), (SYNC, stage.unit.flush)):
            stage.add(Answer(Status.CHECK_CONDITION, data), match, times=100)
            with pytest.raises(IscsifuseError, match="LUN 0 of iqn"):
                await action()
        stage.target.script.clear()
        assert await stage.read() == pattern(512)
        assert stage.nexus.reconnects == 0


@pytest.mark.conformance("B3")
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("segment", [b"\x00", b"\x00\x13" + bytes(18), b"\xff\xff\x70\x00\x03"])
@jumping
async def test_scsi_cases_sense_beyond_its_segment_ends_the_session_and_nothing_else(segment: bytes) -> None:
    """Nothing that comes on such a connection is trusted; the command is sent again on the next one."""

    def lie(pdu: Pdu) -> Pdu:
        return ScsiResponse(
            itt=pdu.itt,
            stat_sn=cast("DataIn", pdu).stat_sn,
            exp_cmd_sn=cast("DataIn", pdu).exp_cmd_sn,
            max_cmd_sn=cast("DataIn", pdu).max_cmd_sn,
            status=Status.CHECK_CONDITION,
            data=segment,
        )

    async with on_stage() as stage:
        stage.add(Change(lie), all_of(is_a(Opcode.DATA_IN), READ), out=True)
        assert await stage.read() == pattern(512)
        assert stage.nexus.reconnects == 1


@pytest.mark.conformance(113)
@pytest.mark.expect_log("failed a write after it had accepted it")
@pytest.mark.parametrize("code", [0x71, 0x73])
@jumping
async def test_scsi_cases_a_deferred_error_is_not_the_commands_and_fails_the_next_flush(code: int) -> None:
    async with on_stage() as stage:
        await stage.write(b"a" * 512, lba=1)
        stage.wire.clear()
        stage.add(sense(K.MEDIUM_ERROR, 0x0C, code=code), READ)
        assert await stage.read() == pattern(512)
        check_attempts(stage, Scsi.READ_10, 2)
        with pytest.raises(WriteBackError, match="failed a write after it had accepted it"):
            await stage.unit.flush()
        await stage.unit.flush()


@pytest.mark.conformance(114)
@jumping
async def test_scsi_cases_a_recovered_error_is_a_success() -> None:
    """It comes with all of the data; once is enough."""
    async with on_stage(status_in_data=False) as stage:
        recovered = sense(K.RECOVERED_ERROR, 0x17, 0x01)
        for match in (READ, WRITE, SYNC):
            stage.add(recovered, all_of(is_a(Opcode.SCSI_RESPONSE), match), out=True)
        assert await stage.read(blocks=64) == pattern(64 * 512)
        await stage.write(b"!" * 4096, lba=8)
        await stage.unit.flush()
        assert stage.disk.contents(lba=8, blocks=8) == b"!" * 4096
        assert [entry.name for entry in stage.target.ledger] == ["READ(10)", "WRITE(10)", "SYNCHRONIZE CACHE(10)"]
        assert stage.wire.opcodes == [Scsi.READ_10, Scsi.WRITE_10, Scsi.SYNCHRONIZE_CACHE_10]


# --- 118, 119, B7: capacities and addresses ---


async def examined(config: TargetConfig) -> tuple[list[LunDescription], list[int]]:
    wire = Wire(config)
    async with (
        serving(config) as target,
        open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings_of()) as nexus,
    ):
        return await scan(nexus), wire.opcodes


REFUSED = sense(K.ILLEGAL_REQUEST, 0x20)


@pytest.mark.conformance(118)
@pytest.mark.parametrize("refused", [Scsi.SERVICE_ACTION_IN_16, Scsi.READ_CAPACITY_10])
@pytest.mark.parametrize("blocks", [100, 1 << 33])
@jumping
async def test_scsi_cases_a_capacity_command_that_is_refused(refused: int, blocks: int) -> None:
    """The other one stands in; where (10) says FFFFFFFFh and (16) is refused, the disk isn't used, not cut short."""
    config = config_of(Disk(blocks=blocks))
    config.script.add(Rule(IN, REFUSED, all_of(COMMAND, has_cdb(refused)), times=0))
    (found,), _ = await examined(config)
    if refused == Scsi.SERVICE_ACTION_IN_16 and blocks > 1 << 32:
        assert not found.usable
        assert found.problem
    else:
        assert found.capacity is not None
        assert found.capacity.blocks == blocks


@pytest.mark.conformance(118)
@jumping
async def test_scsi_cases_a_capacity_16_that_is_short() -> None:
    config = config_of(Disk(blocks=100))
    short = Change(lambda pdu: replace(cast("DataIn", pdu), data=pdu.data[:8], underflow=True, residual_count=24))
    config.script.add(Rule(OUT, short, all_of(is_a(Opcode.DATA_IN), has_cdb(Scsi.SERVICE_ACTION_IN_16)), times=0))
    (found,), opcodes = await examined(config)
    assert found.capacity is not None
    assert found.capacity.blocks == 100
    assert Scsi.READ_CAPACITY_10 in opcodes


def _with_data(pdu: Pdu, *, data: bytes) -> Pdu:
    return replace(cast("DataIn", pdu), data=data)


@pytest.mark.conformance("B7")
@pytest.mark.parametrize(
    ("last", "length"),
    [(99, 0), (99, 1), (99, 1 << 31), ((1 << 63) // 512, 512), ((1 << 64) - 1, 512), ((1 << 64) - 1, 4096)],
)
@jumping
async def test_scsi_cases_a_capacity_that_cannot_be_is_no_disk(last: int, length: int) -> None:
    config = config_of(Disk(blocks=100))
    whole = Capacity(last_lba=last, block_length=length)
    for opcode, data in ((Scsi.SERVICE_ACTION_IN_16, whole.encode_16()), (Scsi.READ_CAPACITY_10, whole.encode_10())):
        lie = functools.partial(_with_data, data=data)
        config.script.add(Rule(OUT, Change(lie), all_of(is_a(Opcode.DATA_IN), has_cdb(opcode)), times=0))
    (found,), _ = await examined(config)
    assert not found.usable
    assert found.problem is not None
    assert "READ CAPACITY" in found.problem


def _first_byte(pdu: Pdu, *, value: int) -> Pdu:
    return replace(cast("DataIn", pdu), data=bytes([value]) + pdu.data[1:])


def _five_bytes(pdu: Pdu) -> Pdu:
    return replace(cast("DataIn", pdu), data=pdu.data[:5], underflow=True, residual_count=250)


@pytest.mark.conformance(122)
@pytest.mark.parametrize(
    ("lie", "shown"),
    [
        (functools.partial(_first_byte, value=0x20), False),  # could be connected, but isn't
        (functools.partial(_first_byte, value=0x60), False),  # there is nothing
        (functools.partial(_first_byte, value=0x05), True),  # a CD-ROM drive
        (_five_bytes, True),
    ],
    ids=["qualifier 1", "qualifier 3", "CD-ROM", "5 bytes"],
)
@jumping
async def test_scsi_cases_what_is_no_disk_is_not_used(lie: Callable[[Pdu], Pdu], shown: bool) -> None:
    config = config_of(Disk(blocks=100))
    config.script.add(Rule(OUT, Change(lie), all_of(is_a(Opcode.DATA_IN), has_cdb(Scsi.INQUIRY)), times=0))
    found, opcodes = await examined(config)
    assert [one.usable for one in found] == [False] * shown
    assert set(opcodes) == {Scsi.REPORT_LUNS, Scsi.INQUIRY}


@pytest.mark.conformance("B7")
@pytest.mark.parametrize("claimed", [0xFFFFFFF8, 0x7FFFFFF8])
@jumping
async def test_scsi_cases_a_list_of_luns_that_claims_to_be_endless(claimed: int) -> None:
    """Bounded: three questions at most, and no memory for what can't be."""
    config = config_of(Disk(blocks=100))
    lie = Change(lambda pdu: replace(cast("DataIn", pdu), data=claimed.to_bytes(4, "big") + pdu.data[4:]))
    config.script.add(Rule(OUT, lie, all_of(is_a(Opcode.DATA_IN), has_cdb(Scsi.REPORT_LUNS)), times=0))
    found, opcodes = await examined(config)
    assert [one.lun for one in found] == [0]
    assert opcodes.count(Scsi.REPORT_LUNS) <= 3


@pytest.mark.conformance(119)
@jumping
async def test_scsi_cases_addresses_beyond_32_bits() -> None:
    """A disk of 4 TiB: the same bytes come back, from their own place, by commands that can say it."""
    chance = random.Random(119)
    async with on_stage(Disk(blocks=1 << 33)) as stage:
        places = [0, 0xFFFFFFFF - 8, 0xFFFFFFFF, 1 << 32, (1 << 33) - 16]
        written = {lba: chance.randbytes(16 * 512) for lba in places if lba != 0xFFFFFFFF}
        for lba, data in written.items():
            stage.wire.clear()
            await stage.write(data, lba=lba)
            wide = lba + 16 > 1 << 32
            assert stage.wire.opcodes == [Scsi.WRITE_16 if wide else Scsi.WRITE_10]
        for lba, data in written.items():
            if lba == 0xFFFFFFFF - 8:
                data = data[: 9 * 512] + written[1 << 32][: 7 * 512]
            assert await stage.read(lba, 16) == data
            assert stage.disk.contents(lba=lba, blocks=16) == data
        assert all(cdbs.decode(command.cdb).blocks <= 0xFFFF for command in stage.wire.commands)


# --- 125, 126: what isn't there ---


@pytest.mark.conformance(126)
@pytest.mark.parametrize("both", [False, True])
@jumping
async def test_scsi_cases_mode_sense_that_is_refused(both: bool) -> None:
    """(10) stands in for (6); without either a disk is one that may have a cache, and is flushed."""
    disk = Disk(blocks=100, write_protected=True, volatile_cache=True)
    config = config_of(disk)
    refused = (Scsi.MODE_SENSE_6, Scsi.MODE_SENSE_10) if both else (Scsi.MODE_SENSE_6,)
    config.script.add(Rule(IN, REFUSED, all_of(COMMAND, has_cdb(*refused)), times=0))
    (found,), opcodes = await examined(config)
    assert found.usable
    assert Scsi.MODE_SENSE_10 in opcodes
    assert (found.write_protected, found.caching is not None, found.dpofua) == (not both, not both, not both)


@pytest.mark.conformance(125)
@pytest.mark.conformance(128)
@jumping
async def test_scsi_cases_a_disk_without_any_page_is_used_as_it_is() -> None:
    """No vital product data: our own limits hold, and nothing is ever unmapped, or taken for zeros."""
    disk = Disk.from_bytes(pattern(BLOCKS * 512))
    disk.thin = True
    config = config_of(disk)
    pages = all_of(COMMAND, has_cdb(Scsi.INQUIRY), lambda seen: bool(cast("ScsiCommand", seen.pdu).cdb[1] & 1))
    config.script.add(Rule(IN, sense(K.ILLEGAL_REQUEST, 0x24), pages, times=0))
    wire = Wire(config)
    async with (
        serving(config) as target,
        open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings_of()) as nexus,
    ):
        (found,) = await scan(nexus)
        assert (found.serial, found.block_limits, found.provisioning) == (None, None, None)
        unit = LogicalUnit(nexus, found)
        memory = memoryview(bytearray(BLOCKS * 512))
        await unit.read_into(memory, lba=0)
        assert memory == pattern(BLOCKS * 512)
        await unit.write(memoryview(bytes(1 << 20)), lba=0)
    assert disk.contents(blocks=2048) == bytes(1 << 20)
    assert not {Scsi.UNMAP, Scsi.WRITE_SAME_10, Scsi.WRITE_SAME_16} & set(wire.opcodes)


# --- 130: smaller ---


@pytest.mark.conformance(130)
@jumping
async def test_scsi_cases_beyond_the_end_of_a_disk_that_shrank_there_is_nothing() -> None:
    """Even the command that meets the news fails if it reaches beyond the new end."""
    for beyond in (True, False):
        async with on_stage() as stage:
            changes: list[int] = []
            stage.unit.on_change = functools.partial(changes.append, 0)
            stage.disk.resize(BLOCKS // 2)
            if beyond:
                with pytest.raises(CommandError, match="21h/00h"):
                    await stage.read(lba=BLOCKS // 2 - 1, blocks=2)
            else:
                await stage.read()
            assert stage.unit.block_count == BLOCKS // 2
            assert len(changes) == 1
            with pytest.raises(CommandError):
                await stage.write(lba=BLOCKS // 2)
            await stage.write(lba=BLOCKS // 2 - 1)
