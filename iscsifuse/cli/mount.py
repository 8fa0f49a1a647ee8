"""``iscsifuse mount``: a URL becomes files."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from iscsifuse.cli.options import Options, Setting, add_flags, resolve
from iscsifuse.errors import UsageError

if TYPE_CHECKING:
    from iscsifuse.cli.url import IscsiUrl
    from iscsifuse.mount.plan import MountPlan

__all__ = ["DESCRIPTION", "HELP", "carry_out", "check", "configure", "plan_of", "run"]

HELP = "mount a portal, a target or a LUN"
DESCRIPTION = (
    "Logs in and shows every disk LUN as a file lun-<n>, in a directory for each target where the URL is a portal. "
    "A URL with a LUN can be mounted on a regular file, which then is the disk. Read-only unless --rw is given."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Gives the parser its arguments."""
    parser.add_argument("url", metavar="URL", help="a portal, a target, or one LUN")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an empty directory, or a regular file for one LUN")
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in front")
    add_flags(parser, mount=True)


def run(namespace: argparse.Namespace) -> int:
    """Carries it out; returns the exit status, one of mount(8)'s."""
    return carry_out(
        plan_of(
            namespace.url,
            namespace.mountpoint,
            namespace.settings,
            foreground=namespace.foreground,
            verbosity=namespace.verbosity,
        )
    )


def check(url: str, mountpoint: str, settings: Sequence[Setting]) -> "tuple[IscsiUrl, Path, Options]":
    """Reads what was typed, and finds whether it can be meant. Nothing is connected to, and nobody is asked anything.

    Raises:
        UsageError: in one sentence, what can't be meant.
    """
    from iscsifuse.cli.url import parse

    options = resolve(settings)
    parsed = parse(url)
    if parsed.lun is not None and options.luns not in ((), (parsed.lun,)):
        raise UsageError(f"the URL names LUN {parsed.lun}, and lun= others: leave one of them out")
    if mountpoint.startswith("/dev/fd/"):
        raise UsageError("drop_privileges is not supported: mount as the user who is to have the files instead")
    if not mountpoint:
        raise UsageError("the mount point has no name")
    # Not resolved: the mount table has it as it was typed, and the daemon changes its directory.
    return parsed, Path(os.path.abspath(mountpoint)), options  # noqa: PTH100 - Path.absolute() leaves ".." in


def plan_of(
    url: str, mountpoint: str, settings: Sequence[Setting], *, foreground: bool, verbosity: int
) -> "MountPlan":
    """All that a mount needs to know. Reads secrets, and asks for one where that is needed.

    Raises:
        UsageError: in one sentence, what can't be meant.
    """
    from iscsifuse.cli.connect import session_settings
    from iscsifuse.mount.plan import MountPlan

    parsed, place, options = check(url, mountpoint, settings)
    # What wasn't said is left to MountPlan's own defaults.
    said = {
        name: value
        for name in ("cache_size", "read_ahead", "write_behind")
        if (value := getattr(options, name)) is not None
    }
    return MountPlan(
        source=parsed.display,
        portal=parsed.portal,
        target_name=parsed.target_name,
        lun=parsed.lun,
        luns=() if parsed.lun is not None else options.luns,
        mountpoint=place,
        session=session_settings(parsed, options),
        read_write=options.read_write,
        foreground=foreground,
        allow_other=options.allow_other,
        uid=options.uid,
        gid=options.gid,
        mode=options.mode,
        direct_io=options.direct_io,
        verbosity=verbosity,
        **said,
    )


def carry_out(plan: "MountPlan") -> int:
    """Mounts; returns once the mount is usable, or, in front, once it has ended."""
    from iscsifuse.mount import daemon

    return daemon.mount(plan)
