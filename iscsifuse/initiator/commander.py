"""SCSI commands to one logical unit, with the retries that they deserve.

`policy.judge` says what a status means; this file acts on it: waits, tries again, starts the unit, or raises. What a
target lets us know on the way (reset, new medium, new capacity) goes to ``on_change``.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from iscsifuse.errors import CommandError, DigestError, TransferError
from iscsifuse.initiator.policy import Action, Change, Verdict, judge
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import cdb as cdbs

__all__ = ["Commander", "Executor"]

log = logging.getLogger(__name__)

MAX_TRANSFER_RETRIES = 2
"""How often a command is repeated whose data was damaged or incomplete."""
_LONGEST_DELAY = 1.0


class Executor(Protocol):
    """Who carries out commands: a `Session` or a `Nexus`."""

    async def execute(
        self,
        cdb: bytes,
        *,
        lun: bytes,
        buffer_in: memoryview | None = None,
        buffer_out: memoryview | None = None,
        exact: bool = False,
    ) -> Task:
        """Carry out one command and return its task, done."""
        ...


class Commander:
    """Sends commands to one logical unit.

    Args:
        executor: carries them out.
        address: the 8 bytes of the LUN.
        label: for messages: "LUN 1 of iqn...".
        limit: seconds that one command may take in all, retries and waits included.
        may_start: whether a stopped unit may be started.
        on_change: awaited when the target reports a change, before the command is tried again.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        address: bytes,
        label: str,
        limit: float,
        may_start: bool = False,
        on_change: Callable[[Change], Awaitable[None]] | None = None,
    ) -> None:
        self._executor = executor
        self._address = address
        self._limit = limit
        self._may_start = may_start
        self._on_change = on_change
        self.label = label

    async def run(
        self,
        cdb: bytes,
        *,
        buffer_in: memoryview | None = None,
        buffer_out: memoryview | None = None,
        exact: bool = False,
        place: str = "",
        first: Awaitable[Task] | None = None,
    ) -> Task:
        """Carry out a command until it succeeds or can't.

        Args:
            cdb: at most 16 bytes.
            buffer_in: where data goes; undefined unless this returns.
            buffer_out: what is written.
            exact: whether every byte must be moved.
            place: for messages: " at LBA 7".
            first: the first attempt, where it was made already: ends as `Executor.execute` does.

        Returns:
            The task of the last attempt; it succeeded.

        Raises:
            CommandError: or a subclass; the target failed it.
            TransferError, DigestError: its data was incomplete or damaged, repeatedly.
            CommandTimeoutError, SessionLostError, ReadOnlyError: see `Executor.execute`.
        """
        troubles: _Troubles | None = None
        while True:
            attempt, first = first, None
            try:
                task = await (
                    attempt
                    or self._executor.execute(
                        cdb, lun=self._address, buffer_in=buffer_in, buffer_out=buffer_out, exact=exact
                    )
                )
                if task.status == 0:
                    return task
                verdict = judge(task.status, task.sense, what=f"{cdbs.name(cdb)} of {self.label}{place}")
                if verdict.action is Action.ACCEPT:
                    if exact:
                        _check_complete(task)
                    return task
                troubles = troubles or _Troubles(task.started)
            except (TransferError, DigestError) as error:
                log.warning("%s of %s%s: %s", cdbs.name(cdb), self.label, place, error)
                troubles = troubles or _Troubles(trio.current_time())
                if troubles.count("transfer") > MAX_TRANSFER_RETRIES:
                    raise
                continue
            await self._prepare_retry(verdict, troubles)

    async def query(self, cdb: bytes, *, length: int) -> bytes:
        """The parameter data that a command returns.

        Args:
            cdb: at most 16 bytes.
            length: its allocation length in bytes.

        Raises:
            CommandError: the target failed it; otherwise like `run`.
        """
        buffer = bytearray(length)
        task = await self.run(cdb, buffer_in=memoryview(buffer))
        return bytes(buffer[: task.received])

    async def _prepare_retry(self, verdict: Verdict, troubles: "_Troubles") -> None:
        """Do what has to be done before the next attempt, or raise."""
        error = verdict.error
        attempt = troubles.count((verdict.action, error and (error.status, error.sense_key)))
        if verdict.change and self._on_change is not None:
            await self._on_change(verdict.change)
        if verdict.action is Action.START and self._may_start:
            await self._start()
        elif verdict.action is not Action.RETRY:
            raise _raisable(error)
        delay = min(verdict.delay * 2 ** min(attempt - 1, 10), _LONGEST_DELAY)
        if attempt > verdict.retries or trio.current_time() + delay - troubles.began > self._limit:
            raise _raisable(error)
        log.info("%s (attempt %d)", error, attempt)
        if delay:
            await trio.sleep(delay)

    async def _start(self) -> None:
        task = await self._executor.execute(cdbs.start_stop_unit(start=True), lun=self._address)
        log.info("%s was started: status %d", self.label, task.status)


class _Troubles:
    """How often which kind of trouble met one command, and when it began: one kind uses up nothing of another's."""

    __slots__ = ("_counts", "began")

    def __init__(self, began: float) -> None:
        self.began = began
        self._counts: dict[object, int] = {}

    def count(self, kind: object) -> int:
        """Count one more; how many there were of this kind."""
        number = self._counts[kind] = self._counts.get(kind, 0) + 1
        return number


def _check_complete(task: Task) -> None:
    """Raise TransferError where a success that isn't called GOOD (RECOVERED ERROR) didn't move every byte."""
    moved = task.solicited if task.buffer_in is None else task.received
    if moved != task.expected or task.residual:
        raise TransferError(f"the target reported success but moved {moved} of {task.expected} bytes")


def _raisable(error: CommandError | None) -> CommandError:
    return error if error is not None else CommandError("the command failed", status=-1)
