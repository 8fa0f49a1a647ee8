"""A TCP relay that makes a loopback connection behave like a worse network: far away, narrow, silent, cut.

One thread, two queues per connection. Bytes that arrive are due after the delay, and not before the link has
carried what came earlier (rate); a queue that is full stops the reading, so that TCP pushes back as it would.
``up`` is from the initiator to the target, ``down`` the way back.
"""

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from support.ports import HOST

__all__ = ["Relay"]

_CHUNK = 1 << 18
_QUEUE_LIMIT = 32 << 20  # more than 1 Gbit/s holds in 200 ms
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER that makes close() send RST


@dataclass(slots=True, eq=False)
class _Way:
    """One direction of one connection."""

    source: socket.socket
    sink: socket.socket
    is_down: bool
    queue: deque[tuple[float, memoryview]] = field(default_factory=deque)
    queued: int = 0
    link_free: float = 0.0
    taken: int = 0  # bytes since the connection began
    at_end: bool = False  # the source has said all
    finished: bool = False  # ... and the sink was told so


class Relay:
    """Listens on a port of 127.0.0.1 and forwards to another one, until `close` (or the end of ``with``).

    The knobs may be turned at any moment, from any thread.
    """

    def __init__(self, port: int, *, delay: float = 0.0, rate: float | None = None) -> None:
        """Start to forward.

        Args:
            port: where connections are forwarded to.
            delay: seconds that bytes take, one way (0.002: 4 ms more per round trip).
            rate: bytes per second of one direction of one connection; None is as fast as it goes.
        """
        self.delay = delay
        self.rate = rate
        self.bytes_up = 0
        self.bytes_down = 0
        self.connections = 0
        self._target = port
        self._stalled = False
        self._blackholed = False
        self._refusing = False
        self._cut_down_at: int | None = None
        self._damage: dict[bool, tuple[int, int]] = {}  # by direction (down?): bytes to go, bytes to spare
        self.damaged = 0
        self._ways: list[_Way] = []
        self._lock = threading.Lock()
        self._turned = threading.Condition(self._lock)
        self._turns = 0
        self._stopping = False
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"relay-{self.port}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- knobs ---

    def cut(self, *, refuse: bool = False) -> None:
        """Reset every connection; with ``refuse``, new ones are refused until `resume`."""
        with self._lock:
            self._refusing = refuse
            if refuse:
                self._listener.close()
            self._reset_all()
            self._wake()
            # A closed socket lives on while the thread sleeps in select(2) on it: the port would still be open.
            turns = self._turns
            assert self._turned.wait_for(lambda: self._turns != turns, 10)

    def cut_after(self, down: int) -> None:
        """Reset the connection that carries the ``down``-th byte from now to the initiator, right after that byte."""
        with self._lock:
            self._cut_down_at = self.bytes_down + down

    def damage_after(self, count: int, *, down: bool, spare: int = 0) -> None:
        """Flip one bit of the ``count``-th byte from now that goes one way; ``damaged`` counts those that were hit.

        Args:
            count: 1 is the next one.
            down: to the initiator.
            spare: the first bytes of each connection that don't count: no digest protects a login.
        """
        with self._lock:
            self._damage[down] = (count, spare)

    def finish(self, *, down: bool) -> None:
        """Close one direction of every connection in good order (FIN), after what is on its way; not the other."""
        with self._lock:
            for way in self._ways:
                if way.is_down is down and not way.at_end:
                    way.queue.append((0.0, memoryview(b"")))
                    way.at_end = True
        self._wake()

    def stall(self) -> None:
        """Carry nothing, and lose nothing: bytes wait until `resume`. New connections are accepted."""
        self._stalled = True
        self._wake()

    def blackhole(self) -> None:
        """Swallow every byte. Connections of this time are reset by `resume`: they missed something."""
        self._blackholed = True
        self._wake()

    def resume(self) -> None:
        """Undo `stall`, `blackhole` and ``cut(refuse=True)``."""
        with self._lock:
            if self._blackholed:
                self._reset_all()
            if self._refusing:
                self._listener = self._listen(self.port)
            self._stalled = self._blackholed = self._refusing = False
        self._wake()

    def close(self) -> None:
        """Reset what is left, and end."""
        self._stopping = True
        self._wake()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._reset_all()
        for each in (self._listener, self._wake_in, self._wake_out):
            each.close()

    # --- the thread ---

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server((HOST, port), backlog=64)
        listener.setblocking(False)
        return listener

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_in.send(b"x", socket.MSG_DONTWAIT)

    def _reset_all(self) -> None:
        for way in self._ways:
            self._reset(way)
        self._ways.clear()

    @staticmethod
    def _reset(way: _Way) -> None:
        for end in (way.source, way.sink):
            if end.fileno() >= 0:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.close()

    def _run(self) -> None:
        # select(2): epoll and poll round timeouts up to whole milliseconds, which is much when the delay is one.
        while not self._stopping:
            with self._lock:
                selector, timeout = self._interests()
            with selector:
                for key, _ in selector.select(timeout):
                    if key.fileobj is self._wake_out:
                        with contextlib.suppress(BlockingIOError):
                            self._wake_out.recv(4096)
            with self._lock:
                self._turn()
                self._turns += 1
                self._turned.notify_all()

    def _interests(self) -> tuple[selectors.BaseSelector, float | None]:
        selector = selectors.SelectSelector()
        events: dict[socket.socket, int] = {self._wake_out: selectors.EVENT_READ}
        timeout = None
        if not self._refusing:
            events[self._listener] = selectors.EVENT_READ
        now = time.monotonic()
        for way in self._ways:
            if self._may_read(way):
                events[way.source] = events.get(way.source, 0) | selectors.EVENT_READ
            if way.queue and not self._stalled:
                wait = way.queue[0][0] - now
                if wait <= 0:
                    events[way.sink] = events.get(way.sink, 0) | selectors.EVENT_WRITE
                else:
                    timeout = wait if timeout is None else min(timeout, wait)
        for each, mask in events.items():
            selector.register(each, mask)
        return selector, timeout

    def _may_read(self, way: _Way) -> bool:
        return not way.at_end and way.queued < _QUEUE_LIMIT and not self._stalled

    def _turn(self) -> None:
        if not self._refusing:
            self._accept()
        for way in list(self._ways):
            if way.source.fileno() < 0 or way.sink.fileno() < 0:
                continue
            try:
                if self._may_read(way):
                    self._read(way)
                if not self._stalled:
                    self._write(way)
            except OSError:
                self._drop(way)
        finished = {id(way.source) for way in self._ways if way.finished}
        for way in list(self._ways):
            if way.finished and id(way.sink) in finished:
                self._drop(way)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection((HOST, self._target), timeout=5)
            except OSError:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                near.close()
                return
            for each in (near, far):
                each.setblocking(False)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ways += [_Way(near, far, is_down=False), _Way(far, near, is_down=True)]
            self.connections += 1

    def _read(self, way: _Way) -> None:
        try:
            # What is narrow is narrow for every byte: a trickle, not a lump now and then.
            data = way.source.recv(_CHUNK if self.rate is None else min(_CHUNK, max(1, int(self.rate * 0.05))))
        except BlockingIOError:
            return
        if self._blackholed:
            return
        data = self._damaged(way, data)
        now = time.monotonic()
        way.link_free = max(way.link_free, now) + (len(data) / self.rate if self.rate else 0.0)
        way.queue.append((way.link_free + self.delay, memoryview(data)))  # an empty one is the end
        way.queued += len(data)
        way.at_end = not data

    def _damaged(self, way: _Way, data: bytes) -> bytes:
        """What arrived, with one bit changed if its turn has come."""
        begin, way.taken = way.taken, way.taken + len(data)
        if way.is_down not in self._damage:
            return data
        count, spare = self._damage[way.is_down]
        start = max(0, spare - begin)  # the first byte of these that counts
        if start + count > len(data):
            self._damage[way.is_down] = (count - max(0, len(data) - start), spare)
            return data
        del self._damage[way.is_down]
        self.damaged += 1
        changed = bytearray(data)
        changed[start + count - 1] ^= 1 << (count % 8)
        return bytes(changed)

    def _write(self, way: _Way) -> None:
        while way.queue and way.queue[0][0] <= time.monotonic():
            due, data = way.queue.popleft()
            if not data:
                way.sink.shutdown(socket.SHUT_WR)
                way.finished = True
                return
            limit = len(data)
            if way.is_down and self._cut_down_at is not None:
                limit = min(limit, self._cut_down_at - self.bytes_down)
            try:
                sent = way.sink.send(data[:limit])
            except BlockingIOError:
                sent = 0
            way.queued -= sent
            if way.is_down:
                self.bytes_down += sent
            else:
                self.bytes_up += sent
            if way.is_down and self._cut_down_at == self.bytes_down:
                self._cut_down_at = None
                raise ConnectionResetError
            if sent < len(data):
                way.queue.appendleft((due, data[sent:]))
                return

    def _drop(self, way: _Way) -> None:
        """Reset a connection, both ways of it."""
        self._ways = [each for each in self._ways if each.source not in (way.source, way.sink)]
        self._reset(way)
