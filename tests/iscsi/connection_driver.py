"""A Connection and the target's side of it: PDUs go in as the naive codec encodes them, and come out decoded."""

from dataclasses import replace

from iscsifuse.iscsi.connection import Connection
from iscsifuse.iscsi.incoming import Event
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import RESERVED_TAG, Pdu, decode_stream
from iscsifuse.iscsi.response import R2T, DataIn, NopIn, ScsiResponse, TargetPdu
from iscsifuse.iscsi.serial import add
from iscsifuse.iscsi.tasks import Task

LUN = bytes([0x40, 0x05, 1, 2, 3, 4, 5, 6])
READ_CDB = bytes([0x28, 0, 0, 0, 0, 7, 0, 0, 1, 0])
WRITE_CDB = bytes([0x2A, 0, 0, 0, 0, 7, 0, 0, 1, 0])


def pattern(length: int) -> bytes:
    """Bytes that tell where they belong."""
    return b"".join(number.to_bytes(4, "big") for number in range(length // 4 + 1))[:length]


def read(length: int, *, exact: bool = True) -> tuple[Task, bytearray]:
    buffer = bytearray(b"\xee" * length)
    return Task(READ_CDB, lun=LUN, buffer_in=memoryview(buffer), exact=exact), buffer


def write(length: int) -> Task:
    return Task(WRITE_CDB, lun=LUN, buffer_out=memoryview(pattern(length)))


def no_data() -> Task:
    return Task(bytes(6), lun=LUN)


def uses_stat_sn(pdu: TargetPdu) -> bool:
    if isinstance(pdu, DataIn):
        return pdu.has_status
    if isinstance(pdu, NopIn):
        return pdu.itt != RESERVED_TAG
    return not isinstance(pdu, R2T)


class Driver:
    """Drives a Connection.

    Attributes:
        connection: under test.
        stat_sn: what the target's next response will carry.
        room: how many commands the target is always ready to take.
    """

    def __init__(
        self, parameters: NegotiatedParameters | None = None, *, cmd_sn: int = 10, stat_sn: int = 100, room: int = 32
    ) -> None:
        self.parameters = parameters or NegotiatedParameters()
        self.stat_sn = stat_sn
        self.room = room
        self.connection = Connection(
            self.parameters,
            cmd_sn=cmd_sn,
            exp_stat_sn=stat_sn,
            exp_cmd_sn=cmd_sn,
            max_cmd_sn=add(cmd_sn, room - 1),
        )

    def sent(self) -> list[Pdu]:
        """What was sent since the last time, decoded."""
        stream = b"".join(self.connection.output)
        self.connection.output.clear()
        pdus = []
        while stream:
            pdu, used = self.decoded(stream)
            pdus.append(pdu)
            stream = stream[used:]
        return pdus

    def decoded(self, stream: bytes) -> tuple[Pdu, int]:
        p = self.parameters
        result = decode_stream(
            stream,
            header_digest=p.header_digest,
            data_digest=p.data_digest,
            max_data=p.target_max_recv_data_segment_length,
        )
        assert result is not None
        return result

    def submit(self, *tasks: Task) -> list[Pdu]:
        for task in tasks:
            self.connection.submit(task)
        return self.sent()

    def encoded(
        self,
        pdu: TargetPdu,
        *,
        stat_sn: int | None = None,
        exp_cmd_sn: int | None = None,
        max_cmd_sn: int | None = None,
    ) -> bytes:
        """A PDU as the target sends it; the numbers that aren't given are the right ones."""
        due = self.connection.window.cmd_sn
        full = replace(
            pdu,
            stat_sn=self.stat_sn if stat_sn is None else stat_sn,
            exp_cmd_sn=due if exp_cmd_sn is None else exp_cmd_sn,
            max_cmd_sn=add(due, self.room - 1) if max_cmd_sn is None else max_cmd_sn,
        )
        if stat_sn is None and uses_stat_sn(pdu):
            self.stat_sn = add(self.stat_sn, 1)
        p = self.parameters
        return full.encode(header_digest=p.header_digest, data_digest=p.data_digest)

    def give(
        self,
        pdu: TargetPdu,
        *,
        stat_sn: int | None = None,
        exp_cmd_sn: int | None = None,
        max_cmd_sn: int | None = None,
    ) -> list[Event]:
        """Have the connection receive a PDU."""
        return self.receive(self.encoded(pdu, stat_sn=stat_sn, exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn))

    def receive(self, stream: bytes) -> list[Event]:
        """Have it receive bytes, scattered over the buffers that it offers."""
        events = []
        while stream:
            count = 0
            for buffer in self.connection.buffers():
                piece = stream[count : count + len(buffer)]
                buffer[: len(piece)] = piece
                count += len(piece)
            events += self.connection.received(count)
            stream = stream[count:]
        return events

    def good(self, task: Task) -> list[Event]:
        """GOOD in a response of its own."""
        return self.give(ScsiResponse(itt=task.itt, exp_data_sn=task.next_data_sn))
