"""The table is complete, docs/conformance.md is up to date, and what keeps both so works."""

import difflib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from conformance.cases import Case, load_cases
from conformance.plugin import ALL_MARKS
from conformance.report import Result, Row, read_results, read_run, render_document, render_terminal, rows_of, summary

ROOT = Path(__file__).resolve().parents[2]
STALE = "docs/conformance.md is out of date; bring it up to date with: scripts/conformance --write"


# --- the repository ---


@pytest.fixture(scope="module")
def marks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The tests of each number: as this very run knows them, or else as a run of all tests would collect them."""
    known = request.config.stash.get(ALL_MARKS, None)
    if known is not None:
        return known
    results = tmp_path_factory.mktemp("conformance") / "results.json"
    command = [sys.executable, "-m", "pytest", "-qq", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--conformance={results}"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return {number: set(tests) for number, tests in read_run(results).items()}


def test_the_table_has_all_numbers() -> None:
    numbers = [case.number for case in load_cases()]
    assert numbers == [*map(str, range(1, 131)), *(f"B{number}" for number in range(1, 13))]


def test_no_test_names_a_case_that_is_not_there(marks: dict[str, set[str]]) -> None:
    unknown = {number: marks[number] for number in marks.keys() - {case.number for case in load_cases()}}
    assert not unknown, f"tests/conformance/cases.toml has no such cases: {unknown}"


def test_the_document_is_up_to_date(marks: dict[str, set[str]]) -> None:
    # Cases, and the tests that there are for them, are compared. Results stay as they are: only a run can tell them.
    document = (ROOT / "docs" / "conformance.md").read_text()
    results = read_results(document)
    rows = [
        Row(case, tuple(sorted(marks.get(case.number, ()))), results.get(case.number, Result.NO_TEST))
        for case in load_cases()
    ]
    wanted = render_document(rows)
    difference = list(difflib.unified_diff(document.splitlines(), wanted.splitlines(), "is", "ought to be", n=0))
    assert not difference, "\n".join([STALE, *difference])
    untrue = [row.case.number for row in rows if bool(row.tests) is (row.result is Result.NO_TEST)]
    assert not untrue, f"{STALE} (cases {', '.join(untrue)})"


# --- recording a run ---


def _record(project: Path, *options: str) -> dict[str, dict[str, dict[str, str]]]:
    """What the plugin writes when pytest runs the tests of ``project``."""
    results = project / "results.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", "/dev/null", f"--rootdir={project}", "-p", "no:cacheprovider"),
            *("-p", "conformance.plugin", f"--conformance={results}", *options, str(project / "tests")),
        ],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert results.exists(), done.stdout + done.stderr
    return read_run(results)


def test_marks_are_found_wherever_they_are(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        textwrap.dedent("""
        from pytest import mark, param

        @mark.conformance(3)
        @mark.conformance(4, "B4")
        def test_decorated(): ...

        @mark.parametrize("n", [param(n, marks=mark.conformance(n)) for n in (1, 2)])
        def test_parameters(n): ...

        @mark.conformance(5)
        class TestIt:
            pytestmark = mark.conformance(6)
            def test_inside(self): ...

        def test_nothing(): ...
        """)
    )
    passed = {"outcome": "passed", "reason": ""}
    assert _record(tmp_path) == {
        "1": {"tests/test_x.py::test_parameters": passed},
        "2": {"tests/test_x.py::test_parameters": passed},
        "3": {"tests/test_x.py::test_decorated": passed},
        "4": {"tests/test_x.py::test_decorated": passed},
        "5": {"tests/test_x.py::TestIt::test_inside": passed},
        "6": {"tests/test_x.py::TestIt::test_inside": passed},
        "B4": {"tests/test_x.py::test_decorated": passed},
    }


def test_what_went_worst_counts(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        textwrap.dedent("""
        import pytest

        pytestmark = pytest.mark.conformance(1)

        @pytest.fixture
        def broken():
            yield
            raise RuntimeError("while tearing down")

        @pytest.fixture
        def absent():
            pytest.skip("no such thing here")

        @pytest.mark.parametrize("n", [0, 1, 2])
        def test_one_of_three_fails(n):
            assert n != 1

        @pytest.mark.parametrize("n", [0, 1])
        def test_one_of_two_is_skipped(n):
            if n:
                pytest.skip("one is enough")

        def test_tear_down_fails(broken): ...
        def test_skipped(absent): ...

        @pytest.mark.xfail
        def test_known_to_fail():
            raise ValueError

        def test_stops():
            pytest.exit("enough")

        def test_never_run(): ...
        """)
    )
    assert _record(tmp_path)["1"] == {
        "tests/test_x.py::test_known_to_fail": {"outcome": "skipped", "reason": ""},
        "tests/test_x.py::test_never_run": {"outcome": "skipped", "reason": "was not run"},
        "tests/test_x.py::test_one_of_three_fails": {"outcome": "failed", "reason": ""},
        "tests/test_x.py::test_one_of_two_is_skipped": {"outcome": "passed", "reason": ""},
        "tests/test_x.py::test_skipped": {"outcome": "skipped", "reason": "no such thing here"},
        "tests/test_x.py::test_stops": {"outcome": "skipped", "reason": "was not run"},
        "tests/test_x.py::test_tear_down_fails": {"outcome": "failed", "reason": ""},
    }


# --- the report ---

CASES = [
    Case(number="1", section="Login", text="A key|value", reference="RFC 7143 §6"),
    Case(number="2", section="Login", text="Two"),
    Case(number="3", section="Login", text="Three"),
    Case(number="4", section="Login", text="Four", reason="no target does that"),
    Case(number="B1", section="Malice", text="Five"),
    Case(number="B2", section="Malice", text="Six", reason="was so once"),
]
RUN = {
    "1": {"t.py::b": {"outcome": "passed", "reason": ""}, "t.py::a": {"outcome": "skipped", "reason": "no tgt"}},
    "2": {"t.py::a": {"outcome": "failed", "reason": ""}, "t.py::b": {"outcome": "passed", "reason": ""}},
    "B1": {"t.py::a": {"outcome": "skipped", "reason": "no tgt"}},
    "B2": {"t.py::b": {"outcome": "passed", "reason": ""}},
}


def test_verdicts() -> None:
    rows = rows_of(CASES, RUN)
    assert [(row.case.number, row.result, row.result.is_bad) for row in rows] == [
        ("1", Result.PASS, False),
        ("2", Result.FAIL, True),
        ("3", Result.NO_TEST, True),
        ("4", Result.CANNOT, False),
        ("B1", Result.NOT_RUN, True),
        ("B2", Result.PASS, False),
    ]
    assert summary(rows) == [
        "4 can't hold: no target does that",
        "B1 not run: no tgt",
        "3 no test",
        "2 FAIL: failed: t.py::a",
        "2 of 6 cases pass",
    ]
    assert summary([rows[0]]) == ["1 of 1 cases pass"]
    lines = render_terminal(rows).splitlines()
    assert lines[:6] == [
        "Login",
        "",
        "    1  pass        A key|value",
        "                   RFC 7143 §6",
        "                   t.py::a",
        "                   t.py::b",
    ]
    assert lines[-1] == "2 of 6 cases pass"


def test_the_document_keeps_its_results() -> None:
    rows = rows_of(CASES, RUN)
    document = render_document(rows)
    assert "| 1 | A key\\|value | RFC 7143 §6 | `t.py::a`<br>`t.py::b` | pass |" in document.splitlines()
    assert "| 4 | Four |  |  | can't hold: no target does that |" in document.splitlines()
    assert read_results(document) == {row.case.number: row.result for row in rows}
    again = json.loads(json.dumps(RUN, sort_keys=True))
    assert render_document(rows_of(CASES, again)) == document


def test_a_table_with_a_misspelt_field_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "cases.toml"
    table.write_text('[[section]]\ntitle = "A"\ncases = [{ number = 1, case = "x", reference = "", reasn = "y" }]\n')
    with pytest.raises(ValueError, match="case 1: unknown reasn"):
        load_cases(table)
