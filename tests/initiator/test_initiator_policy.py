from dataclasses import dataclass

import pytest
from initiator_fakes import sense

from iscsifuse.errors import (
    CommandError,
    DataProtectError,
    MediumError,
    NoMediumError,
    NoSpaceError,
    ReservationConflictError,
)
from iscsifuse.initiator.policy import Action, Change, Verdict, judge
from iscsifuse.scsi.sense import SenseKey
from iscsifuse.scsi.status import Status

ACCEPT, RETRY, START, FAIL = Action.ACCEPT, Action.RETRY, Action.START, Action.FAIL
MANY = 1000


@dataclass(frozen=True)
class Case:
    """What a target says, and what follows."""

    number: int
    status: int
    sense: bytes
    action: Action
    retries: range = range(1)
    error: type[CommandError] | None = CommandError
    change: Change = Change.NONE


def _check(
    number: int,
    key: SenseKey,
    asc: int,
    ascq: int,
    action: Action,
    retries: range = range(1),
    error: type[CommandError] | None = CommandError,
    change: Change = Change.NONE,
    code: int = 0x70,
) -> Case:
    return Case(number, Status.CHECK_CONDITION, sense(key, asc, ascq, code=code), action, retries, error, change)


CAPPED = range(1, 21)
FOR_LONG = range(MANY, 1 << 30)
K = SenseKey

CASES = [
    # 106: reset, power on, nexus loss, commands cleared
    *[
        _check(106, K.UNIT_ATTENTION, 0x29, ascq, RETRY, CAPPED, change=Change.RESET)
        for ascq in (0, 1, 2, 3, 4, 5, 6, 7)
    ],
    _check(106, K.UNIT_ATTENTION, 0x47, 0x7F, RETRY, CAPPED),
    _check(106, K.UNIT_ATTENTION, 0x2F, 0x00, RETRY, CAPPED),
    _check(106, K.UNIT_ATTENTION, 0x2A, 0x01, RETRY, CAPPED, change=Change.MODE),
    # 107: what changed
    _check(107, K.UNIT_ATTENTION, 0x2A, 0x09, RETRY, CAPPED, change=Change.CAPACITY),
    _check(107, K.UNIT_ATTENTION, 0x2A, 0x09, RETRY, CAPPED, change=Change.CAPACITY, code=0x72),
    _check(107, K.UNIT_ATTENTION, 0x3F, 0x0E, RETRY, CAPPED, change=Change.INVENTORY),
    _check(107, K.UNIT_ATTENTION, 0x28, 0x00, RETRY, CAPPED, change=Change.MEDIUM),
    _check(107, K.UNIT_ATTENTION, 0x3F, 0x03, RETRY, CAPPED, change=Change.MEDIUM),
    _check(107, K.UNIT_ATTENTION, 0x3F, 0x05, RETRY, CAPPED, change=Change.MEDIUM),
    # 108: not ready
    *[
        _check(108, K.NOT_READY, 0x04, ascq, RETRY, FOR_LONG)
        for ascq in (0x01, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0A, 0x14)
    ],
    _check(108, K.NOT_READY, 0x04, 0x02, START, range(1, 4)),
    _check(108, K.NOT_READY, 0x04, 0x00, FAIL),
    _check(108, K.NOT_READY, 0x04, 0x03, FAIL),
    *[_check(108, K.NOT_READY, 0x3A, ascq, FAIL, error=NoMediumError) for ascq in (0, 1, 2)],
    # 109: busy
    Case(109, Status.BUSY, b"", RETRY, FOR_LONG),
    Case(109, Status.TASK_SET_FULL, b"", RETRY, FOR_LONG),
    # 110: reserved
    Case(110, Status.RESERVATION_CONFLICT, b"", RETRY, range(1, 6), ReservationConflictError),
    # 111: bad blocks
    _check(111, K.MEDIUM_ERROR, 0x11, 0x00, FAIL, error=MediumError),
    _check(111, K.MEDIUM_ERROR, 0x11, 0x00, FAIL, error=MediumError, code=0x72),
    _check(111, K.MEDIUM_ERROR, 0x0C, 0x00, FAIL, error=MediumError),
    # 112: sense data that make no sense
    *[
        Case(112, Status.CHECK_CONDITION, data, FAIL)
        for data in (b"", b"\x70", b"\x72", b"\x00" * 18, b"\x7f" + bytes(17), b"\xff" * 252)
    ],
    # 113: deferred, fixed and descriptor format; whatever it was about, the command at hand was not executed
    *[
        _check(113, key, 0x0C, 0, RETRY, CAPPED, change=Change.DEFERRED, code=code)
        for key in (K.MEDIUM_ERROR, K.HARDWARE_ERROR, K.RECOVERED_ERROR)
        for code in (0x71, 0x73)
    ],
    # 114: recovered
    _check(114, K.RECOVERED_ERROR, 0x17, 0x01, ACCEPT, error=None),
    _check(114, K.NO_SENSE, 0x00, 0x00, ACCEPT, error=None),
    Case(114, Status.GOOD, b"", ACCEPT, error=None),
    Case(114, Status.CONDITION_MET, b"", ACCEPT, error=None),
    # 115, and 65: aborted
    _check(115, K.ABORTED_COMMAND, 0x47, 0x05, RETRY, range(1, 11)),
    _check(65, K.ABORTED_COMMAND, 0x0C, 0x0C, RETRY, range(1, 11)),
    _check(65, K.ABORTED_COMMAND, 0x0C, 0x0D, RETRY, range(1, 11)),
    # 116: protected, full
    _check(116, K.DATA_PROTECT, 0x27, 0x00, FAIL, error=DataProtectError),
    _check(116, K.DATA_PROTECT, 0x27, 0x02, FAIL, error=DataProtectError),
    _check(116, K.DATA_PROTECT, 0x27, 0x07, FAIL, error=NoSpaceError),
    # 117: aborted by others
    Case(117, Status.TASK_ABORTED, b"", RETRY, range(1, 11)),
    Case(117, Status.ACA_ACTIVE, b"", RETRY, range(1, 11)),
    # the rest
    _check(112, K.ILLEGAL_REQUEST, 0x20, 0x00, FAIL),
    _check(112, K.ILLEGAL_REQUEST, 0x21, 0x00, FAIL),
    _check(112, K.BLANK_CHECK, 0x00, 0x00, FAIL),
    _check(112, K.MISCOMPARE, 0x1D, 0x00, FAIL),
    _check(112, K.HARDWARE_ERROR, 0x44, 0x00, RETRY, range(1, 4)),
    Case(112, 0x22, b"", FAIL),
    Case(112, 0xFE, b"", FAIL),
]


def _name(case: Case) -> str:
    return f"{case.number}-{case.status:02x}-{case.sense[:14].hex() or 'none'}"


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=_name(case), marks=pytest.mark.conformance(case.number)) for case in CASES]
)
def test_policy(case: Case) -> None:
    verdict = judge(case.status, case.sense, what="READ(10) of LUN 1 at LBA 7")
    assert verdict.action is case.action
    assert verdict.retries in case.retries
    assert verdict.change is case.change
    if case.error is None:
        assert verdict.error is None
    else:
        assert type(verdict.error) is case.error
        assert str(verdict.error).startswith("READ(10) of LUN 1 at LBA 7 failed: ")
        assert "\n" not in str(verdict.error)
        assert verdict.error.status == case.status
    if verdict.retries >= MANY:
        assert verdict.delay > 0  # only time bounds it


@pytest.mark.parametrize("code", [0x70, 0x72])
@pytest.mark.parametrize("lba", [0, 7, 0xFFFFFFFF])
@pytest.mark.conformance(111)
def test_policy_a_medium_error_knows_its_block(code: int, lba: int) -> None:
    data = sense(K.MEDIUM_ERROR, 0x11, information=lba, code=code)
    error = judge(Status.CHECK_CONDITION, data, what="x").error
    assert isinstance(error, MediumError)
    assert error.lba == lba
    assert (error.sense_key, error.asc, error.ascq) == (K.MEDIUM_ERROR, 0x11, 0)


@pytest.mark.conformance(111)
def test_policy_a_medium_error_beyond_32_bits() -> None:
    data = sense(K.MEDIUM_ERROR, 0x11, information=1 << 40, code=0x72)
    error = judge(Status.CHECK_CONDITION, data, what="x").error
    assert isinstance(error, MediumError)
    assert error.lba == 1 << 40


@pytest.mark.conformance(111)
def test_policy_a_medium_error_that_names_no_block() -> None:
    error = judge(Status.CHECK_CONDITION, sense(K.MEDIUM_ERROR, 0x11), what="x").error
    assert isinstance(error, MediumError)
    assert error.lba is None


@pytest.mark.parametrize("status", range(256))
def test_policy_every_status_has_a_verdict(status: int) -> None:
    for data in (b"", bytes(18), sense(K.UNIT_ATTENTION, 0x29)):
        verdict = judge(status, data, what="x")
        assert isinstance(verdict, Verdict)
        assert (verdict.error is None) == (verdict.action is ACCEPT)
