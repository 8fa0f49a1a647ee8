from dataclasses import replace

import pytest
from connection_driver import LUN, WRITE_CDB, Driver, no_data, pattern, read, write

from iscsifuse.errors import FormatError, ProtocolError, TransferError
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import RESERVED_TAG, Pdu
from iscsifuse.iscsi.request import DataOut, LogoutRequest, ScsiCommand
from iscsifuse.iscsi.response import R2T, NopIn, ScsiResponse
from iscsifuse.iscsi.tasks import Task

pytestmark = pytest.mark.usefixtures("both_ways")

CHECK_CONDITION = 2
SENSE = b"\x00\x03abc"


def parameters(
    *, initial_r2t: bool = True, immediate_data: bool = False, segment: int = 8192, burst: int = 262144
) -> NegotiatedParameters:
    return NegotiatedParameters(
        initial_r2t=initial_r2t,
        immediate_data=immediate_data,
        first_burst_length=65536,
        max_burst_length=burst,
        target_max_recv_data_segment_length=segment,
    )


def ask(task: Task, r2t_sn: int, offset: int, length: int, *, ttt: int = 0x1234) -> R2T:
    return R2T(
        itt=task.itt, lun=LUN, ttt=ttt, r2t_sn=r2t_sn, buffer_offset=offset, desired_data_transfer_length=length
    )


# --- what goes unasked ---

CELLS = [
    # InitialR2T, ImmediateData, length, immediate, F of the command, unsolicited Data-Out PDUs
    (True, False, 100_000, 0, True, []),
    (True, True, 100_000, 8192, True, []),
    (True, True, 8192, 8192, True, []),
    (True, True, 5, 5, True, []),
    (False, False, 100_000, 0, False, [8192] * 8),
    (False, False, 20_000, 0, False, [8192, 8192, 3616]),
    (False, False, 5, 0, False, [5]),
    (False, True, 100_000, 8192, False, [8192] * 7),
    (False, True, 65536, 8192, False, [8192] * 7),
    (False, True, 20_001, 8192, False, [8192, 3617]),
    (False, True, 8193, 8192, False, [1]),
    (False, True, 8192, 8192, True, []),
    (False, True, 5, 5, True, []),
]


@pytest.mark.conformance(54)
@pytest.mark.conformance(55)
@pytest.mark.conformance(56)
@pytest.mark.parametrize(("initial_r2t", "immediate_data", "length", "immediate", "final", "unsolicited"), CELLS)
def test_four_cells(
    initial_r2t: bool, immediate_data: bool, length: int, immediate: int, final: bool, unsolicited: list[int]
) -> None:
    d = Driver(parameters(initial_r2t=initial_r2t, immediate_data=immediate_data))
    task = write(length)
    command, *data_outs = d.submit(task)
    assert command == ScsiCommand(
        itt=task.itt,
        final=final,
        write=True,
        lun=LUN,
        expected_data_transfer_length=length,
        cmd_sn=10,
        exp_stat_sn=100,
        cdb=WRITE_CDB + bytes(6),
        data=pattern(length)[:immediate],
    )
    assert [len(pdu.data) for pdu in data_outs] == unsolicited
    check_burst(data_outs, task, start=immediate, ttt=RESERVED_TAG)
    total = immediate + sum(unsolicited)
    assert task.solicited == total
    if not initial_r2t:
        assert total == min(65536, length)


def check_burst(pdus: list[Pdu], task: Task, *, start: int, ttt: int) -> int:
    """Assert that these PDUs are one sequence of Data-Out; where it ends."""
    assert task.buffer_out is not None
    for number, pdu in enumerate(pdus):
        assert pdu == DataOut(
            itt=task.itt,
            final=number == len(pdus) - 1,
            lun=LUN,
            ttt=ttt,
            exp_stat_sn=100,
            data_sn=number,
            buffer_offset=start,
            data=bytes(task.buffer_out[start : start + len(pdu.data)]),
        )
        assert pdu.data
        start += len(pdu.data)
    return start


@pytest.mark.conformance(20)
@pytest.mark.conformance(55)
def test_first_burst_smaller_than_a_segment() -> None:
    p = NegotiatedParameters(
        initial_r2t=False, first_burst_length=512, max_burst_length=1024, target_max_recv_data_segment_length=8192
    )
    d = Driver(p)
    task = write(2000)
    (command,) = d.submit(task)
    assert command.data == pattern(512)
    assert isinstance(command, ScsiCommand)
    assert command.final


@pytest.mark.parametrize("digests", [True, False])
def test_immediate_data_is_not_copied(digests: bool) -> None:
    memory = bytearray(5)
    d = Driver(NegotiatedParameters(header_digest=digests, data_digest=digests))
    d.connection.submit(Task(WRITE_CDB, lun=LUN, buffer_out=memoryview(memory)))
    (view,) = [piece for piece in d.connection.output if isinstance(piece, memoryview)]
    assert view.obj is memory
    (command,) = d.sent()
    assert command.data == bytes(5)


def test_a_write_of_nothing() -> None:
    d = Driver(parameters(initial_r2t=False, immediate_data=True))
    task = write(0)
    (command,) = d.submit(task)
    assert isinstance(command, ScsiCommand)
    assert (command.write, command.final, command.data) == (True, True, b"")
    assert d.good(task) == [task]
    assert task.error is None


# --- what is asked for ---


@pytest.mark.conformance(57)
@pytest.mark.conformance(58)
@pytest.mark.conformance(56)
def test_r2ts_are_answered_exactly() -> None:
    d = Driver(parameters())
    task = write(50_000)
    d.submit(task)
    for r2t_sn, (offset, length, pieces) in enumerate([(0, 20_000, 3), (20_000, 8192, 1), (28_192, 21_808, 3)]):
        ttt = 0xCAFE0000 + r2t_sn
        assert d.give(ask(task, r2t_sn, offset, length, ttt=ttt)) == []
        pdus = d.sent()
        assert len(pdus) == pieces
        assert check_burst(pdus, task, start=offset, ttt=ttt) == offset + length
    assert d.good(task) == [task]
    assert task.error is None


def test_ttt_zero_is_a_tag_like_any_other() -> None:
    d = Driver(parameters())
    task = write(512)
    d.submit(task)
    d.give(ask(task, 0, 0, 512, ttt=0))
    assert check_burst(d.sent(), task, start=0, ttt=0) == 512


@pytest.mark.conformance(59)
def test_several_r2ts_out_of_order_are_served_as_received() -> None:
    d = Driver(replace(parameters(), max_outstanding_r2t=2))
    task, other = write(3000), write(1000)
    d.submit(task, other)
    requests = [ask(task, 0, 2000, 1000, ttt=7), ask(other, 0, 0, 1000, ttt=8), ask(task, 1, 0, 2000, ttt=9)]
    d.receive(b"".join(d.encoded(pdu) for pdu in requests))
    first, second, third = d.sent()
    assert check_burst([first], task, start=2000, ttt=7) == 3000
    assert check_burst([second], other, start=0, ttt=8) == 1000
    assert check_burst([third], task, start=0, ttt=9) == 2000
    assert d.good(task) == [task]
    assert task.error is None


@pytest.mark.conformance(61)
@pytest.mark.parametrize("limit", [1, 3])
def test_more_r2ts_at_once_than_were_agreed(limit: int) -> None:
    """They came before even the first one's data was handed over, so nobody can have answered them."""
    d = Driver(replace(parameters(), max_outstanding_r2t=limit))
    task, other = write(3000), write(3000)
    d.submit(task, other)
    for first in range(0, 2 * limit, limit):  # what was handed over counts no more, whatever is put out before
        d.give(NopIn(ttt=5))
        for number in range(first, first + limit):
            d.give(ask(task, number, 100 * number, 100))
            d.give(ask(other, number, 100 * number, 100))
        assert len(d.sent()) == 1 + 2 * limit
    for number in range(2 * limit, 3 * limit):
        d.give(ask(task, number, 100 * number, 100))
    with pytest.raises(ProtocolError, match=f"{limit + 1} R2Ts at once .* where {limit} were agreed"):
        d.give(ask(task, 3 * limit, 0, 100))


@pytest.mark.conformance(60)
def test_a_range_is_asked_for_again() -> None:
    d = Driver(parameters(initial_r2t=False, immediate_data=True))
    task = write(3000)
    d.submit(task)  # all of it went with the command
    d.give(ask(task, 0, 1000, 500))
    (first,) = d.sent()
    d.give(ask(task, 1, 1000, 500))
    (again,) = d.sent()
    assert first == again
    assert first.data == pattern(3000)[1000:1500]
    assert d.good(task) == [task]
    assert task.error is None


@pytest.mark.conformance(61)
@pytest.mark.conformance("B1")
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 0),
        (0, 1025),  # beyond MaxBurstLength
        (2000, 1),
        (1999, 2),
        (0xFFFFF000, 0x2000),
        (0xFFFFFFFF, 0xFFFFFFFF),
    ],
)
def test_r2t_out_of_bounds(offset: int, length: int) -> None:
    d = Driver(parameters(burst=1024))
    task = write(2000)
    d.submit(task)
    with pytest.raises(ProtocolError):
        d.give(ask(task, 0, offset, length))
    assert d.sent() == []


@pytest.mark.conformance(61)
@pytest.mark.parametrize("what", ["tag", "lun", "read", "gap", "repeated"])
def test_r2t_that_can_not_be(what: str) -> None:
    d = Driver(parameters())
    task, (reader, _) = write(2000), read(2000)
    d.submit(task, reader)
    d.give(ask(task, 0, 0, 1000))
    d.sent()
    bad = {
        "tag": ask(task, 1, 1000, 1000, ttt=RESERVED_TAG),
        "lun": R2T(itt=task.itt, ttt=5, r2t_sn=1, buffer_offset=1000, desired_data_transfer_length=1000),
        "read": ask(reader, 0, 0, 1000),
        "gap": ask(task, 2, 1000, 1000),
        "repeated": ask(task, 0, 0, 1000),
    }
    with pytest.raises(ProtocolError):
        d.give(bad[what])
    assert d.sent() == []
    assert d.connection.fail_all(ProtocolError("broken")) == [task, reader]


def test_r2t_with_data() -> None:
    d = Driver(parameters())
    task = write(2000)
    d.submit(task)
    stream = bytearray(d.encoded(ask(task, 0, 0, 1000)))
    stream[7] = 4
    with pytest.raises(FormatError, match="R2T with a data segment"):
        d.receive(bytes(stream) + b"abcd")


@pytest.mark.conformance(52)
def test_r2t_for_nobody() -> None:
    d = Driver(parameters())
    task = write(512)
    d.submit(task)
    assert d.give(R2T(itt=task.itt + 1, lun=LUN, ttt=5, desired_data_transfer_length=512)) == []
    assert d.sent() == []


@pytest.mark.conformance(91)
def test_no_data_after_a_logout() -> None:
    d = Driver(parameters())
    task = write(512)
    d.submit(task)
    d.connection.request(LogoutRequest())
    d.sent()
    assert d.give(ask(task, 0, 0, 512)) == []
    assert d.sent() == []


# --- how it ends ---


@pytest.mark.conformance(62)
def test_check_condition_in_mid_transfer() -> None:
    d = Driver(parameters())
    task = write(2000)
    d.submit(task)
    d.give(ask(task, 0, 0, 1000))
    d.sent()
    assert d.give(ScsiResponse(itt=task.itt, status=CHECK_CONDITION, data=SENSE)) == [task]
    assert (task.status, task.sense) == (CHECK_CONDITION, b"abc")
    assert isinstance(task.shortfall(), TransferError)
    assert d.give(ask(task, 1, 1000, 1000)) == []
    assert d.sent() == []


@pytest.mark.conformance(63)
@pytest.mark.parametrize(("underflow", "overflow"), [(True, False), (False, True)])
def test_good_with_a_residual(underflow: bool, overflow: bool) -> None:
    d = Driver(parameters())
    task = write(512)
    d.submit(task)
    d.give(ask(task, 0, 0, 512))
    response = ScsiResponse(itt=task.itt, underflow=underflow, overflow=overflow, residual_count=100)
    assert d.give(response) == [task]
    assert isinstance(task.error, TransferError)


@pytest.mark.conformance(64)
@pytest.mark.parametrize("asked", [0, 1000, 1999])
def test_good_though_not_all_was_asked_for(asked: int) -> None:
    d = Driver(parameters())
    task = write(2000)
    d.submit(task)
    if asked:
        d.give(ask(task, 0, 0, asked))
    assert d.good(task) == [task]
    assert isinstance(task.error, TransferError)


def test_exp_data_sn_of_a_write_is_not_looked_at() -> None:
    d = Driver(parameters(immediate_data=True))
    task = write(512)
    d.submit(task)
    assert d.give(ScsiResponse(itt=task.itt, exp_data_sn=3)) == [task]
    assert task.error is None


def test_no_data_commands_and_writes_share_the_numbers() -> None:
    d = Driver(parameters())
    commands = d.submit(no_data(), write(5), no_data())
    assert [pdu.cmd_sn for pdu in commands if isinstance(pdu, ScsiCommand)] == [10, 11, 12]
