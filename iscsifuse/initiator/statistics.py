"""How often each SCSI command was sent, how it ended, and how long the target took: the service response times.

A call counts once its status has come, as a dissector that matches requests and responses counts it. Commands that
were lost with their session are not calls; they are counted apart.
"""

from dataclasses import dataclass, field

__all__ = ["CommandRow", "CommandStatistics"]


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

    def add(self, seconds: float, transferred: int, *, error: bool) -> None:
        """Count one call whose status came."""
        self.calls += 1
        self.total += seconds
        self.bytes += transferred
        if error:
            self.errors += 1
        if seconds < self.minimum:
            self.minimum = seconds
        if seconds > self.maximum:
            self.maximum = seconds


class CommandStatistics:
    """The table of a daemon: one row for each kind of command, kept across sessions."""

    def __init__(self) -> None:
        self._rows: dict[str, CommandRow] = {}

    def row(self, name: str, *, opcode: int) -> CommandRow:
        """The row of a kind of command, made on first use."""
        found = self._rows.get(name)
        if found is None:
            found = self._rows[name] = CommandRow(name, opcode)
        return found

    def rows(self) -> list[CommandRow]:
        """All rows, ordered by opcode and name."""
        return sorted(self._rows.values(), key=lambda row: (row.opcode, row.name))
