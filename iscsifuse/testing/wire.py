"""One byte stream as PDUs, through digests, script and validator.

What is received goes past the validator first, then the script; what is sent past the script first, then the
validator. One task reads (whoever calls :meth:`Wire.receive`), one writes (:meth:`Wire.run_writer`);
:meth:`Wire.send` only queues and never waits. Digests are switched on by the login, and take effect for what is
queued from then on. The stream may be a socket or any other `trio.abc.Stream`, such as one in memory.

A wire that has ended stays ended: ``receive`` raises :class:`WireClosedError`, ``send`` does nothing.
"""

import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio
from trio.testing import MemoryReceiveStream, MemorySendStream

from iscsifuse.errors import FormatError
from iscsifuse.iscsi.digest import DIGEST_LENGTH, crc32c_bytes
from iscsifuse.iscsi.pdu import BHS_LENGTH, Pdu, decode, padding, split_lengths
from iscsifuse.testing.actions import Answer, End, Hang, Pass, Pause, Step, reparse
from iscsifuse.testing.script import IN, OUT, Channel
from iscsifuse.testing.validator import Validator

__all__ = ["Incoming", "Wire", "WireClosedError"]

_RECEIVE = 1 << 16
_BATCH = 1 << 18
_QUEUE_LIMIT = 8 << 20
_LINGER = struct.pack("ii", 1, 0)


class WireClosedError(Exception):
    """The connection is over; its text says why."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A PDU that came.

    Attributes:
        pdu: the PDU.
        answer: what a script wants to be answered instead of executing it.
        late: seconds that a script wants it to be executed later.
        intact: False where its data digest was wrong.
    """

    pdu: Pdu
    answer: Answer | None = None
    late: float = 0.0
    intact: bool = True


class Wire:
    """One connection.

    Args:
        stream: the bytes; the wire closes it.
        channel: the script's view of this connection.
        validator: watches it.

    Attributes:
        header_digest: PDUs carry a CRC32C of their headers.
        data_digest: PDUs carry a CRC32C of their data segments.
        validator: watches it.
        received_bytes: how many came so far.
    """

    def __init__(self, stream: trio.abc.Stream, *, channel: Channel, validator: Validator) -> None:
        self.header_digest = False
        self.data_digest = False
        self.validator = validator
        self.received_bytes = 0
        self._stream = stream
        self._channel = channel
        self._buffer = bytearray()
        self._incoming: deque[Step | Incoming] = deque()
        self._queue: deque[tuple[Pdu, bool, bool]] = deque()
        self._queued_bytes = 0
        self._changed = trio.Event()
        self._writing = False
        self._ended = False

    # -- receiving -------------------------------------------------------------------------------------------------

    async def receive(self) -> Incoming:
        """The next PDU, after whatever the script does.

        Raises:
            WireClosedError: the connection ended, or can't be followed any more.

        Cancellation: bytes that came stay in the buffer; call it again.
        """
        while True:
            while self._incoming:
                step = self._incoming.popleft()
                if isinstance(step, Incoming):
                    return step
                await self._carry_out(step)
            pdu, intact = await self._next_pdu()
            for step in self._channel.steps(IN, pdu, encode=lambda pdu: pdu.encode()):
                if not isinstance(step, Pass):
                    self._incoming.append(step)
                    continue
                try:
                    payload = step.payload if isinstance(step.payload, Pdu) else reparse(step.payload)
                except FormatError as error:
                    raise WireClosedError(f"a PDU that can't be read: {error}") from None
                if payload is not None:
                    self._incoming.append(Incoming(payload, step.answer, step.late, intact))

    async def _next_pdu(self) -> tuple[Pdu, bool]:
        await self._fill(BHS_LENGTH)
        ahs_length, data_length = split_lengths(self._buffer)
        head_end = BHS_LENGTH + ahs_length
        start = head_end + (DIGEST_LENGTH if self.header_digest else 0)
        if self.header_digest:
            await self._fill(start)
            if crc32c_bytes((self._buffer[:head_end],)) != self._buffer[head_end:start]:
                self.validator.note("a header digest that doesn't match")
                raise WireClosedError("a header digest that doesn't match")
        data_end = start + data_length
        body_end = data_end + len(padding(data_length))
        end = body_end + (DIGEST_LENGTH if self.data_digest and data_length else 0)
        await self._fill(end)
        intact = True
        with memoryview(self._buffer) as view:
            header, ahs = bytes(view[:BHS_LENGTH]), bytes(view[BHS_LENGTH:head_end])
            data, pad = bytes(view[start:data_end]), bytes(view[data_end:body_end])
            if end > body_end and crc32c_bytes((view[start:body_end],)) != view[body_end:end]:
                self.validator.note("a data digest that doesn't match")
                intact = False
        del self._buffer[:end]
        try:
            pdu = decode(header, ahs=ahs, data=data)
        except FormatError as error:
            self.validator.note(f"a PDU that can't be read: {error}")
            raise WireClosedError(f"a PDU that can't be read: {error}") from None
        self.validator.received(pdu, header=header, pad=pad)
        return pdu, intact

    async def _fill(self, count: int) -> None:
        """Have at least ``count`` bytes in the buffer."""
        while len(self._buffer) < count:
            if self._ended:
                raise WireClosedError("closed")
            try:
                data = await self._stream.receive_some(max(_RECEIVE, count - len(self._buffer)))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise WireClosedError("the connection broke") from None
            if not data:
                raise WireClosedError("the initiator closed the connection")
            self.received_bytes += len(data)
            self._buffer += data

    async def _carry_out(self, step: Step) -> None:
        """A step that isn't passing something on."""
        match step:
            case Pause(seconds):
                await trio.sleep(seconds)
            case Hang():
                await trio.sleep_forever()
            case End(reset):
                self.close(reset=reset)
                raise WireClosedError("a script ended the connection")
            case _:
                pass

    # -- sending ---------------------------------------------------------------------------------------------------

    def send(self, pdu: Pdu) -> None:
        """Queue a PDU."""
        if self._ended:
            return
        self._queue.append((pdu, self.header_digest, self.data_digest))
        self._queued_bytes += BHS_LENGTH + len(pdu.data)
        self._wake()

    async def room(self) -> None:
        """Wait until the queue isn't too long: this is how a slow initiator slows the disk down."""
        while self._queued_bytes > _QUEUE_LIMIT and not self._ended:
            await self._changed.wait()

    async def drain(self) -> None:
        """Wait until all that was queued has been handed to the stream, or the wire has ended."""
        while (self._queue or self._writing) and not self._ended:
            await self._changed.wait()

    async def run_writer(self) -> None:
        """Send what is queued, until the wire ends. Exactly one task does this."""
        try:
            while not self._ended:
                if not self._queue:
                    await self._changed.wait()
                    continue
                self._writing = True
                await self._write_batch()
                self._writing = False
                self._wake()
        except WireClosedError:
            pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.close()

    async def _write_batch(self) -> None:
        """Small PDUs travel together; a step that isn't bytes parts them."""
        batch: list[bytes] = []
        size = 0
        while self._queue and size < _BATCH:
            pdu, header_digest, data_digest = self._queue.popleft()
            self._queued_bytes -= BHS_LENGTH + len(pdu.data)
            encode = _encoder(header_digest=header_digest, data_digest=data_digest)
            for step in self._channel.steps(OUT, pdu, encode=encode):
                if not isinstance(step, Pass):
                    await self._flush(batch)
                    await self._carry_out(step)
                    continue
                if isinstance(step.payload, Pdu):
                    self.validator.sent(step.payload)
                    batch.append(encode(step.payload))
                else:
                    # Bytes that a script made: the initiator will see them as the PDU that they were made from.
                    self.validator.sent(pdu)
                    batch.append(step.payload)
                size += len(batch[-1])
        await self._flush(batch)

    async def _flush(self, batch: list[bytes]) -> None:
        if batch:
            data = batch[0] if len(batch) == 1 else b"".join(batch)
            batch.clear()
            await self._stream.send_all(data)

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self, *, reset: bool = False) -> None:
        """End the connection at once; what is queued is lost.

        Args:
            reset: with RST, where the stream is a socket.
        """
        if self._ended:
            return
        self._ended = True
        if isinstance(self._stream, trio.SocketStream):
            if reset:
                self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
            self._stream.socket.close()
        elif isinstance(self._stream, trio.StapledStream):
            # Streams in memory: their halves are closed without waiting, though the interface says otherwise.
            for half in (self._stream.send_stream, self._stream.receive_stream):
                if isinstance(half, MemorySendStream | MemoryReceiveStream):
                    half.close()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _encoder(*, header_digest: bool, data_digest: bool) -> Callable[[Pdu], bytes]:
    return lambda pdu: pdu.encode(header_digest=header_digest, data_digest=data_digest)
