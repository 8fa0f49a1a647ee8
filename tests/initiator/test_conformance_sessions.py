"""Cases 81 to 96: pings, asynchronous messages, Rejects, logouts, and task management.

Each test names its case; its docstring says what the target does → what the initiator must do. Times are
the true ones, on a clock that jumps.
"""

from functools import partial
from typing import Any

import pytest
import trio
from feature_phase_kit import (
    COMMAND,
    READ,
    RECOVERY,
    WRITE,
    Bench,
    altered,
    bench,
    content,
    data_of,
    jumping,
    nexus_bench,
    numbers_of,
    unit_bench,
)
from initiator_fakes import sense
from initiator_kit import at_once, conversation

from iscsifuse.errors import CommandTimeoutError, SessionLostError
from iscsifuse.initiator import farewell
from iscsifuse.iscsi.pdu import RESERVED_TAG, Opcode
from iscsifuse.iscsi.request import (
    DataOut,
    LoginRequest,
    LogoutRequest,
    NopOut,
    ScsiCommand,
    TaskFunction,
    TaskManagementRequest,
)
from iscsifuse.iscsi.response import (
    R2T,
    AsyncEvent,
    AsyncMessage,
    DataIn,
    NopIn,
    Reject,
    RejectReason,
    ScsiResponse,
    TaskManagementResponse,
    TaskResponse,
)
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.sense import SenseKey
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import Change, Close, Delay, Drop, Late, Stall, sense_segment
from iscsifuse.testing.config import TargetKeys
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Rule, all_of, is_a
from iscsifuse.testing.script import lba as has_lba

ASKED_ONLY = TargetKeys(
    initial_r2t=True,
    immediate_data=False,
    max_burst_length=4096,
    max_recv_data_segment_length=4096,
    default_time2wait=0,
)
DATA = content(100, 16)
TASK_MANAGEMENT = is_a(Opcode.TASK_MANAGEMENT_REQUEST)
LOGOUT = is_a(Opcode.LOGOUT_REQUEST)


async def _outcome(job: Any, into: list[Any]) -> None:
    """What a coroutine function returns or raises."""
    into.extend(await at_once(job, within=1000))


# --- pings ---


@pytest.mark.conformance(81)
@pytest.mark.parametrize("lun", [0, 3, 300])
@pytest.mark.parametrize("data", [b"", b"hello"])
@jumping
async def test_81_a_ping_is_answered(lun: int, data: bytes) -> None:
    """NOP-In with a TTT → NOP-Out at once with ITT 0xffffffff, I=1, and the TTT, LUN and data that came."""
    async with bench() as b:
        address = luns.encode(lun)
        b.peer.wire.validator._pings[0xFFFFFFFE] = NopIn(ttt=0xFFFFFFFE, lun=address)
        b.say(NopIn(ttt=0xFFFFFFFE, lun=address, data=data))
        await b.until(lambda: b.tape.sent(NopOut))
        (answer,) = b.tape.sent(NopOut)
        assert (answer.itt, answer.immediate, answer.ttt) == (RESERVED_TAG, True, 0xFFFFFFFE)
        assert (answer.lun, answer.data) == (address, data)


@pytest.mark.conformance(82)
@jumping
async def test_82_news_of_the_window_is_not_answered() -> None:
    """NOP-In with TTT 0xffffffff, a hundred times → no answer to any of them."""
    async with bench() as b:
        for _ in range(100):
            b.say(NopIn())
        await b.settled()
        assert len(b.tape.sent(NopOut)) == 1  # to the ping that came behind them


@pytest.mark.conformance(83)
@pytest.mark.expect_log(RECOVERY)
@jumping
async def test_83_a_silent_target_is_pinged_then_given_up() -> None:
    """Silence, with a command under way or without → a ping after 5 seconds, recovery after 10; the read is right."""
    for busy in (False, True):
        async with nexus_bench(settings={"timeout": 60}) as b:
            began = trio.current_time()
            b.rule(OUT, Stall(), READ if busy else is_a(Opcode.NOP_IN))
            if busy:
                assert await b.read(3) == content(3)
            await b.until(lambda: b.nexus.reconnects == 1, seconds=30)
            assert len([pdu for pdu in b.tape.sent(NopOut) if pdu.itt != RESERVED_TAG]) == 1
            assert 10 <= trio.current_time() - began <= 14
            assert "has been silent for" in str(b.nexus.report()["last_error"])


@pytest.mark.conformance(83)
@jumping
async def test_83_any_byte_counts_as_life() -> None:
    """Our pings are never answered, but something comes every 4 seconds, be it half a header → it lives on."""
    async with bench() as b:
        b.rule(IN, Drop(), is_a(Opcode.NOP_OUT), times=0)
        for _ in range(10):
            await trio.sleep(4)
            b.say(NopIn())
        half = NopIn(**numbers_of(NopIn(exp_cmd_sn=1, max_cmd_sn=128))).encode()
        await trio.sleep(4)
        await b.peer.wire._stream.send_all(half[:20])
        await trio.sleep(7)  # a ping went out at 5
        await b.peer.wire._stream.send_all(half[20:])
        await trio.sleep(2)
        assert b.session.error is None


@pytest.mark.conformance(83)
@jumping
async def test_83_only_an_idle_connection_is_pinged() -> None:
    """A read every 3 seconds → no ping of ours; then nothing → one every 5 to 7 seconds, and each is answered."""
    async with bench() as b:
        for lba in range(10):
            assert await b.read(lba) == content(lba)
            await trio.sleep(3)
        assert b.tape.sent(NopOut) == []
        await trio.sleep(60)
        assert 8 <= len(b.tape.sent(NopOut)) <= 12
        for ping in b.tape.sent(NopOut):
            assert (ping.ttt, ping.immediate) == (RESERVED_TAG, True)
        assert b.session.error is None


@pytest.mark.conformance(84)
@pytest.mark.expect_log(RECOVERY)
@jumping
async def test_84_nop_in_with_both_tags() -> None:
    """The answer to our ping has a TTT, too → format error: the session is dropped, and logged in again."""
    async with nexus_bench(strict=False) as b:
        b.rule(OUT, altered(ttt=5), is_a(Opcode.NOP_IN))
        await b.until(lambda: b.nexus.reconnects == 1, seconds=30)
        assert "both tags valid" in str(b.nexus.report()["last_error"])
        assert all(pdu.ttt == RESERVED_TAG for pdu in b.tape.sent(NopOut))


# --- asynchronous messages ---


@pytest.mark.conformance(85)
@pytest.mark.conformance(87)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("event", [AsyncEvent.LOGOUT_REQUESTED, AsyncEvent.NEGOTIATION_REQUESTED])
@jumping
async def test_85_87_asked_to_leave_it_drains_logs_out_and_logs_in_again(event: AsyncEvent) -> None:
    """Async 1, or 4 (87), Parameter3=1 → what is under way ends, no new command, a logout within a second, a new
    login; what came meanwhile is carried out there."""
    async with nexus_bench(latency=0.2) as b, conversation(60) as nursery:
        results: list[Any] = []
        nursery.start_soon(_outcome, partial(b.read, 1), results)
        await b.until(lambda: b.tape.sent(ScsiCommand))
        asked = trio.current_time()
        b.say(AsyncMessage(event=event, parameter3=1))
        await b.settled()
        nursery.start_soon(_outcome, partial(b.read, 2), results)
        await b.until(lambda: b.tape.sent(LogoutRequest))
        assert trio.current_time() - asked < 1
        assert results == [content(1)]
        await b.until(lambda: len(results) == 2)
        assert results == [content(1), content(2)]
        kinds = [type(pdu) for way, pdu in b.tape.log if way is IN and not isinstance(pdu, NopOut | LoginRequest)]
        assert kinds == [ScsiCommand, LogoutRequest, ScsiCommand]
        assert b.target.logins == 2


@pytest.mark.conformance(85)
@pytest.mark.conformance(87)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("parameter3", [1, 4])
@pytest.mark.parametrize("event", [AsyncEvent.LOGOUT_REQUESTED, AsyncEvent.NEGOTIATION_REQUESTED])
@jumping
async def test_85_87_it_leaves_in_time_though_a_command_hangs(event: AsyncEvent, parameter3: int) -> None:
    """The same while a command hangs → the logout goes out within Parameter3 seconds; the command is sent again."""
    async with nexus_bench() as b, conversation(60) as nursery:
        b.hold(times=1)
        results: list[Any] = []
        nursery.start_soon(_outcome, partial(b.read, 1), results)
        await b.taken()
        asked = trio.current_time()
        b.say(AsyncMessage(event=event, parameter3=parameter3))
        await b.until(lambda: b.tape.sent(LogoutRequest))
        assert trio.current_time() - asked < parameter3
        await b.until(lambda: results)
        assert results == [content(1)]
        assert b.target.logins == 2


@pytest.mark.conformance(86)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("time2wait", [0, 3, 40])
@pytest.mark.parametrize("event", [AsyncEvent.CONNECTION_DROPPED, AsyncEvent.SESSION_DROPPED])
@jumping
async def test_86_told_of_a_drop_it_waits_as_long_as_it_should(event: AsyncEvent, time2wait: int) -> None:
    """Async 2 or 3 with Time2Wait (Parameter2) → the next login then, and not before; the read is right."""
    async with nexus_bench(settings={"reconnect_timeout": 100}) as b, conversation(200) as nursery:
        b.hold(times=1)
        results: list[Any] = []
        nursery.start_soon(_outcome, partial(b.read, 1), results)
        await b.taken()
        told = trio.current_time()
        b.say(AsyncMessage(event=event, parameter1=0, parameter2=time2wait, parameter3=0))
        await b.until(lambda: b.target.logins == 2, seconds=100)
        assert time2wait <= trio.current_time() - told < time2wait + 2
        await b.until(lambda: results)
        assert results == [content(1)]


@pytest.mark.conformance(88)
@pytest.mark.parametrize(
    "event", [AsyncEvent.SCSI_EVENT, AsyncEvent.TASKS_TERMINATED, 77, AsyncEvent.VENDOR_SPECIFIC]
)
@jumping
async def test_88_other_messages_are_acknowledged_and_survived(event: int) -> None:
    """Async 0 with sense data, 255 with data, unknown ones → ExpStatSN goes on, and so does the session."""
    async with bench() as b:
        before = b.peer.numbers.stat_sn
        for _ in range(3):
            b.say(AsyncMessage(event=event, data=sense_segment(sense(SenseKey.UNIT_ATTENTION, 0x3F, 0x0E))))
        await b.settled()
        assert b.tape.sent(NopOut)[-1].exp_stat_sn == before + 3
        assert await b.read(3) == content(3)
        assert b.target.logins == 1


# --- Reject ---


def _rejected(pdu: Any, reason: int) -> Reject:
    return Reject(reason=reason, data=pdu.header()[:4] + len(pdu.data).to_bytes(4, "big") + pdu.header()[8:48])


COMMAND_REASONS = [
    RejectReason.DATA_DIGEST_ERROR,
    RejectReason.PROTOCOL_ERROR,
    RejectReason.COMMAND_NOT_SUPPORTED,
    RejectReason.TASK_IN_PROGRESS,
    RejectReason.INVALID_PDU_FIELD,
    0x80,
]


@pytest.mark.conformance(89)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("reason", COMMAND_REASONS)
@pytest.mark.parametrize("what", ["read", "write"])
@jumping
async def test_89_a_rejected_command_is_sent_again_on_a_new_session(what: str, reason: int) -> None:
    """Reject of a command, which leaves a gap in CmdSN → nobody waits behind it: the session is dropped, and both
    this command and the next one are carried out on a new one."""
    async with nexus_bench() as b, conversation(60) as nursery:
        b.hold(times=2)
        results: list[Any] = []
        first = partial(b.read, 1) if what == "read" else partial(b.write, DATA, 1)
        nursery.start_soon(_outcome, first, results)
        command = await b.taken()
        nursery.start_soon(_outcome, partial(b.read, 50), results)
        await b.taken()
        b.say(_rejected(command, reason))
        await b.until(lambda: len(results) == 2)
        assert content(50) in results
        assert not [result for result in results if isinstance(result, Exception)]
        assert b.target.logins == 2
        assert b.disk.contents(lba=1, blocks=16) == (DATA if what == "write" else content(1, 16))


@pytest.mark.conformance(89)
@pytest.mark.expect_log(RECOVERY)
@jumping
async def test_89_a_command_that_is_always_rejected_is_an_error() -> None:
    """The same each time → an error after a bounded number of sessions; other commands are carried out."""
    async with nexus_bench(strict=False) as b:
        rejected = Change(lambda pdu: _with_numbers(_rejected(_command(b, pdu), 5), pdu))
        b.rule(OUT, rejected, all_of(READ, has_lba(7)), times=0)
        with pytest.raises(SessionLostError, match="rejected a PDU"):
            await b.read(7)
        assert b.target.logins <= 7
        assert await b.read(8) == content(8)


@pytest.mark.conformance(89)
@pytest.mark.expect_log(RECOVERY)
@jumping
async def test_89_a_command_whose_data_is_damaged_on_its_way_has_as_long_as_a_lost_one() -> None:
    """Reject with reason 02h → the line's doing, and not the target's: the command isn't given up for it."""
    async with nexus_bench(strict=False) as b:
        damaged = RejectReason.DATA_DIGEST_ERROR
        rejected = Change(lambda pdu: _with_numbers(_rejected(_command(b, pdu), damaged), pdu))
        b.rule(OUT, rejected, all_of(READ, has_lba(7)), times=8)
        assert await b.read(7) == content(7)
        assert b.target.logins == 9


def _command(b: Bench, answer: Any) -> ScsiCommand:
    return next(pdu for pdu in reversed(b.tape.sent(ScsiCommand)) if pdu.itt == answer.itt)


def _with_numbers(pdu: Any, other: Any) -> Any:
    return altered(**numbers_of(other)).function(pdu)


@pytest.mark.conformance(90)
@pytest.mark.expect_log("rejected data of a write", "success but asked for")
@pytest.mark.parametrize("ending", ["CHECK CONDITION", "asked again", "GOOD all the same"])
@jumping
async def test_90_a_rejected_data_pdu_awaits_the_response(ending: str) -> None:
    """Reject of a Data-Out → the command goes on until its response: CHECK CONDITION is retried; GOOD counts only if
    the data was asked for again, else the write is sent anew. The session lives."""
    async with unit_bench(keys=ASKED_ONLY) as b, conversation(60) as nursery:
        b.hold(WRITE, times=1)
        results: list[Any] = []
        nursery.start_soon(_outcome, partial(b.unit.write, memoryview(DATA), lba=1), results)
        command = await b.taken()
        for number in range(2):
            b.say(_ask(command, 4096 * number, ttt=number, r2t_sn=number))
            await b.data_out(number + 1)
        refused = b.tape.sent(DataOut)[1]
        b.say(_rejected(refused, RejectReason.DATA_DIGEST_ERROR))
        b.say(_rejected(refused, RejectReason.DATA_DIGEST_ERROR))
        await b.settled()
        assert results == []  # it waits
        if ending == "CHECK CONDITION":
            aborted = sense_segment(sense(SenseKey.ABORTED_COMMAND, 0x47, 0x05))
            b.good(command, status=Status.CHECK_CONDITION, data=aborted)
        else:
            if ending == "asked again":
                b.say(_ask(command, 4096, ttt=9, r2t_sn=2))
                assert data_of(await b.data_out(1, ttt=9)) == DATA[4096:]
            b.good(command)
        await b.until(lambda: results)
        assert results == [None]
        writes = [pdu for pdu in b.tape.sent(ScsiCommand) if pdu.write]
        assert len(writes) == (1 if ending == "asked again" else 2)
        if ending != "asked again":
            assert b.disk.contents(lba=1, blocks=16) == DATA
        assert b.target.logins == 1


def _ask(command: ScsiCommand, offset: int, *, ttt: int, r2t_sn: int) -> R2T:
    return R2T(
        itt=command.itt,
        lun=command.lun,
        ttt=ttt,
        r2t_sn=r2t_sn,
        buffer_offset=offset,
        desired_data_transfer_length=4096,
    )


@pytest.mark.conformance(90)
@jumping
async def test_90_a_reject_of_data_whose_command_is_over_is_nothing() -> None:
    """Reject of a Data-Out after the command's status → nothing happens."""
    async with bench(keys=ASKED_ONLY) as b:
        await b.write(DATA)
        b.say(_rejected(b.tape.sent(DataOut)[0], RejectReason.PROTOCOL_ERROR))
        await b.settled()
        assert await b.read(0, 16) == DATA
        assert b.session.error is None


@pytest.mark.conformance(90)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("rejected", ["data", "a command", "a ping"])
@jumping
async def test_90_waiting_for_logout_is_answered_with_a_logout(rejected: str) -> None:
    """Reject with reason 0x0c, of whatever → a logout within a second, no new command before, a new login, and the
    write is carried out there."""
    async with nexus_bench(keys=ASKED_ONLY) as b, conversation(60) as nursery:
        b.hold(times=1)
        results: list[Any] = []
        nursery.start_soon(_outcome, partial(b.write, DATA, 1), results)
        command = await b.taken()
        b.say(_ask(command, 0, ttt=1, r2t_sn=0))
        (data,) = await b.data_out(1)
        await b.settled()
        pdu = {"data": data, "a command": command, "a ping": b.tape.sent(NopOut)[0]}[rejected]
        told = trio.current_time()
        b.say(_rejected(pdu, RejectReason.WAITING_FOR_LOGOUT))
        await b.settled()
        nursery.start_soon(_outcome, partial(b.read, 50), results)
        await b.until(lambda: b.tape.sent(LogoutRequest))
        assert trio.current_time() - told <= 1
        assert len(b.tape.sent(ScsiCommand)) == 1
        await b.until(lambda: len(results) == 2)
        assert content(50) in results
        assert b.disk.contents(lba=1, blocks=16) == DATA
        assert b.target.logins == 2


@pytest.mark.conformance(90)
@jumping
async def test_90_a_rejected_ping_is_a_sign_of_life() -> None:
    """Our pings are rejected (too many immediate commands) → the session lives, and doesn't wait for them."""
    async with bench() as b:
        reject = Change(lambda pdu: _with_numbers(_rejected(b.tape.sent(NopOut)[-1], 6), pdu))
        b.rule(OUT, reject, is_a(Opcode.NOP_IN), times=0)
        await trio.sleep(60)
        assert len(b.tape.sent(NopOut)) > 5
        assert b.session.error is None
        assert b.session.connection.idle


# --- logout ---


def _logout_response(response: int) -> Rule:
    return Rule(OUT, altered(response=response), is_a(Opcode.LOGOUT_RESPONSE))


@pytest.mark.conformance(91)
@pytest.mark.parametrize(
    "rule",
    [
        None,
        *[_logout_response(response) for response in (1, 2, 3, 255)],
        Rule(IN, Drop(), LOGOUT),
        Rule(IN, Stall(), LOGOUT),
        Rule(IN, Close(reset=True), LOGOUT),
    ],
    ids=["response 0", "response 1", "response 2", "response 3", "response 255", "no answer", "a black hole", "RST"],
)
@jumping
async def test_91_nothing_follows_a_logout(rule: Rule | None) -> None:
    """Logout answered with 0 to 3, or not at all, while the target goes on to ping → nothing follows the logout, and
    the connection is closed within 5 seconds."""
    async with bench() as b, conversation(60) as nursery:
        if rule is not None:
            b.target.script.add(rule)
        assert await b.read(3) == content(3)
        peer = b.peer
        began = trio.current_time()
        nursery.start_soon(b.session.logout)
        await b.until(lambda: b.tape.sent(LogoutRequest))
        peer.ping()
        with pytest.raises(SessionLostError):
            await b.read(3)
        await b.session.wait_ended()
        assert trio.current_time() - began <= farewell.LOGOUT_LIMIT
        assert b.session.transport._sock.fileno() == -1
    kinds = [type(pdu) for way, pdu in b.tape.log if way is IN]
    assert kinds[-1] is LogoutRequest
    assert kinds.count(LogoutRequest) == 1


# --- task management ---


@pytest.mark.conformance(92)
@pytest.mark.expect_log("aborting it")
@pytest.mark.parametrize("number", [0, 3, 300])
@jumping
async def test_92_a_command_past_its_deadline_is_aborted(number: int) -> None:
    """A command isn't answered within its time → ABORT TASK with its tag, LUN and CmdSN on the same connection, once;
    the caller is told, the others never notice."""
    disk = Disk.from_bytes(content(0, 64), lun=number)
    async with bench(settings={"timeout": 30}, disk=disk) as b:
        b.rule(IN, Late(500), all_of(COMMAND, has_lba(7)))
        lun = luns.encode(number)

        async def read(lba: int) -> Any:
            memory = memoryview(bytearray(512))
            cdb = b"\x28\0\0\0\0" + bytes([lba]) + b"\0\0\1\0"
            return await b.session.execute(cdb, lun=lun, buffer_in=memory, exact=True)

        began = trio.current_time()
        results = await at_once(partial(read, 6), partial(read, 7), partial(read, 8), within=60)
        assert isinstance(results[1], CommandTimeoutError)
        assert 30 <= trio.current_time() - began <= 33
        assert not [result for result in (results[0], results[2]) if isinstance(result, Exception)]
        (aborted,) = [pdu for pdu in b.tape.sent(ScsiCommand) if pdu.cdb[5] == 7]
        (abort,) = b.tape.sent(TaskManagementRequest)
        assert (abort.function, abort.immediate) == (TaskFunction.ABORT_TASK, True)
        assert (abort.lun, abort.referenced_task_tag) == (lun, aborted.itt)
        assert abort.ref_cmd_sn == aborted.cmd_sn
        assert b.target.logins == 1
        assert b.session.connection.idle


@pytest.mark.conformance(92)
@pytest.mark.expect_log("aborting it")
@jumping
async def test_92_many_late_commands_are_aborted_one_after_the_other() -> None:
    """Fifty commands hang → one ABORT TASK at a time, each after the answer to the one before; one that is answered
    meanwhile isn't aborted but a success."""
    async with bench(settings={"timeout": 30}) as b, conversation(100) as nursery:
        b.hold(times=50)
        b.rule(OUT, Delay(0.15), is_a(Opcode.TASK_MANAGEMENT_RESPONSE), times=0)
        results: list[Any] = []
        for lba in range(50):
            nursery.start_soon(_outcome, partial(b.read, lba), results)
        commands = [await b.taken() for _ in range(50)]
        await b.until(lambda: b.tape.sent(TaskManagementRequest), seconds=40)
        b.data_in(commands[49], content(49))
        await b.until(lambda: len(results) == 50)
        assert results.count(content(49)) == 1
        assert sum(isinstance(result, CommandTimeoutError) for result in results) == 49
    aborts = b.tape.sent(TaskManagementRequest)
    assert [abort.referenced_task_tag for abort in aborts] == [command.itt for command in commands[:49]]
    exchange = [type(pdu) for _, pdu in b.tape.log if isinstance(pdu, TaskManagementRequest | TaskManagementResponse)]
    assert exchange == [TaskManagementRequest, TaskManagementResponse] * 49


@pytest.mark.conformance(92)
@pytest.mark.conformance(95)
@pytest.mark.expect_log("aborting it")
@jumping
async def test_92_95_aborting_many_commands_is_bounded_in_time() -> None:
    """Twenty commands hang, and each abort is answered after 4 seconds → that doesn't take 80 seconds: the session is
    given up about 10 seconds after the deadline, and each caller is told of his deadline."""
    async with bench(settings={"timeout": 30}) as b:
        b.hold(times=20)
        b.rule(OUT, Delay(4.0), is_a(Opcode.TASK_MANAGEMENT_RESPONSE), times=0)
        began = trio.current_time()
        results = await at_once(*[partial(b.read, lba) for lba in range(20)], within=100)
        assert all(isinstance(result, CommandTimeoutError) for result in results)
        assert 40 <= trio.current_time() - began <= 44
        assert "did not answer the abortion" in str(b.session.error)


@pytest.mark.conformance(93)
@pytest.mark.expect_log("aborting it")
@jumping
async def test_93_task_does_not_exist_is_no_success() -> None:
    """A WRITE hangs, and its abort is answered with "task does not exist" → its outcome is unknown: an error, and the
    session lives."""
    async with bench(settings={"timeout": 30}) as b:
        b.hold(WRITE, times=1)  # so this target knows of no such task
        results = await at_once(partial(b.write, DATA), within=60)
        assert isinstance(results[0], CommandTimeoutError)
        (answer,) = b.tape.told(TaskManagementResponse)
        assert answer.response == TaskResponse.TASK_DOES_NOT_EXIST
        assert b.session.error is None


@pytest.mark.conformance(94)
@pytest.mark.expect_log("aborting it")
@jumping
async def test_94_r2ts_of_a_task_under_abortion_are_still_answered() -> None:
    """An R2T comes for a task whose abortion isn't answered yet → it is answered (RFC 7143 §4.2.3.4: the target may
    wait for that data); one that comes after the answer isn't.

    ABORT TASK SET is sent only on a new session, before any command (the barrier of `Nexus`): no R2T is open then.
    On a session in use it would take commands along that have time left; so late ones are aborted one by one, under
    the same rule.
    """
    async with bench(settings={"timeout": 30}, keys=ASKED_ONLY) as b, conversation(60) as nursery:
        b.hold(WRITE, times=1)
        b.rule(IN, Drop(), TASK_MANAGEMENT)
        results: list[Any] = []
        nursery.start_soon(_outcome, partial(b.write, DATA), results)
        command = await b.taken()
        await b.until(lambda: b.tape.sent(TaskManagementRequest), seconds=40)
        b.say(_ask(command, 4096, ttt=1, r2t_sn=0))
        assert data_of(await b.data_out(1)) == DATA[4096:]
        assert results == []  # neither success nor failure before the answer
        (abort,) = b.tape.sent(TaskManagementRequest)
        b.say(TaskManagementResponse(itt=abort.itt, response=TaskResponse.FUNCTION_COMPLETE))
        await b.until(lambda: results)
        assert isinstance(results[0], CommandTimeoutError)
        b.peer.numbers.outstanding = 0
        task = b.peer.wire.validator._tasks.pop(command.itt, None)
        b.say(_ask(command, 0, ttt=2, r2t_sn=1))
        await b.settled()
        assert len(b.tape.sent(DataOut)) == 1
        assert task is None
        assert all(abort.function == TaskFunction.ABORT_TASK for abort in b.tape.sent(TaskManagementRequest))


ESCALATIONS: list[tuple[str, Rule]] = [
    ("no answer", Rule(IN, Drop(), TASK_MANAGEMENT, times=0)),
    *[
        (f"response {response}", Rule(OUT, altered(response=response), is_a(Opcode.TASK_MANAGEMENT_RESPONSE)))
        for response in (2, 3, 5, 6, 255)
    ],
]


@pytest.mark.conformance(95)
@pytest.mark.expect_log("aborting it", RECOVERY)
@pytest.mark.parametrize("rule", [row[1] for row in ESCALATIONS], ids=[row[0] for row in ESCALATIONS])
@jumping
async def test_95_task_management_that_does_not_work_escalates_to_the_session(rule: Rule) -> None:
    """ABORT TASK is not supported, refused, or not answered for 10 seconds → a new session, which ends the command at
    the target; its caller is told of the deadline, a command with time left is carried out there."""
    async with nexus_bench(settings={"timeout": 30}, strict=False) as b, conversation(100) as nursery:
        b.hold(times=2)
        b.target.script.add(rule)
        results: list[Any] = []
        began = trio.current_time()
        nursery.start_soon(_outcome, partial(b.read, 7), results)
        await b.taken()
        await trio.sleep(25)
        nursery.start_soon(_outcome, partial(b.read, 8), results)
        await b.until(lambda: len(results) == 2, seconds=60)
        assert isinstance(results[0], CommandTimeoutError)
        assert results[1] == content(8)
        assert b.target.logins == 2
        assert trio.current_time() - began <= 44


@pytest.mark.conformance(95)
@pytest.mark.expect_log("aborting it", RECOVERY)
@jumping
async def test_95_a_rejected_abort_escalates_to_the_session() -> None:
    """ABORT TASK is rejected (immediate command reject) → the same."""
    async with nexus_bench(settings={"timeout": 30}, strict=False) as b:
        b.hold(times=1)
        reject = Change(lambda pdu: _with_numbers(_rejected(b.tape.sent(TaskManagementRequest)[-1], 6), pdu))
        b.rule(OUT, reject, is_a(Opcode.TASK_MANAGEMENT_RESPONSE))
        with pytest.raises(CommandTimeoutError):
            await b.read(7)
        assert await b.read(8) == content(8)
        assert b.target.logins == 2


@pytest.mark.conformance(96)
@pytest.mark.expect_log("aborting it")
@pytest.mark.parametrize("late", ["Data-In with status", "Data-In, then a response", "a response"])
@jumping
async def test_96_a_late_response_after_an_abort_is_discarded(late: str) -> None:
    """Data and status of a task come after its abort was confirmed → they complete nothing, and touch no memory; the
    session lives."""
    async with bench(settings={"timeout": 30}, strict=False) as b, conversation(100) as nursery:
        b.hold(times=1)
        results: list[Any] = []
        memory = memoryview(bytearray(512))
        nursery.start_soon(_outcome, partial(b.read, 7, memory=memory), results)
        command = await b.taken()
        await b.until(lambda: results, seconds=60)
        assert isinstance(results[0], CommandTimeoutError)
        memory[:] = b"\xaa" * 512
        if late != "a response":
            with_status = late == "Data-In with status"
            b.say(DataIn(itt=command.itt, data=b"\x55" * 512, has_status=with_status))
        if late != "Data-In with status":
            b.say(ScsiResponse(itt=command.itt, exp_data_sn=1))
        b.peer.numbers.outstanding = 0
        await b.settled()
        assert memory == b"\xaa" * 512
        assert await b.read(8) == content(8)
        assert b.session.error is None
