"""How a session is left: what is under way comes first, then the logout, and then the end in any case.

::

    staying ──say──> draining ──nothing is under way, or its time is over──> Logout Request ──answer──> over
                        └──────────────────the session ends─────────────────────┴──no answer in time──> over

Who leaves has stopped submitting commands. The time for those under way is the caller's to choose: all that there is
where the user goes, half of what the target grants where it sends us away. Where some are left when it is over, their
answers would have to be answered, and nothing may follow a Logout Request; so the connection is closed behind it.

Source: RFC 7143 §11.9.1, §11.14-11.15.
"""

from collections.abc import Callable

import trio

from iscsifuse.iscsi.connection import Connection
from iscsifuse.iscsi.request import LogoutRequest
from iscsifuse.iscsi.response import LogoutResponse

__all__ = ["LOGOUT_LIMIT", "Farewell"]

LOGOUT_LIMIT = 5.0
"""Seconds that a target has to answer a logout, what is still under way included."""


class Farewell:
    """The logout of one session.

    Invariant: `say` is called once at most, and ends within LOGOUT_LIMIT; and no Logout Request is sent after `end`.

    Args:
        connection: of the session.
        send: has the session send what the connection has put out.
        time2wait: seconds before the next login, unless the target says something else.

    Attributes:
        answered: the target has agreed on the end, or has refused to talk of it.
        time2wait: seconds before the next login, as the target asked.
    """

    def __init__(self, connection: Connection, *, send: Callable[[], None], time2wait: float) -> None:
        self.answered = False
        self.time2wait = time2wait
        self._connection = connection
        self._send = send
        self._over = False
        self._idle = trio.Event()  # nothing is under way any more, after `say` began
        self._answer = trio.Event()

    async def say(self, *, patience: float) -> None:
        """Log out once nothing is under way any more, or when the patience with that is over.

        Args:
            patience: seconds.

        Cancellation: at once.
        """
        connection = self._connection
        with trio.move_on_after(LOGOUT_LIMIT):
            with trio.move_on_after(min(patience, 0.8 * LOGOUT_LIMIT)):  # the rest is for the logout
                if not connection.idle:
                    await self._idle.wait()
            if not self._over:
                idle = connection.idle
                connection.request(LogoutRequest())
                self._send()
                if idle:
                    await self._answer.wait()

    def look(self) -> None:
        """To be called after whatever may have been the last thing under way."""
        if self._connection.idle:
            self._idle.set()

    def take_answer(self, answer: LogoutResponse | None) -> None:
        """The logout was answered; or rejected (None)."""
        if answer is not None:
            self.time2wait = answer.time2wait
        self.answered = True
        self._answer.set()

    def end(self) -> None:
        """The session has ended: there is nothing left to wait for."""
        self._over = True
        self._idle.set()
        self._answer.set()
