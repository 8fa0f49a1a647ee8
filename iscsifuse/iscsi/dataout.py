"""Data-Out PDUs, a whole sequence at a time.

Targets may take as little as 512 bytes of data in one PDU (8192 is common), so one R2T can ask for dozens of them.
Their headers differ in four fields; all are built in one go into one piece of memory, and the payload is never
copied: the result alternates header views and views of the caller's buffer, ready for a gather write.

Source: RFC 7143 §11.7, §4.2.5.2 (the F bit ends a sequence, unsolicited or answering one R2T; DataSN starts at 0).
"""

import struct

from iscsifuse.iscsi.digest import DIGEST_LENGTH, crc32c, crc32c_bytes
from iscsifuse.iscsi.pdu import BHS_LENGTH, FINAL, Opcode, padding

__all__ = ["Buffer", "data_out_burst"]

Buffer = bytes | memoryview

_HEADER = struct.Struct(">BBHI8sII4xI4xII4x")
_LITTLE = struct.Struct("<I")


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
    count = -(-total // segment_length)
    stride = BHS_LENGTH + (DIGEST_LENGTH if header_digest else 0)
    memory = bytearray(stride * count)
    headers = memoryview(memory)
    output: list[Buffer] = []
    start = 0
    for data_sn in range(count):
        length = min(segment_length, total - start)
        at = data_sn * stride
        _HEADER.pack_into(
            memory, at, Opcode.DATA_OUT, FINAL if start + length == total else 0, 0, length, lun, itt, ttt,
            exp_stat_sn, data_sn, buffer_offset + start,
        )  # fmt: skip
        if header_digest:
            _LITTLE.pack_into(memory, at + BHS_LENGTH, crc32c(headers[at : at + BHS_LENGTH]))
        output.append(headers[at : at + stride])
        piece = payload[start : start + length]
        output.append(piece)
        tail = padding(length)
        if data_digest:
            tail += crc32c_bytes((piece, tail))
        if tail:
            output.append(tail)
        start += length
    return output
