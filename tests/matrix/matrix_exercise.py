"""One cell: log in, see that it is the one that was wanted, write, flush, read back, look at the backing file."""

import random
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial

import trio
from matrix_cells import Cell, Chap, Side
from matrix_targets import DISK_SIZE, OUR_ACCOUNT, THEIR_ACCOUNT, Place, TargetCells

from iscsifuse.cache import DirectFile
from iscsifuse.initiator.inventory import scan
from iscsifuse.initiator.logical_unit import LogicalUnit
from iscsifuse.initiator.login import login_config
from iscsifuse.initiator.nexus import open_nexus
from iscsifuse.initiator.settings import SessionSettings
from iscsifuse.iscsi.chap import ChapCredentials
from iscsifuse.iscsi.parameters import LoginConfig

__all__ = ["Transfer", "agreed_keys", "initiator_of", "offer", "plan", "run_cells"]

_PATIENCE = 60.0
"""Seconds for a cell, which takes a tenth of one."""
_MOST_FAILURES = 5


def initiator_of(number: int) -> str:
    """Who logs in for a cell."""
    return f"iqn.2026-11.io.github.iscsifuse:cell.{number}"


async def run_cells(target: TargetCells, cells: Mapping[int, Cell]) -> None:
    """Run numbered cells that are outcomes of ``target``, one after the other.

    Raises:
        ExceptionGroup: what went wrong, each with a note that says in which cell; a few at most.
    """
    failures: list[Exception] = []
    for number, cell in cells.items():
        try:
            async with target.serving(cell) as place:
                await _exercise(number, cell, place)
        except Exception as error:
            error.add_note(f"cell {number}: {cell}")
            failures.append(error)
            if len(failures) == _MOST_FAILURES:
                break
    if failures:
        raise ExceptionGroup(f"of {len(cells)} cells", failures)


def agreed_keys(cell: Cell) -> dict[str, str]:
    """What both sides agree on in a cell, in the standard's words."""
    words = {False: "No", True: "Yes"}
    digests = {False: "None", True: "CRC32C"}
    return {
        "HeaderDigest": digests[cell.digests.header],
        "DataDigest": digests[cell.digests.data],
        "InitialR2T": words[cell.initial_r2t],
        "ImmediateData": words[cell.immediate_data],
        "FirstBurstLength": str(cell.lengths.first_burst),
        "MaxBurstLength": str(cell.lengths.max_burst),
        "MaxOutstandingR2T": str(cell.lengths.r2ts),
    }


_cell: ContextVar[Cell] = ContextVar("cell")
"""The one that the present task logs in for."""


def offer(settings: SessionSettings, target_name: str | None) -> LoginConfig:
    """What a login for the present cell offers, in place of `login_config`: there are no settings for most of it."""
    cell = _cell.get()
    config = replace(login_config(settings, target_name), max_recv_data_segment_length=cell.lengths.our_segment)
    if cell.side is Side.TARGET:
        return config
    return replace(
        config,
        initial_r2t=cell.initial_r2t,
        immediate_data=cell.immediate_data,
        first_burst_length=cell.lengths.first_burst,
        max_burst_length=cell.lengths.max_burst,
        max_outstanding_r2t=cell.lengths.r2ts,
    )


def _settings(number: int, cell: Cell) -> SessionSettings:
    (user, secret), (target_user, target_secret) = OUR_ACCOUNT, THEIR_ACCOUNT
    one_way = ChapCredentials(user=user, secret=secret.encode())
    mutual = replace(one_way, target_user=target_user, target_secret=target_secret.encode())
    return SessionSettings(
        initiator_name=initiator_of(number),
        header_digest=cell.digests.header,
        data_digest=cell.digests.data,
        chap={Chap.NONE: None, Chap.ONE_WAY: one_way, Chap.MUTUAL: mutual}[cell.chap],
        read_only=False,
        reconnect_timeout=0,
    )


async def _exercise(number: int, cell: Cell, place: Place) -> None:
    source = random.Random(number)
    contents = bytearray(source.randbytes(DISK_SIZE))
    with place.image.open("r+b") as image:
        image.write(contents)
    _cell.set(cell)
    with trio.fail_after(_PATIENCE):
        async with open_nexus(place.target_name, [place.portal], _settings(number, cell)) as nexus:
            wanted = agreed_keys(cell) | {
                "AuthMethod": "None" if cell.chap is Chap.NONE else "CHAP",
                "MaxRecvDataSegmentLength": str(cell.lengths.our_segment),
                "TargetMaxRecvDataSegmentLength": str(cell.lengths.target_segment),
            }
            got = nexus.negotiated.as_keys()
            assert {key: got[key] for key in wanted} == wanted
            (disk,) = [one for one in await scan(nexus) if one.usable]
            assert (disk.size, disk.block_length) == (DISK_SIZE, cell.block_length)
            unit = LogicalUnit(nexus, disk)
            await _work(cell, unit, contents, source)
            assert nexus.reconnects == 0
    assert place.image.read_bytes() == contents


async def _work(cell: Cell, unit: LogicalUnit, contents: bytearray, source: random.Random) -> None:
    """Write, all at once; flush; read the same places back with their surroundings, all at once again."""
    file = DirectFile(unit)
    transfers = list(plan(cell))
    async with trio.open_nursery() as nursery:
        for transfer in transfers:
            data = source.randbytes(transfer.length)
            contents[transfer.offset : transfer.end] = data
            if transfer.is_aligned(cell.block_length):
                nursery.start_soon(partial(unit.write, memoryview(data), lba=transfer.offset // cell.block_length))
            else:
                nursery.start_soon(file.write, transfer.offset, data)
    await file.sync()

    async def read_back(start: int, end: int) -> None:
        assert await file.read(start, end - start) == contents[start:end]

    async with trio.open_nursery() as nursery:
        for transfer in transfers:
            nursery.start_soon(read_back, max(transfer.offset - 7, 0), min(transfer.end + 9, DISK_SIZE))
            if transfer.is_aligned(cell.block_length):
                nursery.start_soon(read_back, transfer.offset, transfer.end)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes of the disk."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    def is_aligned(self, block_length: int) -> bool:
        return self.offset % block_length == self.length % block_length == 0


def plan(cell: Cell) -> Iterator[Transfer]:
    """Writes around each limit, none of which touches another one's blocks: whole blocks, odd bytes, the very end."""
    block = cell.block_length
    first, burst = cell.lengths.first_burst, cell.lengths.max_burst
    counts = dict.fromkeys((1, -(-first // block), first // block + 1, burst // block + 1, 9))
    place = 0
    for count in counts:
        yield Transfer(place * block, count * block)
        place += count + 1
    for skip, length in ((1, 1), (block - 1, 2), (3, block), (block - 5, first + 6)):
        yield Transfer(place * block + skip, length)
        place += -(-(skip + length) // block) + 1
    yield Transfer(DISK_SIZE - block, block)
