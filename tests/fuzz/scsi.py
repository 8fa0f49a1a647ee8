"""SCSI parameter data and sense data, and, for the target's side of the code, CDBs."""

import contextlib
import struct
from collections.abc import Callable
from typing import TypeVar

from fuzz.words import check_message
from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi import lba_status, opcodes, unmap, vpd
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.allow import is_harmless
from iscsifuse.scsi.capacity import MAX_BLOCK_LENGTH, MAX_SIZE, MIN_BLOCK_LENGTH, Capacity
from iscsifuse.scsi.inquiry import Inquiry, device_type_words
from iscsifuse.scsi.mode import ModeParameters
from iscsifuse.scsi.sense import Sense

__all__ = [
    "check_capacity",
    "check_cdb",
    "check_inquiry",
    "check_lba_status",
    "check_mode",
    "check_report_luns",
    "check_sense",
    "check_vpd",
]

T = TypeVar("T")
_ASKED = struct.Struct(">QQ")


def _decoded(decode: Callable[[bytes], T], data: bytes) -> T | None:
    """What comes out, None where it is refused in the one way that is allowed."""
    try:
        return decode(data)
    except ParameterDataError as error:
        check_message(error)
        return None


def check_sense(data: bytes) -> None:
    """All of it is sense data."""
    sense = _decoded(Sense.decode, data)
    if sense is None:
        return
    assert sense.raw == data
    assert sense.describe().isprintable()
    assert sense.progress is None or 0 <= sense.progress < 1
    assert sense.field_pointer is None or 0 <= sense.field_pointer <= 0xFFFF
    if sense.response_code != 0x7F:
        assert Sense.decode(sense.encode()) == sense


def check_inquiry(data: bytes) -> None:
    """All of it is standard INQUIRY data."""
    inquiry = _decoded(Inquiry.decode, data)
    if inquiry is None:
        return
    assert (inquiry.vendor + inquiry.product + inquiry.revision).isprintable()
    assert device_type_words(inquiry.device_type)
    assert Inquiry.decode(inquiry.encode()) == inquiry


def check_vpd(data: bytes) -> None:
    """All of it is a page; every decoder is asked."""
    supported = _decoded(vpd.SupportedPages.decode, data)
    if supported is not None:
        assert vpd.SupportedPages.decode(supported.encode()) == supported
    serial = _decoded(vpd.UnitSerialNumber.decode, data)
    if serial is not None:
        assert serial.serial.isprintable()
        assert vpd.UnitSerialNumber.decode(serial.encode()) == serial
    identification = _decoded(vpd.DeviceIdentification.decode, data)
    if identification is not None:
        best = vpd.best_designator(identification.designators)
        assert best == vpd.best_designator(reversed(identification.designators))
        assert all(one.describe().isprintable() for one in identification.designators)
        assert vpd.DeviceIdentification.decode(identification.encode()) == identification
    limits = _decoded(vpd.BlockLimits.decode, data)
    if limits is not None:
        assert vpd.BlockLimits.decode(limits.encode()) == limits
    characteristics = _decoded(vpd.BlockDeviceCharacteristics.decode, data)
    if characteristics is not None:
        assert characteristics.form_factor_words().isprintable()
        assert vpd.BlockDeviceCharacteristics.decode(characteristics.encode()) == characteristics
    provisioning = _decoded(vpd.LogicalBlockProvisioning.decode, data)
    if provisioning is not None:
        assert vpd.LogicalBlockProvisioning.decode(provisioning.encode()) == provisioning


def check_report_luns(data: bytes) -> None:
    """All of it is the answer to REPORT LUNS; its first eight bytes are an address, too."""
    address = _decoded(luns.decode, data[:8])
    assert (address is None) is (len(data) < 8)
    if address is not None:
        assert address.raw == data[:8]
        assert address.describe().isprintable()
        if address.number is not None and address.number <= luns.MAX_NUMBER:
            assert luns.decode(luns.encode(address.number)).number == address.number
    report = _decoded(luns.decode_report_luns, data)
    if report is None:
        return
    assert len(report.luns) <= len(data) // 8
    assert report.needs_length is None or len(data) < report.needs_length <= luns.MAX_REPORT_LENGTH
    again = luns.decode_report_luns(luns.encode_report_luns(one.raw for one in report.luns))
    assert again.luns == report.luns
    assert again.needs_length is None


def check_capacity(data: bytes) -> None:
    """All of it is the answer to READ CAPACITY, (10) and (16)."""
    ten = _decoded(Capacity.decode_10, data)
    if ten is not None:
        _check_size(ten)
        assert Capacity.decode_10(ten.encode_10()) == ten
    sixteen = _decoded(Capacity.decode_16, data)
    if sixteen is not None:
        _check_size(sixteen)
        assert Capacity.decode_16(sixteen.encode_16()) == sixteen


def _check_size(capacity: Capacity) -> None:
    assert MIN_BLOCK_LENGTH <= capacity.block_length <= MAX_BLOCK_LENGTH
    assert 0 < capacity.size <= MAX_SIZE
    assert capacity.physical_block_length >= capacity.block_length


def check_mode(data: bytes) -> None:
    """All of it is the answer to MODE SENSE, (6) and (10)."""
    six = _decoded(ModeParameters.decode_6, data)
    if six is not None:
        assert six.caching is None or isinstance(six.caching.wce, bool)
        assert ModeParameters.decode_6(six.encode_6()) == six
    ten = _decoded(ModeParameters.decode_10, data)
    if ten is not None:
        assert ten.caching is None or isinstance(ten.caching.wce, bool)
        assert ModeParameters.decode_10(ten.encode_10()) == ten


def check_lba_status(data: bytes) -> None:
    """Eight bytes of LBA, eight of capacity, then the answer to GET LBA STATUS."""
    if len(data) < _ASKED.size:
        return
    lba, capacity = _ASKED.unpack_from(data)
    answer = data[_ASKED.size :]
    extents = _decoded(lambda raw: lba_status.decode(raw, lba=lba, capacity_blocks=capacity), answer)
    if extents is None:
        return
    expected = lba
    for extent in extents:
        assert extent.lba == expected
        assert extent.blocks > 0
        expected += extent.blocks
    assert expected <= capacity
    assert lba_status.decode(lba_status.encode(extents), lba=lba, capacity_blocks=capacity) == extents


def check_cdb(data: bytes) -> None:
    """All of it is a CDB, and the parameter list of UNMAP."""
    parsed = _decoded(cdbs.decode, data)
    name = opcodes.name(data)
    assert name.isprintable()
    assert cdbs.name(data) == name
    harmless = is_harmless(data)
    if harmless:
        assert parsed is not None
        assert len(data) <= 16
        assert data[opcodes.cdb_length(data[0]) - 1] == 0
    if parsed is not None:
        assert parsed.opcode == data[0]
        assert parsed.lba >= 0
        assert parsed.blocks >= 0
    with contextlib.suppress(ParameterDataError):
        ranges = unmap.decode(data)
        assert unmap.decode(unmap.encode(ranges)) == ranges
