"""The stream of PDUs: the codec that copies, and the framing that doesn't, against each other."""

from dataclasses import dataclass, field
from itertools import cycle

from iscsifuse.errors import DigestError, FormatError
from iscsifuse.iscsi import request, response
from iscsifuse.iscsi.framing import FrameReceiver
from iscsifuse.iscsi.pdu import BHS_LENGTH, Pdu, decode, decode_stream

__all__ = ["check", "decoded"]

assert request
assert response  # both register the kinds of PDUs

_LIMITS = (512, 8192, 65536, 1 << 20)
_CHUNKS = ((1,), (47, 1, 3), (48,), (5, 600), (4096,), (1 << 20,), (100, 1, 1), (49, 2))


def check(data: bytes) -> None:
    """The first byte chooses limit, chunks and digests; the rest is what came."""
    if not data:
        return
    options, stream = data[0], data[1:]
    limit, chunks = _LIMITS[options & 3], _CHUNKS[options >> 2 & 7]
    pdus, error = decoded(stream, limit=limit)
    for pdu in pdus:
        raw = pdu.encode()
        assert decode_stream(raw) == (pdu, len(raw)), "what was encoded isn't what was decoded"
    _check_framing(stream, pdus, error, chunks, limit=limit)
    if options & 0x20:
        _check_digests(pdus, chunks, flip=int.from_bytes(data[-3:], "big"))


def decoded(
    stream: bytes, *, header_digest: bool = False, data_digest: bool = False, limit: int = 1 << 20
) -> tuple[list[Pdu], FormatError | DigestError | None]:
    """All PDUs of a stream, up to its end or the first error."""
    pdus: list[Pdu] = []
    view = memoryview(stream)
    try:
        while True:
            found = decode_stream(view, header_digest=header_digest, data_digest=data_digest, max_data=limit)
            if found is None:
                return pdus, None
            pdu, used = found
            assert BHS_LENGTH <= used <= len(view)
            assert len(pdu.data) <= limit
            pdus.append(pdu)
            view = view[used:]
    except (FormatError, DigestError) as error:
        return pdus, error


@dataclass
class _Frames:
    """Makes PDUs of frames."""

    pdus: list[Pdu] = field(default_factory=list)
    _header: bytes = b""
    _data: bytearray = field(default_factory=bytearray)

    def on_header(self, header: memoryview, ahs_length: int, data_length: int) -> memoryview | None:
        assert len(header) == BHS_LENGTH + ahs_length
        self._header = bytes(header)
        self._data = bytearray(data_length)
        if not data_length:
            self._complete()
            return None
        return memoryview(self._data)

    def on_data(self, *, intact: bool) -> None:
        if not intact:
            raise DigestError("a data digest", header=False)
        self._complete()

    def _complete(self) -> None:
        header, ahs = self._header[:BHS_LENGTH], self._header[BHS_LENGTH:]
        self.pdus.append(decode(header, ahs=ahs, data=bytes(self._data)))


def _check_framing(
    stream: bytes,
    pdus: list[Pdu],
    error: FormatError | DigestError | None,
    chunks: tuple[int, ...],
    *,
    limit: int,
    digests: bool = False,
) -> None:
    """However the stream is chunked, the framing finds the same PDUs and the same error."""
    frames = _Frames()
    receiver = FrameReceiver(frames, header_digest=digests, data_digest=digests, max_data=limit)
    failed: FormatError | DigestError | None = None
    rest = memoryview(stream)
    try:
        for chunk in cycle(chunks):
            if not rest:
                break
            used = 0
            for buffer in receiver.buffers():
                piece = rest[used : min(chunk, used + len(buffer))]
                buffer[: len(piece)] = piece
                used += len(piece)
            rest = rest[used:]
            receiver.received(used)
    except (FormatError, DigestError) as caught:
        failed = caught
    assert frames.pdus == pdus, "framing and codec see different PDUs"
    if failed is None:
        # The codec says that a segment is too long before the additional headers are there.
        assert error is None or receiver.amid, f"the framing overlooked: {error}"
    else:
        assert type(failed) is type(error), f"the framing says {failed!r}, the codec {error!r}"


def _check_digests(pdus: list[Pdu], chunks: tuple[int, ...], *, flip: int) -> None:
    """With digests the PDUs come out as they are; with one bit changed, that PDU never comes out."""
    pieces = [pdu.encode(header_digest=True, data_digest=True) for pdu in pdus]
    stream = b"".join(pieces)
    found, error = decoded(stream, header_digest=True, data_digest=True)
    assert found == pdus
    assert error is None
    _check_framing(stream, pdus, None, chunks, limit=1 << 20, digests=True)
    if stream:
        place = flip % (8 * len(stream))
        damaged = bytearray(stream)
        damaged[place // 8] ^= 1 << place % 8
        found, error = decoded(bytes(damaged), header_digest=True, data_digest=True)
        whole = 0
        for piece in pieces:  # how many PDUs end before the damage
            if place // 8 < len(piece):
                break
            place -= 8 * len(piece)
            whole += 1
        assert found == pdus[:whole], "a damaged PDU was taken for a good one"
        _check_framing(bytes(damaged), found, error, chunks, limit=1 << 20, digests=True)
