"""Who a logical unit says it is, and whether two such answers can be of the same one.

::

    known (at the scan)   now           the same?
    serial X              serial X      yes, if the designators agree, too
    serial X              serial Y      no: another disk
    serial X              none          can't be told: it is asked again
    none, it has no page  serial Y      no: another disk
    page was not readable serial Y      not compared, since it was never known; Y is remembered from now on

Source: SPC-4 §7.8.5 (Device Identification), §7.8.15 (Unit Serial Number), §7.8.14 (Supported VPD Pages).
"""

import logging
from dataclasses import dataclass
from typing import Protocol, TypeVar

from iscsifuse.errors import CommandError, IscsifuseError, ParameterDataError, TransferError
from iscsifuse.initiator.commander import Commander
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi import vpd
from iscsifuse.scsi.designator import Association, Designator
from iscsifuse.scsi.sense import SenseKey

__all__ = ["Identity", "VitalProductData", "examine_identity"]

log = logging.getLogger(__name__)

_VPD_LENGTH = 4096
_SERIAL = vpd.VpdPage.UNIT_SERIAL_NUMBER
_DESIGNATORS = vpd.VpdPage.DEVICE_IDENTIFICATION


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a unit says it is.

    Attributes:
        serial: of VPD page 80h, or None.
        designators: of VPD page 83h.
        unread: those of the two pages that it may have, and that could not be had this time.
    """

    serial: str | None = None
    designators: tuple[Designator, ...] = ()
    unread: frozenset[int] = frozenset()

    def is_missing_in(self, now: "Identity") -> bool:
        """Whether a later answer leaves out what was known, so that nothing can be told."""
        return (self.serial is not None and now.serial is None) or bool(self.designators and not now.designators)

    def agrees_with(self, now: "Identity") -> bool:
        """Whether a later answer, in which nothing is missing, can be the same unit's."""
        return (_SERIAL in self.unread or self.serial == now.serial) and (
            _DESIGNATORS in self.unread or _of_unit(self.designators) == _of_unit(now.designators)
        )


def _of_unit(designators: tuple[Designator, ...]) -> frozenset[Designator]:
    """Those that belong to the unit itself; the others name the port, and another portal has another one."""
    return frozenset(one for one in designators if one.association == Association.LOGICAL_UNIT)


async def examine_identity(pages: "VitalProductData") -> Identity:
    """Ask a unit who it is.

    Raises:
        SessionLostError, CommandTimeoutError, DigestError: nothing can be said now.
    """
    serial = await pages.read(_SERIAL, vpd.UnitSerialNumber)
    identification = await pages.read(_DESIGNATORS, vpd.DeviceIdentification)
    return Identity(
        serial=serial.serial if serial is not None else None,
        designators=identification.designators if identification is not None else (),
        unread=frozenset({_SERIAL, _DESIGNATORS}) & pages.unread,
    )


_T_co = TypeVar("_T_co", covariant=True)


class _Decoder(Protocol[_T_co]):
    """A class of VPD page."""

    def decode(self, data: bytes) -> _T_co: ...


class VitalProductData:
    """The VPD pages of one unit, each asked for when it is wanted.

    Attributes:
        unread: pages that could not be had for a reason that may pass.
    """

    def __init__(self, commander: Commander) -> None:
        self.unread: set[int] = set()
        self._commander = commander
        self._supported: frozenset[int] | None = None

    async def read(self, page: vpd.VpdPage, decoder: _Decoder[_T_co]) -> _T_co | None:
        """A page, or None where the unit doesn't have it, or it can't be used.

        Raises:
            SessionLostError, CommandTimeoutError, DigestError: nothing can be said now.
        """
        if self._supported is None:
            supported = await self._ask(vpd.VpdPage.SUPPORTED_PAGES, vpd.SupportedPages)
            # A unit without the list may still have the two pages that were there before the list was common.
            pages = supported.pages if supported is not None else (_SERIAL, _DESIGNATORS)
            self._supported = frozenset(pages)
        return await self._ask(page, decoder) if page in self._supported else None

    async def _ask(self, page: vpd.VpdPage, decoder: _Decoder[_T_co]) -> _T_co | None:
        try:
            cdb = cdbs.inquiry(allocation_length=_VPD_LENGTH, page=page)
            return decoder.decode(await self._commander.query(cdb, length=_VPD_LENGTH))
        except (CommandError, ParameterDataError, TransferError) as error:
            log.debug("%s", error)
            if _may_pass(error):
                self.unread.add(page)
            return None


def _may_pass(error: IscsifuseError) -> bool:
    """Whether the next answer may be another one: it isn't "no such page", nor a page that makes no sense."""
    if isinstance(error, CommandError):
        return error.sense_key != SenseKey.ILLEGAL_REQUEST
    return isinstance(error, TransferError)
