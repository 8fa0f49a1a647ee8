import pytest
from connection_driver import LUN, Driver, no_data, pattern, read, write

from iscsifuse.errors import (
    FormatError,
    ProtocolError,
    SessionLostError,
    TransferError,
)
from iscsifuse.iscsi.connection import Request
from iscsifuse.iscsi.incoming import MAX_TEXT_LENGTH
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import RESERVED_TAG, Opcode, Pdu
from iscsifuse.iscsi.request import (
    DataOut,
    LogoutReason,
    LogoutRequest,
    NopOut,
    TaskManagementRequest,
    TextRequest,
)
from iscsifuse.iscsi.response import (
    R2T,
    AsyncEvent,
    AsyncMessage,
    DataIn,
    LoginResponse,
    LogoutResponse,
    NopIn,
    Reject,
    RejectReason,
    ScsiResponse,
    TaskManagementResponse,
    TextResponse,
)

pytestmark = pytest.mark.usefixtures("both_ways")

GONE = SessionLostError("the connection is gone")


def test_a_connection_says_whether_a_pdu_is_there_in_part() -> None:
    d = Driver()
    ping = d.encoded(NopIn(ttt=1, data=b"abc"))
    for count, byte in enumerate(ping, 1):
        events = d.receive(bytes([byte]))
        assert d.connection.amid is (count < len(ping))
    assert events == []
    assert len(d.sent()) == 1


# --- NOP ---


@pytest.mark.conformance(81)
@pytest.mark.parametrize("ttt", [0, 1, 0xFFFFFFFE])
def test_a_targets_ping_is_answered(ttt: int) -> None:
    d = Driver(room=1)
    d.submit(no_data())  # the window is closed: that must not matter
    assert d.give(NopIn(ttt=ttt, lun=LUN), max_cmd_sn=10) == []
    assert d.sent() == [NopOut(immediate=True, itt=RESERVED_TAG, ttt=ttt, lun=LUN, cmd_sn=11, exp_stat_sn=100)]
    assert d.connection.window.cmd_sn == 11


@pytest.mark.conformance(81)
def test_nothing_is_expected_in_return_for_the_answer() -> None:
    d = Driver()
    d.give(NopIn(ttt=5))
    assert d.connection.idle


@pytest.mark.conformance(20)
@pytest.mark.conformance(81)
def test_the_answer_to_a_long_ping_fits_into_a_pdu() -> None:
    d = Driver(NegotiatedParameters(target_max_recv_data_segment_length=512))
    d.give(NopIn(ttt=5, data=pattern(1000)))
    (answer,) = d.sent()
    assert answer.data == pattern(512)


@pytest.mark.conformance(82)
def test_news_of_the_window_is_not_answered() -> None:
    d = Driver()
    assert d.give(NopIn()) == []
    assert d.sent() == []


@pytest.mark.conformance(83)
@pytest.mark.parametrize("data", [b"", b"ping"])
def test_our_ping(data: bytes) -> None:
    d = Driver()
    tag = d.connection.request(NopOut(immediate=True, data=data))
    assert d.sent() == [NopOut(immediate=True, itt=tag, cmd_sn=10, exp_stat_sn=100, data=data)]
    (answer,) = d.give(NopIn(itt=tag, data=data))
    assert isinstance(answer, NopIn)
    assert (answer.itt, answer.data) == (tag, data)
    assert d.connection.idle
    assert d.give(NopIn(itt=tag)) == []  # it was answered already


@pytest.mark.conformance(84)
def test_nop_in_with_both_tags() -> None:
    d = Driver()
    tag = d.connection.request(NopOut(immediate=True))
    with pytest.raises(FormatError, match="both tags"):
        d.give(NopIn(itt=tag, ttt=5))


# --- text, task management, logout ---


@pytest.mark.conformance(36)
@pytest.mark.conformance(37)
def test_text() -> None:
    d = Driver()
    tag = d.connection.request(TextRequest(data=b"SendTargets=All\0"))
    (sent,) = d.sent()
    assert sent == TextRequest(itt=tag, ttt=RESERVED_TAG, cmd_sn=10, exp_stat_sn=100, data=b"SendTargets=All\0")
    (partial,) = d.give(TextResponse(itt=tag, final=False, cont=True, ttt=9, lun=LUN, data=b"Targ"))
    assert isinstance(partial, TextResponse)
    assert (partial.ttt, partial.lun, partial.cont, partial.final) == (9, LUN, True, False)
    assert d.connection.request(TextRequest(itt=tag, ttt=9, lun=LUN)) == tag
    (sent,) = d.sent()
    assert sent == TextRequest(itt=tag, ttt=9, lun=LUN, cmd_sn=11, exp_stat_sn=101)
    assert [pdu.itt for pdu in d.give(TextResponse(itt=tag, data=b"etName=iqn.x\0"))] == [tag]
    assert d.connection.idle


@pytest.mark.conformance(92)
def test_abort() -> None:
    d = Driver()
    task = no_data()
    d.submit(no_data(), task)
    request = TaskManagementRequest(lun=LUN, referenced_task_tag=task.itt, ref_cmd_sn=task.cmd_sn)
    tag = d.connection.request(request)
    (sent,) = d.sent()
    assert sent == TaskManagementRequest(
        itt=tag, lun=LUN, referenced_task_tag=task.itt, ref_cmd_sn=11, cmd_sn=12, exp_stat_sn=100
    )
    (answer,) = d.give(TaskManagementResponse(itt=tag))
    assert isinstance(answer, TaskManagementResponse)
    assert not task.done  # what that means is for others to say


REQUESTS: list[Request] = [
    NopOut(immediate=True),
    TaskManagementRequest(),
    TextRequest(),
    LogoutRequest(),
]
ANSWERS: list[type[NopIn | TaskManagementResponse | TextResponse | LogoutResponse]] = [
    NopIn,
    TaskManagementResponse,
    TextResponse,
    LogoutResponse,
]


@pytest.mark.parametrize("asked", range(4))
@pytest.mark.parametrize("answered", range(4))
def test_only_the_right_kind_of_answer(asked: int, answered: int) -> None:
    d = Driver()
    tag = d.connection.request(REQUESTS[asked])
    if asked == answered:
        (event,) = d.give(ANSWERS[answered](itt=tag))
        assert isinstance(event, ANSWERS[answered])
    else:
        with pytest.raises(ProtocolError, match="answers a request of opcode"):
            d.give(ANSWERS[answered](itt=tag))


@pytest.mark.conformance(52)
@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_that_nobody_waits_for(kind: type[NopIn]) -> None:
    d = Driver()
    task, _ = read(4)
    d.submit(task)
    assert d.give(kind(itt=999)) == []
    assert d.give(kind(itt=task.itt)) == []  # a command is not completed by it either
    assert d.connection.tasks == {task.itt: task}


@pytest.mark.conformance(52)
def test_a_status_for_a_request() -> None:
    d = Driver()
    tag = d.connection.request(NopOut(immediate=True))
    assert d.give(ScsiResponse(itt=tag)) == []
    assert d.give(DataIn(itt=tag, data=b"abcd", has_status=True)) == []
    assert len(d.give(NopIn(itt=tag))) == 1


@pytest.mark.conformance(91)
def test_nothing_after_a_logout() -> None:
    d = Driver(room=2)
    running, waiting = no_data(), no_data()
    d.submit(running, no_data(), waiting)
    tag = d.connection.request(LogoutRequest(reason=LogoutReason.CLOSE_SESSION))
    assert d.sent() == [LogoutRequest(itt=tag, cmd_sn=12, exp_stat_sn=100)]
    with pytest.raises(SessionLostError):
        d.connection.submit(no_data())
    for request in REQUESTS:
        assert d.connection.request(request) not in (tag, RESERVED_TAG)
    assert d.give(NopIn(ttt=5), max_cmd_sn=100) == []
    assert d.sent() == []
    assert d.good(running) == [running]  # what the target still says counts
    (answer,) = d.give(LogoutResponse(itt=tag, response=1, time2wait=3))
    assert isinstance(answer, LogoutResponse)
    assert (answer.response, answer.time2wait) == (1, 3)
    assert d.sent() == []
    assert waiting in d.connection.fail_all(GONE)


# --- async, reject, what has no place ---


@pytest.mark.conformance(85)
@pytest.mark.conformance(88)
@pytest.mark.parametrize("event", [*AsyncEvent, 77])
@pytest.mark.parametrize("data", [b"", b"\0\2ab"])
def test_async_message(event: int, data: bytes) -> None:
    d = Driver()
    (message,) = d.give(AsyncMessage(event=event, parameter1=1, parameter2=2, parameter3=3, data=data))
    assert isinstance(message, AsyncMessage)
    assert (message.event, message.parameter1, message.parameter2, message.parameter3) == (event, 1, 2, 3)
    assert message.data == data
    d.connection.request(NopOut(immediate=True))
    (ping,) = d.sent()
    assert isinstance(ping, NopOut)
    assert ping.exp_stat_sn == 101  # acknowledged


@pytest.mark.conformance(89)
@pytest.mark.conformance(90)
@pytest.mark.parametrize("reason", [*RejectReason, 0x80])
def test_reject(reason: int) -> None:
    d = Driver()
    task = write(512)
    (command,) = d.submit(task)
    (event,) = d.give(Reject(reason=reason, data=command.encode()[:48]))
    assert isinstance(event, Reject)
    assert event.reason == reason
    assert event.data[16:20] == task.itt.to_bytes(4, "big")
    assert d.connection.tasks == {task.itt: task}  # it awaits its response, or the end of the session
    assert d.good(task) == [task]


@pytest.mark.conformance(90)
def test_reject_of_a_data_pdu_takes_its_bytes_back_once() -> None:
    d = Driver(NegotiatedParameters(initial_r2t=False, immediate_data=False, target_max_recv_data_segment_length=512))
    task = write(1300)
    _, *data = d.submit(task)
    refused = data[1].encode()[:48]
    (event,) = d.give(Reject(reason=RejectReason.DATA_DIGEST_ERROR, data=refused))
    assert isinstance(event, Reject)
    assert isinstance(event.rejected, DataOut)
    assert (event.rejected.buffer_offset, event.rejected_length) == (512, 512)
    assert task.solicited == 512
    assert d.give(Reject(reason=RejectReason.DATA_DIGEST_ERROR, data=refused)) == []  # no news
    assert len(d.give(Reject(reason=RejectReason.WAITING_FOR_LOGOUT, data=refused))) == 1
    d.give(R2T(itt=task.itt, lun=LUN, ttt=1, buffer_offset=512, desired_data_transfer_length=512))
    (again,) = d.sent()
    assert again.data == data[1].data
    assert d.good(task) == [task]
    assert task.error is None


@pytest.mark.conformance(90)
def test_reject_of_a_data_pdu_and_a_success_that_does_not_ask_again() -> None:
    d = Driver(NegotiatedParameters(initial_r2t=False, immediate_data=False))
    task = write(1300)
    _, data = d.submit(task)
    d.give(Reject(data=data.encode()[:48]))
    assert d.good(task) == [task]
    assert isinstance(task.error, TransferError)
    assert d.give(Reject(data=data.encode()[:48])) == []  # nobody's any more


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda pdu: type(pdu).__name__)
def test_reject_of_a_request_is_its_end(request_: Request) -> None:
    d = Driver()
    tag = d.connection.request(request_)
    (sent,) = d.sent()
    (event,) = d.give(Reject(reason=RejectReason.IMMEDIATE_COMMAND_REJECT, data=sent.encode()[:48]))
    assert isinstance(event, Reject)
    assert event.rejected is not None
    assert event.rejected.itt == tag
    assert d.connection.idle


@pytest.mark.parametrize("data", [b"", bytes(47), b"\x3d" + bytes(47), b"\x1c" + bytes(60)], ids=len)
def test_reject_of_nobody_knows_what(data: bytes) -> None:
    d = Driver()
    tag = d.connection.request(NopOut(immediate=True))
    (event,) = d.give(Reject(data=data))
    assert isinstance(event, Reject)
    assert event.rejected is None
    assert event.rejected_length == 0 or len(data) >= 48
    assert len(d.give(NopIn(itt=tag))) == 1  # still asked


@pytest.mark.conformance(5)
@pytest.mark.parametrize("pdu", [LoginResponse(data=b"a=b\0"), NopOut(), TextRequest(data=b"a=b\0"), LogoutRequest()])
def test_pdus_that_have_no_place(pdu: Pdu) -> None:
    d = Driver()
    with pytest.raises(ProtocolError, match="no place"):
        d.receive(pdu.encode())


@pytest.mark.parametrize("opcode", [0x1C, 0x27, 0x3D])
def test_unknown_opcodes(opcode: int) -> None:
    d = Driver()
    with pytest.raises(FormatError, match="unknown opcode"):
        d.receive(bytes([opcode]) + bytes(47))


@pytest.mark.conformance("B2")
@pytest.mark.parametrize("opcode", [Opcode.DATA_IN, Opcode.SCSI_RESPONSE, Opcode.R2T, Opcode.NOP_IN])
@pytest.mark.parametrize("words", [1, 255])
def test_additional_headers_are_refused(opcode: Opcode, words: int) -> None:
    d = Driver()
    with pytest.raises(FormatError, match="additional headers"):
        d.receive(bytes([opcode, 0x80, 0, 0, words]) + bytes(43 + 4 * words))


@pytest.mark.conformance("B2")
@pytest.mark.parametrize("opcode", [Opcode.DATA_IN, Opcode.SCSI_RESPONSE, Opcode.NOP_IN, 0x3D])
def test_sixteen_megabytes_are_refused(opcode: int) -> None:
    d = Driver()
    with pytest.raises(FormatError, match="16777215"):
        d.receive(bytes([opcode, 0x80, 0, 0, 0, 0xFF, 0xFF, 0xFF]) + bytes(40))


@pytest.mark.conformance("B2")
@pytest.mark.parametrize("opcode", [Opcode.SCSI_RESPONSE, Opcode.NOP_IN, Opcode.TEXT_RESPONSE])
def test_only_data_in_may_be_as_long_as_was_agreed(opcode: Opcode) -> None:
    d = Driver(NegotiatedParameters(max_recv_data_segment_length=0xFFFFFF))
    length = MAX_TEXT_LENGTH + 1
    with pytest.raises(FormatError, match=f"{length} bytes"):
        d.receive(bytes([opcode, 0x80, 0, 0]) + length.to_bytes(4, "big") + bytes(40))


def test_the_longest_segments_that_are_taken() -> None:
    d = Driver(NegotiatedParameters(max_recv_data_segment_length=0xFFFFFF))
    task, (reader, memory) = no_data(), read(MAX_TEXT_LENGTH + 4)
    d.submit(task, reader)
    (event,) = d.give(Reject(data=bytes(MAX_TEXT_LENGTH)))
    assert isinstance(event, Reject)
    assert len(event.data) == MAX_TEXT_LENGTH
    assert d.give(ScsiResponse(itt=task.itt, data=bytes(MAX_TEXT_LENGTH))) == [task]
    assert d.give(DataIn(itt=reader.itt, data=pattern(len(memory)), has_status=True)) == [reader]
    assert memory == pattern(len(memory))


def test_what_was_received_behind_the_login() -> None:
    d = Driver(room=0)
    task = no_data()
    d.connection.submit(task)
    assert d.connection.feed(d.encoded(NopIn(), max_cmd_sn=10) + d.encoded(AsyncMessage(event=255))) != []
    assert [pdu.itt for pdu in d.sent()] == [task.itt]
    assert d.connection.feed(b"") == []
