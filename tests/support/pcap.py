"""Captured packets as TCP payloads: a reader of classic pcap files, and what of each stream is without a hole.

It knows Ethernet (with VLAN tags), IPv4, IPv6 and TCP, and nothing above. A capture may begin in the middle of a
stream, miss packets, hold some twice or out of order; `stretches` gives the unbroken parts of each direction. Nothing
is verified (checksums) and nothing is guessed (fragments are skipped).
"""

import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Endpoint", "Segment", "Stretch", "read_segments", "stretches"]

Endpoint = tuple[str, int]

_MAGICS = {
    b"\xd4\xc3\xb2\xa1": "<",
    b"\xa1\xb2\xc3\xd4": ">",
    b"\x4d\x3c\xb2\xa1": "<",  # nanoseconds
    b"\xa1\xb2\x3c\x4d": ">",
}
_ETHERNET = 1
_IPV4 = 0x0800
_IPV6 = 0x86DD
_VLAN = (0x8100, 0x88A8)
_TCP = 6
_SYN = 0x02


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One TCP segment.

    Attributes:
        frame: number of the packet in the capture, from 1, as Wireshark counts.
        sequence: of the first byte of the payload (a SYN has been added already).
    """

    frame: int
    source: Endpoint
    destination: Endpoint
    sequence: int
    payload: bytes


@dataclass(slots=True, kw_only=True)
class Stretch:
    """An unbroken part of one direction of one connection.

    Attributes:
        starts: offsets in ``data`` at which a segment begins.
        frames: the frame of each of them.
    """

    source: Endpoint
    destination: Endpoint
    data: bytearray = field(default_factory=bytearray)
    starts: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)

    def frame_of(self, offset: int) -> int:
        """The frame that brought the byte at this offset."""
        return self.frames[bisect_left(self.starts, offset + 1) - 1]


def read_segments(path: Path) -> Iterator[Segment]:
    """The TCP segments of a capture that have a payload, in the order of the capture."""
    with path.open("rb") as file:
        start = file.read(24)
        order = _MAGICS[start[:4]]
        (link,) = struct.unpack_from(order + "I", start, 20)
        if link != _ETHERNET:
            raise ValueError(f"link type {link} is not Ethernet")
        frame = 0
        while len(header := file.read(16)) == 16:
            captured, original = struct.unpack_from(order + "II", header, 8)
            frame += 1
            packet = file.read(captured)
            if captured == original == len(packet):
                yield from _tcp(packet, frame)


def _tcp(packet: bytes, frame: int) -> Iterator[Segment]:
    kind, offset = struct.unpack_from(">H", packet, 12)[0], 14
    while kind in _VLAN:
        kind, offset = struct.unpack_from(">H", packet, offset + 2)[0], offset + 4
    if kind == _IPV4:
        words, total, fragment, protocol = struct.unpack_from(">BxH2xHxB", packet, offset)
        if protocol != _TCP or fragment & 0x3FFF:
            return
        source, destination = (".".join(map(str, packet[at : at + 4])) for at in (offset + 12, offset + 16))
        end, offset = offset + total, offset + (words & 15) * 4
    elif kind == _IPV6:
        length, protocol = struct.unpack_from(">HB", packet, offset + 4)
        if protocol != _TCP:
            return
        source, destination = (packet[at : at + 16].hex(":", 2) for at in (offset + 8, offset + 24))
        end, offset = offset + 40 + length, offset + 40
    else:
        return
    from_port, to_port, sequence, words, flags = struct.unpack_from(">HHI4xBB", packet, offset)
    payload = packet[offset + (words >> 4) * 4 : end]
    if payload:
        yield Segment(
            frame=frame,
            source=(source, from_port),
            destination=(destination, to_port),
            sequence=(sequence + (1 if flags & _SYN else 0)) & 0xFFFFFFFF,
            payload=payload,
        )


def stretches(segments: Iterable[Segment]) -> list[Stretch]:
    """The unbroken parts of all streams, those of one direction in the order of the stream."""
    streams: dict[tuple[Endpoint, Endpoint], list[Segment]] = {}
    for segment in segments:
        streams.setdefault((segment.source, segment.destination), []).append(segment)
    result = []
    for (source, destination), stream in streams.items():
        # Relative to the first one seen, as signed numbers: a wrap, and a late segment from before it, sort right.
        base = stream[0].sequence
        places = {id(one): ((one.sequence - base + 0x80000000) & 0xFFFFFFFF) - 0x80000000 for one in stream}
        stream.sort(key=lambda one: places[id(one)])
        stretch, end = Stretch(source=source, destination=destination), None
        for segment in stream:
            place = places[id(segment)]
            if end is None or place > end:
                stretch, end = Stretch(source=source, destination=destination), place
                result.append(stretch)
            fresh = segment.payload[end - place :]
            if fresh:
                stretch.starts.append(len(stretch.data))
                stretch.frames.append(segment.frame)
                stretch.data += fresh
                end += len(fresh)
    return result
