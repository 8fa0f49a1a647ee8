import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi import lba_status
from iscsifuse.scsi.lba_status import Extent, Provisioning

MAPPED, DEALLOCATED, ANCHORED = Provisioning.MAPPED, Provisioning.DEALLOCATED, Provisioning.ANCHORED

# Laid out by hand after SBC-3 §5.4.2: blocks 8 to 15 deallocated, 16 to 19 mapped.
GOLDEN = "00000024 00000000 0000000000000008 00000008 01 000000 0000000000000010 00000004 00 000000"


def _extent(lba: int, blocks: int, kind: Provisioning = DEALLOCATED) -> Extent:
    return Extent(lba=lba, blocks=blocks, provisioning=kind)


def _data(*descriptors: tuple[int, int, int], length: int | None = None) -> bytes:
    body = b"".join(
        lba.to_bytes(8, "big") + blocks.to_bytes(4, "big") + bytes([kind, 0, 0, 0])
        for lba, blocks, kind in descriptors
    )
    return (4 + len(body) if length is None else length).to_bytes(4, "big") + bytes(4) + body


def test_golden() -> None:
    extents = (_extent(8, 8), _extent(16, 4, MAPPED))
    assert lba_status.decode(bytes.fromhex(GOLDEN), lba=8, capacity_blocks=20) == extents
    assert lba_status.encode(extents) == bytes.fromhex(GOLDEN)
    assert [extent.mapped for extent in extents] == [False, True]


@pytest.mark.conformance(129)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # a huge count, and one that only just reaches past the end
        (_data((0, 2**32 - 1, 1)), [_extent(0, 100)]),
        (_data((0, 50, 1), (50, 51, 2)), [_extent(0, 50), _extent(50, 50, ANCHORED)]),
        (_data((0, 100, 0), (100, 1, 1)), [_extent(0, 100, MAPPED)]),
        # what isn't known is mapped: 3 (SBC-4: mapped), 4 (unknown), 15; the upper half of the byte is reserved
        (_data((0, 1, 3), (1, 1, 4), (2, 1, 15)), [_extent(n, 1, MAPPED) for n in range(3)]),
        (_data((0, 1, 0xF1)), [_extent(0, 1)]),
        # the list goes wrong on the way: a gap, an overlap, backwards, nothing
        (_data((0, 10, 1), (11, 10, 1)), [_extent(0, 10)]),
        (_data((0, 10, 1), (9, 10, 1)), [_extent(0, 10)]),
        (_data((0, 10, 1), (0, 10, 1)), [_extent(0, 10)]),
        (_data((0, 10, 1), (10, 0, 1), (10, 5, 1)), [_extent(0, 10)]),
        (_data((0, 10, 1), (2**64 - 1, 10, 1)), [_extent(0, 10)]),
        # cut by the allocation length, by the length field, in mid-descriptor
        (_data((0, 10, 1), (10, 5, 1), length=4 + 16), [_extent(0, 10)]),
        (_data((0, 10, 1), (10, 5, 1))[:-1], [_extent(0, 10)]),
        (_data((0, 10, 1), length=0xFFFFFFFF), [_extent(0, 10)]),
        (_data((0, 10, 1), (10, 5, 1), length=4 + 31), [_extent(0, 10)]),
    ],
)
def test_clamped(data: bytes, expected: list[Extent]) -> None:
    assert lba_status.decode(data, lba=0, capacity_blocks=100) == tuple(expected)


@pytest.mark.conformance(129)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        _data(),
        _data((5, 10, 1), length=0),
        _data((5, 10, 1), length=19),
        _data((5, 10, 1))[:-1],
        _data((4, 10, 1)),
        _data((6, 10, 1)),
        _data((5, 0, 1)),
        _data((2**64 - 1, 2**32 - 1, 1)),
    ],
)
def test_says_nothing(data: bytes) -> None:
    with pytest.raises(ParameterDataError, match="GET LBA STATUS"):
        lba_status.decode(data, lba=5, capacity_blocks=100)


@pytest.mark.conformance(129)
def test_the_block_is_beyond_the_medium() -> None:
    with pytest.raises(ParameterDataError, match="block 100"):
        lba_status.decode(_data((100, 10, 1)), lba=100, capacity_blocks=100)


@pytest.mark.parametrize("extent", [_extent(2**64, 1), _extent(0, 2**32), _extent(-1, 1)])
def test_what_does_not_fit_is_refused(extent: Extent) -> None:
    with pytest.raises(ValueError, match="fit"):
        lba_status.encode([extent])


@given(
    st.integers(0, 2**40),
    st.lists(st.tuples(st.integers(1, 2**32 - 1), st.sampled_from(Provisioning)), min_size=1, max_size=20),
)
def test_round_trip(lba: int, runs: list[tuple[int, Provisioning]]) -> None:
    extents = []
    at = lba
    for blocks, kind in runs:
        extents.append(_extent(at, blocks, kind))
        at += blocks
    assert lba_status.decode(lba_status.encode(extents), lba=lba, capacity_blocks=at) == tuple(extents)


@pytest.mark.conformance("B12")
@given(
    st.binary(max_size=80)
    | st.binary(min_size=5, max_size=60).map(lambda tail: bytes(3) + b"\x44" + bytes(13) + tail),
    st.integers(0, 3),
    st.integers(0, 2**64),
)
def test_any_bytes(data: bytes, lba: int, capacity_blocks: int) -> None:
    try:
        extents = lba_status.decode(data, lba=lba, capacity_blocks=capacity_blocks)
    except ParameterDataError:
        return
    at = lba
    for extent in extents:
        assert extent.lba == at
        assert extent.blocks > 0
        at += extent.blocks
    assert at <= capacity_blocks
