"""How things look on a terminal: columns, sizes, times, JSON. What a target said goes through `printable` first."""

import json
import sys
from collections.abc import Mapping, Sequence

__all__ = [
    "SCHEMA",
    "count",
    "duration",
    "exact_size",
    "json_text",
    "note",
    "pairs",
    "say",
    "size",
    "table",
    "yes_no",
]

#: Of all JSON that a command prints. It goes up when a key changes its meaning or goes away, not when one is added.
SCHEMA = 1

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def say(text: str) -> None:
    """Data, to standard output."""
    print(text)


def note(text: str) -> None:
    """Anything that isn't data, to standard error."""
    print(f"iscsifuse: {text}", file=sys.stderr)


def size(number: int) -> str:
    """``64.0 MiB``; whole bytes below 1 KiB."""
    if number < 1024:
        return f"{number} B"
    value = float(number)
    for unit in _UNITS:
        value /= 1024
        # 1023.95 would be shown as 1024.0
        if value < 1023.95 or unit == _UNITS[-1]:
            return f"{value:.1f} {unit}"
    raise AssertionError("unreachable")


def exact_size(number: int) -> str:
    """``64.0 MiB (67108864 bytes)``."""
    return size(number) if number < 1024 else f"{size(number)} ({number} bytes)"


def duration(seconds: float) -> str:
    """``850 µs``, ``12.4 ms``, ``3.21 s``: three digits, which is more than a service response time is good for."""
    for limit, factor, unit in ((0.9995e-3, 1e6, "µs"), (0.9995, 1e3, "ms")):
        if seconds < limit:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def count(number: int, one: str, many: str | None = None) -> str:
    """``1 disk``, ``3 disks``."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def yes_no(value: bool | None) -> str:
    """``yes``, ``no``; ``-`` where nobody knows."""
    return "-" if value is None else "yes" if value else "no"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """Aligned columns under a header line.

    Args:
        header: a title for each column.
        rows: as many cells each.
        right: titles of the columns that are aligned at their right end.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if title in right else cell.ljust(width)
            for title, cell, width in zip(header, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def pairs(title: str, values: Mapping[str, str]) -> str:
    """A section: its title, and an indented line for each value, aligned."""
    width = max(map(len, values), default=0)
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}".rstrip() for name, value in values.items())])


def json_text(value: Mapping[str, object]) -> str:
    """A JSON object with its ``schema``. Control characters come out as escapes, so a terminal is safe from them."""
    return json.dumps({"schema": SCHEMA, **value}, indent=2, default=str)
