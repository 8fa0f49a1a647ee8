"""What was measured: figures of all rounds, their medians, and ratios of ours to those of the others."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.work import Metric

__all__ = ["Ratio", "Results", "Series", "WorkResult"]


@dataclass(slots=True)
class Series:
    """What one contender did at one kind of work.

    Attributes:
        rounds: the figures of each round, by metric.
        checked: in how many of these rounds every byte was compared.
        failure: why there are no more rounds, if there are not.
        wrong_bytes: whether the failure is that bytes were wrong.
        timed_out: whether the failure is that something took too long.
    """

    rounds: list[Mapping[str, float]] = field(default_factory=list)
    checked: int = 0
    failure: str | None = None
    wrong_bytes: bool = False
    timed_out: bool = False

    def values(self, metric: str) -> list[float]:
        """The figures of one metric, round by round."""
        return [figures[metric] for figures in self.rounds if metric in figures]

    def median(self, metric: str) -> float | None:
        """The middle one, or None if there are none."""
        values = self.values(metric)
        return statistics.median(values) if values else None


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as good (``of_medians``), and the lowest and highest that a single round would give.

    Better is more, whatever the metric; only of costs (CPU, memory) it is how many times as much.
    """

    of_medians: float
    lowest: float
    highest: float
    per_round: tuple[float, ...]


@dataclass(slots=True)
class WorkResult:
    """All contenders at one kind of work."""

    name: str
    title: str
    metrics: Sequence[Metric]
    series: dict[str, Series] = field(default_factory=dict)

    def ratio(self, metric: Metric, ours: str, other: str) -> Ratio | None:
        """``ours`` against ``other``, or None where one of them has no figure."""
        if ours not in self.series or other not in self.series:
            return None
        mine, theirs = self.series[ours], self.series[other]
        a, b = mine.median(metric.name), theirs.median(metric.name)
        if a is None or b is None:
            return None
        pairs = zip(mine.values(metric.name), theirs.values(metric.name), strict=False)
        per_round = tuple(_quotient(metric, one, two) for one, two in pairs)
        return Ratio(_quotient(metric, a, b), min(per_round), max(per_round), per_round)


def is_cost(metric: Metric) -> bool:
    """Whether a ratio of it says how much more we need, and not how much better we are."""
    return metric.unit in ("s/GiB", "MiB")


def _quotient(metric: Metric, ours: float, theirs: float) -> float:
    if not metric.higher_is_better and not is_cost(metric):
        ours, theirs = theirs, ours
    return ours / theirs if theirs else float("inf")


@dataclass(slots=True)
class Results:
    """The whole run.

    Attributes:
        machine: what it ran on, and versions.
        settings: how it was run.
        contenders: how each of them was set up, by name.
        skipped: why others did not take part, by name.
        works: what was measured, by name.
    """

    machine: Mapping[str, str]
    settings: Mapping[str, object]
    contenders: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    works: dict[str, WorkResult] = field(default_factory=dict)

    def median(self, work: str, metric: str, contender: str) -> float | None:
        """One figure, or None if it wasn't measured."""
        found = self.works.get(work)
        series = found.series.get(contender) if found else None
        return series.median(metric) if series else None

    def failures(self) -> list[tuple[str, str, Series]]:
        """Work, contender and what there is, of all that did not end well."""
        return [
            (work.name, name, series)
            for work in self.works.values()
            for name, series in work.series.items()
            if series.failure is not None
        ]
