import hashlib
from typing import Any

import pytest

from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi import lba_status, vpd
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi import unmap as unmap_list
from iscsifuse.scsi.capacity import Capacity
from iscsifuse.scsi.cdb import Opcode
from iscsifuse.scsi.inquiry import Inquiry
from iscsifuse.scsi.mode import CACHING_PAGE, ModeParameters
from iscsifuse.scsi.sense import Sense, SenseKey
from iscsifuse.scsi.status import Status
from iscsifuse.scsi.unmap import UnmapRange
from iscsifuse.testing.disk import DeviceType, Disk
from iscsifuse.testing.lengths import Lengths
from iscsifuse.testing.outcome import Outcome
from iscsifuse.testing.scsi_engine import ScsiEngine

LUN = luns.encode(0)


def engine_of(*disks: Disk, attention: tuple[int, int] | None = None, **options: Any) -> ScsiEngine:
    engine = ScsiEngine.of(disks or [Disk(blocks=100)], **options)
    engine.login("me", attention=attention)
    return engine


def run(engine: ScsiEngine, cdb: bytes, data: bytes = b"", *, lun: bytes = LUN, nexus: str = "me") -> Outcome:
    return engine.check(nexus=nexus, lun=lun, cdb=cdb) or engine.perform(nexus=nexus, lun=lun, cdb=cdb, data=data)


def codes(outcome: Outcome) -> tuple[SenseKey, int, int]:
    assert outcome.status == Status.CHECK_CONDITION
    sense = Sense.decode(outcome.sense)
    return sense.key, sense.asc, sense.ascq


def wide(opcode: int, *, lba: int = 0, blocks: int = 0, flags: int = 0) -> bytes:
    """A 10-, 12- or 16-byte block command."""
    size = cdbs.cdb_length(opcode)
    if size == 10:
        return bytes([opcode, flags]) + lba.to_bytes(4, "big") + b"\0" + blocks.to_bytes(2, "big") + b"\0"
    if size == 12:
        return bytes([opcode, flags]) + lba.to_bytes(4, "big") + blocks.to_bytes(4, "big") + bytes(2)
    return bytes([opcode, flags]) + lba.to_bytes(8, "big") + blocks.to_bytes(4, "big") + bytes(2)


READS = [Opcode.READ_10, Opcode.READ_12, Opcode.READ_16]
WRITES = [
    Opcode.WRITE_10,
    Opcode.WRITE_12,
    Opcode.WRITE_16,
    Opcode.WRITE_AND_VERIFY_10,
    Opcode.WRITE_AND_VERIFY_12,
    Opcode.WRITE_AND_VERIFY_16,
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("read", READS)
def test_what_is_written_is_read(read: Opcode, write: Opcode) -> None:
    engine = engine_of()
    data = b"a" * 512 + b"b" * 512
    assert run(engine, wide(write, lba=9, blocks=2), data) == Outcome()
    assert run(engine, wide(read, lba=8, blocks=4)).data_in == bytes(512) + data + bytes(512)
    assert engine.lengths(lun=LUN, cdb=wide(write, blocks=2)) == Lengths(data_out=1024)
    assert engine.lengths(lun=LUN, cdb=wide(read, blocks=4)) == Lengths(data_in=2048)


def test_six_byte_commands() -> None:
    engine = engine_of(Disk(blocks=300))
    assert run(engine, bytes([Opcode.WRITE_6, 0, 1, 0, 1, 0]), b"x" * 512) == Outcome()
    assert run(engine, bytes([Opcode.READ_6, 0, 0, 5, 0, 0])).data_in == bytes(251 * 512) + b"x" * 512 + bytes(
        4 * 512
    )


@pytest.mark.parametrize("opcode", [*READS, *WRITES, Opcode.VERIFY_16, Opcode.SYNCHRONIZE_CACHE_10])
@pytest.mark.parametrize(("lba", "blocks"), [(100, 1), (99, 2), (101, 0), (0, 101)])
def test_out_of_range(opcode: Opcode, lba: int, blocks: int) -> None:
    engine = engine_of()
    assert codes(run(engine, wide(opcode, lba=lba, blocks=blocks))) == (SenseKey.ILLEGAL_REQUEST, 0x21, 0)
    assert engine.ledger == []


@pytest.mark.parametrize(
    ("disk", "cdb", "expected"),
    [
        ({}, b"\xc1".ljust(16, b"\0"), (SenseKey.ILLEGAL_REQUEST, 0x20, 0)),
        ({}, b"\x28", (SenseKey.ILLEGAL_REQUEST, 0x20, 0)),
        ({}, wide(Opcode.SERVICE_ACTION_IN_16, flags=0x1F), (SenseKey.ILLEGAL_REQUEST, 0x20, 0)),
        ({}, wide(Opcode.READ_10, blocks=1, flags=0x20), (SenseKey.ILLEGAL_REQUEST, 0x24, 0)),
        ({"max_transfer_blocks": 8}, wide(Opcode.READ_10, blocks=9), (SenseKey.ILLEGAL_REQUEST, 0x24, 0)),
        ({}, wide(Opcode.VERIFY_10, flags=0x04), (SenseKey.ILLEGAL_REQUEST, 0x24, 0)),
        ({}, wide(Opcode.WRITE_SAME_10, blocks=1, flags=0x08), (SenseKey.ILLEGAL_REQUEST, 0x24, 0)),
        ({}, wide(Opcode.WRITE_SAME_10, blocks=1), (SenseKey.ILLEGAL_REQUEST, 0x24, 0)),
        ({}, cdbs.unmap(parameter_list_length=24), (SenseKey.ILLEGAL_REQUEST, 0x20, 0)),
        ({}, cdbs.get_lba_status(lba=0, allocation_length=24), (SenseKey.ILLEGAL_REQUEST, 0x20, 0)),
        ({"thin": True}, cdbs.get_lba_status(lba=100, allocation_length=24), (SenseKey.ILLEGAL_REQUEST, 0x21, 0)),
        ({"thin": True}, cdbs.get_lba_status(lba=0, allocation_length=23), (SenseKey.ILLEGAL_REQUEST, 0x24, 0)),
        ({"thin": True}, cdbs.unmap(parameter_list_length=4), (SenseKey.ILLEGAL_REQUEST, 0x1A, 0)),
        ({"write_protected": True}, wide(Opcode.WRITE_16, blocks=1), (SenseKey.DATA_PROTECT, 0x27, 0)),
        ({"medium_present": False}, cdbs.test_unit_ready(), (SenseKey.NOT_READY, 0x3A, 0)),
        ({"stopped": True}, cdbs.read_capacity_10(), (SenseKey.NOT_READY, 0x04, 2)),
        ({}, cdbs.inquiry(allocation_length=255, page=0xC0), (SenseKey.ILLEGAL_REQUEST, 0x24, 0)),
        ({}, b"\x12\x00\x80\x00\xff\x00", (SenseKey.ILLEGAL_REQUEST, 0x24, 0)),
        ({}, cdbs.mode_sense_6(page=0x1C, allocation_length=255), (SenseKey.ILLEGAL_REQUEST, 0x24, 0)),
        ({}, cdbs.mode_sense_6(page=8, subpage=1, allocation_length=255), (SenseKey.ILLEGAL_REQUEST, 0x24, 0)),
        ({}, b"\x1a\x00\xc8\x00\xff\x00", (SenseKey.ILLEGAL_REQUEST, 0x39, 0)),
        ({}, b"\xa0\x00\x03".ljust(10, b"\x20") + bytes(2), (SenseKey.ILLEGAL_REQUEST, 0x24, 0)),
        ({"device_type": DeviceType.CONTROLLER}, cdbs.read_capacity_10(), (SenseKey.ILLEGAL_REQUEST, 0x20, 0)),
    ],
)
@pytest.mark.parametrize("descriptor", [False, True])
def test_what_is_refused(
    disk: dict[str, Any], cdb: bytes, expected: tuple[SenseKey, int, int], descriptor: bool
) -> None:
    engine = engine_of(Disk(blocks=100, descriptor_sense=descriptor, **disk))
    outcome = run(engine, cdb)
    assert codes(outcome) == expected
    if len(cdb) > 1 and cdb[0] != 0x28:
        assert outcome.sense[0] == (0x72 if descriptor else 0x70)


def test_a_medium_error_names_its_block_and_brings_what_was_before() -> None:
    engine = engine_of(Disk(blocks=100, bad_blocks={7}, bad_writes={50}))
    outcome = run(engine, cdbs.read_10(lba=5, blocks=4))
    assert codes(outcome) == (SenseKey.MEDIUM_ERROR, 0x11, 0)
    assert (Sense.decode(outcome.sense).information, len(outcome.data_in)) == (7, 1024)
    outcome = run(engine, cdbs.write_10(lba=48, blocks=4), bytes(2048))
    assert codes(outcome) == (SenseKey.MEDIUM_ERROR, 0x0C, 0)
    assert Sense.decode(outcome.sense).information == 50
    far = 1 << 33
    engine = engine_of(Disk(blocks=1 << 34, bad_blocks={far}))
    sense = Sense.decode(run(engine, cdbs.read_16(lba=far, blocks=1)).sense)
    assert (sense.information, sense.response_code) == (far, 0x72)


def test_verify() -> None:
    engine = engine_of(Disk.from_bytes(b"a" * 1024 + b"b" * 512))
    assert run(engine, wide(Opcode.VERIFY_10, blocks=3)).status == 0
    assert run(engine, wide(Opcode.VERIFY_10, blocks=2, flags=2), b"a" * 1024).status == 0
    assert run(engine, wide(Opcode.VERIFY_12, blocks=2, flags=6), b"a" * 512).status == 0
    outcome = run(engine, wide(Opcode.VERIFY_16, blocks=3, flags=2), b"a" * 1536)
    assert codes(outcome) == (SenseKey.MISCOMPARE, 0x1D, 0)
    assert Sense.decode(outcome.sense).information == 1024
    assert engine.lengths(lun=LUN, cdb=wide(Opcode.VERIFY_12, blocks=2, flags=6)) == Lengths(data_out=512)


def test_write_same() -> None:
    engine = engine_of(Disk(blocks=100, thin=True))
    assert run(engine, wide(Opcode.WRITE_SAME_10, lba=98), b"x" * 512).status == 0
    assert engine.disks[0].contents(lba=97) == bytes(512) + b"x" * 1024
    assert run(engine, wide(Opcode.WRITE_SAME_16, lba=98, blocks=1, flags=0x08), bytes(512)).status == 0
    assert [e.mapped for e in engine.disks[0].extents(lba=98, limit=9)] == [False, True]
    assert run(engine, wide(Opcode.WRITE_SAME_16, lba=99, blocks=1, flags=0x01)).status == 0
    assert engine.disks[0].contents(lba=97) == bytes(1536)


def test_unmap_and_lba_status() -> None:
    engine = engine_of(Disk(blocks=100, thin=True))
    run(engine, cdbs.write_10(lba=10, blocks=10), b"x" * 5120)
    ranges = unmap_list.encode([UnmapRange(lba=12, blocks=3), UnmapRange(lba=50, blocks=0)])
    assert run(engine, cdbs.unmap(parameter_list_length=len(ranges)), ranges).status == 0
    assert run(engine, cdbs.unmap(parameter_list_length=0)).status == 0
    answer = run(engine, cdbs.get_lba_status(lba=5, allocation_length=8 + 3 * 16 + 7)).data_in
    extents = lba_status.decode(answer, lba=5, capacity_blocks=100)
    assert [(e.lba, e.blocks, e.mapped) for e in extents] == [(5, 5, False), (10, 2, True), (12, 3, False)]
    beyond = unmap_list.encode([UnmapRange(lba=99, blocks=2)])
    assert codes(run(engine, cdbs.unmap(parameter_list_length=len(beyond)), beyond))[1] == 0x21
    much = unmap_list.encode([UnmapRange(lba=0, blocks=1)] * 65)
    assert codes(run(engine, cdbs.unmap(parameter_list_length=len(much)), much))[1] == 0x26


def test_synchronize_cache_makes_stable() -> None:
    engine = engine_of()
    run(engine, cdbs.write_10(lba=3, blocks=2), b"x" * 1024)
    run(engine, cdbs.write_10(lba=9, blocks=1, fua=True), b"x" * 512)
    assert engine.disks[0].unstable_blocks == 2
    run(engine, cdbs.synchronize_cache_10(lba=4, blocks=1))
    assert engine.disks[0].unstable_blocks == 1
    run(engine, cdbs.synchronize_cache_16())
    assert engine.disks[0].unstable_blocks == 0


def test_start_and_stop() -> None:
    engine = engine_of(Disk(blocks=1, becoming_ready=2))
    tests = [run(engine, cdbs.test_unit_ready()) for _ in range(3)]
    assert [outcome.status for outcome in tests] == [2, 2, 0]
    assert codes(tests[0]) == (SenseKey.NOT_READY, 0x04, 0x01)
    assert run(engine, cdbs.start_stop_unit(start=False)).status == 0
    assert codes(run(engine, cdbs.read_10(lba=0, blocks=1))) == (SenseKey.NOT_READY, 0x04, 0x02)
    assert run(engine, cdbs.start_stop_unit(start=True)).status == 0
    assert run(engine, cdbs.read_10(lba=0, blocks=1)).status == 0


# --- what a disk says of itself ---


def test_inquiry() -> None:
    engine = engine_of(Disk(blocks=1, vendor="ACME", product="Disk", revision="2"))
    answer = Inquiry.decode(run(engine, cdbs.inquiry(allocation_length=255)).data_in)
    assert (answer.vendor, answer.product, answer.revision, answer.is_disk) == ("ACME", "Disk", "2", True)
    assert len(run(engine, cdbs.inquiry(allocation_length=5)).data_in) == 5
    nobody = run(engine, cdbs.inquiry(allocation_length=255), lun=luns.encode(9)).data_in
    assert nobody[0] == 0x7F


def test_vital_product_data() -> None:
    engine = engine_of(
        Disk(blocks=1, serial="S1", thin=True, max_transfer_blocks=64),
        Disk(blocks=1, lun=1, serial="S2"),
        Disk(blocks=0, lun=2, device_type=DeviceType.CONTROLLER),
    )

    def page(number: int, *, lun: int = 0) -> bytes:
        return run(engine, cdbs.inquiry(allocation_length=255, page=number), lun=luns.encode(lun)).data_in

    assert vpd.SupportedPages.decode(page(0)).pages == (0, 0x80, 0x83, 0xB0, 0xB1, 0xB2)
    assert vpd.SupportedPages.decode(page(0, lun=2)).pages == (0, 0x80, 0x83)
    assert page(0, lun=2)[0] == DeviceType.CONTROLLER
    assert vpd.UnitSerialNumber.decode(page(0x80)).serial == "S1"
    names = [vpd.best_designator(vpd.DeviceIdentification.decode(page(0x83, lun=lun)).designators) for lun in (0, 1)]
    assert [name.identifier[0] >> 4 for name in names if name] == [3, 3]
    assert names[0] != names[1]
    limits = vpd.BlockLimits.decode(page(0xB0))
    assert (limits.max_transfer, limits.max_unmap_descriptor_count) == (64, 64)
    assert vpd.BlockDeviceCharacteristics.decode(page(0xB1)).is_solid_state
    assert [vpd.LogicalBlockProvisioning.decode(page(0xB2, lun=lun)).lbpu for lun in (0, 1)] == [True, False]


def test_capacity() -> None:
    engine = engine_of(Disk(blocks=5, block_length=4096, thin=True, physical_exponent=1), Disk(blocks=1 << 33, lun=1))
    ten = Capacity.decode_10(run(engine, cdbs.read_capacity_10()).data_in)
    assert (ten.blocks, ten.block_length) == (5, 4096)
    sixteen = Capacity.decode_16(run(engine, cdbs.read_capacity_16()).data_in)
    assert (sixteen.blocks, sixteen.lbpme, sixteen.lbprz, sixteen.physical_block_length) == (5, True, True, 8192)
    assert len(run(engine, cdbs.read_capacity_16(allocation_length=12)).data_in) == 12
    assert Capacity.decode_10(run(engine, cdbs.read_capacity_10(), lun=luns.encode(1)).data_in).needs_16


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("protected", [True, False])
def test_mode_sense(cache: bool, protected: bool) -> None:
    engine = engine_of(Disk(blocks=100, volatile_cache=cache, write_protected=protected))
    six = ModeParameters.decode_6(run(engine, cdbs.mode_sense_6(page=0x3F, allocation_length=255)).data_in)
    ten = ModeParameters.decode_10(run(engine, cdbs.mode_sense_10(page=0x3F, allocation_length=255)).data_in)
    assert six == ten
    assert six.caching
    assert (six.caching.wce, six.write_protected, six.dpofua) == (cache, protected, True)
    assert six.block_descriptors == bytes([0, 0, 0, 100, 0, 0, 2, 0])
    one = ModeParameters.decode_6(run(engine, cdbs.mode_sense_6(page=8, allocation_length=255, dbd=True)).data_in)
    assert (list(one.pages), one.block_descriptors) == ([(CACHING_PAGE, 0)], b"")
    changeable = ModeParameters.decode_6(run(engine, b"\x1a\x00\x48\x00\xff\x00").data_in)
    assert changeable.pages[8, 0][2:] == bytes(18)


def test_report_luns() -> None:
    engine = engine_of(Disk(blocks=1, lun=300), Disk(blocks=1, lun=2))
    answer = run(engine, cdbs.report_luns(allocation_length=64)).data_in
    assert [address.number for address in luns.decode_report_luns(answer).luns] == [2, 300]
    answer = run(engine, cdbs.report_luns(allocation_length=64, select_report=1)).data_in
    assert luns.decode_report_luns(answer).luns == ()
    assert len(run(engine, cdbs.report_luns(allocation_length=16)).data_in) == 16


def test_a_lun_that_is_not_there() -> None:
    engine = engine_of()
    assert codes(run(engine, cdbs.test_unit_ready(), lun=luns.encode(4)))[1] == 0x25
    sense = run(engine, cdbs.request_sense(allocation_length=252), lun=luns.encode(4)).data_in
    assert Sense.decode(sense).asc == 0x25
    assert engine.lengths(lun=luns.encode(4), cdb=cdbs.read_10(lba=0, blocks=1)) is None
    assert engine.find(b"\xc1\x01" + bytes(6)) is None
    assert engine.find(b"") is None


# --- unit attentions ---


def test_each_nexus_is_told_once_of_each_thing() -> None:
    disk = Disk(blocks=10)
    engine = engine_of(disk, attention=(0x29, 0))
    assert codes(run(engine, cdbs.read_10(lba=0, blocks=1))) == (SenseKey.UNIT_ATTENTION, 0x29, 0)
    disk.resize(20)
    engine.login("you", attention=None)
    disk.resize(30)
    assert [codes(run(engine, cdbs.test_unit_ready()))[1:] for _ in range(2)] == [(0x2A, 9)] * 2
    assert run(engine, cdbs.test_unit_ready()).status == 0
    assert codes(run(engine, cdbs.test_unit_ready(), nexus="you"))[1:] == (0x2A, 9)
    assert run(engine, cdbs.test_unit_ready(), nexus="you").status == 0
    engine.logout("you")
    disk.resize(40)
    assert run(engine, cdbs.test_unit_ready(), nexus="you").status == 0


def test_some_commands_pass_attentions_and_one_reads_them() -> None:
    engine = engine_of(attention=(0x29, 0))
    assert run(engine, cdbs.inquiry(allocation_length=36)).status == 0
    assert run(engine, cdbs.report_luns(allocation_length=16)).status == 0
    sense = Sense.decode(run(engine, cdbs.request_sense(allocation_length=252)).data_in)
    assert (sense.key, sense.asc) == (SenseKey.UNIT_ATTENTION, 0x29)
    sense = Sense.decode(run(engine, cdbs.request_sense(allocation_length=252, descriptor=True)).data_in)
    assert (sense.key, sense.response_code) == (SenseKey.NO_SENSE, 0x72)
    assert run(engine, cdbs.test_unit_ready()).status == 0


def test_disks_come_and_go() -> None:
    engine = engine_of(Disk(blocks=1))
    engine.replace(Disk(blocks=2, lun=1))
    assert codes(run(engine, cdbs.test_unit_ready()))[1:] == (0x3F, 0x0E)
    assert codes(run(engine, cdbs.test_unit_ready(), lun=luns.encode(1)))[1:] == (0x3F, 0x0E)
    assert run(engine, cdbs.test_unit_ready(), lun=luns.encode(1)).status == 0
    engine.remove(1)
    assert codes(run(engine, cdbs.test_unit_ready()))[1:] == (0x3F, 0x0E)
    with pytest.raises(ValueError, match="two disks are LUN 3"):
        ScsiEngine.of([Disk(blocks=1, lun=3), Disk(blocks=2, lun=3)])


# --- the ledger ---


def test_the_ledger() -> None:
    engine = engine_of(hash_data=True)
    run(engine, cdbs.write_10(lba=3, blocks=1), b"x" * 512)
    run(engine, cdbs.read_10(lba=200, blocks=1))
    run(engine, cdbs.read_16(lba=3, blocks=1))
    assert [(e.number, e.name, e.lun, e.lba, e.blocks, e.status) for e in engine.ledger] == [
        (0, "WRITE(10)", 0, 3, 1, 0),
        (1, "READ(16)", 0, 3, 1, 0),
    ]
    assert {entry.sha256 for entry in engine.ledger} == {hashlib.sha256(b"x" * 512).hexdigest()}
    assert engine.executed("WRITE(10)", "WRITE(16)") == engine.ledger[:1]
    engine.record = False
    run(engine, cdbs.test_unit_ready())
    assert len(engine.ledger) == 2
