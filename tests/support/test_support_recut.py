"""A recording that is cut anew: PDU by PDU, with not a byte changed."""

import random
import struct
from pathlib import Path

import pytest

from support.capture import Capture
from support.pcap import Endpoint, Segment, read_segments, stretches
from support.recut import recut

CLIENT, TARGET = ("127.0.0.1", 40000), ("127.0.0.1", 3260)


def pdu(opcode: int, data: bytes = b"", *, digests: tuple[int, int] = (0, 0), ahs: int = 0) -> bytes:
    """A PDU, as far as lengths go; ``digests``: bytes for the header, for the data."""
    padded = data + bytes(-len(data) % 4)
    header = bytes([opcode, 0x80, 0, 0, ahs]) + len(data).to_bytes(3) + bytes(40 + 4 * ahs)
    return header + b"H" * digests[0] + padded + (b"D" * digests[1] if data else b"")


def recording(path: Path, segments: list[tuple[Endpoint, Endpoint, int, bytes]]) -> Path:
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 0x40000, 1))
        for source, destination, sequence, payload in segments:
            tcp = struct.pack(">HHIIBBHHH", source[1], destination[1], sequence, 0, 5 << 4, 0x10, 1, 0, 0)
            ip = struct.pack(">BBHHHBBH", 0x45, 0, 40 + len(payload), 0, 0, 64, 6, 0) + bytes([127, 0, 0, 1] * 2)
            packet = bytes(12) + b"\x08\x00" + ip + tcp + payload
            file.write(struct.pack("<IIII", 0, 0, len(packet), len(packet)) + packet)
    return path


def cut(tmp_path: Path, segments: list[tuple[Endpoint, Endpoint, int, bytes]]) -> list[Segment]:
    target = tmp_path / "new.pcap"
    recut(recording(tmp_path / "old.pcap", segments), target)
    return list(read_segments(target))


@pytest.mark.parametrize("length", [1, 4, 7, 48, 100, 1000])
def test_whatever_the_segments_pdus_come_out(tmp_path: Path, length: int) -> None:
    pdus = [pdu(0x01), pdu(0x01, b"immediate"), pdu(0x05, bytes(512)), pdu(0x00, ahs=3), pdu(0x3F, b"x")]
    stream = b"".join(pdus)
    start = 0xFFFFFFF0  # it wraps
    segments = [
        (CLIENT, TARGET, (start + at) & 0xFFFFFFFF, stream[at : at + length]) for at in range(0, len(stream), length)
    ]
    assert [segment.payload for segment in cut(tmp_path, segments)] == pdus


def test_digests_count_once_the_login_says_so(tmp_path: Path) -> None:
    both = (4, 4)
    login = pdu(0x43, b"HeaderDigest=CRC32C\0DataDigest=CRC32C\0")
    answer = pdu(0x23, b"HeaderDigest=CRC32C\0DataDigest=CRC32C\0")
    command, data = pdu(0x01, digests=both), pdu(0x25, b"data", digests=both)
    segments = [
        (CLIENT, TARGET, 1, login),
        (TARGET, CLIENT, 1, answer + data[:3]),
        (CLIENT, TARGET, 1 + len(login), command),
        (TARGET, CLIENT, 1 + len(answer) + 3, data[3:] + data),
    ]
    assert [(one.source, one.payload) for one in cut(tmp_path, segments)] == [
        (CLIENT, login),
        (TARGET, answer),
        (CLIENT, command),
        (TARGET, data),
        (TARGET, data),
    ]


def test_segments_out_of_order_twice_and_overlapping(tmp_path: Path) -> None:
    pdus = [pdu(0x05, bytes([number]) * 100) for number in range(20)]
    stream = b"".join(pdus)
    segments = [(CLIENT, TARGET, 1 + at, stream[at : at + 70]) for at in range(0, len(stream), 50)]
    first, *others = segments + segments[3:7]
    random.Random(1).shuffle(others)
    assert [segment.payload for segment in cut(tmp_path, [first, *others])] == pdus


def test_what_is_no_pdu_stays_in_its_pieces(tmp_path: Path) -> None:
    whole = pdu(0x01)
    segments = [
        (CLIENT, TARGET, 1, whole + b"GET / HTTP/1.0\r\n" * 4),
        (CLIENT, TARGET, 113, b"Host: example.com\r\n"),
        (TARGET, CLIENT, 1, pdu(0x25, bytes(100))[:60]),
    ]
    assert [segment.payload for segment in cut(tmp_path, segments)] == [
        whole,
        b"GET / HTTP/1.0\r\n" * 4,
        b"Host: example.com\r\n",
        segments[2][3],
    ]


def test_a_pdu_that_is_longer_than_a_packet(tmp_path: Path) -> None:
    long = pdu(0x05, random.Random(1).randbytes(200_000))
    found = cut(tmp_path, [(CLIENT, TARGET, 1 + at, long[at : at + 50_000]) for at in range(0, len(long), 50_000)])
    assert [len(segment.payload) for segment in found] == [60_000, 60_000, 60_000, 20_048]
    (stretch,) = stretches(found)
    assert stretch.data == long


@pytest.mark.capture
def test_the_dissector_sees_every_pdu(tmp_path: Path) -> None:
    stream = pdu(0x05, bytes(512)) * 3
    parts = (stream[:564], stream[564:])  # 4 bytes of the second PDU are in the first segment
    segments = [(CLIENT, TARGET, 1, parts[0]), (CLIENT, TARGET, 565, parts[1])]
    cut(tmp_path, segments)
    judge = Capture(tmp_path / "new.pcap", port=TARGET[1])
    judge.abandon()
    assert judge.pdu_counts() == {0x05: 3}
    assert judge.unrecognised() == []
