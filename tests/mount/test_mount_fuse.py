"""Through the kernel, on disks in memory: what a program sees that reads, writes, truncates, maps and closes."""

import contextlib
import ctypes
import errno
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ram_kit import Ram, read_at, wait_for, write_at

from iscsifuse.errors import MountError, UsageError
from iscsifuse.mount.attach import BusyError
from iscsifuse.mount.client import status, umount
from iscsifuse.mount.kernel import MAX_BACKGROUND
from iscsifuse.mount.mountinfo import find_mount
from iscsifuse.mount.sparing import BURST

pytestmark = pytest.mark.fuse

MIB = 1 << 20
BLOCKS = 32768  # of 512 bytes: 16 MiB


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Ram]:
    made = Ram(tmp_path)
    yield made
    made.clean_up()


# -- the tree -------------------------------------------------------------------------------------------------------


def test_target_mount_shows_its_luns(ram: Ram) -> None:
    assert ram.start(disks=[BLOCKS, 16]) == 0, ram.said
    assert ram.said == ""
    assert sorted(path.name for path in ram.point.iterdir()) == ["lun-0", "lun-1"]
    assert (ram.point / "lun-1").stat().st_size == 16 * 512
    made = ram.lun.stat()
    assert (made.st_size, made.st_mode, made.st_mtime_ns, made.st_uid) == (16 * MIB, 0o100400, 0, os.getuid())
    assert ram.point.stat().st_mode == 0o40500
    entry = find_mount(ram.point)
    assert entry is not None
    assert (entry.fs_type, entry.source) == ("fuse.iscsifuse", "iscsi://ram%2Cdisk/")
    assert "ro" in entry.options.split(",")
    usage = os.statvfs(ram.point)
    assert (usage.f_blocks * usage.f_frsize, usage.f_bfree) == (16 * MIB + 16 * 512, 0)
    with pytest.raises(FileNotFoundError):
        (ram.point / "lun-2").stat()
    assert umount(ram.point) == 0
    assert not ram.is_mounted()


def test_portal_mount_has_a_directory_for_each_target(ram: Ram) -> None:
    assert ram.start(target_name=None) == 0
    assert [str(path.relative_to(ram.point)) for path in ram.point.rglob("*")] == [
        "iqn.2026-11.com.example:ram",
        "iqn.2026-11.com.example:ram/lun-0",
    ]


def test_owner_and_mode(ram: Ram) -> None:
    assert ram.start(uid=12, gid=34, mode=0o444) == 0
    made = ram.lun.stat()
    assert (made.st_uid, made.st_gid, made.st_mode) == (12, 34, 0o100444)
    assert ram.point.stat().st_mode == 0o40555


def test_status_file_is_hidden_and_current(ram: Ram) -> None:
    assert ram.start() == 0
    path = ram.point / ".iscsifuse/status.json"
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    assert document["luns"][0]["path"] == "lun-0"
    ram.lun.read_bytes()
    later = json.loads(path.read_text())
    assert later["commands"][0]["name"] == "READ(10)"
    assert later["commands"][0]["bytes"] == 16 * MIB
    assert status(ram.point)["pid"] == later["pid"] != os.getpid()
    with pytest.raises(OSError, match="Read-only"):
        path.open("r+")


def test_mount_on_a_file(ram: Ram, tmp_path: Path) -> None:
    ram.point = tmp_path / "disk.img"
    ram.point.write_text("what was there before")
    assert ram.start(lun=0, read_write=True) == 0, ram.said
    assert ram.point.stat().st_size == 16 * MIB
    with ram.point.open("r+b") as file:
        file.seek(MIB)
        file.write(b"hello")
    with ram.point.open("rb") as file:
        file.seek(MIB)
        assert file.read(6) == b"hello\0"
    document = status(ram.point)
    assert document["luns"][0]["path"] == ""  # type: ignore[index]
    assert umount(ram.point) == 0
    assert ram.point.read_text() == "what was there before"


# -- reading and writing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"direct_io": True}, marks=pytest.mark.slow),
        {"write_behind": False},
        pytest.param({"block_length": 4096}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bytes_survive(ram: Ram, options: dict[str, object], tmp_path: Path) -> None:
    blocks = 16 * MIB // int(str(options.get("block_length", 512)))
    assert ram.start(read_write=True, disks=[blocks], **options) == 0
    image = tmp_path / "image"
    image.write_bytes(os.urandom(16 * MIB))
    subprocess.run(["dd", f"if={image}", f"of={ram.lun}", "bs=300k", "status=none"], check=True)
    subprocess.run(["cmp", image, ram.lun], check=True)
    with ram.lun.open("r+b", buffering=0) as file:  # crooked, over several blocks and pages
        for offset, data in ((1, b"x"), (4095, b"yz"), (MIB - 3, b"abcdef" * 1000), (16 * MIB - 1, b"!")):
            os.pwrite(file.fileno(), data, offset)
            with image.open("r+b") as plain:
                os.pwrite(plain.fileno(), data, offset)
    subprocess.run(["cmp", image, ram.lun], check=True)
    assert umount(ram.point) == 0
    assert ram.start(read_write=False, disks=[blocks], **options) == 0


def test_a_disk_keeps_its_size(ram: Ram) -> None:
    assert ram.start(read_write=True) == 0
    write_at(ram.lun, b"first")
    for size in (0, 5, 1 << 40):
        os.truncate(ram.lun, size)
        assert ram.lun.stat().st_size == 16 * MIB
    with ram.lun.open("wb") as file:  # O_TRUNC
        assert os.fstat(file.fileno()).st_size == 16 * MIB
    assert read_at(ram.lun, 5) == b"first"
    os.utime(ram.lun, (1000, 1000))
    assert ram.lun.stat().st_mtime == 0
    ram.lun.chmod(0o600)
    attempts: list[Callable[[], object]] = [
        lambda: ram.lun.chmod(0o644),
        lambda: os.chown(ram.lun, 1, -1),
        ram.lun.unlink,
        lambda: (ram.point / "new").write_bytes(b""),
        lambda: (ram.point / "new").mkdir(),
        lambda: ram.lun.rename(ram.point / "other"),
        lambda: (ram.point / "x").symlink_to("y"),
        lambda: os.link(ram.lun, ram.point / "x"),
        lambda: os.mkfifo(ram.point / "x"),
    ]
    for forbidden in attempts:
        with pytest.raises(PermissionError):
            forbidden()


def test_the_end_of_a_disk(ram: Ram) -> None:
    assert ram.start(read_write=True) == 0
    with ram.lun.open("r+b", buffering=0) as file:
        number = file.fileno()
        assert os.pwrite(number, b"x" * 1000, 16 * MIB - 100) == 100
        for offset in (16 * MIB, 16 * MIB + 1, 1 << 40):
            with pytest.raises(OSError, match="No space") as caught:
                os.pwrite(number, b"x", offset)
            assert caught.value.errno == errno.ENOSPC
        assert os.pread(number, 1000, 16 * MIB - 100) == b"x" * 100
        assert os.pread(number, 1000, 16 * MIB) == b""
        assert os.fstat(number).st_size == 16 * MIB
    result = subprocess.run(
        ["dd", "if=/dev/zero", f"of={ram.lun}", "bs=1M"], capture_output=True, text=True, check=False
    )
    assert "No space left" in result.stderr
    assert f"{16 * MIB} bytes" in result.stderr


def test_direct_writes_say_that_the_disk_is_full(ram: Ram) -> None:
    assert ram.start(read_write=True) == 0
    number = os.open(ram.lun, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 8192) as buffer, pytest.raises(OSError, match="No space"):
            os.pwrite(number, buffer, 16 * MIB - 4096)
    finally:
        os.close(number)


def test_mapped_pages_are_written_at_unmount(ram: Ram) -> None:
    assert ram.start(read_write=True, target_name=None) == 0
    lun = ram.point / "iqn.2026-11.com.example:ram/lun-0"
    with lun.open("r+b") as file, mmap.mmap(file.fileno(), MIB) as mapped:
        mapped[5000:5005] = b"hello"
    assert umount(ram.point) == 0
    assert any(line.startswith("write") for line in ram.log())
    assert ram.log()[-1] == "flush"


def test_read_only_is_read_only(ram: Ram) -> None:
    assert ram.start() == 0
    with pytest.raises(OSError, match="Read-only"):
        os.open(ram.lun, os.O_WRONLY)
    with pytest.raises(OSError, match="Read-only"):
        os.truncate(ram.lun, 0)
    with pytest.raises(OSError, match="Read-only"):
        os.utime(ram.lun)
    assert umount(ram.point) == 0
    assert ram.log() == []


def test_read_errors_are_errors(ram: Ram) -> None:
    assert ram.start() == 0
    ram.order("fail-0")
    with ram.lun.open("rb", buffering=0) as file:
        with pytest.raises(OSError, match="Input/output"):
            os.pread(file.fileno(), 4096, 0)
        ram.revoke("fail-0")
        assert os.pread(file.fileno(), 4096, 0) == bytes(4096)


@pytest.mark.parametrize("how", ["close", "fsync"])
def test_lost_writes_are_reported(ram: Ram, how: str) -> None:
    assert ram.start(read_write=True) == 0
    number = os.open(ram.lun, os.O_WRONLY)
    # Memory that has been touched: the kernel sends parts of blocks where it must fetch pages first, and a part of a
    # block has the rest of it read.
    data = b"x" * MIB
    os.pwrite(number, data, 0)
    os.fsync(number)
    ram.order("fail-0")
    os.pwrite(number, data, MIB)
    with pytest.raises(OSError, match="Input/output"):
        os.fsync(number) if how == "fsync" else os.close(number)
    if how == "fsync":
        ram.revoke("fail-0")
        os.fsync(number)
        os.close(number)
    # Once more, whatever went well since: another program has closed it then.
    with pytest.raises(MountError, match=r"data is lost: LUN 0 of \S+: a buffered write of LBA "):
        umount(ram.point)


@pytest.mark.parametrize("how", ["a child's exit", "a program's start", "a dup"])
def test_a_close_hides_no_error_from_fsync(ram: Ram, how: str) -> None:
    """The kernel passes on each close of a descriptor, and hardly anybody reads the answer."""
    assert ram.start(read_write=True) == 0
    number = os.open(ram.lun, os.O_WRONLY)
    ram.order("fail-0")
    os.pwrite(number, b"x" * 4096, 0)
    if how == "a dup":
        with pytest.raises(OSError, match="Input/output"):
            os.close(os.dup(number))
    else:
        child = os.fork()
        if child == 0:
            try:
                if how == "a program's start":  # which closes what isn't inheritable
                    os.execv("/bin/true", ["true"])  # noqa: S606
            finally:
                os._exit(0)
        assert os.waitpid(child, 0) == (child, 0)
    assert not any(line.startswith("write") for line in ram.log())
    ram.revoke("fail-0")
    with pytest.raises(OSError, match="Input/output"):
        os.fsync(number)
    os.fsync(number)
    os.close(number)


def test_fsync_reaches_stable_storage(ram: Ram) -> None:
    assert ram.start(read_write=True) == 0
    with ram.lun.open("r+b", buffering=0) as file:
        file.write(bytes(8192))
        os.fsync(file.fileno())
        assert ram.log() == ["write 0 8192", "flush"]
        file.write(b"x" * 512)
        os.fdatasync(file.fileno())
        assert ram.log()[-2:] == ["write 16 512", "flush"]


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("flags", [0, os.O_DSYNC, os.O_SYNC])
def test_synchronous_writes_reach_stable_storage(ram: Ram, flags: int, direct_io: bool) -> None:
    """The kernel asks for that where it caches the file, and else leaves it to us."""
    assert ram.start(read_write=True, direct_io=direct_io) == 0
    number = os.open(ram.lun, os.O_WRONLY | flags)
    os.pwrite(number, b"x" * 4096, 8192)
    if flags:
        assert ram.log() == ["write 16 4096", "flush"]
    else:
        assert "flush" not in ram.log()
    os.close(number)


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio isn't installed")
@pytest.mark.parametrize("direct_io", [False, True])
def test_asynchronous_writes_reach_stable_storage(ram: Ram, direct_io: bool) -> None:
    """The kernel doesn't ask for that where they are asynchronous."""
    assert ram.start(read_write=True, direct_io=direct_io) == 0
    command = [
        "fio",
        "--name=job",
        f"--filename={ram.lun}",
        "--rw=write",
        "--bs=4096",
        "--size=16384",
        "--sync=dsync",
    ]
    command += ["--ioengine=libaio", "--iodepth=1", "--direct=1", "--allow_file_create=0"]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    log = ram.log()
    writes = [index for index, line in enumerate(log) if line.startswith("write")]
    assert len(writes) == 4
    assert all("flush" in log[index + 1 : index + 2] for index in writes), log


@pytest.mark.parametrize("direct_io", [False, True])
def test_a_synchronous_write_that_fails_is_an_error(ram: Ram, direct_io: bool) -> None:
    assert ram.start(read_write=True, direct_io=direct_io) == 0
    number = os.open(ram.lun, os.O_WRONLY | os.O_DSYNC)
    ram.order("fail-0")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.pwrite(number, b"x" * 4096, 0)
    os.close(number)


def test_a_disk_that_grows_and_shrinks(ram: Ram) -> None:
    assert ram.start(disks=[2048]) == 0
    assert ram.lun.read_bytes() == bytes(MIB)
    ram.order("grow-0", "4096")
    wait_for(lambda: ram.lun.stat().st_size == 2 * MIB)
    assert ram.lun.read_bytes() == bytes(MIB) + bytes([4096 % 251]) * MIB
    ram.order("grow-0", "1024")
    wait_for(lambda: ram.lun.stat().st_size == MIB // 2)
    assert ram.lun.read_bytes() == bytes(MIB // 2)


@pytest.fixture
def ram_file(ram: Ram) -> Ram:
    """For a mount on a file."""
    ram.point.rmdir()
    ram.point.touch()
    return ram


@pytest.mark.parametrize(("read_write", "opens"), [(False, 1), (True, 6)])
def test_how_often_a_file_is_opened(ram_file: Ram, read_write: bool, opens: int) -> None:
    ram = ram_file
    assert ram.start(lun=0, disks=[2048], note_opens=True, read_write=read_write) == 0, ram.said
    for _ in range(5):
        assert ram.point.read_bytes() == bytes(MIB)
    first = ram.point.open("rb", buffering=0)
    with first:
        assert len((ram.control / "opens").read_text().splitlines()) == opens
        if not read_write:
            with pytest.raises(OSError, match="Read-only"):
                ram.point.open("r+b")
        with pytest.raises(BusyError):
            umount(ram.point)
        assert first.read(10) == bytes(10)
        with mmap.mmap(first.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[MIB - 5 :] == bytes(5)
    assert umount(ram.point) == 0
    assert ram.point.stat().st_size == 0


def test_a_file_that_is_never_opened_has_the_size_of_its_disk(ram_file: Ram) -> None:
    """What the kernel has cached goes when the disk changes, and who was reading where it was gets an error."""
    ram = ram_file
    assert ram.start(lun=0, disks=[2048]) == 0, ram.said
    with ram.point.open("rb", buffering=0) as reader:
        assert reader.read() == bytes(MIB)
        ram.order("grow-0", "4096")
        wait_for(lambda: ram.point.stat().st_size == 2 * MIB)
        assert reader.read() == ram.point.read_bytes()[MIB:] == bytes([4096 % 251]) * MIB
        ram.order("grow-0", "1024")
        wait_for(lambda: ram.point.stat().st_size == MIB // 2)
        assert ram.point.read_bytes() == bytes(MIB // 2)


@pytest.mark.root
def test_a_file_system_in_a_loop_device(ram: Ram, tmp_path: Path) -> None:
    assert ram.start(read_write=True) == 0
    subprocess.run(["mkfs.ext4", "-q", "-F", ram.lun], check=True)
    inside = tmp_path / "inside"
    inside.mkdir()
    subprocess.run(["mount", "-o", "loop", ram.lun, inside], check=True)
    try:
        (inside / "file").write_bytes(b"y" * 100_000)
        with pytest.raises(BusyError, match=r"lun-0 is attached to /dev/loop\d+"):
            umount(ram.point)
        assert ram.is_mounted()
    finally:
        subprocess.run(["umount", inside], check=True)
    subprocess.run(["fsck.ext4", "-fn", ram.lun], check=True, capture_output=True)
    wait_for(lambda: subprocess.run(["losetup", "-j", ram.lun], capture_output=True, check=True).stdout == b"")
    assert umount(ram.point) == 0


# -- how it begins --------------------------------------------------------------------------------------------------


def test_partial_mounts_say_so(ram: Ram) -> None:
    assert ram.start(partial=True) == 64
    assert ram.is_mounted()


def test_a_failure_is_told_and_nothing_is_mounted(ram: Ram) -> None:
    assert ram.start(fail_login=True) == 99
    assert ram.said == "MountError: there is no such LUN\n"
    assert not ram.is_mounted()


def test_sudden_death_is_told(ram: Ram) -> None:
    assert ram.start(blow_up=True) == 99
    assert "was killed by SIGABRT before the mount was ready" in ram.said
    assert not ram.is_mounted()


def test_mount_points_that_will_not_do(ram: Ram, tmp_path: Path) -> None:
    (ram.point / "x").touch()
    assert ram.start() == 99
    assert f"UsageError: the mount point {ram.point} is not empty" in ram.said
    (ram.point / "x").unlink()
    ram.point = tmp_path / "nothing"
    assert ram.start() == 99
    assert "doesn't exist" in ram.said
    ram.point.touch()
    assert ram.start() == 99
    assert "the URL has to name one LUN" in ram.said


def test_mounting_twice_is_refused(ram: Ram) -> None:
    assert ram.start() == 0
    assert ram.start() == 99
    assert "is mounted on" in ram.said
    assert umount(ram.point) == 0
    assert not ram.is_mounted()


def test_signal_before_the_mount_is_ready(ram: Ram) -> None:
    process = subprocess.Popen(ram._command({"delay": 30}), env=ram._env())
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 8
    assert not ram.is_mounted()


# -- how it ends ----------------------------------------------------------------------------------------------------


def test_umount_waits_for_the_daemon(ram: Ram) -> None:
    assert ram.start(read_write=True) == 0
    pid = int(str(status(ram.point)["pid"]))
    assert umount(ram.point) == 0
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or ") Z " in state.read_text()  # a zombie is for init to bury
    assert (ram.control / "logged-out").exists()
    with pytest.raises(UsageError, match="nothing is mounted"):
        umount(ram.point)


def test_umount_of_a_busy_mount_changes_nothing(ram: Ram) -> None:
    assert ram.start() == 0
    with ram.lun.open("rb") as file:
        with pytest.raises(BusyError, match=rf"lun-0 is open by .* \(pid {os.getpid()}\)"):
            umount(ram.point)
        assert len(file.read(10)) == 10
    assert umount(ram.point) == 0


def test_umount_tells_of_lost_data(ram: Ram) -> None:
    assert ram.start(read_write=True) == 0
    number = os.open(ram.lun, os.O_WRONLY)
    os.pwrite(number, bytes(4096), 0)
    ram.order("fail-0")
    with pytest.raises(OSError, match="Input/output"):
        os.close(number)
    with pytest.raises(MountError, match=r"is unmounted, but data is lost: LUN 0 of"):
        umount(ram.point)
    assert not ram.is_mounted()


def leave_dirty(ram: Ram) -> None:
    """Have the daemon hold what nobody has open any more, for a disk that doesn't answer.

    close() waits for what was written before; but not for what is written to mapped pages after the last one. (The
    module mmap keeps a descriptor of its own.)
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    number = os.open(ram.lun, os.O_RDWR)
    place = libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, number, 0)
    os.close(number)
    assert ctypes.string_at(place, 1) == bytes(1)
    ram.order("stall-0")
    ctypes.memmove(place, b"hello", 5)
    assert libc.munmap(place, 4096) == 0


def test_what_follows_an_error_that_was_told_is_flushed_at_the_end(ram: Ram) -> None:
    """The error is told once more, and nothing else suffers for it."""
    assert ram.start(read_write=True) == 0
    with ram.lun.open("r+b", buffering=0) as file:
        ram.order("fail-0")
        file.write(bytes(4096))
        with pytest.raises(OSError, match="Input/output"):
            os.fsync(file.fileno())
        ram.revoke("fail-0")
        os.pwrite(file.fileno(), bytes(8192), MIB)
    with pytest.raises(MountError, match=r"data is lost: LUN 0 of [^;]*$"):
        umount(ram.point)
    assert ram.log() == ["write 2048 8192", "flush"]


def test_umount_tells_what_a_daemon_loses_that_takes_too_long(ram: Ram, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so only after it was made to hurry."""
    assert ram.start(read_write=True, stop_timeout=1) == 0
    leave_dirty(ram)
    monkeypatch.setattr("iscsifuse.mount.client._ORDERLY", 2.0)
    with pytest.raises(MountError, match=r"data is lost: LUN 0 of .* in time; 4096 bytes are lost"):
        umount(ram.point)


def test_umount_gives_a_late_daemon_time_before_it_has_it_hurry(ram: Ram) -> None:
    assert ram.start(read_write=True, stop_timeout=1) == 0
    leave_dirty(ram)
    late = threading.Timer(4, ram.revoke, ["stall-0"])
    late.start()
    try:
        assert umount(ram.point) == 0
    finally:
        late.join()
    assert ram.log() == ["write 0 4096", "flush"]


def test_umount_has_nothing_to_say_where_all_was_synced(ram: Ram) -> None:
    assert ram.start(read_write=True) == 0
    with ram.lun.open("r+b", buffering=0) as file:
        file.write(bytes(4096))
        os.fsync(file.fileno())
    ram.order("fail-0")
    assert umount(ram.point) == 0


def test_umount_works_while_the_target_is_silent(ram: Ram) -> None:
    assert ram.start() == 0
    ram.order("stall-0")
    reader = subprocess.Popen(["dd", f"if={ram.lun}", "of=/dev/null", "status=none"])
    wait_for(lambda: status(ram.point)["cache"]["misses"] > 0)  # type: ignore[index]
    with pytest.raises(BusyError):
        umount(ram.point)
    pid = int(str(status(ram.point)["pid"]))
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not ram.is_mounted(), timeout=30)
    assert reader.wait(timeout=10) != 0


def test_plain_umount_ends_the_daemon(ram: Ram) -> None:
    ram.start_in_front(read_write=True)
    write_at(ram.lun, b"hello")
    subprocess.run(["fusermount3", "-u", ram.point], check=True)
    assert ram.process is not None
    assert ram.process.wait(timeout=10) == 0
    assert ram.log()[-1] == "flush"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unmounts(ram: Ram, number: signal.Signals) -> None:
    ram.start_in_front(read_write=True)
    write_at(ram.lun, b"hello")
    assert ram.process is not None
    ram.process.send_signal(number)
    assert ram.process.wait(timeout=10) == 0
    assert not ram.is_mounted()
    assert (ram.control / "logged-out").exists()


def test_a_signal_unmounts_what_is_busy(ram: Ram) -> None:
    ram.start_in_front(read_write=True)
    number = os.open(ram.lun, os.O_RDWR)
    try:
        os.pwrite(number, b"x" * 512, 0)
        assert ram.process is not None
        ram.process.send_signal(signal.SIGTERM)
        assert ram.process.wait(timeout=20) == 0
        assert not ram.is_mounted()
        assert ram.log() == ["write 0 512", "flush"]
        with pytest.raises(OSError, match=r"not connected|aborted"):
            os.pread(number, 512, 0)
    finally:
        with pytest.raises(OSError, match=r"not connected|aborted"):
            os.close(number)


@pytest.mark.root
def test_what_is_mounted_in_our_place_stays(ram: Ram) -> None:
    """A lazily unmounted mount lives on as long as a program uses it, and ends as ever."""
    ram.start_in_front(read_write=True)
    assert ram.process is not None
    with ram.lun.open("r+b", buffering=0) as file:
        subprocess.run(["umount", "-l", ram.point], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", ram.point], check=True)
        try:
            (ram.point / "file").touch()
            file.write(bytes(512))
            ram.process.send_signal(signal.SIGTERM)
            assert ram.process.wait(timeout=20) == 0
            assert ram.log() == ["write 0 512", "flush"]
            assert [path.name for path in ram.point.iterdir()] == ["file"]
            with pytest.raises(OSError, match=r"not connected|aborted"):
                file.read(512)
            with contextlib.suppress(OSError):
                file.close()
        finally:
            subprocess.run(["umount", ram.point], check=True)
    assert not ram.is_mounted()


@pytest.mark.root
def test_a_mount_that_was_moved_goes_where_it_is(ram: Ram, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", private], check=True)
    try:
        subprocess.run(["mount", "--make-private", private], check=True)  # What a shared mount holds can't be moved.
        ram.point, new = private / "old", private / "new"
        ram.point.mkdir()
        new.mkdir()
        ram.start_in_front(read_write=True)
        subprocess.run(["mount", "--move", ram.point, new], check=True)
        write_at(new / "lun-0", bytes(512))
        assert ram.process is not None
        ram.process.send_signal(signal.SIGTERM)
        assert ram.process.wait(timeout=20) == 0
        assert not ram.is_mounted()
        assert find_mount(new) is None
        assert ram.log() == ["write 0 512", "flush"]
    finally:
        subprocess.run(["umount", "-R", private], check=True)


def test_what_is_written_while_a_busy_mount_ends_is_not_lost(ram: Ram) -> None:
    assert ram.start(read_write=True) == 0
    pid = int(status(ram.point)["pid"])  # type: ignore[call-overload]
    number = os.open(ram.lun, os.O_RDWR)
    os.pwrite(number, b"x" * 4096, 0)
    ram.order("stall-0")
    os.kill(pid, signal.SIGTERM)
    time.sleep(1)  # it is writing back by now, and the disk doesn't answer
    assert os.pwrite(number, b"y" * 4096, MIB) == 4096
    assert ram.is_mounted()
    ram.revoke("stall-0")
    wait_for(lambda: not ram.is_mounted())
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.close(number)
    wait_for(lambda: (ram.control / "logged-out").exists())
    log = ram.log()
    assert log.index("write 0 4096") < log.index("write 2048 4096") < len(log) - 1 - log[::-1].index("flush")


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGTERM, signal.SIGHUP],
        [signal.SIGHUP, signal.SIGTERM],
        [signal.SIGHUP, signal.SIGHUP, signal.SIGHUP],
        [signal.SIGINT, signal.SIGTERM],
    ],
    ids=lambda numbers: "+".join(number.name for number in numbers),
)
def test_signals_that_come_together_lose_nothing(ram: Ram, numbers: list[signal.Signals]) -> None:
    """As they do when a session ends. A hang-up doesn't hurry later either."""
    ram.start_in_front(read_write=True)
    assert ram.process is not None
    number = os.open(ram.lun, os.O_RDWR)
    try:
        ram.order("stall-0")
        os.pwrite(number, b"x" * 512, 0)
        for each in numbers:
            ram.process.send_signal(each)
            time.sleep(0.1)  # or the kernel makes one of two alike
        time.sleep(1.5)
        ram.process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert ram.process.poll() is None
        ram.revoke("stall-0")
        assert ram.process.wait(timeout=20) == 0
    finally:
        with contextlib.suppress(OSError):
            os.close(number)
    assert ram.log() == ["write 0 512", "flush"]
    assert not ram.is_mounted()


def test_who_asks_twice_gives_up_what_is_not_written(ram: Ram) -> None:
    ram.start_in_front(read_write=True)
    assert ram.process is not None
    number = os.open(ram.lun, os.O_RDWR)
    try:
        ram.order("stall-0")
        os.pwrite(number, b"x" * 512, 0)
        for _ in range(2):
            ram.process.send_signal(signal.SIGINT)
            time.sleep(1.5)
        _, said = ram.process.communicate(timeout=10)
    finally:
        with contextlib.suppress(OSError):
            os.close(number)
    assert ram.process.returncode == 32
    assert "not everything could be written back in time; 512 bytes are lost" in said


@pytest.mark.parametrize("verbosity", [0, 2])
def test_a_terminal_is_not_flooded_unless_that_is_wanted(ram: Ram, verbosity: int) -> None:
    ram.start_in_front(verbosity=verbosity)
    ram.order("fail-0")
    times = BURST * 3
    with ram.lun.open("rb", buffering=0) as file:
        for number in range(times):
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(file.fileno(), 512, number * 4096)
    assert ram.process is not None
    ram.process.send_signal(signal.SIGTERM)
    _, said = ram.process.communicate(timeout=20)
    lines = said.count("read failed with EIO")
    assert lines >= times if verbosity else BURST <= lines < times


@contextmanager
def control(ram: Ram, folder: Path) -> Iterator[Path]:
    """The control files of the mount's connection; not everybody has them mounted under /sys."""
    entry = find_mount(ram.point)
    assert entry is not None
    folder.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", folder], check=True, timeout=20)
    try:
        yield folder / str(entry.connection)
    finally:
        subprocess.run(["umount", folder], check=True, timeout=20)


@pytest.mark.root
def test_much_may_be_asked_for_in_the_background(ram: Ram, tmp_path: Path) -> None:
    ram.start_in_front()
    with control(ram, tmp_path / "fusectl") as files:
        assert int((files / "max_background").read_text()) == MAX_BACKGROUND
        assert int((files / "congestion_threshold").read_text()) > MAX_BACKGROUND


@pytest.mark.root
def test_an_aborted_connection_leaves_no_mount(ram: Ram, tmp_path: Path) -> None:
    ram.start_in_front(read_write=True)
    write_at(ram.lun, b"hello")
    with control(ram, tmp_path / "fusectl") as files:
        (files / "abort").write_text("1")
    assert ram.process is not None
    assert ram.process.wait(timeout=20) == 0
    assert not ram.is_mounted()
    assert ram.log()[-1] == "flush"


def test_a_loop_that_breaks_down_leaves_no_mount(ram: Ram) -> None:
    ram.start_in_front(read_write=True, break_loop=True)
    with ram.lun.open("r+b", buffering=0) as file:
        file.write(b"hello")
        ram.order("break")
        assert ram.process is not None
        _, said = ram.process.communicate(timeout=20)
        assert ram.process.returncode == 99
        assert "MountError: the mount broke down" in said
        assert not ram.is_mounted()
        assert ram.log()[-1] == "flush"
        with pytest.raises(OSError, match=r"not connected|aborted"):
            file.close()


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("where", ["below", "invalidations"])
def test_what_was_written_survives_a_mistake_of_ours(ram: Ram, where: str, busy: bool) -> None:
    """Of another disk, too. The mount ends in the usual order, and says what went wrong."""
    ram.start_in_front(read_write=True, disks=[2048, 2048], break_invalidations=True)
    with ram.lun.open("r+b", buffering=0) as file:
        ram.order("stall-0")
        file.write(bytes(range(256)) * 2)
        if where == "below":
            ram.order("accident")
        else:
            ram.order("grow-1", "4096")
        time.sleep(0.3)
        ram.revoke("stall-0")
        if not busy:
            file.close()
        assert ram.process is not None
        _, said = ram.process.communicate(timeout=30)
        assert ram.process.returncode == 99
        assert "MountError: the mount broke down: ZeroDivisionError('a mistake')" in said
        assert not ram.is_mounted()
        assert [line for line in ram.log() if line.startswith("write")] == ["write 0 512"]
        assert ram.log()[-1] == "flush"
        assert (ram.control / "logged-out").exists()
        with contextlib.suppress(OSError):
            file.close()


@pytest.mark.parametrize("busy", [False, True])
def test_who_may_have_no_more_threads_loses_nothing(ram: Ram, busy: bool) -> None:
    """The mount can't be unmounted politely, so programs are cut off; but only after all is written."""
    ram.start_in_front(read_write=True)
    assert ram.process is not None
    if not busy:
        leave_dirty(ram)
    with ram.lun.open("r+b", buffering=0) if busy else contextlib.nullcontext() as file:
        if file is not None:
            ram.order("stall-0")
            file.write(bytes(4096))
        ram.order("no-threads")
        ram.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        ram.revoke("stall-0")
        _, said = ram.process.communicate(timeout=20)
        assert ram.process.returncode == 0
        assert "can't start new thread; programs that still use it will get errors" in said
        assert ram.log() == ["write 0 4096", "flush"]
        assert not ram.is_mounted()
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


def test_what_the_disk_lost_after_a_sync_is_told_at_the_end(ram: Ram) -> None:
    ram.start_in_front(read_write=True, disks=[2048, 2048])
    for number in range(2):
        with (ram.point / f"lun-{number}").open("r+b", buffering=0) as file:
            file.write(b"hello")
            os.fsync(file.fileno())
    ram.order("report-1", "lost after all")
    wait_for(lambda: not (ram.control / "report-1").exists())
    subprocess.run(["fusermount3", "-u", str(ram.point)], check=True)
    assert ram.process is not None
    _, said = ram.process.communicate(timeout=30)
    assert ram.process.returncode == 32
    assert "LUN 1 of iqn.2026-11.com.example:ram: lost after all" in said
    assert "LUN 0 of" not in said


def test_a_killed_daemon_leaves_no_mount(ram: Ram) -> None:
    ram.start_in_front()
    assert ram.process is not None
    ram.process.kill()
    try:
        wait_for(lambda: not ram.is_mounted())
    except AssertionError:
        # On a busy machine it happens that fusermount3 looks while the mount is dying, and leaves it to others.
        with pytest.raises(OSError, match="not connected"):
            list(ram.point.iterdir())
        assert umount(ram.point) == 0
    assert not ram.is_mounted()


@pytest.mark.root
def test_stale_mounts_are_cleared_up(ram: Ram) -> None:
    hidden = "import iscsifuse.mount.attach as a; a.fusermount = lambda: None; "
    command = ram._command({"foreground": True})
    code = f"{hidden} import sys, runpy; sys.argv = {command[1:]!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    clearers: list[Callable[[], int]] = [lambda: umount(ram.point), lambda: ram.start()]
    for clear in clearers:
        process = subprocess.Popen([sys.executable, "-c", code], env=ram._env())
        wait_for(ram.is_mounted)
        ram.point.stat()
        process.kill()
        process.wait()
        with pytest.raises(OSError, match="not connected"):
            list(ram.point.iterdir())
        with pytest.raises(MountError, match="clears it up"):
            status(ram.point)
        assert clear() == 0
    assert umount(ram.point) == 0


@pytest.mark.slow
def test_requests_that_are_taken_back_do_not_stop_the_daemon(ram: Ram) -> None:
    """A program is killed between the daemon's poll and its read of /dev/fuse: the read must not block for ever.

    The daemon is made to be busy in most of its time, which widens that gap.
    """
    ram.order("busy")
    assert ram.start() == 0
    for count in range(60):
        subprocess.run(
            ["timeout", "-s", "KILL", f"0.{count * 7 % 90 + 10:03}", "stat", ram.point / f"nothing-{count}"],
            check=False,
            capture_output=True,
        )
        started = time.monotonic()
        assert status(ram.point)["schema"] == 1
        assert time.monotonic() - started < 2
