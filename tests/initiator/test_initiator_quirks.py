import pytest
from initiator_fakes import LUN_0, Answer, FakeNexus, Reply, illegal, jumping

from iscsifuse.errors import SessionLostError
from iscsifuse.initiator.inventory import LunDescription
from iscsifuse.initiator.quirks import ROOM, make_room_in_tgtd
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.inquiry import Inquiry

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
