"""The full feature phase: commands are under way, and anything at all comes in."""

import contextlib
import struct

from fuzz.pdu import decoded
from iscsifuse.errors import IscsifuseError, SessionLostError
from iscsifuse.iscsi.connection import Connection
from iscsifuse.iscsi.digest import crc32c_bytes
from iscsifuse.iscsi.incoming import Event
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import BHS_LENGTH, RESERVED_TAG, Opcode, padding, split_lengths
from iscsifuse.iscsi.request import NopOut, TaskManagementRequest, TextRequest
from iscsifuse.iscsi.tasks import Task

__all__ = ["FIRST_STAT_SN", "LUN", "READ_LENGTH", "WRITE_LENGTH", "check"]

LUN = bytes([0x40, 0x05, 1, 2, 3, 4, 5, 6])
READ_LENGTH = 300
WRITE_LENGTH = 40_000
FIRST_STAT_SN = 7
_READ = bytes([0x28, 0, 0, 0, 0, 7, 0, 0, 1, 0])
_WRITE = bytes([0x2A, 0, 0, 0, 0, 7, 0, 0, 1, 0])
_UNTOUCHED = 0xEE
_MOST_REPEATS = 20
_WORD = struct.Struct(">I")
_STAT_SN = 24


def check(data: bytes) -> None:
    """The first byte chooses digests and whether the PDUs are put right (lengths, StatSN); the rest is what came.

    Tags 1 to 5 are commands that were sent: a read, a write, one without data, a read that may be short, a long
    write; 6 a ping, 7 an abort, 8 a text request. One more command waits for the window.
    """
    if not data:
        return
    options = data[0]
    parameters = NegotiatedParameters(
        header_digest=bool(options & 1),
        data_digest=bool(options & 2),
        initial_r2t=bool(options & 4),
        immediate_data=not options & 8,
    )
    connection = Connection(parameters, cmd_sn=0, exp_stat_sn=FIRST_STAT_SN, exp_cmd_sn=0, max_cmd_sn=4)
    reads = [bytearray([_UNTOUCHED]) * READ_LENGTH for _ in range(2)]
    tasks = [
        Task(_READ, lun=LUN, buffer_in=memoryview(reads[0]), exact=True),
        Task(_WRITE, lun=LUN, buffer_out=memoryview(bytes(READ_LENGTH)), exact=True),
        Task(bytes(6), lun=LUN),
        Task(_READ, lun=LUN, buffer_in=memoryview(reads[1])),
        Task(_WRITE, lun=LUN, buffer_out=memoryview(bytes(WRITE_LENGTH)), exact=True),
        Task(bytes(6), lun=LUN),
    ]
    for task in tasks:
        connection.submit(task)
    for ping in (NopOut(immediate=True), TaskManagementRequest(), TextRequest()):
        connection.request(ping)
    ended: list[Event] = []
    with contextlib.suppress(IscsifuseError):
        if options & 0x80:
            for piece in _put_right(data[1:], connection, parameters):
                ended += connection.feed(piece)
        else:
            ended += connection.feed(data[1:])
    ended += connection.take_events()
    _check_output(connection, parameters, received=len(data))
    completed = [event for event in ended if isinstance(event, Task)]
    for task in completed:
        _check_success(task)
    completed += connection.fail_all(SessionLostError("the connection is gone"))
    assert all(task.done for task in tasks), "a command never ended"
    assert sorted(map(id, completed)) == sorted(map(id, tasks)), "a command ended twice, or another one did"
    for task, memory in ((tasks[0], reads[0]), (tasks[3], reads[1])):
        beyond = memory[task.received :]
        assert beyond == bytes([_UNTOUCHED]) * len(beyond), "bytes were written that the task doesn't count"


def _check_success(task: Task) -> None:
    """No read is a success without its data, no write without its data having been asked for."""
    if task.error is None and task.status == 0:
        assert task.buffer_in is None or not task.exact or task.received == task.expected
        assert task.buffer_out is None or task.solicited == task.expected


def _check_output(connection: Connection, parameters: NegotiatedParameters, *, received: int) -> None:
    """What we say is well-formed, and not without bounds."""
    said = b"".join(connection.output)
    assert len(said) < _MOST_REPEATS * (WRITE_LENGTH + READ_LENGTH) + 64 * received + 8192, "more and more is sent"
    pdus, error = decoded(said, header_digest=parameters.header_digest, data_digest=parameters.data_digest)
    assert error is None
    encoded = (pdu.encode(header_digest=parameters.header_digest, data_digest=parameters.data_digest) for pdu in pdus)
    assert sum(map(len, encoded)) == len(said), "there is a torn PDU in what is sent"


def _put_right(stream: bytes, connection: Connection, parameters: NegotiatedParameters) -> list[bytes]:
    """PDUs as they should be: lengths of what is there, no additional headers, the next StatSN, right digests."""
    pieces = []
    stat_sn = connection.exp_stat_sn
    while len(stream) >= BHS_LENGTH:
        header, stream = bytearray(stream[:BHS_LENGTH]), stream[BHS_LENGTH:]
        _, length = split_lengths(header)
        body = stream[:length]
        stream = stream[length + len(padding(length)) :]
        _WORD.pack_into(header, 4, len(body))
        opcode, itt = header[0] & 0x3F, header[16:20]
        silent = (
            opcode == Opcode.R2T
            or (opcode == Opcode.DATA_IN and not header[1] & 1)
            or (opcode == Opcode.NOP_IN and itt == _WORD.pack(RESERVED_TAG))
        )
        _WORD.pack_into(header, _STAT_SN, stat_sn)
        stat_sn = (stat_sn + (not silent)) & 0xFFFFFFFF
        piece = bytes(header) + (crc32c_bytes((header,)) if parameters.header_digest else b"")
        if body:
            body += padding(len(body))
            piece += body + (crc32c_bytes((body,)) if parameters.data_digest else b"")
        pieces.append(piece)
    return pieces
