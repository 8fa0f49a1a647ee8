"""How a command ends: a status, sense data, and what it moved.

A command that can't be done raises :class:`SenseError` wherever that is found out; the engine makes an
:class:`Outcome` of it. Source: SAM-5 §5.3, SPC-4 §4.5.
"""

from dataclasses import dataclass

from iscsifuse.scsi.sense import Sense, SenseKey
from iscsifuse.scsi.status import Status

__all__ = ["Outcome", "SenseError", "illegal_request"]

_FIXED = 0x70
_DESCRIPTOR = 0x72


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a command.

    Attributes:
        status: SAM status.
        sense: sense data, encoded; empty for most statuses.
        data_in: bytes for the initiator, not cut to what it expects.
    """

    status: int = Status.GOOD
    sense: bytes = b""
    data_in: bytes = b""


class SenseError(Exception):
    """A command ends with CHECK CONDITION.

    Attributes:
        key: sense key.
        asc: additional sense code.
        ascq: its qualifier.
        information: for the INFORMATION field, or None.
        data_in: what was read before.
    """

    def __init__(
        self, key: SenseKey, asc: int, ascq: int = 0, *, information: int | None = None, data_in: bytes = b""
    ) -> None:
        super().__init__(f"{key.name} {asc:02X}h/{ascq:02X}h")
        self.key = key
        self.asc = asc
        self.ascq = ascq
        self.information = information
        self.data_in = data_in

    def outcome(self, *, descriptor: bool = False) -> Outcome:
        """As the end of a command.

        Args:
            descriptor: use the descriptor format; so is used where the INFORMATION field needs more than 32 bits.
        """
        wide = self.information is not None and self.information > 0xFFFFFFFF
        sense = Sense(
            key=self.key,
            asc=self.asc,
            ascq=self.ascq,
            information=self.information,
            response_code=_DESCRIPTOR if descriptor or wide else _FIXED,
        )
        return Outcome(status=Status.CHECK_CONDITION, sense=sense.encode(), data_in=self.data_in)


def illegal_request(asc: int, ascq: int = 0) -> SenseError:
    """ILLEGAL REQUEST for a reason: 20h operation code, 21h LBA, 24h field in the CDB, 26h field in the list."""
    return SenseError(SenseKey.ILLEGAL_REQUEST, asc, ascq)
