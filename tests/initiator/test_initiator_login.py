import contextlib
import socket
from collections.abc import Awaitable, Callable

import pytest
import trio
from initiator_fakes import jumping
from initiator_kit import (
    DEFAULT_TARGET_NAME,
    config_of,
    portal_of,
    raw_portal,
    serving,
    settings_of,
    until,
)

from iscsifuse.errors import (
    AuthenticationError,
    ConnectError,
    IscsifuseError,
    LoginError,
    LoginTimeoutError,
    NothingFoundError,
    ProtocolError,
)
from iscsifuse.initiator import login as login_module
from iscsifuse.initiator.login import LoggedIn, log_in, login_config, make_isid
from iscsifuse.initiator.settings import Portal, SessionSettings
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi.chap import ChapCredentials
from iscsifuse.iscsi.pdu import Opcode
from iscsifuse.iscsi.response import LoginResponse, NopIn
from iscsifuse.testing.actions import Change, Cut, Delay, Inject, Stall
from iscsifuse.testing.config import ChapPolicy, Redirect, TargetConfig, TargetKeys, TargetNode
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import OUT, Rule, is_a

LOGIN_RESPONSE = is_a(Opcode.LOGIN_RESPONSE)


async def _log_in(portal: Portal, settings: SessionSettings | None = None, *, limit: float = 5.0) -> LoggedIn:
    config = login_config(settings or settings_of(), DEFAULT_TARGET_NAME)
    with trio.fail_after(limit + 1):
        return await log_in(portal, config, isid=make_isid(), limit=limit)


async def test_login_leaves_an_open_connection_and_what_was_agreed_on() -> None:
    async with serving(config_of(Disk(blocks=64))) as target:
        login = await _log_in(portal_of(target))
        assert login.portal == portal_of(target)
        assert login.result.tsih == 1
        assert login.received == b""
        assert login.transport.receive_now([memoryview(bytearray(1))]) is None
        login.transport.close()


def test_login_isid_is_random_and_of_its_type() -> None:
    isids = {make_isid() for _ in range(50)}
    assert len(isids) == 50
    assert all(len(isid) == 6 and isid[0] == 0x80 and isid[4:] == b"\0\0" for isid in isids)


def test_login_digests_are_for_sessions_with_data() -> None:
    settings = settings_of(header_digest=True, data_digest=True)
    normal, discovery = login_config(settings, DEFAULT_TARGET_NAME), login_config(settings, None)
    assert (normal.header_digest, normal.data_digest) == (True, True)
    assert (discovery.header_digest, discovery.data_digest) == (False, False)
    assert discovery.discovery


# --- a target that isn't one, or doesn't answer ---


async def test_login_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectError, match="connection refused"):
        await _log_in(Portal("127.0.0.1", port))


@jumping
async def test_login_a_connection_that_is_not_taken_is_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def connect(_: Portal) -> Transport:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(Transport, "connect", connect)
    with pytest.raises(
        ConnectError, match=r"10\.0\.0\.1:3260 did not take the connection within 15 seconds"
    ) as caught:
        await _log_in(Portal("10.0.0.1"), limit=15)
    assert caught.value.exit_code == 4
    assert trio.current_time() == pytest.approx(15, abs=0.1)


async def _silent(_: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def _hang_up(stream: trio.SocketStream) -> None:
    await stream.receive_some()


def _says(words: bytes) -> Callable[[trio.SocketStream], Awaitable[None]]:
    async def say(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(words)
        await trio.sleep_forever()

    return say


STRANGERS: list[tuple[str, Callable[[trio.SocketStream], Awaitable[None]], type[IscsifuseError], str]] = [
    ("silent", _silent, LoginTimeoutError, "did not answer the login within 0.2 seconds"),
    ("hangs up", _hang_up, LoginError, "ended the connection during the login"),
    ("HTTP", _says(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(40)), ProtocolError, "doesn't speak iSCSI"),
    ("SSH", _says(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n" + bytes(40)), ProtocolError, "doesn't speak iSCSI"),
    ("half a header", _says(LoginResponse().encode()[:20]), LoginTimeoutError, "did not answer the login"),
    ("another PDU", _says(NopIn(itt=0).encode()), ProtocolError, "NopIn in the login phase"),
    ("zeros", _says(bytes(4096)), ProtocolError, ""),
]


@pytest.mark.conformance(5)
@pytest.mark.conformance(25)
@pytest.mark.parametrize(
    ("handler", "kind", "words"), [row[1:] for row in STRANGERS], ids=[row[0] for row in STRANGERS]
)
async def test_login_with_strangers(
    handler: Callable[[trio.SocketStream], Awaitable[None]], kind: type[IscsifuseError], words: str
) -> None:
    async with raw_portal(handler) as portal:
        with pytest.raises(kind) as caught:
            await _log_in(portal, limit=0.2)
    assert words in str(caught.value)
    assert "127.0.0.1" in str(caught.value) or kind is ProtocolError
    assert "\n" not in str(caught.value)


async def test_login_failures_close_the_socket() -> None:
    ends: list[bytes] = []

    async def watch(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(NopIn(itt=0).encode())
        with contextlib.suppress(trio.BrokenResourceError):  # closed with bytes unread: RST
            ends.append(await stream.receive_some())
            return
        ends.append(b"")

    async with raw_portal(watch) as portal:
        for _ in range(3):
            with pytest.raises(ProtocolError):
                await _log_in(portal)
        await until(lambda: len(ends) == 3)
    assert ends == [b"", b"", b""]


async def test_login_cancelled_closes_the_socket() -> None:
    closed = trio.Event()

    async def watch(stream: trio.SocketStream) -> None:
        while await stream.receive_some():
            pass
        closed.set()

    async with raw_portal(watch) as portal:
        with trio.move_on_after(0.1) as scope:
            await _log_in(portal)
        assert scope.cancelled_caught
        with trio.fail_after(2):
            await closed.wait()


# --- a target that behaves, or misbehaves in its own ways ---


@pytest.mark.conformance(25)
@pytest.mark.parametrize("after", [0, 1, 47, 48, 60])
async def test_login_stalls_inside_a_response(after: int) -> None:
    config = config_of(Disk(blocks=64))
    config.script.add(Rule(OUT, match=LOGIN_RESPONSE, action=Stall(after)))
    async with serving(config) as target:
        with pytest.raises(LoginTimeoutError):
            await _log_in(portal_of(target), limit=0.2)


@pytest.mark.parametrize("after", [0, 1, 47, 48, 60])
async def test_login_connection_cut_inside_a_response(after: int) -> None:
    config = config_of(Disk(blocks=64))
    config.script.add(Rule(OUT, match=LOGIN_RESPONSE, action=Cut(after)))
    async with serving(config) as target:
        with pytest.raises(LoginError, match="ended the connection during the login"):
            await _log_in(portal_of(target))
        # Once is not for ever.
        (await _log_in(portal_of(target))).transport.close()


async def test_login_byte_by_byte() -> None:
    async def trickle(stream: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", port) as target, trio.open_nursery() as nursery:

            async def up() -> None:
                async for data in stream:
                    await target.send_all(data)
                nursery.cancel_scope.cancel()

            nursery.start_soon(up)
            async for data in target:
                for index in range(len(data)):
                    await stream.send_all(data[index : index + 1])

    async with serving(config_of(Disk(blocks=64))) as loopback:
        port = loopback.port
        async with raw_portal(trickle) as portal:
            login = await _log_in(portal)
            assert login.result.tsih
            login.transport.close()


async def test_login_bytes_behind_the_last_response_are_kept() -> None:
    config = config_of(Disk(blocks=64))
    # StatSN isn't used up by a NOP-In that wants no answer.
    ping = NopIn(stat_sn=0, exp_cmd_sn=1, max_cmd_sn=32).encode()
    config.script.add(Rule(OUT, match=LOGIN_RESPONSE, nth=2, action=Inject(after=(ping,))))
    async with serving(config, strict=False) as target:
        login = await _log_in(portal_of(target))
        assert login.received == ping
        login.transport.close()


async def test_login_no_such_target() -> None:
    async with serving(config_of(Disk(blocks=64))) as target:
        config = login_config(settings_of(), "iqn.2026-11.io.github.iscsifuse:other")
        with pytest.raises(NothingFoundError):
            await log_in(portal_of(target), config, isid=make_isid(), limit=5)


@pytest.mark.conformance(23)
@pytest.mark.parametrize("status", [0x0200, 0x0202, 0x0300, 0x0301, 0x0302])
async def test_login_refused_with_a_status(status: int) -> None:
    def refuse(_: object) -> LoginResponse:
        return LoginResponse(status_class=status >> 8, status_detail=status & 0xFF)

    config = config_of(Disk(blocks=64))
    config.script.add(Rule(OUT, match=LOGIN_RESPONSE, action=Change(refuse)))
    async with serving(config) as target:
        with pytest.raises(LoginError) as caught:
            await _log_in(portal_of(target))
    assert caught.value.status == status


def _chap(secret: bytes) -> ChapCredentials:
    return ChapCredentials(user="me", secret=secret)


async def test_login_with_chap() -> None:
    config = config_of(Disk(blocks=64), chap=ChapPolicy(users={"me": b"a secret of sixteen"}))
    async with serving(config) as target:
        login = await _log_in(portal_of(target), settings_of(chap=_chap(b"a secret of sixteen")))
        assert login.result.parameters.auth_method == "CHAP"
        login.transport.close()
        with pytest.raises(AuthenticationError):
            await _log_in(portal_of(target), settings_of(chap=_chap(b"another one of sixteen")))
        with pytest.raises(AuthenticationError):
            await _log_in(portal_of(target))


# --- redirects ---


def _redirecting(address: str, **more: object) -> TargetConfig:
    config = config_of(Disk(blocks=64))
    config.nodes = [TargetNode(disks=[Disk(blocks=64)], redirect=Redirect(address, **more))]  # type: ignore[arg-type]
    return config


@pytest.mark.conformance(21)
@pytest.mark.parametrize("permanent", [False, True])
async def test_login_follows_a_redirect(permanent: bool) -> None:
    async with (
        serving(config_of(Disk(blocks=64))) as there,
        serving(_redirecting(there.portal + ",1", permanent=permanent)) as here,
    ):
        login = await _log_in(portal_of(here))
        assert login.portal == portal_of(there)
        assert (here.logins, there.logins) == (0, 1)
        login.transport.close()


@pytest.mark.conformance(21)
async def test_login_follows_a_redirect_after_chap_and_authenticates_anew() -> None:
    policy = ChapPolicy(users={"me": b"a secret of sixteen"})
    settings = settings_of(chap=_chap(b"a secret of sixteen"))
    async with serving(config_of(Disk(blocks=64), chap=policy)) as there:
        config = _redirecting(f"localhost:{there.port}", after_chap=True)
        config.chap = policy
        async with serving(config) as here:
            login = await _log_in(portal_of(here), settings)
            assert login.portal == Portal("localhost", there.port)
            login.transport.close()


@pytest.mark.conformance(22)
async def test_login_redirected_in_circles_ends() -> None:
    config = _redirecting("127.0.0.1:1")
    async with serving(config) as target:
        config.nodes[0].redirect = Redirect(target.portal)
        with pytest.raises(LoginError, match="redirected the login more than 4 times"):
            await _log_in(portal_of(target))


async def test_login_redirected_to_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    async with serving(_redirecting(f"127.0.0.1:{port}")) as target:
        with pytest.raises(ConnectError, match=f"127.0.0.1:{port}"):
            await _log_in(portal_of(target))


async def test_login_the_limit_is_for_all_redirects_together() -> None:
    config = _redirecting("127.0.0.1:1")
    config.script.add(Rule(OUT, match=LOGIN_RESPONSE, times=0, action=Delay(0.15)))
    async with serving(config) as target:
        config.nodes[0].redirect = Redirect(target.portal)
        with pytest.raises(LoginTimeoutError):
            await _log_in(portal_of(target), limit=0.4)


async def test_login_redirected_to_where_the_connection_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = Transport.connect

    async def only_here(portal: Portal) -> Transport:
        if portal.host == "10.0.0.1":
            await trio.sleep_forever()
        return await connect(portal)

    monkeypatch.setattr(Transport, "connect", only_here)
    async with serving(_redirecting("10.0.0.1:3260")) as target:
        with pytest.raises(ConnectError, match="did not take the connection"):
            await _log_in(portal_of(target), limit=0.3)


@pytest.mark.conformance("B2")
async def test_login_response_with_too_much_data() -> None:
    huge = b"\x23\x87\x00\x00\x00\xff\xff\xff" + bytes(40)
    assert login_module.MAX_LOGIN_DATA < 0xFFFFFF
    async with raw_portal(_says(huge)) as portal:
        with pytest.raises(ProtocolError):
            await _log_in(portal)


async def test_login_negotiated_digests() -> None:
    config = config_of(Disk(blocks=64), keys=TargetKeys(header_digests=("CRC32C",), data_digests=("CRC32C",)))
    async with serving(config) as target:
        login = await _log_in(portal_of(target), settings_of(header_digest=True, data_digest=True))
        assert login.result.parameters.header_digest
        assert login.result.parameters.data_digest
        login.transport.close()
