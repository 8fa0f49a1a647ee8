"""The receiving side of the stream: bytes go straight to where they are wanted.

The hot path of a read is here. A naive receiver reads into a buffer, cuts PDUs out of it and copies payloads to
their places. This one asks, as soon as a header is in, where the data segment belongs, and from then on offers
*that* memory for receiving. What was received together with the header is copied, once; the rest never is.

::

                 48 + AHS + digest bytes there                 data segment there
      HEADER ────────────────────────────────> DATA ───────────────────────────────> TRAILER ──> HEADER
        ^              (no data segment)                                (padding, digest)          │
        └──────────────────────────────────────────────────────────────────────────────────────────┘

Small bytes (headers, padding, digests, and whatever the kernel had besides) pass through one staging buffer. While
a payload is being received the caller gets *two* buffers, the rest of the payload and the staging buffer, so one
scatter receive takes the payload's end and the next header together. Behind a large payload only a little of the
staging buffer is offered: the next payload is probably large too, and should not be staged.

The consumer (`FrameHandler`) is asked for each frame: ``on_header`` returns the memory for its data segment, and
``on_data`` says that it is complete. The same stream through `iscsifuse.iscsi.pdu.decode_stream` gives the same
PDUs however it is chunked; the tests hold both against each other.

Source: RFC 7143 §11.2, §13.1.
"""

from collections.abc import Callable
from typing import Protocol

from iscsifuse.errors import DigestError, FormatError
from iscsifuse.iscsi.digest import DIGEST_LENGTH, crc32c_bytes
from iscsifuse.iscsi.pdu import BHS_LENGTH, split_lengths

__all__ = ["STAGING_LENGTH", "FrameHandler", "FrameReceiver"]

STAGING_LENGTH = 65536
_LARGE = 65536
_BEHIND_LARGE = 512
_PAD = (0, 3, 2, 1)


class FrameHandler(Protocol):
    """Who gets the frames. Exceptions of both methods pass through `FrameReceiver.received`."""

    def on_header(self, header: memoryview, ahs_length: int, data_length: int) -> memoryview | None:
        """A header is there.

        Args:
            header: basic header and additional headers; valid during the call only.
            ahs_length: bytes of additional headers behind the first 48.
            data_length: bytes of the data segment that follows.

        Returns:
            Where the data segment shall go: writable, contiguous, ``data_length`` bytes. None where
            ``data_length`` is 0 (the frame is then complete, and ``on_data`` isn't called).
        """
        ...

    def on_data(self, *, intact: bool) -> None:
        """The data segment of the last header is complete; ``intact`` is False where its digest doesn't match."""
        ...


class FrameReceiver:
    """Cuts a stream into frames without copying large payloads.

    Use: offer the buffers of `buffers` to a scatter receive, tell `received` how many bytes came, repeat.

    Args:
        handler: gets each header and the completion of each data segment.
        header_digest: whether headers carry CRC32C.
        data_digest: whether data segments do.
        max_data: longest data segment that is accepted, in bytes.
        take: takes in whole frames in fewer steps: called with the staging buffer and where unread bytes begin
            and end in it, returns where the first frame begins that it didn't take.
    """

    def __init__(
        self,
        handler: FrameHandler,
        *,
        header_digest: bool,
        data_digest: bool,
        max_data: int,
        take: Callable[[memoryview, int, int], int] | None = None,
    ) -> None:
        self._handler = handler
        self._header_digest = DIGEST_LENGTH if header_digest else 0
        self._data_digest = DIGEST_LENGTH if data_digest else 0
        self._max_data = max_data
        self._take = take
        self._staging = memoryview(bytearray(STAGING_LENGTH))
        self._start = 0  # unread bytes of the staging buffer lie in [start, end)
        self._end = 0
        self._payload: memoryview | None = None  # the data segment being received
        self._filled = 0  # bytes of it that are there
        self._trailer = 0  # bytes of padding and digest that follow it
        self._large = False

    @property
    def amid(self) -> bool:
        """Whether a frame has been received in part."""
        return self._payload is not None or self._start != self._end

    def buffers(self) -> list[memoryview]:
        """Where the next received bytes belong, in order; never empty."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start:  # less than a header or a trailer lies there: cheaper to move than to receive in two goes
            rest = self._end - self._start
            self._staging[:rest] = bytes(self._staging[self._start : self._end])
            self._start, self._end = 0, rest
        payload = self._payload
        if payload is not None and self._filled < len(payload):
            limit = self._end + (_BEHIND_LARGE if self._large else STAGING_LENGTH)
            return [payload[self._filled :], self._staging[self._end : limit]]
        return [self._staging[self._end :]]

    def received(self, count: int) -> None:
        """Take in ``count`` bytes that were put into `buffers`.

        Raises:
            FormatError: lengths that can't be; nothing was allocated for them.
            DigestError: a header digest doesn't match.
        """
        payload = self._payload
        if payload is not None and self._filled < len(payload):
            direct = min(count, len(payload) - self._filled)
            self._filled += direct
            count -= direct
        self._end += count
        self._advance()

    def feed(self, data: bytes | memoryview) -> None:
        """Take in bytes that were received elsewhere, such as behind the last PDU of the login phase."""
        view = memoryview(data)
        while len(view):
            used = 0
            for buffer in self.buffers():
                piece = view[used : used + len(buffer)]
                buffer[: len(piece)] = piece
                used += len(piece)
            view = view[used:]
            self.received(used)

    def divert(self) -> None:
        """Let the rest of the data segment that is being received go to memory that nobody reads."""
        if self._payload is not None:
            self._payload = memoryview(bytearray(len(self._payload)))

    def _advance(self) -> None:
        """Handle everything that is complete."""
        staging = self._staging
        while True:
            payload = self._payload
            if payload is None:
                if self._take is not None and self._end - self._start > BHS_LENGTH:
                    self._start = self._take(staging, self._start, self._end)
                if not self._next_header():
                    return
                continue
            start = self._start
            missing = len(payload) - self._filled
            if missing:
                piece = self._end - start
                if piece < missing:
                    payload[self._filled : self._filled + piece] = staging[start : start + piece]
                    self._filled += piece
                    self._start = start + piece
                    return
                payload[self._filled :] = staging[start : start + missing]
                self._filled += missing
                self._start = start = start + missing
            trailer = self._trailer
            if self._end - start < trailer:
                return
            intact = True
            if self._data_digest:
                pad_end = start + trailer - DIGEST_LENGTH
                expected = crc32c_bytes((payload, staging[start:pad_end]))
                intact = staging[pad_end : pad_end + DIGEST_LENGTH] == expected
            self._start = start + trailer
            self._payload = None
            self._handler.on_data(intact=intact)

    def _next_header(self) -> bool:
        """Handle one header, if it is complete; say whether it was."""
        start = self._start
        available = self._end - start
        if available < BHS_LENGTH:
            return False
        staging = self._staging
        ahs_length, data_length = split_lengths(staging, start)
        length = BHS_LENGTH + ahs_length
        digest_length = self._header_digest
        if available < length + digest_length:
            return False
        end = start + length
        header = staging[start:end]
        if digest_length and staging[end : end + DIGEST_LENGTH] != crc32c_bytes((header,)):
            raise DigestError("the header digest of a PDU doesn't match", header=True)
        if data_length > self._max_data:  # after the digest: where that is wrong, the length may be, too
            raise FormatError(
                f"the target sent a data segment of {data_length} bytes, but {self._max_data} is the limit"
            )
        self._start = end + digest_length
        payload = self._handler.on_header(header, ahs_length, data_length)
        if payload is not None:
            self._payload = payload
            self._filled = 0
            self._trailer = _PAD[data_length & 3] + self._data_digest
            self._large = data_length >= _LARGE
        return True
