"""What the benchmark computes, and how it notices that bytes are wrong."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from bench.catalogue import chosen
from bench.contender import Contender
from bench.contents import changed_blocks, fill, require_pattern, require_same
from bench.goals import judge
from bench.report import as_json, as_markdown, as_text
from bench.results import Results, Series, WorkResult
from bench.runner import run_work
from bench.shell import ContenderError, WrongBytesError, run, run_together
from bench.stage import Sizes, Stage
from bench.work import CPU, RATE, SECONDS, Work
from support.disks import MIB, random_file, sparse


def series(metric: str, *values: float) -> Series:
    return Series([{metric: value} for value in values], checked=len(values))


def results(work: WorkResult) -> Results:
    return Results({}, {}, dict.fromkeys(work.series, "as ever"), {}, {work.name: work})


class TestRatios:
    def test_of_rates_it_is_how_many_times_faster(self) -> None:
        work = WorkResult("w", "W", [RATE], {"a": series("rate", 100, 300, 200), "b": series("rate", 100, 100, 50)})
        ratio = work.ratio(RATE, "a", "b")
        assert ratio is not None
        assert (ratio.of_medians, ratio.lowest, ratio.highest) == (2, 1, 4)
        assert ratio.per_round == (1, 3, 4)

    def test_of_times_it_is_how_many_times_faster_too(self) -> None:
        work = WorkResult("w", "W", [SECONDS], {"a": series("time", 1), "b": series("time", 3)})
        ratio = work.ratio(SECONDS, "a", "b")
        assert ratio is not None
        assert ratio.of_medians == 3

    def test_of_costs_it_is_how_many_times_as_much(self) -> None:
        work = WorkResult("w", "W", [CPU], {"a": series("cpu", 3), "b": series("cpu", 2)})
        ratio = work.ratio(CPU, "a", "b")
        assert ratio is not None
        assert ratio.of_medians == 1.5

    def test_there_is_none_without_figures(self) -> None:
        work = WorkResult("w", "W", [RATE], {"a": series("rate", 1), "b": Series(failure="crashed")})
        assert work.ratio(RATE, "a", "b") is None
        assert work.ratio(RATE, "a", "c") is None


class TestGoals:
    def test_against_the_better_one_of_two(self) -> None:
        rounds = {
            "iscsifuse": series("iops", 100),
            "qsd": series("iops", 50),
            "qsd-new": series("iops", 200),
        }
        work = WorkResult("random-read-1", "random", [RATE.__class__("iops", "IOPS", higher_is_better=True)], rounds)
        (judged,) = judge(results(work))
        assert (judged.against, judged.measured, judged.met) == ("qsd-new", 0.5, False)

    def test_one_that_was_not_measured_is_neither_met_nor_missed(self) -> None:
        rounds = {"iscsifuse": series("rate", 100), "libiscsi": Series(failure="crashed")}
        (judged,) = judge(results(WorkResult("write-1m", "write", [RATE], rounds)))
        assert (judged.measured, judged.met) == (None, None)

    def test_one_that_was_not_asked_for_is_left_out(self) -> None:
        assert judge(results(WorkResult("write-1m", "write", [RATE], {"qsd": series("rate", 1)}))) == []


def test_reports_show_failures_and_ratios() -> None:
    rounds = {
        "iscsifuse": series("rate", 300, 200),
        "qsd": series("rate", 100, 100),
        "x": Series(failure="it | broke"),
    }
    found = results(WorkResult("write-1m", "write: dd", [RATE], rounds))
    assert "qsd ×2.50" in as_text(found)
    assert "it | broke" in as_text(found)
    assert "250 (200–300)" in as_markdown(found)
    document = as_json(found)
    assert document["works"]["write-1m"]["metrics"]["rate"]["ratios"]["iscsifuse"]["qsd"]["per_round"] == [3, 2]
    assert document["works"]["write-1m"]["contenders"]["x"]["failure"] == "it | broke"
    assert document["goals"][0]["met"] is True


def test_names_are_chosen_in_full_or_by_their_beginning() -> None:
    names = ["read-1m", "read-cat", "readers", "qsd", "qsd-new"]
    assert chosen(names, None) == names
    assert chosen(names, "read") == ["read-1m", "read-cat"]
    assert chosen(names, "qsd,readers") == ["readers", "qsd"]
    with pytest.raises(ValueError, match="'writers' is none of"):
        chosen(names, "writers")


# --- the order of things ---


class Named(Contender):
    how = "not at all"

    def __init__(self, stage: Stage, name: str) -> None:
        super().__init__(stage)
        self.name = name

    def why_not(self) -> str | None:
        return None


class Diary(Work):
    name = "diary"
    title = "notes who was there"

    def __init__(self, stage: Stage, trouble: Mapping[str, Exception]) -> None:
        super().__init__(stage)
        self.seen: list[tuple[str, bool]] = []
        self.trouble = trouble
        self.finished = False

    def takes(self, contender: Contender) -> bool:
        return contender.name != "stranger"

    def measure(self, contender: Contender) -> Mapping[str, float]:
        self.seen.append((contender.name, self.wants_check))
        if contender.name in self.trouble:
            raise self.trouble[contender.name]
        return {"rate": 1.0}

    def finish(self) -> None:
        self.finished = True


def test_contenders_take_turns_also_at_beginning_and_one_that_fails_is_not_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Stage(Sizes.for_run(quick=True, size=None), tmp_path)
    work = Diary(stage, {"b": WrongBytesError("at 7"), "c": ContenderError("it crashed")})
    found = Results({}, {})
    run_work(work, [Named(stage, name) for name in ("a", "b", "stranger", "c", "d")], 3, found)
    first = [("a", True), ("b", True), ("c", True), ("d", True)]
    assert work.seen == [*first, ("a", False), ("d", False), ("d", False), ("a", False)]
    assert work.finished
    assert [(name, series.failure, series.wrong_bytes) for _, name, series in found.failures()] == [
        ("b", "at 7", True),
        ("c", "it crashed", False),
    ]
    assert "diary, round 1 of 3: b: FAILED: at 7" in capsys.readouterr().err


# --- commands, and bytes ---


def test_a_command_that_fails_or_hangs_is_told() -> None:
    assert run(["echo", "hello"], timeout=10).out == "hello\n"
    with pytest.raises(ContenderError, match="ended with 3: oh no"):
        run(["sh", "-c", "echo oh no >&2; exit 3"], timeout=10)
    with pytest.raises(ContenderError, match=r"had not ended after 0\.2 s"):
        run(["sleep", "60"], timeout=0.2)
    with pytest.raises(ContenderError, match="nobody-has-this isn't installed"):
        run(["nobody-has-this"], timeout=10)
    with pytest.raises(ContenderError, match="false ended with 1"):
        run_together([["true"], ["false"]], timeout=10)


def test_wrong_bytes_are_found(tmp_path: Path) -> None:
    one = random_file(tmp_path / "one", 3 * MIB)
    two = random_file(tmp_path / "two", 3 * MIB)
    require_same(one, two, 3 * MIB, "copies")
    with two.open("r+b") as file:
        file.seek(2 * MIB + 5)
        file.write(b"xx")
    require_same(one, two, 2 * MIB, "copies")
    with pytest.raises(WrongBytesError, match=f"copies: wrong bytes in the MiB at {2 * MIB}"):
        require_same(one, two, 3 * MIB, "copies")
    require_pattern(fill(two, 7), 3 * MIB, 7, "patterns")
    with pytest.raises(WrongBytesError, match="patterns"):
        require_pattern(two, 3 * MIB, 8, "patterns")


def test_blocks_are_counted_and_half_written_ones_are_wrong(tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk", 3 * MIB)
    with disk.open("r+b") as file:
        for block in (0, 255, 256, 700):
            file.seek(block * 4096)
            file.write(b"p" * 4096)
    assert changed_blocks(disk, block=4096, pattern=b"p" * 4096) == 4
    with disk.open("r+b") as file:
        file.seek(500 * 4096)
        file.write(b"p" * 512)
    with pytest.raises(WrongBytesError, match=f"the block at {500 * 4096}"):
        changed_blocks(disk, block=4096, pattern=b"p" * 4096)
