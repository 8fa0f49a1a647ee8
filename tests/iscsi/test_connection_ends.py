"""Ends that are not the target's doing: the connection is gone, or a command took too long."""

import pytest
from connection_driver import Driver, no_data, pattern, read

from iscsifuse.errors import CommandTimeoutError, SessionLostError
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.request import NopOut
from iscsifuse.iscsi.response import DataIn, NopIn, ScsiResponse

pytestmark = pytest.mark.usefixtures("both_ways")

GONE = SessionLostError("the connection is gone")


def test_fail_all() -> None:
    d = Driver(room=2)
    tasks = [no_data() for _ in range(4)]
    for task in tasks:
        d.connection.submit(task)
    d.connection.request(NopOut())
    assert d.connection.fail_all(GONE) == tasks
    assert all(task.done and task.error is GONE for task in tasks)
    assert d.connection.idle
    assert d.connection.output == []
    assert d.connection.fail_all(GONE) == []
    with pytest.raises(SessionLostError):
        d.connection.submit(no_data())
    d.connection.request(NopOut(immediate=True))
    assert d.sent() == []
    assert d.connection.idle


@pytest.mark.parametrize("status", [False, True])
def test_fail_all_in_the_middle_of_data_in(status: bool) -> None:
    d = Driver()
    task, memory = read(1000)
    d.submit(task)
    stream = d.encoded(DataIn(itt=task.itt, data=pattern(1000), has_status=status))
    d.receive(stream[:500])
    d.connection.fail_all(GONE)
    before = bytes(memory)
    assert d.receive(stream[500:]) == []
    assert memory == before
    assert task.error is GONE


def test_fail_all_in_the_middle_of_a_response() -> None:
    d = Driver()
    task, _ = read(1000)
    d.submit(task)
    stream = d.encoded(ScsiResponse(itt=task.itt, status=2, data=b"\0\4abcd"))
    d.receive(stream[:50])
    d.connection.fail_all(GONE)
    assert d.receive(stream[50:]) == []
    assert task.error is GONE


def test_abandon_in_the_queue() -> None:
    d = Driver(room=1)
    tasks = [no_data() for _ in range(4)]
    d.submit(*tasks)
    late = CommandTimeoutError("too late")
    d.connection.abandon(tasks[2], late)
    assert tasks[2].error is late
    assert list(d.connection.queue) == [tasks[1], tasks[3]]
    d.give(NopIn(), max_cmd_sn=30)
    assert [pdu.itt for pdu in d.sent()] == [tasks[1].itt, tasks[3].itt]


def test_abandon_what_was_never_submitted() -> None:
    d = Driver()
    task, other = no_data(), no_data()
    d.submit(other)
    d.connection.abandon(task, CommandTimeoutError("too late"))
    assert task.done
    assert d.connection.tasks == {other.itt: other}


@pytest.mark.conformance(96)
@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("status", [False, True])
@pytest.mark.parametrize("came", [0, 1, 600, 999])
def test_abandon_in_the_middle_of_data_in(came: int, status: bool, digests: bool) -> None:
    d = Driver(NegotiatedParameters(header_digest=digests, data_digest=digests))
    (task, memory), (other, others) = read(1999), read(4)
    d.submit(task, other)
    head = 48 + 4 * digests
    d.give(DataIn(itt=task.itt, data=pattern(1000), final=False))
    stream = d.encoded(DataIn(itt=task.itt, data_sn=1, buffer_offset=1000, data=b"\x55" * 999, has_status=status))
    d.receive(stream[: head + came])
    assert memory.count(0x55, 1000) == came
    before = bytes(memory)
    d.connection.abandon(task, CommandTimeoutError("too late"))
    assert d.receive(stream[head + came :]) == []
    late = [DataIn(itt=task.itt, data_sn=2, buffer_offset=1999), ScsiResponse(itt=task.itt, exp_data_sn=2)]
    for pdu in late[status:]:
        assert d.give(pdu) == []
    assert memory == before
    assert isinstance(task.error, CommandTimeoutError)
    assert task.status == -1
    assert d.give(DataIn(itt=other.itt, data=b"more", has_status=True)) == [other]
    assert others == b"more"


@pytest.mark.conformance(96)
def test_abandon_in_the_middle_of_a_response() -> None:
    d = Driver()
    (task, _), (other, _) = read(4), read(4)
    d.submit(task, other)
    stream = d.encoded(ScsiResponse(itt=task.itt, status=2, data=b"\0\4abcd"))
    d.receive(stream[:50])
    d.connection.abandon(task, CommandTimeoutError("too late"))
    assert d.receive(stream[50:]) == []
    assert (task.status, task.sense) == (-1, b"")
    assert d.give(ScsiResponse(itt=other.itt, status=2, data=b"\0\4abcd")) == [other]
    assert other.sense == b"abcd"


def test_abandon_leaves_a_task_alone_that_is_done() -> None:
    d = Driver()
    task = no_data()
    d.submit(task)
    d.good(task)
    d.connection.abandon(task, CommandTimeoutError("too late"))
    assert task.error is None
    assert task.status == 0
