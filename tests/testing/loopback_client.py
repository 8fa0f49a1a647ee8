"""A small initiator for tests of the loopback target: it sends exactly the PDUs that a test tells it to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import trio

from iscsifuse.iscsi import text
from iscsifuse.iscsi.pdu import RESERVED_TAG, Pdu, decode_stream
from iscsifuse.iscsi.request import DataOut, LoginRequest, LogoutRequest, ScsiCommand, Stage
from iscsifuse.iscsi.response import R2T, DataIn, LoginResponse, LogoutResponse, ScsiResponse
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.sense import Sense
from iscsifuse.testing.config import DEFAULT_TARGET_NAME

INITIATOR = "iqn.2026-11.io.github.iscsifuse:test"
ISID = bytes.fromhex("800123456789")
KEYS = (
    ("HeaderDigest", "None"),
    ("DataDigest", "None"),
    ("InitialR2T", "No"),
    ("ImmediateData", "Yes"),
    ("MaxRecvDataSegmentLength", "65536"),
    ("MaxBurstLength", "1048576"),
    ("FirstBurstLength", "262144"),
    ("MaxOutstandingR2T", "8"),
    ("DefaultTime2Wait", "2"),
    ("DefaultTime2Retain", "0"),
    ("MaxConnections", "1"),
    ("ErrorRecoveryLevel", "0"),
)


class EndOfStreamError(Exception):
    """The target closed the connection."""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    data: bytes
    sense: Sense | None
    residual: int
    overflow: bool
    underflow: bool
    pdus: tuple[Pdu, ...]


@dataclass
class Client:
    """One connection, with the numbers of a well-behaved initiator."""

    stream: trio.abc.Stream
    cmd_sn: int = 100
    exp_stat_sn: int = 0
    itt: int = 1
    header_digest: bool = False
    data_digest: bool = False
    keys: dict[str, str] = field(default_factory=dict)
    tsih: int = 0
    buffer: bytearray = field(default_factory=bytearray)

    # -- PDUs

    async def send(self, pdu: Pdu) -> None:
        await self.stream.send_all(pdu.encode(header_digest=self.header_digest, data_digest=self.data_digest))

    async def receive(self) -> Pdu:
        with trio.fail_after(10):
            while True:
                found = decode_stream(self.buffer, header_digest=self.header_digest, data_digest=self.data_digest)
                if found is not None:
                    del self.buffer[: found[1]]
                    return found[0]
                try:
                    more = await self.stream.receive_some(65536)
                except trio.BrokenResourceError:
                    more = b""
                if not more:
                    raise EndOfStreamError
                self.buffer += more

    async def expect_end(self) -> bytes:
        """Reads to the end of the connection; returns what came."""
        with trio.fail_after(10):
            while True:
                try:
                    more = await self.stream.receive_some(65536)
                except trio.BrokenResourceError:
                    more = b""
                if not more:
                    return bytes(self.buffer)
                self.buffer += more

    def next_itt(self) -> int:
        self.itt += 1
        return self.itt

    def next_cmd_sn(self) -> int:
        number = self.cmd_sn
        self.cmd_sn = (number + 1) & 0xFFFFFFFF
        return number

    # -- login

    def login_request(
        self, pairs: Iterable[tuple[str, str]], *, csg: int, nsg: int = 0, transit: bool = True, cont: bool = False
    ) -> LoginRequest:
        return LoginRequest(
            itt=1,
            transit=transit,
            cont=cont,
            csg=csg,
            nsg=nsg,
            isid=ISID,
            cmd_sn=self.cmd_sn,
            exp_stat_sn=self.exp_stat_sn,
            data=text.encode(pairs),
        )

    async def exchange(self, request: LoginRequest) -> LoginResponse:
        await self.send(request)
        response = await self.receive()
        assert isinstance(response, LoginResponse)
        self.exp_stat_sn = (response.stat_sn + 1) & 0xFFFFFFFF
        self.keys.update(text.decode(response.data))
        self.tsih = response.tsih
        return response

    async def login(
        self,
        *changes: tuple[str, str],
        target: str | None = DEFAULT_TARGET_NAME,
        initiator: str = INITIATOR,
        without: Sequence[str] = (),
    ) -> LoginResponse:
        """One request with all keys, straight to the full feature phase."""
        session = [("TargetName", target)] if target else [("SessionType", "Discovery")]
        keys = {**dict(KEYS), **dict(changes)}
        pairs = [("InitiatorName", initiator), *session, *((k, v) for k, v in keys.items() if k not in without)]
        response = await self.exchange(
            self.login_request(pairs, csg=Stage.LOGIN_OPERATIONAL_NEGOTIATION, nsg=Stage.FULL_FEATURE_PHASE)
        )
        self.header_digest = self.keys.get("HeaderDigest") == "CRC32C"
        self.data_digest = self.keys.get("DataDigest") == "CRC32C"
        return response

    async def logout(self) -> None:
        await self.send(LogoutRequest(itt=self.next_itt(), cmd_sn=self.cmd_sn, exp_stat_sn=self.exp_stat_sn))
        while not isinstance(await self.receive(), LogoutResponse):
            pass

    # -- SCSI

    def command(
        self,
        cdb: bytes,
        *,
        read: int = 0,
        write: int = 0,
        data: bytes = b"",
        final: bool = True,
        lun: int = 0,
        immediate: bool = False,
    ) -> ScsiCommand:
        return ScsiCommand(
            itt=self.next_itt(),
            immediate=immediate,
            final=final,
            read=read > 0,
            write=write > 0,
            lun=luns.encode(lun),
            expected_data_transfer_length=read or write,
            cmd_sn=self.cmd_sn if immediate else self.next_cmd_sn(),
            exp_stat_sn=self.exp_stat_sn,
            cdb=cdb.ljust(16, b"\0"),
            data=data,
        )

    async def read(self, cdb: bytes, length: int, *, lun: int = 0) -> Result:
        command = self.command(cdb, read=length, lun=lun)
        await self.send(command)
        return await self.result(command)

    async def plain(self, cdb: bytes, *, lun: int = 0) -> Result:
        command = self.command(cdb, lun=lun)
        await self.send(command)
        return await self.result(command)

    async def write(
        self,
        cdb: bytes,
        payload: bytes,
        *,
        immediate: int = 0,
        unsolicited: int = 0,
        segment: int = 65536,
        lun: int = 0,
    ) -> Result:
        """A write with so many bytes in the command, so many unsolicited, and the rest as R2Ts ask for it."""
        command = self.command(cdb, write=len(payload), data=payload[:immediate], final=unsolicited == 0, lun=lun)
        await self.send(command)
        await self.data_out(command, payload, immediate, unsolicited, ttt=RESERVED_TAG, segment=segment)
        return await self.result(command, payload, segment=segment)

    async def data_out(
        self, command: ScsiCommand, payload: bytes, offset: int, length: int, *, ttt: int, segment: int = 65536
    ) -> None:
        """One sequence of Data-Out PDUs."""
        end = offset + length
        for data_sn, start in enumerate(range(offset, end, segment)):
            stop = min(start + segment, end)
            await self.send(
                DataOut(
                    itt=command.itt,
                    lun=command.lun if ttt != RESERVED_TAG else bytes(8),
                    ttt=ttt,
                    final=stop == end,
                    exp_stat_sn=self.exp_stat_sn,
                    data_sn=data_sn,
                    buffer_offset=start,
                    data=payload[start:stop],
                )
            )

    async def result(self, command: ScsiCommand, payload: bytes = b"", *, segment: int = 65536) -> Result:
        """Receive until the command's status, answering R2Ts."""
        data = bytearray(command.expected_data_transfer_length if command.read else 0)
        pdus: list[Pdu] = []
        received = 0
        while True:
            pdu = await self.receive()
            pdus.append(pdu)
            if pdu.itt != command.itt:
                continue
            if isinstance(pdu, R2T):
                await self.data_out(
                    command,
                    payload,
                    pdu.buffer_offset,
                    pdu.desired_data_transfer_length,
                    ttt=pdu.ttt,
                    segment=segment,
                )
            if isinstance(pdu, DataIn):
                data[pdu.buffer_offset : pdu.buffer_offset + len(pdu.data)] = pdu.data
                received = max(received, pdu.buffer_offset + len(pdu.data))
            if isinstance(pdu, ScsiResponse) or (isinstance(pdu, DataIn) and pdu.has_status):
                self.exp_stat_sn = (pdu.stat_sn + 1) & 0xFFFFFFFF
                sense = Sense.decode(pdu.data[2:]) if isinstance(pdu, ScsiResponse) and pdu.data else None
                return Result(
                    pdu.status,
                    bytes(data[:received]),
                    sense,
                    pdu.residual_count,
                    pdu.overflow,
                    pdu.underflow,
                    tuple(pdus),
                )
