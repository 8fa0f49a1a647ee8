import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.iscsi.digest import DIGEST_LENGTH, crc32c, crc32c_bytes

READ_10 = bytes.fromhex(
    "01c00000000000000000000000000000140000000000040000000014000000182800000000000000" + "02000000" + "00000000"
)


@pytest.mark.conformance(77)
@pytest.mark.parametrize(
    ("data", "on_the_wire"),
    [
        # Source: RFC 7143 Appendix A.4, "the bytes in order of transmission"
        (bytes(32), "aa36918a"),
        (b"\xff" * 32, "43aba862"),
        (bytes(range(32)), "4e79dd46"),
        (bytes(range(31, -1, -1)), "5cdb3f11"),
        (READ_10, "563a96d9"),
    ],
    ids=["zeros", "ones", "rising", "falling", "READ(10)"],
)
def test_vectors(data: bytes, on_the_wire: str) -> None:
    assert crc32c_bytes((data,)).hex() == on_the_wire
    assert crc32c(data) == int.from_bytes(bytes.fromhex(on_the_wire), "little")


def bitwise(data: bytes) -> int:
    """The polynomial's definition, one bit at a time."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_pieces_count_as_one(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    assert crc32c(*pieces) == bitwise(whole)
    assert crc32c_bytes(memoryview(piece) for piece in pieces) == bitwise(whole).to_bytes(DIGEST_LENGTH, "little")
