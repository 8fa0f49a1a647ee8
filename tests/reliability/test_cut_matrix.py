"""The connection ends at every byte of a conversation, in either direction.

A fixed script (login, reads, writes of every kind, fsyncs, logout) is played once to learn which PDUs it takes. Then
it is played anew for each byte of each of them, and the connection ends right there: on its way in, so that the
target never had the PDU; on its way out, so that it had executed the command and its answer is torn. Nothing of it
may be seen: all reads are right, all fsyncs succeed, and after each fsync the disk's stable storage holds exactly
what was written, by commands that were really executed.

The quick run takes every second byte of the headers in the midst of the conversation, both ends of each, and some of
all others; ``--slow`` takes all of them. The recovery itself is cut likewise: the first loss is at a fixed place, the
second one everywhere after it.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import trio
from reliability_kit import BLOCK, RECOVERY, Bench, bench, config_of, pattern, settings_of

from iscsifuse.errors import IscsifuseError
from iscsifuse.initiator import liveness
from iscsifuse.iscsi.pdu import BHS_LENGTH, Opcode
from iscsifuse.scsi.cdb import Opcode as Scsi
from iscsifuse.testing.actions import Action, Cut, Stall
from iscsifuse.testing.config import TargetKeys
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Direction, Script, Seen

pytestmark = pytest.mark.expect_log(RECOVERY)

BLOCKS = 32
KEYS = TargetKeys(
    default_time2wait=0,
    first_burst_length=1024,
    max_burst_length=2048,
    max_recv_data_segment_length=1024,
    max_outstanding_r2t=1,
)
WRITES = ("WRITE(10)", "WRITE(16)")
HEADER = {1, BHS_LENGTH - 1, *range(0, BHS_LENGTH + 1, 2)}
"""Where a PDU ends in the quick run."""


@dataclass(frozen=True, slots=True)
class Place:
    """A byte of a PDU: the ``nth`` that goes this way, counted from 1."""

    direction: Direction
    nth: int
    after: int


@dataclass(frozen=True, slots=True)
class Sent:
    """A PDU of the conversation."""

    direction: Direction
    nth: int
    opcode: Opcode
    length: int
    scsi: int | None


class Recorder(Script):
    """Writes down what goes by, and has one thing happen at certain places."""

    def __init__(self, *plan: tuple[Place, Action]) -> None:
        super().__init__()
        self.sent: list[Sent] = []
        self.hit: list[Sent] = []
        self._counts = {IN: 0, OUT: 0}
        self._plan = {(place.direction, place.nth): action for place, action in plan}

    @property
    def active(self) -> bool:
        return True

    def choose(self, direction: Direction, seen: Seen) -> Action | None:
        self._counts[direction] += 1
        nth = self._counts[direction]
        scsi = None if seen.command is None else seen.command.cdb[0]
        sent = Sent(direction, nth, seen.pdu.OPCODE, len(seen.pdu.encode()), scsi)
        self.sent.append(sent)
        action = self._plan.get((direction, nth))
        if action is not None:
            self.hit.append(sent)
        return action


@dataclass
class Model:
    """What the blocks have to hold, and what the target really did."""

    at: Bench
    content: bytearray = field(default_factory=lambda: bytearray(BLOCKS * BLOCK))

    async def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        assert await self.at.file.write(offset, data) == len(data)

    async def read(self, offset: int, length: int) -> None:
        assert bytes(await self.at.file.read(offset, length)) == self.content[offset : offset + length]

    async def sync(self) -> None:
        await self.at.file.sync()
        engine = self.at.target.engine()
        names = [entry.name for entry in engine.ledger if entry.status == 0]
        # No success without execution: the last write that counts comes before a flush that was executed.
        written = max((index for index, name in enumerate(names) if name in WRITES), default=-1)
        flushed = max((index for index, name in enumerate(names) if "SYNCHRONIZE" in name), default=-1)
        assert flushed > written >= 0
        assert self.at.disk.unstable_blocks == 0
        assert self.at.disk.contents() == self.content


async def play(script: Script, *, login_timeout: float = 5.0) -> int:
    """The conversation; how often it was logged in again."""
    disk = Disk(blocks=BLOCKS)
    config = config_of(disk, keys=KEYS, script=script)
    async with bench(config, settings=settings_of(login_timeout=login_timeout)) as at:
        model = Model(at)
        await model.read(0, 3 * BLOCK)  # one Data-In, with status
        await model.write(0, pattern(1, 2))  # all of it immediate data
        await model.sync()
        await model.write(0, pattern(2, 2))  # the same blocks: an old write must not come after this one
        await at.file.drain()
        await model.write(8 * BLOCK, pattern(3, 8))  # 1024 bytes immediate, 2048 on an R2T, 1024 on another one
        await at.file.drain()
        await model.write(20 * BLOCK + 100, b"in the midst of a block")  # read, change, write
        await model.sync()
        await model.write(0, pattern(4, 2))
        await at.file.drain()
        at.file.invalidate()
        await model.read(8 * BLOCK, 8 * BLOCK)  # several Data-Ins
        await model.read(0, 2 * BLOCK)
        await model.sync()
        reconnects = at.nexus.reconnects
    assert disk.power_cut() == 0
    assert disk.contents() == model.content
    return reconnects


def trace(*plan: tuple[Place, Action]) -> dict[tuple[Direction, int], Sent]:
    """The PDUs of the conversation; in each direction they are the same each time."""
    recorder = Recorder(*plan)
    trio.run(play, recorder)
    return {(one.direction, one.nth): one for one in recorder.sent}


def _is_login(sent: Sent) -> bool:
    return sent.opcode in (Opcode.LOGIN_REQUEST, Opcode.LOGIN_RESPONSE)


def _is_logout(sent: Sent) -> bool:
    return sent.opcode in (Opcode.LOGOUT_REQUEST, Opcode.LOGOUT_RESPONSE)


def every_byte(sent: Iterable[Sent]) -> list[Place]:
    """``after`` is how many bytes still come: 0 is the end in the PDU's place."""
    return [Place(one.direction, one.nth, after) for one in sent for after in range(one.length)]


def one_of_each_kind(sent: Iterable[Sent]) -> list[Sent]:
    """One PDU of each kind, for each kind of command, in the midst of the conversation."""
    found: dict[object, Sent] = {}
    for one in sent:
        if one.scsi in (Scsi.READ_10, Scsi.WRITE_10, Scsi.SYNCHRONIZE_CACHE_10):
            found.setdefault((one.direction, one.opcode, one.scsi), one)
    return list(found.values())


PARTS = 16
in_parts = pytest.mark.parametrize(
    "part", [None, *(pytest.param(number, marks=pytest.mark.slow) for number in range(PARTS))]
)
"""The quick run has no number; with ``--slow`` all places are tried, in so many parts."""


def chosen(part: int | None, everywhere: list[Place], always: list[Place], samples: int) -> list[Place]:
    """The places of a part; or some that are always taken, and a seeded sample."""
    if part is not None:
        return everywhere[part::PARTS]
    others = [place for place in everywhere if place not in set(always)]
    return always + random.Random(20261121).sample(others, min(samples, len(others)))


@pytest.mark.conformance(97)
@in_parts
def test_a_connection_that_ends_at_any_byte(part: int | None) -> None:
    sent = trace()
    assert sent == trace()  # or else a place would mean nothing
    headers = [place for place in every_byte(one_of_each_kind(sent.values())) if place.after in HEADER]
    where = chosen(part, every_byte(sent.values()), headers, samples=60)
    logins = {key for key, one in sent.items() if _is_login(one)}
    for number, place in enumerate(where):
        recorder = Recorder((place, Cut(place.after, reset=number % 2 == 0)))
        one = sent[place.direction, place.nth]
        if (place.direction, place.nth) in logins:
            # The first login isn't tried again: who mounts is told.
            with pytest.raises(ExceptionGroup) as told:
                trio.run(play, recorder)
            assert told.value.split(IscsifuseError)[1] is None
        else:
            assert trio.run(play, recorder) == (0 if _is_logout(one) else 1)
        assert recorder.hit == [one]


FIRST_LOSS = Place(IN, 15, 700)  # in the data of the first write


def recovery_of(sent: Sequence[Sent]) -> list[Sent]:
    """From behind the first loss to the status of the write that was sent again; one step after the other."""
    lost = next(i for i, one in enumerate(sent) if (one.direction, one.nth) == (IN, FIRST_LOSS.nth))
    assert (sent[lost].opcode, sent[lost].scsi) == (Opcode.SCSI_COMMAND, Scsi.WRITE_10)
    again = next(
        i for i, one in enumerate(sent) if i > lost and (one.direction, one.scsi) == (OUT, int(Scsi.WRITE_10))
    )
    return list(sent[lost + 1 : again + 1])


@pytest.mark.conformance(97)
@in_parts
def test_a_recovery_that_is_interrupted_at_any_byte(part: int | None) -> None:
    first = (FIRST_LOSS, Cut(FIRST_LOSS.after))
    recovery = recovery_of(list(trace(first).values()))
    assert recovery == recovery_of(list(trace(first).values()))
    assert {Opcode.LOGIN_REQUEST, Opcode.TASK_MANAGEMENT_REQUEST} <= {one.opcode for one in recovery}
    where = chosen(part, every_byte(recovery), [], samples=90)
    for number, place in enumerate(where):
        recorder = Recorder(first, (place, Cut(place.after, reset=number % 2 == 0)))
        assert trio.run(play, recorder) in (1, 2)  # 2 where the new session was in use already
        assert [one.nth for one in recorder.hit] == [FIRST_LOSS.nth, place.nth]


@pytest.mark.conformance(97)
@in_parts
def test_a_connection_that_falls_silent_at_some_bytes(part: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes any more, and nothing is taken: only pings tell."""
    monkeypatch.setattr(liveness, "PING_AFTER", 0.1)
    monkeypatch.setattr(liveness, "PING_LIMIT", 0.1)
    sent = [one for one in trace().values() if not (_is_login(one) or _is_logout(one))]
    where = chosen(part, every_byte(sent)[::97], [], samples=8)
    for place in where:
        recorder = Recorder((place, Stall(place.after)))
        assert trio.run(partial(play, recorder, login_timeout=0.5)) >= 1
        assert len(recorder.hit) == 1
