"""Whether a target is still there: who is silent is asked, and who doesn't answer isn't.

A connection on which nothing came for a while is pinged; whatever byte comes then is a sign of life, the ping's
answer or another one. TCP notices a dead line much later, and never a target that is stuck.

Source: RFC 7143 §11.18-11.19.
"""

from iscsifuse.errors import SessionLostError
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi.connection import Connection
from iscsifuse.iscsi.request import NopOut

__all__ = ["PING_AFTER", "PING_LIMIT", "Liveness"]

PING_AFTER = 5.0
"""Seconds without a received byte after which the target is pinged."""
PING_LIMIT = 5.0
"""Seconds that it has to answer."""


class Liveness:
    """Of the target of one session. It puts pings out on the connection; somebody else sends them.

    Invariant: a ping is out only while nothing has come since, as far as the last look could tell; so there is one at
    a time.

    Args:
        transport: counts what comes.
        connection: of the session.
        now: the time.
    """

    def __init__(self, transport: Transport, connection: Connection, *, now: float) -> None:
        self._transport = transport
        self._connection = connection
        self._heard = transport.bytes_received
        self._heard_at = now
        self._pinged_at: float | None = None

    def look(self, now: float, *, may_ping: bool) -> None:
        """To be called from time to time, more often than the limits are long.

        Args:
            now: the time.
            may_ping: not behind a logout.

        Raises:
            SessionLostError: it has been silent for too long.
        """
        heard = self._transport.bytes_received
        if heard != self._heard:
            self._heard = heard
            self._heard_at = now
            self._pinged_at = None
        elif self._pinged_at is not None:
            if now - self._pinged_at >= PING_LIMIT:
                silence = f"{self._transport.portal} has been silent for {now - self._heard_at:.0f} seconds"
                raise SessionLostError(silence)
        elif may_ping and now - self._heard_at >= PING_AFTER:
            self._pinged_at = now
            self._connection.request(NopOut(immediate=True))
