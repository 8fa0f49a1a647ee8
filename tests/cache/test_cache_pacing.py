"""How much is let under way: a line is simulated, and the pacer has to find out how long and how wide it is."""

import heapq

import pytest

from iscsifuse.cache.pacing import GAIN, LEAST, PAUSE, Pacer

MIB = 1 << 20


class Line:
    """Serves one command after the other at ``rate`` bytes a second; what it says takes ``delay`` seconds besides."""

    def __init__(self, *, delay: float, rate: float) -> None:
        self.now = 100.0
        self.delay = delay
        self.rate = rate
        self.free = 0.0
        self.pacer = Pacer(lambda: self.now)

    def run(self, seconds: float, *, size: int = MIB) -> float:
        """Have as much under way as the pacer lets; returns bytes a second of the second half."""
        ends: list[tuple[float, tuple[float, int]]] = []
        stop = self.now + seconds
        half = self.now + seconds / 2
        moved = 0
        while self.now < stop:
            while self.pacer.has_room:
                begun = self.pacer.begin(size)
                self.free = max(self.free, self.now + self.delay / 2) + size / self.rate
                heapq.heappush(ends, (self.free + self.delay / 2, begun))
            self.now, begun = heapq.heappop(ends)
            self.pacer.end(size, begun, well=True)
            if self.now > half:
                moved += size
        while ends:
            self.now, begun = heapq.heappop(ends)
            self.pacer.end(size, begun, well=True)
        return moved / (seconds / 2)


@pytest.mark.parametrize("delay", [0.005, 0.025, 0.1])
def test_a_far_line_is_filled(delay: float) -> None:
    line = Line(delay=delay, rate=125e6)
    assert line.run(4) > 0.95 * line.rate
    assert line.pacer.under_way == 0
    # Not much more than what is meant to be, the command itself included.
    assert line.pacer.limit <= max(LEAST, 1.15 * GAIN * line.rate * (delay + MIB / line.rate))


def test_a_near_line_is_not_swamped() -> None:
    line = Line(delay=0.0001, rate=1.4e9)
    assert line.run(1) > 0.95 * line.rate
    assert line.pacer.limit <= 4 * MIB


def test_a_line_that_was_busy_with_others_is_found_out_after_a_pause() -> None:
    line = Line(delay=0.025, rate=10e6)
    line.run(2)
    few = line.pacer.limit
    line.rate = 125e6
    line.now += PAUSE + 0.1
    assert line.run(4) > 0.95 * line.rate
    assert line.pacer.limit > few


def test_small_commands_are_not_held_back() -> None:
    pacer = Pacer(lambda: 0.0)
    begun = [pacer.begin(4096) for _ in range(700)]
    assert pacer.has_room
    for one in begun:
        pacer.end(4096, one, well=True)
    assert pacer.under_way == 0


def test_one_command_may_always_begin() -> None:
    pacer = Pacer(lambda: 0.0)
    room = [pacer.has_room]
    begun = pacer.begin(100 * MIB)
    room.append(pacer.has_room)
    pacer.end(100 * MIB, begun, well=False)
    room.append(pacer.has_room)
    assert room == [True, False, True]


def test_failures_teach_nothing() -> None:
    line = Line(delay=0.025, rate=125e6)
    line.run(2)
    limit = line.pacer.limit
    begun = line.pacer.begin(MIB)
    line.now += 0.000001
    line.pacer.end(MIB, begun, well=False)
    assert line.pacer.limit == limit
    assert line.pacer.under_way == 0


@pytest.mark.parametrize("size", [256 * 1024, MIB])
@pytest.mark.parametrize(("delay", "rate"), [(0.025, 125e6), (0.025, 12.5e6), (0.005, 125e6), (0.1, 1e6)])
def test_how_wide_a_line_is_can_be_told_from_how_long_it_is(delay: float, rate: float, size: int) -> None:
    """From one command at a time, and from as many as are let."""
    line = Line(delay=delay, rate=rate)
    assert line.pacer.rate(delay) == 0
    for _ in range(8):
        begun = line.pacer.begin(size)
        line.now += delay + size / rate
        line.pacer.end(size, begun, well=True)
    carrying = max(size / rate, (delay + size / rate) / 16)
    assert line.pacer.rate(delay) == pytest.approx(size / carrying)
    line.run(20, size=size)
    assert 0.9 * rate < line.pacer.rate(delay) < 2 * rate
    line.now += 10 * PAUSE
    assert line.pacer.rate(delay)  # it is the line's, not the moment's


def test_a_line_that_is_all_waiting_is_wide() -> None:
    line = Line(delay=0.025, rate=1e12)
    line.pacer.end(4096, line.pacer.begin(4096), well=True)
    assert line.pacer.rate(0.025) == 0  # no time has passed
    begun = line.pacer.begin(4096)
    line.now += 0.025
    line.pacer.end(4096, begun, well=True)
    assert 0 < line.pacer.rate(0.025) < 1e8
