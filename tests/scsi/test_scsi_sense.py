"""Sense data in both formats. Golden bytes are laid out by hand after the tables of SPC-4 §4.5."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi.sense import Sense, SenseKey

MEDIUM_FIXED = "f0 00 03 00 01 e2 40 0a 00 00 00 00 11 00 00 00 00 00"
MEDIUM_DESCRIPTOR = "72 03 11 00 00 00 00 0c 00 0a 80 00 00 00 00 01 00 00 00 07"


def _decode(data: str) -> Sense:
    return Sense.decode(bytes.fromhex(data))


@pytest.mark.conformance(112)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (MEDIUM_FIXED, Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, information=123456)),
        (
            MEDIUM_DESCRIPTOR,
            Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, response_code=0x72, information=0x100000007),
        ),
        # no VALID bit: the number in INFORMATION means nothing
        ("70 00 03 00 01 e2 40 0a 00 00 00 00 11 00 00 00 00 00", Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11)),
        (
            "72 03 11 00 00 00 00 0c 00 0a 00 00 00 00 00 01 00 00 00 07",
            Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, response_code=0x72),
        ),
        # an LBA of 0 is one
        (
            "f0 00 03 00 00 00 00 0a 00 00 00 00 11 00 00 00 00 00",
            Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, information=0),
        ),
        ("70 00 06 00 00 00 00 0a 00 00 00 00 29 00 00 00 00 00", Sense(key=SenseKey.UNIT_ATTENTION, asc=0x29)),
        # deferred
        (
            "71 00 04 00 00 00 00 0a 00 00 00 00 44 00 00 00 00 00",
            Sense(key=SenseKey.HARDWARE_ERROR, asc=0x44, response_code=0x71),
        ),
        ("73 04 44 00 00 00 00 00", Sense(key=SenseKey.HARDWARE_ERROR, asc=0x44, response_code=0x73)),
        # FILEMARK, EOM, ILI, SDAT_OVFL; COMMAND-SPECIFIC INFORMATION; FRU; field pointer
        (
            "70 00 f5 00 00 00 00 0a 00 00 00 09 24 00 07 c8 00 02",
            Sense(
                key=SenseKey.ILLEGAL_REQUEST,
                asc=0x24,
                filemark=True,
                eom=True,
                ili=True,
                overflow=True,
                command_specific=9,
                fru=7,
                sks=b"\xc8\x00\x02",
            ),
        ),
        # SKSV is 0
        (
            "70 00 05 00 00 00 00 0a 00 00 00 00 24 00 00 48 00 02",
            Sense(key=SenseKey.ILLEGAL_REQUEST, asc=0x24),
        ),
        # every kind of descriptor; a vendor specific one (80h) and an ATA status return (09h) are passed over
        (
            (
                "72 05 24 00 80 00 00 42"
                "80 02 aa bb"
                "00 0a 80 00 00 00 00 00 00 00 00 05"
                "01 0a 00 00 00 00 00 00 00 00 00 06"
                "02 06 00 00 cf 00 02 00"
                "03 02 00 07"
                "04 02 00 e0"
                "05 02 00 00"
                "09 0e 00 00 00 00 00 00 00 00 00 00 00 00 00 00"
                "80 00"
            ),
            Sense(
                key=SenseKey.ILLEGAL_REQUEST,
                asc=0x24,
                response_code=0x72,
                overflow=True,
                information=5,
                command_specific=6,
                sks=b"\xcf\x00\x02",
                fru=7,
                filemark=True,
                eom=True,
            ),
        ),
        (
            "72 03 11 00 00 00 00 04 05 02 00 20",
            Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, response_code=0x72, ili=True),
        ),
        # the direct-access block device descriptor of SBC-4 says it all in one
        (
            (
                "72 03 11 00 00 00 00 20 0d 1e a0 00 80 00 03 09 00 00 00 00 00 00 00 08 00 00 00 00 00 00 00 04"
                "00 00 00 00 00 00 00 00"
            ),
            Sense(
                key=SenseKey.MEDIUM_ERROR,
                asc=0x11,
                response_code=0x72,
                information=8,
                command_specific=4,
                sks=b"\x80\x00\x03",
                fru=9,
                ili=True,
            ),
        ),
        # ... or nothing, and what another descriptor said stays
        (
            (
                "72 03 11 00 00 00 00 34 00 0a 80 00 00 00 00 00 00 00 00 05 02 06 00 00 80 00 01 00"
                "0d 1e 00 00 00 00 03 00 00 00 00 00 00 00 00 08 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00"
            ),
            Sense(
                key=SenseKey.MEDIUM_ERROR,
                asc=0x11,
                response_code=0x72,
                information=5,
                command_specific=0,
                sks=b"\x80\x00\x01",
            ),
        ),
        # an SKS descriptor without SKSV
        (
            "72 05 24 00 00 00 00 08 02 06 00 00 48 00 02 00",
            Sense(key=SenseKey.ILLEGAL_REQUEST, asc=0x24, response_code=0x72),
        ),
        # vendor specific, whatever follows
        ("7f", Sense(key=SenseKey.VENDOR_SPECIFIC, response_code=0x7F)),
        ("ff 00 00 00", Sense(key=SenseKey.VENDOR_SPECIFIC, response_code=0x7F)),
        # cut off anywhere, or with an additional length that says so
        ("70 00 03", Sense(key=SenseKey.MEDIUM_ERROR)),
        ("f0 00 03 00 01 e2", Sense(key=SenseKey.MEDIUM_ERROR)),
        ("f0 00 03 00 01 e2 40", Sense(key=SenseKey.MEDIUM_ERROR, information=123456)),
        ("f0 00 03 00 01 e2 40 0a 00 00 01", Sense(key=SenseKey.MEDIUM_ERROR, information=123456)),
        (
            "f0 00 03 00 01 e2 40 00 00 00 00 01 11 00 00 80 00 01",
            Sense(key=SenseKey.MEDIUM_ERROR, information=123456),
        ),
        (
            "f0 00 03 00 01 e2 40 05 00 00 00 01 11 04",
            Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, information=123456, command_specific=1),
        ),
        ("70 00 05 00 00 00 00 0a 00 00 00 00 24 00 00 c0 00", Sense(key=SenseKey.ILLEGAL_REQUEST, asc=0x24)),
        ("72 03", Sense(key=SenseKey.MEDIUM_ERROR, response_code=0x72)),
        ("72 03 11", Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, response_code=0x72)),
        (
            "72 03 11 00 00 00 00 0c 00 0a 80 00 00 00 00 01",
            Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, response_code=0x72),
        ),
        ("72 03 11 00 00 00 00 ff 00", Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, response_code=0x72)),
        ("72 03 11 00 00 00 00 00 05 02 00 20", Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, response_code=0x72)),
        (
            "72 03 11 00 00 00 00 10 03 00 05 02 00 20 04 01 00",
            Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, response_code=0x72, ili=True),
        ),
    ],
)
def test_decode(data: str, expected: Sense) -> None:
    raw = bytes.fromhex(data)
    decoded = Sense.decode(memoryview(raw))
    assert decoded == expected
    assert decoded.raw == raw


@pytest.mark.conformance(112)
@pytest.mark.parametrize("data", ["", "70", "70 00", "72", "f3", "00 00 00 00", "6f 00 03", "74 00 03 00", "7e 00"])
def test_no_sense_key(data: str) -> None:
    with pytest.raises(ParameterDataError, match="sense data"):
        _decode(data)


@pytest.mark.parametrize(("code", "deferred"), [(0x70, False), (0x71, True), (0x72, False), (0x73, True)])
def test_deferred(code: int, deferred: bool) -> None:
    sense = Sense(key=SenseKey.MEDIUM_ERROR, response_code=code)
    assert sense.deferred is deferred
    assert sense.describe().startswith("deferred error: ") is deferred
    assert Sense.decode(sense.encode()) == sense


@pytest.mark.parametrize(
    ("sense", "golden"),
    [
        (Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, information=123456), MEDIUM_FIXED),
        (
            Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, response_code=0x72, information=0x100000007),
            MEDIUM_DESCRIPTOR,
        ),
        (Sense(key=SenseKey.NOT_READY, asc=4, ascq=1, response_code=0x72), "72 02 04 01 00 00 00 00"),
    ],
)
def test_encode(sense: Sense, golden: str) -> None:
    assert sense.encode() == bytes.fromhex(golden)


_sks = st.none() | st.binary(min_size=2, max_size=2).map(lambda tail: b"\x80" + tail)
_byte = st.integers(0, 255)
_common = {
    "key": st.sampled_from(SenseKey),
    "asc": _byte,
    "ascq": _byte,
    "fru": _byte,
    "sks": _sks,
    "filemark": st.booleans(),
    "eom": st.booleans(),
    "ili": st.booleans(),
    "overflow": st.booleans(),
}


@given(
    st.builds(
        Sense,
        response_code=st.sampled_from([0x70, 0x71]),
        information=st.none() | st.integers(0, 2**32 - 1),
        command_specific=st.none() | st.integers(1, 2**32 - 1),
        **_common,
    )
)
def test_fixed_round_trip(sense: Sense) -> None:
    assert Sense.decode(sense.encode()) == sense


@given(
    st.builds(
        Sense,
        response_code=st.sampled_from([0x72, 0x73]),
        information=st.none() | st.integers(0, 2**64 - 1),
        command_specific=st.none() | st.integers(0, 2**64 - 1),
        **_common,
    )
)
def test_descriptor_round_trip(sense: Sense) -> None:
    assert Sense.decode(sense.encode()) == sense


@pytest.mark.parametrize(
    "sense",
    [
        Sense(key=SenseKey.MEDIUM_ERROR, information=2**32),
        Sense(key=SenseKey.MEDIUM_ERROR, information=2**64, response_code=0x72),
        Sense(key=SenseKey.MEDIUM_ERROR, asc=256),
        Sense(key=SenseKey.MEDIUM_ERROR, response_code=0x7F),
        Sense(key=SenseKey.MEDIUM_ERROR, sks=b"\x80"),
        Sense(key=SenseKey.MEDIUM_ERROR, sks=b"\x00\x00\x01"),
    ],
)
def test_what_does_not_fit_is_refused(sense: Sense) -> None:
    with pytest.raises(ValueError, match=r"doesn't fit|no way to encode|three bytes"):
        sense.encode()


@pytest.mark.parametrize(
    ("sense", "text"),
    [
        (Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11), "MEDIUM ERROR, unrecovered read error (11h/00h)"),
        (
            Sense(key=SenseKey.UNIT_ATTENTION, asc=0x29),
            "UNIT ATTENTION, power on, reset, or bus device reset occurred (29h/00h)",
        ),
        (
            Sense(key=SenseKey.VENDOR_SPECIFIC, asc=0x80, ascq=1),
            "VENDOR SPECIFIC, ASC 80h ASCQ 01h, vendor specific (80h/01h)",
        ),
        (
            Sense(key=SenseKey.ILLEGAL_REQUEST, asc=0x24, sks=b"\xc0\x00\x02"),
            "ILLEGAL REQUEST, invalid field in CDB (24h/00h), byte 2 of the CDB",
        ),
        (
            Sense(key=SenseKey.ILLEGAL_REQUEST, asc=0x26, sks=b"\x80\x01\x00"),
            "ILLEGAL REQUEST, invalid field in parameter list (26h/00h), byte 256 of the parameter data",
        ),
        (
            Sense(key=SenseKey.NOT_READY, asc=4, ascq=4, sks=b"\x80\x80\x00"),
            "NOT READY, logical unit not ready, format in progress (04h/04h), 50% done",
        ),
        (
            Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, sks=b"\x80\x80\x00"),
            "MEDIUM ERROR, unrecovered read error (11h/00h)",
        ),
        (
            Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, response_code=0x73),
            "deferred error: MEDIUM ERROR, unrecovered read error (11h/00h)",
        ),
        (_decode("7f 01 02"), "vendor specific sense data 7f0102"),
    ],
)
def test_describe(sense: Sense, text: str) -> None:
    assert sense.describe() == text


def test_progress_and_field_pointer_belong_to_their_keys() -> None:
    for key in SenseKey:
        sense = Sense(key=key, sks=b"\x80\x40\x00")
        assert sense.progress == (0.25 if key in (SenseKey.NO_SENSE, SenseKey.NOT_READY) else None)
        assert sense.field_pointer == (0x4000 if key is SenseKey.ILLEGAL_REQUEST else None)
    assert Sense(key=SenseKey.NOT_READY).progress is None
    assert Sense(key=SenseKey.ILLEGAL_REQUEST).field_pointer is None


@pytest.mark.conformance("B12")
@given(
    st.binary(max_size=64)
    | st.tuples(st.sampled_from([0x70, 0x71, 0x72, 0x73, 0x7F, 0xF0]), st.binary(max_size=270)).map(
        lambda parts: bytes([parts[0]]) + parts[1]
    )
)
def test_any_bytes(data: bytes) -> None:
    try:
        sense = Sense.decode(data)
    except ParameterDataError:
        return
    assert sense.describe().isprintable()


@given(st.sampled_from([MEDIUM_FIXED, MEDIUM_DESCRIPTOR]), st.integers(3, 20))
def test_cut_sense_data_never_says_something_else(data: str, length: int) -> None:
    whole = _decode(data)
    cut = Sense.decode(bytes.fromhex(data)[:length])
    assert cut.key == whole.key
    assert cut.asc in (whole.asc, 0)
    assert cut.information in (whole.information, None)
