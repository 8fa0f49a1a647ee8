"""The data of one command: collecting what a write brings, splitting what a read returns.

A write's data comes as immediate data, then unsolicited until F=1, and the rest is solicited in pieces of at most
MaxBurstLength, of which MaxOutstandingR2T are asked for at once. Of data that the command doesn't want
(the initiator declared more than the CDB says) what comes unsolicited is thrown away, and none is solicited.

Source: RFC 7143 §4.2.5, §11.7, §11.8.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from iscsifuse.iscsi.pdu import RESERVED_TAG
from iscsifuse.iscsi.request import DataOut, ScsiCommand
from iscsifuse.testing.keys import Agreed

__all__ = ["Collector", "Segment", "Solicitation", "segments"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One Data-In PDU.

    Attributes:
        offset: where its data begins.
        length: bytes of it.
        final: it ends a sequence (the F bit).
    """

    offset: int
    length: int
    final: bool


def segments(*, length: int, agreed: Agreed) -> Iterator[Segment]:
    """The Data-In PDUs that carry ``length`` bytes; none for no bytes.

    Source: RFC 7143 §11.7.1, §13.12, §13.13.
    """
    offset = 0
    while offset < length:
        burst_end = min(length, offset + agreed.max_burst_length)
        while offset < burst_end:
            count = min(agreed.initiator_max_recv, burst_end - offset)
            yield Segment(offset=offset, length=count, final=offset + count == burst_end)
            offset += count


@dataclass(slots=True, kw_only=True)
class Solicitation:
    """One R2T.

    Attributes:
        ttt: its tag.
        r2t_sn: its number.
        offset: of the data it asks for.
        length: bytes it asks for.
        done: bytes that came for it.
        data_sn: of the next PDU that answers it.
    """

    ttt: int
    r2t_sn: int
    offset: int
    length: int
    done: int = 0
    data_sn: int = 0


class Collector:
    """The data of one write.

    Args:
        command: the command, immediate data included.
        wanted: bytes that the command needs, at most what the initiator declares.
        agreed: what was negotiated.
        reverse: ask for the last piece first.

    Attributes:
        data: what came, ``wanted`` bytes when complete.
    """

    def __init__(self, command: ScsiCommand, *, wanted: int, agreed: Agreed, reverse: bool = False) -> None:
        self.data = bytearray(wanted)
        self._agreed = agreed
        self._unsolicited = not command.final
        self._position = 0
        self._data_sn = 0
        self._asked: dict[int, Solicitation] = {}
        self._pieces: deque[tuple[int, int]] = deque()
        self._r2t_sn = 0
        self._reverse = reverse
        self._take(command.data, offset=0)
        self._position = len(command.data)
        if not self._unsolicited:
            self._plan()

    @property
    def complete(self) -> bool:
        """Whether nothing more is to come."""
        return not (self._unsolicited or self._pieces or self._asked)

    def _take(self, data: bytes, *, offset: int) -> None:
        end = min(offset + len(data), len(self.data))
        if offset < end:
            self.data[offset:end] = memoryview(data)[: end - offset]

    def _plan(self) -> None:
        """The unsolicited part is over: cut the rest into pieces."""
        burst = self._agreed.max_burst_length
        end = len(self.data)
        self._pieces.extend((start, min(burst, end - start)) for start in range(self._position, end, burst))
        if self._reverse:
            self._pieces.reverse()

    def solicit(self, next_ttt: Iterator[int]) -> Iterator[Solicitation]:
        """What has to be asked for now."""
        while self._pieces and len(self._asked) < self._agreed.max_outstanding_r2t:
            offset, length = self._pieces.popleft()
            asked = Solicitation(ttt=next(next_ttt), r2t_sn=self._r2t_sn, offset=offset, length=length)
            self._r2t_sn += 1
            self._asked[asked.ttt] = asked
            yield asked

    def feed(self, pdu: DataOut) -> bool:
        """Take a Data-Out PDU.

        Returns:
            False where it doesn't belong here: an unknown tag, a wrong DataSN, or bytes that weren't asked for. The
            stream is in step all the same.
        """
        if pdu.ttt == RESERVED_TAG:
            if not self._unsolicited or pdu.buffer_offset != self._position or pdu.data_sn != self._data_sn:
                return False
            self._data_sn += 1
            self._take(pdu.data, offset=pdu.buffer_offset)
            self._position += len(pdu.data)
            if pdu.final:
                self._unsolicited = False
                self._plan()
            return True
        asked = self._asked.get(pdu.ttt)
        if (
            asked is None
            or pdu.buffer_offset != asked.offset + asked.done
            or asked.done + len(pdu.data) > asked.length
        ):
            return False
        self._take(pdu.data, offset=pdu.buffer_offset)
        asked.done += len(pdu.data)
        if asked.done == asked.length:
            del self._asked[pdu.ttt]
        elif pdu.final:
            return False
        return True
