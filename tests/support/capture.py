"""Records what passes between an initiator and a target, and has Wireshark's dissector judge it.

dumpcap says neither when the first packet is sure to be caught nor, once it was interrupted, whether packets were
left in the kernel's buffer. So both ends of a recording are marked by datagrams with a random payload: recording has
begun when the file shows one, and is complete when it shows the last one (packets on ``lo`` keep their order).
"""

import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from support.ports import HOST
from support.process import ServerProcess
from support.recut import recut

__all__ = ["Capture", "CaptureError", "Conversation", "LoginText", "why_unavailable"]

_SCSI_COMMAND = 0x01
_LOGIN_REQUEST = 0x03
_DATA_OUT = 0x05
_LOGIN_RESPONSE = 0x23
_RESERVED_TAG = 0xFFFFFFFF


class CaptureError(Exception):
    """A recording that can't be made, or isn't complete."""


@dataclass(frozen=True, slots=True)
class LoginText:
    """The text keys of one login PDU."""

    from_initiator: bool
    keys: dict[str, str]


@dataclass(slots=True)
class Conversation:
    """What passed on one TCP connection; counts are of full feature phase.

    Attributes:
        initiator_keys: the text keys of all its Login Requests.
        target_keys: of the Login Responses.
        pdus: PDUs by opcode.
        with_data: PDUs whose data segment isn't empty.
        longest_from_initiator: the longest data segment, in bytes.
        longest_from_target: likewise.
        immediate: SCSI Commands that bring data along.
        unsolicited: Data-Out PDUs that answer no R2T.
        header_digests: PDUs with a digest of their header.
        data_digests: PDUs with a digest of their data.
    """

    initiator_keys: dict[str, str] = field(default_factory=dict)
    target_keys: dict[str, str] = field(default_factory=dict)
    pdus: Counter[int] = field(default_factory=Counter)
    with_data: int = 0
    longest_from_initiator: int = 0
    longest_from_target: int = 0
    immediate: int = 0
    unsolicited: int = 0
    header_digests: int = 0
    data_digests: int = 0


@cache
def why_unavailable() -> str | None:
    """Why nothing can be recorded here, or None where it can."""
    try:
        listing = subprocess.run(
            ["dumpcap", "-D"], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20, check=False
        )
        subprocess.run(["tshark", "--version"], capture_output=True, timeout=20, check=True)
    except OSError:
        return "tshark isn't installed"
    if not re.search(r"^\d+\. lo\b", listing.stdout, re.MULTILINE):
        return "no right to capture packets on lo"
    return None


class Capture:
    """The packets of one TCP port on ``lo``, or of several, from ``with`` (or `start`) to `stop`.

    The analysing methods may be called once it is stopped.
    """

    def __init__(self, path: Path, *, port: int, more_ports: Sequence[int] = (), buffer_mib: int = 256) -> None:
        """Prepare a recording of these ports into ``path`` (pcap), with a kernel buffer of ``buffer_mib`` MiB."""
        self.path = path
        self.port = port
        self._ports = (port, *more_ports)
        self._buffer_mib = buffer_mib
        self._process: ServerProcess | None = None
        self._marks = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._marks.bind((HOST, 0))
        self._scanned = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.abandon()

    # --- recording ---

    @property
    def pid(self) -> int | None:
        """dumpcap's, as long as it runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Begin, and return once packets are sure to be caught."""
        marks_port = self._marks.getsockname()[1]
        self._process = ServerProcess(
            [
                *("dumpcap", "-q", "-P", "-i", "lo", "-B", str(self._buffer_mib), "-s", "0", "-w", str(self.path)),
                *("-f", " or ".join([*(f"tcp port {port}" for port in self._ports), f"udp port {marks_port}"])),
            ],
            folder=self.path.parent,
            log=self.path.with_suffix(".log"),
        )
        self._wait_for_mark("to begin", timeout=15)

    def stop(self) -> None:
        """End, and return once everything is in the file, PDU by PDU (`recut`); CaptureError if a packet was lost."""
        process = self._process
        if process is None:
            return
        self._wait_for_mark("to catch up", timeout=60)
        self._process = None
        self._marks.close()
        process.signal(signal.SIGINT)
        if not process.wait(timeout=20):
            process.kill()
            raise CaptureError(f"dumpcap doesn't end:\n{process.said()}")
        lost = re.search(r"received/dropped on interface '.*': \d+/(\d+)", process.said())
        if lost is None or lost[1] != "0":
            raise CaptureError(f"packets were lost:\n{process.said()}")
        pdus = self.path.with_suffix(".pdus")
        recut(self.path, pdus)
        pdus.replace(self.path)  # both would be a lot

    def abandon(self) -> None:
        """End without caring for what was recorded; nothing happens when it is stopped already."""
        process, self._process = self._process, None
        self._marks.close()
        if process is not None:
            process.kill()

    def _wait_for_mark(self, what: str, *, timeout: float) -> None:
        process = self._process
        assert process is not None
        mark = secrets.token_bytes(32)
        deadline = time.monotonic() + timeout
        while not self._file_shows(mark):
            if not process.is_running or time.monotonic() > deadline:
                said = process.said()
                self.abandon()
                raise CaptureError(f"waited in vain for dumpcap {what}:\n{said}")
            self._marks.sendto(mark, self._marks.getsockname())
            self._marks.recv(64)
            time.sleep(0.05)

    def _file_shows(self, mark: bytes) -> bool:
        """Whether ``mark`` is in the part of the file that wasn't looked at before."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                while self._scanned < size:
                    file.seek(max(self._scanned - len(mark), 0))
                    chunk = file.read(1 << 20)
                    self._scanned = file.tell()
                    if mark in chunk:
                        return True
        except FileNotFoundError:
            pass
        return False

    # --- analysis ---

    def malformed(self) -> list[str]:
        """What the dissector calls broken, or an error, in frames of these ports: one line for each, ideally none."""
        broken = "(_ws.malformed || _ws.expert.severity >= 8388608)"
        fields = ["frame.number", "_ws.expert.message", "_ws.col.Info"]
        return [" ".join(row) for row in self._fields(broken, *fields)]

    def unrecognised(self) -> list[str]:
        """Frames whose bytes the dissector doesn't take for (a part of) an iSCSI PDU at all.

        The rest of a PDU that a closed connection cut off is one, too.
        """
        stray = "tcp.len > 0 && !iscsi && !tcp.reassembled_in && !tcp.analysis.flags"
        return [" ".join(row) for row in self._fields(stray, "frame.number", "_ws.col.Info", two_passes=True)]

    def command_counts(self) -> dict[int, int]:
        """How many commands were sent, by SCSI operation code, whatever became of them.

        Read from the dissector's text, where a CDB's own ``Opcode:`` stands without brackets. The fields
        (``scsi_sbc.opcode``) won't do: data that belongs to a command carries the same field again, in the same
        frame where data is immediate. Neither will ``-z scsi,srt`` (`answered_counts`): it leaves out commands that
        ended with another status than GOOD. TCP's retransmissions are not dissected again, so count once.
        """
        text = self._tshark(*self._only(f"iscsi.opcode == {_SCSI_COMMAND}"), "-O", "scsi")
        return dict(Counter(int(code, 16) for code in re.findall(r"^ +Opcode: .*\(0x(\w\w)\)$", text, re.MULTILINE)))

    def answered_counts(self) -> dict[int, int]:
        """How many commands a disk answered with GOOD, by operation code: Wireshark's service response times."""
        table = self._tshark("-q", "-z", "scsi,srt,0")
        row = re.compile(r"^ *(\d+)  .{20,}?(\d+)(?: +[\d.]+){4}$", re.MULTILINE)
        return {int(code): int(calls) for code, calls in row.findall(table)}

    def pdu_counts(self) -> dict[int, int]:
        """How many PDUs were sent, in both directions, by iSCSI opcode."""
        rows = self._fields("iscsi", "iscsi.opcode")
        return dict(Counter(int(code, 0) for (codes,) in rows for code in codes.split("|")))

    def login_keys(self) -> list[LoginText]:
        """The text keys of each login PDU, in the order they were sent."""
        logins = f"iscsi.opcode == {_LOGIN_REQUEST} || iscsi.opcode == {_LOGIN_RESPONSE}"
        return [
            LoginText(
                from_initiator=int(opcode, 0) == _LOGIN_REQUEST,
                keys=dict(pair.split("=", 1) for pair in pairs.split("|") if pair),
            )
            for opcode, pairs in self._fields(logins, "iscsi.opcode", "iscsi.keyvalue")
        ]

    def conversations(self) -> list[Conversation]:
        """The connections, in the order in which they were made."""
        found: dict[str, Conversation] = {}
        names = ("opcode", "datasegmentlength", "targettransfertag", "headerdigest32", "datadigest32", "keyvalue")
        fields = [f"iscsi.{name}" for name in names]
        for stream, port, *values in self._fields("iscsi", "tcp.stream", "tcp.srcport", *fields):
            conversation = found.setdefault(stream, Conversation())
            codes, lengths, tags, headers, data, pairs = (value.split("|") if value else [] for value in values)
            opcodes = [int(code, 0) for code in codes]
            if opcodes[0] in (_LOGIN_REQUEST, _LOGIN_RESPONSE):  # of which there is one at a time
                keys = conversation.initiator_keys if opcodes[0] == _LOGIN_REQUEST else conversation.target_keys
                keys.update(dict(pair.split("=", 1) for pair in pairs))
                continue
            longest = max(map(int, lengths))
            if int(port) in self._ports:
                conversation.longest_from_target = max(conversation.longest_from_target, longest)
            else:
                conversation.longest_from_initiator = max(conversation.longest_from_initiator, longest)
            for opcode, length in zip(opcodes, map(int, lengths), strict=True):
                conversation.pdus[opcode] += 1
                conversation.with_data += length > 0
                conversation.immediate += opcode == _SCSI_COMMAND and length > 0
            if _DATA_OUT in opcodes:
                conversation.unsolicited += sum(int(tag, 0) == _RESERVED_TAG for tag in tags)
            conversation.header_digests += len(headers)
            conversation.data_digests += len(data)
        return list(found.values())

    def _fields(self, condition: str, *fields: str, two_passes: bool = False) -> list[list[str]]:
        """One row for each frame of these ports that meets the display filter; ``|`` joins a field's values."""
        wanted = [word for field in fields for word in ("-e", field)]
        output = self._tshark(
            *(("-2",) if two_passes else ()),
            *self._only(condition),
            *("-T", "fields", "-E", "aggregator=|", *wanted),
        )
        return [line.split("\t") for line in output.splitlines()]

    def _only(self, condition: str) -> tuple[str, str]:
        ours = " || ".join(f"tcp.port == {port}" for port in self._ports)
        return "-Y", f"({ours}) && ({condition})"

    def _tshark(self, *arguments: str) -> str:
        assert self._process is None, "the recording isn't stopped yet"
        done = subprocess.run(
            [
                *("tshark", "-n", "-r", str(self.path)),
                *(word for port in self._ports for word in ("-d", f"tcp.port=={port},iscsi")),
                *("-o", "tcp.desegment_tcp_streams:TRUE", "-o", "tcp.reassemble_out_of_order:TRUE"),
                *arguments,
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CaptureError(f"tshark failed: {done.stderr}")
        return done.stdout
