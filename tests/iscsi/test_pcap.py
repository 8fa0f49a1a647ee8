"""A real array (EMC) and a real initiator (VMware ESX), recorded in 2012, against the codec and the login."""

import dataclasses
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from iscsifuse.errors import FormatError
from iscsifuse.iscsi.chap import ChallengeMemory
from iscsifuse.iscsi.login import LoginMachine
from iscsifuse.iscsi.parameters import LoginConfig
from iscsifuse.iscsi.pdu import Opcode, Pdu, decode_stream
from iscsifuse.iscsi.request import LoginRequest, TextRequest
from iscsifuse.iscsi.response import LoginResponse, TargetPdu, TextResponse
from iscsifuse.iscsi.sendtargets import TargetAddress, TextExchange, parse
from support.pcap import Segment, Stretch, read_segments, stretches

CAPTURE = Path(__file__).parents[3] / "shared" / "data" / "iscsi_login.pcap"
PORT = 3260
ISID = bytes.fromhex("00023d000000")

needs_capture = pytest.mark.skipif(not CAPTURE.exists(), reason="the capture iscsi_login.pcap isn't here")
needs_tshark = pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark isn't installed")


@dataclasses.dataclass(frozen=True)
class Captured:
    frame: int
    raw: bytes
    pdu: Pdu


def follow(stretch: Stretch, start: int) -> list[Captured] | None:
    """The PDUs from there to the end of the stretch, None where they are none of this direction."""
    found: list[Captured] = []
    position = start
    from_target = stretch.source[1] == PORT
    while True:
        try:
            decoded = decode_stream(memoryview(stretch.data)[position:])
        except FormatError:
            return None
        if decoded is None:
            return found
        pdu, length = decoded
        if isinstance(pdu, TargetPdu) is not from_target:
            return None
        end = position + length
        found.append(Captured(stretch.frame_of(end - 1), bytes(stretch.data[position:end]), pdu))
        position = end


@cache
def captured() -> tuple[Captured, ...]:
    """All PDUs of the capture. After a hole, a stretch goes on with the first segment that begins a PDU."""
    result: list[Captured] = []
    for stretch in stretches(read_segments(CAPTURE)):
        for start in stretch.starts:
            found = follow(stretch, start)
            if found:
                result += found
                break
    return tuple(sorted(result, key=lambda one: one.frame))


def of(opcode: Opcode) -> Iterator[Pdu]:
    return (one.pdu for one in captured() if opcode == one.pdu.OPCODE)


@needs_capture
def test_every_pdu_encodes_to_the_bytes_that_were_captured() -> None:
    assert len(captured()) == 183
    for one in captured():
        assert one.pdu.encode() == one.raw, f"frame {one.frame}"


@needs_capture
def test_what_is_in_the_capture() -> None:
    assert Counter(one.pdu.OPCODE for one in captured()) == {
        Opcode.SCSI_COMMAND: 88,
        Opcode.DATA_IN: 60,
        Opcode.SCSI_RESPONSE: 20,
        Opcode.LOGIN_REQUEST: 2,
        Opcode.LOGIN_RESPONSE: 2,
        Opcode.TEXT_REQUEST: 2,
        Opcode.TEXT_RESPONSE: 2,
        Opcode.LOGOUT_REQUEST: 2,
        Opcode.LOGOUT_RESPONSE: 2,
        Opcode.NOP_OUT: 1,
        Opcode.NOP_IN: 1,
        Opcode.ASYNC_MESSAGE: 1,
    }


# What tshark calls a field, and what we do.
FIELDS = {
    "iscsi.opcode": "OPCODE",
    "iscsi.initiatortasktag": "itt",
    "iscsi.targettransfertag": "ttt",
    "iscsi.cmdsn": "cmd_sn",
    "iscsi.expstatsn": "exp_stat_sn",
    "iscsi.statsn": "stat_sn",
    "iscsi.expcmdsn": "exp_cmd_sn",
    "iscsi.maxcmdsn": "max_cmd_sn",
    "iscsi.scsicommand.F": "final",
    "iscsi.scsicommand.R": "read",
    "iscsi.scsicommand.W": "write",
    "iscsi.scsicommand.attr": "attribute",
    "iscsi.scsicommand.expecteddatatransferlength": "expected_data_transfer_length",
    "iscsi.scsidata.F": "final",
    "iscsi.scsidata.A": "acknowledge",
    "iscsi.scsidata.S": "has_status",
    "iscsi.scsidata.O": "overflow",
    "iscsi.scsidata.U": "underflow",
    "iscsi.scsiresponse.O": "overflow",
    "iscsi.scsiresponse.U": "underflow",
    "iscsi.scsiresponse.o": "bidi_overflow",
    "iscsi.scsiresponse.u": "bidi_underflow",
    "iscsi.scsiresponse.response": "response",
    "iscsi.scsiresponse.status": "status",
    "iscsi.scsiresponse.residualcount": "residual_count",
    "iscsi.scsidata.readresidualcount": "residual_count",
    "iscsi.expdatasn": "exp_data_sn",
    "iscsi.datasn": "data_sn",
    "iscsi.bufferOffset": "buffer_offset",
    "iscsi.login.T": "transit",
    "iscsi.login.C": "cont",
    "iscsi.login.csg": "csg",
    "iscsi.login.nsg": "nsg",
    "iscsi.versionmax": "version_max",
    "iscsi.versionmin": "version_min",
    "iscsi.versionactive": "version_active",
    "iscsi.tsih": "tsih",
    "iscsi.cid": "cid",
    "iscsi.text.F": "final",
    "iscsi.text.C": "cont",
    "iscsi.logout.reason": "reason",
    "iscsi.logout.response": "response",
    "iscsi.time2wait": "time2wait",
    "iscsi.time2retain": "time2retain",
    "iscsi.asyncevent": "event",
    "iscsi.eventvendorcode": "vendor_code",
    "iscsi.parameter1": "parameter1",
    "iscsi.parameter2": "parameter2",
    "iscsi.parameter3": "parameter3",
}
SPECIAL = ("iscsi.datasegmentlength", "iscsi.totalahslength", "iscsi.isid", "iscsi.login.status", "iscsi.keyvalue")


def number(value: str) -> int:
    return {"True": 1, "False": 0}[value] if value in ("True", "False") else int(value, 0)


@needs_capture
@needs_tshark
def test_tshark_reads_the_same_fields() -> None:
    names = [*FIELDS, *SPECIAL]
    arguments = [part for name in ("frame.number", *names) for part in ("-e", name)]
    command = [
        "tshark",
        "-r",
        str(CAPTURE),
        "-Y",
        "iscsi.opcode",
        "-T",
        "fields",
        "-E",
        "separator=/t",
        "-E",
        "aggregator=|",
    ]
    output = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout
    ours = {one.frame: one.pdu for one in captured()}
    rows = [line.split("\t") for line in output.splitlines()]
    assert [int(row[0]) for row in rows] == sorted(ours)
    compared: Counter[str] = Counter()
    for row in rows:
        frame, pdu = int(row[0]), ours[int(row[0])]
        for name, value in zip(names, row[1:], strict=True):
            if not value:
                continue
            compared[name] += 1
            where = f"{name} of frame {frame}"
            if name in FIELDS:
                # Expected data and data of one PDU can show a field twice; both are then the same.
                assert {number(part) for part in value.split("|")} == {int(getattr(pdu, FIELDS[name]))}, where
            elif name == "iscsi.datasegmentlength":
                assert number(value) == len(pdu.data), where
            elif name == "iscsi.totalahslength":
                assert number(value) == len(pdu.ahs) // 4, where
            elif name == "iscsi.isid":
                assert isinstance(pdu, LoginRequest | LoginResponse)
                assert bytes.fromhex(value.replace(":", "")) == pdu.isid, where
            elif name == "iscsi.login.status":
                assert isinstance(pdu, LoginResponse)
                assert number(value) == pdu.status_class << 8 | pdu.status_detail, where
            else:
                assert isinstance(pdu, LoginRequest | LoginResponse | TextRequest | TextResponse)
                assert value.encode().replace(b"|", b"\0") + b"\0" == pdu.data, where
    assert set(compared) == set(names), "a field that was never compared proves nothing"


def log_in(config: LoginConfig, data: bytes) -> LoginMachine:
    """Our login, answered by the array's text."""
    machine = LoginMachine(config, isid=ISID, itt=5, cmd_sn=9, random=bytes, challenges=ChallengeMemory())
    machine.start()
    common = LoginResponse(itt=5, isid=ISID, stat_sn=0xFFFFFFFF, exp_cmd_sn=9, max_cmd_sn=39)
    opened = dataclasses.replace(common, transit=True, csg=0, nsg=1, data=b"AuthMethod=None\0")
    (request,) = machine.receive(opened)
    assert request.transit
    answer = dataclasses.replace(common, transit=True, csg=1, nsg=3, stat_sn=0, tsih=12, data=data)
    assert machine.receive(answer) == []
    return machine


@needs_capture
@pytest.mark.conformance(6)
@pytest.mark.conformance(16)
def test_the_array_s_login_is_accepted() -> None:
    for answer in of(Opcode.LOGIN_RESPONSE):
        machine = log_in(LoginConfig(initiator_name="iqn.2026-11.com.example:us", target_name=None), answer.data)
        assert machine.done
        parameters = machine.result.parameters
        assert parameters.target_max_recv_data_segment_length == 65536
        assert parameters.target_portal_group_tag == 1
        assert parameters.default_time2wait == 2
        assert machine.result.next_cmd_sn == 9
        assert machine.result.exp_stat_sn == 1


@needs_capture
def test_the_array_s_login_is_accepted_for_a_target() -> None:
    # It answers few of the keys of a normal session; the others keep the standard's defaults.
    answer = next(of(Opcode.LOGIN_RESPONSE))
    config = LoginConfig(initiator_name="iqn.2026-11.com.example:us", target_name="iqn.1992-05.com.emc:disk")
    parameters = log_in(config, answer.data).result.parameters
    assert parameters.initial_r2t
    assert parameters.first_burst_length == 65536
    assert parameters.max_outstanding_r2t == 1
    assert parameters.max_recv_data_segment_length == 262144


@needs_capture
@pytest.mark.conformance(36)
def test_the_array_s_targets_are_found() -> None:
    for asked, answer in zip(of(Opcode.TEXT_REQUEST), of(Opcode.TEXT_RESPONSE), strict=True):
        exchange = TextExchange([("SendTargets", "All")], itt=answer.itt)
        ours = exchange.start()
        assert isinstance(asked, TextRequest)
        assert dataclasses.replace(ours, cmd_sn=asked.cmd_sn, exp_stat_sn=asked.exp_stat_sn) == asked
        assert exchange.receive(answer) is None
        targets, warnings = parse(exchange.pairs, default=TargetAddress("192.0.2.1"))
        assert warnings == []
        (target,) = targets
        assert target.name == "iqn.1992-05.com.emc:bb0050568c51390000-2"
        assert target.addresses == (TargetAddress("10.131.13.10", 3260, 1),)


# -- the reader of captures itself


def segment(sequence: int, payload: bytes, *, frame: int = 1, port: int = 1) -> Segment:
    there, here = ("192.0.2.1", PORT), ("192.0.2.2", port)
    return Segment(frame=frame, source=there, destination=here, sequence=sequence, payload=payload)


def test_stretches_join_what_belongs_together() -> None:
    parts = [
        segment(0xFFFFFFFE, b"abc", frame=1),
        segment(4, b"ghi", frame=2),  # early
        segment(0xFFFFFFFE, b"abc", frame=3),  # again
        segment(0, b"cdef", frame=4),  # overlaps, across the wrap
        segment(100, b"xyz", frame=5),  # after a hole
        segment(0, b"other", frame=6, port=2),
    ]
    found = stretches(parts)
    assert [(bytes(one.data), one.frames, one.starts) for one in found] == [
        (b"abcdefghi", [1, 4, 2], [0, 3, 6]),
        (b"xyz", [5], [0]),
        (b"other", [6], [0]),
    ]
    assert [found[0].frame_of(offset) for offset in (0, 2, 3, 8)] == [1, 1, 4, 2]


def packet(
    *, vlan: bool = False, ipv6: bool = False, protocol: int = 6, fragment: int = 0, syn: bool = False
) -> bytes:
    tcp = struct.pack(">HHIIBBHHH", 3260, 1000, 41 if syn else 42, 0, 0x50, 2 if syn else 0x10, 0, 0, 0) + b"hello"
    kind = 0x86DD if ipv6 else 0x0800
    ethernet = bytes(12) + (struct.pack(">HH", 0x8100, 7) if vlan else b"") + struct.pack(">H", kind)
    if ipv6:
        return (
            ethernet
            + struct.pack(">IHBB", 6 << 28, len(tcp), protocol, 64)
            + bytes(15)
            + b"\1"
            + bytes(15)
            + b"\2"
            + tcp
        )
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, fragment, 64, protocol, 0, b"\x7f\0\0\1", b"\x7f\0\0\2"
    )
    return ethernet + header + tcp + b"\0\0padding"[: 0 if len(tcp) > 26 else 2]


def write_pcap(path: Path, packets: list[bytes], *, order: str = "<", link: int = 1, cut: int = 0) -> None:
    head = struct.pack(order + "IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, link)
    body = b"".join(
        struct.pack(order + "IIII", 0, 0, len(one) - cut, len(one)) + one[: len(one) - cut] for one in packets
    )
    path.write_bytes(head + body)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (packet(), 1),
        (packet(vlan=True), 1),
        (packet(ipv6=True), 1),
        (packet(syn=True), 1),
        (packet(protocol=17), 0),
        (packet(ipv6=True, protocol=17), 0),
        (packet(fragment=0x2000), 0),
        (bytes(12) + b"\x08\x06" + bytes(46), 0),
    ],
)
def test_read_segments(tmp_path: Path, order: str, one: bytes, expected: int) -> None:
    path = tmp_path / "capture"
    write_pcap(path, [one, one], order=order)
    found = list(read_segments(path))
    assert [(each.payload, each.sequence, each.frame) for each in found] == [(b"hello", 42, 1), (b"hello", 42, 2)][
        : 2 * expected
    ]
    write_pcap(path, [one], order=order, cut=1)
    assert list(read_segments(path)) == []


def test_read_segments_of_another_link(tmp_path: Path) -> None:
    write_pcap(tmp_path / "capture", [], link=113)
    with pytest.raises(ValueError, match="link type 113"):
        list(read_segments(tmp_path / "capture"))
