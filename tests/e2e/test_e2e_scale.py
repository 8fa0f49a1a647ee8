"""Many LUNs at once: how soon a mount is usable, and how much memory its daemon takes."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.cli import Mounted, run_cli
from support.disks import sparse
from support.store import MIB, ONE, Store
from support.tgt import TgtServer

pytestmark = [pytest.mark.fuse, pytest.mark.tgt]

CACHE = 64 * MIB
BESIDE_CACHE = 80 * MIB


def resident(pid: int) -> int:
    """The most memory that a process had, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} tells nothing of its memory")


def test_64_luns_on_8_targets_are_soon_there(
    tgt_server: TgtServer, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    for target in range(8):
        name = f"iqn.2026-11.example:many{target}"
        tgt_server.add_target(name)
        for lun in range(1, 9):
            tgt_server.add_lun(name, lun, sparse(tmp_path / f"{target}-{lun}.img", 8 * MIB))
    run_cli("--version")  # byte code of everything is written once, not measured here
    began = time.monotonic()
    with Mounted(tgt_server.url(), tmp_path / "m") as mounted:
        took = time.monotonic() - began
        assert len(list(mounted.point.glob("*/lun-*"))) == 64
        assert mounted.pid is not None
        memory = resident(mounted.pid)
    record_property("seconds", round(took, 2))
    record_property("MiB", memory // MIB)
    print(f"64 LUNs on 8 targets: mounted after {took:.2f} s, {memory / MIB:.0f} MiB")  # noqa: T201 - a figure
    # 3 s is the goal on an idle machine; a shared one may be busy with other things.
    assert took < 9
    assert memory < CACHE + BESIDE_CACHE


def test_memory_stays_within_bounds(store: Store, tmp_path: Path) -> None:
    with Mounted(store.server.url(ONE), tmp_path / "m", "--rw") as mounted:
        assert mounted.pid is not None
        with mounted.lun(1).open("rb") as source, mounted.lun(2).open("r+b") as sink:
            for _ in range(2):
                source.seek(0)
                sink.seek(0)
                while block := source.read(MIB):
                    sink.write(block)
        memory = resident(mounted.pid)
        cache = mounted.status_file()["cache"]
    print(f"copied 192 MiB: {memory / MIB:.0f} MiB resident")  # noqa: T201 - a figure
    assert memory < CACHE + BESIDE_CACHE
    assert cache["used"] <= cache["size"] == CACHE
    assert store.empty.read_bytes()[: 96 * MIB] == store.random.read_bytes()
