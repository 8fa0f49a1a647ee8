"""A plugin of pytest: ``--conformance=FILE`` writes which tests each numbered case has, and how they went.

The file is JSON: ``{"57": {"tests/a/test_b.py::test_c": {"outcome": "passed", "reason": ""}}}``. A test's parameter
sets are one entry: it failed if one of them did, and passed if one did and none failed. With ``--collect-only`` none
was run.

Where all tests are collected, whatever becomes of them, their marks are in ``config.stash[ALL_MARKS]``.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

__all__ = ["ALL_MARKS", "ConformanceRecorder"]

ALL_MARKS = pytest.StashKey[dict[str, set[str]]]()
"""The tests of each number."""

_ORDER = ("skipped", "passed", "failed")
_NEVER_RUN = ("skipped", "was not run")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance", metavar="FILE", type=Path, help="write how each conformance case went (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    target = config.getoption("--conformance")
    if target is not None:
        config.pluginmanager.register(ConformanceRecorder(target.absolute()), "iscsifuse-conformance")


@pytest.hookimpl(tryfirst=True)  # before any are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = any(config.getoption(name, None) for name in ("lf", "ignore", "ignore_glob"))
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen:
        config.stash[ALL_MARKS] = _marks(items)


def _marks(items: Iterable[pytest.Item]) -> dict[str, set[str]]:
    marks = defaultdict(set)
    for item in items:
        for number in _numbers(item):
            marks[number].add(_test(item.nodeid))
    return dict(marks)


def _numbers(item: pytest.Item) -> list[str]:
    return [str(number) for marker in item.iter_markers("conformance") for number in marker.args]


def _test(node: str) -> str:
    """Without parameters."""
    return node.partition("[")[0]


class ConformanceRecorder:
    """Writes ``target`` at the end of the session."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._numbers: dict[str, list[str]] = {}  # by node id
        self._outcomes: dict[str, tuple[str, str]] = {}  # likewise: outcome and reason

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note what is about to run."""
        for item in session.items:
            if numbers := _numbers(item):
                self._numbers[item.nodeid] = numbers

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how setting up, the test itself and tearing down went: what went worst counts."""
        if report.nodeid not in self._numbers or (report.when != "call" and report.passed):
            return
        reason = str(report.longrepr[2]) if report.skipped and isinstance(report.longrepr, tuple) else ""
        known = self._outcomes.get(report.nodeid)
        if known is None or _ORDER.index(report.outcome) > _ORDER.index(known[0]):
            self._outcomes[report.nodeid] = (report.outcome, reason.removeprefix("Skipped: "))

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        cases: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
        for node, numbers in self._numbers.items():
            test = _test(node)
            new = self._outcomes.get(node, _NEVER_RUN)
            for number in numbers:
                known = cases[number].get(test)
                if known is None or _ORDER.index(new[0]) > _ORDER.index(known[0]):
                    cases[number][test] = new
        rows = {
            number: {
                test: {"outcome": outcome, "reason": reason} for test, (outcome, reason) in sorted(tests.items())
            }
            for number, tests in sorted(cases.items())
        }
        self._target.write_text(json.dumps(rows, indent=1) + "\n")
