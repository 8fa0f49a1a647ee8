"""The benchmark does all its work, and leaves nothing behind. Nobody judges its figures here."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.catalogue import all_works
from bench.contender import FileContender
from bench.ours import Iscsifuse
from bench.peers import Nbdfuse, QemuStorageDaemon
from bench.stage import Sizes, Stage
from support.disks import MIB

MEMORY = Path("/dev/shm")
OTHERS = "qsd,libiscsi,tmpfs"
FILES = ("--json", "bench.json", "--markdown", "bench.md")

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.tgt]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder of its own for the disks, so that it is known whose it is what is left there."""
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < 1024 * MIB:
        pytest.skip(f"less than 1 GiB to spare in {MEMORY}")
    missing = [name for name in ("fio", "fls", "e2fsck") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} isn't installed")
    folder = Path(tempfile.mkdtemp(prefix="iscsifuse-test-", dir=MEMORY))
    folder.chmod(0o711)  # one contender is another user
    yield folder
    mounted = [line for line in Path("/proc/mounts").read_text().splitlines() if f" {folder}/" in line]
    loops = [path for path in Path("/sys/block").glob("loop*/loop/backing_file") if str(folder) in path.read_text()]
    left = list(folder.iterdir())
    if not mounted:
        shutil.rmtree(folder)
    assert (mounted, loops, left) == ([], [], [])


def start_bench(memory: Path, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "bench", "--quick", "--memory-folder", str(memory), *FILES, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "TMPDIR": str(memory)},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def bench(memory: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    """What the benchmark reports; whoever isn't installed is left out, nobody else has failed."""
    with start_bench(memory, folder, *arguments) as process:
        said, _ = process.communicate(timeout=270)
    assert process.returncode == 0, said
    assert {path.name for path in folder.iterdir()} == {"bench.json", "bench.md"}
    assert "| work | unit |" in (folder / "bench.md").read_text()
    report: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    for name, work in report["works"].items():
        for contender, what in work["contenders"].items():
            assert what["failure"] is None, (name, contender, said)
            assert what["rounds"] == 1, (name, contender)
    return report


# The same as others, with another number.
ALIKE = {
    *("read-128k", "read-cat", "write-direct", "random-read-1", "random-read-4", "random-read-16", "random-write-1"),
    *("random-write-16", "random-write-32", "readers-1-lun", "far-25ms-read", "far-25ms-write", "mount-16"),
    "read-1m-fresh",
}


@pytest.mark.parametrize("left_out", [ALIKE, pytest.param(set(), marks=pytest.mark.slow)], ids=["kinds", "all"])
def test_does_every_kind_of_work_and_checks_every_byte(memory: Path, tmp_path: Path, left_out: set[str]) -> None:
    everything = all_works(Stage(Sizes.for_run(quick=True, size=None), MEMORY))
    works = [work for work in everything if work.name not in left_out]
    assert len(works) == len(everything) - len(left_out)
    only = ("--only", ",".join(work.name for work in works)) if left_out else ()
    report = bench(memory, tmp_path, *only, "--contenders", f"iscsifuse,iscsifuse-user,{OTHERS}")
    assert list(report["works"]) == [work.name for work in works]
    assert "iscsifuse" in report["contenders"]
    for work in works:
        found = report["works"][work.name]
        assert set(found["metrics"]) == {metric.name for metric in work.metrics}
        for metric in found["metrics"].values():
            assert metric["figures"]["iscsifuse"]["median"] >= 0
        for contender, what in found["contenders"].items():
            # A mount has no bytes to compare, and qemu-img bench throws away what it reads.
            if not work.name.startswith("mount-") and contender != "libiscsi":
                assert what["checked"] == 1, (work.name, contender)
    if "iscsifuse-user" in report["contenders"]:
        assert report["works"]["read-1m"]["metrics"]["rate"]["figures"]["iscsifuse-user"]["median"] > 0
    if "qsd" in report["contenders"]:
        assert report["works"]["read-1m"]["metrics"]["rate"]["ratios"]["iscsifuse"]["qsd"]["of_medians"] > 0
        assert {goal["met"] for goal in report["goals"]} <= {True, False}


def test_only_some_work_and_some_contenders(memory: Path, tmp_path: Path) -> None:
    report = bench(
        memory, tmp_path, "--only", "read-1m,random-write-4", "--contenders", "iscsifuse,nbdfuse", "--rounds", "1"
    )
    assert list(report["works"]) == ["read-1m", "random-write-4"]
    assert {*report["contenders"], *report["skipped"]} == {"iscsifuse", "nbdfuse"}


@pytest.mark.parametrize("kind", [Iscsifuse, QemuStorageDaemon, Nbdfuse])
def test_what_is_opened_read_only_can_not_be_written(memory: Path, kind: Callable[[Stage], FileContender]) -> None:
    def dd(*words: str) -> int:
        return subprocess.run(
            ["dd", *words, "bs=4k", "count=1"], capture_output=True, timeout=20, check=False
        ).returncode

    with Stage(Sizes.for_run(quick=True, size=16 * MIB), memory) as stage, contextlib.ExitStack() as stack:
        contender = kind(stage)
        stack.callback(contender.close)
        if (reason := contender.why_not()) is not None:
            pytest.skip(reason)
        for read_only in (False, True):
            with contender.open([stage.data], read_only=read_only) as opened:
                assert dd(f"if={opened.path}", "of=/dev/null") == 0
                assert bool(dd("if=/dev/zero", f"of={opened.path}", "conv=notrunc,fsync")) is read_only


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("loop-ext4", signal.SIGINT),
        ("read-1m", signal.SIGTERM),
        pytest.param("loop-ext4", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("read-1m", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_clears_up_when_interrupted(memory: Path, tmp_path: Path, number: signal.Signals, moment: str) -> None:
    with start_bench(
        memory, tmp_path, "--only", moment, "--rounds", "100", "--contenders", "iscsifuse,qsd"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"{moment}, round 3"):  # everybody has had two
                break
        time.sleep(0.4)  # in the middle of something
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted" in said
    report = json.loads((tmp_path / "bench.json").read_text())  # what there was
    assert report["works"][moment]["contenders"]["iscsifuse"]["rounds"] >= 2
