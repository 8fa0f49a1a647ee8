"""What takes part: everything that turns a disk into a file, and what is measured without one."""

import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from bench import shell
from bench.host import take_back_memory
from bench.shell import ContenderError
from bench.stage import Disk, Stage
from support.cli import is_mounted

__all__ = ["SPARE", "Contender", "FileContender", "Opened", "take_away", "wait_for_file"]

SPARE = 128 << 20
"""Bytes of memory that any work may take, besides what it reads and writes."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Disks that are files now.

    Attributes:
        paths: the files, in the order in which the disks were asked for.
        pids: the processes that serve them.
        seconds: from the start of the first of these to the moment when the last file could be used.
        prefix: what commands that touch the files begin with, where they have to be another user's.
    """

    paths: list[Path]
    pids: list[int]
    seconds: float
    prefix: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The file, where there is only one."""
        return self.paths[0]

    def command(self, *words: str | Path) -> list[str | Path]:
        """A command that may touch the files."""
        return [*self.prefix, *words]

    def forget(self, *, room: int = 0) -> None:
        """Have the kernel drop what it has cached of the files, and have ``room`` bytes free that are really there.

        A fresh mount has nothing there, so this is to be sure. Dropping all caches of the machine would be worse: the
        programs that are measured would be read from a disk within the measurement, and only the first time.
        """
        for path in self.paths:
            shell.run(self.command("dd", f"if={path}", "iflag=nocache", "count=0"), timeout=20)
        if room:
            take_back_memory(room)


class Contender(ABC):
    """Somebody to be measured.

    Attributes:
        name: in tables, and for ``--contenders``.
        how: how it is set up, for the reader of the table.
        is_ours: whether it is iscsifuse.
        works: the names of the works that it is for, or None for all that it can do.
    """

    name: str
    how: str
    is_ours: ClassVar[bool] = False
    works: frozenset[str] | None = None

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    @abstractmethod
    def why_not(self) -> str | None:
        """Why it can't take part here, or None."""

    def close(self) -> None:  # noqa: B027 - most keep nothing
        """End what it keeps for longer than one measurement."""


class FileContender(Contender):
    """One that makes files of disks."""

    @abstractmethod
    def open(
        self, disks: Sequence[Disk], *, portal: str | None = None, read_only: bool = False
    ) -> AbstractContextManager[Opened]:
        """The files of some disks of one target, fresh and with nothing cached, for a ``with`` block.

        Args:
            disks: all of the same target.
            portal: where to log in instead of at the server itself.
            read_only: whether to have nobody write to them, as is the rule for evidence.
        """

    def url(self, disk: Disk, portal: str | None, *, lun: bool = True) -> str:
        """The URL of a disk, or of its target."""
        where = portal or self.stage.server.portal
        return f"iscsi://{where}/{disk.target}" + (f"/{disk.lun}" if lun else "")


def wait_for_file(path: Path, size: int, daemon: "subprocess.Popen[str]", log: Path, *, timeout: float = 20) -> None:
    """Wait until ``daemon`` has mounted a file of ``size`` bytes on ``path``."""
    deadline = time.monotonic() + timeout
    while not is_mounted(path):
        if daemon.poll() is not None:
            raise ContenderError(f"the daemon ended: {_last_words(log)}")
        if time.monotonic() > deadline:
            raise ContenderError(f"nothing was mounted in {timeout:.0f} s: {_last_words(log)}")
        time.sleep(0.002)
    shown = int(shell.run(["stat", "-c", "%s", path], timeout=timeout).out)
    if shown != size:
        raise ContenderError(f"the file has {shown} bytes instead of {size}")


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return " / ".join(lines[-3:]) or "it said nothing"


def take_away(path: Path) -> None:
    """Remove a mount whose daemon is gone, or is about to be; nothing happens where nothing is mounted."""
    if is_mounted(path):
        shell.run(["umount", "-l", path], timeout=20, statuses=range(256))
