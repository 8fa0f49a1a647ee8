"""What a kind of work is to the benchmark, and helpers that most of them need."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import shell
from bench.contender import Contender, FileContender, Opened
from bench.shell import WrongBytesError
from bench.stage import Stage

__all__ = ["CPU", "MB", "MEMORY", "RATE", "SECONDS", "Metric", "Work", "compare_with_backing"]

MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Metric:
    """One of the figures that a measurement gives."""

    name: str
    unit: str
    higher_is_better: bool


RATE = Metric("rate", "MB/s", higher_is_better=True)
SECONDS = Metric("time", "s", higher_is_better=False)
CPU = Metric("cpu", "s/GiB", higher_is_better=False)
MEMORY = Metric("memory", "MiB", higher_is_better=False)


class Work(ABC):
    """One kind of work.

    Attributes:
        name: for ``--only`` and in JSON.
        title: for tables.
        metrics: what `measure` gives, the one that counts first.
        wants_check: whether the next `measure` is to compare what it reads, too.
        was_checked: whether the last `measure` has compared all bytes.
    """

    name: str
    title: str
    metrics: Sequence[Metric] = (RATE,)

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.patience = stage.sizes.patience
        self.wants_check = True
        self.was_checked = False

    def takes(self, contender: Contender) -> bool:
        """Whether this work is for ``contender``: for all that make files, unless they are here for other work."""
        return isinstance(contender, FileContender) and (contender.works is None or self.name in contender.works)

    def prepare(self) -> None:  # noqa: B027 - most works need nothing
        """Make what the work needs, before anything is measured."""

    def finish(self) -> None:  # noqa: B027 - most works need nothing
        """Take down what `prepare` has set up; called also when that has failed."""

    @abstractmethod
    def measure(self, contender: Contender) -> Mapping[str, float]:
        """Do the work once.

        What was written is compared every time, what was read if `wants_check` says so, which costs a second reading;
        `was_checked` says whether all was.

        Args:
            contender: who does it; one that `takes` lets in.

        Returns:
            A figure for each of `metrics`, by its name. One that a contender doesn't have is left out.
        """


def compare_with_backing(work: Work, opened: Opened, path: Path, backing: Path, length: int) -> None:
    """Read the first ``length`` bytes of a file once more, and have cmp(1) compare them."""
    command = opened.command("cmp", "-n", str(length), path, backing)
    try:
        shell.run(command, timeout=work.patience)
    except shell.ContenderError as error:
        raise WrongBytesError(str(error)) from error
    work.was_checked = True
