"""The command ``mount.iscsifuse``: how mount(8) carries out ``mount -t iscsifuse URL MOUNTPOINT -o LIST``.

mount(8) looks for ``/sbin/mount.iscsifuse``, and calls it with ``spec dir [-sfnv] [-N namespace] [-o options] [-t
type]``. It is ``iscsifuse mount`` with another grammar: here ``-f`` means *fake*, check everything and mount nothing.
"""

import argparse
import sys
from collections.abc import Sequence

from iscsifuse import __version__
from iscsifuse.cli import mount
from iscsifuse.cli.main import Parser, hide_passwords_of, prepare_output, report, set_up_logging
from iscsifuse.cli.options import parse_list

__all__ = ["main", "run"]


def main() -> None:
    """The script ``mount.iscsifuse``."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Carries out what mount(8) asks for; returns one of its exit statuses."""
    verbosity = 0
    try:
        prepare_output()
        hide_passwords_of(arguments)
        given = _parser().parse_args(arguments)
        verbosity = given.verbosity
        set_up_logging(verbosity)
        settings = [setting for text in given.lists for setting in parse_list(text)]
        if given.fake:
            mount.check(given.url, given.mountpoint, settings)
            return 0
        plan = mount.plan_of(given.url, given.mountpoint, settings, foreground=False, verbosity=verbosity)
        return mount.carry_out(plan)
    except BaseException as error:  # report() raises again what isn't to be reported
        return report(error, verbosity=verbosity, mount_bits=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mount.iscsifuse",
        usage="mount -t iscsifuse URL MOUNTPOINT [-o LIST]",
        description="The helper of mount(8) for iscsifuse. To mount by hand, there is iscsifuse mount.",
        allow_abbrev=False,
    )
    parser.add_argument("url", metavar="URL", help="a portal, a target, or one LUN")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an empty directory, or a regular file for one LUN")
    parser.add_argument("-o", dest="lists", action="append", default=[], metavar="LIST", help="name=value,…")
    parser.add_argument("-f", dest="fake", action="store_true", help="fake: check everything, mount nothing")
    parser.add_argument("-v", dest="verbosity", action="count", default=0, help="log more")
    parser.add_argument("-n", dest="ignored", action="store_true", help="ignored (there is no mtab to leave alone)")
    parser.add_argument("-s", dest="ignored", action="store_true", help="ignored")
    parser.add_argument("-N", dest="ignored", metavar="NAMESPACE", help="ignored (mount(8) has entered it already)")
    parser.add_argument("-t", dest="ignored", metavar="TYPE", help="ignored")
    parser.add_argument("--version", action="version", version=f"iscsifuse {__version__}")
    return parser
