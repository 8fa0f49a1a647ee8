"""The README says what is true: its examples are typed into a shell and have to print what it prints, word for word.

A block ```` ```console ```` holds commands (``$ ...``) and what they print, standard error included. All blocks
together are one shell session, in order. Every command has to succeed, unless the next one is ``echo $?``. A line
``...`` stands for any number of lines that were left out.

What differs from run to run or from machine to machine is made equal on both sides, and nothing else is: the portals'
ports, folders, the loop device, times, process ids, ISID and TSIH, and the numbers (not the words) of ``status`` that
depend on timing. Tables of options, URL keys, commands and exit codes are compared with the program's own.
"""

import ast
import contextlib
import dataclasses
import os
import re
import select
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from iscsifuse import errors
from iscsifuse.cli import options
from iscsifuse.cli.main import COMMANDS
from iscsifuse.cli.url import AUTH_METHODS, QUERY_KEYS
from iscsifuse.initiator.settings import SessionSettings
from iscsifuse.mount.plan import MountPlan
from support.cli import is_mounted, program, run_cli
from support.disks import partitioned_image, random_file, sparse
from support.ports import free_port
from support.process import sbin_path
from support.tgt import TgtServer

TOP = Path(__file__).parents[1]
README = TOP / "README.md"
ERRORS = TOP / "docs" / "errors.md"
MIB = 1 << 20

STORE, CASE, SAFE = (f"iqn.2026-11.example:{name}" for name in ("store", "case", "safe"))
USER, SECRET = "alice", "secret-of-alice-1"
TARGET_USER, TARGET_SECRET = "safe", "secret-of-safe-12"
OTHER_PROGRAMS = (
    *("mmls", "fls", "icat", "losetup", "mount", "umount", "mkfs.ext4", "fsck.ext4", "mke2fs", "sfdisk", "mkntfs"),
    *("bash", "dd", "sha256sum", "find"),
)


# --- the examples ---


@dataclass(frozen=True, slots=True)
class Example:
    """One command of the README, where it stands, and what it prints there."""

    line: int
    command: str
    output: str

    @property
    def tells_status(self) -> bool:
        return self.command == "echo $?"


def examples(text: str) -> list[Example]:
    found = []
    for block in re.finditer(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        first = text.count("\n", 0, block.start(1)) + 1
        number, command, output = 0, "", ""
        for number_now, line in enumerate(block[1].splitlines(), first):
            if line.startswith("$ "):
                if command:
                    found.append(Example(number, command, output))
                number, command, output = number_now, line[2:], ""
            else:
                assert command, f"line {number_now} of the README: output without a command"
                output += line + "\n"
        found.append(Example(number, command, output))
    return found


class Names:
    """What things are called in the README, and here."""

    def __init__(self) -> None:
        self._pairs: list[tuple[str, str]] = []

    def add(self, written: str, here: str) -> None:
        self._pairs.append((written, here))

    def here(self, text: str) -> str:
        for written, here in self._pairs:
            text = text.replace(written, here)
        return text

    def written(self, text: str) -> str:
        for written, here in self._pairs:
            text = text.replace(here, written)
        return text


class Shell:
    """A bash that is fed with one command at a time."""

    def __init__(self, folder: Path) -> None:
        self._said = folder / ".said"
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=folder,
            env={
                "PATH": f"{Path(program('iscsifuse')).parent}:{sbin_path()}",
                "HOME": str(folder),
                "LC_ALL": "C.UTF-8",
                "TZ": "UTC",
                **leak_marks(),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str, *, timeout: float = 60) -> tuple[str, int]:
        """What a command printed, and its exit status."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        quoted = "'" + command.replace("'", "'\\''") + "'"
        # $? of the command is there for the next one.
        stdin.write(f"eval {quoted} >'{self._said}' 2>&1 </dev/null; status=$?; echo $status; (exit $status)\n")
        stdin.flush()
        if not select.select([stdout], [], [], timeout)[0]:
            raise TimeoutError(f"{command} doesn't end; so far it said: {self._said.read_text()}")
        status = int(stdout.readline())
        output = self._said.read_text()
        stdin.write(f"(exit {status})\n")
        stdin.flush()
        return output, status

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def leak_marks() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("ISCSIFUSE_TEST")}


# --- what is volatile ---

_VOLATILE = (
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d, (?:\d+ d )?(?:\d+ h )?(?:\d+ min|\d+ s)? ?ago"), "<moment>"),
    (re.compile(r"(?<=  daemon   process )\d+"), "<pid>"),
    (re.compile(r"(?<=  ISID, TSIH  )[0-9a-f]{12}, \d+"), "<isid>, <tsih>"),
    # Which e2fsprogs made a file system decides how much of it its own tables take.
    (re.compile(r"^e2fsck \d\S* \(\S+\)$", re.MULTILINE), "e2fsck <version>"),
    (re.compile(r"\d+/\d+ files \(\S+ non-contiguous\), \d+/\d+ blocks"), "<files and blocks>"),
)
_AMOUNT = re.compile(r"\b\d+(?:\.\d+)?(?: (?:B|[KMGT]iB|µs|ms|s)\b)?")


def steady(command: str, output: str) -> list[str]:
    """The lines of an output without what differs each time, and without spaces at their ends."""
    for pattern, name in _VOLATILE:
        output = pattern.sub(name, output)
    lines = [line.rstrip() for line in output.splitlines()]
    return list(_steady_status(lines)) if command.startswith("iscsifuse status") else lines


def _steady_status(lines: list[str]) -> Iterator[str]:
    """Amounts in the tables of ``status`` depend on timing, and columns on amounts; words don't."""
    section = ""
    for line in lines:
        section = (
            line if line and not line.startswith(" ") and not section.startswith(("FILE", "Service")) else section
        )
        section = section if line else ""
        if section == "Cache" and line != section and not line.startswith("  size "):
            yield _AMOUNT.sub("<n>", line)
        elif section.startswith(("FILE", "Service")):
            cells = re.split(r"\s{2,}", line)
            kept = 3 if section.startswith("FILE") else 1
            yield "  ".join([*cells[:kept], *(_AMOUNT.sub("<n>", cell) for cell in cells[kept:])])
        elif line.startswith("  window "):
            yield _AMOUNT.sub("<n>", line)
        else:
            yield line


def assert_same(written: list[str], printed: list[str], what: str) -> None:
    """Equal, line by line; ``...`` stands for any number of lines."""
    runs: list[list[str]] = [[]]
    for line in written:
        if line == "...":
            runs.append([])
        else:
            runs[-1].append(line)
    if len(runs) == 1:
        assert printed == written, what
        return
    assert printed[: len(runs[0])] == runs[0], what
    end = len(printed) - len(runs[-1])
    place = len(runs[0])
    for run in runs[1:-1]:
        place = next((at for at in range(place, end - len(run) + 1) if printed[at : at + len(run)] == run), -1)
        assert place >= 0, f"{what}: these lines are not printed, or not in this order: {run}; printed was {printed}"
        place += len(run)
    assert place <= end, what
    assert printed[end:] == runs[-1], what


@pytest.mark.parametrize(
    ("written", "printed", "same"),
    [
        ("a b c", "a b c", True),
        ("a b c", "a B c", False),
        ("a b", "a b c", False),
        ("a b c", "a b", False),
        ("a ... c", "a c", True),
        ("a ... c", "a x y c", True),
        ("a ... c", "a x y", False),
        ("a ... c ... e", "a b c d e", True),
        ("a ... c ... e", "a b d e", False),
        ("a ... d c ... e", "a c d e", False),
        ("a ... b", "a", False),
        ("a ...", "a b", True),
        ("a b ... b c", "a b c", False),
    ],
)
def test_a_difference_is_noticed(written: str, printed: str, same: bool) -> None:
    with contextlib.nullcontext() if same else pytest.raises(AssertionError):
        assert_same(written.split(), printed.split(), "")


def test_words_of_status_count_and_its_amounts_do_not() -> None:
    text = README.read_text()
    [shown] = [example.output for example in examples(text) if example.command.startswith("iscsifuse status")]
    command = "iscsifuse status /mnt/san"
    assert steady(command, shown.replace("96.0 MiB  2.18 ms", "1.0 GiB  7.00 s")) == steady(command, shown)
    for word in re.findall(r"[A-Za-z][\w()=-]+", re.sub(r" [KMG]iB| ms|µs| min\b| ago\b", "", shown)):
        assert steady(command, shown.replace(word, word + "x")) != steady(command, shown), word


# --- the session ---


@pytest.fixture
def targets(tmp_path: Path) -> Iterator[tuple[TgtServer, TgtServer]]:
    """What the README's 127.0.0.1:3260 and 127.0.0.1:3261 serve."""
    for number in (1, 2):
        (tmp_path / f".tgt{number}").mkdir()
    evidence = partitioned_image(tmp_path / "case.img").path
    with TgtServer(tmp_path / ".tgt1") as first, TgtServer(tmp_path / ".tgt2") as second:
        first.add_target(STORE)
        data = random_file(tmp_path / "data.img", 96 * MIB, seed=1)
        first.add_lun(STORE, 1, data, vendor="ACME", product="Disk", serial="A0001")
        empty = sparse(tmp_path / "empty.img", 256 * MIB)
        first.add_lun(STORE, 2, empty, vendor="ACME", product="Disk", serial="A0002")
        first.add_target(CASE)
        first.add_lun(CASE, 1, evidence, vendor="ACME", product="Disk", serial="C0017", readonly=True)
        second.add_target(SAFE, chap=(USER, SECRET), mutual=(TARGET_USER, TARGET_SECRET))
        safe = sparse(tmp_path / "safe.img", 16 * MIB)
        second.add_lun(SAFE, 1, safe, vendor="ACME", product="Disk", serial="S0001")
        yield first, second


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.tgt
def test_the_examples_print_what_the_readme_says(targets: tuple[TgtServer, TgtServer], tmp_path: Path) -> None:
    if missing := [name for name in OTHER_PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"the examples need {', '.join(missing)}")
    names = Names()
    for number, server in enumerate(targets):
        names.add(f"127.0.0.1:{3260 + number}", server.portal)
    names.add("/mnt/", f"{tmp_path}/mnt/")
    folder = tmp_path / "typed"
    folder.mkdir()
    typed = examples(README.read_text())
    assert len(typed) > 30
    shell = Shell(folder)
    try:
        for example, following in zip(typed, [*typed[1:], None], strict=True):
            what = f"README.md:{example.line}: {example.command}"
            printed, status = shell.run(names.here(example.command))
            if example.command.startswith("losetup --find --show "):
                device = printed.strip()
                assert re.fullmatch(r"/dev/loop\d+", device), f"{what}: {printed}"
                names.add("/dev/loop0", device)
            if following is None or not following.tells_status:
                assert status == 0, f"{what}: status {status}: {printed}"
            printed = names.written(printed)
            assert_same(steady(example.command, example.output), steady(example.command, printed), what)
    finally:
        shell.end()
        clear(tmp_path, folder)
    assert all(server.connections() == [] for server in targets)


def clear(tmp_path: Path, folder: Path) -> None:
    """What a failure in mid-session leaves, the innermost first; nothing after a success."""
    for point in (tmp_path / "mnt" / "inside", tmp_path / "mnt" / "san", folder / "case.img"):
        if not point.parent.exists() or not is_mounted(point):
            continue
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):  # it is gone
                if backing.read_text().startswith(f"{point}/"):
                    subprocess.run(["losetup", "--detach", f"/dev/{backing.parts[3]}"], timeout=60, check=False)
        subprocess.run(["umount", point], capture_output=True, timeout=60, check=False)


@pytest.mark.fuse
def test_the_demonstration_prints_what_the_readme_says() -> None:
    shown = re.search(r"^<!-- iscsifuse demo prints -->\n```text\n(.*?)^```$", README.read_text(), re.M | re.S)
    assert shown is not None
    if shutil.which("mke2fs") is None:
        pytest.skip("mke2fs isn't installed")
    done = run_cli("demo", env={"TZ": "UTC"}, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")

    def common(text: str) -> list[str]:
        text = re.sub(r"127\.0\.0\.1:\d+", "<portal>", text)
        text = re.sub(r"\S+/iscsifuse-demo-\w+", "<folder>", text)
        text = re.sub(r"(?<=^-rw------- 1 )\S+ \S+", "<owner> <group>", text, flags=re.M)
        return [line.rstrip() for line in text.splitlines()]

    assert_same(common(shown[1]), common(done.stdout), "iscsifuse demo")


# --- the tables ---


def table(text: str, *header: str) -> list[list[str]]:
    """The rows of the table that has this header."""
    lines = iter(text.splitlines())
    wanted = "| " + " | ".join(header) + " |"
    assert wanted in lines, f"no table {wanted}"
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_the_options_are_those_of_the_program() -> None:
    rows = table(README.read_text(), "option", "default", "meaning")
    written = [row[0].strip("`") for row in rows]
    assert written == [
        option.name if option.metavar is None else f"{option.name}={option.metavar}" for option in options.OPTIONS
    ]
    first = [name.partition("=")[0] for name in written].index("timeout")
    by_name = {option.name: option for option in options.OPTIONS}
    assert [by_name[name.partition("=")[0]].session for name in written] == [
        place >= first for place in range(len(written))
    ]


def test_the_defaults_are_those_of_the_program() -> None:
    defaults = {
        row[0].strip("`").partition("=")[0]: row[1]
        for row in table(README.read_text(), "option", "default", "meaning")
    }
    plan: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(MountPlan)}
    session: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(SessionSettings)}
    for name in ("cache_size", "read_ahead"):
        assert defaults[name] == f"{plan[name] // MIB}M"
    for name in ("timeout", "reconnect_timeout", "login_timeout"):
        assert defaults[name] == f"{session[name]:g}"
    for name in ("header_digest", "data_digest"):
        assert defaults[name] == ("crc32c" if session[name] else "none")
    assert defaults["write"] == ("behind" if plan["write_behind"] else "through")
    assert (defaults["ro"], defaults["rw"]) == (("no", "yes") if plan["read_write"] else ("yes", "no"))
    for name in ("allow_other", "direct_io"):
        assert defaults[name] == ("yes" if plan[name] else "no")


def test_the_parts_of_a_url_are_those_of_the_program() -> None:
    text = README.read_text()
    parts = [name for row in table(text, "part", "meaning") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(parts) == sorted([*("user", "password", "host", "port", "target", "lun"), *QUERY_KEYS])
    [auth] = [row[1] for row in table(text, "part", "meaning") if row[0] == "`auth`"]
    assert re.findall(r"`([^`]+)`", auth) == list(AUTH_METHODS)


def test_the_commands_are_those_of_the_program() -> None:
    text = README.read_text()
    used = {
        word for example in examples(text) for word in re.findall(r"\biscsifuse ([a-z]+)", example.command)
    } | set(re.findall(r"^\$ iscsifuse ([a-z]+)", text, re.MULTILINE))
    assert used | {"demo"} == set(COMMANDS)


def test_the_exit_statuses_are_those_of_the_program() -> None:
    [_, others] = table(README.read_text(), "command", "status")
    written = {int(number): words for number, words in re.findall(r"(\d+) ([^,]+)", others[1])}
    assert written == {
        0: "fine",
        errors.UsageError.exit_code: "usage",
        errors.IscsifuseError.exit_code: "anything else",
        errors.ConnectError.exit_code: "can't connect",
        errors.LoginError.exit_code: "login failed",
        errors.NothingFoundError.exit_code: "nothing found",
        errors.AuthenticationError.exit_code: "authentication failed",
    }


# --- docs/errors.md ---


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of the tables, as it stands there and as a pattern."""

    text: str

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(".*".join(map(re.escape, self.fixed)), re.DOTALL)

    @property
    def fixed(self) -> list[str]:
        return re.split(r"<\w+>", self.text)


def sentences() -> list[Sentence]:
    return [Sentence(text) for text in re.findall(r"^\| `([^`]+)` \|", ERRORS.read_text(), re.MULTILINE)]


@cache
def words_of_the_program() -> str:
    """Every piece of text that the program can print, joined by newlines."""
    trees = [ast.parse(file.read_text()) for file in sorted((TOP / "iscsifuse").rglob("*.py"))]
    constants = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return "\n".join(value for value in constants if isinstance(value, str))


#: What the program makes of something that isn't a text: an errno, a sense key.
NOT_LITERAL = ("connection refused", "MEDIUM ERROR")


def test_every_sentence_is_one_of_the_program() -> None:
    """Its fixed words are there, at least; what can be provoked is provoked below."""
    words = words_of_the_program()
    assert len(sentences()) > 60
    missing = [
        (sentence.text, piece)
        for sentence in sentences()
        for part in sentence.fixed
        for piece in re.split(r": | \(| with (?=the name)", part)
        if (bare := piece.strip(" ().:,'")) and bare not in words and bare not in NOT_LITERAL
    ]
    assert not missing


@pytest.fixture
def silent_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def other_service() -> Iterator[Callable[[bytes], int]]:
    """A port that answers each connection with some bytes and closes it."""
    with contextlib.ExitStack() as stack:

        def serve(answer: bytes) -> int:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def run() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = listener.accept()
                        with connection:
                            connection.recv(4096)
                            connection.sendall(answer)

            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            # shutdown() wakes accept(), which close() doesn't.
            stack.callback(thread.join)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return int(listener.getsockname()[1])

        yield serve


@pytest.mark.fuse
@pytest.mark.tgt
def test_sentences_that_can_be_provoked(
    targets: tuple[TgtServer, TgtServer],
    silent_port: int,
    other_service: Callable[[bytes], int],
    tmp_path: Path,
) -> None:
    plain, closed = targets
    url, point = plain.url(STORE), tmp_path / "m"
    (tmp_path / "full" / "x").mkdir(parents=True)
    point.mkdir()
    (tmp_path / "file").touch()
    secrets = {name: tmp_path / name for name in ("right", "wrong", "theirs", "open")}
    for name, path in secrets.items():
        path.touch(mode=0o644 if name == "open" else 0o600)
        path.write_text({"right": SECRET, "theirs": TARGET_SECRET}.get(name, "not-the-secret-at-all") + "\n")
    chap = ("--chap-user", USER, "--chap-secret-file")
    mutual = (closed.url(SAFE), *chap, secrets["right"], "--target-user", TARGET_USER, "--target-secret-file")
    quick = ("--login-timeout", "1")
    http = b"HTTP/1.1 400 Bad Request\r\nServer: example\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n"
    cases: list[tuple[int, tuple[str | Path, ...], str]] = [
        (4, ("ls", f"iscsi://127.0.0.1:{free_port()}/"), "can't connect to <portal>: connection refused"),
        (4, ("ls", "iscsi://no-such-host.invalid/"), "can't connect to <portal>: the host name"),
        (5, ("ls", f"iscsi://127.0.0.1:{silent_port}/", *quick), "<portal> took the connection"),
        (5, ("ls", f"iscsi://127.0.0.1:{other_service(http)}/"), "<portal> doesn't speak iSCSI"),
        (5, ("ls", f"iscsi://127.0.0.1:{other_service(b'')}/"), "<portal> ended the connection"),
        (21, ("ls", plain.url("iqn.2026-11.example:none")), "target <name> not found"),
        (24, ("ls", closed.url(SAFE)), "<target> at <portal>: the target asks for CHAP"),
        (24, ("ls", closed.url(SAFE), *chap, secrets["wrong"]), "<target> at <portal>: authentication failed"),
        (24, ("ls", url, *chap, secrets["right"]), "<target> at <portal>: the target refused CHAP before"),
        (24, ("ls", *mutual, secrets["wrong"]), "<target> at <portal>: CHAP failed: the target could not prove"),
        (5, ("ls", url, "--data-digest", "crc32c"), "<target> at <portal>: the target doesn't agree to"),
        (32, ("mount", f"{url}/9", point), "<target> has no LUN <n>;"),
        (21, ("ls", f"{url}/9"), "there is no LUN <n> at"),
        (21, ("info", f"{url}/9"), "the target <target> has no LUN <n>: iscsifuse"),
        (32, ("mount", f"{url}/0", point), "LUN <n> of <target> is not a disk"),
        (32, ("mount", url, point, "-o", "lun=8"), "<target> has no usable disk"),
        (1, ("ls", "san.example"), "<text> is no URL"),
        (1, ("ls", f"{url}?colour=blue"), "<key> is no key"),
        (1, ("ls", f"iscsi://a:b@127.0.0.1/{STORE}"), "in an iSCSI URL the password"),
        (1, ("mount", url, point, "-o", "colour"), "there is no option"),
        (1, ("mount", url, point, "--mode", "9"), "<option>: what <name> takes"),
        (1, ("info", plain.url()), "<url> offers <n> targets"),
        (1, ("ls", closed.url(SAFE), *chap, secrets["open"]), "the secret file <file>"),
        (1, ("ls", closed.url(SAFE), "--chap-user", USER), "there is no secret for"),
        (1, ("ls", closed.url(SAFE), "--chap-secret-file", secrets["right"]), "<source> holds a CHAP secret"),
        (1, ("mount", url, tmp_path / "none"), "the mount point <path> doesn't exist"),
        (1, ("mount", url, tmp_path / "full"), "the mount point <path> is not empty"),
        (1, ("mount", url, tmp_path / "file"), "the mount point <path> is a file"),
        (1, ("mount", url, point, "-o", "remount"), "remount is not supported"),
        (1, ("umount", point), "nothing is mounted on"),
        (1, ("umount", "/proc"), "<path> is a mount of type"),
    ]
    with ThreadPoolExecutor(4) as pool:
        ended = pool.map(lambda case: run_cli(*case[1]), cases)
        for (code, arguments, begin), done in zip(cases, ended, strict=True):
            assert (done.returncode, done.stdout) == (code, ""), (arguments, done)
            assert_is_listed(done.stderr, begin)
    assert not is_mounted(point)

    mounts: tuple[tuple[int, tuple[str | Path, ...], str | None], ...] = (
        (64, ("mount", url, point, "-o", "lun=1,8"), "no target has a usable disk"),
        (1, ("mount", url, point), "<url> is mounted on"),
        (0, ("umount", point), None),
        (0, ("mount", plain.url(CASE), point, "--rw"), "<lun> is write-protected"),
        (0, ("umount", point), None),
        (0, ("mount", url, point, "--rw", "-o", "reconnect_timeout=1"), None),
    )
    try:
        for code, arguments, begin_or_nothing in mounts:
            done = run_cli(*arguments)
            assert (done.returncode, done.stdout) == (code, ""), (arguments, done)
            if begin_or_nothing is None:
                assert done.stderr == ""
            else:
                assert_is_listed(done.stderr, begin_or_nothing)
        disk = point / "lun-1"
        with disk.open("r+b", buffering=0) as file:
            done = run_cli("umount", point)
            assert done.returncode == 32
            assert_is_listed(done.stderr, "<path> is busy")
            plain.kill()
            file.write(bytes(1 << 16))  # whole blocks: nothing has to be read first
            with pytest.raises(OSError, match="Input/output error"):
                os.fsync(file.fileno())
        done = run_cli("umount", point)
        assert (done.returncode, is_mounted(point)) == (32, False)
        assert_is_listed(done.stderr, "<path> is unmounted, but data is lost")
    finally:
        if is_mounted(point):
            run_cli("umount", point)


def assert_is_listed(said: str, begin: str) -> None:
    """One sentence, which is the one of docs/errors.md that begins like this."""
    assert said.startswith("iscsifuse: "), said
    assert said.count("\n") == 1, said
    [listed] = [sentence for sentence in sentences() if sentence.text.startswith(begin)]
    assert listed.pattern.fullmatch(said.removeprefix("iscsifuse: ").rstrip("\n")), (listed.text, said)


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/errors.md", "docs/dependencies.md"]
)
def test_links_lead_somewhere(document: str) -> None:
    file = TOP / document
    for there in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text()):
        assert "://" in there or (file.parent / there).exists(), f"{document} has a link to {there}"
