"""Data-Out PDUs, a whole sequence at a time.

Targets may take as little as 512 bytes of data in one PDU (8192 is common), so one R2T can ask for dozens of them.
Their headers differ in four fields; all are built in one go into one piece of memory, and the payload is never
copied: the result alternates header views and views of the caller's buffer, ready for a gather write.

Source: RFC 7143 §11.7, §4.2.5.2 (the F bit ends a sequence, unsolicited or answering one R2T; DataSN starts at 0).
"""

import struct

from iscsifuse.iscsi.digest import crc32c_bytes
from iscsifuse.iscsi.pdu import BHS_LENGTH, FINAL, Opcode, padding

__all__ = ["Buffer", "data_out_burst"]

Buffer = bytes | memoryview

_HEADER = struct.Struct(">BBHI8sII4xI4xII4x")
_LAST = struct.Struct(">BBxxI")
"""What the last header has of its own."""
_WORDS = BHS_LENGTH // 4
_DATA_SN = 9
_BUFFER_OFFSET = 10
"""Words of a header, and the two in which those of a sequence differ."""


def data_out_burst(
    payload: memoryview,
    *,
    lun: bytes,
    itt: int,
    ttt: int,
    exp_stat_sn: int,
    buffer_offset: int,
    segment_length: int,
    header_digest: bool,
    data_digest: bool,
) -> list[Buffer]:
    """One sequence of Data-Out PDUs.

    Args:
        payload: what the sequence carries, at least one byte.
        lun: 8 bytes.
        itt: tag of the command.
        ttt: tag of the R2T, or the reserved tag for unsolicited data.
        exp_stat_sn: acknowledges the target's responses.
        buffer_offset: where in the command's data the payload begins, in bytes.
        segment_length: most bytes that the target takes in one PDU (its MaxRecvDataSegmentLength).
        header_digest: append CRC32C to headers.
        data_digest: append CRC32C to data segments.

    Returns:
        Buffers to send in order; views of ``payload`` among them.
    """
    total = len(payload)
    starts = range(0, total, segment_length)
    count = len(starts)
    template = _HEADER.pack(
        Opcode.DATA_OUT, 0, 0, min(segment_length, total), lun, itt, ttt, exp_stat_sn, 0, buffer_offset
    )  # fmt: skip
    memory = bytearray(template * count)
    if count > 1:
        words = memoryview(memory).cast("I")
        words[_DATA_SN::_WORDS] = _big_endian(range(count))
        words[_BUFFER_OFFSET::_WORDS] = _big_endian(range(buffer_offset, buffer_offset + total, segment_length))
    _LAST.pack_into(memory, len(memory) - BHS_LENGTH, Opcode.DATA_OUT, FINAL, total - starts[-1])
    joined = bytes(memory)
    headers = [joined[at : at + BHS_LENGTH] for at in range(0, len(joined), BHS_LENGTH)]
    pieces = [payload[start : start + segment_length] for start in starts]
    if header_digest:
        headers = [header + crc32c_bytes((header,)) for header in headers]
    output: list[Buffer] = []
    if data_digest or segment_length & 3:
        for header, piece in zip(headers, pieces, strict=True):
            tail = padding(len(piece))
            if data_digest:
                tail += crc32c_bytes((piece, tail))
            output += (header, piece, tail) if tail else (header, piece)
    else:
        output += headers * 2  # for the room
        output[::2] = headers
        output[1::2] = pieces
        tail = padding(total)
        if tail:
            output.append(tail)
    return output


def _big_endian(numbers: range) -> memoryview:
    """Words as they are sent, in the form that a part of a larger memory has."""
    return memoryview(struct.pack(f">{len(numbers)}I", *numbers)).cast("I")
