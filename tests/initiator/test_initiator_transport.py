import random
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from iscsifuse.errors import ConnectError, SessionLostError
from iscsifuse.initiator.settings import Portal
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi.dataout import Buffer

PORTAL = Portal("10.0.0.1")


def _pair(*, small: bool = False) -> tuple[Transport, socket.socket]:
    ours, theirs = socket.socketpair()
    if small:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel makes its minimum of it
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    theirs.setblocking(False)
    return Transport(ours, PORTAL), theirs


@pytest.fixture
async def small() -> AsyncIterator[tuple[Transport, socket.socket]]:
    transport, theirs = _pair(small=True)
    yield transport, theirs
    transport.close()
    theirs.close()


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Transport, socket.socket]]:
    transport, theirs = _pair()
    yield transport, theirs
    transport.close()
    theirs.close()


async def _receive(sock: socket.socket, length: int, *, piece: int = 1 << 16) -> bytes:
    got = bytearray()
    while len(got) < length:
        await trio.lowlevel.wait_readable(sock)
        data = sock.recv(min(piece, length - len(got)))
        if not data:
            break
        got += data
    return bytes(got)


def _nothing_more(sock: socket.socket) -> None:
    with pytest.raises(BlockingIOError):
        sock.recv(1)


async def test_transport_partial_writes_keep_the_order(small: tuple[Transport, socket.socket]) -> None:
    transport, theirs = small
    generator = random.Random(1)
    expected = bytearray()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.run_writer)
            for _ in range(300):
                buffers: list[Buffer] = []
                for _ in range(generator.randrange(1, 5)):
                    piece = generator.randbytes(generator.choice((1, 47, 48, 512, 4096, 20000)))
                    expected += piece
                    buffers.append(piece if generator.random() < 0.5 else memoryview(piece))
                transport.send(buffers)
                if generator.random() < 0.2:
                    await trio.lowlevel.checkpoint()
            waiting = transport.pending
            assert waiting
            assert await _receive(theirs, len(expected), piece=1777) == expected
            nursery.cancel_scope.cancel()
    _nothing_more(theirs)
    assert not transport.pending
    assert transport.bytes_sent == len(expected)


async def test_transport_sends_at_once_what_the_socket_takes(pair: tuple[Transport, socket.socket]) -> None:
    transport, theirs = pair
    transport.send([b"abc", memoryview(b"def")])
    assert theirs.recv(10) == b"abcdef"
    assert not transport.pending


async def test_transport_a_few_are_sent_together_and_no_more(pair: tuple[Transport, socket.socket]) -> None:
    transport, theirs = pair
    for few in (b"a", b"b", b"c"):
        transport.send_soon([few])
        with pytest.raises(BlockingIOError):
            theirs.recv(10, socket.MSG_DONTWAIT)
    transport.send_soon([b"d"])
    assert theirs.recv(10) == b"abcd"
    transport.send_soon([b"e"])
    await trio.sleep(0.01)  # the loop sends what is left, before it sleeps
    assert theirs.recv(10) == b"e"


async def test_transport_more_buffers_than_one_gather_write_takes(pair: tuple[Transport, socket.socket]) -> None:
    transport, theirs = pair
    transport.send([bytes([number & 0xFF]) for number in range(3000)])
    assert await _receive(theirs, 3000) == bytes(number & 0xFF for number in range(3000))


async def test_transport_the_writer_sleeps_and_wakes_again(small: tuple[Transport, socket.socket]) -> None:
    transport, theirs = small
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.run_writer)
            for round_ in range(5):
                data = bytes([round_]) * 100_000
                transport.send([data])
                assert transport.pending
                assert await _receive(theirs, len(data)) == data
                await trio.testing.wait_all_tasks_blocked()
                assert not transport.pending
            nursery.cancel_scope.cancel()


async def test_transport_a_cancelled_writer_tears_nothing(small: tuple[Transport, socket.socket]) -> None:
    transport, theirs = small
    data = random.Random(2).randbytes(300_000)
    transport.send([data])
    got = b""
    with trio.fail_after(10):
        while len(got) < len(data):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transport.run_writer)
                got += await _receive(theirs, min(7000, len(data) - len(got)))
                nursery.cancel_scope.cancel()
            # As after the socket was full: whoever was cancelled had the turn.
            transport._wake_writer.set()
    assert got == data


async def test_transport_flush_needs_no_writer(small: tuple[Transport, socket.socket]) -> None:
    transport, theirs = small
    data = bytes(200_000)
    transport.send([data])
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.flush)
            assert await _receive(theirs, len(data)) == data
    assert not transport.pending


async def test_transport_the_backlog_is_what_waits_for_a_full_socket(
    small: tuple[Transport, socket.socket],
) -> None:
    transport, theirs = small
    put = got = 0

    async def flushed(count: int) -> None:
        nonlocal got
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.flush)
            got += len(await _receive(theirs, count))
            nursery.cancel_scope.cancel()

    transport.send([b"abc"])
    put += 3
    assert transport.backlog == 0
    with trio.fail_after(10):
        for _ in range(3):  # also when it was full before
            transport.send([bytes(200_000), memoryview(bytes(5))])
            transport.send([b"more"])
            transport.send_soon([b"later"])
            put += 200_014
            assert transport.backlog == put - transport.bytes_sent > 0
            transport.own_pending()
            await flushed(100_000)
            assert transport.backlog == put - transport.bytes_sent
            await flushed(put - got)
            assert transport.backlog == 0


async def test_transport_own_pending_frees_the_memory(small: tuple[Transport, socket.socket]) -> None:
    transport, theirs = small
    memory = bytearray(b"x" * 200_000)
    transport.send([b"head", memoryview(memory)])
    assert transport.pending
    transport.own_pending()
    memory[:] = b"y" * len(memory)
    memory.clear()  # refused as long as there is a view
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.flush)
            assert await _receive(theirs, 200_004) == b"head" + b"x" * 200_000


async def test_transport_a_broken_pipe_is_told_at_once_and_once(pair: tuple[Transport, socket.socket]) -> None:
    transport, theirs = pair
    told: list[SessionLostError] = []
    transport.on_broken = told.append
    theirs.close()
    transport.send([b"abc"])
    assert len(told) == 1
    assert told[0] is transport.broken
    assert "the connection to 10.0.0.1:3260 broke: broken pipe" in str(told[0])
    assert not transport.pending
    with pytest.raises(SessionLostError, match="broke"):
        await transport.flush()


async def test_transport_the_writer_tells_of_a_broken_pipe(small: tuple[Transport, socket.socket]) -> None:
    transport, theirs = small
    told = trio.Event()

    def on_broken(_: SessionLostError) -> None:
        told.set()
        transport.close()

    transport.on_broken = on_broken
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.run_writer)
            transport.send([bytes(300_000)])
            await trio.testing.wait_all_tasks_blocked()
            theirs.close()
            await told.wait()
            nursery.cancel_scope.cancel()


async def test_transport_receives_into_given_memory(pair: tuple[Transport, socket.socket]) -> None:
    transport, theirs = pair
    first, second = bytearray(3), bytearray(10)
    assert transport.receive_now([memoryview(first), memoryview(second)]) is None
    theirs.send(b"abcdefg")
    assert transport.receive_now([memoryview(first), memoryview(second)]) == 7
    assert first == b"abc"
    assert second[:4] == b"defg"
    theirs.send(b"hi")
    await transport.wait_readable()
    assert transport.receive_now([memoryview(second)]) == 2
    assert transport.bytes_received == 9
    theirs.close()
    await transport.wait_readable()
    assert transport.receive_now([memoryview(second)]) == 0


async def test_transport_a_reset_is_a_lost_session() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        host, port = listener.getsockname()
        transport = await Transport.connect(Portal(host, port))
        accepted, _ = listener.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        await transport.wait_readable()
        with pytest.raises(SessionLostError, match="connection reset by peer"):
            transport.receive_now([memoryview(bytearray(10))])
        transport.close()


async def test_transport_closing_wakes_who_waits(pair: tuple[Transport, socket.socket]) -> None:
    transport, _ = pair
    woken: list[str] = []

    async def reader() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await transport.wait_readable()
        woken.append("reader")

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            transport.close()
    assert woken == ["reader"]


async def test_transport_a_closed_one_sends_nothing_and_says_so_when_asked(
    pair: tuple[Transport, socket.socket],
) -> None:
    transport, theirs = pair
    transport.close()
    transport.close()
    transport.send([b"abc"])
    assert not transport.pending
    assert theirs.recv(10) == b""
    with pytest.raises(SessionLostError):
        transport.receive_now([memoryview(bytearray(10))])


async def test_transport_closing_forgets_what_waits(small: tuple[Transport, socket.socket]) -> None:
    transport, _ = small
    transport.send([bytes(300_000)])
    assert transport.pending
    transport.close()
    nothing = not transport.pending
    assert nothing


async def test_transport_connect_sets_the_socket_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport = await Transport.connect(Portal(*listener.getsockname()))
        sock = transport._sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > 0
        transport.close()


async def test_transport_connection_refused_in_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectError) as caught:
        await Transport.connect(Portal("127.0.0.1", port))
    assert str(caught.value) == (
        f"can't connect to 127.0.0.1:{port}: connection refused (is the port right, and the target running?)"
    )


async def test_transport_every_address_refused_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectError, match="connection refused"):
        await Transport.connect(Portal("localhost", port))


class _NoNames(trio.abc.HostnameResolver):
    async def getaddrinfo(self, *_: object, **__: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def getnameinfo(self, *_: object) -> tuple[str, str]:
        raise NotImplementedError


async def test_transport_an_unknown_host_in_words() -> None:
    trio.socket.set_custom_hostname_resolver(_NoNames())
    with pytest.raises(
        ConnectError, match=r"can't connect to nowhere\.example:3260: the host name can't be resolved"
    ):
        await Transport.connect(Portal("nowhere.example"))


async def test_transport_letters_that_no_host_name_has() -> None:
    with pytest.raises(ConnectError, match="can't connect to"):
        await Transport.connect(Portal("ab€\u2028c"))


async def test_transport_a_socket_that_cannot_be_set_up_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(socket.socket, "setsockopt", fail)
        monkeypatch.setattr("trio._highlevel_socket.SocketStream.setsockopt", fail)
        with pytest.raises(ConnectError, match="invalid argument"):
            await Transport.connect(Portal(*listener.getsockname()))
        accepted, _ = listener.accept()
        assert accepted.recv(1) == b""
        accepted.close()
