import contextlib
import tracemalloc
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import DigestError, FormatError
from iscsifuse.iscsi.framing import STAGING_LENGTH, FrameReceiver
from iscsifuse.iscsi.pdu import BHS_LENGTH, Pdu, decode, decode_stream
from iscsifuse.iscsi.response import R2T, DataIn, NopIn, ScsiResponse


@dataclass
class Collector:
    """Keeps every frame, and puts every data segment into memory of its own, fenced in."""

    pdus: list[Pdu] = field(default_factory=list)
    intact: list[bool] = field(default_factory=list)
    memory: bytearray = field(default_factory=bytearray)
    _header: bytes = b""

    def on_header(self, header: memoryview, ahs_length: int, data_length: int) -> memoryview | None:
        assert len(header) == BHS_LENGTH + ahs_length
        self._header = bytes(header)
        if not data_length:
            self._keep(b"", intact=True)
            return None
        self.memory = bytearray(b"\xee" * (data_length + 2))
        return memoryview(self.memory)[1:-1]

    def on_data(self, *, intact: bool) -> None:
        assert self.memory[0] == self.memory[-1] == 0xEE
        self._keep(bytes(self.memory[1:-1]), intact=intact)

    def _keep(self, data: bytes, *, intact: bool) -> None:
        self.pdus.append(decode(self._header[:BHS_LENGTH], ahs=self._header[BHS_LENGTH:], data=data))
        self.intact.append(intact)


def receiver(
    handler: Collector, *, header_digest: bool = False, data_digest: bool = False, max_data: int = 1 << 24
) -> FrameReceiver:
    return FrameReceiver(handler, header_digest=header_digest, data_digest=data_digest, max_data=max_data)


def scatter(target: FrameReceiver, data: bytes) -> int:
    """One scatter receive; how many bytes there was room for."""
    count = 0
    for buffer in target.buffers():
        assert len(buffer)
        piece = data[count : count + len(buffer)]
        buffer[: len(piece)] = piece
        count += len(piece)
    target.received(count)
    return count


def scatter_all(target: FrameReceiver, data: bytes) -> None:
    while data:
        data = data[scatter(target, data) :]


def naive(stream: bytes, *, header_digest: bool, data_digest: bool) -> list[Pdu]:
    pdus = []
    while result := decode_stream(stream, header_digest=header_digest, data_digest=data_digest):
        pdus.append(result[0])
        stream = stream[result[1] :]
    return pdus


words = st.integers(0, 0xFFFFFFFF)
lengths = st.integers(0, 40) | st.sampled_from([0, 1, 2, 3, 4, 512, 513, 4095, 8192])
headers = st.integers(0, 255).map(lambda n: bytes(4 * n)) | st.just(b"") | st.just(b"AHS!")


@st.composite
def pdus(draw: st.DrawFn) -> Pdu:
    data = draw(st.binary(min_size=1, max_size=8)) * 8192
    data = data[: draw(lengths)]
    itt = draw(words)
    ahs = draw(headers)
    match draw(st.integers(0, 3)):
        case 0:
            return DataIn(itt=itt, ahs=ahs, data=data, buffer_offset=draw(words), data_sn=draw(words))
        case 1:
            return ScsiResponse(itt=itt, ahs=ahs, data=data, status=draw(st.integers(0, 255)))
        case 2:
            return NopIn(itt=itt, ahs=ahs, data=data)
        case _:
            return R2T(itt=itt, ahs=ahs, desired_data_transfer_length=draw(words))


digests = st.booleans()
cuts = st.lists(st.integers(1, 60) | st.sampled_from([1, 47, 48, 49, 52, 4096, 9000]), min_size=1, max_size=40)


@given(
    wanted=st.lists(pdus(), max_size=8),
    header_digest=digests,
    data_digest=digests,
    cuts=cuts,
    feeding=st.booleans(),
)
def test_any_stream_in_any_pieces_is_what_the_naive_codec_makes_of_it(
    wanted: list[Pdu], header_digest: bool, data_digest: bool, cuts: list[int], feeding: bool
) -> None:
    stream = b"".join(pdu.encode(header_digest=header_digest, data_digest=data_digest) for pdu in wanted)
    assert naive(stream, header_digest=header_digest, data_digest=data_digest) == wanted
    got = Collector()
    target = receiver(got, header_digest=header_digest, data_digest=data_digest)
    start = turn = 0
    while start < len(stream):
        piece = stream[start : start + cuts[turn % len(cuts)]]
        turn += 1
        if feeding:
            target.feed(piece)
            start += len(piece)
        else:
            start += scatter(target, piece)
    assert got.pdus == wanted
    assert all(got.intact)


@pytest.mark.parametrize("header_digest", [False, True])
@pytest.mark.parametrize("data_digest", [False, True])
def test_from_its_first_byte_to_the_one_before_its_last_a_frame_is_there_in_part(
    header_digest: bool, data_digest: bool
) -> None:
    target = receiver(Collector(), header_digest=header_digest, data_digest=data_digest)
    assert not target.amid
    for pdu in (DataIn(itt=1, data=b"abcdefg"), NopIn(itt=2), ScsiResponse(itt=3, ahs=bytes(8), data=b"xy")):
        frame = pdu.encode(header_digest=header_digest, data_digest=data_digest)
        for count, byte in enumerate(frame, 1):
            assert scatter(target, bytes([byte])) == 1
            assert target.amid is (count < len(frame))


@pytest.mark.parametrize("header_digest", [False, True])
@pytest.mark.parametrize("data_digest", [False, True])
def test_every_cut_of_a_stream(header_digest: bool, data_digest: bool) -> None:
    wanted: list[Pdu] = [DataIn(itt=1, data=b"abcdefg"), NopIn(itt=2), ScsiResponse(itt=3, ahs=bytes(8), data=b"xy")]
    stream = b"".join(pdu.encode(header_digest=header_digest, data_digest=data_digest) for pdu in wanted)
    for first in range(len(stream) + 1):
        got = Collector()
        target = receiver(got, header_digest=header_digest, data_digest=data_digest)
        scatter_all(target, stream[:first])
        complete = naive(stream[:first], header_digest=header_digest, data_digest=data_digest)
        # A frame whose digest is still missing isn't handed over early.
        assert got.pdus == complete
        scatter_all(target, stream[first:])
        assert got.pdus == wanted
        assert all(got.intact)


@pytest.mark.conformance("B10")
def test_one_byte_at_a_time() -> None:
    wanted: list[Pdu] = [DataIn(itt=1, data=bytes(1000)), NopIn(itt=2)]
    got = Collector()
    target = receiver(got, header_digest=True, data_digest=True)
    for byte in b"".join(pdu.encode(header_digest=True, data_digest=True) for pdu in wanted):
        assert scatter(target, bytes([byte])) == 1
    assert got.pdus == wanted


# --- large payloads ---


@pytest.mark.parametrize("length", [65536, 65537, 200_001])
@pytest.mark.parametrize("digest", [False, True])
def test_large_payloads_are_received_where_they_belong(length: int, digest: bool) -> None:
    data = bytes(range(251)) * (length // 251 + 1)
    wanted: list[Pdu] = [DataIn(itt=number, data=data[number : number + length]) for number in range(1, 4)]
    stream = b"".join(pdu.encode(header_digest=digest, data_digest=digest) for pdu in wanted)
    got = Collector()
    target = receiver(got, header_digest=digest, data_digest=digest)
    head = BHS_LENGTH + 4 * digest
    assert scatter(target, stream[:head]) == head
    own, behind = target.buffers()
    assert own.obj is got.memory
    assert len(own) == length
    assert len(behind) == 512  # the next payload is not to be staged, its header is
    assert scatter(target, stream[head : head + 1000]) == 1000
    assert len(target.buffers()[0]) == length - 1000
    scatter_all(target, stream[head + 1000 :])
    assert got.pdus == wanted
    assert all(got.intact)


def test_behind_a_small_payload_much_is_taken_at_once() -> None:
    first, second = DataIn(itt=1, data=bytes(8192)), DataIn(itt=2, data=bytes(8191))
    got = Collector()
    target = receiver(got)
    scatter(target, first.encode()[:100])
    own, behind = target.buffers()
    assert len(own) == 8192 - 52
    assert len(behind) == STAGING_LENGTH
    rest = first.encode()[100:] + second.encode()
    assert scatter(target, rest) == len(rest)  # payload's end and a whole PDU in one receive
    assert got.pdus == [first, second]


def test_what_came_with_the_header_is_not_received_again() -> None:
    pdu = DataIn(itt=1, data=bytes(range(256)) * 512)
    stream = pdu.encode()
    got = Collector()
    target = receiver(got)
    assert scatter(target, stream) == STAGING_LENGTH
    assert len(target.buffers()[0]) == len(stream) - STAGING_LENGTH
    scatter_all(target, stream[STAGING_LENGTH:])
    assert got.pdus == [pdu]


def test_buffers_may_be_asked_for_again() -> None:
    pdu = NopIn(itt=1, data=b"abc")
    got = Collector()
    target = receiver(got)
    stream = pdu.encode() * 2
    scatter(target, stream[:100])  # the first one, and 48 bytes of the second
    target.buffers()
    target.buffers()
    scatter_all(target, stream[100:])
    assert got.pdus == [pdu, pdu]


# --- divert ---


@pytest.mark.conformance(96)
@pytest.mark.parametrize("digest", [False, True])
@pytest.mark.parametrize("came", [0, 1, 500, 999, 1000])
def test_diverted_data_leaves_the_memory_alone(came: int, digest: bool) -> None:
    pdu, following = DataIn(itt=1, data=b"\x55" * 1000), NopIn(itt=2)
    head = BHS_LENGTH + 4 * digest
    stream = pdu.encode(header_digest=digest, data_digest=digest)
    if came == 1000 and not digest:
        stream, pdu = DataIn(itt=1, data=b"\x55" * 999).encode(), DataIn(itt=1, data=b"\x55" * 999)
        came = 999  # complete, but for its padding
    got = Collector()
    target = receiver(got, header_digest=digest, data_digest=digest)
    scatter_all(target, stream[: head + came])
    memory = got.memory
    before = bytes(memory)
    assert before.count(0x55) == came
    target.divert()
    assert target.buffers()[0].obj is not memory
    scatter_all(target, stream[head + came :] + following.encode(header_digest=digest))
    assert memory == before
    assert [p.itt for p in got.pdus] == [1, 2]  # the stream is still in step


def test_divert_without_data_under_way_does_nothing() -> None:
    got = Collector()
    target = receiver(got)
    target.divert()
    scatter_all(target, NopIn(itt=1, data=b"abcd").encode())
    target.divert()
    scatter_all(target, NopIn(itt=2, data=b"efgh").encode())
    assert [pdu.data for pdu in got.pdus] == [b"abcd", b"efgh"]


# --- what is refused ---


@pytest.mark.conformance("B2")
@pytest.mark.parametrize("header_digest", [False, True])
def test_longer_data_than_agreed_is_refused_before_memory_is_taken(header_digest: bool) -> None:
    stream = DataIn(itt=1, data=bytes(0xFFFFFF)).encode(header_digest=header_digest)[:52]
    got = Collector()
    target = receiver(got, header_digest=header_digest, max_data=8192)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"16777215 bytes.*8192"):
            target.feed(stream[: BHS_LENGTH + 4 * header_digest])  # not even its first byte has come
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert not got.pdus


def test_the_limit_itself_is_accepted() -> None:
    pdu = DataIn(itt=1, data=bytes(512))
    got = Collector()
    scatter_all(receiver(got, max_data=512), pdu.encode())
    assert got.pdus == [pdu]
    with pytest.raises(FormatError):
        scatter_all(receiver(got, max_data=511), pdu.encode())


@pytest.mark.conformance("B2")
def test_additional_headers_of_255_words() -> None:
    pdu = NopIn(itt=1, ahs=bytes(range(255)) * 4, data=b"abc")
    got = Collector()
    scatter_all(receiver(got, header_digest=True), pdu.encode(header_digest=True))
    assert got.pdus == [pdu]


# --- digests ---


@pytest.mark.conformance(77)
@pytest.mark.conformance(78)
@pytest.mark.parametrize("position", range(BHS_LENGTH + 4 + 4))
def test_a_damaged_header_is_noticed_wherever_it_is_damaged(position: int) -> None:
    stream = bytearray(NopIn(itt=1, ahs=b"AHS.", data=b"abcd").encode(header_digest=True))
    stream[position] ^= 0x10 if position != 4 else 1  # one more word of additional headers is there
    got = Collector()
    target = receiver(got, header_digest=True, max_data=8192)
    with pytest.raises(DigestError) as caught:
        target.feed(bytes(stream) + bytes(64))
    assert caught.value.header
    assert not got.pdus


@pytest.mark.conformance(77)
@pytest.mark.conformance(79)
@pytest.mark.parametrize("position", [0, 4, 5, 7, 8, 11])  # data, padding, digest
def test_damaged_data_is_handed_over_as_damaged(position: int) -> None:
    first, second = DataIn(itt=1, data=b"abcde"), DataIn(itt=2, data=b"abcde")
    stream = bytearray(first.encode(data_digest=True) + second.encode(data_digest=True))
    stream[BHS_LENGTH + position] ^= 0x80
    got = Collector()
    target = receiver(got, data_digest=True)
    scatter_all(target, bytes(stream))
    assert got.intact == [False, True]
    assert got.pdus[1] == second


@given(
    wanted=st.lists(pdus(), min_size=1, max_size=4),
    where=st.integers(0, 1 << 20),
    bit=st.integers(0, 7),
    cuts=cuts,
)
def test_no_single_bit_is_lost_between_two_digests(wanted: list[Pdu], where: int, bit: int, cuts: list[int]) -> None:
    pieces = [pdu.encode(header_digest=True, data_digest=True) for pdu in wanted]
    stream = bytearray(b"".join(pieces))
    where %= len(stream)
    stream[where] ^= 1 << bit
    victim = sum(where >= end for end in accumulate(map(len, pieces)))  # whose bit it is
    got = Collector()
    target = receiver(got, header_digest=True, data_digest=True, max_data=8192)
    start = turn = 0
    error: DigestError | None = None
    while start < len(stream) and error is None:
        try:
            start += scatter(target, bytes(stream[start : start + cuts[turn % len(cuts)]]))
        except DigestError as caught:
            error = caught
        turn += 1
    if error is not None:
        assert error.header
        assert got.pdus == wanted[:victim]
        assert all(got.intact)
        return
    assert got.pdus[:victim] == wanted[:victim]
    assert all(got.intact[:victim])
    if len(got.pdus) > victim:  # otherwise the bit made the header longer than the stream
        assert not got.intact[victim]
        assert got.pdus[victim + 1 :] == wanted[victim + 1 :]


def test_the_handlers_exceptions_pass() -> None:
    class Angry(Collector):
        def on_data(self, *, intact: bool) -> None:
            raise FormatError(f"not today, {intact=}")

    with pytest.raises(FormatError, match="not today"):
        receiver(Angry()).feed(NopIn(itt=1, data=b"abcd").encode())


@given(st.binary(max_size=3000), digests, digests)
@pytest.mark.conformance("B12")
def test_arbitrary_bytes(noise: bytes, header_digest: bool, data_digest: bool) -> None:
    class Sink(Collector):
        def _keep(self, data: bytes, *, intact: bool) -> None:
            assert intact or data_digest
            self.intact.append(intact or bool(data))

    target = FrameReceiver(Sink(), header_digest=header_digest, data_digest=data_digest, max_data=8192)
    with contextlib.suppress(FormatError, DigestError):
        target.feed(noise)
