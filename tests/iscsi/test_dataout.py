import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.iscsi.dataout import Buffer, data_out_burst
from iscsifuse.iscsi.pdu import RESERVED_TAG
from iscsifuse.iscsi.request import DataOut

LUN = bytes(range(1, 9))


def burst(
    payload: memoryview,
    *,
    segment_length: int,
    offset: int = 0,
    header_digest: bool = False,
    data_digest: bool = False,
) -> list[Buffer]:
    return data_out_burst(
        payload,
        lun=LUN,
        itt=0x01020304,
        ttt=0xA1A2A3A4,
        exp_stat_sn=0xFFFFFFFE,
        buffer_offset=offset,
        segment_length=segment_length,
        header_digest=header_digest,
        data_digest=data_digest,
    )


@pytest.mark.conformance(56)
@pytest.mark.conformance(57)
@pytest.mark.conformance(58)
@pytest.mark.conformance(77)
@given(
    payload=st.binary(min_size=1, max_size=200),
    segment_length=st.integers(1, 250),
    offset=st.integers(0, 0xFFFFFFFF - 250),
    header_digest=st.booleans(),
    data_digest=st.booleans(),
)
def test_same_bytes_as_the_naive_codec(
    payload: bytes, segment_length: int, offset: int, header_digest: bool, data_digest: bool
) -> None:
    pieces = [payload[i : i + segment_length] for i in range(0, len(payload), segment_length)]
    expected = [
        DataOut(
            final=number == len(pieces) - 1,
            lun=LUN,
            itt=0x01020304,
            ttt=0xA1A2A3A4,
            exp_stat_sn=0xFFFFFFFE,
            data_sn=number,
            buffer_offset=offset + number * segment_length,
            data=piece,
        ).encode(header_digest=header_digest, data_digest=data_digest)
        for number, piece in enumerate(pieces)
    ]
    output = burst(
        memoryview(payload),
        segment_length=segment_length,
        offset=offset,
        header_digest=header_digest,
        data_digest=data_digest,
    )
    assert b"".join(output) == b"".join(expected)


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize(("length", "segment_length", "count"), [(65536, 8192, 8), (1 << 20, 1 << 20, 1), (7, 4, 2)])
def test_the_payload_is_not_copied(length: int, segment_length: int, count: int, digests: bool) -> None:
    memory = bytearray(length)
    payload = memoryview(memory)
    output = burst(payload, segment_length=segment_length, header_digest=digests, data_digest=digests)
    views = [piece for piece in output if isinstance(piece, memoryview) and piece.obj is memory]
    assert len(views) == count
    assert sum(map(len, views)) == length
    assert sum(len(piece) for piece in output) < length + 60 * count


def test_no_more_buffers_than_needed() -> None:
    assert len(burst(memoryview(bytes(8192)), segment_length=4096)) == 4  # header, data, header, data


@pytest.mark.parametrize("digests", [False, True])
def test_no_empty_buffers(digests: bool) -> None:
    # A gather write that makes no progress on a buffer would look like a closed connection.
    output = burst(memoryview(bytes(8191)), segment_length=512, header_digest=digests, data_digest=digests)
    assert all(len(piece) for piece in output)


def test_unsolicited_data_carries_the_reserved_tag() -> None:
    output = data_out_burst(
        memoryview(b"abcd"),
        lun=LUN,
        itt=1,
        ttt=RESERVED_TAG,
        exp_stat_sn=2,
        buffer_offset=3,
        segment_length=512,
        header_digest=False,
        data_digest=False,
    )
    assert bytes(output[0])[20:24] == b"\xff\xff\xff\xff"
