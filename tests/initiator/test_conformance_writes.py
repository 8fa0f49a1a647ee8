"""Cases 54 to 65: what is sent unasked, what R2Ts ask for, and when a write counts as written.

Each test names its case; its docstring says what the target does → what the initiator must do. The validator watches
all the while: whatever is sent against RFC 7143 fails the test.
"""

import random
from functools import partial
from typing import Any

import pytest
from feature_phase_kit import (
    COMMAND,
    RECOVERY,
    RESPONSE,
    WRITE,
    altered,
    bench,
    content,
    data_of,
    file_bench,
    nexus_bench,
    unit_bench,
)
from initiator_fakes import sense
from initiator_kit import conversation, pattern

from iscsifuse.errors import CommandError, TransferError
from iscsifuse.iscsi.pdu import RESERVED_TAG, Opcode
from iscsifuse.iscsi.request import DataOut, LoginRequest, ScsiCommand
from iscsifuse.iscsi.response import R2T
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.sense import SenseKey
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import Answer, sense_segment
from iscsifuse.testing.config import TargetKeys
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, all_of, is_a

ASKED_ONLY = TargetKeys(
    initial_r2t=True,
    immediate_data=False,
    max_burst_length=4096,
    max_recv_data_segment_length=1024,
    max_outstanding_r2t=4,
    default_time2wait=0,
)
"""Nothing goes unasked; an R2T may ask for four PDUs of 1024 bytes."""
DATA = random.Random(1).randbytes(16 * 512)


def keys_of(**changes: Any) -> TargetKeys:
    return TargetKeys(max_recv_data_segment_length=2048, max_burst_length=8192, default_time2wait=0, **changes)


def ask(command: ScsiCommand, offset: int, length: int, **changes: Any) -> R2T:
    fields: dict[str, Any] = {"lun": command.lun, "ttt": 0xABCD0001, "r2t_sn": 0, **changes}
    return R2T(itt=command.itt, buffer_offset=offset, desired_data_transfer_length=length, **fields)


# --- what goes unasked ---

CELLS = [
    # InitialR2T, ImmediateData, bytes in the command PDU at most, bytes unasked at most
    (True, False, 0, 0),
    (True, True, 2048, 2048),
    (False, False, 0, 6144),
    (False, True, 2048, 6144),
]


@pytest.mark.conformance(54)
@pytest.mark.conformance(55)
@pytest.mark.conformance(56)
@pytest.mark.parametrize("length", [512, 2048, 2560, 6144, 6656, 32768])
@pytest.mark.parametrize(("initial_r2t", "immediate_data", "most_immediate", "most_unasked"), CELLS)
async def test_54_55_56_the_four_cells_of_a_first_burst(
    initial_r2t: bool, immediate_data: bool, most_immediate: int, most_unasked: int, length: int
) -> None:
    """InitialR2T × ImmediateData, FirstBurstLength 6144, segments of 2048 → immediate data as far as it fits, in all
    exactly min(FirstBurstLength, the write's length) bytes unasked, F on the last PDU of each sequence only."""
    keys = keys_of(initial_r2t=initial_r2t, immediate_data=immediate_data, first_burst_length=6144)
    data = pattern(length, seed=99)
    async with bench(keys=keys) as b:
        assert (await b.write(data, 7)).status == Status.GOOD
    assert b.disk.contents(lba=7, blocks=length // 512) == data
    (command,) = b.tape.sent(ScsiCommand)
    unasked = [pdu for pdu in b.tape.sent(DataOut) if pdu.ttt == RESERVED_TAG]
    immediate, first_burst = min(length, most_immediate), min(length, most_unasked)
    assert command.data == data[:immediate]
    assert command.data + data_of(unasked) == data[:first_burst]
    assert command.final is not bool(unasked)
    for ttt in {pdu.ttt for pdu in b.tape.sent(DataOut)}:
        *others, last = [pdu.final for pdu in b.tape.sent(DataOut) if pdu.ttt == ttt]
        assert (any(others), last) == (False, True)
    asked = [(r2t.buffer_offset, r2t.desired_data_transfer_length) for r2t in b.tape.told(R2T)]
    assert sum(count for _, count in asked) == length - first_burst


# --- what is asked for ---


@pytest.mark.conformance(57)
@pytest.mark.conformance(77)
@pytest.mark.parametrize("length", [1, 1000, 1001, 1002, 1003])
@pytest.mark.parametrize("number", [0, 5, 300])
async def test_57_an_r2t_is_answered_exactly(number: int, length: int) -> None:
    """An R2T with a TTT, a LUN, an offset, a length → Data-Out with just these, and the write's own bytes; also
    where they have to be padded, and with digests (77)."""
    disk = Disk.from_bytes(bytes(64 * 512), lun=number)
    settings = {"header_digest": True, "data_digest": True}
    async with bench(keys=ASKED_ONLY, disk=disk, settings=settings) as b, conversation() as nursery:
        b.hold(times=1)
        nursery.start_soon(partial(b.write, DATA, lun=luns.encode(number)))
        command = await b.taken()
        b.say(ask(command, 1536, length, ttt=0xFFFFFFFE))
        (answer,) = await b.data_out(1)
        assert (answer.itt, answer.ttt, answer.lun) == (command.itt, 0xFFFFFFFE, luns.encode(number))
        assert (answer.buffer_offset, answer.data, answer.final) == (1536, DATA[1536 : 1536 + length], True)
        b.good(command, status=Status.BUSY)


@pytest.mark.conformance(56)
@pytest.mark.conformance(58)
async def test_58_an_r2t_that_takes_several_pdus() -> None:
    """R2Ts for more than a PDU holds → contiguous PDUs, DataSN from 0 in each answer, the F bit on its last one."""
    async with bench(keys=ASKED_ONLY) as b:
        assert (await b.write(DATA)).status == Status.GOOD
    assert b.disk.contents(blocks=16) == DATA
    assert [r2t.desired_data_transfer_length for r2t in b.tape.told(R2T)] == [4096, 4096]
    for r2t in b.tape.told(R2T):
        pdus = [pdu for pdu in b.tape.sent(DataOut) if pdu.ttt == r2t.ttt]
        assert [pdu.data_sn for pdu in pdus] == [0, 1, 2, 3]
        assert [pdu.buffer_offset - r2t.buffer_offset for pdu in pdus] == [0, 1024, 2048, 3072]
        assert [pdu.final for pdu in pdus] == [False, False, False, True]


@pytest.mark.conformance(59)
async def test_59_r2ts_out_of_order_are_served_as_they_came() -> None:
    """Three R2Ts at once, last piece first → answered in the order of their arrival, and the write is whole."""
    async with bench(keys=ASKED_ONLY) as b, conversation() as nursery:
        b.hold(times=1)
        nursery.start_soon(b.write, DATA)
        command = await b.taken()
        asked = [(6144, 2048), (0, 4096), (4096, 2048)]
        for number, (offset, length) in enumerate(asked):
            b.say(ask(command, offset, length, ttt=number, r2t_sn=number))
        answers = await b.data_out(8)
        b.good(command)
    assert [pdu.ttt for pdu in answers] == [0, 0, 1, 1, 1, 1, 2, 2]
    for number, (offset, length) in enumerate(asked):
        assert data_of([pdu for pdu in answers if pdu.ttt == number]) == DATA[offset : offset + length]


@pytest.mark.conformance(60)
async def test_60_a_range_is_asked_for_again() -> None:
    """A second R2T for bytes that were sent already → the same bytes, also if somebody writes there: he waits."""
    async with file_bench(keys=ASKED_ONLY) as b, conversation() as nursery:
        b.hold(WRITE, times=1)
        await b.file.write(0, DATA)
        nursery.start_soon(b.file.sync, b.handle)
        command = await b.taken()
        length = command.expected_data_transfer_length
        assert length == len(DATA)
        b.say(ask(command, 0, 4096, ttt=1))
        await b.data_out(4)
        written: list[int] = []

        async def write_again() -> None:
            written.append(await b.file.write(0, b"\xff" * 4096))

        nursery.start_soon(write_again)
        await b.settled()
        b.say(ask(command, 0, 4096, ttt=2, r2t_sn=1))
        assert data_of(await b.data_out(4, ttt=2)) == DATA[:4096] == data_of(await b.data_out(4, ttt=1))
        assert written == []
        b.say(ask(command, 4096, 4096, ttt=3, r2t_sn=2))
        await b.data_out(4, ttt=3)
        b.good(command)
        await b.until(lambda: written)
        await b.file.sync(b.handle)
        assert b.disk.contents(blocks=8) == b"\xff" * 4096


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("no bytes", {"desired_data_transfer_length": 0}),
    ("out of bounds", {"buffer_offset": 4096 + 512}),
    ("far out of bounds", {"buffer_offset": 0xFFFFF000, "desired_data_transfer_length": 0x1000}),
    ("beyond MaxBurstLength", {"desired_data_transfer_length": 4097}),
    ("a reserved TTT", {"ttt": RESERVED_TAG}),
    ("another LUN", {"lun": luns.encode(1)}),
    ("a gap in R2TSN", {"r2t_sn": 1}),
    ("an old R2TSN", {"r2t_sn": 0xFFFFFFFF}),
]


@pytest.mark.conformance(61)
@pytest.mark.expect_log(RECOVERY)
@pytest.mark.parametrize("changes", [row[1] for row in WRONG], ids=[row[0] for row in WRONG])
async def test_61_an_r2t_that_can_not_be_ends_the_session(changes: dict[str, Any]) -> None:
    """An R2T of length 0, out of bounds, too long, with a wrong tag, LUN or number → not one byte is sent for it; the
    session is dropped, and the write carried out on a new one."""
    async with nexus_bench(keys=ASKED_ONLY) as b:
        b.rule(OUT, altered(**changes), is_a(Opcode.R2T), nth=1)
        assert (await b.write(DATA)).status == Status.GOOD
        assert b.target.logins == 2
        assert b.disk.contents(blocks=16) == DATA
        assert len(b.target.engine().executed("WRITE(10)")) == 1
        kinds = [type(pdu) for _, pdu in b.tape.log]
        assert kinds.index(R2T) < len(kinds) - kinds[::-1].index(LoginRequest) < kinds.index(DataOut)


@pytest.mark.conformance(61)
@pytest.mark.expect_log(RECOVERY)
async def test_61_an_r2t_for_a_read_ends_the_session() -> None:
    """An R2T with the ITT of a read → the session is dropped, and the read carried out on a new one."""
    async with nexus_bench(strict=False) as b, conversation() as nursery:
        b.hold(times=1)
        results: list[bytes] = []

        async def read() -> None:
            results.append(await b.read(3))

        nursery.start_soon(read)
        command = await b.taken()
        b.say(ask(command, 0, 512))
        await b.until(lambda: results)
        assert results == [content(3)]
        assert b.target.logins == 2
        assert not b.tape.sent(DataOut)


@pytest.mark.conformance(61)
@pytest.mark.expect_log(RECOVERY)
async def test_61_more_r2ts_at_once_than_were_agreed_end_the_session() -> None:
    """MaxOutstandingR2T is 4, and five come at once → the session is dropped, the write carried out on a new one."""
    async with nexus_bench(keys=ASKED_ONLY, strict=False) as b, conversation() as nursery:
        b.hold(times=1)
        nursery.start_soon(b.write, DATA)
        command = await b.taken()
        for number in range(5):
            b.say(ask(command, 512 * number, 512, ttt=number, r2t_sn=number))
        await b.until(lambda: b.target.logins == 2)
        await b.until(lambda: b.disk.contents(blocks=16) == DATA)
    assert "5 R2Ts at once for one command, where 4 were agreed" in str(b.nexus.report()["last_error"])


# --- when a write counts ---


@pytest.mark.conformance(62)
async def test_62_check_condition_in_the_midst_of_a_transfer() -> None:
    """CHECK CONDITION after the first of two R2Ts → no success; an R2T that comes for it later isn't answered."""
    async with bench(keys=ASKED_ONLY) as b, conversation() as nursery:
        b.hold(times=1)
        tasks: list[Any] = []

        async def write() -> None:
            tasks.append(await b.write(DATA))

        nursery.start_soon(write)
        command = await b.taken()
        b.say(ask(command, 0, 4096))
        await b.data_out(4)
        b.good(command, status=Status.CHECK_CONDITION, data=sense_segment(sense(SenseKey.MEDIUM_ERROR, 0x0C)))
        await b.until(lambda: tasks)
        assert tasks[0].status == Status.CHECK_CONDITION
        b.peer.wire.validator.note = lambda sentence: pytest.fail(sentence)  # type: ignore[method-assign]
        b.say(ask(command, 4096, 4096, ttt=2, r2t_sn=1))
        await b.settled()
        assert len(b.tape.sent(DataOut)) == 4
        assert await b.read(1) == content(1)


@pytest.mark.conformance(63)
@pytest.mark.expect_log("success but a residual")
@pytest.mark.parametrize("residual", [512, 1])
@pytest.mark.parametrize("flag", ["underflow", "overflow"])
async def test_63_good_with_a_residual_is_no_success_of_a_write(flag: str, residual: int) -> None:
    """GOOD with underflow or overflow on a WRITE, again and again → EIO, after a bounded number of attempts."""
    async with unit_bench() as b:
        b.rule(OUT, altered(**{flag: True, "residual_count": residual}), all_of(WRITE, RESPONSE), times=0)
        with pytest.raises(TransferError) as caught:
            await b.unit.write(memoryview(DATA), lba=0)
        assert caught.value.errno == 5
        assert len(b.target.engine().executed("WRITE(10)")) == 3


@pytest.mark.conformance(64)
@pytest.mark.expect_log("success but asked for 0 of 8192 bytes")
async def test_64_good_without_having_asked_is_no_success() -> None:
    """GOOD though not one byte was solicited, again and again → EIO, after a bounded number of attempts."""
    async with unit_bench(keys=ASKED_ONLY) as b:
        b.rule(IN, Answer(Status.GOOD), all_of(WRITE, COMMAND), times=0)
        with pytest.raises(TransferError) as caught:
            await b.unit.write(memoryview(DATA), lba=0)
        assert caught.value.errno == 5
        assert b.tape.sent(DataOut) == []
        assert b.disk.contents(blocks=16) == content(0, 16)


@pytest.mark.conformance(64)
@pytest.mark.expect_log("success but asked for 4096 of 8192 bytes")
async def test_64_good_with_half_of_it_missing_is_no_success() -> None:
    """GOOD after the first of two R2Ts → not believed; the next attempt, asked for whole, is a success."""
    async with unit_bench(keys=ASKED_ONLY) as b, conversation() as nursery:
        b.hold(WRITE, times=1)
        nursery.start_soon(partial(b.unit.write, memoryview(DATA), lba=0))
        command = await b.taken()
        b.say(ask(command, 0, 4096))
        await b.data_out(4)
        b.good(command)
    assert b.disk.contents(blocks=16) == DATA


ABOUT_DATA = [(0x0C, 0x0C), (0x0C, 0x0D)]
"""Unexpected unsolicited data; not enough unsolicited data."""


def _refuse(asc: int, ascq: int) -> Answer:
    return Answer(Status.CHECK_CONDITION, sense(SenseKey.ABORTED_COMMAND, asc, ascq))


@pytest.mark.conformance(65)
@pytest.mark.parametrize(("asc", "ascq"), ABOUT_DATA)
async def test_65_aborted_over_its_data_is_sent_again(asc: int, ascq: int) -> None:
    """ABORTED COMMAND 0C/0C or 0C/0D, three times → the write is sent anew each time, with a new CmdSN and ITT, and
    with all of its data; it is executed once."""
    async with unit_bench() as b:
        b.rule(IN, _refuse(asc, ascq), all_of(WRITE, COMMAND), times=3)
        await b.unit.write(memoryview(DATA), lba=0)
        commands = [pdu for pdu in b.tape.sent(ScsiCommand) if pdu.write]
        first = commands[0].cmd_sn
        assert [command.cmd_sn for command in commands] == [first, first + 1, first + 2, first + 3]
        assert len({command.itt for command in commands}) == 4
        assert [command.data for command in commands] == [DATA] * 4
        assert len(b.target.engine().executed("WRITE(10)")) == 1
    assert b.disk.contents(blocks=16) == DATA


@pytest.mark.conformance(65)
@pytest.mark.parametrize(("asc", "ascq"), ABOUT_DATA)
async def test_65_aborted_over_its_data_for_ever_is_an_error(asc: int, ascq: int) -> None:
    """The same for ever → EIO after six attempts, and nothing was executed."""
    async with unit_bench() as b:
        b.rule(IN, _refuse(asc, ascq), all_of(WRITE, COMMAND), times=0)
        with pytest.raises(CommandError) as caught:
            await b.unit.write(memoryview(DATA), lba=0)
        assert (caught.value.errno, caught.value.asc, caught.value.ascq) == (5, asc, ascq)
        assert len([pdu for pdu in b.tape.sent(ScsiCommand) if pdu.write]) == 6
        assert b.target.engine().executed("WRITE(10)") == []
        assert await b.read(0) == content(0)
