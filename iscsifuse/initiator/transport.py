"""A TCP connection to a portal, for one reader and one writer.

**Sending** is a plain call: `send` takes buffers, writes what the socket takes at once, and leaves the rest to the
writer task. Callers never wait here, so a cancelled caller can't tear a PDU; what was handed over is sent whole and
in order, or the connection is over. **Receiving** is for one task: `receive_now` puts bytes straight into the memory
that the protocol object offers.

The socket is used raw, not through trio's wrapper: a system call that would block is the only reason to go through
the event loop.

Source: RFC 7143 §4.2.1, §9.
"""

import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterable
from itertools import islice

import trio

from iscsifuse.errors import ConnectError, SessionLostError
from iscsifuse.initiator.loop import Loop
from iscsifuse.initiator.settings import Portal
from iscsifuse.iscsi.dataout import Buffer

__all__ = ["Transport"]

_GATHER = 512
"""Buffers in one gather write; the kernel takes 1024 (IOV_MAX)."""
_SOON = 4
"""Buffers that are sent together: as many small reads, or half as many writes. A send costs half as much as a small
read does in all; but with more of them the target would be kept waiting."""

_FEW = 8
"""Buffers that are better let go of one by one than counted together."""

_USER_TIMEOUT_MS = 30_000
"""How long sent bytes may stay unacknowledged before the kernel gives up: a second net below the NOP-Out pings."""

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_CLOSE_IN_ORDER = struct.pack("ii", 0, 0)

_WOULD_BLOCK = (BlockingIOError, InterruptedError)


class Transport:
    """An open connection.

    Args:
        sock: connected, and owned by this object from now on.
        portal: for messages.

    Attributes:
        portal: where it leads.
        bytes_sent: bytes given to the kernel.
        bytes_received: bytes taken from the kernel.
        broken: why sending failed, if it did.
        on_broken: called at once when sending fails.
    """

    def __init__(self, sock: socket.socket, portal: Portal) -> None:
        sock.setblocking(False)
        self.portal = portal
        self.bytes_sent = 0
        self.bytes_received = 0
        self.broken: SessionLostError | None = None
        self.on_broken: Callable[[SessionLostError], None] | None = None
        self._sock = sock
        self._pending: deque[Buffer] = deque()
        self._blocked = False  # the writer task has, or will get, the turn
        self._queued_to = 0  # ``bytes_sent`` once everything is sent; kept up to date only while blocked
        self._put_off = False  # the loop calls us before it sleeps
        self._loop = Loop.current()
        self._fd = sock.fileno()
        self._loop.watch(self._fd)
        self._wake_writer = trio.Event()
        self._closed = False

    @classmethod
    async def connect(cls, portal: Portal) -> "Transport":
        """Connect to a portal, trying each of its addresses.

        Raises:
            ConnectError: in one sentence.

        Cancellation: leaves nothing open; wrap it in a time limit.
        """
        try:
            stream = await trio.open_tcp_stream(portal.host, portal.port)
        except OSError as error:
            raise ConnectError(f"can't connect to {portal}: {_reason(error)}") from error
        except UnicodeError as error:  # the host name has letters that no host name has
            raise ConnectError(f"can't connect to {portal}: {error}") from error
        sock = socket.socket(fileno=stream.socket.detach())
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
        except OSError as error:
            sock.close()
            raise ConnectError(f"can't connect to {portal}: {_reason(error)}") from error
        return cls(sock, portal)

    @property
    def pending(self) -> bool:
        """Whether bytes wait for the socket to take them."""
        return bool(self._pending)

    @property
    def backlog(self) -> int:
        """Bytes that wait for a socket that takes no more: the other side doesn't read."""
        return self._queued_to - self.bytes_sent if self._blocked else 0

    def send(self, buffers: list[Buffer]) -> None:
        """Send buffers, in order, after everything that was sent before.

        They must not change until they are sent, which the caller knows from the target's answer; where that comes
        too early for it, see `own_pending`.
        """
        if self._closed:
            return
        self._pending.extend(buffers)
        if self._blocked:
            self._queued_to += _total(buffers)
        else:
            self._write()

    def send_soon(self, buffers: Collection[Buffer]) -> None:
        """Like `send`, but together with what others send who can run now, up to a few."""
        if self._closed:
            return
        self._pending.extend(buffers)
        if self._blocked:
            self._queued_to += _total(buffers)
        elif len(self._pending) >= _SOON:
            self._write()
        elif not self._put_off:
            self._put_off = True
            self._loop.put_off(self._write_put_off)

    def _write_put_off(self) -> None:
        """No task is running now, and none may be woken: see `Loop.put_off`."""
        self._put_off = False
        if not self._blocked and not self._closed:
            self._write(later=True)

    def send_now(self) -> None:
        """Send what was to be sent soon."""
        if self._put_off and not self._blocked:
            self._write()

    def own_pending(self) -> None:
        """Copy what isn't sent yet, so that the memory it was handed over in may change from now on."""
        self._pending = deque(bytes(buffer) for buffer in self._pending)

    def _write(self, *, later: bool = False) -> None:
        """Write until nothing is left or the socket is full.

        Args:
            later: whoever has to know of an obstacle is told in the next round of the event loop.
        """
        pending = self._pending
        while pending:
            try:
                sent = self._sock.sendmsg(islice(pending, _GATHER))
            except _WOULD_BLOCK:
                self._blocked = True
                if self._queued_to <= self.bytes_sent:  # what waited before, if anything did, has all been sent
                    self._queued_to = self.bytes_sent + _total(pending)
                if later:
                    self._loop.wake_soon(self._wake_the_writer)
                else:
                    self._wake_writer.set()
                return
            except OSError as error:
                self._pending.clear()
                self.broken = SessionLostError(f"the connection to {self.portal} broke: {_reason(error)}")
                if later:
                    self._loop.wake_soon(self._report_broken)
                else:
                    self._report_broken()
                return
            self.bytes_sent += sent
            if _FEW < len(pending) <= _GATHER and sent == _total(pending):
                pending.clear()
                return
            while sent:
                first = pending[0]
                if len(first) > sent:
                    pending[0] = memoryview(first)[sent:]
                    break
                sent -= len(first)
                pending.popleft()

    def _wake_the_writer(self) -> None:
        self._wake_writer.set()

    def _report_broken(self) -> None:
        if self.on_broken is not None and self.broken is not None:
            self.on_broken(self.broken)

    async def run_writer(self) -> None:
        """The writer task: sends what the socket didn't take at once. Runs until it is cancelled."""
        while True:
            await self._wake_writer.wait()
            self._wake_writer = trio.Event()
            while self._blocked and not self._closed:
                await trio.lowlevel.wait_writable(self._sock)
                self._blocked = False
                self._write()

    async def flush(self) -> None:
        """Wait until everything is sent; for phases without a writer task.

        Raises:
            SessionLostError: the connection broke.
        """
        while self._pending:
            await trio.lowlevel.wait_writable(self._sock)
            self._blocked = False
            self._write()
        if self.broken is not None:
            raise self.broken

    def receive_now(self, buffers: list[memoryview]) -> int | None:
        """Receive what is there.

        Args:
            buffers: filled in order.

        Returns:
            How many bytes came; 0 where the other side has closed; None where nothing is there yet.

        Raises:
            SessionLostError: the connection broke.
        """
        try:
            count = self._sock.recv_into(buffers[0]) if len(buffers) == 1 else self._sock.recvmsg_into(buffers)[0]
        except _WOULD_BLOCK:
            return None
        except OSError as error:
            raise SessionLostError(f"the connection to {self.portal} broke: {_reason(error)}") from error
        self.bytes_received += count
        return count

    def let_others_receive(self, receive: Callable[[], None]) -> None:
        """From now on ``receive`` may be called whenever something is there; see `Loop.look_around`."""
        self._loop.watch(self._fd, receive)

    def glance(self, limit: int) -> bool:
        """Look for a moment whether something comes; see `Loop.glance`.

        Args:
            limit: nanoseconds to look at most.

        Returns:
            Whether `receive_now` has something to say, and nobody else has.
        """
        return self._loop.glance(self._fd, limit)

    async def wait_readable(self) -> None:
        """Wait until `receive_now` has something to say."""
        await trio.lowlevel.wait_readable(self._sock)

    def reset_on_close(self) -> None:
        """From now on the end of this connection, be it by `close` or by this process's death, is a RST.

        The kernel then throws away what isn't sent yet. Otherwise it would go on to deliver it in the background, and
        an old write could reach the target when a newer one is there already.
        """
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)

    def close(self, *, in_order: bool = False) -> None:
        """Close the socket; whoever waits on it is woken. Does nothing the second time.

        Args:
            in_order: both sides have agreed on the end: a FIN will do, in spite of `reset_on_close`.
        """
        if not self._closed:
            self._closed = True
            if in_order:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_IN_ORDER)
            self._pending.clear()
            self._loop.unwatch(self._fd)
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


def _total(buffers: Iterable[Buffer]) -> int:
    return sum(map(len, buffers))


def _reason(error: OSError) -> str:
    """The system's words for an error; of the first one where several addresses were tried."""
    leaf: BaseException = error
    while not (isinstance(leaf, OSError) and leaf.errno) and leaf.__cause__ is not None:
        leaf = leaf.__cause__
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
    if isinstance(leaf, socket.gaierror):
        return "the host name can't be resolved"
    if not isinstance(leaf, OSError) or not leaf.errno:
        return str(leaf)
    words = os.strerror(leaf.errno)
    hint = " (is the port right, and the target running?)" if leaf.errno == errno.ECONNREFUSED else ""
    return words[0].lower() + words[1:] + hint
