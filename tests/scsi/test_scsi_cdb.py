"""CDB builders against bytes written out by hand from the tables of SPC-4 and SBC-3."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.scsi import cdb
from iscsifuse.scsi.cdb import Opcode


@pytest.mark.parametrize(
    ("built", "golden"),
    [
        (cdb.test_unit_ready(), "00 00 00 00 00 00"),
        (cdb.request_sense(allocation_length=252), "03 00 00 00 fc 00"),
        (cdb.request_sense(allocation_length=18, descriptor=True), "03 01 00 00 12 00"),
        (cdb.inquiry(allocation_length=255), "12 00 00 00 ff 00"),
        (cdb.inquiry(allocation_length=0x1234, page=0x83), "12 01 83 12 34 00"),
        (cdb.inquiry(allocation_length=255, page=0), "12 01 00 00 ff 00"),
        (cdb.report_luns(allocation_length=0x01020304), "a0 00 00 00 00 00 01 02 03 04 00 00"),
        (cdb.report_luns(allocation_length=16, select_report=2), "a0 00 02 00 00 00 00 00 00 10 00 00"),
        (cdb.read_capacity_10(), "25 00 00 00 00 00 00 00 00 00"),
        (cdb.read_capacity_16(), "9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00"),
        (
            cdb.get_lba_status(lba=0x0102030405060708, allocation_length=0x0A0B0C0D),
            "9e 12 01 02 03 04 05 06 07 08 0a 0b 0c 0d 00 00",
        ),
        (cdb.mode_sense_6(page=0x08, allocation_length=192), "1a 00 08 00 c0 00"),
        (cdb.mode_sense_6(page=0x3F, subpage=0xFF, allocation_length=4, dbd=True), "1a 08 3f ff 04 00"),
        (cdb.mode_sense_10(page=0x08, allocation_length=0x0102), "5a 00 08 00 00 00 00 01 02 00"),
        (cdb.mode_sense_10(page=0x0A, subpage=1, allocation_length=8, dbd=True), "5a 08 0a 01 00 00 00 00 08 00"),
        (cdb.start_stop_unit(start=True), "1b 00 00 00 01 00"),
        (cdb.start_stop_unit(start=False, immediate=True), "1b 01 00 00 00 00"),
        (cdb.read_10(lba=0x01020304, blocks=0x0506), "28 00 01 02 03 04 00 05 06 00"),
        (cdb.read_10(lba=1, blocks=1, fua=True, dpo=True), "28 18 00 00 00 01 00 00 01 00"),
        (
            cdb.read_16(lba=0x0102030405060708, blocks=0x090A0B0C, dpo=True),
            "88 10 01 02 03 04 05 06 07 08 09 0a 0b 0c 00 00",
        ),
        (cdb.write_10(lba=0x01020304, blocks=0x0506, fua=True), "2a 08 01 02 03 04 00 05 06 00"),
        (
            cdb.write_16(lba=0x0102030405060708, blocks=0x090A0B0C, fua=True),
            "8a 08 01 02 03 04 05 06 07 08 09 0a 0b 0c 00 00",
        ),
        (cdb.synchronize_cache_10(), "35 00 00 00 00 00 00 00 00 00"),
        (cdb.synchronize_cache_10(lba=0x01020304, blocks=5, immediate=True), "35 02 01 02 03 04 00 00 05 00"),
        (cdb.synchronize_cache_16(lba=1, blocks=2), "91 00 00 00 00 00 00 00 00 01 00 00 00 02 00 00"),
        (cdb.unmap(parameter_list_length=24), "42 00 00 00 00 00 00 00 18 00"),
    ],
)
def test_bytes(built: bytes, golden: str) -> None:
    assert built == bytes.fromhex(golden)


@pytest.mark.parametrize(
    ("built", "captured"),
    [
        # Sent by VMware ESX to an EMC array, 2012.
        (cdb.inquiry(allocation_length=255), "12 00 00 00 ff 00"),
        (cdb.inquiry(allocation_length=255, page=0x80), "12 01 80 00 ff 00"),
        (cdb.report_luns(allocation_length=2056, select_report=0), "a0 00 00 00 00 00 00 00 08 08 00 00"),
        (cdb.mode_sense_6(page=0x0A, allocation_length=16, dbd=True), "1a 08 0a 00 10 00"),
        (cdb.read(lba=0x880, blocks=1), "28 00 00 00 08 80 00 00 01 00"),
    ],
)
def test_the_same_as_another_initiator_sends(built: bytes, captured: str) -> None:
    assert built == bytes.fromhex(captured)


Builder = Callable[..., bytes]


@pytest.mark.conformance(119)
@pytest.mark.parametrize(("builder", "short", "long"), [(cdb.read, 0x28, 0x88), (cdb.write, 0x2A, 0x8A)])
@pytest.mark.parametrize(
    ("lba", "blocks", "ten"),
    [
        (0, 0, True),
        (0, 65535, True),
        (0, 65536, False),
        (2**32 - 1, 1, True),
        (2**32 - 1, 2, False),
        (2**32 - 65535, 65535, True),
        (2**32, 0, False),
        (2**32, 1, False),
        (2**64 - 1, 1, False),
        (2**64 - 2**32 + 1, 2**32 - 1, False),
    ],
)
def test_read_and_write_pick_the_form(
    builder: Builder, short: int, long: int, lba: int, blocks: int, ten: bool
) -> None:
    built = builder(lba=lba, blocks=blocks, fua=True, dpo=True)
    parsed = cdb.decode(built)
    assert len(built) == (10 if ten else 16)
    assert parsed.opcode == (short if ten else long)
    assert (parsed.lba, parsed.blocks, parsed.fua, parsed.dpo) == (lba, blocks, True, True)


@pytest.mark.conformance(119)
@pytest.mark.parametrize(
    ("lba", "blocks", "length"), [(0, 0, 10), (5, 65535, 10), (5, 65536, 16), (2**32 - 1, 2, 16), (2**32, 0, 16)]
)
def test_synchronize_cache_picks_the_form(lba: int, blocks: int, length: int) -> None:
    built = cdb.synchronize_cache(lba=lba, blocks=blocks, immediate=True)
    parsed = cdb.decode(built)
    assert len(built) == length
    assert (parsed.lba, parsed.blocks, parsed.immediate) == (lba, blocks, True)


@pytest.mark.parametrize("builder", [cdb.read, cdb.write, cdb.synchronize_cache])
@pytest.mark.parametrize(
    ("lba", "blocks"), [(-1, 1), (1, -1), (-5, 10), (0, 2**32), (2**64, 0), (2**64 - 1, 2), (2**33, -1)]
)
def test_out_of_range_is_refused_and_not_masked(builder: Builder, lba: int, blocks: int) -> None:
    with pytest.raises(ValueError, match=r"out of the range|doesn't fit|allocation length of 16"):
        builder(lba=lba, blocks=blocks)


@pytest.mark.parametrize(
    "build",
    [
        lambda: cdb.read_10(lba=2**32, blocks=1),
        lambda: cdb.read_10(lba=0, blocks=65536),
        lambda: cdb.read_10(lba=-1, blocks=1),
        lambda: cdb.write_10(lba=2**32, blocks=1),
        lambda: cdb.write_10(lba=0, blocks=-1),
        lambda: cdb.read_16(lba=2**64, blocks=1),
        lambda: cdb.read_16(lba=0, blocks=2**32),
        lambda: cdb.write_16(lba=-1, blocks=1),
        lambda: cdb.synchronize_cache_10(lba=2**32),
        lambda: cdb.synchronize_cache_16(blocks=2**32),
        lambda: cdb.request_sense(allocation_length=256),
        lambda: cdb.inquiry(allocation_length=65536),
        lambda: cdb.inquiry(allocation_length=255, page=256),
        lambda: cdb.inquiry(allocation_length=255, page=-1),
        lambda: cdb.report_luns(allocation_length=15),
        lambda: cdb.report_luns(allocation_length=2**32),
        lambda: cdb.read_capacity_16(allocation_length=2**32),
        lambda: cdb.get_lba_status(lba=2**64, allocation_length=24),
        lambda: cdb.mode_sense_6(page=0x40, allocation_length=4),
        lambda: cdb.mode_sense_6(page=8, allocation_length=256),
        lambda: cdb.mode_sense_10(page=-1, allocation_length=4),
        lambda: cdb.mode_sense_10(page=8, subpage=256, allocation_length=4),
        lambda: cdb.unmap(parameter_list_length=65536),
    ],
)
def test_every_field_is_checked(build: Callable[[], bytes]) -> None:
    with pytest.raises(ValueError, match=r"out of the range|doesn't fit|allocation length of 16"):
        build()


@given(lba=st.integers(0, 2**64 - 1), blocks=st.integers(0, 2**32 - 1), fua=st.booleans(), dpo=st.booleans())
def test_read_and_write_say_what_was_asked(lba: int, blocks: int, fua: bool, dpo: bool) -> None:
    for builder in (cdb.read, cdb.write):
        if lba + blocks > 2**64:
            with pytest.raises(ValueError, match="out of the range"):
                builder(lba=lba, blocks=blocks)
            continue
        parsed = cdb.decode(builder(lba=lba, blocks=blocks, fua=fua, dpo=dpo))
        assert (parsed.lba, parsed.blocks, parsed.fua, parsed.dpo) == (lba, blocks, fua, dpo)


@pytest.mark.parametrize(
    ("bytes_", "words"),
    [
        ("00", "TEST UNIT READY"),
        ("28 00", "READ(10)"),
        ("88", "READ(16)"),
        ("8a", "WRITE(16)"),
        ("2e", "WRITE AND VERIFY(10)"),
        ("34", "PRE-FETCH(10)"),
        ("85", "ATA PASS-THROUGH(16)"),
        ("12 01 83 00 ff 00", "INQUIRY"),
        ("9e 10", "READ CAPACITY(16)"),
        ("9e 12", "GET LBA STATUS"),
        ("9e 32", "GET LBA STATUS"),
        ("9e 1f", "SERVICE ACTION IN(16), service action 0x1F"),
        ("9e", "SERVICE ACTION IN(16)"),
        ("a3 0a", "REPORT TARGET PORT GROUPS"),
        ("5e 00", "PERSISTENT RESERVE IN, READ KEYS"),
        ("5f 03", "PERSISTENT RESERVE OUT, CLEAR"),
        ("7f 00 00 00 00 00 00 18 00 09", "variable length command, service action 0x09"),
        ("7f 00 00 00 00 00 00 18 00", "variable length command"),
        ("c1 00 00 00 00 00", "opcode 0xC1"),
        ("", "empty CDB"),
    ],
)
def test_name(bytes_: str, words: str) -> None:
    assert cdb.name(bytes.fromhex(bytes_)) == words
    assert cdb.name(memoryview(bytes.fromhex(bytes_))) == words


@given(st.binary(max_size=20))
def test_every_cdb_has_a_name(data: bytes) -> None:
    assert cdb.name(data).isprintable()
    assert cdb.name(data)


@pytest.mark.parametrize(
    ("opcode", "length"),
    [
        (Opcode.INQUIRY, 6),
        (Opcode.READ_10, 10),
        (Opcode.UNMAP, 10),
        (Opcode.MODE_SENSE_10, 10),
        (Opcode.VARIABLE_LENGTH, 0),
        (Opcode.READ_16, 16),
        (Opcode.SERVICE_ACTION_IN_16, 16),
        (Opcode.REPORT_LUNS, 12),
        (0xC0, 0),
        (0xFF, 0),
    ],
)
def test_cdb_length(opcode: int, length: int) -> None:
    assert cdb.cdb_length(opcode) == length


def test_the_number_in_a_name_is_the_length() -> None:
    for opcode in Opcode:
        _, _, tail = opcode.name.rpartition("_")
        if tail.isdigit():
            assert cdb.cdb_length(opcode) == int(tail)
