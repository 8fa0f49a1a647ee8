import pytest
from connection_driver import LUN, READ_CDB, Driver, no_data, pattern, read, write

from iscsifuse.errors import FormatError, ProtocolError, TransferError
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.request import ScsiCommand, TaskAttribute
from iscsifuse.iscsi.response import DataIn, ScsiResponse

pytestmark = pytest.mark.usefixtures("both_ways")

CHECK_CONDITION, BUSY = 2, 8
SENSE = bytes([0x70, 0, 3, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0])


def with_length(sense: bytes) -> bytes:
    return len(sense).to_bytes(2, "big") + sense


def test_the_command() -> None:
    d = Driver()
    task, _ = read(512)
    assert d.submit(task) == [
        ScsiCommand(
            itt=task.itt,
            read=True,
            attribute=TaskAttribute.SIMPLE,
            lun=LUN,
            expected_data_transfer_length=512,
            cmd_sn=10,
            exp_stat_sn=100,
            cdb=READ_CDB + bytes(6),
        )
    ]
    assert task.cmd_sn == 10


def test_a_command_without_data() -> None:
    d = Driver()
    task = no_data()
    (command,) = d.submit(task)
    assert isinstance(command, ScsiCommand)
    assert (command.read, command.write, command.final) == (False, False, True)
    assert d.good(task) == [task]
    assert task.status == 0
    assert task.error is None


@pytest.mark.conformance(66)
@pytest.mark.parametrize("collapsed", [True, False])
def test_status_in_the_last_data_in_or_of_its_own(collapsed: bool) -> None:
    d = Driver()
    task, memory = read(1000)
    d.submit(task)
    data = pattern(1000)
    assert d.give(DataIn(itt=task.itt, data_sn=0, buffer_offset=0, data=data[:600], final=False)) == []
    assert d.connection.exp_stat_sn == 100
    events = d.give(DataIn(itt=task.itt, data_sn=1, buffer_offset=600, data=data[600:], has_status=collapsed))
    if not collapsed:
        assert events == []
        assert d.connection.tasks == {task.itt: task}
        events = d.give(ScsiResponse(itt=task.itt, exp_data_sn=2))
    assert events == [task]
    assert task.done
    assert task.status == 0
    assert task.error is None
    assert memory == data
    assert d.connection.exp_stat_sn == 101
    assert d.connection.idle


@pytest.mark.parametrize("cut", [1, 47, 48, 500, 1047])
def test_a_part_of_a_pdu_is_known_to_be_one(cut: int) -> None:
    d = Driver()
    task, _ = read(1000)
    d.submit(task)
    stream = d.encoded(DataIn(itt=task.itt, data=pattern(1000), has_status=True))
    amid = [d.connection.amid]
    for piece in (stream[:cut], stream[cut:]):
        d.receive(piece)
        amid.append(d.connection.amid)
    assert amid == [False, True, False]


def test_payload_is_received_where_the_caller_wants_it() -> None:
    d = Driver(NegotiatedParameters(max_recv_data_segment_length=262144))
    task, memory = read(200_000)
    d.submit(task)
    data = pattern(200_000)
    stream = d.encoded(DataIn(itt=task.itt, data=data, has_status=True))
    d.receive(stream[:48])
    first = d.connection.buffers()[0]
    assert first.obj is memory
    assert len(first) == 200_000
    assert d.receive(stream[48:]) == [task]
    assert memory == data


@pytest.mark.conformance(67)
@pytest.mark.parametrize("has_status", [True, False])
def test_data_in_of_zero_length(has_status: bool) -> None:
    d = Driver()
    task, memory = read(8)
    d.submit(task)
    d.give(DataIn(itt=task.itt, data_sn=0, final=False))
    d.give(DataIn(itt=task.itt, data_sn=1, data=b"abcdefgh", final=False))
    events = d.give(DataIn(itt=task.itt, data_sn=2, buffer_offset=8, has_status=has_status))
    assert (events == [task]) == has_status
    if not has_status:
        assert d.give(ScsiResponse(itt=task.itt, exp_data_sn=3)) == [task]
    assert task.error is None
    assert memory == b"abcdefgh"


@pytest.mark.conformance(68)
def test_gap_in_data_sn() -> None:
    d = Driver()
    task, _ = read(16)
    d.submit(task)
    d.give(DataIn(itt=task.itt, data_sn=0, data=b"abcd", final=False))
    with pytest.raises(ProtocolError, match="DataSN 2"):
        d.give(DataIn(itt=task.itt, data_sn=2, buffer_offset=4, data=b"efgh"))


@pytest.mark.conformance(68)
@pytest.mark.parametrize("data", [b"ABCD", b""])
def test_duplicate_is_discarded(data: bytes) -> None:
    d = Driver()
    task, memory = read(8)
    d.submit(task)
    d.give(DataIn(itt=task.itt, data_sn=0, data=b"abcd", final=False))
    assert d.give(DataIn(itt=task.itt, data_sn=0, data=data, final=False)) == []
    assert d.give(DataIn(itt=task.itt, data_sn=1, buffer_offset=4, data=b"efgh", has_status=True)) == [task]
    assert task.error is None
    assert memory == b"abcdefgh"


@pytest.mark.conformance(69)
@pytest.mark.parametrize("missing", [4, 12, 16])
def test_left_out_data_in(missing: int) -> None:
    d = Driver()
    task, _ = read(16)
    d.submit(task)
    if missing < 16:
        d.give(DataIn(itt=task.itt, data=bytes(16 - missing)))
    assert d.good(task) == [task]
    assert isinstance(task.error, TransferError)


@pytest.mark.conformance(70)
@pytest.mark.parametrize("exp_data_sn", [0, 2, 0xFFFFFFFF])
def test_exp_data_sn_differs(exp_data_sn: int) -> None:
    d = Driver()
    task, _ = read(16)
    d.submit(task)
    d.give(DataIn(itt=task.itt, data=bytes(16)))
    with pytest.raises(ProtocolError, match=f"1 Data-In PDUs came, but the target sent {exp_data_sn}"):
        d.give(ScsiResponse(itt=task.itt, exp_data_sn=exp_data_sn))
    assert not task.done


def test_exp_data_sn_means_nothing_without_a_read_or_success() -> None:
    d = Driver()
    plain, (failed, _), (rejected, _) = no_data(), read(16), read(16)
    d.submit(plain, failed, rejected)
    assert d.give(ScsiResponse(itt=plain.itt, exp_data_sn=7)) == [plain]
    assert d.give(ScsiResponse(itt=failed.itt, status=BUSY, exp_data_sn=7)) == [failed]
    assert d.give(ScsiResponse(itt=rejected.itt, response=1, exp_data_sn=7)) == [rejected]
    assert plain.error is failed.error is None


@pytest.mark.conformance(71)
@pytest.mark.parametrize(("offset", "length"), [(5, 4), (3, 4), (0, 4), (4, 13), (0xFFFFFFFC, 4)])
def test_offset_gap_overlap_or_beyond_the_end(offset: int, length: int) -> None:
    d = Driver()
    task, memory = read(16)
    d.submit(task)
    d.give(DataIn(itt=task.itt, data=b"abcd", final=False))
    before = bytes(memory)
    with pytest.raises(ProtocolError):
        d.give(DataIn(itt=task.itt, data_sn=1, buffer_offset=offset, data=b"X" * length))
    assert memory == before
    assert not task.done


@pytest.mark.conformance(71)
def test_status_without_final() -> None:
    d = Driver()
    task, _ = read(16)
    d.submit(task)
    with pytest.raises(ProtocolError, match="isn't the final one"):
        d.give(DataIn(itt=task.itt, data=bytes(16), has_status=True, final=False))


@pytest.mark.conformance(72)
@pytest.mark.parametrize("collapsed", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_underflow(collapsed: bool, exact: bool) -> None:
    d = Driver()
    task, memory = read(255, exact=exact)
    d.submit(task)
    if collapsed:
        data_in = DataIn(itt=task.itt, data=pattern(36), has_status=True, underflow=True, residual_count=219)
        assert d.give(data_in) == [task]
    else:
        d.give(DataIn(itt=task.itt, data=pattern(36)))
        response = ScsiResponse(itt=task.itt, exp_data_sn=1, underflow=True, residual_count=219)
        assert d.give(response) == [task]
    assert isinstance(task.error, TransferError) == exact
    assert (task.received, task.residual, task.underflow, task.overflow) == (36, 219, True, False)
    assert memory[:36] == pattern(36)


@pytest.mark.parametrize("collapsed", [True, False])
def test_overflow(collapsed: bool) -> None:
    d = Driver()
    task, _ = read(512)
    d.submit(task)
    if collapsed:
        d.give(DataIn(itt=task.itt, data=bytes(512), has_status=True, overflow=True, residual_count=3584))
    else:
        d.give(DataIn(itt=task.itt, data=bytes(512)))
        d.give(ScsiResponse(itt=task.itt, exp_data_sn=1, overflow=True, residual_count=3584))
    assert isinstance(task.error, TransferError)
    assert (task.residual, task.underflow, task.overflow) == (3584, False, True)


@pytest.mark.conformance(73)
@pytest.mark.parametrize("response", [1, 2, 0x80, 0xFF])
@pytest.mark.parametrize("segment", [b"", with_length(SENSE)])
def test_response_code(response: int, segment: bytes) -> None:
    d = Driver()
    task, _ = read(16)
    d.submit(task)
    d.give(DataIn(itt=task.itt, data=bytes(16)))
    assert d.give(ScsiResponse(itt=task.itt, response=response, status=0, data=segment)) == [task]
    assert isinstance(task.error, TransferError)
    assert f"{response:#04x}" in str(task.error)


@pytest.mark.conformance(74)
def test_check_condition_without_sense() -> None:
    d = Driver()
    task, _ = read(16)
    d.submit(task)
    with pytest.raises(FormatError, match="without sense"):
        d.give(ScsiResponse(itt=task.itt, status=CHECK_CONDITION))
    assert not task.done


@pytest.mark.conformance("B3")
@pytest.mark.parametrize("segment", [b"\x00", b"\x00\x13" + SENSE, b"\xff\xff" + SENSE])
def test_sense_beyond_its_segment(segment: bytes) -> None:
    d = Driver()
    task, _ = read(16)
    d.submit(task)
    with pytest.raises(FormatError):
        d.give(ScsiResponse(itt=task.itt, status=CHECK_CONDITION, data=segment))
    assert not task.done
    assert d.connection.fail_all(ProtocolError("broken")) == [task]


@pytest.mark.parametrize(("underflow", "overflow"), [(True, False), (False, True), (False, False)])
def test_check_condition(underflow: bool, overflow: bool) -> None:
    d = Driver()
    task, _ = read(16)
    d.submit(task)
    d.give(DataIn(itt=task.itt, data=bytes(4)))
    response = ScsiResponse(
        itt=task.itt,
        status=CHECK_CONDITION,
        exp_data_sn=1,
        underflow=underflow,
        overflow=overflow,
        residual_count=12,
        data=with_length(SENSE),
    )
    assert d.give(response) == [task]
    assert task.status == CHECK_CONDITION
    assert task.sense == SENSE
    assert task.error is None
    assert task.received == 4
    assert (task.underflow, task.overflow, task.residual) == (underflow, overflow, 12 * (underflow or overflow))


@pytest.mark.conformance(75)
@pytest.mark.parametrize("data", [b"", bytes(16)])
def test_check_condition_inside_data_in(data: bytes) -> None:
    d = Driver()
    task, _ = read(16)
    d.submit(task)
    with pytest.raises(ProtocolError, match="CHECK CONDITION"):
        d.give(DataIn(itt=task.itt, data=data, has_status=True, status=CHECK_CONDITION))


@pytest.mark.conformance(76)
def test_acknowledge_bit_is_ignored() -> None:
    d = Driver()
    task, memory = read(8)
    d.submit(task)
    pdu = DataIn(itt=task.itt, data=b"abcd", acknowledge=True, ttt=77, lun=LUN)
    assert d.give(pdu) == []
    assert d.sent() == []
    pdu = DataIn(itt=task.itt, data_sn=1, buffer_offset=4, data=b"efgh", acknowledge=True, ttt=78, has_status=True)
    assert d.give(pdu) == [task]
    assert task.error is None
    assert memory == b"abcdefgh"


@pytest.mark.conformance(52)
@pytest.mark.parametrize("data", [b"", b"abcd"])
@pytest.mark.parametrize("has_status", [True, False])
def test_data_in_for_nobody(data: bytes, has_status: bool) -> None:
    d = Driver()
    task, memory = read(4)
    d.submit(task)
    assert d.give(DataIn(itt=task.itt + 1, data=data, has_status=has_status)) == []
    assert memory == b"\xee" * 4
    assert not task.done
    assert d.give(DataIn(itt=task.itt, data=b"mine", has_status=True)) == [task]
    assert memory == b"mine"


def test_data_in_for_a_write() -> None:
    d = Driver()
    task = write(16)
    d.submit(task)
    with pytest.raises(ProtocolError, match="reads nothing"):
        d.give(DataIn(itt=task.itt, data=b"abcd"))


def test_one_receive_with_several_answers_in_order() -> None:
    d = Driver()
    tasks = [read(8)[0] for _ in range(4)]
    d.submit(*tasks)
    order = [tasks[2], tasks[0], tasks[3], tasks[1]]
    stream = b"".join(d.encoded(DataIn(itt=task.itt, data=bytes(8), has_status=True)) for task in order)
    assert d.receive(stream) == order


def test_those_who_were_done_before_an_error_are_not_lost() -> None:
    d = Driver()
    (first, _), (second, _) = read(8), read(8)
    d.submit(first, second)
    stream = d.encoded(DataIn(itt=first.itt, data=bytes(8), has_status=True))
    stream += d.encoded(DataIn(itt=second.itt, data=bytes(9)))
    with pytest.raises(ProtocolError):
        d.receive(stream)
    assert d.connection.take_events() == [first]
    assert d.connection.take_events() == []
    assert first.error is None
    assert d.connection.fail_all(ProtocolError("broken")) == [second]
