import logging
import random
import socket
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import trio
import trio.testing
from initiator_fakes import Reply
from initiator_kit import (
    LUN_0,
    at_once,
    config_of,
    conversation,
    log_in_to,
    open_session,
    pattern,
    serving,
    settings_of,
    until,
)

from iscsifuse.errors import (
    CommandTimeoutError,
    DigestError,
    IscsifuseError,
    ProtocolError,
    ReadOnlyError,
    SessionLostError,
    TransferError,
)
from iscsifuse.initiator import clearing, farewell, liveness
from iscsifuse.initiator import session as session_module
from iscsifuse.initiator.login import LoggedIn
from iscsifuse.initiator.loop import Loop
from iscsifuse.initiator.session import Session
from iscsifuse.initiator.settings import Portal
from iscsifuse.initiator.statistics import CommandStatistics
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi.login import LoginResult
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import Opcode, decode
from iscsifuse.iscsi.request import ScsiCommand
from iscsifuse.iscsi.response import (
    AsyncEvent,
    DataIn,
    LogoutResponse,
    NopIn,
    ScsiResponse,
    TaskManagementResponse,
    TaskResponse,
)
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.sense import SenseKey
from iscsifuse.scsi.status import Status
from iscsifuse.strands import Strand, Team
from iscsifuse.testing.actions import (
    Answer,
    Call,
    Change,
    ChangeBytes,
    Close,
    Cut,
    Delay,
    Drop,
    Inject,
    Late,
    Stall,
    sense_segment,
)
from iscsifuse.testing.config import TargetKeys
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Rule, all_of, is_a
from iscsifuse.testing.script import cdb as has_cdb
from iscsifuse.testing.script import lba as has_lba

READ, WRITE = has_cdb(0x28), has_cdb(0x2A)
COMMAND = is_a(Opcode.SCSI_COMMAND)
BLOCKS = 4096


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "ABORT_LIMIT", 0.3)
    monkeypatch.setattr(farewell, "LOGOUT_LIMIT", 0.5)


def _disk(**changes: Any) -> Disk:
    disk = Disk.from_bytes(pattern(BLOCKS * 512))
    for name, value in changes.items():
        setattr(disk, name, value)
    return disk


def _memory(blocks: int = 1) -> memoryview:
    return memoryview(bytearray(b"\xee" * (blocks * 512)))


async def _read(session: Session, lba: int = 0, blocks: int = 1, *, buffer: memoryview | None = None) -> bytes:
    memory = _memory(blocks) if buffer is None else buffer
    task = await session.execute(cdbs.read(lba=lba, blocks=blocks), lun=LUN_0, buffer_in=memory, exact=True)
    assert task.status == Status.GOOD
    return bytes(memory)


async def _write(session: Session, data: bytes, lba: int = 0) -> Task:
    cdb = cdbs.write(lba=lba, blocks=len(data) // 512)
    return await session.execute(cdb, lun=LUN_0, buffer_out=memoryview(data))


# --- carrying out commands ---


@pytest.mark.parametrize("digests", [False, True])
async def test_session_reads_and_writes(digests: bool) -> None:
    disk = _disk()
    settings = settings_of(header_digest=digests, data_digest=digests)
    async with serving(config_of(disk)) as target, open_session(target, settings) as session:
        assert await _read(session, 5, 3) == pattern(BLOCKS * 512)[5 * 512 : 8 * 512]
        data = random.Random(3).randbytes(1000 * 512)
        assert (await _write(session, data, 7)).status == Status.GOOD
        assert await _read(session, 7, 1000) == data
    assert disk.contents(lba=7, blocks=1000) == data
    assert disk.contents(lba=0, blocks=7) == pattern(7 * 512)


@pytest.mark.parametrize("first_burst", [512, 65536])
@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("initial_r2t", [False, True])
@pytest.mark.conformance(54)
@pytest.mark.conformance(55)
async def test_session_writes_with_every_kind_of_first_burst(
    initial_r2t: bool, immediate: bool, first_burst: int
) -> None:
    keys = TargetKeys(
        initial_r2t=initial_r2t,
        immediate_data=immediate,
        first_burst_length=first_burst,
        max_burst_length=131072,
        max_recv_data_segment_length=8192,
        default_time2wait=0,
    )
    disk = _disk()
    async with serving(config_of(disk, keys=keys, reverse_r2t=True)) as target, open_session(target) as session:
        for blocks in (1, 3, 128, 129, 700):
            data = random.Random(blocks).randbytes(blocks * 512)
            assert (await _write(session, data, blocks)).status == Status.GOOD
            assert disk.contents(lba=blocks, blocks=blocks) == data


@pytest.mark.conformance(47)
@pytest.mark.parametrize("window", [1, 2, 100])
async def test_session_many_commands_at_once_through_a_window(window: int) -> None:
    expected = pattern(BLOCKS * 512)
    async with serving(config_of(_disk(), window=window, reorder=7)) as target, open_session(target) as session:
        numbers = random.Random(window).sample(range(BLOCKS - 8), 200)
        results = await at_once(*[lambda lba=lba: _read(session, lba, 4) for lba in numbers])
        assert results == [expected[lba * 512 : (lba + 4) * 512] for lba in numbers]
        assert session.connection.idle


@pytest.mark.conformance(46)
async def test_session_a_closed_window_queues() -> None:
    disk = _disk()
    async with serving(config_of(disk, window=2)) as target, open_session(target) as session:
        target.set_window(0)
        await _read(session)
        await _read(session)
        async with conversation() as nursery:
            nursery.start_soon(_read, session, 9)
            await until(lambda: session.connection.queue)
            await trio.sleep(0.05)
            assert len(session.connection.queue) == 1
            assert not session.connection.tasks
            target.set_window(4)
        assert not session.connection.queue


@pytest.mark.conformance(46)
async def test_session_a_window_that_stays_closed_is_a_timeout() -> None:
    async with serving(config_of(_disk(), window=1)) as target:
        async with open_session(target, settings_of(timeout=0.2)) as session:
            target.set_window(0)
            await _read(session)
            with pytest.raises(CommandTimeoutError, match=r"took no command for 0\.2 seconds"):
                await _read(session)
            assert session.error is None
            target.set_window(8)
            await _read(session)
        assert [entry.name for entry in target.ledger] == ["READ(10)"] * 2


@pytest.mark.parametrize(
    "cdb",
    [
        cdbs.write(lba=0, blocks=1),
        cdbs.write(lba=1 << 33, blocks=1),
        cdbs.synchronize_cache(),
        cdbs.start_stop_unit(start=True),
        b"\x42" + bytes(9),
        b"\x04" + bytes(5),
        b"\xee" + bytes(15),
        b"",
    ],
    ids=bytes.hex,
)
async def test_session_read_only_holds_back(cdb: bytes) -> None:
    async with serving(config_of(_disk())) as target:
        async with open_session(target, settings_of(read_only=True)) as session:
            with pytest.raises(ReadOnlyError, match="held back: the disk is attached read-only"):
                await session.execute(cdb, lun=LUN_0, buffer_out=memoryview(bytes(512)))
            assert session.transport.bytes_sent == 0 or not target.ledger
            await _read(session)
        assert [entry.name for entry in target.ledger] == ["READ(10)"]


async def test_session_status_and_sense_are_the_callers_to_judge() -> None:
    async with serving(config_of(_disk(bad_blocks={3}))) as target, open_session(target) as session:
        task = await session.execute(cdbs.read(lba=2, blocks=4), lun=LUN_0, buffer_in=_memory(4), exact=True)
        assert task.status == Status.CHECK_CONDITION
        assert task.sense[2] & 0x0F == SenseKey.MEDIUM_ERROR


@pytest.mark.conformance(69)
async def test_session_success_without_the_data_is_none() -> None:
    config = config_of(_disk(), status_in_data=False)
    config.script.add(Rule(OUT, match=is_a(Opcode.DATA_IN), action=Drop()))
    async with serving(config, strict=False) as target, open_session(target) as session:
        memory = _memory()
        with pytest.raises(IscsifuseError):
            await _read(session, buffer=memory)


@pytest.mark.conformance(64)
async def test_session_success_of_a_write_that_was_never_asked_for_is_none() -> None:
    config = config_of(_disk(), keys=TargetKeys(initial_r2t=True, immediate_data=False, default_time2wait=0))
    config.script.add(Rule(IN, match=all_of(WRITE, COMMAND), action=Answer(Status.GOOD)))
    async with serving(config) as target, open_session(target) as session:
        with pytest.raises(TransferError):
            await _write(session, bytes(4096))
        assert session.error is None


@pytest.mark.conformance(79)
async def test_session_damaged_data_fails_its_command_only() -> None:
    def damage(data: bytes) -> bytes:
        return data[:60] + bytes([data[60] ^ 1]) + data[61:]

    config = config_of(_disk())
    config.script.add(Rule(OUT, match=is_a(Opcode.DATA_IN), action=ChangeBytes(damage)))
    async with serving(config) as target, open_session(target, settings_of(data_digest=True)) as session:
        with pytest.raises(DigestError):
            await _read(session)
        assert await _read(session) == pattern(512)


# --- cancellation ---


async def test_session_a_cancelled_caller_stays_until_the_target_has_answered() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, action=Late(0.3)))
    async with serving(config) as target, open_session(target) as session:
        memory = _memory(8)
        began = trio.current_time()
        with trio.move_on_after(0.05):
            await _read(session, 0, 8, buffer=memory)
            await trio.lowlevel.checkpoint()
            pytest.fail("the cancellation was lost")
        assert trio.current_time() - began >= 0.25
        assert session.connection.idle
        assert memory == pattern(8 * 512)  # it had come, and nothing comes any more
        memory[:] = bytes(len(memory))
        assert await _read(session, 1) == pattern(1024)[512:]
        assert not any(memory)


@pytest.mark.conformance(96)
@pytest.mark.expect_log("aborting it")
async def test_session_the_memory_of_a_timed_out_read_is_not_touched_afterwards() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=all_of(READ, has_lba(7)), action=Late(60)))
    confirmed = is_a(Opcode.TASK_MANAGEMENT_RESPONSE)

    def late_data(pdu: Any) -> DataIn:
        return DataIn(**{**_numbers(pdu), "stat_sn": 0}, itt=tags[0], data_sn=0, data=b"\x55" * 1024)

    config.script.add(Rule(OUT, match=confirmed, action=Inject(after=(late_data,))))
    async with serving(config, strict=False) as target:  # noqa: SIM117 - is the target's end
        async with open_session(target, settings_of(timeout=0.15)) as session:
            memory = _memory(4)
            tags: list[int] = []

            async def remember() -> None:
                await until(lambda: session.connection.tasks)
                tags.extend(session.connection.tasks)

            result, _ = await at_once(lambda: _read(session, 7, 4, buffer=memory), remember)
            assert isinstance(result, CommandTimeoutError)
            memory[:] = bytes(len(memory))
            assert await _read(session, 100) == pattern(101 * 512)[100 * 512 :]
            assert not any(memory)
            assert session.error is None


def _numbers(pdu: Any) -> dict[str, Any]:
    return {"stat_sn": pdu.stat_sn, "exp_cmd_sn": pdu.exp_cmd_sn, "max_cmd_sn": pdu.max_cmd_sn}


# --- deadlines ---


@pytest.mark.conformance(92)
@pytest.mark.expect_log("READ.* took longer than 0.2 seconds: aborting it")
async def test_session_a_command_past_its_deadline_is_aborted() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=all_of(READ, has_lba(7)), action=Late(60)))
    async with serving(config) as target, open_session(target, settings_of(timeout=0.2)) as session:
        with pytest.raises(CommandTimeoutError, match=r"did not finish READ\(10\) within 0.2 seconds"):
            await _read(session, 7)
        assert session.error is None
        assert session.connection.idle
        assert await _read(session, 8) == pattern(9 * 512)[8 * 512 :]
        assert all(entry.lba != 7 for entry in target.ledger)


@pytest.mark.conformance(93)
@pytest.mark.expect_log("aborting it")
async def test_session_a_task_that_is_not_there_any_more_is_no_success() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=all_of(WRITE, COMMAND), action=Late(60)))
    gone = Change(
        lambda pdu: TaskManagementResponse(**_numbers(pdu), itt=pdu.itt, response=TaskResponse.TASK_DOES_NOT_EXIST)
    )
    config.script.add(Rule(OUT, match=is_a(Opcode.TASK_MANAGEMENT_RESPONSE), action=gone))
    async with serving(config, strict=False) as target, open_session(target, settings_of(timeout=0.2)) as session:
        with pytest.raises(CommandTimeoutError):
            await _write(session, bytes(512))
        assert session.error is None


@pytest.mark.conformance(95)
@pytest.mark.expect_log("aborting it")
async def test_session_an_unanswered_abortion_ends_the_session() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=all_of(READ, has_lba(7)), action=Late(60)))
    config.script.add(Rule(IN, match=is_a(Opcode.TASK_MANAGEMENT_REQUEST), action=Drop()))
    async with serving(config) as target, open_session(target, settings_of(timeout=0.3)) as session:

        async def later() -> bytes:
            await trio.sleep(0.25)
            config.script.add(Rule(IN, match=all_of(READ, has_lba(9)), action=Late(60)))
            return await _read(session, 9)

        first, second = await at_once(lambda: _read(session, 7), later)
        assert isinstance(first, CommandTimeoutError)  # its time is over, on whatever session
        # This one has time left, unless its own deadline came first; it may be replayed.
        assert isinstance(second, SessionLostError | CommandTimeoutError)
        assert "did not answer the abortion" in str(session.error)


@pytest.mark.conformance(95)
@pytest.mark.expect_log("aborting it")
@pytest.mark.parametrize("response", [2, 5, 6, 255])
async def test_session_a_refused_abortion_ends_the_session(response: int) -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, action=Late(60)))
    refuse = Change(lambda pdu: TaskManagementResponse(**_numbers(pdu), itt=pdu.itt, response=response))
    config.script.add(Rule(OUT, match=is_a(Opcode.TASK_MANAGEMENT_RESPONSE), action=refuse))
    async with serving(config, strict=False) as target, open_session(target, settings_of(timeout=0.2)) as session:
        with pytest.raises(CommandTimeoutError):
            await _read(session)
        assert isinstance(session.error, ProtocolError)


@pytest.mark.expect_log("aborting it")
async def test_session_a_command_that_ends_before_its_abortion_is_a_success() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, action=Late(0.25)))
    config.script.add(Rule(IN, match=is_a(Opcode.TASK_MANAGEMENT_REQUEST), action=Stall()))
    async with serving(config) as target, open_session(target, settings_of(timeout=0.2)) as session:
        assert await _read(session) == pattern(512)


# --- life and silence ---


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PING_AFTER", 0.15)
    monkeypatch.setattr(liveness, "PING_LIMIT", 0.15)


def test_session_a_silent_target_is_found_out_in_about_ten_seconds() -> None:
    assert liveness.PING_AFTER + liveness.PING_LIMIT <= 10
    # Who hears nothing while it waits for a barrier finds the session lost, not the question unanswered.
    assert clearing.BARRIER_LIMIT > liveness.PING_AFTER + liveness.PING_LIMIT + 2
    assert clearing.ABORT_LIMIT + farewell.LOGOUT_LIMIT < 30


@pytest.mark.conformance(83)
@pytest.mark.usefixtures("_impatient")
async def test_session_an_idle_target_is_pinged_and_lives() -> None:
    config = config_of(_disk())
    pings: list[int] = []
    config.script.add(Rule(IN, match=is_a(Opcode.NOP_OUT), times=0, action=Call(lambda: pings.append(1))))
    async with serving(config) as target, open_session(target) as session:
        await trio.sleep(0.8)
        assert 2 <= len(pings) <= 6
        assert session.error is None
        assert await _read(session) == pattern(512)


@pytest.mark.conformance(83)
@pytest.mark.usefixtures("_impatient")
async def test_session_a_busy_target_is_not_pinged() -> None:
    config = config_of(_disk())
    pings: list[int] = []
    config.script.add(Rule(IN, match=is_a(Opcode.NOP_OUT), times=0, action=Call(lambda: pings.append(1))))
    async with serving(config) as target, open_session(target) as session:
        for _ in range(12):
            await _read(session)
            await trio.sleep(0.04)
        assert not pings


@pytest.mark.conformance(83)
@pytest.mark.usefixtures("_impatient")
async def test_session_a_silent_target_is_lost() -> None:
    config = config_of(_disk())
    config.script.add(Rule(OUT, match=READ, action=Stall()))
    async with serving(config) as target, open_session(target) as session:
        began = trio.current_time()
        results = await at_once(lambda: _read(session, 1), lambda: _read(session, 2))
        assert 0.25 <= trio.current_time() - began < 1.0
        assert all(isinstance(result, SessionLostError) for result in results)
        assert results[0] is not results[1]
        assert "has been silent for" in str(session.error)


@pytest.mark.conformance(83)
@pytest.mark.usefixtures("_impatient")
async def test_session_any_byte_is_a_sign_of_life() -> None:
    """Pings that get lost don't count as long as something comes."""
    config = config_of(_disk(), nop_interval=0.1)
    config.script.add(Rule(IN, match=is_a(Opcode.NOP_OUT), times=0, action=Drop()))
    async with serving(config, strict=False) as target, open_session(target) as session:
        await trio.sleep(0.7)
        assert session.error is None


@pytest.mark.conformance(81)
async def test_session_answers_pings() -> None:
    config = config_of(_disk())
    answers: list[int] = []
    config.script.add(Rule(IN, match=is_a(Opcode.NOP_OUT), times=0, action=Call(lambda: answers.append(1))))
    async with serving(config) as target, open_session(target):
        for _ in range(20):
            target.ping()
        await until(lambda: len(answers) == 20)


@pytest.mark.conformance(81)
async def test_session_answers_a_ping_that_came_with_the_login_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_TICK", 60.0)  # not only with the next look at the clock
    config = config_of(_disk())
    answers: list[int] = []
    config.script.add(Rule(IN, match=is_a(Opcode.NOP_OUT), action=Call(lambda: answers.append(1))))
    ping = NopIn(ttt=7, stat_sn=3, exp_cmd_sn=1, max_cmd_sn=128)
    config.script.add(Rule(OUT, match=is_a(Opcode.LOGIN_RESPONSE), nth=2, action=Inject(after=(ping,))))
    async with serving(config, strict=False) as target, open_session(target):
        await until(lambda: answers, seconds=1)


# --- how a session ends ---


def _rubbish(data: bytes) -> bytes:
    """No additional header is announced: that would be waited for."""
    return b"\xff\xff\xff\xff\0".ljust(len(data), b"\xff")


ENDS: list[tuple[str, Rule]] = [
    ("FIN instead of a status", Rule(OUT, match=READ, action=Close())),
    ("RST instead of a status", Rule(OUT, match=READ, action=Close(reset=True))),
    ("FIN instead of taking a command", Rule(IN, match=READ, action=Close())),
    *[(f"cut after {n} bytes", Rule(OUT, match=READ, action=Cut(n))) for n in (1, 47, 48, 49, 300, 559)],
    *[(f"reset after {n} bytes", Rule(OUT, match=READ, action=Cut(n, reset=True))) for n in (47, 48, 300)],
    ("rubbish", Rule(OUT, match=READ, action=ChangeBytes(lambda data: _rubbish(data)))),
    ("too long", Rule(OUT, match=READ, action=ChangeBytes(lambda data: data[:5] + b"\xff\xff\xff" + data[8:]))),
]


@pytest.mark.conformance(97)
@pytest.mark.parametrize("rule", [row[1] for row in ENDS], ids=[row[0] for row in ENDS])
async def test_session_every_waiter_is_told_of_the_end(rule: Rule) -> None:
    config = config_of(_disk(), latency=0.02)
    config.script.add(rule)
    async with serving(config, strict=False) as target, open_session(target) as session:
        results = await at_once(*[lambda lba=lba: _read(session, lba) for lba in range(10)], within=3)
        assert all(isinstance(result, SessionLostError) for result in results)
        assert len({id(result) for result in results}) == 10
        assert session.error is not None
        await session.wait_ended()
        with pytest.raises(SessionLostError):
            await _read(session)


async def test_session_answers_that_came_before_the_end_count() -> None:
    config = config_of(_disk())
    swallowed = all_of(READ, has_lba(2))
    config.script.add(Rule(OUT, match=all_of(READ, has_lba(1)), action=Delay(0.1)))  # so both travel together
    config.script.add(Rule(OUT, match=swallowed, action=ChangeBytes(_rubbish)))
    async with serving(config, strict=False) as target, open_session(target) as session:

        async def second() -> bytes:
            await trio.sleep(0.03)
            return await _read(session, 2)

        results = await at_once(lambda: _read(session, 1), second)
        assert results[0] == pattern(1024)[512:]
        assert isinstance(results[1], SessionLostError)


async def test_session_broken_pipe_in_the_midst_of_a_write() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=all_of(WRITE, COMMAND), action=Close(reset=True)))
    async with serving(config) as target, open_session(target) as session:
        results = await at_once(*[lambda: _write(session, bytes(1 << 20)) for _ in range(8)])
        assert all(isinstance(result, SessionLostError) for result in results)


async def test_session_a_connection_that_breaks_within_a_call() -> None:
    """The fourth command is the one that sends: it finds the connection broken, and none of them may be left."""
    async with serving(config_of(_disk())) as target, open_session(target) as session:
        session.transport._sock.shutdown(socket.SHUT_WR)
        memory = memoryview(bytearray(512))
        tasks = [session.start(cdbs.read(lba=1, blocks=1), lun=LUN_0, buffer_in=memory) for _ in range(4)]
        assert all(task.done for task in tasks)
        assert not session.takes_commands
        assert Loop.current().under_way == 0
        for task in tasks:
            await session.until_done(task)
            with pytest.raises(SessionLostError, match="broke"):
                session.settle(task)


class _Narrow:
    """A socket that takes no more than the first command of a write, until it is widened."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.room = 300_000

    def sendmsg(self, buffers: Iterable[Any]) -> int:
        data = b"".join(buffers)[: self.room]
        if not data:
            raise BlockingIOError
        sent = self._sock.send(data)
        self.room -= sent
        return sent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


@pytest.mark.conformance(62)
async def test_session_a_write_that_fails_early_lets_go_of_its_memory() -> None:
    disk = _disk()
    config = config_of(disk, keys=TargetKeys(initial_r2t=True, immediate_data=False, default_time2wait=0))
    broken = sense_segment(Reply.check(SenseKey.MEDIUM_ERROR, 0x0C).sense)

    def status(pdu: Any) -> ScsiResponse:
        return ScsiResponse(**_numbers(pdu), itt=pdu.itt, status=Status.CHECK_CONDITION, data=broken)

    # The target gives up as soon as it has asked for the data; its own status, later, is not to be seen.
    config.script.add(Rule(OUT, match=is_a(Opcode.R2T), action=Inject(after=(status,))))
    config.script.add(Rule(OUT, match=all_of(WRITE, is_a(Opcode.SCSI_RESPONSE)), action=Drop()))
    async with serving(config) as target, open_session(target, settings_of(data_digest=True)) as session:
        sock = _Narrow(session.transport._sock)
        session.transport._sock = cast("socket.socket", sock)
        memory = bytearray(2048 * 512)
        task = await session.execute(cdbs.write(lba=0, blocks=2048), lun=LUN_0, buffer_out=memoryview(memory))
        assert task.status == Status.CHECK_CONDITION
        assert session.transport.pending
        memory[:] = b"\xff" * len(memory)  # with data digests, a change on the way would be seen
        sock.room = 1 << 30
        await until(lambda: not session.transport.pending)
        assert await _read(session, 3000) == pattern(3001 * 512)[3000 * 512 :]
        assert session.error is None
    assert disk.contents(blocks=2048) == bytes(2048 * 512)


async def test_session_whoever_serves_others_may_receive_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(config_of(_disk())) as target, conversation() as nursery:
        session = Session(await log_in_to(target, settings_of()), settings_of(), CommandStatistics())
        monkeypatch.setattr(session.transport, "wait_readable", trio.sleep_forever)  # the reader does nothing
        nursery.start_soon(session.run)
        await trio.testing.wait_all_tasks_blocked()
        loop = Loop.current()
        assert not loop.look_around(-1)
        session._receive_in_between()  # nothing is there, after all
        memory = memoryview(bytearray(512))
        task = session.start(cdbs.read(lba=5, blocks=1), lun=LUN_0, buffer_in=memory, exact=True)
        found = 0
        while not task.done:
            await trio.lowlevel.checkpoint()
            found += loop.look_around(-1)
        assert found
        assert bytes(memory) == pattern(6 * 512)[5 * 512 :]
        for serving_session in list(target.sessions):
            serving_session.end()
        while session.error is None:
            await trio.lowlevel.checkpoint()
            loop.look_around(-1)
        session._receive_in_between()
        assert not loop.look_around(-1)


async def test_session_a_fibre_may_look_for_an_answer_within_the_receive_that_woke_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a worker of the write-back does, whose next command is the only one again."""
    ours, theirs = socket.socketpair()
    disk = pattern(40 * 512)
    stat_sn = 7
    looks = 0
    with theirs:
        transport = Transport(ours, Portal("127.0.0.1", 3260))
        result = LoginResult(
            parameters=NegotiatedParameters(), tsih=1, next_cmd_sn=1, exp_stat_sn=7, exp_cmd_sn=1, max_cmd_sn=9
        )
        login = LoggedIn(transport, result, b"")
        session = Session(login, settings_of(), CommandStatistics())

        def answer() -> None:
            nonlocal stat_sn
            command = decode(theirs.recv(48))
            assert isinstance(command, ScsiCommand)
            lba = int.from_bytes(command.cdb[2:6], "big")
            reply = DataIn(
                itt=command.itt, has_status=True, stat_sn=stat_sn, exp_cmd_sn=command.cmd_sn + 1,
                max_cmd_sn=command.cmd_sn + 9, data=disk[lba * 512 : lba * 512 + 512],
            )  # fmt: skip
            stat_sn += 1
            theirs.send(reply.encode())

        def glance(_limit: int) -> bool:
            nonlocal looks
            looks += 1
            answer()
            return True

        found: list[bytes] = []

        async def read_on() -> None:
            for lba in range(40):
                memory = memoryview(bytearray(512))
                task = session.start(cdbs.read(lba=lba, blocks=1), lun=LUN_0, buffer_in=memory, exact=True)
                await session.until_done(task)
                assert session.settle(task) is task
                found.append(bytes(memory))

        monkeypatch.setattr(transport, "glance", glance)
        strand = Strand(Team(), read_on())
        strand.go_on()
        session.until_done.__self__._glance.limit = 1000  # type: ignore[attr-defined]
        receives = 0
        while strand.awaits is not None:
            await trio.lowlevel.checkpoint()  # the loop sends what it was left
            answer()
            session._receive()
            receives += 1
        assert found == [disk[lba * 512 : lba * 512 + 512] for lba in range(40)]
        assert receives == 2  # the first one, and one in 32, lets others have their turn
        assert looks == 38
        session.fail(SessionLostError("enough"))


async def test_session_the_run_task_is_cancelled() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, action=Late(60)))
    async with serving(config) as target:
        session = Session(await log_in_to(target, settings_of()), settings_of(), CommandStatistics())
        results: list[object] = []

        async def caller() -> None:
            results.extend(await at_once(lambda: _read(session)))

        async with conversation(2) as outer:
            outer.start_soon(caller)
            async with trio.open_nursery() as inner:
                inner.start_soon(session.run)
                await until(lambda: session.connection.tasks)
                inner.cancel_scope.cancel()
        assert isinstance(results[0], SessionLostError)
        await session.wait_ended()
        await session.logout()  # does nothing, and ends


# --- logout ---


@pytest.mark.conformance(91)
async def test_session_logs_out() -> None:
    logouts: list[int] = []
    config = config_of(_disk(), keys=TargetKeys(default_time2wait=3))
    config.script.add(Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Call(lambda: logouts.append(1))))
    async with serving(config) as target:
        async with open_session(target) as session:
            await _read(session)
            await session.logout()
            await session.logout()
            with pytest.raises(SessionLostError, match="logged out"):
                await _read(session)
            assert session.time2wait == 3
        assert logouts == [1]
        await until(lambda: not target.sessions)


@pytest.mark.conformance(91)
async def test_session_logs_out_after_the_commands_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_TICK", 60.0)
    config = config_of(_disk(), latency=0.2)
    async with serving(config) as target, open_session(target) as session:

        async def refused() -> None:
            await trio.sleep(0.05)
            with pytest.raises(SessionLostError, match="being logged out"):
                await _read(session, 3)

        async def logout() -> None:
            await trio.sleep(0.02)
            await session.logout()

        results = await at_once(lambda: _read(session, 1), lambda: _read(session, 2), logout, refused)
        assert results == [pattern(1024)[512:], pattern(1536)[1024:], None, None]


@pytest.mark.parametrize(
    "rule",
    [
        Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Drop()),
        Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Close()),
        Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Close(reset=True)),
        Rule(
            OUT,
            match=is_a(Opcode.LOGOUT_RESPONSE),
            action=Change(lambda pdu: LogoutResponse(**_numbers(pdu), itt=pdu.itt, response=2)),
        ),
    ],
    ids=["silence", "FIN", "RST", "refused"],
)
@pytest.mark.conformance(91)
async def test_session_logout_is_bounded_whatever_the_target_does(rule: Rule) -> None:
    config = config_of(_disk())
    config.script.add(rule)
    async with serving(config) as target, open_session(target) as session:
        with trio.fail_after(1):
            await session.logout()
        assert session.error is not None


async def test_session_logout_is_bounded_by_a_command_that_hangs() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, action=Late(60)))
    async with serving(config) as target, open_session(target) as session:

        async def logout() -> None:
            await trio.sleep(0.02)
            await session.logout()

        read, _ = await at_once(lambda: _read(session), logout, within=1.5)
        assert isinstance(read, SessionLostError)


@pytest.mark.expect_log("aborting it")
async def test_session_logout_goes_on_once_a_command_was_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(farewell, "LOGOUT_LIMIT", 4.0)
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, action=Late(60)))
    logouts: list[int] = []
    config.script.add(Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Call(lambda: logouts.append(1))))
    async with serving(config) as target, open_session(target, settings_of(timeout=0.2)) as session:

        async def logout() -> None:
            await trio.sleep(0.02)
            await session.logout()

        read, _ = await at_once(lambda: _read(session), logout, within=2)
        assert isinstance(read, CommandTimeoutError)
        assert logouts == [1]


@pytest.mark.usefixtures("_impatient")
@pytest.mark.conformance(91)
async def test_session_nothing_follows_a_logout_no_ping_either() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Drop()))
    async with serving(config) as target, open_session(target) as session:
        await trio.sleep(0.1)
        await session.logout()
        await until(lambda: not target.sessions)


async def test_session_logout_cancelled_ends_it_anyway() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Drop()))
    async with serving(config) as target, open_session(target) as session:
        with trio.move_on_after(0.05) as scope:
            await session.logout()
        assert scope.cancelled_caught
        await session.wait_ended()


# --- asynchronous messages ---


@pytest.mark.conformance(85)
@pytest.mark.parametrize("event", [AsyncEvent.LOGOUT_REQUESTED, AsyncEvent.NEGOTIATION_REQUESTED])
@pytest.mark.conformance(87)
async def test_session_asked_to_log_out_drains_first(event: AsyncEvent) -> None:
    logouts: list[int] = []
    config = config_of(_disk(), latency=0.1)
    config.script.add(Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Call(lambda: logouts.append(1))))
    async with serving(config) as target, open_session(target) as session:

        async def ask() -> None:
            await trio.sleep(0.02)
            target.asynchronous(event, parameter3=1)

        async def too_late() -> bytes:
            await trio.sleep(0.06)
            return await _read(session, 3)

        results = await at_once(lambda: _read(session, 1), ask, too_late)
        assert results[0] == pattern(1024)[512:]
        assert isinstance(results[2], SessionLostError)
        with trio.fail_after(1):
            await session.wait_ended()
        assert "the target asked for a" in str(session.error)
        assert logouts == [1]


@pytest.mark.conformance(85)
async def test_session_asked_to_log_out_does_so_in_time_though_a_command_hangs() -> None:
    logouts: list[float] = []
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, action=Late(60)))
    config.script.add(
        Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Call(lambda: logouts.append(trio.current_time())))
    )
    async with serving(config) as target, open_session(target) as session:

        async def ask() -> None:
            await trio.sleep(0.02)
            target.asynchronous(AsyncEvent.LOGOUT_REQUESTED, parameter3=1)

        began = trio.current_time()
        read, _ = await at_once(lambda: _read(session), ask)
        assert isinstance(read, SessionLostError)
        await until(lambda: logouts)
        assert logouts[0] - began < 1


@pytest.mark.conformance(86)
@pytest.mark.parametrize("event", [AsyncEvent.CONNECTION_DROPPED, AsyncEvent.SESSION_DROPPED])
async def test_session_told_of_a_drop_remembers_how_long_to_wait(event: AsyncEvent) -> None:
    async with serving(config_of(_disk())) as target, open_session(target) as session:
        target.asynchronous(event, parameter2=7, parameter3=9)
        with trio.fail_after(1):
            await session.wait_ended()
        assert session.time2wait == 7
        assert "announced that it drops" in str(session.error)


@pytest.mark.conformance(88)
@pytest.mark.parametrize(
    "event", [AsyncEvent.SCSI_EVENT, AsyncEvent.TASKS_TERMINATED, 77, AsyncEvent.VENDOR_SPECIFIC]
)
async def test_session_survives_other_messages(event: int) -> None:
    async with serving(config_of(_disk())) as target, open_session(target) as session:
        target.asynchronous(event)
        assert await _read(session) == pattern(512)
        assert session.error is None


# --- under load ---


async def test_session_the_reader_gives_way_however_fast_a_target_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(config_of(_disk())) as target, open_session(target) as session:
        flood = NopIn(stat_sn=session.connection.exp_stat_sn, exp_cmd_sn=1, max_cmd_sn=128).encode()
        received = 0

        def receive_now(buffers: list[memoryview]) -> int:
            nonlocal received
            received += 1
            assert received < 10_000, "nobody else got a turn"
            buffers[0][: len(flood)] = flood
            return len(flood)

        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(session.transport, "receive_now", receive_now)
        target.ping()
        await until(lambda: received > 100)
        session.fail(SessionLostError("enough"))
        await session.wait_ended()


def _rules() -> list[Rule]:
    return [
        Rule(IN, match=COMMAND, action=Late(0.003), times=0, chance=0.3),
        Rule(OUT, match=is_a(Opcode.DATA_IN), action=Inject(before=(_ping,)), times=0, chance=0.05),
    ]


def _ping(pdu: Any) -> NopIn:
    return NopIn(**{**_numbers(pdu), "stat_sn": 0}, ttt=99)


async def test_session_reads_and_writes_in_disorder_are_right(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    disk = _disk()
    keys = TargetKeys(max_recv_data_segment_length=4096, first_burst_length=8192, max_burst_length=16384)
    config = config_of(disk, keys=keys, reorder=5, window=17)
    for rule in _rules():
        config.script.add(rule)
    expected = bytearray(disk.contents())
    generator = random.Random(9)

    def job(index: int) -> Callable[[], Any]:
        # Each has blocks of its own, so the order among them doesn't matter.
        lba, data = index * 64, generator.randbytes(64 * 512)
        if index % 2:
            expected[lba * 512 : (lba + 64) * 512] = data
            return lambda: _write(session, data, lba)
        return lambda: _read(session, lba, 64)

    async with serving(config, strict=False) as target, open_session(target) as session:
        results = await at_once(*[job(index) for index in range(BLOCKS // 64)], within=20)
    for index, result in enumerate(results):
        if index % 2 == 0:
            assert result == expected[index * 64 * 512 : (index + 1) * 64 * 512]
        else:
            assert isinstance(result, Task)
            assert result.status == Status.GOOD
    assert disk.contents() == expected


async def test_session_tells_of_trouble_before_anybody_who_waits_goes_on() -> None:
    """Two statuses arrive together: who waits for the second one may be awake first, and would overtake the first."""
    async with serving(config_of(Disk.from_bytes(bytes(4096)))) as target, open_session(target) as session:
        troubles: list[Task] = []
        session.on_trouble = troubles.append
        failing, well = (session.start(cdbs.test_unit_ready(), lun=LUN_0) for _ in range(2))
        failing.finish(status=Status.CHECK_CONDITION, residual=0, underflow=False, overflow=False)
        well.finish(status=Status.GOOD, residual=0, underflow=False, overflow=False)
        session._handle([failing, well])
        assert troubles == [failing]
        for task in (failing, well):
            del session.connection.tasks[task.itt]  # the target's own answers belong to nobody now
