import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi import lun
from iscsifuse.scsi.lun import AddressMethod, LunAddress

# Captured from an EMC array, 2012: one logical unit, LUN 1.
EMC = "00000008000000000001000000000000"


@pytest.mark.conformance(124)
@pytest.mark.parametrize(
    ("number", "golden"),
    [
        (0, "0000000000000000"),
        (1, "0001000000000000"),
        (255, "00ff000000000000"),
        (256, "4100000000000000"),
        (16383, "7fff000000000000"),
    ],
)
def test_encode(number: int, golden: str) -> None:
    assert lun.encode(number) == bytes.fromhex(golden)


@pytest.mark.conformance(124)
@pytest.mark.parametrize("number", [-1, 16384, 65536, 2**24, 2**64])
def test_encode_never_masks(number: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        lun.encode(number)


@pytest.mark.conformance(124)
def test_every_number_has_an_address_of_its_own() -> None:
    addresses = {lun.encode(number): number for number in range(lun.MAX_NUMBER + 1)}
    assert len(addresses) == 16384
    for address, number in addresses.items():
        decoded = lun.decode(address)
        assert decoded.number == number
        assert decoded.raw == address


@pytest.mark.conformance(123)
@pytest.mark.parametrize(
    ("raw", "number", "method", "words"),
    [
        ("0005000000000000", 5, AddressMethod.PERIPHERAL, "LUN 5"),
        ("4005000000000000", 5, AddressMethod.FLAT, "LUN 5"),
        ("7fff000000000000", 16383, AddressMethod.FLAT, "LUN 16383"),
        ("d200010000000000", 256, AddressMethod.EXTENDED, "LUN 256"),
        ("d2ffffff00000000", 0xFFFFFF, AddressMethod.EXTENDED, "LUN 16777215"),
        ("e200000001050000", 0x105, AddressMethod.EXTENDED, "LUN 261"),
        # another bus, another level, LUN and target: not a plain number
        ("0105000000000000", None, AddressMethod.PERIPHERAL, "LUN 0x0105000000000000"),
        ("0005000100000000", None, AddressMethod.PERIPHERAL, "LUN 0x0005000100000000"),
        ("4005000000000001", None, AddressMethod.FLAT, "LUN 0x4005000000000001"),
        ("8005000000000000", None, AddressMethod.LOGICAL_UNIT, "LUN 0x8005000000000000"),
        ("d200010000000001", None, AddressMethod.EXTENDED, "LUN 0xd200010000000001"),
        ("e200000001050100", None, AddressMethod.EXTENDED, "LUN 0xe200000001050100"),
        ("f200000000000001", None, AddressMethod.EXTENDED, "LUN 0xf200000000000001"),
        ("ffffffffffffffff", None, AddressMethod.EXTENDED, "LUN 0xffffffffffffffff"),
    ],
)
def test_decode(raw: str, number: int | None, method: AddressMethod, words: str) -> None:
    address = lun.decode(memoryview(bytes.fromhex(raw)))
    assert address == LunAddress(raw=bytes.fromhex(raw), number=number, method=method)
    assert address.describe() == words


@pytest.mark.conformance(123)
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("c101000000000000", "well-known logical unit REPORT LUNS"),
        ("c102000000000000", "well-known logical unit ACCESS CONTROLS"),
        ("c17f000000000000", "well-known logical unit 7Fh"),
    ],
)
def test_well_known(raw: str, words: str) -> None:
    address = lun.decode(bytes.fromhex(raw))
    assert address.well_known
    assert address.number is None
    assert address.describe() == words


@pytest.mark.parametrize("length", [0, 1, 7, 9, 16])
def test_not_eight_bytes(length: int) -> None:
    with pytest.raises(ParameterDataError, match="8 bytes"):
        lun.decode(bytes(length))
    with pytest.raises(ValueError, match="8 bytes"):
        lun.encode_report_luns([bytes(8), bytes(length)])


def test_captured() -> None:
    report = lun.decode_report_luns(bytes.fromhex(EMC))
    assert [address.number for address in report.luns] == [1]
    assert (report.total_length, report.received, report.needs_length) == (16, 16, None)
    assert lun.encode_report_luns([lun.encode(1)]) == bytes.fromhex(EMC)


def _report(*luns: int, length: int | None = None) -> bytes:
    whole = lun.encode_report_luns([lun.encode(number) for number in luns])
    return whole if length is None else length.to_bytes(4, "big") + whole[4:]


@pytest.mark.conformance(123)
@pytest.mark.parametrize(
    ("data", "numbers", "needs"),
    [
        (_report(), [], None),
        (_report(3, 1, 2), [3, 1, 2], None),
        (_report(3, 1, 3, 1, 2), [3, 1, 2], None),
        (_report(1, 256), [1, 256], None),
        # longer than the allocation length
        (_report(0, 1, length=24), [0, 1], 32),
        (_report(0, 1, 2)[:-3], [0, 1], 32),
        (_report(0, 1, length=65536 * 8), [0, 1], 65536 * 8 + 8),
        (_report(length=8), [], 16),
        # more came than the length says
        (_report(0, 1, 2, length=8), [0], None),
        (_report(0, 1, 2, length=0), [], None),
        # no multiple of eight
        (_report(0, 1, 2, length=20), [0, 1], None),
        (_report(0, 1, length=25), [0, 1], None),
        (_report(0, 1) + b"\0\5\0", [0, 1], None),
        # "not specified" is no logical unit
        (lun.encode_report_luns([lun.encode(0), b"\xff" * 8, lun.encode(2)]), [0, 2], None),
    ],
)
def test_report_luns(data: bytes, numbers: list[int], needs: int | None) -> None:
    report = lun.decode_report_luns(data)
    assert [address.number for address in report.luns] == numbers
    assert report.needs_length == needs


@pytest.mark.conformance("B7")
@pytest.mark.parametrize("length", [0xFFFFFFF8, 0xFFFFFFFF, 65537 * 8, 0x80000000])
def test_nonsense_length(length: int) -> None:
    report = lun.decode_report_luns(_report(0, 1, length=length))
    assert [address.number for address in report.luns] == [0, 1]
    assert report.needs_length is None


@pytest.mark.parametrize("length", range(8))
def test_no_header(length: int) -> None:
    with pytest.raises(ParameterDataError, match="REPORT LUNS"):
        lun.decode_report_luns(bytes(length))


@given(st.lists(st.binary(min_size=8, max_size=8).filter(lambda raw: raw != b"\xff" * 8), unique=True))
def test_round_trip(addresses: list[bytes]) -> None:
    report = lun.decode_report_luns(lun.encode_report_luns(addresses))
    assert [address.raw for address in report.luns] == addresses
    assert report.needs_length is None


@pytest.mark.conformance("B12")
@given(st.binary(max_size=80))
def test_any_bytes(data: bytes) -> None:
    try:
        report = lun.decode_report_luns(data)
    except ParameterDataError:
        return
    assert len(report.luns) <= len(data) // 8
    assert len({address.raw for address in report.luns}) == len(report.luns)
    assert all(address.describe() for address in report.luns)
    assert report.needs_length is None or len(data) < report.needs_length <= lun.MAX_REPORT_LENGTH
