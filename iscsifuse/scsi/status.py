"""Status codes: the one byte with which every command ends.

Which of them is worth a retry is a policy and lives with the initiator; here are only their numbers and
names.

Source: SAM-5 §5.3.1.
"""

from enum import IntEnum

__all__ = ["Status", "words"]


class Status(IntEnum):
    """SAM status codes, without the obsolete ones. Source: SAM-5 §5.3.1."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    CONDITION_MET = 0x04
    BUSY = 0x08
    RESERVATION_CONFLICT = 0x18
    TASK_SET_FULL = 0x28
    ACA_ACTIVE = 0x30
    TASK_ABORTED = 0x40


_WORDS: dict[int, str] = {member.value: member.name.replace("_", " ") for member in Status}


def words(status: int) -> str:
    """What a status byte is called: "CHECK CONDITION", or "status 0x99" where it has no name."""
    return _WORDS.get(status) or f"status 0x{status:02X}"
