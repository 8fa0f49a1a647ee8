from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import (
    CommandTimeoutError,
    DigestError,
    FormatError,
    IscsifuseError,
    ProtocolError,
    SessionLostError,
    TransferError,
)
from iscsifuse.iscsi.tasks import Task

LUN = bytes(8)
GOOD, CHECK_CONDITION, BUSY = 0x00, 0x02, 0x08


def reading(length: int, *, exact: bool = True) -> Task:
    return Task(bytes(10), lun=LUN, buffer_in=memoryview(bytearray(length)), exact=exact)


def writing(length: int) -> Task:
    return Task(bytes(10), lun=LUN, buffer_out=memoryview(bytes(range(256)) * (length // 256 + 1))[:length])


def finish(
    task: Task, status: int = GOOD, *, underflow: int | None = None, overflow: int | None = None
) -> IscsifuseError | None:
    task.finish(
        status=status,
        residual=underflow or overflow or 0,
        underflow=underflow is not None,
        overflow=overflow is not None,
    )
    assert task.done
    assert task.status == status
    return task.error


def test_expected_length() -> None:
    assert reading(512).expected == 512
    assert writing(1024).expected == 1024
    assert Task(bytes(6), lun=LUN).expected == 0
    assert Task(bytes(6), lun=LUN, buffer_in=memoryview(bytearray())).expected == 0


@pytest.mark.conformance(124)
@pytest.mark.parametrize(("cdb", "lun"), [(17, 8), (32, 8), (10, 7), (10, 9), (10, 0)])
def test_what_an_encoder_would_cut_or_pad_is_refused(cdb: int, lun: int) -> None:
    with pytest.raises(ValueError, match=f"CDB of {cdb} bytes, a LUN of {lun}"):
        Task(bytes(cdb), lun=bytes(lun))


# --- Data-In ---


def test_data_in_goes_where_it_belongs() -> None:
    memory = bytearray(10)
    task = Task(bytes(10), lun=LUN, buffer_in=memoryview(memory))
    for data_sn, (offset, data) in enumerate([(0, b"abcd"), (4, b"ef"), (6, b"ghij")]):
        place = task.place(data_sn=data_sn, offset=offset, length=len(data))
        assert place is not None
        place[:] = data
    assert memory == b"abcdefghij"
    assert task.received == 10
    assert task.next_data_sn == 3


@pytest.mark.conformance(68)
@pytest.mark.parametrize("data_sn", [2, 3, 1000, 0x7FFFFFFF])
def test_gap_in_data_sn(data_sn: int) -> None:
    task = reading(100)
    task.place(data_sn=0, offset=0, length=10)
    with pytest.raises(ProtocolError, match="missing"):
        task.place(data_sn=data_sn, offset=10, length=10)


@pytest.mark.conformance(68)
@pytest.mark.parametrize(("data_sn", "offset"), [(0, 0), (1, 10), (0xFFFFFFFF, 50)])
def test_duplicate_data_in_has_no_place(data_sn: int, offset: int) -> None:
    task = reading(100)
    task.place(data_sn=0, offset=0, length=10)
    task.place(data_sn=1, offset=10, length=10)
    assert task.place(data_sn=data_sn, offset=offset, length=10) is None
    assert task.received == 20
    assert task.place(data_sn=2, offset=20, length=80) is not None


def test_data_sn_half_the_circle_away_is_no_duplicate() -> None:
    task = reading(100)
    with pytest.raises(ProtocolError, match="missing"):
        task.place(data_sn=0x80000000, offset=0, length=10)


def test_data_sn_wraps() -> None:
    task = reading(100)
    task.next_data_sn = 0xFFFFFFFF
    task.place(data_sn=0xFFFFFFFF, offset=0, length=10)
    assert task.next_data_sn == 0
    assert task.place(data_sn=0xFFFFFFFF, offset=0, length=10) is None
    assert task.place(data_sn=0, offset=10, length=10) is not None


@pytest.mark.conformance(71)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (11, 10),
        (9, 10),
        (0, 10),
        (0, 20),
        (10, 91),
        (100, 1),
        (101, 0),
        (0xFFFFFFFF, 2),
        (0xFFFFF000, 0x2000),
        (11, 0),
    ],
)
def test_offset_gap_overlap_or_beyond_the_end(offset: int, length: int) -> None:
    task = reading(100)
    task.place(data_sn=0, offset=0, length=10)
    with pytest.raises(ProtocolError, match=f"{length} bytes at offset {offset}"):
        task.place(data_sn=1, offset=offset, length=length)
    assert task.received == 10


@pytest.mark.conformance(67)
def test_data_in_of_zero_length() -> None:
    task = reading(100)
    task.place(data_sn=0, offset=0, length=0)
    task.place(data_sn=1, offset=0, length=100)
    task.place(data_sn=2, offset=100, length=0)
    assert finish(task) is None


@pytest.mark.parametrize("task", [writing(100), Task(bytes(6), lun=LUN)])
def test_data_in_for_a_command_that_reads_nothing(task: Task) -> None:
    with pytest.raises(ProtocolError, match="reads nothing"):
        task.place(data_sn=0, offset=0, length=10)


# --- R2T ---


def r2t(task: Task, offset: int, length: int, *, r2t_sn: int | None = None, burst: int = 1 << 24) -> bytes:
    number = task.next_r2t_sn if r2t_sn is None else r2t_sn
    return bytes(task.take_r2t(r2t_sn=number, offset=offset, length=length, max_burst_length=burst))


@pytest.mark.conformance(61)
@pytest.mark.conformance("B1")
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 0),
        (1000, 0),
        (0, 1001),
        (1, 1000),
        (999, 2),
        (1000, 1),
        (0xFFFFF000, 0x2000),
        (0xFFFFFFFF, 1),
        (0, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
    ],
)
def test_r2t_for_bytes_that_are_not_there(offset: int, length: int) -> None:
    task = writing(1000)
    with pytest.raises(ProtocolError, match=f"{length} bytes at offset {offset}"):
        r2t(task, offset, length)
    assert task.solicited == 0


@pytest.mark.conformance(61)
def test_r2t_beyond_max_burst_length() -> None:
    task = writing(1000)
    assert len(r2t(task, 0, 512, burst=512)) == 512
    with pytest.raises(ProtocolError, match="513 bytes"):
        r2t(task, 0, 513, burst=512)


@pytest.mark.conformance(61)
@pytest.mark.parametrize("r2t_sn", [0, 2, 0xFFFFFFFF])
def test_r2t_that_is_not_the_next_one(r2t_sn: int) -> None:
    task = writing(1000)
    r2t(task, 0, 10)
    with pytest.raises(ProtocolError, match=f"R2TSN {r2t_sn} came where 1 was due"):
        r2t(task, 10, 10, r2t_sn=r2t_sn)


def test_r2t_sn_wraps() -> None:
    task = writing(1000)
    task.next_r2t_sn = 0xFFFFFFFF
    r2t(task, 0, 10)
    assert task.next_r2t_sn == 0


@pytest.mark.conformance(61)
@pytest.mark.parametrize("task", [reading(100), Task(bytes(6), lun=LUN)])
def test_r2t_for_a_command_that_writes_nothing(task: Task) -> None:
    with pytest.raises(ProtocolError, match="writes nothing"):
        r2t(task, 0, 10)


def test_what_an_r2t_asks_for_is_not_copied() -> None:
    memory = bytearray(b"0123456789")
    task = Task(bytes(10), lun=LUN, buffer_out=memoryview(memory))
    piece = task.take_r2t(r2t_sn=0, offset=3, length=4, max_burst_length=100)
    assert piece.obj is memory
    assert bytes(piece) == b"3456"


@pytest.mark.conformance(60)
def test_the_same_bytes_again() -> None:
    task = writing(1000)
    first = r2t(task, 100, 300)
    assert r2t(task, 100, 300) == first
    assert r2t(task, 150, 50) == first[50:100]


@pytest.mark.conformance("B10")
def test_the_same_bytes_for_ever() -> None:
    task = writing(1000)
    for _ in range(16):
        r2t(task, 0, 1000)
    with pytest.raises(ProtocolError, match="17000 bytes of a write of 1000"):
        r2t(task, 0, 1000)


@pytest.mark.conformance(59)
@pytest.mark.conformance(64)
@given(
    length=st.integers(1, 60),
    unsolicited=st.integers(0, 60),
    ranges=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 60)), max_size=12),
)
def test_every_byte_is_counted_once(length: int, unsolicited: int, ranges: list[tuple[int, int]]) -> None:
    task = writing(length)
    task.solicited = min(unsolicited, length)
    asked = [offset < task.solicited for offset in range(length)]
    whole = task.buffer_out
    assert whole is not None
    for offset, size in ranges:
        if offset + size <= length:
            assert r2t(task, offset, size) == whole[offset : offset + size]
            asked[offset : offset + size] = [True] * size
            assert task.solicited == [*asked, False].index(False)
            ahead = [(task.solicited, task.solicited), *task._ahead]
            assert all(a[1] < b[0] for a, b in pairwise(ahead))
    assert (finish(task) is None) == all(asked)


# --- how it ended ---


def received(task: Task, count: int) -> Task:
    if count:
        task.place(data_sn=0, offset=0, length=count)
    return task


def solicited(task: Task, count: int) -> Task:
    if count:
        r2t(task, 0, count)
    return task


@pytest.mark.parametrize("exact", [False, True])
def test_everything_moved(exact: bool) -> None:
    assert finish(received(reading(512, exact=exact), 512)) is None
    assert finish(solicited(writing(512), 512)) is None
    assert finish(Task(bytes(6), lun=LUN)) is None
    assert finish(writing(0)) is None
    assert finish(reading(0)) is None


@pytest.mark.conformance(69)
@pytest.mark.parametrize("count", [0, 1, 511])
def test_a_read_that_succeeds_without_all_of_its_data(count: int) -> None:
    error = finish(received(reading(512), count))
    assert isinstance(error, TransferError)
    assert str(error) == f"the target reported success but sent {count} of 512 bytes"


@pytest.mark.conformance(72)
@pytest.mark.parametrize(("count", "residual"), [(0, 512), (500, 12), (500, 0), (512, 12), (512, 0)])
def test_underflow_of_a_media_read(count: int, residual: int) -> None:
    assert isinstance(finish(received(reading(512), count), underflow=residual), TransferError)


def test_overflow_of_a_media_read() -> None:
    # The target thinks that the command meant more bytes than we do: these needn't be the ones that we mean.
    error = finish(received(reading(512), 512), overflow=3584)
    assert isinstance(error, TransferError)
    assert "residual of 3584" in str(error)


@pytest.mark.conformance(72)
def test_underflow_of_parameter_data_is_shorter_data() -> None:
    task = received(reading(255, exact=False), 36)
    assert finish(task, underflow=219) is None
    assert task.received == 36
    assert task.residual == 219
    assert task.underflow


@pytest.mark.conformance(69)
@pytest.mark.parametrize("residual", [0, 218])
def test_underflow_of_parameter_data_that_does_not_add_up(residual: int) -> None:
    error = finish(received(reading(255, exact=False), 36), underflow=residual)
    assert isinstance(error, TransferError)
    assert f"{residual} of 255 bytes are missing, but sent 36" in str(error)


def test_a_command_without_data_has_nothing_to_be_short_of() -> None:
    assert finish(Task(bytes(6), lun=LUN), underflow=0) is None
    assert finish(Task(bytes(6), lun=LUN), overflow=36) is None
    assert Task(bytes(6), lun=LUN).shortfall() is None


def test_overflow_of_parameter_data_is_more_than_we_asked_for() -> None:
    task = received(reading(255, exact=False), 255)
    assert finish(task, overflow=1000) is None
    assert task.overflow
    assert task.residual == 1000


def test_short_parameter_data_without_a_residual_count() -> None:
    task = received(reading(255, exact=False), 36)
    assert finish(task) is None
    assert task.received == 36


def test_residual_count_without_a_flag_is_reserved() -> None:
    task = received(reading(512), 512)
    task.finish(status=GOOD, residual=12345, underflow=False, overflow=False)
    assert task.error is None
    assert task.residual == 0


@pytest.mark.conformance(63)
@pytest.mark.parametrize("flag", ["underflow", "overflow"])
def test_a_write_with_a_residual(flag: str) -> None:
    task = solicited(writing(512), 512)
    error = finish(task, underflow=5) if flag == "underflow" else finish(task, overflow=5)
    assert isinstance(error, TransferError)
    assert "residual of 5 bytes of a write of 512" in str(error)


@pytest.mark.conformance(64)
@pytest.mark.parametrize("count", [0, 1, 511])
def test_a_write_that_succeeds_though_not_all_was_asked_for(count: int) -> None:
    error = finish(solicited(writing(512), count))
    assert isinstance(error, TransferError)
    assert str(error) == f"the target reported success but asked for {count} of 512 bytes"


@pytest.mark.conformance(62)
@pytest.mark.parametrize("status", [CHECK_CONDITION, BUSY])
def test_another_status_speaks_for_itself_but_can_be_asked(status: int) -> None:
    task = solicited(writing(512), 100)
    assert finish(task, status) is None
    assert isinstance(task.shortfall(), TransferError)
    task = received(reading(512), 100)
    assert finish(task, status, underflow=412) is None
    assert isinstance(task.shortfall(), TransferError)
    task = received(reading(512), 512)
    assert finish(task, status) is None
    assert task.shortfall() is None


@pytest.mark.conformance(79)
def test_an_earlier_error_stays() -> None:
    for last in (lambda t: finish(t), lambda t: t.fail(SessionLostError("gone"))):
        task = received(reading(512), 100)
        task.error = DigestError("damaged", header=False)
        last(task)
        assert task.done
        assert isinstance(task.error, DigestError)


def test_fail() -> None:
    task = reading(512)
    error = CommandTimeoutError("too slow")
    task.fail(error)
    assert task.done
    assert task.error is error
    assert task.status == -1


# --- sense ---


@pytest.mark.parametrize(
    ("segment", "sense"),
    [
        (b"\x00\x03abc", b"abc"),
        (b"\x00\x03abc\x00", b"abc"),
        (b"\x00\x00", b""),
        (b"\x00\x00response data", b""),
        (b"\x01\x00" + bytes(256), bytes(256)),
    ],
)
def test_sense(segment: bytes, sense: bytes) -> None:
    task = reading(512)
    task.take_sense(segment)
    assert task.sense == sense


@pytest.mark.conformance("B3")
@pytest.mark.parametrize(
    "segment", [b"", b"\x00", b"\x12", b"\x00\x01", b"\x00\x13" + bytes(18), b"\xff\xff" + bytes(252)]
)
def test_sense_beyond_its_segment(segment: bytes) -> None:
    task = reading(512)
    with pytest.raises(FormatError):
        task.take_sense(segment)
    assert task.sense == b""


# --- data that was thrown away ---


@pytest.mark.conformance(90)
@given(
    length=st.integers(1, 40),
    unsolicited=st.integers(0, 40),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 45), st.integers(0, 45)), max_size=12),
)
def test_data_that_was_thrown_away_does_not_count(
    length: int, unsolicited: int, steps: list[tuple[bool, int, int]]
) -> None:
    """Against a set of numbers: R2Ts put bytes into it, Rejects take them out again."""
    task = writing(length)
    task.solicited = min(unsolicited, length)
    there = set(range(task.solicited))
    for asked, offset, count in steps:
        span = range(offset, offset + count)
        if not asked:
            changed = bool(there & set(span))
            assert task.take_back(offset=offset, length=count) is changed
            there -= set(span)
        elif count and offset + count <= length:
            task.take_r2t(r2t_sn=task.next_r2t_sn, offset=offset, length=count, max_burst_length=100)
            there |= set(span)
    error = finish(task)
    assert isinstance(error, TransferError) == (len(there) < length)


@pytest.mark.conformance(90)
def test_a_status_that_is_no_success_stays_what_it_is() -> None:
    task = writing(1000)
    task.solicited = 1000
    assert task.take_back(offset=0, length=1000)
    assert finish(task, CHECK_CONDITION) is None
