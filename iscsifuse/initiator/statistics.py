"""How often each SCSI command was sent, how it ended, and how long the target took: the service response times.

A call counts once its status has come, as a dissector that matches requests and responses counts it. Commands that
were lost with their session are not calls; they are counted apart.
"""

from dataclasses import dataclass, field

from iscsifuse.iscsi.tasks import Task
from iscsifuse.quick import known
from iscsifuse.scsi import cdb as cdbs

__all__ = ["CommandRow", "CommandStatistics"]

_SERVICE_ACTIONS = frozenset({0x9E, 0x9F, 0xA3, 0xA4, 0x7F})
"""Opcodes whose second byte says which command it is."""


@known
@dataclass(slots=True)
class CommandRow:
    """Totals of one kind of command.

    Attributes:
        name: "READ(10)".
        opcode: first byte of its CDB.
        calls: commands whose status came.
        errors: those of them whose status was not GOOD.
        lost: commands whose session ended before the status came.
        bytes: bytes moved by the calls, in either direction.
        total: seconds, summed over the calls.
        minimum: seconds, of the fastest call.
        maximum: seconds, of the slowest call.
    """

    name: str
    opcode: int
    calls: int = 0
    errors: int = 0
    lost: int = 0
    bytes: int = 0
    total: float = 0.0
    minimum: float = field(default=float("inf"))
    maximum: float = 0.0

    @property
    def average(self) -> float:
        """Mean seconds of a call; 0 where there was none."""
        return self.total / self.calls if self.calls else 0.0


class CommandStatistics:
    """The table of a daemon: one row for each kind of command, kept across sessions.

    Attributes:
        by_kind: the rows, by opcode, or opcode and service action.
    """

    def __init__(self) -> None:
        self._rows: dict[str, CommandRow] = {}
        self.by_kind: dict[int, CommandRow] = {}

    def row(self, name: str, *, opcode: int) -> CommandRow:
        """The row of a kind of command, made on first use."""
        found = self._rows.get(name)
        if found is None:
            found = self._rows[name] = CommandRow(name, opcode)
        return found

    def count(self, task: Task, now: float) -> None:
        """Count a command that is done.

        Args:
            task: ``started`` when it was submitted.
            now: of the same clock.
        """
        cdb = task.cdb
        opcode = cdb[0]
        kind = opcode | (cdb[1] & 0x1F) << 8 if opcode in _SERVICE_ACTIONS else opcode
        row = self.by_kind.get(kind)
        if row is None:
            row = self.by_kind[kind] = self.row(cdbs.name(cdb), opcode=opcode)
        if task.status < 0:
            row.lost += 1
            return
        seconds = now - task.started
        row.calls += 1
        row.total += seconds
        row.bytes += task.received or task.solicited
        if task.status or task.error is not None:
            row.errors += 1
        if seconds < row.minimum:
            row.minimum = seconds
        if seconds > row.maximum:
            row.maximum = seconds

    def rows(self) -> list[CommandRow]:
        """All rows, ordered by opcode and name."""
        return sorted(self._rows.values(), key=lambda row: (row.opcode, row.name))
