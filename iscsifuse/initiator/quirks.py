"""What particular targets want, besides what the standards say.

**tgtd** (of the Linux SCSI target framework) takes memory from the C library for each command, as much as the command
may return, and gives it back afterwards. glibc in turn gives memory back to the kernel as soon as more of it is free
than twice the largest piece that was ever given back; and memory that comes from the kernel costs a page fault for
each 4 KiB. With commands of 256 KiB and 1 MiB, several at a time, that was half of all that tgtd had to do. One
command that *may* return a lot changes it for good: that much is kept from then on. Nothing is transferred, and the
memory isn't even touched. (Nobody needs that; it makes tgtd quicker.)

It tells of a unit that was swapped for another one (3Fh/0Eh) all the others, but not that one. Where none of these is
mounted there is still unit 0, a controller that it always has: a look at that brings the news.
"""

import logging
import mmap
from collections.abc import Collection, Iterable

from iscsifuse.errors import IscsifuseError
from iscsifuse.initiator.commander import Commander
from iscsifuse.initiator.inventory import LunDescription
from iscsifuse.initiator.nexus import Nexus
from iscsifuse.scsi import cdb as cdbs

__all__ = ["ROOM", "hear_tgtd", "make_room_in_tgtd"]

log = logging.getLogger(__name__)

ROOM = 8 << 20
"""Bytes. glibc keeps up to twice as much then; more than we have under way at a target that is so near that this
matters."""
_TGT_VENDOR = "IET"
_HEARING = 2.0
"""Seconds for all that unit 0 has to tell; the power on of each login is in front of it."""


async def make_room_in_tgtd(nexus: Nexus, units: Iterable[LunDescription]) -> bool:
    """Let tgtd keep the memory of its commands; does nothing with other targets.

    Args:
        nexus: a session with the target.
        units: some of its units. They tell what it is; the first one is asked.

    Returns:
        Whether a target was asked. It has told of its LUNs then, so it doesn't tell any more that they had changed
        before: whoever wants to know scans them.

    An error is none of the caller's: the target is as slow as it was.

    Cancellation: leaves nothing behind.

    Source: SPC-4 §6.33 (REPORT LUNS, which ends the unit attention 3Fh/0Eh); mallopt(3), M_MMAP_THRESHOLD.
    """
    unit = _unit_of_tgtd(units)
    if unit is None:
        return False
    commander = Commander(
        nexus, address=unit.address, label=f"LUN {unit.lun} of {nexus.target_name}", limit=nexus.settings.timeout
    )
    # Memory that costs nothing before somebody writes to it; only the few bytes of the list will be there.
    room = memoryview(mmap.mmap(-1, ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    try:
        await commander.run(cdbs.report_luns(allocation_length=ROOM), buffer_in=room)
    except IscsifuseError as error:
        log.debug("%s", error)
    return True


async def hear_tgtd(nexus: Nexus, units: Collection[LunDescription]) -> None:
    """Let tgtd tell by its unit 0 what it would tell nobody who is mounted; does nothing with other targets.

    Args:
        nexus: a session with the target; what it tells has the units examined (`Nexus.doubt_all`).
        units: those that are mounted.

    An error is none of the caller's. Cancellation: leaves nothing behind.
    """
    if _unit_of_tgtd(units) is None or any(unit.lun == 0 for unit in units):
        return
    commander = Commander(nexus, address=bytes(8), label=f"LUN 0 of {nexus.target_name}", limit=_HEARING)
    try:
        await commander.run(cdbs.test_unit_ready())
    except IscsifuseError as error:
        log.debug("%s", error)


def _unit_of_tgtd(units: Iterable[LunDescription]) -> LunDescription | None:
    return next((unit for unit in units if unit.inquiry.vendor == _TGT_VENDOR), None)
