"""Executors that are made up: a command's end is a value."""

import functools
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ParamSpec, cast

import trio
import trio.testing

from iscsifuse.errors import SessionLostError
from iscsifuse.initiator.nexus import Nexus, NexusState
from iscsifuse.initiator.settings import SessionSettings
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.capacity import Capacity
from iscsifuse.scsi.designator import Association, CodeSet, Designator, DesignatorType
from iscsifuse.scsi.inquiry import Inquiry
from iscsifuse.scsi.mode import CACHING_PAGE, CachingPage, ModeParameters
from iscsifuse.scsi.sense import Sense, SenseKey
from iscsifuse.scsi.status import Status
from iscsifuse.scsi.vpd import BlockLimits, DeviceIdentification, SupportedPages, UnitSerialNumber

__all__ = [
    "LUN_0",
    "Answer",
    "FakeExecutor",
    "FakeNexus",
    "FakeUnit",
    "Reply",
    "designator",
    "illegal",
    "jumping",
    "mode",
    "sense",
]

P = ParamSpec("P")

LUN_0 = luns.encode(0)


def jumping(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """A test on a clock that begins at 0, and jumps when everybody sleeps."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        trio.run(functools.partial(test, *args, **kwargs), clock=trio.testing.MockClock(autojump_threshold=0))

    return run


def sense(key: SenseKey, asc: int = 0, ascq: int = 0, *, information: int | None = None, code: int = 0x70) -> bytes:
    """Sense data."""
    return Sense(key=key, asc=asc, ascq=ascq, information=information, response_code=code).encode()


@dataclass(frozen=True)
class Reply:
    """How a command ends.

    Attributes:
        data: what goes into its buffer.
        status: SAM status.
        sense: sense data.
        short: bytes that are missing of a write.
    """

    data: bytes = b""
    status: int = Status.GOOD
    sense: bytes = b""
    short: int = 0

    @classmethod
    def check(cls, key: SenseKey, asc: int = 0, ascq: int = 0, *, data: bytes = b"", **more: Any) -> "Reply":
        return cls(data=data, status=Status.CHECK_CONDITION, sense=sense(key, asc, ascq, **more))


Answer = Reply | Exception


class FakeExecutor:
    """Answers commands: from a list, the last answer for ever; or by a function of the CDB.

    Attributes:
        cdbs: what was asked, in order.
        times: when.
        before: called with each CDB.
    """

    def __init__(self, answers: Iterable[Answer] | Callable[[bytes, bytes], Answer]) -> None:
        self._answers = answers if callable(answers) else iter(list(answers))
        self._last: Answer | None = None
        self.cdbs: list[bytes] = []
        self.times: list[float] = []
        self.seconds = 0.0
        self.before: Callable[[bytes], object] = lambda _: None
        self.watchers: dict[bytes, Callable[[Task], None]] = {}

    def _next(self, lun: bytes, cdb: bytes) -> Answer:
        if callable(self._answers):
            return self._answers(lun, cdb)
        self._last = next(self._answers, self._last)
        assert self._last is not None
        return self._last

    async def execute(
        self,
        cdb: bytes,
        *,
        lun: bytes,
        buffer_in: memoryview | None = None,
        buffer_out: memoryview | None = None,
        exact: bool = False,
    ) -> Task:
        task = Task(cdb, lun=lun, buffer_in=buffer_in, buffer_out=buffer_out, exact=exact)
        task.started = trio.current_time()
        self.cdbs.append(bytes(cdb))
        self.times.append(task.started)
        await trio.sleep(self.seconds)
        self.before(cdb)
        answer = self._next(lun, cdb)
        if isinstance(answer, Exception):
            raise answer
        if buffer_in is not None:
            count = min(len(answer.data), len(buffer_in))
            buffer_in[:count] = answer.data[:count]
            task.received = count
        if buffer_out is not None:
            task.solicited = len(buffer_out) - answer.short
        task.sense = answer.sense
        task.finish(status=answer.status, residual=0, underflow=False, overflow=False)
        if answer.status and lun in self.watchers:
            self.watchers[lun](task)
        if task.error is not None:
            raise task.error
        return task

    @property
    def opcodes(self) -> list[int]:
        """The operation codes of what was asked."""
        return [cdb[0] for cdb in self.cdbs]


class FakeNexus(FakeExecutor):
    """An executor with what a scan and a logical unit need besides."""

    def __init__(
        self, answers: Iterable[Answer] | Callable[[bytes, bytes], Answer], *, settings: SessionSettings | None = None
    ) -> None:
        super().__init__(answers)
        self.settings = settings or SessionSettings(initiator_name="iqn.x", read_only=False)
        self.target_name = "iqn.x:target"
        self.reconnects = self.epoch = 0
        self.guards: list[Callable[[Any], Awaitable[bool]]] = []
        self.barred: dict[bytes, Exception] = {}
        self.doubters: list[Callable[[], None]] = []
        self.state = NexusState.LOGGED_IN

    @property
    def session(self) -> "FakeNexus":
        return self

    def start_read(self, buffer: memoryview, **place: object) -> None:
        """Nothing goes the short way: everything is executed."""

    def start(self, cdb: bytes, *, lun: bytes, **buffers: object) -> None:
        """Nothing is started beforehand: everything goes the general way, by `execute`."""

    def watch(self, lun: bytes, watcher: Callable[[Task], None], *, doubt: Callable[[], None]) -> None:
        self.watchers[lun] = watcher
        self.doubters.append(doubt)

    def doubt_all(self) -> None:
        for doubt in self.doubters:
            doubt()

    def add_guard(self, guard: Callable[[Any], Awaitable[bool]]) -> None:
        self.guards.append(guard)

    give_up_at = 0.0

    def bar(self, lun: bytes, error: Exception | None, *, until: float = 0.0) -> None:  # noqa: ARG002
        if error is None:
            self.barred.pop(lun, None)
        else:
            self.barred[lun] = error

    def prove_soon(self, guard: Callable[[Any], Awaitable[bool]], *, then: Callable[[], None]) -> None:
        async def prove() -> None:
            with suppress(SessionLostError):
                await guard(self)
            then()

        trio.lowlevel.spawn_system_task(prove)

    def as_nexus(self) -> Nexus:
        """For the type checker."""
        return cast("Nexus", self)


def illegal(asc: int = 0x20) -> Reply:
    """ILLEGAL REQUEST: 20h an operation code, 24h a field of the CDB."""
    return Reply.check(SenseKey.ILLEGAL_REQUEST, asc)


class FakeUnit:
    """A logical unit that answers by operation code, page, or as it was told to.

    Attributes:
        answers: by name: "inquiry", "vpd 80", "capacity 10", "capacity 16", "mode6 08", "mode10 3f", "ready",
            "luns", "read", "write", "sync". A list is worked off, its last entry stays.
        asked: the names, in order.
    """

    def __init__(self, **changes: Answer | Sequence[Answer]) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, Answer | list[Answer]] = {
            "inquiry": Reply(Inquiry(version=6, vendor="V", product="P").encode()),
            "vpd 00": Reply(SupportedPages((0x00, 0x80, 0x83, 0xB0)).encode()),
            "vpd 80": Reply(UnitSerialNumber("SERIAL").encode()),
            "vpd 83": Reply(DeviceIdentification((designator(),)).encode()),
            "vpd b0": Reply(BlockLimits().encode()),
            "capacity 16": Reply(Capacity(last_lba=99, block_length=512).encode_16()),
            "capacity 10": Reply(Capacity(last_lba=99, block_length=512).encode_10()),
            "mode6 08": Reply(mode(wce=True).encode_6()),
            "ready": Reply(),
            "luns": Reply(luns.encode_report_luns([LUN_0])),
            "read": Reply(bytes(1 << 20)),
            "write": Reply(),
            "sync": Reply(),
        }
        self.change(**changes)

    def change(self, **changes: Answer | Sequence[Answer]) -> None:
        for name, answer in changes.items():
            self.answers[name.replace("_", " ")] = list(answer) if isinstance(answer, Sequence) else answer

    def __call__(self, lun: bytes, cdb: bytes) -> Answer:  # noqa: ARG002 - as an executor asks
        name = _name(cdb)
        self.asked.append(name)
        answer = self.answers.get(name, illegal(0x24 if "vpd" in name or "mode" in name else 0x20))
        if isinstance(answer, list):
            return answer.pop(0) if len(answer) > 1 else answer[0]
        return answer


def designator(number: int = 1, *, association: Association = Association.LOGICAL_UNIT) -> Designator:
    """An NAA designator."""
    return Designator(
        association=association,
        designator_type=DesignatorType.NAA,
        code_set=CodeSet.BINARY,
        identifier=(0x3 << 60 | number).to_bytes(8, "big"),
    )


def mode(*, wce: bool = False, wp: bool = False, dpofua: bool = False, caching: bool = True) -> ModeParameters:
    """Mode parameters."""
    pages = {(CACHING_PAGE, 0): CachingPage(wce=wce).encode()} if caching else {}
    return ModeParameters(write_protected=wp, dpofua=dpofua, pages=pages)


def _name(cdb: bytes) -> str:
    match cdb[0]:
        case 0x12:
            return f"vpd {cdb[2]:02x}" if cdb[1] & 1 else "inquiry"
        case 0x1A:
            return f"mode6 {cdb[2] & 0x3F:02x}"
        case 0x5A:
            return f"mode10 {cdb[2] & 0x3F:02x}"
        case 0x9E:
            return "capacity 16"
    return {
        0x00: "ready",
        0x25: "capacity 10",
        0x28: "read",
        0x88: "read",
        0x2A: "write",
        0x8A: "write",
        0x35: "sync",
        0x91: "sync",
        0xA0: "luns",
        0x1B: "start",
    }[cdb[0]]
