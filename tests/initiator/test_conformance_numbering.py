"""Cases 44 to 53: CmdSN, the command window, StatSN, and tags, on the wire.

Each test names its case; its docstring says what the target does → what the initiator must do.
"""

from functools import partial
from typing import Any

import pytest
import trio
from feature_phase_kit import (
    BLOCKS,
    COMMAND,
    DATA_IN,
    READ,
    RECOVERY,
    RESPONSE,
    Bench,
    altered,
    bench,
    content,
    jumping,
    nexus_bench,
)
from initiator_kit import LUN_0, at_once, conversation

from iscsifuse.errors import CommandTimeoutError
from iscsifuse.initiator import login as login_module
from iscsifuse.iscsi.login import LoginMachine
from iscsifuse.iscsi.pdu import RESERVED_TAG
from iscsifuse.iscsi.request import (
    DataOut,
    LoginRequest,
    LogoutRequest,
    NopOut,
    ScsiCommand,
    TaskManagementRequest,
)
from iscsifuse.iscsi.response import R2T, DataIn, NopIn, ScsiResponse, TaskManagementResponse
from iscsifuse.iscsi.serial import add
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.testing.actions import Late
from iscsifuse.testing.config import TargetKeys
from iscsifuse.testing.script import IN, OUT, all_of
from iscsifuse.testing.script import lba as has_lba

SMALL = TargetKeys(
    initial_r2t=True,
    immediate_data=False,
    max_burst_length=2048,
    max_recv_data_segment_length=512,
    default_time2wait=0,
)
"""A write of eight blocks takes two R2Ts of four PDUs each."""


async def _mixed_work(b: Bench) -> None:
    """Reads, writes of many PDUs, commands without data, and pings, all at once."""

    async def nothing() -> None:
        await b.session.execute(cdbs.test_unit_ready(), lun=LUN_0)

    async def pings() -> None:
        b.target.ping()

    jobs: list[Any] = []
    for number in range(10):
        jobs += [
            partial(b.read, number, 4),
            partial(b.write, bytes([number]) * 4096, 100 + 8 * number),
            nothing,
            pings,
        ]
    results = await at_once(*jobs)
    assert not [result for result in results if isinstance(result, Exception)]


@pytest.mark.conformance(44)
@pytest.mark.parametrize("window", [3, 128])
async def test_44_cmd_sn_goes_up_by_one_with_each_command_that_is_not_immediate(window: int) -> None:
    """Commands, data, pings in any order → each command has the next CmdSN, from the login's on; nothing else has."""
    async with bench(window=window, keys=SMALL) as b:
        await _mixed_work(b)
    (first, *_) = b.tape.sent(LoginRequest)
    commands = b.tape.sent(ScsiCommand)
    assert [command.cmd_sn for command in commands] == [first.cmd_sn + number for number in range(30)]
    assert b.tape.sent(NopOut)
    assert b.tape.sent(DataOut)
    (logout,) = b.tape.sent(LogoutRequest)
    assert (logout.immediate, logout.cmd_sn) == (True, first.cmd_sn + 30)


@pytest.mark.conformance(45)
@pytest.mark.expect_log("aborting it")
@pytest.mark.parametrize("closed", [False, True])
@jumping
async def test_45_immediate_requests_carry_the_current_cmd_sn(closed: bool) -> None:
    """A ping, a silence, a deadline → NOP-Out and ABORT TASK carry the next command's CmdSN, and leave it to that,
    also through a closed window."""
    async with bench(settings={"timeout": 30}, window=1 if closed else 5) as b, conversation(60) as nursery:
        b.hold(times=1)
        nursery.start_soon(at_once, partial(b.read, 7))
        held = await b.taken()
        b.target.ping()
        await b.until(lambda: b.tape.sent(TaskManagementRequest), seconds=40)
        await b.until(lambda: not b.session.connection.tasks)
        pings = b.tape.sent(NopOut)
        assert {pdu.itt == RESERVED_TAG for pdu in pings} == {False, True}  # theirs and ours
        requests: list[Any] = [*pings, *b.tape.sent(TaskManagementRequest)]
        for pdu in requests:
            assert (pdu.immediate, pdu.cmd_sn) == (True, held.cmd_sn + 1)
        b.peer.numbers.outstanding = 0
        b.peer.announce()
        assert await b.read(3) == content(3)
        assert b.tape.sent(ScsiCommand)[-1].cmd_sn == held.cmd_sn + 1


@pytest.mark.conformance(46)
@pytest.mark.parametrize("opener", ["a NOP-In", "a response"])
@jumping
async def test_46_a_closed_window_is_silence_until_it_opens(opener: str) -> None:
    """MaxCmdSN = ExpCmdSN-1 → no command, however long it takes, until a NOP-In or a response says otherwise."""
    async with bench(settings={"timeout": 1000}, window=1) as b, conversation(500) as nursery:
        b.hold(times=2)
        nursery.start_soon(b.read, 1)
        held = await b.taken()
        nursery.start_soon(b.read, 2)
        await trio.sleep(100)
        assert b.tape.told(NopIn)  # as answers to our pings: the window is still what it was
        assert len(b.tape.sent(ScsiCommand)) == 1
        assert len(b.session.connection.queue) == 1
        if opener == "a NOP-In":
            b.peer.numbers.window = 2
            b.peer.announce()
        else:
            b.data_in(held, content(1))
        second = await b.taken()
        assert second.cmd_sn == held.cmd_sn + 1
        if opener == "a NOP-In":
            b.data_in(held, content(1))
        b.data_in(second, content(2))


@pytest.mark.conformance(47)
@pytest.mark.parametrize("window", [1, 2, 100])
@jumping
async def test_47_as_many_commands_at_once_as_the_window_holds(window: int) -> None:
    """A window of 100 → exactly 100 of 150 commands under way at once; of 1 → one after the other."""
    async with bench(window=window, latency=1.0, settings={"timeout": 1000}) as b:
        jobs = [partial(b.read, lba) for lba in range(150 if window == 100 else 20)]
        assert await at_once(*jobs, within=100) == [content(lba) for lba in range(len(jobs))]
    under_way = most = 0
    for way, pdu in b.tape.log:
        under_way += way is IN and isinstance(pdu, ScsiCommand)
        under_way -= way is OUT and isinstance(pdu, DataIn) and pdu.has_status
        most = max(most, under_way)
    assert most == window
    assert under_way == 0


@pytest.mark.conformance(48)
@pytest.mark.parametrize(
    ("exp_cmd_sn", "max_cmd_sn"),
    [(50, 40), (3, 1), (1, 0x80000002), (0xFFFFFFF0, 0xFFFFFFEF), (1, 1), (1, 0), (2, 2)],
)
async def test_48_numbers_that_can_not_be_change_nothing(exp_cmd_sn: int, max_cmd_sn: int) -> None:
    """MaxCmdSN < ExpCmdSN-1 → both ignored; either smaller than before → ignored. A good pair counts again."""
    async with bench(window=2) as b, conversation() as nursery:
        b.hold(times=3)
        nursery.start_soon(b.read, 1)
        first = await b.taken()
        assert first.cmd_sn == 1  # ExpCmdSN is 2 from here on, MaxCmdSN 2
        b.say(NopIn())
        b.say(NopIn(), exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn)
        await b.settled()
        nursery.start_soon(b.read, 2)
        second = await b.taken()  # what was granted isn't taken back
        nursery.start_soon(b.read, 3)
        await b.settled()
        assert len(b.tape.sent(ScsiCommand)) == 2  # and nothing was added
        b.peer.numbers.window = 3
        b.peer.announce()
        third = await b.taken()
        for command, lba in ((first, 1), (second, 2), (third, 3)):
            b.data_in(command, content(lba))


@pytest.mark.conformance(49)
@pytest.mark.parametrize("first", [0xFFFFFFF0, 0x7FFFFFF0])
async def test_49_numbers_wrap_around(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CmdSN and StatSN begin at 0xFFFFFFF0 → they go on through 0, and everything is carried out."""
    machine = partial(LoginMachine)

    def begin(*args: Any, **kwargs: Any) -> LoginMachine:
        return machine(*args, **{**kwargs, "cmd_sn": first})

    monkeypatch.setattr(login_module, "LoginMachine", begin)
    async with bench(initial_stat_sn=first, window=5, keys=SMALL) as b:
        for _ in range(2):
            await _mixed_work(b)
    assert [command.cmd_sn for command in b.tape.sent(ScsiCommand)] == [add(first, number) for number in range(60)]
    (logout,) = b.tape.sent(LogoutRequest)
    responses = [pdu for pdu in b.tape.told(DataIn) if pdu.has_status] + b.tape.told(ScsiResponse)
    assert len(responses) == 60
    assert logout.exp_stat_sn == add(b.tape.sent(ScsiCommand)[0].exp_stat_sn, 60)


@pytest.mark.conformance(50)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("status_in_data", [False, True])
@pytest.mark.parametrize("gap", [1, -1, 0x7FFFFFFF, 0x80000000, 0x80000001])
async def test_50_a_gap_in_stat_sn_is_a_new_session(gap: int, status_in_data: bool) -> None:
    """StatSN jumps by 2^31, or by one → the session is given up, the command carried out on a new one."""
    async with nexus_bench(strict=False, status_in_data=status_in_data) as b:
        await b.read(1)
        jump = altered(stat_sn=lambda pdu: add(pdu.stat_sn, gap))
        b.rule(OUT, jump, all_of(READ, DATA_IN if status_in_data else RESPONSE))
        assert await b.read(7) == content(7)
        assert b.target.logins == 2
        assert len(b.target.script.log) == 1
        assert b.nexus.report()["reconnects"] == 1


@pytest.mark.conformance(51)
async def test_51_what_uses_up_no_stat_sn() -> None:
    """NOP-In with ITT -1, R2T, Data-In without status → the StatSN in them isn't acknowledged, whatever it is."""
    async with bench(keys=SMALL) as b, conversation() as nursery:
        before = b.peer.numbers.stat_sn
        b.hold(times=2)
        nursery.start_soon(b.write, content(0, 2), 9)
        writer = await b.taken()
        nursery.start_soon(b.read, 3, 2)
        reader = await b.taken()
        b.say(NopIn(), stat_sn=before + 1000)
        b.say(R2T(itt=writer.itt, lun=LUN_0, ttt=1, desired_data_transfer_length=1024), stat_sn=before + 2000)
        b.say(DataIn(itt=reader.itt, data=content(3), final=False), stat_sn=before + 3000)
        b.say(NopIn(ttt=77), stat_sn=before)
        await b.settled()
        sent: list[Any] = [*b.tape.sent(NopOut), *b.tape.sent(DataOut)]
        assert [pdu.exp_stat_sn for pdu in sent] == [before] * 4
        b.good(writer)
        b.say(DataIn(itt=reader.itt, data_sn=1, buffer_offset=512, data=content(4), has_status=True))
        await b.settled()
        assert b.tape.sent(NopOut)[-1].exp_stat_sn == before + 2


@pytest.mark.conformance(52)
@pytest.mark.parametrize("itt", ["unknown", "reserved", "completed", "a ping's"])
async def test_52_a_completion_that_is_nobodys_completes_nobody(itt: str) -> None:
    """A status for an unknown ITT, or a second one → no other task is completed, no memory written."""
    async with bench(strict=False) as b, conversation() as nursery:
        b.hold(times=3)
        results: list[bytes] = []

        async def read(lba: int) -> None:
            results.append(await b.read(lba))

        nursery.start_soon(read, 1)
        first = await b.taken()
        nursery.start_soon(read, 2)
        second = await b.taken()
        b.data_in(first, content(1))
        await b.until(lambda: len(results) == 1)
        ping = b.session.connection.request(NopOut(immediate=True, data=b"not sent yet"))
        tag = {"unknown": 0x4711, "reserved": RESERVED_TAG, "completed": first.itt, "a ping's": ping}[itt]
        b.say(DataIn(itt=tag, data=b"\x55" * 512, has_status=True))
        b.say(ScsiResponse(itt=tag))
        b.say(ScsiResponse(itt=tag, status=2, data=b"\0\3\x70\0\5"))
        await b.settled()
        assert len(results) == 1
        assert list(b.session.connection.tasks) == [second.itt]
        b.data_in(second, content(2))
        await b.until(lambda: len(results) == 2)
        assert results == [content(1), content(2)]


@pytest.mark.conformance(53)
@pytest.mark.expect_log("aborting it")
@jumping
async def test_53_tags_are_unique_and_never_the_reserved_one() -> None:
    """Commands before and after 2^32 of them, one aborted meanwhile → no tag twice, none 0xffffffff."""
    async with bench(settings={"timeout": 10}) as b:
        b.session.connection._numbers.next_itt = 0xFFFFFFF8
        b.rule(IN, Late(500), all_of(COMMAND, has_lba(7)))
        results = await at_once(partial(b.read, 7), *[partial(b.read, 20 + lba) for lba in range(12)], within=60)
        assert isinstance(results[0], CommandTimeoutError)
        assert results[1:] == [content(20 + lba) for lba in range(12)]
        assert b.tape.told(TaskManagementResponse)
        for lba in range(5):
            await b.read(BLOCKS - 1 - lba)
    tags = [pdu.itt for pdu in [*b.tape.sent(ScsiCommand), *b.tape.sent(TaskManagementRequest)]]
    tags += [pdu.itt for pdu in b.tape.sent(NopOut)]
    assert RESERVED_TAG not in tags
    assert len(set(tags)) == len(tags) >= 19
    assert {tag > 0x80000000 for tag in tags} == {False, True}
