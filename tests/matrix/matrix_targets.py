"""The targets of the matrix: how each is brought to a cell, and what it makes of one that it doesn't do."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from matrix_cells import BLOCK_LENGTHS, Cell, Chap, Side

from iscsifuse.initiator.settings import Portal
from iscsifuse.testing.config import ChapPolicy, LoginAttention, TargetConfig, TargetKeys, TargetNode
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.target import LoopbackTarget
from support.disks import sparse
from support.istgt import IstgtServer
from support.ports import HOST
from support.tgt import TgtServer

__all__ = [
    "DISK_SIZE",
    "OUR_ACCOUNT",
    "THEIR_ACCOUNT",
    "IstgtCells",
    "Place",
    "StrictCells",
    "TargetCells",
    "TgtCells",
]

DISK_SIZE = 1 << 20
OUR_ACCOUNT = ("initiator", "a secret of sixteen")
THEIR_ACCOUNT = ("target", "another of sixteen")
# What a target agrees to at most where it is the initiator that limits.
_FIRST_BURST = 262144
_MAX_BURST = 1048576
_R2TS = 16


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cell's disk is."""

    portal: Portal
    target_name: str
    image: Path


class TargetCells(ABC):
    """A target that can be brought to any cell, or nearly."""

    def __init__(self, folder: Path) -> None:
        self._images: dict[int, Path] = {
            length: sparse(folder / f"{length}.img", DISK_SIZE) for length in BLOCK_LENGTHS
        }

    def outcome(self, cell: Cell) -> Cell:
        """What comes of a cell here: the same, or the nearest that this target does."""
        return cell

    @abstractmethod
    def serving(self, cell: Cell) -> AbstractAsyncContextManager[Place]:
        """Serve a disk of `DISK_SIZE` bytes that way; ``cell`` is an outcome."""


def _name(chap: Chap, block_length: int) -> str:
    return f"iqn.2026-11.io.github.iscsifuse:{chap.value.replace(' ', '-').lower()}.{block_length}"


_ACCOUNTS = {Chap.NONE: (None, None), Chap.ONE_WAY: (OUR_ACCOUNT, None), Chap.MUTUAL: (OUR_ACCOUNT, THEIR_ACCOUNT)}
"""That of the initiator, and that of the target."""


def _keys(cell: Cell) -> dict[str, str]:
    """What a target has to be told, in the standard's words."""
    limits = cell.side is Side.TARGET
    lengths = cell.lengths
    return {
        "InitialR2T": _yes_no(limits and cell.initial_r2t),
        "ImmediateData": _yes_no(cell.immediate_data or not limits),
        "FirstBurstLength": str(lengths.first_burst if limits else _FIRST_BURST),
        "MaxBurstLength": str(lengths.max_burst if limits else _MAX_BURST),
        "MaxOutstandingR2T": str(lengths.r2ts if limits else _R2TS),
        "MaxRecvDataSegmentLength": str(lengths.target_segment),
    }


def _yes_no(value: bool) -> str:
    return "Yes" if value else "No"


class TgtCells(TargetCells):
    """tgt: a target for each way to authenticate and each block length, told the rest before each login."""

    def __init__(self, server: TgtServer, folder: Path) -> None:
        super().__init__(folder)
        self._server = server
        self._told: dict[tuple[str, str], str] = {}
        for chap, (ours, theirs) in _ACCOUNTS.items():
            for length in BLOCK_LENGTHS:
                name = _name(chap, length)
                server.add_target(name, chap=ours, mutual=theirs)
                server.add_lun(name, 1, self._images[length], block_size=length)

    def outcome(self, cell: Cell) -> Cell:
        """We must not take segments whose length isn't a multiple of 4.

        tgt pads in its own buffer: where it has to in mid-transfer, it overwrites the first bytes of the next Data-In
        with zeros.
        """
        return cell.within(our_segment=cell.lengths.our_segment // 4 * 4)

    @asynccontextmanager
    async def serving(self, cell: Cell) -> AsyncIterator[Place]:
        """See `TargetCells.serving`."""
        name = _name(cell.chap, cell.block_length)
        for key, value in _keys(cell).items():
            self._tell(name, key, value)
        for key, wanted in (("HeaderDigest", cell.digests.header), ("DataDigest", cell.digests.data)):
            limited = "CRC32C" if wanted else "None"
            self._tell(name, key, limited if cell.side is Side.TARGET else "CRC32C,None")
        yield Place(Portal(HOST, self._server.port), name, self._images[cell.block_length])

    def _tell(self, name: str, key: str, value: str) -> None:
        if self._told.get((name, key)) != value:
            self._told[name, key] = value
            self._server.set_param(name, key, value)


class IstgtCells(TargetCells):
    """istgt: likewise, but it has to be started anew to be told something."""

    def __init__(self, server: IstgtServer, folder: Path) -> None:
        super().__init__(folder)
        self._server = server
        self._told: dict[str, str] = {}
        for chap, (ours, theirs) in _ACCOUNTS.items():
            for length in BLOCK_LENGTHS:
                disk = {0: self._images[length]}
                server.add_target(_name(chap, length), disk, block_size=length, chap=ours, mutual=theirs)
        server.start()

    def outcome(self, cell: Cell) -> Cell:
        """istgt doesn't do InitialR2T=No, and declares a segment of no less than 8192 and no more than ours."""
        segment = min(max(cell.lengths.target_segment, 8192), cell.lengths.our_segment)
        return replace(cell, initial_r2t=True).within(target_segment=segment)

    @asynccontextmanager
    async def serving(self, cell: Cell) -> AsyncIterator[Place]:
        """See `TargetCells.serving`."""
        keys = _keys(cell) | {"InitialR2T": "Yes"}
        if keys != self._told:
            self._told = keys
            self._server.set_params(keys)
            self._server.restart()
        name = _name(cell.chap, cell.block_length)
        yield Place(Portal(HOST, self._server.port), name, self._images[cell.block_length])


class StrictCells(TargetCells):
    """The loopback target, which notices whatever an initiator does wrong."""

    @asynccontextmanager
    async def serving(self, cell: Cell) -> AsyncIterator[Place]:
        """See `TargetCells.serving`; AssertionError at the end if there was anything wrong."""
        told = _keys(cell)
        both = ("None", "CRC32C")
        limits = cell.side is Side.TARGET
        keys = TargetKeys(
            header_digests=both[cell.digests.header :][:1] if limits else both,
            data_digests=both[cell.digests.data :][:1] if limits else both,
            initial_r2t=told["InitialR2T"] == "Yes",
            immediate_data=told["ImmediateData"] == "Yes",
            first_burst_length=int(told["FirstBurstLength"]),
            max_burst_length=int(told["MaxBurstLength"]),
            max_outstanding_r2t=int(told["MaxOutstandingR2T"]),
            max_recv_data_segment_length=cell.lengths.target_segment,
        )
        image = self._images[cell.block_length]
        name = _name(cell.chap, cell.block_length)
        disk = Disk.from_file(image, block_length=cell.block_length)
        config = TargetConfig(
            nodes=[TargetNode(name=name, disks=[disk])],
            keys=keys,
            chap=_policy(cell.chap),
            login_attention=LoginAttention.NONE,
        )
        try:
            async with LoopbackTarget(config).serve() as target:
                yield Place(Portal(target.host, target.port), name, image)
        finally:
            disk.backing.close()
        assert not target.violations, target.violations


def _policy(chap: Chap) -> ChapPolicy | None:
    if chap is Chap.NONE:
        return None
    name, secret = THEIR_ACCOUNT if chap is Chap.MUTUAL else ("target", "")
    return ChapPolicy(
        users={OUR_ACCOUNT[0]: OUR_ACCOUNT[1].encode()}, target_name=name, target_secret=secret.encode()
    )
