"""The data of one write, as an initiator has to send it.

Three kinds of data may belong to a command: *immediate* (in the command PDU), *unsolicited* (Data-Out without a
Target Transfer Tag, announced by F=0 in the command), and *solicited* (Data-Out that answer an R2T, by its tag). Each
unsolicited or solicited sequence starts with DataSN 0, is contiguous, ends with the F bit, and has exactly its
length.

A :class:`WriteBursts` is told what was sent and received, and says what was wrong with it.
Source: RFC 7143 §4.2.5.2, §11.3.4, §11.7, §13.11, §13.14.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from iscsifuse.iscsi.pdu import NO_LUN, RESERVED_TAG
from iscsifuse.iscsi.request import DataOut, ScsiCommand
from iscsifuse.iscsi.response import R2T
from iscsifuse.testing.keys import Agreed

__all__ = ["WriteBursts"]


@dataclass(slots=True)
class _Sequence:
    """A run of Data-Out PDUs that is under way."""

    offset: int
    length: int
    done: int = 0
    data_sn: int = 0


@dataclass(slots=True)
class WriteBursts:
    """The sequences of one command.

    Attributes:
        command: the command.
        agreed: what was negotiated.
        unsolicited: the sequence that F=0 announced, until its end.
    """

    command: ScsiCommand
    agreed: Agreed
    unsolicited: _Sequence | None = None
    _solicited: dict[int, _Sequence] = field(default_factory=dict)

    def begin(self) -> Iterator[str]:
        """What is wrong with the command's own data and F bit."""
        command, agreed = self.command, self.agreed
        immediate = len(command.data)
        first = min(agreed.first_burst_length, command.expected_data_transfer_length)
        if immediate and not command.write:
            yield f"{immediate} bytes of immediate data in a command that isn't a write"
        elif immediate and not agreed.immediate_data:
            yield f"{immediate} bytes of immediate data, but ImmediateData is No"
        if immediate > first:
            yield f"{immediate} bytes of immediate data, but the first burst has {first}"
        if command.final:
            return
        if not command.write:
            yield "F=0 in a command that isn't a write"
        elif agreed.initial_r2t:
            yield "F=0 in a command, but InitialR2T is Yes"
        elif immediate >= first:
            yield "F=0 in a command, but nothing is left of the first burst"
        else:
            self.unsolicited = _Sequence(immediate, first - immediate)

    @property
    def in_flight(self) -> bool:
        """Whether a sequence was announced or asked for that hasn't come whole."""
        return self.unsolicited is not None or bool(self._solicited)

    def solicit(self, pdu: R2T) -> None:
        """An R2T goes out."""
        self._solicited[pdu.ttt] = _Sequence(pdu.buffer_offset, pdu.desired_data_transfer_length)

    def data_out(self, pdu: DataOut) -> Iterator[str]:
        """What is wrong with a Data-Out PDU."""
        if pdu.ttt == RESERVED_TAG:
            sequence, what = self.unsolicited, "unsolicited data"
            if sequence is None:
                yield "unsolicited data that wasn't announced, or after its end"
                return
            if pdu.lun not in (NO_LUN, self.command.lun):
                yield f"unsolicited data with LUN {pdu.lun.hex()}"
        else:
            found, what = self._solicited.get(pdu.ttt), f"data for TTT {pdu.ttt:#x}"
            if found is None:
                yield f"{what}, which no R2T has, or after its end"
                return
            sequence = found
            if pdu.lun != self.command.lun:
                yield f"{what} with LUN {pdu.lun.hex()}, not the R2T's"
        yield from _follow(sequence, pdu, what)
        if pdu.final and pdu.ttt == RESERVED_TAG:
            self.unsolicited = None
        elif pdu.final:
            del self._solicited[pdu.ttt]


def _follow(sequence: _Sequence, pdu: DataOut, what: str) -> Iterator[str]:
    """Take a PDU into its sequence, whatever is wrong with it."""
    if not pdu.data:
        yield f"{what}: a PDU without data"
    if pdu.data_sn != sequence.data_sn:
        yield f"{what}: DataSN {pdu.data_sn} where {sequence.data_sn} was due"
    due = sequence.offset + sequence.done
    if pdu.buffer_offset != due:
        yield f"{what}: offset {pdu.buffer_offset} where {due} was due"
    sequence.data_sn = pdu.data_sn + 1
    sequence.done += len(pdu.data)
    if sequence.done > sequence.length:
        yield f"{what}: {sequence.done} bytes where {sequence.length} were due"
    elif pdu.final and sequence.done < sequence.length:
        yield f"{what}: F after {sequence.done} bytes where {sequence.length} were due"
    elif not pdu.final and sequence.done == sequence.length:
        yield f"{what}: no F after the last of {sequence.length} bytes"
