"""A target that forgets what it was not told to keep when its power is cut: nothing acknowledged is lost."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from initiator_kit import DEFAULT_TARGET_NAME, config_of, pattern, portal_of, serving, settings_of

from iscsifuse.cache import BlockCache, BufferPool, CacheSettings
from iscsifuse.errors import WriteBackError
from iscsifuse.initiator.inventory import scan
from iscsifuse.initiator.logical_unit import LogicalUnit
from iscsifuse.initiator.nexus import open_nexus
from iscsifuse.testing.config import LoginAttention
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.target import LoopbackTarget

pytestmark = [pytest.mark.conformance(104), pytest.mark.expect_log("session lost|logged in again|can't log in again")]

BLOCKS = 4096


class Rig:
    """A target with a volatile disk, and its LUN as a cached file."""

    def __init__(self, target: LoopbackTarget, disk: Disk, cache: BlockCache) -> None:
        self.target = target
        self.disk = disk
        self.cache = cache

    def cut_power(self, *, reboot: bool) -> int:
        """The disk forgets; and the target comes back from a reboot, or just goes on (a reset by somebody else)."""
        return self.target.power_cut() if reboot else self.disk.power_cut()

    def stable(self) -> bytes:
        """What is left if the power is cut now."""
        self.disk.power_cut()
        return self.disk.contents(lba=0, blocks=BLOCKS)


@asynccontextmanager
async def volatile(*, slots: int = 64) -> AsyncIterator[Rig]:
    disk = Disk.from_bytes(pattern(BLOCKS * 512))
    async with serving(config_of(disk, login_attention=LoginAttention.POWER_ON)) as target:
        with trio.fail_after(60):
            async with (
                open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings_of()) as nexus,
                trio.open_nursery() as nursery,
            ):
                (description,) = await scan(nexus)
                unit = LogicalUnit(nexus, description)
                cache = BlockCache(unit, pool=BufferPool(slots * 32768, slot_size=32768), settings=CacheSettings())
                unit.on_change, unit.on_loss = cache.invalidate, cache.lose
                await nursery.start(cache.run)
                yield Rig(target, disk, cache)
                nursery.cancel_scope.cancel()


@pytest.mark.parametrize("reboot", [False, True])
async def test_acknowledged_writes_survive_a_power_cut(reboot: bool) -> None:
    async with volatile() as rig:
        data = random.Random(1).randbytes(300_000)
        await rig.cache.write(1000, data)
        await rig.cache.drain()
        assert rig.cut_power(reboot=reboot) > 500
        assert rig.disk.contents(lba=0, blocks=BLOCKS) == pattern(BLOCKS * 512)  # it has forgotten all of it
        await rig.cache.sync()
        expected = bytearray(pattern(BLOCKS * 512))
        expected[1000 : 1000 + len(data)] = data
        assert rig.stable() == expected


@pytest.mark.parametrize("reboot", [False, True])
async def test_nobody_reads_what_the_disk_has_fallen_back_to(reboot: bool) -> None:
    async with volatile() as rig:
        await rig.cache.write(0, b"new" * 1000)
        await rig.cache.drain()
        rig.cut_power(reboot=reboot)
        rig.cache.invalidate()
        assert bytes(await rig.cache.read(0, 3000)) == b"new" * 1000
        await rig.cache.read(1 << 20, 512)  # the first command after the cut
        await rig.cache.sync()
        assert bytes(await rig.cache.read(0, 3000)) == b"new" * 1000 == rig.stable()[:3000]


async def test_after_a_sync_nothing_is_written_again() -> None:
    async with volatile() as rig:
        await rig.cache.write(0, b"new" * 1000)
        await rig.cache.sync()
        written = len(rig.target.engine().executed("WRITE(10)"))
        assert rig.cut_power(reboot=True) == 0
        await rig.cache.read(1 << 20, 512)
        await rig.cache.sync()
        assert len(rig.target.engine().executed("WRITE(10)")) == written


async def test_a_target_that_tells_of_power_on_at_every_login_costs_a_rewrite_and_no_error() -> None:
    async with volatile() as rig:
        handle = rig.cache.open()
        await rig.cache.write(0, b"new" * 1000)
        await rig.cache.drain(handle)
        rig.target.drop_connections()
        await rig.cache.sync(handle)
        assert rig.stable()[:3000] == b"new" * 1000


@pytest.mark.parametrize("seed", range(6))
async def test_reboots_at_any_moment(seed: int) -> None:
    """Writes, syncs and cuts side by side; each byte that a sync covered is stable, and in the end all are."""
    r = random.Random(seed)
    async with volatile(slots=r.choice((8, 24, 64))) as rig:
        cache, image = rig.cache, bytearray(pattern(BLOCKS * 512))

        async def write(zone: int) -> None:
            base, size = zone * 256 * 1024, 256 * 1024
            for _ in range(25):
                offset = base + r.randrange(size - 1)
                data = r.randbytes(min(r.choice((1, 512, 4096, 50_000)), base + size - offset))
                await cache.write(offset, data)
                image[offset : offset + len(data)] = data
                if r.random() < 0.2:
                    await cache.sync()

        async def cut() -> None:
            for _ in range(8):
                await trio.sleep(r.random() * 0.05)
                rig.cut_power(reboot=True)

        async with trio.open_nursery() as nursery:
            for zone in range(8):
                nursery.start_soon(write, zone)
            nursery.start_soon(cut)
        await cache.sync()
        assert rig.stable() == image
        assert bytes(await cache.read(0, len(image))) == image


async def test_what_can_not_be_written_again_is_an_error_of_the_next_sync() -> None:
    async with volatile() as rig:
        handle = rig.cache.open()
        await rig.cache.write(0, b"new" * 1000)
        await rig.cache.drain(handle)
        rig.cut_power(reboot=False)
        rig.disk.write_protected = True
        with pytest.raises(WriteBackError):
            await rig.cache.sync(handle)
        rig.disk.write_protected = False
        await rig.cache.sync(handle)  # told once
