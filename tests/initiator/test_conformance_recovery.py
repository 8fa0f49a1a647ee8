"""Cases 97 to 103, and 105: connections that end anywhere, the session that comes back, what was written meanwhile.

Each test names its case; its docstring says what the target does → what the initiator must do.
"""

import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import pytest
import trio
from feature_phase_kit import (
    COMMAND,
    DATA_IN,
    READ,
    RECOVERY,
    RESPONSE,
    WRITE,
    Bench,
    content,
    file_bench,
    jumping,
    nexus_bench,
    unit_bench,
)
from initiator_kit import DEFAULT_TARGET_NAME, at_once, conversation, portal_of, settings_of

from iscsifuse.errors import IdentityError, SessionLostError, WriteBackError
from iscsifuse.initiator import nexus as nexus_module
from iscsifuse.initiator.nexus import NexusState, open_nexus
from iscsifuse.iscsi.pdu import Opcode, Pdu
from iscsifuse.iscsi.request import DataOut, LoginRequest, ScsiCommand
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import Action, Close, Cut, Late, Stall, Step
from iscsifuse.testing.config import TargetKeys
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Direction, Match, all_of, is_a
from iscsifuse.testing.script import cdb as has_cdb

ASKED_ONLY = TargetKeys(
    initial_r2t=True,
    immediate_data=False,
    max_burst_length=1024,
    max_recv_data_segment_length=1024,
    default_time2wait=0,
)
DATA = content(100, 4)
SYNC = has_cdb(0x35, 0x91)


async def _outcome(job: Any, into: list[Any]) -> None:
    into.extend(await at_once(job, within=1000))


# --- 97: every byte of every PDU ---

PDUS: list[tuple[str, Direction, Match, int]] = [
    # What is cut, and how long it is, with digests: 48 + 4, data + 4
    ("Data-In", OUT, all_of(READ, DATA_IN), 48 + 4 + 512 + 4),
    ("R2T", OUT, is_a(Opcode.R2T), 48 + 4),
    ("SCSI Response", OUT, all_of(WRITE, RESPONSE), 48 + 4),
    ("NOP-In", OUT, is_a(Opcode.NOP_IN), 48 + 4),
    ("a read command", IN, all_of(READ, COMMAND), 48),
    ("a write command", IN, all_of(WRITE, COMMAND), 48),
    ("Data-Out", IN, is_a(Opcode.DATA_OUT), 48 + 1024),
]


def _cuts(length: int, *, every: bool) -> list[int]:
    """Where to cut: everywhere, or at the edges and a few places between."""
    return list(range(length)) if every else sorted({0, 1, 5, 8, 20, 47, 48, 49, 51, 52, 53, 300, length - 1})


@pytest.mark.conformance(97)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every byte"])
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize(("direction", "match", "length"), [row[1:] for row in PDUS], ids=[row[0] for row in PDUS])
async def test_97_a_connection_that_ends_within_a_pdu(
    direction: Direction, match: Match, length: int, reset: bool, every: bool
) -> None:
    """FIN or RST after any byte of any kind of PDU → logged in again, and read and write are what they should be."""
    settings = {"header_digest": True, "data_digest": True, "timeout": 60, "reconnect_timeout": 60}
    async with nexus_bench(settings=settings, keys=ASKED_ONLY) as b:
        for number, cut in enumerate(_cuts(length, every=every), start=1):
            if cut >= length:
                continue
            b.rule(direction, Cut(cut, reset=reset), match)
            data = number.to_bytes(4, "big") * 512
            jobs: list[Any] = [partial(b.read, 7), partial(b.write, data, 200)]
            if match is PDUS[3][2]:
                b.peer.ping()
            results: list[Any] = await at_once(*jobs, within=10)
            assert results[0] == content(7)
            assert results[1].status == Status.GOOD
            await b.reconnected(number)
            assert b.disk.contents(lba=200, blocks=4) == data
        assert b.target.logins == b.nexus.reconnects + 1


class _HalfClose:
    """Nothing more goes out, and the PDU is swallowed; what comes is still read."""

    def __init__(self, b: Bench) -> None:
        self._bench = b

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002 - an action
        cast("trio.SocketStream", self._bench.peer.wire._stream).socket.shutdown(socket.SHUT_WR)
        return ()


@pytest.mark.conformance(97)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("match", [READ, WRITE], ids=["read", "write"])
async def test_97_a_connection_that_is_half_closed(match: Match) -> None:
    """The target closes its sending half and goes on to read → logged in again; the command is carried out."""
    async with nexus_bench() as b:
        b.rule(IN, _HalfClose(b), all_of(match, COMMAND))
        results = await at_once(partial(b.read, 7), partial(b.write, DATA, 200))
        assert results[0] == content(7)
        assert b.disk.contents(lba=200, blocks=4) == DATA
        assert b.target.logins == 2


@pytest.mark.conformance(97)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize(
    ("direction", "match", "after"),
    [
        pytest.param(direction, match, after, id=f"{name}-{after}")
        for name, direction, match, length in PDUS
        for after in (0, 1, 47, 48, 300)
        if after < length
    ],
)
@jumping
async def test_97_a_black_hole(direction: Direction, match: Match, after: int) -> None:
    """Silence from within a PDU on, on an open connection → found out by a ping within 12 seconds; logged in
    again, and read and write are what they should be."""
    async with nexus_bench(settings={"timeout": 60}, keys=ASKED_ONLY) as b:
        b.rule(direction, Stall(after), match)
        if match is PDUS[3][2]:
            b.peer.ping()
        began = trio.current_time()
        results = await at_once(partial(b.read, 7), partial(b.write, DATA, 200), within=60)
        assert results[0] == content(7)
        assert b.disk.contents(lba=200, blocks=4) == DATA
        await b.reconnected()
        assert trio.current_time() - began <= 14


# --- 98, 99: the new login ---


@pytest.mark.conformance(98)
@pytest.mark.expect_log(RECOVERY)
async def test_98_the_same_isid_and_tsih_0() -> None:
    """A session is lost three times, beside another one to the same target → each login has TSIH 0 and the
    session's own ISID, and the two never share one."""
    async with nexus_bench() as b:
        ours = b.tape.sent(LoginRequest)[0].isid
        for lost in range(1, 4):
            b.session.fail(SessionLostError("the cable was pulled"))
            await b.reconnected(lost)
        settings = settings_of()
        async with open_nexus(DEFAULT_TARGET_NAME, [portal_of(b.target)], settings):
            await b.until(lambda: len(b.target.sessions) == 2)
            assert await b.read(3) == content(3)
        requests = b.tape.sent(LoginRequest)
        assert {request.tsih for request in requests} == {0}
        firsts = [request.isid for request in requests if request.isid == ours]
        others = {request.isid for request in requests if request.isid != ours}
        assert len(firsts) >= 4
        assert len(others) == 1
        assert b.nexus.reconnects == 3


@pytest.mark.conformance(99)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("time2wait", [0, 2, 30])
@jumping
async def test_99_default_time2wait_and_a_second_loss(time2wait: int) -> None:
    """DefaultTime2Wait, a loss, and two more within the new login → the first attempt not before that time; those
    losses are survived, and the read is right."""
    keys = TargetKeys(default_time2wait=time2wait)
    async with nexus_bench(keys=keys, settings={"reconnect_timeout": 200}) as b, conversation(300) as nursery:
        login = is_a(Opcode.LOGIN_RESPONSE)
        b.rule(OUT, Close(), login, nth=1)
        b.rule(OUT, Cut(50, reset=True), login, nth=2)
        results: list[Any] = []
        began = trio.current_time()
        before = len(b.tape.sent(LoginRequest))
        b.target.drop_connections()
        nursery.start_soon(_outcome, partial(b.read, 7), results)
        await b.until(lambda: len(b.tape.sent(LoginRequest)) > before, seconds=100)
        assert time2wait <= trio.current_time() - began < time2wait + 2
        await b.until(lambda: results, seconds=100)
        assert results == [content(7)]
        assert len(b.target.script.log) == 2
        assert b.nexus.reconnects == 1


# --- 100: another disk ---


def _serial(disk: Disk) -> None:
    disk.serial = "ANOTHER"


def _capacity(disk: Disk) -> None:
    disk.blocks //= 2


def _block_length(disk: Disk) -> None:
    disk.block_length, disk.blocks = 4096, disk.blocks // 8


@pytest.mark.conformance(100)
@pytest.mark.expect_log(RECOVERY, "another disk answers|came back with", "did not reach the disk")
@pytest.mark.parametrize("change", [_serial, _capacity, _block_length])
async def test_100_another_disk_in_its_place(change: Callable[[Disk], None]) -> None:
    """VPD 80/83, capacity or block length differ after a loss → reads, writes and flushes fail and stay failed,
    through further losses; what was cached isn't shown any more; not one READ or WRITE reaches that disk."""
    async with file_bench() as b:
        assert bytes(await b.file.read(0, 4096)) == content(0, 8)
        before = b.disk.contents()
        ledger = len(b.target.ledger)
        change(b.disk)
        for lost in (1, 2):
            b.target.drop_connections()
            await b.reconnected(lost)
            for offset in (0, 65536):
                with pytest.raises(IdentityError) as caught:
                    await b.file.read(offset, 4096)
                assert caught.value.errno == 5
            await b.file.write(0, b"!" * 4096)
            with pytest.raises(WriteBackError):
                await b.file.sync(b.handle)
        assert {entry.name for entry in b.target.ledger[ledger:]} & {"READ(10)", "WRITE(10)"} == set()
        assert b.disk.backing.read(offset=0, length=len(before)) == before


# --- 101 to 103: what was written ---


@pytest.mark.conformance(101)
@pytest.mark.expect_log(RECOVERY)
async def test_101_executed_but_its_status_is_lost() -> None:
    """A WRITE is executed, its status lost with the connection; meanwhile the same blocks are written again → the
    first is replayed, then comes the newer one, and that is what the disk holds."""
    old, new = b"o" * 4096, b"n" * 4096
    async with file_bench() as b, conversation(10) as nursery:
        b.rule(OUT, Close(reset=True), all_of(WRITE, RESPONSE))
        await b.file.write(0, old)
        nursery.start_soon(b.file.sync, b.handle)
        await b.until(lambda: b.target.engine().executed("WRITE(10)"))
        await b.file.write(0, new)
        await b.file.sync(b.handle)
        assert b.target.logins == 2
        written = [pdu.data[:1] for pdu in b.tape.sent(ScsiCommand) if pdu.write]
        assert written == [b"o", b"o", b"n"]
        assert len(b.target.engine().executed("WRITE(10)")) == 3
    assert b.disk.contents(blocks=8) == new


@pytest.mark.conformance(102)
@pytest.mark.expect_log(RECOVERY)
@jumping
async def test_102_what_the_old_session_was_doing_is_over_before_the_replay() -> None:
    """The target doesn't notice the loss, and would execute the old WRITE 30 seconds later → the new login (same
    ISID, TSIH 0) ends it first; a newer write to the same blocks is what the disk holds, then and later."""
    async with nexus_bench(settings={"timeout": 100}) as b, conversation(200) as nursery:
        b.rule(IN, Late(30.0), all_of(WRITE, COMMAND))
        nursery.start_soon(b.write, b"o" * 512, 0)
        await b.until(lambda: b.tape.sent(ScsiCommand))
        b.session.fail(SessionLostError("the cable was pulled"))
        await b.until(lambda: b.target.engine().executed("WRITE(10)"))
        await b.write(b"n" * 512, 0)
        await trio.sleep(100)
        assert len(b.target.engine().executed("WRITE(10)")) == 2
        assert b.disk.contents(blocks=1) == b"n" * 512
        kinds = [type(pdu) for way, pdu in b.tape.log if way is IN and not isinstance(pdu, DataOut)]
        first, second = [number for number, kind in enumerate(kinds) if kind is ScsiCommand][:2]
        assert LoginRequest in kinds[first:second]


@pytest.mark.conformance(103)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("moment", ["a write's command", "a write's status", "the flush", "the flush's status"])
async def test_103_a_loss_during_fsync(moment: str) -> None:
    """The connection is lost while an fsync writes back, or flushes → it succeeds only after all was written on
    the new session, and a SYNCHRONIZE CACHE after that; a power cut then takes nothing."""
    rules: dict[str, tuple[Direction, Action, Match, int]] = {
        "a write's command": (IN, Close(), all_of(WRITE, COMMAND), 2),
        "a write's status": (OUT, Close(), all_of(WRITE, RESPONSE), 2),
        "the flush": (IN, Close(), all_of(SYNC, COMMAND), 1),
        "the flush's status": (OUT, Close(reset=True), all_of(SYNC, RESPONSE), 1),
    }
    direction, action, match, nth = rules[moment]
    async with file_bench() as b:
        b.rule(direction, action, match, nth=nth)
        for number in range(4):
            await b.file.write(number << 18, bytes([number + 1]) * 65536)
        await b.file.sync(b.handle)
        assert b.target.logins == 2
        names = [entry.name for entry in b.target.ledger]
        assert names[-1].startswith("SYNCHRONIZE CACHE")
        assert b.target.power_cut() == 0
        for number in range(4):
            assert b.disk.contents(lba=number << 9, blocks=128) == bytes([number + 1]) * 65536


# --- 105: an end to waiting ---


@pytest.mark.conformance(105)
@pytest.mark.expect_log(RECOVERY, "aborting it", "did not reach the disk|failed")
@pytest.mark.parametrize("how", ["refused", "silent"])
@jumping
async def test_105_the_deadline_passes(how: str) -> None:
    """The target is gone for longer than reconnect_timeout (120 s) → each of those who read, write or fsync gets
    EIO, the later ones at once; taking it all down takes seconds; when the target is back, everything works again."""
    async with file_bench(settings={"reconnect_timeout": 120, "timeout": 60}) as b, conversation(2000) as nursery:
        outage: Action = Close() if how == "refused" else Stall()
        b.rule(OUT, outage, is_a(Opcode.LOGIN_RESPONSE), times=0)
        began = trio.current_time()
        b.target.drop_connections()
        await b.until(lambda: b.nexus.state is NexusState.LOST, seconds=60)
        await b.file.write(1 << 20, b"x" * 4096)  # acknowledged, before anybody knows
        results: list[Any] = []
        for lba in range(0, 80, 8):
            nursery.start_soon(_outcome, partial(b.unit.read_into, memoryview(bytearray(512)), lba=lba), results)
            nursery.start_soon(_outcome, partial(b.file.read, lba * 512, 4096), results)
        nursery.start_soon(_outcome, partial(b.file.sync, b.handle), results)
        await b.until(lambda: len(results) == 21, seconds=300)
        assert 119 <= trio.current_time() - began <= 125
        assert all(getattr(result, "errno", None) == 5 for result in results)
        began = trio.current_time()
        with pytest.raises(SessionLostError):
            await b.unit.read_into(memoryview(bytearray(512)), lba=0)
        assert trio.current_time() == began
        b.target.script.clear()
        await b.until(lambda: b.nexus.state is NexusState.LOGGED_IN, seconds=60)
        assert bytes(await b.file.read(0, 4096)) == content(0, 8)


@pytest.mark.conformance(105)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("how", ["refused", "silent"])
@jumping
async def test_105_a_mount_can_be_taken_down_at_any_time(how: str) -> None:
    """The target is gone, there is no deadline, and readers wait → closing takes seconds, and each of them gets
    EIO."""
    results: list[Any] = []
    async with conversation(2000) as nursery:
        async with unit_bench(settings={"reconnect_timeout": -1}) as b:
            outage: Action = Close() if how == "refused" else Stall()
            b.rule(OUT, outage, is_a(Opcode.LOGIN_RESPONSE), times=0)
            b.target.drop_connections()
            for lba in range(5):
                job = partial(b.unit.read_into, memoryview(bytearray(512)), lba=lba)
                nursery.start_soon(_outcome, job, results)
            await trio.sleep(500)
            assert results == []
            began = trio.current_time()
        await b.until(lambda: len(results) == 5)
        assert trio.current_time() - began <= nexus_module.LAST_WORDS
        assert all(isinstance(result, SessionLostError) for result in results)
