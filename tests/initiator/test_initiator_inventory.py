from collections.abc import Sequence
from typing import Any

import pytest
from initiator_fakes import Answer, FakeNexus, FakeUnit, Reply, illegal, jumping, mode
from initiator_kit import DEFAULT_TARGET_NAME, config_of, portal_of, serving, settings_of

from iscsifuse.errors import (
    CommandError,
    CommandTimeoutError,
    DigestError,
    IscsifuseError,
    ParameterDataError,
    SessionLostError,
    TransferError,
)
from iscsifuse.initiator.commander import Commander
from iscsifuse.initiator.inventory import LunDescription, examine_capacity, scan
from iscsifuse.initiator.nexus import open_nexus
from iscsifuse.initiator.settings import SessionSettings
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.capacity import Capacity
from iscsifuse.scsi.inquiry import Inquiry
from iscsifuse.scsi.sense import SenseKey as K
from iscsifuse.scsi.vpd import BlockLimits, SupportedPages
from iscsifuse.testing.config import LoginAttention
from iscsifuse.testing.disk import DeviceType, Disk

BLOCKS = 100


async def _scan_one(unit: FakeUnit, *, limit: float = 5.0) -> LunDescription:
    settings = SessionSettings(initiator_name="iqn.x", timeout=limit)
    (found,) = await scan(FakeNexus(unit, settings=settings).as_nexus())
    return found


def _addresses(*numbers: int) -> Reply:
    return Reply(luns.encode_report_luns([luns.encode(number) for number in numbers]))


# --- against the loopback target ---


async def _scan(*disks: Disk, only: set[int] | None = None, **changes: Any) -> list[LunDescription]:
    config = config_of(*disks, login_attention=LoginAttention.POWER_ON)
    async with (
        serving(config) as target,
        open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings_of(**changes)) as nexus,
    ):
        return await scan(nexus, only=only)


async def test_inventory_of_a_loopback_target() -> None:
    disks = [
        Disk(blocks=BLOCKS, lun=0, device_type=DeviceType.CONTROLLER),
        Disk(blocks=BLOCKS, lun=1, vendor="ACME", product="ROCKET", serial="ABC123", write_protected=True),
        Disk(blocks=BLOCKS, lun=300, block_length=4096, volatile_cache=False, thin=True, max_transfer_blocks=8),
    ]
    controller, first, second = await _scan(*disks, read_only=True)
    assert [one.lun for one in (controller, first, second)] == [0, 1, 300]
    assert not controller.is_disk
    assert not controller.usable
    assert controller.type_words == "storage array controller"
    assert (controller.size, controller.block_length) == (0, 0)
    assert first.usable
    assert (first.inquiry.vendor, first.inquiry.product, first.serial) == ("ACME", "ROCKET", "ABC123")
    assert (first.size, first.block_length) == (BLOCKS * 512, 512)
    assert first.designators
    assert first.write_protected
    assert first.caching is not None
    assert first.caching.wce
    assert second.address == luns.encode(300)
    assert second.size == BLOCKS * 4096
    assert second.caching is not None
    assert not second.caching.wce
    assert second.block_limits is not None
    assert second.block_limits.max_transfer == 8
    assert second.provisioning is not None
    assert second.provisioning.lbpu
    assert second.characteristics is not None


@pytest.mark.parametrize(("only", "found"), [({1}, [1]), ({1, 7}, [1]), ({9}, []), (None, [0, 1, 2])])
async def test_inventory_of_some(only: set[int] | None, found: list[int]) -> None:
    disks = [Disk(blocks=8, lun=number) for number in range(3)]
    assert [one.lun for one in await _scan(*disks, only=only)] == found


async def test_inventory_of_very_many() -> None:
    """More units than are examined at once, and than fit the first REPORT LUNS."""
    count = 1100
    nexus = FakeNexus(
        lambda _, cdb: (
            Reply(luns.encode_report_luns([luns.encode(number) for number in range(count)]))
            if cdb[0] == 0xA0
            else Reply(Inquiry(device_type=0x0C).encode())
        )
    )
    found = await scan(nexus.as_nexus())
    assert [one.lun for one in found] == list(range(count))
    assert nexus.opcodes.count(0xA0) == 2


async def test_inventory_a_unit_that_is_not_ready_hides_no_other() -> None:
    disks = [
        Disk(blocks=8, lun=0, medium_present=False),
        Disk(blocks=8, lun=1),
        Disk(blocks=8, lun=2, stopped=True),
        Disk(blocks=8, lun=3, becoming_ready=1),
    ]
    found = await _scan(*disks, read_only=True)
    assert [one.lun for one in found] == [0, 1, 2, 3]
    assert [one.usable for one in found] == [False, True, False, True]
    assert "LUN 0" in str(found[0].problem)
    assert found[2].problem is not None
    assert disks[2].stopped  # a read-only session starts nothing


@pytest.mark.conformance(108)
async def test_inventory_starts_a_stopped_unit_where_it_may() -> None:
    disk = Disk(blocks=8, stopped=True)
    (found,) = await _scan(disk, read_only=False)
    assert found.usable
    assert not disk.stopped


# --- what is listed ---


@pytest.mark.conformance(122)
@pytest.mark.parametrize("qualifier", [1, 2, 3])
@jumping
async def test_inventory_leaves_out_what_is_not_there(qualifier: int) -> None:
    unit = FakeUnit(inquiry=Reply(Inquiry(peripheral_qualifier=qualifier).encode()))
    assert await scan(FakeNexus(unit).as_nexus()) == []


@pytest.mark.conformance(122)
@pytest.mark.parametrize("device_type", [0x01, 0x05, 0x07, 0x0C, 0x0D, 0x0E, 0x1F])
@jumping
async def test_inventory_shows_what_is_no_disk_but_asks_it_nothing(device_type: int) -> None:
    unit = FakeUnit(inquiry=Reply(Inquiry(device_type=device_type).encode()))
    found = await _scan_one(unit)
    assert not found.is_disk
    assert not found.usable
    assert unit.asked == ["luns", "inquiry"]


@pytest.mark.conformance(122)
@jumping
async def test_inventory_of_five_bytes_of_inquiry() -> None:
    """Something that says no more than that it is a disk isn't used, and isn't asked for more."""
    for data in (bytes([0, 0, 5, 2, 0]), Inquiry().encode()[:35]):
        unit = FakeUnit(inquiry=Reply(data))
        found = await _scan_one(unit)
        assert found.is_disk
        assert not found.usable
        assert found.problem == f"its INQUIRY data ends after {len(data)} bytes: it doesn't say what it is"
        assert unit.asked == ["luns", "inquiry"]
    found = await _scan_one(FakeUnit(inquiry=Reply(bytes([1, 0, 5, 2, 0]))))
    assert not found.usable
    assert (await _scan_one(FakeUnit(inquiry=Reply(Inquiry().encode()[:36])))).usable


@pytest.mark.conformance(122)
@pytest.mark.expect_log("INQUIRY")
@pytest.mark.parametrize(
    "answer",
    [Reply(b""), Reply(b"\0\0\5\2"), illegal(), Reply(status=0xFE), CommandTimeoutError("INQUIRY took too long")],
)
@jumping
async def test_inventory_a_unit_without_inquiry_is_told_of_and_left_out(answer: Answer) -> None:
    assert await scan(FakeNexus(FakeUnit(inquiry=answer)).as_nexus()) == []


WELL_KNOWN = bytes([0xC1, 1]) + bytes(6)
FLAT_5 = bytes([0x40, 5]) + bytes(6)
EXTENDED = bytes([0xD2, 0, 1, 0]) + bytes(4)

LISTS: list[tuple[str, Sequence[bytes], list[int]]] = [
    ("empty", [], [0]),
    ("without LUN 0", [luns.encode(3), luns.encode(7)], [3, 7]),
    ("in disorder", [luns.encode(7), luns.encode(0), luns.encode(3)], [0, 3, 7]),
    ("duplicates", [luns.encode(1)] * 5, [1]),
    ("flat below 256", [FLAT_5], [5]),
    ("the same by two methods", [luns.encode(5), FLAT_5], [5]),
    ("256 and up", [luns.encode(256), luns.encode(16383)], [256, 16383]),
    ("extended", [EXTENDED, luns.encode(1)], [1, 256]),
    ("well-known", [WELL_KNOWN, luns.encode(1)], [1]),
    ("only well-known", [WELL_KNOWN], []),
    ("two levels", [bytes([0, 1, 0, 2, 0, 0, 0, 0]), luns.encode(1)], [1]),
    ("not specified", [b"\xff" * 8, luns.encode(1)], [1]),
]


@pytest.mark.conformance(123)
@pytest.mark.conformance(124)
@pytest.mark.parametrize(("listed", "numbers"), [row[1:] for row in LISTS], ids=[row[0] for row in LISTS])
@jumping
async def test_inventory_of_odd_lists(listed: Sequence[bytes], numbers: list[int]) -> None:
    seen: dict[str, bytes] = {}
    unit = FakeUnit(luns=Reply(luns.encode_report_luns(listed)), inquiry=Reply(Inquiry(device_type=0x0C).encode()))

    def answer(lun: bytes, cdb: bytes) -> Answer:
        if cdb[0] == 0x12:
            seen[lun.hex()] = lun
        return unit(lun, cdb)

    found = await scan(FakeNexus(answer).as_nexus())
    assert [one.lun for one in found] == numbers
    assert set(seen.values()) == {one.address for one in found}
    for one in found:  # verbatim, the first of several that mean the same
        same = [address for address in listed if luns.decode(address).number == one.lun]
        assert one.address == (same or [luns.encode(0)])[0]


@pytest.mark.conformance(123)
@pytest.mark.expect_log("looking at LUN 0 only|REPORT LUNS")
@pytest.mark.parametrize(
    "answer",
    [illegal(), Reply(b""), Reply(b"\0\0\0"), Reply(status=0x18), TransferError("REPORT LUNS was cut short")],
)
@jumping
async def test_inventory_without_a_list_there_is_lun_0(answer: Answer) -> None:
    found = await _scan_one(FakeUnit(luns=answer))
    assert found.lun == 0
    assert found.usable


@pytest.mark.conformance(123)
@jumping
async def test_inventory_of_a_list_that_grows() -> None:
    long = luns.encode_report_luns([luns.encode(number) for number in range(2000)])
    for answers, expected in (
        ([Reply(long[:8192]), Reply(long)], 2000),
        ([Reply(long[:8192])], 1023),  # it never gives more than that
    ):
        unit = FakeUnit(luns=answers, inquiry=Reply(Inquiry(device_type=0x0C).encode()))
        assert len(await scan(FakeNexus(unit).as_nexus())) == expected
        assert unit.asked.count("luns") <= 3


@pytest.mark.conformance("B7")
@pytest.mark.parametrize("length", [0xFFFFFFF8, 0x7FFFFFF8, 0xFFFFFFFF, 9])
@jumping
async def test_inventory_of_a_list_that_claims_to_be_endless(length: int) -> None:
    lie = length.to_bytes(4, "big") + bytes(4) + luns.encode(0)
    found = await _scan_one(FakeUnit(luns=Reply(lie)))
    assert found.lun == 0


# --- capacity ---


def _c10(last: int, length: int = 512) -> Reply:
    return Reply(Capacity(last_lba=last, block_length=length).encode_10())


def _c16(last: int, length: int = 512) -> Reply:
    return Reply(Capacity(last_lba=last, block_length=length).encode_16())


HUGE = 1 << 33

CAPACITIES: list[tuple[str, int, Answer, Answer, int | type[IscsifuseError], list[str]]] = [
    ("new", 6, _c10(9), _c16(99), 99, ["16"]),
    ("new, huge", 6, _c10(HUGE), _c16(HUGE), HUGE, ["16"]),
    ("new, 16 refused", 6, _c10(99), illegal(), 99, ["16", "10"]),
    ("new, 16 short", 6, _c10(99), Reply(bytes(11)), 99, ["16", "10"]),
    ("new, 16 empty", 6, _c10(99), Reply(), 99, ["16", "10"]),
    ("new, 16 absurd", 6, _c10(99), _c16(99, 3), 99, ["16", "10"]),
    ("new, 16 refused, huge", 6, _c10(HUGE), illegal(), CommandError, ["16", "10", "16"]),
    ("new, both refused", 6, illegal(), illegal(), CommandError, ["16", "10"]),
    ("new, both short", 6, Reply(bytes(7)), Reply(bytes(7)), ParameterDataError, ["16", "10"]),
    ("old", 4, _c10(99), _c16(9), 99, ["10"]),
    ("old, huge", 2, _c10(HUGE), _c16(HUGE), HUGE, ["10", "16"]),
    ("old, 10 refused", 4, illegal(), _c16(99), 99, ["10", "16"]),
    ("old, 10 short", 0, Reply(bytes(7)), _c16(99), 99, ["10", "16"]),
    ("old, both refused", 4, illegal(), illegal(), CommandError, ["10", "16"]),
    ("12 bytes of 16", 6, _c10(9), Reply(Capacity(last_lba=99, block_length=512).encode_16()[:12]), 99, ["16"]),
    ("more than a file holds", 6, illegal(), _c16((1 << 60), 4096), IscsifuseError, ["16", "10"]),
]


@pytest.mark.conformance(118)
@pytest.mark.conformance("B7")
@pytest.mark.parametrize(
    ("version", "ten", "sixteen", "last", "asked"),
    [row[1:] for row in CAPACITIES],
    ids=[row[0] for row in CAPACITIES],
)
@jumping
async def test_inventory_capacity(
    version: int, ten: Answer, sixteen: Answer, last: int | type[IscsifuseError], asked: list[str]
) -> None:
    unit = FakeUnit(capacity_10=ten, capacity_16=sixteen)
    commander = Commander(FakeNexus(unit), address=luns.encode(0), label="x", limit=5)
    if isinstance(last, int):
        capacity = await examine_capacity(commander, version=version)
        assert capacity.last_lba == last
    else:
        with pytest.raises(last):
            await examine_capacity(commander, version=version)
    assert [name.removeprefix("capacity ") for name in unit.asked] == asked


# --- mode sense ---

WP, NO_WP = mode(wp=True, dpofua=True), mode()
MODES: list[tuple[str, dict[str, Answer], tuple[bool, bool | None, bool]]] = [
    ("six", {"mode6_08": Reply(mode(wp=True, wce=True).encode_6())}, (True, True, False)),
    ("six refused", {"mode6_08": illegal(), "mode10_08": Reply(WP.encode_10())}, (True, False, True)),
    ("six empty", {"mode6_08": Reply(), "mode10_08": Reply(WP.encode_10())}, (True, False, True)),
    (
        "no caching page",
        {
            "mode6_08": illegal(0x24),
            "mode10_08": illegal(0x24),
            "mode6_3f": Reply(mode(wp=True, caching=False).encode_6()),
        },
        (True, None, False),
    ),
    (
        "all pages, by ten",
        {
            "mode6_08": illegal(),
            "mode10_08": illegal(),
            "mode6_3f": illegal(),
            "mode10_3f": Reply(mode(wce=True).encode_10()),
        },
        (False, True, False),
    ),
    ("none at all", {"mode6_08": illegal()}, (False, None, False)),
    ("header only", {"mode6_08": Reply(b"\x03\0\x80\0")}, (True, None, False)),
    ("a lie about lengths", {"mode6_08": Reply(b"\xff\0\x80\xff" + bytes(8))}, (True, None, False)),
    ("caching page of two bytes", {"mode6_08": Reply(b"\x05\0\0\0\x08\0")}, (False, None, False)),
]


@pytest.mark.conformance(126)
@pytest.mark.parametrize(("answers", "expected"), [row[1:] for row in MODES], ids=[row[0] for row in MODES])
@jumping
async def test_inventory_mode(answers: dict[str, Answer], expected: tuple[bool, bool | None, bool]) -> None:
    found = await _scan_one(FakeUnit(**answers))
    assert found.usable
    wce = None if found.caching is None else found.caching.wce
    assert (found.write_protected, wce, found.dpofua) == expected


# --- vital product data ---


def _pages(*codes: int) -> Reply:
    return Reply(SupportedPages(codes).encode())


@pytest.mark.conformance(125)
@jumping
async def test_inventory_vpd_absent() -> None:
    unit = FakeUnit(vpd_00=illegal(0x24), vpd_80=illegal(0x24), vpd_83=illegal(0x24))
    found = await _scan_one(unit)
    assert found.usable
    assert (found.serial, found.designators, found.block_limits) == (None, (), None)
    assert "vpd b0" not in unit.asked


@pytest.mark.conformance(125)
@jumping
async def test_inventory_vpd_without_a_list_of_pages() -> None:
    found = await _scan_one(FakeUnit(vpd_00=illegal(0x24)))
    assert found.serial == "SERIAL"
    assert found.designators


@pytest.mark.conformance(125)
@jumping
async def test_inventory_vpd_only_what_is_listed_is_asked_for() -> None:
    unit = FakeUnit(vpd_00=_pages(0x00, 0x83))
    found = await _scan_one(unit)
    assert found.serial is None
    assert [name for name in unit.asked if name.startswith("vpd")] == ["vpd 00", "vpd 83"]


@pytest.mark.conformance(125)
@pytest.mark.parametrize(
    "answer",
    [
        illegal(0x24),
        Reply(b""),
        Reply(b"\0\xb0"),
        Reply(b"\0\xb0\0\x3c"),
        Reply(BlockLimits(max_transfer=8).encode()[:10]),
        Reply(b"\0\x83\0\x08" + bytes(8)),
        Reply(b"\xff" * 64),
    ],
)
@jumping
async def test_inventory_vpd_a_page_that_cannot_be_used_counts_as_absent(answer: Answer) -> None:
    found = await _scan_one(FakeUnit(vpd_b0=answer))
    assert found.usable
    assert found.block_limits is None or found.block_limits.max_transfer in (0, 8)


# --- one that breaks hides no other ---

TROUBLES: list[Answer] = [
    CommandTimeoutError("it took too long"),
    DigestError("it was damaged", header=False),
    TransferError("it was cut short"),
    Reply.check(K.HARDWARE_ERROR, 0x44),
    Reply.check(K.NOT_READY, 0x04, 0x03),
    Reply(status=0xFE),
]
STEPS = ["inquiry", "vpd_00", "vpd_80", "vpd_83", "vpd_b0", "ready", "capacity_16", "mode6_08"]


@pytest.mark.expect_log(".")
@pytest.mark.parametrize("trouble", TROUBLES, ids=repr)
@pytest.mark.parametrize("step", STEPS)
@jumping
async def test_inventory_a_broken_unit_hides_no_other(step: str, trouble: Answer) -> None:
    broken, fine = FakeUnit(**{step: trouble}), FakeUnit(luns=_addresses(0, 1, 2))

    def answer(lun: bytes, cdb: bytes) -> Answer:
        return broken(lun, cdb) if lun == luns.encode(1) else fine(lun, cdb)

    found = await scan(FakeNexus(answer).as_nexus())
    assert [one.lun for one in found if one.usable and one.lun != 1] == [0, 2]
    for one in found:
        if one.lun == 1 and not one.usable:
            assert one.problem


@pytest.mark.parametrize("step", ["luns", *STEPS])
@jumping
async def test_inventory_a_lost_session_is_not_the_units_fault(step: str) -> None:
    unit = FakeUnit(**{step: SessionLostError("no session")})
    with pytest.raises(SessionLostError, match="no session"):
        await scan(FakeNexus(unit).as_nexus())


# --- and it changes nothing ---


async def test_inventory_changes_nothing() -> None:
    """Everything that leaves a read-only scan is on the list of what is harmless; the ledger says the same."""
    config = config_of(
        *[Disk(blocks=8, lun=lun, stopped=lun == 1) for lun in range(3)], login_attention=LoginAttention.POWER_ON
    )
    async with serving(config) as target:
        settings = settings_of(read_only=True)
        async with open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings) as nexus:
            await scan(nexus)
        names = {entry.name for entry in target.ledger}
    assert names <= {
        "REPORT LUNS",
        "INQUIRY",
        "TEST UNIT READY",
        "READ CAPACITY(16)",
        "READ CAPACITY(10)",
        "MODE SENSE(6)",
        "MODE SENSE(10)",
    }
