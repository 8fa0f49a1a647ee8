"""``scripts/bench``: iscsifuse and the programs that do the same, side by side on this machine."""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.catalogue import all_contenders, all_works, chosen
from bench.contender import Contender
from bench.host import adopt_orphans, describe
from bench.report import as_json, as_markdown, as_text
from bench.results import Results
from bench.runner import run_work
from bench.stage import Sizes, Stage
from bench.work import Work
from support.disks import MIB
from support.process import sbin_path

_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures iscsifuse and other programs in turn, against one tgtd on this machine. It needs root. "
        "The exit status is 1 if iscsifuse failed at something, or anybody gave wrong bytes.",
    )
    parser.add_argument("--rounds", type=int, help="how often everything is measured (5; with --quick: 1)")
    parser.add_argument(
        "--quick", action="store_true", help="little of everything: shows that it works, not how fast"
    )
    parser.add_argument(
        "--only", metavar="WORK,…", help="these kinds of work, or all that begin so: read,random-read-1"
    )
    parser.add_argument("--contenders", metavar="NAME,…", help="these contenders only")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    parser.add_argument("--size", type=_size, metavar="SIZE", help="of the disk that is read and written (1G)")
    parser.add_argument("--qsd", type=Path, metavar="PROGRAM", help="another qemu-storage-daemon: contender qsd-new")
    parser.add_argument(
        "--qsd-poll-max-ns", type=int, metavar="N", help="of the iothread that it is given (QEMU's default)"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="FOLDER", help="another checkout of iscsifuse: contender iscsifuse-base"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and ratios there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    parser.add_argument(
        "--memory-folder",
        type=Path,
        default=Path("/dev/shm"),
        metavar="FOLDER",
        help="where the disks are (/dev/shm)",
    )
    return parser


def _size(text: str) -> int:
    number = text.upper().removesuffix("B").removesuffix("I")
    factor = _SUFFIXES.get(number[-1:], 1)
    size = int(number.rstrip("KMG")) * factor
    if size < 16 * MIB or size % (16 * MIB):
        raise argparse.ArgumentTypeError("a multiple of 16M, please")
    return size


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    os.environ["PATH"] = sbin_path()
    sizes = Sizes.for_run(quick=options.quick, size=options.size)
    rounds = options.rounds or (1 if options.quick else 5)
    stage = Stage(sizes, options.memory_folder)
    works = all_works(stage)
    contenders = all_contenders(stage, options)
    try:
        names = chosen([work.name for work in works], options.only)
        works = [work for work in works if work.name in names]
        names = chosen([contender.name for contender in contenders], options.contenders)
        contenders = [contender for contender in contenders if contender.name in names]
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        _list(works, contenders)
        return 0
    if os.geteuid() != 0:
        parser.error("it needs root: it mounts, attaches loop devices, and becomes another user")
    _check_space(parser, options.memory_folder, sizes)
    _end_by_exception()
    adopt_orphans()
    settings = {"rounds": rounds, "quick": options.quick, "size": f"{sizes.full // MIB} MiB"}
    results = Results(describe(options.qsd), settings)
    try:
        with stage, contextlib.ExitStack() as stack:
            _run(works, _present(contenders, results, stack), rounds, results)
    except KeyboardInterrupt:
        print("interrupted; this is what there is:", file=sys.stderr)
        _report(results, options)
        return 130
    _report(results, options)
    failed = any(series.wrong_bytes or name.startswith("iscsifuse") for _, name, series in results.failures())
    return 1 if failed else 0


def _list(works: Sequence[Work], contenders: Sequence[Contender]) -> None:
    for what, lines in (
        ("work", [(work.name, work.title) for work in works]),
        ("contenders", [(contender.name, contender.how) for contender in contenders]),
    ):
        print(f"{what}:")
        for name, text in lines:
            print(f"  {name:<16}  {text}")


def _check_space(parser: argparse.ArgumentParser, folder: Path, sizes: Sizes) -> None:
    """What is read, what is written, a copy, and two file systems."""
    space = os.statvfs(folder)
    wanted = 3 * sizes.full + 768 * MIB
    if space.f_bavail * space.f_frsize < wanted:
        parser.error(f"{folder} has less than {wanted // MIB} MiB to spare; give --size or --memory-folder")


def _end_by_exception() -> None:
    """Let SIGTERM and SIGHUP end the run as Ctrl-C does, so that everything is cleared up."""

    def interrupt(*_: object) -> None:
        for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)  # one is enough: clearing up isn't to be interrupted
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, interrupt)


def _present(contenders: Sequence[Contender], results: Results, stack: contextlib.ExitStack) -> list[Contender]:
    """Those that can take part here; of the others, why they can't."""
    present = []
    for contender in contenders:
        stack.callback(contender.close)
        if (reason := contender.why_not()) is None:
            present.append(contender)
            results.contenders[contender.name] = contender.how
        else:
            results.skipped[contender.name] = reason
            print(f"{contender.name}: left out: {reason}", file=sys.stderr)
    return present


def _run(works: Sequence[Work], contenders: Sequence[Contender], rounds: int, results: Results) -> None:
    for work in works:
        run_work(work, contenders, rounds, results)


def _report(results: Results, options: argparse.Namespace) -> None:
    print(as_text(results))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(results), indent=1) + "\n")
        print(f"figures: {options.json}")
    if options.markdown is not None:
        options.markdown.write_text(as_markdown(results))
        print(f"tables: {options.markdown}")


if __name__ == "__main__":
    sys.exit(main())
