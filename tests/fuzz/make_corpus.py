"""Makes the corpus anew: ``PYTHONPATH=tests .venv/bin/python -m fuzz.make_corpus``.

Most of it is what tgtd and istgt really said: this records sessions with them (packets, as dumpcap sees them), takes
the PDUs out of the recording, and sorts what is in them by decoder. A few seeds are made by our own encoders, for
what neither of the two says. Needs tgt, istgt, and the right to capture on ``lo``; files named ``finding-*`` stay.

Logins are recorded with the ISID and the "random" bytes of the checks (`fuzz.login`), so that a target's proof in a
mutual CHAP is right there, too.
"""

import argparse
import hashlib
import re
import struct
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import trio

from fuzz import discovery
from fuzz.connection import FIRST_STAT_SN, LUN, READ_LENGTH, WRITE_LENGTH
from fuzz.login import (
    INITIATOR,
    ISID,
    RECORDS,
    SECRET,
    TARGET,
    TARGET_SECRET,
    TARGET_USER,
    USER,
    config_of,
    record_of,
    steady,
)
from fuzz.pdu import decoded
from fuzz.targets import CORPUS, TARGETS
from iscsifuse.errors import IscsifuseError, LoginError, NegotiationError
from iscsifuse.initiator import discovery as discovering
from iscsifuse.initiator import login as logins
from iscsifuse.initiator.inventory import scan
from iscsifuse.initiator.nexus import Nexus, open_nexus
from iscsifuse.initiator.settings import Portal, SessionSettings
from iscsifuse.iscsi import text
from iscsifuse.iscsi.pdu import NO_LUN, RESERVED_TAG, Pdu
from iscsifuse.iscsi.request import LoginRequest, ScsiCommand
from iscsifuse.iscsi.response import (
    R2T,
    AsyncMessage,
    DataIn,
    LoginResponse,
    LogoutResponse,
    NopIn,
    Reject,
    ScsiResponse,
    TargetPdu,
    TaskManagementResponse,
    TextResponse,
)
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi import lba_status, unmap, vpd
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.capacity import Capacity
from iscsifuse.scsi.lba_status import Extent, Provisioning
from iscsifuse.scsi.mode import CachingPage, ModeParameters
from iscsifuse.scsi.opcodes import Opcode as Scsi
from iscsifuse.scsi.opcodes import ServiceActionIn16
from iscsifuse.scsi.sense import Sense, SenseKey
from support.capture import Capture
from support.disks import random_file, sparse
from support.istgt import IstgtServer
from support.pcap import read_segments, stretches
from support.tgt import TgtServer

MIB = 1 << 20
_LONGEST = 3000
"""Bytes of a seed. Longer ones only make fuzzing slow."""
_MOST = 60
"""Captured seeds of one target, from one server."""
_MOST_OF_A_KIND = 3
"""PDUs with the same opcode, from one connection."""

_PROPOSALS: tuple[list[tuple[str, str]], ...] = (
    [("IFMarker", "Yes"), ("OFMarkInt", "1~2048"), ("X-com.example.key", "1"), ("iSCSIProtocolLevel", "2")],
    [("TaskReporting", "FastAbort,RFC3720"), ("MaxConnections", "4"), ("ErrorRecoveryLevel", "2")],
    [("InitiatorName", INITIATOR), ("SessionType", "Normal"), ("TargetAddress", "10.0.0.1"), ("TargetAddress", "h")],
    [("FirstBurstLength", "Irrelevant"), ("ImmediateData", "No"), ("InitialR2T", "Yes"), ("HeaderDigest", "None")],
    [("DataDigest", "Reject"), ("MaxBurstLength", "NotUnderstood"), ("DefaultTime2Wait", "3600")],
)
"""Keys that neither of the recorded targets would send."""

Seeds = dict[str, dict[bytes, str]]


def main() -> None:
    argparse.ArgumentParser(prog="python -m fuzz.make_corpus", description=__doc__.splitlines()[0]).parse_args()
    seeds: Seeds = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        for server, record in (("tgt", _record_tgt), ("istgt", _record_istgt)):
            place = Path(folder, server)
            place.mkdir()
            for number, (options, capture) in enumerate(record(place)):
                _sort(_pdus_of(capture, place / f"{number}.pcap"), options, server, seeds)
    _make(seeds)
    for name in TARGETS:
        _write(CORPUS / name, seeds[name])


# --- recording ---


def _record_tgt(folder: Path) -> Iterable[tuple[int, Capture]]:
    with TgtServer(folder) as server:
        disk, other = random_file(folder / "disk", 4 * MIB), sparse(folder / "other", 3 << 40)
        thin = sparse(folder / "thin", 16 * MIB)
        for name, chap, mutual in _accounts():
            digests = {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"} if name == TARGET + ":d" else None
            server.add_target(name, chap=chap, mutual=mutual, params=digests)
            server.add_lun(name, 1, disk, serial="FUZZ0001")
        server.add_lun(TARGET, 2, other, block_size=4096)
        server.add_lun(TARGET, 3, thin, params={"thin_provisioning": "1"})
        yield from _record(server.port, folder)


def _record_istgt(folder: Path) -> Iterable[tuple[int, Capture]]:
    server = IstgtServer(folder)
    for number, (name, chap, mutual) in enumerate(_accounts()):
        backing = {lun: random_file(folder / f"disk{number}{lun}", 4 * MIB) for lun in (0, 1)}
        server.add_target(name, backing, chap=chap, mutual=mutual)
    with server:
        yield from _record(server.port, folder)


def _accounts() -> Sequence[tuple[str, tuple[str, str] | None, tuple[str, str] | None]]:
    """Each target needs another name, which the seeds then lose again (`_renamed`)."""
    ours, theirs = (USER, SECRET.decode()), (TARGET_USER, TARGET_SECRET.decode())
    return (
        (TARGET, None, None),
        (TARGET + ":c", ours, None),
        (TARGET + ":m", ours, theirs),
        (TARGET + ":d", None, None),
    )


def _record(port: int, folder: Path) -> Iterable[tuple[int, Capture]]:
    """One recording for each way to log in; the number of the first is that of plain sessions."""
    # fuzz.login.config_of: nothing, both digests, discovery, CHAP, mutual CHAP, both again with MD5 only; a refusal.
    for options in (0, 24, 4, 1, 3, 33, 35, 64):
        capture = Capture(folder / f"{options}.pcapng", port=port)
        with capture, mock.patch.object(logins, "secrets", SimpleNamespace(token_bytes=steady)):
            logins._challenges.clear()
            with suppress(LoginError, NegotiationError):
                trio.run(_talk, options, port)
        yield options, capture


async def _talk(options: int, port: int) -> None:
    portal = Portal("127.0.0.1", port)
    config = config_of(options)
    settings = SessionSettings(
        initiator_name=INITIATOR,
        header_digest=config.header_digest,
        data_digest=config.data_digest,
        chap=config.chap,
        login_timeout=5,
        reconnect_timeout=0,
        read_only=False,
    )
    with (
        mock.patch("iscsifuse.initiator.nexus.make_isid", return_value=ISID),
        mock.patch("iscsifuse.initiator.discovery.make_isid", return_value=ISID),
    ):
        if options & 4:
            await discovering.discover(portal, settings)
            return
        suffix = {0: "", 24: ":d", 1: ":c", 3: ":m", 64: ":no-such-target"}[options & ~32]
        async with open_nexus(TARGET + suffix, [portal], settings) as nexus:
            for description in await scan(nexus):
                with suppress(IscsifuseError):
                    await _exercise(nexus, description.address)


async def _exercise(nexus: Nexus, address: bytes) -> None:
    """Reads, a write, and questions that are asked seldom or are answered with sense data."""
    for length in (512, 4096, 20480):
        buffer = memoryview(bytearray(length))
        with suppress(IscsifuseError):
            await nexus.execute(cdbs.read_10(lba=0, blocks=length // 512), lun=address, buffer_in=buffer)
    with suppress(IscsifuseError):
        await nexus.execute(cdbs.write_10(lba=8, blocks=8), lun=address, buffer_out=memoryview(bytes(4096)))
    questions = [
        cdbs.get_lba_status(lba=0, allocation_length=512),
        cdbs.mode_sense_6(page=0x3F, allocation_length=255),
        cdbs.mode_sense_10(page=0x3F, allocation_length=512),
        cdbs.mode_sense_6(page=0x0A, allocation_length=255),
        cdbs.read_capacity_10(),
        cdbs.read_capacity_16(),
        cdbs.report_luns(allocation_length=512),
        cdbs.inquiry(allocation_length=96),
        cdbs.request_sense(allocation_length=96),
        cdbs.synchronize_cache(),
        bytes([0xC1, *bytes(15)]),
        *(cdbs.inquiry(allocation_length=512, page=page) for page in range(0x80, 0x8B)),
        *(cdbs.inquiry(allocation_length=512, page=page) for page in (0x00, 0xB0, 0xB1, 0xB2, 0xB3, 0xC0)),
        cdbs.read_16(lba=1 << 50, blocks=1),
        cdbs.read_10(lba=0xFFFFFFF0, blocks=1),
    ]
    for cdb in questions:
        await nexus.execute(cdb, lun=address, buffer_in=memoryview(bytearray(512)))


# --- what was recorded ---


def _pdus_of(capture: Capture, pcap: Path) -> list[list[Pdu]]:
    """The PDUs of each connection; both directions, the initiator's first (answers find their command by tag)."""
    subprocess.run(["editcap", "-F", "pcap", str(capture.path), str(pcap)], check=True, capture_output=True)
    connections: dict[int, list[Pdu]] = defaultdict(list)
    parts = stretches(read_segments(pcap))
    parts.sort(key=lambda part: part.source[1] == capture.port)
    for part in parts:
        client = part.destination[1] if part.source[1] == capture.port else part.source[1]
        connections[client] += _pdus(bytes(part.data))
    return list(connections.values())


def _pdus(stream: bytes) -> list[Pdu]:
    """The login has no digests; what follows may have both."""
    pdus, error = decoded(stream)
    if error is None:
        return pdus
    start = 0
    login: list[Pdu] = []
    for pdu in pdus:
        if not isinstance(pdu, LoginRequest | LoginResponse):
            break
        login.append(pdu)
        start += len(pdu.encode())
    rest, error = decoded(stream[start:], header_digest=True, data_digest=True)
    assert error is None, error
    return login + rest


def _sort(connections: list[list[Pdu]], options: int, server: str, seeds: Seeds) -> None:
    for pdus in connections:
        answers = [pdu for pdu in pdus if isinstance(pdu, TargetPdu)]
        responses = [pdu for pdu in answers if isinstance(pdu, LoginResponse)]
        _sort_login(responses, options & ~64, server, seeds)
        texts = [pdu for pdu in answers if isinstance(pdu, TextResponse)]
        if texts:
            whole = b"".join(pdu.data for pdu in texts)
            seeds["sendtargets"][b"\x40" + whole] = server
            seeds["text"][whole] = server
            stream = b"".join(replace(pdu, itt=1).encode() for pdu in texts)
            seeds["sendtargets"][bytes([discovery.PDUS]) + stream] = server
        kinds: dict[int, int] = defaultdict(int)
        for pdu in pdus:
            raw = pdu.encode()
            kinds[pdu.OPCODE] += len(raw) < 700
            if len(raw) < 700 and kinds[pdu.OPCODE] <= _MOST_OF_A_KIND:
                seeds["pdu"][bytes([0x24 + len(raw) % 4]) + raw] = server
        _sort_scsi(pdus, server, seeds)


def _renamed(data: bytes) -> bytes:
    return re.sub(re.escape(TARGET.encode()) + b":[cmd]", TARGET.encode(), data)


def _sort_login(responses: list[LoginResponse], options: int, server: str, seeds: Seeds) -> None:
    if not responses:
        return
    stream = b"".join(pdu.encode() for pdu in responses)
    seeds["login"][bytes([options]) + stream] = server
    records = (record_of(replace(pdu, data=_renamed(pdu.data))) for pdu in responses)
    seeds["login"][bytes([options | RECORDS]) + b"".join(records)] = server
    chap: list[bytes] = []
    stages: list[bytes] = [b"", b""]
    for pdu in responses:
        seeds["text"][pdu.data] = server
        try:
            pairs = text.decode(pdu.data)
        except IscsifuseError:
            continue
        steps = [pair for pair in pairs if pair[0].startswith("CHAP_")]
        if steps:
            chap.append(text.encode(steps).rstrip(b"\0"))
        rest = [pair for pair in pairs if not pair[0].startswith(("CHAP_", "AuthMethod"))]
        stages[min(pdu.csg, 1)] += text.encode(rest)
    if chap:
        seeds["chap"][bytes([options]) + b"\0\0".join(chap)] = server
    wanted = options >> 2 & 7
    seeds["negotiation"][bytes([wanted]) + b"\0\0".join(stage.rstrip(b"\0") for stage in stages)] = server


def _sort_scsi(pdus: list[Pdu], server: str, seeds: Seeds) -> None:
    """Data-In and sense data, by the command that they answer."""
    commands: dict[int, ScsiCommand] = {}
    data: dict[int, bytes] = defaultdict(bytes)
    for pdu in pdus:
        if isinstance(pdu, ScsiCommand):
            commands[pdu.itt] = pdu
            seeds["cdb"][pdu.cdb] = server
        elif isinstance(pdu, DataIn):
            data[pdu.itt] += pdu.data
        elif isinstance(pdu, ScsiResponse) and pdu.data:
            seeds["sense"][pdu.data[2 : 2 + int.from_bytes(pdu.data[:2], "big")]] = server
    for itt, received in data.items():
        cdb = commands[itt].cdb
        target = _target_of(cdb)
        if target == "lba_status":
            received = struct.pack(">QQ", 0, 1 << 20) + received
        if target is not None and len(received) <= _LONGEST:
            seeds[target][received.rstrip(b"\0") + bytes(4) if target == "vpd" else received] = server


def _target_of(cdb: bytes) -> str | None:
    parsed = cdbs.decode(cdb)
    match parsed.opcode:
        case Scsi.INQUIRY:
            return "vpd" if parsed.evpd else "inquiry"
        case Scsi.REPORT_LUNS:
            return "report_luns"
        case Scsi.READ_CAPACITY_10:
            return "capacity"
        case Scsi.MODE_SENSE_6 | Scsi.MODE_SENSE_10:
            return "mode"
        case Scsi.REQUEST_SENSE:
            return "sense"
        case Scsi.SERVICE_ACTION_IN_16:
            is_capacity = parsed.service_action == ServiceActionIn16.READ_CAPACITY_16
            return "capacity" if is_capacity else "lba_status"
        case _:
            return None


# --- what neither of the two targets says ---


def _make(seeds: Seeds) -> None:
    made: dict[str, list[bytes]] = {
        "url": [
            b"\0iscsi://host/",
            b"\0iscsi://user%pa%40ss@[fe80::1%25eth0]:3261/iqn.2026-11.com.example:disk/7",
            b"\0iscsi://10.0.0.1:3260/naa.6000000000000001?header_digest=crc32c&data_digest=none&auth=sha3-256",
            b"\0iscsi://u%p@h/eui.0123456789abcdef/0?target_user=t&target_password=%7Epw",
            b"\1portal.example:3260",
            b"\1[::1]:3260",
            b"\2iscsi://us%40er@h/iqn.2026-11.com.example:disk?auth=md5",
            b"\2iscsi://us:er@h:port/what?ever",
            "\0iscsi://ho\u00dft/iqn.2026-11.com.example:d\u00edsk".encode(),
        ],
        "sense": [
            Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, information=7, sks=b"\x80\0\1", fru=3).encode(),
            Sense(key=SenseKey.NOT_READY, asc=4, ascq=4, response_code=0x72, sks=b"\x80\x40\0", ili=True).encode(),
            Sense(
                key=SenseKey.ABORTED_COMMAND, response_code=0x73, information=1 << 40, command_specific=5, eom=True
            ).encode(),
            bytes.fromhex("720311000000001a0d188000c0000007000000000000000900000000000000ff01"),
            bytes.fromhex("7f0123456789"),
        ],
        "report_luns": [
            luns.encode_report_luns([luns.encode(0), luns.encode(300), bytes.fromhex("c101000000000000")]),
            luns.encode_report_luns([bytes.fromhex("d2012345") + bytes(4), bytes.fromhex("e20123456789") + bytes(2)]),
        ],
        "capacity": [
            Capacity(last_lba=0xFFFFFFFF, block_length=512).encode_10(),
            Capacity(
                last_lba=(1 << 50) - 1, block_length=4096, protection_type=2, p_i_exponent=1, lbpme=True, lbprz=True
            ).encode_16(),
        ],
        "lba_status": [
            struct.pack(">QQ", 100, 4096)
            + lba_status.encode(
                Extent(lba=100 + 8 * number, blocks=8, provisioning=Provisioning(number % 3)) for number in range(5)
            )
        ],
        "mode": [
            ModeParameters(
                write_protected=True,
                dpofua=True,
                block_descriptors=bytes(8),
                pages={(8, 0): CachingPage(wce=True).encode(), (0x0A, 1): bytes.fromhex("4a010004") + bytes(4)},
            ).encode_10()
        ],
        "vpd": [
            vpd.BlockLimits(wsnz=True, max_transfer=2048, unmap_granularity_alignment=3).encode(),
            vpd.LogicalBlockProvisioning(lbpu=True, lbprz=True, provisioning_type=2).encode(),
            vpd.BlockDeviceCharacteristics(rotation_rate=7200, form_factor=2, fuab=True).encode(),
        ],
        "cdb": [
            unmap.encode([unmap.UnmapRange(lba=1, blocks=8), unmap.UnmapRange(lba=1 << 40, blocks=1)]),
            bytes.fromhex("93080000000000000010000000080000"),
            bytes.fromhex("7f0000000000001800090000") + bytes(20),
        ],
        "sendtargets": [
            b"\x08"
            + text.encode(
                [
                    ("TargetName", TARGET),
                    ("TargetAddress", "[2001:db8::1]:3261,7"),
                    ("TargetAddress", "host.example"),
                    ("TargetName", "naa.600000000000000a"),
                    ("TargetAddress", "10.0.0.1:0"),
                ]
            )
        ],
        "login": [
            bytes([RECORDS])
            + record_of(LoginResponse(status_class=1, status_detail=1, data=b"TargetAddress=[::1]:3261,2\0")),
            bytes([RECORDS])
            + record_of(LoginResponse(cont=True, data=b"TargetAlias=a long "))
            + record_of(LoginResponse(transit=True, nsg=1, data=b"alias\0TargetPortalGroupTag=1\0"))
            + record_of(LoginResponse(csg=1, data=b"MaxRecvDataSegmentLength=512\0X-com.example.key=1\0"))
            + record_of(LoginResponse(csg=1, data=b""))
            + record_of(LoginResponse(transit=True, csg=1, nsg=3, data=b"HeaderDigest=None\0")),
        ],
        "negotiation": [
            bytes([options])
            + b"TargetPortalGroupTag=1\0TargetAlias=a\0IFMarker=No\0\0"
            + text.encode(proposal).rstrip(b"\0")
            for options in (0, 1, 8, 63)
            for proposal in _PROPOSALS
        ],
        "connection": _conversations(),
    }
    for name, entries in made.items():
        for entry in entries:
            seeds[name][entry] = "made"


def _conversations() -> list[bytes]:
    """Targets that answer everything, or go wrong, in the words of `fuzz.connection`."""
    sense = Sense(key=SenseKey.MEDIUM_ERROR, asc=0x11, information=7).encode()
    good: list[TargetPdu] = [
        DataIn(itt=1, final=False, data_sn=0, data=bytes(200), lun=LUN),
        DataIn(itt=1, data_sn=1, buffer_offset=200, data=bytes(READ_LENGTH - 200), has_status=True),
        R2T(itt=2, ttt=1, lun=LUN, desired_data_transfer_length=READ_LENGTH),
        ScsiResponse(itt=2),
        ScsiResponse(itt=3, status=2, data=len(sense).to_bytes(2, "big") + sense),
        DataIn(itt=4, data=bytes(40)),
        ScsiResponse(itt=4, exp_data_sn=1, underflow=True, residual_count=READ_LENGTH - 40),
        R2T(itt=5, ttt=2, lun=LUN, desired_data_transfer_length=WRITE_LENGTH),
        NopIn(ttt=9, lun=NO_LUN, data=b"ping"),
        ScsiResponse(itt=5),
        NopIn(itt=6),
        TaskManagementResponse(itt=7),
        TextResponse(itt=8, data=b"a=b\0"),
        AsyncMessage(event=1, parameter3=5),
        ScsiResponse(itt=9),
        LogoutResponse(itt=RESERVED_TAG),
    ]
    bad: list[TargetPdu] = [
        ScsiResponse(itt=1, response=1),
        Reject(reason=4, data=bytes(48)),
        DataIn(itt=77, data=bytes(12), has_status=True),
        R2T(itt=5, ttt=RESERVED_TAG, lun=LUN, desired_data_transfer_length=5),
    ]
    conversations = []
    for pdus in (good, good[::-1], bad):
        numbered = b"".join(
            replace(pdu, stat_sn=FIRST_STAT_SN + n, exp_cmd_sn=8, max_cmd_sn=40).encode()
            for n, pdu in enumerate(pdus)
        )
        conversations += [bytes([options]) + numbered for options in (0x80, 0x83, 0x8C, 0)]
    return conversations


# --- writing ---


def _write(folder: Path, seeds: dict[bytes, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if not path.name.startswith("finding-"):
            path.unlink()
    counts: dict[str, int] = defaultdict(int)
    # The shortest first, so that what is left out by the limit is what is slow.
    for data, origin in sorted(seeds.items(), key=lambda seed: (len(seed[0]), seed[0])):
        if len(data) > _LONGEST or counts[origin] >= _MOST:
            continue
        counts[origin] += 1
        (folder / f"{origin}-{hashlib.sha256(data).hexdigest()[:8]}").write_bytes(data)
    print(f"{folder.name}: {', '.join(f'{count} of {origin}' for origin, count in sorted(counts.items()))}")


if __name__ == "__main__":
    main()
