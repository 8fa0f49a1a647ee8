from collections.abc import Sequence

import pytest
import trio
from initiator_fakes import LUN_0, Answer, FakeExecutor, Reply, jumping

from iscsifuse.errors import (
    CommandError,
    CommandTimeoutError,
    DigestError,
    IscsifuseError,
    MediumError,
    ReservationConflictError,
    SessionLostError,
    TransferError,
)
from iscsifuse.initiator.commander import Commander
from iscsifuse.initiator.policy import Change
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.sense import SenseKey as K
from iscsifuse.scsi.status import Status

GOOD = Reply(bytes(512))
BUSY = Reply(status=Status.BUSY)
POWER_ON = Reply.check(K.UNIT_ATTENTION, 0x29)
BECOMING_READY = Reply.check(K.NOT_READY, 0x04, 0x01)
STOPPED = Reply.check(K.NOT_READY, 0x04, 0x02)
READ = cdbs.read(lba=7, blocks=1)
START_STOP = 0x1B


def _commander(executor: FakeExecutor, *, limit: float = 30.0, may_start: bool = False) -> Commander:
    return Commander(executor, address=LUN_0, label="LUN 0 of iqn.x", limit=limit, may_start=may_start)


async def _read(commander: Commander) -> bytes:
    memory = memoryview(bytearray(512))
    await commander.run(READ, buffer_in=memory, exact=True, place=" at LBA 7")
    return bytes(memory)


@pytest.mark.parametrize(
    "answers",
    [
        [GOOD],
        [POWER_ON, GOOD],
        [POWER_ON] * 5 + [GOOD],
        [BUSY] * 20 + [GOOD],
        [Reply(status=Status.TASK_SET_FULL)] * 20 + [GOOD],
        [BECOMING_READY] * 20 + [GOOD],
        [Reply.check(K.ABORTED_COMMAND, 0x47, 0x05), GOOD],
        [Reply.check(K.HARDWARE_ERROR, 0x44), GOOD],
        [Reply(status=Status.TASK_ABORTED)] * 3 + [GOOD],
        [Reply(status=Status.RESERVATION_CONFLICT)] * 2 + [GOOD],
        [Reply.check(K.MEDIUM_ERROR, 0x0C, code=0x71), GOOD],
        # One kind of trouble uses up nothing of another's.
        [BECOMING_READY] * 15 + [Reply.check(K.UNIT_ATTENTION, 0x28), POWER_ON, GOOD],
        [BUSY] * 15 + [POWER_ON, Reply(status=Status.RESERVATION_CONFLICT), GOOD],
        [BECOMING_READY] * 15 + [STOPPED, GOOD],
        [Reply(bytes(100)), POWER_ON, GOOD],
        [DigestError("x", header=False), BUSY, Reply(bytes(3)), GOOD],
        [Reply.check(K.RECOVERED_ERROR, 0x17, data=bytes(512))],
    ],
)
@pytest.mark.expect_log("READ.* of LUN 0 of iqn.x at LBA 7: ")
@jumping
async def test_commander_troubles_that_pass(answers: Sequence[Answer]) -> None:
    starts = [Reply()] if STOPPED in answers else []
    position = answers.index(STOPPED) + 1 if starts else 0
    executor = FakeExecutor([*answers[:position], *starts, *answers[position:]])
    assert await _read(_commander(executor, may_start=True)) == bytes(512)
    assert len(executor.cdbs) == len(answers) + len(starts)


FOR_EVER = [
    (POWER_ON, CommandError, 11),
    (Reply.check(K.ABORTED_COMMAND, 0x47, 0x05), CommandError, 6),
    (Reply.check(K.HARDWARE_ERROR, 0x44), CommandError, 2),
    (Reply(status=Status.TASK_ABORTED), CommandError, 6),
    (Reply(status=Status.RESERVATION_CONFLICT), ReservationConflictError, 4),
    (Reply.check(K.MEDIUM_ERROR, 0x0C, code=0x71), CommandError, 6),
    (Reply(bytes(511)), TransferError, 3),
    (DigestError("x", header=False), DigestError, 3),
    # no second try
    (Reply.check(K.MEDIUM_ERROR, 0x11, information=7), MediumError, 1),
    (Reply.check(K.ILLEGAL_REQUEST, 0x21), CommandError, 1),
    (Reply(status=0xFE), CommandError, 1),
    (CommandTimeoutError("x"), CommandTimeoutError, 1),
    (SessionLostError("x"), SessionLostError, 1),
]


@pytest.mark.expect_log("READ.* of LUN 0 of iqn.x at LBA 7: ")
@pytest.mark.parametrize(("answer", "error", "attempts"), FOR_EVER)
@jumping
async def test_commander_troubles_that_stay_are_bounded_by_count(
    answer: Answer, error: type[IscsifuseError], attempts: int
) -> None:
    executor = FakeExecutor([answer])
    with pytest.raises(error):
        await _read(_commander(executor))
    assert len(executor.cdbs) == attempts
    assert trio.current_time() < 5


@pytest.mark.conformance(108)
@pytest.mark.conformance(109)
@pytest.mark.parametrize("answer", [BUSY, Reply(status=Status.TASK_SET_FULL), BECOMING_READY])
@pytest.mark.parametrize("limit", [0.5, 30.0, 300.0])
@jumping
async def test_commander_troubles_that_stay_are_bounded_by_the_deadline(answer: Reply, limit: float) -> None:
    executor = FakeExecutor([answer])
    with pytest.raises(CommandError, match=r"READ\(10\) of LUN 0 of iqn\.x at LBA 7 failed"):
        await _read(_commander(executor, limit=limit))
    assert limit - 1.1 <= trio.current_time() <= limit
    assert len(executor.cdbs) < limit + 10  # it backs off
    gaps = [round(after - before, 6) for before, after in zip(executor.times, executor.times[1:], strict=False)]
    assert gaps == sorted(gaps)


@pytest.mark.conformance("B10")
@jumping
async def test_commander_a_mixed_flood_is_bounded() -> None:
    flood: list[Answer] = [POWER_ON, BUSY, Reply.check(K.ABORTED_COMMAND, 0x47), Reply(status=Status.TASK_ABORTED)]
    executor = FakeExecutor(flood * 1000)
    with pytest.raises(CommandError):
        await _read(_commander(executor))
    assert len(executor.cdbs) < 50


@pytest.mark.expect_log("1 of 512 bytes")
@jumping
async def test_commander_the_deadline_counts_from_the_first_attempt_whatever_it_was() -> None:
    """Not from the start of the clock, where the first trouble was none of the target's status."""
    await trio.sleep(1000)
    executor = FakeExecutor([Reply(bytes(1)), BUSY, BUSY, GOOD])
    assert await _read(_commander(executor, limit=5)) == bytes(512)
    executor = FakeExecutor([Reply(bytes(1)), BUSY])
    began = trio.current_time()
    with pytest.raises(CommandError):
        await _read(_commander(executor, limit=5))
    assert 3.9 <= trio.current_time() - began <= 5


# --- recovered errors ---


@pytest.mark.conformance(114)
@pytest.mark.conformance(72)
@pytest.mark.expect_log("moved 100 of 512 bytes")
@jumping
async def test_commander_a_recovered_error_without_all_the_data_is_no_success() -> None:
    executor = FakeExecutor([Reply.check(K.RECOVERED_ERROR, 0x17, data=bytes(100))])
    with pytest.raises(TransferError, match="moved 100 of 512 bytes"):
        await _read(_commander(executor))
    assert len(executor.cdbs) == 3


@pytest.mark.conformance(114)
@pytest.mark.expect_log("moved 12 of 512 bytes")
@jumping
async def test_commander_a_recovered_write_that_was_not_fetched_is_no_success() -> None:
    recovered = Reply(status=Status.CHECK_CONDITION, sense=Reply.check(K.RECOVERED_ERROR, 0x17).sense, short=500)
    executor = FakeExecutor([recovered])
    with pytest.raises(TransferError):
        await _commander(executor).run(cdbs.write(lba=0, blocks=1), buffer_out=memoryview(bytes(512)), exact=True)


@jumping
async def test_commander_a_recovered_query_may_be_short() -> None:
    executor = FakeExecutor([Reply.check(K.RECOVERED_ERROR, 0x17, data=b"abc")])
    data = await _commander(executor).query(cdbs.inquiry(allocation_length=255), length=255)
    assert data == b"abc"


# --- START STOP UNIT ---


@pytest.mark.conformance(108)
@jumping
async def test_commander_a_stopped_unit_is_started_where_that_is_allowed() -> None:
    executor = FakeExecutor([STOPPED, Reply(), BECOMING_READY, GOOD])
    assert await _read(_commander(executor, may_start=True)) == bytes(512)
    assert executor.opcodes == [0x28, START_STOP, 0x28, 0x28]
    assert executor.cdbs[1][4] & 0x01  # START, and not LOEJ
    assert not executor.cdbs[1][4] & 0x02


@pytest.mark.conformance(108)
@jumping
async def test_commander_a_stopped_unit_is_left_alone_otherwise() -> None:
    executor = FakeExecutor([STOPPED])
    with pytest.raises(CommandError):
        await _read(_commander(executor))
    assert executor.opcodes == [0x28]


@pytest.mark.conformance(108)
@jumping
async def test_commander_a_unit_that_does_not_start_is_given_up() -> None:
    executor = FakeExecutor(lambda _, cdb: Reply() if cdb[0] == START_STOP else STOPPED)
    with pytest.raises(CommandError):
        await _read(_commander(executor, may_start=True))
    assert executor.opcodes.count(START_STOP) == 3
    assert executor.opcodes.count(0x28) == 3


# --- news ---


@pytest.mark.parametrize(
    ("answer", "change"),
    [
        (POWER_ON, Change.RESET),
        (Reply.check(K.UNIT_ATTENTION, 0x28), Change.MEDIUM),
        (Reply.check(K.UNIT_ATTENTION, 0x2A, 0x09), Change.CAPACITY),
        (Reply.check(K.UNIT_ATTENTION, 0x3F, 0x0E), Change.INVENTORY),
        (Reply.check(K.MEDIUM_ERROR, 0x0C, code=0x71), Change.DEFERRED),
    ],
)
@pytest.mark.conformance(107)
@jumping
async def test_commander_news_are_told_before_the_next_attempt(answer: Reply, change: Change) -> None:
    executor = FakeExecutor([answer, BUSY, GOOD])
    told: list[tuple[Change, int]] = []

    async def on_change(news: Change) -> None:
        await trio.sleep(1)
        told.append((news, len(executor.cdbs)))

    commander = Commander(executor, address=LUN_0, label="x", limit=30, on_change=on_change)
    await _read(commander)
    assert told == [(change, 1)]


@jumping
async def test_commander_a_query_returns_what_came() -> None:
    executor = FakeExecutor([Reply(b"x" * 100)])
    commander = _commander(executor)
    assert await commander.query(cdbs.inquiry(allocation_length=255), length=255) == b"x" * 100
    assert await commander.query(cdbs.inquiry(allocation_length=36), length=36) == b"x" * 36


@jumping
async def test_commander_cancelled_between_attempts() -> None:
    executor = FakeExecutor([BECOMING_READY])
    with trio.move_on_after(3.1) as scope:
        await _read(_commander(executor))
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(3.1)
