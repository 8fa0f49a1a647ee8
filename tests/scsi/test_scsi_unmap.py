import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi import unmap
from iscsifuse.scsi.unmap import UnmapRange

# Laid out by hand after SBC-3 §5.28.2.
GOLDEN = "0026 0020 00000000 0000000000000008 00000010 00000000 0000000100000000 00000001 00000000"


def test_golden() -> None:
    ranges = (UnmapRange(lba=8, blocks=16), UnmapRange(lba=2**32, blocks=1))
    assert unmap.encode(ranges) == bytes.fromhex(GOLDEN)
    assert unmap.decode(bytes.fromhex(GOLDEN)) == ranges


@pytest.mark.parametrize(
    ("data", "blocks"),
    [
        ("0006 0000 00000000", []),
        ("0006 0010 00000000 0000000000000008 00000010 00000000", [16]),
        # half a range at the end, and data behind the list
        ("0016 0018 00000000 0000000000000008 00000010 00000000 0000000000000009", [16]),
        ("0016 0010 00000000 0000000000000008 00000010 00000000 0000000000000009 00000001 00000000", [16]),
    ],
)
def test_decode(data: str, blocks: list[int]) -> None:
    assert [entry.blocks for entry in unmap.decode(bytes.fromhex(data))] == blocks


@pytest.mark.parametrize("data", ["", "0006 0000 000000", "0016 0010 00000000", "ffff ffff 00000000"])
def test_cut(data: str) -> None:
    with pytest.raises(ParameterDataError, match="UNMAP"):
        unmap.decode(bytes.fromhex(data))


@pytest.mark.parametrize(
    "ranges",
    [
        [UnmapRange(lba=2**64, blocks=1)],
        [UnmapRange(lba=0, blocks=2**32)],
        [UnmapRange(lba=0, blocks=1)] * 4096,
    ],
)
def test_what_does_not_fit_is_refused(ranges: list[UnmapRange]) -> None:
    with pytest.raises(ValueError, match="fit"):
        unmap.encode(ranges)


@given(
    st.lists(st.builds(UnmapRange, lba=st.integers(0, 2**64 - 1), blocks=st.integers(0, 2**32 - 1)), max_size=20).map(
        tuple
    )
)
def test_round_trip(ranges: tuple[UnmapRange, ...]) -> None:
    assert unmap.decode(unmap.encode(ranges)) == ranges


@pytest.mark.conformance("B12")
@given(st.binary(max_size=64))
def test_any_bytes(data: bytes) -> None:
    try:
        ranges = unmap.decode(data)
    except ParameterDataError:
        return
    assert 8 + 16 * len(ranges) <= len(data)
