"""Fails a test during which something was logged that nobody expected.

A daemon that survives by logging an error, and a background task that dies of an exception which nobody collects,
look like success to a test that only checks results. So each test is watched: records of WARNING and above, and
tracebacks at INFO, from the loggers below; tracebacks and Python's own complaints in what it printed. A test that
provokes such a thing says so: ``@pytest.mark.expect_log(r"regex")``.
"""

import logging
import re
from collections.abc import Generator

import pytest

__all__ = ["LogGuard"]

_LOGGERS = ("iscsifuse", "pyfuse3", "trio", "asyncio")
_COMPLAINT = re.compile(
    r"Traceback \(most recent call last\)|Exception Group Traceback|Exception ignored in|"
    r"exception was never retrieved|was never awaited"
)


class LogGuard(logging.Handler):
    """A pytest plugin, and the logging handler that it listens with."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[str] = []
        self._levels: dict[str, int] = {}
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Remember a record that shouldn't be there."""
        has_traceback = record.exc_info is not None and record.exc_info[0] is not None
        if record.levelno >= logging.WARNING or has_traceback:
            self._seen.append(self.format(record))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        """Listen, from before the first fixture to after the last one.

        At the named loggers themselves, for the code under test may replace the root logger's handlers.
        """
        self._seen.clear()
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(self)
            self._levels[name] = logger.level
            logger.setLevel(logging.INFO)
        try:
            return (yield)
        finally:
            for name in _LOGGERS:
                logger = logging.getLogger(name)
                logger.removeHandler(self)
                logger.setLevel(self._levels[name])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Turn a phase (set-up, call, tear-down) that passed into one that failed."""
        report = yield
        problems, self._seen = self._seen, []
        problems += [
            f"in its {title}:\n{text}"
            for title, text in report.sections
            if title in (f"Captured stdout {call.when}", f"Captured stderr {call.when}") and _COMPLAINT.search(text)
        ]
        expected = [re.compile(regex) for mark in item.iter_markers("expect_log") for regex in mark.args]
        unexpected = [each for each in problems if not any(regex.search(each) for regex in expected)]
        if unexpected and report.outcome == "passed":
            report.outcome = "failed"
            report.longrepr = "\n".join(
                ["Logged during this test, and not expected (@pytest.mark.expect_log allows it):", *unexpected]
            )
        return report
