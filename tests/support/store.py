"""A tgtd as a person would set one up: two targets, small and huge disks, 512 and 4096 byte blocks."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.disks import random_file, sparse
from support.tgt import TgtServer

ONE = "iqn.2026-11.example:one"
TWO = "iqn.2026-11.example:two"
MIB = 1 << 20
TIB = 1 << 40


__all__ = ["MIB", "ONE", "TIB", "TWO", "Store", "random_image", "store"]


@dataclass(frozen=True, slots=True)
class Store:
    """Two targets and the files behind their disks."""

    server: TgtServer
    random: Path
    empty: Path
    huge: Path
    large_blocks: Path


@pytest.fixture(scope="session")
def random_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be copied: to make it takes longer."""
    return random_file(tmp_path_factory.mktemp("store") / "random.img", 96 * MIB, seed=7)


@pytest.fixture
def store(tgt_server: TgtServer, tmp_path: Path, random_image: Path) -> Store:
    made = Store(
        server=tgt_server,
        random=Path(shutil.copyfile(random_image, tmp_path / "random.img")),
        empty=sparse(tmp_path / "empty.img", 256 * MIB),
        huge=sparse(tmp_path / "huge.img", 3 * TIB),
        large_blocks=sparse(tmp_path / "4k.img", 64 * MIB),
    )
    tgt_server.add_target(ONE)
    tgt_server.add_target(TWO)
    tgt_server.add_lun(ONE, 1, made.random, serial="RANDOM01")
    tgt_server.add_lun(ONE, 2, made.empty)
    tgt_server.add_lun(TWO, 1, made.huge)
    tgt_server.add_lun(TWO, 2, made.large_blocks, block_size=4096)
    return made
