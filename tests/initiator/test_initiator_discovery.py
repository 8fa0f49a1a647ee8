import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from initiator_kit import config_of, portal_of, raw_portal, serving, settings_of, until

from iscsifuse.errors import (
    AuthenticationError,
    ConnectError,
    IscsifuseError,
    LoginError,
    LoginTimeoutError,
    ProtocolError,
)
from iscsifuse.initiator import discovery
from iscsifuse.initiator.discovery import discover
from iscsifuse.initiator.settings import DiscoveredTarget, Portal
from iscsifuse.iscsi import text
from iscsifuse.iscsi.chap import ChapCredentials
from iscsifuse.iscsi.pdu import Opcode
from iscsifuse.iscsi.response import R2T, AsyncMessage, LoginResponse, NopIn, Reject, RejectReason, TextResponse
from iscsifuse.testing.actions import Action, Call, Change, Close, Cut, Drop, Inject, Stall
from iscsifuse.testing.config import ChapPolicy, TargetConfig, TargetNode
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Rule, is_a

TEXT_RESPONSE = is_a(Opcode.TEXT_RESPONSE)
PREFIX = "iqn.2026-11.io.github.iscsifuse"


async def _discover(portal: Portal, *, limit: float = 5.0, **changes: Any) -> list[DiscoveredTarget]:
    with trio.fail_after(2 * limit + 4):
        return await discover(portal, settings_of(login_timeout=limit, **changes))


def _said(targets: list[DiscoveredTarget]) -> list[str]:
    return [f"{place} {target.name}" for target in targets for place in target.portals]


def _nodes(**addresses: tuple[str, ...] | None) -> TargetConfig:
    config = config_of()
    config.nodes = [
        TargetNode(name=f"{PREFIX}:{name}", disks=[Disk(blocks=8)], addresses=places, tag=number)
        for number, (name, places) in enumerate(addresses.items(), 1)
    ]
    return config


async def test_discovery_of_several_targets() -> None:
    config = _nodes(b=None, a=None, c=None)
    logouts: list[int] = []
    config.script.add(Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Call(lambda: logouts.append(1))))
    async with serving(config) as target:
        here = target.portal
        assert _said(await _discover(portal_of(target))) == [
            f"{here},1 {PREFIX}:b",
            f"{here},2 {PREFIX}:a",
            f"{here},3 {PREFIX}:c",
        ]
        assert target.logins == 1
        assert logouts == [1]


@pytest.mark.conformance(42)
async def test_discovery_of_several_portals() -> None:
    config = _nodes(a=("10.0.0.1:3261,2", "[fe80::1]:3260,1", "10.0.0.1:3261,2", "san.example,7", "10.0.0.2"))
    async with serving(config) as target:
        assert _said(await _discover(portal_of(target))) == [
            f"10.0.0.1:3261,2 {PREFIX}:a",
            f"[fe80::1]:3260,1 {PREFIX}:a",
            f"san.example:3260,7 {PREFIX}:a",
            f"10.0.0.2:3260,1 {PREFIX}:a",
        ]


@pytest.mark.conformance(42)
async def test_discovery_without_an_address_is_the_portal_in_use() -> None:
    async with serving(_nodes(a=())) as target:
        assert _said(await _discover(portal_of(target))) == [f"{target.portal},1 {PREFIX}:a"]


async def test_discovery_of_nothing() -> None:
    async with serving(_nodes()) as target:
        assert await _discover(portal_of(target)) == []


@pytest.mark.conformance(36)
@pytest.mark.conformance(37)
@pytest.mark.conformance(43)
@pytest.mark.parametrize("chunk", [1, 7, 512, 0])
async def test_discovery_of_a_text_in_pieces(chunk: int) -> None:
    count = 3 if chunk == 1 else 300
    config = _nodes(**{f"t{number}": ("10.0.0.1:3260,1", "10.0.0.2:3260,2") for number in range(count)})
    config.text_chunk = chunk
    async with serving(config) as target:
        found = await _discover(portal_of(target))
    assert [one.name for one in found] == [f"{PREFIX}:t{number}" for number in range(count)]
    assert all(len(one.portals) == 2 for one in found)


@pytest.mark.conformance("B6")
@pytest.mark.conformance(40)
@pytest.mark.expect_log("left out|skipped")
async def test_discovery_leaves_out_what_cannot_be_used() -> None:
    answer = text.encode(
        [
            ("TargetName", f"{PREFIX}:good"),
            ("TargetAddress", "10.0.0.1:99999,1"),
            ("TargetAddress", "10.0.0.1:3260,1"),
            ("X-com.example.key", "1"),
            ("TargetName", "../../etc/passwd"),
            ("TargetAddress", "10.0.0.1:3260,1"),
            ("TargetName", f"{PREFIX}:also"),
        ]
    )
    config = _nodes(a=None)
    rule = Rule(OUT, match=TEXT_RESPONSE, action=Change(lambda pdu: _with_data(pdu, answer)))
    config.script.add(rule)
    async with serving(config) as target:
        assert _said(await _discover(portal_of(target))) == [
            f"10.0.0.1:3260,1 {PREFIX}:good",
            f"{target.portal},1 {PREFIX}:also",
        ]


def _with_data(pdu: Any, data: bytes, **changes: Any) -> TextResponse:
    return TextResponse(
        **{"final": True, "itt": pdu.itt, "stat_sn": pdu.stat_sn, "exp_cmd_sn": pdu.exp_cmd_sn, **changes},
        max_cmd_sn=pdu.max_cmd_sn,
        data=data,
    )


async def test_discovery_with_chap() -> None:
    config = _nodes(a=None)
    config.chap = ChapPolicy(users={"me": b"a secret of sixteen"})
    async with serving(config) as target:
        good = ChapCredentials(user="me", secret=b"a secret of sixteen")
        assert len(await _discover(portal_of(target), chap=good)) == 1
        with pytest.raises(AuthenticationError):
            await _discover(portal_of(target), chap=ChapCredentials(user="me", secret=b"another one of sixteen"))
        with pytest.raises(AuthenticationError):
            await _discover(portal_of(target))


async def test_discovery_asks_for_no_digests() -> None:
    config = _nodes(a=None)
    async with serving(config) as target:
        assert await _discover(portal_of(target), header_digest=True, data_digest=True)


# --- portals that are none, or break down ---


async def _silent(_: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def _hang_up(stream: trio.SocketStream) -> None:
    await stream.receive_some()


async def _http(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<html>")


STRANGERS: list[tuple[Callable[[trio.SocketStream], Awaitable[None]], type[IscsifuseError]]] = [
    (_silent, LoginTimeoutError),
    (_hang_up, LoginError),
    (_http, ProtocolError),
]


@pytest.mark.conformance(25)
@pytest.mark.parametrize(("handler", "kind"), STRANGERS)
async def test_discovery_with_strangers(
    handler: Callable[[trio.SocketStream], Awaitable[None]], kind: type[IscsifuseError]
) -> None:
    async with raw_portal(handler) as portal:
        began = trio.current_time()
        with pytest.raises(kind) as caught:
            await _discover(portal, limit=0.3)
        assert trio.current_time() - began < 1
    assert str(portal) in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_discovery_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectError):
        await _discover(Portal("127.0.0.1", port))


BREAKDOWNS: list[tuple[str, Rule, type[IscsifuseError]]] = [
    ("FIN", Rule(OUT, match=TEXT_RESPONSE, action=Close()), ConnectError),
    ("RST", Rule(OUT, match=TEXT_RESPONSE, action=Close(reset=True)), ConnectError),
    ("cut", Rule(OUT, match=TEXT_RESPONSE, action=Cut(60)), ConnectError),
    ("cut in the header", Rule(OUT, match=TEXT_RESPONSE, action=Cut(20)), ConnectError),
    ("silence", Rule(OUT, match=TEXT_RESPONSE, action=Stall()), LoginTimeoutError),
    ("a stall", Rule(OUT, match=TEXT_RESPONSE, action=Stall(50)), LoginTimeoutError),
    ("the question is lost", Rule(IN, match=is_a(Opcode.TEXT_REQUEST), action=Drop()), LoginTimeoutError),
    (
        "the same piece for ever",
        Rule(
            OUT,
            match=TEXT_RESPONSE,
            times=0,
            action=Change(lambda pdu: _with_data(pdu, b"", final=False, ttt=7, cont=True)),
        ),
        IscsifuseError,
    ),
    (
        "a reserved tag, but not final",
        Rule(OUT, match=TEXT_RESPONSE, action=Change(lambda pdu: _with_data(pdu, b"", final=False))),
        ProtocolError,
    ),
    (
        "no key=value",
        Rule(OUT, match=TEXT_RESPONSE, action=Change(lambda pdu: _with_data(pdu, b"rubbish\0"))),
        ProtocolError,
    ),
    (
        "a reject",
        Rule(
            OUT,
            match=TEXT_RESPONSE,
            action=Change(
                lambda pdu: Reject(
                    reason=RejectReason.PROTOCOL_ERROR,
                    stat_sn=pdu.stat_sn,  # type: ignore[attr-defined]
                    exp_cmd_sn=pdu.exp_cmd_sn,  # type: ignore[attr-defined]
                    max_cmd_sn=pdu.max_cmd_sn,  # type: ignore[attr-defined]
                    data=bytes(48),
                )
            ),
        ),
        ProtocolError,
    ),
]


@pytest.mark.conformance(39)
@pytest.mark.conformance(41)
@pytest.mark.conformance("B4")
@pytest.mark.parametrize(("rule", "kind"), [row[1:] for row in BREAKDOWNS], ids=[row[0] for row in BREAKDOWNS])
async def test_discovery_breaks_down(rule: Rule, kind: type[IscsifuseError]) -> None:
    config = _nodes(a=None)
    config.script.add(rule)
    async with serving(config, strict=False) as target:
        began = trio.current_time()
        with pytest.raises(kind) as caught:
            await _discover(portal_of(target), limit=0.4)
        assert trio.current_time() - began < 1.5
    assert "\n" not in str(caught.value)
    assert str(caught.value)


async def test_discovery_pings_and_messages_do_no_harm() -> None:
    tags = iter((7, 8))

    def ping(pdu: Any) -> NopIn:
        return NopIn(ttt=next(tags), stat_sn=pdu.stat_sn, exp_cmd_sn=pdu.exp_cmd_sn, max_cmd_sn=pdu.max_cmd_sn)

    config = _nodes(a=None)
    config.script.add(Rule(OUT, match=TEXT_RESPONSE, action=Inject(before=(ping, ping))))
    async with serving(config) as target:
        assert len(await _discover(portal_of(target))) == 1

    def message(pdu: Any) -> AsyncMessage:
        return AsyncMessage(event=255, stat_sn=pdu.stat_sn, exp_cmd_sn=pdu.exp_cmd_sn, max_cmd_sn=pdu.max_cmd_sn)

    def next_number(pdu: Any) -> TextResponse:
        return _with_data(pdu, pdu.data, stat_sn=pdu.stat_sn + 1)

    config = _nodes(a=None)
    config.script.add(Rule(OUT, match=TEXT_RESPONSE, action=_Two(message, next_number)))
    async with serving(config, strict=False) as target:
        assert len(await _discover(portal_of(target))) == 1


class _Two(Action):
    """Two PDUs, both made from the one that matched."""

    def __init__(self, *made: Callable[[Any], Any]) -> None:
        self._made = made

    def steps(self, pdu: Any, encode: Any) -> Any:
        return [step for make in self._made for step in Change(make).steps(pdu, encode)]


async def test_discovery_a_pdu_of_another_world_is_an_error() -> None:
    config = _nodes(a=None)
    config.script.add(
        Rule(OUT, match=TEXT_RESPONSE, action=Change(lambda pdu: R2T(itt=pdu.itt, desired_data_transfer_length=1)))
    )
    async with serving(config, strict=False) as target:
        with pytest.raises(IscsifuseError):
            await _discover(portal_of(target), limit=0.3)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Drop()),
        Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Close()),
        Rule(IN, match=is_a(Opcode.LOGOUT_REQUEST), action=Close(reset=True)),
        Rule(OUT, match=is_a(Opcode.LOGOUT_RESPONSE), action=Change(lambda _: NopIn(itt=5, ttt=5))),
    ],
    ids=["silence", "FIN", "RST", "rubbish"],
)
@pytest.mark.parametrize("limit", [0.2, 5.0])
async def test_discovery_a_clumsy_logout_takes_nothing_away(
    rule: Rule, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the limit for the question is shorter than that for the logout."""
    monkeypatch.setattr(discovery, "_LOGOUT_LIMIT", 0.4)
    config = _nodes(a=None)
    config.script.add(rule)
    async with serving(config, strict=False) as target:
        assert len(await _discover(portal_of(target), limit=limit)) == 1


async def test_discovery_follows_a_redirect() -> None:
    """A portal may send discovery elsewhere; what it lists without an address is there, then."""
    there_config = _nodes(a=())
    async with serving(there_config) as there:

        async def redirect(stream: trio.SocketStream) -> None:

            request = await stream.receive_some()
            isid = request[8:14]
            answer = LoginResponse(
                isid=isid, status_class=1, status_detail=1, data=text.encode([("TargetAddress", there.portal)])
            )
            await stream.send_all(answer.encode())
            await stream.receive_some()

        async with raw_portal(redirect) as here:
            assert _said(await _discover(here)) == [f"{there.portal},1 {PREFIX}:a"]


async def test_discovery_cancelled_closes_the_connection() -> None:
    config = _nodes(a=None)
    config.script.add(Rule(OUT, match=TEXT_RESPONSE, action=Stall()))
    async with serving(config) as target:
        with trio.move_on_after(0.1) as scope:
            await _discover(portal_of(target))
        assert scope.cancelled_caught
        await until(lambda: not target.sessions)
