import json
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from initiator_kit import (
    DEFAULT_TARGET_NAME,
    LUN_0,
    at_once,
    config_of,
    conversation,
    pattern,
    portal_of,
    raw_portal,
    serving,
    settings_of,
    until,
)

from iscsifuse.errors import (
    CommandTimeoutError,
    ConnectError,
    IdentityError,
    IscsifuseError,
    LoginError,
    LoginTimeoutError,
    NothingFoundError,
    SessionLostError,
)
from iscsifuse.initiator import farewell, guards, revival
from iscsifuse.initiator import nexus as nexus_module
from iscsifuse.initiator import session as session_module
from iscsifuse.initiator.nexus import Nexus, NexusState, open_nexus
from iscsifuse.initiator.session import Session
from iscsifuse.initiator.settings import Portal
from iscsifuse.iscsi.pdu import Opcode, Pdu
from iscsifuse.iscsi.response import AsyncEvent, DataIn, Reject, RejectReason
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import Call, Change, Close, Cut, Drop, Late, Stall
from iscsifuse.testing.config import Redirect, TargetKeys
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Rule, all_of, is_a
from iscsifuse.testing.script import cdb as has_cdb
from iscsifuse.testing.target import LoopbackTarget

pytestmark = pytest.mark.expect_log("session lost|logged in again|can't log in again|trying the next portal")

READ, WRITE = has_cdb(0x28), has_cdb(0x2A)
COMMAND = is_a(Opcode.SCSI_COMMAND)
BLOCKS = 8192


def _disk() -> Disk:
    return Disk.from_bytes(pattern(BLOCKS * 512))


@asynccontextmanager
async def _open(target: LoopbackTarget, *more: Portal, **changes: Any) -> AsyncIterator[Nexus]:
    with trio.fail_after(20):
        async with open_nexus(DEFAULT_TARGET_NAME, [*more, portal_of(target)], settings_of(**changes)) as nexus:
            yield nexus


async def _read(nexus: Nexus, lba: int = 0, blocks: int = 1) -> bytes:
    memory = memoryview(bytearray(blocks * 512))
    task = await nexus.execute(cdbs.read(lba=lba, blocks=blocks), lun=LUN_0, buffer_in=memory, exact=True)
    assert task.status == Status.GOOD
    return bytes(memory)


async def _write(nexus: Nexus, data: bytes, lba: int) -> None:
    cdb = cdbs.write(lba=lba, blocks=len(data) // 512)
    task = await nexus.execute(cdb, lun=LUN_0, buffer_out=memoryview(data), exact=True)
    assert task.status == Status.GOOD


def _closed_port() -> Portal:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return Portal("127.0.0.1", listener.getsockname()[1])


# --- replay ---


KILLS: list[tuple[str, Rule]] = [
    ("status lost", Rule(OUT, match=has_cdb(0x28, 0x2A), nth=5, action=Close())),
    ("status lost, RST", Rule(OUT, match=has_cdb(0x28, 0x2A), nth=5, action=Close(reset=True))),
    ("command lost", Rule(IN, match=COMMAND, nth=5, action=Close())),
    ("data lost", Rule(IN, match=is_a(Opcode.DATA_OUT), nth=7, action=Close(reset=True))),
    ("R2T lost", Rule(OUT, match=is_a(Opcode.R2T), nth=3, action=Close())),
    ("torn data", Rule(OUT, match=is_a(Opcode.DATA_IN), nth=6, action=Cut(1000))),
    ("torn header", Rule(OUT, match=is_a(Opcode.DATA_IN), nth=6, action=Cut(30, reset=True))),
    ("torn status", Rule(OUT, match=is_a(Opcode.SCSI_RESPONSE), nth=3, action=Cut(47))),
    ("torn data out", Rule(IN, match=is_a(Opcode.DATA_OUT), nth=9, action=Cut(100))),
    ("everywhere", Rule(OUT, match=has_cdb(0x28, 0x2A), nth=10, times=0, chance=0.02, action=Close(reset=True))),
]


@pytest.mark.conformance(97)
@pytest.mark.conformance(98)
@pytest.mark.conformance(101)
@pytest.mark.parametrize("rule", [row[1] for row in KILLS], ids=[row[0] for row in KILLS])
async def test_nexus_connections_die_under_reads_and_writes(rule: Rule) -> None:
    disk = _disk()
    keys = TargetKeys(
        first_burst_length=8192, max_burst_length=32768, max_recv_data_segment_length=4096, default_time2wait=0
    )
    config = config_of(disk, keys=keys, window=16)
    config.script.add(rule)
    expected = bytearray(disk.contents())
    generator = random.Random(11)

    def read(nexus: Nexus, lba: int) -> Callable[[], Any]:
        return lambda: _read(nexus, lba, 64)

    def write(nexus: Nexus, lba: int) -> Callable[[], Any]:
        data = generator.randbytes(64 * 512)
        expected[lba * 512 : (lba + 64) * 512] = data
        return lambda: _write(nexus, data, lba)

    async with serving(config) as target, _open(target) as nexus:
        jobs = [(write if index % 2 else read)(nexus, index * 64) for index in range(60)]
        results = await at_once(*jobs, within=15)
        for index, result in enumerate(results):
            if index % 2:
                assert result is None
            else:
                assert result == expected[index * 64 * 512 : (index + 1) * 64 * 512]
        assert disk.contents() == expected
        assert nexus.reconnects == len(config.script.log)
        assert nexus.reconnects == target.logins - 1
        assert nexus.state is NexusState.LOGGED_IN
        assert nexus.report()["reconnects"] == nexus.reconnects
        assert nexus.report()["replays"] == sum(row.lost for row in nexus.statistics.rows()) > 0


async def test_nexus_a_command_that_always_kills_its_session_is_given_up() -> None:
    """After as long as it may wait for a session; not earlier, since it needn't be its fault."""
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, times=0, action=Close()))
    async with serving(config) as target, _open(target, reconnect_timeout=1) as nexus:
        began = trio.current_time()
        with pytest.raises(SessionLostError):
            await _read(nexus)
        assert trio.current_time() - began >= 1
        assert target.logins > 10


async def test_nexus_a_command_under_which_the_target_breaks_the_protocol_is_given_up_soon() -> None:
    def reject(pdu: Pdu) -> Pdu:
        assert isinstance(pdu, DataIn)
        return Reject(
            reason=RejectReason.PROTOCOL_ERROR,
            stat_sn=pdu.stat_sn,
            exp_cmd_sn=pdu.exp_cmd_sn,
            max_cmd_sn=pdu.max_cmd_sn,
            data=bytes([Opcode.SCSI_COMMAND]) + bytes(47),
        )

    config = config_of(_disk())
    config.script.add(Rule(OUT, match=READ, times=0, action=Change(reject)))
    async with serving(config) as target, _open(target, reconnect_timeout=60) as nexus:
        with pytest.raises(SessionLostError, match="rejected"):
            await _read(nexus)
        assert target.logins == 1 + nexus_module.MAX_REPLAYS


async def test_nexus_sessions_that_do_not_last_follow_each_other_ever_more_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(revival, "FIRST_BACK_OFF", 0.05)
    monkeypatch.setattr(revival, "LAST_BACK_OFF", 0.5)
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, times=0, action=Close()))
    async with serving(config) as target, _open(target, reconnect_timeout=1) as nexus:
        with pytest.raises(SessionLostError):
            await _read(nexus)
        assert 3 <= target.logins <= 18  # 0.1 s between them, less a quarter


@pytest.mark.conformance(98)
async def test_nexus_the_same_isid_and_no_tsih_again() -> None:
    async with serving(config_of(_disk())) as target, _open(target) as nexus:
        first = target.sessions[0].identity
        target.drop_connections()
        await _read(nexus)
        again = target.sessions[-1].identity
        assert again.isid == first.isid
        assert again.tsih != first.tsih
        assert nexus.report()["isid"] == first.isid.hex()
        async with _open(target) as other:
            await _read(other)
            assert target.sessions[-1].identity.isid != first.isid


@pytest.mark.conformance(102)
async def test_nexus_what_the_old_session_still_did_is_over_before_the_replay() -> None:
    """The target, not noticing that the connection is gone, still has the write; it must not come later."""
    disk = _disk()
    config = config_of(disk)
    config.script.add(Rule(IN, match=all_of(WRITE, COMMAND), action=Late(0.4)))
    async with serving(config) as target, _open(target) as nexus:

        async def cut() -> None:
            await until(lambda: nexus.session.connection.tasks)
            nexus.session.fail(SessionLostError("the cable was pulled"))

        await at_once(lambda: _write(nexus, b"a" * 512, 0), cut)
        await _write(nexus, b"b" * 512, 0)
        await trio.sleep(0.5)
        assert disk.contents(lba=0, blocks=1) == b"b" * 512


@pytest.mark.conformance(99)
async def test_nexus_a_second_loss_during_recovery() -> None:
    config = config_of(_disk())
    login = is_a(Opcode.LOGIN_RESPONSE)
    config.script.add(Rule(OUT, match=login, nth=3, action=Close()))
    config.script.add(Rule(OUT, match=login, nth=4, action=Cut(50, reset=True)))
    async with serving(config) as target, _open(target) as nexus:
        target.drop_connections()
        assert await _read(nexus) == pattern(512)
        assert nexus.reconnects == 1


@pytest.mark.conformance(86)
@pytest.mark.conformance(99)
@pytest.mark.parametrize("how", ["negotiated", "told"])
async def test_nexus_waits_as_long_as_the_target_asked(how: str) -> None:
    keys = TargetKeys(default_time2wait=1 if how == "negotiated" else 0)
    async with serving(config_of(_disk(), keys=keys)) as target, _open(target) as nexus:
        began = trio.current_time()
        if how == "negotiated":
            target.drop_connections()
        else:
            target.asynchronous(AsyncEvent.SESSION_DROPPED, parameter2=1)
        await _read(nexus)
        if nexus.reconnects == 0:  # the news had not come yet
            await _noticed(nexus)
            await _read(nexus)
        assert 1.0 <= trio.current_time() - began < 2.0


async def test_nexus_a_target_that_asks_for_a_logout_gets_a_new_login() -> None:
    async with serving(config_of(_disk(), latency=0.05)) as target, _open(target) as nexus:
        jobs = [lambda lba=lba: _read(nexus, lba) for lba in range(20)]

        async def ask() -> None:
            await trio.sleep(0.02)
            target.asynchronous(AsyncEvent.LOGOUT_REQUESTED, parameter3=1)
            await trio.sleep(0.05)
            assert await _read(nexus, 77) == pattern(78 * 512)[77 * 512 :]

        results = await at_once(*jobs, ask)
        assert results == [pattern(21 * 512)[lba * 512 : (lba + 1) * 512] for lba in range(20)] + [None]
        assert nexus.reconnects == 1


# --- waiting has an end ---


async def test_nexus_waiters_are_told_when_the_time_is_over_and_later_it_heals() -> None:
    config = config_of(_disk())
    refuse = Rule(OUT, match=is_a(Opcode.LOGIN_RESPONSE), times=0, action=Close())
    async with serving(config) as target, _open(target, reconnect_timeout=0.4) as nexus:
        await _read(nexus)
        config.script.add(refuse)
        target.drop_connections()
        await until(lambda: nexus.state is NexusState.LOST)
        began = trio.current_time()
        results = await at_once(*[lambda: _read(nexus) for _ in range(5)])
        assert 0.3 <= trio.current_time() - began < 1
        assert all(isinstance(result, SessionLostError) for result in results)
        assert "no session with" in str(results[0])
        assert "ended the connection during the login" in str(results[0])
        began = trio.current_time()
        with pytest.raises(SessionLostError):
            await _read(nexus)
        assert trio.current_time() - began < 0.1  # at once
        config.script.clear()
        await until(lambda: nexus.state is NexusState.LOGGED_IN)
        assert await _read(nexus) == pattern(512)
        assert nexus.reconnects == 1


async def test_nexus_commands_under_way_wait_no_longer_either() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, action=Call(lambda: config.script.add(refuse))))
    config.script.add(Rule(OUT, match=READ, action=Close()))
    refuse = Rule(OUT, match=is_a(Opcode.LOGIN_RESPONSE), times=0, action=Close())
    async with serving(config) as target, _open(target, reconnect_timeout=0.3) as nexus:
        began = trio.current_time()
        with pytest.raises(SessionLostError):
            await _read(nexus)
        assert 0.25 <= trio.current_time() - began < 1


async def test_nexus_no_waiting_at_all() -> None:
    config = config_of(_disk())
    config.script.add(Rule(OUT, match=READ, action=Close()))
    async with serving(config) as target, _open(target, reconnect_timeout=0) as nexus:
        with pytest.raises(SessionLostError):
            await _read(nexus)
        await until(lambda: nexus.state is NexusState.LOGGED_IN and nexus.reconnects == 1)
        assert await _read(nexus) == pattern(512)


async def test_nexus_waiting_for_ever() -> None:
    config = config_of(_disk())
    async with serving(config) as target, _open(target, reconnect_timeout=-1) as nexus:
        target.drop_connections()
        await _noticed(nexus)
        assert nexus.give_up_at == float("inf")
        assert await _read(nexus) == pattern(512)


async def test_nexus_a_waiter_can_be_cancelled() -> None:
    config = config_of(_disk())
    async with serving(config) as target, _open(target, reconnect_timeout=-1) as nexus:
        config.script.add(Rule(OUT, match=is_a(Opcode.LOGIN_RESPONSE), times=0, action=Stall()))
        target.drop_connections()
        await until(lambda: nexus.state is NexusState.LOST)
        with trio.move_on_after(0.1) as scope:
            await _read(nexus)
        assert scope.cancelled_caught


@pytest.mark.expect_log("aborting it")
async def test_nexus_a_command_past_its_deadline_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "ABORT_LIMIT", 0.1)
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, times=0, action=Late(60)))
    config.script.add(Rule(IN, match=is_a(Opcode.TASK_MANAGEMENT_REQUEST), times=0, action=Drop()))
    async with serving(config) as target, _open(target, timeout=0.2) as nexus:
        began = trio.current_time()
        with pytest.raises(CommandTimeoutError):
            await _read(nexus)
        assert trio.current_time() - began < 1
        await until(lambda: nexus.reconnects == 1)


# --- closing ---


async def test_nexus_close_logs_out() -> None:
    logouts: list[int] = []
    config = config_of(_disk())
    config.script.add(Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Call(lambda: logouts.append(1))))
    async with serving(config) as target:
        async with _open(target) as nexus:
            await _read(nexus)
        assert nexus.state is NexusState.CLOSED
        assert logouts == [1]
        with pytest.raises(SessionLostError, match="it was closed"):
            await _read(nexus)
        await nexus.close()


async def _noticed(nexus: Nexus) -> None:
    """The loss was seen; the next login may have come already."""
    await until(lambda: nexus.state is NexusState.LOST or nexus.reconnects)


async def _lost(target: LoopbackTarget, nexus: Nexus) -> None:
    """The session is lost, and the next login doesn't come to an end."""
    target.script.add(Rule(OUT, match=is_a(Opcode.LOGIN_RESPONSE), times=0, action=Stall()))
    target.drop_connections()
    await until(lambda: nexus.state is NexusState.LOST)


async def _refused(target: LoopbackTarget, nexus: Nexus) -> None:
    target.script.add(Rule(OUT, match=is_a(Opcode.LOGIN_RESPONSE), times=0, action=Close()))
    target.drop_connections()
    await until(lambda: nexus.state is NexusState.LOST)


async def _guarded(target: LoopbackTarget, nexus: Nexus) -> None:
    """The session is lost, and a guard hangs on the new one."""
    target.script.add(Rule(IN, match=has_cdb(0x00), action=Late(60)))
    asked = trio.Event()

    async def guard(session: Session) -> bool:
        asked.set()
        await session.execute(cdbs.test_unit_ready(), lun=LUN_0)
        return True

    nexus.add_guard(guard)
    target.drop_connections()
    await asked.wait()


async def _silent(target: LoopbackTarget, _: Nexus) -> None:
    target.script.add(Rule(IN, times=0, action=Drop()))


async def _fine(_: LoopbackTarget, nexus: Nexus) -> None:
    await _read(nexus)


@pytest.mark.parametrize("waiters", [0, 3])
@pytest.mark.parametrize("situation", [_fine, _lost, _refused, _guarded, _silent])
@pytest.mark.conformance(105)
async def test_nexus_close_ends_promptly_in_the_midst_of(
    situation: Callable[[LoopbackTarget, Nexus], Any], waiters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(farewell, "LOGOUT_LIMIT", 0.4)
    async with serving(config_of(_disk())) as target, conversation(5) as nursery:
        results: list[object] = []
        async with _open(target, reconnect_timeout=-1) as nexus:
            await situation(target, nexus)

            async def wait() -> None:
                results.extend(await at_once(lambda: _read(nexus)))

            for _ in range(waiters):
                nursery.start_soon(wait)
            await trio.sleep(0.05)
            began = trio.current_time()
        assert trio.current_time() - began < 1
        await until(lambda: len(results) == waiters, seconds=1)
        if situation is not _fine:
            assert all(isinstance(result, SessionLostError) for result in results)


async def test_nexus_close_after_commands_under_way() -> None:
    async with serving(config_of(_disk(), latency=0.2)) as target, conversation() as nursery:
        results: list[object] = []

        async def read(nexus: Nexus) -> None:
            results.extend(await at_once(lambda: _read(nexus)))

        async with _open(target) as nexus:
            nursery.start_soon(read, nexus)
            await until(lambda: nexus.session.connection.tasks)
        await until(lambda: results)
        assert results == [pattern(512)]


async def test_nexus_cancelled_logs_out_all_the_same() -> None:
    logouts: list[int] = []
    config = config_of(_disk(), latency=0.2)
    config.script.add(Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Call(lambda: logouts.append(1))))
    done: list[str] = []
    async with serving(config) as target:
        with trio.move_on_after(0.1) as scope:
            async with _open(target) as nexus:
                await _write(nexus, b"x" * 512, 3)
                done.append("write")
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert done == ["write"]  # it was under way, and its end is known
        assert logouts == [1]
        assert target.disk().contents(lba=3, blocks=1) == b"x" * 512


async def test_nexus_cancelled_is_bounded_though_a_command_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nexus_module, "LAST_WORDS", 0.3)
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, action=Late(60)))
    async with serving(config) as target:
        began = trio.current_time()
        with trio.move_on_after(0.1) as scope:
            async with _open(target, timeout=60) as nexus:
                await _read(nexus)
        assert scope.cancelled_caught
        assert trio.current_time() - began < 1.5


async def test_nexus_a_cancelled_caller_is_told_so_even_if_its_session_died() -> None:
    config = config_of(_disk())
    config.script.add(Rule(IN, match=READ, action=Late(60)))
    async with serving(config) as target, _open(target, reconnect_timeout=0) as nexus, conversation() as nursery:
        scope = trio.CancelScope()

        async def read() -> None:
            with scope:
                await _read(nexus)

        nursery.start_soon(read)
        await until(lambda: nexus.session.connection.tasks)
        scope.cancel()
        target.drop_connections()
        await until(lambda: scope.cancelled_caught)


async def test_nexus_nobody_waits_for_ever_when_it_was_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiter that a cancellation doesn't reach is told all the same."""
    monkeypatch.setattr(nexus_module, "LAST_WORDS", 0.2)
    config = config_of(_disk())
    results: list[object] = []
    async with serving(config) as target:

        async def shielded(nexus: Nexus) -> None:
            with trio.CancelScope(shield=True):
                results.extend(await at_once(lambda: _read(nexus)))

        with trio.move_on_after(0.3):
            async with _open(target, reconnect_timeout=-1) as nexus:
                await _refused(target, nexus)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(shielded, nexus)
        assert isinstance(results[0], SessionLostError)


# --- opening ---


async def test_nexus_portals_are_tried_in_order() -> None:
    async with serving(config_of(_disk())) as target:
        tried: list[str] = []

        async def silent(_: trio.SocketStream) -> None:
            tried.append("silent")
            await trio.sleep_forever()

        async with (
            raw_portal(silent) as portal,
            _open(target, _closed_port(), portal, login_timeout=0.3) as nexus,
        ):
            assert tried == ["silent"]
            assert nexus.portal == portal_of(target)
            assert nexus.report()["portal"] == target.portal


async def test_nexus_a_target_that_says_no_is_not_asked_elsewhere() -> None:
    async with serving(config_of(_disk())) as target:
        portals = [portal_of(target), _closed_port()]
        with pytest.raises(NothingFoundError):
            async with open_nexus("iqn.2026-11.io.github.iscsifuse:other", portals, settings_of()):
                pass


async def test_nexus_recovery_goes_to_another_portal_and_begins_with_the_first() -> None:
    first_config, second_config = config_of(_disk()), config_of(_disk())
    async with serving(first_config) as first, serving(second_config) as second:
        portals = [portal_of(first), portal_of(second)]
        async with open_nexus(DEFAULT_TARGET_NAME, portals, settings_of()) as nexus:
            assert nexus.portal == portals[0]
            first_config.script.add(Rule(OUT, match=is_a(Opcode.LOGIN_RESPONSE), times=0, action=Close()))
            first.drop_connections()
            await until(lambda: nexus.portal == portals[1])
            await _read(nexus)
            first_config.script.clear()
            second.drop_connections()
            await until(lambda: nexus.portal == portals[0])
            await _read(nexus)


@pytest.mark.conformance(22)
async def test_nexus_recovery_begins_at_the_original_portal_not_where_it_was_redirected_to() -> None:
    async with serving(config_of(_disk())) as there, serving(config_of(_disk())) as elsewhere:
        config = config_of(_disk())
        config.nodes[0].redirect = Redirect(there.portal)
        async with serving(config) as here, _open(here) as nexus:
            assert nexus.portal == portal_of(there)
            config.nodes[0].redirect = Redirect(elsewhere.portal)
            there.drop_connections()
            await until(lambda: nexus.portal == portal_of(elsewhere))
            await _read(nexus)


async def _stall(_: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def _rubbish(stream: trio.SocketStream) -> None:
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(48))
    await trio.sleep_forever()


async def _end(stream: trio.SocketStream) -> None:
    await stream.receive_some()


@pytest.mark.parametrize(
    ("handler", "kind"), [(_stall, LoginTimeoutError), (_rubbish, IscsifuseError), (_end, LoginError)]
)
async def test_nexus_opening_fails_with_one_plain_error(handler: Any, kind: type[IscsifuseError]) -> None:
    async with raw_portal(handler) as portal:
        with pytest.raises(kind):
            async with open_nexus(DEFAULT_TARGET_NAME, [portal], settings_of(login_timeout=0.2)):
                pytest.fail("not to be reached")
    with pytest.raises(ConnectError):
        async with open_nexus(DEFAULT_TARGET_NAME, [_closed_port(), _closed_port()], settings_of()):
            pytest.fail("not to be reached")


@pytest.mark.parametrize("error", [ValueError("x"), SessionLostError("x"), KeyboardInterrupt(), SystemExit(3)])
async def test_nexus_exceptions_of_the_body_are_not_grouped(error: BaseException) -> None:
    async with serving(config_of(_disk())) as target:
        with pytest.raises(type(error)) as caught:
            async with _open(target):
                raise error
        assert caught.value is error


async def test_nexus_exceptions_of_the_body_while_the_session_is_lost() -> None:
    async with serving(config_of(_disk())) as target:

        async def body() -> None:
            async with _open(target) as nexus:
                await _refused(target, nexus)
                raise ValueError("x")

        with pytest.raises(ValueError, match="x"):
            await body()


async def test_nexus_the_body_ends_at_once() -> None:
    async with serving(config_of(_disk())) as target:
        for _ in range(5):
            async with _open(target):
                pass
        await until(lambda: not target.sessions)


async def test_nexus_report_is_json() -> None:
    async with serving(config_of(_disk())) as target, _open(target) as nexus:
        await _read(nexus)
        report = json.loads(json.dumps(nexus.report()))
        assert report["target"] == DEFAULT_TARGET_NAME
        assert report["state"] == "logged in"
        assert report["keys"]["MaxRecvDataSegmentLength"] == "262144"
        assert (report["in_flight"], report["queued"], report["last_error"]) == (0, 0, None)


# --- guards and barred units ---


async def test_nexus_guards_are_asked_before_commands_flow() -> None:
    order: list[str] = []
    config = config_of(_disk())
    async with serving(config) as target, _open(target) as nexus:

        async def guard(session: Session) -> bool:
            await session.execute(cdbs.test_unit_ready(), lun=LUN_0)
            await trio.sleep(0.1)
            order.append("guard")
            return True

        nexus.add_guard(guard)
        nexus.add_guard(guard)

        async def read() -> None:
            await _read(nexus)
            order.append("read")

        target.drop_connections()
        await until(lambda: nexus.state is NexusState.LOST)
        await at_once(read, read)
        assert order == ["guard", "guard", "read", "read"]


async def test_nexus_a_session_that_dies_under_a_guard_is_replaced() -> None:
    config = config_of(_disk())
    config.script.add(Rule(OUT, match=has_cdb(0x00), times=2, action=Close()))
    asked = 0

    async def guard(session: Session) -> bool:
        nonlocal asked
        asked += 1
        await session.execute(cdbs.test_unit_ready(), lun=LUN_0)
        return True

    async with serving(config) as target, _open(target) as nexus:
        nexus.add_guard(guard)
        target.drop_connections()
        await _noticed(nexus)
        assert await _read(nexus) == pattern(512)
        assert asked == 3
        assert nexus.reconnects == 1


@pytest.mark.conformance(100)
@pytest.mark.parametrize("error", [IdentityError("another disk"), SessionLostError("can't tell")])
async def test_nexus_what_waits_for_a_replay_does_not_reach_a_barred_unit(
    error: IdentityError | SessionLostError,
) -> None:
    disk = _disk()
    config = config_of(disk)
    config.script.add(Rule(IN, match=all_of(WRITE, COMMAND), action=Close()))
    async with serving(config) as target, _open(target) as nexus:

        async def guard(_: Session) -> bool:
            nexus.bar(LUN_0, error)
            return True

        nexus.add_guard(guard)
        results = await at_once(*[lambda lba=lba: _write(nexus, b"!" * 512, lba) for lba in range(4)])
        assert all(type(result) is type(error) and str(result) == str(error) for result in results)
        assert nexus.reconnects == 1
        assert target.engine().executed("WRITE(10)") == []
        assert disk.contents() == pattern(BLOCKS * 512)
        with pytest.raises(type(error)):
            await _read(nexus)
        nexus.bar(LUN_0, None)
        nexus.bar(LUN_0, None)
        await _read(nexus)


async def test_nexus_a_guard_that_cannot_tell_is_asked_again_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guards, "ASK_AGAIN_AFTER", 0.05)
    answers = iter([False, False, True])
    asked: list[float] = []

    async def guard(_: Session) -> bool:
        asked.append(trio.current_time())
        return next(answers)

    async with serving(config_of(_disk())) as target, _open(target) as nexus:
        nexus.add_guard(guard)
        target.drop_connections()
        await until(lambda: nexus.reconnects == 1)
        await _read(nexus)
        assert len(asked) <= 2
        await until(lambda: len(asked) == 3)
        await trio.sleep(0.15)
        assert len(asked) == 3


async def test_nexus_sessions_never_wait_for_a_command_that_was_given_up() -> None:
    """Lots of cancelled callers, and a connection that dies: nothing is left over."""
    config = config_of(_disk(), latency=0.02)
    config.script.add(Rule(OUT, match=READ, nth=30, action=Close(reset=True)))
    generator = random.Random(4)
    async with serving(config) as target, _open(target) as nexus:
        async with conversation(15) as nursery:

            async def some() -> None:
                for _ in range(10):
                    with trio.move_on_after(generator.random() * 0.05):
                        await _read(nexus, generator.randrange(1000), 8)

            for _ in range(10):
                nursery.start_soon(some)
        await until(lambda: nexus.state is NexusState.LOGGED_IN)
        await _read(nexus)
        assert nexus.session.connection.idle
