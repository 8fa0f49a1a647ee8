"""What is behind a target: its logical units, and what each one says of itself.

Nothing here changes anything, and nothing is asked twice. A unit that can't be examined is described with its
``problem``, so that one broken disk hides no other.

Source: SPC-4 §6.4 (INQUIRY), §6.33 (REPORT LUNS), §7.8 (VPD pages), §6.11 (MODE SENSE); SBC-3 §5.12-5.13.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import trio

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
from iscsifuse.initiator.groups import plain_errors
from iscsifuse.initiator.identity import Identity, VitalProductData, examine_identity
from iscsifuse.initiator.nexus import Nexus
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi import vpd
from iscsifuse.scsi.capacity import Capacity
from iscsifuse.scsi.designator import Designator
from iscsifuse.scsi.inquiry import Inquiry, device_type_words
from iscsifuse.scsi.mode import CachingPage, ModeParameters

__all__ = ["LunDescription", "examine_capacity", "scan"]

log = logging.getLogger(__name__)

_INQUIRY_LENGTH = 255
_SHORTEST_INQUIRY = 36
"""Bytes. Source: SPC-4 §6.6.2."""
_LUNS_LENGTH = 8192
_MODE_LENGTH = 192
_CACHING = 0x08
_ALL_PAGES = 0x3F
_SPC_3 = 5
_AT_ONCE = 16
"""Units that are examined at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LunDescription:
    """One logical unit.

    Attributes:
        lun: its number.
        address: the 8 bytes as REPORT LUNS gave them.
        inquiry: standard INQUIRY data.
        capacity: or None where it isn't a disk, or can't say.
        identity: who it is, as far as it says.
        block_limits: VPD page B0h, or None.
        characteristics: VPD page B1h, or None.
        provisioning: VPD page B2h, or None.
        caching: the caching mode page, or None where the unit doesn't tell.
        write_protected: the WP bit of MODE SENSE.
        dpofua: whether FUA is honoured.
        problem: one sentence why a disk can't be used, or None.
        seen_in: `Nexus.epoch` when the look at it began.
    """

    lun: int
    address: bytes
    inquiry: Inquiry
    capacity: Capacity | None = None
    identity: Identity = field(default_factory=Identity)
    block_limits: vpd.BlockLimits | None = None
    characteristics: vpd.BlockDeviceCharacteristics | None = None
    provisioning: vpd.LogicalBlockProvisioning | None = None
    caching: CachingPage | None = None
    write_protected: bool = False
    dpofua: bool = False
    problem: str | None = field(default=None)
    seen_in: int = 0

    @property
    def serial(self) -> str | None:
        """Of VPD page 80h."""
        return self.identity.serial

    @property
    def designators(self) -> tuple[Designator, ...]:
        """Of VPD page 83h."""
        return self.identity.designators

    @property
    def is_disk(self) -> bool:
        """Whether it is a direct access block device that is there."""
        return self.inquiry.is_disk

    @property
    def usable(self) -> bool:
        """Whether it can be shown as a file."""
        return self.is_disk and self.capacity is not None and self.problem is None

    @property
    def type_words(self) -> str:
        """What it is: disk, storage array controller and so on."""
        return device_type_words(self.inquiry.device_type)

    @property
    def size(self) -> int:
        """Capacity in bytes; 0 where unknown."""
        return self.capacity.size if self.capacity is not None else 0

    @property
    def block_length(self) -> int:
        """Bytes of a logical block; 0 where unknown."""
        return self.capacity.block_length if self.capacity is not None else 0


async def scan(
    nexus: Nexus, *, only: Collection[int] | None = None, without: Collection[int] = ()
) -> list[LunDescription]:
    """Describe the logical units of a target.

    Args:
        nexus: a session with it.
        only: just these numbers, or None for all.
        without: not these, which are known.

    Returns:
        Units in ascending order, disks and others. Units that are not connected (peripheral qualifier not 0) are left
        out, and so are well-known ones.

    Raises:
        IscsifuseError: the target as a whole can't be examined.
    """
    # A target may list one number by two addressing methods; the first one stands for it.
    wanted: dict[int, luns.LunAddress] = {}
    for address in await _report_luns(nexus):
        number = address.number
        if number is None or address.well_known or number in without or (only is not None and number not in only):
            continue
        wanted.setdefault(number, address)
    found: list[LunDescription] = []
    limiter = trio.CapacityLimiter(_AT_ONCE)

    async def examine(address: luns.LunAddress, number: int) -> None:
        async with limiter:
            description = await _examine(nexus, address, number)
        if description is not None:
            found.append(description)

    with plain_errors():
        async with trio.open_nursery() as nursery:
            for number, address in wanted.items():
                nursery.start_soon(examine, address, number)
    return sorted(found, key=lambda description: description.lun)


def _commander(nexus: Nexus, address: bytes, number: int) -> Commander:
    return Commander(
        nexus,
        address=address,
        label=f"LUN {number} of {nexus.target_name}",
        limit=nexus.settings.timeout,
        may_start=not nexus.settings.read_only,
    )


async def _report_luns(nexus: Nexus) -> tuple[luns.LunAddress, ...]:
    """The addresses of all units; just LUN 0 for a target that doesn't know REPORT LUNS."""
    commander = _commander(nexus, luns.encode(0), 0)
    length = _LUNS_LENGTH
    try:
        for _ in range(3):  # the list may grow between two questions, but not for ever
            data = await commander.query(cdbs.report_luns(allocation_length=length), length=length)
            report = luns.decode_report_luns(data)
            if report.needs_length is None or report.needs_length <= length:
                break
            length = report.needs_length
        return report.luns or (luns.decode(luns.encode(0)),)
    except (CommandError, ParameterDataError, TransferError) as error:
        log.warning("%s; looking at LUN 0 only", error)
        return (luns.decode(luns.encode(0)),)


async def _examine(nexus: Nexus, address: luns.LunAddress, number: int) -> LunDescription | None:
    seen_in = nexus.epoch
    commander = _commander(nexus, address.raw, number)
    try:
        data = await commander.query(cdbs.inquiry(allocation_length=_INQUIRY_LENGTH), length=_INQUIRY_LENGTH)
        inquiry = Inquiry.decode(data)
    except (CommandError, ParameterDataError, TransferError, DigestError, CommandTimeoutError) as error:
        log.warning("%s", error)
        return None
    if inquiry.peripheral_qualifier != 0:
        return None
    base = LunDescription(lun=number, address=address.raw, inquiry=inquiry, seen_in=seen_in)
    if not inquiry.is_disk:
        return base
    if len(data) < _SHORTEST_INQUIRY:
        return replace(base, problem=f"its INQUIRY data ends after {len(data)} bytes: it doesn't say what it is")
    try:
        return await _examine_disk(commander, await _examine_pages(commander, base))
    except SessionLostError:
        raise
    except IscsifuseError as error:
        return replace(base, problem=str(error))


async def _examine_pages(commander: Commander, base: LunDescription) -> LunDescription:
    """What the vital product data say."""
    pages = VitalProductData(commander)
    identity = await examine_identity(pages)
    if identity.unread:
        log.warning("%s could not tell who it is; it is asked again when its session was lost", commander.label)
    return replace(
        base,
        identity=identity,
        block_limits=await pages.read(vpd.VpdPage.BLOCK_LIMITS, vpd.BlockLimits),
        characteristics=await pages.read(vpd.VpdPage.BLOCK_DEVICE_CHARACTERISTICS, vpd.BlockDeviceCharacteristics),
        provisioning=await pages.read(vpd.VpdPage.LOGICAL_BLOCK_PROVISIONING, vpd.LogicalBlockProvisioning),
    )


async def examine_capacity(commander: Commander, *, version: int) -> Capacity:
    """How large a disk is.

    READ CAPACITY(16) first where the unit claims SPC-3 or later, since only that tells of thin provisioning; (10)
    first for older ones, which may not take kindly to the other. Each is the other's second chance.

    Raises:
        CommandError: neither works.
        ParameterDataError: the numbers can't be.
    """
    if version < _SPC_3:
        try:
            return await _capacity_10(commander)
        except (CommandError, ParameterDataError, TransferError) as error:
            log.info("%s; trying READ CAPACITY(16)", error)
            return await _capacity_16(commander)
    try:
        return await _capacity_16(commander)
    except (CommandError, ParameterDataError, TransferError) as error:
        log.info("%s; trying READ CAPACITY(10)", error)
        return await _capacity_10(commander)


async def _capacity_10(commander: Commander) -> Capacity:
    capacity = Capacity.decode_10(await commander.query(cdbs.read_capacity_10(), length=8))
    return await _capacity_16(commander) if capacity.needs_16 else capacity


async def _capacity_16(commander: Commander) -> Capacity:
    return Capacity.decode_16(await commander.query(cdbs.read_capacity_16(allocation_length=32), length=32))


async def _examine_disk(commander: Commander, description: LunDescription) -> LunDescription:
    """Wait until it is ready; then its size and its mode."""
    try:
        await commander.run(cdbs.test_unit_ready())
        capacity = await examine_capacity(commander, version=description.inquiry.version)
    except SessionLostError:
        raise
    except IscsifuseError as error:
        return replace(description, problem=str(error))
    mode = await _mode(commander)
    return replace(
        description,
        capacity=capacity,
        caching=mode.caching if mode is not None else None,
        write_protected=mode.write_protected if mode is not None else False,
        dpofua=mode.dpofua if mode is not None else False,
    )


async def _mode(commander: Commander) -> ModeParameters | None:
    """The mode parameters: with the caching page where there is one, with any others or none otherwise."""
    for page in (_CACHING, _ALL_PAGES):
        try:
            cdb = cdbs.mode_sense_6(page=page, allocation_length=_MODE_LENGTH)
            return ModeParameters.decode_6(await commander.query(cdb, length=_MODE_LENGTH))
        except (CommandError, ParameterDataError, TransferError) as error:
            log.debug("%s", error)
        try:
            cdb = cdbs.mode_sense_10(page=page, allocation_length=_MODE_LENGTH)
            return ModeParameters.decode_10(await commander.query(cdb, length=_MODE_LENGTH))
        except (CommandError, ParameterDataError, TransferError) as error:
            log.debug("%s", error)
    return None
