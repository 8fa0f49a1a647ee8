"""What a disk says of itself: INQUIRY, vital product data, capacity, mode pages, REPORT LUNS.

Each function returns the whole answer; the engine cuts it at the allocation length.
Source: SPC-4 §6.6, §6.11, §6.33, §7.8; SBC-3 §5.15, §6.5, §6.6.
"""

from collections.abc import Iterable

from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.capacity import Capacity
from iscsifuse.scsi.cdb import Opcode, ParsedCdb
from iscsifuse.scsi.inquiry import Inquiry
from iscsifuse.scsi.mode import ALL_PAGES, CACHING_PAGE, CONTROL_PAGE, CachingPage, ModeParameters
from iscsifuse.scsi.sense import SenseKey
from iscsifuse.scsi.vpd import (
    Association,
    BlockDeviceCharacteristics,
    BlockLimits,
    CodeSet,
    Designator,
    DesignatorType,
    DeviceIdentification,
    LogicalBlockProvisioning,
    ProvisioningType,
    SupportedPages,
    UnitSerialNumber,
    VpdPage,
)
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.outcome import SenseError, illegal_request

__all__ = ["MAX_UNMAP_BLOCKS", "MAX_UNMAP_RANGES", "capacity", "inquiry", "mode_sense", "no_unit", "report_luns"]

MAX_UNMAP_BLOCKS = 1 << 20
MAX_UNMAP_RANGES = 64

# SAM-4, iSCSI, SPC-4, SBC-3, no version of them in particular. Source: SPC-4 §6.6.2, table 144.
_STANDARDS = (0x0080, 0x0960, 0x0460, 0x04C0)
_SPC_4 = 0x06
_NOT_HERE = 3
_NO_DEVICE = 0x1F
_CHANGEABLE = 1
_SAVED = 3


def no_unit() -> bytes:
    """Standard INQUIRY data of a LUN behind which there is nothing: qualifier 3, device type 1Fh."""
    return Inquiry(peripheral_qualifier=_NOT_HERE, device_type=_NO_DEVICE, version=_SPC_4).encode()


def inquiry(disk: Disk, cdb: ParsedCdb) -> bytes:
    """INQUIRY: standard data or a vital product data page.

    Raises:
        SenseError: there is no such page, or a page code came without EVPD.
    """
    if not cdb.evpd:
        if cdb.page:
            raise illegal_request(0x24)
        return Inquiry(
            device_type=disk.device_type,
            version=_SPC_4,
            hisup=True,
            cmdque=True,
            vendor=disk.vendor,
            product=disk.product,
            revision=disk.revision,
            version_descriptors=_STANDARDS,
        ).encode()
    if cdb.page not in _pages(disk):
        raise illegal_request(0x24)
    # The first byte of every page repeats qualifier and device type.
    return bytes([disk.device_type]) + _page(disk, VpdPage(cdb.page))[1:]


def _pages(disk: Disk) -> tuple[int, ...]:
    pages = [VpdPage.SUPPORTED_PAGES, VpdPage.UNIT_SERIAL_NUMBER, VpdPage.DEVICE_IDENTIFICATION]
    if disk.is_disk:
        pages += [VpdPage.BLOCK_LIMITS, VpdPage.BLOCK_DEVICE_CHARACTERISTICS, VpdPage.LOGICAL_BLOCK_PROVISIONING]
    return tuple(pages)


def _page(disk: Disk, page: VpdPage) -> bytes:
    match page:
        case VpdPage.SUPPORTED_PAGES:
            return SupportedPages(_pages(disk)).encode()
        case VpdPage.UNIT_SERIAL_NUMBER:
            return UnitSerialNumber(disk.serial).encode()
        case VpdPage.DEVICE_IDENTIFICATION:
            return DeviceIdentification(_designators(disk)).encode()
        case VpdPage.BLOCK_LIMITS:
            return BlockLimits(
                max_transfer=disk.max_transfer_blocks,
                optimal_transfer=disk.optimal_transfer_blocks,
                max_unmap_lba_count=MAX_UNMAP_BLOCKS if disk.thin else 0,
                max_unmap_descriptor_count=MAX_UNMAP_RANGES if disk.thin else 0,
                optimal_unmap_granularity=1 if disk.thin else 0,
            ).encode()
        case VpdPage.BLOCK_DEVICE_CHARACTERISTICS:
            return BlockDeviceCharacteristics(rotation_rate=1).encode()
        case VpdPage.LOGICAL_BLOCK_PROVISIONING:
            return LogicalBlockProvisioning(
                lbpu=disk.thin,
                lbpws=disk.thin,
                lbpws10=disk.thin,
                lbprz=disk.thin,
                provisioning_type=ProvisioningType.THIN if disk.thin else ProvisioningType.RESOURCE,
            ).encode()


def _designators(disk: Disk) -> tuple[Designator, ...]:
    """A locally assigned NAA (format 3), made from the serial number, and the T10 vendor identification."""
    number = int.from_bytes(disk.serial.encode()[-8:], "big") & 0x0FFFFFFFFFFFFFFF
    return (
        Designator(
            association=Association.LOGICAL_UNIT,
            designator_type=DesignatorType.NAA,
            code_set=CodeSet.BINARY,
            identifier=(0x3 << 60 | number).to_bytes(8, "big"),
        ),
        Designator(
            association=Association.LOGICAL_UNIT,
            designator_type=DesignatorType.T10_VENDOR_ID,
            code_set=CodeSet.ASCII,
            identifier=disk.vendor.ljust(8).encode() + disk.serial.encode(),
        ),
    )


def capacity(disk: Disk) -> Capacity:
    """What READ CAPACITY says."""
    return Capacity(
        last_lba=disk.blocks - 1,
        block_length=disk.block_length,
        lbpme=disk.thin,
        lbprz=disk.thin,
        logical_per_physical_exponent=disk.physical_exponent,
    )


def mode_sense(disk: Disk, cdb: ParsedCdb) -> bytes:
    """MODE SENSE, both forms: the caching page and the control page.

    Raises:
        SenseError: there is no such page, or saved values are wanted.
    """
    if cdb.page_control == _SAVED:
        raise SenseError(SenseKey.ILLEGAL_REQUEST, 0x39)
    control = bytes([CONTROL_PAGE, 10, disk.descriptor_sense << 2]) + bytes(9)
    pages = {CONTROL_PAGE: control}
    if disk.is_disk:
        pages = {CACHING_PAGE: CachingPage(wce=disk.volatile_cache).encode(), **pages}
    if cdb.page != ALL_PAGES:
        pages = {code: page for code, page in pages.items() if code == cdb.page}
    if not pages or cdb.subpage not in (0, 0xFF if cdb.page == ALL_PAGES else 0):
        raise illegal_request(0x24)
    if cdb.page_control == _CHANGEABLE:
        pages = {code: page[:2].ljust(len(page), b"\0") for code, page in pages.items()}
    descriptor = b""
    if disk.is_disk and not cdb.dbd:
        descriptor = min(disk.blocks, 0xFFFFFFFF).to_bytes(4, "big") + disk.block_length.to_bytes(4, "big")
    parameters = ModeParameters(
        write_protected=disk.write_protected,
        dpofua=disk.is_disk,
        block_descriptors=descriptor,
        pages={(code, 0): page for code, page in pages.items()},
    )
    return parameters.encode_6() if cdb.opcode == Opcode.MODE_SENSE_6 else parameters.encode_10()


def report_luns(numbers: Iterable[int], cdb: ParsedCdb) -> bytes:
    """REPORT LUNS.

    Raises:
        SenseError: the allocation length is too small, or SELECT REPORT isn't known.
    """
    if cdb.allocation_length < 16 or cdb.select_report > 2:
        raise illegal_request(0x24)
    # There is no well-known logical unit.
    return luns.encode_report_luns([] if cdb.select_report == 1 else [luns.encode(number) for number in numbers])
