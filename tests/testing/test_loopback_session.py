import contextlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback_client import ISID, Client, EndOfStreamError, Result

from iscsifuse.iscsi.pdu import RESERVED_TAG, Pdu
from iscsifuse.iscsi.request import (
    DataOut,
    LogoutRequest,
    NopOut,
    ScsiCommand,
    SnackRequest,
    TaskFunction,
    TaskManagementRequest,
    TextRequest,
)
from iscsifuse.iscsi.response import (
    R2T,
    AsyncMessage,
    DataIn,
    LogoutResponse,
    NopIn,
    Reject,
    RejectReason,
    ScsiResponse,
    TaskManagementResponse,
    TaskResponse,
)
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.sense import SenseKey
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import Late
from iscsifuse.testing.config import LoginAttention, TargetConfig, TargetKeys
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, Rule, cdb
from iscsifuse.testing.target import LoopbackTarget

BLOCKS = 4096


def pattern(length: int) -> bytes:
    return b"".join(number.to_bytes(8, "big") for number in range(-(-length // 8)))[:length]


@asynccontextmanager
async def serving(
    *disks: Disk, keys: TargetKeys | None = None, clean: bool = True, **changes: Any
) -> AsyncIterator[LoopbackTarget]:
    config = TargetConfig.of(*(disks or [Disk(blocks=BLOCKS)]), keys=keys)
    config.login_attention = LoginAttention.NONE
    for name, value in changes.items():
        setattr(config, name, value)
    async with LoopbackTarget(config).serve() as target:
        yield target
    if clean:
        assert target.violations == []


async def log_in(target: LoopbackTarget, *changes: tuple[str, str]) -> Client:
    client = Client(target.connect())
    await client.login(*changes)
    return client


def good(result: Result) -> bool:
    return (result.status, result.residual, result.overflow, result.underflow) == (0, 0, False, False)


# --- data ---


@pytest.mark.parametrize("digests", ["None", "CRC32C"])
@pytest.mark.parametrize("immediate_data", ["Yes", "No"])
@pytest.mark.parametrize("initial_r2t", ["Yes", "No"])
async def test_writes_and_reads_in_all_cells(initial_r2t: str, immediate_data: str, digests: str) -> None:
    keys = TargetKeys(
        max_recv_data_segment_length=4096, first_burst_length=10240, max_burst_length=20480, max_outstanding_r2t=2
    )
    async with serving(keys=keys) as target:
        client = await log_in(
            target,
            ("InitialR2T", initial_r2t),
            ("ImmediateData", immediate_data),
            ("HeaderDigest", digests),
            ("DataDigest", digests),
            ("MaxRecvDataSegmentLength", "1024"),
        )
        data = pattern(100 * 512)
        immediate = 3584 if immediate_data == "Yes" else 0
        unsolicited = 10240 - immediate if initial_r2t == "No" else 0
        result = await client.write(
            cdbs.write_10(lba=7, blocks=100), data, immediate=immediate, unsolicited=unsolicited, segment=4096
        )
        assert good(result)
        r2ts = [pdu for pdu in result.pdus if isinstance(pdu, R2T)]
        rest = len(data) - immediate - unsolicited
        assert [r2t.r2t_sn for r2t in r2ts] == list(range(-(-rest // 20480)))
        assert [r2t.desired_data_transfer_length for r2t in r2ts[:-1]] == [20480] * (len(r2ts) - 1)
        assert r2ts[0].buffer_offset == immediate + unsolicited
        assert target.disk().contents(lba=7, blocks=100) == data
        result = await client.read(cdbs.read_10(lba=7, blocks=100), len(data))
        assert good(result)
        assert result.data == data
        assert all(len(pdu.data) <= 1024 for pdu in result.pdus)
        await client.logout()


async def test_a_small_write_is_one_pdu() -> None:
    async with serving() as target:
        client = await log_in(target)
        result = await client.write(cdbs.write_10(lba=0, blocks=1), b"x" * 512, immediate=512)
        assert [type(pdu) for pdu in result.pdus] == [ScsiResponse]
        assert target.ledger[-1].name == "WRITE(10)"


async def test_data_in_sequences_end_with_f_and_status_comes_with_the_last() -> None:
    async with serving() as target:
        client = await log_in(target, ("MaxBurstLength", "4096"), ("MaxRecvDataSegmentLength", "1536"))
        result = await client.read(cdbs.read_10(lba=0, blocks=17), 17 * 512)
        parts = [(p.buffer_offset, len(p.data), p.final, p.has_status) for p in result.pdus if isinstance(p, DataIn)]
        assert parts == [
            (0, 1536, False, False),
            (1536, 1536, False, False),
            (3072, 1024, True, False),
            (4096, 1536, False, False),
            (5632, 1536, False, False),
            (7168, 1024, True, False),
            (8192, 512, True, True),
        ]
        assert [p.data_sn for p in result.pdus if isinstance(p, DataIn)] == list(range(7))


async def test_status_may_come_apart_from_the_data() -> None:
    async with serving(status_in_data=False) as target:
        client = await log_in(target)
        result = await client.read(cdbs.read_10(lba=0, blocks=1), 512)
        assert [type(pdu) for pdu in result.pdus] == [DataIn, ScsiResponse]
        last = result.pdus[-1]
        assert isinstance(last, ScsiResponse)
        assert last.exp_data_sn == 1


async def test_r2ts_are_limited_and_may_be_turned_round() -> None:
    keys = TargetKeys(max_burst_length=1024, max_outstanding_r2t=3)
    async with serving(keys=keys, reverse_r2t=True) as target:
        client = await log_in(target, ("InitialR2T", "Yes"), ("ImmediateData", "No"))
        data = pattern(5 * 1024)
        command = client.command(cdbs.write_10(lba=0, blocks=10), write=len(data))
        await client.send(command)
        r2ts = [await client.receive() for _ in range(3)]
        assert [r2t.buffer_offset for r2t in r2ts if isinstance(r2t, R2T)] == [4096, 3072, 2048]
        assert len({r2t.ttt for r2t in r2ts if isinstance(r2t, R2T)}) == 3
        for r2t in r2ts[::-1]:
            assert isinstance(r2t, R2T)
            await client.data_out(command, data, r2t.buffer_offset, 1024, ttt=r2t.ttt)
        result = await client.result(command, data)
        assert good(result)
        assert target.disk().contents(blocks=10) == data


@pytest.mark.parametrize(
    ("expected", "blocks", "residual", "overflow", "underflow"),
    [(512, 2, 512, True, False), (2048, 2, 1024, False, True), (1024, 2, 0, False, False)],
)
async def test_residuals(expected: int, blocks: int, residual: int, overflow: bool, underflow: bool) -> None:
    async with serving(clean=False) as target:
        client = await log_in(target)
        result = await client.read(cdbs.read_10(lba=0, blocks=blocks), expected)
        assert (result.residual, result.overflow, result.underflow) == (residual, overflow, underflow)
        assert len(result.data) == min(expected, blocks * 512)
        result = await client.write(cdbs.write_10(lba=0, blocks=blocks), pattern(expected), immediate=512)
        assert (result.residual, result.overflow, result.underflow) == (residual, overflow, underflow)
        wanted = min(expected, blocks * 512)
        assert target.disk().contents(blocks=4) == pattern(wanted).ljust(2048, b"\0")
        assert len(target.violations) == (2 if residual else 0)


async def test_a_command_that_fails_early_gets_its_status_after_the_unsolicited_data() -> None:
    async with serving(Disk(blocks=8, write_protected=True)) as target:
        client = await log_in(target)
        data = pattern(4096)
        command = client.command(cdbs.write_10(lba=0, blocks=8), write=4096, final=False)
        await client.send(command)
        with trio.move_on_after(0.1):
            raise AssertionError(await client.receive())
        await client.data_out(command, data, 0, 4096, ttt=RESERVED_TAG, segment=1024)
        result = await client.result(command)
        assert (result.status, result.sense and result.sense.asc) == (Status.CHECK_CONDITION, 0x27)
        assert (result.residual, result.underflow) == (4096, True)


async def test_wrong_data_out_is_rejected_and_fails_its_command() -> None:
    async with serving(clean=False) as target:
        client = await log_in(target, ("InitialR2T", "Yes"), ("ImmediateData", "No"))
        command = client.command(cdbs.write_10(lba=0, blocks=2), write=1024)
        await client.send(command)
        r2t = await client.receive()
        assert isinstance(r2t, R2T)
        await client.data_out(command, bytes(2048), 512, 512, ttt=r2t.ttt)
        reject = await client.receive()
        assert isinstance(reject, Reject)
        assert reject.reason == RejectReason.PROTOCOL_ERROR
        result = await client.result(command)
        assert result.sense
        assert (result.sense.key, result.sense.asc, result.sense.ascq) == (SenseKey.ABORTED_COMMAND, 0x0C, 0x0D)
        assert target.ledger == []


# --- numbers ---


@pytest.mark.parametrize("start", [0, 1, 0xFFFFFFF0, 0xFFFFFFFF])
async def test_numbers_wrap(start: int) -> None:
    async with serving(initial_stat_sn=start) as target:
        client = Client(target.connect(), cmd_sn=start)
        await client.login()
        for _ in range(20):
            result = await client.plain(cdbs.test_unit_ready())
            assert good(result)
        response = result.pdus[-1]
        assert isinstance(response, ScsiResponse)
        assert response.stat_sn == (start + 20) & 0xFFFFFFFF
        assert response.exp_cmd_sn == (start + 20) & 0xFFFFFFFF
        assert response.max_cmd_sn == (start + 20 + 127) & 0xFFFFFFFF


async def test_a_command_without_its_data_holds_up_no_other_one() -> None:
    async with serving() as target:
        client = await log_in(target, ("ImmediateData", "No"), ("InitialR2T", "Yes"))
        await pending_write(client)
        assert good(await client.plain(cdbs.test_unit_ready()))
        assert target.sessions[0].numbers.outstanding == 1


async def test_commands_are_executed_in_the_order_of_their_numbers() -> None:
    async with serving(clean=False) as target:
        client = await log_in(target)
        commands = [client.command(cdbs.read_10(lba=lba, blocks=1), read=512) for lba in range(4)]
        for index in (2, 1, 3, 0, 0, 2):
            await client.send(commands[index])
        for command in commands:
            response = await client.receive()
            assert response.itt == command.itt
        assert [entry.lba for entry in target.ledger] == [0, 1, 2, 3]


async def test_what_is_outside_of_the_window_is_ignored() -> None:
    async with serving(window=2, clean=False) as target:
        client = await log_in(target)
        for distance in (-1, 2, 1000):
            client.cmd_sn += distance
            await client.send(
                client.command(cdbs.test_unit_ready(), immediate=True).__class__(
                    itt=900 + distance, cmd_sn=client.cmd_sn, cdb=bytes(16)
                )
            )
            client.cmd_sn -= distance
        result = await client.plain(cdbs.test_unit_ready())
        assert good(result)
        assert len(target.ledger) == 1


async def test_the_window_counts_what_is_not_done() -> None:
    rule = Rule(IN, Late(0.2), cdb(cdbs.Opcode.READ_10), times=0)
    async with serving(window=3) as target:
        target.script.add(rule)
        client = await log_in(target)
        first = client.command(cdbs.read_10(lba=0, blocks=1), read=512)
        await client.send(first)
        response = (await client.plain(cdbs.test_unit_ready())).pdus[-1]
        assert isinstance(response, ScsiResponse)
        # Two have come, one of them is still there.
        assert (response.exp_cmd_sn, response.max_cmd_sn) == (102, 103)
        data = await client.receive()
        assert isinstance(data, DataIn)
        assert (data.itt, data.exp_cmd_sn, data.max_cmd_sn) == (first.itt, 102, 104)
        assert [entry.name for entry in target.ledger] == ["TEST UNIT READY", "READ(10)"]


async def test_a_closed_window_opens_with_a_nop_in() -> None:
    async with serving(window=1) as target:
        client = await log_in(target)
        target.set_window(0)
        nop = await client.receive()
        assert isinstance(nop, NopIn)
        assert (nop.itt, nop.ttt, nop.exp_cmd_sn, nop.max_cmd_sn) == (RESERVED_TAG, RESERVED_TAG, 100, 100)
        response = (await client.plain(cdbs.test_unit_ready())).pdus[-1]
        assert isinstance(response, ScsiResponse)
        assert (response.exp_cmd_sn, response.max_cmd_sn) == (101, 100)
        target.set_window(5)
        nop = await client.receive()
        assert isinstance(nop, NopIn)
        assert (nop.exp_cmd_sn, nop.max_cmd_sn) == (101, 105)


async def test_ready_commands_may_be_executed_in_any_order() -> None:
    async def order(seed: int | None) -> list[int]:
        async with serving(reorder=seed, latency=0.05) as target:
            client = await log_in(target)
            for lba in range(12):
                await client.send(client.command(cdbs.read_10(lba=lba, blocks=1), read=512))
            for _ in range(12):
                client.exp_stat_sn = 1 + (await client.receive()).stat_sn  # type: ignore[attr-defined]
            return [entry.lba for entry in target.ledger]

    assert await order(None) == list(range(12))
    assert await order(1) != list(range(12))
    assert sorted(await order(1)) == list(range(12))


# --- NOP, task management, text, logout ---


async def test_pings_both_ways() -> None:
    async with serving() as target:
        client = await log_in(target)
        await client.send(
            NopOut(itt=9, immediate=True, cmd_sn=client.cmd_sn, exp_stat_sn=client.exp_stat_sn, data=b"hello")
        )
        answer = await client.receive()
        assert isinstance(answer, NopIn)
        assert (answer.itt, answer.ttt, answer.data, answer.stat_sn) == (9, RESERVED_TAG, b"hello", 2)
        target.ping()
        ping = await client.receive()
        assert isinstance(ping, NopIn)
        assert (ping.itt, ping.stat_sn) == (RESERVED_TAG, 3)
        await client.send(
            NopOut(immediate=True, ttt=ping.ttt, lun=ping.lun, cmd_sn=client.cmd_sn, exp_stat_sn=answer.stat_sn + 1)
        )
        client.exp_stat_sn = answer.stat_sn + 1
        assert good(await client.plain(cdbs.test_unit_ready()))


async def test_pings_at_intervals(autojump_clock: trio.testing.MockClock) -> None:  # noqa: ARG001
    async with serving(nop_interval=30) as target:
        client = await log_in(target)
        start = trio.current_time()
        for _ in range(3):
            while not client.buffer:
                client.buffer += await client.stream.receive_some(100)
            assert isinstance(await client.receive(), NopIn)
        assert trio.current_time() - start == pytest.approx(90, abs=1)


def task_management(client: Client, function: int, **fields: Any) -> TaskManagementRequest:
    return TaskManagementRequest(
        itt=client.next_itt(), function=function, cmd_sn=client.cmd_sn, exp_stat_sn=client.exp_stat_sn, **fields
    )


async def manage(client: Client, request: TaskManagementRequest) -> int:
    await client.send(request)
    response = await client.receive()
    assert isinstance(response, TaskManagementResponse)
    assert response.itt == request.itt
    client.exp_stat_sn = response.stat_sn + 1
    return response.response


async def pending_write(client: Client, *, lun: int = 0) -> ScsiCommand:
    """A write that waits for its data."""
    command = client.command(cdbs.write_10(lba=0, blocks=1), write=512, lun=lun)
    await client.send(command)
    assert isinstance(await client.receive(), R2T)
    return command


async def test_abort_task() -> None:
    async with serving() as target:
        client = await log_in(target, ("ImmediateData", "No"), ("InitialR2T", "Yes"))
        command = await pending_write(client)
        request = task_management(
            client,
            TaskFunction.ABORT_TASK,
            lun=command.lun,
            referenced_task_tag=command.itt,
            ref_cmd_sn=command.cmd_sn,
        )
        assert await manage(client, request) == TaskResponse.FUNCTION_COMPLETE
        again = replace(request, itt=client.next_itt(), exp_stat_sn=client.exp_stat_sn)
        assert await manage(client, again) == TaskResponse.TASK_DOES_NOT_EXIST
        assert target.ledger == []
        assert target.sessions[0].numbers.outstanding == 0


@pytest.mark.parametrize(
    ("function", "others", "attention"),
    [
        (TaskFunction.ABORT_TASK_SET, 1, False),
        (TaskFunction.CLEAR_TASK_SET, 1, False),
        (TaskFunction.LOGICAL_UNIT_RESET, 1, True),
        (TaskFunction.TARGET_WARM_RESET, 0, True),
    ],
)
async def test_resets(function: TaskFunction, others: int, attention: bool) -> None:
    async with serving(Disk(blocks=8), Disk(blocks=8, lun=300)) as target:
        client = await log_in(target, ("ImmediateData", "No"), ("InitialR2T", "Yes"))
        await pending_write(client)
        await pending_write(client, lun=300)
        assert await manage(client, task_management(client, function)) == TaskResponse.FUNCTION_COMPLETE
        assert target.sessions[0].numbers.outstanding == others
        result = await client.plain(cdbs.test_unit_ready())
        assert (result.sense is not None) == attention
        if result.sense is not None:
            assert (result.sense.asc, result.sense.ascq) == (0x29, 0x03)


@pytest.mark.parametrize(
    ("function", "lun", "response"),
    [
        (TaskFunction.LOGICAL_UNIT_RESET, 5, TaskResponse.LUN_DOES_NOT_EXIST),
        (TaskFunction.TASK_REASSIGN, 0, TaskResponse.REASSIGNMENT_NOT_SUPPORTED),
        (TaskFunction.CLEAR_ACA, 0, TaskResponse.FUNCTION_NOT_SUPPORTED),
    ],
)
async def test_task_management_that_is_refused(function: int, lun: int, response: int) -> None:
    async with serving() as target:
        client = await log_in(target)
        assert await manage(client, task_management(client, function, lun=luns.encode(lun))) == response


async def test_cold_reset_drops_the_connection() -> None:
    async with serving() as target:
        client = await log_in(target)
        assert await manage(client, task_management(client, TaskFunction.TARGET_COLD_RESET)) == 0
        assert await client.expect_end() == b""


@pytest.mark.parametrize(("reason", "cid", "response"), [(0, 0, 0), (1, 0, 0), (1, 9, 1), (2, 0, 2)])
async def test_logout(reason: int, cid: int, response: int) -> None:
    async with serving() as target:
        client = await log_in(target)
        await client.send(
            LogoutRequest(itt=5, reason=reason, cid=cid, cmd_sn=client.cmd_sn, exp_stat_sn=client.exp_stat_sn)
        )
        answer = await client.receive()
        assert isinstance(answer, LogoutResponse)
        assert answer.response == response
        if response == 0:
            assert await client.expect_end() == b""
            assert target.sessions == []


async def test_what_a_discovery_session_does_not_do() -> None:
    async with serving(clean=False) as target:
        client = Client(target.connect())
        await client.login(target=None)
        await client.send(client.command(cdbs.test_unit_ready()))
        reject = await client.receive()
        assert isinstance(reject, Reject)
        assert reject.reason == RejectReason.COMMAND_NOT_SUPPORTED
        await client.send(SnackRequest(itt=1))
        assert isinstance(await client.receive(), Reject)
        assert await manage(client, task_management(client, TaskFunction.ABORT_TASK)) == 5


async def test_a_tag_that_is_in_use_is_rejected() -> None:
    async with serving(clean=False) as target:
        client = await log_in(target, ("ImmediateData", "No"), ("InitialR2T", "Yes"))
        command = await pending_write(client)
        await client.send(replace(command, cmd_sn=client.next_cmd_sn()))
        reject = await client.receive()
        assert isinstance(reject, Reject)
        assert reject.reason == RejectReason.TASK_IN_PROGRESS


async def test_asynchronous_messages() -> None:
    async with serving() as target:
        client = await log_in(target)
        target.asynchronous(1, parameter3=10)
        message = await client.receive()
        assert isinstance(message, AsyncMessage)
        assert (message.event, message.parameter3, message.stat_sn) == (1, 10, 2)
        client.exp_stat_sn = 3
        assert good(await client.plain(cdbs.test_unit_ready()))


# --- digests ---


async def test_a_wrong_header_digest_ends_the_connection() -> None:
    async with serving(clean=False) as target:
        client = await log_in(target, ("HeaderDigest", "CRC32C"))
        data = bytearray(client.command(cdbs.test_unit_ready()).encode(header_digest=True))
        data[50] ^= 1
        await client.stream.send_all(data)
        assert await client.expect_end() == b""
        assert target.violations == ["a header digest that doesn't match"]


async def test_a_wrong_data_digest_fails_the_command_only() -> None:
    async with serving(clean=False) as target:
        client = await log_in(target, ("DataDigest", "CRC32C"), ("InitialR2T", "Yes"), ("ImmediateData", "Yes"))
        command = client.command(cdbs.write_10(lba=0, blocks=1), write=512, data=b"x" * 512)
        damaged = bytearray(command.encode(data_digest=True))
        damaged[60] ^= 1
        await client.stream.send_all(damaged)
        reject = await client.receive()
        assert isinstance(reject, Reject)
        assert (reject.reason, reject.data[16:20]) == (RejectReason.DATA_DIGEST_ERROR, command.itt.to_bytes(4, "big"))
        client.exp_stat_sn = reject.stat_sn + 1
        result = await client.write(cdbs.write_10(lba=0, blocks=1), b"y" * 512)
        assert good(result)
        assert target.disk().contents(blocks=1) == b"y" * 512


async def test_a_wrong_data_digest_of_data_out() -> None:
    async with serving(clean=False) as target:
        client = await log_in(target, ("DataDigest", "CRC32C"), ("InitialR2T", "Yes"), ("ImmediateData", "No"))
        command = client.command(cdbs.write_10(lba=0, blocks=1), write=512)
        await client.send(command)
        r2t = await client.receive()
        assert isinstance(r2t, R2T)
        client.data_digest = False
        await client.data_out(command, bytes(512), 0, 512, ttt=r2t.ttt)
        await client.stream.send_all(b"\1\2\3\4")
        client.data_digest = True
        result = await client.result(command)
        assert isinstance(result.pdus[0], Reject)
        assert result.sense
        assert (result.sense.key, result.sense.asc) == (SenseKey.ABORTED_COMMAND, 0x47)


# --- sessions ---


async def test_a_second_login_replaces_the_session_and_its_tasks() -> None:
    async with serving(login_attention=LoginAttention.STANDARD) as target:
        old = await log_in(target, ("ImmediateData", "No"), ("InitialR2T", "Yes"))
        result = await old.plain(cdbs.test_unit_ready())
        assert result.sense
        assert (result.sense.asc, result.sense.ascq) == (0x29, 0x00)
        await pending_write(old)
        new = await log_in(target)
        assert await old.expect_end() == b""
        result = await new.plain(cdbs.test_unit_ready())
        assert result.sense
        assert (result.sense.asc, result.sense.ascq) == (0x29, 0x07)
        assert good(await new.plain(cdbs.test_unit_ready()))
        assert [session.identity.isid for session in target.sessions] == [ISID]
        assert target.logins == 2


async def test_another_initiator_does_not_disturb() -> None:
    async with serving() as target:
        one = await log_in(target)
        two = Client(target.connect())
        await two.login(initiator="iqn.2000-01.org.example:other")
        assert good(await one.plain(cdbs.test_unit_ready()))
        assert good(await two.plain(cdbs.test_unit_ready()))
        assert len(target.sessions) == 2


async def test_a_power_cut() -> None:
    async with serving(login_attention=LoginAttention.STANDARD) as target:
        client = await log_in(target)
        await client.plain(cdbs.test_unit_ready())
        assert good(await client.write(cdbs.write_10(lba=0, blocks=1), b"a" * 512))
        assert good(await client.plain(cdbs.synchronize_cache()))
        assert good(await client.write(cdbs.write_10(lba=0, blocks=2), b"b" * 1024))
        assert good(await client.write(cdbs.write_10(lba=5, blocks=1, fua=True), b"c" * 512))
        assert target.power_cut() == 2
        with pytest.raises(EndOfStreamError):
            await client.receive()
        assert target.disk().contents(blocks=6) == b"a" * 512 + bytes(2048) + b"c" * 512
        client = await log_in(target)
        result = await client.plain(cdbs.test_unit_ready())
        assert result.sense
        assert (result.sense.asc, result.sense.ascq) == (0x29, 0x00)


async def test_a_file_is_synchronized_beside_everything_else(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    disk = Disk.from_file(image)
    started, go_on = threading.Event(), threading.Event()

    def slow_flush() -> None:
        started.set()
        go_on.wait(5)

    disk.backing.flush = slow_flush  # type: ignore[method-assign]
    async with serving(disk) as target:
        client = await log_in(target)
        command = client.command(cdbs.synchronize_cache())
        await client.send(command)
        await trio.to_thread.run_sync(started.wait)
        await client.send(NopOut(itt=99, immediate=True, cmd_sn=client.cmd_sn, exp_stat_sn=client.exp_stat_sn))
        answer = await client.receive()
        assert isinstance(answer, NopIn)
        go_on.set()
        assert good(await client.result(command))


@given(data=st.data())
@settings(max_examples=100)
def test_noise_ends_a_connection_and_nothing_else(data: st.DataObject) -> None:
    kinds: list[type[Pdu]] = [
        ScsiCommand,
        DataOut,
        NopOut,
        TaskManagementRequest,
        LogoutRequest,
        SnackRequest,
        TextRequest,
    ]
    noise = []
    for _ in range(data.draw(st.integers(1, 6))):
        pdu = data.draw(st.sampled_from(kinds))(
            itt=data.draw(st.integers(0, 3)), data=data.draw(st.binary(max_size=40))
        )
        raw = bytearray(pdu.encode())
        for _ in range(data.draw(st.integers(0, 6))):
            index = data.draw(st.integers(0, 47).filter(lambda index: index not in (4, 5, 6)))
            raw[index] = data.draw(st.integers(0, 255))
        # Mostly in the window, so that it isn't just ignored.
        raw[24:28] = data.draw(st.sampled_from([100, 100, 101, 102, 5000])).to_bytes(4, "big")
        noise.append(bytes(raw))

    async def main() -> None:
        async with serving(clean=False) as target:
            client = await log_in(target)
            with contextlib.suppress(trio.BrokenResourceError):
                for raw in noise:
                    await client.stream.send_all(raw)
            await trio.testing.wait_all_tasks_blocked()
            await client.stream.aclose()
            other = Client(target.connect())
            await other.login(initiator="iqn.2000-01.org.example:other")
            result = await other.read(cdbs.inquiry(allocation_length=36), 36)
            assert good(result)

    trio.run(main)


async def test_real_sockets() -> None:
    async with serving() as target:
        client = Client(await trio.open_tcp_stream(target.host, target.port))
        await client.login()
        data = pattern(1 << 20)
        assert good(await client.write(cdbs.write_10(lba=0, blocks=2048), data))
        result = await client.read(cdbs.read_10(lba=0, blocks=2048), len(data))
        assert result.data == data
        assert target.drop_connections() == 1
        assert await client.expect_end() == b""
        await client.stream.aclose()


def test_in_a_thread() -> None:
    target = LoopbackTarget(TargetConfig.of(Disk(blocks=8)))

    async def visit() -> None:
        client = Client(await trio.open_tcp_stream(target.host, target.port))
        await client.login()
        await client.logout()
        await client.stream.aclose()

    with pytest.raises(RuntimeError, match="doesn't run"):
        target.call(lambda: 1)
    with target.in_thread():
        assert target.url() == f"iscsi://127.0.0.1:{target.port}"
        trio.run(visit)
        assert target.call(lambda: target.logins) == 1
    with pytest.raises(RuntimeError, match="doesn't run"):
        target.connect()
    config = TargetConfig.of(Disk(blocks=8))
    config.hosts = ("192.0.2.1",)
    with pytest.raises(BaseExceptionGroup) as caught, LoopbackTarget(config).in_thread():
        raise AssertionError
    assert caught.group_contains(OSError)
