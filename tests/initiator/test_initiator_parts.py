"""The parts of sessions and nexuses by themselves; together they are tested against targets."""

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from initiator_fakes import LUN_0, jumping

from iscsifuse.errors import IdentityError, SessionLostError
from iscsifuse.initiator.bars import Bars
from iscsifuse.initiator.clearing import BARRIER_LIMIT, Clearing
from iscsifuse.initiator.farewell import LOGOUT_LIMIT, Farewell
from iscsifuse.initiator.guards import ASK_AGAIN_AFTER, MOST_ROUNDS, MOST_WAIT, Guards
from iscsifuse.initiator.liveness import PING_AFTER, PING_LIMIT, Liveness
from iscsifuse.initiator.session import Session
from iscsifuse.initiator.settings import Portal
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi.connection import Connection
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import Pdu, decode_stream
from iscsifuse.iscsi.request import LogoutRequest, NopOut, TaskManagementRequest
from iscsifuse.iscsi.response import LogoutResponse, TaskManagementResponse
from iscsifuse.iscsi.tasks import Task

LUN_1 = bytes([0, 1, 0, 0, 0, 0, 0, 0])


class Line:
    """A connection, and what was sent on it."""

    def __init__(self) -> None:
        self.connection = Connection(NegotiatedParameters(), cmd_sn=1, exp_stat_sn=1, exp_cmd_sn=1, max_cmd_sn=8)
        self.sent: list[Pdu] = []

    def send(self) -> None:
        for piece in self.connection.output:
            decoded = decode_stream(bytes(piece), header_digest=False, data_digest=False, max_data=8192)
            assert decoded is not None
            self.sent.append(decoded[0])
        self.connection.output.clear()

    def kinds(self) -> list[type[Pdu]]:
        self.send()
        return [type(pdu) for pdu in self.sent]


# --- liveness ---


def test_parts_liveness_asks_once_and_gives_up_in_time() -> None:
    line = Line()
    transport = SimpleNamespace(bytes_received=48, portal=Portal("target"))
    liveness = Liveness(cast("Transport", transport), line.connection, now=0.0)
    liveness.look(PING_AFTER - 0.1, may_ping=True)
    assert line.kinds() == []
    liveness.look(PING_AFTER, may_ping=True)
    liveness.look(PING_AFTER + 1, may_ping=True)
    assert line.kinds() == [NopOut]
    transport.bytes_received += 1  # any byte will do
    liveness.look(PING_AFTER + 2, may_ping=True)
    late = PING_AFTER + 2 + PING_AFTER
    liveness.look(late, may_ping=False)  # not behind a logout
    assert line.kinds() == [NopOut]
    liveness.look(late, may_ping=True)
    assert line.kinds() == [NopOut, NopOut]
    with pytest.raises(SessionLostError, match="has been silent for 10 seconds"):
        liveness.look(late + PING_LIMIT, may_ping=True)


# --- the logout ---


@jumping
async def test_parts_farewell_waits_for_what_is_under_way_then_for_the_answer() -> None:
    line = Line()
    task = Task(bytes(6), lun=LUN_0)
    line.connection.submit(task)
    farewell = Farewell(line.connection, send=line.send, time2wait=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: farewell.say(patience=3))
        await trio.sleep(1)
        assert LogoutRequest not in line.kinds()
        line.connection.abandon(task, SessionLostError("over"))
        farewell.look()
        await trio.sleep(1)
        assert line.kinds()[-1] is LogoutRequest
        assert not farewell.answered
        farewell.take_answer(LogoutResponse(time2wait=7))
    assert trio.current_time() == 2
    assert (farewell.answered, farewell.time2wait) == (True, 7)


@jumping
async def test_parts_farewell_ends_whatever_the_target_does() -> None:
    silent = Line()
    await Farewell(silent.connection, send=silent.send, time2wait=2).say(patience=99)
    assert trio.current_time() == LOGOUT_LIMIT
    busy = Line()
    busy.connection.submit(Task(bytes(6), lun=LUN_0))
    await Farewell(busy.connection, send=busy.send, time2wait=2).say(patience=1)
    assert trio.current_time() == LOGOUT_LIMIT + 1
    assert busy.kinds()[-1] is LogoutRequest


@jumping
async def test_parts_farewell_says_nothing_to_a_session_that_has_ended() -> None:
    line = Line()
    line.connection.submit(Task(bytes(6), lun=LUN_0))
    farewell = Farewell(line.connection, send=line.send, time2wait=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: farewell.say(patience=3))
        await trio.sleep(1)
        farewell.end()
    assert trio.current_time() == 1
    assert LogoutRequest not in line.kinds()
    assert not farewell.answered


# --- ABORT TASK SET ---


@jumping
async def test_parts_clearing_gives_each_answer_to_who_asked() -> None:
    line = Line()
    clearing = Clearing(line.connection, send=line.send)
    answers: dict[bytes, int | None] = {}

    async def ask(lun: bytes) -> None:
        answers[lun] = await clearing.abort_task_set(lun)

    async with trio.open_nursery() as nursery:
        for lun in (LUN_0, LUN_1):
            nursery.start_soon(ask, lun)
        await trio.sleep(1)
        tags = {pdu.lun: pdu.itt for pdu in line.sent if isinstance(pdu, TaskManagementRequest)}
        assert clearing.take_answer(TaskManagementResponse(itt=tags[LUN_1], response=5))
        assert not clearing.take_answer(TaskManagementResponse(itt=77, response=0))  # somebody else's
    assert answers == {LUN_1: 5, LUN_0: None}
    assert trio.current_time() == BARRIER_LIMIT
    assert not clearing.take_answer(TaskManagementResponse(itt=tags[LUN_0], response=0))  # too late


@jumping
async def test_parts_clearing_ends_with_its_session() -> None:
    line = Line()
    clearing = Clearing(line.connection, send=line.send)
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(SessionLostError, match="gone"):
                await clearing.abort_task_set(LUN_0)

        nursery.start_soon(ask)
        await trio.sleep(1)
        clearing.end(SessionLostError("gone"))
    assert trio.current_time() == 1


# --- bars ---


@jumping
async def test_parts_bars_hold_back_until_they_are_lifted_or_their_time_is_over() -> None:
    bars = Bars()
    bars.put(LUN_0, SessionLostError("not there yet"), until=10.0)
    looks: list[float] = []

    async def wait() -> None:
        while LUN_0 in bars.barred:
            await bars.wait(LUN_0)
            looks.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(1)
        bars.put(LUN_1, SessionLostError("another"), until=0.0)
        await trio.sleep(1)
        bars.wake()
        await trio.sleep(1)
        bars.lift(LUN_0)
    assert looks == [1, 2, 3]  # every change is worth a look
    bars.put(LUN_0, IdentityError("another disk"), until=5.0)
    with pytest.raises(IdentityError, match="another disk") as info:
        await wait()
    assert trio.current_time() == 5
    assert info.value is not bars.barred[LUN_0][0]  # a copy: tracebacks don't pile up


# --- guards ---


def _guard(*answers: bool, calls: list[float]) -> Callable[[Session], Awaitable[bool]]:
    left = list(answers)

    async def guard(_: Session) -> bool:
        calls.append(trio.current_time())
        return left.pop(0)

    return guard


@jumping
async def test_parts_guards_are_asked_again_once_their_session_is_in_use() -> None:
    session = cast("Session", SimpleNamespace(error=None))
    guards = Guards()
    settled: list[float] = []
    slow: list[float] = []
    guards.add(_guard(True, calls=settled))
    guards.add(_guard(False, False, True, calls=slow))
    async with trio.open_nursery() as nursery:
        guards.start(nursery)
        await guards.prove(session)
        await trio.sleep(2 * ASK_AGAIN_AFTER)
        assert (settled, slow) == ([0], [0])
        guards.go_on(session)
    assert settled == [0]
    assert slow == [0, 10.25, 10.75]


@jumping
async def test_parts_a_guard_that_comes_while_others_look_is_asked_too() -> None:
    session = cast("Session", SimpleNamespace(error=None))
    guards = Guards()
    late: list[float] = []

    async def slow(_: Session) -> bool:
        await trio.sleep(1)
        guards.add(_guard(True, calls=late))
        return True

    guards.add(slow)
    async with trio.open_nursery() as nursery:
        guards.start(nursery)
        await guards.prove(session)
    assert late == [1]


@jumping
async def test_parts_all_guards_are_asked_again_after_news_about_all() -> None:
    """Who was proved before the news came may be somebody else since."""
    session = cast("Session", SimpleNamespace(error=None))
    guards = Guards()
    first: list[float] = []
    second: list[float] = []
    guards.add(_guard(False, True, calls=first))

    async def tells(_: Session) -> bool:
        second.append(trio.current_time())
        await trio.sleep(1)
        if len(second) == 1:
            guards.note_news()
        return True

    guards.add(tells)
    async with trio.open_nursery() as nursery:
        guards.start(nursery)
        await guards.prove(session)
        guards.go_on(session)  # all is settled
    assert (first, second) == ([0, 1], [0, 1])


@jumping
async def test_parts_a_session_with_news_all_the_time_is_given_up() -> None:
    guards = Guards()

    async def tells(_: Session) -> bool:
        await trio.sleep(1)
        guards.note_news()
        return True

    guards.add(tells)
    async with trio.open_nursery() as nursery:
        guards.start(nursery)
        with pytest.raises(SessionLostError, match="all the time"):
            await guards.prove(cast("Session", SimpleNamespace(error=None)))
    assert trio.current_time() == MOST_ROUNDS


@jumping
@pytest.mark.parametrize("end", ["settled", "unsettled", "lost"])
async def test_parts_a_guard_that_takes_long_holds_up_no_other(end: str) -> None:
    """It goes on, and is asked again if that settles nothing; another session is none of its business."""
    session = cast("Session", SimpleNamespace(error=None))
    guards = Guards()
    quick: list[float] = []
    slow: list[float] = []
    guards.add(_guard(True, True, calls=quick))

    async def hangs(_: Session) -> bool:
        slow.append(trio.current_time())
        await trio.sleep(50)
        if end == "lost":
            raise SessionLostError("gone")
        return end == "settled" or len(slow) > 1

    guards.add(hangs)
    async with trio.open_nursery() as nursery:
        guards.start(nursery)
        await guards.prove(session)
        assert trio.current_time() == MOST_WAIT
        guards.go_on(session)
    assert quick == [0]
    assert slow == ([0, 50.25] if end == "unsettled" else [0])


@jumping
async def test_parts_a_guard_that_was_late_is_asked_again_after_news_once_it_is_done() -> None:
    """It has looked before these; only while it looks does it hear of them itself."""
    guards = Guards()
    looks: list[float] = []

    async def late(_: Session) -> bool:
        looks.append(trio.current_time())
        await trio.sleep(MOST_WAIT + 1 if len(looks) == 1 else 0)
        return True

    rounds: list[float] = []

    async def tells(_: Session) -> bool:
        rounds.append(trio.current_time())
        if len(rounds) == 1:
            guards.note_news()
        elif len(rounds) == 2:
            await trio.sleep(2)  # until the late one is done
            guards.note_news()
        return True

    guards.add(late)
    guards.add(tells)
    async with trio.open_nursery() as nursery:
        guards.start(nursery)
        await guards.prove(cast("Session", SimpleNamespace(error=None)))
    assert looks == [0, MOST_WAIT + 2]
    assert rounds == [0, MOST_WAIT, MOST_WAIT + 2]


@jumping
async def test_parts_a_session_that_is_lost_under_a_guard_is_given_up_at_once() -> None:
    guards = Guards()

    async def loses(_: Session) -> bool:
        await trio.sleep(1)
        raise SessionLostError("gone")

    async def hangs(_: Session) -> bool:
        await trio.sleep(50)
        raise SessionLostError("gone, too")

    guards.add(loses)
    guards.add(hangs)
    async with trio.open_nursery() as nursery:
        guards.start(nursery)
        with pytest.raises(SessionLostError, match=r"gone$"):
            await guards.prove(cast("Session", SimpleNamespace(error=None)))
        assert trio.current_time() == 1
    guards.stop()
    with pytest.raises(SessionLostError, match="at its end"):
        await guards.prove(cast("Session", SimpleNamespace(error=None)))


@jumping
async def test_parts_guards_are_left_alone_when_session_or_nexus_has_ended() -> None:
    told: list[str] = []
    for end in ("session", "nexus"):
        state = SimpleNamespace(error=None)
        session = cast("Session", state)
        guards = Guards()
        calls: list[float] = []
        guard = _guard(*[False] * 9, calls=calls)
        guards.prove_soon(guard, session, then=lambda: told.append("not begun"))
        assert calls == []
        async with trio.open_nursery() as nursery:
            guards.start(nursery)
            guards.prove_soon(guard, session, then=lambda: told.append("looked"))
            await trio.sleep(0.3)
            if end == "session":
                state.error = SessionLostError("gone")
            else:
                guards.stop()
            await trio.sleep(60)
        assert len(calls) <= 3  # once more where it was about to look again
    assert told == ["not begun", "looked"] * 2
