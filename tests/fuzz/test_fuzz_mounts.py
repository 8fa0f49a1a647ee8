"""Real mounts on a target that goes wrong at random: every byte right or an error, and never a mount left over."""

import os
import random
from contextlib import suppress
from pathlib import Path

import pytest

from iscsifuse.testing.config import TargetConfig, TargetKeys, TargetNode
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.mutator import mutations
from iscsifuse.testing.script import Script
from iscsifuse.testing.target import LoopbackTarget
from support.cli import is_mounted, run_cli

pytestmark = [pytest.mark.fuse, pytest.mark.conformance("B12")]

TARGET = "iqn.2026-11.com.example:mutant"
QUICK = 2
ALL = 40
SIZE = 512 * 1024
PIECE = 128 * 1024
OPTIONS = "timeout=1,login_timeout=2,reconnect_timeout=1"


def mount_and_use(seed: int, point: Path) -> str:
    """What became of it: refused, failed, or right. Whatever else happens fails the test."""
    draw = random.Random(seed)
    contents = [random.Random(lun).randbytes(SIZE) for lun in (0, 1)]
    disks = [Disk.from_bytes(content, lun=lun) for lun, content in enumerate(contents)]
    options = OPTIONS
    if draw.random() < 0.5:
        options += ",header_digest=crc32c,data_digest=crc32c"
    writes = draw.random() < 0.5
    if writes:
        options += ",rw"
    config = TargetConfig(
        nodes=[TargetNode(name=TARGET, disks=disks)],
        keys=TargetKeys(default_time2wait=0, initial_r2t=draw.random() < 0.5),
        script=Script(*mutations(seed), seed=seed),
    )
    with LoopbackTarget(config).in_thread() as target:
        done = run_cli("mount", target.url(target=TARGET), point, "-o", options, timeout=120)
        assert "Traceback" not in done.stderr
        if not is_mounted(point):
            assert done.returncode
            assert done.stderr.startswith("iscsifuse: ")
            return "refused"
        try:
            errors = sum(use(point / f"lun-{lun}", contents[lun]) for lun in (0, 1))
            if writes:
                errors += write(point / "lun-1", target.disk(1))
        finally:
            left = run_cli("umount", point, timeout=120)
        assert not is_mounted(point)
        if not errors:
            assert left.returncode == 0, left.stderr
        return "failed" if errors else "right"


def use(path: Path, content: bytes) -> int:
    """Read all of a disk; how many reads failed."""
    errors = 0
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return 1
    try:
        for offset in range(0, SIZE, PIECE):
            try:
                found = os.pread(file, PIECE, offset)
            except OSError:
                errors += 1
            else:
                assert found == content[offset : offset + PIECE], f"wrong bytes from {offset} of {path.name}"
    finally:
        os.close(file)
    return errors


def write(path: Path, disk: Disk) -> int:
    """Write a piece and flush; how many of these failed. What is flushed is there."""
    piece = random.Random("piece").randbytes(PIECE)
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return 1
    try:
        assert os.pwrite(file, piece, PIECE) == PIECE
        os.fsync(file)
    except OSError:
        return 1
    else:
        assert disk.contents()[PIECE : 2 * PIECE] == piece, "what was flushed isn't there"
        return 0
    finally:
        with suppress(OSError):  # the test knows already, or nothing was written since
            os.close(file)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.slow] if seed >= QUICK else []) for seed in range(ALL)]
)
def test_a_mount_on_a_target_that_goes_wrong(seed: int, tmp_path: Path) -> None:
    point = tmp_path / "m"
    point.mkdir()
    assert mount_and_use(seed, point) in ("refused", "failed", "right")
    assert not is_mounted(point)
    assert list(point.iterdir()) == []
