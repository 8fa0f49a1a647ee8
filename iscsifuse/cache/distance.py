"""What pays over a long line only: to read in vain, where that costs less than one more round trip.

Two kinds of readers are none of a stream's, and wait for a whole round trip with each request:

* `Leaps`: who goes forward in leaps, from directory to directory, or from one file of a list to the next. No request
  begins where another one ended, but each lies a little further on than the one before. Whoever leaps often enough
  becomes a stream with holes.
* `Places`: who asks for one thing here and one there, but all of it in one neighbourhood: the files of a directory in
  the order of their names' hashes. The neighbourhood is read as a whole as soon as the waits for what was asked for
  in it have cost as much as that would: at worst both are paid.

*Worth* is the number of bytes that may be read in vain for one request that finds its data there. Where the target is
near that is nothing: there a request costs processor time, ours and the target's, and so do bytes; a file system
check is quicker without what lies between the directories.
"""

from collections import deque

__all__ = ["FAR", "Leaps", "Places", "worth"]

NEAR = 0.001
"""Seconds that a command takes where the target is near."""
SHARE = 0.5
"""Of a round trip: the rest is the profit, and the margin for what isn't known exactly."""
ASSUMED_RATE = 100e6
"""Bytes a second of a line about which nothing is known yet; that will be known after the first read-ahead."""
FAR = 256 * 1024
"""Bytes that a request must be worth, for anybody to be watched. (Over 25 ms and 100 Mbit/s it is 150 KiB. There a
file system check, which has several requests under way, was slower with all this than without.)"""

PROOF = 4
"""Leaps that make a reader one who leaps. So many in a row by chance, each into one of the ways below: never."""
LONGEST = 2 << 20
"""Bytes of a leap: from the end of one request to the beginning of the next."""
READERS = 8
"""How many may be about to prove themselves in a LUN."""

PLACE = 2 << 20
"""Bytes of a neighbourhood."""
FEWEST = 3
"""Requests that make one, however much each is worth: of a GiB, two in one place are often there by chance."""
RECENT = 64
"""How many requests are remembered."""
SEEN = 8
"""Places that were read as a whole, and are kept, whatever is used of them."""


def worth(latency: float, rate: float) -> int:
    """How many bytes the line carries in the time that one request less saves, or rather in a part of it.

    Args:
        latency: seconds that a small command takes; 0 if unknown.
        rate: bytes a second of the line; 0 if unknown.
    """
    return int(SHARE * latency * (rate or ASSUMED_RATE)) if latency >= NEAR else 0


class _Reader:
    __slots__ = ("begun", "end", "leaps", "read")

    def __init__(self, begun: int, end: int) -> None:
        self.begun = begun
        self.end = end
        self.leaps = 0
        self.read = end - begun


class Leaps:
    """Those who may be leaping in one LUN."""

    def __init__(self) -> None:
        self._readers: list[_Reader] = []  # the latest first

    def observe(self, offset: int, end: int, worth: int) -> int | None:
        """A request that continues nothing, for the bytes ``offset`` to ``end - 1``.

        Args:
            offset: first byte.
            end: byte after the last one.
            worth: bytes that it is worth; see the module.

        Returns:
            Where the reader began whose leap this was, if it has proven itself; it is forgotten here then.
        """
        near = [reader for reader in self._readers if reader.end <= offset <= reader.end + LONGEST]
        if not near:
            self._readers.insert(0, _Reader(offset, end))
            del self._readers[READERS:]
            return None
        reader = max(near, key=lambda reader: reader.end)
        self._readers.remove(reader)
        reader.end = end
        reader.leaps += 1
        reader.read += end - offset
        if reader.leaps < PROOF:
            self._readers.insert(0, reader)
            return None
        if (reader.leaps + 1) * worth < end - reader.begun - reader.read:
            return None  # Too far apart: it has to begin again.
        return reader.begun


class Places:
    """Where in one LUN something was asked for of late.

    Attributes:
        left: first byte of the place that was given up for the latest one, if any was.
    """

    def __init__(self) -> None:
        self.left: int | None = None
        self._recent: deque[int] = deque(maxlen=RECENT)
        self._seen: deque[int] = deque()

    def observe(self, offset: int, worth: int) -> int | None:
        """A request that continues nothing, and leaps nowhere.

        Args:
            offset: its first byte.
            worth: bytes that it is worth; see the module.

        Returns:
            First byte of the place that is to be read as a whole.
        """
        place = offset // PLACE
        if place in self._seen:
            return None
        self._recent.append(place)
        times = self._recent.count(place)
        if times < FEWEST or times * worth < PLACE:
            return None
        self._seen.append(place)
        self.left = self._seen.popleft() * PLACE if len(self._seen) > SEEN else None
        return place * PLACE
