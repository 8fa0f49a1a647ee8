import dataclasses

import pytest

from iscsifuse.errors import FormatError, NegotiationError, ProtocolError
from iscsifuse.iscsi.negotiation import KEYS, Negotiation
from iscsifuse.iscsi.parameters import LoginConfig, NegotiatedParameters
from iscsifuse.iscsi.request import Stage

NORMAL = LoginConfig(initiator_name="iqn.2026-11.com.example:us", target_name="iqn.2026-11.com.example:disk")
DISCOVERY = dataclasses.replace(NORMAL, target_name=None)
OPERATIONAL = Stage.LOGIN_OPERATIONAL_NEGOTIATION
SECURITY = Stage.SECURITY_NEGOTIATION


def negotiate(config: LoginConfig = NORMAL, **answers: str) -> NegotiatedParameters:
    """What follows from these answers, all the other offers being left unanswered."""
    negotiation = Negotiation(config)
    assert negotiation.receive(answers.items(), stage=OPERATIONAL) == []
    return negotiation.result()


def proposed(config: LoginConfig, *pairs: tuple[str, str], stage: int = OPERATIONAL) -> list[tuple[str, str]]:
    """Our answers to what a target proposes."""
    return Negotiation(config).receive(pairs, stage=stage)


# -- what we send


@pytest.mark.conformance(1)
def test_identity() -> None:
    assert Negotiation(NORMAL).identity() == [
        ("InitiatorName", "iqn.2026-11.com.example:us"),
        ("TargetName", "iqn.2026-11.com.example:disk"),
        ("SessionType", "Normal"),
    ]
    named = dataclasses.replace(DISCOVERY, initiator_alias="me")
    assert Negotiation(named).identity() == [
        ("InitiatorName", "iqn.2026-11.com.example:us"),
        ("InitiatorAlias", "me"),
        ("SessionType", "Discovery"),
    ]
    assert DISCOVERY.discovery
    assert not NORMAL.discovery


def test_offers() -> None:
    assert Negotiation(NORMAL).offers() == [
        ("HeaderDigest", "None"),
        ("DataDigest", "None"),
        ("MaxConnections", "1"),
        ("InitialR2T", "No"),
        ("ImmediateData", "Yes"),
        ("MaxRecvDataSegmentLength", "262144"),
        ("MaxBurstLength", "16776192"),
        ("FirstBurstLength", "262144"),
        ("DefaultTime2Wait", "0"),
        ("DefaultTime2Retain", "0"),
        ("MaxOutstandingR2T", "8"),
        ("DataPDUInOrder", "Yes"),
        ("DataSequenceInOrder", "Yes"),
        ("ErrorRecoveryLevel", "0"),
    ]
    for name, value in Negotiation(NORMAL).offers():
        assert not value.isdigit() or KEYS[name].low <= int(value) <= KEYS[name].high


def test_offers_of_a_discovery_session() -> None:
    config = dataclasses.replace(DISCOVERY, header_digest=True, data_digest=True)
    assert Negotiation(config).offers() == [
        ("HeaderDigest", "CRC32C"),
        ("DataDigest", "CRC32C"),
        ("MaxRecvDataSegmentLength", "262144"),
        ("DefaultTime2Wait", "0"),
        ("DefaultTime2Retain", "0"),
        ("ErrorRecoveryLevel", "0"),
    ]


def test_the_first_burst_is_not_offered_above_the_greatest() -> None:
    config = dataclasses.replace(NORMAL, max_burst_length=4096)
    assert ("FirstBurstLength", "4096") in Negotiation(config).offers()


# -- results


def test_silence_leaves_the_defaults() -> None:
    assert negotiate() == NegotiatedParameters(max_recv_data_segment_length=262144)


def test_all_keys_answered() -> None:
    config = dataclasses.replace(NORMAL, header_digest=True, data_digest=True)
    negotiation = Negotiation(config)
    answers = {
        "HeaderDigest": "CRC32C",
        "DataDigest": "CRC32C",
        "MaxConnections": "1",
        "InitialR2T": "No",
        "ImmediateData": "No",
        "MaxRecvDataSegmentLength": "65536",
        "MaxBurstLength": "1048576",
        "FirstBurstLength": "131072",
        "DefaultTime2Wait": "5",
        "DefaultTime2Retain": "0",
        "MaxOutstandingR2T": "4",
        "DataPDUInOrder": "Yes",
        "DataSequenceInOrder": "Yes",
        "ErrorRecoveryLevel": "0",
        "TargetPortalGroupTag": "65535",
        "TargetAlias": "a disk\x1b",
        "TargetAddress": "192.0.2.1",
    }
    assert negotiation.receive(answers.items(), stage=OPERATIONAL) == []
    result = negotiation.result(auth_method="CHAP")
    assert result == NegotiatedParameters(
        header_digest=True,
        data_digest=True,
        max_recv_data_segment_length=262144,
        target_max_recv_data_segment_length=65536,
        initial_r2t=False,
        immediate_data=False,
        max_burst_length=1048576,
        first_burst_length=131072,
        max_outstanding_r2t=4,
        default_time2wait=5,
        default_time2retain=0,
        target_portal_group_tag=65535,
        target_alias="a disk\x1b",
        auth_method="CHAP",
    )
    del answers["TargetAddress"]
    assert result.as_keys() == answers | {
        "AuthMethod": "CHAP",
        "MaxRecvDataSegmentLength": "262144",
        "TargetMaxRecvDataSegmentLength": "65536",
        "TargetAlias": "a disk\\x1b",
    }


def test_as_keys_leaves_out_what_is_not_known() -> None:
    assert NegotiatedParameters().as_keys() == {
        "AuthMethod": "None",
        "HeaderDigest": "None",
        "DataDigest": "None",
        "MaxRecvDataSegmentLength": "8192",
        "TargetMaxRecvDataSegmentLength": "8192",
        "InitialR2T": "Yes",
        "ImmediateData": "Yes",
        "MaxBurstLength": "262144",
        "FirstBurstLength": "65536",
        "MaxOutstandingR2T": "1",
        "DataPDUInOrder": "Yes",
        "DataSequenceInOrder": "Yes",
        "DefaultTime2Wait": "2",
        "DefaultTime2Retain": "20",
        "ErrorRecoveryLevel": "0",
        "MaxConnections": "1",
    }


@pytest.mark.conformance(18)
def test_hexadecimal_numbers() -> None:
    result = negotiate(MaxBurstLength="0x10000", FirstBurstLength="0X8000", TargetPortalGroupTag="0x01")
    assert (result.max_burst_length, result.first_burst_length) == (65536, 32768)
    assert result.target_portal_group_tag == 1


@pytest.mark.conformance(19)
@pytest.mark.parametrize(("declared", "limit", "text_limit"), [("512", 512, 512), ("0xFFFFFF", 0xFFFFFF, 8192)])
def test_the_directions_have_their_own_segment_length(declared: str, limit: int, text_limit: int) -> None:
    negotiation = Negotiation(NORMAL)
    assert negotiation.send_limit == 8192
    negotiation.receive([("MaxRecvDataSegmentLength", declared)], stage=OPERATIONAL)
    assert negotiation.result().target_max_recv_data_segment_length == limit
    assert negotiation.result().max_recv_data_segment_length == 262144
    assert negotiation.send_limit == text_limit


@pytest.mark.conformance(19)
def test_an_undeclared_segment_length() -> None:
    assert negotiate().target_max_recv_data_segment_length == 8192


@pytest.mark.conformance(14)
def test_the_first_burst_is_never_above_the_greatest() -> None:
    assert negotiate(MaxBurstLength="4096", FirstBurstLength="8192").first_burst_length == 4096
    assert negotiate(MaxBurstLength="4096").first_burst_length == 4096


@pytest.mark.conformance(20)
def test_connections_and_recovery_level_stay() -> None:
    result = negotiate(MaxConnections="8", ErrorRecoveryLevel="2")
    assert (result.max_connections, result.error_recovery_level) == (1, 0)


@pytest.mark.conformance(13)
@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        pytest.param({}, "HeaderDigest", "CRC32C", marks=pytest.mark.conformance(12)),
        pytest.param({}, "DataDigest", "CRC32C", marks=pytest.mark.conformance(12)),
        pytest.param({}, "DataDigest", "CRC32C,None", marks=pytest.mark.conformance(12)),
        pytest.param({"header_digest": True}, "HeaderDigest", "MD5\x1b", marks=pytest.mark.conformance(12)),
        ({"immediate_data": False}, "ImmediateData", "Yes"),
        ({"initial_r2t": True}, "InitialR2T", "No"),
        ({}, "DataPDUInOrder", "No"),
        ({}, "DataSequenceInOrder", "No"),
        ({}, "MaxBurstLength", "16776193"),
        ({}, "FirstBurstLength", "262145"),
        ({}, "MaxOutstandingR2T", "9"),
        ({"default_time2wait": 2}, "DefaultTime2Wait", "1"),
        ({}, "DefaultTime2Retain", "1"),
    ],
)
def test_results_outside_of_the_offer(config: dict[str, bool], name: str, value: str) -> None:
    with pytest.raises(NegotiationError, match=f"{name}=.* outside of the offer") as caught:
        negotiate(dataclasses.replace(NORMAL, **config), **{name: value})  # type: ignore[arg-type]
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MaxBurstLength", "511"),
        ("MaxBurstLength", "16777216"),
        ("MaxBurstLength", "1_000"),
        ("MaxConnections", "0"),
        ("MaxOutstandingR2T", "0"),
        ("ErrorRecoveryLevel", "3"),
        ("DefaultTime2Wait", "3601"),
        ("DefaultTime2Retain", "-1"),
        ("MaxRecvDataSegmentLength", "511"),
        ("MaxRecvDataSegmentLength", "Reject"),
        ("TargetPortalGroupTag", "65536"),
        pytest.param("InitialR2T", "yes", marks=pytest.mark.conformance(17)),
        pytest.param("ImmediateData", "Maybe", marks=pytest.mark.conformance(17)),
        pytest.param("DataPDUInOrder", "", marks=pytest.mark.conformance(17)),
    ],
)
def test_values_that_are_none(name: str, value: str) -> None:
    with pytest.raises(FormatError, match=f"{name} should"):
        negotiate(NORMAL, **{name: value})


@pytest.mark.conformance(9)
@pytest.mark.parametrize("name", [name for name, _ in Negotiation(NORMAL).offers()])
def test_keys_of_the_standard_must_be_understood(name: str) -> None:
    with pytest.raises(ProtocolError):
        negotiate(NORMAL, **{name: "NotUnderstood"})


@pytest.mark.conformance(9)
def test_not_understood_says_which() -> None:
    with pytest.raises(NegotiationError, match="doesn't understand MaxBurstLength"):
        negotiate(MaxBurstLength="NotUnderstood")


@pytest.mark.conformance(11)
def test_reject_leaves_what_was() -> None:
    rejected = {name: "Reject" for name, _ in Negotiation(NORMAL).offers() if name != "MaxRecvDataSegmentLength"}
    assert negotiate(NORMAL, **rejected) == NegotiatedParameters(max_recv_data_segment_length=262144)


@pytest.mark.conformance(11)
@pytest.mark.parametrize("name", ["HeaderDigest", "DataDigest"])
@pytest.mark.parametrize("value", ["Reject", "None", None])
def test_a_digest_that_is_required(name: str, value: str | None) -> None:
    config = dataclasses.replace(NORMAL, header_digest=name == "HeaderDigest", data_digest=name == "DataDigest")
    option = "header_digest" if name == "HeaderDigest" else "data_digest"
    with pytest.raises(NegotiationError, match=f"doesn't agree to {name}=CRC32C, which {option}=crc32c requires"):
        negotiate(config, **({} if value is None else {name: value}))


@pytest.mark.conformance(10)
@pytest.mark.parametrize("first", [True, False])
def test_first_burst_irrelevant(first: bool) -> None:
    answers = [("InitialR2T", "Yes"), ("ImmediateData", "No")]
    answers.insert(0 if first else 2, ("FirstBurstLength", "Irrelevant"))
    result = negotiate(NORMAL, **dict(answers))
    assert (result.initial_r2t, result.immediate_data) == (True, False)
    assert result.first_burst_length == 65536


@pytest.mark.conformance(10)
@pytest.mark.parametrize(
    "answers",
    [
        {"FirstBurstLength": "Irrelevant", "InitialR2T": "Yes", "ImmediateData": "Yes"},
        {"FirstBurstLength": "Irrelevant", "InitialR2T": "No", "ImmediateData": "No"},
        {"MaxBurstLength": "Irrelevant", "InitialR2T": "Yes", "ImmediateData": "No"},
        {"HeaderDigest": "Irrelevant"},
    ],
)
def test_what_isn_t_irrelevant(answers: dict[str, str]) -> None:
    with pytest.raises(NegotiationError, match="irrelevant, which it isn't"):
        negotiate(NORMAL, **answers)


def test_irrelevant_in_a_discovery_session() -> None:
    assert negotiate(DISCOVERY, ErrorRecoveryLevel="Irrelevant").error_recovery_level == 0
    with pytest.raises(NegotiationError, match="calls DataDigest irrelevant"):
        negotiate(DISCOVERY, DataDigest="Irrelevant")


# -- repeated keys, keys out of place


@pytest.mark.conformance(15)
@pytest.mark.parametrize(
    "name", ["MaxBurstLength", "TargetAlias", "TargetPortalGroupTag", "MaxRecvDataSegmentLength", "X-foo", "IFMarker"]
)
@pytest.mark.parametrize("together", [True, False])
def test_no_key_comes_twice(name: str, together: bool) -> None:
    value = "No" if name == "IFMarker" else "4096"
    negotiation = Negotiation(NORMAL)
    texts = [[(name, value), (name, value)]] if together else [[(name, value)], [(name, value)]]
    with pytest.raises(NegotiationError, match=f"{name} twice"):  # noqa: PT012  (which text raises is the point)
        for pairs in texts:
            negotiation.receive(pairs, stage=OPERATIONAL)
    # The first was fine.
    assert together or negotiation.result()


def test_only_addresses_may_come_twice() -> None:
    assert proposed(NORMAL, ("TargetAddress", "192.0.2.1"), ("TargetAddress", "192.0.2.2")) == []


def test_keys_of_the_security_stage() -> None:
    pairs = [
        ("TargetAlias", "disk"),
        ("TargetPortalGroupTag", "1"),
        ("TargetAddress", "192.0.2.1"),
        ("MaxRecvDataSegmentLength", "8192"),
    ]
    assert proposed(NORMAL, *pairs, stage=SECURITY) == []
    for name, value in Negotiation(NORMAL).offers():
        if name != "MaxRecvDataSegmentLength":
            with pytest.raises(NegotiationError, match=f"{name} before the operational stage"):
                proposed(NORMAL, (name, value), stage=SECURITY)


def test_what_only_initiators_declare() -> None:
    # An echo is harmless; anything else is not.
    assert proposed(NORMAL, *Negotiation(NORMAL).identity(), stage=SECURITY) == []
    for pair in (("TargetName", "iqn.other"), ("SendTargets", "All"), ("SessionType", "Discovery")):
        with pytest.raises(NegotiationError, match=f"{pair[0]}, which only an initiator"):
            proposed(NORMAL, pair)


# -- proposals


@pytest.mark.conformance(16)
@pytest.mark.parametrize(
    ("config", "name", "value", "answer"),
    [
        (NORMAL, "X-com.example.key", "anything", "NotUnderstood"),
        (NORMAL, "X#other", "", "NotUnderstood"),
        (NORMAL, "RDMAExtensions", "Yes", "NotUnderstood"),
        (NORMAL, "IFMarker", "No", "No"),
        (NORMAL, "OFMarker", "Yes", "No"),
        (NORMAL, "IFMarkInt", "2048~8192", "Reject"),
        (NORMAL, "OFMarkInt", "2048", "Reject"),
        (DISCOVERY, "OFMarker", "Yes", "No"),
        (NORMAL, "TaskReporting", "RFC3720", "RFC3720"),
        (NORMAL, "TaskReporting", "FastAbort,ResponseFence,RFC3720", "RFC3720"),
        (NORMAL, "TaskReporting", "FastAbort", "Reject"),
        (NORMAL, "iSCSIProtocolLevel", "2", "1"),
        (NORMAL, "iSCSIProtocolLevel", "0", "0"),
        (DISCOVERY, "iSCSIProtocolLevel", "1", "Irrelevant"),
        (DISCOVERY, "TaskReporting", "RFC3720", "Irrelevant"),
        (DISCOVERY, "MaxConnections", "8", "Irrelevant"),
        (DISCOVERY, "InitialR2T", "Yes", "Irrelevant"),
    ],
)
def test_proposals_of_the_target(config: LoginConfig, name: str, value: str, answer: str) -> None:
    any_stage = name not in KEYS or KEYS[name].security
    for stage in (OPERATIONAL, SECURITY) if any_stage else (OPERATIONAL,):
        negotiation = Negotiation(config)
        assert negotiation.receive([(name, value)], stage=stage) == [(name, answer)]
        assert negotiation.result() == NegotiatedParameters(max_recv_data_segment_length=262144)


@pytest.mark.conformance(17)
def test_a_marker_key_is_a_boolean() -> None:
    with pytest.raises(FormatError, match="IFMarker should be Yes or No"):
        proposed(NORMAL, ("IFMarker", "maybe"))


@pytest.mark.parametrize("name", ["X-foo", "IFMarker", "OFMarkInt", "TaskReporting", "iSCSIProtocolLevel"])
@pytest.mark.parametrize("value", ["NotUnderstood", "Irrelevant", "Reject"])
def test_answers_to_what_was_never_asked(name: str, value: str) -> None:
    with pytest.raises(NegotiationError, match=f"answered the key {name}"):
        proposed(NORMAL, (name, value))
