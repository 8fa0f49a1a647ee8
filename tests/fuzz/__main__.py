"""Runs one target under atheris: ``PYTHONPATH=tests .venv/bin/python -m fuzz TARGET``.

It ends with status 0 when its time is over, with another one at the first finding. Inputs that reach new code are
kept in the work folder, and the next run begins with them; so is the input of a finding, as ``finding-*``.
``--replay FILE`` runs the check on one file, without atheris.

The last line of standard output sums up::

    login: 812345 executions, 433 inputs in 900 CPU seconds, no finding
"""

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

MIB_LIMIT = 1024
"""MiB of memory that the whole process may take, atheris included."""
_HANG = 1200
"""Seconds without an end of one input. The check itself is stricter, and counts CPU time only."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("target")
    parser.add_argument("--minutes", type=float, default=1.0, help="CPU minutes (1)")
    parser.add_argument("--work", type=Path, default=Path("build/fuzz"), help="where inputs are kept (build/fuzz)")
    parser.add_argument("--replay", type=Path, help="check this file, and nothing else")
    options = parser.parse_args()
    if options.replay is not None:
        _target(options.target).run(options.replay.read_bytes())
        print(f"{options.replay}: no finding")
        return
    _fuzz(options.target, minutes=options.minutes, work=options.work)


def _target(name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202 - its type must not be imported yet
    """The target, imported now: what atheris watches has to be imported under its eyes."""
    targets = importlib.import_module("fuzz.targets").TARGETS
    if name not in targets:
        sys.exit(f"there is no target {name}: there are {', '.join(targets)}")
    return targets[name]


def _fuzz(name: str, *, minutes: float, work: Path) -> None:
    import atheris

    atheris.enabled_hooks.add("RegEx")
    atheris.enabled_hooks.add("str")
    with atheris.instrument_imports(include=["iscsifuse.scsi", "iscsifuse.iscsi", "iscsifuse.cli"]):
        target = _target(name)
    found = work / name / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    executions = 0
    limit = minutes * 60

    def one(data: bytes) -> None:
        nonlocal executions
        executions += 1
        try:
            target.run(data)
        except BaseException:
            _sum_up(name, executions, found, "A FINDING")
            raise
        if executions % 256 == 0 and time.process_time() > limit:
            _sum_up(name, executions, found, "no finding")
            os._exit(0)  # atheris has no other way to end without being killed

    dictionary = work / name / "words"
    dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words or (b"\0",)))  # not an empty one
    arguments = [
        sys.argv[0],
        str(found),
        str(target.seeds()[0].parent),
        f"-artifact_prefix={work / name}/finding-",
        f"-dict={dictionary}",
        f"-max_len={target.max_length}",
        f"-rss_limit_mb={MIB_LIMIT}",
        f"-timeout={_HANG}",
        "-print_final_stats=0",
        "-verbosity=0",
    ]
    atheris.Setup(arguments, one)
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    """As libFuzzer wants it."""
    return "".join(f"\\x{byte:02x}" for byte in word)


def _sum_up(name: str, executions: int, found: Path, verdict: str) -> None:
    inputs = sum(1 for _ in found.iterdir())
    seconds = time.process_time()
    print(f"{name}: {executions} executions, {inputs} inputs in {seconds:.0f} CPU seconds, {verdict}", flush=True)


if __name__ == "__main__":
    main()
