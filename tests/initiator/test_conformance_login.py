"""Cases 1 to 20: a login from the first request to the first command, against a target that is scripted to be odd.

Each test says its case in one line: what the target does → what we must do. The target's validator watches all that
we send, and its ledger what was executed.
"""

from dataclasses import replace
from typing import Any

import pytest
from conformance_kit import (
    LOGIN_RESPONSE,
    METHOD,
    OPERATIONAL,
    SECURITY,
    answer,
    is_refused,
    listen,
    log_in_to,
    respond,
    said,
    use,
)
from initiator_kit import DEFAULT_TARGET_NAME, INITIATOR, config_of, open_session, serving, settings_of

from iscsifuse.errors import FormatError, LoginTimeoutError, NegotiationError, ProtocolError
from iscsifuse.initiator.settings import SessionSettings
from iscsifuse.iscsi.chap import ChapCredentials
from iscsifuse.iscsi.login import MAX_EXCHANGES
from iscsifuse.iscsi.negotiation import Negotiation
from iscsifuse.iscsi.parameters import LoginConfig
from iscsifuse.iscsi.pdu import Pdu
from iscsifuse.iscsi.request import DataOut, LoginRequest, ScsiCommand
from iscsifuse.iscsi.response import AsyncMessage, DataIn, LoginResponse, LogoutResponse, NopIn, Reject, ScsiResponse
from iscsifuse.testing.actions import Change, Delay
from iscsifuse.testing.config import ChapPolicy, TargetConfig, TargetKeys
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Rule, anything

OFFERS = dict(Negotiation(LoginConfig(initiator_name=INITIATOR, target_name=DEFAULT_TARGET_NAME)).offers())
CHAP = settings_of(chap=ChapCredentials(user="me", secret=b"a secret of sixteen"))
POLICY = ChapPolicy(users={"me": b"a secret of sixteen"})


def _config(*, keys: TargetKeys | None = None, **changes: Any) -> TargetConfig:
    return config_of(Disk(blocks=4096), keys=keys, **changes)


def _logins(heard: list[Pdu]) -> list[LoginRequest]:
    return [pdu for pdu in heard if isinstance(pdu, LoginRequest)]


def _speak(config: TargetConfig) -> list[LoginResponse]:
    """A list that fills with the Login Responses that go out."""
    spoken: list[LoginResponse] = []

    def note(pdu: Pdu) -> Pdu:
        assert isinstance(pdu, LoginResponse)
        spoken.append(pdu)
        return pdu

    config.script.add(Rule(OUT, Change(note), LOGIN_RESPONSE, times=0))
    return spoken


# --- stages ---


@pytest.mark.conformance(1)
@pytest.mark.parametrize("keys_at_once", [0, 3])
async def test_names_come_first_and_full_feature_phase_begins_when_both_say_so(keys_at_once: int) -> None:
    """1: T=1 login → names, TSIH 0 in the first request; commands only after T=1, NSG=3 in request and response."""
    config = _config(login_keys=keys_at_once)
    heard, spoken = listen(config), _speak(config)
    async with serving(config) as target:
        await use(target, await log_in_to(target))
    logins = _logins(heard)
    assert said(heard)[0].items() >= {"InitiatorName": INITIATOR, "TargetName": DEFAULT_TARGET_NAME}.items()
    assert (logins[0].transit, logins[0].csg, logins[0].tsih) == (True, 0, 0)
    assert heard[: len(logins)] == logins
    both = [
        request.transit and request.nsg == 3 and response.transit and response.nsg == 3
        for request, response in zip(logins, spoken, strict=True)
    ]
    assert both == [False] * (len(both) - 1) + [True]
    assert len(both) > 4 or not keys_at_once


@pytest.mark.conformance(2)
async def test_one_key_at_a_time() -> None:
    """2: T=0 more than six times, one key each → we carry on, ask again with empty requests, and all keys count."""
    config = _config(keys=TargetKeys(max_burst_length=65536, alias="disk", default_time2wait=0), login_keys=1)
    heard, spoken = listen(config), _speak(config)
    async with serving(config) as target:
        login = await log_in_to(target)
        await use(target, login, blocks=512)
    assert [pdu.transit for pdu in spoken].count(False) > 6
    assert all(pdu.data.count(b"\0") <= 1 for pdu in spoken)
    logins = _logins(heard)
    assert all(pdu.transit and not pdu.data for pdu in logins if pdu not in logins[:3])
    assert (login.result.parameters.max_burst_length, login.result.parameters.target_alias) == (65536, "disk")


@pytest.mark.conformance(2)
@pytest.mark.conformance("B4")
async def test_a_target_that_never_says_t() -> None:
    """2, B4: T=0 for ever → the login ends after a bounded number of exchanges."""
    config = _config()
    heard: list[Pdu] = []

    def unask(pdu: Pdu) -> Pdu:
        """The target doesn't get to see that we would like to go on."""
        heard.append(pdu)
        return replace(pdu, transit=False, nsg=0) if isinstance(pdu, LoginRequest) else pdu

    config.script.add(Rule(IN, Change(unask), anything, nth=2, times=0))
    await is_refused(config, ProtocolError, f"more than {MAX_EXCHANGES} exchanges")
    assert len(heard) == MAX_EXCHANGES
    assert all(isinstance(pdu, LoginRequest) and pdu.transit for pdu in heard)


@pytest.mark.conformance(2)
@pytest.mark.conformance(25)
async def test_a_target_that_takes_its_time_again_and_again() -> None:
    """2, 25: each answer comes soon, the last one never → the limit is for the whole login."""
    config = _config(login_keys=1)
    config.script.add(Rule(OUT, Delay(0.1), LOGIN_RESPONSE, times=0))
    await is_refused(config, LoginTimeoutError, "did not answer the login within 0.35 seconds", limit=0.35)


@pytest.mark.conformance(3)
@pytest.mark.parametrize("chunk", [2, 7, 100])
async def test_a_text_in_pieces(chunk: int) -> None:
    """3: C=1, the text split inside key=val → an empty request each time, without T and C; the text is joined."""
    keys = TargetKeys(max_burst_length=65536, alias="a disk", default_time2wait=0)
    config = _config(keys=keys, login_chunk=chunk)
    heard, spoken = listen(config), _speak(config)
    async with serving(config) as target:
        login = await log_in_to(target)
        await use(target, login)
    assert any(pdu.cont and not pdu.data.endswith(b"\0") for pdu in spoken)
    logins = _logins(heard)
    for response, request in zip(spoken, logins[1:], strict=False):
        if response.cont:
            assert (request.data, request.transit, request.cont, request.nsg) == (b"", False, False, 0)
    assert (login.result.parameters.max_burst_length, login.result.parameters.target_alias) == (65536, "a disk")


@pytest.mark.conformance("B4")
async def test_a_text_that_never_ends() -> None:
    """B4: C=1 for ever → the login ends when the text is too long, or has too many pieces."""
    for data, words in (
        (b"x" * 8192, "more than 65536 bytes of text"),
        (b"", f"more than {MAX_EXCHANGES} exchanges"),
    ):
        config = _config()
        respond(config, SECURITY, times=0, transit=False, nsg=0, cont=True, data=data)
        await is_refused(config, ProtocolError, words)


@pytest.mark.conformance("B4")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"rubbish\0", "text without '='"),
        (b"=value\0", "a key that can't be one"),
        (b"Max Burst=1\0", "a key that can't be one"),
        (b"a" * 64 + b"=1\0", "a key that can't be one"),
        (b"X-a=" + b"x" * 8193 + b"\0", "a value of 8193 bytes"),
    ],
)
async def test_text_that_is_none(data: bytes, words: str) -> None:
    """B4: text without '=', without a key, without an end → an error in one line."""
    config = _config()
    answer(config, OPERATIONAL, {}, more=data)
    await is_refused(config, FormatError, words)


@pytest.mark.conformance("B4")
async def test_text_without_its_last_nul() -> None:
    """B4: the NUL after the last pair is missing → the pair counts all the same."""
    config = _config()
    answer(config, OPERATIONAL, {}, more=b"TargetAlias=disk")
    async with serving(config) as target:
        login = await log_in_to(target)
        assert login.result.parameters.target_alias == "disk"
        await use(target, login)


_BROKEN: list[tuple[str, int, dict[str, Any], SessionSettings | None, str]] = [
    ("C=1 with T=1", SECURITY, {"cont": True}, None, "says that its text goes on"),
    ("C=1 with T=1, at the end", OPERATIONAL, {"cont": True}, None, "says that its text goes on"),
    ("T=1 unasked", METHOD, {"transit": True, "nsg": 1}, CHAP, "which was not asked for"),
    ("T=1 unasked, to the end", METHOD, {"transit": True, "nsg": 3}, CHAP, "which was not asked for"),
    ("NSG above the one asked for", SECURITY, {"nsg": 3}, None, "to stage 3, but 1"),
    ("NSG=2", SECURITY, {"nsg": 2}, None, "to stage 2, but 1"),
    ("NSG=2 at the end", OPERATIONAL, {"nsg": 2}, None, "to stage 2, but 3"),
    ("NSG=1 again", OPERATIONAL, {"nsg": 1}, None, "to stage 1, but 3"),
    ("CSG=1 too early", SECURITY, {"csg": 1}, None, "of stage 1 in stage 0"),
    ("CSG=0 too late", OPERATIONAL, {"csg": 0}, None, "of stage 0 in stage 1"),
    ("CSG=3", OPERATIONAL, {"csg": 3}, None, "of stage 3 in stage 1"),
]


@pytest.mark.conformance(4)
@pytest.mark.parametrize(
    ("nth", "fields", "settings", "words"), [row[1:] for row in _BROKEN], ids=[row[0] for row in _BROKEN]
)
async def test_stages_that_change_against_the_rules(
    nth: int, fields: dict[str, Any], settings: SessionSettings | None, words: str
) -> None:
    """4: C=1 with T=1; T=1 unasked; NSG above the one asked for; NSG=2 → the connection is dropped."""
    config = _config(chap=POLICY if settings else None)
    respond(config, nth, **fields)
    await is_refused(config, ProtocolError, words, settings)


@pytest.mark.conformance(4)
async def test_nsg_means_nothing_without_t() -> None:
    """4, the other side of it: NSG in a response with T=0 is reserved, and not looked at."""
    config = _config(login_keys=1)
    respond(config, OPERATIONAL + 1, nsg=2)
    async with serving(config) as target:
        await use(target, await log_in_to(target))


@pytest.mark.conformance(4)
async def test_t_in_the_midst_of_the_target_s_own_text() -> None:
    """4: T=1 in answer to an empty request without T, which only fetches more text → the connection is dropped."""
    config = _config(login_chunk=20)
    respond(config, 2, transit=True, nsg=1)
    await is_refused(config, ProtocolError, "which was not asked for")


@pytest.mark.conformance(5)
@pytest.mark.parametrize("nth", [SECURITY, OPERATIONAL])
@pytest.mark.parametrize(
    "other",
    [
        NopIn(itt=0),
        NopIn(ttt=5),
        ScsiResponse(itt=0),
        DataIn(itt=0, final=True, has_status=True),
        AsyncMessage(event=0),
        Reject(reason=4, data=bytes(48)),
        LogoutResponse(itt=0),
    ],
    ids=lambda pdu: pdu.OPCODE.name,
)
async def test_other_pdus_in_a_login(nth: int, other: Pdu) -> None:
    """5: a PDU that isn't a Login Response, in either stage → the connection is terminated."""
    config = _config()
    respond(config, nth, lambda _: other)
    await is_refused(config, ProtocolError, f"sent a {type(other).__name__} in the login phase")


# --- numbers ---


@pytest.mark.conformance(6)
@pytest.mark.conformance(7)
@pytest.mark.parametrize("first", [0, 1, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF])
async def test_numbers_from_the_login_to_the_first_command(first: int) -> None:
    """6: any initial StatSN → ExpStatSN follows modulo 2^32. 7: the first command carries the login's CmdSN."""
    config = _config(initial_stat_sn=first)
    heard = listen(config)
    async with serving(config) as target:
        await use(target, await log_in_to(target))
    login = _logins(heard)
    command = next(pdu for pdu in heard if isinstance(pdu, ScsiCommand))
    assert [pdu.exp_stat_sn for pdu in login[1:]] == [(first + 1) % 2**32]
    assert command.exp_stat_sn == (first + 2) % 2**32
    assert {pdu.cmd_sn for pdu in login} == {command.cmd_sn}
    assert not command.immediate


@pytest.mark.conformance(8)
async def test_what_never_changes_in_a_login() -> None:
    """8: a login of many exchanges, with CHAP → ISID, CID, TSIH, ITT, CmdSN and versions are the first request's."""
    mutual = ChapCredentials(user="me", secret=b"a secret of sixteen", target_secret=b"another of sixteen")
    policy = replace(POLICY, target_secret=b"another of sixteen")
    config = _config(chap=policy, login_chunk=16, login_keys=2)
    heard = listen(config)
    async with serving(config) as target:
        await use(target, await log_in_to(target, settings_of(chap=mutual)))
    logins = _logins(heard)
    assert len(logins) > 20
    names = ("isid", "cid", "tsih", "itt", "cmd_sn", "version_max", "version_min")
    assert len({tuple(getattr(pdu, name) for name in names) for pdu in logins}) == 1
    assert (logins[0].tsih, logins[0].version_max, logins[0].version_min) == (0, 0, 0)


@pytest.mark.conformance(8)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"itt": 9}, "ITT 0x9 instead of 0x0"),
        ({"isid": b"abcdef"}, "ISID 616263646566 instead of"),
        ({"version_active": 1}, "version 0x01"),
    ],
)
@pytest.mark.parametrize("nth", [SECURITY, OPERATIONAL])
async def test_what_a_target_must_not_change(fields: dict[str, Any], words: str, nth: int) -> None:
    """8, the target's half: an answer to somebody else's login, or of another version → the connection is dropped."""
    config = _config()
    respond(config, nth, **fields)
    await is_refused(config, ProtocolError, words)


# --- keys ---


@pytest.mark.conformance(9)
@pytest.mark.parametrize("key", ["AuthMethod", "SessionType", *OFFERS])
async def test_a_key_that_every_target_has_to_understand(key: str) -> None:
    """9: a key that the RFC defines is answered NotUnderstood → protocol error."""
    config = _config()
    answer(config, OPERATIONAL if key in OFFERS else SECURITY, {key: "NotUnderstood"})
    error = await is_refused(config, ProtocolError, key)
    assert isinstance(error, NegotiationError | FormatError)


@pytest.mark.conformance(10)
@pytest.mark.parametrize("key", [{"FirstBurstLength": "Irrelevant"}, {"FirstBurstLength": None}])
async def test_a_first_burst_that_there_is_not(key: dict[str, str | None]) -> None:
    """10: FirstBurstLength=Irrelevant under InitialR2T=Yes, ImmediateData=No → accepted; all data waits for R2T."""
    config = _config(keys=TargetKeys(initial_r2t=True, immediate_data=False, default_time2wait=0))
    answer(config, OPERATIONAL, key)
    heard = listen(config)
    async with serving(config) as target:
        await use(target, await log_in_to(target), blocks=300)
    assert not any(pdu.data for pdu in heard if isinstance(pdu, ScsiCommand))
    assert all(pdu.ttt != 0xFFFFFFFF for pdu in heard if isinstance(pdu, DataOut))


@pytest.mark.conformance(10)
@pytest.mark.parametrize("keys", [{}, {"initial_r2t": True}, {"immediate_data": False}])
async def test_a_first_burst_that_matters(keys: dict[str, bool]) -> None:
    """10, the other cells: FirstBurstLength=Irrelevant though there is unsolicited data → an error."""
    config = _config(keys=TargetKeys(**keys))  # type: ignore[arg-type]
    answer(config, OPERATIONAL, {"FirstBurstLength": "Irrelevant"})
    await is_refused(config, NegotiationError, "calls FirstBurstLength irrelevant")


# The keys whose values of before are the standard's defaults. A target that says Reject has these in force, too.
_DEFAULTS = TargetKeys(
    header_digests=(),
    data_digests=(),
    initial_r2t=True,
    immediate_data=True,
    max_burst_length=262144,
    first_burst_length=65536,
    max_outstanding_r2t=1,
    default_time2wait=0,
)


@pytest.mark.conformance(11)
@pytest.mark.parametrize("key", [key for key in OFFERS if key != "MaxRecvDataSegmentLength"])
async def test_a_key_that_is_rejected(key: str) -> None:
    """11: key=Reject → the value of before is kept, and the session works with it."""
    config = _config(keys=_DEFAULTS)
    answer(config, OPERATIONAL, {key: "Reject"})
    async with serving(config) as target:
        login = await log_in_to(target)
        agreed = login.result.parameters
        assert (
            agreed.as_keys()[key]
            == {
                "HeaderDigest": "None",
                "DataDigest": "None",
                "MaxConnections": "1",
                "InitialR2T": "Yes",
                "ImmediateData": "Yes",
                "MaxBurstLength": "262144",
                "FirstBurstLength": "65536",
                "DefaultTime2Wait": "2",
                "DefaultTime2Retain": "20",
                "MaxOutstandingR2T": "1",
                "DataPDUInOrder": "Yes",
                "DataSequenceInOrder": "Yes",
                "ErrorRecoveryLevel": "0",
            }[key]
        )
        await use(target, login, blocks=700)


@pytest.mark.conformance(11)
@pytest.mark.parametrize(
    ("key", "settings", "words"),
    [
        ("HeaderDigest", {"header_digest": True}, "doesn't agree to HeaderDigest=CRC32C"),
        ("DataDigest", {"data_digest": True}, "doesn't agree to DataDigest=CRC32C"),
        ("MaxRecvDataSegmentLength", {}, "MaxRecvDataSegmentLength should be a number"),
    ],
)
async def test_a_rejection_that_we_cannot_live_with(key: str, settings: dict[str, bool], words: str) -> None:
    """11: key=Reject, and the value of before won't do (or the key is a declaration) → the connection is closed."""
    config = _config()
    answer(config, OPERATIONAL, {key: "Reject"})
    await is_refused(config, ProtocolError, words, settings_of(**settings))


@pytest.mark.conformance(12)
@pytest.mark.parametrize("key", ["HeaderDigest", "DataDigest"])
@pytest.mark.parametrize(
    ("wanted", "value"),
    [(False, "CRC32C"), (False, "CRC32C,None"), (True, "None"), (True, "MD5"), (True, "None,CRC32C")],
)
async def test_a_digest_that_was_not_offered(key: str, wanted: bool, value: str) -> None:
    """12: a digest that was not offered is chosen → closed."""
    config = _config()
    answer(config, OPERATIONAL, {key: value})
    words = "doesn't agree to" if value == "None" else f"answered {key}={value}, which lies outside of the offer"
    await is_refused(config, NegotiationError, words, settings_of(header_digest=wanted, data_digest=wanted))


@pytest.mark.conformance(12)
@pytest.mark.parametrize(("header", "data"), [(True, False), (False, True), (True, True)])
async def test_digests_that_were_offered(header: bool, data: bool) -> None:
    """12, the other side of it: what was offered and chosen is used from the first command on."""
    async with serving(_config()) as target:
        settings = settings_of(header_digest=header, data_digest=data)
        login = await log_in_to(target, settings)
        assert (login.result.parameters.header_digest, login.result.parameters.data_digest) == (header, data)
        await use(target, login, blocks=100, settings=settings)


@pytest.mark.conformance(13)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MaxBurstLength", "16777215"),
        ("MaxBurstLength", "511"),
        ("FirstBurstLength", "262145"),
        ("MaxOutstandingR2T", "9"),
        ("MaxOutstandingR2T", "0"),
        ("MaxRecvDataSegmentLength", "511"),
        ("MaxRecvDataSegmentLength", "16777216"),
        ("DefaultTime2Wait", "3601"),
        ("DefaultTime2Retain", "1"),
        ("DataPDUInOrder", "No"),
        ("DataSequenceInOrder", "No"),
        ("MaxConnections", "0"),
        ("ErrorRecoveryLevel", "3"),
        ("TargetPortalGroupTag", "65536"),
    ],
)
async def test_a_result_outside_of_the_offer(key: str, value: str) -> None:
    """13: a result outside of the offer, or of the key's range → protocol error."""
    config = _config()
    answer(config, OPERATIONAL if key in OFFERS else SECURITY, {key: value})
    await is_refused(config, ProtocolError, key)


@pytest.mark.conformance(14)
async def test_a_first_burst_above_the_burst() -> None:
    """14: FirstBurstLength > MaxBurstLength → clamped: no more unsolicited data than MaxBurstLength."""
    config = _config(keys=TargetKeys(max_burst_length=65536, default_time2wait=0))
    answer(config, OPERATIONAL, {"FirstBurstLength": "262144", "MaxBurstLength": "65536"})
    heard = listen(config)
    async with serving(config) as target:
        login = await log_in_to(target)
        assert login.result.parameters.first_burst_length == 65536
        await use(target, login, blocks=1000)
    unsolicited = [
        pdu for pdu in heard if isinstance(pdu, ScsiCommand) or (isinstance(pdu, DataOut) and pdu.ttt == 2**32 - 1)
    ]
    assert sum(len(pdu.data) for pdu in unsolicited) == 65536


@pytest.mark.conformance(15)
@pytest.mark.parametrize(
    "key", ["MaxBurstLength", "HeaderDigest", "MaxRecvDataSegmentLength", "InitialR2T", "X-org.example.a"]
)
async def test_a_key_that_comes_twice(key: str) -> None:
    """15: a key is negotiated twice in one text, even with the same value → dropped."""
    config = _config()
    value = {"HeaderDigest": "None", "InitialR2T": "No"}.get(key, "65536")
    answer(config, OPERATIONAL, {key: value}, more=f"{key}={value}\0".encode())
    await is_refused(config, NegotiationError, f"{key} twice")


@pytest.mark.conformance(15)
async def test_a_key_that_comes_again() -> None:
    """15: a key is negotiated again in a later text of the login → dropped."""
    config = _config(login_keys=1)
    answer(config, 8, {"HeaderDigest": "None"})
    await is_refused(config, NegotiationError, "HeaderDigest twice")
    config = _config(login_keys=1)
    answer(config, SECURITY, {"AuthMethod": "None"})  # which comes with the next response, too
    await is_refused(config, NegotiationError, "a key of authentication twice")
    config = _config()
    answer(config, OPERATIONAL, {"AuthMethod": "None"})
    await is_refused(config, ProtocolError, "a key of authentication twice")


@pytest.mark.conformance(16)
async def test_proposals_of_the_target() -> None:
    """16: the target proposes unknown keys → NotUnderstood; marker keys → No or Reject; and the login goes on."""
    extra = (
        ("X-org.example.odd", "1"),
        ("X#NodeArchitecture", "odd"),
        ("Y-org.example.old", "2"),
        ("OFMarker", "Yes"),
        ("IFMarker", "No"),
        ("OFMarkInt", "2048~8192"),
        ("IFMarkInt", "1~65535"),
        ("TaskReporting", "FastAbort,RFC3720"),
        ("iSCSIProtocolLevel", "2"),
    )
    config = _config(keys=TargetKeys(extra=extra, default_time2wait=0))
    answer(config, SECURITY, {"X-org.example.early": "1"})
    heard = listen(config)
    async with serving(config) as target:
        await use(target, await log_in_to(target))
    answered = {key: value for text in said(heard) for key, value in text.items()}
    assert {key: answered[key] for key, _ in extra} == {
        "X-org.example.odd": "NotUnderstood",
        "X#NodeArchitecture": "NotUnderstood",
        "Y-org.example.old": "NotUnderstood",
        "OFMarker": "No",
        "IFMarker": "No",
        "OFMarkInt": "Reject",
        "IFMarkInt": "Reject",
        "TaskReporting": "RFC3720",
        "iSCSIProtocolLevel": "1",
    }
    assert answered["X-org.example.early"] == "NotUnderstood"


@pytest.mark.conformance(17)
@pytest.mark.parametrize("key", ["InitialR2T", "ImmediateData", "DataPDUInOrder", "IFMarker"])
@pytest.mark.parametrize("value", ["yes", "NO", "Maybe", "Yes ", "1", "true", ""])
async def test_booleans_that_are_none(key: str, value: str) -> None:
    """17: `yes`, `Maybe` for a boolean → the login fails."""
    config = _config()
    answer(config, OPERATIONAL, {key: value})
    await is_refused(config, FormatError, f"{key} should be Yes or No")


@pytest.mark.conformance(18)
async def test_numbers_in_hexadecimal() -> None:
    """18: numbers in hexadecimal → accepted, and used."""
    keys = TargetKeys(
        max_burst_length=65536,
        first_burst_length=32768,
        max_recv_data_segment_length=4096,
        max_outstanding_r2t=1,
        default_time2wait=0,
    )
    config = _config(keys=keys)
    hexadecimal = {
        "MaxBurstLength": "0x10000",
        "FirstBurstLength": "0X8000",
        "MaxRecvDataSegmentLength": "0x01000",
        "MaxOutstandingR2T": "0x1",
    }
    answer(config, OPERATIONAL, dict(hexadecimal))
    heard = listen(config)
    async with serving(config) as target:
        login = await log_in_to(target)
        agreed = login.result.parameters
        assert (agreed.max_burst_length, agreed.first_burst_length, agreed.max_outstanding_r2t) == (65536, 32768, 1)
        await use(target, login, blocks=300)
    assert max(len(pdu.data) for pdu in heard if isinstance(pdu, DataOut)) == 4096


@pytest.mark.conformance("B5")
@pytest.mark.parametrize(
    "value",
    [
        "1_000",
        " 1000",
        "1000 ",
        "+1000",
        "01000",
        "١٠٠٠",
        "1000\n",
        "0x",
        "0b1",
        "1e3",
        "1000.0",
        "0x1_0000",
        "",
        "-1",
    ],
)
async def test_numbers_that_only_python_would_read(value: str) -> None:
    """B5: what int() takes and the standard doesn't → an error."""
    config = _config()
    answer(config, OPERATIONAL, {"MaxBurstLength": value})
    await is_refused(config, FormatError, "MaxBurstLength should be a number")


@pytest.mark.conformance(19)
@pytest.mark.parametrize(("declared", "limit"), [(512, 512), (None, 8192)])
async def test_segments_that_the_target_takes(declared: int | None, limit: int) -> None:
    """19: the target declares MaxRecvDataSegmentLength 512, or none → we cap at 512, 8192; it sends larger ones."""
    config = _config(keys=TargetKeys(max_recv_data_segment_length=declared, default_time2wait=0))
    heard, segments = listen(config), list[int]()

    def measure(pdu: Pdu) -> Pdu:
        segments.append(len(pdu.data))
        return pdu

    config.script.add(Rule(OUT, Change(measure), anything, times=0))
    async with serving(config) as target:
        await use(target, await log_in_to(target), blocks=256)
    assert max(len(pdu.data) for pdu in heard) == limit
    assert max(segments) == 256 * 512


@pytest.mark.conformance(20)
async def test_more_connections_and_recovery_than_we_do() -> None:
    """20: MaxConnections=8, ErrorRecoveryLevel=2 → 1 and 0 hold, nothing of the kind is ever sent."""
    config = _config()
    answer(config, OPERATIONAL, {"MaxConnections": "8", "ErrorRecoveryLevel": "2"})
    heard = listen(config)
    async with serving(config) as target:
        login = await log_in_to(target)
        agreed = login.result.parameters
        assert (agreed.max_connections, agreed.error_recovery_level) == (1, 0)
        await use(target, login)
        assert target.logins == 1
    offered = {key: value for text in said(heard) for key, value in text.items()}
    assert (offered["MaxConnections"], offered["ErrorRecoveryLevel"]) == ("1", "0")


async def test_a_session_of_the_kit_keeps_the_rules_too() -> None:
    """The tests of this file and those of others log in alike."""
    async with serving(_config()) as target, open_session(target):
        assert target.logins == 1
