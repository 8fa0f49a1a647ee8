"""One SCSI command on its way: what has moved, what may move, and how it ended.

::

    QUEUED ──submit──> SENT ──Data-In / R2T──> SENT ──status──> DONE
                         └────────session lost, aborted───────> DONE (error)

Invariants:

* ``buffer_in`` is written by nobody but the receiver, and by the receiver only until the task is done; whoever
  submitted it must not look at it before.
* ``buffer_out`` doesn't change until the task is done: an R2T may ask for the same range again (RFC 7143 §11.8).
* A read is a success only if every byte that status and residual claim has arrived (`Task.shortfall`); a write only
  if every byte was asked for. GOOD alone is not believed.

Source: RFC 7143 §11.3-11.4, §11.7-11.8.
"""

from collections.abc import Callable

from iscsifuse.errors import FormatError, IscsifuseError, ProtocolError, TransferError
from iscsifuse.iscsi.serial import MASK, less
from iscsifuse.quick import known

__all__ = ["Task"]

_GOOD = 0x00
_MAX_REPEATS = 16
"""How many times over a target may ask for the bytes of a write. Data that was damaged on its way is worth a few
repetitions; a target that goes on and on would have us pile up more than it ever takes."""


@known
class Task:
    """A SCSI command, from its submission to its end.

    Args:
        cdb: at most 16 bytes.
        lun: the 8 bytes of the LUN, as REPORT LUNS gave them.
        buffer_in: where Data-In goes: writable, contiguous; its length is the expected data transfer length.
        buffer_out: what a write carries; its length is the expected data transfer length.
        exact: whether a GOOD status for more or fewer bytes than expected is an error (it is for media, not for
            INQUIRY).

    Raises:
        ValueError: a CDB or a LUN that would not travel as it is.

    Attributes:
        itt: Initiator Task Tag, once it was sent.
        cmd_sn: CmdSN, once it was sent.
        status: SAM status, once it is done without ``error``.
        sense: sense data without its length, empty where there was none.
        residual: residual count; ``underflow`` and ``overflow`` say of which kind.
        received: bytes that arrived in ``buffer_in``.
        solicited: ``buffer_out`` was sent up to here without a gap (bytes).
        error: why there is no status.
        done: whether it is over.
        started: for the caller's use: when it was submitted (seconds of its clock).
        waiter: for the caller's use: called, and taken away, when it is done.
    """

    __slots__ = (
        "_ahead",
        "_asked",
        "buffer_in",
        "buffer_out",
        "cdb",
        "cmd_sn",
        "done",
        "error",
        "exact",
        "expected",
        "itt",
        "lun",
        "next_data_sn",
        "next_r2t_sn",
        "overflow",
        "received",
        "residual",
        "sense",
        "solicited",
        "started",
        "status",
        "underflow",
        "waiter",
    )

    def __init__(
        self,
        cdb: bytes,
        *,
        lun: bytes,
        buffer_in: memoryview | None = None,
        buffer_out: memoryview | None = None,
        exact: bool = False,
    ) -> None:
        if len(cdb) > 16 or len(lun) != 8:
            raise ValueError(f"a CDB of {len(cdb)} bytes, a LUN of {len(lun)}")  # the encoder would cut or pad it
        self.cdb = cdb
        self.lun = lun
        self.buffer_in = buffer_in
        self.buffer_out = buffer_out
        self.exact = exact
        self.expected = len(buffer_in or b"") + len(buffer_out or b"")
        self.itt = -1
        self.cmd_sn = -1
        self.next_data_sn = 0
        self.next_r2t_sn = 0
        self.received = 0
        self.solicited = 0
        self._ahead: list[tuple[int, int]] = []  # ranges that were sent beyond a gap: apart, ascending
        self._asked = 0  # bytes that were asked for, repetitions included
        self.status = -1
        self.sense = b""
        self.residual = 0
        self.underflow = False
        self.overflow = False
        self.error: IscsifuseError | None = None
        self.done = False
        self.started = 0.0
        self.waiter: Callable[[], None] | None = None

    def place(self, *, data_sn: int, offset: int, length: int) -> memoryview | None:
        """Where the data of a Data-In goes.

        Returns:
            The memory, or None where the PDU is a duplicate and its data is to be thrown away.

        Raises:
            ProtocolError: a gap in DataSN or in the offsets, or bytes beyond the expected length. DataPDUInOrder
                and DataSequenceInOrder are always Yes here, so the offset can only be the next one.

        Source: RFC 7143 §11.7.4-11.7.5, §7.9.
        """
        if data_sn != self.next_data_sn:
            if less(data_sn, self.next_data_sn):
                return None
            raise ProtocolError(f"a Data-In is missing: DataSN {data_sn} came where {self.next_data_sn} was due")
        self.next_data_sn = (data_sn + 1) & MASK
        buffer = self.buffer_in
        if buffer is None:
            raise ProtocolError("a Data-In for a command that reads nothing")
        end = offset + length
        if offset != self.received or end > len(buffer):
            raise ProtocolError(
                f"a Data-In of {length} bytes at offset {offset}: {self.received} of {len(buffer)} bytes were there"
            )
        self.received = end
        return buffer[offset:end]

    def take_r2t(self, *, r2t_sn: int, offset: int, length: int, max_burst_length: int) -> memoryview:
        """What an R2T asks for.

        Raises:
            ProtocolError: it isn't the next one, or asks for nothing, or for bytes that the command doesn't have, or
                for more than MaxBurstLength, or for the same bytes over and over.

        Source: RFC 7143 §11.8.
        """
        buffer = self.buffer_out
        if buffer is None:
            raise ProtocolError("an R2T for a command that writes nothing")
        if r2t_sn != self.next_r2t_sn:
            raise ProtocolError(f"an R2T is missing: R2TSN {r2t_sn} came where {self.next_r2t_sn} was due")
        if not 0 < length <= max_burst_length or offset + length > len(buffer):
            raise ProtocolError(f"an R2T for {length} bytes at offset {offset} of a write of {len(buffer)} bytes")
        self._asked += length
        if self._asked > _MAX_REPEATS * len(buffer):
            raise ProtocolError(f"R2Ts for {self._asked} bytes of a write of {len(buffer)}")
        self.next_r2t_sn = (r2t_sn + 1) & MASK
        self._count_solicited(offset, offset + length)
        return buffer[offset : offset + length]

    def _count_solicited(self, start: int, end: int) -> None:
        """Count each byte once: ranges may be asked for out of order, and again."""
        if start <= self.solicited and not self._ahead:
            self.solicited = max(self.solicited, end)
            return
        ranges = [(0, self.solicited)]
        for first, last in sorted([*self._ahead, (start, end)]):
            if first <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(ranges[-1][1], last))
            else:
                ranges.append((first, last))
        self.solicited = ranges[0][1]
        self._ahead = ranges[1:]

    def take_back(self, *, offset: int, length: int) -> bool:
        """Data that was sent was thrown away: it doesn't count any more, unless an R2T asks for it again.

        Returns:
            Whether it counted.

        Source: RFC 7143 §7.3.
        """
        ranges = [(0, self.solicited), *self._ahead]
        before = [(first, min(last, offset)) for first, last in ranges if first < offset]
        after = [(max(first, offset + length), last) for first, last in ranges if last > offset + length]
        kept = before + after
        self.solicited = kept.pop(0)[1] if kept and kept[0][0] == 0 else 0
        self._ahead = kept
        return [(0, self.solicited), *kept] != ranges

    def finish(self, *, status: int, residual: int, underflow: bool, overflow: bool) -> None:
        """The status came: judge whether it can be true.

        A success that doesn't account for every byte becomes ``error`` (TransferError).
        """
        self.done = True
        self.status = status
        self.residual = residual if underflow or overflow else 0
        self.underflow = underflow
        self.overflow = overflow
        if (
            status == _GOOD
            and self.error is None
            and not (
                # A read that got every byte, and no word of a residual: `shortfall` would find nothing.
                self.received == self.expected and self.buffer_out is None and not (underflow or overflow)
            )
        ):
            self.error = self.shortfall()

    def shortfall(self) -> TransferError | None:
        """Why not every byte can have been moved, or None where all were.

        `finish` asks this where the status is GOOD. Whoever takes another status for a success (RECOVERED ERROR,
        CONDITION MET) has to ask, too.

        Source: RFC 7143 §11.4.4-11.4.5.
        """
        expected = self.expected
        residual = self.residual
        if self.buffer_out is not None:
            if self.underflow or self.overflow:
                return TransferError(
                    f"the target reported success but a residual of {residual} bytes of a write of {expected}"
                )
            if self.solicited < expected:
                return TransferError(
                    f"the target reported success but asked for {self.solicited} of {expected} bytes"
                )
        elif self.buffer_in is not None:
            received = self.received
            if self.exact:
                if received != expected:
                    return TransferError(f"the target reported success but sent {received} of {expected} bytes")
                if self.underflow or self.overflow:  # its idea of the command isn't ours: another block length, maybe
                    return TransferError(
                        f"the target reported success but a residual of {residual} bytes of a read of {expected}"
                    )
            elif self.underflow and received + residual < expected:
                return TransferError(
                    f"the target said that {residual} of {expected} bytes are missing, but sent {received}"
                )
        return None

    def take_sense(self, segment: bytes) -> None:
        """Keep the sense data of a response's data segment: two bytes of SenseLength, then the sense data.

        Raises:
            FormatError: SenseLength reaches beyond the segment.

        Source: RFC 7143 §11.4.7.
        """
        if len(segment) < 2:
            raise FormatError(f"a response whose data segment of {len(segment)} bytes holds no SenseLength")
        length = segment[0] << 8 | segment[1]
        if length > len(segment) - 2:
            raise FormatError(f"SenseLength {length} in a data segment of {len(segment)} bytes")
        self.sense = segment[2 : 2 + length]

    def fail(self, error: IscsifuseError) -> None:
        """End it without a status."""
        self.done = True
        if self.error is None:
            self.error = error
