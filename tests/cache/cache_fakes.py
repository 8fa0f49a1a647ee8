"""A disk in memory that can be slow, out of order, and broken; it checks what the cache promises about buffers."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from iscsifuse.errors import MediumError
from iscsifuse.fibres import here, own_task
from support.fibres import sleep_as_fibre


def bad_block(lba: int) -> MediumError:
    return MediumError(f"block {lba} is bad", status=2, sense_key=3, asc=0x11, ascq=0, lba=lba)


@dataclass
class Command:
    """What the device was asked for."""

    kind: str  # "read", "write" or "flush"
    lba: int = 0
    blocks: int = 0

    @property
    def span(self) -> range:
        return range(self.lba, self.lba + self.blocks)


@dataclass
class FakeDevice:
    """A BlockDevice; `data` is its medium.

    delay: called for each command, says how many seconds it takes (0: a checkpoint, no more).
    gate: called for each command, awaited before it is executed.
    fault: called for each command at its end; what it returns is raised. A failing write may have written a part.
    bad: blocks that can't be read.
    volatile: it has a cache; `stable` is what a power cut leaves: the medium as it was when the last successful
        flush began.
    eager: writes are executed at once, and only their status takes its time.
    """

    block_length: int = 512
    block_count: int = 1024
    write_burst: int = 1 << 20
    latency: float = 0.0
    delay: Callable[[Command], float] | None = None
    gate: Callable[[Command], Awaitable[None]] | None = None
    fault: Callable[[Command], Exception | None] | None = None
    data: bytearray = field(default_factory=bytearray)
    log: list[Command] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)
    in_flight: list[Command] = field(default_factory=list)
    most_in_flight: int = 0
    volatile: bool = False
    eager: bool = False
    stable: bytes = b""
    cuts: int = 0

    def __post_init__(self) -> None:
        if not self.data:
            pattern = bytes((i * 31 + (i >> 8) * 7) & 0xFF for i in range(65536))
            size = self.block_length * self.block_count
            self.data = bytearray((pattern * (size // len(pattern) + 1))[:size])
        self.stable = bytes(self.data)

    def cut_power(self) -> None:
        """And give it back."""
        self.cuts += 1
        self.data[:] = self.stable

    def commands(self, kind: str) -> list[Command]:
        return [command for command in self.log if command.kind == kind]

    @contextmanager
    def _running(self, command: Command) -> Iterator[None]:
        self.log.append(command)
        for other in self.in_flight:
            # One transfer of a block at a time, unless all of them read it (uncached reads).
            if command.kind == "flush" or other.kind == "flush" or {command.kind, other.kind} == {"read"}:
                continue
            if {command.kind, other.kind} == {"write"}:
                overlap = range(max(command.lba, other.lba), min(command.span.stop, other.span.stop))
                assert not overlap, f"two writes of blocks {overlap} at once"
        self.in_flight.append(command)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        try:
            yield
        finally:
            self.in_flight = [other for other in self.in_flight if other is not command]

    async def _wait(self, command: Command) -> None:
        if self.gate is not None:
            await own_task()
            await self.gate(command)
        seconds = self.delay(command) if self.delay is not None else 0
        if here().fibre is not None:
            await sleep_as_fibre(seconds)
        else:
            await trio.sleep(seconds)

    def _check(self, command: Command) -> None:
        if self.fault is not None:
            error = self.fault(command)
            if error is not None:
                raise error
        for lba in sorted(self.bad):
            if command.kind == "read" and lba in command.span:
                raise bad_block(lba)

    async def read_into(self, buffer: memoryview, *, lba: int) -> None:
        command = Command("read", lba, len(buffer) // self.block_length)
        assert len(buffer) == command.blocks * self.block_length > 0
        assert lba >= 0
        assert lba + command.blocks <= self.block_count
        with self._running(command):
            buffer[:] = b"\xee" * len(buffer)  # undefined until it has succeeded
            await self._wait(command)
            self._check(command)
            start = lba * self.block_length
            buffer[:] = self.data[start : start + len(buffer)]

    async def write(self, buffer: memoryview, *, lba: int, fua: bool = False) -> None:
        assert not fua
        command = Command("write", lba, len(buffer) // self.block_length)
        assert len(buffer) == command.blocks * self.block_length > 0
        assert lba >= 0
        if lba + command.blocks > self.block_count:
            raise bad_block(self.block_count)
        start = lba * self.block_length
        half = len(buffer) if self.eager else command.blocks // 2 * self.block_length
        before = bytes(buffer)
        with self._running(command):
            # The first half of the blocks arrives early, the second one late: a failure is a torn write.
            self.data[start : start + half] = buffer[:half]
            await self._wait(command)
            assert bytes(buffer) == before, "a buffer changed under its write"
            self._check(command)
            if not self.eager:
                self.data[start : start + len(buffer)] = buffer

    async def flush(self) -> None:
        command = Command("flush")
        with self._running(command):
            covered, cuts = bytes(self.data), self.cuts
            await self._wait(command)
            if self.fault is not None:
                error = self.fault(command)
                if error is not None:
                    raise error
            if self.cuts == cuts:
                self.stable = covered


class Gate:
    """Holds a device's commands until they are let go."""

    def __init__(self, device: FakeDevice, hold: Callable[[Command], bool]) -> None:
        self.hold = hold
        self.held: list[Command] = []
        self._events: list[trio.Event] = []
        device.gate = self._wait

    async def _wait(self, command: Command) -> None:
        if self.hold(command):
            self.held.append(command)
            event = trio.Event()
            self._events.append(event)
            try:
                await event.wait()
            finally:
                self.held.remove(command)

    def open(self) -> None:
        """Let go of all, and hold nothing any more."""
        self.hold = lambda _command: False
        self.release()

    def release(self) -> None:
        """Let go of those that are held now."""
        for event in self._events:
            event.set()
        self._events.clear()


def reads(command: Command) -> bool:
    return command.kind == "read"


def writes(command: Command) -> bool:
    return command.kind == "write"


def flushes(command: Command) -> bool:
    return command.kind == "flush"
