import pytest
from connection_driver import LUN, Driver, no_data, read, write
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import CommandTimeoutError, ProtocolError, SessionLostError
from iscsifuse.iscsi.connection import Connection
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import RESERVED_TAG, Pdu
from iscsifuse.iscsi.request import (
    DataOut,
    LogoutRequest,
    NopOut,
    ScsiCommand,
    TaskManagementRequest,
    TextRequest,
)
from iscsifuse.iscsi.response import (
    R2T,
    AsyncMessage,
    DataIn,
    LogoutResponse,
    NopIn,
    Reject,
    ScsiResponse,
    TargetPdu,
    TaskManagementResponse,
    TextResponse,
)
from iscsifuse.iscsi.serial import add
from iscsifuse.iscsi.tasks import Task

pytestmark = pytest.mark.usefixtures("both_ways")


def cmd_sns(pdus: list[Pdu]) -> list[int]:
    numbers = []
    for pdu in pdus:
        assert isinstance(pdu, ScsiCommand | NopOut | TaskManagementRequest | TextRequest | LogoutRequest)
        numbers.append(pdu.cmd_sn)
    return numbers


# --- CmdSN and the window ---


@pytest.mark.conformance(7)
@pytest.mark.conformance(44)
@pytest.mark.conformance(49)
@pytest.mark.parametrize("first", [0, 1, 0x7FFFFFFE, 0xFFFFFFF0, 0xFFFFFFFE, 0xFFFFFFFF])
def test_cmd_sn_counts_commands(first: int) -> None:
    d = Driver(cmd_sn=first)
    assert cmd_sns(d.submit(*(no_data() for _ in range(32)))) == [add(first, i) for i in range(32)]


@pytest.mark.conformance(45)
@pytest.mark.parametrize("closed", [False, True])
def test_immediate_requests_carry_the_current_cmd_sn(closed: bool) -> None:
    d = Driver(room=1 if closed else 10)
    d.submit(no_data())
    immediate: list[Pdu] = []
    for request in (NopOut(immediate=True), TaskManagementRequest(referenced_task_tag=1), LogoutRequest()):
        d.connection.request(request)
        immediate += d.sent()
    assert cmd_sns(immediate) == [11, 11, 11]
    assert d.connection.window.cmd_sn == 11


def test_requests_that_are_not_immediate_count() -> None:
    d = Driver()
    d.connection.request(TextRequest(data=b"SendTargets=All\0"))
    d.connection.submit(no_data())
    d.connection.request(NopOut())
    d.connection.request(NopOut(immediate=True))
    assert cmd_sns(d.sent()) == [10, 11, 12, 13]


@pytest.mark.conformance(46)
@pytest.mark.parametrize("news", ["nop", "response", "r2t", "data", "async"])
def test_a_closed_window_is_opened_by_whatever_the_target_sends(news: str) -> None:
    d = Driver(NegotiatedParameters(immediate_data=False), room=2)
    writer, (reader, _) = write(512), read(512)
    d.submit(writer, reader)
    waiting = [no_data() for _ in range(5)]
    assert d.submit(*waiting) == []
    assert list(d.connection.queue) == waiting
    pdus: dict[str, TargetPdu] = {
        "nop": NopIn(),
        "response": ScsiResponse(itt=writer.itt, status=8),
        "r2t": R2T(itt=writer.itt, lun=LUN, ttt=1, desired_data_transfer_length=512),
        "data": DataIn(itt=reader.itt, data=bytes(4), final=False),
        "async": AsyncMessage(event=255),
    }
    d.give(pdus[news], max_cmd_sn=13)
    commands = [pdu for pdu in d.sent() if not isinstance(pdu, DataOut)]
    assert [pdu.itt for pdu in commands] == [task.itt for task in waiting[:2]]  # in order
    assert cmd_sns(commands) == [12, 13]
    assert list(d.connection.queue) == waiting[2:]
    assert d.submit(no_data()) == []  # nobody overtakes
    d.give(NopIn(), max_cmd_sn=13)
    assert d.sent() == []
    d.give(NopIn(), max_cmd_sn=100)
    assert cmd_sns(d.sent()) == [14, 15, 16, 17]


@pytest.mark.conformance(46)
def test_a_request_that_is_not_immediate_waits_for_the_window() -> None:
    d = Driver(room=1)
    d.submit(no_data())
    waiting = no_data()
    d.submit(waiting)
    first = d.connection.request(NopOut(data=b"1"))
    second = d.connection.request(NopOut(data=b"2"))
    assert d.sent() == []
    assert not d.connection.idle
    d.give(NopIn(), max_cmd_sn=11)
    assert [(pdu.itt, pdu.data) for pdu in d.sent()] == [(first, b"1")]
    third = d.connection.request(NopOut(data=b"3"))
    d.give(NopIn(), max_cmd_sn=20)
    sent = d.sent()
    assert [pdu.itt for pdu in sent] == [second, third, waiting.itt]
    assert cmd_sns(sent) == [12, 13, 14]
    assert d.give(NopIn(itt=third)) != []


@pytest.mark.conformance(46)
@pytest.mark.conformance(91)
def test_a_logout_that_waits_for_the_window_is_the_last_thing_that_is_sent() -> None:
    d = Driver(room=0)
    task = no_data()
    d.submit(task)
    d.connection.request(LogoutRequest(immediate=False))
    d.connection.request(NopOut())
    d.give(NopIn(), max_cmd_sn=20)
    (logout,) = d.sent()
    assert isinstance(logout, LogoutRequest)
    assert logout.cmd_sn == 10
    assert d.connection.fail_all(SessionLostError("logged out")) == [task]


@pytest.mark.conformance(47)
@pytest.mark.parametrize(("room", "parallel"), [(100, 100), (1, 1), (7, 7)])
def test_as_many_at_once_as_the_window_holds(room: int, parallel: int) -> None:
    d = Driver(room=room)
    tasks = [no_data() for _ in range(200)]
    running = [pdu.itt for pdu in d.submit(*tasks)]
    assert len(running) == parallel
    done = 0
    while running:
        itt = running.pop(0)
        assert d.give(ScsiResponse(itt=itt), max_cmd_sn=add(10, done + room)) == [tasks[done]]
        done += 1
        running += [pdu.itt for pdu in d.sent()]
        assert len(running) == min(parallel, 200 - done)
    assert done == 200
    assert d.connection.window.cmd_sn == 210


@pytest.mark.conformance(48)
def test_numbers_that_can_not_be_are_ignored() -> None:
    d = Driver(room=1)
    d.submit(no_data())
    d.submit(no_data())
    d.give(NopIn(), exp_cmd_sn=50, max_cmd_sn=40)
    d.give(NopIn(), exp_cmd_sn=11, max_cmd_sn=9)
    d.give(NopIn(), exp_cmd_sn=9, max_cmd_sn=8)
    assert d.sent() == []
    assert (d.connection.window.exp_cmd_sn, d.connection.window.max_cmd_sn) == (10, 10)


@pytest.mark.conformance(48)
def test_a_login_with_numbers_that_can_not_be() -> None:
    c = Connection(NegotiatedParameters(), cmd_sn=5, exp_stat_sn=1, exp_cmd_sn=0, max_cmd_sn=0x80000003)
    c.submit(no_data())
    assert c.output == []
    c.feed(NopIn(exp_cmd_sn=5, max_cmd_sn=10).encode())
    assert len(c.output) == 1


# --- StatSN ---


@pytest.mark.conformance(6)
@pytest.mark.conformance(49)
@pytest.mark.parametrize("first", [0, 0xFFFFFFF0, 0xFFFFFFFF])
def test_stat_sn_is_acknowledged(first: int) -> None:
    d = Driver(stat_sn=first)
    for number in range(40):
        task = no_data()
        (command,) = d.submit(task)
        assert isinstance(command, ScsiCommand)
        assert command.exp_stat_sn == add(first, number)
        assert d.good(task) == [task]
    assert d.connection.exp_stat_sn == add(first, 40)


@pytest.mark.conformance(50)
@pytest.mark.parametrize("gap", [1, -1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001])
@pytest.mark.parametrize("first", [100, 0xFFFFFFFF])
@pytest.mark.parametrize(
    "pdu",
    [
        ScsiResponse(itt=1),
        ScsiResponse(itt=77),
        DataIn(itt=1, data=bytes(4), has_status=True),
        DataIn(itt=77, has_status=True),
        NopIn(itt=2),
        AsyncMessage(),
        Reject(),
        TextResponse(itt=77),
        TaskManagementResponse(itt=77),
        LogoutResponse(itt=77),
    ],
    ids=lambda pdu: f"{type(pdu).__name__}-{pdu.itt}",
)
def test_stat_sn_that_is_not_the_next(pdu: TargetPdu, first: int, gap: int) -> None:
    d = Driver(stat_sn=first)
    task, memory = read(4)
    d.submit(task)
    assert (task.itt, d.connection.request(NopOut(immediate=True))) == (1, 2)
    with pytest.raises(ProtocolError, match=f"where {first} was due"):
        d.give(pdu, stat_sn=add(first, gap))
    assert d.connection.take_events() == []
    assert not task.done
    assert memory == b"\xee" * 4


@pytest.mark.conformance(51)
def test_what_uses_up_no_stat_sn() -> None:
    d = Driver(NegotiatedParameters(immediate_data=False))
    writer, (reader, _) = write(512), read(4)
    d.submit(writer, reader)
    d.give(NopIn(), stat_sn=4711)
    d.give(NopIn(ttt=5), stat_sn=4711)
    d.give(R2T(itt=writer.itt, lun=LUN, ttt=1, desired_data_transfer_length=512), stat_sn=4711)
    d.give(DataIn(itt=reader.itt, data=bytes(4)), stat_sn=4711)
    assert d.connection.exp_stat_sn == 100
    assert d.give(ScsiResponse(itt=reader.itt, exp_data_sn=1), stat_sn=100) == [reader]


@pytest.mark.parametrize("pdu", [AsyncMessage(), Reject(), TextResponse(itt=7), ScsiResponse(itt=7), NopIn(itt=7)])
def test_what_uses_up_a_stat_sn_even_if_nobody_asked(pdu: TargetPdu) -> None:
    d = Driver()
    d.give(pdu)
    assert d.connection.exp_stat_sn == 101


# --- tags ---


@pytest.mark.conformance(53)
@pytest.mark.parametrize("first", [0, 0xFFFFFFFD, 0xFFFFFFFF])
def test_tags_are_unique_and_never_the_reserved_one(first: int) -> None:
    c = Connection(NegotiatedParameters(), cmd_sn=1, exp_stat_sn=1, exp_cmd_sn=1, max_cmd_sn=1000, first_itt=first)
    old = no_data()
    c.submit(old)
    tags = [old.itt]
    for _ in range(5):
        task = no_data()
        c.submit(task)
        tags += [task.itt, c.request(NopOut(immediate=True)), c.new_itt()]
    assert len(set(tags)) == len(tags)
    assert RESERVED_TAG not in tags


@pytest.mark.conformance(53)
def test_a_tag_in_use_is_not_given_away_after_four_billion() -> None:
    d = Driver()
    old = no_data()
    d.submit(old)
    ping = d.connection.request(NopOut(immediate=True))
    d.connection._numbers.next_itt = old.itt  # as after 2^32 commands
    new = no_data()
    d.submit(new)
    assert new.itt not in (old.itt, ping)


@pytest.mark.conformance(53)
@pytest.mark.conformance(96)
def test_the_tag_of_an_aborted_task_is_not_used_again() -> None:
    d = Driver()
    task, following = no_data(), no_data()
    d.submit(task)
    d.connection.abandon(task, CommandTimeoutError("too slow"))
    d.submit(following)
    assert following.itt != task.itt
    assert d.give(ScsiResponse(itt=task.itt)) == []
    assert d.good(following) == [following]


@pytest.mark.conformance(52)
def test_a_second_completion_completes_nobody() -> None:
    d = Driver()
    first, second = no_data(), no_data()
    d.submit(first, second)
    assert d.good(first) == [first]
    for data in (b"", b"\0\0"):
        assert d.give(ScsiResponse(itt=first.itt, status=2 if data else 0, data=data)) == []
    assert d.give(ScsiResponse(itt=RESERVED_TAG)) == []
    assert (first.status, second.done) == (0, False)
    assert d.good(second) == [second]


@given(
    room=st.integers(0, 6),
    first=st.sampled_from([0, 10, 0xFFFFFFFC]),
    steps=st.lists(st.sampled_from(["submit", "answer", "open", "stay", "abandon", "ping"]), max_size=60),
)
def test_no_command_leaves_outside_the_window_and_each_ends_once(room: int, first: int, steps: list[str]) -> None:
    d = Driver(cmd_sn=first, stat_sn=0xFFFFFFF8, room=room)
    limit = room  # commands that may have been sent so far
    submitted: list[Task] = []
    ended: list[object] = []
    carried: list[int] = []
    for step in steps:
        live = [task for task in submitted if not task.done]
        if step == "submit":
            submitted.append(no_data())
            d.connection.submit(submitted[-1])
        elif step == "ping":
            d.connection.request(NopOut(immediate=True))
        elif step == "abandon" and live:
            d.connection.abandon(live[len(live) // 2], CommandTimeoutError("too slow"))
            ended.append(live[len(live) // 2])
        elif step == "answer" and d.connection.tasks:
            limit += 1
            itt = max(d.connection.tasks)
            ended += d.give(ScsiResponse(itt=itt), max_cmd_sn=add(first, limit - 1))
        elif step in ("open", "stay"):
            limit += step == "open"
            assert d.give(NopIn(), max_cmd_sn=add(first, limit - 1)) == []
        carried += cmd_sns([pdu for pdu in d.sent() if isinstance(pdu, ScsiCommand)])
        assert carried == [add(first, i) for i in range(len(carried))]
        assert len(carried) <= limit
        assert not d.connection.queue or len(carried) == limit  # nothing waits without a reason
    ended += d.connection.fail_all(SessionLostError("gone"))
    assert all(task.done for task in submitted)
    assert len(ended) == len(submitted)
    assert {id(task) for task in ended} == {id(task) for task in submitted}
