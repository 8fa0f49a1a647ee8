"""Mounts of real targets: what a whole portal looks like, and what is left when a target goes."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from support.cli import Mounted, is_mounted, run_cli
from support.disks import random_file, sparse
from support.ports import HOST, wait_until
from support.relay import Relay
from support.tgt import TgtServer

pytestmark = [pytest.mark.fuse, pytest.mark.tgt]

NAME = "iqn.2026-11.com.example:disk"
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "images"
    made.mkdir()
    return made


@pytest.fixture
def point(tmp_path: Path) -> Path:
    made = tmp_path / "mnt"
    made.mkdir()
    return made


def test_a_large_portal_is_mounted_at_once(tgt_server: TgtServer, folder: Path, point: Path) -> None:
    for target in range(8):
        tgt_server.add_target(f"{NAME}{target}")
        for lun in range(1, 9):
            tgt_server.add_lun(f"{NAME}{target}", lun, sparse(folder / f"{target}-{lun}", MIB * (target + lun)))
    started = time.monotonic()
    with Mounted(tgt_server.url(), point) as mounted:
        assert time.monotonic() - started < 9  # 3 s is the goal on an idle machine: `scripts/bench` measures it
        assert len(list(point.rglob("lun-*"))) == 64
        assert mounted.lun(8, target=f"{NAME}7").stat().st_size == 15 * MIB
        assert not mounted.lun(0, target=f"{NAME}7").exists()
        assert len(mounted.status_file()["sessions"]) == 8
        assert len(tgt_server.connections()) == 8
    assert tgt_server.connections() == []


def test_bytes_arrive(tgt_server: TgtServer, folder: Path, point: Path) -> None:
    image, data = sparse(folder / "image", 32 * MIB), random_file(folder / "data", 32 * MIB)
    tgt_server.add_target(NAME)
    tgt_server.add_lun(NAME, 1, image)
    with Mounted(tgt_server.url(NAME), point, "--rw") as mounted:
        subprocess.run(["dd", f"if={data}", f"of={mounted.lun(1)}", "bs=1M", "status=none"], check=True)
        subprocess.run(["cmp", data, mounted.lun(1)], check=True)
    assert image.read_bytes() == data.read_bytes()
    with Mounted(tgt_server.url(NAME, 1), point, "-o", "direct_io") as mounted:
        subprocess.run(["cmp", data, mounted.lun(1)], check=True)


@pytest.mark.parametrize("delay", [0.0, 0.005])
def test_hops_are_read_ahead_where_the_target_is_far_away(
    tgt_server: TgtServer, folder: Path, point: Path, delay: float
) -> None:
    """From directory to directory, say: each hop a round trip, or nearly none of them."""
    image = random_file(folder / "image", 32 * MIB)
    tgt_server.add_target(NAME)
    tgt_server.add_lun(NAME, 1, image)
    content = image.read_bytes()
    hops = range(0, len(content), 128 << 10)
    with (
        Relay(tgt_server.port, delay=delay) as relay,
        Mounted(f"iscsi://{HOST}:{relay.port}/{NAME}/1", point) as mounted,
    ):
        with mounted.lun(1).open("rb", buffering=0) as file:
            for hop in hops:
                assert os.pread(file.fileno(), 4096, hop) == content[hop : hop + 4096]
        status = mounted.status_file()
        (reads,) = (row["calls"] for row in status["commands"] if row["name"] == "READ(10)")
        (ahead,) = (lun["cache"]["read_ahead_commands"] for lun in status["luns"])
        if delay:
            assert reads - ahead < len(hops) / 4
        else:
            assert (reads, ahead) == (len(hops), 0)


def test_a_lun_on_a_file(tgt_server: TgtServer, folder: Path, tmp_path: Path) -> None:
    image = random_file(folder / "image", MIB)
    tgt_server.add_target(NAME)
    tgt_server.add_lun(NAME, 1, image)
    file = tmp_path / "disk.img"
    file.touch()
    with Mounted(tgt_server.url(NAME, 1), file):
        assert file.read_bytes() == image.read_bytes()
    assert file.stat().st_size == 0


def test_a_target_that_lets_nobody_in_leaves_the_others(tgt_server: TgtServer, folder: Path, point: Path) -> None:
    tgt_server.add_target(f"{NAME}-open")
    tgt_server.add_lun(f"{NAME}-open", 1, sparse(folder / "image", MIB))
    tgt_server.add_target(f"{NAME}-locked", chap=("someone", "a secret that is long"))
    done = run_cli("mount", tgt_server.url(), point)
    assert done.returncode == 64, done.stderr
    assert f"{NAME}-locked" in done.stderr
    assert [path.name for path in point.iterdir()] == [f"{NAME}-open"]
    assert run_cli("umount", point).returncode == 0


@pytest.mark.parametrize(
    ("target", "lun", "words"),
    [
        (NAME, 7, "has no LUN 7; the LUNs it shows: 0, 1"),
        (NAME, 0, "is not a disk, but a storage array controller"),
        (f"{NAME}-none", None, "not found"),
    ],
)
def test_what_is_not_there(
    tgt_server: TgtServer, folder: Path, point: Path, target: str, lun: int | None, words: str
) -> None:
    tgt_server.add_target(NAME)
    tgt_server.add_lun(NAME, 1, sparse(folder / "image", MIB))
    done = run_cli("mount", tgt_server.url(target, lun), point)
    assert done.returncode == 32
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not is_mounted(point)
    assert tgt_server.connections() == []


@pytest.mark.conformance(105)
def test_umount_works_without_the_target(tgt_server: TgtServer, folder: Path, point: Path) -> None:
    tgt_server.add_target(NAME)
    tgt_server.add_lun(NAME, 1, sparse(folder / "one", MIB))
    tgt_server.add_lun(NAME, 2, sparse(folder / "two", MIB))
    limits = ("-o", "timeout=2,reconnect_timeout=2")
    with Mounted(tgt_server.url(NAME), point, *limits):
        tgt_server.kill()
    tgt_server.start()
    with Mounted(tgt_server.url(NAME), point, "--rw", *limits) as mounted:
        number = os.open(mounted.lun(2), os.O_WRONLY)
        tgt_server.kill()
        os.write(number, bytes(4096))
        with pytest.raises(OSError, match="Input/output"):
            os.close(number)
        done = run_cli("umount", point)
        assert done.returncode == 32
        assert "is unmounted, but data is lost: LUN 2 of" in done.stderr
        assert "LUN 1 of" not in done.stderr
        assert not is_mounted(point)


def test_tgtd_keeps_the_memory_of_its_commands(tgt_server: TgtServer, folder: Path, point: Path) -> None:
    """Otherwise each page that is written costs it a page fault."""
    pages = 32768
    tgt_server.add_target(NAME)
    tgt_server.add_lun(NAME, 1, sparse(folder / "image", pages * 4096))
    with Mounted(tgt_server.url(NAME), point, "--rw") as mounted:

        def write_all() -> int:
            before = tgt_server.page_faults()
            words = ["dd", "if=/dev/zero", f"of={mounted.lun(1)}", "bs=1M", f"count={pages // 256}"]
            subprocess.run([*words, "conv=fsync,notrunc", "status=none"], check=True)
            return tgt_server.page_faults() - before

        def lists() -> int:
            (row,) = [row for row in mounted.status_file()["commands"] if row["name"] == "REPORT LUNS"]
            return int(row["calls"])

        assert write_all() < pages / 2
        seen = lists()
        tgt_server.restart()  # It has forgotten, and is told again.
        wait_until(lambda: lists() > seen, timeout=20, what="a new session")
        assert write_all() < pages / 2
