"""The results for people: a table for a terminal or for Markdown; and for programs: JSON."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench.goals import Judged, judge
from bench.results import Ratio, Results, Series, WorkResult
from bench.work import Metric

__all__ = ["as_json", "as_markdown", "as_text"]

SCHEMA = 1


def _figure(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cell(series: Series | None, metric: Metric) -> str:
    """The median, and the lowest and highest of the rounds; what is wrong where there is none."""
    if series is None:
        return "-"
    values = series.values(metric.name)
    mark = " (!)" if series.failure is not None else ""
    if not values:
        return "failed" if series.failure is not None else "-"
    median = series.median(metric.name)
    assert median is not None
    if len(values) == 1:
        return _figure(median) + mark
    return f"{_figure(median)} ({_figure(min(values))}–{_figure(max(values))}){mark}"


def _ours(results: Results) -> list[str]:
    return [name for name in results.contenders if name.startswith("iscsifuse")]


def _ratios(work: WorkResult, metric: Metric, results: Results) -> Iterable[tuple[str, str, Ratio]]:
    """Each of ours against each of the others, and against our own baseline."""
    ours = _ours(results)
    for mine in ours:
        for other in results.contenders:
            is_peer = other not in ours or (other == "iscsifuse-base" and mine == "iscsifuse")
            ratio = work.ratio(metric, mine, other) if is_peer else None
            if ratio is not None:
                yield mine, other, ratio


def _rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of all measurements."""
    names = list(results.contenders)
    head = ["work", "unit", *names, "iscsifuse against"]
    lines = []
    for work in results.works.values():
        for metric in work.metrics:
            cells = [_cell(work.series.get(name), metric) for name in names]
            if set(cells) <= {"-"}:
                continue
            title = work.title if metric is work.metrics[0] else f"… {metric.name}"
            # A difference in megabytes says more than how many times it is.
            ratios = [] if metric.unit == "MiB" else list(_ratios(work, metric, results))
            against = ", ".join(
                f"{other} ×{ratio.of_medians:.2f}" for mine, other, ratio in ratios if mine == "iscsifuse"
            )
            lines.append([title, metric.unit, *cells, against or "-"])
    return head, lines


def _goal_rows(judged: Sequence[Judged]) -> tuple[list[str], list[list[str]]]:
    head = ["goal", "against", "wanted", "measured", "rounds", "met"]
    lines = []
    for each in judged:
        spread = "-"
        if each.lowest is not None and each.highest is not None:
            spread = f"{_figure(each.lowest)}–{_figure(each.highest)}"
        met = {True: "yes", False: "NO", None: "-"}[each.met]
        measured = "-" if each.measured is None else _figure(each.measured)
        lines.append([each.what, each.against, each.goal, measured, spread, met])
    return head, lines


def _notes(results: Results) -> list[str]:
    notes = [f"{name}: {how}" for name, how in results.contenders.items()]
    notes += [f"{name}: left out: {reason}" for name, reason in results.skipped.items()]
    notes += [f"{work}: {name} failed: {series.failure}" for work, name, series in results.failures()]
    return notes


_LEGEND = (
    "Median of the rounds, in brackets the lowest and the highest; (!): failed in a later round. "
    "“×2.00” is twice as good as the other one; of CPU time it is how many times as much is needed. "
    "MB is a million bytes. Evidence is what Sleuth Kit, qemu-img convert, e2fsck and sha256sum read."
)


def as_text(results: Results) -> str:
    """For a terminal."""
    parts = [_machine_line(results), _aligned(*_rows(results)), _LEGEND, *_notes(results)]
    if judged := judge(results):
        parts.append("\n" + _aligned(*_goal_rows(judged)))
    return "\n".join(parts)


def as_markdown(results: Results) -> str:
    """For the documentation."""
    machine = [[name, value] for name, value in (*results.machine.items(), *_settings(results))]
    parts = [_piped(["", ""], machine), _piped(*_rows(results)), _LEGEND]
    parts.append("\n".join(f"- {note}" for note in _notes(results)))
    if judged := judge(results):
        parts.append(_piped(*_goal_rows(judged)))
    return "\n\n".join(parts) + "\n"


def _settings(results: Results) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in results.settings.items() if value is not None]


def _machine_line(results: Results) -> str:
    return "; ".join(f"{name} {value}" for name, value in (*results.machine.items(), *_settings(results)))


def _aligned(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, rule, *lines]
    )


def _piped(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in rows)


def as_json(results: Results) -> dict[str, Any]:
    """Everything, with the figures of each round."""
    return {
        "schema": SCHEMA,
        "machine": dict(results.machine),
        "settings": dict(results.settings),
        "contenders": results.contenders,
        "skipped": results.skipped,
        "works": {work.name: _work_as_json(work, results) for work in results.works.values()},
        "goals": [
            {
                "goal": each.what,
                "against": each.against,
                "wanted": each.goal,
                "measured": each.measured,
                "lowest": each.lowest,
                "highest": each.highest,
                "met": each.met,
            }
            for each in judge(results)
        ],
    }


def _work_as_json(work: WorkResult, results: Results) -> dict[str, Any]:
    return {
        "title": work.title,
        "contenders": {
            name: {"rounds": len(series.rounds), "checked": series.checked, "failure": series.failure}
            for name, series in work.series.items()
        },
        "metrics": {metric.name: _metric_as_json(work, metric, results) for metric in work.metrics},
    }


def _metric_as_json(work: WorkResult, metric: Metric, results: Results) -> dict[str, Any]:
    figures = {}
    for name, series in work.series.items():
        if values := series.values(metric.name):
            figures[name] = {
                "median": series.median(metric.name),
                "lowest": min(values),
                "highest": max(values),
                "values": values,
            }
    ratios: dict[str, dict[str, Any]] = {}
    for mine, other, ratio in _ratios(work, metric, results):
        ratios.setdefault(mine, {})[other] = {
            "of_medians": ratio.of_medians,
            "lowest": ratio.lowest,
            "highest": ratio.highest,
            "per_round": list(ratio.per_round),
        }
    return {
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "figures": figures,
        "ratios": ratios,
    }
