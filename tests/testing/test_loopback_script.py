from dataclasses import replace
from typing import Any

import pytest
import trio
from loopback_client import Client, EndOfStreamError
from test_loopback_session import good, log_in, serving

from iscsifuse.errors import FormatError
from iscsifuse.iscsi.pdu import Opcode, Pdu
from iscsifuse.iscsi.request import NopOut
from iscsifuse.iscsi.response import DataIn, NopIn, ScsiResponse
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.cdb import Opcode as Scsi
from iscsifuse.scsi.sense import Sense, SenseKey
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import (
    Action,
    Answer,
    Call,
    Change,
    ChangeBytes,
    Close,
    Cut,
    Delay,
    Drop,
    Duplicate,
    Inject,
    Late,
    Stall,
    SwapWithNext,
    reparse,
)
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import (
    IN,
    OUT,
    Channel,
    Direction,
    Rule,
    Script,
    Seen,
    all_of,
    anything,
    cdb,
    has_itt,
    is_a,
    lba,
    lun,
)
from iscsifuse.testing.target import LoopbackTarget

SENSE = Sense(key=SenseKey.HARDWARE_ERROR, asc=0x44).encode()
READ = cdbs.read_10(lba=0, blocks=1)


async def read(client: Client, block: int = 0) -> bytes:
    result = await client.read(cdbs.read_10(lba=block, blocks=1), 512)
    assert good(result)
    return result.data


def rule(target: LoopbackTarget, direction: Direction, action: Action, **options: Any) -> None:
    target.script.add(Rule(direction, action, **{"match": cdb(Scsi.READ_10), **options}))


def letters() -> Disk:
    return Disk.from_bytes(b"".join(bytes([letter]) * 512 for letter in b"abcdefgh"))


# --- which PDU is meant ---


def seen(command: bytes = READ, *, number: int = 0) -> Seen:
    from iscsifuse.iscsi.request import ScsiCommand

    pdu = ScsiCommand(itt=7, lun=bytes([0, number]) + bytes(6), cdb=command.ljust(16, b"\0"))
    return Seen(pdu, pdu)


@pytest.mark.parametrize(
    ("match", "hit", "miss"),
    [
        (anything, seen(), None),
        (is_a(Opcode.SCSI_COMMAND, Opcode.R2T), seen(), Seen(NopIn(), None)),
        (cdb(Scsi.READ_10, Scsi.READ_16), seen(), seen(cdbs.test_unit_ready())),
        (cdb(0), seen(cdbs.test_unit_ready()), Seen(NopIn(), None)),
        (lun(3), seen(number=3), seen()),
        (lba(5), seen(cdbs.read_10(lba=4, blocks=2)), seen(cdbs.read_10(lba=6, blocks=2))),
        (lba(5, blocks=9), seen(cdbs.read_10(lba=13, blocks=2)), seen(cdbs.read_10(lba=14, blocks=2))),
        (lba(0), seen(), Seen(NopIn(), None)),
        (has_itt(7), seen(), Seen(NopIn(itt=8), None)),
        (all_of(has_itt(7), lun(0)), seen(), seen(number=1)),
    ],
)
def test_matches(match: Any, hit: Seen, miss: Seen | None) -> None:
    assert match(hit)
    assert miss is None or not match(miss)


def test_nth_times_and_log() -> None:
    script = Script(
        Rule(IN, Drop(), is_a(Opcode.NOP_OUT), nth=2, times=2, name="drop"), Rule(IN, Delay(1), nth=3, times=0)
    )
    channel = Channel(script)
    hits = []
    for number in range(6):
        steps = channel.steps(IN, NopOut(itt=number), encode=lambda pdu: pdu.encode())
        hits.append(len(steps))
    # The second rule counts also what the first one acts on.
    assert hits == [1, 0, 0, 2, 2, 2]
    assert [(fired.rule, fired.itt, fired.count) for fired in script.log] == [
        ("drop", 1, 2),
        ("drop", 2, 3),
        ("1", 3, 4),
        ("1", 4, 5),
        ("1", 5, 6),
    ]
    assert script.active
    script.clear()
    assert not script.active


def test_chance_is_repeatable() -> None:
    def draw(seed: int) -> list[int]:
        script = Script(Rule(OUT, Drop(), times=0, chance=0.5), seed=seed)
        for number in range(40):
            script.choose(OUT, Seen(NopIn(itt=number), None))
        return [fired.itt for fired in script.log]

    assert draw(1) == draw(1)
    assert 5 < len(draw(1)) < 35
    assert draw(1) != draw(2)


def test_reparse() -> None:
    pdu = NopOut(itt=5, data=b"hello")
    assert reparse(pdu.encode()) == pdu
    assert reparse(pdu.encode()[:50]) is None
    assert reparse(b"x") is None
    with pytest.raises(FormatError):
        reparse(b"\x3a".ljust(48, b"\0"))


# --- what happens to it ---


async def test_change_on_the_way_out() -> None:
    async with serving(letters()) as target:
        rule(target, OUT, Change(lambda pdu: replace(pdu, data=b"z" * 512)), nth=2)
        client = await log_in(target)
        assert [await read(client), await read(client), await read(client)] == [b"a" * 512, b"z" * 512, b"a" * 512]
        assert [fired.opcode for fired in target.script.log] == [Opcode.DATA_IN]


async def test_change_on_the_way_in_is_not_held_against_the_initiator() -> None:
    def elsewhere(pdu: Pdu) -> Pdu:
        return replace(pdu, cdb=cdbs.read_10(lba=3, blocks=1).ljust(16, b"\0"))  # type: ignore[call-arg]

    async with serving(letters()) as target:
        rule(target, IN, Change(elsewhere))
        client = await log_in(target)
        assert [await read(client), await read(client)] == [b"d" * 512, b"a" * 512]


async def test_change_bytes() -> None:
    async with serving(letters()) as target:
        rule(target, OUT, ChangeBytes(lambda raw: raw[:100] + b"!" + raw[101:]))
        rule(target, IN, ChangeBytes(lambda raw: raw[:37] + b"\2" + raw[38:]), nth=2)
        client = await log_in(target)
        assert (await read(client)).count(b"!") == 1
        assert await read(client) == b"c" * 512


async def test_drop_and_duplicate() -> None:
    async with serving(letters()) as target:
        client = await log_in(target)
        rule(target, IN, Drop())
        rule(target, OUT, Duplicate(2))
        with trio.move_on_after(0.05):
            await read(client)
        client.cmd_sn -= 1
        target.violations.clear()
        await read(client)
        copies = [await client.receive() for _ in range(2)]
        assert [type(pdu) for pdu in copies] == [DataIn, DataIn]
        target.violations.clear()  # the numbers that the dropped command had used


async def test_delay(autojump_clock: trio.testing.MockClock) -> None:  # noqa: ARG001
    async with serving(letters()) as target:
        client = await log_in(target)
        rule(target, OUT, Delay(5))
        start = trio.current_time()
        await read(client)
        assert 5 <= trio.current_time() - start < 6
        rule(target, IN, Delay(7))
        await read(client)
        assert 12 <= trio.current_time() - start < 14


async def test_late_lets_others_overtake() -> None:
    async with serving(letters()) as target:
        client = await log_in(target)
        rule(target, IN, Late(0.1))
        await client.send(client.command(READ, read=512))
        assert await read(client, 1) == b"b" * 512
        assert await client.receive()
        assert [entry.lba for entry in target.ledger] == [1, 0]


async def test_swap_with_next() -> None:
    async with serving(letters(), clean=False) as target:
        client = await log_in(target)
        rule(target, OUT, SwapWithNext())
        first, second = client.command(READ, read=512), client.command(cdbs.test_unit_ready())
        await client.send(first)
        await client.send(second)
        assert [(await client.receive()).itt, (await client.receive()).itt] == [second.itt, first.itt]


@pytest.mark.parametrize("reset", [False, True])
async def test_close(reset: bool) -> None:
    async with serving(letters()) as target:
        client = Client(await trio.open_tcp_stream(target.host, target.port))
        await client.login()
        rule(target, OUT, Close(reset=reset))
        with pytest.raises(EndOfStreamError):
            await read(client)
        await client.stream.aclose()
        client = await log_in(target)
        rule(target, OUT, Close(after=True))
        await read(client)
        assert await client.expect_end() == b""


@pytest.mark.parametrize("count", [0, 1, 47, 48, 49, 559])
async def test_cut_on_the_way_out(count: int) -> None:
    async with serving(letters()) as target:
        client = await log_in(target)
        rule(target, OUT, Cut(after=count))
        await client.send(client.command(READ, read=512))
        assert len(await client.expect_end()) == count


async def test_cut_on_the_way_in() -> None:
    async with serving(letters()) as target:
        client = await log_in(target)
        target.script.add(Rule(IN, Cut(after=40), cdb(Scsi.WRITE_10)))
        await client.send(client.command(cdbs.write_10(lba=0, blocks=1), write=512, data=bytes(512)))
        assert await client.expect_end() == b""
        assert target.ledger == []


async def test_stall(autojump_clock: trio.testing.MockClock) -> None:  # noqa: ARG001
    async with serving(letters()) as target:
        client = await log_in(target)
        rule(target, OUT, Stall(after=60))
        await client.send(client.command(READ, read=512))
        await trio.sleep(5)
        assert len(await client.stream.receive_some(1000)) == 60
        with trio.move_on_after(1000) as scope:
            await client.stream.receive_some(1)
        assert scope.cancelled_caught


async def test_inject() -> None:
    async with serving(letters()) as target:
        client = await log_in(target)
        noise = NopIn(stat_sn=2, exp_cmd_sn=100, max_cmd_sn=228)
        rule(target, OUT, Inject(before=[noise], after=[noise.encode(), lambda pdu: replace(pdu, itt=77)]))
        await client.send(client.command(READ, read=512))
        pdus = [await client.receive() for _ in range(4)]
        assert [(type(pdu), pdu.itt) for pdu in pdus] == [
            (NopIn, 2**32 - 1),
            (DataIn, 2),
            (NopIn, 2**32 - 1),
            (DataIn, 77),
        ]


async def test_call() -> None:
    async with serving(letters()) as target:
        client = await log_in(target)
        rule(target, IN, Call(lambda: target.disk().write(b"new" + bytes(509), lba=0)))
        assert (await read(client))[:3] == b"new"


async def test_answer_without_executing() -> None:
    async with serving(letters()) as target:
        client = await log_in(target)
        target.script.add(Rule(IN, Answer(Status.BUSY), cdb(Scsi.WRITE_10)))
        rule(target, IN, Answer(Status.CHECK_CONDITION, SENSE))
        rule(target, IN, Answer(Status.GOOD, response=1), nth=2)
        result = await client.write(cdbs.write_10(lba=0, blocks=1), bytes(512), immediate=512)
        assert result.status == Status.BUSY
        result = await client.read(READ, 512)
        assert result.sense
        assert (result.status, result.data, result.sense.asc) == (Status.CHECK_CONDITION, b"", 0x44)
        response = (await client.read(READ, 512)).pdus[-1]
        assert isinstance(response, ScsiResponse)
        assert response.response == 1
        assert target.ledger == []


async def test_answer_otherwise_than_it_ended() -> None:
    async with serving(letters()) as target:
        client = await log_in(target)
        target.script.add(Rule(OUT, Answer(Status.CHECK_CONDITION, SENSE), times=0))
        result = await client.write(cdbs.write_10(lba=0, blocks=1), b"x" * 512)
        assert (result.status, len(target.ledger)) == (Status.CHECK_CONDITION, 1)
        result = await client.read(READ, 512)
        assert [type(pdu) for pdu in result.pdus] == [ScsiResponse]
