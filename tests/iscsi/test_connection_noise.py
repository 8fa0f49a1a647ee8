"""Whatever comes in: only errors of ours come out, and every command ends once."""

import contextlib
import sys

import pytest
from connection_driver import LUN, Driver, no_data, pattern, read, write
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import IscsifuseError, SessionLostError
from iscsifuse.iscsi.incoming import Event
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import RESERVED_TAG, Opcode
from iscsifuse.iscsi.request import NopOut, TaskManagementRequest, TextRequest
from iscsifuse.iscsi.response import DataIn
from iscsifuse.iscsi.tasks import Task

pytestmark = pytest.mark.usefixtures("both_ways")


def busy(p: NegotiatedParameters) -> tuple[Driver, list[Task]]:
    d = Driver(p, stat_sn=0, cmd_sn=0, room=5)
    tasks = [read(300)[0], write(300), no_data(), read(300, exact=False)[0], write(40_000), no_data()]
    d.submit(*tasks)  # tags from 1; the last one waits
    d.connection.request(NopOut(immediate=True))
    d.connection.request(TaskManagementRequest())
    d.connection.request(TextRequest())
    return d, tasks


small = st.integers(0, 8) | st.sampled_from([300, 0xFFFFFFFF, 0x80000000, 0xFFFFF000])
words = st.lists(small | st.integers(0, 0xFFFFFFFF), min_size=10, max_size=10)
opcodes = st.sampled_from([int(code) for code in Opcode]) | st.integers(0, 255)


@st.composite
def nonsense(draw: st.DrawFn) -> bytes:
    """A PDU that gets far: many of its fields are ones that might be right."""
    data = draw(st.binary(max_size=40) | st.sampled_from([bytes(300), b"\0\2ab"]))
    flags = draw(st.sampled_from([0x80, 0x81, 0x82, 0x83, 0]) | st.integers(0, 255))
    fields = draw(words)
    fields[2] = draw(st.integers(0, 10) | st.just(RESERVED_TAG))  # ITT
    fields[4] = draw(st.integers(0, 2))  # StatSN
    if draw(st.booleans()):
        fields[0:2] = [int.from_bytes(LUN[:4], "big"), int.from_bytes(LUN[4:], "big")]
    head = bytes([draw(opcodes), flags, draw(small) & 0xFF, draw(small) & 0xFF])
    lengths = len(data) | (draw(st.integers(0, 20)) == 20) << 24
    header = head + lengths.to_bytes(4, "big") + b"".join(field.to_bytes(4, "big") for field in fields)
    return header + data + bytes(-len(data) % 4)


def receive_nonsense(p: NegotiatedParameters, pieces: list[bytes]) -> None:
    d, tasks = busy(p)
    ended: list[Event] = []
    with contextlib.suppress(IscsifuseError):
        for piece in pieces:
            ended += d.connection.feed(piece)
    ended += d.connection.take_events()
    completed = [event for event in ended if isinstance(event, Task)]
    for task in completed:
        # No read is a success without its data, no write without its data having been asked for.
        if task.error is None and task.status == 0:
            assert task.buffer_in is None or not task.exact or task.received == 300
            assert task.buffer_out is None or task.solicited == task.expected
    completed += d.connection.fail_all(SessionLostError("the connection is gone"))
    assert all(task.done for task in tasks)
    assert len(completed) == len(tasks)
    assert {id(task) for task in completed} == {id(task) for task in tasks}


@pytest.mark.conformance("B12")
@given(st.lists(nonsense(), min_size=1, max_size=12))
def test_nonsense_raises_nothing_but_our_errors(pdus: list[bytes]) -> None:
    receive_nonsense(NegotiatedParameters(), pdus)


@pytest.mark.conformance("B12")
@given(noise=st.binary(max_size=600), header_digest=st.booleans(), data_digest=st.booleans())
def test_arbitrary_bytes_raise_nothing_but_our_errors(noise: bytes, header_digest: bool, data_digest: bool) -> None:
    receive_nonsense(NegotiatedParameters(header_digest=header_digest, data_digest=data_digest), [noise])


def _calls_byte_by_byte(length: int) -> tuple[int, int]:
    """Bytes of a Data-In, and the calls of functions that it takes to receive it one byte at a time."""
    d = Driver(NegotiatedParameters(max_recv_data_segment_length=length))
    task, memory = read(length)
    d.submit(task)
    stream = d.encoded(DataIn(itt=task.itt, data=pattern(length), has_status=True))
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for byte in stream:
            d.connection.buffers()[0][0] = byte
            d.connection.received(1)
    finally:
        sys.setprofile(None)
    assert task.done
    assert memory == pattern(length)
    return len(stream), calls


@pytest.mark.conformance("B10")
def test_one_byte_at_a_time_costs_the_same_for_each_byte() -> None:
    """A target that sends byte by byte → a bounded number of steps for each, however long the PDU is."""
    (short, few), (long, many) = _calls_byte_by_byte(1024), _calls_byte_by_byte(65536)
    assert few / short < 20
    assert many / long < 1.1 * few / short
