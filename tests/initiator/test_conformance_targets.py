"""Cases of login and discovery with a target that others wrote: what the loopback target can't prove."""

from pathlib import Path

import pytest
import trio
import trio.testing
from conformance_kit import IN_RECOVERY, one_disk, opened, reads, use
from initiator_kit import DEFAULT_TARGET_NAME, pattern, portal_of, serving, settings_of, until

from iscsifuse.errors import LoginError, SessionLostError
from iscsifuse.initiator.discovery import discover
from iscsifuse.initiator.login import log_in, login_config, make_isid
from iscsifuse.initiator.nexus import NexusState
from iscsifuse.initiator.settings import Portal
from iscsifuse.iscsi.chap import ChapCredentials
from support.cli import run_cli
from support.tgt import TgtServer

SECRET = "a secret of sixteen"


def _portal(server: TgtServer) -> Portal:
    return Portal("127.0.0.1", server.port)


def _offer(server: TgtServer, image: Path, *, user: str | None = None) -> None:
    server.add_target(DEFAULT_TARGET_NAME, chap=None if user is None else (user, SECRET))
    server.add_lun(DEFAULT_TARGET_NAME, 1, image)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(1 << 20))
    return path


@pytest.mark.conformance(21)
@pytest.mark.parametrize("reason", ["Temporary", "Permanent"])
@pytest.mark.parametrize(("host", "address"), [("127.0.0.2", "127.0.0.2"), ("::1", "[::1]")])
async def test_tgt_sends_us_elsewhere(tgt_server: TgtServer, host: str, address: str, reason: str) -> None:
    """21: tgt redirects, temporarily or permanently, to an IPv4 or IPv6 address → followed."""
    async with serving(one_disk(hosts=(host,))) as there:
        tgt_server.add_target(DEFAULT_TARGET_NAME)
        # It sends nobody to the host he comes from.
        for key, value in (("Address", address), ("Port", str(there.port)), ("Reason", reason)):
            tgt_server.set_param(DEFAULT_TARGET_NAME, f"Redirect{key}", value)
        config = login_config(settings_of(), DEFAULT_TARGET_NAME)
        login = await log_in(_portal(tgt_server), config, isid=make_isid(), limit=5)
        assert login.portal == portal_of(there)
        await use(there, login)
    assert tgt_server.connections() == []


@IN_RECOVERY
@pytest.mark.conformance(23)
async def test_tgt_forgets_the_target_for_a_while(tgt_server: TgtServer, image: Path) -> None:
    """23: the target is gone from tgt, as while it is started again, and comes back → the session heals."""
    tgt_server.add_target(f"{DEFAULT_TARGET_NAME}-other")  # without any target it would not listen to a login
    _offer(tgt_server, image)
    async with opened([_portal(tgt_server)]) as nexus:
        tgt_server.delete_target(DEFAULT_TARGET_NAME)
        await until(lambda: "not found" in str(nexus.report()["last_error"]))
        assert nexus.state is NexusState.LOST
        _offer(tgt_server, image)
        await until(lambda: nexus.reconnects == 1)


@IN_RECOVERY
@pytest.mark.conformance(23)
async def test_tgt_will_not_have_us_any_more(tgt_server: TgtServer, image: Path) -> None:
    """23: tgt takes our account away → refused once, and never asked again, though the target has come back."""
    tgt_server.add_target(f"{DEFAULT_TARGET_NAME}-other")
    _offer(tgt_server, image, user="me")
    chap = ChapCredentials(user="me", secret=SECRET.encode())
    async with opened([_portal(tgt_server)], chap=chap) as nexus:
        tgt_server.delete_target(DEFAULT_TARGET_NAME)
        _offer(tgt_server, image, user="somebody-else")
        await until(lambda: nexus.state is NexusState.REFUSED)
        with pytest.raises(SessionLostError, match="CHAP"):
            await reads(nexus)
        tgt_server.delete_target(DEFAULT_TARGET_NAME)
        _offer(tgt_server, image)
        await trio.testing.wait_all_tasks_blocked(0.3)  # many times the longest back-off of these tests
        assert nexus.state is NexusState.REFUSED
        assert tgt_server.connections() == []


@pytest.mark.conformance(31)
async def test_tgt_that_has_no_secret_of_its_own(tgt_server: TgtServer, image: Path) -> None:
    """31: mutual CHAP with a target that has no outgoing account → no session."""
    _offer(tgt_server, image, user="me")
    chap = ChapCredentials(user="me", secret=SECRET.encode(), target_secret=b"another of sixteen")
    with pytest.raises(LoginError):
        async with opened([_portal(tgt_server)], chap=chap):
            pytest.fail("not to be reached")
    assert tgt_server.connections() == []


@pytest.mark.slow  # it takes tgtadm that long to make so many
@pytest.mark.conformance(37)
@pytest.mark.conformance(43)
async def test_tgt_has_more_targets_than_fit_into_one_answer(tgt_server: TgtServer) -> None:
    """37, 43: tgt cuts its answer inside of a pair, with F=0 and C=0 → joined: all targets are there."""
    names = [f"iqn.2026-11.io.github.iscsifuse:{number:05}{'n' * 186}" for number in range(1300)]
    for name in names:
        tgt_server.add_target(name)
    assert len(names) * (len(names[0]) + 45) > 262144  # more than one PDU
    found = await discover(_portal(tgt_server), settings_of())
    assert [target.name for target in found] == names
    lines = (await trio.to_thread.run_sync(run_cli, "discover", f"iscsi://{_portal(tgt_server)}/")).stdout
    assert lines == "".join(f"{_portal(tgt_server)},1 {name}\n" for name in names)
