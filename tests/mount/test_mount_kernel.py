"""What is tuned, and that nothing fails where nothing may be."""

import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from iscsifuse.mount import kernel
from iscsifuse.mount.kernel import keep_awake, prepare_process, tune_mount, unmount_call
from iscsifuse.mount.mountinfo import MountEntry

ENTRY = MountEntry(device="0:40", mountpoint="/mnt", fs_type="fuse.iscsifuse", source="x", options="ro")


@pytest.mark.parametrize(("read_ahead", "kilobytes"), [(8 << 20, 512), (128 << 10, 128), (0, 0)])
def test_a_mount_is_tuned_where_the_kernel_lets_us(tmp_path: Path, read_ahead: int, kilobytes: int) -> None:
    bdi = tmp_path / "class/bdi/0:40"
    connection = tmp_path / "fs/fuse/connections/40"
    for folder in (bdi, connection):
        folder.mkdir(parents=True)
    tune_mount(ENTRY, read_ahead=read_ahead, sysfs=tmp_path)
    assert (bdi / "read_ahead_kb").read_text() == f"{kilobytes}\n"
    assert (connection / "max_background").read_text() == "256\n"
    assert int((connection / "congestion_threshold").read_text()) > 256


@pytest.mark.parametrize("libc", [SimpleNamespace(), SimpleNamespace(fsmount=None, fsopen=lambda *_: -1)])
def test_where_it_does_not_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, libc: SimpleNamespace
) -> None:
    monkeypatch.setattr(kernel, "_libc", lambda: libc)
    tune_mount(ENTRY, read_ahead=1 << 20, sysfs=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_process_is_prepared(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            prepare_process(tmp_path)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            adjusted = (tmp_path / "oom_score_adj").read_text() == "-900\n"
            code = 0 if soft == hard and resource.getrlimit(resource.RLIMIT_CORE)[0] == 0 and adjusted else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert before == (resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE))


def test_waking_is_for_a_while_only() -> None:
    def mine(*_: object) -> None:
        raise AssertionError("not while keep_awake holds")

    before = signal.signal(signal.SIGALRM, mine)
    try:
        with keep_awake(0.01):
            assert signal.getitimer(signal.ITIMER_REAL)[1] == pytest.approx(0.01, rel=0.5)
            time.sleep(0.05)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGALRM) is mine
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("lazy", [False, True])
def test_unmounting_nothing_is_an_error(tmp_path: Path, lazy: bool) -> None:
    with pytest.raises(OSError, match=r"Invalid argument|not permitted") as caught:
        unmount_call(str(tmp_path), lazy=lazy)
    assert caught.value.filename == str(tmp_path)
