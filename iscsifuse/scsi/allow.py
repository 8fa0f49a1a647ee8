"""The read-only allow-list: which CDBs may leave while a session is read-only.

This is a promise to people who have to swear that nothing was written, so it is a list of what is *known to
be harmless*, not of what is known to write. Everything that isn't on it is held back: operation codes and
service actions that nobody here has heard of, truncated CDBs, vendor specific ones, and harmless commands
with bits that make them less so:

- LOG SENSE with SP saves parameters on the device;
- VERIFY with BYTCHK takes data out, which has no place in a session that only reads;
- a CONTROL byte other than 0 (ACA, vendor specific bits) changes how the device goes on.

SYNCHRONIZE CACHE is absent because nothing was written that it could be needed for: sent to a disk that
others write to, it changes what is on the medium. START STOP UNIT is absent because it changes the device's
state.
"""

from iscsifuse.scsi._fields import Buffer
from iscsifuse.scsi.opcodes import MaintenanceIn, Opcode, PersistentReserveIn, ServiceActionIn16, cdb_length

__all__ = ["is_harmless"]

#: Harmless whatever their fields say.
_ALWAYS = frozenset(
    int(opcode)
    for opcode in (
        Opcode.TEST_UNIT_READY,
        Opcode.REQUEST_SENSE,
        Opcode.READ_6,
        Opcode.INQUIRY,
        Opcode.MODE_SENSE_6,
        Opcode.READ_CAPACITY_10,
        Opcode.READ_10,
        Opcode.MODE_SENSE_10,
        Opcode.READ_16,
        Opcode.REPORT_LUNS,
        Opcode.READ_12,
    )
)

#: Harmless with one of these values in the lower five bits of the second byte.
_SERVICE_ACTIONS: dict[int, frozenset[int]] = {
    Opcode.PERSISTENT_RESERVE_IN: frozenset(action.value for action in PersistentReserveIn),
    Opcode.SERVICE_ACTION_IN_16: frozenset(
        {ServiceActionIn16.READ_CAPACITY_16.value, ServiceActionIn16.GET_LBA_STATUS.value}
    ),
    Opcode.MAINTENANCE_IN: frozenset(
        {
            MaintenanceIn.REPORT_TARGET_PORT_GROUPS.value,
            MaintenanceIn.REPORT_SUPPORTED_OPERATION_CODES.value,
        }
    ),
}

#: Harmless where none of these bits of the second byte is set.
_FORBIDDEN_BITS: dict[int, int] = {
    Opcode.LOG_SENSE: 0x01,  # SP
    Opcode.VERIFY_10: 0x06,  # BYTCHK
    Opcode.VERIFY_16: 0x06,
}

_LONGEST = 16


def is_harmless(cdb: Buffer) -> bool:
    """Whether a CDB can change neither the medium nor any state of the device that matters.

    Args:
        cdb: as it would be sent; padding up to 16 bytes is allowed.

    Returns:
        True only for what is on the list; never raises.
    """
    if not cdb:
        return False
    opcode = cdb[0]
    length = cdb_length(opcode)
    # Every operation code on the list has a length of its own; 0 is the groups that haven't.
    if not 0 < length <= len(cdb) <= _LONGEST or cdb[length - 1] != 0:
        return False
    if opcode in _ALWAYS:
        return True
    actions = _SERVICE_ACTIONS.get(opcode)
    if actions is not None:
        return cdb[1] & 0x1F in actions
    forbidden = _FORBIDDEN_BITS.get(opcode)
    return forbidden is not None and not cdb[1] & forbidden
