"""The order of things: for each work, round after round, every contender in turn.

Each round begins with another contender, and every other one goes backwards: whoever comes first, or after somebody
who leaves much behind, may have to pay for that.
"""

import contextlib
import subprocess
import sys
from collections.abc import Sequence

from bench.contender import Contender
from bench.results import Results, Series, WorkResult
from bench.shell import ContenderError, TimedOutError, WrongBytesError
from bench.work import Work

__all__ = ["run_work"]

_PATIENCE = 2  # kinds of work at which a contender may hang; each time costs minutes


def run_work(work: Work, contenders: Sequence[Contender], rounds: int, results: Results) -> None:
    """Measure one kind of work: A B C B A C C A B ..., so that a machine that slows down does so for all.

    A contender that fails isn't asked again; what it did until then is kept, with the reason. What is read is
    compared in the first round, and for iscsifuse in all of them; what is written, always.
    """
    hung = [name for _, name, series in results.failures() if series.timed_out]
    taking = [
        contender for contender in contenders if work.takes(contender) and hung.count(contender.name) < _PATIENCE
    ]
    if not taking:
        return
    result = WorkResult(work.name, work.title, work.metrics, {contender.name: Series() for contender in taking})
    results.works[work.name] = result
    with contextlib.ExitStack() as stack:
        stack.callback(work.finish)
        try:
            work.prepare()
        except ContenderError as error:
            for series in result.series.values():
                series.failure = f"could not be prepared: {error}"
            _tell(f"{work.name}: could not be prepared: {error}")
            return
        for number in range(rounds):
            step = -1 if number % 2 else 1
            for position in range(len(taking)):
                contender = taking[(number + step * position) % len(taking)]
                series = result.series[contender.name]
                if series.failure is None:
                    work.wants_check = number == 0 or contender.is_ours
                    _measure(work, contender, series)
                    _tell(f"{work.name}, round {number + 1} of {rounds}: {contender.name}: {_latest(series, work)}")


def _measure(work: Work, contender: Contender, series: Series) -> None:
    work.was_checked = False
    try:
        figures = work.measure(contender)
    except (ContenderError, OSError, AssertionError, KeyError, ValueError, subprocess.SubprocessError) as error:
        # A peer that crashes is a line in the table. A mistake of ours looks the same there, and is told as well.
        kind = "" if isinstance(error, ContenderError) else f"{type(error).__name__}: "
        series.failure = kind + " / ".join(str(error).splitlines()[:3])
        series.wrong_bytes = isinstance(error, WrongBytesError)
        series.timed_out = isinstance(error, TimedOutError)
        return
    series.rounds.append(figures)
    series.checked += work.was_checked


def _latest(series: Series, work: Work) -> str:
    if series.failure is not None:
        return f"FAILED: {series.failure}"
    return ", ".join(
        f"{series.rounds[-1][metric.name]:.4g} {metric.unit}"
        for metric in work.metrics
        if metric.name in series.rounds[-1]
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
