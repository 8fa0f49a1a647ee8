"""The way back from a CDB to its fields, for the side that executes commands.

A CDB is read by one function for its operation code, chosen in a table; an operation code that isn't in the
table is still a :class:`ParsedCdb`, with nothing but the operation code, so that a target can refuse it by
name. Bytes beyond the length of the CDB are padding and aren't looked at.

Source: SPC-4 §6, SBC-3 §5.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi._fields import Buffer
from iscsifuse.scsi.opcodes import Opcode, ServiceActionIn16, cdb_length, service_action_of

__all__ = ["ParsedCdb", "decode"]

# operation code, flags, LBA, blocks: at the same place in every block command of a length
_BLOCKS_10 = struct.Struct(">BBIxH")
_BLOCKS_12 = struct.Struct(">BBII")
_BLOCKS_16 = struct.Struct(">BBQI")
_BLOCKS = {10: _BLOCKS_10, 12: _BLOCKS_12, 16: _BLOCKS_16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedCdb:
    """The fields of a CDB. Those that a command doesn't have are 0, False or None.

    Attributes:
        opcode: operation code; may be one that :class:`Opcode` doesn't know.
        service_action: of the commands that have one, else None.
        lba: logical block address.
        blocks: transfer length, number of blocks or verification length, in blocks. A 0 in READ(6) and
            WRITE(6) is told here as the 256 that it means.
        allocation_length: the most bytes of parameter data that the initiator takes.
        parameter_list_length: bytes of parameter data that the initiator sends.
        page: page code of INQUIRY, MODE SENSE or LOG SENSE.
        subpage: of MODE SENSE and LOG SENSE.
        page_control: MODE SENSE: 0 current, 1 changeable, 2 default, 3 saved values. LOG SENSE has it too.
        select_report: of REPORT LUNS.
        protect: RDPROTECT, WRPROTECT or VRPROTECT.
        bytchk: byte check of VERIFY and WRITE AND VERIFY, two bits.
        evpd: INQUIRY asks for a vital product data page.
        dbd: MODE SENSE asks for no block descriptors.
        descriptor: REQUEST SENSE asks for descriptor format.
        save: SP of LOG SENSE, LOG SELECT and MODE SELECT.
        fua: force unit access.
        dpo: disable page out.
        immediate: status is wanted before the operation has ended.
        start: of START STOP UNIT.
        load_eject: of START STOP UNIT.
        power_condition: of START STOP UNIT, four bits.
        unmap: of WRITE SAME.
        anchor: of WRITE SAME and UNMAP.
        ndob: no data-out buffer, of WRITE SAME(16).
    """

    opcode: int
    service_action: int | None = None
    lba: int = 0
    blocks: int = 0
    allocation_length: int = 0
    parameter_list_length: int = 0
    page: int = 0
    subpage: int = 0
    page_control: int = 0
    select_report: int = 0
    protect: int = 0
    bytchk: int = 0
    evpd: bool = False
    dbd: bool = False
    descriptor: bool = False
    save: bool = False
    fua: bool = False
    dpo: bool = False
    immediate: bool = False
    start: bool = False
    load_eject: bool = False
    power_condition: int = 0
    unmap: bool = False
    anchor: bool = False
    ndob: bool = False


def _number(cdb: bytes, start: int, size: int) -> int:
    return int.from_bytes(cdb[start : start + size], "big")


def _plain(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(opcode=cdb[0], service_action=service_action_of(cdb))


def _transfer_6(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(opcode=cdb[0], lba=_number(cdb, 1, 3) & 0x1FFFFF, blocks=cdb[4] or 256)


def _transfer(layout: struct.Struct) -> Callable[[bytes], ParsedCdb]:
    def parse(cdb: bytes) -> ParsedCdb:
        opcode, flags, lba, blocks = layout.unpack_from(cdb)
        return ParsedCdb(
            opcode=opcode,
            lba=lba,
            blocks=blocks,
            fua=bool(flags & 0x08),
            dpo=bool(flags & 0x10),
            protect=flags >> 5,
        )

    return parse


def _range(cdb: bytes) -> tuple[int, int]:
    """LBA and number of blocks of a 10-byte, 12-byte or 16-byte block command."""
    _, _, lba, blocks = _BLOCKS[cdb_length(cdb[0])].unpack_from(cdb)
    return lba, blocks


def _verify(cdb: bytes) -> ParsedCdb:
    lba, blocks = _range(cdb)
    return ParsedCdb(
        opcode=cdb[0],
        lba=lba,
        blocks=blocks,
        dpo=bool(cdb[1] & 0x10),
        protect=cdb[1] >> 5,
        bytchk=cdb[1] >> 1 & 3,
    )


def _synchronize_cache(cdb: bytes) -> ParsedCdb:
    lba, blocks = _range(cdb)
    return ParsedCdb(opcode=cdb[0], lba=lba, blocks=blocks, immediate=bool(cdb[1] & 0x02))


def _write_same(cdb: bytes) -> ParsedCdb:
    lba, blocks = _range(cdb)
    return ParsedCdb(
        opcode=cdb[0],
        lba=lba,
        blocks=blocks,
        protect=cdb[1] >> 5,
        anchor=bool(cdb[1] & 0x10),
        unmap=bool(cdb[1] & 0x08),
        # SBC-3 gives the bit a meaning in the 16-byte form alone.
        ndob=cdb[0] == Opcode.WRITE_SAME_16 and bool(cdb[1] & 0x01),
    )


def _compare_and_write(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(
        opcode=cdb[0],
        lba=_number(cdb, 2, 8),
        blocks=cdb[13],
        fua=bool(cdb[1] & 0x08),
        dpo=bool(cdb[1] & 0x10),
        protect=cdb[1] >> 5,
    )


def _unmap(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(opcode=cdb[0], parameter_list_length=_number(cdb, 7, 2), anchor=bool(cdb[1] & 0x01))


def _request_sense(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(opcode=cdb[0], allocation_length=cdb[4], descriptor=bool(cdb[1] & 0x01))


def _inquiry(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(opcode=cdb[0], allocation_length=_number(cdb, 3, 2), page=cdb[2], evpd=bool(cdb[1] & 0x01))


def _mode_sense_6(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(
        opcode=cdb[0],
        allocation_length=cdb[4],
        page=cdb[2] & 0x3F,
        page_control=cdb[2] >> 6,
        subpage=cdb[3],
        dbd=bool(cdb[1] & 0x08),
    )


def _mode_sense_10(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(
        opcode=cdb[0],
        allocation_length=_number(cdb, 7, 2),
        page=cdb[2] & 0x3F,
        page_control=cdb[2] >> 6,
        subpage=cdb[3],
        dbd=bool(cdb[1] & 0x08),
    )


def _log_sense(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(
        opcode=cdb[0],
        allocation_length=_number(cdb, 7, 2),
        page=cdb[2] & 0x3F,
        page_control=cdb[2] >> 6,
        subpage=cdb[3],
        save=bool(cdb[1] & 0x01),
    )


def _mode_select_6(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(opcode=cdb[0], parameter_list_length=cdb[4], save=bool(cdb[1] & 0x01))


def _mode_select_10(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(opcode=cdb[0], parameter_list_length=_number(cdb, 7, 2), save=bool(cdb[1] & 0x01))


def _start_stop_unit(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(
        opcode=cdb[0],
        immediate=bool(cdb[1] & 0x01),
        start=bool(cdb[4] & 0x01),
        load_eject=bool(cdb[4] & 0x02),
        power_condition=cdb[4] >> 4,
    )


def _report_luns(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(opcode=cdb[0], allocation_length=_number(cdb, 6, 4), select_report=cdb[2])


def _service_action_in_16(cdb: bytes) -> ParsedCdb:
    action = cdb[1] & 0x1F
    if action in (ServiceActionIn16.READ_CAPACITY_16, ServiceActionIn16.GET_LBA_STATUS):
        return ParsedCdb(
            opcode=cdb[0],
            service_action=action,
            lba=_number(cdb, 2, 8),
            allocation_length=_number(cdb, 10, 4),
        )
    return ParsedCdb(opcode=cdb[0], service_action=action)


def _maintenance_in(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(opcode=cdb[0], service_action=cdb[1] & 0x1F, allocation_length=_number(cdb, 6, 4))


def _persistent_reserve_in(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(opcode=cdb[0], service_action=cdb[1] & 0x1F, allocation_length=_number(cdb, 7, 2))


def _persistent_reserve_out(cdb: bytes) -> ParsedCdb:
    return ParsedCdb(opcode=cdb[0], service_action=cdb[1] & 0x1F, parameter_list_length=_number(cdb, 5, 4))


_DECODERS: dict[int, Callable[[bytes], ParsedCdb]] = {
    Opcode.READ_6: _transfer_6,
    Opcode.WRITE_6: _transfer_6,
    Opcode.READ_CAPACITY_10: lambda cdb: ParsedCdb(opcode=cdb[0], lba=_number(cdb, 2, 4)),
    Opcode.READ_10: _transfer(_BLOCKS_10),
    Opcode.WRITE_10: _transfer(_BLOCKS_10),
    Opcode.READ_12: _transfer(_BLOCKS_12),
    Opcode.WRITE_12: _transfer(_BLOCKS_12),
    Opcode.READ_16: _transfer(_BLOCKS_16),
    Opcode.WRITE_16: _transfer(_BLOCKS_16),
    Opcode.VERIFY_10: _verify,
    Opcode.VERIFY_12: _verify,
    Opcode.VERIFY_16: _verify,
    Opcode.WRITE_AND_VERIFY_10: _verify,
    Opcode.WRITE_AND_VERIFY_12: _verify,
    Opcode.WRITE_AND_VERIFY_16: _verify,
    Opcode.SYNCHRONIZE_CACHE_10: _synchronize_cache,
    Opcode.SYNCHRONIZE_CACHE_16: _synchronize_cache,
    Opcode.WRITE_SAME_10: _write_same,
    Opcode.WRITE_SAME_16: _write_same,
    Opcode.COMPARE_AND_WRITE: _compare_and_write,
    Opcode.UNMAP: _unmap,
    Opcode.REQUEST_SENSE: _request_sense,
    Opcode.INQUIRY: _inquiry,
    Opcode.MODE_SENSE_6: _mode_sense_6,
    Opcode.MODE_SENSE_10: _mode_sense_10,
    Opcode.LOG_SENSE: _log_sense,
    Opcode.MODE_SELECT_6: _mode_select_6,
    Opcode.MODE_SELECT_10: _mode_select_10,
    Opcode.START_STOP_UNIT: _start_stop_unit,
    Opcode.REPORT_LUNS: _report_luns,
    Opcode.SERVICE_ACTION_IN_16: _service_action_in_16,
    Opcode.MAINTENANCE_IN: _maintenance_in,
    Opcode.PERSISTENT_RESERVE_IN: _persistent_reserve_in,
    Opcode.PERSISTENT_RESERVE_OUT: _persistent_reserve_out,
}


def decode(cdb: Buffer) -> ParsedCdb:
    """The fields of a CDB.

    Args:
        cdb: as received; longer than the command's CDB is fine, the rest is padding.

    Returns:
        The fields; for an operation code that isn't known, nothing but that code (and its service action).

    Raises:
        ParameterDataError: the CDB is empty, or shorter than its operation code says.

    Source: SPC-4 §4.2.5.1.
    """
    if not cdb or len(cdb) < cdb_length(cdb[0]):
        raise ParameterDataError(f"a CDB of {len(cdb)} bytes is too short for its operation code")
    return _DECODERS.get(cdb[0], _plain)(bytes(cdb))
