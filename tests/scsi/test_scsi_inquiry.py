from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi.inquiry import Inquiry, device_type_words

# Captured from an EMC array, 2012, the first 96 bytes: LUN 0, which has nothing behind it, and LUN 1, a disk.
EMC_LUN_0 = (
    "20000532a3001002454d43202020202043656c657272612020202020202020203030303243656c657272612054362e30"
    "2e33362e3400000000000960032003000000000000000000000000000000000000000000000000000000000000000000"
)
EMC_LUN_1 = (
    "00000532c3001002454d43202020202043656c657272612020202020202020203030303243656c657272612054362e30"
    "2e33362e3400000000000960032003000000000000000000000000000000000000000000000000000000000000000000"
)


def test_captured() -> None:
    inquiry = Inquiry.decode(bytes.fromhex(EMC_LUN_1))
    assert inquiry == Inquiry(
        peripheral_qualifier=0,
        device_type=0,
        version=5,
        response_data_format=2,
        normaca=True,
        hisup=True,
        multi_port=True,
        cmdque=True,
        vendor="EMC",
        product="Celerra",
        revision="0002",
        version_descriptors=(0x0960, 0x0320, 0x0300),
    )
    assert inquiry.is_disk
    # What is told here is at the same offsets in what we encode.
    encoded = inquiry.encode()
    captured = bytes.fromhex(EMC_LUN_1)
    assert len(encoded) == 74
    assert encoded[:4] + encoded[5:36] == captured[:4] + captured[5:36]
    assert encoded[58:] == captured[58:74]


@pytest.mark.conformance(122)
def test_captured_lun_without_a_disk() -> None:
    inquiry = Inquiry.decode(bytes.fromhex(EMC_LUN_0))
    assert (inquiry.peripheral_qualifier, inquiry.device_type) == (1, 0)
    assert not inquiry.is_disk


@pytest.mark.conformance(122)
@pytest.mark.parametrize(
    ("first", "disk"), [(0x00, True), (0x20, False), (0x60, False), (0x7F, False), (0x0C, False), (0x05, False)]
)
def test_is_disk(first: int, disk: bool) -> None:
    assert Inquiry.decode(bytes([first, 0, 6, 2, 0])).is_disk is disk


@pytest.mark.conformance(122)
def test_five_bytes() -> None:
    assert Inquiry.decode(bytes.fromhex("00 80 06 12 1f")) == Inquiry(version=6, removable=True, hisup=True)


@pytest.mark.parametrize("length", range(5))
def test_too_short(length: int) -> None:
    with pytest.raises(ParameterDataError, match="INQUIRY"):
        Inquiry.decode(bytes.fromhex(EMC_LUN_1)[:length])


@pytest.mark.parametrize(
    ("length", "vendor", "product", "revision"),
    [(8, "", "", ""), (10, "EM", "", ""), (16, "EMC", "", ""), (20, "EMC", "Cele", ""), (34, "EMC", "Celerra", "00")],
)
def test_cut(length: int, vendor: str, product: str, revision: str) -> None:
    inquiry = Inquiry.decode(bytes.fromhex(EMC_LUN_1)[:length])
    assert (inquiry.vendor, inquiry.product, inquiry.revision) == (vendor, product, revision)
    assert inquiry.cmdque


def test_additional_length_ends_the_data() -> None:
    # 5 + 3 bytes; what follows is left over from something else.
    data = bytes.fromhex("00 00 06 02 03 00 00 02") + b"GARBAGE!" * 10
    assert Inquiry.decode(data) == Inquiry(version=6, cmdque=True)


@pytest.mark.parametrize(
    ("position", "byte", "field"),
    [
        (5, 0x01, "protect"),
        (5, 0x08, "third_party_copy"),
        (6, 0x10, "multi_port"),
        (7, 0x02, "cmdque"),
        (1, 0x80, "removable"),
        (3, 0x10, "hisup"),
        (3, 0x20, "normaca"),
    ],
)
def test_flags(position: int, byte: int, field: str) -> None:
    data = bytearray(36)
    data[4] = 31
    data[position] = byte
    assert getattr(Inquiry.decode(data), field) is True
    data[position] ^= 0xFF
    data[4] = 31
    assert getattr(Inquiry.decode(data), field) is False


@pytest.mark.parametrize(("byte", "tpgs"), [(0x00, 0), (0x10, 1), (0x20, 2), (0x30, 3), (0xCF, 0)])
def test_tpgs(byte: int, tpgs: int) -> None:
    assert Inquiry.decode(bytes([0, 0, 6, 2, 31, byte]) + bytes(30)).tpgs == tpgs


@pytest.mark.conformance("B6")
def test_text_is_safe_to_show() -> None:
    data = bytes([0, 0, 6, 2, 31, 0, 0, 0]) + b"\x1b[31mEVL" + b"../etc\n\r\x00\x7f\xff\xe4    " + b"1\x00\x00\x00"
    inquiry = Inquiry.decode(data)
    assert inquiry.vendor == "?[31mEVL"
    assert inquiry.product == "../etc??????"
    assert inquiry.revision == "1"


_text = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=16)
_flag = st.booleans()
_inquiries = st.builds(
    Inquiry,
    peripheral_qualifier=st.integers(0, 7),
    device_type=st.integers(0, 31),
    removable=_flag,
    version=st.integers(0, 255),
    response_data_format=st.integers(0, 15),
    normaca=_flag,
    hisup=_flag,
    tpgs=st.integers(0, 3),
    third_party_copy=_flag,
    protect=_flag,
    multi_port=_flag,
    cmdque=_flag,
    vendor=_text.map(lambda text: text[:8]),
    product=_text,
    revision=_text.map(lambda text: text[:4]),
    version_descriptors=st.lists(st.integers(1, 0xFFFF), max_size=8).map(tuple),
)


@given(_inquiries)
def test_round_trip(inquiry: Inquiry) -> None:
    assert Inquiry.decode(inquiry.encode()) == inquiry


@pytest.mark.parametrize(
    "change",
    [
        {"peripheral_qualifier": 8},
        {"device_type": 32},
        {"tpgs": 4},
        {"response_data_format": 16},
        {"version": 256},
        {"vendor": "nine char"},
        {"product": "ä"},
        {"revision": "\x1b"},
        {"version_descriptors": (1,) * 9},
        {"version_descriptors": (0x10000,)},
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, int | str | tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"fit|longer|printable"):
        replace(Inquiry(), **change).encode()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0x00, "disk"),
        (0x01, "tape"),
        (0x05, "CD/DVD"),
        (0x0C, "storage array controller"),
        (0x0D, "enclosure"),
        (0x1F, "no device"),
        (0x1A, "device type 1Ah"),
    ],
)
def test_device_type_words(number: int, text: str) -> None:
    assert device_type_words(number) == text


@pytest.mark.conformance("B12")
@given(st.binary(max_size=128))
def test_any_bytes(data: bytes) -> None:
    try:
        inquiry = Inquiry.decode(data)
    except ParameterDataError:
        assert len(data) < 5
        return
    assert (inquiry.vendor + inquiry.product + inquiry.revision).isprintable()
