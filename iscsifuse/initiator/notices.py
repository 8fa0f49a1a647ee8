"""What a target says besides how commands end, and what follows from it.

=============================== ==================================================================================
answer to a ping                nothing: whatever comes is a sign of life (see `liveness`)
answer to a task management     whoever asked is told (see `clearing`, `deadlines`)
answer to a logout              the session is over (see `farewell`)
asynchronous message            it wants us to leave, or is leaving: so do we; others are only logged
Reject of data                  the command will end with a response of its own
Reject of anything else         a number is missing that nothing can fill in: only a new session gets on
=============================== ==================================================================================

Source: RFC 7143 §7.3, §11.9, §11.17.
"""

import logging
from typing import Protocol

from iscsifuse.errors import DigestError, ProtocolError, SessionLostError
from iscsifuse.initiator.clearing import Clearing
from iscsifuse.initiator.deadlines import Deadlines
from iscsifuse.initiator.farewell import Farewell
from iscsifuse.iscsi.incoming import Event
from iscsifuse.iscsi.request import DataOut, LogoutRequest, NopOut, TaskManagementRequest
from iscsifuse.iscsi.response import (
    AsyncEvent,
    AsyncMessage,
    LogoutResponse,
    Reject,
    RejectReason,
    TaskManagementResponse,
)

__all__ = ["Notices"]

log = logging.getLogger(__name__)


class Leave(Protocol):
    """Logs out because the target wants that, in the background, and once."""

    def __call__(self, why: str, *, within: float) -> None:
        """Begin; ``within`` is how many seconds there are."""
        ...


class Notices:
    """Acts on the events of one session that are no tasks.

    Invariant: it keeps nothing. Each event has had its effect when `take` returns, or has ended the session when it
    raises.

    Args:
        deadlines: of the session, like all of these.
        clearing: sends ABORT TASK SET.
        farewell: its logout.
        leave: begins it.
    """

    def __init__(self, *, deadlines: Deadlines, clearing: Clearing, farewell: Farewell, leave: Leave) -> None:
        self._deadlines = deadlines
        self._clearing = clearing
        self._farewell = farewell
        self._leave = leave

    def take(self, event: Event, now: float) -> None:
        """Act on an event.

        Raises:
            ProtocolError: the session can't go on.
            SessionLostError: the target drops it.
        """
        match event:
            case TaskManagementResponse():
                if not self._clearing.take_answer(event):
                    self._deadlines.answered(event, now)
            case LogoutResponse():
                self._farewell.take_answer(event)
            case AsyncMessage():
                self._on_async(event)
            case Reject():
                self._on_reject(event, now)

    def _on_async(self, message: AsyncMessage) -> None:
        """Source: RFC 7143 §11.9.1."""
        match message.event:
            case AsyncEvent.LOGOUT_REQUESTED:
                self._leave("the target asked for a logout", within=message.parameter3)
            case AsyncEvent.CONNECTION_DROPPED | AsyncEvent.SESSION_DROPPED:
                self._farewell.time2wait = message.parameter2
                raise SessionLostError("the target announced that it drops the session")
            case AsyncEvent.NEGOTIATION_REQUESTED:
                self._leave("the target asked for a new negotiation", within=message.parameter3)
            case _:
                log.info("asynchronous message, event %d", message.event)

    def _on_reject(self, reject: Reject, now: float) -> None:
        """Source: RFC 7143 §7.3, §11.17."""
        if reject.reason == RejectReason.WAITING_FOR_LOGOUT:
            self._leave("the target waits for a logout", within=1.0)
            return
        match reject.rejected:
            case DataOut():  # the command ends with a response of its own
                log.warning("the target rejected data of a write (reason %#04x)", reject.reason)
            case NopOut():  # also a sign of life
                log.info("the target rejected a ping (reason %#04x)", reject.reason)
            case LogoutRequest():
                self._farewell.take_answer(None)
            case rejected:
                if isinstance(rejected, TaskManagementRequest):
                    self._deadlines.give_up(now)
                # A command's number would stay missing for ever: only a new session gets on.
                if reject.reason == RejectReason.DATA_DIGEST_ERROR:
                    # The line's doing, not the target's: the command may be sent for as long as sessions get lost.
                    raise DigestError("the target found the data digest of a command not to match", header=False)
                raise ProtocolError(f"the target rejected a PDU (reason {reject.reason:#04x})")
