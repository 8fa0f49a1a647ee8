import pytest
from connection_driver import Driver, no_data, pattern, read, write

from iscsifuse.errors import DigestError, SessionLostError
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.request import LogoutRequest, NopOut, TextRequest
from iscsifuse.iscsi.response import (
    AsyncMessage,
    DataIn,
    NopIn,
    Reject,
    ScsiResponse,
    TargetPdu,
    TextResponse,
)

pytestmark = pytest.mark.usefixtures("both_ways")

HEAD = 48 + 4


def driver(*, header_digest: bool = True, data_digest: bool = True) -> Driver:
    return Driver(
        NegotiatedParameters(header_digest=header_digest, data_digest=data_digest, initial_r2t=False),
    )


@pytest.mark.conformance(77)
@pytest.mark.parametrize("header_digest", [False, True])
@pytest.mark.parametrize("data_digest", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 8193])
def test_what_is_sent_carries_what_was_agreed(header_digest: bool, data_digest: bool, length: int) -> None:
    d = driver(header_digest=header_digest, data_digest=data_digest)
    for task in (no_data(), read(length)[0], write(length)):
        d.connection.submit(task)
    d.connection.request(NopOut(immediate=True, data=pattern(length)[:8192]))
    d.connection.request(TextRequest(data=b"SendTargets=All\0"))
    d.connection.request(LogoutRequest())
    stream = b"".join(d.connection.output)
    pdus = d.sent()  # this checks digests
    assert sum(map(len, (pdu.data for pdu in pdus))) == length + min(length, 8192) + 16
    padded = sum(-(-len(pdu.data) // 4) * 4 for pdu in pdus)
    with_data = sum(1 for pdu in pdus if pdu.data)
    assert len(stream) == 48 * len(pdus) + padded + 4 * header_digest * len(pdus) + 4 * data_digest * with_data


@pytest.mark.conformance(77)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 513])
@pytest.mark.parametrize("header_digest", [False, True])
@pytest.mark.parametrize("data_digest", [False, True])
def test_what_is_received_is_checked_for_what_was_agreed(header_digest: bool, data_digest: bool, length: int) -> None:
    d = driver(header_digest=header_digest, data_digest=data_digest)
    task, memory = read(length)
    d.submit(task)
    assert d.give(DataIn(itt=task.itt, data=pattern(length), has_status=True)) == [task]
    assert task.error is None
    assert memory == pattern(length)


@pytest.mark.conformance(77)
@pytest.mark.parametrize("header_digest", [False, True])
@pytest.mark.parametrize("data_digest", [False, True])
def test_an_empty_segment_has_no_digest(header_digest: bool, data_digest: bool) -> None:
    d = driver(header_digest=header_digest, data_digest=data_digest)
    task, (reader, _) = no_data(), read(0)
    d.submit(task, reader)
    tag = d.connection.request(NopOut(immediate=True))
    # Each is handed over as soon as its last byte is there, without waiting for four more.
    assert [pdu.itt for pdu in d.give(NopIn(itt=tag))] == [tag]
    assert len(d.give(AsyncMessage())) == 1
    assert d.good(task) == [task]
    assert d.give(DataIn(itt=reader.itt, has_status=True)) == [reader]


@pytest.mark.conformance(78)
def test_header_digest_error() -> None:
    d = driver()
    task, _ = read(8)
    d.submit(task)
    stream = bytearray(d.encoded(DataIn(itt=task.itt, data=bytes(8), has_status=True)))
    stream[20] ^= 1
    with pytest.raises(DigestError) as caught:
        d.receive(bytes(stream))
    assert caught.value.header
    assert not task.done


@pytest.mark.conformance(79)
@pytest.mark.parametrize("collapsed", [True, False])
@pytest.mark.parametrize("victim", [0, 1])
def test_data_digest_error_on_data_in(collapsed: bool, victim: int) -> None:
    d = driver()
    (task, _), (other, memory) = read(8), read(8)
    d.submit(task, other)
    pdus = [
        DataIn(itt=task.itt, data=b"abcd", final=False),
        DataIn(itt=task.itt, data_sn=1, buffer_offset=4, data=b"efgh", has_status=collapsed),
    ]
    events = []
    for number, pdu in enumerate(pdus):
        stream = bytearray(d.encoded(pdu))
        if number == victim:
            stream[HEAD] ^= 1
        events += d.receive(bytes(stream))
    if not collapsed:
        assert events == []  # its memory is in use until the status has come
        assert not task.done
        events = d.give(ScsiResponse(itt=task.itt, exp_data_sn=2))
    assert events == [task]
    assert isinstance(task.error, DigestError)
    assert not task.error.header
    assert d.give(DataIn(itt=other.itt, data=b"ijklmnop", has_status=True)) == [other]  # still in step
    assert other.error is None
    assert memory == b"ijklmnop"


@pytest.mark.conformance(79)
def test_two_damaged_data_ins() -> None:
    d = driver()
    task, _ = read(8)
    d.submit(task)
    for number in (0, 1):
        pdu = DataIn(
            itt=task.itt,
            data_sn=number,
            buffer_offset=4 * number,
            data=b"abcd",
            final=number == 1,
            has_status=number == 1,
        )
        stream = bytearray(d.encoded(pdu))
        stream[-1] ^= 1
        d.receive(bytes(stream))
    assert isinstance(task.error, DigestError)
    assert task.done


@pytest.mark.conformance(79)
def test_damaged_data_for_nobody() -> None:
    d = driver()
    stream = bytearray(d.encoded(DataIn(itt=77, data=b"abcd", has_status=True)))
    stream[HEAD] ^= 1
    assert d.receive(bytes(stream)) == []


@pytest.mark.conformance(80)
@pytest.mark.parametrize("what", ["response", "nobody", "async", "reject", "text", "nop"])
def test_data_digest_error_on_anything_else(what: str) -> None:
    d = driver()
    task, _ = read(8)
    d.submit(task)
    sense = b"\0\3abc"
    pdus: dict[str, TargetPdu] = {
        "response": ScsiResponse(itt=task.itt, status=2, data=sense),
        "nobody": ScsiResponse(itt=77, status=2, data=sense),
        "async": AsyncMessage(data=sense),
        "reject": Reject(data=bytes(48)),
        "text": TextResponse(itt=d.connection.request(TextRequest()), data=b"a=b\0"),
        "nop": NopIn(itt=d.connection.request(NopOut(immediate=True)), data=b"ping"),
    }
    stream = bytearray(d.encoded(pdus[what]))
    stream[HEAD] ^= 1
    with pytest.raises(DigestError) as caught:
        d.receive(bytes(stream))
    assert not caught.value.header
    assert d.connection.take_events() == []
    assert not task.done
    assert d.connection.fail_all(SessionLostError("gone")) == [task]
