"""The chaos run in short; and that its oracle sees what it is there to see."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.faults import KINDS
from chaos.load import compare
from chaos.writer import SECTOR, Writer, sector_of

SHORT = [kind.name.replace(" ", "-") for kind in KINDS if "long" not in kind.name]


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.tgt
@pytest.mark.parametrize(
    ("seed", "minutes", "faults"),
    [(1, 0.1, SHORT), pytest.param(2, 5, [*SHORT, "long-stop", "long-black-hole"], marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_a_mount_under_chaos_loses_nothing(tmp_path: Path, seed: int, minutes: float, faults: list[str]) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-P", "-m", "chaos", "--short", "--minutes", str(minutes), "--seed", str(seed)]
    command += [
        "--faults",
        ",".join(faults),
        "--at-least",
        "3",
        "--keep",
        str(tmp_path / "chaos"),
        "--json",
        str(report),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        timeout=minutes * 60 + 250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(report.read_text())
    assert said["ok"]
    assert said["bytes_lost"] == 0
    assert said["bytes_verified"] > 10 << 20
    assert sum(said["faults"].values()) >= 3
    assert said["reconnects"] >= 1


# --- the oracle ---


class Never:
    asked = False


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Writer]:
    def writer(size: int = 64 * SECTOR, seed: int = 1) -> Writer:
        file = tmp_path / "file"
        file.write_bytes(bytes(size))
        return Writer(file, size=size, seed=seed, rate=1e9, log=tmp_path / "log")

    return writer


def put(writer: Writer, sector: int, data: bytes) -> None:
    """Behind the writer's back."""
    os.pwrite(writer._fd, data, sector * SECTOR)


def test_the_writer_is_content_with_an_honest_file(make: Callable[..., Writer], tmp_path: Path) -> None:
    writer = make()
    for _ in range(200):
        writer.run(1e-9, Never())  # type: ignore[arg-type]
        writer._write(*writer._place())
        writer._read(*writer._place())
    assert writer.finish(5)
    assert writer.totals.wrong == []
    writer.expected(tmp_path / "expected")
    assert compare(tmp_path / "expected", tmp_path / "file", what="file") == (64 * SECTOR, 0, [])


def test_a_write_that_is_lost_in_silence_is_seen(make: Callable[..., Writer], tmp_path: Path) -> None:
    writer = make()
    writer._write(3, 2)
    put(writer, 4, sector_of(0, 4))  # as if its second sector had never been written
    writer._read(0, 8)
    assert writer.totals.wrong == []  # an error may be reported yet ...
    assert writer.finish(5)
    assert "a read gave zeros in sector 4, not write 1; no error was reported" in writer.totals.wrong[0]
    writer.expected(tmp_path / "expected")
    compared, lost, told = compare(tmp_path / "expected", tmp_path / "file", what="file")
    assert (compared, lost) == (64 * SECTOR, SECTOR)
    assert told == ["file: sector 4 has zeros instead of write 1 of sector 4"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (sector_of(1, 3), "write 1 of sector 3"),  # another place
        (b"x" * SECTOR, "nobody's: "),
        (sector_of(1, 4)[:-1] + b"!", "write 1 of sector 4, torn"),
    ],
)
def test_what_was_never_written_there_is_wrong_at_once(make: Callable[..., Writer], found: bytes, words: str) -> None:
    writer = make()
    writer._write(3, 2)
    put(writer, 4, found)
    writer._read(4, 1)
    assert words in writer.totals.wrong[0]


def test_an_old_value_after_an_fsync_is_wrong_at_once(make: Callable[..., Writer]) -> None:
    writer = make()
    writer._write(4, 1)
    writer._write(4, 1)
    assert writer._fsync()
    put(writer, 4, sector_of(1, 4))
    writer._read(4, 1)
    assert "write 1 of sector 4 in sector 4, not write 2" in writer.totals.wrong[0]


def test_after_an_error_old_and_new_will_do_until_it_is_written_anew(
    make: Callable[..., Writer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    writer = make()
    writer._write(4, 1)

    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fails)
        assert not writer._fsync()
        put(writer, 4, sector_of(0, 4))
        writer._read(4, 1)
    assert writer.finish(5)
    assert writer.totals.wrong == []
    assert writer.totals.errors_reported == 1
    writer.expected(tmp_path / "expected")
    assert compare(tmp_path / "expected", tmp_path / "file", what="file")[1] == 0


@pytest.mark.parametrize("arguments", [["--faults", "flood"], ["--minutes", "soon"]])
def test_what_it_does_not_know_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from chaos.__main__ import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert "chaos: error" in capsys.readouterr().err


def test_the_list_has_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    from chaos.__main__ import main

    assert main(["--list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == [kind.name.replace(" ", "-") for kind in KINDS]
