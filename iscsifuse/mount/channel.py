"""The line between a daemon and the commands ``status`` and ``umount``: a Unix socket beside the mount.

Why not through the mount itself? An extended attribute is asked for with each write (see ``operations``), a mount on
a regular file has no room for a status file, and whoever waits for a FUSE request can't be interrupted. A socket has
none of these, and the kernel vouches for the process at its other end.

The socket lives in the abstract name space, named after the device number of the mount, so both sides find it from
the mount table, and nothing stays behind. On it the daemon speaks, in lines of JSON, and the client listens:

1. the status document, at once;
2. when the mount has ended and all is written back: ``{"errors": [...]}``, sentences about what could not be written.

Who may listen: root, the daemon's own user, the owner of the files, and everybody where the mount is shared.
"""

import json
import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence

import trio

from iscsifuse.errors import MountError

__all__ = ["Channel", "Line", "channel_name"]

log = logging.getLogger(__name__)

_UCRED = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""
_MOST_LISTENERS = 64
_SEND_LIMIT = 10.0
_BIND_LIMIT = 30.0
_MAX_LINE = 64 << 20


def channel_name(device: str) -> bytes:
    """Address of the socket for a mount with that st_dev ("0:40")."""
    return b"\0iscsifuse/" + device.encode()


def _peer(raw: bytes) -> tuple[int, int]:
    pid, uid, _ = _UCRED.unpack(raw)
    return pid, uid


class Channel:
    """The daemon's side.

    Args:
        device: st_dev of the mount.
        status: makes the status document.
        may_listen: whether a user id may.
    """

    def __init__(
        self, device: str, *, status: Callable[[], Mapping[str, object]], may_listen: Callable[[int], bool]
    ) -> None:
        self._name = channel_name(device)
        self._status = status
        self._may_listen = may_listen
        self._listening = trio.CancelScope()
        self._farewell: bytes | None = None
        self._leaving = trio.Event()
        self._listeners = 0
        self._silent = trio.Event()

    async def serve(self) -> None:
        """Answer until ``stop_listening``. Whatever goes wrong is logged: a mount doesn't end for it."""
        async with trio.open_nursery() as nursery:
            with self._listening:
                try:
                    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                        await self._bind(listener)
                        listener.listen(_MOST_LISTENERS)
                        while True:
                            connection, _ = await listener.accept()
                            self._listeners += 1
                            nursery.start_soon(self._answer, connection)
                except OSError as error:
                    log.warning("iscsifuse status can't be served: %s", error)

    def stop_listening(self) -> None:
        """The mount has ended: give the name free for the next one. Who listens already hears the rest."""
        self._listening.cancel()

    async def say_farewell(self, errors: Sequence[str], *, limit: float = 2.0) -> None:
        """Tell all who still listen how it ended.

        Args:
            errors: sentences.
            limit: seconds until those who don't take it are left alone.
        """
        self.stop_listening()
        self._farewell = json.dumps({"errors": list(errors)}).encode() + b"\n"
        self._leaving.set()
        with trio.move_on_after(limit):
            while self._listeners:
                await self._silent.wait()
                self._silent = trio.Event()

    async def _bind(self, listener: trio.socket.SocketType) -> None:
        """Take the name; the last mount with the same number may be a moment from giving it free."""
        deadline = trio.current_time() + _BIND_LIMIT
        while True:
            try:
                await listener.bind(self._name)
            except OSError:
                if trio.current_time() > deadline:
                    raise
                await trio.sleep(0.2)
            else:
                return

    async def _answer(self, connection: trio.socket.SocketType) -> None:
        try:
            with connection:
                raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
                if self._listeners > _MOST_LISTENERS or not self._may_listen(_peer(raw)[1]):
                    return
                stream = trio.SocketStream(connection)
                document = json.dumps(self._status(), default=str).encode() + b"\n"
                with trio.fail_after(_SEND_LIMIT):
                    await stream.send_all(document)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._until_gone, stream, nursery.cancel_scope)
                    await self._leaving.wait()
                    if self._farewell is not None:
                        await stream.send_all(self._farewell)
                    nursery.cancel_scope.cancel()
        except* (OSError, trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # The listener went away.
        except* Exception as group:
            log.exception("the status could not be told", exc_info=group)
        finally:
            self._listeners -= 1
            self._silent.set()

    @staticmethod
    async def _until_gone(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        """Wait until the listener hangs up; what it says isn't of interest."""
        while await stream.receive_some(4096):
            pass
        scope.cancel()


class Line:
    """The client's side; a context manager.

    Attributes:
        pid: the daemon's process id, as the kernel says.
        uid: its user.
    """

    def __init__(self, device: str, *, timeout: float = 5.0) -> None:
        """Connect.

        Args:
            device: st_dev of the mount.
            timeout: seconds for connecting.

        Raises:
            OSError: nobody is there (ConnectionRefusedError), or nobody answers (TimeoutError).
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(channel_name(device))
            raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            self.pid, self.uid = _peer(raw)
        except BaseException:
            self._socket.close()
            raise
        self._received = b""

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def is_trusted(self, owner: int | None) -> bool:
        """Whether the other end is who it should be: root, or the user who mounted."""
        return self.uid in (0, os.geteuid()) or self.uid == owner

    def next(self, *, timeout: float) -> dict[str, object] | None:
        """The next thing that the daemon says, or None when it has hung up.

        Args:
            timeout: seconds that it may be silent.

        Raises:
            TimeoutError: it said nothing.
            MountError: what it said makes no sense.
        """
        self._socket.settimeout(timeout)
        while b"\n" not in self._received:
            try:
                piece = self._socket.recv(1 << 16)
            except ConnectionError:
                return None
            if not piece:
                return None
            self._received += piece
            if len(self._received) > _MAX_LINE:
                raise MountError("the daemon talks too much")
        line, _, self._received = self._received.partition(b"\n")
        try:
            value = json.loads(line)
        except ValueError as error:
            raise MountError("the daemon talks nonsense") from error
        if not isinstance(value, dict):
            raise MountError("the daemon talks nonsense")
        return value
