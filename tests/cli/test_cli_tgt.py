"""The commands as a user runs them, against Debian's tgt."""

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from iscsifuse.cli.main import run
from support.ports import free_port
from support.process import sbin_path
from support.tgt import TgtServer

pytestmark = [
    pytest.mark.tgt,
    pytest.mark.skipif(shutil.which("tgtd", path=sbin_path()) is None, reason="needs tgtd (package tgt)"),
]
fuse = pytest.mark.skipif(
    not Path("/dev/fuse").exists() or shutil.which("fusermount3") is None, reason="needs /dev/fuse and fusermount3"
)

PLAIN, CLOSED, MUTUAL = (f"iqn.2004-04.com.example:{name}" for name in ("plain", "closed", "mutual"))
USER, SECRET = "alice", "secret-of-alice"
TARGET_USER, TARGET_SECRET = "target", "secret-of-the-target"
SIZE = 8 << 20


@dataclass
class San:
    server: TgtServer
    folder: Path

    def url(self, target: str | None = None, lun: int | None = None, *, user: str = "", query: str = "") -> str:
        url = self.server.url(target, lun, query=query)
        return url.replace("iscsi://", f"iscsi://{user}@") if user else url

    def backing(self, number: int) -> Path:
        return self.folder / f"disk{number}"


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    folder = tmp_path_factory.mktemp("tgt")
    for number in range(3):
        (folder / f"disk{number}").write_bytes(os.urandom(SIZE))
    with TgtServer(folder) as server:
        server.add_target(PLAIN, params={"HeaderDigest": "None,CRC32C", "DataDigest": "None,CRC32C"})
        server.add_lun(PLAIN, 1, folder / "disk0", vendor="ACME", product="Turbo", serial="SERIAL-1")
        server.add_lun(PLAIN, 300, folder / "disk1", block_size=4096, readonly=True)
        server.add_target(CLOSED, chap=(USER, SECRET))
        server.add_lun(CLOSED, 1, folder / "disk2")
        server.add_target(MUTUAL, chap=(USER, SECRET), mutual=(TARGET_USER, TARGET_SECRET))
        server.add_lun(MUTUAL, 1, folder / "disk2")
        yield San(server, folder)


def iscsifuse(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command: in a process of its own where it forks, else in this one, which is much quicker."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("LIBISCSI_CHAP_")]:
            patch.delenv(name)
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        if arguments[0] in ("discover", "ls", "info"):
            out, err = io.StringIO(), io.StringIO()
            with redirect_stdout(out), redirect_stderr(err):
                code = run(arguments)
            return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
        return subprocess.run(
            [sys.executable, "-m", "iscsifuse.cli", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_discover(san: San) -> None:
    done = iscsifuse("discover", san.server.portal)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == sorted(
        f"{san.server.portal},1 {name}" for name in (PLAIN, CLOSED, MUTUAL)
    )
    assert iscsifuse("discover", san.url()).stdout == done.stdout


@pytest.mark.skipif(shutil.which("iscsi-ls") is None, reason="needs iscsi-ls (package libiscsi-bin)")
def test_discover_as_libiscsi_does(san: San) -> None:
    theirs = subprocess.run(["iscsi-ls", san.url()], capture_output=True, text=True, timeout=20, check=True).stdout
    said = {f"{portal} {name}" for name, portal in re.findall(r"^Target:(\S+) Portal:(\S+)$", theirs, re.MULTILINE)}
    assert len(said) == 3
    assert said == set(iscsifuse("discover", san.server.portal).stdout.splitlines())


def test_ls(san: San) -> None:
    done = iscsifuse("ls", san.url(PLAIN))
    assert (done.returncode, done.stderr) == (0, "")
    header, first, second, third = (re.split(r"\s{2,}", line) for line in done.stdout.splitlines())
    assert header == ["TARGET", "LUN", "TYPE", "SIZE", "BLOCK", "VENDOR", "MODEL", "SERIAL", "PROTECTED"]
    assert first[:3] == [PLAIN, "0", "storage array controller"]
    assert second == [PLAIN, "1", "disk", "8.0 MiB", "512", "ACME", "Turbo", "SERIAL-1", "no"]
    assert third[:5] == [PLAIN, "300", "disk", "8.0 MiB", "4096"]
    assert third[-1] == "yes"


def test_ls_of_a_portal_goes_on_where_a_target_refuses(san: San) -> None:
    done = iscsifuse("ls", san.url())
    assert done.returncode == 0
    assert PLAIN in done.stdout
    assert CLOSED not in done.stdout
    assert "CHAP" in done.stderr


def test_info(san: San) -> None:
    document = json.loads(iscsifuse("info", san.url(PLAIN, 300), "--json").stdout)
    assert document["schema"] == 1
    assert document["keys"]["HeaderDigest"] == "None"
    [unit] = document["luns"]
    assert (unit["size"], unit["block_size"], unit["write_protected"]) == (SIZE, 4096, True)
    assert any(one["text"].startswith("naa.") for one in unit["designators"])
    words = iscsifuse("info", san.url(PLAIN, 300)).stdout
    assert f"8.0 MiB ({SIZE} bytes)" in words
    assert "write-protected  yes" in words


def test_digests(san: San) -> None:
    query = "header_digest=crc32c&data_digest=crc32c"
    keys = json.loads(iscsifuse("info", san.url(PLAIN, 1, query=query), "--json").stdout)["keys"]
    assert (keys["HeaderDigest"], keys["DataDigest"]) == ("CRC32C", "CRC32C")
    keys = json.loads(iscsifuse("info", san.url(PLAIN, 1), "--json", "--data-digest", "crc32c").stdout)["keys"]
    assert (keys["HeaderDigest"], keys["DataDigest"]) == ("None", "CRC32C")
    done = iscsifuse("ls", san.url(CLOSED, user=f"{USER}%{SECRET}"), "--header-digest", "crc32c")
    assert done.returncode == 5
    assert "HeaderDigest=CRC32C" in done.stderr


def test_chap_from_everywhere(san: San, tmp_path: Path) -> None:
    secret = tmp_path / "chap"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    flags = ["--chap-user", USER, "--chap-secret-file", str(secret)]
    pair = {"LIBISCSI_CHAP_USERNAME": USER, "LIBISCSI_CHAP_PASSWORD": SECRET}
    for arguments, env in (
        ([san.url(CLOSED), *flags], {}),
        ([san.url(CLOSED, user=USER)], {"CREDENTIALS_DIRECTORY": str(tmp_path)}),
        ([san.url(CLOSED)], pair),
    ):
        done = iscsifuse("ls", *arguments, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count(CLOSED) == 2
    done = iscsifuse("ls", san.url(CLOSED, user=f"{USER}%{SECRET}"))
    assert done.returncode == 0
    assert "can be seen" in done.stderr
    assert SECRET not in done.stderr
    secret.chmod(0o644)
    done = iscsifuse("ls", san.url(CLOSED), *flags)
    assert done.returncode == 1
    assert "chmod 600" in done.stderr


def test_mutual_chap(san: San) -> None:
    user = f"{USER}%{SECRET}"
    for secret, code in ((TARGET_SECRET, 0), ("not-the-targets", 24)):
        query = f"target_user={TARGET_USER}&target_password={secret}"
        done = iscsifuse("ls", san.url(MUTUAL, user=user, query=query))
        assert done.returncode == code, done.stderr
        assert secret not in done.stderr


def test_exit_status(san: San) -> None:
    closed_port = f"iscsi://127.0.0.1:{free_port()}/"
    for arguments, code in (
        (["discover", closed_port], 4),
        (["ls", closed_port], 4),
        (["ls", san.url("iqn.2004-04.com.example:none")], 21),
        (["ls", san.url(PLAIN, 7)], 21),
        (["info", san.url(PLAIN, 7)], 21),
        (["ls", san.url(CLOSED)], 24),
        (["ls", san.url(CLOSED, user=f"{USER}%wrong-secret-wrong")], 24),
        (["info", san.url()], 1),
        (["status", "/"], 1),
        (["umount", "/"], 1),
        (["mount", closed_port, str(san.folder / "none")], 1),
    ):
        done = iscsifuse(*arguments)
        assert done.returncode == code, (arguments, done)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert SECRET not in done.stderr


@fuse
@pytest.mark.fuse
def test_mount_as_mount_fuse_does(san: San, tmp_path: Path) -> None:
    done = iscsifuse(san.url(PLAIN), str(tmp_path), "-o", "rw,dev,suid,_netdev,lun=1,300")
    try:
        assert (done.returncode, done.stdout) == (0, "")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lun-1", "lun-300"]
        assert (tmp_path / "lun-300").read_bytes() == san.backing(1).read_bytes()
        with (tmp_path / "lun-1").open("r+b") as disk:
            disk.seek(12345)
            disk.write(b"through iscsifuse")
            disk.flush()
            os.fsync(disk.fileno())
        with san.backing(0).open("rb") as backing:
            backing.seek(12345)
            assert backing.read(17) == b"through iscsifuse"
        shown = iscsifuse("status", str(tmp_path)).stdout
        assert shown.startswith(f"{tmp_path}: {san.url(PLAIN)}\n  access   read-write, write=behind\n")
        assert re.search(r"^READ\(10\) +[1-9]", shown, re.MULTILINE)
        document = json.loads(iscsifuse("status", str(tmp_path), "--json").stdout)
        assert document["schema"] == 1
        assert [lun["lun"] for lun in document["luns"]] == [1, 300]
    finally:
        ended = iscsifuse("umount", str(tmp_path))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert not os.path.ismount(tmp_path)
    assert san.server.connections() == []
    assert iscsifuse("umount", str(tmp_path)).returncode == 1


@fuse
@pytest.mark.fuse
def test_mount_on_a_file(san: San, tmp_path: Path) -> None:
    file = tmp_path / "disk"
    file.touch()
    assert iscsifuse("mount", san.url(PLAIN, 300), str(file)).returncode == 0
    try:
        assert file.read_bytes() == san.backing(1).read_bytes()
        assert iscsifuse("status", str(file)).stdout.startswith(f"{file}: ")
    finally:
        assert iscsifuse("umount", str(file)).returncode == 0
    assert file.stat().st_size == 0


@fuse
@pytest.mark.fuse
def test_mount_of_a_portal_where_a_target_refuses(san: San, tmp_path: Path) -> None:
    done = iscsifuse("mount", san.url(), str(tmp_path))
    try:
        assert done.returncode == 64
        assert [path.name for path in tmp_path.iterdir()] == [PLAIN]
    finally:
        assert iscsifuse("umount", str(tmp_path)).returncode == 0


@pytest.mark.parametrize(("target", "code"), [("iqn.2004-04.com.example:none", 32), (CLOSED, 32)])
def test_mount_fails(san: San, tmp_path: Path, target: str, code: int) -> None:
    done = iscsifuse("mount", san.url(target), str(tmp_path))
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    assert not os.path.ismount(tmp_path)
