"""Vital product data pages, apart from designators."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi.designator import Designator
from iscsifuse.scsi.vpd import (
    BlockDeviceCharacteristics,
    BlockLimits,
    DeviceIdentification,
    LogicalBlockProvisioning,
    SupportedPages,
    UnitSerialNumber,
)

# Captured from an EMC array, 2012.
EMC_00 = "00000003008083"
EMC_80 = (
    "00800035454d432d43656c657272612d69534353492d564c552d66733136"
    "5f54325f4c554e315f424230303530353638433531333930303030"
)
EMC_83 = "00830014010300106006048c003d7658f05d83da77e4a0dd"

# Laid out by hand after SBC-3 §6.6.4 and SBC-4.
B0 = (
    "00b0003c 01 ff 0008 00001000 00000800 00000100 00400000 00000040 00000010 80000004 0000000000010000"
    "00000001 00000002 00000003 00000004 00000005"
)
B0_FIELDS: dict[str, Any] = {
    "wsnz": True,
    "max_compare_and_write": 255,
    "optimal_granularity": 8,
    "max_transfer": 4096,
    "optimal_transfer": 2048,
    "max_prefetch": 256,
    "max_unmap_lba_count": 0x400000,
    "max_unmap_descriptor_count": 64,
    "optimal_unmap_granularity": 16,
    "unmap_granularity_alignment": 4,
    "max_write_same": 65536,
    "max_atomic_transfer": 1,
    "atomic_alignment": 2,
    "atomic_granularity": 3,
    "max_atomic_transfer_with_boundary": 4,
    "max_atomic_boundary": 5,
}


def test_captured_supported_pages() -> None:
    page = SupportedPages.decode(bytes.fromhex(EMC_00))
    assert page.pages == (0x00, 0x80, 0x83)
    assert page.encode() == bytes.fromhex(EMC_00)


def test_captured_serial() -> None:
    page = UnitSerialNumber.decode(bytes.fromhex(EMC_80))
    assert page.serial == "EMC-Celerra-iSCSI-VLU-fs16_T2_LUN1_BB0050568C51390000"
    assert page.encode() == bytes.fromhex(EMC_80)


def test_captured_identification() -> None:
    page = DeviceIdentification.decode(bytes.fromhex(EMC_83))
    assert page.designators == (
        Designator(
            association=0,
            designator_type=3,
            code_set=1,
            identifier=bytes.fromhex("6006048c003d7658f05d83da77e4a0dd"),
        ),
    )
    assert page.encode() == bytes.fromhex(EMC_83)


@pytest.mark.parametrize(
    ("payload", "serial"),
    [
        (b"", ""),
        (b"    ", ""),
        (b"  12345678  ", "12345678"),
        (b"AB\x1b]0;x\x07", "AB?]0;x?"),
        (b"1234\x00\x00", "1234"),
    ],
)
def test_serial(payload: bytes, serial: str) -> None:
    assert UnitSerialNumber.decode(bytes([0, 0x80, 0, len(payload)]) + payload).serial == serial


def test_serial_cut_by_the_allocation_length() -> None:
    assert UnitSerialNumber.decode(bytes.fromhex(EMC_80)[:7]).serial == "EMC"


def test_block_limits() -> None:
    page = BlockLimits(**B0_FIELDS)
    assert BlockLimits.decode(bytes.fromhex(B0)) == page
    assert page.encode() == bytes.fromhex(B0)


@pytest.mark.conformance(125)
@pytest.mark.parametrize(
    ("length", "known"),
    [
        (4, 0),
        (5, 1),
        (6, 2),
        (7, 2),
        (8, 3),
        (11, 3),
        (16, 5),  # SBC-2
        (20, 6),
        (36, 10),
        (43, 10),
        (44, 11),
        (64, 16),
    ],
)
def test_short_block_limits(length: int, known: int) -> None:
    """A page that ends early, and one that was cut: fields that aren't there whole have their defaults."""
    expected = BlockLimits(**dict(list(B0_FIELDS.items())[:known]))
    cut = bytes.fromhex(B0)[:length]
    assert BlockLimits.decode(cut) == expected
    assert BlockLimits.decode(cut[:2] + (length - 4).to_bytes(2, "big") + cut[4:]) == expected
    # ... whatever lies behind the end of the page
    ended = cut[:2] + (length - 4).to_bytes(2, "big") + bytes.fromhex(B0)[4:]
    assert BlockLimits.decode(ended) == expected


def test_alignment_without_ugavalid() -> None:
    data = bytearray(bytes.fromhex(B0))
    data[32] = 0
    assert BlockLimits.decode(data).unmap_granularity_alignment is None


# Laid out by hand after SBC-3 §6.6.2.
B1 = "00b1003c 1c20 00 02 23" + "00" * 55


def test_characteristics() -> None:
    page = BlockDeviceCharacteristics(rotation_rate=7200, form_factor=2, zoned=2, fuab=True, vbuls=True)
    assert BlockDeviceCharacteristics.decode(bytes.fromhex(B1)) == page
    assert page.encode() == bytes.fromhex(B1)
    assert page.form_factor_words() == "3.5 inch"
    assert not page.is_solid_state


@pytest.mark.conformance(125)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("00b10000", BlockDeviceCharacteristics()),
        ("00b1003c", BlockDeviceCharacteristics()),
        ("00b1003c00", BlockDeviceCharacteristics()),
        ("00b1003c1c", BlockDeviceCharacteristics()),
        ("00b1003c0001", BlockDeviceCharacteristics(rotation_rate=1)),
        ("00b1003c000105f3", BlockDeviceCharacteristics(rotation_rate=1, product_type=5, form_factor=3)),
    ],
)
def test_short_characteristics(data: str, expected: BlockDeviceCharacteristics) -> None:
    assert BlockDeviceCharacteristics.decode(bytes.fromhex(data)) == expected


def test_solid_state() -> None:
    page = BlockDeviceCharacteristics(rotation_rate=1)
    assert page.is_solid_state
    assert page.form_factor_words() == ""


# Laid out by hand after SBC-3 §6.6.5.
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            "00b20004 0a e6 02 00",
            LogicalBlockProvisioning(
                threshold_exponent=10,
                lbpu=True,
                lbpws=True,
                lbpws10=True,
                lbprz=True,
                anc_sup=True,
                provisioning_type=2,
            ),
        ),
        ("00b20004 00 80 01 00", LogicalBlockProvisioning(lbpu=True, provisioning_type=1)),
        ("00b20004 00 40 00 00", LogicalBlockProvisioning(lbpws=True)),
        ("00b20004 00 20 00 00", LogicalBlockProvisioning(lbpws10=True)),
        ("00b20004 00 04 00 00", LogicalBlockProvisioning(lbprz=True)),
        ("00b20004 00 02 00 00", LogicalBlockProvisioning(anc_sup=True)),
    ],
)
def test_provisioning(data: str, expected: LogicalBlockProvisioning) -> None:
    assert LogicalBlockProvisioning.decode(bytes.fromhex(data)) == expected
    assert expected.encode() == bytes.fromhex(data)


@pytest.mark.conformance(128)
def test_the_initialization_pattern_is_not_zeros() -> None:
    # SBC-4: LBPRZ is three bits wide; 010b says that unmapped blocks read as a pattern of the device's own.
    assert not LogicalBlockProvisioning.decode(bytes.fromhex("00b20004 00 08 00 00")).lbprz


@pytest.mark.conformance(125)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("00b20000", LogicalBlockProvisioning()),
        ("00b20004", LogicalBlockProvisioning()),
        ("00b2000405", LogicalBlockProvisioning(threshold_exponent=5)),
        # DP is set: a provisioning group designator follows, which isn't needed
        ("00b20008 00810200 01030004", LogicalBlockProvisioning(lbpu=True, provisioning_type=2)),
    ],
)
def test_short_or_long_provisioning(data: str, expected: LogicalBlockProvisioning) -> None:
    assert LogicalBlockProvisioning.decode(bytes.fromhex(data)) == expected


Page = (
    SupportedPages
    | UnitSerialNumber
    | BlockLimits
    | BlockDeviceCharacteristics
    | LogicalBlockProvisioning
    | DeviceIdentification
)
PAGES: dict[int, type[Page]] = {
    0x00: SupportedPages,
    0x80: UnitSerialNumber,
    0x83: DeviceIdentification,
    0xB0: BlockLimits,
    0xB1: BlockDeviceCharacteristics,
    0xB2: LogicalBlockProvisioning,
}
# What a device without EVPD answers: standard INQUIRY data, here of a disk and of a removable one.
STANDARD = "00000502 1f000002 41434d4520202020" + "20" * 20
REMOVABLE = "00800502 1f000002 41434d4520202020" + "20" * 20


@pytest.mark.conformance(125)
@pytest.mark.parametrize("code", PAGES)
@pytest.mark.parametrize("data", [STANDARD, REMOVABLE, "", "00", "00b0", "00c00000", "7f000000ff"[:4], "00840000"])
def test_not_this_page(code: int, data: str) -> None:
    with pytest.raises(ParameterDataError, match=f"VPD page {code:02X}h"):
        PAGES[code].decode(bytes.fromhex(data))


@pytest.mark.conformance(125)
@pytest.mark.parametrize("code", PAGES)
def test_every_other_page_code_is_refused(code: int) -> None:
    for other in set(range(256)) - {code}:
        with pytest.raises(ParameterDataError, match="the answer is page"):
            PAGES[code].decode(bytes([0, other, 0, 0]))


@pytest.mark.parametrize(
    "page",
    [
        SupportedPages((256,)),
        UnitSerialNumber("x" * 512),
        UnitSerialNumber("\x1b"),
        BlockLimits(max_transfer=2**32),
        BlockLimits(unmap_granularity_alignment=2**31),
        BlockLimits(unmap_granularity_alignment=-1),
        BlockDeviceCharacteristics(form_factor=16),
        BlockDeviceCharacteristics(zoned=4),
        BlockDeviceCharacteristics(rotation_rate=65536),
        LogicalBlockProvisioning(provisioning_type=8),
        LogicalBlockProvisioning(threshold_exponent=256),
        DeviceIdentification((Designator(association=0, designator_type=0, code_set=1, identifier=bytes(256)),)),
        DeviceIdentification((Designator(association=4, designator_type=0, code_set=1, identifier=b"x"),)),
        DeviceIdentification((Designator(association=0, designator_type=16, code_set=1, identifier=b"x"),)),
        DeviceIdentification((Designator(association=0, designator_type=0, code_set=16, identifier=b"x"),)),
        DeviceIdentification(
            (Designator(association=0, designator_type=0, code_set=1, identifier=b"x", protocol=16),)
        ),
    ],
)
def test_what_does_not_fit_is_refused(page: Page) -> None:
    with pytest.raises(ValueError, match=r"fit|longer|printable|range\(0, 256\)"):
        page.encode()


_u32 = st.integers(0, 2**32 - 1)


@given(
    st.builds(
        BlockLimits,
        wsnz=st.booleans(),
        max_compare_and_write=st.integers(0, 255),
        optimal_granularity=st.integers(0, 65535),
        max_transfer=_u32,
        optimal_transfer=_u32,
        max_prefetch=_u32,
        max_unmap_lba_count=_u32,
        max_unmap_descriptor_count=_u32,
        optimal_unmap_granularity=_u32,
        unmap_granularity_alignment=st.none() | st.integers(0, 2**31 - 1),
        max_write_same=st.integers(0, 2**64 - 1),
        max_atomic_transfer=_u32,
        atomic_alignment=_u32,
        atomic_granularity=_u32,
        max_atomic_transfer_with_boundary=_u32,
        max_atomic_boundary=_u32,
    )
)
def test_block_limits_round_trip(page: BlockLimits) -> None:
    assert BlockLimits.decode(page.encode()) == page


@given(
    st.builds(
        Designator,
        association=st.integers(0, 3),
        designator_type=st.integers(0, 15),
        code_set=st.integers(0, 15),
        identifier=st.binary(max_size=255),
        protocol=st.none() | st.integers(0, 15),
    ),
    st.integers(0, 5),
)
def test_identification_round_trip(designator: Designator, times: int) -> None:
    page = DeviceIdentification((designator,) * times)
    assert DeviceIdentification.decode(page.encode()) == page


def test_identification_cut_by_the_allocation_length() -> None:
    first = Designator(association=0, designator_type=1, code_set=2, identifier=b"ACME    disk 1")
    second = Designator(association=0, designator_type=3, code_set=1, identifier=bytes.fromhex("5000c50012345678"))
    data = DeviceIdentification((first, second)).encode()
    for length in range(4 + len(first.encode()), len(data)):
        assert DeviceIdentification.decode(data[:length]).designators == (first,)
    assert DeviceIdentification.decode(data).designators == (first, second)
    assert DeviceIdentification.decode(data + b"left over").designators == (first, second)


@pytest.mark.conformance(125)
def test_identification_with_a_designator_beyond_its_end() -> None:
    with pytest.raises(ParameterDataError, match="past the end"):
        DeviceIdentification.decode(bytes.fromhex("00830008 0103000a 60060480"))


@pytest.mark.conformance("B12")
@given(
    st.sampled_from(sorted(PAGES)),
    st.binary(max_size=80) | st.binary(max_size=70).map(lambda tail: bytes([0, 0, 0, len(tail) & ~3]) + tail),
    st.booleans(),
)
def test_any_bytes(code: int, data: bytes, right_code: bool) -> None:
    if right_code and len(data) > 1:
        data = data[:1] + bytes([code]) + data[2:]
    try:
        page = PAGES[code].decode(data)
    except ParameterDataError:
        return
    if isinstance(page, UnitSerialNumber):
        assert page.serial.isprintable()
    if isinstance(page, DeviceIdentification):
        assert all(designator.describe().isprintable() for designator in page.designators)
