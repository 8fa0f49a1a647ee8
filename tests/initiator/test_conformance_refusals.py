"""Cases 23 to 25: a target that refuses the login, or falls silent in it; at the first login, and in recovery."""

import itertools
import json

import pytest
import trio
import trio.testing
from conformance_kit import (
    IN_RECOVERY,
    LOGIN_RESPONSE,
    OPERATIONAL,
    SECURITY,
    is_refused,
    listen,
    log_in_to,
    one_disk,
    opened,
    reads,
    respond,
    status,
    use,
)
from initiator_kit import at_once, portal_of, serving, until

from iscsifuse.errors import LoginError, LoginTimeoutError, SessionLostError
from iscsifuse.initiator import revival
from iscsifuse.initiator.nexus import NexusState
from iscsifuse.iscsi.pdu import Pdu
from iscsifuse.iscsi.request import LoginRequest
from iscsifuse.testing.actions import Change, Close, Stall
from iscsifuse.testing.config import TargetConfig
from iscsifuse.testing.script import IN, OUT, Rule, anything

# --- 23, 24: refusals ---


@pytest.mark.conformance(23)
@pytest.mark.parametrize("nth", [SECURITY, OPERATIONAL])
@pytest.mark.parametrize(
    "number", [*range(0x0200, 0x020C), 0x02FF, 0x0300, 0x0301, 0x0302, 0x03FF], ids=lambda number: f"{number:04x}"
)
async def test_a_refused_login_is_not_tried_again(number: int, nth: int) -> None:
    """23: status class 2, 3 at the first login → told at once, with the status; one attempt; TCP closed."""
    config = one_disk()
    respond(config, nth, status(number))
    heard = listen(config)
    error = await is_refused(config, LoginError, f"status {number:04x}", heard=heard)
    assert isinstance(error, LoginError)
    assert error.status == number
    assert len(heard) == nth


@IN_RECOVERY
@pytest.mark.conformance(23)
@pytest.mark.parametrize(
    "number", [0x0200, 0x0201, 0x0202, 0x0204, 0x0206, 0x020B, 0x02FF], ids=lambda number: f"{number:04x}"
)
async def test_recovery_ends_with_a_refusal(number: int) -> None:
    """23: status class 2 in recovery → asked once, never again; who waits is told at once, and so are later ones."""
    config = one_disk()
    async with serving(config) as target, opened([portal_of(target)], reconnect_timeout=-1) as nexus:
        config.script.add(Rule(OUT, Change(status(number)), LOGIN_RESPONSE, times=0))
        heard = listen(config)
        target.drop_connections()
        results = await at_once(lambda: reads(nexus), lambda: reads(nexus))
        assert [type(result) for result in results] == [SessionLostError, SessionLostError]
        assert f"status {number:04x}" in str(results[0])
        assert json.loads(json.dumps(nexus.report()))["state"] == "refused"
        config.script.clear()
        for _ in range(3):
            with pytest.raises(SessionLostError, match=f"status {number:04x}"):
                await reads(nexus)
        await trio.testing.wait_all_tasks_blocked(0.3)  # thirty times the first back-off
        assert len(heard) == 1
        assert target.connections == 0
        assert target.logins == 1
    assert nexus.state is NexusState.CLOSED


@IN_RECOVERY
@pytest.mark.conformance(23)
async def test_a_refusal_at_one_portal_leaves_the_others() -> None:
    """23: one of two portals refuses by class 2 → it is not asked again, the other one is, until it works."""
    first, second = one_disk(), one_disk()
    async with (
        serving(first) as here,
        serving(second) as there,
        opened([portal_of(here), portal_of(there)]) as nexus,
    ):
        first.script.add(Rule(OUT, Change(status(0x0202)), LOGIN_RESPONSE, times=0))
        second.script.add(Rule(OUT, Close(), LOGIN_RESPONSE, times=3))
        heard = listen(first)
        here.drop_connections()
        assert await reads(nexus)
        assert nexus.portal == portal_of(there)
        assert len(second.script.log) == 3
        assert len([pdu for pdu in heard if isinstance(pdu, LoginRequest)]) == 1


@IN_RECOVERY
@pytest.mark.conformance(23)
async def test_a_target_that_is_started_again_is_not_there_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """23: "not found" in recovery → asked again, seldom, however long it takes: it had the target once."""
    monkeypatch.setattr(revival, "LAST_BACK_OFF", 0.2)
    config = one_disk()
    async with serving(config) as target, opened([portal_of(target)]) as nexus:
        times = _login_times(config)
        config.script.add(Rule(OUT, Change(status(0x0203)), LOGIN_RESPONSE, times=2))
        target.drop_connections()
        assert await reads(nexus)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert all(gap >= 0.14 for gap in gaps[:2])
    config = one_disk()
    async with serving(config) as target, opened([portal_of(target)], reconnect_timeout=0.1) as nexus:
        config.script.add(Rule(OUT, Change(status(0x0203)), LOGIN_RESPONSE, times=0))
        target.drop_connections()
        with pytest.raises(SessionLostError, match="not found"):
            await reads(nexus)
        assert nexus.state is NexusState.LOST
        config.script.clear()
        await until(lambda: nexus.reconnects == 1)
        assert await reads(nexus)


def _login_times(config: TargetConfig) -> list[float]:
    """When the first request of each login comes."""
    times: list[float] = []

    def hear(pdu: Pdu) -> Pdu:
        if isinstance(pdu, LoginRequest) and pdu.csg == 0:
            times.append(trio.current_time())
        return pdu

    config.script.add(Rule(IN, Change(hear), anything, times=0))
    return times


@IN_RECOVERY
@pytest.mark.conformance(23)
@pytest.mark.parametrize("number", [0x0300, 0x0301, 0x0302], ids=lambda number: f"{number:04x}")
async def test_recovery_backs_off_from_a_busy_target(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """23: status class 3 in recovery → tried again, each time after a longer while, until it works; TCP closed."""
    monkeypatch.setattr(revival, "LAST_BACK_OFF", 5.0)
    config = one_disk()
    async with serving(config) as target, opened([portal_of(target)]) as nexus:
        times = _login_times(config)
        config.script.add(Rule(OUT, Change(status(number)), LOGIN_RESPONSE, times=5))
        target.drop_connections()
        assert await reads(nexus)
        assert target.connections == 1
    assert len(times) == 6
    for index, (earlier, later) in enumerate(itertools.pairwise(times)):
        assert later - earlier >= 0.75 * revival.FIRST_BACK_OFF * 2**index


@pytest.mark.conformance(24)
@pytest.mark.parametrize("number", [0x0101, 0x0201, 0x0301])
async def test_the_numbers_of_a_refusal_are_ignored(number: int) -> None:
    """24: a failure with junk in every other field → the status counts, and nothing else is looked at."""
    junk = {
        "itt": 0xDEAD, "isid": b"junk!!", "tsih": 7, "stat_sn": 0xDEADBEEF, "exp_cmd_sn": 5, "max_cmd_sn": 0x80000000,
        "csg": 3, "nsg": 2, "transit": True, "cont": True, "version_max": 9, "version_active": 9,
    }  # fmt: skip
    async with serving(one_disk()) as there:
        config = one_disk()
        data = f"TargetAddress={there.portal}\0".encode() if number == 0x0101 else b"\xff=\xfe" * 9
        respond(config, OPERATIONAL, status(number, data=data, **junk))
        if number != 0x0101:
            error = await is_refused(config, LoginError, f"status {number:04x}")
            assert isinstance(error, LoginError)
            assert error.status == number
            return
        async with serving(config) as here:
            await use(there, await log_in_to(here))


# --- 25: silence ---


@pytest.mark.conformance(25)
@pytest.mark.parametrize("nth", [SECURITY, OPERATIONAL])
@pytest.mark.parametrize("after", [0, 1, 47, 48, 50])
async def test_silence_in_a_login(after: int, nth: int) -> None:
    """25: silence, or a stall inside a response, in either stage → login timeout; TCP closed."""
    config = one_disk()
    config.script.add(Rule(OUT, Stall(after), LOGIN_RESPONSE, nth=nth))
    await is_refused(config, LoginTimeoutError, "did not answer the login within 0.2 seconds", limit=0.2)


@IN_RECOVERY
@pytest.mark.conformance(25)
async def test_silence_in_recovery() -> None:
    """25: the same when a mounted session logs in again → after the timeout it is tried once more."""
    config = one_disk()
    async with serving(config) as target, opened([portal_of(target)], login_timeout=0.3) as nexus:
        config.script.add(Rule(OUT, Stall(20), LOGIN_RESPONSE, times=2))
        target.drop_connections()
        assert await reads(nexus)
        assert len(config.script.log) == 2
        assert nexus.reconnects == 1
