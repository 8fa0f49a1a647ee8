"""Command descriptor blocks: one function for each command that is ever sent, and the way back for a target.

A builder returns exactly the bytes of its CDB (6, 10 or 16; the transport pads). Every number is
keyword-only, so that an LBA and a count can't change places, and one that doesn't fit its field raises
``ValueError``: a masked LBA would be a write to somebody else's block. ``read`` and ``write`` choose the
shortest form that can say it, since some targets know the 10-byte one only.

Names, operation codes and service actions live in :mod:`~iscsifuse.scsi.opcodes`, decoding in
:mod:`~iscsifuse.scsi.parsed_cdb`; both are offered here too.

Source: SPC-4 §6, SBC-3 §5.
"""

import struct

from iscsifuse.scsi._fields import pack
from iscsifuse.scsi.opcodes import (
    MaintenanceIn,
    Opcode,
    PersistentReserveIn,
    ServiceActionIn16,
    cdb_length,
    name,
)
from iscsifuse.scsi.parsed_cdb import ParsedCdb, decode

__all__ = [
    "MAX_BLOCKS_10",
    "MaintenanceIn",
    "Opcode",
    "ParsedCdb",
    "PersistentReserveIn",
    "ServiceActionIn16",
    "cdb_length",
    "decode",
    "get_lba_status",
    "inquiry",
    "mode_sense_6",
    "mode_sense_10",
    "name",
    "read",
    "read_10",
    "read_16",
    "read_capacity_10",
    "read_capacity_16",
    "report_luns",
    "request_sense",
    "start_stop_unit",
    "synchronize_cache",
    "synchronize_cache_10",
    "synchronize_cache_16",
    "test_unit_ready",
    "unmap",
    "write",
    "write_10",
    "write_16",
]

#: The most blocks that a 10-byte READ or WRITE can name.
MAX_BLOCKS_10 = 0xFFFF
_END_10 = 1 << 32
_END_16 = 1 << 64

# operation code, flags, LBA, group number, blocks, control
_TRANSFER_10 = struct.Struct(">BBIBHB")
_TRANSFER_16 = struct.Struct(">BBQIBB")
_INQUIRY = struct.Struct(">BBBHB")
_REPORT_LUNS = struct.Struct(">BxBxxxIxB")
_SERVICE_ACTION_16 = struct.Struct(">BBQIBB")
_MODE_SENSE_6 = struct.Struct(">BBBBBB")
_MODE_SENSE_10 = struct.Struct(">BBBB3xHB")
_UNMAP = struct.Struct(">BB5xHB")
_SIX = struct.Struct(">BBBBBB")

_READ_10 = int(Opcode.READ_10)
_READ_16 = int(Opcode.READ_16)
_WRITE_10 = int(Opcode.WRITE_10)
_WRITE_16 = int(Opcode.WRITE_16)

_TEST_UNIT_READY = bytes(6)
_READ_CAPACITY_10 = bytes([Opcode.READ_CAPACITY_10]) + bytes(9)


def _out_of_range(lba: int, blocks: int) -> ValueError:
    return ValueError(f"LBA {lba}, {blocks} blocks: out of the range of the CDB's fields")


def test_unit_ready() -> bytes:
    """TEST UNIT READY. Source: SPC-4 §6.47."""
    return _TEST_UNIT_READY


def request_sense(*, allocation_length: int, descriptor: bool = False) -> bytes:
    """REQUEST SENSE.

    Args:
        allocation_length: bytes, at most 255.
        descriptor: ask for descriptor format sense data.

    Raises:
        ValueError: an argument doesn't fit its field.

    Source: SPC-4 §6.39.
    """
    return pack(_SIX, Opcode.REQUEST_SENSE, descriptor, 0, 0, allocation_length, 0)


def inquiry(*, allocation_length: int, page: int | None = None) -> bytes:
    """INQUIRY.

    Args:
        allocation_length: bytes, at most 65535. Old devices read one byte of it: ask for 255 at most at
            first.
        page: a vital product data page, or None for the standard data.

    Raises:
        ValueError: an argument doesn't fit its field.

    Source: SPC-4 §6.6.1.
    """
    return pack(_INQUIRY, Opcode.INQUIRY, page is not None, page or 0, allocation_length, 0)


def report_luns(*, allocation_length: int, select_report: int = 0) -> bytes:
    """REPORT LUNS.

    Args:
        allocation_length: bytes, at least 16.
        select_report: 0 leaves well-known logical units out, 1 is those alone, 2 is all.

    Raises:
        ValueError: an argument doesn't fit its field, or the allocation length is below 16.

    Source: SPC-4 §6.33.
    """
    if allocation_length < 16:
        raise ValueError(f"REPORT LUNS needs an allocation length of 16 or more, not {allocation_length}")
    return pack(_REPORT_LUNS, Opcode.REPORT_LUNS, select_report, allocation_length, 0)


def read_capacity_10() -> bytes:
    """READ CAPACITY(10); the answer has 8 bytes. Source: SBC-3 §5.15."""
    return _READ_CAPACITY_10


def read_capacity_16(*, allocation_length: int = 32) -> bytes:
    """READ CAPACITY(16).

    Raises:
        ValueError: the allocation length doesn't fit its field.

    Source: SBC-3 §5.16.
    """
    return pack(
        _SERVICE_ACTION_16,
        Opcode.SERVICE_ACTION_IN_16,
        ServiceActionIn16.READ_CAPACITY_16,
        0,
        allocation_length,
        0,
        0,
    )


def get_lba_status(*, lba: int, allocation_length: int) -> bytes:
    """GET LBA STATUS.

    Args:
        lba: first block asked about.
        allocation_length: bytes: 8 and 16 for each descriptor.

    Raises:
        ValueError: an argument doesn't fit its field.

    Source: SBC-3 §5.4.
    """
    return pack(
        _SERVICE_ACTION_16,
        Opcode.SERVICE_ACTION_IN_16,
        ServiceActionIn16.GET_LBA_STATUS,
        lba,
        allocation_length,
        0,
        0,
    )


def _page_code(page: int) -> int:
    if not 0 <= page <= 0x3F:
        raise ValueError(f"mode page {page:#x} doesn't fit its field of six bits")
    return page  # page control 00b: current values


def mode_sense_6(*, page: int, allocation_length: int, subpage: int = 0, dbd: bool = False) -> bytes:
    """MODE SENSE(6), current values.

    Args:
        page: page code, 3Fh for all.
        allocation_length: bytes, at most 255.
        subpage: subpage code, FFh for all.
        dbd: leave block descriptors out.

    Raises:
        ValueError: an argument doesn't fit its field.

    Source: SPC-4 §6.11.
    """
    return pack(_MODE_SENSE_6, Opcode.MODE_SENSE_6, dbd << 3, _page_code(page), subpage, allocation_length, 0)


def mode_sense_10(*, page: int, allocation_length: int, subpage: int = 0, dbd: bool = False) -> bytes:
    """MODE SENSE(10), current values, short block descriptors only (LLBAA is 0).

    Args:
        page: page code, 3Fh for all.
        allocation_length: bytes, at most 65535.
        subpage: subpage code, FFh for all.
        dbd: leave block descriptors out.

    Raises:
        ValueError: an argument doesn't fit its field.

    Source: SPC-4 §6.12.
    """
    return pack(_MODE_SENSE_10, Opcode.MODE_SENSE_10, dbd << 3, _page_code(page), subpage, allocation_length, 0)


def start_stop_unit(*, start: bool, immediate: bool = False) -> bytes:
    """START STOP UNIT without load or eject.

    Args:
        start: spin up (True) or down.
        immediate: ask for status before the unit is ready.

    Source: SBC-3 §5.25.
    """
    return pack(_SIX, Opcode.START_STOP_UNIT, immediate, 0, 0, start, 0)


def read_10(*, lba: int, blocks: int, fua: bool = False, dpo: bool = False) -> bytes:
    """READ(10).

    Args:
        lba: first block, below 2^32.
        blocks: at most 65535; 0 transfers nothing.
        fua: force unit access: the medium, not a volatile cache, is read.
        dpo: disable page out: a hint that these blocks won't be wanted again soon.

    Raises:
        ValueError: an argument doesn't fit its field.

    Source: SBC-3 §5.11.
    """
    try:
        return _TRANSFER_10.pack(_READ_10, fua << 3 | dpo << 4, lba, 0, blocks, 0)
    except struct.error:
        raise _out_of_range(lba, blocks) from None


def read_16(*, lba: int, blocks: int, fua: bool = False, dpo: bool = False) -> bytes:
    """READ(16): as :func:`read_10`, with an LBA below 2^64 and fewer than 2^32 blocks. Source: SBC-3 §5.13."""
    try:
        return _TRANSFER_16.pack(_READ_16, fua << 3 | dpo << 4, lba, blocks, 0, 0)
    except struct.error:
        raise _out_of_range(lba, blocks) from None


def write_10(*, lba: int, blocks: int, fua: bool = False, dpo: bool = False) -> bytes:
    """WRITE(10).

    Args:
        lba: first block, below 2^32.
        blocks: at most 65535; 0 transfers nothing.
        fua: force unit access: status comes when the data is on the medium.
        dpo: disable page out.

    Raises:
        ValueError: an argument doesn't fit its field.

    Source: SBC-3 §5.32.
    """
    try:
        return _TRANSFER_10.pack(_WRITE_10, fua << 3 | dpo << 4, lba, 0, blocks, 0)
    except struct.error:
        raise _out_of_range(lba, blocks) from None


def write_16(*, lba: int, blocks: int, fua: bool = False, dpo: bool = False) -> bytes:
    """WRITE(16): as :func:`write_10`, with an LBA below 2^64 and fewer than 2^32 blocks. Source: SBC-3 §5.34."""
    try:
        return _TRANSFER_16.pack(_WRITE_16, fua << 3 | dpo << 4, lba, blocks, 0, 0)
    except struct.error:
        raise _out_of_range(lba, blocks) from None


def read(*, lba: int, blocks: int, fua: bool = False, dpo: bool = False) -> bytes:
    """READ(10) where it can name these blocks, else READ(16).

    Raises:
        ValueError: negative, more than 2^32-1 blocks, or an end beyond 2^64.

    Source: SBC-3 §5.11, §5.13.
    """
    end = lba + blocks
    try:
        if end <= _END_10 and blocks <= MAX_BLOCKS_10:
            if lba < _END_10:
                return _TRANSFER_10.pack(_READ_10, fua << 3 | dpo << 4, lba, 0, blocks, 0)
        elif end > _END_16:
            raise _out_of_range(lba, blocks)
        return _TRANSFER_16.pack(_READ_16, fua << 3 | dpo << 4, lba, blocks, 0, 0)
    except struct.error:
        raise _out_of_range(lba, blocks) from None


def write(*, lba: int, blocks: int, fua: bool = False, dpo: bool = False) -> bytes:
    """WRITE(10) where it can name these blocks, else WRITE(16).

    Raises:
        ValueError: negative, more than 2^32-1 blocks, or an end beyond 2^64.

    Source: SBC-3 §5.32, §5.34.
    """
    end = lba + blocks
    try:
        if end <= _END_10 and blocks <= MAX_BLOCKS_10:
            if lba < _END_10:
                return _TRANSFER_10.pack(_WRITE_10, fua << 3 | dpo << 4, lba, 0, blocks, 0)
        elif end > _END_16:
            raise _out_of_range(lba, blocks)
        return _TRANSFER_16.pack(_WRITE_16, fua << 3 | dpo << 4, lba, blocks, 0, 0)
    except struct.error:
        raise _out_of_range(lba, blocks) from None


def synchronize_cache_10(*, lba: int = 0, blocks: int = 0, immediate: bool = False) -> bytes:
    """SYNCHRONIZE CACHE(10).

    Args:
        lba: first block.
        blocks: at most 65535; 0 is everything from ``lba`` to the end of the medium.
        immediate: ask for status before the data is on the medium; then GOOD proves nothing.

    Raises:
        ValueError: an argument doesn't fit its field.

    Source: SBC-3 §5.26.
    """
    return pack(_TRANSFER_10, Opcode.SYNCHRONIZE_CACHE_10, immediate << 1, lba, 0, blocks, 0)


def synchronize_cache_16(*, lba: int = 0, blocks: int = 0, immediate: bool = False) -> bytes:
    """SYNCHRONIZE CACHE(16): as :func:`synchronize_cache_10` with wider fields. Source: SBC-3 §5.27."""
    return pack(_TRANSFER_16, Opcode.SYNCHRONIZE_CACHE_16, immediate << 1, lba, blocks, 0, 0)


def synchronize_cache(*, lba: int = 0, blocks: int = 0, immediate: bool = False) -> bytes:
    """SYNCHRONIZE CACHE(10) where it can name these blocks, else SYNCHRONIZE CACHE(16).

    Raises:
        ValueError: negative, more than 2^32-1 blocks, or an end beyond 2^64.

    Source: SBC-3 §5.26, §5.27.
    """
    if lba + blocks > _END_16:
        raise _out_of_range(lba, blocks)
    if lba < _END_10 and lba + blocks <= _END_10 and blocks <= MAX_BLOCKS_10:
        return synchronize_cache_10(lba=lba, blocks=blocks, immediate=immediate)
    return synchronize_cache_16(lba=lba, blocks=blocks, immediate=immediate)


def unmap(*, parameter_list_length: int) -> bytes:
    """UNMAP without ANCHOR; which blocks is in the parameter list, the command's data.

    Args:
        parameter_list_length: bytes, at most 65535.

    Raises:
        ValueError: the length doesn't fit its field.

    Source: SBC-3 §5.28.
    """
    return pack(_UNMAP, Opcode.UNMAP, 0, parameter_list_length, 0)
