"""Cases 27 to 35, B8, B9 and B11: CHAP in both directions, and what an impostor may try.

The loopback target's half of CHAP shares no code with ours, and this file computes proofs by itself.
"""

import hashlib
import hmac
import logging
import secrets
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import trio
from conformance_kit import (
    AFTER_CHAP,
    CHALLENGE,
    CHAP,
    IN_RECOVERY,
    LOGIN_RESPONSE,
    METHOD,
    OPERATIONAL,
    POLICY,
    PROOF,
    SECRET,
    answer,
    is_refused,
    listen,
    log_in_to,
    note_answers,
    one_disk,
    opened,
    reads,
    respond,
    said,
    use,
)
from initiator_kit import DEFAULT_TARGET_NAME, portal_of, raw_portal, serving, settings_of, until

from iscsifuse.cli.options import Options
from iscsifuse.cli.secrets import credentials
from iscsifuse.cli.url import parse
from iscsifuse.errors import (
    AuthenticationError,
    IscsifuseError,
    NegotiationError,
    NoChapError,
    ProtocolError,
)
from iscsifuse.initiator import login as login_module
from iscsifuse.initiator.discovery import discover
from iscsifuse.initiator.login import login_config
from iscsifuse.initiator.nexus import open_nexus
from iscsifuse.iscsi import text
from iscsifuse.iscsi.chap import ChapCredentials
from iscsifuse.iscsi.pdu import Pdu
from iscsifuse.iscsi.request import LoginRequest
from iscsifuse.iscsi.response import LoginResponse
from iscsifuse.testing.actions import Stall
from iscsifuse.testing.config import ChapPolicy, Redirect
from iscsifuse.testing.script import OUT, Rule

THEIRS = b"another of sixteen"
MUTUAL = settings_of(chap=ChapCredentials(user="me", secret=SECRET, target_user="target", target_secret=THEIRS))
BOTH = ChapPolicy(users={"me": SECRET}, target_secret=THEIRS)
_KINDS = {"5": "md5", "6": "sha1", "7": "sha256", "8": "sha3_256"}


def _proof(asked: Mapping[str, str], secret: bytes = SECRET, *, algorithm: str = "") -> str:
    """CHAP_R for CHAP_I and CHAP_C, as RFC 1994 has it."""
    question = bytes([int(asked["CHAP_I"])]) + secret + bytes.fromhex(asked["CHAP_C"][2:])
    kind = _KINDS[algorithm or asked["CHAP_A"]]
    return "0x" + hashlib.new(kind, question, usedforsecurity=False).hexdigest()


def _nothing_proved(heard: list[Pdu]) -> bool:
    return not any("CHAP_R" in keys for keys in said(heard))


# --- algorithms ---


@pytest.mark.conformance(27)
@pytest.mark.parametrize(
    ("auth", "offered"),
    [("", "8,6,5"), ("?auth=md5", "5"), ("?auth=sha1", "6,5"), ("?auth=sha-256", "7,5"), ("?auth=sha3-256", "8,5")],
)
async def test_md5_is_always_offered_last(auth: str, offered: str) -> None:
    """27: whatever a user chooses → CHAP_A ends with 5 (MD5), with what was chosen before it; each of them works."""
    url = parse(f"iscsi://me%{SECRET.decode().replace(' ', '%20')}@h/{auth}")
    chap = credentials(url, Options(), environment={}, warn=lambda _: None, ask=lambda _: None)
    for algorithm in offered.split(","):
        config = one_disk(chap=ChapPolicy(users={"me": SECRET}, algorithms=(int(algorithm),)))
        heard, told = listen(config), note_answers(config)
        async with serving(config) as target:
            await use(target, await log_in_to(target, settings_of(chap=chap)))
        assert said(heard)[1] == {"CHAP_A": offered}
        assert told[1]["CHAP_A"] == algorithm
        assert said(heard)[2]["CHAP_R"] == _proof(told[1])


@pytest.mark.conformance(28)
@pytest.mark.parametrize("value", ["7", "9", "0", "4294967296", "-5", "MD5", "8,6,5", " 5", "5_0", "٥", "", None])
async def test_an_algorithm_that_was_not_offered(value: str | None) -> None:
    """28: CHAP_A not offered, or not a number → closed, and nothing is proved."""
    config = one_disk(chap=POLICY)
    answer(config, CHALLENGE, {"CHAP_A": value})
    heard = listen(config)
    await is_refused(config, AuthenticationError, "CHAP failed: .*(CHAP_A|algorithm)", CHAP, heard=heard)
    assert _nothing_proved(heard)


# --- the target's question ---


@pytest.mark.conformance(29)
@pytest.mark.parametrize(
    ("nth", "keys", "words"),
    [
        (CHALLENGE, {"CHAP_I": None}, "left out CHAP_I"),
        (CHALLENGE, {"CHAP_C": None}, "left out CHAP_C"),
        (CHALLENGE, {"CHAP_I": None, "CHAP_C": None}, "left out CHAP_C, CHAP_I"),
        (CHALLENGE, {"CHAP_I": "256"}, "CHAP_I should lie in 0..255"),
        (CHALLENGE, {"CHAP_I": "-1"}, "CHAP_I should be a number"),
        (CHALLENGE, {"CHAP_I": "1_0"}, "CHAP_I should be a number"),
        (CHALLENGE, {"CHAP_C": ""}, "CHAP_C should be a binary value"),
        (CHALLENGE, {"CHAP_C": "0x"}, "CHAP_C should be a binary value"),
        (CHALLENGE, {"CHAP_C": "112233"}, "CHAP_C should be a binary value"),
        (CHALLENGE, {"CHAP_N": "target"}, "sent CHAP_N out of turn"),
        (CHALLENGE, {"CHAP_R": "0x00"}, "sent CHAP_R out of turn"),
        (METHOD, {"CHAP_A": "5", "CHAP_I": "1", "CHAP_C": "0x00"}, "CHAP_A, CHAP_C, CHAP_I before its turn"),
        (METHOD, {"CHAP_C": "0x00"}, "CHAP_C before its turn"),
    ],
)
async def test_questions_that_are_none(nth: int, keys: dict[str, str | None], words: str) -> None:
    """29: CHAP_I, CHAP_C missing, out of order, out of range → closed, and nothing is proved."""
    config = one_disk(chap=POLICY)
    answer(config, nth, keys)
    heard = listen(config)
    await is_refused(config, AuthenticationError, words, CHAP, heard=heard)
    assert _nothing_proved(heard)


@pytest.mark.conformance(29)
@pytest.mark.parametrize("nth", [PROOF, AFTER_CHAP])
async def test_a_second_question(nth: int) -> None:
    """29: the target asks again after our proof → closed."""
    config = one_disk(chap=POLICY)
    answer(config, nth, {"CHAP_A": "5", "CHAP_I": "1", "CHAP_C": "0x00"})
    await is_refused(config, ProtocolError, "CHAP_A, CHAP_C, CHAP_I after authentication was over", CHAP)


@pytest.mark.conformance(30)
@pytest.mark.parametrize("base64", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 16, 1023, 1024])
async def test_questions_of_all_lengths(length: int, base64: bool) -> None:
    """30: CHAP_C of up to 1024 bytes, in hexadecimal or base64 → accepted and answered right, both ways."""
    config = one_disk(
        chap=ChapPolicy(users={"me": SECRET}, target_secret=THEIRS, challenge_length=length, base64=base64)
    )
    told = note_answers(config)
    async with serving(config) as target:
        await use(target, await log_in_to(target, MUTUAL))
    assert told[1]["CHAP_C"].startswith("0b" if base64 else "0x")
    assert len(told[1]["CHAP_C"]) == 2 + (-(-length // 3) * 4 if base64 else 2 * length)


@pytest.mark.conformance(30)
@pytest.mark.parametrize("base64", [False, True])
@pytest.mark.parametrize("length", [1025, 2000, 3000])
async def test_questions_that_are_too_long(length: int, base64: bool) -> None:
    """30: CHAP_C of 1025 bytes and more → refused, in either encoding."""
    config = one_disk(chap=ChapPolicy(users={"me": SECRET}, challenge_length=length, base64=base64))
    heard = listen(config)
    await is_refused(config, AuthenticationError, "CHAP_C is longer than 1024 bytes", CHAP, heard=heard)
    assert _nothing_proved(heard)


@pytest.mark.conformance(30)
@pytest.mark.conformance("B5")
@pytest.mark.parametrize(
    "value", ["0bAAE", "0bAAB=", "0bAA==AA==", "0b AAECAw==", "0bAA-_", "0x1g", "0x1_1", "0x 11", "0xAB\n"]
)
async def test_questions_that_can_be_read_in_two_ways(value: str) -> None:
    """30, B5: base64 that isn't canonical, digits that are none → refused."""
    config = one_disk(chap=POLICY)
    answer(config, CHALLENGE, {"CHAP_C": value})
    await is_refused(config, AuthenticationError, "CHAP_C .*(base64|binary value)", CHAP)


@pytest.mark.conformance("B5")
async def test_an_odd_number_of_digits() -> None:
    """B5: odd hexadecimal is decoded in one way only, as a number is: 0x123 is the bytes 01 23."""
    config = one_disk(chap=POLICY)
    answer(config, CHALLENGE, {"CHAP_A": "5", "CHAP_I": "7", "CHAP_C": "0x123"})
    heard = listen(config)
    async with serving(config) as target:
        with pytest.raises(AuthenticationError, match="refused our CHAP user or secret"):  # it had asked otherwise
            await log_in_to(target, CHAP)
    assert said(heard)[2]["CHAP_R"] == _proof({"CHAP_A": "5", "CHAP_I": "7", "CHAP_C": "0x0123"})


# --- the target's own proof ---


@pytest.mark.conformance(31)
@pytest.mark.parametrize("transit", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda right: {"CHAP_R": right[:-2]}, "could not prove"),
        (lambda right: {"CHAP_R": right + "00"}, "CHAP_R is longer than"),
        (lambda right: {"CHAP_R": right[:-1] + ("0" if right[-1] != "0" else "1")}, "could not prove"),
        (lambda right: {"CHAP_R": "0x" + "00" * ((len(right) - 2) // 2)}, "could not prove"),
        (lambda _: {"CHAP_R": "rubbish"}, "CHAP_R should be a binary value"),
        (lambda _: {"CHAP_R": ""}, "CHAP_R should be a binary value"),
        (lambda _: {"CHAP_R": None}, "left out CHAP_R"),
        (lambda _: {"CHAP_N": None}, "left out CHAP_N"),
        (lambda _: {"CHAP_N": "other"}, "calls itself 'other'"),
        (lambda _: {"CHAP_N": "targe"}, "calls itself 'targe'"),
        (lambda _: {"CHAP_N": "target2"}, "calls itself 'target2'"),
        (lambda _: {"CHAP_N": ""}, "calls itself ''"),
        (lambda _: {"CHAP_N": None, "CHAP_R": None}, "left out CHAP_N, CHAP_R"),
    ],
)
async def test_a_target_that_cannot_prove_itself(change: Any, words: str, transit: bool) -> None:
    """31: mutual; CHAP_N, CHAP_R wrong, short, long, missing → full feature phase is never reached."""
    config = one_disk(chap=BOTH)

    def spoil(pdu: LoginResponse) -> LoginResponse:
        pairs = dict(_pairs(pdu))
        pairs |= change(pairs["CHAP_R"])
        return _with(pdu, {key: value for key, value in pairs.items() if value is not None}, transit=transit)

    respond(config, PROOF, spoil)
    heard = listen(config)
    await is_refused(config, AuthenticationError, f"CHAP failed: .*{words}", MUTUAL, heard=heard)
    assert len(heard) == 3


def _pairs(pdu: Pdu) -> list[tuple[str, str]]:
    return list(said([LoginRequest(data=pdu.data)])[0].items())


def _with(pdu: LoginResponse, pairs: Mapping[str, str], **fields: Any) -> LoginResponse:
    nsg = {"nsg": 0} if fields.get("transit") is False else {}
    return replace(pdu, data=text.encode(pairs.items()), **{**nsg, **fields})


@pytest.mark.conformance(31)
async def test_a_target_with_another_secret_or_none() -> None:
    """31: the target proves another secret, or refuses to prove any → no session."""
    config = one_disk(chap=ChapPolicy(users={"me": SECRET}, target_secret=b"not the right one"))
    await is_refused(config, AuthenticationError, "could not prove that it knows its secret", MUTUAL)
    await is_refused(one_disk(chap=POLICY), AuthenticationError, "status 0201", MUTUAL)


@pytest.mark.conformance(31)
async def test_a_target_that_goes_on_without_proof() -> None:
    """31: the target says T=1 to our proof, and nothing about its own → no session."""
    config = one_disk(chap=BOTH)
    respond(config, PROOF, lambda pdu: _with(pdu, {}, transit=True, nsg=1))
    await is_refused(config, AuthenticationError, "left out CHAP_N, CHAP_R", MUTUAL)


@pytest.mark.conformance(32)
async def test_our_own_secret_as_proof() -> None:
    """32: CHAP_R equals what our own secret gives → fails, even if the target's name is right."""
    config = one_disk(chap=ChapPolicy(users={"me": SECRET}, target_secret=SECRET))
    await is_refused(config, AuthenticationError, "answered with our own secret", MUTUAL)


# --- reflection ---


@pytest.mark.conformance(33)
@pytest.mark.conformance("B9")
@pytest.mark.parametrize("where", ["same", "parallel", "later", "discovery"])
async def test_our_question_comes_back(where: str) -> None:
    """33: our challenge comes back on the same, a parallel or a later connection → closed, and not answered."""
    first = one_disk(chap=BOTH)
    heard_first = listen(first)
    if where == "same":
        respond(first, PROOF, lambda pdu: _with(pdu, said(heard_first)[-1] | {"CHAP_A": "5"}, transit=False))
        await is_refused(first, AuthenticationError, "CHAP failed", MUTUAL, heard=heard_first)
        assert len([keys for keys in said(heard_first) if "CHAP_R" in keys]) == 1
        return
    if where == "parallel":
        first.script.add(Rule(OUT, Stall(), LOGIN_RESPONSE, nth=PROOF))
    async with serving(first) as here, trio.open_nursery() as nursery:

        async def log_in() -> None:
            login = await log_in_to(here, MUTUAL)
            login.transport.close()

        nursery.start_soon(log_in)
        await until(lambda: any("CHAP_C" in keys for keys in said(heard_first)))
        if where != "parallel":
            await until(lambda: here.logins)
        (ours,) = [keys["CHAP_C"] for keys in said(heard_first) if "CHAP_C" in keys]
        second = one_disk(chap=BOTH)
        heard_second = listen(second)
        answer(second, CHALLENGE, {"CHAP_C": ours})
        if where == "discovery":
            async with serving(second) as there:
                with pytest.raises(AuthenticationError, match="a challenge of our own"):
                    await discover(portal_of(there), MUTUAL)
        else:
            await is_refused(second, AuthenticationError, "a challenge of our own", MUTUAL, heard=heard_second)
        assert _nothing_proved(heard_second)
        nursery.cancel_scope.cancel()


@pytest.mark.conformance("B9")
async def test_where_our_questions_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """B9: our challenges are the operating system's random bytes, as long as the hash, remembered for all logins."""
    drawn: list[bytes] = []
    token_bytes = secrets.token_bytes

    def draw(count: int) -> bytes:
        drawn.append(token_bytes(count))
        return drawn[-1]

    monkeypatch.setattr(secrets, "token_bytes", draw)
    asked = []
    for algorithm, length in ((5, 16), (6, 20), (8, 32)):
        config = one_disk(chap=ChapPolicy(users={"me": SECRET}, target_secret=THEIRS, algorithms=(algorithm,)))
        heard = listen(config)
        async with serving(config) as target:
            (await log_in_to(target, MUTUAL)).transport.close()
        question = bytes.fromhex(said(heard)[2]["CHAP_C"][2:])
        assert len(question) == length
        assert question in drawn
        asked.append(question)
    assert len(set(asked)) == 3
    assert all(question in login_module._challenges for question in asked)


@pytest.mark.conformance("B9")
async def test_proofs_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """B9: what the target proves is only ever compared by hmac.compare_digest: its name, its proof, our own proof."""
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def spy(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return compare(left, right)

    monkeypatch.setattr("iscsifuse.iscsi.chap.hmac.compare_digest", spy)
    config = one_disk(chap=ChapPolicy(users={"me": SECRET}, target_secret=THEIRS, algorithms=(5,)))
    heard, told = listen(config), note_answers(config)
    async with serving(config) as target:
        (await log_in_to(target, MUTUAL)).transport.close()
    theirs = bytes.fromhex(told[2]["CHAP_R"][2:])
    ours = bytes.fromhex(_proof(said(heard)[2], SECRET, algorithm="5")[2:])
    assert (theirs, theirs) in compared
    assert (theirs, ours) in compared
    assert (b"target", b"target") in compared


# --- no way around it ---


@pytest.mark.conformance(34)
@pytest.mark.conformance("B8")
@pytest.mark.parametrize("value", ["None", "Reject", "KRB5", "CHAP,None", "None,CHAP", "chap", ""])
@pytest.mark.parametrize("settings", [CHAP, MUTUAL], ids=["one way", "mutual"])
async def test_no_login_without_the_chap_that_was_asked_for(value: str, settings: Any) -> None:
    """34, B8: AuthMethod=None, or anything else than CHAP, while the user asked for CHAP → aborted."""
    config = one_disk(chap=BOTH)
    answer(config, METHOD, {"AuthMethod": value})
    heard = listen(config)
    await is_refused(config, NoChapError, "doesn't do CHAP, which --chap-user asks for", settings, heard=heard)
    assert said(heard)[0]["AuthMethod"] == "CHAP"


@pytest.mark.conformance(34)
@pytest.mark.conformance("B8")
@pytest.mark.parametrize("nsg", [1, 3])
async def test_no_stage_is_left_out(nsg: int) -> None:
    """34, B8: the target says nothing about AuthMethod, and goes on to the next stage → aborted."""
    config = one_disk(chap=POLICY)
    respond(config, METHOD, lambda pdu: _with(pdu, {}, transit=True, nsg=nsg))
    await is_refused(config, ProtocolError, "changes the stage, which was not asked for", CHAP)


@pytest.mark.conformance(34)
async def test_discovery_and_chap() -> None:
    """34: discovery may go without CHAP where a portal has no account for it; not where CHAP was done, and wrong."""
    async with serving(config := one_disk()) as target:
        heard = listen(config)
        assert len(await discover(portal_of(target), CHAP)) == 1
        assert [keys["AuthMethod"] for keys in said(heard) if "AuthMethod" in keys] == ["CHAP", "None"]
    lax = ChapPolicy(users={"me": SECRET}, target_secret=b"not the right one", required=False)
    async with serving(config := one_disk(chap=lax)) as target:
        heard = listen(config)
        with pytest.raises(AuthenticationError, match="could not prove that it knows its secret"):
            await discover(portal_of(target), MUTUAL)
        assert [keys["AuthMethod"] for keys in said(heard) if "AuthMethod" in keys] == ["CHAP"]
        assert target.logins == 0


@pytest.mark.conformance(35)
@pytest.mark.parametrize(
    ("ours", "theirs"), [("elevenbytes", None), ("twelve-bytes", "elevenbytez"), ("twelve-bytes", "twelve_bytes")]
)
def test_short_secrets(ours: str, theirs: str | None) -> None:
    """35: a secret of fewer than 96 bits, of ours or of the target's → a warning for each, that doesn't tell it."""
    url = parse(f"iscsi://me%{ours}@h/" + (f"?target_user=t&target_password={theirs}" if theirs else ""))
    warnings: list[str] = []
    assert credentials(url, Options(), environment={}, warn=warnings.append, ask=lambda _: None)
    weak = [warning for warning in warnings if "fewer than 12 bytes" in warning]
    assert len(weak) == sum(len(secret) < 12 for secret in (ours, theirs) if secret)
    assert ours not in "".join(warnings)


# --- B8: nobody gets more than his own ---


@pytest.mark.conformance("B8")
async def test_a_redirection_does_not_carry_authentication_along() -> None:
    """B8: a portal that passed CHAP redirects to a host that wants none → aborted; it saw no proof of ours."""

    async def no_need(stream: trio.SocketStream) -> None:
        request = await stream.receive_some()
        reply = LoginResponse(itt=0, isid=request[8:14], data=b"AuthMethod=None\0")
        await stream.send_all(reply.encode())
        rest.append(await stream.receive_some())

    rest: list[bytes] = []
    async with raw_portal(no_need) as portal:
        config = one_disk(redirect=Redirect(str(portal), after_chap=True), chap=POLICY)
        async with serving(config) as here:
            with pytest.raises(NoChapError, match=f"{portal}: the target doesn't do CHAP"):
                await log_in_to(here, CHAP)
            await until(lambda: rest)
    assert rest == [b""]


@pytest.mark.conformance("B8")
async def test_each_host_gets_a_proof_for_its_own_question_only() -> None:
    """B8: two hosts, CHAP at both → each proof answers that host's challenge; the secret itself goes to neither."""
    configs = [one_disk(chap=POLICY), one_disk(chap=POLICY)]
    heard, told = [listen(config) for config in configs], [note_answers(config) for config in configs]
    async with serving(configs[0]) as here, serving(configs[1]) as there:
        configs[0].nodes[0].redirect = Redirect(there.portal, after_chap=True)
        await use(there, await log_in_to(here, CHAP))
    proofs = []
    for pdus, challenges in zip(heard, told, strict=True):
        (asked,) = [keys for keys in challenges if "CHAP_C" in keys]
        (proof,) = [keys["CHAP_R"] for keys in said(pdus) if "CHAP_R" in keys]
        assert proof == _proof(asked)
        proofs.append(proof)
        everything = b"".join(pdu.encode() for pdu in pdus)
        assert SECRET not in everything
        assert SECRET.hex().encode() not in everything
    assert len(set(proofs)) == 2


@pytest.mark.conformance("B8")
@pytest.mark.parametrize("case", ["chap", "digest"])
async def test_no_search_for_a_portal_that_asks_for_less(case: str) -> None:
    """B8: one portal doesn't do what the user demands → the error; the next one isn't asked whether it does."""
    first, second = one_disk(), one_disk()
    changes: dict[str, Any] = {"chap": CHAP.chap} if case == "chap" else {"header_digest": True}
    if case == "chap":
        first.chap = POLICY
        answer(first, METHOD, {"AuthMethod": "None"})
    else:
        answer(first, OPERATIONAL, {"HeaderDigest": "None"})
    async with serving(first) as here, serving(second) as there:
        with pytest.raises(NoChapError if case == "chap" else NegotiationError):
            async with opened([portal_of(here), portal_of(there)], **changes):
                pytest.fail("not to be reached")
        assert there.connections == there.logins == 0


# --- B11: what nobody may see ---


@IN_RECOVERY
@pytest.mark.conformance("B11")
@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("fails", ["not", "target refuses", "target can't prove itself", "stall"])
async def test_secrets_are_nowhere(fails: str, mutual: bool, caplog: pytest.LogCaptureFixture) -> None:
    """B11: whatever becomes of a login → no secret stands in a log, a traceback with its variables, a status."""
    caplog.set_level(logging.DEBUG)
    theirs = b"another of sixteen"
    credentials = ChapCredentials(user="me", secret=SECRET, target_secret=theirs if mutual else None)
    users = {"me": b"not what we have" if fails == "target refuses" else SECRET}
    proof = b"what nobody knows" if fails == "target can't prove itself" else theirs
    config = one_disk(chap=ChapPolicy(users=users, target_secret=proof))
    if fails == "stall":
        config.script.add(Rule(OUT, Stall(), LOGIN_RESPONSE, nth=3))
    settings = settings_of(chap=credentials, login_timeout=0.4 if fails == "stall" else 5.0)
    shown: list[object] = [settings, login_config(settings, DEFAULT_TARGET_NAME), credentials]
    async with serving(config) as target:
        try:
            async with open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings) as nexus:
                await reads(nexus)
                target.drop_connections()
                await reads(nexus)
                shown += [nexus.report(), nexus.session, nexus.session.connection, vars(nexus)]
        except IscsifuseError as error:
            assert fails != "not"
            shown.append(error)
            # What this test has in its variables is its own affair.
            ours = None if error.__traceback__ is None else error.__traceback__.tb_next
            trace = traceback.TracebackException(type(error), error, ours, capture_locals=True)
            shown += list(trace.format(chain=True))
        else:
            assert fails == "not" or (not mutual and fails == "target can't prove itself")
    everything = "\n".join(map(repr, shown)) + caplog.text
    for secret in (SECRET, theirs):
        assert secret.decode() not in everything
        assert secret.hex() not in everything
        assert repr(bytearray(secret))[11:-2] not in everything
