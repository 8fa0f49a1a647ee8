"""Everything that an initiator sends, held against RFC 7143. One validator watches one connection.

It sees what really came (before a script touches it) and what really went out (after a script touched it), so it
knows exactly what the initiator can know: the window that was told, the R2Ts that were sent, which tasks are over. It
decides nothing: each violation is a sentence in a list, and the target goes on.

What is in flight is not held against the initiator: data that was asked for is welcome after its task has ended.
Source: RFC 7143 §4.2.2 (numbering), §4.2.5 (data), §6.3 (login), §11 (fields).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from iscsifuse.iscsi import serial
from iscsifuse.iscsi.pdu import BHS_LENGTH, RESERVED_TAG, Opcode, Pdu, split_lengths
from iscsifuse.iscsi.request import (
    DataOut,
    LoginRequest,
    LogoutRequest,
    NopOut,
    ScsiCommand,
    SnackRequest,
    Stage,
    TaskFunction,
    TaskManagementRequest,
    TextRequest,
)
from iscsifuse.iscsi.response import (
    R2T,
    DataIn,
    LoginResponse,
    LogoutResponse,
    NopIn,
    Reject,
    ScsiResponse,
    TargetPdu,
    TaskManagementResponse,
    TextResponse,
)
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.testing.burst import WriteBursts
from iscsifuse.testing.keys import Agreed
from iscsifuse.testing.lengths import Lengths

__all__ = ["Validator"]

_LOGIN_DATA = 8192
_MAX_ATTRIBUTE = 4
_REMEMBERED = 256

Numbered = ScsiCommand | TextRequest | NopOut | TaskManagementRequest | LogoutRequest


@dataclass(slots=True)
class _Task:
    """What an Initiator Task Tag stands for."""

    pdu: Pdu
    bursts: WriteBursts | None = None
    over: bool = False


class Validator:
    """Watches one connection.

    Args:
        violations: where the sentences go.
        label: put in front of each sentence.
    """

    def __init__(self, violations: list[str], *, label: str = "") -> None:
        self._violations = violations
        self._lengths: Callable[[bytes, bytes], Lengths | None] = lambda _lun, _cdb: None
        self._label = label
        self._agreed: Agreed | None = None
        self._login: LoginRequest | None = None
        self._stage: int | None = None
        self._cmd_sn: int | None = None
        self._exp_cmd_sn = 0
        self._max_cmd_sn: int | None = None
        self._exp_stat_sn: int | None = None
        self._next_stat_sn: int | None = None
        self._tasks: dict[int, _Task] = {}
        self._recent: dict[int, Pdu] = {}
        self._pings: dict[int, NopIn] = {}
        self._texts: dict[int, TextResponse] = {}
        self._logged_out = False

    # -- what comes ------------------------------------------------------------------------------------------------

    def note(self, sentence: str) -> None:
        """One more violation, found elsewhere."""
        self._violations.append(f"{self._label}{sentence}")

    def received(self, pdu: Pdu, *, header: bytes | None = None, pad: bytes = b"") -> None:
        """A PDU came.

        Args:
            pdu: the PDU.
            header: its 48 bytes as they came, or None where they aren't known.
            pad: the bytes after its data.
        """
        what = f"{pdu.OPCODE.name} (itt {pdu.itt:#x})"
        for problem in self._problems(pdu, header, pad):
            self.note(f"{what}: {problem}")

    def _problems(self, pdu: Pdu, header: bytes | None, pad: bytes) -> Iterator[str]:
        yield from _format(pdu, header, pad)
        limit = self._agreed.target_max_recv if self._agreed else _LOGIN_DATA
        if len(pdu.data) > limit:
            yield f"a data segment of {len(pdu.data)} bytes, but {limit} is the limit"
        if self._logged_out:
            yield "came after a logout"
        if isinstance(pdu, LoginRequest):
            yield from self._login_request(pdu)
            return
        if self._agreed is None:
            yield "came during the login"
            return
        yield from self._acknowledged(pdu)
        if isinstance(pdu, DataOut):
            yield from self._data_out(pdu)
        elif isinstance(pdu, ScsiCommand | TextRequest | NopOut | TaskManagementRequest | LogoutRequest):
            if not (isinstance(pdu, NopOut) and pdu.itt == RESERVED_TAG):
                yield from self._tag(pdu)
            yield from self._numbered(pdu)
            yield from self._by_kind(pdu)

    def _acknowledged(self, pdu: Pdu) -> Iterator[str]:
        """ExpStatSN never goes back, and never beyond what was sent."""
        if not isinstance(
            pdu,
            ScsiCommand | TextRequest | NopOut | TaskManagementRequest | LogoutRequest | DataOut | SnackRequest,
        ):
            return
        number = pdu.exp_stat_sn
        if self._next_stat_sn is not None and serial.less(self._next_stat_sn, number):
            yield f"ExpStatSN {number}, but only {serial.add(self._next_stat_sn, -1)} was sent"
        elif self._exp_stat_sn is not None and serial.less(number, self._exp_stat_sn):
            yield f"ExpStatSN {number} after {self._exp_stat_sn}"
        else:
            self._exp_stat_sn = number

    def _numbered(self, pdu: Numbered) -> Iterator[str]:
        """CmdSN: one more for each command that isn't immediate, and never beyond the window."""
        if pdu.cmd_sn != self._cmd_sn:
            yield f"CmdSN {pdu.cmd_sn} where {self._cmd_sn} was due"
        if pdu.immediate:
            return
        if self._max_cmd_sn is not None and serial.less(self._max_cmd_sn, pdu.cmd_sn):
            yield f"CmdSN {pdu.cmd_sn} beyond MaxCmdSN {self._max_cmd_sn}"
        self._cmd_sn = serial.add(pdu.cmd_sn, 1)

    def _tag(self, pdu: Numbered) -> Iterator[str]:
        if pdu.itt == RESERVED_TAG:
            yield "the reserved Initiator Task Tag"
            return
        known = self._tasks.get(pdu.itt)
        if known is not None and not known.over:
            if isinstance(pdu, TextRequest) and isinstance(known.pdu, TextRequest) and pdu.ttt != RESERVED_TAG:
                return  # the next request of a text exchange
            yield f"the tag of a task that isn't over ({known.pdu.OPCODE.name})"
        self._tasks[pdu.itt] = _Task(pdu)

    def _by_kind(self, pdu: Numbered) -> Iterator[str]:
        match pdu:
            case ScsiCommand():
                yield from self._scsi_command(pdu)
            case NopOut():
                yield from self._nop_out(pdu)
            case TextRequest():
                yield from self._text(pdu)
            case TaskManagementRequest():
                yield from self._task_management(pdu)
            case LogoutRequest():
                self._logged_out = True
                if pdu.data:
                    yield "a data segment"

    def _scsi_command(self, pdu: ScsiCommand) -> Iterator[str]:
        if pdu.attribute > _MAX_ATTRIBUTE:
            yield f"ATTR {pdu.attribute}"
        length = cdbs.cdb_length(pdu.cdb[0])
        if length and any(pdu.cdb[length:]):
            yield f"bytes after the {length} of the CDB aren't zero"
        if pdu.read and pdu.write:
            yield "R and W in one command"
        elif not (pdu.read or pdu.write) and pdu.expected_data_transfer_length:
            yield f"expects {pdu.expected_data_transfer_length} bytes with neither R nor W"
        yield from self._transfer(pdu)
        bursts = WriteBursts(pdu, self._agreed or Agreed())
        self._tasks[pdu.itt] = _Task(pdu, bursts)
        yield from bursts.begin()

    def _transfer(self, pdu: ScsiCommand) -> Iterator[str]:
        moves = self._lengths(pdu.lun, pdu.cdb)
        if moves is None:
            return
        name = cdbs.name(pdu.cdb)
        if bool(moves.data_in) != pdu.read:
            yield f"R={int(pdu.read)} in {name} that moves {moves.data_in} bytes in"
        if bool(moves.data_out) != pdu.write:
            yield f"W={int(pdu.write)} in {name} that moves {moves.data_out} bytes out"
        if pdu.expected_data_transfer_length != (moves.data_in or moves.data_out):
            yield (
                f"expects {pdu.expected_data_transfer_length} bytes, but {name} moves "
                f"{moves.data_in or moves.data_out}"
            )

    def _nop_out(self, pdu: NopOut) -> Iterator[str]:
        if pdu.itt != RESERVED_TAG:
            if pdu.ttt != RESERVED_TAG:
                yield f"a ping with TTT {pdu.ttt:#x}"
            return
        if not pdu.immediate:
            yield "an answer to a ping that isn't immediate"
        if pdu.ttt == RESERVED_TAG:
            return  # allowed: it only acknowledges
        ping = self._pings.pop(pdu.ttt, None)
        if ping is None:
            yield f"an answer to a ping with TTT {pdu.ttt:#x}, which wasn't sent"
        elif ping.lun != pdu.lun:
            yield f"an answer to a ping with LUN {pdu.lun.hex()}, not the ping's"

    def _text(self, pdu: TextRequest) -> Iterator[str]:
        """Source: RFC 7143 §11.10.4: the tag and the LUN of the response go back as they were."""
        if pdu.cont and pdu.final:
            yield "C=1 with F=1"
        answered = self._texts.pop(pdu.itt, None)
        if pdu.ttt == RESERVED_TAG:
            return
        if answered is None:
            yield f"TTT {pdu.ttt:#x} in a request that answers no response"
        elif (pdu.ttt, pdu.lun) != (answered.ttt, answered.lun):
            yield (
                f"TTT {pdu.ttt:#x} and LUN {pdu.lun.hex()}, but the response had {answered.ttt:#x} and "
                f"{answered.lun.hex()}"
            )

    def _task_management(self, pdu: TaskManagementRequest) -> Iterator[str]:
        if pdu.data:
            yield "a data segment"
        if pdu.function != TaskFunction.ABORT_TASK:
            if pdu.referenced_task_tag != RESERVED_TAG:
                yield f"Referenced Task Tag {pdu.referenced_task_tag:#x} in function {pdu.function}"
            return
        task = self._tasks.get(pdu.referenced_task_tag)
        # The task's response may have crossed this request.
        meant = self._recent.get(pdu.referenced_task_tag) if task is None else task.pdu
        if not isinstance(meant, ScsiCommand):
            yield f"ABORT TASK of tag {pdu.referenced_task_tag:#x}, which no command has"
            return
        if meant.lun != pdu.lun:
            yield f"ABORT TASK with LUN {pdu.lun.hex()}, not the task's"
        if meant.cmd_sn != pdu.ref_cmd_sn:
            yield f"RefCmdSN {pdu.ref_cmd_sn}, but the task's is {meant.cmd_sn}"

    def _data_out(self, pdu: DataOut) -> Iterator[str]:
        task = self._tasks.get(pdu.itt)
        if task is None or task.bursts is None:
            yield "data for a tag that no command has"
            return
        yield from task.bursts.data_out(pdu)
        if task.over:
            self._end(pdu.itt)
        if pdu.ttt != RESERVED_TAG:
            return
        # Unsolicited data comes in the order of the commands (RFC 7143 §4.2.5.2 with §11.3.4).
        for other in self._tasks.values():
            if other is task:
                break
            if other.bursts is not None and other.bursts.unsolicited is not None and not other.over:
                yield f"unsolicited data before that of itt {other.pdu.itt:#x} has ended"

    # -- login -----------------------------------------------------------------------------------------------------

    def _login_request(self, pdu: LoginRequest) -> Iterator[str]:
        if self._agreed is not None:
            yield "came in the full feature phase"
            return
        first = self._login
        if first is None:
            self._login = pdu
            self._cmd_sn = pdu.cmd_sn
            if pdu.itt == RESERVED_TAG:
                yield "the reserved Initiator Task Tag"
        else:
            names = ("isid", "tsih", "cid", "itt", "cmd_sn", "version_max", "version_min")
            for name in names:
                if getattr(pdu, name) != getattr(first, name):
                    yield f"{name} changed from {getattr(first, name)!r} to {getattr(pdu, name)!r} during the login"
            if self._next_stat_sn is not None and pdu.exp_stat_sn != self._next_stat_sn:
                yield f"ExpStatSN {pdu.exp_stat_sn} where {self._next_stat_sn} was due"
        if pdu.cont and pdu.transit:
            yield "C=1 with T=1"
        if pdu.transit and pdu.nsg <= pdu.csg:
            yield f"NSG {pdu.nsg} isn't after CSG {pdu.csg}"
        if not pdu.transit and pdu.nsg:
            yield f"NSG {pdu.nsg} without T"
        if pdu.csg not in (Stage.SECURITY_NEGOTIATION, Stage.LOGIN_OPERATIONAL_NEGOTIATION):
            yield f"CSG {pdu.csg}"
        elif self._stage is not None and pdu.csg != self._stage:
            yield f"CSG {pdu.csg} where {self._stage} was due"
        self._stage = pdu.csg

    def know(self, *, lengths: Callable[[bytes, bytes], Lengths | None]) -> None:
        """Which target this is about.

        Args:
            lengths: what a command to a LUN (eight bytes) moves by its CDB, or None where that isn't known.
        """
        self._lengths = lengths

    def full_feature(self, agreed: Agreed) -> None:
        """The login is over; call it before its last response is sent."""
        self._agreed = agreed

    # -- what goes out ---------------------------------------------------------------------------------------------

    def sent(self, pdu: Pdu) -> None:
        """A PDU is about to go out."""
        if isinstance(pdu, TargetPdu):
            self._told(pdu)
        match pdu:
            case LoginResponse():
                if pdu.transit:
                    self._stage = pdu.nsg
            case R2T():
                task = self._tasks.get(pdu.itt)
                if task is not None and task.bursts is not None:
                    task.bursts.solicit(pdu)
            case NopIn():
                if pdu.ttt != RESERVED_TAG:
                    self._pings[pdu.ttt] = pdu
                self._end(pdu.itt)
            case DataIn():
                if pdu.has_status:
                    self._end(pdu.itt)
            case TextResponse():
                if pdu.final:
                    self._end(pdu.itt)
                else:
                    self._texts[pdu.itt] = pdu
            case TaskManagementResponse():
                self._abort(pdu.itt)
                self._end(pdu.itt)
            case ScsiResponse() | LogoutResponse():
                self._end(pdu.itt)
            case Reject():
                self._rejected(pdu.data)
            case _:
                pass

    def _told(self, pdu: TargetPdu) -> None:
        """StatSN and window as an initiator understands them. Source: RFC 7143 §4.2.2.1."""
        counts = not isinstance(pdu, R2T) and not (isinstance(pdu, DataIn) and not pdu.has_status)
        if counts:
            ping = isinstance(pdu, NopIn) and pdu.itt == RESERVED_TAG
            self._next_stat_sn = pdu.stat_sn if ping else serial.add(pdu.stat_sn, 1)
        if serial.less(pdu.max_cmd_sn, serial.add(pdu.exp_cmd_sn, -1)):
            return
        if self._max_cmd_sn is None or serial.less(self._max_cmd_sn, pdu.max_cmd_sn):
            self._max_cmd_sn = pdu.max_cmd_sn

    def _end(self, itt: int) -> None:
        task = self._tasks.get(itt)
        if task is None:
            return
        if task.bursts is not None and task.bursts.in_flight:
            task.over = True
            return
        del self._tasks[itt]
        self._recent[itt] = task.pdu
        if len(self._recent) > _REMEMBERED:
            del self._recent[next(iter(self._recent))]

    def _abort(self, itt: int) -> None:
        """The tasks that a task management function took away are over."""
        request = self._tasks.get(itt)
        if request is None or not isinstance(request.pdu, TaskManagementRequest):
            return
        function = request.pdu
        for tag, task in list(self._tasks.items()):
            if not isinstance(task.pdu, ScsiCommand):
                continue
            match function.function:
                case TaskFunction.ABORT_TASK:
                    hit = tag == function.referenced_task_tag
                case TaskFunction.TARGET_WARM_RESET | TaskFunction.TARGET_COLD_RESET:
                    hit = True
                case _:
                    hit = task.pdu.lun == function.lun
            if hit:
                self._end(tag)

    def _rejected(self, header: bytes) -> None:
        if len(header) >= BHS_LENGTH and header[0] & 0x3F not in (Opcode.DATA_OUT, Opcode.SNACK_REQUEST):
            self._end(int.from_bytes(header[16:20], "big"))


def _format(pdu: Pdu, header: bytes | None, pad: bytes) -> Iterator[str]:
    """Reserved fields and padding are zeros; our codec writes them so, and drops what it doesn't know."""
    if header is not None:
        # The lengths are compared by the codec, and a validator may be shown a PDU without its data.
        expected = bytearray(pdu.header())
        expected[4:8] = header[4:8]
        wrong = [index for index in range(BHS_LENGTH) if header[index] != expected[index]]
        if wrong:
            yield f"reserved bits are set, or fixed ones aren't, at byte {', '.join(map(str, wrong))}"
        ahs_length, _ = split_lengths(header)
        if ahs_length:
            yield f"{ahs_length} bytes of additional headers"
    if any(pad):
        yield "padding that isn't zero"
