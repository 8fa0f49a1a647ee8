"""The names of SCSI commands: operation codes, service actions, and how long a CDB is.

An operation code's upper three bits are its *group*, and the group fixes the length of the CDB (SPC-4
§4.2.5.1). Some operation codes are shared by several commands that a *service action* in the second byte
tells apart; the only place that knows which is the table :data:`SERVICE_ACTIONS`.

iSCSI always carries at least 16 bytes of CDB, so one that is longer than its group says is normal: the rest
is padding.
"""

from enum import IntEnum

from iscsifuse.scsi._fields import Buffer

__all__ = [
    "SERVICE_ACTIONS",
    "MaintenanceIn",
    "Opcode",
    "PersistentReserveIn",
    "PersistentReserveOut",
    "ServiceActionIn16",
    "cdb_length",
    "name",
    "service_action_of",
]


class Opcode(IntEnum):
    """Operation codes of SPC-4 and SBC-3 (and a few older ones). Source: SPC-4 annex D.2, SBC-3 annex A."""

    TEST_UNIT_READY = 0x00
    REZERO_UNIT = 0x01
    REQUEST_SENSE = 0x03
    FORMAT_UNIT = 0x04
    REASSIGN_BLOCKS = 0x07
    READ_6 = 0x08
    WRITE_6 = 0x0A
    SEEK_6 = 0x0B
    INQUIRY = 0x12
    MODE_SELECT_6 = 0x15
    RESERVE_6 = 0x16
    RELEASE_6 = 0x17
    COPY = 0x18
    MODE_SENSE_6 = 0x1A
    START_STOP_UNIT = 0x1B
    RECEIVE_DIAGNOSTIC_RESULTS = 0x1C
    SEND_DIAGNOSTIC = 0x1D
    PREVENT_ALLOW_MEDIUM_REMOVAL = 0x1E
    READ_CAPACITY_10 = 0x25
    READ_10 = 0x28
    WRITE_10 = 0x2A
    SEEK_10 = 0x2B
    WRITE_AND_VERIFY_10 = 0x2E
    VERIFY_10 = 0x2F
    PRE_FETCH_10 = 0x34
    SYNCHRONIZE_CACHE_10 = 0x35
    READ_DEFECT_DATA_10 = 0x37
    WRITE_BUFFER = 0x3B
    READ_BUFFER_10 = 0x3C
    READ_LONG_10 = 0x3E
    WRITE_LONG_10 = 0x3F
    WRITE_SAME_10 = 0x41
    UNMAP = 0x42
    SANITIZE = 0x48
    LOG_SELECT = 0x4C
    LOG_SENSE = 0x4D
    XDWRITEREAD_10 = 0x53
    MODE_SELECT_10 = 0x55
    RESERVE_10 = 0x56
    RELEASE_10 = 0x57
    MODE_SENSE_10 = 0x5A
    PERSISTENT_RESERVE_IN = 0x5E
    PERSISTENT_RESERVE_OUT = 0x5F
    VARIABLE_LENGTH = 0x7F
    THIRD_PARTY_COPY_OUT = 0x83
    THIRD_PARTY_COPY_IN = 0x84
    ATA_PASS_THROUGH_16 = 0x85
    READ_16 = 0x88
    COMPARE_AND_WRITE = 0x89
    WRITE_16 = 0x8A
    READ_ATTRIBUTE = 0x8C
    WRITE_ATTRIBUTE = 0x8D
    WRITE_AND_VERIFY_16 = 0x8E
    VERIFY_16 = 0x8F
    PRE_FETCH_16 = 0x90
    SYNCHRONIZE_CACHE_16 = 0x91
    WRITE_SAME_16 = 0x93
    ZBC_OUT = 0x94
    ZBC_IN = 0x95
    WRITE_ATOMIC_16 = 0x9C
    SERVICE_ACTION_IN_16 = 0x9E
    SERVICE_ACTION_OUT_16 = 0x9F
    REPORT_LUNS = 0xA0
    ATA_PASS_THROUGH_12 = 0xA1
    SECURITY_PROTOCOL_IN = 0xA2
    MAINTENANCE_IN = 0xA3
    MAINTENANCE_OUT = 0xA4
    READ_12 = 0xA8
    SERVICE_ACTION_OUT_12 = 0xA9
    WRITE_12 = 0xAA
    SERVICE_ACTION_IN_12 = 0xAB
    WRITE_AND_VERIFY_12 = 0xAE
    VERIFY_12 = 0xAF
    SECURITY_PROTOCOL_OUT = 0xB5
    READ_DEFECT_DATA_12 = 0xB7


class ServiceActionIn16(IntEnum):
    """Service actions of SERVICE ACTION IN(16) that only report something. Source: SBC-3 annex A."""

    READ_CAPACITY_16 = 0x10
    READ_LONG_16 = 0x11
    GET_LBA_STATUS = 0x12
    REPORT_REFERRALS = 0x13


class MaintenanceIn(IntEnum):
    """Service actions of MAINTENANCE IN. Source: SPC-4 annex D.3."""

    REPORT_IDENTIFYING_INFORMATION = 0x05
    REPORT_TARGET_PORT_GROUPS = 0x0A
    REPORT_ALIASES = 0x0B
    REPORT_SUPPORTED_OPERATION_CODES = 0x0C
    REPORT_SUPPORTED_TASK_MANAGEMENT_FUNCTIONS = 0x0D
    REPORT_PRIORITY = 0x0E
    REPORT_TIMESTAMP = 0x0F


class PersistentReserveIn(IntEnum):
    """Service actions of PERSISTENT RESERVE IN. Source: SPC-4 §6.13.1."""

    READ_KEYS = 0x00
    READ_RESERVATION = 0x01
    REPORT_CAPABILITIES = 0x02
    READ_FULL_STATUS = 0x03


class PersistentReserveOut(IntEnum):
    """Service actions of PERSISTENT RESERVE OUT. Source: SPC-4 §6.14.2."""

    REGISTER = 0x00
    RESERVE = 0x01
    RELEASE = 0x02
    CLEAR = 0x03
    PREEMPT = 0x04
    PREEMPT_AND_ABORT = 0x05
    REGISTER_AND_IGNORE_EXISTING_KEY = 0x06
    REGISTER_AND_MOVE = 0x07


#: Which service actions have a name, by operation code. Those that are not here carry the operation code's
#: name.
SERVICE_ACTIONS: dict[int, type[IntEnum]] = {
    Opcode.SERVICE_ACTION_IN_16: ServiceActionIn16,
    Opcode.MAINTENANCE_IN: MaintenanceIn,
    Opcode.PERSISTENT_RESERVE_IN: PersistentReserveIn,
    Opcode.PERSISTENT_RESERVE_OUT: PersistentReserveOut,
}

#: Operation codes whose second byte holds a service action in its lower five bits.
_HAS_SERVICE_ACTION = frozenset(
    {
        Opcode.PERSISTENT_RESERVE_IN,
        Opcode.PERSISTENT_RESERVE_OUT,
        Opcode.SANITIZE,
        Opcode.THIRD_PARTY_COPY_OUT,
        Opcode.THIRD_PARTY_COPY_IN,
        Opcode.ZBC_OUT,
        Opcode.ZBC_IN,
        Opcode.SERVICE_ACTION_IN_16,
        Opcode.SERVICE_ACTION_OUT_16,
        Opcode.MAINTENANCE_IN,
        Opcode.MAINTENANCE_OUT,
        Opcode.SERVICE_ACTION_OUT_12,
        Opcode.SERVICE_ACTION_IN_12,
    }
)

# Groups 3 (variable length), 6 and 7 (vendor specific) say nothing about the length: 0.
_GROUP_LENGTH = (6, 10, 10, 0, 16, 12, 0, 0)


def _words(member: IntEnum) -> str:
    """READ_CAPACITY_16 is written "READ CAPACITY(16)"."""
    head, _, tail = member.name.rpartition("_")
    return f"{head.replace('_', ' ')}({tail})" if tail.isdigit() else member.name.replace("_", " ")


_OPCODE_WORDS: dict[int, str] = {
    **{member.value: _words(member) for member in Opcode},
    # Hyphens can't be had from a Python name.
    Opcode.PRE_FETCH_10: "PRE-FETCH(10)",
    Opcode.PRE_FETCH_16: "PRE-FETCH(16)",
    Opcode.THIRD_PARTY_COPY_OUT: "THIRD-PARTY COPY OUT",
    Opcode.THIRD_PARTY_COPY_IN: "THIRD-PARTY COPY IN",
    Opcode.ATA_PASS_THROUGH_12: "ATA PASS-THROUGH(12)",
    Opcode.ATA_PASS_THROUGH_16: "ATA PASS-THROUGH(16)",
    Opcode.VARIABLE_LENGTH: "variable length command",
}


def _action_words(opcode: int, action: IntEnum) -> str:
    if opcode in (Opcode.PERSISTENT_RESERVE_IN, Opcode.PERSISTENT_RESERVE_OUT):
        # "READ KEYS" or "RELEASE" alone would be taken for a command of its own.
        return f"{_OPCODE_WORDS[opcode]}, {_words(action)}"
    return _words(action)


_SERVICE_ACTION_WORDS: dict[tuple[int, int], str] = {
    (opcode, action.value): _action_words(opcode, action)
    for opcode, actions in SERVICE_ACTIONS.items()
    for action in actions
}


def cdb_length(opcode: int) -> int:
    """How many bytes a CDB with this operation code has: 6, 10, 12 or 16.

    Returns:
        The length, or 0 where the operation code's group doesn't fix it (variable length, vendor specific).

    Source: SPC-4 §4.2.5.1.
    """
    return _GROUP_LENGTH[opcode >> 5]


def service_action_of(cdb: Buffer) -> int | None:
    """The service action of a CDB, or None where its operation code has none or the CDB ends before it."""
    if not cdb:
        return None
    if cdb[0] == Opcode.VARIABLE_LENGTH:
        return int.from_bytes(cdb[8:10], "big") if len(cdb) >= 10 else None
    if len(cdb) < 2 or cdb[0] not in _HAS_SERVICE_ACTION:
        return None
    return cdb[1] & 0x1F


def name(cdb: Buffer) -> str:
    """What a CDB is called in the standards: "READ(10)", "GET LBA STATUS".

    Args:
        cdb: any bytes; never raises.

    Returns:
        The command's name, with the service action as a number where that has no name, or "opcode 0xC1".
    """
    if not cdb:
        return "empty CDB"
    opcode = cdb[0]
    words = _OPCODE_WORDS.get(opcode)
    if words is None:
        return f"opcode 0x{opcode:02X}"
    action = service_action_of(cdb)
    if action is None:
        return words
    return _SERVICE_ACTION_WORDS.get((opcode, action)) or f"{words}, service action 0x{action:02X}"
