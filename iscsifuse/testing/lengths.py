"""How many bytes a command moves, and which way, by its CDB alone.

The engine solicits that much; the validator compares it with what an initiator declares. Source: SPC-4 §6, SBC-3 §5.
"""

from collections.abc import Callable
from dataclasses import dataclass

from iscsifuse.scsi.cdb import Opcode, ParsedCdb, ServiceActionIn16

__all__ = ["Lengths", "lengths"]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Bytes that a command moves at most.

    Attributes:
        data_in: to the initiator.
        data_out: from it.
    """

    data_in: int = 0
    data_out: int = 0


_NOTHING = Lengths()


def _reads(cdb: ParsedCdb, block_length: int) -> Lengths:
    return Lengths(data_in=cdb.blocks * block_length)


def _writes(cdb: ParsedCdb, block_length: int) -> Lengths:
    return Lengths(data_out=cdb.blocks * block_length)


def _verify(cdb: ParsedCdb, block_length: int) -> Lengths:
    # BYTCHK: 0 moves nothing, 1 every block, 3 a single block that all are compared with.
    return Lengths(data_out={1: cdb.blocks, 3: 1}.get(cdb.bytchk, 0) * block_length)


def _write_same(cdb: ParsedCdb, block_length: int) -> Lengths:
    return Lengths(data_out=0 if cdb.ndob else block_length)


def _allocated(cdb: ParsedCdb, block_length: int) -> Lengths:  # noqa: ARG001 - one signature for all
    return Lengths(data_in=cdb.allocation_length)


def _listed(cdb: ParsedCdb, block_length: int) -> Lengths:  # noqa: ARG001
    return Lengths(data_out=cdb.parameter_list_length)


def _capacity_10(cdb: ParsedCdb, block_length: int) -> Lengths:  # noqa: ARG001
    return Lengths(data_in=8)


def _nothing(cdb: ParsedCdb, block_length: int) -> Lengths:  # noqa: ARG001
    return _NOTHING


_TABLE: dict[int, Callable[[ParsedCdb, int], Lengths]] = {
    Opcode.TEST_UNIT_READY: _nothing,
    Opcode.START_STOP_UNIT: _nothing,
    Opcode.PREVENT_ALLOW_MEDIUM_REMOVAL: _nothing,
    Opcode.SYNCHRONIZE_CACHE_10: _nothing,
    Opcode.SYNCHRONIZE_CACHE_16: _nothing,
    Opcode.READ_CAPACITY_10: _capacity_10,
    Opcode.READ_6: _reads,
    Opcode.READ_10: _reads,
    Opcode.READ_12: _reads,
    Opcode.READ_16: _reads,
    Opcode.WRITE_6: _writes,
    Opcode.WRITE_10: _writes,
    Opcode.WRITE_12: _writes,
    Opcode.WRITE_16: _writes,
    Opcode.WRITE_AND_VERIFY_10: _writes,
    Opcode.WRITE_AND_VERIFY_12: _writes,
    Opcode.WRITE_AND_VERIFY_16: _writes,
    Opcode.VERIFY_10: _verify,
    Opcode.VERIFY_12: _verify,
    Opcode.VERIFY_16: _verify,
    Opcode.WRITE_SAME_10: _write_same,
    Opcode.WRITE_SAME_16: _write_same,
    Opcode.UNMAP: _listed,
    Opcode.MODE_SELECT_6: _listed,
    Opcode.MODE_SELECT_10: _listed,
    Opcode.PERSISTENT_RESERVE_OUT: _listed,
    Opcode.INQUIRY: _allocated,
    Opcode.REQUEST_SENSE: _allocated,
    Opcode.REPORT_LUNS: _allocated,
    Opcode.MODE_SENSE_6: _allocated,
    Opcode.MODE_SENSE_10: _allocated,
    Opcode.LOG_SENSE: _allocated,
    Opcode.MAINTENANCE_IN: _allocated,
    Opcode.PERSISTENT_RESERVE_IN: _allocated,
}


def lengths(cdb: ParsedCdb, *, block_length: int) -> Lengths | None:
    """What the command moves, or None where its operation code (or service action) isn't known.

    Args:
        cdb: the command.
        block_length: bytes in a block of its logical unit.
    """
    if cdb.opcode == Opcode.SERVICE_ACTION_IN_16:
        known = cdb.service_action in (ServiceActionIn16.READ_CAPACITY_16, ServiceActionIn16.GET_LBA_STATUS)
        return _allocated(cdb, block_length) if known else None
    found = _TABLE.get(cdb.opcode)
    return None if found is None else found(cdb, block_length)
