"""Commands whose time is over: aborted one after the other, or given up together with their session.

::

    under way ──deadline──> late ──ABORT TASK, when it is its turn──> aborted (CommandTimeoutError)
                              └──refused, rejected, no answer in time──> the session has to go

One at a time: a target takes few immediate requests at once (RFC 7143 §4.2.2.1), and each of these commands may still
end by itself. ABORT TASK SET isn't sent here: it would take those along that have time left. Until its abortion is
confirmed a command's R2Ts are answered, and its memory belongs to the target (§4.2.3.4).

Source: RFC 7143 §11.5-11.6.
"""

import logging
from collections.abc import Callable

from iscsifuse.errors import CommandTimeoutError, ProtocolError
from iscsifuse.iscsi.connection import Connection
from iscsifuse.iscsi.request import TaskFunction, TaskManagementRequest
from iscsifuse.iscsi.response import TaskManagementResponse, TaskResponse
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import cdb as cdbs

__all__ = ["Deadlines"]

log = logging.getLogger(__name__)


class Deadlines:
    """The deadlines of one session's commands. It puts requests out on the connection; somebody else sends them.

    Args:
        connection: whose commands they are.
        limit: seconds that a command may take.
        end: called with each task that ended here, and the time.
    """

    def __init__(self, connection: Connection, *, limit: float, end: Callable[[Task, float], None]) -> None:
        self._connection = connection
        self._limit = limit
        self._end = end
        self._abort: tuple[int, Task, float] | None = None  # the one that is under way: its tag, of whom, since when

    def expire(self, now: float, *, patience: float) -> bool:
        """Look at all commands: end those that nobody took in time, abort those that are late.

        Args:
            now: the time.
            patience: seconds that a late command may take to end, be it that its abortion isn't answered, or that it
                had to wait for the abortion of others.

        Returns:
            Whether the session is good for more. If not, all late commands have ended.
        """
        limit = self._limit
        for task in list(self._connection.queue):
            if now - task.started < limit:
                break
            self._connection.abandon(task, CommandTimeoutError(f"the target took no command for {limit:g} seconds"))
            self._end(task, now)
        oldest = self._oldest()
        unanswered = self._abort is not None and now - self._abort[2] >= patience
        if unanswered or (oldest is not None and now - oldest.started >= limit + patience):
            self.give_up(now)
            return False
        self._abort_next(now)
        return True

    def answered(self, answer: TaskManagementResponse, now: float) -> None:
        """An abortion was answered.

        Raises:
            ProtocolError: it was refused. The target may go on with the command as long as the session lives; all
                late commands have ended here.
        """
        itt, task, _ = self._abort or (-1, None, 0.0)
        if task is None or answer.itt != itt:
            return
        self._abort = None
        if not task.done:
            if answer.response not in (TaskResponse.FUNCTION_COMPLETE, TaskResponse.TASK_DOES_NOT_EXIST):
                self.give_up(now)
                raise ProtocolError(f"the target refused to abort a command (response {answer.response})")
            self._time_out(task, now)
        self._abort_next(now)

    def give_up(self, now: float) -> None:
        """End the commands that can't be aborted: a new session won't do them any good, their time is over."""
        for task in list(self._connection.tasks.values()):
            if now - task.started >= self._limit:
                self._time_out(task, now)

    def _oldest(self) -> Task | None:
        """The command that was sent first; the table is ordered by age."""
        return next(iter(self._connection.tasks.values()), None)

    def _abort_next(self, now: float) -> None:
        task = self._oldest()
        if task is None or self._abort is not None or now - task.started < self._limit:
            return
        log.warning("%s took longer than %g seconds: aborting it", cdbs.name(task.cdb), self._limit)
        itt = self._connection.request(
            TaskManagementRequest(
                function=TaskFunction.ABORT_TASK,
                lun=task.lun,
                referenced_task_tag=task.itt,
                ref_cmd_sn=task.cmd_sn,
            )
        )
        self._abort = itt, task, now

    def _time_out(self, task: Task, now: float) -> None:
        error = f"the target did not finish {cdbs.name(task.cdb)} within {self._limit:g} seconds"
        self._connection.abandon(task, CommandTimeoutError(error))
        self._end(task, now)
