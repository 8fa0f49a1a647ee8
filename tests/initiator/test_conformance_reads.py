"""Cases 66 to 80: what comes of a read, in which order, with which status, and with damaged bytes.

Each test names its case; its docstring says what the target does → what the initiator must do.
"""

import socket
from contextlib import suppress
from typing import Any, cast

import pytest
from feature_phase_kit import (
    DATA_IN,
    READ,
    RECOVERY,
    RESPONSE,
    altered,
    bench,
    content,
    file_bench,
    nexus_bench,
    numbers_of,
    unit_bench,
)
from initiator_kit import LUN_0, conversation

from iscsifuse.errors import DigestError, MediumError, ParameterDataError, TransferError
from iscsifuse.initiator.commander import Commander
from iscsifuse.initiator.inventory import scan
from iscsifuse.iscsi.parameters import LoginConfig
from iscsifuse.iscsi.pdu import Opcode
from iscsifuse.iscsi.request import LogoutRequest, NopOut, ScsiCommand
from iscsifuse.iscsi.response import AsyncEvent, AsyncMessage, DataIn, NopIn, ScsiResponse
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import ChangeBytes, Drop, Duplicate, Inject
from iscsifuse.testing.script import OUT, Match, all_of, is_a
from iscsifuse.testing.script import cdb as has_cdb

DATA = all_of(READ, DATA_IN)
STATUS = all_of(READ, RESPONSE)
DIGESTS = {"header_digest": True, "data_digest": True}


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The initiator takes 512 bytes in a PDU, so that a read of some blocks is a sequence of Data-In."""

    def small(**fields: Any) -> LoginConfig:
        return LoginConfig(**{**fields, "max_recv_data_segment_length": 512})

    monkeypatch.setattr("iscsifuse.initiator.login.LoginConfig", small)


# --- status and data ---


@pytest.mark.conformance(66)
@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("status_in_data", [True, False])
async def test_66_status_in_the_last_data_in_or_on_its_own(status_in_data: bool) -> None:
    """GOOD in the last Data-In (S bit), or in a SCSI Response → the read is whole either way."""
    async with bench(status_in_data=status_in_data) as b:
        assert await b.read(9, 8) == content(9, 8)
        assert [pdu.has_status for pdu in b.tape.told(DataIn)] == [False] * 7 + [status_in_data]
        assert len(b.tape.told(ScsiResponse)) == (not status_in_data)


@pytest.mark.conformance(67)
async def test_67_data_in_without_data() -> None:
    """Data-In of no bytes before, between and behind those with data → they count in DataSN, and that is all."""
    async with bench() as b, conversation() as nursery:
        b.hold(times=1)
        results: list[bytes] = []

        async def read() -> None:
            results.append(await b.read(5, 2))

        nursery.start_soon(read)
        command = await b.taken()
        b.say(DataIn(itt=command.itt, data_sn=0, final=False))
        b.say(DataIn(itt=command.itt, data_sn=1, data=content(5), final=False))
        b.say(DataIn(itt=command.itt, data_sn=2, buffer_offset=512, final=False))
        b.say(DataIn(itt=command.itt, data_sn=3, buffer_offset=512, data=content(6)))
        b.data_in(command, b"", data_sn=4, buffer_offset=1024)
        await b.until(lambda: results)
        assert results == [content(5, 2)]


@pytest.mark.conformance(68)
@pytest.mark.usefixtures("small_segments")
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("lost", [1, 2, 7])
async def test_68_a_gap_in_data_sn_is_a_new_session(lost: int) -> None:
    """One of eight Data-In is missing → recovery, and the read is right; never with a hole in it."""
    async with nexus_bench(strict=False) as b:
        b.rule(OUT, Drop(), DATA, nth=lost)
        assert await b.read(9, 8) == content(9, 8)
        assert b.target.logins == 2


@pytest.mark.conformance(68)
@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("copies", [1, 3])
async def test_68_a_duplicate_is_thrown_away(copies: int) -> None:
    """Data-In that come twice, the second time with other bytes → the first ones count, and nothing else happens."""
    async with bench(strict=False) as b:

        def forged(pdu: Any) -> DataIn:
            return DataIn(
                **numbers_of(pdu), itt=pdu.itt, data_sn=pdu.data_sn, buffer_offset=pdu.buffer_offset,
                data=b"\x55" * len(pdu.data), final=False,
            )  # fmt: skip

        b.rule(OUT, Inject(after=(forged,) * copies), DATA, nth=3)
        b.rule(OUT, Duplicate(copies), DATA, nth=5)
        assert await b.read(9, 8) == content(9, 8)
        assert len(b.target.script.log) == 2
        assert b.session.error is None


# --- a success that isn't one ---


@pytest.mark.conformance(69)
@pytest.mark.expect_log("success but sent 0 of 4096 bytes")
async def test_69_good_without_data_is_no_success_of_a_read() -> None:
    """Data-In left out, GOOD, no underflow, a matching ExpDataSN → EIO after three attempts; no byte is handed out
    or cached; the next read, answered properly, is right."""
    async with file_bench(strict=False, status_in_data=False) as b:
        b.rule(OUT, Drop(), DATA, times=3)
        b.rule(OUT, altered(exp_data_sn=0), STATUS, times=3)
        with pytest.raises(TransferError) as caught:
            await b.file.read(0, 4096)
        assert caught.value.errno == 5
        assert len([pdu for pdu in b.tape.sent(ScsiCommand) if pdu.cdb[0] == 0x28]) == 3
        assert bytes(await b.file.read(0, 4096)) == content(0, 8)


@pytest.mark.conformance(69)
@pytest.mark.usefixtures("small_segments")
@pytest.mark.expect_log("success but sent 3584 of 4096 bytes")
async def test_69_good_with_the_last_data_in_left_out() -> None:
    """The last of eight Data-In left out, and ExpDataSN is 7 → the same; the second attempt counts."""
    async with unit_bench(strict=False, status_in_data=False) as b:
        b.rule(OUT, Drop(), DATA, nth=8)
        b.rule(OUT, altered(exp_data_sn=7), STATUS)
        memory = memoryview(bytearray(4096))
        await b.unit.read_into(memory, lba=9)
        assert memory == content(9, 8)
        assert b.target.logins == 1


PARAMETER_DATA: list[tuple[str, Match, bytes]] = [
    ("INQUIRY", has_cdb(0x12), cdbs.inquiry(allocation_length=96)),
    ("REPORT LUNS", has_cdb(0xA0), cdbs.report_luns(allocation_length=1024)),
    ("READ CAPACITY(16)", has_cdb(0x9E), cdbs.read_capacity_16(allocation_length=32)),
]


@pytest.mark.conformance(69)
@pytest.mark.parametrize(
    ("match", "cdb"), [row[1:] for row in PARAMETER_DATA], ids=[row[0] for row in PARAMETER_DATA]
)
async def test_69_good_without_data_of_parameter_data_is_nothing(match: Match, cdb: bytes) -> None:
    """The same for parameter data → what came is handed out, which is nothing: no zeros in its place."""
    async with nexus_bench(strict=False, status_in_data=False) as b:
        b.rule(OUT, Drop(), all_of(match, DATA_IN))
        b.rule(OUT, altered(exp_data_sn=0, underflow=False, residual_count=0), all_of(match, RESPONSE))
        commander = Commander(b.nexus, address=LUN_0, label="LUN 0", limit=5)
        assert await commander.query(cdb, length=1024) == b""
        assert await commander.query(cdb, length=1024) != b""


@pytest.mark.conformance(69)
@pytest.mark.expect_log(".")
async def test_69_a_scan_without_data_finds_no_disk() -> None:
    """The same for each command of a scan → an error, or no disk; never one of invented size."""
    for opcode in (0x12, 0xA0, 0x25, 0x9E):
        async with nexus_bench(strict=False, status_in_data=False) as b:
            b.rule(OUT, Drop(), all_of(has_cdb(opcode), DATA_IN), times=0)
            gone = altered(exp_data_sn=0, underflow=False, residual_count=0)
            b.rule(OUT, gone, all_of(has_cdb(opcode), RESPONSE), times=0)
            found = []
            with suppress(ParameterDataError, TransferError):
                found = await scan(b.nexus)
            assert all(one.capacity is None or one.capacity.blocks == b.disk.blocks for one in found)


@pytest.mark.conformance(70)
@pytest.mark.usefixtures("small_segments")
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("exp_data_sn", [0, 7, 9, 0xFFFFFFFF])
async def test_70_exp_data_sn_that_is_not_what_came(exp_data_sn: int) -> None:
    """Eight Data-In, and a GOOD that speaks of another number → recovery, and the read is right."""
    async with nexus_bench(strict=False, status_in_data=False) as b:
        b.rule(OUT, altered(exp_data_sn=exp_data_sn), STATUS)
        assert await b.read(9, 8) == content(9, 8)
        assert b.target.logins == 2


WRONG: list[tuple[str, Any, int]] = [
    ("an offset gap", {"buffer_offset": 1024}, 2),
    ("an overlap", {"buffer_offset": 256}, 2),
    ("backwards", {"buffer_offset": 0}, 2),
    ("beyond the expected length", {"buffer_offset": lambda pdu: pdu.buffer_offset, "data": bytes(513)}, 8),
    ("far beyond it", {"buffer_offset": 0xFFFFFE00}, 3),
    ("S without F", {"final": False}, 8),
    ("CHECK CONDITION in it", {"status": Status.CHECK_CONDITION}, 8),
]


@pytest.mark.conformance(71)
@pytest.mark.conformance(75)
@pytest.mark.usefixtures("small_segments")
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize(("changes", "nth"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
async def test_71_75_data_in_that_can_not_be_ends_the_session(changes: dict[str, Any], nth: int) -> None:
    """Data-In with a gap or an overlap in offsets, beyond the expected length, S without F, with CHECK CONDITION in
    it (75) → the session is dropped, the read carried out on a new one."""
    async with nexus_bench(strict=False) as b:
        b.rule(OUT, altered(**changes), DATA, nth=nth)
        memory = memoryview(bytearray(9 * 512))
        memory[4096:] = b"\xaa" * 512  # what lies behind the buffer isn't touched
        assert await b.read(9, 8, memory=memory[:4096]) == content(9, 8)
        assert b.target.logins == 2
        assert memory[4096:] == b"\xaa" * 512


@pytest.mark.conformance(72)
@pytest.mark.expect_log("success but")
@pytest.mark.parametrize("with_data", [True, False])
async def test_72_underflow_of_a_media_read_is_an_error(with_data: bool) -> None:
    """GOOD with underflow on a READ, with fewer bytes or with all of them, again and again → EIO."""
    async with unit_bench(strict=False, status_in_data=False) as b:
        b.rule(OUT, altered(underflow=True, residual_count=512), STATUS, times=0)
        if not with_data:
            b.rule(OUT, altered(data=lambda pdu: pdu.data[:-512]), DATA, times=0)
        with pytest.raises(TransferError) as caught:
            await b.unit.read_into(memoryview(bytearray(4096)), lba=0)
        assert caught.value.errno == 5


@pytest.mark.conformance(72)
async def test_72_underflow_of_inquiry_is_shorter_data() -> None:
    """GOOD with underflow on an INQUIRY → just the bytes that came."""
    async with nexus_bench() as b:
        commander = Commander(b.nexus, address=LUN_0, label="LUN 0", limit=5)
        data = await commander.query(cdbs.inquiry(allocation_length=255), length=255)
        (answer,) = b.tape.told(DataIn)
        assert answer.underflow
        assert len(data) == 255 - answer.residual_count == len(answer.data) > 0


@pytest.mark.conformance(73)
@pytest.mark.expect_log("gave up the command")
@pytest.mark.parametrize("response", [1, 0x80, 0xFF])
async def test_73_a_response_code_makes_the_status_void(response: int) -> None:
    """Response 0x01 (target failure) with status GOOD and all of the data → failed; sent again, then right."""
    async with unit_bench(status_in_data=False) as b:
        b.rule(OUT, altered(response=response), STATUS)
        memory = memoryview(bytearray(512))
        await b.unit.read_into(memory, lba=3)
        assert memory == content(3)
        assert len([pdu for pdu in b.tape.sent(ScsiCommand) if pdu.cdb[0] == 0x28]) == 2
        b.rule(OUT, altered(response=response), STATUS, times=0)
        with pytest.raises(TransferError):
            await b.unit.read_into(memory, lba=3)


@pytest.mark.conformance(74)
@pytest.mark.expect_log(RECOVERY)
async def test_74_check_condition_without_sense_data_ends_the_session() -> None:
    """CHECK CONDITION with an empty data segment → format error: the session is dropped, the read sent again."""
    async with nexus_bench(strict=False, status_in_data=False) as b:
        b.rule(OUT, altered(status=Status.CHECK_CONDITION, data=b""), STATUS)
        assert await b.read(3) == content(3)
        assert b.target.logins == 2
        assert "CHECK CONDITION without sense data" in str(b.nexus.report()["last_error"])


@pytest.mark.conformance(76)
@pytest.mark.usefixtures("small_segments")
async def test_76_the_a_bit_is_ignored() -> None:
    """Data-In with the A bit at ErrorRecoveryLevel 0 → read as usual; no SNACK, no other answer."""
    async with bench(strict=False) as b:
        b.rule(OUT, altered(acknowledge=True, ttt=77), DATA, times=0)
        assert await b.read(9, 8) == content(9, 8)
        assert [pdu.OPCODE for _, pdu in b.tape.log if pdu.OPCODE < 0x20][-1] == Opcode.SCSI_COMMAND
        assert b.session.error is None


# --- digests ---


def _crc32c(data: bytes) -> bytes:
    """Bit by bit, as RFC 7143 §13.1 defines it: nobody else's code."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "little")


class _Spy:
    """A socket whose sent bytes are kept."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.sent = b""

    def sendmsg(self, buffers: Any) -> int:
        data = b"".join(buffers)
        count = self._sock.send(data)
        self.sent += data[:count]
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def test_77_the_oracle() -> None:
    """RFC 7143 Appendix A.4: 32 bytes of zeros, and 0 to 31."""
    assert _crc32c(bytes(32)).hex() == "aa36918a"
    assert _crc32c(bytes(range(32))).hex() == "4e79dd46"


@pytest.mark.conformance(77)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5])
async def test_77_the_data_digest_covers_the_padding(length: int) -> None:
    """A ping of 0 to 5 bytes, padded with anything → it is understood, and answered with header, CRC32C of it, data,
    padding, CRC32C of both; the last one is missing where there is no data."""
    async with bench(settings=DIGESTS) as b:
        spy = _Spy(b.session.transport._sock)
        b.session.transport._sock = cast("socket.socket", spy)
        data = b"abcde"[:length]
        padding = b"\x7f" * (-length % 4)  # any bytes may pad

        def padded(encoded: bytes) -> bytes:
            body = encoded[52 : 52 + length] + padding
            return encoded[:52] + body + (_crc32c(body) if body else b"")

        b.rule(OUT, ChangeBytes(padded), is_a(Opcode.NOP_IN))
        b.say(NopIn(ttt=5, data=data))
        await b.until(lambda: b.tape.sent(NopOut))
        header, rest = spy.sent[:48], spy.sent[52:]
        assert spy.sent[48:52] == _crc32c(header)
        body = data + bytes(-length % 4)
        assert rest == (body + _crc32c(body) if data else b"")


def _flipped(at: int) -> ChangeBytes:
    return ChangeBytes(lambda data: data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])


@pytest.mark.conformance(78)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("at", [0, 5, 19, 31, 47, 48, 51])
@pytest.mark.parametrize("match", [DATA_IN, RESPONSE], ids=["Data-In", "response"])
async def test_78_a_header_digest_error_ends_the_connection(match: Match, at: int) -> None:
    """One bit of a header, or of its digest, is wrong → the connection is closed; the read is right on a new one."""
    async with nexus_bench(strict=False, settings=DIGESTS, status_in_data=False) as b:
        b.rule(OUT, _flipped(at), all_of(READ, match))
        assert await b.read(3, 8) == content(3, 8)
        assert b.target.logins == 2
        assert "header digest" in str(b.nexus.report()["last_error"])


@pytest.mark.conformance(79)
@pytest.mark.expect_log("data digest of a Data-In doesn't match")
@pytest.mark.parametrize("at", [52, 52 + 4095, 52 + 4096])
async def test_79_a_damaged_data_in_is_read_again(at: int) -> None:
    """One bit of the data, or of its digest, is wrong, once → sent again on the same session, and right."""
    async with file_bench(settings=DIGESTS) as b:
        b.rule(OUT, _flipped(at), DATA)
        assert bytes(await b.file.read(0, 4096)) == content(0, 8)
        assert b.target.logins == 1
        assert len(b.target.engine().executed("READ(10)")) == 2


@pytest.mark.conformance(79)
@pytest.mark.expect_log("data digest of a Data-In doesn't match")
async def test_79_a_data_in_that_is_always_damaged_is_an_error() -> None:
    """The same each time → EIO after three attempts, and nothing is cached: the next read asks the target again."""
    async with file_bench(settings=DIGESTS) as b:
        b.rule(OUT, _flipped(100), DATA, times=3)
        with pytest.raises(DigestError):
            await b.file.read(0, 4096)
        assert b.file.peek(0, 512) is None
        assert bytes(await b.file.read(0, 4096)) == content(0, 8)
        assert len(b.target.engine().executed("READ(10)")) == 4


@pytest.mark.conformance(80)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("at", [53, 70, 75])
async def test_80_a_damaged_response_is_a_new_session(at: int) -> None:
    """The data digest of a SCSI Response is wrong (sense data, or the digest) → session recovery; the next counts."""
    async with unit_bench(strict=False, settings=DIGESTS) as b:
        b.disk.bad_blocks.add(3)
        b.rule(OUT, _flipped(at), STATUS)
        with pytest.raises(MediumError) as caught:
            await b.unit.read_into(memoryview(bytearray(512)), lba=3)
        assert caught.value.lba == 3
        assert b.target.logins == 2
        assert "data digest of a response" in str(b.nexus.report()["last_error"])


@pytest.mark.conformance(80)
@pytest.mark.expect_log(RECOVERY)
async def test_80_a_damaged_asynchronous_message_is_a_new_session() -> None:
    """The data digest of an Asynchronous Message is wrong → session recovery; it isn't acted on."""
    async with nexus_bench(strict=False, settings=DIGESTS) as b:
        b.rule(OUT, _flipped(54), is_a(Opcode.ASYNC_MESSAGE))
        b.say(AsyncMessage(event=AsyncEvent.LOGOUT_REQUESTED, parameter3=1, data=b"\0\4abcd"))
        await b.until(lambda: b.target.logins == 2)
        assert await b.read(3) == content(3)
        assert b.tape.sent(LogoutRequest) == []
        assert "data digest of a response" in str(b.nexus.report()["last_error"])
