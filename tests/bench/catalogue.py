"""Every kind of work, and everybody who takes part."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from bench.contender import Contender
from bench.distance import Digests, DigestsOfQuickTarget, FarList, FarRead, FarWrite
from bench.footprint import Memory, MountTime
from bench.ours import Iscsifuse, IscsifuseUser
from bench.peers import Libiscsi, Nbdfuse, QemuStorageDaemon, Tmpfs
from bench.random_io import RandomRead, RandomWrite
from bench.realwork import Convert, FsCheck, LoopExt4, Sha256, SleuthKit
from bench.sequential import Readers, SequentialRead, SequentialWrite, WarmRead, count_bytes
from bench.stage import Stage
from bench.work import Work

__all__ = ["all_contenders", "all_works", "chosen"]


def all_works(stage: Stage) -> list[Work]:
    """In the order in which they are done."""
    sizes = stage.sizes
    half, full = sizes.half, sizes.full

    def dd(block: str, length: int, *flags: str) -> list[str]:
        return ["dd", "if=FILE", "of=/dev/null", f"bs={block}", *flags, *count_bytes(length)]

    return [
        SequentialRead(stage, "read-1m", "read: dd bs=1M", dd("1M", full), length=full),
        SequentialRead(
            stage,
            "read-1m-fresh",
            "read: dd bs=1M, from a tgtd just started",
            dd("1M", full),
            length=full,
            fresh=True,
        ),
        SequentialRead(stage, "read-128k", "read: dd bs=128k", dd("128k", half), length=half),
        SequentialRead(stage, "read-cat", "read: cat", ["cat", "FILE"], length=full),
        SequentialRead(
            stage,
            "read-direct",
            "read: dd bs=1M iflag=direct",
            dd("1M", half, "iflag=direct"),
            length=half,
            direct=True,
        ),
        SequentialWrite(stage, "write-1m", "write: dd bs=1M conv=fsync", block="1M", length=full),
        SequentialWrite(
            stage,
            "write-1m-fresh",
            "write: dd bs=1M conv=fsync, to a tgtd just started",
            block="1M",
            length=full,
            fresh=True,
        ),
        SequentialWrite(stage, "write-4k", "write: dd bs=4k conv=fsync", block="4k", length=sizes.small_writes),
        SequentialWrite(
            stage,
            "write-direct",
            "write: dd bs=1M oflag=direct conv=fsync",
            block="1M",
            length=half,
            flags=["oflag=direct"],
        ),
        *(RandomRead(stage, depth) for depth in (1, 4, 16, 32)),
        *(RandomWrite(stage, depth) for depth in (1, 4, 16, 32)),
        WarmRead(stage),
        Readers(stage, luns=4),
        Readers(stage, luns=1),
        LoopExt4(stage),
        SleuthKit(stage),
        Convert(stage),
        FsCheck(stage),
        Sha256(stage),
        *(kind(stage, round_trip) for round_trip in (0.005, 0.025) for kind in (FarRead, FarWrite)),
        FarList(stage),
        Digests(stage),
        DigestsOfQuickTarget(stage),
        Memory(stage),
        *(MountTime(stage, luns) for luns in (1, 16, 256)),
    ]


def all_contenders(stage: Stage, options: argparse.Namespace) -> list[Contender]:
    """In the order of the table: ours first."""
    contenders: list[Contender] = [Iscsifuse(stage)]
    baseline: Path | None = options.baseline
    if baseline is not None:
        contenders.append(Iscsifuse(stage, name="iscsifuse-base", checkout=baseline))
    contenders += [IscsifuseUser(stage), QemuStorageDaemon(stage)]
    if options.qsd is not None:
        contenders.append(
            QemuStorageDaemon(
                stage, name="qsd-new", program=options.qsd, iothread=True, poll_max_ns=options.qsd_poll_max_ns
            )
        )
    return [*contenders, Nbdfuse(stage), Libiscsi(stage), Tmpfs(stage)]


def chosen(names: Iterable[str], wanted: str | None) -> list[str]:
    """Those of ``names`` that a comma-separated list names, in full or by the beginning up to a hyphen.

    ValueError for one that names nothing.
    """
    known = list(names)
    if wanted is None:
        return known
    found = set()
    for word in wanted.split(","):
        matching = [name for name in known if name == word]
        matching = matching or [name for name in known if name.startswith(f"{word}-")]
        if not matching:
            raise ValueError(f"{word!r} is none of {', '.join(known)}")
        found.update(matching)
    return [name for name in known if name in found]
