import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import FormatError, ProtocolError
from iscsifuse.iscsi import sendtargets, text
from iscsifuse.iscsi.pdu import NO_LUN, RESERVED_TAG
from iscsifuse.iscsi.request import TextRequest
from iscsifuse.iscsi.response import NopIn, Reject, TextResponse
from iscsifuse.iscsi.sendtargets import TargetAddress, TargetRecord, TextExchange, parse, parse_address

HERE = TargetAddress("192.0.2.9", 3261)
A = "iqn.2026-11.com.example:a"
B = "iqn.2026-11.com.example:b"

# -- addresses


@pytest.mark.conformance(42)
@pytest.mark.parametrize(
    ("value", "host", "port", "tag", "shown"),
    [
        ("10.0.0.1:3260,1", "10.0.0.1", 3260, 1, "10.0.0.1:3260,1"),
        ("10.0.0.1:860,0x10", "10.0.0.1", 860, 16, "10.0.0.1:860,16"),
        ("10.0.0.1,1", "10.0.0.1", 3260, 1, "10.0.0.1:3260,1"),
        ("10.0.0.1", "10.0.0.1", 3260, None, "10.0.0.1:3260"),
        ("[2001:DB8::1]:3260,65535", "2001:db8::1", 3260, 65535, "[2001:db8::1]:3260,65535"),
        ("[::ffff:192.0.2.1]", "::ffff:c000:201", 3260, None, "[::ffff:c000:201]:3260"),
        ("san.example.com:65535,0", "san.example.com", 65535, 0, "san.example.com:65535,0"),
        ("x", "x", 3260, None, "x:3260"),
        ("san_1.example.com.", "san_1.example.com.", 3260, None, "san_1.example.com.:3260"),
    ],
)
def test_parse_address(value: str, host: str, port: int, tag: int | None, shown: str) -> None:
    address = parse_address(value)
    assert (address.host, address.port, address.tag) == (host, port, tag)
    assert str(address) == shown


@pytest.mark.conformance("B6")
@pytest.mark.parametrize(
    "value",
    [
        "", ":3260", "host:", "host:0", "host:65536", "host:99999", "host:03260", "host:3260,", "host:3260,65536",
        "host,x", "host,1,2", "[::1", "::1", "2001:db8::1:3260", "[:::]:1", "[fe80::1%eth0]", "[host]:3260",
        "[]:3260", "-host", "a b", "host\n", "host\x1b[m", "a/b", "host:३", "x" * 300, "host:3260 ,1", "ho$t",
    ],
)  # fmt: skip
def test_parse_address_refuses(value: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_address(value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


# -- the text


@pytest.mark.conformance(42)
@pytest.mark.parametrize(
    ("pairs", "targets"),
    [
        ([], []),
        ([("TargetName", A)], [TargetRecord(A, (HERE,))]),
        (
            [("TargetName", A), ("TargetAddress", "10.0.0.1:3260,1"), ("TargetAddress", "[::1]:3260,2")],
            [TargetRecord(A, (TargetAddress("10.0.0.1", 3260, 1), TargetAddress("::1", 3260, 2)))],
        ),
        (
            [("TargetName", B), ("TargetName", A), ("TargetAddress", "san.example")],
            [TargetRecord(B, (HERE,)), TargetRecord(A, (TargetAddress("san.example"),))],
        ),
        (  # the same target and the same address again
            [
                ("TargetName", A),
                ("TargetAddress", "10.0.0.1:3260,1"),
                ("TargetName", B),
                ("TargetName", A),
                ("TargetAddress", "10.0.0.2:3260,1"),
                ("TargetAddress", "10.0.0.1:3260,1"),
            ],
            [
                TargetRecord(A, (TargetAddress("10.0.0.1", 3260, 1), TargetAddress("10.0.0.2", 3260, 1))),
                TargetRecord(B, (HERE,)),
            ],
        ),
    ],
)
def test_parse(pairs: list[tuple[str, str]], targets: list[TargetRecord]) -> None:
    assert parse(pairs, default=HERE) == (targets, [])


@pytest.mark.parametrize(
    ("pairs", "targets", "complaint"),
    [
        pytest.param(
            [("TargetName", A), ("MaxBurstLength", "512"), ("TargetAddress", "x")],
            [TargetRecord(A, (TargetAddress("x"),))],
            "the key MaxBurstLength doesn't belong",
            marks=pytest.mark.conformance(40),
        ),
        pytest.param(
            [("TargetName", "../\x1b"), ("TargetAddress", "x"), ("TargetName", A)],
            [TargetRecord(A, (HERE,))],
            "a target was left out",
            marks=pytest.mark.conformance("B6"),
        ),
        ([("TargetAddress", "x\n"), ("TargetName", A)], [TargetRecord(A, (HERE,))], r"'x\\n' came before any target"),
        (
            [("TargetName", A), ("TargetAddress", "x:0"), ("TargetAddress", "y")],
            [TargetRecord(A, (TargetAddress("y"),))],
            f"an address of {A} was left out",
        ),
    ],
)
def test_what_can_t_be_used_is_left_out(
    pairs: list[tuple[str, str]], targets: list[TargetRecord], complaint: str
) -> None:
    found, warnings = parse(pairs, default=HERE)
    assert found == targets
    (warning,) = warnings
    assert re.search(complaint, warning)
    assert warning.isprintable()


def test_a_target_without_any_usable_address_is_left_out() -> None:
    found, warnings = parse([("TargetName", A), ("TargetAddress", "x:0"), ("TargetName", B)], default=HERE)
    assert found == [TargetRecord(B, (HERE,))]
    assert len(warnings) == 2
    assert "no address that can be used" in warnings[1]


@pytest.mark.conformance(43)
def test_ten_thousand_targets() -> None:
    pairs = [
        pair
        for number in range(10_000)
        for pair in (("TargetName", f"{A}{number}"), ("TargetAddress", "10.0.0.1:3260,1"))
    ]
    data = text.encode(pairs)
    exchange = TextExchange([("SendTargets", "All")], itt=1)
    request: TextRequest | None = exchange.start()
    started = time.process_time()
    pieces = text.split(data, 8192)
    for number, piece in enumerate(pieces):
        assert request is not None
        last = number == len(pieces) - 1
        ttt = RESERVED_TAG if last else number
        request = exchange.receive(TextResponse(itt=1, final=last, cont=not last, ttt=ttt, data=piece))
    found, warnings = parse(exchange.pairs, default=HERE)
    assert time.process_time() - started < 5
    assert len(found) == 10_000
    assert warnings == []


@pytest.mark.conformance("B10")
def test_warnings_don_t_grow_without_end() -> None:
    found, warnings = parse([("TargetName", "bad")] * 1000, default=HERE)
    assert found == []
    assert len(warnings) == 101
    assert warnings[-1] == "... and 900 more"


@pytest.mark.conformance("B12")
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["TargetName", "TargetAddress", "Other"]),
            st.sampled_from([A, B, "10.0.0.1", "[::1]:1,1"]) | st.text(max_size=20),
        )
    )
)
def test_parse_never_crashes(pairs: list[tuple[str, str]]) -> None:
    targets, warnings = parse(pairs, default=HERE)
    names = [target.name for target in targets]
    assert len(set(names)) == len(names)
    assert all(target.addresses for target in targets)
    assert all(warning.isprintable() for warning in warnings)


# -- the exchange


def exchange() -> TextExchange:
    started = TextExchange([("SendTargets", "All")], itt=77)
    assert started.pairs == []
    return started


@pytest.mark.conformance(36)
def test_the_first_request() -> None:
    one = exchange()
    assert one.itt == 77
    assert one.start() == TextRequest(
        itt=77, ttt=0xFFFFFFFF, lun=NO_LUN, final=True, cont=False, immediate=False, data=b"SendTargets=All\0"
    )


def test_one_response() -> None:
    one = exchange()
    assert one.receive(TextResponse(itt=77, data=b"TargetName=a\0")) is None
    assert one.done
    assert one.pairs == [("TargetName", "a")]


@pytest.mark.conformance(37)
def test_an_answer_in_several_responses() -> None:
    one = exchange()
    lun = b"\0\1\2\3\4\5\6\7"
    more = one.receive(TextResponse(itt=77, final=False, ttt=5, lun=lun, data=b"TargetName=a\0"))
    assert more == TextRequest(itt=77, ttt=5, lun=lun, final=True)
    more = one.receive(TextResponse(itt=77, final=False, cont=True, ttt=6, data=b"TargetNa"))
    assert more == TextRequest(itt=77, ttt=6, lun=NO_LUN, final=True)
    assert one.pairs == []
    assert not one.done
    assert one.receive(TextResponse(itt=77, data=b"me=b\0")) is None
    assert one.pairs == [("TargetName", "a"), ("TargetName", "b")]


@pytest.mark.conformance(38)
def test_a_tag_in_a_final_response_is_ignored() -> None:
    one = exchange()
    assert one.receive(TextResponse(itt=77, final=True, ttt=5, data=b"TargetName=a\0")) is None
    assert one.pairs == [("TargetName", "a")]


@pytest.mark.conformance(39)
def test_not_final_without_a_tag() -> None:
    with pytest.raises(ProtocolError, match="without a Target Transfer Tag"):
        exchange().receive(TextResponse(itt=77, final=False, ttt=RESERVED_TAG))


@pytest.mark.conformance(41)
def test_reject_gives_the_sequence_up() -> None:
    one = exchange()
    one.receive(TextResponse(itt=77, final=False, ttt=5, data=b"TargetName=a\0"))
    with pytest.raises(ProtocolError, match=r"rejected the Text Request \(reason 0x05\)"):
        one.receive(Reject(reason=5))
    assert one.pairs == []


def test_final_and_continued() -> None:
    with pytest.raises(ProtocolError, match="final and says that its text goes on"):
        exchange().receive(TextResponse(itt=77, final=True, cont=True))


def test_what_answers_no_text_request() -> None:
    with pytest.raises(ProtocolError, match="a NopIn that answers no"):
        exchange().receive(NopIn(itt=77))
    with pytest.raises(ProtocolError, match="a TextResponse that answers no"):
        exchange().receive(TextResponse(itt=78))
    one = exchange()
    one.receive(TextResponse(itt=77))
    with pytest.raises(ProtocolError, match="answers no Text Request"):
        one.receive(TextResponse(itt=77))


@pytest.mark.conformance(43)
def test_text_beyond_the_limit() -> None:
    one = TextExchange([("SendTargets", "All")], itt=77, limit=100)
    one.receive(TextResponse(itt=77, final=False, cont=True, ttt=5, data=b"x" * 100))
    with pytest.raises(FormatError, match="more than 100 bytes"):
        one.receive(TextResponse(itt=77, final=False, cont=True, ttt=5, data=b"x"))


@pytest.mark.conformance(37)
@pytest.mark.parametrize("cont", [True, False])
@pytest.mark.parametrize("cut", range(1, 26))
def test_an_answer_that_is_cut_anywhere(cut: int, cont: bool) -> None:
    data = b"TargetName=a\0TargetName=b\0"
    one = exchange()
    one.receive(TextResponse(itt=77, final=False, cont=cont, ttt=5, data=data[:cut]))
    one.receive(TextResponse(itt=77, data=data[cut:]))
    assert one.pairs == [("TargetName", "a"), ("TargetName", "b")]


@pytest.mark.conformance("B4")
@pytest.mark.parametrize("cont", [True, False])
def test_responses_for_ever(monkeypatch: pytest.MonkeyPatch, cont: bool) -> None:
    monkeypatch.setattr(sendtargets, "MAX_EXCHANGES", 10)
    one = exchange()
    for _ in range(10):
        assert one.receive(TextResponse(itt=77, final=False, cont=cont, ttt=5)) is not None
    with pytest.raises(ProtocolError, match="more than 10 responses"):
        one.receive(TextResponse(itt=77, final=False, cont=cont, ttt=5))
