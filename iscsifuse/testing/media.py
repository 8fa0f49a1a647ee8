"""The commands that touch blocks, on one disk.

Every function gets a CDB whose range was checked (see ``scsi_engine``) and returns the data for the initiator. What
can't be done raises SenseError, and leaves the blocks as they were. Source: SBC-3 §5.
"""

from collections.abc import Callable

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi import lba_status
from iscsifuse.scsi import unmap as unmap_list
from iscsifuse.scsi.cdb import Opcode, ParsedCdb
from iscsifuse.scsi.sense import SenseKey
from iscsifuse.testing.disk import BadBlockError, Disk
from iscsifuse.testing.outcome import SenseError, illegal_request
from iscsifuse.testing.parameter_data import MAX_UNMAP_BLOCKS, MAX_UNMAP_RANGES

__all__ = ["CHANGES_MEDIUM", "HANDLERS", "Data", "Handler", "check_range", "get_lba_status"]

Data = bytes | bytearray
Handler = Callable[[Disk, ParsedCdb, Data], bytes]

_PATTERN_BYTES = 1 << 20
_BYTES_IN_DESCRIPTOR = 16

CHANGES_MEDIUM = frozenset(
    {
        Opcode.WRITE_6,
        Opcode.WRITE_10,
        Opcode.WRITE_12,
        Opcode.WRITE_16,
        Opcode.WRITE_AND_VERIFY_10,
        Opcode.WRITE_AND_VERIFY_12,
        Opcode.WRITE_AND_VERIFY_16,
        Opcode.WRITE_SAME_10,
        Opcode.WRITE_SAME_16,
        Opcode.UNMAP,
    }
)
"""What a write-protected disk refuses."""

_TRANSFERS = frozenset(
    {
        Opcode.READ_6,
        Opcode.READ_10,
        Opcode.READ_12,
        Opcode.READ_16,
        *CHANGES_MEDIUM - {Opcode.WRITE_SAME_10, Opcode.WRITE_SAME_16, Opcode.UNMAP},
    }
)


def check_range(disk: Disk, cdb: ParsedCdb) -> None:
    """Whether the blocks that a CDB names are there, may be named at once, and protection isn't asked for.

    Raises:
        SenseError: 21/00 out of range, 24/00 too many blocks, or protection information that the disk doesn't have.
    """
    if cdb.protect:
        raise illegal_request(0x24)
    if cdb.lba + cdb.blocks > disk.blocks:
        raise illegal_request(0x21)
    if cdb.opcode in _TRANSFERS and 0 < disk.max_transfer_blocks < cdb.blocks:
        raise illegal_request(0x24)


def _read(disk: Disk, cdb: ParsedCdb, data: Data) -> bytes:  # noqa: ARG001 - all handlers have one signature
    try:
        return disk.read(lba=cdb.lba, blocks=cdb.blocks)
    except BadBlockError as error:
        before = disk.read(lba=cdb.lba, blocks=error.lba - cdb.lba)
        raise SenseError(SenseKey.MEDIUM_ERROR, 0x11, information=error.lba, data_in=before) from None


def _write(disk: Disk, cdb: ParsedCdb, data: Data) -> bytes:
    # Fewer bytes than the CDB names came where the initiator declared fewer: whole blocks of them are written.
    usable = len(data) - len(data) % disk.block_length
    try:
        disk.write(memoryview(data)[:usable], lba=cdb.lba, stable=cdb.fua)
    except BadBlockError as error:
        raise SenseError(SenseKey.MEDIUM_ERROR, 0x0C, information=error.lba) from None
    return b""


def _write_and_verify(disk: Disk, cdb: ParsedCdb, data: Data) -> bytes:
    # Verifying reads the medium, so what was written has to be on it.
    _write(disk, cdb, data)
    disk.synchronize(lba=cdb.lba, blocks=cdb.blocks)
    return b""


def _compare(disk: Disk, *, lba: int, expected: Data) -> None:
    """Raises SenseError (1D/00) where the blocks from ``lba`` on don't hold these bytes."""
    found = _read(disk, ParsedCdb(opcode=Opcode.READ_16, lba=lba, blocks=len(expected) // disk.block_length), b"")
    if found != expected:
        # The first byte that differs, found as the highest bit of two long numbers' difference.
        difference = int.from_bytes(found, "big") ^ int.from_bytes(expected, "big")
        offset = len(found) - (difference.bit_length() + 7) // 8
        raise SenseError(SenseKey.MISCOMPARE, 0x1D, information=offset)


def _verify(disk: Disk, cdb: ParsedCdb, data: Data) -> bytes:
    if cdb.bytchk == 0:
        _read(disk, cdb, b"")
    elif cdb.bytchk == 1:
        _compare(disk, lba=cdb.lba, expected=data)
    elif cdb.bytchk == 3:
        for lba in range(cdb.lba, cdb.lba + cdb.blocks):
            _compare(disk, lba=lba, expected=data)
    else:
        raise illegal_request(0x24)
    return b""


def _write_same(disk: Disk, cdb: ParsedCdb, data: Data) -> bytes:
    blocks = cdb.blocks or disk.blocks - cdb.lba
    if cdb.anchor or (cdb.unmap and not disk.thin):
        raise illegal_request(0x24)
    if not cdb.ndob and len(data) != disk.block_length:
        raise illegal_request(0x24)
    pattern = bytes(disk.block_length) if cdb.ndob else data
    if cdb.unmap and not any(pattern):
        disk.unmap(lba=cdb.lba, blocks=blocks)
        return b""
    at_once = max(1, _PATTERN_BYTES // disk.block_length)
    for start in range(0, blocks, at_once):
        count = min(at_once, blocks - start)
        disk.write(pattern * count, lba=cdb.lba + start)
    return b""


def _unmap(disk: Disk, cdb: ParsedCdb, data: Data) -> bytes:
    if not disk.thin:
        raise illegal_request(0x20)
    if cdb.parameter_list_length == 0:
        return b""
    try:
        ranges = unmap_list.decode(data)
    except ParameterDataError:
        raise illegal_request(0x1A) from None
    if len(ranges) > MAX_UNMAP_RANGES or sum(entry.blocks for entry in ranges) > MAX_UNMAP_BLOCKS:
        raise illegal_request(0x26)
    if any(entry.lba + entry.blocks > disk.blocks for entry in ranges):
        raise illegal_request(0x21)
    for entry in ranges:
        disk.unmap(lba=entry.lba, blocks=entry.blocks)
    return b""


def _synchronize_cache(disk: Disk, cdb: ParsedCdb, data: Data) -> bytes:  # noqa: ARG001
    disk.synchronize(lba=cdb.lba, blocks=cdb.blocks)
    return b""


def get_lba_status(disk: Disk, cdb: ParsedCdb) -> bytes:
    """GET LBA STATUS: as many extents as the allocation length has room for.

    Raises:
        SenseError: the disk isn't thin, the LBA is out of range, or there is no room for one extent.
    """
    if not disk.thin:
        raise illegal_request(0x20)
    if cdb.lba >= disk.blocks:
        raise illegal_request(0x21)
    if cdb.allocation_length < 8 + _BYTES_IN_DESCRIPTOR:
        raise illegal_request(0x24)
    limit = (cdb.allocation_length - 8) // _BYTES_IN_DESCRIPTOR
    return lba_status.encode(disk.extents(lba=cdb.lba, limit=limit))


HANDLERS: dict[int, Handler] = {
    Opcode.READ_6: _read,
    Opcode.READ_10: _read,
    Opcode.READ_12: _read,
    Opcode.READ_16: _read,
    Opcode.WRITE_6: _write,
    Opcode.WRITE_10: _write,
    Opcode.WRITE_12: _write,
    Opcode.WRITE_16: _write,
    Opcode.WRITE_AND_VERIFY_10: _write_and_verify,
    Opcode.WRITE_AND_VERIFY_12: _write_and_verify,
    Opcode.WRITE_AND_VERIFY_16: _write_and_verify,
    Opcode.VERIFY_10: _verify,
    Opcode.VERIFY_12: _verify,
    Opcode.VERIFY_16: _verify,
    Opcode.WRITE_SAME_10: _write_same,
    Opcode.WRITE_SAME_16: _write_same,
    Opcode.UNMAP: _unmap,
    Opcode.SYNCHRONIZE_CACHE_10: _synchronize_cache,
    Opcode.SYNCHRONIZE_CACHE_16: _synchronize_cache,
}
"""By operation code."""
