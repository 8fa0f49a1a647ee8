import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import FormatError
from iscsifuse.iscsi import text

KEY_CHARACTERS = "ABCabc019.-+@_#"


@pytest.mark.parametrize(
    ("data", "pairs"),
    [
        (b"", []),
        (b"A=b\0", [("A", "b")]),
        (b"A=\0", [("A", "")]),
        (b"A=b=c\0", [("A", "b=c")]),
        (b"A=1\0B=2\0A=3\0", [("A", "1"), ("B", "2"), ("A", "3")]),
        (b"A=1\0B=2", [("A", "1"), ("B", "2")]),  # the last NUL is missing
        (b"A=1\0\0\0B=2\0\0\0", [("A", "1"), ("B", "2")]),  # padding counted as data
        (b"A" * 63 + b"=x\0", [("A" * 63, "x")]),
        (b"X#foo=1\0X-com.example.a@b_c+d=2\0", [("X#foo", "1"), ("X-com.example.a@b_c+d", "2")]),
        (b"iSCSIProtocolLevel=1\0", [("iSCSIProtocolLevel", "1")]),
        ("TargetAlias=Größe\0".encode(), [("TargetAlias", "Größe")]),
        (b"TargetAlias=Gr\xf6\xdfe\0", [("TargetAlias", "Gr\\xf6\\xdfe")]),
        (b"A=" + b"v" * 8192 + b"\0", [("A", "v" * 8192)]),
    ],
)
def test_decode(data: bytes, pairs: list[tuple[str, str]]) -> None:
    assert text.decode(data) == pairs
    assert text.decode(memoryview(bytearray(data))) == pairs


@pytest.mark.conformance("B4")
@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"no equals sign\0", "without '='"),
        (b"A=1\0nonsense", "without '='"),
        (b"=value\0", "can't be one"),
        (b"A" * 64 + b"=x\0", "can't be one"),
        (b"A B=x\0", "can't be one"),
        (b"A\n=x\0", "can't be one"),
        (b"\xc3\xa4=x\0", "can't be one"),
        (b"1A=x\0", "can't be one"),
        (b"A=" + b"v" * 8193 + b"\0", "8193 bytes for A"),
        (b"\x1b[2J" * 100, "without '='"),
    ],
)
def test_decode_refuses(data: bytes, complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint) as caught:
        text.decode(data)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


@pytest.mark.conformance(43)
def test_decode_takes_so_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_PAIRS", 3)
    assert len(text.decode(b"A=1\0" * 3 + bytes(5))) == 3
    with pytest.raises(FormatError, match="more than 3 keys in one text"):
        text.decode(b"A=1\0" * 4)


@pytest.mark.conformance("B12")
@given(st.binary(max_size=300))
def test_decode_of_anything_gives_pairs_or_a_format_error(data: bytes) -> None:
    try:
        pairs = text.decode(data)
    except FormatError:
        return
    for key, value in pairs:
        assert 1 <= len(key) <= 63
        assert "\0" not in value


pairs_to_send = st.lists(
    st.tuples(
        st.text(KEY_CHARACTERS, max_size=62).map(lambda rest: "K" + rest),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50),
    ),
    max_size=8,
)


@given(pairs_to_send)
def test_what_is_encoded_decodes(pairs: list[tuple[str, str]]) -> None:
    assert text.decode(text.encode(pairs)) == pairs


def test_encode() -> None:
    assert text.encode([("A", "1"), ("B", "")]) == b"A=1\0B=\0"
    assert text.encode([("A", "\udcff")]) == b"A=?\0"


@pytest.mark.parametrize("pair", [("A", "1\0B=2"), ("A=", "1"), ("", "1"), ("\udcff", "1"), ("A", "v" * 8193)])
def test_encode_refuses(pair: tuple[str, str]) -> None:
    with pytest.raises(FormatError, match="can't be"):
        text.encode([pair])


@given(pairs_to_send, st.integers(1, 30))
def test_split_and_assemble(pairs: list[tuple[str, str]], length: int) -> None:
    pieces = text.split(text.encode(pairs), length)
    assert pieces
    assert all(len(piece) <= length for piece in pieces)
    assembler = text.Assembler()
    for piece in pieces[:-1]:
        assert assembler.add(piece, cont=True) is None
        assert assembler.partial
    assert assembler.add(pieces[-1], cont=False) == pairs
    assert not assembler.partial


def test_an_empty_text_is_one_empty_piece() -> None:
    assert text.split(b"", 10) == [b""]


@pytest.mark.conformance(43)
def test_assembler_counts_everything_and_stops() -> None:
    assembler = text.Assembler(10)
    assert assembler.add(b"A=1\0", cont=False) == [("A", "1")]
    assert assembler.add(b"B=2", cont=True) is None
    assert assembler.add(b"34\0", cont=False) == [("B", "234")]
    assert assembler.total == 10
    with pytest.raises(FormatError, match="more than 10 bytes"):
        assembler.add(b"C", cont=True)


@pytest.mark.conformance(18)
@pytest.mark.parametrize(
    ("value", "result"),
    [
        ("0", 0),
        ("8192", 8192),
        ("0x2000", 8192),
        ("0X2aB", 0x2AB),
        ("0x0", 0),
        ("0x0001", 1),
        ("4294967295", 0xFFFFFFFF),
    ],
)
def test_number(value: str, result: int) -> None:
    assert text.number(value) == result


@pytest.mark.conformance("B5")
@pytest.mark.parametrize(
    "value",
    [
        "", " 1", "1 ", "1\n", "+1", "-1", "1_000", "01", "1.0", "0x", "0x1_0", "0xg", "x1", "0b1", "1e3", "१", "１",
        "²", "1,2", "9" * 5000, "0x" + "0" * 17,
    ],
)  # fmt: skip
def test_number_refuses(value: str) -> None:
    with pytest.raises(FormatError, match=r"^K should be a number, not '") as caught:
        text.number(value, key="K")
    assert str(caught.value).isascii()


@pytest.mark.parametrize("value", ["511", "1025", "0x401", "99999999999999999999"])
def test_number_out_of_range(value: str) -> None:
    with pytest.raises(FormatError, match=r"K should lie in 512\.\.1024"):
        text.number(value, low=512, high=1024, key="K")


def test_number_at_the_ends_of_its_range() -> None:
    assert text.number("512", low=512, high=1024) == 512
    assert text.number("1024", low=512, high=1024) == 1024


@pytest.mark.conformance(17)
def test_boolean() -> None:
    assert text.boolean("Yes") is True
    assert text.boolean("No") is False
    for value in ("yes", "NO", "Maybe", "", "1", "Yes ", "Yes,No"):
        with pytest.raises(FormatError, match="should be Yes or No"):
            text.boolean(value)


@pytest.mark.conformance(30)
@pytest.mark.parametrize(
    ("value", "result"),
    [
        ("0x0123", b"\x01\x23"),
        ("0X0aB", b"\x00\xab"),  # an odd number of digits: a zero in front
        ("0x1", b"\x01"),
        ("0x00", b"\x00"),
        ("0bAQI=", b"\x01\x02"),
        ("0BAQID", b"\x01\x02\x03"),
        ("0b+/8=", b"\xfb\xff"),
    ],
)
def test_binary(value: str, result: bytes) -> None:
    assert text.binary(value, 1024) == result


@pytest.mark.conformance("B5")
@pytest.mark.parametrize(
    "value",
    [
        "", "0x", "0b", "0x0g", "0x 1", "0x1_2", "12", "AQI=", "0bA", "0bAQ", "0bAQI", "0bAQI==", "0bAQ=I", "0bAQ I=",
        "0bAQI=\n", "0bAQJ=", "0b=", "0b-_8=", "0x١",
    ],
)  # fmt: skip
def test_binary_refuses(value: str) -> None:
    with pytest.raises(FormatError, match=r"^K "):
        text.binary(value, 1024, key="K")


@pytest.mark.conformance(30)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 1023, 1024])
def test_binary_up_to_its_limit(length: int) -> None:
    data = b"\x5a" * length
    longer = data + b"\x5a"
    for encode in (text.hex_encode, lambda some: "0b" + base64.b64encode(some).decode()):
        assert text.binary(encode(data), length) == data
        with pytest.raises(FormatError, match="longer than"):
            text.binary(encode(longer), length)


def test_binary_doesn_t_decode_what_is_much_too_long() -> None:
    for value in ("0x" + "0" * 100_000, "0b" + "A" * 100_000):
        with pytest.raises(FormatError, match="longer than 4 bytes"):
            text.binary(value, 4)


@given(st.binary(min_size=1, max_size=64))
def test_hex_encode_is_read_back(data: bytes) -> None:
    assert text.binary(text.hex_encode(data), 64) == data
