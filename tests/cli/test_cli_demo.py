import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iscsifuse.cli import demo_stage
from iscsifuse.cli.demo_stage import DemoError, Stage
from iscsifuse.cli.main import run

fuse = pytest.mark.skipif(
    not Path("/dev/fuse").exists() or shutil.which("fusermount3") is None, reason="needs /dev/fuse and fusermount3"
)
DEMO = [sys.executable, "-m", "iscsifuse.cli", "demo"]


def what_is_left(folder: Path) -> list[str]:
    """Files, mounts and processes that know of a folder."""
    left = [str(path) for path in folder.iterdir()]
    left += [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command:
            left.append(command)
    return left


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder)}


@fuse
@pytest.mark.fuse
def test_demo(tmp_path: Path) -> None:
    done = subprocess.run(DEMO, env=environment(tmp_path), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    commands = re.findall(r"^\$ (\S+ ?\S*)", done.stdout, re.MULTILINE)
    for command in ("discover", "ls", "mount", "status", "umount"):
        assert f"iscsifuse {command}" in commands
    assert "\nequal\n" in done.stdout
    assert re.search(r"^READ\(1[06]\) +[1-9]", done.stdout, re.MULTILINE)
    assert re.search(r"^WRITE\(1[06]\) +[1-9]", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("# Everything that was compared was equal.\n")
    if shutil.which("debugfs", path=f"{os.environ['PATH']}:/sbin:/usr/sbin"):
        assert "This file lives on a disk" in done.stdout
    assert what_is_left(tmp_path) == []


@fuse
@pytest.mark.fuse
def test_demo_keep(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--keep"], env=environment(tmp_path), capture_output=True, text=True, timeout=120, check=False
    )
    ending = done.stdout.rpartition("$ ")[2].strip()
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        [folder] = tmp_path.iterdir()
        disk = folder / "mnt/lun-0"
        assert disk.stat().st_size == demo_stage.IMAGE_SIZE
        assert disk.read_bytes() == (folder / "disk.img").read_bytes()
    finally:
        # What it says ends it. The program may not be on the PATH here.
        command = ending.replace("iscsifuse umount", f"{sys.executable} -m iscsifuse.cli umount", 1)
        subprocess.run(["/bin/sh", "-c", command], timeout=60, check=True)
    deadline = time.monotonic() + 10
    while what_is_left(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert what_is_left(tmp_path) == []


@fuse
@pytest.mark.fuse
@pytest.mark.parametrize(
    ("after", "number", "code"),
    [
        pytest.param("iscsifuse mount", signal.SIGINT, 130, marks=pytest.mark.slow),
        ("sha256sum", signal.SIGTERM, 143),
        pytest.param("iscsifuse ls", signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_demo_interrupted(tmp_path: Path, after: str, number: int, code: int) -> None:
    with subprocess.Popen(
        DEMO,
        env={**environment(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("$ ") and after in line:
                # As a terminal does it: to the whole group.
                os.killpg(process.pid, number)
                break
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert what_is_left(tmp_path) == []


def test_where_fuse_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(demo_stage, "FUSE_DEVICE", tmp_path / "fuse")
    assert run(["demo"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("iscsifuse: FUSE is not available here: there is no ")
    assert output.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_failing_step_is_told_and_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("iscsifuse.cli.demo_stage.require_fuse", lambda: None)

    def corrupted(stage: Stage, *arguments: str, shown: bool = True) -> str:
        assert shown
        assert arguments[0] == "discover"
        return f"{stage.portal},1 another\n"

    monkeypatch.setattr(Stage, "iscsifuse", corrupted)
    assert run(["demo"]) == 2
    assert "the discovered target is '127.0.0.1:" in capsys.readouterr().err
    assert what_is_left(tmp_path) == []


def test_image_without_mke2fs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Stage, "has", lambda _, program: program != "mke2fs")
    stage = Stage()
    assert not stage.make_image()
    content = stage.image.read_bytes()
    assert len(content) == demo_stage.IMAGE_SIZE
    assert content[512 * 7 :].startswith(b"block 7\n")
    assert not any(content[demo_stage.FILE_SYSTEM_SIZE :])
    stage.clear()
    assert list(tmp_path.iterdir()) == []


def test_stage_tells_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stage = Stage()
    try:
        with pytest.raises(DemoError, match="failed with status 3: echo out; exit 3"):
            stage.shell("echo out; exit 3")
        assert capsys.readouterr().out == "$ echo out; exit 3\nout\n"
        with pytest.raises(DemoError, match=r"failed with status 1: sh -c .*: oh"):
            stage.run(["sh", "-c", "echo oh >&2; exit 1"])
        with pytest.raises(DemoError, match="no-such-program is missing"):
            stage.run(["no-such-program"])
        monkeypatch.setattr(demo_stage, "_COMMAND_LIMIT", 0.1)
        with pytest.raises(DemoError, match="took longer"):
            stage.shell("exec sleep 60")
        # No image: the target can't start.
        with pytest.raises(DemoError, match=r"the loopback target does not start: .*disk.img"):
            stage.start_target()
    finally:
        stage.clear()
    assert what_is_left(tmp_path) == []
