"""The daemon dies under load; the disk is swapped; the user wants to go while the target is dead: through a mount."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from iscsifuse.mount.assembly import LOOK_EVERY
from support.cli import Mounted, is_mounted, program, run_cli
from support.disks import MIB, random_file, sha256, sparse
from support.ports import wait_until
from support.process import is_alive
from support.relay import Relay
from support.tgt import TgtServer

pytestmark = [pytest.mark.fuse, pytest.mark.tgt]

ONE = "iqn.2026-11.example:one"

# Writes records of 4 KiB one after the other, and says which ones are fsynced.
WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for number in range(1, 16384):
    os.pwrite(fd, b"%08d" % number * 512, number * 4096)
    if number % 8 == 0:
        os.fsync(fd)
        print(number, flush=True)
"""
READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
while True:
    for block in range(64):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(fd, 65536, block * 65536)
    print("read", flush=True)
"""


def start(code: str, file: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, str(file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def next_lines(process: "subprocess.Popen[str]", count: int) -> list[str]:
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(count)]
    assert all(lines)
    return lines


def auto_unmounter(point: Path) -> int:
    """The fusermount3 that unmounts when the daemon is gone."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(b"fusermount3") and str(point).encode() in command:
                return int(folder.name)
    raise AssertionError("nobody would unmount")


@pytest.mark.parametrize("stale", [False, True], ids=["unmounted by fusermount3", "stale"])
def test_what_was_fsynced_is_there_after_the_daemon_was_killed(
    tgt_server: TgtServer, tmp_path: Path, stale: bool
) -> None:
    disk = sparse(tmp_path / "disk", 64 * MIB)
    tgt_server.add_target(ONE)
    tgt_server.add_lun(ONE, 1, disk)
    point = tmp_path / "m"
    with Mounted(tgt_server.url(ONE), point, "--rw") as mounted:
        lun, pid = mounted.lun(1), mounted.pid
        assert pid is not None
        programs = [start(WRITER, lun), start(READER, lun)]
        try:
            begun = [next_lines(process, 5) for process in programs]
            if stale:
                os.kill(auto_unmounter(point), signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            said = [process.communicate(timeout=20) for process in programs]  # nobody hangs
        finally:
            for process in programs:
                process.kill()
        for process, (_, complaint) in zip(programs, said, strict=True):
            assert process.returncode == 1
            assert "[Errno " in complaint
        if not stale:
            # It looks once, and where the kernel hasn't given up the connection by then, it leaves the mount alone.
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: not is_mounted(point), timeout=5, what="fusermount3 to unmount")
        left = is_mounted(point)
        assert left or not stale
        done = run_cli("mount", tgt_server.url(ONE), point, "--rw")  # as if nothing had happened
        assert done.returncode == 0, done.stderr
        assert ("unmounting what a dead daemon left there" in done.stderr) is left
        mounted.pid = mounted.status_file()["pid"]
        last = int((begun[0] + said[0][0].split())[-1])
        with lun.open("rb") as again, disk.open("rb") as behind:
            for number in range(1, last + 1):
                for file in (again, behind):
                    file.seek(number * 4096)
                    assert file.read(4096) == b"%08d" % number * 512, number


@pytest.mark.conformance(100)
def test_a_disk_that_was_swapped_while_nobody_looked_gets_no_byte(tgt_server: TgtServer, tmp_path: Path) -> None:
    """Another disk of the same size answers under the same number: errors that stay, and not one byte on it."""
    mine = sparse(tmp_path / "mine", 16 * MIB)
    other = random_file(tmp_path / "other", 16 * MIB, seed=3)
    before = sha256(other)
    tgt_server.add_target(ONE)
    tgt_server.add_lun(ONE, 1, mine, serial="MINE")
    with (
        Relay(tgt_server.port) as relay,
        Mounted(
            f"iscsi://127.0.0.1:{relay.port}/{ONE}", tmp_path / "m", "--rw", "-o", "reconnect_timeout=20"
        ) as mounted,
    ):
        lun = mounted.lun(1)
        with lun.open("r+b", buffering=0) as file:
            file.write(b"mine" * 1024)
            os.fsync(file.fileno())
            relay.cut(refuse=True)
            tgt_server.delete_lun(ONE, 1)
            tgt_server.add_lun(ONE, 1, other, serial="OTHER")
            # Waits in the cache, to be written when the disk is back. (Not earlier: children close what they inherit,
            # and that flushes.)
            file.seek(MIB)
            file.write(b"lost" * 1024)
            relay.resume()
            with pytest.raises(OSError, match="Input/output"):
                os.fsync(file.fileno())
            for _ in range(3):
                with pytest.raises(OSError, match="Input/output"):
                    os.pread(file.fileno(), 4096, 8 * MIB)
                os.pwrite(file.fileno(), b"more" * 1024, 2 * MIB)
                with pytest.raises(OSError, match="Input/output"):
                    os.fsync(file.fileno())
        done = run_cli("umount", mounted.point)
        assert done.returncode == 32
        assert "another disk answers where LUN 1 of" in done.stderr
    assert sha256(other) == before
    assert mine.read_bytes()[:4096] == b"mine" * 1024


@pytest.mark.conformance(107)
def test_another_disk_that_only_another_lun_tells_of_gets_nothing(tgt_server: TgtServer, tmp_path: Path) -> None:
    """tgtd tells the units that were there before; the new one says nothing, nor any other once it was asked."""
    disks = [random_file(tmp_path / f"disk-{number}", 8 * MIB, seed=number) for number in (1, 2)]
    other = random_file(tmp_path / "other", 8 * MIB, seed=3)
    before = sha256(other)
    tgt_server.add_target(ONE)
    for number, disk in enumerate(disks, 1):
        tgt_server.add_lun(ONE, number, disk, serial=f"DISK-{number}")
    with Mounted(tgt_server.url(ONE), tmp_path / "m", "--rw", "-o", "direct_io") as mounted:
        with mounted.lun(1).open("rb", buffering=0) as first, mounted.lun(2).open("r+b", buffering=0) as second:
            assert second.read(4096) == disks[1].read_bytes()[:4096]
            tgt_server.delete_lun(ONE, 2)
            tgt_server.add_lun(ONE, 2, other, serial="OTHER")
            assert os.pread(first.fileno(), 4096, 0) == disks[0].read_bytes()[:4096]
            with pytest.raises(OSError, match="Input/output"):
                os.pwrite(second.fileno(), b"lost" * 1024, 0)
            with pytest.raises(OSError, match="Input/output"):
                os.pread(second.fileno(), 4096, 0)
        assert run_cli("umount", mounted.point).returncode == 32
    assert sha256(other) == before


@pytest.mark.slow
@pytest.mark.conformance(107)
def test_another_disk_in_a_mount_of_one_lun_is_found_out(tgt_server: TgtServer, tmp_path: Path) -> None:
    """tgtd tells only its controller of it, which is asked every ten seconds."""
    disk, other = (random_file(tmp_path / f"disk-{number}", 8 * MIB, seed=number) for number in (1, 2))
    before = sha256(other)
    tgt_server.add_target(ONE)
    tgt_server.add_lun(ONE, 1, disk, serial="DISK")
    with Mounted(tgt_server.url(ONE, 1), tmp_path / "m", "--rw", "-o", "direct_io") as mounted:
        with mounted.lun(1).open("r+b", buffering=0) as file:
            tgt_server.delete_lun(ONE, 1)
            tgt_server.add_lun(ONE, 1, other, serial="OTHER")
            time.sleep(LOOK_EVERY + 2)
            with pytest.raises(OSError, match="Input/output"):
                os.pwrite(file.fileno(), b"lost" * 1024, 0)
        assert run_cli("umount", mounted.point).returncode == 32
    assert sha256(other) == before


# --- while the target is dead ---


@pytest.mark.conformance(105)
def test_a_target_that_is_away_too_long_is_an_error_and_its_return_heals_the_mount(
    tgt_server: TgtServer, tmp_path: Path
) -> None:
    disk = random_file(tmp_path / "disk", 8 * MIB, seed=6)
    tgt_server.add_target(ONE)
    tgt_server.add_lun(ONE, 1, disk)
    options = ("--rw", "-o", "reconnect_timeout=1,direct_io")
    with Mounted(tgt_server.url(ONE), tmp_path / "m", *options) as mounted:
        file = os.open(mounted.lun(1), os.O_RDWR)
        try:
            began = time.monotonic()  # the loss is noticed before kill() has returned
            tgt_server.kill()
            for call in (lambda: os.pread(file, 4096, 0), lambda: os.pwrite(file, bytes(4096), 0)):
                with pytest.raises(OSError, match="Input/output"):
                    call()
            assert time.monotonic() - began >= 1
            session = mounted.status_file()["sessions"][0]
            assert session["state"] == "lost"
            assert session["last_error"]
            tgt_server.start()
            wait_until(
                lambda: mounted.status_file()["sessions"][0]["state"] == "logged in", timeout=30, what="the session"
            )
            assert os.pread(file, 4096, 0) == disk.read_bytes()[:4096]
            os.pwrite(file, b"anew" * 1024, 4096)
            os.fsync(file)
        finally:
            os.close(file)
        assert mounted.status_file()["sessions"][0]["reconnects"] == 1
    assert disk.read_bytes()[4096:8192] == b"anew" * 1024


@contextmanager
def paused(server: TgtServer) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.cont()


@pytest.mark.conformance(105)
@pytest.mark.parametrize(
    "how", ["SIGTERM", *(pytest.param(how, marks=pytest.mark.slow) for how in ("umount", "Ctrl-C"))]
)
def test_who_wants_to_go_can_go_while_the_target_is_dead(tgt_server: TgtServer, tmp_path: Path, how: str) -> None:
    """With data that can't be written any more, and a reader who waits for some that can't be read."""
    tgt_server.add_target(ONE)
    tgt_server.add_lun(ONE, 1, sparse(tmp_path / "disk", 16 * MIB))
    point = tmp_path / "m"
    point.mkdir()
    command = [program("iscsifuse"), "mount", "-f", tgt_server.url(ONE), str(point), "--rw"]
    command += ["-o", "timeout=1,reconnect_timeout=1,login_timeout=1"]
    daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lun = point / "lun-1"
    try:
        wait_until(lambda: is_mounted(point), timeout=20, what="the mount")
        file = os.open(lun, os.O_RDWR)
        with paused(tgt_server):
            reader = start("import os, sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, 8 << 20)", lun)
            wait_until(lambda: in_flight(status_of(point)) > 0, timeout=20, what="the reader to wait")
            # Not earlier: children close what they inherit, and that would wait for what was written.
            os.pwrite(file, bytes(4096), 0)
            if how == "umount":
                reader.communicate(timeout=60)
                with pytest.raises(OSError, match="Input/output"):
                    os.fsync(file)
                os.close(file)
                done = run_cli("umount", point)
                assert done.returncode in (0, 32), done.stderr
            else:
                daemon.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGINT)
            _, said = daemon.communicate(timeout=60)
            reader.communicate(timeout=20)
            assert reader.returncode == 1
            assert "Traceback" not in said
        assert not is_mounted(point)
        if how != "umount":
            with contextlib.suppress(OSError):  # nobody is there any more
                os.close(file)
    finally:
        daemon.kill()
        daemon.wait()
        assert daemon.stderr is not None
        daemon.stderr.close()


def status_of(point: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((point / ".iscsifuse" / "status.json").read_text())
    return document


def in_flight(status: dict[str, Any]) -> int:
    return int(status["sessions"][0]["in_flight"])


def test_what_is_cached_is_read_while_the_target_is_dead(tgt_server: TgtServer, tmp_path: Path) -> None:
    disk = random_file(tmp_path / "disk", 8 * MIB, seed=5)
    tgt_server.add_target(ONE)
    tgt_server.add_lun(ONE, 1, disk)
    with contextlib.ExitStack() as stack:
        limits = ("-o", "timeout=8,reconnect_timeout=1,read_ahead=0")
        mounted = stack.enter_context(Mounted(tgt_server.url(ONE), tmp_path / "m", *limits))
        with mounted.lun(1).open("rb", buffering=0) as file:
            for _ in range(2):  # what is read once only isn't kept
                content = os.pread(file.fileno(), 4 * MIB, 0)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not the kernel's cache, ours
            assert content == disk.read_bytes()[: 4 * MIB]
            with paused(tgt_server):
                hung = start(
                    "import os, sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, 6 << 20)", mounted.lun(1)
                )
                wait_until(lambda: in_flight(mounted.status_file()) > 0, timeout=5, what="the other reader to wait")
                began = time.monotonic()
                assert os.pread(file.fileno(), 4 * MIB, 0) == content
                assert in_flight(mounted.status_file()) > 0  # still
                assert time.monotonic() - began < 3
            hung.communicate(timeout=20)


# --- memory ---


@pytest.fixture
def small_group() -> Iterator[Callable[[], None]]:
    """What puts a child, before it runs, into a memory cgroup of 96 MiB."""
    top = Path("/sys/fs/cgroup/memory")
    group = top / f"iscsifuse-test-{os.getpid()}"
    if not top.is_dir():
        top = Path("/sys/fs/cgroup")
        group = top / f"iscsifuse-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")
    limit = next((group / name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists()), None)
    try:
        if limit is None:
            pytest.skip("memory can't be limited here")
        limit.write_text(str(96 * MIB))

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        yield enter
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), timeout=20, what="the group to be empty")
        group.rmdir()


@pytest.mark.root
def test_a_file_system_is_written_by_a_daemon_with_little_memory(
    tgt_server: TgtServer, tmp_path: Path, small_group: Callable[[], None]
) -> None:
    """A program dirties more than the daemon may have: the kernel's write-back needs the daemon, and it memory."""
    disk = sparse(tmp_path / "disk", 256 * MIB)
    tgt_server.add_target(ONE)
    tgt_server.add_lun(ONE, 1, disk)
    point, inside = tmp_path / "m", tmp_path / "inside"
    point.mkdir()
    inside.mkdir()

    def run(*command: str | Path, small: bool = False) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
            preexec_fn=small_group if small else None,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(program("iscsifuse"), "mount", tgt_server.url(ONE), point, "--rw", "-o", "cache_size=16M", small=True)
    pid = None
    try:
        status = run("cat", point / ".iscsifuse" / "status.json")
        pid = int(status.partition('"pid": ')[2].partition(",")[0])
        run("mkfs.ext4", "-q", point / "lun-1")
        device = run("losetup", "--find", "--show", point / "lun-1").strip()
        try:
            run("mount", device, inside)
            try:
                source = random_file(tmp_path / "source", 4 * MIB, seed=9)
                copy = f"for n in $(seq 40); do cat {source} || exit 1; done > {inside}/file && sync"
                run("sh", "-c", copy)
                assert is_alive(pid)
            finally:
                run("umount", inside)
        finally:
            run("losetup", "--detach", device)
    finally:
        run(program("iscsifuse"), "umount", point)
    run("e2fsck", "-fn", disk)
    found = run("sh", "-c", f"debugfs -R 'cat /file' {disk} 2>/dev/null | sha256sum").split()[0]
    wanted = run("sh", "-c", f"for n in $(seq 40); do cat {tmp_path}/source; done | sha256sum").split()[0]
    assert found == wanted
