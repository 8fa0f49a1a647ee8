import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_fakes import untouched_environment

from iscsifuse.cli import main, mount_helper
from iscsifuse.errors import ConnectError, MountError, UsageError
from iscsifuse.initiator.settings import Portal
from iscsifuse.mount.plan import MountPlan

IQN = "iqn.2004-04.com.example:disk"
MIB = 1 << 20
Run = Callable[[list[str]], int]


class Daemon:
    """Takes plans in place of iscsifuse.mount.daemon."""

    def __init__(self) -> None:
        self.plans: list[MountPlan] = []
        self.outcome: int | Exception = 0

    def mount(self, plan: MountPlan) -> int:
        self.plans.append(plan)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    @property
    def plan(self) -> MountPlan:
        [plan] = self.plans
        return plan


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    untouched_environment(monkeypatch)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    fake = Daemon()
    monkeypatch.setattr("iscsifuse.mount.daemon.mount", fake.mount)
    yield fake
    root.handlers[:], root.level = handlers, level


def test_defaults_are_the_plans_own(daemon: Daemon) -> None:
    assert main.run(["mount", f"iscsi://h/{IQN}", "/mnt/x"]) == 0
    plan = daemon.plan
    assert plan == MountPlan(
        source=f"iscsi://h/{IQN}",
        portal=Portal("h"),
        target_name=IQN,
        lun=None,
        mountpoint=Path("/mnt/x"),
        session=plan.session,
    )
    assert plan.session.read_only
    assert plan.session.chap is None


def test_everything_that_can_be_said(daemon: Daemon, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret-of-the-file\n")
    secret.chmod(0o600)
    options = (
        "rw,allow_other,uid=1,gid=2,mode=640,cache_size=8M,read_ahead=1M,write=through,timeout=5,login_timeout=6,"
        f"reconnect_timeout=7,header_digest=crc32c,data_digest=crc32c,initiator_name={IQN}2,chap_user=alice,"
        f"chap_secret_file={secret},lun=1:3"
    )
    assert main.run(["mount", "iscsi://10.0.0.1:3261", str(tmp_path), "-o", options, "-f", "-vv"]) == 0
    plan = daemon.plan
    assert (plan.portal, plan.target_name, plan.lun, plan.luns) == (Portal("10.0.0.1", 3261), None, None, (1, 3))
    assert (plan.read_write, plan.foreground, plan.allow_other, plan.verbosity) == (True, True, True, 2)
    assert (plan.uid, plan.gid, plan.mode) == (1, 2, 0o640)
    assert (plan.cache_size, plan.read_ahead, plan.write_behind, plan.direct_io) == (8 * MIB, MIB, False, False)
    session = plan.session
    assert (session.timeout, session.login_timeout, session.reconnect_timeout) == (5.0, 6.0, 7.0)
    assert (session.header_digest, session.data_digest, session.read_only) == (True, True, False)
    assert session.initiator_name == f"{IQN}2"
    assert session.chap is not None
    assert (session.chap.user, session.chap.secret) == ("alice", b"secret-of-the-file")


@pytest.mark.parametrize(
    ("arguments", "write_behind", "direct_io", "read_write"),
    [
        (["--direct-io", "--rw"], False, True, True),
        (["-o", "direct_io,write=behind"], False, True, False),
        (["-o", "sync,rw"], False, False, True),
        (["--rw", "-o", "ro"], True, False, False),
    ],
)
def test_modes(daemon: Daemon, arguments: list[str], write_behind: bool, direct_io: bool, read_write: bool) -> None:
    assert main.run(["mount", "iscsi://h", "/mnt", *arguments]) == 0
    plan = daemon.plan
    assert (plan.write_behind, plan.direct_io, plan.read_write) == (write_behind, direct_io, read_write)
    assert plan.session.read_only is not read_write


def test_as_mount_fuse_calls_it(daemon: Daemon) -> None:
    assert main.run([f"iscsi://h/{IQN}/1", "/mnt/x", "-o", "rw,noexec,nosuid,nodev,cache_size=1M,dev,suid"]) == 0
    plan = daemon.plan
    assert (plan.target_name, plan.lun, plan.read_write, plan.cache_size) == (IQN, 1, True, MIB)
    assert not plan.foreground


@pytest.mark.conformance("B11")
def test_no_password_in_a_plans_words(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"iscsi://alice%s3cret-s3cret@h/{IQN}?target_user=t&target_password=t-s3cret"
    assert main.run(["mount", url, "/mnt"]) == 0
    assert "s3cret" not in repr(daemon.plan)
    assert daemon.plan.source == f"iscsi://alice@h/{IQN}?target_user=t"
    assert "can be seen" in capsys.readouterr().err


def test_relative_mount_point(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main.run(["mount", "iscsi://h", "a/../b"])
    assert daemon.plan.mountpoint == tmp_path / "b"


def test_lun_list_that_repeats_the_url(daemon: Daemon) -> None:
    assert main.run(["mount", f"iscsi://h/{IQN}/1", "/mnt", "--lun", "1"]) == 0
    assert (daemon.plan.lun, daemon.plan.luns) == (1, ())


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (0, 0, ""),
        (64, 64, ""),
        (32, 32, ""),
        (8, 8, ""),
        (UsageError("not empty"), 1, "iscsifuse: not empty\n"),
        (MountError("no FUSE"), 32, "iscsifuse: no FUSE\n"),
        (ConnectError("no answer"), 32, "iscsifuse: no answer\n"),
        (OSError(12, "Cannot allocate memory"), 2, "iscsifuse: Cannot allocate memory\n"),
        (PermissionError(1, "Operation not permitted"), 1, "iscsifuse: Operation not permitted\n"),
    ],
)
def test_exit_status(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], outcome: int | Exception, code: int, message: str
) -> None:
    daemon.outcome = outcome
    arguments = [f"iscsi://h/{IQN}", "/mnt", "-o", "rw"]
    assert main.run(["mount", *arguments]) == code
    assert capsys.readouterr() == ("", message)
    assert mount_helper.run(arguments) == code
    assert capsys.readouterr() == ("", message)


# --- mount.iscsifuse ---


@pytest.mark.parametrize(
    "arguments",
    [
        [f"iscsi://h/{IQN}", "/mnt", "-o", "rw,noatime,sync,relatime,uid=0,_netdev,nofail,user,x-systemd.automount"],
        [f"iscsi://h/{IQN}", "/mnt", "-s", "-n", "-v", "-o", "rw"],
        [f"iscsi://h/{IQN}", "/mnt", "-N", "/proc/1/ns/mnt", "-o", "rw,defaults", "-t", "iscsifuse.x"],
        ["-o", "ro", f"iscsi://h/{IQN}", "/mnt", "-o", "rw"],
        [f"iscsi://h/{IQN}", "/mnt", "-sv", "-orw"],
    ],
)
def test_helper(daemon: Daemon, arguments: list[str]) -> None:
    assert mount_helper.run(arguments) == 0
    plan = daemon.plan
    assert (plan.source, plan.mountpoint) == (f"iscsi://h/{IQN}", Path("/mnt"))
    assert plan.read_write
    assert not plan.foreground


@pytest.mark.parametrize("flags", [["-f"], ["-sfnv"], ["-f", "-o", "rw,chap_user=nobody-has-a-secret"]])
def test_helper_fake(daemon: Daemon, flags: list[str]) -> None:
    assert mount_helper.run([f"iscsi://h/{IQN}", "/mnt", *flags]) == 0
    assert daemon.plans == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["iscsi://h"],
        ["h", "/mnt"],
        ["h", "/mnt", "-f"],
        ["iscsi://h", "/mnt", "-o", "what"],
        ["iscsi://h", "/mnt", "-f", "-o", "what"],
        ["iscsi://h", "/mnt", "--rw"],
        ["iscsi://h", "/mnt", "-o"],
        ["iscsi://h", "/mnt", "-o", "remount,rw"],
    ],
)
def test_helper_usage(daemon: Daemon, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert mount_helper.run(arguments) == 1
    output = capsys.readouterr()
    assert output.err.startswith("iscsifuse: ")
    assert output.err.count("\n") == 1
    assert daemon.plans == []


def test_helper_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert mount_helper.run(["--help"]) == 0
    assert "mount -t iscsifuse URL MOUNTPOINT" in capsys.readouterr().out


# --- umount ---


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(0, 0), (UsageError("no"), 1), (PermissionError(1, "no"), 1), (MountError("no"), 32), (OSError(5, "no"), 2)],
)
def test_umount(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outcome: int | Exception, code: int
) -> None:
    asked: list[str] = []

    def umount(mountpoint: str | os.PathLike[str]) -> int:
        asked.append(os.fspath(mountpoint))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr("iscsifuse.mount.client.umount", umount)
    assert main.run(["umount", "/mnt/x"]) == code
    assert asked == ["/mnt/x"]
    assert capsys.readouterr() == ("", "" if code == 0 else "iscsifuse: no\n")
