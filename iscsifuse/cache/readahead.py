"""When to read ahead, and how far; pure policy, bytes in, ranges out.

Requests reach the cache slightly out of order (the kernel sends several at once, and trio shuffles tasks), from
several readers at the same time, in between random ones. Two tables, each least recently used first:

* *candidates*: segments that were read, keyed by their end. A request that begins where one ends makes it longer;
  one that ends where one begins, too, but proves nothing (that is how reading backwards looks). Segments that meet
  are joined, so the order of arrival within a stream doesn't matter. A candidate that was continued often enough
  is a sequential stream: once for large requests (the kernel saw a stream itself), twice for small ones.
* *streams*: the proven ones. A request that begins at a stream's end is found at once. One that begins close to it
  is the stream's too: it overtook, or was overtaken. Random requests can't push streams out, only other streams can.

A stream that turns out to be full of holes (less than a quarter of what it has passed was asked for) is none: a file
system check that hops from directory to directory shall not be given all that lies in between. Unless the target is
far away, where what lies in between costs less than one more round trip: see ``distance``, which also finds those who
never were a stream.

The window grows with the stream: it is as long as what was read so far, up to the setting, and up to this stream's
share of the memory. So what is read in vain is never much more than what was read with profit. Read-ahead is issued
in steps: as soon as half a window, or ``STEP`` where that is less, has been consumed since the last one, the window
is filled up again. So a full-grown stream keeps nearly its whole window in flight or in memory all the time, instead
of alternating between a full and a half one.
"""

from collections.abc import Callable

from iscsifuse.cache.distance import FAR, PLACE, SEEN, Leaps, Places
from iscsifuse.quick import known

__all__ = ["CANDIDATES", "LOOK_EVERY", "NEAR", "RandomReads", "ReadAhead", "Stream"]

INITIAL = 256 * 1024
STEP = 1 << 20
LARGE_REQUEST = 64 * 1024
NEAR = 2 << 20
SPARSE = 4
STREAMS = 16
CANDIDATES = 32
LOOK_EVERY = 32
"""Random requests between two looks at how far away the target is."""


@known
class Stream:
    """A sequential reader.

    Attributes:
        end: byte after what was read.
        issued: byte up to which read-ahead was issued.
        begun: first byte of it.
        behind: bytes behind ``end`` in which a request is taken for one that was overtaken.
        window: bytes that should lie between ``end`` and ``issued``.
        trigger: the ``end`` from which on the next step is due.
        passed: the ``end`` at the latest step.
        read: bytes that were asked for since then.
        requests: for how many of them it was.
        dead: forgotten; what was issued for it and not begun yet is pointless.
    """

    __slots__ = ("begun", "behind", "dead", "end", "issued", "passed", "read", "requests", "trigger", "window")

    def __init__(self, begun: int, end: int) -> None:
        self.begun = begun
        self.behind = NEAR
        self.end = self.issued = self.trigger = self.passed = end
        self.read = self.requests = self.window = 0
        self.dead = False


@known
class Candidate:
    __slots__ = ("continued", "end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.continued = 0


@known
class RandomReads:
    """Requests that belong to no stream.

    Attributes:
        candidates: segments by their end, oldest first.
        starts: the same by their start.
        count: how many requests were near to nothing, since everything was forgotten.
        is_far: whether the target was far away when that was last looked at.
    """

    __slots__ = ("candidates", "count", "is_far", "starts")

    def __init__(self) -> None:
        self.candidates: dict[int, Candidate] = {}
        self.starts: dict[int, Candidate] = {}
        self.count = 0
        self.is_far = False


class ReadAhead:
    """The streams of one LUN.

    Args:
        largest: the largest window, in bytes; at least 1.
        budget: bytes that the windows of all streams may have together.
        extent: bytes in an extent; ranges end at extent boundaries where they can.
        worth: how many bytes may be read in vain for a request that finds its data there; see ``distance``.
        passed: told of ranges whose readers have passed them; what was read there in vain needn't be kept.

    Attributes:
        streams: by their end, least recently used first.
        random: all other requests. Both are public for `iscsifuse.quick.take_stray`, which does what `observe` does
            where a request is near to nothing, and the target isn't far.
    """

    def __init__(
        self,
        *,
        largest: int,
        budget: int,
        extent: int,
        worth: Callable[[], int] = lambda: 0,
        passed: Callable[[int, int], None] = lambda start, stop: None,  # noqa: ARG005
    ) -> None:
        self._largest = largest
        self._budget = budget
        self._extent = extent
        self.streams: dict[int, Stream] = {}
        self.random = RandomReads()
        self._candidates = self.random.candidates
        self._starts = self.random.starts
        self._worth = worth
        self._passed = passed
        self._forget_afar()

    def observe(self, offset: int, end: int, *, size: int) -> tuple[Stream, int, int] | None:
        """A reader asks for the bytes ``offset`` to ``end - 1``.

        Args:
            offset: first byte.
            end: byte after the last one, greater than ``offset``.
            size: bytes in the device.

        Returns:
            What to read ahead now: the stream, the first byte, the byte after the last one; None for nothing.
        """
        stream = self.streams.pop(offset, None)
        if stream is None:
            return self._stray(offset, end, size)
        stream.end = end
        stream.read += end - offset
        stream.requests += 1
        self.streams[end] = stream
        if end < stream.trigger:
            return None
        return self._advance(stream, size)

    def failed(self, stream: Stream) -> None:
        """A read-ahead failed: begin small again."""
        stream.begun = stream.end

    def refused(self, stream: Stream, position: int) -> None:
        """There was no room from ``position`` on: take it back, and try again when half of the rest is consumed."""
        if position < stream.issued:
            stream.issued = max(position, stream.end)
            stream.trigger = (stream.end + stream.issued) // 2 + 1

    def reset(self) -> None:
        """Forget everything: the medium has changed."""
        for stream in self.streams.values():
            self._end(stream)
        self.streams.clear()
        self._candidates.clear()
        self._starts.clear()
        self._forget_afar()

    def _advance(self, stream: Stream, size: int) -> tuple[Stream, int, int] | None:
        share = min(self._largest, self._budget // max(1, len(self.streams)))
        end = stream.end
        passed = end - stream.passed
        if stream.read < passed:
            self._passed(stream.passed, end)
            if stream.read * SPARSE < passed and stream.requests * self._worth() < passed - stream.read:
                self._end(stream)
                del self.streams[end]
                return None
        stream.passed = end
        stream.read = stream.requests = 0
        window = stream.window = min(share, max(INITIAL, end - stream.begun))
        stream.trigger = end + max(1, min(window // 2, STEP))
        start = max(stream.issued, end)
        target = end + window
        if target > size:
            target = size
        else:
            whole = target - target % self._extent
            if whole > start:
                target = whole
        if target <= start:
            return None
        stream.issued = target
        return stream, start, target

    def _stray(self, offset: int, end: int, size: int) -> tuple[Stream, int, int] | None:
        """A request that doesn't begin at a stream's end."""
        for key, stream in self.streams.items():
            if key - stream.behind <= offset <= key + NEAR:
                del self.streams[key]
                stream.end = max(key, end)
                stream.read += end - offset
                stream.requests += 1
                self.streams[stream.end] = stream
                return self._advance(stream, size) if stream.end >= stream.trigger else None
        candidate = self._candidates.pop(offset, None)
        if candidate is not None:
            candidate.continued += 1
            candidate.end = end
        else:
            candidate = self._starts.pop(end, None)
            if candidate is not None:
                candidate.start = offset
                self._forget(candidate)
            elif end not in self._candidates and offset not in self._starts and end not in self._starts:
                # Near to nothing: a random request. The general way would end up here, too.
                self._make_room()
                self._candidates[end] = self._starts[offset] = Candidate(offset, end)
                return self._noted(offset, end, size)
            else:
                candidate = Candidate(offset, end)
        after = self._starts.get(candidate.end)
        if after is not None and after is not candidate:
            self._forget(after)
            candidate.end = after.end
            candidate.continued += after.continued + 1
        if candidate.continued >= (1 if end - offset >= LARGE_REQUEST else 2):
            self._forget(candidate)
            return self._promote(candidate.start, candidate.end, size)
        self._remember(candidate)
        return None

    def _noted(self, offset: int, end: int, size: int) -> tuple[Stream, int, int] | None:
        """A random request has become a candidate."""
        random = self.random
        if not random.count % LOOK_EVERY:  # There may be a hundred thousand of them in a second.
            random.is_far = self._worth() >= FAR
        random.count += 1
        return self._from_afar(offset, end, size) if random.is_far else None

    def _promote(self, start: int, end: int, size: int) -> tuple[Stream, int, int] | None:
        stream = Stream(start, end)
        if len(self.streams) >= STREAMS:
            self._end(self.streams.pop(next(iter(self.streams))))
        self.streams[end] = stream
        return self._advance(stream, size)

    def _from_afar(self, offset: int, end: int, size: int) -> tuple[Stream, int, int] | None:
        """A random request to a target for which a round trip is much."""
        worth = self._worth()
        begun = self._leaps.observe(offset, end, worth)
        if begun is not None:
            plan = self._promote(begun, end, size)
            self.streams[end].behind = 0  # Whoever asks for something there is somebody else.
            return plan
        if self._largest < PLACE or self._budget < SEEN * PLACE:
            return None
        place = self._places.observe(offset, worth)
        if place is None:
            return None
        left = self._places.left
        if left is not None:
            self._passed(left, left + PLACE)
        return Stream(place, place), place, min(place + PLACE, size)

    def _end(self, stream: Stream) -> None:
        stream.dead = True
        if stream.issued > stream.end:
            self._passed(stream.end, stream.issued)

    def _forget_afar(self) -> None:
        self._leaps = Leaps()
        self._places = Places()
        self.random.count = 0
        self.random.is_far = False

    def _remember(self, candidate: Candidate) -> None:
        for other in (self._candidates.get(candidate.end), self._starts.get(candidate.start)):
            if other is not None:
                self._forget(other)
        self._make_room()
        self._candidates[candidate.end] = candidate
        self._starts[candidate.start] = candidate

    def _make_room(self) -> None:
        if len(self._candidates) >= CANDIDATES:
            candidates, starts = self._candidates, self._starts
            oldest = candidates.pop(next(iter(candidates)))
            if starts.get(oldest.start) is oldest:
                del starts[oldest.start]

    def _forget(self, candidate: Candidate) -> None:
        """Take a candidate out of both tables, where it is (still) the one that stands there."""
        if self._candidates.get(candidate.end) is candidate:
            del self._candidates[candidate.end]
        if self._starts.get(candidate.start) is candidate:
            del self._starts[candidate.start]
