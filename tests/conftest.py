"""What holds for every test: options, what is skipped where, the guards, and servers as fixtures.

A marker says what a test needs (``fuse``, ``root``, ``tgt``, ``istgt``, ``capture``, ``slow``); where that isn't
there, the test skips and says why. Whoever asks for a server's fixture needs no marker for it. Tests that need such
things are watched for leaks (`support.leakguard`), and every test for what it logs (`support.logguard`).
"""

import contextlib
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import coverage
import pytest
from hypothesis import HealthCheck, settings

from support import capture, leakguard
from support.capture import Capture
from support.istgt import IstgtServer
from support.leakguard import Leftovers
from support.logguard import LogGuard
from support.process import sbin_path
from support.tgt import TgtServer

pytest_plugins = ["support.store", "conformance.plugin"]

# Property tests are the same every time by default: a failure is the fault of the change at hand.
# HYPOTHESIS_PROFILE=thorough looks for new ones.
settings.register_profile(
    "default", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

_FIXTURE_NEEDS = {"tgt_server": "tgt", "istgt_server": "istgt", "start_capture": "capture"}
_LEAVES_THINGS = ("fuse", "root", "tgt", "istgt", "capture")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take long, too")
    parser.addoption(
        "--traced",
        metavar="FOLDER",
        action="append",
        default=[],
        help="run the tests of this folder first, and have coverage look no further (may be given again)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Who starts the tests in the background, or by nohup, as a CI may, leaves signals ignored, for all children, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ["PATH"] = sbin_path()
    os.environ[leakguard.RUN] = uuid.uuid4().hex
    config.pluginmanager.register(LogGuard(), "iscsifuse-log-guard")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--traced"):
        items.sort(key=lambda item: not _is_traced(item))
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in _FIXTURE_NEEDS:
                item.add_marker(_FIXTURE_NEEDS[fixture])


def _is_traced(item: pytest.Item) -> bool:
    folders: list[str] = item.config.getoption("--traced")
    return any(item.path.is_relative_to(item.config.rootpath / folder) for folder in folders)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Tracing makes everything slower by a third, and only those who count branches need it."""
    tracing = coverage.Coverage.current() if item.config.getoption("--traced") else None
    if tracing is not None and not _is_traced(item):
        tracing.stop()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("takes long; run with --slow")
    for marker, why_not in _NEEDS.items():
        if item.get_closest_marker(marker) and (reason := why_not()):
            pytest.skip(reason)


# --- what there is on this machine: each says why not, or None ---


@cache
def _why_no_fuse() -> str | None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"no FUSE here: /dev/fuse: {error.strerror}"
    return None if shutil.which("fusermount3") else "fusermount3 isn't installed"


@cache
def _why_no_root() -> str | None:
    if os.getuid() != 0:
        return "needs root"
    effective = Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0]
    if not int(effective, 16) & (1 << 21):  # a container's root: CAP_SYS_ADMIN is missing
        return "root may not mount here"
    return None if Path("/dev/loop-control").exists() else "no loop devices here"


def _why_no_program(*names: str) -> Callable[[], str | None]:
    return lambda: next((f"{name} isn't installed" for name in names if not shutil.which(name)), None)


_NEEDS: dict[str, Callable[[], str | None]] = {
    "fuse": _why_no_fuse,
    "root": _why_no_root,
    "tgt": _why_no_program("tgtd", "tgtadm"),
    "istgt": _why_no_program("istgt"),
    "capture": capture.why_unavailable,
}


# --- leaks ---


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_at_the_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield
    folder = tmp_path_factory.getbasetemp().resolve()
    _fail_if_left(folder, (leakguard.RUN, os.environ[leakguard.RUN]), "The tests, taken together, left behind")


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """First in, last out: it looks when the test's other fixtures are done, also when the test has failed."""
    if not any(request.node.get_closest_marker(marker) for marker in _LEAVES_THINGS):
        yield
        return
    folder: Path = request.getfixturevalue("tmp_path")
    mark = uuid.uuid4().hex
    os.environ[leakguard.TEST] = mark
    try:
        yield
    finally:
        del os.environ[leakguard.TEST]
        _fail_if_left(folder.resolve(), (leakguard.TEST, mark), "This test left behind")


def _fail_if_left(folder: Path, mark: tuple[str, str], what: str) -> None:
    left = Leftovers.settle(folder, mark, grace=2)
    if left:
        left.remove()
        pytest.fail(f"{what} (and it was removed):\n{left}", pytrace=False)


# --- servers ---


@pytest.fixture
def tgt_server(tmp_path: Path) -> Iterator[TgtServer]:
    """A running tgtd without targets."""
    folder = tmp_path / ".tgt"
    folder.mkdir()
    with TgtServer(folder) as server:
        yield server


@pytest.fixture
def istgt_server(tmp_path: Path) -> Iterator[IstgtServer]:
    """An istgt that is not running yet: add targets, then call ``start()``."""
    folder = tmp_path / ".istgt"
    folder.mkdir()
    server = IstgtServer(folder)
    yield server
    server.stop()


@pytest.fixture
def start_capture(tmp_path: Path) -> Iterator[Callable[..., Capture]]:
    """``start_capture(port)`` records that port of ``lo``, or several; ``stop()`` what it returns, then analyse."""
    with contextlib.ExitStack() as stack:

        def start(port: int, *more_ports: int) -> Capture:
            path = tmp_path / f"port-{port}-{uuid.uuid4().hex[:6]}.pcap"
            recording = Capture(path, port=port, more_ports=more_ports)
            recording.start()
            stack.callback(recording.abandon)
            return recording

        yield start
