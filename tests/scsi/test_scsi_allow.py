"""The allow-list against a list of its own, over everything that the first two bytes of a CDB can say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.scsi import cdb
from iscsifuse.scsi.allow import is_harmless

# Written out as numbers, so that a slip in the names of operation codes can't hide here too.
_ALWAYS = {0x00, 0x03, 0x08, 0x12, 0x1A, 0x25, 0x28, 0x5A, 0x88, 0xA0, 0xA8}
_BY_SERVICE_ACTION = {0x5E: {0, 1, 2, 3}, 0x9E: {0x10, 0x12}, 0xA3: {0x0A, 0x0C}}
_LENGTHS = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}


def _expected(opcode: int, second: int) -> bool:
    if opcode in _ALWAYS:
        return True
    if opcode in _BY_SERVICE_ACTION:
        return second % 32 in _BY_SERVICE_ACTION[opcode]
    if opcode == 0x4D:
        return second % 2 == 0
    if opcode in (0x2F, 0x8F):
        return second // 2 % 4 == 0
    return False


def test_all_operation_codes_and_second_bytes() -> None:
    harmless = 0
    for opcode in range(256):
        for second in range(256):
            padded = bytes([opcode, second]).ljust(16, b"\0")
            expected = _expected(opcode, second)
            assert is_harmless(padded) is expected, cdb.name(padded)
            exact = padded[: _LENGTHS.get(opcode >> 5, 16)]
            assert is_harmless(exact) is expected, cdb.name(exact)
            harmless += expected
    # 11 × 256, 8 service actions × 8, half of LOG SENSE, a quarter of two VERIFYs
    assert harmless == 11 * 256 + 8 * 8 + 128 + 2 * 64


def test_truncated() -> None:
    assert not is_harmless(b"")
    for opcode in range(256):
        for length in range(1, _LENGTHS.get(opcode >> 5, 17)):
            assert not is_harmless(bytes([opcode]).ljust(length, b"\0"))


def test_longer_than_any_cdb() -> None:
    assert is_harmless(cdb.read(lba=0, blocks=1).ljust(16, b"\0"))
    assert not is_harmless(cdb.read(lba=0, blocks=1).ljust(17, b"\0"))


@pytest.mark.parametrize("control", [0x01, 0x04, 0x40, 0x80, 0xFF])
def test_control_byte(control: int) -> None:
    assert not is_harmless(cdb.read_10(lba=0, blocks=1)[:-1] + bytes([control]))
    assert not is_harmless((cdb.read_10(lba=0, blocks=1)[:-1] + bytes([control])).ljust(16, b"\0"))
    assert not is_harmless(cdb.read_16(lba=0, blocks=1)[:-1] + bytes([control]))


@pytest.mark.parametrize(
    "built",
    [
        cdb.test_unit_ready(),
        cdb.request_sense(allocation_length=252),
        cdb.inquiry(allocation_length=255),
        cdb.inquiry(allocation_length=255, page=0xB0),
        cdb.report_luns(allocation_length=2056),
        cdb.read_capacity_10(),
        cdb.read_capacity_16(),
        cdb.get_lba_status(lba=2**64 - 1, allocation_length=2**32 - 1),
        cdb.mode_sense_6(page=0x3F, allocation_length=255),
        cdb.mode_sense_10(page=0x3F, allocation_length=255),
        cdb.read(lba=2**32 - 1, blocks=1, fua=True, dpo=True),
        cdb.read(lba=2**40, blocks=2**20, fua=True, dpo=True),
    ],
)
def test_what_a_reader_needs(built: bytes) -> None:
    assert is_harmless(built)
    assert is_harmless(bytearray(built))
    assert is_harmless(memoryview(built))


@pytest.mark.parametrize(
    "built",
    [
        cdb.write(lba=0, blocks=1),
        cdb.write(lba=2**40, blocks=1),
        cdb.synchronize_cache(),
        cdb.synchronize_cache(lba=2**40),
        cdb.unmap(parameter_list_length=24),
        cdb.start_stop_unit(start=True),
    ],
)
def test_what_changes_something(built: bytes) -> None:
    assert not is_harmless(built)
    assert not is_harmless(built.ljust(16, b"\0"))


@given(st.binary(max_size=20))
def test_never_raises_and_agrees_with_the_list(data: bytes) -> None:
    if is_harmless(data):
        assert _expected(data[0], data[1])
