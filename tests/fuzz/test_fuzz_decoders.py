"""The checks of all decoders, over the corpus and over bytes that hypothesis makes up; atheris isn't needed here."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iscsifuse.iscsi.chap
import iscsifuse.iscsi.negotiation
import iscsifuse.iscsi.response
import iscsifuse.iscsi.sendtargets
import iscsifuse.iscsi.tasks
import iscsifuse.scsi.capacity
import iscsifuse.scsi.inquiry
import iscsifuse.scsi.lba_status
import iscsifuse.scsi.mode
import iscsifuse.scsi.sense
import iscsifuse.scsi.vpd
from fuzz.targets import CORPUS, TARGETS, FuzzTarget
from iscsifuse.cli.url import parse
from iscsifuse.errors import UrlError
from iscsifuse.iscsi.response import NopIn
from iscsifuse.iscsi.text import LOGIN_TEXT_LIMIT, encode

pytestmark = pytest.mark.conformance("B12")

MIB = 1 << 20
LOGIN = LOGIN_TEXT_LIMIT
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())


@every_target
def test_the_corpus_holds_no_finding(target: FuzzTarget) -> None:
    seeds = target.seeds()
    assert seeds
    for seed in seeds:
        target.run(seed.read_bytes())


def test_each_folder_of_the_corpus_belongs_to_a_target() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)


@st.composite
def changed(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with some bytes changed, put in, or cut out."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 6))
        data[start : start + length] = draw(st.binary(max_size=6))
    return bytes(data)


@every_target
def test_made_up_bytes_are_no_finding(target: FuzzTarget) -> None:
    seeds = [seed.read_bytes() for seed in target.seeds()]

    @settings(max_examples=150)
    @given(changed(seeds) | st.binary(max_size=target.max_length))
    def check(data: bytes) -> None:
        target.run(data)

    check()


# -- what comes in by the MiB, or says that it will, costs no more than that -----------------------------------------

HOSTILE = {
    "pdu": [b"\3" + NopIn(data=bytes(MIB - 1)).encode()[:48] + bytes(100)] * 2,
    "connection": [
        b"\0" + NopIn(data=bytes(MIB)).encode()[:48],
        b"\0" + b"\x25" + bytes(4) + b"\3\xff\xff" + bytes(40),
    ],
    "text": [encode([("X-a", "\xe9" * 4000)]) * 8, b"a=\xff" * LOGIN, b"=" * LOGIN, b"\xff" + b"\0" * LOGIN],
    "negotiation": [b"\0" + b"\0".join(b"X-%d=1" % number for number in range(LOGIN // 8))],
    "login": [b"\x80" + b"\x40\0\0\xff\xff" + bytes(65535) + b"\x40\0\0\xff\xff" + b"a" * 65535] * 2,
    "chap": [b"\1CHAP_A=5\0CHAP_I=1\0CHAP_C=0x" + b"1" * MIB, b"\1CHAP_A=" + b"9" * MIB],
    "sendtargets": [
        b"\xff" + b"\0" * MIB,
        b"\xff" + b"TargetName=iqn.2026-11.com.example:a\0" * 200,
        b"\x20" + b"TargetAddress=\0" * 300,
    ],
    "url": [b"\0iscsi://" + b"a" * MIB, b"\0iscsi://h/" + b"%25" * 100_000, b"\0iscsi://h/?" + b"&" * MIB],
    "report_luns": [b"\xff\xff\xff\xf8\0\0\0\0" + bytes(MIB), bytes(8) * 2],
    "vpd": [b"\0\x83\xff\xff" + bytes(MIB), b"\0\x80\xff\xff" + b"s" * MIB],
    "mode": [b"\xff\xff\0\0\0\0\0\0" + b"\x01\x00" * 40_000],
    "sense": [b"\x72\0\0\0\0\0\0\xff" + bytes(MIB)],
    "lba_status": [bytes(14) + b"\1\0" + b"\xff\xff\xff\xff" + bytes(MIB)],
}
"""Bytes of hostile input by target; none is so long that holding it a few times would be worth a remark."""


@pytest.mark.parametrize("name", HOSTILE)
def test_memory_and_time_are_bounded(name: str) -> None:
    for data in HOSTILE[name]:
        TARGETS[name].run(data)
        tracemalloc.start()
        try:
            TARGETS[name].check(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 16 * MIB, f"{len(data)} bytes took {peak / MIB:.0f} MiB"


# -- the checks themselves -------------------------------------------------------------------------------------------


def broken(*_arguments: Any, **_keywords: Any) -> Any:
    raise IndexError("as a decoder would that looks too far")


BREAKS: dict[str, tuple[object, str]] = {
    "pdu": (iscsifuse.iscsi.response.DataIn, "parse"),
    "connection": (iscsifuse.iscsi.tasks.Task, "place"),
    "negotiation": (iscsifuse.iscsi.negotiation, "_RESULTS"),
    "login": (iscsifuse.iscsi.negotiation.Negotiation, "receive"),
    "chap": (iscsifuse.iscsi.chap, "response"),
    "sendtargets": (iscsifuse.iscsi.sendtargets, "validate_iscsi_name"),
    "sense": (iscsifuse.scsi.sense, "_decode_fixed"),
    "inquiry": (iscsifuse.scsi.inquiry, "printable"),
    "vpd": (iscsifuse.scsi.vpd, "_whole_fields"),
    "capacity": (iscsifuse.scsi.capacity, "_checked"),
    "mode": (iscsifuse.scsi.mode, "_pages"),
    "lba_status": (iscsifuse.scsi.lba_status, "_provisioning"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_an_error_of_another_kind_is_a_finding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, attribute = BREAKS[name]
    monkeypatch.setattr(place, attribute, broken)
    with pytest.raises((IndexError, TypeError)):
        test_the_corpus_holds_no_finding(TARGETS[name])


def off_by_one(function: Callable[..., int]) -> Callable[..., int]:
    return lambda *arguments: function(*arguments) + 1


def test_a_decoder_that_reads_another_number_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iscsifuse.scsi.sense._number", off_by_one(iscsifuse.scsi.sense._number))
    with pytest.raises(AssertionError):
        test_the_corpus_holds_no_finding(TARGETS["sense"])


def test_a_digest_that_nobody_looks_at_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iscsifuse.iscsi.pdu.crc32c_bytes", lambda _: b"abcd")
    with pytest.raises(AssertionError):
        test_the_corpus_holds_no_finding(TARGETS["pdu"])


# -- what was found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["\udcff", "us\udc80er", "n\0l"])
def test_a_user_that_is_no_text_is_refused_in_our_words(user: str) -> None:
    with pytest.raises(UrlError, match="UTF-8"):
        parse(f"iscsi://{user}@host/")
