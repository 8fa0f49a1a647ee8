"""Cases 21, 22 and 26: redirections and portal groups; and IPv6, several portals, the longest names."""

import socket
from typing import Any

import pytest
import trio
from conformance_kit import (
    CHAP,
    IN_RECOVERY,
    POLICY,
    SECURITY,
    is_refused,
    listen,
    log_in_to,
    one_disk,
    opened,
    reads,
    respond,
    said,
    status,
    use,
)
from initiator_kit import DEFAULT_TARGET_NAME, portal_of, raw_portal, serving, settings_of, until

from iscsifuse.errors import LoginError, NothingFoundError
from iscsifuse.initiator import login as login_module
from iscsifuse.initiator.discovery import discover
from iscsifuse.initiator.login import log_in, login_config, make_isid
from iscsifuse.initiator.settings import Portal
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi.request import LoginRequest
from iscsifuse.mount.assembly import portals_of
from iscsifuse.testing.config import Redirect, TargetNode


def _dead() -> Portal:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return Portal("127.0.0.1", listener.getsockname()[1])


# --- 21: redirections ---


@pytest.mark.conformance(21)
@pytest.mark.parametrize("after_chap", [False, True])
@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize(
    ("listens_on", "address"),
    [
        ("127.0.0.1", "127.0.0.1:{port}"),
        ("127.0.0.1", "127.0.0.1:{port},1"),
        ("127.0.0.1", "localhost:{port},1"),
        ("::1", "[::1]:{port}"),
        ("::1", "[0:0:0:0:0:0:0:1]:{port},1"),
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "localhost,1"),
        ("::1", "[::1]"),
        ("::1", "[::1],1"),
    ],
)
async def test_redirections_are_followed(
    listens_on: str, address: str, permanent: bool, after_chap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """21: status 0101, 0102, before or after CHAP → followed: IPv6, host name, with and without a port and a tag."""
    connect = Transport.connect
    asked: list[int] = []

    async def connect_to(portal: Portal) -> Transport:
        asked.append(portal.port)
        # Nobody can have the standard's port for a test: what goes there goes to the target behind it.
        return await connect(portal if portal.port != 3260 else Portal(portal.host, there.port))

    monkeypatch.setattr(Transport, "connect", connect_to)
    policy = POLICY if after_chap else None
    there_config = one_disk(chap=policy, hosts=(listens_on,))
    heard_there = listen(there_config)
    async with serving(there_config) as there:
        redirect = Redirect(address.format(port=there.port), permanent=permanent, after_chap=after_chap)
        config = one_disk(redirect=redirect, chap=policy)
        heard_here = listen(config)
        async with serving(config) as here:
            login = await log_in_to(here, CHAP if after_chap else None)
            assert asked == [here.port, there.port if "{port}" in address else 3260]
            await use(there, login)
            await until(lambda: here.connections == 0)
            assert (here.logins, there.logins) == (0, 1)
    assert ("CHAP_R" in said(heard_here)[-1]) is after_chap
    # There, everything begins anew, for the same target.
    first = said(heard_there)[0]
    assert first["TargetName"] == DEFAULT_TARGET_NAME
    assert first["AuthMethod"] == ("CHAP" if after_chap else "None")
    begin = heard_there[0]
    assert isinstance(begin, LoginRequest)
    assert (begin.tsih, begin.exp_stat_sn, begin.csg) == (0, 0, 0)


@pytest.mark.conformance(21)
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "doesn't say which"),
        (b"TargetAddress=\0", "is no TargetAddress"),
        (b"TargetAddress=a b:3260\0", "holds no host name"),
        (b"TargetAddress=[::1\0", "is no TargetAddress"),
        (b"TargetAddress=::1:3260\0", "is no TargetAddress"),
        (b"TargetAddress=[1::2::3]:3260\0", "holds no IPv6 address"),
        (b"TargetAddress=127.0.0.1:0\0", "port"),
        (b"TargetAddress=127.0.0.1:65536\0", "port"),
        (b"TargetAddress=127.0.0.1:3260,x\0", "tag"),
        (b"TargetAddress=\x1b[2J\0", "TargetAddress"),
        (b"nonsense", "can be read"),
    ],
)
async def test_redirections_to_nowhere(data: bytes, words: str) -> None:
    """21: a redirection without an address that can be read → an error that says so."""
    config = one_disk()
    respond(config, SECURITY, status(0x0101, data=data))
    error = await is_refused(config, LoginError, words)
    assert isinstance(error, LoginError)
    assert error.status == 0x0101


@pytest.mark.conformance(22)
@pytest.mark.conformance("B10")
@pytest.mark.parametrize("targets", [1, 2])
async def test_redirections_in_a_circle(targets: int) -> None:
    """22: redirected in a circle, of one or of two → the login ends after a few turns."""
    first, second = one_disk(), one_disk()
    async with serving(first) as here, serving(second) as there:
        first.nodes[0].redirect = Redirect((there if targets == 2 else here).portal)
        second.nodes[0].redirect = Redirect(here.portal)
        heard = listen(first), listen(second)
        with pytest.raises(LoginError, match="redirected the login more than 4 times") as caught:
            await log_in_to(here)
        assert str(portal_of(here)) in str(caught.value)
        await until(lambda: here.connections == there.connections == 0)
    assert sum(map(len, heard)) == login_module.MAX_REDIRECTS + 1


@IN_RECOVERY
@pytest.mark.conformance(22)
@pytest.mark.parametrize("permanent", [False, True])
async def test_recovery_begins_where_the_user_began(permanent: bool) -> None:
    """22: the session is lost at the place that a redirection led to → recovery asks the original portal again."""
    async with serving(one_disk()) as there, serving(one_disk()) as elsewhere:
        config = one_disk(redirect=Redirect(there.portal, permanent=permanent))
        async with serving(config) as here, opened([portal_of(here)]) as nexus:
            assert nexus.portal == portal_of(there)
            config.nodes[0].redirect = Redirect(elsewhere.portal, permanent=permanent)
            there.drop_connections()
            assert await reads(nexus)
            assert nexus.portal == portal_of(elsewhere)
            # And when it leads nowhere, the portal itself.
            config.nodes[0].redirect = None
            elsewhere.drop_connections()
            await until(lambda: nexus.reconnects == 2)
            assert nexus.portal == portal_of(here)
            assert (here.logins, there.logins, elsewhere.logins) == (1, 1, 1)


# --- 26: portal groups ---


def _flags(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "portal group" in record.getMessage()]


@pytest.fixture(autouse=True)
def _nothing_flagged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_module, "_strangers", set())


@pytest.mark.expect_log("portal group")
@IN_RECOVERY
@pytest.mark.conformance(26)
@pytest.mark.parametrize("typed", ["address", "name"])
async def test_another_portal_group_than_discovery_said(typed: str, caplog: pytest.LogCaptureFixture) -> None:
    """26: TargetPortalGroupTag differs from discovery's → one warning, however often we log in; it works."""
    config = one_disk(tag=2)
    async with serving(config) as target:
        config.nodes[0].addresses = (f"{target.portal},7",)
        here = portal_of(target)
        (found,) = await discover(here, settings_of())
        portals = portals_of(found, here if typed == "address" else Portal("localhost", target.port))
        assert [portal.tag for portal in portals] == ([7] if typed == "address" else [None, 7])
        async with opened(portals[-1:]) as nexus:
            for times in (1, 2):
                target.drop_connections()
                await until(lambda times=times: nexus.reconnects == times)  # type: ignore[misc]
            assert await reads(nexus)
    (flag,) = _flags(caplog)
    assert flag.startswith(f"{DEFAULT_TARGET_NAME}: the portal {here} says it is in portal group 2, but ")
    assert flag.endswith(" said 7")


@pytest.mark.expect_log("portal group")
@pytest.mark.conformance(26)
async def test_another_portal_group_than_a_redirection_said(caplog: pytest.LogCaptureFixture) -> None:
    """26: the same for the tag in the address that a redirection gives."""
    async with (
        serving(one_disk(tag=3)) as there,
        serving(one_disk(redirect=Redirect(f"{there.portal},4"))) as here,
    ):
        (await log_in_to(here)).transport.close()
    assert len(_flags(caplog)) == 1


@pytest.mark.conformance(26)
@pytest.mark.parametrize("said_by_discovery", ["{portal},2", "{portal}", None])
async def test_the_portal_group_that_was_expected(said_by_discovery: str | None) -> None:
    """26, the other side of it: no warning where the groups agree, or discovery said nothing about them."""
    config = one_disk(tag=2)
    async with serving(config) as target:
        if said_by_discovery:
            config.nodes[0].addresses = (said_by_discovery.format(portal=target.portal),)
        (found,) = await discover(portal_of(target), settings_of())
        login = await log_in_to(portals_of(found, portal_of(target))[0])
        login.transport.close()


# --- several portals, IPv6, long names ---


async def _hang_up(stream: trio.SocketStream) -> None:
    await stream.receive_some()


async def _http(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(48))


async def _silent(_: trio.SocketStream) -> None:
    await trio.sleep_forever()


@IN_RECOVERY
@pytest.mark.expect_log("trying the next portal")
@pytest.mark.conformance(25)
@pytest.mark.parametrize("first", [None, _hang_up, _http, _silent])
async def test_several_portals_of_which_the_first_is_dead(first: Any) -> None:
    """A portal is dead, hangs up, is no target or is silent → the next one; in recovery, too."""
    async with serving(one_disk()) as target, raw_portal(first or _hang_up) as odd:
        portals = [_dead() if first is None else odd, portal_of(target)]
        async with opened(portals, login_timeout=0.4) as nexus:
            assert nexus.portal == portal_of(target)
            target.drop_connections()
            assert await reads(nexus)
            assert nexus.portal == portal_of(target)


@pytest.mark.expect_log("trying the next portal")
@pytest.mark.conformance(23)
@pytest.mark.parametrize("number", [0x0202, 0x0203, 0x0301], ids=lambda number: f"{number:04x}")
async def test_several_portals_of_which_the_first_says_no(number: int) -> None:
    """23: of several portals the first refuses → the next one for class 3; a class 2 is the target's last word."""
    first, second = one_disk(), one_disk()
    respond(first, SECURITY, status(number), times=0)
    async with serving(first) as here, serving(second) as there:
        portals = [portal_of(here), portal_of(there)]
        if number >> 8 == 3:
            async with opened(portals) as nexus:
                assert nexus.portal == portal_of(there)
            return
        with pytest.raises(NothingFoundError if number == 0x0203 else LoginError):
            async with opened(portals):
                pytest.fail("not to be reached")
        assert there.logins == 0


@IN_RECOVERY
@pytest.mark.conformance(42)
async def test_over_ipv6() -> None:
    """Discovery, login, reading and recovery over [::1], from the address that discovery told."""
    async with serving(one_disk(hosts=("::1",))) as target:
        (found,) = await discover(portal_of(target), settings_of())
        (portal,) = portals_of(found, portal_of(target))
        assert (str(portal), portal.host) == (target.portal, "::1")
        async with opened([portal]) as nexus:
            assert await reads(nexus)
            target.drop_connections()
            assert await reads(nexus)
            assert nexus.report()["portal"] == f"[::1]:{target.port}"


@pytest.mark.conformance("B6")
async def test_the_longest_name() -> None:
    """A target's name of 223 bytes is found and logged in to; one of 224 bytes is left out by discovery."""
    name = "iqn.2026-11.io.github.iscsifuse:" + "n" * (223 - 32)
    config = one_disk()
    config.nodes[0].name = name
    async with serving(config) as target:
        (found,) = await discover(portal_of(target), settings_of())
        assert (found.name, len(found.name)) == (name, 223)
        login = await log_in(portal_of(target), login_config(settings_of(), name), isid=make_isid(), limit=5)
        await use(target, login)


@pytest.mark.expect_log("has 224 bytes, but 223 is the limit")
@pytest.mark.conformance("B6")
async def test_a_name_that_is_too_long(caplog: pytest.LogCaptureFixture) -> None:
    """B6: a name of 224 bytes in a list → left out, said in one line that is not too long; the others are there."""
    config = one_disk()
    config.nodes.insert(0, TargetNode(name="iqn.2026-11.io.github.iscsifuse:" + "n" * (224 - 32)))
    async with serving(config) as target:
        (found,) = await discover(portal_of(target), settings_of())
    assert found.name == DEFAULT_TARGET_NAME
    (warning,) = [record.getMessage() for record in caplog.records if "224" in record.getMessage()]
    assert warning.isprintable()
    assert len(warning) < 200
