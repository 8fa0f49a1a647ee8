"""File systems on a LUN: on a loop device, written, checked, still there on a new mount; and Sleuth Kit's view."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from support.cli import Mounted
from support.disks import partitioned_image
from support.store import ONE, Store
from support.tgt import TgtServer

pytestmark = [pytest.mark.fuse, pytest.mark.tgt]


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def loop_device(file: Path, *options: str) -> Iterator[str]:
    device = run("losetup", "--find", "--show", *options, file).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted_on(device: str | Path, point: Path, *options: str) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    run("mount", *options, device, point)
    try:
        yield point
    finally:
        run("umount", point)


def sums(folder: Path) -> str:
    return run("sh", "-c", f"cd '{folder}' && find . -type f -print0 | sort -z | xargs -0 sha256sum")


@pytest.mark.root
@pytest.mark.parametrize(
    "options",
    [pytest.param((), id="buffered"), pytest.param(("--direct-io=on",), id="direct", marks=pytest.mark.slow)],
)
def test_ext4_on_a_loop_device(store: Store, tmp_path: Path, options: tuple[str, ...]) -> None:
    source = tmp_path / "source.tar"
    run("tar", "-C", Path(__file__).parents[2], "-cf", source, "iscsifuse", "tests", "docs", "pyproject.toml")
    inside = tmp_path / "inside"
    with Mounted(store.server.url(ONE), tmp_path / "m", "--rw") as mounted:
        with loop_device(mounted.lun(2), *options) as device:
            run("mkfs.ext4", "-q", device)
            with mounted_on(device, inside):
                for copy in range(8):
                    (inside / str(copy)).mkdir()
                    run("tar", "-C", inside / str(copy), "-xf", source)
                written = sums(inside)
        run("e2fsck", "-fn", mounted.lun(2))
    assert written.count("\n") > 400
    run("e2fsck", "-fn", store.empty)
    with Mounted(store.server.url(ONE), tmp_path / "m") as mounted:
        run("e2fsck", "-fn", mounted.lun(2))
        with mounted_on(mounted.lun(2), inside, "-o", "loop,ro"):
            assert sums(inside) == written


@pytest.mark.parametrize("table", ["mbr", "gpt"])
def test_sleuth_kit_sees_what_is_on_the_backing_file(
    tgt_server: TgtServer, tmp_path: Path, table: Literal["mbr", "gpt"]
) -> None:
    image = partitioned_image(tmp_path / "disk.img", table=table)
    tgt_server.add_target(ONE)
    tgt_server.add_lun(ONE, 1, image.path)
    with Mounted(tgt_server.url(ONE), tmp_path / "m") as mounted:
        lun = mounted.lun(1)
        assert run("mmls", lun) == run("mmls", image.path)
        for partition in image.partitions:
            where = ("-o", str(partition.offset // 512))
            listing = run("fls", "-r", "-p", *where, lun)
            assert listing == run("fls", "-r", "-p", *where, image.path)
            for name, content in partition.files.items():
                inode = (
                    next(line for line in listing.splitlines() if line.endswith(f"\t{name}")).split()[1].rstrip(":")
                )
                got = subprocess.run(["icat", *where, lun, inode], capture_output=True, check=True, timeout=60).stdout
                assert got == content, (partition.kind, name)
