"""What to do about a status that isn't GOOD: a pure judgement, with no I/O.

::

    status, sense ──judge()──> Verdict: ACCEPT | RETRY (after a delay, so often) | FAIL (with an exception)

A retry is right where the command was not executed, or where executing it twice is the same as once; that is so for
every command that is sent here (whole blocks are read and written; nothing is relative). How often is bounded by kind
and by the deadline of the command, whichever comes first.

Source: SAM-5 §5.3, SPC-4 §4.5; the notes name the additional sense codes.
"""

from dataclasses import dataclass, field
from enum import Enum, Flag, auto

from iscsifuse.errors import (
    CommandError,
    DataProtectError,
    MediumError,
    NoMediumError,
    NoSpaceError,
    ParameterDataError,
    ReservationConflictError,
)
from iscsifuse.scsi import status as statuses
from iscsifuse.scsi.sense import Sense, SenseKey
from iscsifuse.scsi.status import Status

__all__ = ["Action", "Change", "Verdict", "judge"]


class Action(Enum):
    """What follows from a status."""

    ACCEPT = auto()
    RETRY = auto()
    START = auto()
    """START STOP UNIT, then retry; only where the disk may be changed."""
    FAIL = auto()


class Change(Flag):
    """What a target let us know about the disk, besides how the command went."""

    NONE = 0
    RESET = auto()
    """29h: power on, reset, or nexus loss: volatile state may be gone."""
    MEDIUM = auto()
    """28h: another medium may be there; 3Fh/03h, 3Fh/05h: the unit may be another one."""
    MODE = auto()
    """2Ah/01h: it may have a volatile cache now."""
    CAPACITY = auto()
    """2Ah/09h."""
    INVENTORY = auto()
    """3Fh/0Eh: the list of LUNs changed. That is about all units, whichever tells it."""
    ABSENT = auto()
    """25h: the list doesn't have this one any more."""
    DEFERRED = auto()
    """71h, 73h: an earlier command failed after its status was given."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judgement.

    Attributes:
        action: what to do.
        retries: how often this kind of trouble may be retried.
        delay: seconds to wait before the first retry; doubled for each further one up to a second.
        error: what to raise if it isn't, or can't be, cured.
        change: news about the disk.
    """

    action: Action
    retries: int = 0
    delay: float = 0.0
    error: CommandError | None = field(default=None)
    change: Change = Change.NONE


_ACCEPT = Verdict(Action.ACCEPT)
_MANY = 1_000_000  # the deadline bounds it

_ATTENTION = {0x28: Change.MEDIUM, 0x29: Change.RESET}
_ATTENTION_IN_FULL = {
    (0x2A, 0x01): Change.MODE,  # MODE PARAMETERS CHANGED
    (0x2A, 0x09): Change.CAPACITY,
    (0x3F, 0x03): Change.MEDIUM,  # INQUIRY DATA HAS CHANGED
    (0x3F, 0x05): Change.MEDIUM,  # DEVICE IDENTIFIER CHANGED
    (0x3F, 0x0E): Change.INVENTORY,  # REPORTED LUNS DATA HAS CHANGED
}
# NOT READY, 04h: becoming ready; format, rebuild, recalculation, operation, long write, self-test in progress;
# target port in transition; power condition changes.
_NOT_READY_YET = frozenset({0x01, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0A, 0x14, 0x1A, 0x1B, 0x1C, 0x1D})


def judge(status: int, sense_data: bytes, *, what: str) -> Verdict:
    """Judge a command by its status.

    Args:
        status: the SAM status byte.
        sense_data: what came with it, maybe empty.
        what: the beginning of the sentence for an error: command and place ("READ(10) of LUN 1 at LBA 7").
    """
    if status == Status.GOOD or status == Status.CONDITION_MET:
        return _ACCEPT
    if status == Status.CHECK_CONDITION:
        return _judge_sense(sense_data, what=what)
    error = CommandError(f"{what} failed: the target reports {statuses.words(status)}", status=status)
    if status in (Status.BUSY, Status.TASK_SET_FULL):
        return Verdict(Action.RETRY, retries=_MANY, delay=0.05, error=error)
    if status == Status.RESERVATION_CONFLICT:
        conflict = ReservationConflictError(f"{what} failed: another initiator has reserved the disk", status=status)
        return Verdict(Action.RETRY, retries=3, delay=0.1, error=conflict)
    if status in (Status.TASK_ABORTED, Status.ACA_ACTIVE):
        return Verdict(Action.RETRY, retries=5, delay=0.05, error=error)
    return Verdict(Action.FAIL, error=error)


def _judge_sense(sense_data: bytes, *, what: str) -> Verdict:
    try:
        sense = Sense.decode(sense_data)
    except ParameterDataError:
        return Verdict(
            Action.FAIL,
            error=CommandError(
                f"{what} failed: CHECK CONDITION with sense data that makes no sense", status=Status.CHECK_CONDITION
            ),
        )
    if sense.deferred:
        # The current command was not executed (SPC-4 §4.5.5): the trouble is an earlier one's.
        return Verdict(Action.RETRY, retries=5, error=_error(CommandError, sense, what), change=Change.DEFERRED)
    asc, ascq = sense.asc, sense.ascq
    match sense.key:
        case SenseKey.NO_SENSE | SenseKey.RECOVERED_ERROR:
            return _ACCEPT
        case SenseKey.UNIT_ATTENTION:
            change = _ATTENTION.get(asc, Change.NONE)
            change = _ATTENTION_IN_FULL.get((asc, ascq), change)
            return Verdict(Action.RETRY, retries=10, error=_error(CommandError, sense, what), change=change)
        case SenseKey.ILLEGAL_REQUEST if asc == 0x25:
            # LOGICAL UNIT NOT SUPPORTED: nobody is there to tell a unit attention. Once more, after a look at who is.
            error = _error(CommandError, sense, what)
            return Verdict(Action.RETRY, retries=1, error=error, change=Change.ABSENT)
        case SenseKey.NOT_READY:
            return _judge_not_ready(sense, what)
        case SenseKey.MEDIUM_ERROR:
            return Verdict(Action.FAIL, error=_medium_error(sense, what))
        case SenseKey.HARDWARE_ERROR:
            return Verdict(Action.RETRY, retries=1, delay=0.1, error=_error(CommandError, sense, what))
        case SenseKey.ABORTED_COMMAND:
            return Verdict(Action.RETRY, retries=5, delay=0.01, error=_error(CommandError, sense, what))
        case SenseKey.DATA_PROTECT:
            kind = NoSpaceError if (asc, ascq) == (0x27, 0x07) else DataProtectError
            return Verdict(Action.FAIL, error=_error(kind, sense, what))
        case _:
            return Verdict(Action.FAIL, error=_error(CommandError, sense, what))


def _judge_not_ready(sense: Sense, what: str) -> Verdict:
    if sense.asc == 0x3A:
        return Verdict(Action.FAIL, error=_error(NoMediumError, sense, what))
    error = _error(CommandError, sense, what)
    if sense.asc == 0x04 and sense.ascq == 0x02:
        return Verdict(Action.START, retries=2, delay=0.1, error=error)
    if sense.asc == 0x04 and sense.ascq in _NOT_READY_YET:
        return Verdict(Action.RETRY, retries=_MANY, delay=0.25, error=error)
    return Verdict(Action.FAIL, error=error)


def _error(kind: type[CommandError], sense: Sense, what: str) -> CommandError:
    return kind(
        f"{what} failed: {sense.describe()}",
        status=Status.CHECK_CONDITION,
        sense_key=sense.key,
        asc=sense.asc,
        ascq=sense.ascq,
    )


def _medium_error(sense: Sense, what: str) -> MediumError:
    bad = f" (bad block: LBA {sense.information})" if sense.information is not None else ""
    return MediumError(
        f"{what} failed: {sense.describe()}{bad}",
        status=Status.CHECK_CONDITION,
        sense_key=sense.key,
        asc=sense.asc,
        ascq=sense.ascq,
        lba=sense.information,
    )
