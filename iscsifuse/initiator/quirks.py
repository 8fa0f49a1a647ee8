"""What particular targets want, besides what the standards say. Nothing in here is needed; it makes them quicker.

**tgtd** (of the Linux SCSI target framework) takes memory from the C library for each command, as much as the command
may return, and gives it back afterwards. glibc in turn gives memory back to the kernel as soon as more of it is free
than twice the largest piece that was ever given back; and memory that comes from the kernel costs a page fault for
each 4 KiB. With commands of 256 KiB and 1 MiB, several at a time, that was half of all that tgtd had to do. One
command that *may* return a lot changes it for good: that much is kept from then on. Nothing is transferred, and the
memory isn't even touched.
"""

import logging
import mmap
from collections.abc import Iterable

from iscsifuse.errors import IscsifuseError
from iscsifuse.initiator.commander import Commander
from iscsifuse.initiator.inventory import LunDescription
from iscsifuse.initiator.nexus import Nexus
from iscsifuse.scsi import cdb as cdbs

__all__ = ["ROOM", "make_room_in_tgtd"]

log = logging.getLogger(__name__)

ROOM = 8 << 20
"""Bytes. glibc keeps up to twice as much then; more than we have under way at a target that is so near that this
matters."""
_TGT_VENDOR = "IET"


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
    unit = next((unit for unit in units if unit.inquiry.vendor == _TGT_VENDOR), None)
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
