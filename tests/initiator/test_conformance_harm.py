"""Cases B1, B2 and B10: a target that means harm.

Each test names its case; its docstring says what the target does → what the initiator must do.
"""

import socket
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

import pytest
import trio
import trio.testing
from feature_phase_kit import (
    COMMAND,
    READ,
    RECOVERY,
    RESPONSE,
    WRITE,
    Bench,
    altered,
    bench,
    content,
    jumping,
    nexus_bench,
    unit_bench,
)
from initiator_fakes import sense
from initiator_kit import LUN_0, at_once, conversation

from iscsifuse.errors import CommandError, CommandTimeoutError, SessionLostError
from iscsifuse.initiator import backlog, farewell
from iscsifuse.iscsi.pdu import NO_LUN, Opcode, Pdu
from iscsifuse.iscsi.request import DataOut
from iscsifuse.iscsi.response import R2T, NopIn, ScsiResponse
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.sense import SenseKey
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import Answer, ChangeBytes, Pass, Pause, Stall, Step
from iscsifuse.testing.config import TargetKeys
from iscsifuse.testing.script import IN, OUT, Match, all_of, is_a

ASKED_ONLY = TargetKeys(initial_r2t=True, immediate_data=False, default_time2wait=0)
DATA = content(100, 16)


# --- B1, B2 ---


@pytest.mark.conformance("B1")
@pytest.mark.conformance(61)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0xFFFFF000, 0x2000), (0xFFFFFFFF, 1), (0, 0xFFFFFFFF), (8191, 2), (8192, 1), (0x80000000, 512)],
)
async def test_b1_an_r2t_beyond_the_write(offset: int, length: int) -> None:
    """An R2T at offset 0xFFFFF000 for 0x2000 bytes, and its like → not one byte is sent for it, not even a slice
    that came out shorter; the session is dropped, and the write is right on a new one."""
    async with nexus_bench(keys=ASKED_ONLY) as b:
        b.rule(OUT, altered(buffer_offset=offset, desired_data_transfer_length=length), is_a(Opcode.R2T))
        assert (await b.write(DATA)).status == Status.GOOD
        assert b.target.logins == 2
        assert len(b.tape.sent(DataOut)) == 1  # on the second session
        assert b.disk.contents(blocks=16) == DATA


def _claiming(*, words: int = 0, length: int) -> ChangeBytes:
    """A header that announces additional headers, which come, and data, which doesn't."""
    return ChangeBytes(
        lambda data: data[:4] + bytes([words]) + length.to_bytes(3, "big") + data[8:48] + bytes(4 * words)
    )


@pytest.mark.conformance("B2")
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize(("words", "length"), [(0, 0xFFFFFF), (255, 0), (255, 0xFFFFFF), (0, 262145), (1, 512)])
@pytest.mark.parametrize(
    "match", [all_of(READ, is_a(Opcode.DATA_IN)), RESPONSE, is_a(Opcode.NOP_IN)], ids=["Data-In", "status", "NOP-In"]
)
async def test_b2_lengths_that_nobody_agreed_to(match: Match, words: int, length: int) -> None:
    """DataSegmentLength of 16 MiB, or one more than agreed; AHS of 255 words → refused at the header, before any
    memory is taken for it; the read is right on a new session."""
    async with nexus_bench(strict=False, status_in_data=False) as b:
        assert await b.read(1) == content(1)
        b.rule(OUT, _claiming(words=words, length=length), match)
        tracemalloc.start()
        try:
            b.target.ping()
            assert await b.read(7) == content(7)
            await b.reconnected()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 4 << 20


# --- B10: floods that aren't read ---


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that is reached sooner; see `_narrowed`."""
    monkeypatch.setattr(backlog, "BACKLOG_LIMIT", 1 << 20)


def _narrowed(b: Bench) -> trio.SocketStream:
    """The target's end of a connection for which the kernel keeps little, so that what isn't read waits at its
    sender."""
    stream = cast("trio.SocketStream", b.peer.wire._stream)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    b.session.transport._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    return stream


async def _pour(stream: trio.SocketStream, flood: bytes, *, until: Callable[[], object]) -> None:
    """Send the same again and again."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while not until():
            await stream.send_all(flood)


def _pings(count: int, *, size: int = 0, ttt: int = 1) -> bytes:
    ping = NopIn(ttt=ttt, lun=NO_LUN, stat_sn=1, exp_cmd_sn=1, max_cmd_sn=128, data=bytes(size))
    return ping.encode() * count


@pytest.mark.conformance("B10")
@pytest.mark.usefixtures("narrow")
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("size", [0, 4096])
async def test_b10_pings_without_end_whose_answers_are_not_read(size: int) -> None:
    """Pings without end, and nothing is read → no more than BACKLOG_LIMIT of answers waits: the session is ended
    with a sentence that says why, and logged in again."""
    async with nexus_bench(strict=False) as b, conversation(30) as nursery:
        session, stream = b.session, _narrowed(b)
        b.rule(IN, Stall(), is_a(Opcode.NOP_OUT))
        most = 0

        def over() -> bool:
            nonlocal most
            most = max(most, session.transport.backlog)
            return session.error is not None

        flood = _pings(65536 // (48 + size), size=size)
        nursery.start_soon(partial(_pour, stream, flood, until=over))
        await b.until(lambda: session.error, seconds=25)
        assert "doesn't read the answers (1 MiB of them wait)" in str(session.error)
        assert most <= (1 << 20) + 2 * 65536
        await b.reconnected()
        assert await b.read(7) == content(7)


@pytest.mark.conformance("B10")
@pytest.mark.usefixtures("narrow")
@pytest.mark.expect_log(RECOVERY)
async def test_b10_r2ts_without_end_whose_data_is_not_read() -> None:
    """R2Ts for the same megabyte again and again, and nothing is read → what waits is at most what the write has,
    and BACKLOG_LIMIT; then the session is ended, and the write is right on a new one."""
    data = DATA * 128
    async with nexus_bench(keys=ASKED_ONLY, strict=False) as b, conversation(30) as nursery:
        b.hold(times=1)
        b.rule(IN, Stall(), is_a(Opcode.DATA_OUT))
        session, stream = b.session, _narrowed(b)
        results: list[Any] = []

        async def write() -> None:
            results.append(await b.write(data))

        nursery.start_soon(write)
        command = await b.taken()
        most = 0
        for number in range(16):
            r2t = R2T(
                itt=command.itt,
                lun=command.lun,
                ttt=number,
                r2t_sn=number,
                exp_cmd_sn=command.cmd_sn + 1,
                max_cmd_sn=command.cmd_sn + 8,
                stat_sn=command.exp_stat_sn,
                desired_data_transfer_length=1 << 20,
            )
            with suppress(trio.BrokenResourceError):
                await stream.send_all(r2t.encode())
            await trio.testing.wait_all_tasks_blocked(0.01)
            most = max(most, session.transport.backlog)
            if session.error is not None:
                break
        assert number == 2  # the second one fits into what is allowed, just as well as the first
        assert "doesn't read the answers" in str(session.error)
        assert most <= 3 << 20
        await b.until(lambda: results)
        assert results[0].status == Status.GOOD
        assert b.disk.contents(blocks=2048) == data
        assert b.target.logins == 2


@pytest.mark.conformance("B10")
@pytest.mark.usefixtures("narrow")
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("asked", [True, False])
async def test_b10_writes_that_are_failed_without_being_read(asked: bool) -> None:
    """Each write is failed, its data asked for or sent unasked, and not one byte is read → what is left of them isn't
    kept for ever: the session is ended at BACKLOG_LIMIT."""
    keys = ASKED_ONLY if asked else TargetKeys(default_time2wait=0)
    async with nexus_bench(keys=keys, strict=False) as b, conversation(30) as nursery:
        b.rule(IN, Stall(), all_of(WRITE, COMMAND))
        session, stream = b.session, _narrowed(b)
        failed = 0

        async def write() -> None:
            nonlocal failed
            while session.error is None:
                with suppress(SessionLostError):
                    await session.execute(
                        cdbs.write(lba=0, blocks=512), lun=LUN_0, buffer_out=memoryview(DATA * 32), exact=True
                    )
                    failed += 1

        nursery.start_soon(write)
        for number in range(1, 100):
            numbers: dict[str, Any] = {"exp_cmd_sn": number + 1, "max_cmd_sn": number + 8, "stat_sn": 2 + number}
            await b.until(lambda: session.connection.tasks or session.error)
            if session.error is not None:
                break
            (itt,) = session.connection.tasks
            r2t = R2T(itt=itt, lun=LUN_0, ttt=1, desired_data_transfer_length=1 << 18, **numbers)
            status = ScsiResponse(
                itt=itt, status=Status.BUSY, **{**numbers, "stat_sn": session.connection.exp_stat_sn}
            )
            with suppress(trio.BrokenResourceError):
                await stream.send_all((r2t.encode() if asked else b"") + status.encode())
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert failed <= 10
        assert "doesn't read the answers" in str(session.error)


# --- B10: floods that are read ---


@pytest.mark.conformance("B10")
@pytest.mark.parametrize("kind", ["pings", "news"])
async def test_b10_a_flood_of_nop_in_leaves_room_for_work(kind: str) -> None:
    """NOP-In without end, to be answered or not, as fast as the connection takes them → reads and writes go on,
    and closing it all takes its usual time."""
    over = False
    async with conversation(30) as nursery:
        async with nexus_bench(strict=False) as b:
            flood = _pings(1000, ttt=1 if kind == "pings" else 0xFFFFFFFF)
            stream = cast("trio.SocketStream", b.peer.wire._stream)
            lock = trio.Lock()
            send_all = stream.send_all

            async def whole(data: bytes) -> None:
                async with lock:  # two tasks send: the target's own writer, and the flood
                    await send_all(data)

            stream.send_all = whole  # type: ignore[method-assign, assignment]
            nursery.start_soon(partial(_pour, stream, flood, until=lambda: over))
            results = await at_once(
                *[partial(b.read, lba) for lba in range(50)], partial(b.write, DATA, 300), within=20
            )
            assert results[:50] == [content(lba) for lba in range(50)]
            assert b.session.error is None
            began = time.monotonic()
        over = True
        assert time.monotonic() - began < farewell.LOGOUT_LIMIT + 1
    assert b.disk.contents(lba=300, blocks=16) == DATA


@pytest.mark.conformance("B10")
@pytest.mark.parametrize(
    ("answer", "attempts"),
    [
        (Answer(Status.BUSY), range(50, 100)),
        (Answer(Status.TASK_SET_FULL), range(50, 100)),
        (Answer(Status.CHECK_CONDITION, sense(SenseKey.UNIT_ATTENTION, 0x29)), range(11, 12)),
        (Answer(Status.CHECK_CONDITION, sense(SenseKey.UNIT_ATTENTION, 0x2A, 0x09)), range(11, 12)),
    ],
    ids=["BUSY", "TASK SET FULL", "UNIT ATTENTION 29/00", "UNIT ATTENTION 2A/09"],
)
@jumping
async def test_b10_a_flood_of_statuses_is_bounded_in_time(answer: Answer, attempts: range) -> None:
    """BUSY, TASK SET FULL, UNIT ATTENTION for ever → EIO within the command's time (60 s), after a bounded number
    of attempts; then everything works again."""
    async with unit_bench(settings={"timeout": 60}) as b:
        b.rule(IN, answer, all_of(READ, COMMAND), times=0)
        began = trio.current_time()
        before = len(b.target.script.log)
        with pytest.raises(CommandError) as caught:
            await b.unit.read_into(memoryview(bytearray(512)), lba=0)
        assert caught.value.errno == 5
        assert trio.current_time() - began <= 60
        assert len(b.target.script.log) - before in attempts
        b.target.script.clear()
        memory = memoryview(bytearray(512))
        await b.unit.read_into(memory, lba=7)
        assert memory == content(7)


class _ByteByByte:
    """Each PDU a byte at a time."""

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        steps: list[Step] = []
        for byte in encode(pdu):
            steps += [Pass(bytes([byte])), Pause(0)]
        return steps


@pytest.mark.conformance("B10")
async def test_b10_one_byte_at_a_time() -> None:
    """Everything comes one byte at a time → reads and writes are right; one look at the socket for each byte is
    the most that is done."""
    async with bench(strict=False, keys=ASKED_ONLY, settings={"timeout": 60}) as b:
        b.rule(OUT, _ByteByByte(), lambda _: True, times=0)
        looks = 0
        receive_now = b.session.transport.receive_now

        def counted(buffers: list[memoryview]) -> int | None:
            nonlocal looks
            looks += 1
            return receive_now(buffers)

        b.session.transport.receive_now = counted  # type: ignore[method-assign]
        before = b.session.transport.bytes_received
        results: list[Any] = await at_once(partial(b.read, 7, 8), partial(b.write, DATA, 300), within=30)
        assert results[0] == content(7, 8)
        assert results[1].status == Status.GOOD
        assert looks <= 2 * (b.session.transport.bytes_received - before) + 10
    assert b.disk.contents(lba=300, blocks=16) == DATA


@pytest.mark.conformance("B10")
@pytest.mark.expect_log(RECOVERY, "aborting it")
@jumping
async def test_b10_a_trickle_does_not_keep_anything_up() -> None:
    """One byte of an answer every 4 seconds, which is a sign of life → the command has its deadline all the same,
    and closing takes its usual time."""
    async with conversation(1000) as nursery:
        results: list[Any] = []
        async with nexus_bench(strict=False, settings={"timeout": 30, "reconnect_timeout": 0}) as b:
            b.rule(OUT, _Trickle(), all_of(READ, is_a(Opcode.DATA_IN)))

            async def read() -> None:
                results.extend(await at_once(b.read, within=500))

            nursery.start_soon(read)
            began = trio.current_time()
            await b.until(lambda: results, seconds=100)
            assert isinstance(results[0], CommandTimeoutError)
            assert trio.current_time() - began <= 45
            began = trio.current_time()
        assert trio.current_time() - began <= farewell.LOGOUT_LIMIT + 1


class _Trickle:
    """A byte every four seconds."""

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        steps: list[Step] = []
        for byte in encode(pdu):
            steps += [Pass(bytes([byte])), Pause(4.0)]
        return steps
