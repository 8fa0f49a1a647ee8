"""Taking turns at a descriptor that stands for /dev/fuse: a datagram socket, one datagram for each request."""

import socket
from collections.abc import Iterator
from typing import Any

import pyfuse3
import pytest
import trio
import trio.lowlevel
import trio.testing

from iscsifuse.initiator.loop import Loop
from iscsifuse.mount.turns import Turns, taking_turns

STOP = b"stop"


@pytest.fixture
def device() -> Iterator[tuple[socket.socket, socket.socket]]:
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with kernel, ours:
        yield kernel, ours


class Workers:
    """What pyfuse3's workers do; ``handle`` is their request handler."""

    def __init__(self, turns: Turns, ours: socket.socket, handle: Any) -> None:
        self.turns = turns
        self.ours = ours
        self.handle = handle
        self.inside = 0
        self.taken: list[bytes] = []
        self.over = False

    async def work(self) -> None:
        while True:
            async with self.turns:
                self.inside += 1
                assert self.inside == 1
                try:
                    if self.over:
                        return
                    await self.turns.wait_readable(self.ours.fileno())
                finally:
                    self.inside -= 1
            request = self.ours.recv(100, socket.MSG_DONTWAIT)  # it must be there
            if request == STOP:
                self.over = True
                return
            self.taken.append(request)
            await self.handle(request)


async def _serve(ours: socket.socket, handle: Any, *, workers: int = 4) -> Workers:
    turns = Turns()
    group = Workers(turns, ours, handle)
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(workers):
                nursery.start_soon(group.work)
    finally:
        turns.end()
    return group


async def test_every_request_is_taken_once(device: tuple[socket.socket, socket.socket]) -> None:
    kernel, ours = device

    async def handle(_: bytes) -> None:
        """Answered from memory."""

    async def ask() -> None:
        for number in range(300):
            kernel.send(b"%d" % number)
            if number % 7 == 0:
                await trio.sleep(0.001)
            elif number % 3 == 0:
                await trio.lowlevel.checkpoint()
        kernel.send(STOP)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            group = await _serve(ours, handle)
    assert group.taken == [b"%d" % number for number in range(300)]


async def test_requests_that_wait_let_others_be_taken(device: tuple[socket.socket, socket.socket]) -> None:
    kernel, ours = device
    waiting = 0
    most = 0
    go = trio.Event()

    async def handle(_: bytes) -> None:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        if waiting == 4:
            go.set()
        await go.wait()
        waiting -= 1

    for number in range(8):
        kernel.send(b"%d" % number)
    kernel.send(STOP)
    with trio.fail_after(5):
        group = await _serve(ours, handle, workers=4)
    assert most == 4
    assert len(group.taken) == 8


async def test_a_stream_of_hits_does_not_starve_others(device: tuple[socket.socket, socket.socket]) -> None:
    kernel, ours = device
    stopped = False
    handled = 0

    async def handle(_: bytes) -> None:
        nonlocal handled
        handled += 1
        assert handled < 10_000
        kernel.send(STOP if stopped else b"again")

    async def somebody_else() -> None:
        nonlocal stopped
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        stopped = True

    kernel.send(b"first")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, ours, handle)
            nursery.start_soon(somebody_else)


async def test_cancelled_workers_leave_it_to_the_others(device: tuple[socket.socket, socket.socket]) -> None:
    kernel, ours = device
    turns = Turns()

    async def handle(_: bytes) -> None:
        await trio.lowlevel.checkpoint()

    group = Workers(turns, ours, handle)
    scopes: list[trio.CancelScope] = []

    async def cancellable() -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await group.work()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(cancellable)
            await trio.testing.wait_all_tasks_blocked()
            for scope in scopes[:3]:  # whoever has the turn, and whoever sleeps
                scope.cancel()
                await trio.testing.wait_all_tasks_blocked()
                kernel.send(b"x")
                await trio.testing.wait_all_tasks_blocked()
            kernel.send(STOP)
    turns.end()
    assert group.taken == [b"x"] * 3


async def test_a_descriptor_that_is_closed_is_told_of(device: tuple[socket.socket, socket.socket]) -> None:
    _, ours = device
    turns = Turns()

    async def close() -> None:
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(ours.fileno())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        with pytest.raises(trio.ClosedResourceError):
            async with turns:
                await turns.wait_readable(ours.fileno())
    turns.end()
    turns.end()


async def test_nobody_looks_for_requests_while_a_command_is_under_way(
    device: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, ours = device
    turns = Turns()
    turns.begin(ours.fileno())
    loop = Loop.current()
    looked = 0

    def glance(_fd: int, _limit: int) -> bool:
        nonlocal looked
        looked += 1
        return False

    monkeypatch.setattr(loop, "glance", glance)

    async def wait_once() -> None:
        async with turns:
            await turns.wait_readable(ours.fileno())

    for under_way, expected in ((1, 0), (0, 1)):
        loop.under_way = under_way
        turns._glance.limit = 1000  # each wait teaches it how long one takes here and now
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_once)
            await trio.testing.wait_all_tasks_blocked()
            kernel.send(b"x")
        ours.recv(10)
        assert looked == expected
    loop.under_way = 0
    turns.end()


def test_pyfuse3_gets_its_own_back() -> None:
    before = vars(pyfuse3)["trio"]
    with taking_turns():
        ours = vars(pyfuse3)["trio"]
        assert ours is not before
        assert isinstance(ours.Lock(), Turns)
    assert vars(pyfuse3)["trio"] is before
