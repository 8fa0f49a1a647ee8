import argparse
import logging
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from iscsifuse import __version__
from iscsifuse.cli import main
from iscsifuse.cli.main import COMMANDS, redacted, run, with_command
from iscsifuse.errors import (
    AuthenticationError,
    ConnectError,
    IscsifuseError,
    LoginError,
    LoginTimeoutError,
    MountError,
    NothingFoundError,
    ProtocolError,
    SecretError,
    SessionLostError,
    UrlError,
    UsageError,
)

Inject = Callable[[str, BaseException | int], None]


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Lets a command end with an exception or a status, whatever its arguments."""

    def make(command: str, outcome: BaseException | int) -> None:
        def carry_out(namespace: argparse.Namespace) -> int:
            assert namespace.command == command
            if isinstance(outcome, int):
                return outcome
            raise outcome

        monkeypatch.setattr(COMMANDS[command], "run", carry_out)

    return make


ARGUMENTS = {
    "discover": ["discover", "h"],
    "ls": ["ls", "iscsi://h"],
    "info": ["info", "iscsi://h"],
    "mount": ["mount", "iscsi://h", "/mnt"],
    "umount": ["umount", "/mnt"],
    "status": ["status", "/mnt"],
    "demo": ["demo"],
}
FAILURES: list[tuple[BaseException, int, int]] = [
    (UsageError("no"), 1, 1),
    (UrlError("no"), 1, 1),
    (SecretError("no"), 1, 1),
    (ConnectError("no"), 4, 32),
    (LoginError("no"), 5, 32),
    (LoginTimeoutError("no"), 5, 32),
    (ProtocolError("no"), 5, 32),
    (NothingFoundError("no"), 21, 32),
    (AuthenticationError("no"), 24, 32),
    (MountError("no"), 2, 32),
    (SessionLostError("no"), 2, 32),
    (IscsifuseError("no"), 2, 32),
]


@pytest.mark.parametrize("command", sorted(ARGUMENTS))
@pytest.mark.parametrize(("error", "code", "mount_code"), FAILURES)
def test_exit_status_of_our_errors(
    inject: Inject, capsys: pytest.CaptureFixture[str], command: str, error: Exception, code: int, mount_code: int
) -> None:
    inject(command, error)
    assert run(ARGUMENTS[command]) == (mount_code if command in ("mount", "umount") else code)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "iscsifuse: no\n"


@pytest.mark.parametrize("command", sorted(ARGUMENTS))
@pytest.mark.parametrize("status", [0, 64])
def test_exit_status_of_a_command(inject: Inject, command: str, status: int) -> None:
    inject(command, status)
    assert run(ARGUMENTS[command]) == status


@pytest.mark.parametrize(
    ("error", "command", "code", "words"),
    [
        (OSError(28, "No space left on device"), "ls", 2, "No space left on device"),
        (FileNotFoundError(2, "No such file", "/x"), "ls", 2, "/x: No such file"),
        (PermissionError(1, "Operation not permitted", "/x"), "mount", 1, "/x: Operation not permitted"),
        (PermissionError(1, "Operation not permitted", "/x"), "ls", 2, "/x: Operation not permitted"),
        (ZeroDivisionError("oh"), "ls", 2, "this should not have happened: ZeroDivisionError: oh"),
        (ZeroDivisionError("oh"), "mount", 2, "this should not have happened: ZeroDivisionError: oh"),
    ],
)
def test_other_errors(
    inject: Inject, capsys: pytest.CaptureFixture[str], error: Exception, command: str, code: int, words: str
) -> None:
    inject(command, error)
    assert run(ARGUMENTS[command]) == code
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1
    assert "Traceback" not in shown


def test_interrupt_is_quiet(inject: Inject, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (KeyboardInterrupt(), BaseExceptionGroup("x", [ValueError("y"), KeyboardInterrupt()])):
        inject("mount", error)
        assert run(ARGUMENTS["mount"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "group",
    [
        ExceptionGroup("a", [ConnectError("here")]),
        ExceptionGroup("a", [ExceptionGroup("b", [ConnectError("here")])]),
        ExceptionGroup("a", [ValueError("x"), ConnectError("here")]),
        ExceptionGroup("a", [ExceptionGroup("b", [ConnectError("here"), ValueError("x")]), KeyError("x")]),
    ],
)
def test_groups_are_unwrapped(inject: Inject, capsys: pytest.CaptureFixture[str], group: Exception) -> None:
    inject("ls", group)
    assert run(ARGUMENTS["ls"]) == 4
    assert capsys.readouterr().err == "iscsifuse: here\n"


def test_what_ends_no_command_is_raised_again(inject: Inject) -> None:
    inject("ls", GeneratorExit())
    with pytest.raises(GeneratorExit):
        run(ARGUMENTS["ls"])


def test_traceback_for_vv_only(inject: Inject, capsys: pytest.CaptureFixture[str]) -> None:
    inject("ls", ConnectError("to iscsi://me%s3cret@h failed"))
    for flags, expected in ((["-v"], False), (["-vv"], True), (["-v", "-v"], True)):
        assert run(["ls", "iscsi://h", *flags]) == 4
        shown = capsys.readouterr().err
        assert ("Traceback" in shown) is expected
        assert "s3cret" not in shown
    assert run(["-v", "ls", "iscsi://h", "-v"]) == 4
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.conformance("B6")
def test_messages_are_one_printable_line(inject: Inject, capsys: pytest.CaptureFixture[str]) -> None:
    inject("ls", ConnectError("evil\n\x1b[31m\u202e"))
    run(ARGUMENTS["ls"])
    assert capsys.readouterr().err == "iscsifuse: evil\\n\\x1b[31m\\u202e\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["lss", "iscsi-url"], "there is no command 'lss': did you mean ls?"),
        (["ls"], "required: URL"),
        (["ls", "iscsi://h", "extra"], "unrecognized arguments: extra"),
        (["ls", "h"], "is no URL"),
        (["ls", "iscsi://h", "--rw"], "unrecognized arguments: --rw"),
        (["ls", "iscsi://h", "--time", "1"], "unrecognized arguments"),
        (["mount", "iscsi://h"], "required: MOUNTPOINT"),
        (["iscsi://h"], "required: MOUNTPOINT"),
        (["mount", "h", "/mnt"], "is no URL"),
        (["10.0.0.1", "/mnt"], "a URL begins with iscsi://"),
        (["mount", "iscsi://h", "/mnt", "-o", "what"], "there is no option 'what'"),
        (["mount", "iscsi://h", "/mnt", "--cache-size", "64m"], "a size such as 64M"),
        (["mount", "iscsi://h/iqn.2004-04.com.example:x/1", "/mnt", "--lun", "2"], "the URL names LUN 1"),
        (["mount", "iscsi://h", "/dev/fd/5"], "drop_privileges"),
        (["mount", "iscsi://h", ""], "mount point"),
        (["discover", "iscsi://h/iqn.2004-04.com.example:x"], "only a portal"),
        (["umount"], "required: MOUNTPOINT"),
        (["demo", "x"], "unrecognized arguments: x"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert run(arguments) == 1
    output = capsys.readouterr()
    assert words in output.err
    assert output.err.startswith("iscsifuse: ")
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert "…" not in output.err  # nothing but a password is taken away


@pytest.mark.conformance("B11")
@pytest.mark.parametrize(
    "arguments",
    [
        ["ls", "iscsi://h", "iscsi://u%s3cret@h"],
        ["ls", "iscsi://h", "iscsi://u%s3 cret@h"],
        ["ls", "iscsi://u%s3cret@h", "--bad"],
        ["status", "/mnt", "iscsi://u%s3'cret@h"],
        ["mount", "iscsi://u%s3cret@h/x", "/mnt"],
        ["mount", "iscsi://u%s3cret@h?target_password=s3cret&a", "/mnt"],
        ["mount", "iscsi://h?target_password=s3cret&a", "/mnt"],
        ["umount", "/mnt", "iscsi://h?target_password=s3cret"],
        ["iscsi://u%s3cret@h"],
    ],
)
def test_usage_has_no_password(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(arguments) == 1
    output = capsys.readouterr()
    assert "s3" not in output.err
    assert "cret" not in output.err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nothing", "nothing"),
        ("at iscsi://host/x", "at iscsi://host/x"),
        ("at iscsi://u%p@host/x", "at iscsi://…@host/x"),
        ("at iscsi://u%p@q@host/x", "at iscsi://…@host/x"),
        ("iscsi://[user[%password]@]host[:port]/", "iscsi://[user[%password]@]host[:port]/"),
        ("write user%password@host", "write user%password@host"),
        ("?a=b&target_password=x&c=d", "?a=b&target_password=…&c=d"),
    ],
)
def test_redacted(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(
    ("arguments", "command", "result"),
    [
        ([], None, []),
        (["-v"], None, ["-v"]),
        (["ls", "iscsi://h"], "ls", ["ls", "iscsi://h"]),
        (["-v", "ls", "iscsi://h"], "ls", ["-v", "ls", "iscsi://h"]),
        (["iscsi://h", "/m"], "mount", ["mount", "iscsi://h", "/m"]),
        (["iscsi://h", "/m", "-o", "rw,dev,suid"], "mount", ["mount", "iscsi://h", "/m", "-o", "rw,dev,suid"]),
        (["-o", "rw", "iscsi://h", "/m"], "mount", ["mount", "-o", "rw", "iscsi://h", "/m"]),
        (["-orw", "-f", "iscsi://h", "/m"], "mount", ["mount", "-orw", "-f", "iscsi://h", "/m"]),
        (["--timeout", "5", "iscsi://h", "/m"], "mount", ["mount", "--timeout", "5", "iscsi://h", "/m"]),
        (["--rw", "iscsi://h", "/m"], "mount", ["mount", "--rw", "iscsi://h", "/m"]),
        (["--", "iscsi://h", "/m"], "mount", ["mount", "--", "iscsi://h", "/m"]),
        (["-o"], None, ["-o"]),
        (["http://h", "/m"], "mount", ["mount", "http://h", "/m"]),
        (["mount", "iscsi://h", "/m"], "mount", ["mount", "iscsi://h", "/m"]),
    ],
)
def test_mount_without_its_name(arguments: list[str], command: str | None, result: list[str]) -> None:
    assert with_command(arguments) == (command, result)


def test_mount_without_its_name_has_mounts_exit_status(inject: Inject, capsys: pytest.CaptureFixture[str]) -> None:
    inject("mount", ConnectError("no"))
    assert run(["-v", "iscsi://h", "/mnt", "-o", "rw,dev,suid,_netdev"]) == 32
    assert capsys.readouterr().err == "iscsifuse: no\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"iscsifuse {__version__}\n"


@pytest.mark.parametrize("command", sorted(ARGUMENTS))
def test_help_of_every_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run([command, "--help"]) == 0
    assert f"usage: iscsifuse {command}" in capsys.readouterr().out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {command} " in shown for command in ARGUMENTS)


_HEAVY = ("trio", "pyfuse3", "crc32c", "asyncio", "ssl")


@pytest.mark.parametrize("arguments", [["--help"], ["mount", "--help"], ["ls", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from iscsifuse.cli.main import run\n"
        f"assert run({arguments!r}) == 0\n"
        f"found = [name for name in {_HEAVY!r} if name in sys.modules]\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr


def test_help_is_quick() -> None:
    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", "from iscsifuse.cli.main import main; main()", "--help"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    # Processor time, and the best of many: others may be busy on this machine, too.
    assert min(once() for _ in range(8)) < 0.3


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def buffering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is printed can't be written, a buffer tells at its end, and without one the first word does."""
    monkeypatch.setenv("PYTHONUNBUFFERED", request.param)


@pytest.mark.usefixtures("buffering")
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_broken_pipe_is_quiet(option: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "from iscsifuse.cli.main import main; main()", option],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(20)
    assert process.returncode == 141


@pytest.mark.usefixtures("buffering")
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_full_disk_is_told(option: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from iscsifuse.cli.main import main; main()", option],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=20,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == "iscsifuse: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "closed", "code", "said"),
    [
        ("--version", ">&-", 2, "iscsifuse: Bad file descriptor\n"),
        ("--version", "2>&- <&-", 0, ""),
        ("bogus", "2>&-", 1, ""),
        ("bogus", "<&- >&- 2>&-", 1, ""),
    ],
)
def test_standard_streams_that_are_closed(arguments: str, closed: str, code: int, said: str) -> None:
    program = f"'{sys.executable}' -c 'from iscsifuse.cli.main import main; main()' {arguments}"
    done = subprocess.run(
        ["sh", "-c", f"exec {program} {closed}"], capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stderr) == (code, said)


def test_terminal_without_our_letters() -> None:
    code = "from iscsifuse.cli import main, words; main.prepare_output(); words.say('µ'); words.note('…')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xb5\n", b"iscsifuse: \\u2026\n")


@pytest.mark.parametrize(
    ("verbosity", "level"), [(0, logging.WARNING), (1, logging.INFO), (2, logging.DEBUG), (5, logging.DEBUG)]
)
def test_log_level(verbosity: int, level: int) -> None:
    logging.getLogger().handlers.clear()
    main.set_up_logging(verbosity)
    assert logging.getLogger().level == level


def test_ctrl_c_in_trio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import signal

    async def wait() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()

    def carry_out(_: argparse.Namespace) -> int:
        trio.run(wait)
        return 0

    monkeypatch.setattr(COMMANDS["ls"], "run", carry_out)
    assert run(ARGUMENTS["ls"]) == 130
    assert capsys.readouterr().err == ""
