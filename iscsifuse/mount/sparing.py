"""A log that can't be flooded: a daemon lives for years, and a bad line has something to say at each moment.

Each place in the program that logs has its own budget: so many lines at once, then one every few seconds. What is
held back is counted, and the next line from there says how many there were. This is for the handlers, those of a
mount in the foreground included; who logs needn't think of it.
"""

import logging
import time
from collections.abc import Callable

__all__ = ["SparingFilter"]

BURST = 20
"""Lines from one place that may come at once."""
EVERY = 10.0
"""Seconds after which one more may."""


class _Budget:
    __slots__ = ("held_back", "left", "since")

    def __init__(self, now: float) -> None:
        self.left = float(BURST)
        self.since = now
        self.held_back = 0


class SparingFilter(logging.Filter):
    """For a handler of a mount. Bounded itself: there are so many places that log, and no more.

    Args:
        clock: seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._budgets: dict[tuple[str, int], _Budget] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record may pass; what was held back before it is told by it. CRITICAL always passes."""
        if record.levelno >= logging.CRITICAL:
            return True
        now = self._clock()
        place = record.pathname, record.lineno
        budget = self._budgets.get(place)
        if budget is None:
            budget = self._budgets[place] = _Budget(now)
        budget.left = min(float(BURST), budget.left + (now - budget.since) / EVERY)
        budget.since = now
        if budget.left < 1:
            budget.held_back += 1
            return False
        budget.left -= 1
        if budget.held_back:
            record.msg = f"{record.getMessage()} ({budget.held_back} like this were not logged)"
            record.args = None
            budget.held_back = 0
        return True
