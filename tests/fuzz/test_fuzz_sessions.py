"""Sessions with a target whose answers are changed at random: data that is right, or an error, and an end."""

import random
import struct
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from fuzz.sessions import BrokenPromiseError, Outcome, run_session
from iscsifuse.errors import ProtocolError
from iscsifuse.initiator.logical_unit import LogicalUnit
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi.incoming import Incoming
from iscsifuse.iscsi.pdu import Pdu, decode_stream
from iscsifuse.iscsi.response import R2T, DataIn, LoginResponse, ScsiResponse, TextResponse
from iscsifuse.testing.actions import Change, Pass
from iscsifuse.testing.mutator import Damage, mutations

pytestmark = pytest.mark.conformance("B12")

USUAL = 60
QUICK = 100  # within so many, each broken promise is caught
SLOW = 10_000


def run(seeds: range) -> list[Outcome]:
    return [run_session(seed) for seed in seeds]


def test_sessions_with_a_target_that_goes_wrong() -> None:
    outcomes = run(range(USUAL))
    # It is worth nothing if the target is never wrong, or if nothing ever works.
    assert sum(bool(outcome.fired) for outcome in outcomes) > USUAL // 2
    assert sum(not outcome.errors for outcome in outcomes) > USUAL // 4
    kinds = Counter(error for outcome in outcomes for error in outcome.errors)
    assert len(kinds) > 3, kinds
    assert sum(outcome.done for outcome in outcomes) > 5 * USUAL


@pytest.mark.slow
@pytest.mark.parametrize("first", range(USUAL, SLOW, (SLOW - USUAL) // 10))
def test_ten_thousand_sessions(first: int) -> None:
    run(range(first, min(SLOW, first + (SLOW - USUAL) // 10)))


def test_a_seed_is_the_same_session_again() -> None:
    seed = next(seed for seed in range(QUICK) if len(run_session(seed).fired) > 2)
    assert run_session(seed) == run_session(seed)


# -- a session that breaks its promises is caught --------------------------------------------------------------------


def caught(seeds: range = range(QUICK)) -> str:
    with pytest.raises(BrokenPromiseError) as info:
        run(seeds)
    return str(info.value)


def test_damaged_data_that_is_believed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Incoming.on_data
    monkeypatch.setattr(Incoming, "on_data", lambda self, intact: real(self, intact=intact or True))
    assert "read: block" in caught()


def test_a_flush_that_does_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_: LogicalUnit) -> None:
        pass

    monkeypatch.setattr(LogicalUnit, "flush", nothing)
    assert "after a power cut" in caught()


def test_an_error_of_another_kind_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise LookupError("of no task")

    monkeypatch.setattr(Incoming, "_on_r2t", broken)
    assert "another kind" in caught()


def test_a_descriptor_that_stays_open_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def forget(transport: Transport, *, in_order: bool = False) -> None:
        if not transport._closed:
            kept.append(transport._sock.dup())
            real(transport, in_order=in_order)

    real = Transport.close
    monkeypatch.setattr(Transport, "close", forget)
    assert "descriptors" in caught()
    for one in kept:
        one.close()


# -- the mutator -----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_rules() -> None:
    assert [rule.name for rule in mutations(7)] == [rule.name for rule in mutations(7)]
    assert len({tuple(rule.name for rule in mutations(seed)) for seed in range(100)}) > 90


def damages() -> list[Damage]:
    return [rule.action for seed in range(400) for rule in mutations(seed) if isinstance(rule.action, Damage)]


def plain(pdu: Pdu) -> bytes:
    return pdu.encode()


def with_digests(pdu: Pdu) -> bytes:
    return pdu.encode(header_digest=True, data_digest=True)


def with_header_digest(pdu: Pdu) -> bytes:
    return pdu.encode(header_digest=True)


PAYLOAD = random.Random(1).randbytes(600)


@pytest.mark.parametrize("encode", [plain, with_header_digest])
@pytest.mark.parametrize(
    "pdu",
    [DataIn(itt=5, data=PAYLOAD), TextResponse(itt=5, data=PAYLOAD), ScsiResponse(itt=5, status=2, data=PAYLOAD)],
)
def test_what_nobody_could_notice_is_not_damaged(pdu: Pdu, encode: Any) -> None:
    changed = 0
    for damage in damages():
        (step,) = damage.steps(pdu, encode)
        assert isinstance(step, Pass)
        raw = step.payload
        assert isinstance(raw, bytes)
        whole = encode(pdu)
        assert raw[48:] == whole[48:], "data, or where it lies, has changed"
        assert raw[16:20] == struct.pack(">I", 5), "the tag has changed"
        assert raw[3] == whole[3], "the status has changed"
        if isinstance(pdu, TextResponse):
            assert (raw[5:8], raw[20:24]) == (whole[5:8], whole[20:24]), "a part of the list may be all of it now"
        changed += raw != whole
    assert changed > 50


def test_with_digests_anything_may_be_damaged_and_none_is_made_right_again() -> None:
    pdu = DataIn(itt=5, data=PAYLOAD)
    whole = with_digests(pdu)
    places = set()
    for damage in damages():
        (step,) = damage.steps(pdu, with_digests)
        assert isinstance(step, Pass)
        raw = step.payload
        assert isinstance(raw, bytes)
        if raw == whole:  # one byte of noise may be the one that was there
            continue
        places.add(next((n for n, (old, new) in enumerate(zip(whole, raw, strict=False)) if old != new), len(raw)))
        try:
            found = decode_stream(raw, header_digest=True, data_digest=True)
        except ProtocolError:
            continue
        assert found is None or found == (pdu, len(whole)), "damage that can't be seen"
    assert any(place > 48 for place in places)
    assert any(place < 48 for place in places)


def test_lies_that_nobody_could_notice_are_not_told() -> None:
    pdus = [
        DataIn(itt=5, ttt=7, data=PAYLOAD, data_sn=3, buffer_offset=512),
        ScsiResponse(itt=5, status=2, data=PAYLOAD),
        ScsiResponse(itt=5),
        TextResponse(itt=5, ttt=7, data=PAYLOAD),
        R2T(itt=5, ttt=7, desired_data_transfer_length=512),
    ]
    lies = [rule.action for seed in range(2000) for rule in mutations(seed) if isinstance(rule.action, Change)]
    for pdu in pdus:
        told = {action.function(pdu) for action in lies} - {pdu}
        assert len(told) > 20
        for lie in told:
            assert (lie.itt, lie.data) == (pdu.itt, pdu.data)
            assert not isinstance(lie, TextResponse) or lie.ttt == 7
            assert not isinstance(lie, ScsiResponse) or lie.status != 0 or lie.status == pdu.status  # type: ignore[attr-defined]


def test_a_login_response_may_be_damaged_anyhow() -> None:
    pdu = replace(LoginResponse(itt=5), data=PAYLOAD)
    damaged = [step.payload for damage in damages() for step in damage.steps(pdu, plain) if isinstance(step, Pass)]
    assert any(isinstance(raw, bytes) and raw[48:] != plain(pdu)[48:] for raw in damaged)
