"""The full feature phase of one session, which has one connection.

**Order.** A numbered PDU is acted on when its CmdSN is due; one that is early, but inside the window, is kept; one outside is
ignored silently. Immediate PDUs are acted on at once. SCSI commands then collect their data side by side, and one executor
performs them: in the order of arrival, or (``reorder``) any that is ready, chosen by a seeded generator.

**The window.** MaxCmdSN leaves room for as many commands as ``window`` says, less those that aren't done. It is told with
every PDU, and never goes back. A window that is made smaller closes as commands come in.

**The end.** ``run`` returns when the initiator logged out or the wire ended; whoever runs it takes the session off the list
then. Tasks end with it, unexecuted. `end` may be called from anywhere at any time.

Source: RFC 7143 §4.2.2 (numbering), §11.3-11.19; SAM-5 §7 (task management).
"""

import itertools
import random
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import trio

from iscsifuse.iscsi import serial
from iscsifuse.iscsi.pdu import NO_LUN, RESERVED_TAG, Pdu
from iscsifuse.iscsi.request import (
    DataOut,
    LogoutReason,
    LogoutRequest,
    NopOut,
    ScsiCommand,
    TaskFunction,
    TaskManagementRequest,
    TextRequest,
)
from iscsifuse.iscsi.response import (
    R2T,
    AsyncMessage,
    DataIn,
    LogoutResponse,
    NopIn,
    Reject,
    RejectReason,
    ScsiResponse,
    TaskManagementResponse,
    TaskResponse,
)
from iscsifuse.scsi.sense import SenseKey
from iscsifuse.scsi.status import Status
from iscsifuse.testing.config import TargetConfig
from iscsifuse.testing.discovery import TextExchange
from iscsifuse.testing.keys import Agreed
from iscsifuse.testing.lengths import Lengths
from iscsifuse.testing.outcome import Outcome, SenseError
from iscsifuse.testing.script import sense_segment
from iscsifuse.testing.scsi_engine import ScsiEngine
from iscsifuse.testing.transfer import Collector, segments
from iscsifuse.testing.wire import Incoming, Wire, WireClosedError

__all__ = ["Session", "SessionIdentity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionIdentity:
    """Who is at the other end, and of what.

    Attributes:
        initiator_name: of the initiator.
        isid: six bytes.
        target_name: of the target; empty in a discovery session.
        tsih: the handle that this target gave.
        cid: of the connection.
    """

    initiator_name: str
    isid: bytes
    target_name: str
    tsih: int
    cid: int

    @property
    def nexus(self) -> Hashable:
        """What an I_T nexus is: initiator port and target."""
        return self.initiator_name, self.isid, self.target_name


@dataclass(slots=True, eq=False)
class _Task:
    """A SCSI command that isn't done.

    Attributes:
        command: the command.
        moves: what it moves by its CDB.
        collector: its data, where it is a write.
        outcome: how it ended already, before it was executed.
        response: iSCSI response code that a script wants.
        ready: it may be executed.
        delayed: its latency has been started.
        late: seconds that a script wants it to wait.
    """

    command: ScsiCommand
    moves: Lengths
    collector: Collector | None = None
    outcome: Outcome | None = None
    response: int = 0
    ready: bool = False
    delayed: bool = False
    late: float = 0.0


class Session:
    """One session.

    Args:
        wire: its connection.
        config: how to behave.
        identity: who it is with.
        agreed: what was negotiated.
        engine: the disks, or None in a discovery session.
        cmd_sn: CmdSN of the first command.
        stat_sn: StatSN of the next response.
        listing: the text that SendTargets with this value is answered with, or None to refuse it.

    Attributes:
        window: commands that may be outstanding; change it at any time.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        config: TargetConfig,
        identity: SessionIdentity,
        agreed: Agreed,
        engine: ScsiEngine | None,
        cmd_sn: int,
        stat_sn: int,
        listing: Callable[[str], bytes | None],
    ) -> None:
        self.wire = wire
        self.identity = identity
        self.agreed = agreed
        self.window = config.window
        self._config = config
        self._engine = engine
        self._exp_cmd_sn = cmd_sn
        self._max_cmd_sn = serial.add(cmd_sn, config.window - 1)
        self._stat_sn = stat_sn
        self._early: dict[int, Incoming] = {}
        self._tasks: dict[int, _Task] = {}
        self._order: deque[_Task] = deque()
        self._something_ready = trio.Event()
        self._ttts = itertools.count(1)
        self._random = None if config.reorder is None else random.Random(config.reorder)  # noqa: S311
        self._text = TextExchange(
            listing=listing,
            limit=min(config.text_chunk or agreed.initiator_max_recv, agreed.initiator_max_recv),
            next_ttt=self._ttts,
        )
        self._nursery: trio.Nursery | None = None
        self._logged_out = False

    # -- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until the initiator logs out or the wire ends.

        Cancellation: leaves tasks unexecuted; the wire stays open.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._execute_tasks)
            if self._config.nop_interval:
                nursery.start_soon(self._ping_regularly)
            try:
                while not self._logged_out:
                    self._arrived(await self.wire.receive())
            except WireClosedError:
                pass
            else:
                await self.wire.drain()
            nursery.cancel_scope.cancel()
        self._nursery = None

    def end(self, *, reset: bool = False) -> None:
        """Drop the connection, and the session with it: no task of it is executed any more."""
        self._order.clear()
        self._tasks.clear()
        self.wire.close(reset=reset)

    @property
    def outstanding(self) -> int:
        """SCSI commands that aren't done."""
        return len(self._tasks)

    # -- numbers ---------------------------------------------------------------------------------------------------

    def _limit(self) -> int:
        """MaxCmdSN as it has to be told now."""
        limit = serial.add(self._exp_cmd_sn, self.window - len(self._tasks) - 1)
        if serial.less(self._max_cmd_sn, limit):
            self._max_cmd_sn = limit
        return self._max_cmd_sn

    def _next_stat_sn(self) -> int:
        number = self._stat_sn
        self._stat_sn = serial.add(number, 1)
        return number

    # -- what comes ------------------------------------------------------------------------------------------------

    def _arrived(self, incoming: Incoming) -> None:
        pdu = incoming.pdu
        if not incoming.intact:
            self._damaged(pdu)
            return
        if isinstance(pdu, DataOut):
            self._data_out(pdu)
            return
        if not isinstance(pdu, ScsiCommand | TextRequest | NopOut | TaskManagementRequest | LogoutRequest):
            self._reject(pdu, RejectReason.COMMAND_NOT_SUPPORTED)
            return
        if pdu.immediate:
            self._act(incoming)
            return
        ahead = serial.distance(self._exp_cmd_sn, pdu.cmd_sn)
        if ahead < 0 or serial.less(self._max_cmd_sn, pdu.cmd_sn):
            return  # RFC 7143 §4.2.2.1: ignored silently
        self._early.setdefault(pdu.cmd_sn, incoming)
        while (due := self._early.pop(self._exp_cmd_sn, None)) is not None:
            self._exp_cmd_sn = serial.add(self._exp_cmd_sn, 1)
            self._act(due)

    def _act(self, incoming: Incoming) -> None:
        match incoming.pdu:
            case ScsiCommand() as pdu:
                self._scsi_command(pdu, incoming)
            case NopOut() as pdu:
                self._nop_out(pdu)
            case TaskManagementRequest() as pdu:
                self._task_management(pdu)
            case TextRequest() as pdu:
                stat_sn = self._next_stat_sn()
                answer = self._text.answer(
                    pdu, stat_sn=stat_sn, exp_cmd_sn=self._exp_cmd_sn, max_cmd_sn=self._limit()
                )
                self.wire.send(answer)
            case LogoutRequest() as pdu:
                self._logout(pdu)
            case _:
                pass

    def _damaged(self, pdu: Pdu) -> None:
        """A data digest was wrong. Source: RFC 7143 §7.8, error recovery level 0."""
        self._reject(pdu, RejectReason.DATA_DIGEST_ERROR)
        task = self._tasks.get(pdu.itt) if isinstance(pdu, DataOut) else None
        if task is not None:
            # Protocol service CRC error.
            self._finish(task, SenseError(SenseKey.ABORTED_COMMAND, 0x47, 0x05).outcome())
        elif isinstance(pdu, ScsiCommand) and not pdu.immediate and pdu.cmd_sn == self._exp_cmd_sn:
            # Its number would stay missing for ever; the initiator learns of its end from the Reject.
            self._exp_cmd_sn = serial.add(self._exp_cmd_sn, 1)

    def _scsi_command(self, pdu: ScsiCommand, incoming: Incoming) -> None:
        if self._engine is None:
            self._reject(pdu, RejectReason.COMMAND_NOT_SUPPORTED)
            return
        if pdu.itt in self._tasks:
            self._reject(pdu, RejectReason.TASK_IN_PROGRESS)
            return
        task = _Task(pdu, self._engine.lengths(lun=pdu.lun, cdb=pdu.cdb) or Lengths(), late=incoming.late)
        if incoming.answer is not None:
            answer = incoming.answer
            task.outcome, task.response = Outcome(status=answer.status, sense=answer.sense), answer.response
        else:
            task.outcome = self._engine.check(nexus=self.identity.nexus, lun=pdu.lun, cdb=pdu.cdb)
        if pdu.write or not pdu.final:
            wanted = 0 if task.outcome else min(pdu.expected_data_transfer_length, task.moves.data_out)
            task.collector = Collector(pdu, wanted=wanted, agreed=self.agreed, reverse=self._config.reverse_r2t)
        self._tasks[pdu.itt] = task
        if pdu.immediate:
            self._order.appendleft(task)
        else:
            self._order.append(task)
        self._advance(task)

    def _data_out(self, pdu: DataOut) -> None:
        task = self._tasks.get(pdu.itt)
        if task is None or task.collector is None:
            return  # of a task that is over: it may have been in flight
        if not task.collector.feed(pdu):
            self._reject(pdu, RejectReason.PROTOCOL_ERROR)
            # Incorrect amount of data.
            self._finish(task, SenseError(SenseKey.ABORTED_COMMAND, 0x0C, 0x0D).outcome())
            return
        self._advance(task)

    def _advance(self, task: _Task) -> None:
        """Ask for more of a task's data, or let it be executed."""
        if task.collector is not None:
            for asked in task.collector.solicit(self._ttts):
                self.wire.send(
                    R2T(
                        itt=task.command.itt,
                        lun=task.command.lun,
                        ttt=asked.ttt,
                        stat_sn=self._stat_sn,
                        exp_cmd_sn=self._exp_cmd_sn,
                        max_cmd_sn=self._limit(),
                        r2t_sn=asked.r2t_sn,
                        buffer_offset=asked.offset,
                        desired_data_transfer_length=asked.length,
                    )
                )
            if not task.collector.complete:
                return
        delay = self._config.latency + task.late
        if delay and self._nursery is not None:
            if not task.delayed:
                task.delayed = True
                self._nursery.start_soon(self._make_ready_later, task, delay)
        else:
            self._make_ready(task)

    async def _make_ready_later(self, task: _Task, seconds: float) -> None:
        await trio.sleep(seconds)
        self._make_ready(task)

    def _make_ready(self, task: _Task) -> None:
        task.ready = True
        self._something_ready.set()

    # -- executing -------------------------------------------------------------------------------------------------

    async def _execute_tasks(self) -> None:
        while True:
            task = self._choose()
            if task is None:
                # Nothing can become ready between the look and this line: neither awaits.
                self._something_ready = trio.Event()
                await self._something_ready.wait()
                continue
            outcome = task.outcome
            if outcome is None and self._engine is not None:
                command = task.command
                outcome = self._engine.perform(
                    nexus=self.identity.nexus,
                    lun=command.lun,
                    cdb=command.cdb,
                    data=b"" if task.collector is None else task.collector.data,
                )
            self._finish(task, outcome or Outcome())
            await self.wire.room()
            await trio.lowlevel.checkpoint()

    def _choose(self) -> _Task | None:
        if self._random is None:
            # A task that a script delays doesn't hold up the ones behind it.
            for task in self._order:
                if task.ready or not task.late:
                    return task if task.ready else None
            return None
        ready = [task for task in self._order if task.ready]
        return self._random.choice(ready) if ready else None

    def _drop(self, task: _Task) -> None:
        """Take a task off the lists; it will not be executed, or has been."""
        if self._tasks.pop(task.command.itt, None) is not None:
            self._order.remove(task)

    def _finish(self, task: _Task, outcome: Outcome) -> None:
        """Send a command's data and status."""
        self._drop(task)
        command, moves = task.command, task.moves
        expected = command.expected_data_transfer_length
        if command.write:
            data = b""
            available = moves.data_out if outcome.status == Status.GOOD else 0
        else:
            data = outcome.data_in if command.read else b""
            available = len(outcome.data_in)
        overflow = available > expected
        underflow = available < expected
        residual = abs(available - expected)
        count = min(len(data), expected)
        collapsed = self._config.status_in_data and outcome.status == Status.GOOD and count > 0 and not task.response
        data_sn = 0
        for segment in segments(length=count, agreed=self.agreed):
            last = collapsed and segment.offset + segment.length == count
            self.wire.send(
                DataIn(
                    itt=command.itt,
                    final=segment.final,
                    stat_sn=self._next_stat_sn() if last else 0,
                    exp_cmd_sn=self._exp_cmd_sn,
                    max_cmd_sn=self._limit(),
                    data_sn=data_sn,
                    buffer_offset=segment.offset,
                    has_status=last,
                    status=Status.GOOD,
                    overflow=last and overflow,
                    underflow=last and underflow,
                    residual_count=residual if last else 0,
                    data=data[segment.offset : segment.offset + segment.length],
                )
            )
            data_sn += 1
        if not collapsed:
            self.wire.send(
                ScsiResponse(
                    itt=command.itt,
                    stat_sn=self._next_stat_sn(),
                    exp_cmd_sn=self._exp_cmd_sn,
                    max_cmd_sn=self._limit(),
                    response=task.response,
                    status=outcome.status,
                    exp_data_sn=data_sn,
                    overflow=overflow,
                    underflow=underflow,
                    residual_count=residual,
                    data=sense_segment(outcome.sense),
                )
            )

    # -- everything else -------------------------------------------------------------------------------------------

    def _nop_out(self, pdu: NopOut) -> None:
        if pdu.itt == RESERVED_TAG:
            return  # an answer to a ping
        self.wire.send(
            NopIn(
                itt=pdu.itt,
                lun=pdu.lun,
                stat_sn=self._next_stat_sn(),
                exp_cmd_sn=self._exp_cmd_sn,
                max_cmd_sn=self._limit(),
                data=pdu.data[: self.agreed.initiator_max_recv],
            )
        )

    def _task_management(self, pdu: TaskManagementRequest) -> None:
        response = self._manage(pdu)
        self.wire.send(
            TaskManagementResponse(
                itt=pdu.itt,
                response=response,
                stat_sn=self._next_stat_sn(),
                exp_cmd_sn=self._exp_cmd_sn,
                max_cmd_sn=self._limit(),
            )
        )
        if pdu.function == TaskFunction.TARGET_COLD_RESET:
            self._logged_out = True

    def _manage(self, pdu: TaskManagementRequest) -> TaskResponse:
        if self._engine is None:
            return TaskResponse.FUNCTION_NOT_SUPPORTED
        disk = self._engine.find(pdu.lun)
        match pdu.function:
            case TaskFunction.ABORT_TASK:
                task = self._tasks.get(pdu.referenced_task_tag)
                if task is None:
                    return TaskResponse.TASK_DOES_NOT_EXIST
                self._drop(task)
            case TaskFunction.ABORT_TASK_SET | TaskFunction.CLEAR_TASK_SET | TaskFunction.LOGICAL_UNIT_RESET:
                if disk is None:
                    return TaskResponse.LUN_DOES_NOT_EXIST
                for task in [task for task in self._order if task.command.lun == pdu.lun]:
                    self._drop(task)
                if pdu.function == TaskFunction.LOGICAL_UNIT_RESET:
                    self._engine.reset(disk.lun)
            case TaskFunction.TARGET_WARM_RESET | TaskFunction.TARGET_COLD_RESET:
                for task in list(self._order):
                    self._drop(task)
                for number in self._engine.disks:
                    self._engine.reset(number)
            case TaskFunction.TASK_REASSIGN:
                return TaskResponse.REASSIGNMENT_NOT_SUPPORTED
            case _:
                return TaskResponse.FUNCTION_NOT_SUPPORTED
        return TaskResponse.FUNCTION_COMPLETE

    def _logout(self, pdu: LogoutRequest) -> None:
        response = 0
        if pdu.reason == LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY:
            response = 2  # recovery isn't supported
        elif pdu.reason == LogoutReason.CLOSE_CONNECTION and pdu.cid != self.identity.cid:
            response = 1  # no such connection
        self.wire.send(
            LogoutResponse(
                itt=pdu.itt,
                response=response,
                stat_sn=self._next_stat_sn(),
                exp_cmd_sn=self._exp_cmd_sn,
                max_cmd_sn=self._limit(),
                time2wait=self._config.keys.default_time2wait,
                time2retain=self._config.keys.default_time2retain,
            )
        )
        self._logged_out = response == 0

    def _reject(self, pdu: Pdu, reason: RejectReason) -> None:
        self.wire.send(
            Reject(
                reason=reason,
                stat_sn=self._next_stat_sn(),
                exp_cmd_sn=self._exp_cmd_sn,
                max_cmd_sn=self._limit(),
                data=pdu.header(),
            )
        )

    # -- what this target says unasked -----------------------------------------------------------------------------

    async def _ping_regularly(self) -> None:
        while True:
            await trio.sleep(self._config.nop_interval)
            self.ping()

    def ping(self, *, lun: bytes = NO_LUN) -> int:
        """Send a NOP-In that wants an answer.

        Returns:
            Its Target Transfer Tag.
        """
        ttt = next(self._ttts)
        self._nop_in(ttt=ttt, lun=lun)
        return ttt

    def announce(self) -> None:
        """Tell the window, with a NOP-In that wants no answer."""
        self._nop_in(ttt=RESERVED_TAG, lun=NO_LUN)

    def _nop_in(self, *, ttt: int, lun: bytes) -> None:
        # StatSN isn't used up: the next response carries the same (RFC 7143 §11.19.2).
        self.wire.send(
            NopIn(ttt=ttt, lun=lun, stat_sn=self._stat_sn, exp_cmd_sn=self._exp_cmd_sn, max_cmd_sn=self._limit())
        )

    def asynchronous(
        self, event: int, *, parameter1: int = 0, parameter2: int = 0, parameter3: int = 0, sense: bytes = b""
    ) -> None:
        """Send an Asynchronous Message. Source: RFC 7143 §11.9."""
        self.wire.send(
            AsyncMessage(
                event=event,
                parameter1=parameter1,
                parameter2=parameter2,
                parameter3=parameter3,
                stat_sn=self._next_stat_sn(),
                exp_cmd_sn=self._exp_cmd_sn,
                max_cmd_sn=self._limit(),
                data=sense_segment(sense),
            )
        )
