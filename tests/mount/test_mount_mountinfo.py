"""The mount table."""

import os
import threading
from pathlib import Path

import pytest

from iscsifuse.mount.mountinfo import find_mount, is_dead, parse_mountinfo, read_mounts, where

TABLE = rb"""22 1 254:0 / / rw,relatime - ext4 /dev/root rw
43 27 0:40 / /mnt/san rw,nosuid,nodev - fuse.iscsifuse iscsi://san/ rw,user_id=1000,group_id=1000
44 27 0:41 / /mnt/a\040b\134c rw,nosuid shared:1 master:2 - fuse.iscsifuse iscsi://x/\011y ro,user_id=0
45 27 0:42 / /mnt/san rw - tmpfs tmpfs rw
nonsense
46 27 x:y / /mnt/y rw - tmpfs tmpfs rw
47 27 0:43 / /mnt/z rw - tmpfs
"""


def test_lines_are_parsed() -> None:
    root, san, blank, above = parse_mountinfo(TABLE.splitlines(keepends=True))
    assert (root.mountpoint, root.is_ours, root.owner) == ("/", False, None)
    assert (san.device, san.source, san.owner, san.connection) == ("0:40", "iscsi://san/", 1000, 40)
    assert san.is_ours
    assert (blank.mountpoint, blank.source, blank.owner) == ("/mnt/a b\\c", "iscsi://x/\ty", 0)
    assert "ro" in blank.options.split(",")
    assert above.fs_type == "tmpfs"


def test_the_topmost_mount_is_found() -> None:
    mounts = parse_mountinfo(TABLE.splitlines())
    found = find_mount("/mnt/san", mounts)
    assert found is not None
    assert found.fs_type == "tmpfs"
    assert find_mount("/mnt/./a b\\c/../a b\\c", mounts) == mounts[2]
    assert find_mount("/mnt/nothing", mounts) is None


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "up").symlink_to(tmp_path)
    line = f"43 27 0:40 / {tmp_path.resolve()}/real rw - fuse.iscsifuse x rw".encode()
    mounts = parse_mountinfo([line])
    for name in ("real", "link", "up/real", "up/link"):
        assert find_mount(tmp_path / name, mounts) == mounts[0]
    assert where(tmp_path / "up" / "link") == str(tmp_path.resolve() / "link")


def test_this_machine_has_a_root() -> None:
    assert find_mount("/") in read_mounts()


def test_only_a_dead_mount_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_dead(str(tmp_path))
    assert not is_dead(str(tmp_path / "nothing"))

    def no_daemon(*_: object) -> int:
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(os, "open", no_daemon)
    assert is_dead(str(tmp_path))


@pytest.mark.expect_log("can't look whether .* is dead: can't start new thread")
def test_who_may_have_no_more_threads_takes_a_mount_to_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert not is_dead(str(tmp_path))
