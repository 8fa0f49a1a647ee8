"""mount(8), umount(8) and fstab, with the two links that the README tells a user to make.

The links have to be in system folders. They are, but only in a mount namespace of the test's own, where the folders
are covered by copies (of links to what was there before), so the machine itself isn't changed. What is mounted in
there is looked at from outside, through ``/proc/<pid>/root``.
"""

import contextlib
import json
import mmap
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from support.cli import program
from support.disks import sha256
from support.ports import free_port, wait_until
from support.process import is_alive
from support.store import MIB, ONE, Store

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.tgt]

#: What a mount helper's line in fstab may hold beside our own options.
FSTAB_WORDS = "_netdev,nofail,user,noauto,x-systemd.requires=network-online.target,x-systemd.mount-timeout=30"


class Namespace:
    """A mount namespace in which programs were added to system folders; it lives from ``with`` to its end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._holder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo made; exec sleep infinity"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        with self._holder.stdout as said:
            assert said.readline() == b"made\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._holder is not None
        self._holder.kill()
        self._holder.wait()

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """A command in the namespace; never raises for its exit code."""
        assert self._holder is not None
        process = f"/proc/{self._holder.pid}"
        words = map(str, command)
        return subprocess.run(
            # Its root, too: these tests may themselves be run in a chroot.
            ["nsenter", f"--mount={process}/ns/mnt", f"--root={process}/root", f"--wd={process}/root", "--", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def do(self, *command: str | Path) -> str:
        """A command that has to succeed, and to say nothing on standard error; returns its standard output."""
        done = self.run(*command)
        assert (done.returncode, done.stderr) == (0, ""), f"{command}: {done}"
        return done.stdout

    def seen(self, path: Path) -> Path:
        """A path of the namespace, for the test to look at."""
        assert self._holder is not None
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def is_mounted(self, point: Path) -> bool:
        assert self._holder is not None
        table = Path(f"/proc/{self._holder.pid}/mounts").read_text()
        return any(line.split()[1] == str(point) for line in table.splitlines())

    def add_program(self, name: str, *, to: str) -> None:
        """``ln -s <our program> <to>``."""
        where = os.path.realpath(to)
        before, cover = (self._folder / f"{kind}{where.replace('/', '-')}" for kind in ("before", "cover"))
        before.mkdir()
        cover.mkdir()
        self.do("mount", "--bind", where, before)
        for entry in os.listdir(where):  # noqa: PTH208 - names are wanted
            (cover / entry).symlink_to(before / entry)
        self.do("mount", "--bind", cover, where)
        self.do("ln", "-s", program(name), to)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[Namespace]:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("unshare and nsenter aren't installed")
    folder = tmp_path / ".namespace"
    folder.mkdir()
    with Namespace(folder) as namespace:
        # As the README says it.
        namespace.add_program("iscsifuse", to="/usr/local/bin")
        namespace.add_program("mount.iscsifuse", to="/sbin")
        yield namespace


@pytest.fixture
def point(tmp_path: Path, system: Namespace) -> Iterator[Path]:
    made = tmp_path / "m"
    made.mkdir()
    yield made
    # Whatever the test has left: the namespace ends only with its last process.
    if system.is_mounted(made):
        with contextlib.suppress(subprocess.TimeoutExpired):
            system.run("umount", made)
        system.run("umount", "-l", made)


def status(system: Namespace, point: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(system.seen(point / ".iscsifuse" / "status.json").read_text())
    return document


def end(system: Namespace, point: Path, how: str, pid: int) -> None:
    """Unmounts with one of the two commands; afterwards neither mount nor daemon is there."""
    if how == "umount(8)":
        system.do("umount", point)
        assert not system.is_mounted(point)
        # umount(8) doesn't wait for the daemon, which writes back and logs out.
        wait_until(lambda: not is_alive(pid), timeout=10, what="the daemon to end")
    else:
        assert system.do("iscsifuse", "umount", point) == ""
        assert not system.is_mounted(point)
        assert not is_alive(pid)


kinds = pytest.mark.parametrize("kind", ["iscsifuse", "fuse.iscsifuse"])
kinds_and_ends = pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("iscsifuse", "umount(8)"),
        ("fuse.iscsifuse", "iscsifuse umount"),
        pytest.param("iscsifuse", "iscsifuse umount", marks=pytest.mark.slow),
        pytest.param("fuse.iscsifuse", "umount(8)", marks=pytest.mark.slow),
    ],
)


@kinds_and_ends
def test_what_is_written_is_on_the_disk_after_umount(
    store: Store, system: Namespace, point: Path, kind: str, how: str
) -> None:
    system.do("mount", "-t", kind, store.server.url(ONE), point, "-o", "rw,lun=1,2")
    assert sorted(path.name for path in system.seen(point).iterdir()) == ["lun-1", "lun-2"]
    pid = status(system, point)["pid"]
    assert len(store.server.connections()) == 1

    chance = random.Random(kind + how)
    model = bytearray(store.random.read_bytes())
    disk = system.seen(point / "lun-1")
    with disk.open("r+b", buffering=0) as file:
        for _ in range(40):
            offset, data = chance.randrange(len(model) - MIB), chance.randbytes(chance.randrange(1, 300_000))
            assert os.pwrite(file.fileno(), data, offset) == len(data)
            model[offset : offset + len(data)] = data
        # Of what is written to memory, nobody but the kernel knows until it is unmounted.
        with mmap.mmap(file.fileno(), 3 * MIB) as window:
            for offset in (0, 123_456, 2 * MIB - 5):
                window[offset : offset + 10] = model[offset : offset + 10] = chance.randbytes(10)
    end(system, point, how, pid)
    assert store.random.read_bytes() == model
    assert sha256(store.empty) == sha256_of_zeros(256 * MIB)
    assert store.server.connections() == []


@cache
def sha256_of_zeros(size: int) -> str:
    from hashlib import sha256 as digest

    state = digest()
    for _ in range(size // MIB):
        state.update(bytes(MIB))
    return state.hexdigest()


@kinds_and_ends
def test_a_line_in_fstab(store: Store, system: Namespace, point: Path, tmp_path: Path, kind: str, how: str) -> None:
    table = tmp_path / "fstab"
    table.write_text(f"# a comment\n{store.server.url(ONE)} {point} {kind} ro,lun=1,mode=440,{FSTAB_WORDS} 0 0\n")
    before = sha256(store.random)
    system.do("mount", "-T", table, point)
    shown = status(system, point)
    assert (shown["read_write"], [lun["lun"] for lun in shown["luns"]]) == (False, [1])
    disk = system.seen(point / "lun-1")
    assert disk.stat().st_mode & 0o7777 == 0o440
    with pytest.raises(OSError, match="Read-only"):
        disk.open("r+b")
    assert sha256(disk) == before
    end(system, point, how, shown["pid"])
    assert sha256(store.random) == before


@pytest.mark.parametrize("kind", ["iscsifuse", pytest.param("fuse.iscsifuse", marks=pytest.mark.slow)])
def test_mount8_says_rw_where_nobody_says_ro(store: Store, system: Namespace, point: Path, kind: str) -> None:
    """Its helpers can't tell whether a person wrote it, so the README tells people to write ``ro``."""
    for options, writable in (((), True), (("-o", "ro"), False), (("-r",), False)):
        system.do("mount", "-t", kind, store.server.url(ONE, 1), point, *options)
        shown = status(system, point)
        assert shown["read_write"] is writable
        assert system.seen(point / "lun-1").stat().st_mode & 0o7777 == (0o600 if writable else 0o400)
        end(system, point, "iscsifuse umount", shown["pid"])


def test_one_lun_on_a_regular_file(store: Store, system: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "disk.img"
    file.write_text("what was here before")
    system.do("mount", "-t", "iscsifuse", store.server.url(ONE, 1), file, "-o", "ro")
    assert sha256(system.seen(file)) == sha256(store.random)
    system.do("umount", file)
    assert file.read_text() == system.seen(file).read_text() == "what was here before"


def test_fake_checks_and_mounts_nothing(store: Store, system: Namespace, point: Path) -> None:
    system.do("mount", "-f", "-t", "iscsifuse", store.server.url(ONE), point, "-o", "ro,cache_size=16M")
    assert not system.is_mounted(point)
    assert store.server.connections() == []
    refused = system.run("mount", "-f", "-t", "iscsifuse", store.server.url(ONE), point, "-o", "ro,cache_size=lots")
    assert refused.returncode == 1
    assert refused.stderr.startswith("iscsifuse: 'cache_size=lots': ")


@kinds
def test_a_failure_is_mount8s_failure(store: Store, system: Namespace, point: Path, kind: str) -> None:
    for url, options, code, words in (
        (f"iscsi://127.0.0.1:{free_port()}/", "ro", 32, "connection refused"),
        (store.server.url("iqn.2026-11.example:nope"), "ro", 32, "not found"),
        (store.server.url(ONE), "ro,colour=blue", 1, "there is no option 'colour'"),
        (store.server.url(ONE), "ro,lun=1,7", 64, "LUN 7"),
    ):
        done = system.run("mount", "-t", kind, url, point, "-o", options)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert done.stderr.startswith("iscsifuse: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert system.is_mounted(point) is (code == 64)
    end(system, point, "umount(8)", status(system, point)["pid"])
