from pathlib import Path

import pytest

from iscsifuse.cli.initiator_name import default_initiator_name
from iscsifuse.iscsi.names import make_initiator_name, validate_iscsi_name

NAME = "iqn.1993-08.org.debian:01:abc"


@pytest.fixture
def machine_id(tmp_path: Path) -> Path:
    path = tmp_path / "machine-id"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    return path


@pytest.mark.parametrize(
    "text",
    [
        f"InitiatorName={NAME}\n",
        f"InitiatorName = {NAME}  ",
        f"## comment\n#InitiatorName=iqn.2004-04.com.example:not\n\n  InitiatorName={NAME}\nInitiatorAlias=x\n",
        f"InitiatorName={NAME}\r\n",
    ],
)
def test_the_file_wins(tmp_path: Path, machine_id: Path, text: str) -> None:
    file = tmp_path / "initiatorname.iscsi"
    file.write_bytes(text.encode())
    assert default_initiator_name(name_file=file, machine_id=machine_id) == NAME


@pytest.mark.parametrize("text", ["", "InitiatorName=\n", "InitiatorName=me\n", "GenerateName=yes\n", "#" + NAME])
def test_a_file_without_a_name(tmp_path: Path, machine_id: Path, text: str) -> None:
    file = tmp_path / "initiatorname.iscsi"
    file.write_text(text)
    made = default_initiator_name(name_file=file, machine_id=machine_id)
    assert made == make_initiator_name("0123456789abcdef0123456789abcdef")


def test_no_file(tmp_path: Path, machine_id: Path) -> None:
    made = default_initiator_name(name_file=tmp_path / "none", machine_id=machine_id)
    assert made == default_initiator_name(name_file=tmp_path / "none", machine_id=machine_id)
    assert "0123456789abcdef" not in made


@pytest.mark.parametrize("text", [None, "", "uninitialized\n"])
def test_no_machine_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    monkeypatch.setattr("platform.node", lambda: "some-host")
    path = tmp_path / "machine-id"
    if text is not None:
        path.write_text(text)
    made = default_initiator_name(name_file=tmp_path / "none", machine_id=path)
    assert made == make_initiator_name("some-host")


def test_of_this_machine() -> None:
    validate_iscsi_name(default_initiator_name())
