"""The main job against tgtd: what a portal offers becomes files, and their bytes are the backing files' bytes."""

import json
import os
import random
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.cli import Mounted, program, run_cli
from support.disks import random_file, sha256
from support.quick import needs_quick
from support.store import MIB, ONE, TIB, TWO, Store

pytestmark = [pytest.mark.fuse, pytest.mark.tgt]


def test_discover_and_ls_find_what_another_initiator_finds(store: Store) -> None:
    theirs = subprocess.run(
        ["iscsi-ls", "-s", store.server.url()], capture_output=True, text=True, timeout=30, check=True
    ).stdout
    expected = {(name, portal) for name, portal in re.findall(r"Target:(\S+) Portal:(\S+)", theirs)}
    discovered = run_cli("discover", store.server.url())
    assert discovered.returncode == 0, discovered.stderr
    ours = {(name, portal) for portal, name in (line.split(" ") for line in discovered.stdout.splitlines())}
    assert ours == expected
    assert len(ours) == 2

    listed = json.loads(run_cli("ls", store.server.url(), "--json").stdout)
    disks = [lun for target in listed["targets"] for lun in target["luns"] if lun["type"] == "disk"]
    assert len(disks) == theirs.count("DIRECT_ACCESS") == 4
    assert sorted(lun["size"] for lun in disks) == sorted([96 * MIB, 256 * MIB, 3 * TIB, 64 * MIB])


def test_a_portal_becomes_a_tree_of_disks(store: Store, tmp_path: Path) -> None:
    with Mounted(store.server.url(), tmp_path / "m") as mounted:
        found = {str(path.relative_to(mounted.point)): path.stat() for path in mounted.point.rglob("lun-*")}
        assert {name: status.st_size for name, status in found.items()} == {
            f"{ONE}/lun-1": 96 * MIB,
            f"{ONE}/lun-2": 256 * MIB,
            f"{TWO}/lun-1": 3 * TIB,
            f"{TWO}/lun-2": 64 * MIB,
        }
        assert {status.st_mode & 0o7777 for status in found.values()} == {0o400}
        assert os.listdir(mounted.point) == [ONE, TWO]  # noqa: PTH208 - the order that the directory has
        with pytest.raises(OSError, match="Read-only"):
            mounted.lun(1, target=ONE).open("r+b")


def test_a_mount_by_somebody_without_standard_streams(store: Store, tmp_path: Path) -> None:
    """Nothing that is opened meanwhile may get their numbers: what is printed there would reach a target."""
    point = tmp_path / "m"
    point.mkdir()
    mount = [program("iscsifuse"), "mount", store.server.url(ONE), str(point)]
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *mount]
    done = subprocess.run(command, timeout=60, check=False)
    try:
        assert done.returncode == 0
        assert sha256(point / "lun-1") == sha256(store.random)
        pid = json.loads(run_cli("status", point, "--json").stdout)["pid"]
        assert {str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in range(3)} == {"/dev/null"}
    finally:
        ended = run_cli("umount", point)
    assert ended.returncode == 0


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("-o", "direct_io"), marks=pytest.mark.slow),
        ("-o", "cache_size=1M"),
        pytest.param(("-o", "read_ahead=0"), marks=pytest.mark.slow),
    ],
)
def test_a_whole_disk_reads_as_its_backing_file(store: Store, tmp_path: Path, options: tuple[str, ...]) -> None:
    with Mounted(store.server.url(ONE), tmp_path / "m", *options) as mounted:
        assert sha256(mounted.lun(1)) == sha256(store.random)


@pytest.mark.slow
def test_a_gibibyte_reads_as_its_backing_file(store: Store, tmp_path: Path) -> None:
    backing = random_file(tmp_path / "gib.img", 1 << 30, seed=11)
    store.server.add_lun(ONE, 3, backing)
    with Mounted(store.server.url(ONE), tmp_path / "m") as mounted:
        assert sha256(mounted.lun(3)) == sha256(backing)


@pytest.mark.parametrize(
    ("write", "digests"),
    [
        pytest.param("behind", False, id="behind-plain", marks=pytest.mark.slow),
        pytest.param("behind", True, id="behind-digests"),
        pytest.param("through", False, id="through-plain"),
        pytest.param("through", True, id="through-digests", marks=pytest.mark.slow),
    ],
)
def test_odd_writes_land_where_they_should(store: Store, tmp_path: Path, write: str, digests: bool) -> None:
    options = ["--rw", "-o", f"write={write}"]
    if digests:
        for key in ("HeaderDigest", "DataDigest"):
            store.server.set_param(TWO, key, "CRC32C")
        options += ["--header-digest", "crc32c", "--data-digest", "crc32c"]
    chance = random.Random(f"{write}{digests}")
    model = bytearray(64 * MIB)
    with Mounted(store.server.url(TWO), tmp_path / "m", *options) as mounted:
        descriptor = os.open(mounted.lun(2), os.O_RDWR)
        try:
            for _ in range(150):
                offset = chance.randrange(len(model))
                data = chance.randbytes(min(chance.choice((1, 511, 4097, 70001, 1300007)), len(model) - offset))
                assert os.pwrite(descriptor, data, offset) == len(data)
                model[offset : offset + len(data)] = data
                at = chance.randrange(len(model) - 5000)
                assert os.pread(descriptor, 5000, at) == model[at : at + 5000]
            os.fsync(descriptor)
            assert store.large_blocks.read_bytes() == model
        finally:
            os.close(descriptor)
    assert store.large_blocks.read_bytes() == model


def test_dd_of_odd_sizes_at_odd_offsets(store: Store, tmp_path: Path) -> None:
    piece = random_file(tmp_path / "piece", 7777 * 33, seed=3)
    with Mounted(store.server.url(ONE, 2), tmp_path / "m", "--rw") as mounted:
        subprocess.run(
            ["dd", f"if={piece}", f"of={mounted.lun(2)}", "bs=7777", "seek=13", "conv=notrunc,fsync"],
            check=True,
            capture_output=True,
            timeout=60,
        )
    with store.empty.open("rb") as disk:
        disk.seek(13 * 7777)
        assert disk.read(piece.stat().st_size) == piece.read_bytes()


def test_beyond_two_tebibytes(store: Store, tmp_path: Path) -> None:
    places = (2 * TIB - 3, 2 * TIB, 2 * TIB + 4097, 3 * TIB - 512, 2 * TIB - 512 * 1024)
    with Mounted(store.server.url(TWO), tmp_path / "m", "--rw") as mounted:
        descriptor = os.open(mounted.lun(1), os.O_RDWR)
        try:
            for number, place in enumerate(places):
                assert os.pwrite(descriptor, b"%08d" % number, place) == 8
            # One write whose blocks lie on both sides of LBA 2^32.
            across = random.Random(5).randbytes(MIB)
            assert os.pwrite(descriptor, across, 2 * TIB - MIB // 2) == MIB
            os.fsync(descriptor)
            assert os.pread(descriptor, MIB, 2 * TIB - MIB // 2) == across
        finally:
            os.close(descriptor)
        status = mounted.status_file()
    names = {row["name"] for row in status["commands"]}
    assert {"WRITE(16)", "WRITE(10)"} <= names
    with store.huge.open("rb") as disk:
        disk.seek(2 * TIB - MIB // 2)
        assert disk.read(MIB) == across
        disk.seek(3 * TIB - 512)
        assert disk.read(8) == b"00000003"
        disk.seek(2 * TIB + MIB)
        assert disk.read(MIB) == bytes(MIB)


def test_the_end_of_a_disk(store: Store, tmp_path: Path) -> None:
    with Mounted(store.server.url(ONE), tmp_path / "m", "--rw") as mounted:
        descriptor = os.open(mounted.lun(2), os.O_RDWR | os.O_TRUNC)
        try:
            size = 256 * MIB
            assert os.fstat(descriptor).st_size == size
            os.ftruncate(descriptor, 5)
            assert os.fstat(descriptor).st_size == size
            assert os.pwrite(descriptor, b"abcdef", size - 3) == 3
            with pytest.raises(OSError, match="No space left"):
                os.pwrite(descriptor, b"x", size)
            assert os.pread(descriptor, 100, size - 5) == b"\0\0abc"
            assert os.pread(descriptor, 100, size) == b""
        finally:
            os.close(descriptor)


def test_one_lun_over_a_regular_file(store: Store, tmp_path: Path) -> None:
    point = tmp_path / "disk"
    point.write_text("what was here before")
    with Mounted(store.server.url(ONE, 1), point):
        assert point.stat().st_size == 96 * MIB
        assert sha256(point) == sha256(store.random)
        shown = run_cli("status", point, "--json")
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout)["luns"][0]["lun"] == 1
    assert point.read_text() == "what was here before"


def test_nothing_is_ever_written_by_a_read_only_mount(store: Store, tmp_path: Path) -> None:
    before = sha256(store.random)
    with Mounted(store.server.url(ONE), tmp_path / "m") as mounted:
        subprocess.run(["cp", mounted.lun(1), tmp_path / "copy"], check=True, timeout=60)
        for attempt in (
            ["dd", "if=/dev/zero", f"of={mounted.lun(1)}", "count=1"],
            ["truncate", "-s0", str(mounted.lun(1))],
        ):
            assert subprocess.run(attempt, capture_output=True, check=False, timeout=30).returncode != 0
        commands = {row["name"] for row in mounted.status_file()["commands"]}
    assert not {name for name in commands if "WRITE" in name or "SYNCHRONIZE" in name}
    assert sha256(store.random) == before


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_quick), False], ids=["quick", "pure"])
def test_small_reads_and_writes_all_over_a_disk(store: Store, tmp_path: Path, compiled: bool) -> None:
    """With the short cuts of `iscsifuse.quick`, and without: eight programs, 4 KiB each time, some of them again."""
    chance = random.Random(20261122)
    with Mounted(
        store.server.url(ONE), tmp_path / "m", "--rw", env={"ISCSIFUSE_PURE": None if compiled else "1"}
    ) as mounted:
        pid = json.loads(run_cli("status", tmp_path / "m", "--json").stdout)["pid"]
        assert ("_quick." in Path(f"/proc/{pid}/maps").read_text()) == compiled
        expected = store.random.read_bytes()
        with mounted.lun(1).open("rb", buffering=0) as disk, ThreadPoolExecutor(8) as programs:
            os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            places = [chance.randrange(96 * MIB // 4096) * 4096 for _ in range(3000)]
            found = programs.map(lambda place: os.pread(disk.fileno(), 4096, place), places)
            for place, data in zip(places, found, strict=True):
                assert data == expected[place : place + 4096]
        with mounted.lun(2).open("r+b", buffering=0) as disk:
            for place in places[:200]:
                os.pwrite(disk.fileno(), expected[place : place + 4096], place)
            os.fsync(disk.fileno())
    written = store.empty.read_bytes()
    assert all(written[place : place + 4096] == expected[place : place + 4096] for place in places[:200])
    assert written.count(0) > len(written) - 201 * 4096
