"""Against targets that others wrote: what the loopback target can't prove, since it shares our codecs."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from initiator_kit import at_once, pattern, settings_of, until

from iscsifuse.errors import AuthenticationError, DataProtectError, NothingFoundError, ReadOnlyError
from iscsifuse.initiator import liveness
from iscsifuse.initiator.discovery import discover
from iscsifuse.initiator.inventory import LunDescription, scan
from iscsifuse.initiator.logical_unit import LogicalUnit
from iscsifuse.initiator.nexus import Nexus, open_nexus
from iscsifuse.initiator.settings import Portal
from iscsifuse.iscsi.chap import ChapCredentials
from support.istgt import IstgtServer
from support.tgt import TgtServer

TARGET = "iqn.2026-11.io.github.iscsifuse:target"
SIZE = 8 << 20
RECOVERY = "session lost|logged in again|can't log in again"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(SIZE))
    return path


def _portal(server: TgtServer | IstgtServer) -> Portal:
    return Portal("127.0.0.1", server.port)


@asynccontextmanager
async def _open(
    server: TgtServer | IstgtServer, **changes: Any
) -> AsyncIterator[tuple[Nexus, list[LunDescription], LogicalUnit]]:
    with trio.fail_after(30):
        async with open_nexus(TARGET, [_portal(server)], settings_of(**changes)) as nexus:
            found = await scan(nexus)
            disk = next(one for one in found if one.usable)
            yield nexus, found, LogicalUnit(nexus, disk)


async def _read(unit: LogicalUnit, lba: int, blocks: int) -> bytes:
    memory = memoryview(bytearray(blocks * unit.block_length))
    await unit.read_into(memory, lba=lba)
    return bytes(memory)


async def _exercise(unit: LogicalUnit, image: Path) -> None:
    """Reads and writes of all sizes, side by side, each on a stripe of its own."""
    length = unit.block_length
    expected = bytearray(pattern(SIZE))

    async def stripe(number: int) -> None:
        generator = random.Random(number)
        width = unit.block_count // 8
        for _ in range(8):
            blocks = generator.choice((1, 7, 8, 129, width // 2))
            lba = number * width + generator.randrange(width - blocks)
            data = generator.randbytes(blocks * length)
            await unit.write(memoryview(data), lba=lba)
            expected[lba * length : lba * length + len(data)] = data
            assert await _read(unit, lba, blocks) == data

    assert await at_once(*[lambda number=number: stripe(number) for number in range(8)], within=25) == [None] * 8
    await unit.flush()
    assert await _read(unit, 0, unit.block_count) == expected
    assert await trio.Path(image).read_bytes() == expected


async def _reconnected(nexus: Nexus, before: int) -> None:
    await until(lambda: nexus.reconnects > before, seconds=10)


# --- tgt ---


async def test_targets_tgt_discovery(tgt_server: TgtServer) -> None:
    tgt_server.add_target(TARGET)
    for number in range(3):
        tgt_server.add_target(f"{TARGET}-{number}")
    found = await discover(_portal(tgt_server), settings_of(header_digest=True))
    assert {one.name for one in found} == {TARGET, *[f"{TARGET}-{number}" for number in range(3)]}
    assert str(found[0].portals[0]) == f"{tgt_server.portal},1"


async def test_targets_tgt_inventory(tgt_server: TgtServer, image: Path) -> None:
    tgt_server.add_target(TARGET)
    tgt_server.add_lun(TARGET, 1, image, vendor="ACME", product="ROCKET", serial="S-1")
    tgt_server.add_lun(TARGET, 7, image, block_size=4096, readonly=True)
    async with _open(tgt_server, read_only=True) as (_, found, unit):
        assert [(one.lun, one.type_words, one.usable) for one in found] == [
            (0, "storage array controller", False),
            (1, "disk", True),
            (7, "disk", True),
        ]
        assert (found[1].inquiry.vendor, found[1].inquiry.product, found[1].serial) == ("ACME", "ROCKET", "S-1")
        assert (found[1].size, found[1].block_length, found[1].write_protected) == (SIZE, 512, False)
        assert (found[2].size, found[2].block_length, found[2].write_protected) == (SIZE, 4096, True)
        assert found[1].caching is not None
        assert await _read(unit, 3, 5) == pattern(SIZE)[3 * 512 : 8 * 512]
        with pytest.raises(ReadOnlyError):
            await unit.write(memoryview(bytes(512)), lba=0)
    assert await trio.Path(image).read_bytes() == pattern(SIZE)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"InitialR2T": "No", "ImmediateData": "Yes"},
        {"InitialR2T": "Yes", "ImmediateData": "No", "MaxBurstLength": "65536", "MaxOutstandingR2T": "8"},
        {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C", "MaxRecvDataSegmentLength": "4096"},
    ],
)
@pytest.mark.parametrize("block_size", [512, 4096])
async def test_targets_tgt_reads_and_writes(
    tgt_server: TgtServer, image: Path, params: dict[str, str], block_size: int
) -> None:
    tgt_server.add_target(TARGET, params=params)
    tgt_server.add_lun(TARGET, 1, image, block_size=block_size)
    digests = "DataDigest" in params
    async with _open(tgt_server, header_digest=digests, data_digest=digests) as (nexus, _, unit):
        assert nexus.negotiated.data_digest is digests
        await _exercise(unit, image)


@pytest.mark.expect_log(RECOVERY)
@pytest.mark.conformance(97)
async def test_targets_tgt_connections_that_are_closed_under_way(tgt_server: TgtServer, image: Path) -> None:
    tgt_server.add_target(TARGET, params={"DefaultTime2Wait": "0"})
    tgt_server.add_lun(TARGET, 1, image)
    async with _open(tgt_server) as (nexus, _, unit):

        async def close() -> None:
            for _ in range(2):
                await trio.sleep(0.05)
                before = nexus.reconnects
                for connection in await trio.to_thread.run_sync(tgt_server.connections):
                    await trio.to_thread.run_sync(tgt_server.close_connection, connection)
                await _reconnected(nexus, before)

        assert await at_once(lambda: _exercise(unit, image), close, within=28) == [None, None]
        assert nexus.reconnects == 2


@pytest.mark.expect_log(RECOVERY)
async def test_targets_tgt_that_is_killed_and_comes_back(tgt_server: TgtServer, image: Path) -> None:
    tgt_server.add_target(TARGET, params={"DefaultTime2Wait": "0"})
    tgt_server.add_lun(TARGET, 1, image)
    async with _open(tgt_server, reconnect_timeout=20) as (nexus, _, unit):
        await trio.to_thread.run_sync(tgt_server.restart)
        await _exercise(unit, image)
        assert nexus.reconnects == 1


@pytest.mark.expect_log(RECOVERY)
@pytest.mark.conformance(83)
async def test_targets_tgt_that_falls_silent(
    tgt_server: TgtServer, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "PING_AFTER", 0.2)
    monkeypatch.setattr(liveness, "PING_LIMIT", 0.3)
    tgt_server.add_target(TARGET, params={"DefaultTime2Wait": "0"})
    tgt_server.add_lun(TARGET, 1, image)
    async with _open(tgt_server, login_timeout=0.5, reconnect_timeout=20) as (nexus, _, unit):
        await trio.sleep(0.6)  # answered pings
        assert nexus.session.error is None
        await trio.to_thread.run_sync(tgt_server.pause)

        async def wake_up() -> None:
            await until(lambda: nexus.session.error is not None)
            await trio.to_thread.run_sync(tgt_server.cont)

        data, _ = await at_once(lambda: _read(unit, 0, 100), wake_up, within=15)
        assert data == pattern(SIZE)[: 100 * 512]
        assert nexus.reconnects >= 1


async def test_targets_tgt_chap(tgt_server: TgtServer, image: Path) -> None:
    tgt_server.add_target(TARGET, chap=("me", "a secret of sixteen"), mutual=("it", "another of sixteen"))
    tgt_server.add_lun(TARGET, 1, image)
    good = ChapCredentials(
        user="me", secret=b"a secret of sixteen", target_user="it", target_secret=b"another of sixteen"
    )
    async with _open(tgt_server, chap=good) as (nexus, _, unit):
        assert nexus.negotiated.auth_method == "CHAP"
        assert await _read(unit, 0, 1) == pattern(512)
    bad = ChapCredentials(user="me", secret=b"not the secret at all")
    for chap in (bad, None):
        with pytest.raises(AuthenticationError):
            async with _open(tgt_server, chap=chap):
                pass


async def test_targets_tgt_write_protected_and_unknown(tgt_server: TgtServer, image: Path) -> None:
    tgt_server.add_target(TARGET)
    tgt_server.add_lun(TARGET, 1, image, readonly=True)
    async with _open(tgt_server) as (_, _, unit):
        with pytest.raises(DataProtectError):
            await unit.write(memoryview(bytes(512)), lba=0)
    with pytest.raises(NothingFoundError):
        async with open_nexus(f"{TARGET}-other", [_portal(tgt_server)], settings_of()):
            pass


# --- istgt ---


@pytest.mark.parametrize("digest", [False, True])
async def test_targets_istgt_reads_and_writes(istgt_server: IstgtServer, image: Path, digest: bool) -> None:
    istgt_server.add_target(TARGET, {0: image}, digest="Header Data" if digest else "Auto")
    istgt_server.start()
    (found,) = await discover(_portal(istgt_server), settings_of())
    assert found.name == TARGET
    async with _open(istgt_server, header_digest=digest, data_digest=digest) as (nexus, luns, unit):
        assert [one.lun for one in luns] == [0]
        assert nexus.negotiated.header_digest is digest
        await _exercise(unit, image)
