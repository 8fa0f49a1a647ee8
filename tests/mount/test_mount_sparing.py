import contextlib
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyfuse3 import FUSEError

from iscsifuse.errors import CommandTimeoutError
from iscsifuse.mount import daemon, translate
from iscsifuse.mount.sparing import BURST, EVERY, SparingFilter
from iscsifuse.mount.translate import translated


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.lines: list[str] = []
        self.addFilter(SparingFilter(lambda: self.now))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def logger_to(lines: Lines) -> logging.Logger:
    logger = logging.getLogger("sparing-test")
    logger.handlers = [lines]
    logger.propagate = False
    return logger


def test_one_place_can_not_flood_the_log_and_what_is_held_back_is_told() -> None:
    lines = Lines()
    log = logger_to(lines)
    for number in range(10_000):
        log.error("session lost %d", number)
        lines.now += EVERY / 1000  # a hundred a second
    allowed = BURST + 10_000 // 1000
    assert allowed - 1 <= len(lines.lines) <= allowed
    assert lines.lines[:BURST] == [f"session lost {number}" for number in range(BURST)]
    told = [int(line.partition("(")[2].split()[0]) for line in lines.lines[BURST:]]
    last = int(lines.lines[-1].split()[2])
    assert sum(told) + len(lines.lines) == last + 1
    assert lines.lines[-1].endswith(" like this were not logged)")


def test_places_do_not_use_up_each_others_budget() -> None:
    lines = Lines()
    log = logger_to(lines)
    for _ in range(BURST * 2):
        log.error("often")
    log.warning("seldom")
    assert lines.lines[-1] == "seldom"


def test_after_a_pause_there_is_a_full_budget_again() -> None:
    lines = Lines()
    log = logger_to(lines)
    for _ in range(2):
        lines.lines.clear()
        for number in range(BURST + 5):
            log.error("%d%%", number)
        assert len(lines.lines) == BURST
        lines.now += EVERY * BURST
    assert lines.lines[0] == "0% (5 like this were not logged)"


@translated
async def _failing_read(_: object) -> None:
    raise CommandTimeoutError("slow")


@pytest.mark.expect_log("read failed with EIO: slow")
async def test_operations_that_fail_can_not_flood_the_log() -> None:
    lines = Lines()
    translate.log.addHandler(lines)
    try:
        for _ in range(BURST + 7):
            with pytest.raises(FUSEError):
                await _failing_read(None)
        lines.now += EVERY
        with pytest.raises(FUSEError):
            await _failing_read(None)
    finally:
        translate.log.removeHandler(lines)
    assert len(lines.lines) == BURST + 1
    assert lines.lines[0].endswith("read failed with EIO: slow")
    assert lines.lines[-1].endswith("read failed with EIO: slow (7 like this were not logged)")


def test_what_is_critical_always_passes() -> None:
    lines = Lines()
    log = logger_to(lines)
    for _ in range(BURST * 2):
        log.critical("the mount broke down")
    assert len(lines.lines) == BURST * 2


@pytest.fixture
def syslog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A logger of the system, and the daemon's log goes there; put back afterwards."""
    root = logging.getLogger()
    before, raising = root.handlers[:], logging.raiseExceptions
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "log"))
        listener.setblocking(False)
        monkeypatch.setattr(daemon, "_DEV_LOG", tmp_path / "log")
        daemon._log_to_syslog(SimpleNamespace(mountpoint="/mnt"))  # type: ignore[arg-type]
        try:
            yield listener
        finally:
            for handler in root.handlers:
                handler.close()
            root.handlers[:] = before
            logging.raiseExceptions = raising


def lines_of(listener: socket.socket) -> list[bytes]:
    lines = []
    with contextlib.suppress(BlockingIOError):
        while True:
            lines.append(listener.recv(4096))
    return lines


def test_the_daemon_spares_syslog(syslog: socket.socket) -> None:
    seen = []
    for _ in range(1000):
        logging.getLogger("another").error("the same again")
        seen += lines_of(syslog)
    assert 1 <= len(seen) <= BURST
    assert b"/mnt: the same again" in seen[0]


def test_a_syslog_that_does_not_read_is_not_waited_for(syslog: socket.socket) -> None:
    for number in range(600):  # more than the kernel queues, from so many places
        log = logging.getLogger("another")
        log.handle(log.makeRecord(log.name, logging.ERROR, "there", number, "unread", (), None))
    queued = len(lines_of(syslog))
    assert 1 <= queued < 600
    logging.getLogger("another").error("it reads again")
    assert b"it reads again" in lines_of(syslog)[0]


def test_a_syslog_that_was_restarted_is_found_again(syslog: socket.socket, tmp_path: Path) -> None:
    syslog.close()
    logging.getLogger("another").error("nobody hears")
    (tmp_path / "log").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "log"))
        listener.setblocking(False)
        logging.getLogger("another").error("heard again")
        assert b"heard again" in lines_of(listener)[0]
