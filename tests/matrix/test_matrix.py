"""Every combination of what a login can lead to, against two real targets and one that forgives nothing.

A usual run takes cells that cover all pairs; ``--slow`` takes all of them.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import trio
from matrix_cells import LENGTHS, Cell, Chap, Side, all_cells, all_pairs
from matrix_exercise import agreed_keys, initiator_of, offer, run_cells
from matrix_targets import IstgtCells, StrictCells, TargetCells, TgtCells

from support.capture import Capture, Conversation
from support.istgt import IstgtServer
from support.tgt import TgtServer

pytestmark = [pytest.mark.conformance(19), pytest.mark.conformance(54), pytest.mark.conformance(120)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for all pairs; or, of all cells, one test for each set of lengths and each side that limits."""
    if "cells" not in metafunc.fixturenames:
        return
    portions = {"all pairs": all_pairs()}
    if metafunc.config.getoption("--slow"):
        cells = all_cells()
        portions = {
            f"{lengths} by the {side.value}": [cell for cell in cells if (cell.lengths, cell.side) == (lengths, side)]
            for lengths in LENGTHS
            for side in Side
        }
    metafunc.parametrize("cells", portions.values(), ids=portions.keys())


@pytest.fixture(autouse=True)
def _offers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iscsifuse.initiator.nexus.login_config", offer)
    monkeypatch.setattr("iscsifuse.initiator.revival.login_config", offer)


def _outcomes(target: TargetCells, cells: list[Cell]) -> dict[int, Cell]:
    """What there is to do, numbered."""
    return dict(enumerate(dict.fromkeys(target.outcome(cell) for cell in cells)))


async def test_strict(cells: list[Cell], tmp_path: Path) -> None:
    target = StrictCells(tmp_path)
    await run_cells(target, _outcomes(target, cells))


async def test_tgt(
    cells: list[Cell], tgt_server: TgtServer, tmp_path: Path, start_capture: Callable[..., Capture]
) -> None:
    target = TgtCells(tgt_server, tmp_path)
    outcomes = _outcomes(target, cells)
    recording = start_capture(tgt_server.port)
    await run_cells(target, outcomes)
    recording.stop()
    _judge(recording, outcomes)


@pytest.fixture
def istgt_servers(tmp_path: Path) -> Iterator[list[IstgtServer]]:
    """Several, since istgt thinks for a second before it answers the first request of a connection."""
    servers = []
    for number in range(16):
        folder = tmp_path / f"istgt-{number}"
        folder.mkdir()
        servers.append(IstgtServer(folder))
    yield servers
    for server in servers:
        server.kill()  # to be asked to end takes longer


@pytest.mark.istgt
async def test_istgt(
    cells: list[Cell], istgt_servers: list[IstgtServer], start_capture: Callable[..., Capture]
) -> None:
    targets = [IstgtCells(server, server.folder) for server in istgt_servers]
    outcomes = _outcomes(targets[0], cells)
    recording = start_capture(*[server.port for server in istgt_servers])
    left = iter(outcomes.items())
    share = -(-len(outcomes) // len(targets))
    async with trio.open_nursery() as nursery:
        for target in targets:  # neighbours stay together: they need the same configuration
            nursery.start_soon(run_cells, target, dict(islice(left, share)))
    recording.stop()
    _judge(recording, outcomes)


def _judge(recording: Capture, outcomes: dict[int, Cell]) -> None:
    """What the dissector says to what passed."""
    assert recording.malformed() == []
    assert recording.unrecognised() == []
    conversations = {seen.initiator_keys["InitiatorName"]: seen for seen in recording.conversations()}
    assert conversations.keys() == {initiator_of(number) for number in outcomes}
    for number, cell in outcomes.items():
        _was_on_the_wire(cell, conversations[initiator_of(number)])


def _was_on_the_wire(cell: Cell, seen: Conversation) -> None:
    """That what was agreed on is what was done."""
    lengths = cell.lengths
    wanted = agreed_keys(cell) | {"MaxRecvDataSegmentLength": str(lengths.target_segment)}
    said = {"MaxRecvDataSegmentLength": "8192"} | seen.target_keys  # what goes without saying
    assert {key: said.get(key) for key in wanted} == wanted, cell
    assert ("CHAP_R" in seen.initiator_keys) is (cell.chap is not Chap.NONE), cell
    assert ("CHAP_R" in seen.target_keys) is (cell.chap is Chap.MUTUAL), cell
    assert seen.header_digests == (seen.pdus.total() if cell.digests.header else 0), cell
    assert seen.data_digests == (seen.with_data if cell.digests.data else 0), cell
    assert (seen.immediate > 0) is cell.immediate_data, cell
    left_over = lengths.first_burst > (lengths.target_segment if cell.immediate_data else 0)
    assert (seen.unsolicited > 0) is (left_over and not cell.initial_r2t), cell
    # Segments are as long as they may be, somewhere. (Neither target keeps MaxBurstLength when it sends.)
    unasked = cell.immediate_data or not cell.initial_r2t
    reach = min(lengths.target_segment, lengths.first_burst if unasked else lengths.max_burst)
    assert reach <= seen.longest_from_initiator <= lengths.target_segment, cell
    both = min(lengths.our_segment, lengths.target_segment, lengths.max_burst)
    assert both <= seen.longest_from_target <= lengths.our_segment, cell
