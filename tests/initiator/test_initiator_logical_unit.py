import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from initiator_fakes import FakeNexus, FakeUnit, Reply, designator, illegal, jumping, mode
from initiator_kit import (
    DEFAULT_TARGET_NAME,
    at_once,
    config_of,
    pattern,
    portal_of,
    serving,
    settings_of,
    until,
)

from iscsifuse.errors import (
    CommandError,
    DataProtectError,
    DigestError,
    IdentityError,
    MediumError,
    ReadOnlyError,
    SessionLostError,
    TransferError,
    WriteBackError,
)
from iscsifuse.initiator import guards
from iscsifuse.initiator.inventory import scan
from iscsifuse.initiator.logical_unit import MAX_TRANSFER, LogicalUnit
from iscsifuse.initiator.nexus import Nexus, NexusState, open_nexus
from iscsifuse.initiator.settings import SessionSettings
from iscsifuse.iscsi.pdu import Opcode
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.capacity import Capacity
from iscsifuse.scsi.designator import Association
from iscsifuse.scsi.sense import SenseKey as K
from iscsifuse.scsi.status import Status
from iscsifuse.scsi.vpd import BlockLimits, DeviceIdentification, UnitSerialNumber
from iscsifuse.testing.actions import Answer, Close, Delay, Late
from iscsifuse.testing.config import LoginAttention, TargetConfig
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Rule, all_of, is_a
from iscsifuse.testing.script import cdb as has_cdb
from iscsifuse.testing.script import lun as has_lun
from iscsifuse.testing.target import LoopbackTarget

RECOVERY = "session lost|logged in again|can't log in again"
READ, WRITE = has_cdb(0x28, 0x88), has_cdb(0x2A, 0x8A)
COMMAND = is_a(Opcode.SCSI_COMMAND)
BLOCKS = 16384


def _disk(blocks: int = BLOCKS, **changes: Any) -> Disk:
    disk = Disk.from_bytes(pattern(blocks * 512))
    for name, value in changes.items():
        setattr(disk, name, value)
    return disk


@asynccontextmanager
async def _open(config: TargetConfig, **changes: Any) -> AsyncIterator[tuple[LoopbackTarget, Nexus, LogicalUnit]]:
    async with serving(config) as target:
        with trio.fail_after(20):
            async with open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings_of(**changes)) as nexus:
                (description,) = await scan(nexus)
                yield target, nexus, LogicalUnit(nexus, description)


async def _read(unit: LogicalUnit, lba: int, blocks: int) -> bytes:
    memory = memoryview(bytearray(blocks * unit.block_length))
    await unit.read_into(memory, lba=lba)
    return bytes(memory)


async def _fake(unit: FakeUnit, **changes: Any) -> tuple[LogicalUnit, FakeNexus]:
    settings = replace(SessionSettings(initiator_name="iqn.x", read_only=False, timeout=5), **changes)
    nexus = FakeNexus(unit, settings=settings)
    (description,) = await scan(nexus.as_nexus())
    unit.asked.clear()
    nexus.cdbs.clear()
    return LogicalUnit(nexus.as_nexus(), description), nexus


# --- reading and writing ---


@pytest.mark.conformance(120)
@pytest.mark.conformance(121)
@pytest.mark.parametrize("block_length", [512, 520, 4096])
@pytest.mark.parametrize("limit", [0, 1, 7, 128])
async def test_logical_unit_splits_what_is_too_long(block_length: int, limit: int) -> None:
    contents = pattern(300 * block_length)
    disk = Disk.from_bytes(contents, block_length=block_length)
    disk.max_transfer_blocks = limit
    async with _open(config_of(disk, reorder=3)) as (target, _, unit):
        assert (unit.block_length, unit.block_count) == (block_length, 300)
        for lba, blocks in ((0, 1), (5, 7), (5, 8), (0, 300), (290, 10)):
            piece = contents[lba * block_length : (lba + blocks) * block_length]
            assert await _read(unit, lba, blocks) == piece
        data = random.Random(limit).randbytes(200 * block_length)
        await unit.write(memoryview(data), lba=50)
        assert disk.contents(lba=50, blocks=200) == data
        assert disk.contents(lba=0, blocks=50) == contents[: 50 * block_length]
        if limit:
            assert all(entry.blocks <= limit for entry in target.ledger if entry.name.startswith(("READ(", "WRITE(")))


async def test_logical_unit_no_command_is_longer_than_a_mebibyte() -> None:
    async with _open(config_of(_disk())) as (target, _, unit):
        assert await _read(unit, 0, BLOCKS) == pattern(BLOCKS * 512)
        reads = target.engine().executed("READ(10)")
        assert len(reads) == BLOCKS * 512 // MAX_TRANSFER
        assert sum(entry.blocks for entry in reads) == BLOCKS


@pytest.mark.conformance(119)
@jumping
async def test_logical_unit_addresses_beyond_32_bits() -> None:
    fake = FakeUnit(capacity_16=Reply(Capacity(last_lba=1 << 40, block_length=512).encode_16()))
    unit, nexus = await _fake(fake)
    for lba, blocks, opcode in ((0xFFFFFFFE, 1, 0x28), (0xFFFFFFFF, 2, 0x88), (1 << 32, 1, 0x88), (1 << 40, 1, 0x88)):
        nexus.cdbs.clear()
        await _read(unit, lba, blocks)
        assert nexus.opcodes == [opcode]
        assert cdbs.decode(nexus.cdbs[0]).lba == lba


@jumping
async def test_logical_unit_a_limit_that_is_larger_than_ours_changes_nothing() -> None:
    unit, nexus = await _fake(FakeUnit(vpd_b0=Reply(BlockLimits(max_transfer=1 << 20).encode())))
    await _read(unit, 0, 4096)
    assert [cdbs.decode(cdb).blocks for cdb in nexus.cdbs] == [2048, 2048]


@jumping
async def test_logical_unit_pieces_run_side_by_side() -> None:
    unit, nexus = await _fake(FakeUnit(vpd_b0=Reply(BlockLimits(max_transfer=8).encode())))
    nexus.seconds = 1.0
    began = trio.current_time()
    await _read(unit, 0, 800)
    assert trio.current_time() - began == pytest.approx(1.0)
    assert len(nexus.cdbs) == 100


@pytest.mark.conformance(111)
async def test_logical_unit_a_bad_block_in_one_piece_is_one_plain_error() -> None:
    disk = _disk(bad_blocks={70, 500}, max_transfer_blocks=64)
    async with _open(config_of(disk)) as (_, _, unit):
        with pytest.raises(MediumError) as caught:
            await _read(unit, 0, 1000)
        assert caught.value.lba in (70, 500)
        assert "LUN 0 of" in str(caught.value)
        assert "at LBA" in str(caught.value)
        assert await _read(unit, 0, 70) == pattern(70 * 512)


async def test_logical_unit_a_write_protected_one() -> None:
    async with _open(config_of(_disk(write_protected=True))) as (_, _, unit):
        assert unit.description.write_protected
        with pytest.raises(DataProtectError):
            await unit.write(memoryview(bytes(4096 * 512)), lba=0)


@pytest.mark.parametrize(("dpofua", "fua", "bit"), [(True, True, 8), (True, False, 0), (False, True, 0)])
@jumping
async def test_logical_unit_force_unit_access_where_it_is_honoured(dpofua: bool, fua: bool, bit: int) -> None:
    unit, nexus = await _fake(FakeUnit(mode6_08=Reply(mode(wce=True, dpofua=dpofua).encode_6())))
    await unit.write(memoryview(bytes(512)), lba=3, fua=fua)
    assert nexus.cdbs[0][1] & 0x08 == bit


@pytest.mark.conformance(69)
@pytest.mark.expect_log("512 of 1024 bytes")
@jumping
async def test_logical_unit_a_short_read_is_an_error() -> None:
    unit, _ = await _fake(FakeUnit(read=Reply(bytes(512))))
    with pytest.raises(TransferError):
        await _read(unit, 0, 2)


async def test_logical_unit_without_a_capacity_is_none() -> None:
    async with _open(config_of(_disk())) as (_, nexus, unit):
        with pytest.raises(ValueError, match="without a capacity"):
            LogicalUnit(nexus, replace(unit.description, capacity=None))


async def test_logical_unit_a_cancelled_read_leaves_its_memory_alone_afterwards() -> None:
    config = config_of(_disk(max_transfer_blocks=64), latency=0.1)
    async with _open(config) as (_, nexus, unit):
        memory = memoryview(bytearray(1024 * 512))
        with trio.move_on_after(0.02) as scope:
            await unit.read_into(memory, lba=0)
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert nexus.session.connection.idle
        memory[:] = bytes(len(memory))
        await _read(unit, 0, 1)
        assert not any(memory)


# --- read-only ---


async def test_logical_unit_read_only_nothing_that_changes_the_medium_ever_leaves() -> None:
    disk = _disk(stopped=False, becoming_ready=1)
    config = config_of(disk, login_attention=LoginAttention.POWER_ON)
    seen: set[int] = set()
    config.script.add(Rule(IN, match=lambda seen_: _note(seen, seen_), times=0, action=Late(0)))
    async with _open(config, read_only=True) as (target, _, unit):
        memory = memoryview(bytes(512))
        large = memoryview(bytes(8192 * 512))
        for data, lba, fua in ((memory, 0, False), (large, 0, False), (memory, 0, True), (memory, 1 << 33, False)):
            with pytest.raises(ReadOnlyError):
                await unit.write(data, lba=lba, fua=fua)
        await unit.flush()  # nothing was written, so there is nothing to flush
        disk.stopped = True
        with pytest.raises(CommandError):
            await _read(unit, 0, 1)
        disk.stopped = False
        disk.resize(BLOCKS + 1)
        await _read(unit, 0, 1)
        assert unit.block_count == BLOCKS + 1
        harmless = {"INQUIRY", "REPORT LUNS", "TEST UNIT READY", "READ(10)", "READ CAPACITY(16)", "MODE SENSE(6)"}
        assert {entry.name for entry in target.ledger} <= harmless
    assert disk.contents(blocks=BLOCKS) == pattern(BLOCKS * 512)
    assert seen <= {0x00, 0x12, 0x1A, 0x28, 0x9E, 0xA0}


def _note(seen: set[int], one: Any) -> bool:
    if one.pdu.OPCODE == Opcode.SCSI_COMMAND:
        seen.add(one.pdu.cdb[0])
    return False


async def test_logical_unit_latency_is_that_of_the_quickest_command() -> None:
    config = config_of(_disk(bad_blocks={7}))
    slow = Rule(IN, match=has_cdb(0x28, 0x88), action=Delay(0.2), times=2)
    config.script.add(slow)
    async with _open(config) as (_, nexus, unit):
        nexus.session.latency = math.inf
        assert unit.latency == 0
        with pytest.raises(MediumError):
            await unit.read_into(memoryview(bytearray(512)), lba=7)
        assert unit.latency == 0  # an error may have taken no trouble
        await unit.read_into(memoryview(bytearray(512)), lba=0)
        assert unit.latency > 0.15
        await unit.read_into(memoryview(bytearray(512)), lba=1)
        assert 0 < unit.latency < 0.15


# --- flush ---


@pytest.mark.conformance(127)
@pytest.mark.expect_log(RECOVERY)
async def test_logical_unit_flush_makes_writes_stable() -> None:
    disk = _disk(volatile_cache=True)
    async with _open(config_of(disk)) as (target, _, unit):
        await unit.write(memoryview(b"x" * 512), lba=0)
        await unit.flush()
        await unit.write(memoryview(b"y" * 512), lba=1)
        target.power_cut()
        assert disk.contents(blocks=2) == b"x" * 512 + pattern(1024)[512:]
        assert len(target.engine().executed("SYNCHRONIZE CACHE(10)", "SYNCHRONIZE CACHE(16)")) == 1


@pytest.mark.conformance(127)
async def test_logical_unit_flush_without_a_cache_sends_nothing() -> None:
    async with _open(config_of(_disk(volatile_cache=False))) as (target, _, unit):
        await unit.write(memoryview(b"x" * 512), lba=0)
        await unit.flush()
        assert not [entry for entry in target.ledger if entry.name.startswith("SYNCHRONIZE")]


@pytest.mark.conformance(127)
async def test_logical_unit_flush_that_fails_fails() -> None:
    config = config_of(_disk())
    broken = Reply.check(K.MEDIUM_ERROR, 0x0C)
    config.script.add(Rule(IN, match=has_cdb(0x35, 0x91), action=Answer(broken.status, broken.sense)))
    async with _open(config) as (_, _, unit):
        with pytest.raises(MediumError):
            await unit.flush()
        await unit.flush()


@pytest.mark.parametrize("caching", [True, False])
@jumping
async def test_logical_unit_without_synchronize_cache(caching: bool) -> None:
    """One that tells of a cache and can't flush it fails; one that tells of none is taken for write-through."""
    answers: dict[str, Any] = {"sync": illegal(0x20)}
    if not caching:
        answers["mode6_08"] = illegal()
    fake = FakeUnit(**answers)
    unit, _ = await _fake(fake)
    if caching:
        for _ in range(2):
            with pytest.raises(CommandError):
                await unit.flush()
        assert fake.asked == ["sync", "sync"]
    else:
        await unit.flush()
        await unit.flush()
        assert fake.asked == ["sync"]


@pytest.mark.conformance(113)
@pytest.mark.expect_log("failed a write after it had accepted it")
@pytest.mark.parametrize("wce", [True, False])
@jumping
async def test_logical_unit_a_deferred_error_fails_the_next_flush_once(wce: bool) -> None:
    deferred = Reply.check(K.MEDIUM_ERROR, 0x0C, code=0x71)
    fake = FakeUnit(mode6_08=Reply(mode(wce=wce).encode_6()), read=[deferred, Reply(bytes(512))])
    unit, _ = await _fake(fake)
    await _read(unit, 0, 1)
    with pytest.raises(WriteBackError, match=r"LUN 0 of iqn\.x:target"):
        await unit.flush()
    await unit.flush()
    fake.change(sync=[deferred, illegal(0x24), Reply()], read=[deferred, Reply(bytes(512))])
    if wce:
        with pytest.raises(CommandError):
            await unit.flush()
        with pytest.raises(WriteBackError):  # it isn't forgotten because the flush failed, too
            await unit.flush()
    await _read(unit, 0, 1)


@pytest.mark.conformance(113)
@pytest.mark.expect_log("failed a write after it had accepted it")
@jumping
async def test_logical_unit_a_deferred_error_is_told_at_once_to_who_wants_to_know() -> None:
    deferred = Reply.check(K.MEDIUM_ERROR, 0x0C, code=0x71)
    unit, _ = await _fake(FakeUnit(mode6_08=Reply(mode(wce=True).encode_6()), read=[deferred, Reply(bytes(512))]))
    told: list[WriteBackError] = []
    unit.on_deferred = told.append
    await _read(unit, 0, 1)
    assert [str(error) for error in told] == [
        "LUN 0 of iqn.x:target: the target failed a write after it had accepted it"
    ]
    await unit.flush()  # has nothing to add


@pytest.mark.conformance(103)
@pytest.mark.expect_log(RECOVERY)
async def test_logical_unit_a_loss_during_flush() -> None:
    disk = _disk()
    config = config_of(disk)
    config.script.add(Rule(IN, match=has_cdb(0x35, 0x91), action=Close()))
    async with _open(config) as (target, nexus, unit):
        await unit.write(memoryview(b"x" * 512), lba=0)
        await unit.flush()
        assert nexus.reconnects == 1
        target.power_cut()
        assert disk.contents(blocks=1) == b"x" * 512
        assert len(target.engine().executed("SYNCHRONIZE CACHE(10)", "SYNCHRONIZE CACHE(16)")) == 1


# --- who is it, after a reconnect ---


def _other_serial(target: LoopbackTarget) -> None:
    target.disk().serial = "ANOTHER DISK"


def _smaller(target: LoopbackTarget) -> None:
    target.disk().blocks = BLOCKS // 2


def _larger(target: LoopbackTarget) -> None:
    target.disk().blocks = BLOCKS + 1


def _other_blocks(target: LoopbackTarget) -> None:
    target.disk().block_length = 4096
    target.disk().blocks = BLOCKS // 8


@pytest.mark.conformance(100)
@pytest.mark.expect_log(f"{RECOVERY}|another disk answers|came back with")
@pytest.mark.parametrize("swap", [_other_serial, _smaller, _larger, _other_blocks])
async def test_logical_unit_another_disk_gets_no_command(swap: Callable[[LoopbackTarget], None]) -> None:
    disk = _disk()
    config = config_of(disk)
    dropped: list[str] = []
    async with _open(config) as (target, nexus, unit):
        unit.on_change = lambda: dropped.append("cache")
        config.script.add(Rule(IN, match=all_of(WRITE, COMMAND), action=Late(60)))
        config.script.add(Rule(OUT, match=is_a(Opcode.LOGIN_RESPONSE), times=0, action=Delay(0.05)))

        async def cut() -> None:
            await until(lambda: nexus.session.connection.tasks)
            swap(target)
            target.drop_connections()

        # One is under way, others come while the session is lost, and some afterwards.
        async def while_lost() -> None:
            await until(lambda: nexus.state is NexusState.LOST)
            await unit.write(memoryview(b"!" * 512), lba=9)

        results = await at_once(lambda: unit.write(memoryview(b"!" * 512), lba=3), while_lost, cut)
        assert isinstance(results[0], IdentityError)
        assert isinstance(results[1], IdentityError)
        assert nexus.reconnects == 1
        for attempt in (lambda: _read(unit, 0, 1), lambda: unit.write(memoryview(bytes(512)), lba=0), unit.flush):
            with pytest.raises(IdentityError, match="LUN 0"):
                await attempt()
        assert dropped
        # It stays so, even if the right one comes back.
        disk.serial, disk.blocks, disk.block_length = "LOOPBACK00000000", BLOCKS, 512
        target.drop_connections()
        await until(lambda: nexus.reconnects == 2)
        with pytest.raises(IdentityError):
            await _read(unit, 0, 1)
        assert target.engine().executed("WRITE(10)", "WRITE(16)") == []
        assert disk.contents() == pattern(BLOCKS * 512)


@pytest.mark.conformance(100)
@pytest.mark.expect_log(f"{RECOVERY}|another disk answers")
@pytest.mark.parametrize("swapped", [False, True])
async def test_logical_unit_a_disk_that_is_swapped_between_the_scan_and_its_use(swapped: bool) -> None:
    """The session is lost when nobody guards a described disk yet → it is proved before its first command."""
    disk = _disk()
    async with (
        serving(config_of(disk)) as target,
        open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings_of()) as nexus,
    ):
        (description,) = await scan(nexus)
        if swapped:
            disk.serial = "ANOTHER"
        target.drop_connections()
        await until(lambda: nexus.reconnects == 1)
        unit = LogicalUnit(nexus, description)
        if swapped:
            with pytest.raises(IdentityError):
                await unit.write(memoryview(bytes(512)), lba=0)
            assert target.engine().executed("WRITE(10)") == []
        else:
            await unit.write(memoryview(bytes(512)), lba=0)
            assert disk.contents(blocks=1) == bytes(512)


@pytest.mark.conformance(100)
@pytest.mark.expect_log(f"{RECOVERY}")
async def test_logical_unit_the_same_disk_goes_on() -> None:
    config = config_of(_disk(), login_attention=LoginAttention.STANDARD)
    async with _open(config) as (target, nexus, unit):
        for number in range(1, 4):
            target.drop_connections()
            assert await _read(unit, 0, 4096) == pattern(4096 * 512)
            assert nexus.reconnects == number


@pytest.mark.conformance(100)
@pytest.mark.expect_log(f"{RECOVERY}|can't be examined any more|is there again")
async def test_logical_unit_one_that_cannot_be_examined_comes_back_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "ASK_AGAIN_AFTER", 0.05)
    disk = _disk()
    async with _open(config_of(disk), reconnect_timeout=0.3) as (target, nexus, unit):
        disk.medium_present = False
        target.drop_connections()
        await until(lambda: nexus.reconnects == 1)
        with pytest.raises(SessionLostError, match="can't be examined any more"):
            await _read(unit, 0, 1)
        with pytest.raises(SessionLostError):
            await unit.flush()
        disk.medium_present = True
        await trio.sleep(0.2)
        assert await _read(unit, 0, 1) == pattern(512)


def _loses_its_names(unit: FakeUnit) -> None:
    unit.change(vpd_00=illegal(0x24), vpd_80=illegal(0x24), vpd_83=illegal(0x24))


def _fails(unit: FakeUnit) -> None:
    unit.change(vpd_80=Reply.check(K.ABORTED_COMMAND, 0x47, 0x05))


def _is_damaged(unit: FakeUnit) -> None:
    unit.change(vpd_83=DigestError("damaged", header=False))


def _has_no_capacity(unit: FakeUnit) -> None:
    unit.change(capacity_16=illegal(), capacity_10=illegal())


def _other_designator(unit: FakeUnit) -> None:
    unit.change(vpd_83=Reply(DeviceIdentification((designator(2),)).encode()))


def _other_number(unit: FakeUnit) -> None:
    unit.change(vpd_80=Reply(UnitSerialNumber("OTHER").encode()))


def _nothing(unit: FakeUnit) -> None:
    unit.change(ready=[Reply.check(K.UNIT_ATTENTION, 0x29), Reply.check(K.UNIT_ATTENTION, 0x2A, 9), Reply()])


def _other_port(unit: FakeUnit) -> None:
    port = designator(77, association=Association.TARGET_PORT)
    unit.change(vpd_83=Reply(DeviceIdentification((port, designator())).encode()))


PROOFS: list[tuple[Callable[[FakeUnit], None], bool, type[Exception] | None]] = [
    (_nothing, True, None),
    (_other_port, True, None),  # of another portal
    (_loses_its_names, False, SessionLostError),
    (_fails, False, SessionLostError),
    (_is_damaged, False, SessionLostError),
    (_has_no_capacity, False, SessionLostError),
    (_other_designator, True, IdentityError),
    (_other_number, True, IdentityError),
]


@pytest.mark.conformance(100)
@pytest.mark.expect_log("examined any more|who it is|another disk answers|damaged|is there again")
@pytest.mark.parametrize(("change", "settled", "error"), PROOFS)
@jumping
async def test_logical_unit_proof(
    change: Callable[[FakeUnit], None], settled: bool, error: type[Exception] | None
) -> None:
    fake = FakeUnit()
    unit, nexus = await _fake(fake)
    before = dict(fake.answers)
    change(fake)
    (guard,) = nexus.guards
    assert await guard(nexus) is settled
    barred = nexus.barred.get(unit.description.address)
    assert type(barred) is (error or type(None))
    # What can't be told may be told later; another disk stays another disk.
    fake.answers = before
    assert await guard(nexus) is True
    assert bool(nexus.barred) == (error is IdentityError)


@pytest.mark.conformance(100)
@pytest.mark.expect_log("who it is|another disk answers|is there again")
@jumping
async def test_logical_unit_what_could_not_be_read_at_first_is_no_sign_of_another_disk() -> None:
    """VPD 80h fails at the scan, works later → the same disk; from then on its serial number counts."""
    fake = FakeUnit(vpd_80=Reply.check(K.HARDWARE_ERROR, 0x44))
    unit, nexus = await _fake(fake)
    assert unit.description.serial is None
    (guard,) = nexus.guards
    assert await guard(nexus) is True  # still nothing
    fake.change(vpd_80=Reply(UnitSerialNumber("LATE").encode()))
    assert await guard(nexus) is True
    assert not nexus.barred
    fake.change(vpd_80=Reply.check(K.HARDWARE_ERROR, 0x44))
    assert await guard(nexus) is False  # it was known by now
    fake.change(vpd_80=Reply(UnitSerialNumber("LATE").encode()))
    assert await guard(nexus) is True
    fake.change(vpd_80=Reply(UnitSerialNumber("OTHER").encode()))
    assert await guard(nexus) is True
    assert type(nexus.barred[unit.description.address]) is IdentityError


@pytest.mark.conformance(100)
@pytest.mark.expect_log("could not tell who it is|another disk answers")
@pytest.mark.parametrize(
    ("at_first", "later"),
    [
        ({"vpd_80": illegal(0x24)}, {"vpd_80": Reply(UnitSerialNumber("NEW").encode())}),  # it had none
        (
            {"vpd_80": Reply.check(K.HARDWARE_ERROR, 0x44)},
            {"vpd_83": Reply(DeviceIdentification((designator(2),)).encode())},
        ),
        ({"vpd_83": Reply.check(K.HARDWARE_ERROR, 0x44)}, {"vpd_80": Reply(UnitSerialNumber("NEW").encode())}),
        ({"vpd_83": Reply(b"\0\x83\0\4abcd")}, {"vpd_83": Reply(DeviceIdentification((designator(2),)).encode())}),
    ],
)
@jumping
async def test_logical_unit_what_was_read_at_first_is_compared(
    at_first: dict[str, Reply], later: dict[str, Reply]
) -> None:
    fake = FakeUnit(**at_first)
    unit, nexus = await _fake(fake)
    assert await nexus.guards[0](nexus) is True
    assert not nexus.barred
    fake.change(**later)
    assert await nexus.guards[0](nexus) is True
    assert type(nexus.barred[unit.description.address]) is IdentityError


@jumping
async def test_logical_unit_proof_on_a_session_that_dies() -> None:
    fake = FakeUnit()
    _, nexus = await _fake(fake)
    fake.change(ready=SessionLostError("gone"))
    with pytest.raises(SessionLostError):
        await nexus.guards[0](nexus)
    assert "is being examined" in str(next(iter(nexus.barred.values())))  # for those on the next session to lift
    fake.change(ready=Reply())
    assert await nexus.guards[0](nexus)
    assert not nexus.barred


@pytest.mark.conformance(100)
@pytest.mark.expect_log(f"{RECOVERY}|longer than|is there again|can't be examined")
async def test_logical_unit_one_that_hangs_after_a_login_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it get a command before it has said who it is."""
    monkeypatch.setattr(guards, "MOST_WAIT", 0.3)
    disks = [_disk(), _disk(serial="SECOND", lun=1)]
    config = config_of(*disks)
    async with serving(config) as target:
        with trio.fail_after(20):
            async with open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings_of(timeout=2)) as nexus:
                first, second = [LogicalUnit(nexus, description) for description in await scan(nexus)]
                config.script.add(Rule(IN, match=all_of(has_cdb(0x00), has_lun(0)), action=Late(1.5)))
                target.drop_connections()
                began = trio.current_time()
                assert await _read(second, 0, 1) == pattern(512)
                assert trio.current_time() - began < 1.2
                assert [error for error, _ in nexus._bars.barred.values()]
                await first.write(memoryview(b"!" * 512), lba=0)
                assert trio.current_time() - began > 1.2
                assert disks[0].contents(blocks=1) == b"!" * 512
                assert nexus.reconnects == 1


# --- changes while it is mounted ---


@pytest.mark.conformance(107)
@pytest.mark.conformance(130)
@pytest.mark.parametrize("blocks", [BLOCKS * 2, BLOCKS // 2])
async def test_logical_unit_a_new_capacity(blocks: int) -> None:
    disk = _disk()
    async with _open(config_of(disk)) as (_, _, unit):
        changes: list[int] = []
        unit.on_change = lambda: changes.append(unit.block_count)
        disk.resize(blocks)
        assert await _read(unit, 0, 1) == pattern(512)
        assert unit.block_count == blocks
        assert changes == [blocks]
        if blocks < BLOCKS:
            with pytest.raises(CommandError):
                await _read(unit, BLOCKS - 1, 1)
        else:
            await _read(unit, blocks - 1, 1)


@pytest.mark.conformance(107)
@jumping
async def test_logical_unit_a_capacity_that_changes_while_it_is_read_is_read_again() -> None:
    resized = Reply.check(K.UNIT_ATTENTION, 0x2A, 0x09)
    fake = FakeUnit()
    unit, nexus = await _fake(fake)
    fake.change(
        read=[resized, resized, Reply(bytes(512))],
        capacity_16=[Reply(Capacity(last_lba=n, block_length=512).encode_16()) for n in (199, 299)],
    )
    nexus.seconds = 1.0

    async def later() -> None:
        await trio.sleep(0.5)
        await _read(unit, 0, 1)

    # The second one hears of the second change while the first one's number is on its way.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_read, unit, 0, 1)
        nursery.start_soon(later)
    assert unit.block_count == 300


@pytest.mark.conformance(100)
@pytest.mark.expect_log("changed its block length from 512 to 4096")
@jumping
async def test_logical_unit_a_new_block_length_is_another_disk() -> None:
    fake = FakeUnit()
    unit, nexus = await _fake(fake)
    changes: list[int] = []
    unit.on_change = lambda: changes.append(1)
    fake.change(
        read=[Reply.check(K.UNIT_ATTENTION, 0x2A, 0x09), Reply(bytes(512))],
        capacity_16=Reply(Capacity(last_lba=99, block_length=4096).encode_16()),
    )
    await _read(unit, 0, 1)  # the fake lets it through; a nexus wouldn't
    assert isinstance(nexus.barred[unit.description.address], IdentityError)
    assert changes == [1]


@pytest.mark.expect_log("its new capacity can't be read|READ CAPACITY.*: x")
@pytest.mark.parametrize("trouble", [illegal(), Reply(bytes(5)), TransferError("x"), DigestError("x", header=False)])
@jumping
async def test_logical_unit_a_capacity_that_cannot_be_read_keeps_the_old_one(trouble: Reply) -> None:
    fake = FakeUnit()
    unit, _ = await _fake(fake)
    fake.change(
        read=[Reply.check(K.UNIT_ATTENTION, 0x2A, 0x09), Reply(bytes(512))], capacity_16=trouble, capacity_10=trouble
    )
    await _read(unit, 0, 1)
    assert unit.block_count == 100


@pytest.mark.conformance(107)
@pytest.mark.expect_log("another disk answers")
async def test_logical_unit_another_one_under_the_same_number() -> None:
    """The target says that its list of units changed: who is it that answers now?"""
    disk, other = _disk(), _disk(serial="OTHER")
    async with _open(config_of(disk)) as (target, _, unit):
        target.engine().replace(other)
        with pytest.raises(IdentityError):
            await unit.write(memoryview(b"!" * 512), lba=0)
        assert other.contents() == pattern(BLOCKS * 512)


@pytest.mark.conformance(107)
@pytest.mark.expect_log("another disk answers")
@pytest.mark.parametrize(
    "told",
    [
        [(0x28, 0x00)],
        [(0x3F, 0x03)],
        [(0x3F, 0x05)],
        [(0x2A, 0x09), (0x3F, 0x0E)],  # the new capacity isn't that of the disk that was mounted
        [(0x3F, 0x0E), (0x2A, 0x09)],
    ],
)
async def test_logical_unit_another_one_is_told_in_many_ways(told: list[tuple[int, int]]) -> None:
    disk, other = _disk(), _disk(serial="OTHER")
    other.resize(BLOCKS * 2)
    before = other.contents()
    other.attentions.clear()
    async with _open(config_of(disk)) as (target, _, unit):
        await _read(unit, 0, 1)
        target.engine().disks[0] = other
        disk.attentions.clear()
        other.attentions.extend([*disk.attentions, *told])
        with pytest.raises(IdentityError):
            await unit.write(memoryview(b"!" * 512), lba=0)
        assert other.contents() == before


@pytest.mark.conformance(107)
@pytest.mark.expect_log("another disk answers where LUN 1")
@pytest.mark.parametrize("used", [True, False])
async def test_logical_unit_news_of_the_list_are_for_all_units(used: bool) -> None:
    """The target tells one of them only, in use or not: the others are held back before anything else is sent."""
    disks = [_disk(), _disk(serial="SECOND", lun=1)]
    async with serving(config_of(*disks)) as target:
        with trio.fail_after(20):
            async with open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings_of()) as nexus:
                found = await scan(nexus)
                second = LogicalUnit(nexus, found[1])
                other = _disk(serial="OTHER", lun=1)
                target.engine().disks[1] = other
                disks[0].attentions.append((0x3F, 0x0E))
                if used:
                    assert await _read(LogicalUnit(nexus, found[0]), 0, 1) == pattern(512)
                else:
                    await nexus.execute(cdbs.test_unit_ready(), lun=found[0].address)
                with pytest.raises(IdentityError):
                    await second.write(memoryview(b"!" * 512), lba=0)
                assert other.contents() == pattern(BLOCKS * 512)


@pytest.mark.conformance(107)
@jumping
async def test_logical_unit_is_held_back_when_the_news_arrive() -> None:
    """Not when those go on who wait for the command that told: others may send before them."""
    unit, nexus = await _fake(FakeUnit())
    task = Task(b"", lun=unit.description.address)
    for change in (Reply.check(K.UNIT_ATTENTION, 0x3F, 0x0E), Reply.check(K.UNIT_ATTENTION, 0x28), illegal(0x25)):
        task.status, task.sense = 2, change.sense
        nexus.watchers[task.lun](task)
        assert list(nexus.barred) == [task.lun]
        await trio.sleep(1)
        assert not nexus.barred


@pytest.mark.conformance(100)
@pytest.mark.expect_log(RECOVERY)
async def test_logical_unit_a_capacity_that_was_announced_may_come_back() -> None:
    """The session is lost before it is read: that is no other disk."""
    disk = _disk()
    config = config_of(disk, login_attention=LoginAttention.NONE)
    async with _open(config) as (_, nexus, unit):
        config.script.add(Rule(IN, match=has_cdb(0x25, 0x9E), action=Close()))
        disk.resize(BLOCKS * 2)
        assert await _read(unit, 0, 1) == pattern(512)
        assert nexus.reconnects == 1
        assert unit.block_count == BLOCKS * 2
        await _read(unit, BLOCKS * 2 - 1, 1)


@pytest.mark.expect_log("taken for write-through")
@pytest.mark.parametrize("knows", [True, False])
@jumping
async def test_logical_unit_other_mode_parameters_may_mean_a_cache(knows: bool) -> None:
    """A cache that was switched on while it was mounted is flushed from then on."""
    fake = FakeUnit(mode6_08=Reply(mode(wce=False).encode_6()))
    unit, _ = await _fake(fake)
    await unit.flush()
    assert fake.asked == []
    changed = Reply.check(K.UNIT_ATTENTION, 0x2A, 0x01)
    fake.change(read=[changed, Reply(bytes(512))], sync=Reply() if knows else illegal())
    await _read(unit, 0, 1)
    assert unit.volatile
    await unit.flush()
    assert fake.asked.count("sync") == 1
    assert unit.volatile == knows


@pytest.mark.conformance(100)
@pytest.mark.expect_log("another disk answers")
@pytest.mark.parametrize("news", [True, False])
@jumping
async def test_logical_unit_an_examination_that_takes_long_lifts_no_other_s_bar(news: bool) -> None:
    """The guard of a login goes on while the session is used; the disk is swapped behind its back."""
    fake = FakeUnit()
    unit, nexus = await _fake(fake)
    address = unit.description.address
    task = Task(b"", lun=address)
    task.status, task.sense = 2, Reply.check(K.UNIT_ATTENTION, 0x3F, 0x0E).sense
    nexus.seconds = 1.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(nexus.guards[0], nexus)
        await trio.sleep(4.5)  # it knows who it is, and asks how large it is
        assert nexus.barred
        fake.change(vpd_80=Reply(UnitSerialNumber("ANOTHER").encode()))
        if news:
            nexus.watchers[address](task)
        else:
            nursery.start_soon(nexus.guards[0], nexus)  # of another session
    assert isinstance(nexus.barred[address], IdentityError)


@pytest.mark.conformance(100)
async def test_logical_unit_news_between_the_scan_and_its_use_have_it_examined() -> None:
    disk = _disk()
    async with serving(config_of(disk, _disk(serial="SECOND", lun=1))) as target:
        with trio.fail_after(20):
            async with open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings_of()) as nexus:
                found = await scan(nexus)
                disk.attentions.append((0x3F, 0x0E))
                await nexus.execute(cdbs.test_unit_ready(), lun=found[0].address)
                asked = len(target.ledger)
                assert await _read(LogicalUnit(nexus, found[1]), 0, 1) == pattern(512)
                assert "INQUIRY" in [entry.name for entry in target.ledger[asked:]]


@pytest.mark.conformance(107)
@pytest.mark.expect_log("changes all the time|is there again")
@jumping
async def test_logical_unit_one_that_changes_all_the_time_is_held_back() -> None:
    changed = Reply.check(K.UNIT_ATTENTION, 0x3F, 0x0E)
    fake = FakeUnit()
    unit, nexus = await _fake(fake)
    fake.change(read=[changed, Reply(bytes(512))])
    nexus.before = lambda cdb: nexus.doubt_all() if cdb[0] == cdbs.Opcode.INQUIRY else None
    await _read(unit, 0, 1)  # the fake lets it through; a nexus wouldn't
    assert isinstance(nexus.barred[unit.description.address], SessionLostError)
    nexus.before = lambda _: None
    assert await nexus.guards[0](nexus)
    assert not nexus.barred


@pytest.mark.conformance(107)
async def test_logical_unit_another_list_with_the_same_disk_in_it() -> None:
    disk = _disk()
    async with _open(config_of(disk)) as (target, _, unit):
        disk.attentions.append((0x3F, 0x0E))
        disk.resize(BLOCKS + 8)
        assert await _read(unit, 0, 1) == pattern(512)
        assert unit.block_count == BLOCKS + 8
        assert len([entry for entry in target.ledger if entry.name == "INQUIRY"]) > 4


@pytest.mark.conformance(107)
@jumping
async def test_logical_unit_news_that_come_while_it_is_examined_have_it_examined_again() -> None:
    """What the first proof has seen may be what was there before the second change."""
    changed = Reply.check(K.UNIT_ATTENTION, 0x3F, 0x0E)
    fake = FakeUnit()
    unit, nexus = await _fake(fake)
    fake.change(read=[changed, changed, Reply(bytes(512))])
    nexus.seconds = 0.2

    async def later() -> None:
        await trio.sleep(0.3)  # its answer comes when the unit has begun to say who it is
        await _read(unit, 0, 1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_read, unit, 0, 1)
        nursery.start_soon(later)
    assert fake.asked.count("ready") == 2
    assert not nexus.barred


@pytest.mark.conformance(107)
@jumping
async def test_logical_unit_a_proof_that_loses_its_session_holds_nothing_back() -> None:
    """The next session's guards come before any command, and may have come already."""
    fake = FakeUnit()
    unit, nexus = await _fake(fake)
    fake.change(read=[Reply.check(K.UNIT_ATTENTION, 0x3F, 0x0E), Reply(bytes(512))], ready=SessionLostError("gone"))
    await _read(unit, 0, 1)
    assert not nexus.barred


async def test_logical_unit_a_medium_that_may_have_changed_drops_what_is_cached() -> None:
    disk = _disk()
    async with _open(config_of(disk)) as (_, _, unit):
        changes: list[int] = []
        unit.on_change = lambda: changes.append(1)
        disk.attentions.append((0x28, 0x00))
        await _read(unit, 0, 1)
        assert changes == [1]


async def test_logical_unit_a_reset_is_no_change() -> None:
    disk = _disk()
    async with _open(config_of(disk)) as (target, _, unit):
        unit.on_change = lambda: pytest.fail("nothing changed")
        target.engine().reset(0)
        disk.attentions.append((0x29, 0x00))
        assert await _read(unit, 0, 1) == pattern(512)


# --- under fire ---


@pytest.mark.expect_log(f"{RECOVERY}|.* of LUN 0 .*")
async def test_logical_unit_reads_and_writes_under_fire_are_right() -> None:
    """Busy answers, unit attentions, aborted commands and dying connections, all at once; the data is right."""
    disk = _disk(max_transfer_blocks=128)
    config = config_of(disk, reorder=2, window=16, login_attention=LoginAttention.STANDARD)
    aborted = Reply.check(K.ABORTED_COMMAND, 0x47, 0x05)
    attention = Reply.check(K.UNIT_ATTENTION, 0x29, 0x07)
    for action, chance in (
        (Answer(Status.BUSY), 0.05),
        (Answer(aborted.status, aborted.sense), 0.05),
        (Answer(attention.status, attention.sense), 0.05),
        (Answer(Status.TASK_ABORTED), 0.02),
    ):
        config.script.add(Rule(IN, match=all_of(COMMAND, has_cdb(0x28, 0x2A)), times=0, chance=chance, action=action))
    config.script.add(Rule(OUT, match=has_cdb(0x28, 0x2A), times=0, nth=20, chance=0.01, action=Close(reset=True)))
    expected = bytearray(disk.contents())
    generator = random.Random(8)
    async with _open(config) as (_, nexus, unit):

        async def stripe(number: int) -> None:
            blocks = BLOCKS // 8
            for _ in range(6):
                lba = number * blocks + generator.randrange(blocks - 300)
                data = generator.randbytes(generator.randrange(1, 300) * 512)
                await unit.write(memoryview(data), lba=lba)
                expected[lba * 512 : lba * 512 + len(data)] = data
                assert await _read(unit, lba, len(data) // 512) == data

        results = await at_once(*[lambda number=number: stripe(number) for number in range(8)], within=20)
        assert results == [None] * 8
        assert await _read(unit, 0, BLOCKS) == expected
        assert disk.contents() == expected
        assert nexus.reconnects >= 1


def test_logical_unit_address_goes_back_verbatim() -> None:
    """Covered by the fakes, which answer by address; said here so that it isn't lost: flat addressing of LUN 5."""
    flat = bytes([0x40, 5]) + bytes(6)

    async def main() -> None:
        seen: set[bytes] = set()
        fake = FakeUnit(luns=Reply(luns.encode_report_luns([flat])))

        def answer(lun: bytes, cdb: bytes) -> Any:
            seen.add(lun)
            return fake(lun, cdb)

        nexus = FakeNexus(answer)
        (description,) = await scan(nexus.as_nexus())
        seen.clear()
        await _read(LogicalUnit(nexus.as_nexus(), description), 0, 1)
        assert seen == {flat}

    trio.run(main)
