from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi import cdb
from iscsifuse.scsi.cdb import Opcode, ParsedCdb
from iscsifuse.scsi.opcodes import service_action_of


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("00 00 00 00 00 00", ParsedCdb(opcode=0x00)),
        ("03 01 00 00 fc 00", ParsedCdb(opcode=0x03, allocation_length=252, descriptor=True)),
        # The upper three bits of byte 1 once were a LUN, and aren't part of the address.
        ("08 ff ff ff 10 00", ParsedCdb(opcode=0x08, lba=0x1FFFFF, blocks=16)),
        ("0a 01 02 03 00 00", ParsedCdb(opcode=0x0A, lba=0x010203, blocks=256)),
        ("12 01 83 12 34 00", ParsedCdb(opcode=0x12, evpd=True, page=0x83, allocation_length=0x1234)),
        ("12 00 00 00 05 00", ParsedCdb(opcode=0x12, allocation_length=5)),
        ("15 11 00 00 18 00", ParsedCdb(opcode=0x15, parameter_list_length=24, save=True)),
        (
            "1a 08 88 ff c0 00",
            ParsedCdb(opcode=0x1A, page=8, page_control=2, subpage=255, allocation_length=192, dbd=True),
        ),
        (
            "1b 01 00 00 32 00",
            ParsedCdb(opcode=0x1B, immediate=True, start=False, load_eject=True, power_condition=3),
        ),
        ("1b 00 00 00 01 00", ParsedCdb(opcode=0x1B, start=True)),
        ("25 00 01 02 03 04 00 00 01 00", ParsedCdb(opcode=0x25, lba=0x01020304)),
        (
            "28 38 01 02 03 04 ff 05 06 00",
            ParsedCdb(opcode=0x28, lba=0x01020304, blocks=0x0506, fua=True, dpo=True, protect=1),
        ),
        ("2a 08 00 00 00 00 00 00 00 00", ParsedCdb(opcode=0x2A, fua=True)),
        ("2e 02 00 00 00 09 00 00 01 00", ParsedCdb(opcode=0x2E, lba=9, blocks=1, bytchk=1)),
        (
            "2f f6 01 02 03 04 ff 05 06 00",
            ParsedCdb(opcode=0x2F, lba=0x01020304, blocks=0x0506, bytchk=3, dpo=True, protect=7),
        ),
        ("35 02 01 02 03 04 ff 05 06 00", ParsedCdb(opcode=0x35, lba=0x01020304, blocks=0x0506, immediate=True)),
        ("41 19 00 00 00 09 00 00 02 00", ParsedCdb(opcode=0x41, lba=9, blocks=2, unmap=True, anchor=True)),
        ("42 01 00 00 00 00 00 00 18 00", ParsedCdb(opcode=0x42, parameter_list_length=24, anchor=True)),
        (
            "4d 01 6f 01 00 00 00 01 00 00",
            ParsedCdb(opcode=0x4D, page=0x2F, page_control=1, subpage=1, allocation_length=256, save=True),
        ),
        ("55 10 00 00 00 00 00 01 02 00", ParsedCdb(opcode=0x55, parameter_list_length=0x0102)),
        ("5a 08 3f 00 00 00 00 01 02 00", ParsedCdb(opcode=0x5A, page=0x3F, allocation_length=0x0102, dbd=True)),
        ("5e 01 00 00 00 00 00 02 00 00", ParsedCdb(opcode=0x5E, service_action=1, allocation_length=512)),
        (
            "5f 03 05 00 00 00 00 00 18 00",
            ParsedCdb(opcode=0x5F, service_action=3, parameter_list_length=24),
        ),
        (
            "88 10 01 02 03 04 05 06 07 08 09 0a 0b 0c 00 00",
            ParsedCdb(opcode=0x88, lba=0x0102030405060708, blocks=0x090A0B0C, dpo=True),
        ),
        (
            "89 08 01 02 03 04 05 06 07 08 00 00 00 01 00 00",
            ParsedCdb(opcode=0x89, lba=0x0102030405060708, blocks=1, fua=True),
        ),
        (
            "8a 08 00 00 00 00 00 00 00 08 00 00 00 0c 00 00",
            ParsedCdb(opcode=0x8A, lba=8, blocks=12, fua=True),
        ),
        ("8e 00 00 00 00 00 00 00 00 08 00 00 00 0c 00 00", ParsedCdb(opcode=0x8E, lba=8, blocks=12)),
        ("8f 00 00 00 00 00 00 00 00 08 00 00 00 0c 00 00", ParsedCdb(opcode=0x8F, lba=8, blocks=12)),
        ("91 00 00 00 00 00 00 00 00 08 00 00 00 0c 00 00", ParsedCdb(opcode=0x91, lba=8, blocks=12)),
        (
            "93 09 00 00 00 00 00 00 00 08 00 00 00 0c 00 00",
            ParsedCdb(opcode=0x93, lba=8, blocks=12, unmap=True, ndob=True),
        ),
        (
            "9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00",
            ParsedCdb(opcode=0x9E, service_action=0x10, allocation_length=32),
        ),
        (
            "9e 12 00 00 00 00 00 00 00 07 00 00 00 18 00 00",
            ParsedCdb(opcode=0x9E, service_action=0x12, lba=7, allocation_length=24),
        ),
        (
            "9e 14 00 00 00 00 00 00 00 07 00 00 00 18 00 00",
            ParsedCdb(opcode=0x9E, service_action=0x14),
        ),
        (
            "a0 00 02 00 00 00 00 00 08 08 00 00",
            ParsedCdb(opcode=0xA0, select_report=2, allocation_length=0x808),
        ),
        (
            "a3 0c 00 00 00 00 00 00 10 00 00 00",
            ParsedCdb(opcode=0xA3, service_action=0x0C, allocation_length=4096),
        ),
        (
            "a8 08 01 02 03 04 05 06 07 08 ff 00",
            ParsedCdb(opcode=0xA8, lba=0x01020304, blocks=0x05060708, fua=True),
        ),
        ("aa 00 00 00 00 01 00 00 00 02 00 00", ParsedCdb(opcode=0xAA, lba=1, blocks=2)),
        ("ae 04 00 00 00 01 00 00 00 02 00 00", ParsedCdb(opcode=0xAE, lba=1, blocks=2, bytchk=2)),
        ("af 00 00 00 00 01 00 00 00 02 00 00", ParsedCdb(opcode=0xAF, lba=1, blocks=2)),
        ("04 00 00 00 00 00", ParsedCdb(opcode=0x04)),
        ("a4 0a 00 00 00 00 00 00 00 00 00 00", ParsedCdb(opcode=0xA4, service_action=0x0A)),
        ("7f 00 00 00 00 00 00 18 00 0b", ParsedCdb(opcode=0x7F, service_action=0x0B)),
        ("c1", ParsedCdb(opcode=0xC1)),
    ],
)
def test_fields(data: str, expected: ParsedCdb) -> None:
    raw = bytes.fromhex(data)
    assert cdb.decode(raw) == expected
    # Padded to the 16 bytes of a PDU it is the same command.
    padded = cdb.decode(memoryview(raw.ljust(16, b"\0")))
    assert replace(padded, service_action=expected.service_action) == expected


@pytest.mark.parametrize("opcode", list(Opcode))
def test_too_short(opcode: Opcode) -> None:
    length = cdb.cdb_length(opcode)
    for short in range(1, length):
        with pytest.raises(ParameterDataError, match="too short"):
            cdb.decode(bytes([opcode]).ljust(short, b"\0"))
    assert cdb.decode(bytes([opcode]).ljust(max(length, 1), b"\0")).opcode == opcode


def test_empty() -> None:
    assert service_action_of(b"") is None
    with pytest.raises(ParameterDataError, match="0 bytes"):
        cdb.decode(b"")


@pytest.mark.conformance("B12")
@given(st.binary(max_size=40))
def test_any_bytes(data: bytes) -> None:
    try:
        parsed = cdb.decode(data)
    except ParameterDataError:
        return
    assert parsed.opcode == data[0]
