"""The event loop's ends: what is put off, and what is looked for without sleeping."""

import os
import socket
import time
from collections.abc import Callable

import pytest
import trio

from iscsifuse.fibres import here, run_ready
from iscsifuse.initiator.loop import Glance, Loop

MICROSECOND = 1000


async def test_put_off_until_every_task_has_run() -> None:
    loop = Loop.current()
    assert Loop.current() is loop
    seen: list[str] = []

    async def task(number: int) -> None:
        seen.append(f"task {number}")
        if number == 0:
            loop.put_off(lambda: seen.append("put off"))

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(task, number)
    assert sorted(seen[:5]) == [f"task {number}" for number in range(5)]
    assert seen[5:] == ["put off"]


async def test_what_was_put_off_can_wake_a_task_although_the_loop_is_about_to_sleep() -> None:
    loop = Loop.current()
    event = trio.Event()
    loop.put_off(lambda: loop.wake_soon(event.set))
    with trio.fail_after(2):
        await event.wait()


async def test_a_loop_for_each_run() -> None:
    here = Loop.current()

    async def there() -> Loop:
        return Loop.current()

    other = await trio.to_thread.run_sync(trio.run, there)
    assert other is not here


@pytest.fixture
def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


async def test_glance_sees_news(pair: tuple[socket.socket, socket.socket]) -> None:
    loop = Loop.current()
    ours, theirs = pair
    with ours, theirs:
        loop.watch(ours.fileno())
        began = time.monotonic_ns()
        assert not loop.glance(ours.fileno(), 300 * MICROSECOND)
        assert time.monotonic_ns() - began >= 300 * MICROSECOND
        theirs.send(b"x")
        began = time.monotonic_ns()
        assert loop.glance(ours.fileno(), 10_000_000 * MICROSECOND)
        assert time.monotonic_ns() - began < 5_000_000 * MICROSECOND
        theirs.close()
        assert loop.glance(ours.fileno(), MICROSECOND)  # an end is news, too
        loop.unwatch(ours.fileno())
        loop.unwatch(ours.fileno())


async def test_glance_ends_when_others_have_news(pair: tuple[socket.socket, socket.socket]) -> None:
    loop = Loop.current()
    ours, theirs = pair
    other, friend = socket.socketpair()
    with ours, theirs, other, friend:
        loop.watch(ours.fileno())
        loop.watch(other.fileno())
        friend.send(b"x")
        began = time.monotonic_ns()
        assert not loop.glance(ours.fileno(), 10_000_000 * MICROSECOND)
        theirs.send(b"x")
        assert not loop.glance(ours.fileno(), 10_000_000 * MICROSECOND)  # both: the loop shall see to both
        assert time.monotonic_ns() - began < 5_000_000 * MICROSECOND
        loop.unwatch(ours.fileno())
        loop.unwatch(other.fileno())


async def test_look_around_sends_and_receives_and_tells_what_it_is_worth(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    loop = Loop.current()
    ours, theirs = pair
    requests, programs = socket.socketpair()
    quiet, friend = socket.socketpair()
    seen: list[str] = []

    def receive() -> None:
        seen.append(ours.recv(10).decode())

    with ours, theirs, requests, programs, quiet, friend:
        for sock in (requests, quiet, ours):
            loop.watch(sock.fileno())
        loop.watch(ours.fileno(), receive)  # has a receiver from now on
        fd = requests.fileno()
        loop.put_off(lambda: seen.append("sent"))
        assert not loop.look_around(fd)
        assert seen == ["sent"]
        assert not loop.look_around(fd)
        theirs.send(b"answer")
        assert loop.look_around(fd)
        assert not loop.look_around(fd)
        assert seen == ["sent", "answer"]  # each once
        programs.send(b"request")
        assert loop.look_around(fd)
        assert requests.recv(10) == b"request"  # left to the caller
        friend.send(b"x")
        assert not loop.look_around(fd)  # for the event loop: nobody here can receive it
        theirs.send(b"more")
        loop.unwatch(ours.fileno())
        assert not loop.look_around(fd)
        assert seen == ["sent", "answer"]
        loop.unwatch(fd)
        loop.unwatch(quiet.fileno())


def test_how_long_to_look_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    glance = Glance(100 * MICROSECOND)
    assert glance.limit == 0
    glance.learn(500 * MICROSECOND)
    assert glance.limit == 0  # too far away to be worth it
    for _ in range(10):
        glance.learn(60 * MICROSECOND)
    assert glance.limit == 100 * MICROSECOND
    limits = []
    for _ in range(6):
        glance.learn(500 * MICROSECOND)
        limits.append(glance.limit)
    assert limits == sorted(limits, reverse=True)
    assert limits[-1] == 0


def test_nobody_looks_where_there_is_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    glance = Glance(100 * MICROSECOND)
    glance.learn(10 * MICROSECOND)
    assert glance.limit == 0


class _Fibre:
    """Notes when it is called; may do something then."""

    def __init__(self, do: Callable[[], None] = lambda: None) -> None:
        self.do = do
        self.calls = 0

    def wake(self) -> None:
        here().ready.append(self)

    def go_on(self) -> None:
        here().fibre = self
        self.calls += 1
        self.do()
        here().fibre = None


async def test_fibres_that_were_woken_go_on_in_order_and_one_after_the_other() -> None:
    second = _Fibre()
    seen: list[int] = []

    def wake_the_second() -> None:
        second.wake()
        run_ready()
        seen.append(second.calls)

    first = _Fibre(wake_the_second)
    first.wake()
    assert first.calls == 0
    run_ready()
    assert (first.calls, second.calls, seen) == (1, 1, [0])


async def test_a_fibre_that_nobody_calls_is_called_before_the_loop_sleeps() -> None:
    called = trio.Event()
    assert Loop.current()
    fibre = _Fibre(called.set)
    fibre.wake()
    with trio.fail_after(5):
        await called.wait()
    assert fibre.calls == 1
