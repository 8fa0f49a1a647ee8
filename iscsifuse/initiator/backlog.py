"""How much may wait for a target that doesn't read.

Nobody waits when something is sent, so what a target asks for (data of writes, answers to pings) is kept here while
it doesn't read. The data of a write is its submitter's memory, and is asked for once; everything beyond that is ours,
and has a bound.
"""

from iscsifuse.errors import SessionLostError
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi.connection import Connection

__all__ = ["BACKLOG_LIMIT", "check_backlog"]

BACKLOG_LIMIT = 16 << 20
"""Bytes that may wait for a target that doesn't read, besides the data of the writes that are under way."""


def check_backlog(transport: Transport, connection: Connection) -> None:
    """See that no more waits to be sent than the writes that are under way can account for.

    They ask for each byte once; what is asked for again was received before, if the target can be believed.

    Raises:
        SessionLostError: more waits.
    """
    waiting = transport.backlog
    if waiting <= BACKLOG_LIMIT:
        return
    if waiting > BACKLOG_LIMIT + sum(len(task.buffer_out or b"") for task in connection.tasks.values()):
        raise SessionLostError(
            f"{transport.portal} asks and asks, but doesn't read the answers ({waiting >> 20} MiB of them wait)"
        )
