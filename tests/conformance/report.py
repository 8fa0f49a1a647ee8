"""What a run says about each case, for a terminal and as docs/conformance.md."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from pathlib import Path

from conformance.cases import Case

__all__ = ["Result", "Row", "read_results", "render_document", "render_terminal", "rows_of", "summary"]

_PREAMBLE = Path(__file__).with_name("preamble.md")


class Result(StrEnum):
    """What became of a case."""

    PASS = "pass"
    FAIL = "FAIL"
    NOT_RUN = "not run"
    NO_TEST = "no test"
    CANNOT = "can't hold"

    @property
    def is_bad(self) -> bool:
        """Whether somebody has to do something about it."""
        return self not in (Result.PASS, Result.CANNOT)


@dataclass(frozen=True, slots=True)
class Row:
    """A case, the tests that carry its number, and what they came to."""

    case: Case
    tests: tuple[str, ...]
    result: Result
    notes: tuple[str, ...] = field(default=())


def rows_of(cases: Iterable[Case], run: Mapping[str, Mapping[str, Mapping[str, str]]]) -> list[Row]:
    """The rows of a run, as `conformance.plugin` wrote it."""
    return [_row(case, run.get(case.number, {})) for case in cases]


def _row(case: Case, tests: Mapping[str, Mapping[str, str]]) -> Row:
    outcomes = {entry["outcome"] for entry in tests.values()}
    if "failed" in outcomes:
        failed = tuple(f"failed: {test}" for test, entry in tests.items() if entry["outcome"] == "failed")
        return Row(case, tuple(sorted(tests)), Result.FAIL, failed)
    if "passed" in outcomes:
        return Row(case, tuple(sorted(tests)), Result.PASS)
    if case.reason:
        return Row(case, tuple(sorted(tests)), Result.CANNOT, (case.reason,))
    if tests:
        reasons = tuple(sorted({entry["reason"] for entry in tests.values()}))
        return Row(case, tuple(sorted(tests)), Result.NOT_RUN, reasons)
    return Row(case, (), Result.NO_TEST)


def summary(rows: list[Row]) -> list[str]:
    """What keeps cases from passing, then one line that counts."""
    order = (Result.CANNOT, Result.NOT_RUN, Result.NO_TEST, Result.FAIL)
    lines = [_complaint(row) for result in order for row in rows if row.result is result]
    passed = sum(row.result is Result.PASS for row in rows)
    return [*lines, f"{passed} of {len(rows)} cases pass"]


def _complaint(row: Row) -> str:
    return f"{row.case.number} {row.result}" + (f": {'; '.join(row.notes)}" if row.notes else "")


def render_terminal(rows: list[Row]) -> str:
    """The whole table, as text."""
    lines = []
    for section, group in groupby(rows, key=lambda row: row.case.section):
        lines += [section, ""]
        for row in group:
            lines.append(f"{row.case.number:>5}  {row.result:<10}  {row.case.text}")
            lines += [" " * 19 + line for line in (row.case.reference, *row.tests) if line]
        lines.append("")
    return "\n".join([*lines, *summary(rows)])


def render_document(rows: list[Row]) -> str:
    """docs/conformance.md: the same for the same tests and outcomes, whenever and wherever they ran."""
    lines = [_PREAMBLE.read_text().rstrip("\n"), "", f"**{summary(rows)[-1]}.**"]
    for section, group in groupby(rows, key=lambda row: row.case.section):
        lines += ["", f"## {section}", "", "| number | case | reference | tests | result |", "|---|---|---|---|---|"]
        lines += [_markdown(row) for row in group]
    return "\n".join([*lines, ""])


def _markdown(row: Row) -> str:
    result = f"{row.result}: {row.case.reason}" if row.result is Result.CANNOT else str(row.result)
    tests = "<br>".join(f"`{test}`" for test in row.tests)
    cells = (row.case.number, row.case.text, row.case.reference, tests, result)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def read_results(document: str) -> dict[str, Result]:
    """The results that a document states, by number."""
    found = re.findall(r"^\| (B?\d+) \|.* \| ([^|]+?) \|$", document, re.MULTILINE)
    return {number: Result(text.partition(":")[0]) for number, text in found}


def read_run(file: Path) -> dict[str, dict[str, dict[str, str]]]:
    """What `conformance.plugin` wrote."""
    run: dict[str, dict[str, dict[str, str]]] = json.loads(file.read_text())
    return run
