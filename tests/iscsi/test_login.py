import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import (
    AuthenticationError,
    FormatError,
    LoginError,
    NegotiationError,
    NoChapError,
    NothingFoundError,
    ProtocolError,
)
from iscsifuse.iscsi import login, text
from iscsifuse.iscsi.chap import ChallengeMemory, ChapAlgorithm, ChapCredentials
from iscsifuse.iscsi.login import STATUS_WORDS, LoginMachine, LoginState, Redirect
from iscsifuse.iscsi.parameters import LoginConfig
from iscsifuse.iscsi.pdu import Pdu
from iscsifuse.iscsi.request import LoginRequest
from iscsifuse.iscsi.response import LoginResponse, NopIn, Reject, ScsiResponse

ISID = b"\x80\1\2\3\4\5"
ITT = 0xABCD
CMD_SN = 1000
TARGET = "iqn.2026-11.com.example:disk"
CONFIG = LoginConfig(initiator_name="iqn.2026-11.com.example:us", target_name=TARGET)
DISCOVERY = dataclasses.replace(CONFIG, target_name=None)
CREDENTIALS = ChapCredentials(user="joe", secret=b"our secret, long", algorithms=(ChapAlgorithm.MD5,))
MUTUAL = dataclasses.replace(CREDENTIALS, target_user="disk", target_secret=b"their secret, long")
WITH_CHAP = dataclasses.replace(CONFIG, chap=CREDENTIALS)
WITH_MUTUAL = dataclasses.replace(CONFIG, chap=MUTUAL)
Pairs = Iterable[tuple[str, str]]


class Target:
    """The other side, told what to say step by step; it keeps the numbers right."""

    def __init__(self, config: LoginConfig = CONFIG, *, stat_sn: int = 100, **machine: Any) -> None:
        self.stat_sn = stat_sn
        arguments = {"isid": ISID, "itt": ITT, "cmd_sn": CMD_SN, "random": bytes, "challenges": ChallengeMemory()}
        self.machine = LoginMachine(config, **(arguments | machine))  # type: ignore[arg-type]
        (self.last,) = self.machine.start()
        self.requests = [self.last]

    def state(self) -> LoginState:
        return self.machine.state

    def asked(self) -> dict[str, str]:
        """The text of the last request."""
        return dict(text.decode(self.last.data))

    def say(self, pairs: Pairs | bytes = (), **fields: Any) -> LoginRequest | None:
        """Answer the last request; the request that follows."""
        data = pairs if isinstance(pairs, bytes) else text.encode(pairs)
        basic: dict[str, Any] = {
            "itt": ITT,
            "isid": ISID,
            "csg": self.last.csg,
            "nsg": self.last.nsg if fields.get("transit") else 0,
            "stat_sn": self.stat_sn,
            "exp_cmd_sn": CMD_SN,
            "max_cmd_sn": CMD_SN + 31,
            "data": data,
        }
        self.stat_sn = (self.stat_sn + 1) & 0xFFFFFFFF
        answers = self.machine.receive(LoginResponse(**(basic | fields)))
        if not answers:
            return None
        (self.last,) = answers
        self.requests.append(self.last)
        return self.last

    def agree(self) -> None:
        """Let the security stage pass without authentication."""
        self.say([("AuthMethod", "None"), ("TargetPortalGroupTag", "1")], transit=True)

    def challenge(self, **keys: str) -> LoginRequest | None:
        """CHAP up to our answer."""
        self.say([("AuthMethod", "CHAP")])
        return self.say(({"CHAP_A": "5", "CHAP_I": "9", "CHAP_C": "0x010203"} | keys).items())

    def prove(self) -> dict[str, str]:
        """The right answer to our challenge."""
        keys = self.asked()
        data = bytes([int(keys["CHAP_I"])]) + b"their secret, long" + bytes.fromhex(keys["CHAP_C"][2:])
        return {"CHAP_N": "disk", "CHAP_R": "0x" + hashlib.md5(data).hexdigest()}  # noqa: S324  (the standard's)


# -- the usual ways


@pytest.mark.conformance(1)
@pytest.mark.conformance(7)
def test_without_authentication() -> None:
    target = Target()
    first = target.last
    assert first == LoginRequest(
        transit=True, csg=0, nsg=1, isid=ISID, itt=ITT, cmd_sn=CMD_SN, exp_stat_sn=0, tsih=0, cid=0, data=first.data
    )
    assert target.asked() == {
        "InitiatorName": CONFIG.initiator_name,
        "TargetName": TARGET,
        "SessionType": "Normal",
        "AuthMethod": "None",
    }
    assert target.state() is LoginState.SECURITY_METHOD
    target.agree()
    assert target.state() is LoginState.OPERATIONAL
    assert (target.last.transit, target.last.csg, target.last.nsg) == (True, 1, 3)
    assert target.asked()["MaxBurstLength"] == "16776192"
    assert "InitiatorName" not in target.asked()
    with pytest.raises(RuntimeError, match="state OPERATIONAL"):
        _ = target.machine.result
    assert target.say([("MaxBurstLength", "65536")], transit=True, tsih=3) is None
    assert target.machine.done
    assert target.machine.redirect is None
    result = target.machine.result
    assert result.parameters.max_burst_length == 65536
    assert result.parameters.target_portal_group_tag == 1
    assert result.parameters.auth_method == "None"
    assert (result.tsih, result.next_cmd_sn, result.exp_stat_sn) == (3, CMD_SN, 102)
    assert (result.exp_cmd_sn, result.max_cmd_sn) == (CMD_SN, CMD_SN + 31)


def test_discovery() -> None:
    target = Target(DISCOVERY)
    assert target.asked() == {
        "InitiatorName": CONFIG.initiator_name,
        "SessionType": "Discovery",
        "AuthMethod": "None",
    }
    target.say(transit=True)  # a target that says nothing at all
    assert "MaxBurstLength" not in target.asked()
    target.say(transit=True)
    assert target.machine.done
    assert target.machine.result.parameters.target_portal_group_tag is None


@pytest.mark.conformance(27)
def test_chap_one_way() -> None:
    target = Target(WITH_CHAP)
    assert target.asked()["AuthMethod"] == "CHAP"
    assert not target.last.transit
    target.say([("AuthMethod", "CHAP"), ("TargetPortalGroupTag", "1")])
    assert target.state() is LoginState.CHAP
    assert target.asked() == {"CHAP_A": "5"}
    assert not target.last.transit
    target.say([("CHAP_A", "5"), ("CHAP_I", "9"), ("CHAP_C", "0x010203")])
    expected = hashlib.md5(b"\x09our secret, long\1\2\3").hexdigest()  # noqa: S324  (the standard's)
    assert target.asked() == {"CHAP_N": "joe", "CHAP_R": "0x" + expected}
    assert (target.last.transit, target.last.nsg) == (True, 1)
    target.say(transit=True)
    target.say(transit=True)
    assert target.machine.done
    assert target.machine.result.parameters.auth_method == "CHAP"


@pytest.mark.parametrize("at_once", [True, False])
def test_chap_mutual(at_once: bool) -> None:
    target = Target(WITH_MUTUAL)
    target.challenge()
    assert target.last.transit
    target.say(target.prove().items(), transit=at_once)
    if not at_once:
        assert target.state() is LoginState.SECURITY_DONE
        assert target.last.transit
        assert target.last.data == b""
        target.say(transit=True)
    target.say(transit=True)
    assert target.machine.done


@pytest.mark.conformance(8)
def test_what_stays_the_same_in_all_requests() -> None:
    target = Target(WITH_MUTUAL, cid=7, tsih=0)
    target.challenge()
    target.say(target.prove().items(), transit=True)
    target.say(tsih=99)
    target.say([("IFMarker", "No")])
    target.say(transit=True, tsih=99)
    assert target.machine.done
    assert len(target.requests) == 6
    for request in target.requests:
        constant = (request.isid, request.cid, request.tsih, request.itt, request.cmd_sn)
        assert constant == (ISID, 7, 0, ITT, CMD_SN)
        assert (request.version_min, request.version_max) == (0, 0)
        assert request.nsg == (0 if not request.transit else 1 if request.csg == 0 else 3)
    assert [request.exp_stat_sn for request in target.requests] == [0, 101, 102, 103, 104, 105]


@pytest.mark.conformance(6)
@pytest.mark.parametrize("first", [0, 1, 0xFFFFFFFE, 0xFFFFFFFF])
def test_status_numbers_follow_the_target_s_first(first: int) -> None:
    target = Target(stat_sn=first)
    target.agree()
    assert target.last.exp_stat_sn == (first + 1) & 0xFFFFFFFF
    target.say(transit=True)
    assert target.machine.result.exp_stat_sn == (first + 2) & 0xFFFFFFFF


@pytest.mark.conformance(6)
def test_a_gap_in_the_status_numbers() -> None:
    target = Target()
    target.agree()
    with pytest.raises(ProtocolError, match="StatSN 102 instead of 101"):
        target.say(transit=True, stat_sn=102)


# -- T=0, and what the target proposes


@pytest.mark.conformance(2)
def test_one_key_at_a_time() -> None:
    target = Target()
    target.say([("TargetAlias", "disk")])
    target.say([("AuthMethod", "None")])
    target.say([("TargetPortalGroupTag", "1")])
    target.say(transit=True)
    for pair in [
        ("HeaderDigest", "None"),
        ("DataDigest", "None"),
        ("MaxBurstLength", "65536"),
        ("FirstBurstLength", "4096"),
        ("InitialR2T", "No"),
        ("ImmediateData", "No"),
    ]:
        request = target.say([pair])
        assert request is not None
        assert (request.transit, request.nsg, request.data) == (True, 3, b"")
    target.say([("MaxOutstandingR2T", "2")], transit=True)
    parameters = target.machine.result.parameters
    assert (parameters.first_burst_length, parameters.initial_r2t, parameters.max_outstanding_r2t) == (4096, False, 2)
    assert parameters.target_alias == "disk"


@pytest.mark.conformance(2)
@pytest.mark.conformance("B10")
def test_a_target_that_never_comes_to_an_end() -> None:
    target = Target()
    for _ in range(login.MAX_EXCHANGES):
        assert target.say() is not None
    with pytest.raises(ProtocolError, match="more than 256 exchanges"):
        target.say()
    assert target.state() is LoginState.FAILED


@pytest.mark.conformance(16)
def test_proposals_are_answered() -> None:
    target = Target()
    target.agree()
    target.say([("X-com.example.a", "1"), ("OFMarker", "Yes"), ("IFMarkInt", "1~2"), ("MaxBurstLength", "512")])
    assert target.asked() == {"X-com.example.a": "NotUnderstood", "OFMarker": "No", "IFMarkInt": "Reject"}
    assert target.last.transit
    target.say(transit=True)
    assert target.machine.done


@pytest.mark.conformance(16)
def test_proposals_at_the_end_of_a_stage() -> None:
    target = Target()
    target.say([("X-com.example.a", "1")], transit=True)
    assert target.asked()["X-com.example.a"] == "NotUnderstood"
    assert "MaxBurstLength" in target.asked()
    # In the last response there is no room for an answer any more; nothing changes by it.
    target.say([("IFMarker", "No"), ("X-com.example.b", "1")], transit=True)
    assert target.machine.done


@pytest.mark.conformance(20)
def test_more_connections_and_recovery_than_we_do() -> None:
    target = Target()
    target.agree()
    target.say([("MaxConnections", "8"), ("ErrorRecoveryLevel", "2")])
    target.say(transit=True)
    parameters = target.machine.result.parameters
    assert (parameters.max_connections, parameters.error_recovery_level) == (1, 0)


@pytest.mark.conformance(15)
def test_a_key_that_comes_again_in_a_later_text() -> None:
    target = Target()
    target.agree()
    target.say([("MaxBurstLength", "512")])
    with pytest.raises(NegotiationError, match="MaxBurstLength twice"):
        target.say([("MaxBurstLength", "512")])


# -- C bits


@pytest.mark.conformance(3)
def test_a_text_of_the_target_s_in_pieces() -> None:
    target = Target()
    target.agree()
    pieces = [b"MaxBurst", b"Length=655", b"36\0TargetAli", b"as=disk\0"]
    for piece in pieces[:-1]:
        request = target.say(piece, cont=True)
        assert request is not None
        assert (request.transit, request.cont, request.csg, request.nsg, request.data) == (False, False, 1, 0, b"")
    request = target.say(pieces[-1])
    assert request is not None
    assert request.transit
    target.say(transit=True)
    parameters = target.machine.result.parameters
    assert (parameters.max_burst_length, parameters.target_alias) == (65536, "disk")


@pytest.mark.conformance("B4")
def test_pieces_for_ever() -> None:
    target = Target()
    for _ in range(8):
        target.say(b"x" * 8192, cont=True)
    with pytest.raises(FormatError, match="more than 65536 bytes"):
        target.say(b"x", cont=True)
    empty = Target()
    for _ in range(login.MAX_EXCHANGES):
        empty.say(cont=True)
    with pytest.raises(ProtocolError, match="exchanges"):
        empty.say(cont=True)


def in_pieces() -> Target:
    """A target that takes 512 bytes at a time only, and said so early; our long text is under way."""
    target = Target(dataclasses.replace(CONFIG, initiator_alias="me"))
    proposals = [(f"X-com.example.{number}", "1") for number in range(40)]
    target.say([("MaxRecvDataSegmentLength", "512"), *proposals], transit=True)
    return target


def test_our_text_in_pieces() -> None:
    target = in_pieces()
    data = b""
    pieces = 0
    while target.last.cont:
        assert (target.last.transit, target.last.nsg, len(target.last.data)) == (False, 0, 512)
        data += target.last.data
        pieces += 1
        target.say()
    data += target.last.data
    assert pieces == (len(data) - 1) // 512 > 1
    assert target.last.transit
    assert len(text.decode(data)) == 40 + 14
    target.say(transit=True)
    assert target.machine.done


@pytest.mark.parametrize("fields", [{"pairs": [("TargetAlias", "x")]}, {"cont": True}])
def test_answers_in_the_middle_of_our_text(fields: dict[str, Any]) -> None:
    target = in_pieces()
    with pytest.raises(ProtocolError, match="before our text was complete"):
        target.say(**fields)


# -- responses that break the rules


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param({"transit": True, "cont": True}, "text goes on", marks=pytest.mark.conformance(4)),
        pytest.param({"transit": True, "nsg": 3}, "stage 3, but 1", marks=pytest.mark.conformance(4)),
        pytest.param({"transit": True, "nsg": 2}, "stage 2, but 1", marks=pytest.mark.conformance(4)),
        pytest.param({"transit": True, "nsg": 0}, "stage 0, but 1", marks=pytest.mark.conformance(4)),
        pytest.param({"csg": 1}, "stage 1 in stage 0", marks=pytest.mark.conformance(4)),
        pytest.param({"csg": 3}, "stage 3 in stage 0", marks=pytest.mark.conformance(4)),
        pytest.param({"itt": 1}, "ITT 0x1 instead of 0xabcd", marks=pytest.mark.conformance(8)),
        pytest.param({"isid": bytes(6)}, "ISID 000000000000", marks=pytest.mark.conformance(8)),
        pytest.param({"version_active": 1}, "version 0x01", marks=pytest.mark.conformance(8)),
    ],
)
def test_broken_responses(fields: dict[str, Any], complaint: str) -> None:
    target = Target()
    with pytest.raises(ProtocolError, match=complaint):
        target.say(**fields)
    assert target.state() is LoginState.FAILED
    with pytest.raises(ProtocolError, match="in state FAILED"):
        target.say()


@pytest.mark.conformance(4)
def test_the_stage_changes_unasked() -> None:
    target = Target(WITH_CHAP)
    with pytest.raises(ProtocolError, match="not asked for"):
        target.say([("AuthMethod", "CHAP")], transit=True, nsg=1)
    target = Target()
    target.agree()
    target.say(b"TargetAli", cont=True)
    with pytest.raises(ProtocolError, match="not asked for"):
        target.say(b"as=x\0", transit=True, nsg=3)
    target = Target()
    target.agree()
    with pytest.raises(ProtocolError, match="stage 2, but 3"):
        target.say(transit=True, nsg=2)


@pytest.mark.conformance(5)
@pytest.mark.parametrize("pdu", [NopIn(), ScsiResponse(itt=ITT), Reject(), LoginRequest(itt=ITT)])
def test_other_pdus(pdu: Pdu) -> None:
    target = Target()
    with pytest.raises(ProtocolError, match=f"a {type(pdu).__name__} in the login phase"):
        target.machine.receive(pdu)
    assert target.state() is LoginState.FAILED


def test_responses_when_none_is_awaited() -> None:
    target = Target()
    target.agree()
    target.say(transit=True)
    with pytest.raises(ProtocolError, match="FULL_FEATURE"):
        target.say()
    assert target.machine.done
    fresh = LoginMachine(CONFIG, isid=ISID, itt=1, cmd_sn=1, random=bytes, challenges=set())
    with pytest.raises(ProtocolError, match="in state START"):
        fresh.receive(LoginResponse())


# -- authentication


@pytest.mark.parametrize("method", ["CHAP", "Reject", "KRB5,CHAP"])
def test_the_target_wants_chap_and_we_don_t(method: str) -> None:
    with pytest.raises(AuthenticationError, match="the target asks for CHAP; give --chap-user"):
        Target().say([("AuthMethod", method)])


@pytest.mark.conformance(34)
@pytest.mark.conformance("B8")
@pytest.mark.parametrize("method", ["None", "Reject", "SRP\x1b"])
def test_we_want_chap_and_the_target_doesn_t(method: str) -> None:
    target = Target(WITH_CHAP)
    with pytest.raises(NoChapError, match="doesn't do CHAP, which --chap-user asks for") as caught:
        target.say([("AuthMethod", method)])
    assert str(caught.value).isprintable()


@pytest.mark.conformance(9)
@pytest.mark.parametrize("config", [CONFIG, WITH_CHAP])
def test_auth_method_is_a_key_that_every_target_understands(config: LoginConfig) -> None:
    with pytest.raises(NegotiationError, match="doesn't understand AuthMethod"):
        Target(config).say([("AuthMethod", "NotUnderstood")])


@pytest.mark.conformance(34)
def test_a_target_that_says_nothing_about_chap_gets_nowhere() -> None:
    target = Target(WITH_CHAP)
    for _ in range(3):
        target.say()
        assert not target.last.transit
    target.say([("AuthMethod", "CHAP")])
    assert target.asked() == {"CHAP_A": "5"}


@pytest.mark.conformance(29)
@pytest.mark.parametrize("config", [CONFIG, WITH_CHAP])
def test_chap_keys_before_their_turn(config: LoginConfig) -> None:
    with pytest.raises(AuthenticationError, match="sent CHAP_A, CHAP_C before its turn"):
        Target(config).say([("AuthMethod", "CHAP"), ("CHAP_C", "0x00"), ("CHAP_A", "5")])


@pytest.mark.conformance(15)
@pytest.mark.parametrize(
    "texts",
    [
        [[("AuthMethod", "CHAP"), ("AuthMethod", "CHAP")]],
        [[("AuthMethod", "CHAP")], [("AuthMethod", "CHAP"), ("CHAP_A", "5"), ("CHAP_I", "1"), ("CHAP_C", "0x00")]],
        [[("AuthMethod", "CHAP")], [("CHAP_A", "5"), ("CHAP_A", "5"), ("CHAP_I", "1"), ("CHAP_C", "0x00")]],
    ],
)
def test_keys_of_authentication_that_come_twice(texts: list[Pairs]) -> None:
    target = Target(WITH_CHAP)
    for pairs in texts[:-1]:
        target.say(pairs)
    with pytest.raises(NegotiationError, match="authentication twice"):
        target.say(texts[-1])


@pytest.mark.conformance(29)
@pytest.mark.parametrize("stage", ["security", "operational"])
def test_keys_of_authentication_after_it_was_over(stage: str) -> None:
    target = Target(WITH_CHAP)
    target.challenge()
    if stage == "operational":
        target.say(transit=True)
    with pytest.raises(ProtocolError, match="sent CHAP_N, CHAP_R after authentication was over"):
        target.say([("CHAP_R", "0x00"), ("CHAP_N", "x")])


@pytest.mark.conformance(31)
@pytest.mark.parametrize("transit", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda _: {},
        lambda right: {"CHAP_N": right["CHAP_N"]},
        lambda right: {"CHAP_R": right["CHAP_R"]},
        lambda right: right | {"CHAP_N": "other"},
        lambda right: right | {"CHAP_R": right["CHAP_R"][:-2]},
        lambda right: right | {"CHAP_R": right["CHAP_R"] + "00"},
        lambda right: right | {"CHAP_R": "0x" + "00" * 16},
    ],
)
def test_without_the_target_s_proof_there_is_no_full_feature_phase(
    transit: bool, change: Callable[[dict[str, str]], dict[str, str]]
) -> None:
    target = Target(WITH_MUTUAL)
    target.challenge()
    with pytest.raises(AuthenticationError, match="CHAP failed"):
        target.say(change(target.prove()).items(), transit=transit)
    assert target.state() is LoginState.FAILED
    with pytest.raises(ProtocolError):
        target.say(transit=True)


@pytest.mark.conformance(33)
def test_our_challenge_from_a_parallel_login() -> None:
    memory = ChallengeMemory()
    first = Target(WITH_MUTUAL, challenges=memory)
    first.challenge()
    with pytest.raises(AuthenticationError, match="a challenge of our own"):
        Target(WITH_MUTUAL, challenges=memory).challenge(CHAP_C=first.asked()["CHAP_C"])


# -- statuses


@pytest.mark.conformance(23)
@pytest.mark.parametrize("status", [status for status in STATUS_WORDS if status >> 8 in (2, 3)])
def test_statuses_in_words(status: int) -> None:
    with pytest.raises(LoginError, match=f"status {status:04x}") as caught:
        Target().say(status_class=status >> 8, status_detail=status & 0xFF)
    assert caught.value.status == status
    special = {0x0201: AuthenticationError, 0x0203: NothingFoundError}
    assert type(caught.value) is special.get(status, LoginError)
    assert status in special or STATUS_WORDS[status] in str(caught.value)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0x02FF, "calls our login wrong"),
        (0x03FF, "can't take a login now"),
        (0x01FF, "redirects us"),
        (0x7700, "in a way of its own"),
    ],
)
def test_statuses_that_the_standard_doesn_t_know(status: int, words: str) -> None:
    with pytest.raises(LoginError, match=words) as caught:
        Target().say(status_class=status >> 8, status_detail=status & 0xFF)
    assert caught.value.status == status


def test_no_such_target() -> None:
    with pytest.raises(NothingFoundError, match=f"target {TARGET} not found at this portal"):
        Target().say(status_class=2, status_detail=3)
    with pytest.raises(NothingFoundError, match="target for discovery not found"):
        Target(DISCOVERY).say(status_class=2, status_detail=3)


def test_authentication_failures_say_what_to_do() -> None:
    with pytest.raises(AuthenticationError, match="the target asks for CHAP; give --chap-user"):
        Target().say(status_class=2, status_detail=1)
    with pytest.raises(AuthenticationError, match="it may have no CHAP account for us"):
        Target(WITH_CHAP).say(status_class=2, status_detail=1)
    target = Target(WITH_CHAP)
    target.challenge()
    with pytest.raises(AuthenticationError, match="refused our CHAP user or secret \\(status 0201\\)"):
        target.say(status_class=2, status_detail=1)


def test_authorization_failures_say_what_to_do() -> None:
    with pytest.raises(LoginError, match=r"with the name iqn\.2026-11\.com\.example:us; .* give --chap-user"):
        Target().say(status_class=2, status_detail=2)
    with pytest.raises(LoginError, match=r"with the name iqn\.2026-11\.com\.example:us \(status 0202\)"):
        Target(WITH_CHAP).say(status_class=2, status_detail=2)


def test_a_wrong_secret_by_another_status() -> None:
    # tgt says 0200 there.
    target = Target(WITH_CHAP)
    target.challenge()
    with pytest.raises(AuthenticationError, match=r"refused our CHAP user or secret \(status 0200\)") as caught:
        target.say(status_class=2, status_detail=0)
    assert caught.value.status == 0x0200
    # After the security stage it has nothing to do with the secret.
    target = Target(WITH_CHAP)
    target.challenge()
    target.say(transit=True)
    with pytest.raises(LoginError, match="without saying why") as other:
        target.say(status_class=2, status_detail=0)
    assert not isinstance(other.value, AuthenticationError)


def test_a_target_that_means_sha1_by_the_number_of_sha256() -> None:
    credentials = dataclasses.replace(CREDENTIALS, algorithms=(ChapAlgorithm.SHA256,))
    target = Target(dataclasses.replace(CONFIG, chap=credentials))
    target.challenge(CHAP_A="7")
    with pytest.raises(AuthenticationError, match="try auth=md5"):
        target.say(status_class=2, status_detail=0)


@pytest.mark.conformance(24)
def test_the_numbers_of_a_failure_are_ignored() -> None:
    target = Target()
    target.agree()
    with pytest.raises(LoginError, match="out of resources"):
        target.say(
            b"\xff" * 9, status_class=3, status_detail=2, stat_sn=5, itt=0, isid=bytes(6), csg=3, transit=True, nsg=2,
            version_active=9,
        )  # fmt: skip


# -- redirects


@pytest.mark.conformance(21)
@pytest.mark.parametrize("when", ["at once", "after CHAP", "operational"])
@pytest.mark.parametrize(
    ("detail", "address", "redirect"),
    [
        (1, "192.0.2.1:3261,2", Redirect(host="192.0.2.1", port=3261, tag=2, permanent=False)),
        (2, "[2001:db8::1]", Redirect(host="2001:db8::1", port=3260, tag=None, permanent=True)),
        (1, "san.example.com", Redirect(host="san.example.com", port=3260, tag=None, permanent=False)),
    ],
)
def test_redirect(when: str, detail: int, address: str, redirect: Redirect) -> None:
    target = Target(CONFIG if when == "at once" else WITH_CHAP)
    if when != "at once":
        target.challenge()
    if when == "operational":
        target.say(transit=True)
    pairs = [("TargetAlias", "x"), ("TargetAddress", address), ("TargetAddress", "other")]
    assert target.say(pairs, status_class=1, status_detail=detail) is None
    assert target.machine.redirect == redirect
    assert target.state() is LoginState.REDIRECTED
    assert not target.machine.done
    with pytest.raises(ProtocolError, match="REDIRECTED"):
        target.say()


@pytest.mark.conformance(21)
@pytest.mark.parametrize(
    ("data", "complaint"),
    [(b"", "doesn't say which"), (b"TargetAddress=x:0\0", "can be read"), (b"nonsense", "can be read")],
)
def test_redirects_to_nowhere(data: bytes, complaint: str) -> None:
    target = Target()
    with pytest.raises(LoginError, match=complaint) as caught:
        target.say(data, status_class=1, status_detail=1)
    assert caught.value.status == 0x0101
    assert target.machine.redirect is None
    assert target.state() is LoginState.FAILED


# -- anything


@pytest.mark.conformance("B12")
@given(
    st.sampled_from([CONFIG, DISCOVERY, WITH_CHAP, WITH_MUTUAL]),
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    b"", b"AuthMethod=None\0", b"AuthMethod=CHAP\0", b"CHAP_A=5\0CHAP_I=1\0CHAP_C=0x11\0",
                    b"CHAP_N=disk\0", b"MaxBurstLength=512\0", b"HeaderDigest=None\0", b"X-a=1\0",
                    b"IFMarker=No\0", b"Max",
                ]
            )
            | st.binary(max_size=20),
            st.booleans(),
            st.booleans(),
            st.sampled_from([0, 0, 0, 0, 1, 2, 3]),
        ),
        max_size=8,
    ),
)  # fmt: skip
def test_whatever_a_target_says(config: LoginConfig, steps: list[tuple[bytes, bool, bool, int]]) -> None:
    target = Target(config)
    try:
        for data, transit, cont, status_class in steps:
            if target.say(data, transit=transit, cont=cont, status_class=status_class) is None:
                break
    except (LoginError, ProtocolError):
        assert target.state() is LoginState.FAILED
    assert not (target.machine.done and config is WITH_MUTUAL), "full feature phase without the target's proof"
    assert not (target.machine.done and target.last.csg != 1)


def test_the_module_s_head_names_all_states() -> None:
    head = inspect.getdoc(login) or ""
    for state in LoginState:
        assert state is LoginState.START or state.name in head
