"""A target keeps an old write back, and lets it go when a newer one may be there already.

The old write is one whose connection was lost: the target has its data, we have no status. It is sent again on the
next session, and a newer write to the same block follows. Where the old one lands before it is sent again, no harm is
done; that is what the two barriers are for: the login with the same ISID (RFC 7143 §6.3.5), and ABORT TASK SET.
"""

import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from reliability_kit import BLOCK, RECOVERY, Bench, bench, config_of, pattern

from iscsifuse.initiator import clearing, liveness, session
from iscsifuse.initiator.settings import Portal
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi.pdu import Opcode, Pdu
from iscsifuse.iscsi.request import ScsiCommand
from iscsifuse.iscsi.response import Reject, RejectReason, TaskManagementResponse, TaskResponse
from iscsifuse.testing.actions import Action, Call, Change, Drop, End, Stall, Step
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Rule, all_of, is_a
from iscsifuse.testing.script import cdb as has_cdb

pytestmark = pytest.mark.expect_log(RECOVERY)

WRITE = all_of(is_a(Opcode.SCSI_COMMAND), has_cdb(0x2A))
SYNCHRONIZE = all_of(is_a(Opcode.SCSI_COMMAND), has_cdb(0x35))
PLACE = 7


@dataclass
class Zombie:
    """A write that the target has taken and not done, on a connection that is gone.

    As an action it takes the write and cuts the connection; ``land`` has it done, once.
    """

    disk: Disk
    held: list[bytes] = field(default_factory=list)
    landed: list[str] = field(default_factory=list)

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        assert isinstance(pdu, ScsiCommand)
        self.held.append(pdu.data)
        return (End(reset=True),)

    def land(self, when: str) -> Call:
        def do() -> None:
            if self.held and not self.landed:
                self.landed.append(when)
                self.disk.write(self.held[0], lba=PLACE)

        return Call(do)


async def old_and_new(at: Bench) -> None:
    """An old write is lost on its way; a newer one to the same block follows; both are fsynced."""
    handle = at.file.open()
    await at.file.write(PLACE * BLOCK, pattern(1))
    await at.file.drain(handle)
    await at.file.write(PLACE * BLOCK, pattern(2))
    await at.file.sync(handle)


def zombie_target(*, land_at: str, more: Sequence[Rule] = ()) -> tuple[Disk, Zombie, list[Rule]]:
    disk = Disk(blocks=64)
    zombie = Zombie(disk)
    moments = {
        "login": Rule(IN, zombie.land("login"), is_a(Opcode.LOGIN_REQUEST), times=0),
        "task management": Rule(IN, zombie.land("task management"), is_a(Opcode.TASK_MANAGEMENT_REQUEST)),
        "the end": Rule(IN, zombie.land("the end"), SYNCHRONIZE),
    }
    # Whoever never asks the target to end old tasks gets the old write in the end: that is what is proven here.
    rules = [Rule(IN, zombie, WRITE), *more, moments[land_at], moments["the end"]]
    return disk, zombie, rules


async def run(disk: Disk, rules: Sequence[Rule]) -> None:
    config = config_of(disk)
    for rule in rules:
        config.script.add(rule)
    async with bench(config) as at:
        await old_and_new(at)
        assert at.nexus.reconnects >= 1
        assert bytes(await at.file.read(PLACE * BLOCK, BLOCK)) == pattern(2)


@pytest.mark.conformance(101)
@pytest.mark.conformance(102)
@pytest.mark.parametrize("land_at", ["login", "task management"], ids=["compliant", "slow-aborting"])
async def test_an_old_write_does_not_overtake(land_at: str) -> None:
    disk, zombie, rules = zombie_target(land_at=land_at)
    await run(disk, rules)
    assert zombie.landed == [land_at]
    assert disk.contents(lba=PLACE, blocks=1) == pattern(2)


@pytest.mark.conformance(102)
async def test_what_can_not_be_defended_is_a_target_that_says_it_is_gone_and_does_it_later() -> None:
    """docs/reliability.md says so. Nothing more could be asked: both barriers lie before the write is sent again."""
    disk = Disk(blocks=64)
    zombie = Zombie(disk)
    seen: list[Opcode] = []

    def note(pdu: Pdu) -> Pdu:
        seen.append(pdu.OPCODE)
        return pdu

    interesting = is_a(Opcode.LOGIN_REQUEST, Opcode.TASK_MANAGEMENT_REQUEST)
    config = config_of(disk)
    config.script.add(Rule(IN, zombie, WRITE))
    for match in (interesting, WRITE):
        config.script.add(Rule(IN, Change(note), match, times=0))
    async with bench(config) as at:
        await old_and_new(at)
        assert disk.contents(lba=PLACE, blocks=1) == pattern(2)
        zombie.land("afterwards").function()
    order = seen[seen.index(Opcode.TASK_MANAGEMENT_REQUEST) - 1 :]
    assert order[:4] == [
        Opcode.LOGIN_REQUEST,
        Opcode.TASK_MANAGEMENT_REQUEST,
        Opcode.SCSI_COMMAND,  # the old one again
        Opcode.SCSI_COMMAND,  # the newer one
    ]
    assert zombie.landed == ["afterwards"]
    assert disk.contents(lba=PLACE, blocks=1) == pattern(1)


def _reject(pdu: Pdu) -> Pdu:
    assert isinstance(pdu, TaskManagementResponse)
    return Reject(
        reason=RejectReason.COMMAND_NOT_SUPPORTED,
        stat_sn=pdu.stat_sn,
        exp_cmd_sn=pdu.exp_cmd_sn,
        max_cmd_sn=pdu.max_cmd_sn,
        data=bytes([Opcode.TASK_MANAGEMENT_REQUEST | 0x40]) + bytes(47),
    )


def _unsupported(pdu: Pdu) -> Pdu:
    assert isinstance(pdu, TaskManagementResponse)
    return replace(pdu, response=TaskResponse.FUNCTION_NOT_SUPPORTED)


@pytest.mark.conformance(95)
@pytest.mark.parametrize(
    "action", [Change(_unsupported), Change(_reject), Drop()], ids=["not supported", "rejected", "not answered"]
)
async def test_a_target_that_does_not_know_the_second_barrier_has_had_the_first(
    action: Action, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clearing, "BARRIER_LIMIT", 0.1)
    answer = Rule(OUT, action, is_a(Opcode.TASK_MANAGEMENT_RESPONSE), times=0)
    disk, zombie, rules = zombie_target(land_at="login", more=[answer])
    await run(disk, rules)
    assert zombie.landed == ["login"]
    assert disk.contents(lba=PLACE, blocks=1) == pattern(2)


@pytest.mark.parametrize("action", [Change(_reject), Drop()], ids=["rejected", "not answered"])
async def test_a_target_that_can_not_take_the_question_is_asked_once(
    action: Action, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clearing, "BARRIER_LIMIT", 0.1)
    disk = Disk(blocks=64)
    config = config_of(disk)
    config.script.add(Rule(IN, Cutting(), WRITE, name="cut"))
    config.script.add(Rule(IN, Cutting(), WRITE, nth=3, name="cut"))
    config.script.add(Rule(IN, Call(lambda: None), is_a(Opcode.TASK_MANAGEMENT_REQUEST), times=0, name="asked"))
    config.script.add(Rule(OUT, action, is_a(Opcode.TASK_MANAGEMENT_RESPONSE), times=0))
    async with bench(config) as at:
        for number in (1, 2):
            await at.file.write(0, pattern(number))
            await at.file.sync()
            assert disk.contents(lba=0, blocks=1) == pattern(number)
    fired = [line.rule for line in config.script.log]
    assert fired.count("cut") == 2
    assert fired.count("asked") == 1


async def test_a_loss_behind_the_first_barrier_is_followed_by_both() -> None:
    """The second barrier is asked for until it was had: here the connection dies as soon as it is asked for."""
    disk = Disk(blocks=64)
    zombie = Zombie(disk)
    asked = is_a(Opcode.TASK_MANAGEMENT_REQUEST)
    rules = [
        Rule(IN, zombie, WRITE),
        Rule(IN, Cutting(), asked, times=2),
        Rule(IN, zombie.land("third"), asked, nth=3),
        Rule(IN, zombie.land("the end"), SYNCHRONIZE),
    ]
    await run(disk, rules)
    assert zombie.landed == ["third"]
    assert disk.contents(lba=PLACE, blocks=1) == pattern(2)


async def test_a_line_that_falls_silent_behind_the_first_barrier_is_followed_by_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No answer on a line that is dead says nothing about the target: it is asked again, and from then on."""
    monkeypatch.setattr(liveness, "PING_AFTER", 0.2)
    monkeypatch.setattr(liveness, "PING_LIMIT", 0.2)
    monkeypatch.setattr(session, "_TICK", 0.05)
    monkeypatch.setattr(clearing, "BARRIER_LIMIT", 1.5)
    disk = Disk(blocks=64)
    zombie = Zombie(disk)
    asked = is_a(Opcode.TASK_MANAGEMENT_REQUEST)
    rules = [
        Rule(IN, zombie, WRITE),
        Rule(IN, Stall(), asked),
        Rule(IN, zombie.land("second"), asked, nth=2),
        Rule(IN, zombie.land("the end"), SYNCHRONIZE),
    ]
    await run(disk, rules)
    assert zombie.landed == ["second"]
    assert disk.contents(lba=PLACE, blocks=1) == pattern(2)


class Cutting:
    """The connection ends in the PDU's place."""

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        return (End(reset=True),)


async def test_where_nothing_was_being_written_nothing_is_asked() -> None:
    config = config_of(Disk(blocks=64))
    config.script.add(Rule(IN, Call(lambda: None), is_a(Opcode.TASK_MANAGEMENT_REQUEST), times=0))
    async with bench(config) as at:
        await at.file.write(0, pattern(1))
        await at.file.sync()
        at.target.drop_connections()
        await at.unit.read_into(memoryview(bytearray(BLOCK)), lba=0)
        assert at.nexus.reconnects == 1
    assert config.script.log == []


async def test_a_session_ends_with_a_reset_even_if_this_process_is_killed() -> None:
    async with bench(config_of(Disk(blocks=64))) as at:
        linger = at.nexus.session.transport._sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        assert struct.unpack("ii", linger) == (1, 0)


@pytest.mark.parametrize("in_order", [False, True])
async def test_what_the_kernel_has_not_sent_yet_is_thrown_away_with_a_lost_session(in_order: bool) -> None:
    """Else the kernel delivers it in the background, whenever the other side reads again: after a newer write."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        transport = await Transport.connect(Portal("127.0.0.1", listener.getsockname()[1]))
        other, _ = listener.accept()
        with other:
            transport.reset_on_close()
            transport.send([bytes(64 << 20)])
            assert transport.pending
            sent = transport.bytes_sent
            transport.close(in_order=in_order)
            other.settimeout(5)
            received = 0
            try:
                while data := other.recv(1 << 20):
                    received += len(data)
                end = "FIN"
            except ConnectionResetError:
                end = "RST"
            assert end == ("FIN" if in_order else "RST")
            assert (received == sent) is in_order
