"""The short cuts in C against the Python that they are short cuts through: from the same state to the same state."""

import gc
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from connection_driver import LUN, Driver, pattern
from hypothesis import given
from hypothesis import strategies as st
from test_connection_noise import nonsense

from iscsifuse import quick
from iscsifuse.errors import IscsifuseError
from iscsifuse.initiator.statistics import CommandStatistics
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import RESERVED_TAG
from iscsifuse.iscsi.request import NopOut, ScsiCommand
from iscsifuse.iscsi.response import DataIn, NopIn, ScsiResponse, TargetPdu
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import cdb as cdbs
from support.quick import needs_quick, pure

pytestmark = needs_quick

NUMBERS = st.sampled_from([0, 1, 0x7FFFFFFE, 0xFFFFFFF0, 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF])


def seen(task: Task) -> dict[str, Any]:
    """All that there is to a task."""
    values = {name: getattr(task, name) for name in Task.__slots__}
    values["error"] = repr(task.error)
    if task.buffer_in is not None:
        values["buffer_in"] = bytes(task.buffer_in)
    return values


def state(d: Driver) -> dict[str, Any]:
    """All that a connection remembers."""
    c = d.connection
    return {
        "window": (c.window.cmd_sn, c.window.exp_cmd_sn, c.window.max_cmd_sn),
        "numbers": (c.exp_stat_sn, c._numbers.next_itt),
        "tasks": [(itt, seen(task)) for itt, task in c.tasks.items()],
        "queue": [seen(task) for task in c.queue],
        "requests": c._requests,
        "output": [bytes(buffer) for buffer in c.output],
        "amid": c.amid,
    }


# -- start_read ------------------------------------------------------------------------------------------------------


def sent_alike(
    places: list[tuple[int, int]],
    *,
    cmd_sn: int = 10,
    stat_sn: int = 100,
    first_itt: int = 1,
    room: int = 32,
    header_digest: bool = False,
    ping: bool = False,
) -> None:
    """Reads of some (LBA, blocks): the same bytes leave both ways, and the same is remembered."""
    ends = []
    for way in ("pure", "quick"):
        d = Driver(NegotiatedParameters(header_digest=header_digest), cmd_sn=cmd_sn, stat_sn=stat_sn, room=room)
        d.connection._numbers.next_itt = first_itt
        if ping:  # the first tag is taken by something else
            d.connection.request(NopOut(immediate=True, itt=first_itt))
        sent = [bytes(buffer) for buffer in d.connection.output]
        d.connection.output.clear()
        tasks = []
        for lba, blocks in places:
            memory = memoryview(bytearray(max(1, blocks % 1000)))
            if way == "pure":
                with pure():
                    task = send(d, memory, lba=lba, blocks=blocks)
            else:
                task = send(d, memory, lba=lba, blocks=blocks)
            tasks.append(seen(task))
            sent += [bytes(buffer) for buffer in d.connection.output]
            d.connection.output.clear()
        ends.append((tasks, sent, state(d)))
    assert ends[0] == ends[1]


def send(d: Driver, memory: memoryview, *, lba: int, blocks: int) -> Task:
    """As a session sends a read."""
    c = d.connection
    found = c.start_read(memory, lun=LUN, lba=lba, blocks=blocks, started=1.5)
    if found is not None:
        c.output.append(found[1])
        return found[0]
    task = Task(cdbs.read(lba=lba, blocks=blocks), lun=LUN, buffer_in=memory, exact=True)
    task.started = 1.5
    c.submit(task)
    return task


BLOCKS = [0, 1, 8, 0xFF, 0x100, 0xFFFF, 0x10000]


@given(
    cmd_sn=NUMBERS,
    stat_sn=NUMBERS,
    first_itt=NUMBERS,
    room=st.integers(0, 3),
    header_digest=st.booleans(),
    ping=st.booleans(),
    places=st.lists(
        st.tuples(st.sampled_from([0, 7, 0xFFFFFF00, 0xFFFFFFFF]), st.sampled_from(BLOCKS)), min_size=1, max_size=5
    ),
)
def test_a_read_is_sent_like_any_command(
    cmd_sn: int,
    stat_sn: int,
    first_itt: int,
    room: int,
    header_digest: bool,
    ping: bool,
    places: list[tuple[int, int]],
) -> None:
    sent_alike(
        places,
        cmd_sn=cmd_sn,
        stat_sn=stat_sn,
        first_itt=first_itt,
        room=room,
        header_digest=header_digest,
        ping=ping,
    )


@pytest.mark.parametrize("lba", [0, 0x12345678, 0xFFFF0000, 0xFFFFFFF8, 0xFFFFFFFF, 0x100000000, 1 << 40])
def test_wherever_it_reads(lba: int) -> None:
    for blocks in BLOCKS:
        sent_alike([(lba, blocks), (lba, blocks)])


@pytest.mark.parametrize("number", [0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF])
def test_whatever_its_numbers_are(number: int) -> None:
    for ping in (False, True):
        sent_alike([(1, 8)] * 4, first_itt=number, ping=ping)
    for room in range(5):
        sent_alike([(1, 8)] * 4, cmd_sn=number, stat_sn=number, room=room)


def test_the_usual_read_goes_the_short_way() -> None:
    d = Driver()
    memory = memoryview(bytearray(4096))
    found = d.connection.start_read(memory, lun=LUN, lba=7, blocks=8, started=1.0)
    assert found is not None
    task, header = found
    command, _ = d.decoded(header)
    assert isinstance(command, ScsiCommand)
    assert command.cdb[:10] == cdbs.read_10(lba=7, blocks=8)
    assert (command.lun, command.itt, command.expected_data_transfer_length) == (LUN, task.itt, 4096)
    assert d.connection.tasks == {task.itt: task}
    assert d.connection.output == []


def test_what_waits_to_be_sent_goes_first() -> None:
    """Commands leave in the order of their CmdSN: RFC 7143 §4.2.2.1."""
    d = Driver()
    d.connection.submit(Task(bytes(6), lun=LUN))
    memory = memoryview(bytearray(512))
    assert d.connection.start_read(memory, lun=LUN, lba=0, blocks=1, started=0.0) is None
    d.sent()
    assert d.connection.start_read(memory, lun=LUN, lba=0, blocks=1, started=0.0) is not None


def test_nothing_is_sent_after_the_end() -> None:
    d = Driver()
    d.connection.fail_all(IscsifuseError("over"))
    assert d.connection.start_read(memoryview(bytearray(512)), lun=LUN, lba=0, blocks=1, started=0.0) is None


@pytest.mark.parametrize("memory", [memoryview(bytearray(1024))[::2], memoryview(b"")])
def test_memory_that_is_of_no_use_is_left_to_the_general_way(memory: memoryview) -> None:
    d = Driver()
    before = state(d)
    assert d.connection.start_read(memory, lun=LUN, lba=0, blocks=1, started=0.0) is None
    assert state(d) == before


# -- take_reads ------------------------------------------------------------------------------------------------------

LENGTHS = [1, 3, 4, 512, 4096]


def answers(draw: st.DrawFn, d: Driver, tasks: list[Task]) -> list[bytes]:
    """What a target might say: mostly what is usual."""
    said = []
    for task in tasks:
        data = pattern(task.expected)
        kind = draw(st.sampled_from(["usual"] * 6 + ["pieces", "apart", "short", "late", "again", "ping", "noise"]))
        usual = DataIn(itt=task.itt, has_status=True, final=True, data=data)
        pdus: list[TargetPdu] = [usual]
        if kind == "pieces":
            cut = draw(st.integers(0, len(data)))
            pdus = [
                DataIn(itt=task.itt, data=data[:cut], final=False),
                DataIn(itt=task.itt, data=data[cut:], data_sn=1, buffer_offset=cut, has_status=True, final=True),
            ]
        elif kind == "apart":
            pdus = [DataIn(itt=task.itt, data=data, final=True), ScsiResponse(itt=task.itt, exp_data_sn=1)]
        elif kind == "short":
            rest = draw(st.integers(0, len(data)))
            pdus = [
                DataIn(
                    itt=task.itt,
                    data=data[:rest],
                    has_status=True,
                    final=True,
                    underflow=draw(st.booleans()),
                    residual_count=len(data) - rest,
                )
            ]
        elif kind == "late":
            pdus = [DataIn(itt=task.itt, data=data, data_sn=draw(st.integers(0, 2)), has_status=True, final=True)]
        elif kind == "again":
            pdus = [usual, usual]
        elif kind == "ping":
            pdus = [NopIn(itt=RESERVED_TAG, ttt=5, data=b"ping"), usual]
        elif kind == "noise":
            said.append(draw(nonsense()))
        said += [d.encoded(pdu, max_cmd_sn=draw(st.sampled_from([None, None, None, 5, 0]))) for pdu in pdus]
    return said


@st.composite
def conversations(draw: st.DrawFn) -> tuple[NegotiatedParameters, list[int], list[bytes], list[int], int]:
    p = NegotiatedParameters(
        data_digest=draw(st.booleans()) and draw(st.booleans()),
        max_recv_data_segment_length=draw(st.sampled_from([512, 8192, 262144])),
    )
    lengths = draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=12))
    stat_sn = draw(NUMBERS)
    d = Driver(p, stat_sn=stat_sn)
    tasks = [Task(bytes(10), lun=LUN, buffer_in=memoryview(bytearray(n)), exact=True) for n in lengths]
    d.submit(*tasks)
    stream = b"".join(answers(draw, d, tasks))
    if draw(st.booleans()):  # one bit is wrong
        position = draw(st.integers(0, len(stream) - 1))
        wrong = stream[position] ^ 1 << draw(st.integers(0, 7))
        stream = stream[:position] + bytes([wrong]) + stream[position + 1 :]
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    return p, lengths, pieces, draw(st.permutations(range(len(lengths)))), stat_sn


@given(conversation=conversations())
def test_what_comes_is_taken_in_alike(
    conversation: tuple[NegotiatedParameters, list[int], list[bytes], list[int], int],
) -> None:
    """Whatever a target says, in whatever pieces: the same events, bytes, numbers, answers and complaints."""
    p, lengths, pieces, order, stat_sn = conversation
    ends = []
    for way in ("pure", "quick"):
        if way == "pure":
            with pure():
                d = Driver(p, stat_sn=stat_sn)
        else:
            d = Driver(p, stat_sn=stat_sn)
        tasks = [Task(bytes(10), lun=LUN, buffer_in=memoryview(bytearray(b"\xee" * n)), exact=True) for n in lengths]
        d.submit(*tasks)
        if order[0] == 0:
            d.connection.abandon(tasks[-1], IscsifuseError("given up"))
        told: list[object] = []
        try:
            for piece in pieces:
                told += [tasks.index(e) if isinstance(e, Task) else repr(e) for e in d.receive(piece)]
        except IscsifuseError as error:
            told += [tasks.index(e) if isinstance(e, Task) else repr(e) for e in d.connection.take_events()]
            told.append(repr(error))
        ends.append((told, [seen(task) for task in tasks], state(d)))
    assert ends[0] == ends[1]


def told_alike(d_of: Callable[[], Driver], pieces: list[bytes], *, partly: bytes = b"") -> list[object]:
    """What comes of three reads of 512 bytes, which has to be the same both ways; ``partly`` comes first."""
    ends: list[list[object]] = []
    for way in ("pure", "quick"):
        if way == "pure":
            with pure():
                d = d_of()
        else:
            d = d_of()
        tasks = [Task(bytes(10), lun=LUN, buffer_in=memoryview(bytearray(512)), exact=True) for _ in range(3)]
        d.submit(*tasks)
        told: list[object] = []
        try:
            for piece in (partly, *pieces):
                told += [tasks.index(e) if isinstance(e, Task) else repr(e) for e in d.receive(piece)]
        except IscsifuseError as error:
            told += [tasks.index(e) if isinstance(e, Task) else repr(e) for e in d.connection.take_events()]
            told.append(repr(error))
        ends.append([told, [seen(task) for task in tasks], state(d)])
    assert ends[0] == ends[1]
    return ends[1]


USUAL = DataIn(itt=2, has_status=True, final=True, data=pattern(512))
BOTH = 100
"""StatSN of what comes first."""


def a_driver() -> Driver:
    return Driver(stat_sn=BOTH)


@pytest.mark.parametrize(
    ("position", "values"),
    [
        (0, [0x21, 0x05, 0x65, 0xA5, 0x3F]),  # opcode
        (1, [0x01, 0x80, 0x00, 0x83, 0x85, 0xC1, 0x91, 0xFF]),  # flags
        (2, [0, 1]),
        (3, [2, 8, 0x18, 0x28, 0x40]),  # status
        (4, [1, 2, 255]),  # additional headers
        (5, [1]),  # the length of the data
        (6, [0, 1, 3]),
        (7, [1, 4, 255]),
        (8, [1]),
        (19, [0, 1, 3, 4]),  # tag
        (20, [255]),  # target's tag
        (27, [99, 101]),  # StatSN
        (24, [1]),
        (39, [1, 2]),  # DataSN
        (36, [128]),
        (43, [1, 4]),  # offset
        (40, [128]),
        (47, [4]),  # residual count
    ],
)
def test_one_byte_is_unusual(position: int, values: list[int]) -> None:
    """In a Data-In that is usual in all else, after which another one comes."""
    for value in values:
        d = a_driver()
        frame = bytearray(d.encoded(USUAL, exp_cmd_sn=12, max_cmd_sn=44))
        frame[position] = value
        last = DataIn(itt=3, has_status=True, final=True, data=pattern(512))
        told_alike(a_driver, [bytes(frame), d.encoded(last, exp_cmd_sn=13, max_cmd_sn=45)])


@pytest.mark.parametrize("digests", [False, True])
def test_no_data_more_data_less_data(digests: bool) -> None:
    for length in (0, 1, 508, 509, 511, 512, 513, 516, 1024):
        p = NegotiatedParameters(data_digest=digests)
        d = Driver(p, stat_sn=BOTH)
        frame = d.encoded(DataIn(itt=2, has_status=True, final=True, data=bytes(length)))
        end = told_alike(lambda p=p: Driver(p, stat_sn=BOTH), [frame[:-1], frame[-1:]])  # type: ignore[misc]
        told_alike(lambda p=p: Driver(p, stat_sn=BOTH), [frame])  # type: ignore[misc]
        assert (end[0] == [1]) == (length <= 512)


def test_more_than_was_agreed_is_refused() -> None:
    """MaxRecvDataSegmentLength is ours to hold: RFC 7143 §13.12."""
    p = NegotiatedParameters(max_recv_data_segment_length=8192)
    for length in (8192, 8196):
        results = []
        for way in (pure, None):
            if way is None:
                d = Driver(p)
            else:
                with way():
                    d = Driver(p)
            task = Task(bytes(10), lun=LUN, buffer_in=memoryview(bytearray(length)), exact=True)
            d.submit(task)
            try:
                d.receive(d.encoded(DataIn(itt=task.itt, has_status=True, final=True, data=bytes(length))))
                results.append("")
            except IscsifuseError as error:
                results.append(str(error))
        assert results[0] == results[1]
        assert bool(results[1]) == (length > 8192)


@pytest.mark.parametrize("data_sn", [0, 1])
@pytest.mark.parametrize("offset", [0, 256])
@pytest.mark.parametrize("length", [256, 512])
def test_the_rest_of_a_read(data_sn: int, offset: int, length: int) -> None:
    """Half of it is there already."""
    d = a_driver()
    half = d.encoded(DataIn(itt=2, data=pattern(256), final=False))
    rest = DataIn(itt=2, has_status=True, final=True, data=pattern(length), data_sn=data_sn, buffer_offset=offset)
    told_alike(a_driver, [d.encoded(rest)], partly=half)


def test_a_duplicate_of_nothing() -> None:
    """An empty Data-In has used up DataSN 0, so that the whole of the data is a duplicate."""
    d = a_driver()
    empty = d.encoded(DataIn(itt=2, data=b"", final=False))
    told_alike(a_driver, [d.encoded(USUAL)], partly=empty)


EDGES = [0, 1, 2, 12, 13, 14, 31, 44, 45, 46, 0x7FFFFFFF, 0x80000000, 0x8000000C, 0x8000000D, 0xFFFFFFFF]


def test_whatever_it_says_of_the_window() -> None:
    for exp_cmd_sn in EDGES:
        for max_cmd_sn in EDGES:
            d = a_driver()
            said = [
                d.encoded(DataIn(itt=itt, has_status=True, final=True, data=pattern(512)), **numbers)
                for itt, numbers in (
                    (1, {"exp_cmd_sn": 12, "max_cmd_sn": 43}),
                    (2, {"exp_cmd_sn": exp_cmd_sn, "max_cmd_sn": max_cmd_sn}),
                )
            ]
            assert told_alike(a_driver, said)[0] == [0, 1]


def test_usual_answers_go_the_short_way() -> None:
    """Else the comparison above would compare the Python with itself."""
    d = Driver()
    taken: list[int] = []
    take = d.connection._receiver._take
    assert take is not None

    def counted(staging: memoryview, start: int, end: int) -> int:
        stop = take(staging, start, end)
        taken.append(stop - start)
        return stop

    d.connection._receiver._take = counted
    tasks = [Task(bytes(10), lun=LUN, buffer_in=memoryview(bytearray(512)), exact=True) for _ in range(3)]
    d.submit(*tasks)
    data = pattern(512)
    stream = b"".join(d.encoded(DataIn(itt=t.itt, has_status=True, final=True, data=data)) for t in tasks)
    assert d.receive(stream) == tasks
    assert taken == [3 * (48 + 512)]
    assert all(task.done and bytes(task.buffer_in or b"") == data for task in tasks)


# -- end_reads -------------------------------------------------------------------------------------------------------


def ended(cdb: bytes, *, status: int = 0, error: Exception | None = None, started: float = 1.0) -> Task:
    task = Task(cdb, lun=LUN, buffer_in=memoryview(bytearray(512)), exact=True)
    task.started, task.done, task.status, task.received = started, True, status, 512
    task.error = error  # type: ignore[assignment]
    return task


READ = cdbs.read_10(lba=1, blocks=1)
OTHERS = st.builds(
    ended,
    st.sampled_from([READ, cdbs.read_16(lba=1, blocks=1), cdbs.test_unit_ready(), cdbs.synchronize_cache_10()]),
    status=st.sampled_from([0, 2, -1]),
    error=st.sampled_from([None, IscsifuseError("lost")]),
)
GOOD = st.builds(ended, st.just(READ), started=st.floats(0, 2))


@given(events=st.lists(GOOD | OTHERS | st.just(NopIn()), max_size=12), known=st.booleans())
def test_the_end_of_reads_is_counted_alike(events: list[Any], known: bool) -> None:
    assert quick.end_reads is not None
    tables = [CommandStatistics(), CommandStatistics()]
    if known:
        for table in tables:
            table.count(ended(READ), 1.25)
    good = [e for e in events if isinstance(e, Task) and (e.cdb, e.status, e.error) == (READ, 0, None)]
    woken: list[int] = []
    for number, task in enumerate(good):
        task.waiter = lambda number=number: woken.append(number)
    count, quickest, others = quick.end_reads(events, tables[0].by_kind, 2.5)
    if not known:  # nobody has counted a read before: the first one makes the row
        assert (count, others, woken) == (0, events, [])
        return
    assert count == len(good)
    assert woken == list(range(len(good)))
    assert [id(event) for event in others] == [id(e) for e in events if not any(e is g for g in good)]
    assert quickest == min((2.5 - task.started for task in good), default=float("inf"))
    assert all(task.waiter is None for task in good)
    for task in good:
        tables[1].count(task, 2.5)
    assert tables[0].rows() == tables[1].rows()


@pytest.mark.parametrize("status", [0, 2, -1])
def test_what_failed_is_not_counted_as_a_success(status: int) -> None:
    assert quick.end_reads is not None
    table = CommandStatistics()
    table.count(ended(READ), 1.25)
    task = ended(READ, status=status, error=IscsifuseError("lost"))
    assert quick.end_reads([task], table.by_kind, 2.0) == (0, float("inf"), [task])
    assert table.rows()[0].calls == 1


def test_what_a_waiter_raises_is_raised() -> None:
    assert quick.end_reads is not None
    table = CommandStatistics()
    table.count(ended(READ), 1.25)
    task = ended(READ)
    task.waiter = lambda: 1 / 0  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        quick.end_reads([task], table.by_kind, 2.0)


# -- what must never happen ------------------------------------------------------------------------------------------


def test_arguments_that_it_doesn_t_know_are_refused() -> None:
    """Not guessed at: they are a mistake of ours."""
    for function in (quick.start_read, quick.take_reads, quick.end_reads, quick.take_stray):
        assert function is not None
        unknown: list[tuple[Any, ...]] = [
            (),
            (None,) * 3,
            (None,) * 6,
            (None,) * 7,
            ({}, {}, {}, -1, 0, 0, 0),
            ([], {}, 1),
        ]
        for arguments in unknown:
            with pytest.raises(TypeError):
                function(*arguments)


def test_staging_memory_is_not_left() -> None:
    d = Driver()
    take = d.connection._receiver._take
    assert take is not None
    with pytest.raises(ValueError, match="beyond"):
        take(memoryview(bytearray(10)), 0, 11)
    with pytest.raises(ValueError, match="beyond"):
        take(memoryview(bytearray(10)), 5, 4)


def test_classes_are_known_by_their_slots() -> None:
    """A class that has changed isn't used; the Python goes on without."""
    with pytest.raises(ValueError, match="no short cut knows"):
        quick.known(type("Nothing", (), {}))
    try:
        with pytest.raises(AttributeError):
            quick.known(type("Numbers", (), {"__slots__": ("next_itt",)}))
        with pytest.raises(TypeError, match="is no slot"):
            quick.known(type("Numbers", (), {"exp_stat_sn": 1, "next_itt": 1}))
        d = Driver()
        with pytest.raises(TypeError):
            d.connection.start_read(memoryview(bytearray(512)), lun=LUN, lba=0, blocks=1, started=0.0)
    finally:
        quick.known(type(Driver().connection._numbers))


def test_nothing_is_kept() -> None:
    """Objects that went through are freed, and shared ones are counted rightly."""

    def rounds(count: int) -> None:
        d = Driver()
        table = CommandStatistics()
        table.count(ended(READ), 1.25)
        for _ in range(count):
            found = d.connection.start_read(memory, lun=lun, lba=7, blocks=1, started=started)
            assert found is not None
            [event] = d.give(DataIn(itt=found[0].itt, has_status=True, final=True, data=bytes(512)))
            assert quick.end_reads is not None
            assert quick.end_reads([event], table.by_kind, 2.5)[0] == 1

    lun, memory, started = bytes(range(8)), memoryview(bytearray(512)), 0.5
    shared = [lun, memory, started]
    rounds(300)
    before = [sys.getrefcount(thing) for thing in shared]
    tracemalloc.start()
    try:
        rounds(300)
        gc.collect()
        start = tracemalloc.get_traced_memory()[0]
        rounds(3000)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - start < 20_000
    finally:
        tracemalloc.stop()
    assert [sys.getrefcount(thing) for thing in shared] == before
