"""For the conformance cases of the full feature phase: an initiator, a target that is told what to do, a tape.

The target is a loopback target with a script. A test that wants to play the target itself has it `Bench.hold` some
commands: they are seen, and nobody answers but the test (`Bench.taken`, `Bench.say`). The tape has all PDUs as they
passed the target. Whatever the initiator does against RFC 7143 fails the test: the target's validator watches.
"""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import trio
from initiator_kit import (
    DEFAULT_TARGET_NAME,
    LUN_0,
    config_of,
    open_session,
    pattern,
    portal_of,
    serving,
    settings_of,
)
from trio.testing import MockClock

from iscsifuse.cache import BlockCache, BufferPool, CacheSettings, Handle
from iscsifuse.initiator import revival
from iscsifuse.initiator import session as session_module
from iscsifuse.initiator.inventory import scan
from iscsifuse.initiator.logical_unit import LogicalUnit
from iscsifuse.initiator.nexus import Nexus, open_nexus
from iscsifuse.initiator.session import Session
from iscsifuse.iscsi.pdu import RESERVED_TAG, Opcode, Pdu
from iscsifuse.iscsi.request import DataOut, NopOut, ScsiCommand
from iscsifuse.iscsi.response import R2T, DataIn, NopIn, ScsiResponse, TargetPdu
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import Change, Drop
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Direction, Match, Rule, Seen, all_of, cdb, is_a
from iscsifuse.testing.session import Session as Peer
from iscsifuse.testing.target import LoopbackTarget

__all__ = [
    "BLOCKS",
    "COMMAND",
    "DATA_IN",
    "READ",
    "RECOVERY",
    "RESPONSE",
    "WRITE",
    "Bench",
    "Tape",
    "altered",
    "bench",
    "content",
    "data_of",
    "file_bench",
    "jumping",
    "nexus_bench",
    "numbers_of",
    "unit_bench",
]

BLOCKS = 4096
READ, WRITE = cdb(0x28), cdb(0x2A)
COMMAND = is_a(Opcode.SCSI_COMMAND)
DATA_IN = is_a(Opcode.DATA_IN)
RESPONSE = is_a(Opcode.SCSI_RESPONSE)
RECOVERY = "session lost|logged in again|can't log in again"
"""What is logged when a session is lost and found again."""

P = TypeVar("P", bound=Pdu)
A = ParamSpec("A")


def jumping(test: Callable[A, Awaitable[None]]) -> Callable[A, None]:
    """A test on a clock that jumps when nothing happens, on sockets either: minutes take no time."""

    @functools.wraps(test)
    def run(*args: A.args, **kwargs: A.kwargs) -> None:
        with patch.object(session_module, "_TICK", 1.0), patch.object(revival, "LAST_BACK_OFF", 5.0):
            trio.run(partial(test, *args, **kwargs), clock=MockClock(autojump_threshold=0.01))

    return run


def content(lba: int, blocks: int = 1) -> bytes:
    """What the disk holds at the beginning."""
    return pattern(BLOCKS * 512)[lba * 512 : (lba + blocks) * 512]


def numbers_of(pdu: Any) -> dict[str, Any]:
    """StatSN and the window, for a PDU that takes another one's place."""
    return {"stat_sn": pdu.stat_sn, "exp_cmd_sn": pdu.exp_cmd_sn, "max_cmd_sn": pdu.max_cmd_sn}


def altered(**changes: Any) -> Change:
    """The same PDU with other fields; a function makes a field from the PDU."""

    def alter(pdu: Any) -> Any:
        return replace(pdu, **{name: new(pdu) if callable(new) else new for name, new in changes.items()})

    return Change(alter)


def data_of(pdus: list[DataOut]) -> bytes:
    """What some Data-Out PDUs carry, one after the other."""
    return b"".join(pdu.data for pdu in pdus)


class Tape:
    """What passed the target, in order; of what it sent, as it was before the script changed it.

    Attributes:
        log: which way, and what.
    """

    def __init__(self) -> None:
        self.log: list[tuple[Direction, Pdu]] = []
        self.grown = trio.Event()  # replaced whenever it has

    def rules(self) -> list[Rule]:
        """Rules that look and never act."""
        return [Rule(way, Drop(), partial(self._note, way)) for way in Direction]

    def _note(self, way: Direction, seen: Seen) -> bool:
        self.log.append((way, seen.pdu))
        self.grown.set()
        self.grown = trio.Event()
        return False

    def sent(self, kind: type[P]) -> list[P]:
        """What the initiator sent of a kind."""
        return [pdu for way, pdu in self.log if way is IN and isinstance(pdu, kind)]

    def told(self, kind: type[P]) -> list[P]:
        """What the target sent of a kind."""
        return [pdu for way, pdu in self.log if way is OUT and isinstance(pdu, kind)]


@dataclass
class Bench:
    """A target and its initiator.

    Attributes:
        target: the loopback target.
        disk: its disk.
        tape: what passed it.
        session: the initiator's session, where the test has no more than that.
        nexus: the session that comes back, where it has that.
        unit: the disk as the initiator shows it, where it has that.
        file: the disk as a file, cached, where it has that.
        handle: an open handle of the file.
    """

    target: LoopbackTarget
    disk: Disk
    tape: Tape
    _session: Session | None = None
    _nexus: Nexus | None = None
    _unit: LogicalUnit | None = None
    _file: BlockCache | None = None
    _handle: Handle | None = None
    _taken: int = field(default=0)

    @property
    def session(self) -> Session:
        if self._nexus is not None:
            return self._nexus.session
        assert self._session is not None
        return self._session

    @property
    def nexus(self) -> Nexus:
        assert self._nexus is not None
        return self._nexus

    @property
    def unit(self) -> LogicalUnit:
        assert self._unit is not None
        return self._unit

    @property
    def file(self) -> BlockCache:
        assert self._file is not None
        return self._file

    @property
    def handle(self) -> Handle:
        assert self._handle is not None
        return self._handle

    @property
    def peer(self) -> Peer:
        """The target's end of the session."""
        return self.target.sessions[-1]

    # -- the initiator ---

    async def read(self, lba: int = 0, blocks: int = 1, *, memory: memoryview | None = None) -> bytes:
        """Read by the session, or the nexus where there is one."""
        memory = memoryview(bytearray(b"\xee" * (blocks * 512))) if memory is None else memory
        executor = self._nexus or self.session
        task = await executor.execute(cdbs.read(lba=lba, blocks=blocks), lun=LUN_0, buffer_in=memory, exact=True)
        assert task.status == Status.GOOD
        return bytes(memory)

    async def write(self, data: bytes, lba: int = 0, *, lun: bytes = LUN_0) -> Task:
        """Write by the session, or the nexus where there is one; its status is the caller's to judge."""
        executor = self._nexus or self.session
        command = cdbs.write(lba=lba, blocks=len(data) // 512)
        return await executor.execute(command, lun=lun, buffer_out=memoryview(data), exact=True)

    async def until(self, condition: Callable[[], object], *, seconds: float = 10) -> None:
        """Wait until something is so; fail if it never is. Jumping clocks don't have to jump far for it."""
        step = 1.0 if isinstance(trio.lowlevel.current_clock(), MockClock) else 0.01
        with trio.fail_after(seconds):
            while not condition():
                with trio.move_on_after(step):
                    await self.tape.grown.wait()

    async def reconnected(self, times: int = 1) -> None:
        """Wait until the session was logged in again as often as that."""
        await self.until(lambda: self.nexus.reconnects == times, seconds=60)

    # -- the target ---

    def rule(self, direction: Direction, action: Any, match: Match, **when: Any) -> None:
        """One more rule."""
        self.target.script.add(Rule(direction, action, match, **when))

    def hold(self, match: Match = COMMAND, *, times: int = 0) -> None:
        """Leave commands to the test, and say nothing about them."""
        self.rule(IN, Drop(), all_of(COMMAND, match), times=times)

    async def taken(self) -> ScsiCommand:
        """The next command of the tape, which is held: it counts as received, and keeps its place in the window."""
        await self.until(lambda: len(self.tape.sent(ScsiCommand)) > self._taken)
        command = self.tape.sent(ScsiCommand)[self._taken]
        self._taken += 1
        if command.cmd_sn == self.peer.numbers.exp_cmd_sn:
            self.peer.numbers.advance()
            self.peer.numbers.outstanding += 1
        return command

    def say(self, pdu: TargetPdu, **numbers: int) -> None:
        """Send a PDU with the right numbers, or those that are given."""
        known = self.peer.numbers
        counts = not isinstance(pdu, R2T)
        if isinstance(pdu, DataIn):
            counts = pdu.has_status
        elif isinstance(pdu, NopIn):
            counts = pdu.itt != RESERVED_TAG
        if "stat_sn" not in numbers:
            numbers["stat_sn"] = known.next_stat_sn() if counts else known.stat_sn
        changes: dict[str, Any] = {"exp_cmd_sn": known.exp_cmd_sn, "max_cmd_sn": known.max_cmd_sn, **numbers}
        self.peer.wire.send(replace(pdu, **changes))

    def good(self, command: ScsiCommand, **changes: Any) -> None:
        """GOOD in a response of its own."""
        self.peer.numbers.outstanding -= 1
        self.say(replace(ScsiResponse(itt=command.itt), **changes))

    def data_in(self, command: ScsiCommand, data: bytes, **changes: Any) -> None:
        """All of a read's data with its status."""
        self.peer.numbers.outstanding -= 1
        self.say(replace(DataIn(itt=command.itt, data=data, has_status=True), **changes))

    async def data_out(self, count: int, *, ttt: int | None = None) -> list[DataOut]:
        """As many Data-Out PDUs as that, once they have come."""

        def there() -> list[DataOut]:
            return [pdu for pdu in self.tape.sent(DataOut) if ttt is None or pdu.ttt == ttt]

        await self.until(lambda: len(there()) >= count)
        return there()

    async def settled(self) -> None:
        """Wait until a ping of the target's, sent now, is answered: all before it has been seen by the initiator."""
        ttt = self.peer.ping()
        await self.until(lambda: any(pdu.ttt == ttt for pdu in self.tape.sent(NopOut)))


@asynccontextmanager
async def _served(
    *, strict: bool = True, disk: Disk | None = None, **config: Any
) -> AsyncIterator[tuple[LoopbackTarget, Disk, Tape]]:
    tape = Tape()
    disk = disk or Disk.from_bytes(pattern(BLOCKS * 512))
    settings = config_of(disk, **config)
    for rule in tape.rules():
        settings.script.add(rule)
    async with serving(settings, strict=strict) as target:
        yield target, disk, tape


@asynccontextmanager
async def bench(*, strict: bool = True, settings: Any = None, **config: Any) -> AsyncIterator[Bench]:
    """A bare session: what ends it, ends it for good."""
    async with (
        _served(strict=strict, **config) as (target, disk, tape),
        open_session(target, settings_of(**(settings or {}))) as session,
    ):
        yield Bench(target, disk, tape, session)


@asynccontextmanager
async def nexus_bench(*, strict: bool = True, settings: Any = None, **config: Any) -> AsyncIterator[Bench]:
    """A session that is logged in again when it is lost."""
    async with _served(strict=strict, **config) as (target, disk, tape), _nexus(target, settings) as nexus:
        yield Bench(target, disk, tape, _nexus=nexus)


@asynccontextmanager
async def unit_bench(*, strict: bool = True, settings: Any = None, **config: Any) -> AsyncIterator[Bench]:
    """A disk on such a session, with all the retries."""
    async with _served(strict=strict, **config) as (target, disk, tape), _nexus(target, settings) as nexus:
        (description,) = await scan(nexus)
        made = Bench(target, disk, tape, _nexus=nexus, _unit=LogicalUnit(nexus, description))
        made._taken = len(tape.sent(ScsiCommand))
        yield made


@asynccontextmanager
async def file_bench(*, strict: bool = True, settings: Any = None, **config: Any) -> AsyncIterator[Bench]:
    """Such a disk as a file with a write-behind cache."""
    async with unit_bench(strict=strict, settings=settings, **config) as made:
        pool = BufferPool(4 << 20)
        made._file = BlockCache(made.unit, pool=pool, settings=CacheSettings(read_ahead=0, write_back_delay=0.01))
        made.unit.on_change = made._file.invalidate
        made._handle = made._file.open()
        async with trio.open_nursery() as nursery:
            await nursery.start(made._file.run)
            yield made
            nursery.cancel_scope.cancel()


def _nexus(target: LoopbackTarget, settings: Any) -> Any:
    return open_nexus(DEFAULT_TARGET_NAME, [portal_of(target)], settings_of(**(settings or {})))
