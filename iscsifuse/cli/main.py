"""The command ``iscsifuse``: from words on a command line to an exit status.

Every failure is one sentence on standard error. What is ours (:class:`IscsifuseError`) knows its own exit code; mount
and umount have mount(8)'s bits instead. A traceback is for ``-vv`` only. Nothing that is printed from here holds a
password: text that may come from the command line passes :func:`redacted`.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from iscsifuse import __version__
from iscsifuse.cli import demo, discover, info, ls, mount, status, umount
from iscsifuse.cli.options import OPTIONS
from iscsifuse.cli.words import note
from iscsifuse.errors import IscsifuseError, UsageError

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = ["Parser", "hide_passwords_of", "main", "prepare_output", "redacted", "report", "run", "set_up_logging"]

EXIT_USAGE = 1
EXIT_SYSTEM = 2
EXIT_MOUNT_FAILURE = 32
EXIT_INTERRUPTED = 128 + 2
EXIT_BROKEN_PIPE = 128 + 13

COMMANDS = {
    "discover": discover,
    "ls": ls,
    "info": info,
    "mount": mount,
    "umount": umount,
    "status": status,
    "demo": demo,
}
_MOUNT_BITS = ("mount", "umount")
_VALUED = {"-o", *(option.flag for option in OPTIONS if option.metavar is not None)}
#: Greedy, for a password may hold anything; but the syntax itself may be shown.
_USERINFO = re.compile(r"://(?!\[user\[%password\]@\]).*@", re.DOTALL)
_TARGET_PASSWORD = re.compile(r"(target_pass[^=&\s]*=)[^&'\"]*", re.IGNORECASE)
_EPILOG = """\
A URL names a portal, a target, or one LUN:
  iscsi://[user[%password]@]host[:port]/[target[/lun]][?key=value[&key=value]...]

  iscsifuse ls iscsi://san.example
  iscsifuse mount iscsi://san.example/iqn.2004-04.com.example:disk /mnt/san
  iscsifuse umount /mnt/san

iscsifuse URL MOUNTPOINT -o LIST is the same as iscsifuse mount, for mount(8).
"""


class Parser(argparse.ArgumentParser):
    """argparse; but a mistake is a UsageError, and output that can't be written is an OSError."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError: what argparse found wrong."""
        raise UsageError(f"{message}; {self.prog} --help tells more")

    def _print_message(self, message: str, file: "SupportsWrite[str] | None" = None) -> None:
        """As argparse's own, which hides an OSError; and where output isn't buffered, this is where it fails."""
        stream = sys.stderr if file is None else file
        if stream is not None:
            stream.write(message)


def main() -> None:
    """The script ``iscsifuse``."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Carries out a command line; returns the exit status."""
    command, arguments = with_command(arguments)
    verbosity = 0
    try:
        prepare_output()
        if command is not None and command not in COMMANDS:
            raise UsageError(_unknown(command))
        hide_passwords_of(arguments)
        try:
            namespace = _parser().parse_args(arguments)
        except SystemExit:  # --help and --version: what they printed has to arrive, too
            sys.stdout.flush()
            raise
        verbosity = namespace.verbosity = namespace.verbosity + namespace.verbosity_before
        set_up_logging(verbosity)
        code: int = COMMANDS[namespace.command].run(namespace)
        sys.stdout.flush()
    except BaseException as error:  # report() raises again what isn't to be reported
        return report(error, verbosity=verbosity, mount_bits=command in _MOUNT_BITS)
    return code


def with_command(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Finds the sub-command, and puts ``mount`` in front where a URL stands in its place.

    Returns:
        The first argument that is neither an option nor an option's value, and all arguments.
    """
    rest = iter(arguments)
    for argument in rest:
        if argument in _VALUED:
            next(rest, None)
        elif argument == "--":
            continue
        elif not argument.startswith("-"):
            if "://" in argument:
                return "mount", ["mount", *arguments]
            return argument, list(arguments)
    return None, list(arguments)


def report(error: BaseException, *, verbosity: int, mount_bits: bool) -> int:
    """Tells of a failure, and returns the exit status for it.

    Args:
        error: what ended the command.
        verbosity: from 2 on, a traceback is shown too.
        mount_bits: whether the status is one of mount(8)'s.

    Raises:
        BaseException: ``error`` itself, where it is nothing that a command ends with.
    """
    error = _single(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _forget_output()
        return EXIT_BROKEN_PIPE
    if not isinstance(error, Exception):
        raise error
    if verbosity >= 2:
        _show_traceback(error)
    if isinstance(error, IscsifuseError):
        _tell(str(error))
        if not mount_bits:
            return error.exit_code
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_MOUNT_FAILURE
    if isinstance(error, OSError):
        _forget_output()
        _tell(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or repr(error))
        return EXIT_USAGE if mount_bits and isinstance(error, PermissionError) else EXIT_SYSTEM
    _tell(f"this should not have happened: {type(error).__name__}: {error} (-vv shows where)")
    return EXIT_SYSTEM


def redacted(text: str) -> str:
    """The text without what may be a password in a URL. Rather too much is taken away than too little."""
    return _TARGET_PASSWORD.sub(r"\1…", _USERINFO.sub("://…@", text))


def set_up_logging(verbosity: int) -> None:
    """Warnings go to standard error; ``-v`` adds what happens, ``-vv`` how."""
    import logging

    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)]
    form = "iscsifuse: %(message)s" if verbosity < 2 else "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level, format=form, stream=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="iscsifuse",
        description="Shows every LUN of an iSCSI target as a plain file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"iscsifuse {__version__}")
    _add_verbose(parser, dest="verbosity_before")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION, allow_abbrev=False)
        _add_verbose(command, dest="verbosity")
        module.configure(command)
    return parser


def _unknown(command: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}, and a URL begins with iscsi://"
    return f"there is no command {command!r}: {hint}"


def _add_verbose(parser: argparse.ArgumentParser, *, dest: str) -> None:
    parser.add_argument("-v", dest=dest, action="count", default=0, help="log more; -vv: very much more")


def _single(error: BaseException) -> BaseException:
    """Of a group, the exception that a person should hear of: an interrupt, else one of ours, else the first."""
    while isinstance(error, BaseExceptionGroup):
        by_rank = sorted(
            error.exceptions,
            key=lambda one: (
                isinstance(one, Exception),
                not isinstance(one, IscsifuseError | BaseExceptionGroup),
            ),
        )
        error = by_rank[0]
    return error


def _tell(message: str) -> None:
    from iscsifuse.iscsi.names import printable

    note(printable(redacted(message), limit=4096))


def _show_traceback(error: BaseException) -> None:
    import traceback

    sys.stderr.write(redacted("".join(traceback.format_exception(error))))


def hide_passwords_of(arguments: Sequence[str]) -> None:
    """Keeps what may be a password out of ps(1)."""
    if any("@" in argument or "target_pass" in argument for argument in arguments):
        from iscsifuse.cli.arguments import hide_passwords

        hide_passwords()


def prepare_output() -> None:
    """A terminal that has no µ is no reason to fail; nor is a standard stream that is closed, unless it is needed."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # Or else the next file has this number, a connection to a target for instance, and gets what is printed.
            # Standard output can't be written to, so that output that goes nowhere is an error still.
            os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_RDWR)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """What couldn't be written won't be written at exit either: not to be told of it twice."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
