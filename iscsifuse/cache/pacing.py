"""How much to have under way: bandwidth times delay, and not much more.

Too little under way leaves the line idle; that is what makes a far target slow. Too much makes nothing faster:
commands queue up at the target, data queues up in socket buffers, and what comes last has fallen out of the
processor's caches when its turn comes. (With 16 MiB under way a target on the same machine gives 1.1 GB/s and takes
0.6 GB/s; with 3 MiB 1.4 GB/s and 1.0 GB/s.) No constant is right for both, so both factors are measured:

* the delay is that of the quickest command;
* the bandwidth is what arrived between the sending of a command and its end, divided by the time that took.

Three times their product is allowed, less a constant, since little is enough for what is near: whatever is limited by
us grows with each round trip, until the line is the limit; from then on the rest is a reserve. After a pause
everything is measured anew.

How wide the line is without its length is another question, and `Pacer.rate` answers it: what came, by the time it
took besides the wait that each command has.

The idea is that of TCP BBR (Cardwell et al., "BBR: Congestion-Based Congestion Control", ACM Queue 14/5, 2016).
"""

from collections.abc import Callable

import trio

__all__ = ["Pacer"]

LEAST = 3 << 20
"""Bytes that are always allowed: enough for whatever is near, with the largest commands."""
FIRST = 8 << 20
"""Bytes that are allowed while nothing is known: a far line would else begin slowly, and a near one doesn't mind."""
GAIN = 3.0
PAUSE = 1.0
"""Seconds without a command after which the line may have become another one."""
FADING = 1 / 16
"""How much less each command counts than the next one, for `Pacer.rate`."""
_UP = 0.5
_DOWN = 0.0625


class Pacer:
    """Decides whether one more background command may be sent.

    Args:
        clock: seconds.

    Attributes:
        under_way: bytes of the commands that have begun and not ended.
        limit: no command shall begin while there are that many or more.
    """

    __slots__ = ("_came", "_clock", "_delay", "_delivered", "_ended", "_rate", "_seen", "_took", "limit", "under_way")

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self.under_way = 0
        self.limit = FIRST
        self._clock = clock
        self._delivered = 0  # bytes of all commands that have ended well
        self._ended = 0.0
        self._delay = 0.0  # seconds; 0: unknown
        self._rate = 0.0  # bytes a second; 0: unknown
        self._seen = self._took = self._came = 0.0  # commands, seconds, bytes; fading

    @property
    def has_room(self) -> bool:
        """Whether one more command may begin; always, where none is under way."""
        return self.under_way < self.limit

    def rate(self, latency: float) -> float:
        """Bytes a second of the line, if a command waits so many seconds however small it is; 0 if unknown."""
        # Where the waits seem to be nearly all of it, all that is known is that the line is wide.
        return self._came / max(self._took - latency * self._seen, self._took / 16) if self._took else 0.0

    def begin(self, size: int) -> tuple[float, int]:
        """A command of so many bytes begins; what is returned is for `end`."""
        now = self._clock()
        if not self.under_way and now - self._ended > PAUSE:
            self._delay = self._rate = 0.0
            self.limit = FIRST
        self.under_way += size
        return now, self._delivered

    def end(self, size: int, begun: tuple[float, int], *, well: bool) -> None:
        """It has ended; one that has failed teaches nothing."""
        self.under_way -= size
        now = self._ended = self._clock()
        if not well:
            return
        self._delivered += size
        began, delivered = begun
        took = now - began
        if took <= 0:
            return
        if not self._delay or took < self._delay:
            self._delay = took
        came = self._delivered - delivered
        self._seen += 1 - FADING * self._seen
        self._took += took - FADING * self._took
        self._came += came - FADING * self._came
        rate = came / took
        self._rate += (_UP if rate > self._rate else _DOWN) * (rate - self._rate)
        self.limit = max(LEAST, int(GAIN * self._rate * self._delay) - LEAST)
