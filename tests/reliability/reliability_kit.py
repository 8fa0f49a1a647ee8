"""What the tests of reliability share: a cached file on a loopback target, with a script between the two."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from iscsifuse.cache import BlockFile, BufferPool, CacheSettings, block_file
from iscsifuse.initiator.inventory import scan
from iscsifuse.initiator.logical_unit import LogicalUnit
from iscsifuse.initiator.nexus import Nexus, open_nexus
from iscsifuse.initiator.settings import Portal, SessionSettings
from iscsifuse.testing.config import DEFAULT_TARGET_NAME, LoginAttention, TargetConfig, TargetKeys, TargetNode
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.target import LoopbackTarget

__all__ = ["BLOCK", "RECOVERY", "Bench", "bench", "config_of", "pattern", "settings_of", "until"]

BLOCK = 512
RECOVERY = "session lost|logged in again|can't log in again"
INITIATOR = "iqn.2026-11.io.github.iscsifuse:reliability"


def pattern(number: int, blocks: int = 1) -> bytes:
    """Blocks that say which value they are."""
    return b"".join(f"value {number}, block {block};".encode().ljust(BLOCK, b".") for block in range(blocks))


def settings_of(**changes: Any) -> SessionSettings:
    """A session that may write."""
    usual: dict[str, Any] = {
        "initiator_name": INITIATOR,
        "timeout": 30.0,
        "login_timeout": 5.0,
        "reconnect_timeout": 10.0,
        "read_only": False,
    }
    return SessionSettings(**{**usual, **changes})


def config_of(*disks: Disk, keys: TargetKeys | None = None, **changes: Any) -> TargetConfig:
    """A loopback target that has no unit attention to tell unless asked for."""
    usual: dict[str, Any] = {"login_attention": LoginAttention.NONE}
    return TargetConfig(
        nodes=[TargetNode(disks=list(disks))],
        keys=keys or TargetKeys(default_time2wait=0),
        **{**usual, **changes},
    )


@dataclass(frozen=True, slots=True)
class Bench:
    """A file, and all that it stands on."""

    target: LoopbackTarget
    nexus: Nexus
    unit: LogicalUnit
    file: BlockFile

    @property
    def disk(self) -> Disk:
        return self.target.disk()


@asynccontextmanager
async def bench(
    config: TargetConfig,
    *,
    settings: SessionSettings | None = None,
    cache: CacheSettings | None = None,
    within: float = 30.0,
    strict: bool = True,
) -> AsyncIterator[Bench]:
    """Serve, log in, and have the first disk as a file with a write-back cache."""
    with trio.fail_after(within):
        async with LoopbackTarget(config).serve() as target:
            portal = Portal(target.host, target.port)
            async with open_nexus(DEFAULT_TARGET_NAME, [portal], settings or settings_of()) as nexus:
                unit = LogicalUnit(nexus, (await scan(nexus))[0])
                pool = BufferPool(4 << 20)
                file = block_file(
                    unit, pool=pool, settings=cache or CacheSettings(write_back_delay=0.0, read_ahead=0)
                )
                async with trio.open_nursery() as nursery:
                    await nursery.start(file.run)
                    yield Bench(target, nexus, unit, file)
                    nursery.cancel_scope.cancel()
        if strict:
            assert not target.violations, target.violations


async def until(condition: Callable[[], object], *, seconds: float = 10.0) -> None:
    """Wait until something is so; fail if it never is."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - of whatever state, events or not
            await trio.sleep(0.002)
