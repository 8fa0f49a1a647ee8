"""What a rule can do to a PDU, and the steps that this comes to.

An :class:`Action` turns one PDU into steps and does nothing itself (:class:`Call` excepted, which is there to make
something happen). Steps are carried out by whoever owns the byte stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from iscsifuse.iscsi.pdu import BHS_LENGTH, Pdu, decode, split_lengths
from iscsifuse.iscsi.request import ScsiCommand
from iscsifuse.iscsi.response import DataIn, ScsiResponse

__all__ = [
    "Action",
    "Answer",
    "Call",
    "Change",
    "ChangeBytes",
    "Close",
    "Cut",
    "Delay",
    "Drop",
    "Duplicate",
    "End",
    "Hang",
    "Inject",
    "Late",
    "Pass",
    "Pause",
    "Stall",
    "Step",
    "SwapWithNext",
    "reparse",
    "sense_segment",
]


@dataclass(frozen=True, slots=True)
class Pass:
    """Step: let this go on.

    Attributes:
        payload: a PDU, or bytes as they travel.
        answer: for a command on its way in: what to answer without executing it.
        late: for a command on its way in: seconds before it is executed.
    """

    payload: Pdu | bytes
    answer: "Answer | None" = None
    late: float = 0.0


@dataclass(frozen=True, slots=True)
class Pause:
    """Step: nothing more goes this way for some seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class End:
    """Step: end the connection, with RST or with FIN."""

    reset: bool


@dataclass(frozen=True, slots=True)
class Hang:
    """Step: nothing more goes this way, and the connection stays open."""


Step = Pass | Pause | End | Hang


class Action(Protocol):
    """What a rule does to one PDU."""

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        """The steps that replace it.

        Args:
            pdu: the PDU that matched.
            encode: makes the bytes that would travel, digests included.
        """


@dataclass(frozen=True, slots=True)
class Change:
    """Another PDU in its place."""

    function: Callable[[Pdu], Pdu]

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        return (Pass(self.function(pdu)),)


@dataclass(frozen=True, slots=True)
class ChangeBytes:
    """Other bytes in its place; digests are not made right again."""

    function: Callable[[bytes], bytes]

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        """See :class:`Action`."""
        return (Pass(self.function(encode(pdu))),)


@dataclass(frozen=True, slots=True)
class Drop:
    """Nothing in its place."""

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        return ()


@dataclass(frozen=True, slots=True)
class Delay:
    """It, and all that follows it, some seconds later."""

    seconds: float

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        return Pause(self.seconds), Pass(pdu)


@dataclass(frozen=True, slots=True)
class Late:
    """A SCSI command on its way in is executed some seconds later; others overtake it."""

    seconds: float

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        return (Pass(pdu, late=self.seconds),)


@dataclass(frozen=True, slots=True)
class Duplicate:
    """It, and as many copies."""

    copies: int = 1

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        return (Pass(pdu),) * (1 + self.copies)


@dataclass(frozen=True, slots=True)
class SwapWithNext:
    """The next PDU that goes this way comes first (or what a rule makes of it); without one, it never comes."""

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`. The channel does the holding."""
        return (Pass(pdu),)


@dataclass(frozen=True, slots=True)
class Close:
    """The end of the connection in its place, or right after it."""

    reset: bool = False
    after: bool = False

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        return (Pass(pdu), End(self.reset)) if self.after else (End(self.reset),)


@dataclass(frozen=True, slots=True)
class Cut:
    """Its first bytes, then the end of the connection; on the way in it is as if only these had come."""

    after: int
    reset: bool = False

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        """See :class:`Action`."""
        return Pass(encode(pdu)[: self.after]), End(self.reset)


@dataclass(frozen=True, slots=True)
class Stall:
    """Its first bytes (none, if not told), then silence on an open connection."""

    after: int = 0

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        """See :class:`Action`."""
        return Pass(encode(pdu)[: self.after]), Hang()


@dataclass(frozen=True, slots=True)
class Inject:
    """Other PDUs before and after it; made from it, where a function is given."""

    before: Sequence[Pdu | bytes | Callable[[Pdu], Pdu]] = ()
    after: Sequence[Pdu | bytes | Callable[[Pdu], Pdu]] = ()

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""

        def made(items: Sequence[Pdu | bytes | Callable[[Pdu], Pdu]]) -> list[Step]:
            return [Pass(item if isinstance(item, Pdu | bytes) else item(pdu)) for item in items]

        return *made(self.before), Pass(pdu), *made(self.after)


@dataclass(frozen=True, slots=True)
class Call:
    """It goes on, and something happens first: a power cut, a new capacity, a closed window."""

    function: Callable[[], object]

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        self.function()
        return (Pass(pdu),)


@dataclass(frozen=True, slots=True)
class Answer:
    """This status for a SCSI command.

    On the way in the command is not executed. On the way out, on the PDU that carries its status, it was
    executed, and this is told instead.

    Attributes:
        status: the SAM status.
        sense: sense data, or none.
        response: the iSCSI response code.
    """

    status: int
    sense: bytes = b""
    response: int = 0

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        if isinstance(pdu, ScsiCommand):
            return (Pass(pdu, answer=self),)
        if isinstance(pdu, ScsiResponse) or (isinstance(pdu, DataIn) and pdu.has_status):
            return (
                Pass(
                    ScsiResponse(
                        itt=pdu.itt,
                        stat_sn=pdu.stat_sn,
                        exp_cmd_sn=pdu.exp_cmd_sn,
                        max_cmd_sn=pdu.max_cmd_sn,
                        response=self.response,
                        status=self.status,
                        data=sense_segment(self.sense),
                    )
                ),
            )
        return (Pass(pdu),)


def sense_segment(sense: bytes) -> bytes:
    """The data segment of a SCSI Response. Source: RFC 7143 §11.4.7.2."""
    return len(sense).to_bytes(2, "big") + sense if sense else b""


def reparse(payload: bytes) -> Pdu | None:
    """The PDU that these bytes are, without digests; None where they are no whole PDU.

    Raises:
        FormatError: the operation code is unknown.
    """
    if len(payload) < BHS_LENGTH:
        return None
    ahs_length, data_length = split_lengths(payload)
    start = BHS_LENGTH + ahs_length
    if len(payload) < start + data_length:
        return None
    return decode(payload[:BHS_LENGTH], ahs=payload[BHS_LENGTH:start], data=payload[start : start + data_length])
