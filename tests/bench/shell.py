"""Commands as the benchmark runs them: in a session of their own, with a limit of time, gone when they are done.

Nothing in this package touches a file of a mount itself: a daemon that hangs would hang the benchmark with it, beyond
the reach of any limit. Whatever reads, writes or looks at such a file is a command.
"""

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.process import sbin_path

__all__ = ["ContenderError", "Ran", "TimedOutError", "WrongBytesError", "run", "run_together", "start"]


class ContenderError(Exception):
    """A contender could not do its work; the text says why."""


class TimedOutError(ContenderError):
    """A command of a contender had not ended in time."""


class WrongBytesError(ContenderError):
    """A contender gave or left bytes that aren't those it was given."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that ended well: how long it took, what it said, and the CPU seconds of it and its children."""

    seconds: float
    out: str
    err: str
    cpu: float


def run(
    command: Sequence[str | Path],
    *,
    timeout: float,
    folder: Path | None = None,
    output: Path | None = None,
    statuses: Sequence[int] = (0,),
) -> Ran:
    """Run a command to its end.

    Args:
        command: its words.
        timeout: seconds after which it is killed, with all its children, and a `ContenderError`.
        folder: where it runs; the root folder, unless told otherwise, so that nothing lands in the checkout.
        output: a file for its standard output.
        statuses: the exit statuses that mean that all went well.
    """
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(output.open("wb")) if output else subprocess.PIPE
        before = _children_cpu()
        began = time.perf_counter()
        process = stack.enter_context(start(command, folder=folder, stdout=out, stderr=subprocess.PIPE))
        said, complained = _communicate(process, command, timeout)
        seconds = time.perf_counter() - began
        cpu = _children_cpu() - before
    if process.returncode not in statuses:
        raise ContenderError(f"{_brief(command)} ended with {process.returncode}: {_tail(complained or said)}")
    return Ran(seconds, said, complained, cpu)


def run_together(commands: Sequence[Sequence[str | Path]], *, timeout: float) -> float:
    """Start all of these at once; the seconds until the last one has ended, each of them well."""
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        began = time.perf_counter()
        processes = [
            stack.enter_context(start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
            for command in commands
        ]
        said = [
            _communicate(process, command, deadline - time.monotonic())[1]
            for process, command in zip(processes, commands, strict=True)
        ]
        seconds = time.perf_counter() - began
    for process, command, text in zip(processes, commands, said, strict=True):
        if process.returncode:
            raise ContenderError(f"{_brief(command)} ended with {process.returncode}: {_tail(text)}")
    return seconds


@contextmanager
def start(
    command: Sequence[str | Path],
    *,
    folder: Path | None = None,
    stdout: int | object = subprocess.DEVNULL,
    stderr: int | object = subprocess.DEVNULL,
) -> Iterator["subprocess.Popen[str]"]:
    """A command that runs beside us; when the block is left, it and all its children are killed if they still run."""
    words = [str(word) for word in command]
    try:
        process = subprocess.Popen(
            words,
            cwd=folder or "/",
            env={**os.environ, "PATH": sbin_path(), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=stdout,  # type: ignore[arg-type]
            stderr=stderr,  # type: ignore[arg-type]
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise ContenderError(f"{words[0]} isn't installed") from error
    try:
        yield process
    finally:
        _end(process)


def _communicate(process: "subprocess.Popen[str]", command: Sequence[str | Path], timeout: float) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=max(timeout, 0.1))
    except subprocess.TimeoutExpired as expired:
        raise TimedOutError(f"{_brief(command)} had not ended after {timeout:g} s") from expired
    return out or "", err or ""


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # One that waits for a dead file system may outlive this; its daemon's end will be its own.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _brief(command: Sequence[str | Path]) -> str:
    return " ".join(str(word) for word in command)[:200]


def _tail(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-3:]) or "it said nothing"
