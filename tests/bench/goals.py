"""What iscsifuse is meant to reach, and whether it did."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.footprint import CACHE_SIZE
from bench.results import Results
from support.disks import MIB

__all__ = ["Judged", "judge"]

_BOUND = (CACHE_SIZE + 60 * MIB) / MIB
_QSD = ("qsd",)
_BETTER_QSD = ("qsd", "qsd-new")


@dataclass(frozen=True, slots=True)
class _Goal:
    """A figure of ``ours`` at one work against the best of ``others``, or by itself where there are none."""

    work: str
    metric: str
    limit: float
    others: Sequence[str] = ()
    ours: str = "iscsifuse"
    at_most: bool = False


@dataclass(frozen=True, slots=True)
class Judged:
    """One goal, and what came of it; ``measured`` and ``met`` are None where something wasn't measured."""

    what: str
    against: str
    goal: str
    measured: float | None
    lowest: float | None
    highest: float | None
    met: bool | None


_GOALS = (
    _Goal("read-1m", "rate", 1.5, _QSD),
    _Goal("read-1m", "rate", 0.75, ("libiscsi",)),
    _Goal("read-1m", "rate", 1.2, _QSD, ours="iscsifuse-user"),
    _Goal("read-1m-fresh", "rate", 1.5, _QSD),
    _Goal("read-1m-fresh", "rate", 0.75, ("libiscsi",)),
    _Goal("read-direct", "rate", 1.0, _QSD),
    _Goal("write-1m", "rate", 1.5, _QSD),
    _Goal("write-1m", "rate", 0.85, ("libiscsi",)),
    _Goal("write-1m-fresh", "rate", 1.5, _QSD),
    _Goal("write-1m-fresh", "rate", 0.85, ("libiscsi",)),
    _Goal("write-4k", "rate", 2.0, _QSD),
    _Goal("random-read-1", "iops", 1.0, _BETTER_QSD),
    _Goal("random-read-16", "iops", 1.0, _BETTER_QSD),
    _Goal("random-read-32", "iops", 1.0, _BETTER_QSD),
    _Goal("random-write-1", "iops", 1.0, _QSD),
    _Goal("random-write-16", "iops", 2.0, _QSD),
    _Goal("warm-read", "rate", 0.8, ("tmpfs",)),
    _Goal("sleuthkit", "time", 1.5, _QSD),
    _Goal("loop-ext4", "time", 1.5, _QSD),
    _Goal("e2fsck", "time", 1.5, _QSD),
    _Goal("far-25ms-read", "of-line", 0.9),
    _Goal("far-25ms-write", "of-line", 0.9),
    _Goal("digests", "kept", 0.8),
    _Goal("digests-quick", "kept", 0.8),
    _Goal("read-1m", "cpu", 1.3, _QSD, at_most=True),
    _Goal("read-1m", "memory", _BOUND, at_most=True),
    _Goal("memory", "64-readers", _BOUND, at_most=True),
)


def judge(results: Results) -> list[Judged]:
    """All goals whose work and whose contenders were asked for."""
    return [_judge(goal, results) for goal in _GOALS if _took_part(goal, results)]


def _took_part(goal: _Goal, results: Results) -> bool:
    if goal.work not in results.works or goal.ours not in results.works[goal.work].series:
        return False
    return not goal.others or any(other in results.works[goal.work].series for other in goal.others)


def _judge(goal: _Goal, results: Results) -> Judged:
    work = results.works[goal.work]
    metric = next(metric for metric in work.metrics if metric.name == goal.metric)
    what = f"{goal.ours}: {work.title}" + ("" if metric is work.metrics[0] else f" ({goal.metric})")
    sign = "≤" if goal.at_most else "≥"
    measured = lowest = highest = None
    if goal.others:
        ratios = [(work.ratio(metric, goal.ours, other), other) for other in goal.others]
        known = [(ratio, other) for ratio, other in ratios if ratio is not None]
        against = " or ".join(goal.others)
        if known:
            # The best of the others is the one that we look worst against.
            choose = max if goal.at_most else min
            ratio, against = choose(known, key=lambda pair: pair[0].of_medians)
            measured, lowest, highest = ratio.of_medians, ratio.lowest, ratio.highest
    else:
        against = f"{metric.unit}"
        values = work.series[goal.ours].values(goal.metric) if goal.ours in work.series else []
        if values:
            measured, lowest, highest = results.median(goal.work, goal.metric, goal.ours), min(values), max(values)
            if metric.unit == "MiB":  # a bound is one for every round
                measured = highest
    met = None
    if measured is not None:
        met = measured <= goal.limit if goal.at_most else measured >= goal.limit
    return Judged(what, against, f"{sign} {goal.limit:g}", measured, lowest, highest, met)
