from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi.capacity import MAX_BLOCK_LENGTH, MAX_SIZE, MIN_BLOCK_LENGTH, Capacity

# Captured from an EMC array, 2012.
EMC = "00bb7fff00000200"
# Laid out by hand after SBC-3 §5.16.2: P_TYPE 0 with PROT_EN, P_I_EXPONENT 1, 8 blocks in a physical
# one, LBPME, LBPRZ.
LONG = "00000001 00000007 00000200 01 13 c003" + "00" * 16


def test_captured() -> None:
    capacity = Capacity.decode_10(bytes.fromhex(EMC))
    assert capacity == Capacity(last_lba=12287999, block_length=512)
    assert capacity.blocks == 12288000
    assert capacity.size == 6000 * 1024 * 1024
    assert not capacity.needs_16
    assert capacity.encode_10() == bytes.fromhex(EMC)


def test_long_form() -> None:
    capacity = Capacity.decode_16(bytes.fromhex(LONG))
    assert capacity == Capacity(
        last_lba=0x100000007,
        block_length=512,
        protection_type=1,
        p_i_exponent=1,
        lbpme=True,
        lbprz=True,
        logical_per_physical_exponent=3,
        lowest_aligned_lba=3,
    )
    assert capacity.physical_block_length == 4096
    assert capacity.encode_16() == bytes.fromhex(LONG)


@pytest.mark.parametrize(("byte", "protection"), [(0x00, 0), (0x01, 1), (0x03, 2), (0x05, 3), (0x04, 0)])
def test_protection_type(byte: int, protection: int) -> None:
    data = bytes.fromhex("0000000000000007 00000200") + bytes([byte]) + bytes(19)
    assert Capacity.decode_16(data).protection_type == protection


@pytest.mark.conformance(118)
def test_beyond_the_short_form() -> None:
    capacity = Capacity.decode_10(bytes.fromhex("ffffffff00000200"))
    assert capacity.needs_16
    assert not Capacity.decode_10(bytes.fromhex("fffffffe00000200")).needs_16
    # ... but READ CAPACITY(16) may well say exactly that
    assert not Capacity.decode_16(bytes.fromhex("00000000ffffffff00000200") + bytes(20)).needs_16


@pytest.mark.parametrize("last_lba", [2**32 - 1, 2**32, 2**50])
def test_a_target_says_that_it_is_beyond_the_short_form(last_lba: int) -> None:
    assert Capacity(last_lba=last_lba, block_length=512).encode_10() == bytes.fromhex("ffffffff00000200")


@pytest.mark.parametrize("length", range(12, 32))
def test_short_answers_of_the_long_form(length: int) -> None:
    capacity = Capacity.decode_16(bytes.fromhex(LONG)[:length])
    assert (capacity.last_lba, capacity.block_length) == (0x100000007, 512)
    assert capacity.lbpme is (length > 14)


@pytest.mark.conformance(118)
def test_too_short() -> None:
    for length in range(8):
        with pytest.raises(ParameterDataError, match=r"READ CAPACITY\(10\)"):
            Capacity.decode_10(bytes.fromhex(EMC)[:length])
    for length in range(12):
        with pytest.raises(ParameterDataError, match=r"READ CAPACITY\(16\)"):
            Capacity.decode_16(bytes.fromhex(LONG)[:length])


@pytest.mark.conformance("B7")
@pytest.mark.parametrize("block_length", [0, 1, 255, 2**20 + 1, 2**31, 2**32 - 1])
def test_implausible_block_length(block_length: int) -> None:
    for data, decode in (
        (bytes(4) + block_length.to_bytes(4, "big"), Capacity.decode_10),
        (bytes(8) + block_length.to_bytes(4, "big") + bytes(20), Capacity.decode_16),
    ):
        with pytest.raises(ParameterDataError, match=f"block length of {block_length} bytes"):
            decode(data)


@pytest.mark.parametrize("block_length", [256, 512, 520, 528, 2048, 4096, 65536, 2**20])
def test_plausible_block_length(block_length: int) -> None:
    assert Capacity.decode_10(bytes(4) + block_length.to_bytes(4, "big")).size == block_length


@pytest.mark.conformance("B7")
@pytest.mark.parametrize(
    ("last_lba", "block_length", "fits"),
    [
        (2**54 - 2, 512, True),
        (2**54 - 1, 512, False),
        (2**64 - 1, 512, False),
        (2**51 - 1, 4096, False),
        (2**51 - 2, 4096, True),
    ],
)
def test_size_beyond_a_file_offset(last_lba: int, block_length: int, fits: bool) -> None:
    data = last_lba.to_bytes(8, "big") + block_length.to_bytes(4, "big") + bytes(20)
    if fits:
        assert Capacity.decode_16(data).size <= MAX_SIZE
    else:
        with pytest.raises(ParameterDataError, match="more than a file can hold"):
            Capacity.decode_16(data)


@pytest.mark.parametrize(
    "change",
    [
        {"last_lba": 2**64},
        {"last_lba": -1},
        {"block_length": 2**32},
        {"protection_type": 9},
        {"p_i_exponent": 16},
        {"logical_per_physical_exponent": -1},
        {"lowest_aligned_lba": 0x4000},
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="fit"):
        replace(Capacity(last_lba=7, block_length=512), **change).encode_16()  # type: ignore[arg-type]
    if "block_length" in change or change.get("last_lba") == -1:
        with pytest.raises(ValueError, match="fit"):
            replace(Capacity(last_lba=7, block_length=512), **change).encode_10()  # type: ignore[arg-type]


@given(
    st.builds(
        Capacity,
        last_lba=st.integers(0, 2**43 - 2),
        block_length=st.integers(MIN_BLOCK_LENGTH, MAX_BLOCK_LENGTH),
        protection_type=st.integers(0, 8),
        p_i_exponent=st.integers(0, 15),
        lbpme=st.booleans(),
        lbprz=st.booleans(),
        logical_per_physical_exponent=st.integers(0, 15),
        lowest_aligned_lba=st.integers(0, 0x3FFF),
    )
)
def test_round_trip(capacity: Capacity) -> None:
    assert Capacity.decode_16(capacity.encode_16()) == capacity
    short = Capacity.decode_10(capacity.encode_10())
    assert short.block_length == capacity.block_length
    assert short.needs_16 == (capacity.last_lba >= 2**32 - 1)


@pytest.mark.conformance("B12")
@given(st.binary(max_size=40))
def test_any_bytes(data: bytes) -> None:
    for decode in (Capacity.decode_10, Capacity.decode_16):
        try:
            capacity = decode(data)
        except ParameterDataError:
            continue
        assert 0 < capacity.size <= MAX_SIZE
