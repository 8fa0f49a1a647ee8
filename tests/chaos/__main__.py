"""``scripts/chaos``: a mount under load while connections, target and disks fail, by a seeded schedule.

Four loads run all the time: a writer with a memory, and fio with verification; each on a raw disk, and in an ext4 on
a loop device. In the end the files behind the disks have to hold exactly what was written.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from chaos.campaign import Campaign, write_report
from chaos.faults import KINDS, Kind
from chaos.world import Sizes, World
from support.process import sbin_path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description="Breaks connections, target and disks under a mount that is being written, and compares every "
        "byte in the end. It needs root. The exit status is 1 if anything was lost, hung, grew, or died.",
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="how long there are faults (3)")
    parser.add_argument("--seed", type=int, default=1, help="of the schedule and of what is written (1)")
    parser.add_argument("--at-least", type=int, default=0, metavar="N", help="go on until there were so many faults")
    parser.add_argument("--faults", type=_kinds, default=KINDS, metavar="KIND,…", help="these kinds only")
    parser.add_argument("--list", action="store_true", help="say which kinds there are, and end")
    parser.add_argument(
        "--distance", type=float, default=0.0, metavar="MS", help="milliseconds of a round trip to the target"
    )
    parser.add_argument("--options", default="", metavar="LIST", help="more options of the mount, as after -o")
    parser.add_argument("--short", action="store_true", help="small disks, for a run of seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there, and leave files and logs")
    return parser


def _kinds(text: str) -> tuple[Kind, ...]:
    wanted = text.split(",")
    known = {kind.name.replace(" ", "-"): kind for kind in KINDS}
    try:
        return tuple(known[name.strip().replace(" ", "-")] for name in wanted)
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"{error.args[0]} is no kind of fault; see --list") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        for kind in KINDS:
            print(f"{kind.name.replace(' ', '-'):<16} {kind.what}")
        return 0
    if os.geteuid() != 0:
        parser.error("it needs root: it kills connections, attaches a loop device, and mounts")
    os.environ["PATH"] = sbin_path()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    with contextlib.ExitStack() as stack:
        if options.keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="iscsifuse-chaos-")))
        else:
            folder = options.keep
            folder.mkdir(parents=True, exist_ok=True)
        sizes = Sizes.short() if options.short else Sizes()
        try:
            with World(folder.resolve(), sizes, options=options.options, distance=options.distance / 1000) as world:
                campaign = Campaign(world, options.faults, seed=options.seed)
                report = campaign.run(options.minutes * 60, faults=options.at_least)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        print(report.as_text(options.faults))
        if options.json is not None:
            write_report(report, options.json)
        return 1 if report.wrong else 0


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
