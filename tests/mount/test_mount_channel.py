"""The socket between a daemon and the commands."""

import os
import socket
import time
import uuid
from collections.abc import Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from iscsifuse.errors import MountError
from iscsifuse.mount.channel import Channel, Line, channel_name
from iscsifuse.mount.client import _farewell


@pytest.fixture
def device() -> str:
    return f"test:{uuid.uuid4().hex}"


def channel(device: str, may_listen: Callable[[int], bool] = lambda uid: uid == os.geteuid()) -> Channel:
    return Channel(device, status=lambda: {"schema": 1, "odd": {1, 2}}, may_listen=may_listen)


async def connect(device: str) -> Line:
    """In a thread, as the other end is in this one."""
    for _ in range(200):
        try:
            return await trio.to_thread.run_sync(Line, device)
        except ConnectionRefusedError:
            await trio.sleep(0.01)
    raise AssertionError("nobody listens")


async def ask(line: Line) -> dict[str, object] | None:
    return await trio.to_thread.run_sync(lambda: line.next(timeout=5))


async def test_status_then_farewell(device: str) -> None:
    made = channel(device)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.serve)
        with await connect(device) as line:
            assert (line.pid, line.uid) == (os.getpid(), os.geteuid())
            assert line.is_trusted(None)
            first = await ask(line)
            assert first == {"schema": 1, "odd": "{1, 2}"}
            made.stop_listening()
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(ConnectionRefusedError):
                Line(device)
            nursery.start_soon(made.say_farewell, ["LUN 1: lost"])
            assert await ask(line) == {"errors": ["LUN 1: lost"]}
            assert await ask(line) is None


async def test_who_hangs_up_is_not_waited_for(device: str) -> None:
    made = channel(device)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.serve)
        for _ in range(3):
            with await connect(device) as line:
                await ask(line)
        with trio.fail_after(1):
            await made.say_farewell([])
        nursery.cancel_scope.cancel()


async def test_who_does_not_take_the_farewell_is_left(device: str) -> None:
    made = channel(device)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.serve)
        with await connect(device) as line:
            await ask(line)
            with trio.fail_after(3):
                await made.say_farewell(["x" * (64 << 20)], limit=0.2)
        nursery.cancel_scope.cancel()


async def test_strangers_hear_nothing(device: str) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel(device, lambda _: False).serve)
        with await connect(device) as line:
            assert await ask(line) is None
        nursery.cancel_scope.cancel()


def test_only_root_the_owner_and_oneself_are_trusted() -> None:
    line = Line.__new__(Line)
    line.uid = 12345
    assert not line.is_trusted(None)
    assert not line.is_trusted(54321)
    assert line.is_trusted(12345)
    line.uid = 0
    assert line.is_trusted(54321)


async def test_the_name_is_waited_for(device: str) -> None:
    with trio.socket.socket(trio.socket.AF_UNIX) as other:
        await other.bind(channel_name(device))
        made = channel(device)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.serve)
            await trio.testing.wait_all_tasks_blocked(0.01)
            other.close()
            with await connect(device) as line:
                assert await ask(line) is not None
            nursery.cancel_scope.cancel()


@pytest.mark.expect_log("iscsifuse status can't be served")
async def test_a_name_that_stays_taken_is_no_disaster(device: str, autojump_clock: MockClock) -> None:  # noqa: ARG001
    with trio.socket.socket(trio.socket.AF_UNIX) as other:
        await other.bind(channel_name(device))
        await channel(device).serve()


@pytest.mark.expect_log("the status could not be told")
async def test_a_status_that_fails_is_no_disaster(device: str) -> None:
    def broken() -> dict[str, object]:
        raise KeyError("bug")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Channel(device, status=broken, may_listen=lambda _: True).serve)
        for _ in range(2):
            with await connect(device) as line:
                assert await ask(line) is None
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("said", [b"nonsense\n", b"[1]\n", b"\xff\n"])
async def test_nonsense_is_refused(device: str, said: bytes) -> None:
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(channel_name(device))
        listener.listen()
        line = Line(device)
        connection, _ = await listener.accept()
        with connection, line:
            await connection.send(said)
            with pytest.raises(MountError, match="nonsense"):
                line.next(timeout=5)
            with pytest.raises(TimeoutError):
                line.next(timeout=0.01)
            connection.close()
            assert line.next(timeout=5) is None


def test_a_status_that_comes_late_is_no_farewell() -> None:
    line = Line.__new__(Line)
    line._received = b""
    line._socket, daemon = socket.socketpair()
    with line, daemon:
        daemon.sendall(b'{"schema": 1}\n')
        assert _farewell(line, time.monotonic() + 0.2) is None
        daemon.sendall(b'{"schema": 1}\n{"errors": ["LUN 1: lost"]}\n')
        assert _farewell(line, time.monotonic() + 5) == ["LUN 1: lost"]
