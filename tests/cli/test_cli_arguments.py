import subprocess
import sys
from pathlib import Path

import pytest

from iscsifuse.cli.arguments import hide_passwords, masked

pytestmark = pytest.mark.conformance("B11")
CODE = (
    "import sys, pathlib\n"
    "from iscsifuse.cli.arguments import hide_passwords\n"
    "print(hide_passwords())\n"
    "print(pathlib.Path('/proc/self/cmdline').read_text().replace(chr(0), ' '))\n"
    "print(sys.argv[1:])\n"
)


def ask(folder: Path, *arguments: str) -> list[str]:
    script = folder / "script"
    script.write_text(CODE)
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "hidden"),
    [
        (b"iscsifuse\0ls\0iscsi://h/\0", b"iscsifuse\0ls\0iscsi://h/\0"),
        (b"ls\0iscsi://u%p@h/\0-v\0", b"ls\0iscsi://xxx@h/\0-v\0"),
        (b"iscsi://u%p@q@h/\0a@b\0", b"iscsi://xxxxx@h/\0a@b\0"),
        (b"iscsi://u%p/q@h/\0", b"iscsi://xxxxx@h/\0"),
        (b"iscsi://h?auth=md5&target_password=abc&a=b\0", b"iscsi://h?auth=md5&target_password=xxx&a=b\0"),
        (b"iscsi://h?target_password=abc\0d\0", b"iscsi://h?target_password=xxx\0d\0"),
    ],
)
def test_masked(line: bytes, hidden: bytes) -> None:
    assert masked(line) == hidden


def test_in_a_real_process(tmp_path: Path) -> None:
    url = "iscsi://user%s3cret@h/?target_password=s3cret"
    changed, shown, arguments = ask(tmp_path, "a", url, "b")
    assert changed == "True"
    assert shown.endswith(f" a iscsi://{'x' * 11}@h/?target_password=xxxxxx b ")
    # The program itself knows what it was told.
    assert arguments == repr(["a", url, "b"])


def test_nothing_to_hide(tmp_path: Path) -> None:
    assert ask(tmp_path, "iscsi://h/")[0] == "False"


@pytest.mark.parametrize("stat", ["", "1 (a) b) S 1", "1 (x) S " + "1 " * 60, "1 (x) S " + "9" * 400])
def test_never_fails_and_writes_only_what_it_knows(tmp_path: Path, stat: str) -> None:
    assert not hide_passwords(tmp_path)
    (tmp_path / "cmdline").write_bytes(b"iscsi://u%p@h\0")
    (tmp_path / "stat").write_text(stat)
    (tmp_path / "mem").write_bytes(b"-" * 100)
    assert not hide_passwords(tmp_path)
    assert (tmp_path / "mem").read_bytes() == b"-" * 100
