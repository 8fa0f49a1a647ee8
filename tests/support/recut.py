"""Cuts a capture anew, so that TCP segments begin where iSCSI PDUs do.

Wireshark's dissector goes on from one segment to the next only where at least 8 bytes of a PDU are in the first one;
where there are fewer, it takes what follows for rubbish until a segment happens to begin with a PDU. How TCP cuts a
stream is chance, so a recording is brought into another shape before the dissector sees it. The bytes stay as they
were, and so does the order in which things became complete; what can't be taken for PDUs is left in its pieces.

Only lengths are read here, and the two keys that add digests to them: nothing of the initiator's own code is used.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from support.pcap import Endpoint, Segment, read_segments

__all__ = ["recut"]

_HEADER = 48
_LOGIN_RESPONSE = 0x23
_LOGINS = (0x03, _LOGIN_RESPONSE)
_OPCODES = frozenset([*range(0x07), 0x10, *range(0x20, 0x28), 0x31, 0x32, 0x3F])
_MOST = 60_000  # bytes in a segment: IP counts them with 16 bits
_ETHERNET = bytes(12) + b"\x08\x00"


def recut(source: Path, target: Path) -> None:
    """Write the TCP payloads of ``source`` to ``target``, one PDU after the other; both are classic pcap files.

    Args:
        source: a recording of IPv4 connections, from their beginning.
        target: the file to make.
    """
    connections: dict[frozenset[Endpoint], _Connection] = {}
    directions: dict[tuple[Endpoint, Endpoint], _Direction] = {}
    with target.open("wb") as file:
        output = _Output(file)
        for segment in read_segments(source):
            ends = (segment.source, segment.destination)
            if ends not in directions:
                connection = connections.setdefault(frozenset(ends), _Connection())
                directions[ends] = _Direction(connection, awaited=segment.sequence)
            for piece in directions[ends].take(segment):
                output.write(*ends, piece)
        for ends, direction in directions.items():
            for piece in direction.rest():
                output.write(*ends, piece)


@dataclass(slots=True)
class _Connection:
    """What a login settles, in bytes for each PDU after it."""

    header_digest: int = 0
    data_digest: int = 0

    def learn(self, text: bytes) -> None:
        keys = text.split(b"\0")
        self.header_digest = 4 if b"HeaderDigest=CRC32C" in keys else self.header_digest
        self.data_digest = 4 if b"DataDigest=CRC32C" in keys else self.data_digest


@dataclass(slots=True)
class _Direction:
    """One direction of a connection: segments go in, PDUs come out.

    Attributes:
        connection: what both directions share.
        awaited: sequence number of the next byte.
        early: segments that came before their turn, by sequence number.
        left: bytes of a PDU that isn't whole yet.
        in_step: whether what came so far was PDUs.
    """

    connection: _Connection
    awaited: int
    early: dict[int, bytes] = field(default_factory=dict)
    left: bytearray = field(default_factory=bytearray)
    in_step: bool = True

    def take(self, segment: Segment) -> Iterator[bytes]:
        """What is complete with this segment."""
        self.early[segment.sequence] = segment.payload
        while (fresh := self._next()) is not None:
            self.left += fresh
            yield from self._complete()

    def _next(self) -> bytes | None:
        """The bytes whose turn it is, if they have come; those that came twice are thrown away."""
        for sequence, payload in list(self.early.items()):
            known = (self.awaited - sequence) & 0xFFFFFFFF
            if known < 0x80000000:  # else something is missing before it
                del self.early[sequence]
                if known < len(payload):
                    self.awaited = (sequence + len(payload)) & 0xFFFFFFFF
                    return payload[known:]
        return None

    def _complete(self) -> Iterator[bytes]:
        start = 0
        while self.in_step and start + _HEADER <= len(self.left):
            opcode, additional = self.left[start] & 0x3F, self.left[start + 4]
            length = int.from_bytes(self.left[start + 5 : start + 8])
            end = start + _HEADER + 4 * additional + (length + 3) // 4 * 4
            if opcode not in _LOGINS:
                end += self.connection.header_digest + (self.connection.data_digest if length else 0)
            self.in_step = opcode in _OPCODES
            if not self.in_step or end > len(self.left):
                break
            pdu = bytes(self.left[start:end])
            if opcode == _LOGIN_RESPONSE:
                self.connection.learn(pdu[_HEADER:])
            yield pdu
            start = end
        del self.left[:start]
        if not self.in_step:
            yield from self.rest()

    def rest(self) -> Iterator[bytes]:
        """What can't be completed."""
        if self.left:
            yield bytes(self.left)
            self.left.clear()


class _Output:
    """A pcap file of made-up packets: nobody looks at the checksums and the times that are missing."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._packets = 0
        self._sent: Counter[tuple[Endpoint, Endpoint]] = Counter()
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 0x40000, 1))

    def write(self, source: Endpoint, destination: Endpoint, data: bytes) -> None:
        """Append bytes that ``source`` sends; more than a packet holds become several."""
        for start in range(0, len(data), _MOST):
            payload = data[start : start + _MOST]
            sequence = (self._sent[source, destination] + 1) & 0xFFFFFFFF
            self._sent[source, destination] += len(payload)
            tcp = struct.pack(">HHIIBBHHH", source[1], destination[1], sequence, 0, 5 << 4, 0x18, 0xFFFF, 0, 0)
            ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp) + len(payload), 0, 0, 64, 6, 0)
            packet = b"".join((_ETHERNET, ip, _address(source), _address(destination), tcp, payload))
            self._packets += 1
            self._file.write(struct.pack("<IIII", *divmod(self._packets, 1_000_000), len(packet), len(packet)))
            self._file.write(packet)


def _address(end: Endpoint) -> bytes:
    return bytes(map(int, end[0].split(".")))
