"""ABORT TASK SET: have a target end all that this nexus has given to a logical unit, and say so.

It is a barrier, not a way to end a command (for that see `deadlines`): whatever an old session left at the unit has
come to its end once the target has answered.

Source: RFC 7143 §11.5.1, SAM-5 §7.3.
"""

from collections.abc import Callable

import trio

from iscsifuse.errors import SessionLostError
from iscsifuse.iscsi.connection import Connection
from iscsifuse.iscsi.request import TaskFunction, TaskManagementRequest
from iscsifuse.iscsi.response import TaskManagementResponse

__all__ = ["ABORT_LIMIT", "BARRIER_LIMIT", "Clearing"]

ABORT_LIMIT = 10.0
"""Seconds that a target has to answer a task management function."""
BARRIER_LIMIT = 15.0
"""The same for ABORT TASK SET. Longer than a line may be silent (`liveness`), for who doesn't answer isn't asked for
another one again: that must not be the line's doing."""


class Clearing:
    """The ABORT TASK SETs of one session.

    Invariant: an answer goes to whoever sent the request with its tag, while he waits for it, and to nobody else.

    Args:
        connection: of the session.
        send: has the session send what the connection has put out.
    """

    def __init__(self, connection: Connection, *, send: Callable[[], None]) -> None:
        self._connection = connection
        self._send = send
        self._under_way: dict[int, _Answer] = {}
        self._ended: SessionLostError | None = None

    async def abort_task_set(self, lun: bytes) -> int | None:
        """Have the target end all tasks of this nexus on a logical unit: those that an old session left, too.

        Args:
            lun: 8 bytes.

        Returns:
            Its answer (see `TaskResponse`; it needn't support it), or None: it did not answer within BARRIER_LIMIT.

        Raises:
            SessionLostError: the session ended first.
        """
        answer = _Answer()
        if self._ended is not None:
            raise SessionLostError(str(self._ended))
        itt = self._connection.request(TaskManagementRequest(function=TaskFunction.ABORT_TASK_SET, lun=lun))
        self._under_way[itt] = answer
        self._send()
        with trio.move_on_after(BARRIER_LIMIT):
            await answer.came.wait()
        del self._under_way[itt]
        if self._ended is not None:
            raise SessionLostError(str(self._ended))
        return answer.response

    def take_answer(self, answer: TaskManagementResponse) -> bool:
        """Hand over an answer; whether somebody here has waited for it."""
        waiting = self._under_way.get(answer.itt)
        if waiting is None:
            return False
        waiting.response = answer.response
        waiting.came.set()
        return True

    def end(self, reason: SessionLostError) -> None:
        """The session has ended: no answer will come."""
        self._ended = reason
        for waiting in self._under_way.values():
            waiting.came.set()


class _Answer:
    """Of a target to a task management function, once it has come."""

    __slots__ = ("came", "response")

    def __init__(self) -> None:
        self.came = trio.Event()
        self.response: int | None = None
