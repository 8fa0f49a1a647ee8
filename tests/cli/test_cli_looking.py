"""discover, ls and info against targets that answer from a table."""

import json
import logging
from collections.abc import Iterator

import pytest
from cli_fakes import PORTAL, FakeWorld, controller, disk, target, untouched_environment

from iscsifuse.cli.initiator_name import default_initiator_name
from iscsifuse.cli.main import run
from iscsifuse.errors import AuthenticationError, ConnectError, NothingFoundError
from iscsifuse.initiator.settings import Portal
from iscsifuse.scsi.designator import Designator
from iscsifuse.scsi.mode import CachingPage
from iscsifuse.scsi.vpd import BlockDeviceCharacteristics, BlockLimits, LogicalBlockProvisioning

ONE, TWO = "iqn.2004-04.com.example:one", "iqn.2004-04.com.example:two"
Output = pytest.CaptureFixture[str]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWorld]:
    untouched_environment(monkeypatch)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    fake = FakeWorld()
    fake.install(monkeypatch)
    yield fake
    root.handlers[:], root.level = handlers, level


# --- discover ---


def test_discover_prints_iscsiadms_lines(world: FakeWorld, capsys: Output) -> None:
    world.targets = [
        target(ONE, ("10.0.0.1", 3260, 1), ("10.0.0.2", 3261, 2)),
        target(TWO, ("fe80::1", 3260, 65535), ("san.example", 860, 0)),
    ]
    assert run(["discover", "10.0.0.1"]) == 0
    output = capsys.readouterr()
    assert output.out == (
        f"10.0.0.1:3260,1 {ONE}\n10.0.0.2:3261,2 {ONE}\n[fe80::1]:3260,65535 {TWO}\nsan.example:860,0 {TWO}\n"
    )
    assert output.err == ""
    assert world.asked == [("discovery", (PORTAL,))]


def test_discover_json(world: FakeWorld, capsys: Output) -> None:
    world.targets = [target(ONE, ("fe80::1", 3260, 1))]
    assert run(["discover", "iscsi://[fe80::1]:3261/", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "portal": "[fe80::1]:3261",
        "targets": [{"target": ONE, "portals": [{"host": "fe80::1", "port": 3260, "tag": 1}]}],
    }


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_discover_nothing(world: FakeWorld, capsys: Output, flags: list[str]) -> None:
    assert run(["discover", "10.0.0.1", *flags]) == 21
    output = capsys.readouterr()
    assert output.err == "iscsifuse: 10.0.0.1:3260 offers no target\n"
    assert output.out == "" if not flags else json.loads(output.out)["targets"] == []
    assert world.settings is not None


def test_discover_fails(world: FakeWorld, capsys: Output) -> None:
    world.targets = ConnectError("can't connect")
    assert run(["discover", "10.0.0.1"]) == 4
    assert capsys.readouterr() == ("", "iscsifuse: can't connect\n")


@pytest.mark.conformance("B6")
def test_discover_is_safe_on_a_terminal(world: FakeWorld, capsys: Output) -> None:
    world.targets = [target("iqn\x1b]0;x\x07", ("10.0.0.1\n", 3260, 1))]
    assert run(["discover", "10.0.0.1"]) == 0
    assert capsys.readouterr().out == "10.0.0.1\\n:3260,1 iqn\\x1b]0;x\\x07\n"


# --- settings ---


def test_default_settings(world: FakeWorld) -> None:
    run(["discover", "10.0.0.1"])
    settings = world.settings
    assert settings is not None
    assert settings.initiator_name == default_initiator_name()
    assert settings.read_only
    assert settings.chap is None
    assert (settings.header_digest, settings.data_digest) == (False, False)
    assert (settings.timeout, settings.login_timeout, settings.reconnect_timeout) == (60.0, 15.0, 120.0)


@pytest.mark.parametrize(
    ("arguments", "header_digest", "data_digest"),
    [
        (["iscsi://h?header_digest=crc32c"], True, False),
        (["iscsi://h?header_digest=crc32c", "--header-digest", "none"], False, False),
        (["iscsi://h?data_digest=none", "--data-digest", "crc32c"], False, True),
    ],
)
def test_flags_outrank_the_url(
    world: FakeWorld, arguments: list[str], header_digest: bool, data_digest: bool
) -> None:
    run(["discover", *arguments])
    assert world.settings is not None
    assert (world.settings.header_digest, world.settings.data_digest) == (header_digest, data_digest)


def test_settings_from_flags(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBISCSI_CHAP_PASSWORD", "secret-of-the-env")
    name = "iqn.2004-04.com.example:me"
    flags = ["--timeout", "5", "--login-timeout", "2", "--reconnect-timeout", "0", "--initiator-name", name]
    run(["discover", "10.0.0.1", *flags, "--chap-user", "alice"])
    settings = world.settings
    assert settings is not None
    assert (settings.timeout, settings.login_timeout, settings.reconnect_timeout) == (5.0, 2.0, 0.0)
    assert settings.initiator_name == name
    assert settings.chap is not None
    assert (settings.chap.user, settings.chap.secret) == ("alice", b"secret-of-the-env")


def test_a_missing_secret_is_told_before_anybody_is_asked(
    world: FakeWorld, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iscsifuse.cli.connect.ask_on_terminal", lambda _: None)
    assert run(["ls", "iscsi://alice@h"]) == 1
    assert "no secret for the CHAP user 'alice'" in capsys.readouterr().err
    assert world.asked == []


# --- ls ---


def test_ls_table(world: FakeWorld, capsys: Output) -> None:
    world.targets = [target(ONE), target(TWO)]
    world.luns = {
        ONE: [controller(0), disk(1), disk(300, blocks=1 << 30, block_length=4096, write_protected=True)],
        TWO: [disk(0, serial=None)],
    }
    assert run(["ls", "iscsi://10.0.0.1"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out == "\n".join(
        [
            f"{'TARGET':27}  LUN  TYPE                          SIZE  BLOCK  VENDOR  MODEL       SERIAL  PROTECTED",
            f"{ONE}    0  storage array controller         -      -  ACME    Controller  -       -",
            f"{ONE}    1  disk                      64.0 MiB    512  ACME    Turbo Disk  SN1     no",
            f"{ONE}  300  disk                       4.0 TiB   4096  ACME    Turbo Disk  SN300   yes",
            f"{TWO}    0  disk                      64.0 MiB    512  ACME    Turbo Disk  -       no",
            "",
        ]
    )


def test_ls_json(world: FakeWorld, capsys: Output) -> None:
    world.targets = [target(ONE)]
    world.luns = {ONE: [controller(0), disk(1)]}
    assert run(["ls", "iscsi://10.0.0.1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    [found] = document["targets"]
    assert (found["target"], found["portal"], found["error"]) == (ONE, "10.0.0.1:3260", None)
    assert found["luns"][0] == {
        "lun": 0,
        "type": "storage array controller",
        "is_disk": False,
        "size": None,
        "block_size": None,
        "vendor": "ACME",
        "model": "Controller",
        "revision": "1.0",
        "serial": None,
        "write_protected": None,
        "problem": None,
    }
    assert found["luns"][1]["size"] == 67108864
    assert found["luns"][1]["block_size"] == 512
    assert found["luns"][1]["write_protected"] is False


def test_ls_of_one_target_asks_nobody_for_targets(world: FakeWorld) -> None:
    world.luns = {ONE: [disk(1)]}
    assert run(["ls", f"iscsi://10.0.0.1:3261/{ONE}"]) == 0
    assert world.asked == [(ONE, (Portal("10.0.0.1", 3261),))]


def test_ls_of_one_lun(world: FakeWorld, capsys: Output) -> None:
    world.luns = {ONE: [disk(1), disk(2)]}
    assert run(["ls", f"iscsi://10.0.0.1/{ONE}/2"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert "SN2" in line
    assert header.startswith("TARGET")


def test_ls_of_a_lun_that_is_not_there(world: FakeWorld, capsys: Output) -> None:
    world.luns = {ONE: [disk(1)]}
    assert run(["ls", f"iscsi://me@10.0.0.1/{ONE}/2"]) == 1  # no secret
    assert run(["ls", f"iscsi://10.0.0.1/{ONE}/2"]) == 21
    output = capsys.readouterr()
    assert output.out == ""
    assert f"there is no LUN 2 at iscsi://10.0.0.1/{ONE}/2\n" in output.err


@pytest.mark.parametrize(
    ("luns", "code", "lines"),
    [
        ({ONE: ConnectError("one is down"), TWO: [disk(1)]}, 0, 2),
        ({ONE: ConnectError("one is down"), TWO: AuthenticationError("two says no")}, 4, 0),
        ({ONE: AuthenticationError("one says no"), TWO: []}, 24, 0),
    ],
)
def test_ls_where_a_target_fails(
    world: FakeWorld, capsys: Output, luns: dict[str, list[object]], code: int, lines: int
) -> None:
    world.targets = [target(ONE), target(TWO)]
    world.luns = luns  # type: ignore[assignment]
    assert run(["ls", "iscsi://10.0.0.1"]) == code
    output = capsys.readouterr()
    assert output.out.count("\n") == lines
    assert output.err.startswith("iscsifuse: one ")


def test_ls_json_tells_of_failures(world: FakeWorld, capsys: Output) -> None:
    world.targets = [target(ONE), target(TWO)]
    world.luns = {ONE: NothingFoundError("not here"), TWO: [disk(0)]}
    assert run(["ls", "iscsi://10.0.0.1", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["targets"]
    assert (first["error"], first["luns"], first["portal"]) == ("not here", [], None)
    assert second["error"] is None


def test_ls_logs_in_where_the_target_is(world: FakeWorld) -> None:
    world.targets = [
        target(ONE, ("10.0.0.2", 3260, 1), ("10.0.0.1", 3260, 1)),
        target(TWO, ("10.0.0.3", 3260, 1)),
    ]
    world.luns = {ONE: [disk(1)], TWO: [disk(1)]}
    run(["ls", "iscsi://10.0.0.1"])
    asked = dict(world.asked)
    assert asked[ONE] == (PORTAL, Portal("10.0.0.2"))
    # Not known to be at the portal that was typed: that one last.
    assert asked[TWO] == (Portal("10.0.0.3"), PORTAL)


def test_ls_shows_a_problem(world: FakeWorld, capsys: Output) -> None:
    world.luns = {ONE: [disk(1, capacity=None, problem="not\nready"), disk(2)]}
    assert run(["ls", f"iscsi://h/{ONE}"]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.endswith("  NOTE")
    assert first.endswith("  not\\nready")
    assert " - " in first
    assert second.endswith(" no")


@pytest.mark.conformance("B6")
def test_ls_is_safe_on_a_terminal(world: FakeWorld, capsys: Output) -> None:
    world.luns = {ONE: [disk(1, serial="\x1b[2J\u202e")]}
    run(["ls", f"iscsi://h/{ONE}"])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    run(["ls", f"iscsi://h/{ONE}", "--json"])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["ls", "info"])
def test_portal_without_a_target(world: FakeWorld, capsys: Output, command: str) -> None:
    assert run([command, "iscsi://10.0.0.1"]) == 21
    assert "offers no target" in capsys.readouterr().err
    assert len(world.asked) == 1


# --- info ---


def test_info(world: FakeWorld, capsys: Output) -> None:
    unit = disk(
        1,
        caching=CachingPage(wce=True),
        dpofua=True,
        block_limits=BlockLimits(max_transfer=2048, max_unmap_lba_count=64),
        characteristics=BlockDeviceCharacteristics(rotation_rate=1, form_factor=3),
        provisioning=LogicalBlockProvisioning(lbpu=True, provisioning_type=2),
        designators=(
            Designator(association=0, designator_type=3, code_set=1, identifier=bytes.fromhex("6001405a" * 4)),
            Designator(association=1, designator_type=4, code_set=1, identifier=b"\0\0\0\1"),
        ),
    )
    world.luns = {ONE: [controller(0), unit]}
    assert run(["info", f"iscsi://10.0.0.1/{ONE}"]) == 0
    shown = capsys.readouterr().out
    for words in (
        f"Target {ONE}\n  portal  10.0.0.1:3260\n  LUNs    2\n",
        "Negotiated keys\n",
        "  HeaderDigest                    None\n",
        "LUN 0: INQUIRY\n  type                    storage array controller\n",
        "LUN 1: capacity\n  size                 64.0 MiB (67108864 bytes)\n",
        "  write cache      on\n",
        "  designator 0 (83h)  naa.6001405a6001405a6001405a6001405a\n",
        "  designator 1 (83h)  target port 1 (of the target port)\n",
        "  longest transfer           2048\n",
        "  rotation     none, solid state\n  form factor  2.5 inch\n",
        "  provisioning                   thin provisioned\n",
    ):
        assert words in shown
    assert "LUN 0: capacity" not in shown


def test_info_of_a_disk_that_tells_nothing(world: FakeWorld, capsys: Output) -> None:
    world.luns = {ONE: [disk(1, capacity=None, serial=None, problem="there is no medium")]}
    assert run(["info", f"iscsi://10.0.0.1/{ONE}/1"]) == 0
    shown = capsys.readouterr().out
    assert "there is no medium" in shown
    assert "write cache      not reported" in shown
    assert "(B0h)" not in shown
    assert "(B2h)" not in shown


def test_info_json(world: FakeWorld, capsys: Output) -> None:
    identifier = bytes.fromhex("6001405a" * 4)
    unit = disk(1, designators=(Designator(association=0, designator_type=3, code_set=1, identifier=identifier),))
    world.luns = {ONE: [controller(0), unit]}
    assert run(["info", f"iscsi://10.0.0.1/{ONE}", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    assert document["keys"]["HeaderDigest"] == "None"
    nothing, found = document["luns"]
    assert nothing["capacity"] is None
    assert found["capacity"]["last_lba"] == 131071
    assert found["address"] == "0001000000000000"
    assert found["designators"][0]["identifier"] == identifier.hex()
    assert found["designators"][0]["text"] == "naa." + identifier.hex()
    assert found["inquiry"]["vendor"] == "ACME"
    assert found["size"] == 67108864


def test_info_of_a_lun_that_is_not_there(world: FakeWorld, capsys: Output) -> None:
    world.luns = {ONE: [disk(1)]}
    assert run(["info", f"iscsi://h/{ONE}/2"]) == 21
    assert f"the target {ONE} has no LUN 2" in capsys.readouterr().err


def test_info_of_a_portal(world: FakeWorld, capsys: Output) -> None:
    world.targets = [target(ONE)]
    world.luns = {ONE: [disk(1)], TWO: []}
    assert run(["info", "iscsi://10.0.0.1"]) == 0
    world.targets = [target(ONE), target(TWO)]
    assert run(["info", "iscsi://10.0.0.1"]) == 1
    message = capsys.readouterr().err
    assert "offers 2 targets" in message
    assert ONE in message
