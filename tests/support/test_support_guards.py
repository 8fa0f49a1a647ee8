"""The guards of conftest.py have to fail a test: shown by tests that must fail, in a pytest of their own."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parents[1]


def _run(tmp_path: Path, code: str, *options: str) -> tuple[dict[str, int], str]:
    """Outcomes and output of the tests in ``code``, run under this conftest.py."""
    (tmp_path / "test_inner.py").write_text("import logging, pytest\n" + textwrap.dedent(code))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", str(_TESTS.parent / "pyproject.toml")),
            *("-p", "conftest", "-p", "no:cacheprovider"),
            *(f"--rootdir={tmp_path}", f"--basetemp={tmp_path / 'inner'}"),
            *options,
            str(tmp_path / "test_inner.py"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_TESTS), os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    counts = re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout.splitlines()[-1])
    return {outcome: int(number) for number, outcome in counts}, done.stdout + done.stderr


def test_what_is_logged_fails_a_test(tmp_path: Path) -> None:
    outcomes, output = _run(
        tmp_path,
        """
        import sys

        def test_warning():
            logging.getLogger("iscsifuse.session").warning("the target is odd")

        def test_traceback_below_warning():
            try:
                raise ValueError("swallowed")
            except ValueError:
                logging.getLogger("pyfuse3").info("oops", exc_info=True)

        def test_printed():
            print("Task exception was never retrieved", file=sys.stderr)

        @pytest.fixture
        def late():
            yield
            logging.getLogger("iscsifuse").error("while tearing down")

        def test_in_a_fixture(late):
            pass
        """,
    )
    assert outcomes == {"failed": 3, "passed": 1, "error": 1}, output
    for text in ("the target is odd", "ValueError: swallowed", "never retrieved", "while tearing down"):
        assert text in output


def test_what_is_expected_or_harmless_passes(tmp_path: Path) -> None:
    outcomes, output = _run(
        tmp_path,
        """
        @pytest.mark.expect_log("is odd", "unlucky")
        def test_expected():
            logging.getLogger("iscsifuse.session").warning("the target is odd")

        @pytest.mark.expect_log("is odd")
        def test_expected_something_else():
            logging.getLogger("iscsifuse.session").warning("the target is even")

        def test_harmless():
            logging.getLogger("iscsifuse").info("hello")
            logging.getLogger("somebody.else").warning("mind your business")
        """,
    )
    assert outcomes == {"passed": 2, "failed": 1}, output


def test_processes_left_behind_are_found_and_ended(tmp_path: Path) -> None:
    outcomes, output = _run(
        tmp_path,
        """
        import subprocess
        from pathlib import Path

        pytestmark = pytest.mark.istgt

        def test_child(tmp_path):
            subprocess.Popen(["sleep", "4321"])

        def test_daemon_of_a_test_that_fails(tmp_path):
            subprocess.run(["setsid", "-f", "sleep", "4322"], check=True)
            assert False

        def test_clean(tmp_path):
            subprocess.run(["true"], check=True)
        """,
        "-o",
        "filterwarnings=default",
    )
    if "skipped" in outcomes:
        pytest.skip("istgt isn't installed")
    assert outcomes == {"passed": 2, "failed": 1, "error": 2}, output
    assert "the process" in output
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [each for each in commands if each.startswith((b"sleep\x004321", b"sleep\x004322"))]


@pytest.mark.root
def test_mounts_and_loop_devices_left_behind_are_found_and_removed(tmp_path: Path) -> None:
    outcomes, output = _run(
        tmp_path,
        """
        import subprocess
        from support.disks import ext4_image

        @pytest.mark.root
        def test_loop_mount(tmp_path):
            image = ext4_image(tmp_path / "a b.img", 8 << 20, {"file": b"x"})
            point = tmp_path / "mount point"
            point.mkdir()
            subprocess.run(["mount", "-o", "loop,ro", image, point], check=True)
            assert (point / "file").read_bytes() == b"x"
        """,
    )
    assert outcomes == {"passed": 1, "error": 1}, output
    assert "a mount of type ext4" in output
    assert "the loop device" in output
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_slow_tests_wait_to_be_asked_for(tmp_path: Path) -> None:
    code = """
        @pytest.mark.slow
        def test_slow():
            pass
        """
    outcomes, output = _run(tmp_path, code)
    assert outcomes == {"skipped": 1}
    assert "takes long; run with --slow" in output
    assert _run(tmp_path, code, "--slow")[0] == {"passed": 1}


def test_what_is_missing_skips_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide = """
        import shutil
        which = shutil.which
        shutil.which = lambda name, **more: None if name in ("tgtd", "istgt") else which(name, **more)
        """
    (tmp_path / "hide.py").write_text(textwrap.dedent(hide))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = """
        @pytest.mark.tgt
        def test_marked():
            assert False

        def test_with_a_fixture(istgt_server):
            assert False
        """
    outcomes, output = _run(tmp_path, code, "-p", "hide")
    assert outcomes == {"skipped": 2}, output
    assert "tgtd isn't installed" in output
    assert "istgt isn't installed" in output
