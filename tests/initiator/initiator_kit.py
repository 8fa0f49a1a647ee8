"""What the tests of the initiator share: settings, and targets on this machine."""

import sys
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import Any

import trio

from iscsifuse.initiator.login import LoggedIn, log_in, login_config, make_isid
from iscsifuse.initiator.session import Session
from iscsifuse.initiator.settings import Portal, SessionSettings
from iscsifuse.initiator.statistics import CommandStatistics
from iscsifuse.scsi import lun as luns
from iscsifuse.testing.config import DEFAULT_TARGET_NAME, LoginAttention, TargetConfig, TargetKeys, TargetNode
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.target import LoopbackTarget

__all__ = [
    "DEFAULT_TARGET_NAME",
    "INITIATOR",
    "LUN_0",
    "at_once",
    "config_of",
    "conversation",
    "open_session",
    "pattern",
    "portal_of",
    "raw_portal",
    "serving",
    "settings_of",
    "until",
    "without_violations",
]

INITIATOR = "iqn.2026-11.io.github.iscsifuse:tests"
LUN_0 = luns.encode(0)


def settings_of(**changes: Any) -> SessionSettings:
    """Settings for a session that may write, with short times."""
    usual = SessionSettings(
        initiator_name=INITIATOR, timeout=5.0, login_timeout=5.0, reconnect_timeout=5.0, read_only=False
    )
    return replace(usual, **changes)


@cache
def pattern(length: int, *, seed: int = 0) -> bytes:
    """Bytes of which no two blocks are alike: numbers of eight bytes, most significant first."""
    words = array("Q", range(seed, seed + -(-length // 8)))
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()[:length]


# --- targets on this machine ---


def config_of(*disks: Disk, keys: TargetKeys | None = None, **changes: Any) -> TargetConfig:
    """A loopback target with these disks, that has no unit attention to tell unless asked for."""
    usual: dict[str, Any] = {"login_attention": LoginAttention.NONE}
    return TargetConfig(
        nodes=[TargetNode(disks=list(disks))],
        keys=keys or TargetKeys(default_time2wait=0),
        **{**usual, **changes},
    )


@asynccontextmanager
async def serving(config: TargetConfig, *, strict: bool = True) -> AsyncIterator[LoopbackTarget]:
    """A loopback target; whatever the initiator does wrong fails the test."""
    async with LoopbackTarget(config).serve() as target:
        yield target
    if strict:
        without_violations(target)


def without_violations(target: LoopbackTarget) -> None:
    assert not target.violations, target.violations


def portal_of(target: LoopbackTarget) -> Portal:
    return Portal(target.host, target.port)


@asynccontextmanager
async def raw_portal(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[Portal]:
    """A TCP server whose connections a coroutine handles; it is closed when that returns."""

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):
                await handler(stream)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        try:
            yield Portal("127.0.0.1", port)
        finally:
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_session(
    target: LoopbackTarget,
    settings: SessionSettings | None = None,
    *,
    statistics: CommandStatistics | None = None,
) -> AsyncIterator[Session]:
    """A bare session with the first target, that runs while the block does."""
    settings = settings or settings_of()
    login = await log_in_to(target, settings)
    session = Session(login, settings, statistics or CommandStatistics())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        yield session
        await session.logout()


async def log_in_to(target: LoopbackTarget, settings: SessionSettings) -> LoggedIn:
    name = target.config.nodes[0].name
    return await log_in(portal_of(target), login_config(settings, name), isid=make_isid(), limit=5)


async def until(condition: Callable[[], object], *, seconds: float = 5.0) -> None:
    """Wait until something is so; fail if it never is."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - of whatever state, events or not
            await trio.sleep(0.005)


@asynccontextmanager
async def conversation(within: float = 5.0) -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks have to be done within some seconds."""
    with trio.fail_after(within):
        async with trio.open_nursery() as nursery:
            yield nursery


async def at_once(*jobs: Callable[[], Awaitable[object]], within: float = 5.0) -> list[object]:
    """What some coroutines return or raise, run side by side."""
    results: list[object] = [None] * len(jobs)

    async def run(index: int, job: Callable[[], Awaitable[object]]) -> None:
        try:
            results[index] = await job()
        except Exception as error:
            results[index] = error

    async with conversation(within) as nursery:
        for index, job in enumerate(jobs):
            nursery.start_soon(run, index, job)
    return results
