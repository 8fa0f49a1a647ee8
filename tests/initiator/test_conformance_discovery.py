"""Cases 36 to 43 and B4: what a portal may answer to SendTargets; and ten thousand targets, in bounded memory."""

import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import trio
from conformance_kit import listen
from initiator_kit import config_of, portal_of, serving, settings_of, until

from iscsifuse.errors import FormatError, IscsifuseError, LoginTimeoutError, ProtocolError
from iscsifuse.initiator import discovery
from iscsifuse.initiator.discovery import discover
from iscsifuse.initiator.settings import DiscoveredTarget, Portal
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi import sendtargets, text
from iscsifuse.iscsi.pdu import RESERVED_TAG, Opcode, Pdu
from iscsifuse.iscsi.request import LoginRequest, LogoutRequest, TextRequest
from iscsifuse.iscsi.response import NopIn, Reject, RejectReason, TextResponse
from iscsifuse.testing.actions import Change
from iscsifuse.testing.config import TargetConfig, TargetNode
from iscsifuse.testing.script import OUT, Rule, is_a
from iscsifuse.testing.target import LoopbackTarget
from support.cli import run_cli

PREFIX = "iqn.2026-11.io.github.iscsifuse"
MANY = 10_000


def _nodes(count: int, *addresses: str, **changes: Any) -> TargetConfig:
    config = config_of(**changes)
    config.nodes = [TargetNode(name=f"{PREFIX}:t{number:05}", addresses=addresses or None) for number in range(count)]
    return config


def _change(config: TargetConfig, nth: int, function: Callable[[TextResponse], Pdu], *, times: int = 1) -> None:
    """Have the nth Text Response changed."""
    action = Change(cast("Callable[[Pdu], Pdu]", function))
    config.script.add(Rule(OUT, action, is_a(Opcode.TEXT_RESPONSE), nth=nth, times=times))


async def _discover(where: LoopbackTarget | Portal, *, limit: float = 5.0) -> list[DiscoveredTarget]:
    portal = portal_of(where) if isinstance(where, LoopbackTarget) else where
    with trio.fail_after(limit + 10):
        return await discover(portal, settings_of(login_timeout=limit))


def _names(found: list[DiscoveredTarget]) -> list[str]:
    return [target.name.removeprefix(f"{PREFIX}:") for target in found]


def _after_login(heard: list[Pdu]) -> list[Pdu]:
    return [pdu for pdu in heard if not isinstance(pdu, LoginRequest)]


async def _gives_up(config: TargetConfig, kind: type[IscsifuseError], words: str, *, limit: float = 5.0) -> list[Pdu]:
    """A discovery that ends with this error in one line, the connection closed; what was sent after the login."""
    heard = listen(config)
    async with serving(config) as target:
        with pytest.raises(kind, match=words) as caught:
            await _discover(target, limit=limit)
        await until(lambda: target.connections == 0)
    assert str(caught.value).isprintable()
    return _after_login(heard)


# --- the exchange ---


@pytest.mark.conformance(36)
async def test_the_first_text_request() -> None:
    """36: the first Text Request → TTT 0xffffffff, F=1, SendTargets=All, and a tag that no other task has."""
    config = _nodes(2)
    heard = listen(config)
    async with serving(config) as target:
        assert _names(await _discover(target)) == ["t00000", "t00001"]
    request, logout = _after_login(heard)
    assert isinstance(request, TextRequest)
    assert isinstance(logout, LogoutRequest)
    assert (request.ttt, request.final, request.cont, request.immediate) == (RESERVED_TAG, True, False, False)
    assert request.data == b"SendTargets=All\0"
    assert len({request.itt, logout.itt, RESERVED_TAG}) == 3


@pytest.mark.conformance(37)
@pytest.mark.parametrize(("cut", "cont"), [("in a pair", True), ("in a pair", False), ("after a pair", False)])
@pytest.mark.parametrize("tag", [0, 1, 0xFFFFFFFE])
async def test_an_answer_in_several_responses(cut: str, cont: bool, tag: int) -> None:
    """37: F=0 with a TTT and a LUN → both and the ITT go back; the answer is joined, even if C=0 inside of a pair."""
    whole = text.encode(
        [
            ("TargetName", f"{PREFIX}:a"),
            ("TargetAddress", "10.0.0.1:3260,1"),
            ("TargetAddress", "10.0.0.2:3260,1"),
            ("TargetName", f"{PREFIX}:b"),
        ]
    )
    at = 20 if cut == "in a pair" else whole.index(b"\0", 60) + 1
    lun = bytes(range(8))
    config = _nodes(1)
    _change(config, 1, lambda pdu: replace(pdu, final=False, cont=cont, ttt=tag, lun=lun, data=whole[:at]))
    _change(config, 2, lambda pdu: replace(pdu, final=True, cont=False, ttt=RESERVED_TAG, data=whole[at:]))
    heard = listen(config)
    async with serving(config) as target:
        found = await _discover(target)
    assert [(one.name, len(one.portals)) for one in found] == [(f"{PREFIX}:a", 2), (f"{PREFIX}:b", 1)]
    first, second, _ = _after_login(heard)
    assert isinstance(first, TextRequest)
    assert isinstance(second, TextRequest)
    assert (second.itt, second.ttt, second.lun) == (first.itt, tag, lun)
    assert (second.data, second.final, second.cont) == (b"", True, False)
    assert second.cmd_sn == first.cmd_sn + 1


@pytest.mark.conformance(38)
async def test_a_tag_that_means_nothing() -> None:
    """38: F=1 with a valid TTT → ignored: the answer is whole, and a logout follows."""
    config = _nodes(1)
    _change(config, 1, lambda pdu: replace(pdu, final=True, ttt=7))
    heard = listen(config)
    async with serving(config) as target:
        assert _names(await _discover(target)) == ["t00000"]
    assert [type(pdu) for pdu in _after_login(heard)] == [TextRequest, LogoutRequest]


@pytest.mark.conformance(39)
@pytest.mark.parametrize("cont", [False, True])
@pytest.mark.parametrize("nth", [1, 2])
async def test_not_final_and_no_tag_to_go_on_with(nth: int, cont: bool) -> None:
    """39: F=0 with TTT 0xffffffff, at once or in the midst → disconnected, nothing more is asked."""
    config = _nodes(20, text_chunk=200)
    _change(config, nth, lambda pdu: replace(pdu, final=False, cont=cont, ttt=RESERVED_TAG))
    heard = await _gives_up(config, ProtocolError, "not final, without a Target Transfer Tag")
    assert [type(pdu) for pdu in heard] == [TextRequest] * nth


@pytest.mark.expect_log("doesn't belong to an answer to SendTargets; it was skipped")
@pytest.mark.conformance(40)
@pytest.mark.parametrize(
    "key", ["X-org.example.a=1", "TargetAlias=disk", "MaxBurstLength=512", "AuthMethod=None", "A="]
)
async def test_a_foreign_key_in_an_answer(key: str, caplog: pytest.LogCaptureFixture) -> None:
    """40: a foreign key anywhere in the answer → skipped with a warning; the targets around it are there."""
    config = _nodes(2, "10.0.0.1:3260,1")
    foreign = key.encode() + b"\0"

    def spread(pdu: TextResponse) -> TextResponse:
        return replace(pdu, data=foreign + pdu.data.replace(b"TargetAddress", foreign + b"TargetAddress") + foreign)

    _change(config, 1, spread)
    async with serving(config) as target:
        found = await _discover(target)
    assert [str(place) for one in found for place in one.portals] == ["10.0.0.1:3260,1"] * 2
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 4


@pytest.mark.expect_log(r"left out|and \d+ more")
@pytest.mark.conformance(40)
@pytest.mark.conformance("B6")
async def test_a_flood_of_what_cannot_be_used(caplog: pytest.LogCaptureFixture) -> None:
    """40, B6: thousands of names that are none → a bounded number of warnings, each one printable line."""
    data = b"".join(f"TargetName=../\x1b[2J\n{number}\0".encode() for number in range(5000))
    config = _nodes(1)
    _change(config, 1, lambda pdu: replace(pdu, data=data + pdu.data))
    async with serving(config) as target:
        assert _names(await _discover(target)) == ["t00000"]
    warnings = [record.getMessage() for record in caplog.records]
    assert 0 < len(warnings) <= 101
    assert all(warning.isprintable() for warning in warnings)


@pytest.mark.conformance(41)
@pytest.mark.parametrize("nth", [1, 3])
async def test_a_reject(nth: int) -> None:
    """41: a Reject, at once or in the midst → the sequence is given up; no target of half an answer is shown."""
    config = _nodes(50, text_chunk=200)

    def reject(pdu: TextResponse) -> Reject:
        return Reject(
            reason=RejectReason.COMMAND_NOT_SUPPORTED,
            stat_sn=pdu.stat_sn,
            exp_cmd_sn=pdu.exp_cmd_sn,
            max_cmd_sn=pdu.max_cmd_sn,
            data=bytes(48),
        )

    _change(config, nth, reject)
    heard = await _gives_up(config, ProtocolError, "rejected the Text Request")
    assert [type(pdu) for pdu in heard] == [TextRequest] * nth


@pytest.mark.conformance(41)
@pytest.mark.parametrize("value", ["Reject", "NotUnderstood", "Irrelevant"])
async def test_a_portal_that_will_not_tell(value: str) -> None:
    """41: SendTargets=Reject instead of an answer → an error, not an empty list."""
    config = _nodes(1)
    _change(config, 1, lambda pdu: replace(pdu, data=f"SendTargets={value}\0".encode()))
    await _gives_up(config, ProtocolError, f"doesn't tell its targets: it answered SendTargets={value}")


@pytest.mark.conformance(42)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_addresses_of_all_kinds(host: str) -> None:
    """42: no TargetAddress → the portal in use; IPv6, host names, duplicates, several, no port, no tag."""
    config = _nodes(2, hosts=(host,))
    config.nodes[0].addresses = ()
    config.nodes[1].addresses = (
        "10.0.0.1:3261,2",
        "[2001:DB8::0:1]:3260,1",
        "san.example,7",
        "[2001:db8::1],1",
        "10.0.0.2",
        "10.0.0.1:3261,2",
    )
    async with serving(config) as target:
        nowhere, everywhere = await _discover(target)
        assert [str(place) for place in nowhere.portals] == [f"{target.portal},1"]
    assert [str(place) for place in everywhere.portals] == [
        "10.0.0.1:3261,2", "[2001:db8::1]:3260,1", "san.example:3260,7", "10.0.0.2:3260,1",
    ]  # fmt: skip


# --- how much, and how long ---


@pytest.mark.conformance(43)
@pytest.mark.parametrize("chunk", [512, 8192])
async def test_ten_thousand_targets(chunk: int) -> None:
    """43: ten thousand targets in one answer, of many pieces → all of them are there, in order, in little memory."""
    config = _nodes(MANY, "10.0.0.1:3260,1", "[2001:db8::1]:3260,2", text_chunk=chunk)
    async with serving(config) as target:
        with _traced(chunk == 8192) as peak:  # tracing takes three times as long
            found = await _discover(target, limit=60)
    assert _names(found) == [f"t{number:05}" for number in range(MANY)]
    assert all([place.tag for place in one.portals] == [1, 2] for one in found)
    assert not peak or peak[0] < 48 << 20, peak  # the target's half included, which has the answer several times


@contextmanager
def _traced(really: bool = True) -> Iterator[list[int]]:
    """A list that holds the peak of the memory that was taken in the block, when that is over."""
    peak: list[int] = []
    if not really:
        yield peak
        return
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


@pytest.mark.conformance(43)
@pytest.mark.conformance("B4")
@pytest.mark.parametrize(
    ("piece", "cont", "words"),
    [
        (b"x" * 262144, True, "more than 16777216 bytes of text"),
        (bytes(262144), True, "more than 16777216 bytes of text"),
        (b"A=\0" * 80000, False, "more than 16777216 bytes of text"),
        (b"A=\0" * 80000, None, "more than 131072 keys in one text"),
    ],
    ids=["a value", "nothing", "keys", "keys that end"],
)
async def test_an_answer_without_an_end(piece: bytes, cont: bool | None, words: str) -> None:
    """43, B4: F=0 for ever, or just too much text → given up, and memory stays bounded."""
    config = _nodes(1)
    times = 5 if cont is None else 0
    _change(config, 1, lambda pdu: replace(pdu, final=False, cont=bool(cont), ttt=7, data=piece), times=times)
    with _traced() as peak:
        await _gives_up(config, FormatError, words, limit=60)
    assert peak[0] < 96 << 20, peak


@pytest.mark.conformance("B4")
@pytest.mark.parametrize("cont", [True, False])
async def test_empty_answers_for_ever(cont: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """B4: F=0 for ever, with nothing in it → given up after so many responses."""
    monkeypatch.setattr(sendtargets, "MAX_EXCHANGES", 100)
    config = _nodes(1)
    _change(config, 1, lambda pdu: replace(pdu, final=False, cont=cont, ttt=7, data=b""), times=0)
    heard = await _gives_up(config, ProtocolError, "more than 100 responses to one Text Request")
    assert len(heard) == 101


@pytest.mark.conformance("B10")
@pytest.mark.parametrize("wants_answer", [False, True])
async def test_a_portal_that_talks_without_a_pause(wants_answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """B10: NOP-Ins faster than we can read them, in place of an answer → the time limit holds."""
    receive_now = Transport.receive_now
    endless = NopIn(ttt=5 if wants_answer else RESERVED_TAG, stat_sn=3, exp_cmd_sn=2, max_cmd_sn=99).encode()
    state = {"flood": False, "at": 0, "calls": 0}

    def flooded(self: Transport, buffers: list[memoryview]) -> int | None:
        if not state["flood"]:
            return receive_now(self, buffers)
        state["calls"] += 1
        if state["calls"] > 1000:
            return 0  # so that a broken product fails, and doesn't hang
        for buffer in buffers:
            start = state["at"] % len(endless)
            state["at"] += len(buffer)
            buffer[:] = (endless * (len(buffer) // len(endless) + 2))[start : start + len(buffer)]
        return sum(map(len, buffers))

    monkeypatch.setattr(Transport, "receive_now", flooded)
    send = Transport.send

    def watched(self: Transport, buffers: list[Any]) -> None:
        if any(bytes(buffer[:1]) == b"\x04" for buffer in buffers):
            state["flood"] = True
        send(self, buffers)

    monkeypatch.setattr(Transport, "send", watched)
    monkeypatch.setattr(discovery, "_LOGOUT_LIMIT", 0.1)
    async with serving(_nodes(1), strict=False) as target:
        with pytest.raises(LoginTimeoutError, match="did not answer SendTargets"):
            await _discover(target, limit=0.3)
    assert state["calls"] > 1


# --- what a user sees ---


@contextmanager
def _in_thread(config: TargetConfig) -> Iterator[LoopbackTarget]:
    with LoopbackTarget(config).in_thread() as target:
        yield target
    assert target.violations == []
    assert threading.active_count() < 20


@pytest.mark.conformance(43)
def test_iscsifuse_discover_prints_ten_thousand_targets() -> None:
    """43: `iscsifuse discover` → a line for each of them, as iscsiadm prints it; and as JSON."""
    with _in_thread(_nodes(MANY, "10.0.0.1:3260,1", hosts=("::1",))) as target:
        done = run_cli("discover", target.url())
        assert (done.returncode, done.stderr) == (0, "")
        expected = [f"10.0.0.1:3260,1 {PREFIX}:t{number:05}" for number in range(MANY)]
        assert done.stdout.splitlines() == expected
        shown = json.loads(run_cli("discover", target.url(), "--json").stdout)
        assert shown["portal"] == target.portal
        assert [one["target"] for one in shown["targets"]] == [line.split()[1] for line in expected]


@pytest.mark.conformance("B6")
def test_the_longest_name_on_the_command_line() -> None:
    """B6: a name of 223 bytes is shown and asked for; one of 224 is refused in one sentence, before a portal is."""
    name = f"{PREFIX}:" + "n" * (222 - len(PREFIX))
    config = _nodes(1)
    config.nodes[0].name = name
    with _in_thread(config) as target:
        assert run_cli("discover", target.url()).stdout == f"{target.portal},1 {name}\n"
        logins = target.logins
        done = run_cli("ls", target.url(target=name))
        assert "has no" in done.stderr or done.returncode in (0, 21)
        assert target.logins == logins + 1
        for arguments in (
            ("ls", target.url(target=name + "n")),
            ("info", target.url(target=name + "n")),
            ("ls", "--initiator-name", name + "n", target.url()),
        ):
            done = run_cli(*arguments)
            assert (done.returncode, done.stdout) == (1, "")
            (sentence,) = done.stderr.splitlines()
            assert "has 224 bytes, but 223 is the limit" in sentence
        assert target.logins == logins + 1
