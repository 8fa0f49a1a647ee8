"""The full feature phase of one session, which has one connection.

A numbered PDU is acted on when its CmdSN is due; one that is early, but inside the window, is kept; one outside is
ignored silently. Immediate PDUs are acted on at once. SCSI commands become tasks (see ``tasks``), everything else is
answered here.

``run`` returns when the initiator logged out or the wire ended; whoever runs it takes the session off the list then.
Tasks end with it, unexecuted. `end` may be called from anywhere at any time.

Source: RFC 7143 §4.2.2 (numbering), §11.3-11.19; SAM-5 §7 (task management).
"""

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import trio

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
    AsyncMessage,
    LogoutResponse,
    NopIn,
    Reject,
    RejectReason,
    TaskManagementResponse,
    TaskResponse,
)
from iscsifuse.scsi.sense import SenseKey
from iscsifuse.testing.actions import sense_segment
from iscsifuse.testing.config import TargetConfig
from iscsifuse.testing.discovery import TextExchange
from iscsifuse.testing.keys import Agreed
from iscsifuse.testing.numbers import Numbers
from iscsifuse.testing.outcome import SenseError
from iscsifuse.testing.scsi_engine import ScsiEngine
from iscsifuse.testing.tasks import TaskSet
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
        wire: its connection.
        identity: who it is with.
        agreed: what was negotiated.
        numbers: CmdSN, MaxCmdSN, StatSN.
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
        self.numbers = Numbers(cmd_sn=cmd_sn, stat_sn=stat_sn, window=config.window)
        self._config = config
        self._engine = engine
        self._early: dict[int, Incoming] = {}
        self._ttts = itertools.count(1)
        self._tasks: TaskSet | None = None
        if engine is not None:
            self._tasks = TaskSet(
                wire,
                numbers=self.numbers,
                engine=engine,
                nexus=identity.nexus,
                agreed=agreed,
                config=config,
                next_ttt=self._ttts,
            )
        self._text = TextExchange(
            listing=listing,
            limit=min(config.text_chunk or agreed.initiator_max_recv, agreed.initiator_max_recv),
            next_ttt=self._ttts,
        )
        self._logged_out = False

    # -- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until the initiator logs out or the wire ends.

        Cancellation: leaves tasks unexecuted; the wire stays open.
        """
        async with trio.open_nursery() as nursery:
            if self._tasks is not None:
                nursery.start_soon(self._tasks.execute)
            if self._config.nop_interval:
                nursery.start_soon(self._ping_regularly)
            try:
                while not self._logged_out:
                    self._arrived(await self.wire.receive())
                await self.wire.drain()
            except WireClosedError:
                pass
            nursery.cancel_scope.cancel()

    def end(self, *, reset: bool = False) -> None:
        """Drop the connection, and the session with it: no task of it is executed any more."""
        if self._tasks is not None:
            self._tasks.drop_all()
        self.wire.close(reset=reset)

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
        if not self.numbers.within(pdu.cmd_sn):
            return  # RFC 7143 §4.2.2.1: ignored silently
        self._early.setdefault(pdu.cmd_sn, incoming)
        while (due := self._early.pop(self.numbers.exp_cmd_sn, None)) is not None:
            self.numbers.advance()
            self._act(due)

    def _act(self, incoming: Incoming) -> None:
        match incoming.pdu:
            case ScsiCommand() as pdu:
                if self._tasks is None:
                    self._reject(pdu, RejectReason.COMMAND_NOT_SUPPORTED)
                elif not self._tasks.begin(pdu, incoming):
                    self._reject(pdu, RejectReason.TASK_IN_PROGRESS)
            case NopOut() as pdu:
                self._nop_out(pdu)
            case TaskManagementRequest() as pdu:
                self._task_management(pdu)
            case TextRequest() as pdu:
                self.wire.send(self._text.answer(pdu, self.numbers))
            case LogoutRequest() as pdu:
                self._logout(pdu)
            case _:
                pass

    def _damaged(self, pdu: Pdu) -> None:
        """A data digest was wrong. Source: RFC 7143 §7.8, error recovery level 0."""
        self._reject(pdu, RejectReason.DATA_DIGEST_ERROR)
        task = self._tasks.find(pdu.itt) if self._tasks is not None and isinstance(pdu, DataOut) else None
        if self._tasks is not None and task is not None:
            # Protocol service CRC error.
            self._tasks.finish(task, SenseError(SenseKey.ABORTED_COMMAND, 0x47, 0x05).outcome())
        elif isinstance(pdu, ScsiCommand) and not pdu.immediate and pdu.cmd_sn == self.numbers.exp_cmd_sn:
            # Its number would stay missing for ever; the initiator learns of its end from the Reject.
            self.numbers.advance()

    def _data_out(self, pdu: DataOut) -> None:
        if self._tasks is None:
            self._reject(pdu, RejectReason.COMMAND_NOT_SUPPORTED)
            return
        wronged = self._tasks.data_out(pdu)
        if wronged is not None:
            self._reject(pdu, RejectReason.PROTOCOL_ERROR)
            # Incorrect amount of data.
            self._tasks.finish(wronged, SenseError(SenseKey.ABORTED_COMMAND, 0x0C, 0x0D).outcome())

    # -- everything else -------------------------------------------------------------------------------------------

    def _nop_out(self, pdu: NopOut) -> None:
        if pdu.itt == RESERVED_TAG:
            return  # an answer to a ping
        self.wire.send(
            NopIn(
                itt=pdu.itt,
                lun=pdu.lun,
                stat_sn=self.numbers.next_stat_sn(),
                exp_cmd_sn=self.numbers.exp_cmd_sn,
                max_cmd_sn=self.numbers.max_cmd_sn,
                data=pdu.data[: self.agreed.initiator_max_recv],
            )
        )

    def _task_management(self, pdu: TaskManagementRequest) -> None:
        response = self._manage(pdu)
        self.wire.send(
            TaskManagementResponse(
                itt=pdu.itt,
                response=response,
                stat_sn=self.numbers.next_stat_sn(),
                exp_cmd_sn=self.numbers.exp_cmd_sn,
                max_cmd_sn=self.numbers.max_cmd_sn,
            )
        )
        if pdu.function == TaskFunction.TARGET_COLD_RESET:
            self._logged_out = True

    def _manage(self, pdu: TaskManagementRequest) -> TaskResponse:
        engine, tasks = self._engine, self._tasks
        if engine is None or tasks is None:
            return TaskResponse.FUNCTION_NOT_SUPPORTED
        match pdu.function:
            case TaskFunction.ABORT_TASK:
                task = tasks.find(pdu.referenced_task_tag)
                if task is None:
                    return TaskResponse.TASK_DOES_NOT_EXIST
                tasks.drop(task)
            case TaskFunction.ABORT_TASK_SET | TaskFunction.CLEAR_TASK_SET | TaskFunction.LOGICAL_UNIT_RESET:
                disk = engine.find(pdu.lun)
                if disk is None:
                    return TaskResponse.LUN_DOES_NOT_EXIST
                tasks.drop_all(lambda task: task.command.lun == pdu.lun)
                if pdu.function == TaskFunction.LOGICAL_UNIT_RESET:
                    engine.reset(disk.lun)
            case TaskFunction.TARGET_WARM_RESET | TaskFunction.TARGET_COLD_RESET:
                tasks.drop_all()
                for number in engine.disks:
                    engine.reset(number)
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
                stat_sn=self.numbers.next_stat_sn(),
                exp_cmd_sn=self.numbers.exp_cmd_sn,
                max_cmd_sn=self.numbers.max_cmd_sn,
                time2wait=self._config.keys.default_time2wait,
                time2retain=self._config.keys.default_time2retain,
            )
        )
        self._logged_out = response == 0

    def _reject(self, pdu: Pdu, reason: RejectReason) -> None:
        self.wire.send(
            Reject(
                reason=reason,
                stat_sn=self.numbers.next_stat_sn(),
                exp_cmd_sn=self.numbers.exp_cmd_sn,
                max_cmd_sn=self.numbers.max_cmd_sn,
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
            NopIn(
                ttt=ttt,
                lun=lun,
                stat_sn=self.numbers.stat_sn,
                exp_cmd_sn=self.numbers.exp_cmd_sn,
                max_cmd_sn=self.numbers.max_cmd_sn,
            )
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
                stat_sn=self.numbers.next_stat_sn(),
                exp_cmd_sn=self.numbers.exp_cmd_sn,
                max_cmd_sn=self.numbers.max_cmd_sn,
                data=sense_segment(sense),
            )
        )
