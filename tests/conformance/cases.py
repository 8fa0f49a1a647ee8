"""The table of cases, read from cases.toml."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Case", "load_cases"]

_TABLE = Path(__file__).with_name("cases.toml")
_FIELDS = {"number", "case", "reference", "reason"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One case.

    Attributes:
        number: ``57``, ``B1``; always text.
        section: the heading it stands under.
        text: what the target does, and what has to come of it.
        reference: where that is written, or empty.
        reason: why it can't hold, or empty.
    """

    number: str
    section: str
    text: str
    reference: str = ""
    reason: str = ""


def load_cases(table: Path = _TABLE) -> list[Case]:
    """All cases, in the order of the table; ValueError where it has a field that nobody knows."""
    cases = []
    for section in tomllib.loads(table.read_text())["section"]:
        for row in section["cases"]:
            if unknown := row.keys() - _FIELDS:
                raise ValueError(f"case {row['number']}: unknown {', '.join(sorted(unknown))}")
            cases.append(
                Case(
                    number=str(row["number"]),
                    section=section["title"],
                    text=row["case"],
                    reference=row["reference"],
                    reason=row.get("reason", ""),
                )
            )
    return cases
