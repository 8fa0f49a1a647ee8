import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import DigestError, FormatError
from iscsifuse.iscsi.pdu import NO_LUN, Opcode, Pdu, decode, decode_stream, padding, split_lengths
from iscsifuse.iscsi.request import (
    DataOut,
    LoginRequest,
    LogoutReason,
    LogoutRequest,
    NopOut,
    ScsiCommand,
    SnackRequest,
    TaskAttribute,
    TaskFunction,
    TaskManagementRequest,
    TextRequest,
)
from iscsifuse.iscsi.response import (
    R2T,
    AsyncEvent,
    AsyncMessage,
    DataIn,
    LoginResponse,
    LogoutResponse,
    NopIn,
    Reject,
    RejectReason,
    ScsiResponse,
    TaskManagementResponse,
    TaskResponse,
    TextResponse,
)

LUN_1 = bytes.fromhex("0001000000000000")
LUN = bytes.fromhex("a1a2a3a4a5a6a7a8")

# Bytes that an array (EMC) and an initiator (VMware ESX) exchanged in 2012, with what Wireshark says they mean.
CAPTURED: list[tuple[str, Pdu]] = [
    (
        (
            "3280000000000014 0000000000000000 ffffffff00000000 0000025d00000225 0000024300000000 0000000000000000"
            "0012f00006000000 000a000000003f0e 00c00000"
        ),
        AsyncMessage(
            stat_sn=605,
            exp_cmd_sn=549,
            max_cmd_sn=579,
            event=AsyncEvent.SCSI_EVENT,
            data=bytes.fromhex("0012f00006000000000a000000003f0e00c00000"),
        ),
    ),
    (
        (
            "23870000000000ad 00023d000000000c 0000000000000000 0000000000000001 0000001f00000000 0000000000000000"
            "4865616465724469676573743d4e6f6e6500446174614469676573743d4e6f6e650044656661756c7454696d6532576169743d320044"
            "656661756c7454696d653252657461696e3d300049464d61726b65723d4e6f004f464d61726b65723d4e6f004572726f725265636f76"
            "6572794c6576656c3d3000546172676574506f7274616c47726f75705461673d31004d617852656376446174615365676d656e744c65"
            "6e6774683d363535333600000000"
        ),
        LoginResponse(
            itt=0,
            transit=True,
            csg=1,
            nsg=3,
            isid=bytes.fromhex("00023d000000"),
            tsih=12,
            stat_sn=0,
            exp_cmd_sn=1,
            max_cmd_sn=31,
            data=(
                b"HeaderDigest=None\0DataDigest=None\0DefaultTime2Wait=2\0DefaultTime2Retain=0\0IFMarker=No\0OFMarker=No\0"
                b"ErrorRecoveryLevel=0\0TargetPortalGroupTag=1\0MaxRecvDataSegmentLength=65536\0"
            ),
        ),
    ),
    (
        (
            "0480000000000010 0000000000000000 00000001ffffffff 0000000100000001 0000000000000000 0000000000000000"
            "53656e64546172676574733d416c6c00"
        ),
        TextRequest(itt=1, cmd_sn=1, exp_stat_sn=1, data=b"SendTargets=All\0"),
    ),
    (
        (
            "2480000000000056 0000000000000000 00000001ffffffff 0000000100000002 0000002000000000 0000000000000000"
            "5461726765744e616d653d69716e2e313939322d30352e636f6d2e656d633a6262303035303536386335313339303030302d32005461"
            "72676574416464726573733d31302e3133312e31332e31303a333236302c31000000"
        ),
        TextResponse(
            itt=1,
            stat_sn=1,
            exp_cmd_sn=2,
            max_cmd_sn=32,
            data=b"TargetName=iqn.1992-05.com.emc:bb0050568c51390000-2\0TargetAddress=10.131.13.10:3260,1\0",
        ),
    ),
    (
        "4680000000000000 0000000000000000 0000000200000000 0000000200000002 0000000000000000 0000000000000000",
        LogoutRequest(itt=2, immediate=True, reason=LogoutReason.CLOSE_SESSION, cmd_sn=2, exp_stat_sn=2),
    ),
    (
        "2680000000000000 0000000000000000 0000000200000000 0000000200000002 0000002000000000 0002000000000000",
        LogoutResponse(itt=2, stat_sn=2, exp_cmd_sn=2, max_cmd_sn=32, time2wait=2, time2retain=0),
    ),
    (
        "4080000000000000 0000000000000000 5b020000ffffffff 000002250000025e 0000000000000000 0000000000000000",
        NopOut(itt=0x5B020000, immediate=True, cmd_sn=549, exp_stat_sn=606),
    ),
    (
        "2080000000000000 0000000000000000 5b020000ffffffff 0000025e00000225 0000024300000000 0000000000000000",
        NopIn(itt=0x5B020000, stat_sn=606, exp_cmd_sn=549, max_cmd_sn=579),
    ),
    (
        "01c1000000000000 0000000000000000 5c02000000000808 000002250000025f a000000000000000 0808000000000000",
        ScsiCommand(
            itt=0x5C020000,
            read=True,
            attribute=TaskAttribute.SIMPLE,
            expected_data_transfer_length=2056,
            cmd_sn=549,
            exp_stat_sn=607,
            cdb=bytes.fromhex("a0000000000000000808000000000000"),
        ),
    ),
    (
        (
            "2583000000000010 0000000000000000 5c020000ffffffff 0000025f00000226 0000024400000000 00000000000007f8"
            "00000008000000000001000000000000"
        ),
        DataIn(
            itt=0x5C020000,
            has_status=True,
            underflow=True,
            stat_sn=607,
            exp_cmd_sn=550,
            max_cmd_sn=580,
            residual_count=2040,
            data=bytes.fromhex("00000008000000000001000000000000"),
        ),
    ),
    (
        "2180000000000000 0000000000000000 6602000000000000 0000026900000230 0000024e00000000 0000000000000000",
        ScsiResponse(itt=0x66020000, stat_sn=617, exp_cmd_sn=560, max_cmd_sn=590),
    ),
]

# Laid out by hand from the figures of RFC 7143, every field with a value of its own.
BY_HAND: list[tuple[str, Pdu]] = [
    (  # §11.3
        (
            "41e4000000000002 a1a2a3a4a5a6a7a8 0102030405060708 090a0b0c0d0e0f10 1112131415161718 191a1b1c1d1e1f20"
            "aabb0000"
        ),
        ScsiCommand(
            immediate=True,
            read=True,
            write=True,
            attribute=TaskAttribute.ACA,
            lun=LUN,
            itt=0x01020304,
            expected_data_transfer_length=0x05060708,
            cmd_sn=0x090A0B0C,
            exp_stat_sn=0x0D0E0F10,
            cdb=bytes(range(0x11, 0x21)),
            data=b"\xaa\xbb",
        ),
    ),
    (  # §11.3, not final, with an additional header
        (
            "0120000002000000 0001000000000000 0102030400000000 0000000000000000 0000000000000000 0000000000000000"
            "0005010011121314"
        ),
        ScsiCommand(
            final=False, write=True, attribute=0, lun=LUN_1, itt=0x01020304, ahs=bytes.fromhex("0005010011121314")
        ),
    ),
    (  # §11.4
        (
            "219e018000000004 0000000000000000 0102030405060708 090a0b0c0d0e0f10 1112131415161718 191a1b1c1d1e1f20"
            "0002f000"
        ),
        ScsiResponse(
            bidi_overflow=True,
            bidi_underflow=True,
            overflow=True,
            underflow=True,
            response=1,
            status=0x80,
            itt=0x01020304,
            snack_tag=0x05060708,
            stat_sn=0x090A0B0C,
            exp_cmd_sn=0x0D0E0F10,
            max_cmd_sn=0x11121314,
            exp_data_sn=0x15161718,
            bidi_residual_count=0x191A1B1C,
            residual_count=0x1D1E1F20,
            data=b"\x00\x02\xf0\x00",
        ),
    ),
    (  # §11.5
        "4285000000000000 a1a2a3a4a5a6a7a8 0102030405060708 090a0b0c0d0e0f10 1112131415161718 0000000000000000",
        TaskManagementRequest(
            function=TaskFunction.LOGICAL_UNIT_RESET,
            lun=LUN,
            itt=0x01020304,
            referenced_task_tag=0x05060708,
            cmd_sn=0x090A0B0C,
            exp_stat_sn=0x0D0E0F10,
            ref_cmd_sn=0x11121314,
            exp_data_sn=0x15161718,
        ),
    ),
    (  # §11.5, queued
        "0281000000000000 0000000000000000 01020304ffffffff 0000000000000000 0000000000000000 0000000000000000",
        TaskManagementRequest(immediate=False, itt=0x01020304),
    ),
    (  # §11.6
        "2280ff0000000000 0000000000000000 0102030400000000 090a0b0c0d0e0f10 1112131400000000 0000000000000000",
        TaskManagementResponse(
            response=TaskResponse.FUNCTION_REJECTED,
            itt=0x01020304,
            stat_sn=0x090A0B0C,
            exp_cmd_sn=0x0D0E0F10,
            max_cmd_sn=0x11121314,
        ),
    ),
    (  # §11.7, Data-Out
        (
            "0580000000000003 a1a2a3a4a5a6a7a8 0102030405060708 000000000d0e0f10 0000000015161718 191a1b1c00000000"
            "aabbcc00"
        ),
        DataOut(
            lun=LUN,
            itt=0x01020304,
            ttt=0x05060708,
            exp_stat_sn=0x0D0E0F10,
            data_sn=0x15161718,
            buffer_offset=0x191A1B1C,
            data=b"\xaa\xbb\xcc",
        ),
    ),
    (
        "0500000000000000 0000000000000000 01020304ffffffff 0000000000000000 0000000000000000 0000000000000000",
        DataOut(final=False, itt=0x01020304),
    ),
    (  # §11.7, Data-In
        (
            "2545000800000001 a1a2a3a4a5a6a7a8 0102030405060708 090a0b0c0d0e0f10 1112131415161718 191a1b1c1d1e1f20"
            "aa000000"
        ),
        DataIn(
            final=False,
            acknowledge=True,
            overflow=True,
            has_status=True,
            status=8,
            lun=LUN,
            itt=0x01020304,
            ttt=0x05060708,
            stat_sn=0x090A0B0C,
            exp_cmd_sn=0x0D0E0F10,
            max_cmd_sn=0x11121314,
            data_sn=0x15161718,
            buffer_offset=0x191A1B1C,
            residual_count=0x1D1E1F20,
            data=b"\xaa",
        ),
    ),
    (  # §11.8
        "3180000000000000 a1a2a3a4a5a6a7a8 0102030405060708 090a0b0c0d0e0f10 1112131415161718 191a1b1c1d1e1f20",
        R2T(
            lun=LUN,
            itt=0x01020304,
            ttt=0x05060708,
            stat_sn=0x090A0B0C,
            exp_cmd_sn=0x0D0E0F10,
            max_cmd_sn=0x11121314,
            r2t_sn=0x15161718,
            buffer_offset=0x191A1B1C,
            desired_data_transfer_length=0x1D1E1F20,
        ),
    ),
    (  # §11.9
        "3280000000000000 a1a2a3a4a5a6a7a8 ffffffff00000000 090a0b0c0d0e0f10 111213140107191a 1b1c1d1e00000000",
        AsyncMessage(
            lun=LUN,
            stat_sn=0x090A0B0C,
            exp_cmd_sn=0x0D0E0F10,
            max_cmd_sn=0x11121314,
            event=AsyncEvent.LOGOUT_REQUESTED,
            vendor_code=7,
            parameter1=0x191A,
            parameter2=0x1B1C,
            parameter3=0x1D1E,
        ),
    ),
    (  # §11.10
        (
            "4440000000000004 a1a2a3a4a5a6a7a8 0102030405060708 090a0b0c0d0e0f10 0000000000000000 0000000000000000"
            "413d6200"
        ),
        TextRequest(
            immediate=True,
            final=False,
            cont=True,
            lun=LUN,
            itt=0x01020304,
            ttt=0x05060708,
            cmd_sn=0x090A0B0C,
            exp_stat_sn=0x0D0E0F10,
            data=b"A=b\0",
        ),
    ),
    (  # §11.11
        (
            "2440000000000004 a1a2a3a4a5a6a7a8 0102030405060708 090a0b0c0d0e0f10 1112131400000000 0000000000000000"
            "413d6200"
        ),
        TextResponse(
            final=False,
            cont=True,
            lun=LUN,
            itt=0x01020304,
            ttt=0x05060708,
            stat_sn=0x090A0B0C,
            exp_cmd_sn=0x0D0E0F10,
            max_cmd_sn=0x11121314,
            data=b"A=b\0",
        ),
    ),
    (  # §11.12
        "4387020100000000 a1a2a3a4a5a6f1f2 01020304f3f40000 090a0b0c0d0e0f10 0000000000000000 0000000000000000",
        LoginRequest(
            transit=True,
            csg=1,
            nsg=3,
            version_max=2,
            version_min=1,
            isid=LUN[:6],
            tsih=0xF1F2,
            itt=0x01020304,
            cid=0xF3F4,
            cmd_sn=0x090A0B0C,
            exp_stat_sn=0x0D0E0F10,
        ),
    ),
    (
        (
            "4344000000000003 0000000000000000 0102030400000000 0000000000000000 0000000000000000 0000000000000000"
            "413d6200"
        ),
        LoginRequest(cont=True, csg=1, itt=0x01020304, data=b"A=b"),
    ),
    (  # §11.13
        "2341020100000000 a1a2a3a4a5a6f1f2 0102030400000000 090a0b0c0d0e0f10 1112131402030000 0000000000000000",
        LoginResponse(
            cont=True,
            nsg=1,
            version_max=2,
            version_active=1,
            isid=LUN[:6],
            tsih=0xF1F2,
            itt=0x01020304,
            stat_sn=0x090A0B0C,
            exp_cmd_sn=0x0D0E0F10,
            max_cmd_sn=0x11121314,
            status_class=2,
            status_detail=3,
        ),
    ),
    (  # §11.14
        "0681000000000000 0000000000000000 01020304f3f40000 090a0b0c0d0e0f10 0000000000000000 0000000000000000",
        LogoutRequest(
            immediate=False,
            reason=LogoutReason.CLOSE_CONNECTION,
            itt=0x01020304,
            cid=0xF3F4,
            cmd_sn=0x090A0B0C,
            exp_stat_sn=0x0D0E0F10,
        ),
    ),
    (  # §11.15
        "2680030000000000 0000000000000000 0102030400000000 090a0b0c0d0e0f10 1112131400000000 f1f2f3f400000000",
        LogoutResponse(
            response=3,
            itt=0x01020304,
            stat_sn=0x090A0B0C,
            exp_cmd_sn=0x0D0E0F10,
            max_cmd_sn=0x11121314,
            time2wait=0xF1F2,
            time2retain=0xF3F4,
        ),
    ),
    (  # §11.16
        "1082000000000000 a1a2a3a4a5a6a7a8 0102030405060708 000000000d0e0f10 0000000000000000 191a1b1c1d1e1f20",
        SnackRequest(
            snack_type=2,
            lun=LUN,
            itt=0x01020304,
            ttt=0x05060708,
            exp_stat_sn=0x0D0E0F10,
            beg_run=0x191A1B1C,
            run_length=0x1D1E1F20,
        ),
    ),
    (  # §11.17
        "3f80090000000000 0000000000000000 ffffffff00000000 090a0b0c0d0e0f10 1112131415161718 0000000000000000",
        Reject(
            reason=RejectReason.INVALID_PDU_FIELD,
            stat_sn=0x090A0B0C,
            exp_cmd_sn=0x0D0E0F10,
            max_cmd_sn=0x11121314,
            data_sn=0x15161718,
        ),
    ),
    (  # §11.18
        "0080000000000000 a1a2a3a4a5a6a7a8 ffffffff05060708 090a0b0c0d0e0f10 0000000000000000 0000000000000000",
        NopOut(immediate=False, lun=LUN, ttt=0x05060708, cmd_sn=0x090A0B0C, exp_stat_sn=0x0D0E0F10),
    ),
    (  # §11.19
        (
            "2080000000000001 a1a2a3a4a5a6a7a8 ffffffff05060708 090a0b0c0d0e0f10 1112131400000000 0000000000000000"
            "55000000"
        ),
        NopIn(
            lun=LUN, ttt=0x05060708, stat_sn=0x090A0B0C, exp_cmd_sn=0x0D0E0F10, max_cmd_sn=0x11121314, data=b"\x55"
        ),
    ),
]


@pytest.mark.parametrize(("raw", "pdu"), CAPTURED + BY_HAND, ids=lambda part: type(part).__name__.replace("str", "-"))
def test_golden_bytes(raw: str, pdu: Pdu) -> None:
    data = bytes.fromhex(raw)
    assert pdu.encode() == data
    assert decode_stream(data) == (pdu, len(data))


def test_every_kind_has_golden_bytes() -> None:
    assert {pdu.OPCODE for _, pdu in CAPTURED + BY_HAND} == set(Opcode)


KINDS = sorted({type(pdu) for _, pdu in BY_HAND}, key=lambda kind: kind.OPCODE)
WORD = st.integers(0, 0xFFFFFFFF)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "attribute": st.integers(0, 7),
    "cdb": st.binary(min_size=16, max_size=16),
    "cid": st.integers(0, 0xFFFF),
    "csg": st.integers(0, 3),
    "event": st.integers(0, 255),
    "function": st.integers(0, 0x7F),
    "isid": st.binary(min_size=6, max_size=6),
    "lun": st.binary(min_size=8, max_size=8),
    "nsg": st.integers(0, 3),
    "reason": st.integers(0, 0x7F),
    "response": st.integers(0, 255),
    "snack_type": st.integers(0, 15),
    "status": st.integers(0, 255),
    "status_class": st.integers(0, 255),
    "status_detail": st.integers(0, 255),
    "vendor_code": st.integers(0, 255),
    "ahs": st.integers(0, 3).flatmap(lambda words: st.binary(min_size=4 * words, max_size=4 * words)),
    "data": st.binary(max_size=40),
} | {
    name: st.integers(0, 0xFFFF)
    for name in ("parameter1", "parameter2", "parameter3", "time2wait", "time2retain", "tsih")
} | {name: st.integers(0, 255) for name in ("version_active", "version_max", "version_min")}  # fmt: skip


@st.composite
def pdus(draw: st.DrawFn) -> Pdu:
    kind = draw(st.sampled_from(KINDS))
    values = {}
    for field in dataclasses.fields(kind):
        usual = st.booleans() if field.type is bool or isinstance(field.default, bool) else WORD
        values[field.name] = draw(FIELDS.get(field.name, usual))
    return kind(**values)


@pytest.mark.conformance(77)
@given(pdus(), st.booleans(), st.booleans(), st.binary(max_size=9))
def test_what_is_encoded_decodes(pdu: Pdu, header_digest: bool, data_digest: bool, behind: bytes) -> None:
    raw = pdu.encode(header_digest=header_digest, data_digest=data_digest)
    length = 48 + len(pdu.ahs) + 4 * header_digest + len(pdu.data) + (-len(pdu.data)) % 4
    assert len(raw) == length + (4 if data_digest and pdu.data else 0)
    decoded = decode_stream(raw + behind, header_digest=header_digest, data_digest=data_digest)
    assert decoded == (pdu, len(raw))
    for missing in (1, len(raw) // 2, len(raw)):
        part = raw[: len(raw) - missing]
        assert decode_stream(part, header_digest=header_digest, data_digest=data_digest) is None


@pytest.mark.conformance("B12")
@given(st.binary(min_size=48, max_size=48), st.binary(max_size=100), st.booleans(), st.booleans())
def test_anything_decodes_or_is_a_typed_error(
    header: bytes, rest: bytes, header_digest: bool, data_digest: bool
) -> None:
    for short in (header, header[:5] + bytes(2) + header[7:]):
        try:
            decoded = decode_stream(short + rest, header_digest=header_digest, data_digest=data_digest, max_data=8192)
        except (FormatError, DigestError):
            continue
        assert decoded is None or decoded[1] <= 48 + len(rest)


@pytest.mark.conformance("B2")
def test_a_segment_that_is_too_long_is_not_waited_for() -> None:
    header = bytes.fromhex("2480000000ffffff") + bytes(40)
    with pytest.raises(FormatError, match="16777215 bytes, but 8192 is the limit"):
        decode_stream(header, max_data=8192)
    assert decode_stream(header) is None
    exact = TextResponse(data=b"x" * 100).encode()
    assert decode_stream(exact, max_data=100) is not None
    with pytest.raises(FormatError):
        decode_stream(exact, max_data=99)


@pytest.mark.conformance(78)
@pytest.mark.parametrize("position", [0, 7, 20, 47, 48, 51, 52, 55])
def test_header_digest(position: int) -> None:
    raw = bytearray(NopIn(ahs=b"abcd", data=b"hello").encode(header_digest=True))
    assert decode_stream(raw, header_digest=True) is not None
    raw[position] ^= 1
    with pytest.raises(DigestError) as caught:
        decode_stream(raw, header_digest=True)
    assert caught.value.header


@pytest.mark.conformance(78)
def test_a_damaged_length_is_a_digest_error() -> None:
    raw = bytearray(NopIn(data=b"hello").encode(header_digest=True))
    raw[5] ^= 0x80  # 8 MiB more, and more than may be
    with pytest.raises(DigestError):
        decode_stream(raw, header_digest=True, max_data=8192)
    assert decode_stream(raw[:51], header_digest=True, max_data=8192) is None


@pytest.mark.conformance(77)
@pytest.mark.conformance(79)
@pytest.mark.parametrize("position", [48, 52, 53, 55, 56, 59])
def test_data_digest_covers_the_padding(position: int) -> None:
    raw = bytearray(NopIn(data=b"hello").encode(data_digest=True))
    assert len(raw) == 60
    raw[position] ^= 1
    with pytest.raises(DigestError) as caught:
        decode_stream(raw, data_digest=True)
    assert not caught.value.header


@pytest.mark.conformance(77)
def test_no_digest_of_an_empty_segment() -> None:
    assert len(NopIn().encode(data_digest=True)) == 48
    assert decode_stream(NopIn().encode(data_digest=True), data_digest=True) is not None


def test_decode_looks_at_its_arguments() -> None:
    header = TextResponse(data=b"abcd").header()
    assert decode(header, data=b"abcd") == TextResponse(data=b"abcd")
    for wrong in ({"data": b"abc"}, {"data": b"abcd", "ahs": bytes(4)}, {}):
        with pytest.raises(FormatError, match="lengths are not the ones"):
            decode(header, **wrong)
    with pytest.raises(FormatError, match="basic header of 47 bytes"):
        decode(header[:47], data=b"abcd")
    with pytest.raises(FormatError, match="unknown opcode 0x3e"):
        decode(b"\xbe" + header[1:], data=b"abcd")


def test_reserved_bits_are_not_looked_at() -> None:
    header = bytearray(NopIn(itt=5).header())
    header[0] |= 0xC0
    header[1] |= 0x3F
    header[47] = 0xFF
    assert decode(bytes(header)) == NopIn(itt=5)


@pytest.mark.parametrize("length", range(9))
def test_padding(length: int) -> None:
    assert (length + len(padding(length))) % 4 == 0
    assert len(padding(length)) < 4
    assert not any(padding(length))


def test_split_lengths() -> None:
    assert split_lengths(bytes(4) + b"\x02\x01\x02\x03") == (8, 0x010203)
    assert split_lengths(memoryview(bytes(4) + b"\xff\xff\xff\xff")) == (1020, 0xFFFFFF)


@pytest.mark.parametrize(
    "pdu", [NopOut(ahs=bytes(3)), NopOut(ahs=bytes(1024)), NopOut(data=bytes(0x1000000))], ids=["odd", "long", "data"]
)
def test_what_can_t_be_encoded(pdu: Pdu) -> None:
    with pytest.raises(ValueError, match=r"bytes$"):
        pdu.encode()


def test_the_longest_there_are() -> None:
    pdu = NopOut(lun=NO_LUN, ahs=bytes(1020), data=bytes(0xFFFFFF))
    decoded = decode_stream(pdu.encode())
    assert decoded is not None
    assert decoded[0] == pdu
