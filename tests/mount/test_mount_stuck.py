"""The kernel waits in the daemon's name: an invalidation that waits for a page, which waits for the daemon's answer.

A thread that does so can't be killed, and keeps the connection. Whoever ends the daemon then must end that, too, or
every program that waits for the mount waits for ever.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ram_kit import Ram, wait_for

from iscsifuse.errors import MountError
from iscsifuse.mount.channel import Line
from iscsifuse.mount.client import umount
from iscsifuse.mount.mountinfo import MountEntry, find_mount

pytestmark = [pytest.mark.fuse, pytest.mark.root]

READER = "import os, sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, 1 << 20)"


@contextmanager
def fusectl(folder: Path) -> Iterator[Path]:
    """Not everybody has it mounted under /sys."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", folder], check=True, timeout=20)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, timeout=20)


def waits_for(pid: int, *functions: str) -> Callable[[], bool]:
    """Whether a thread of a process waits in the kernel, in a function with such a name."""

    def look() -> bool:
        places = [(task / "stack").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
        return any(function in place for function in functions for place in places)

    if not Path("/proc/self/stack").exists():
        pytest.skip("this kernel doesn't tell where a process waits")
    return look


class Stuck:
    """A mount whose daemon waits for the kernel, which waits for a reader's page, which waits for the daemon."""

    def __init__(self, ram: Ram, **options: object) -> None:
        ram.start_in_front(read_write=True, read_ahead=0, **options)
        entry = find_mount(ram.point)
        assert entry is not None
        self.ram = ram
        self.entry: MountEntry = entry
        ram.order("stall-0")
        self.reader = subprocess.Popen([sys.executable, "-c", READER, str(ram.lun)], stderr=subprocess.PIPE)
        wait_for(waits_for(self.reader.pid, "request_wait_answer", "folio"))
        ram.order("grow-0", "40000")
        assert ram.process is not None
        self.daemon = ram.process
        wait_for(waits_for(self.daemon.pid, "folio"))

    def assert_reader_is_told(self) -> None:
        _, said = self.reader.communicate(timeout=20)
        assert self.reader.returncode == 1
        assert b"Error: [Errno" in said


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Ram]:
    made = Ram(tmp_path)
    try:
        yield made
    finally:
        entry = find_mount(made.point)
        if entry is not None:
            with fusectl(tmp_path / "rescue") as control:
                (control / str(entry.connection) / "abort").write_text("1")
        made.clean_up()


@pytest.mark.parametrize("may_abort", [True, False])
def test_a_daemon_that_ends_takes_what_waits_for_it_along(ram: Ram, may_abort: bool) -> None:
    """With and without the right to abort the connection."""
    stuck = Stuck(ram, may_abort=may_abort)
    stuck.daemon.send_signal(signal.SIGTERM)
    stuck.daemon.wait(timeout=20)
    stuck.assert_reader_is_told()
    assert not ram.is_mounted()


def test_the_end_goes_on_where_that_breaks_down(ram: Ram) -> None:
    """What was lost before is told all the same, and what isn't lost is written."""
    stuck = Stuck(ram, may_abort=False, break_release=True, disks=[32768, 2048, 2048])
    files = [(ram.point / f"lun-{number}").open("r+b", buffering=0) for number in (1, 2)]
    try:
        ram.order("fail-1")
        for file in files:
            file.write(bytes(4096))
        with Line(stuck.entry.device) as line:
            assert line.next(timeout=10) is not None
            stuck.daemon.send_signal(signal.SIGTERM)
            last = line.next(timeout=30)
        _, said = stuck.daemon.communicate(timeout=20)
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                file.close()
    stuck.assert_reader_is_told()
    assert last is not None
    assert {error[:8] for error in last["errors"]} == {"LUN 1 of"}  # type: ignore[attr-defined]
    assert "MountError: the mount broke down: OSError(5, 'as commanded')" in said
    assert stuck.daemon.returncode == 99
    assert ram.log(2) == ["write 0 4096", "flush"]
    assert not ram.is_mounted()


def test_umount_clears_up_after_a_daemon_that_was_killed_then(ram: Ram, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL while the kernel waits in its name: nothing ends by itself, but 'iscsifuse umount' ends it.

    Where it may not, it changes nothing and says who may."""
    stuck = Stuck(ram)
    stuck.daemon.kill()
    wait_for(lambda: "Z (zombie)" in Path(f"/proc/{stuck.daemon.pid}/status").read_text())
    with monkeypatch.context() as patch:
        patch.setattr("iscsifuse.mount.client.abort_connection", lambda *_: False)
        with pytest.raises(MountError, match="umount -f"):
            umount(ram.point)
    assert ram.is_mounted()
    assert umount(ram.point) == 0
    stuck.assert_reader_is_told()
    stuck.daemon.wait(timeout=20)
    assert not ram.is_mounted()
