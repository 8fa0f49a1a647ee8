import pytest
from initiator_fakes import LUN_0, Answer, FakeNexus, Reply, illegal, jumping

from iscsifuse.errors import SessionLostError
from iscsifuse.initiator.inventory import LunDescription
from iscsifuse.initiator.quirks import ROOM, hear_tgtd, make_room_in_tgtd
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.inquiry import Inquiry
from iscsifuse.scsi.sense import SenseKey as K

LIST = Reply(luns.encode_report_luns([LUN_0]))


def unit(vendor: str, lun: int = 0) -> LunDescription:
    return LunDescription(lun=lun, address=luns.encode(lun), inquiry=Inquiry(version=6, vendor=vendor, product="P"))


@jumping
async def test_tgtd_gets_one_command_that_may_return_much() -> None:
    nexus = FakeNexus([LIST])
    assert await make_room_in_tgtd(nexus.as_nexus(), [unit("IET", 3), unit("IET", 4)])
    assert nexus.cdbs == [cdbs.report_luns(allocation_length=ROOM)]


@jumping
async def test_tgtd_may_be_behind_any_of_the_units() -> None:
    asked: list[bytes] = []

    def answer(lun: bytes, cdb: bytes) -> Answer:  # noqa: ARG001 - as an executor asks
        asked.append(lun)
        return LIST

    nexus = FakeNexus(answer)
    assert await make_room_in_tgtd(nexus.as_nexus(), [unit("ACME", 1), unit("IET", 2)])
    assert asked == [luns.encode(2)]


@jumping
async def test_other_targets_are_left_alone() -> None:
    nexus = FakeNexus([LIST])
    assert not await make_room_in_tgtd(nexus.as_nexus(), [unit("ACME"), unit("FreeBSD"), unit("LIO-ORG")])
    assert not await make_room_in_tgtd(nexus.as_nexus(), [])
    assert nexus.cdbs == []


@pytest.mark.parametrize("answer", [illegal(), SessionLostError("gone")])
def test_a_refusal_is_no_trouble(answer: Answer) -> None:
    @jumping
    async def run() -> None:
        nexus = FakeNexus([answer])
        assert await make_room_in_tgtd(nexus.as_nexus(), [unit("IET")])
        assert len(nexus.cdbs) == 1

    run()


@jumping
async def test_tgtd_is_heard_by_its_controller_where_that_is_not_mounted() -> None:
    asked: list[bytes] = []
    answers = iter([Reply.check(K.UNIT_ATTENTION, 0x29), Reply.check(K.UNIT_ATTENTION, 0x3F, 0x0E), Reply()])

    def answer(lun: bytes, cdb: bytes) -> Answer:
        assert cdb == cdbs.test_unit_ready()
        asked.append(lun)
        return next(answers)

    nexus = FakeNexus(answer)
    for units in ([], [unit("ACME", 1)], [unit("IET", 0), unit("IET", 1)]):
        await hear_tgtd(nexus.as_nexus(), units)
    assert asked == []
    await hear_tgtd(nexus.as_nexus(), [unit("IET", 1)])
    assert asked == [LUN_0] * 3


@jumping
async def test_a_controller_that_tells_nothing_is_no_trouble() -> None:
    for answer in (illegal(0x25), SessionLostError("gone")):
        nexus = FakeNexus([answer])
        await hear_tgtd(nexus.as_nexus(), [unit("IET", 1)])
        assert len(nexus.cdbs) <= 2
