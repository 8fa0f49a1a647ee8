import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi.mode import CACHING_PAGE, CONTROL_PAGE, CachingPage, ModeParameters

# Captured from an EMC array, 2012: MODE SENSE(6) of the control page without block descriptors.
EMC = "0f0000000a0a20088000000000000000"

# Laid out by hand after SPC-4 §7.5.5 and SBC-3 §6.5.5: a block descriptor, the caching page with WCE, the control
# page.
DESCRIPTOR = "0000100000000200"
CACHING = "8812 04 00 ffff 0000 ffff ffff 80 14 0000 00 000000"
CONTROL = "0a0a 0200 0000 0000 0000 0000"
SIX = f"2b 00 90 08 {DESCRIPTOR} {CACHING} {CONTROL}"
TEN = f"002e 00 90 00 00 0008 {DESCRIPTOR} {CACHING} {CONTROL}"


def test_captured() -> None:
    parameters = ModeParameters.decode_6(bytes.fromhex(EMC))
    assert parameters == ModeParameters(pages={(CONTROL_PAGE, 0): bytes.fromhex("0a0a20088000000000000000")})
    assert parameters.caching is None
    assert parameters.encode_6() == bytes.fromhex(EMC)


@pytest.mark.conformance(126)
def test_both_forms_say_the_same() -> None:
    expected = ModeParameters(
        write_protected=True,
        dpofua=True,
        block_descriptors=bytes.fromhex(DESCRIPTOR),
        pages={(CACHING_PAGE, 0): bytes.fromhex(CACHING), (CONTROL_PAGE, 0): bytes.fromhex(CONTROL)},
    )
    assert ModeParameters.decode_6(bytes.fromhex(SIX)) == expected
    assert ModeParameters.decode_10(bytes.fromhex(TEN)) == expected
    assert expected.encode_6() == bytes.fromhex(SIX)
    assert expected.encode_10() == bytes.fromhex(TEN)
    assert expected.caching == CachingPage(wce=True)


@pytest.mark.conformance(126)
@pytest.mark.parametrize(
    ("device", "write_protected", "dpofua"),
    [(0x00, False, False), (0x80, True, False), (0x10, False, True), (0x6F, False, False)],
)
def test_header(device: int, write_protected: bool, dpofua: bool) -> None:
    for parameters in (
        ModeParameters.decode_6(bytes([3, 5, device, 0])),
        ModeParameters.decode_10(bytes([0, 6, 5, device, 0, 0, 0, 0])),
        # A length field that leaves the header out can't hide that the medium is write-protected.
        ModeParameters.decode_6(bytes([0, 5, device, 0])),
        ModeParameters.decode_10(bytes([0, 0, 5, device, 0, 0, 0, 0])),
    ):
        assert parameters == ModeParameters(medium_type=5, write_protected=write_protected, dpofua=dpofua)


def test_too_short() -> None:
    for length in range(4):
        with pytest.raises(ParameterDataError, match=r"MODE SENSE\(6\)"):
            ModeParameters.decode_6(bytes.fromhex(SIX)[:length])
    for length in range(8):
        with pytest.raises(ParameterDataError, match=r"MODE SENSE\(10\)"):
            ModeParameters.decode_10(bytes.fromhex(TEN)[:length])


@pytest.mark.parametrize(
    ("data", "pages"),
    [
        # bounded by the length field, though more came
        ("17 00 00 00" + CACHING + CONTROL, {(8, 0): CACHING}),
        # ... and by what came
        ("ff 00 00 00" + CACHING, {(8, 0): CACHING}),
        # the last page is cut
        ("ff 00 00 00 08 12 04", {(8, 0): "081204"}),
        ("ff 00 00 00 08 12", {(8, 0): "0812"}),
        ("ff 00 00 00 08", {}),
        # block descriptors beyond the end
        ("0f 00 00 ff" + CONTROL, {}),
        # a subpage, whole and cut
        ("0b 00 00 00 4a 01 00 04 01 02 03 04", {(10, 1): "4a01000401020304"}),
        ("ff 00 00 00 4a 01 00", {}),
        # the first of two
        ("13 00 00 00 0a 02 01 01 0a 02 02 02", {(10, 0): "0a020101"}),
        # page 00h has no format; nor have zeros that follow the last page
        ("1b 00 00 00 0a 02 01 01 00 00 00 00 0a 02 02 02", {(10, 0): "0a020101"}),
    ],
)
def test_pages(data: str, pages: dict[tuple[int, int], str]) -> None:
    assert ModeParameters.decode_6(bytes.fromhex(data)).pages == {
        key: bytes.fromhex(page) for key, page in pages.items()
    }


@pytest.mark.conformance(126)
@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("08 12 00", CachingPage(wce=False)),
        ("08 12 04", CachingPage(wce=True)),
        ("88 12 fb", CachingPage(wce=False, rcd=True)),
        ("08 0a 05 00 00 00 00 00 00 00 00 00", CachingPage(wce=True, rcd=True)),  # SCSI-2 has 12 bytes
        (
            "08 12 04 00 00 00 00 00 00 00 00 00 21 00 00 00 00 00 00 00",
            CachingPage(wce=True, dra=True, nv_dis=True),
        ),
    ],
)
def test_caching(page: str, expected: CachingPage) -> None:
    raw = bytes.fromhex(page)
    assert CachingPage.decode(raw) == expected
    assert ModeParameters(pages={(8, 0): raw}).caching == expected
    assert CachingPage.decode(expected.encode()) == expected
    assert len(expected.encode()) == 20


@pytest.mark.parametrize("page", ["", "08", "08 12", "0a 0a 04", "48 00 04", "00 00 00"])
def test_not_the_caching_page(page: str) -> None:
    with pytest.raises(ParameterDataError, match="mode page 08h"):
        CachingPage.decode(bytes.fromhex(page))


@pytest.mark.parametrize("page", ["08 12", "48 00 00 04 04 04 04 04"])
def test_wce_is_not_known(page: str) -> None:
    parameters = ModeParameters.decode_6(bytes([0xFF, 0, 0, 0]) + bytes.fromhex(page))
    assert (8, 0) in parameters.pages
    assert parameters.caching is None


def test_what_does_not_fit_is_refused() -> None:
    long = ModeParameters(pages={(10, 1): bytes(253)})
    with pytest.raises(ValueError, match="fit"):
        long.encode_6()
    assert len(long.encode_10()) == 8 + 253
    with pytest.raises(ValueError, match="fit"):
        ModeParameters(block_descriptors=bytes(65536)).encode_10()
    with pytest.raises(ValueError, match="fit"):
        ModeParameters(medium_type=256).encode_6()


_short_page = st.builds(
    lambda code, body: (((code, 0)), bytes([code, len(body)]) + body), st.integers(1, 62), st.binary(max_size=20)
)
_sub_page = st.builds(
    lambda code, sub, body: ((code, sub), bytes([0x40 | code, sub]) + len(body).to_bytes(2, "big") + body),
    st.integers(1, 62),
    st.integers(1, 254),
    st.binary(max_size=20),
)


@given(
    st.builds(
        ModeParameters,
        medium_type=st.integers(0, 255),
        write_protected=st.booleans(),
        dpofua=st.booleans(),
        block_descriptors=st.sampled_from([b"", bytes(8), b"12345678" * 2]),
        pages=st.lists(_short_page | _sub_page, max_size=6).map(dict),
    )
)
def test_round_trip(parameters: ModeParameters) -> None:
    assert ModeParameters.decode_6(parameters.encode_6()) == parameters
    assert ModeParameters.decode_10(parameters.encode_10()) == parameters


@pytest.mark.conformance("B12")
@given(st.binary(max_size=80))
def test_any_bytes(data: bytes) -> None:
    for decode in (ModeParameters.decode_6, ModeParameters.decode_10):
        try:
            parameters = decode(data)
        except ParameterDataError:
            continue
        assert parameters.caching is None or isinstance(parameters.caching.wce, bool)
    try:
        CachingPage.decode(data)
    except ParameterDataError:
        assert len(data) < 3 or data[0] & 0x7F != 8
