"""Sessions with a target that goes wrong: ``PYTHONPATH=tests .venv/bin/python -m fuzz.sessions --count 10000``.

Each seed is a session of its own: discovery, login, what the disks say of themselves, reads, writes, flushes, logout,
against a loopback target whose answers `iscsifuse.testing.mutator` changes. It may end with any error of ours; what
it may not do is checked here:

- hand out a block that was never written there, or lose one that was acknowledged (after a flush: also across a power
  cut), or let an older write overtake a newer one;
- raise anything but one plain exception of `iscsifuse.errors`;
- go on and on: in time of its own clock, in CPU time, in memory;
- leave a task or a descriptor.

A failure says its seed. ``--seed N`` is that session again: clock, order of tasks, and all that is random follow from
the seed (what the kernel does doesn't, so once in a while a failure won't show again).
"""

import argparse
import contextlib
import gc
import logging
import random
import resource
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, SimpleNamespace
from unittest import mock

import trio
import trio.testing

from iscsifuse.errors import IscsifuseError
from iscsifuse.initiator import login
from iscsifuse.initiator.discovery import discover
from iscsifuse.initiator.inventory import scan
from iscsifuse.initiator.logical_unit import LogicalUnit
from iscsifuse.initiator.nexus import open_nexus
from iscsifuse.initiator.settings import Portal, SessionSettings
from iscsifuse.iscsi.chap import ChapCredentials
from iscsifuse.testing.config import ChapPolicy, LoginAttention, TargetConfig, TargetKeys, TargetNode
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.mutator import mutations
from iscsifuse.testing.script import Script
from iscsifuse.testing.target import LoopbackTarget

__all__ = ["BrokenPromiseError", "Outcome", "run_session"]

TARGET = "iqn.2026-11.com.example:mutant"
_LONGEST = 900.0
"""Seconds of the session's own clock: ten operations, each of which may wait for a lost session, and the logins."""
_CPU_LIMIT = 30.0
_AUTOJUMP = 0.003
_OPERATIONS = 12
_BATCH = 4
_MOST_MEMORY = 64 << 20
"""Bytes that this process may grow by, after the first hundred sessions."""
_WARM_UP = 100


class BrokenPromiseError(AssertionError):
    """A session did what no session may do."""


@dataclass(slots=True)
class Outcome:
    """How a session ended.

    Attributes:
        seed: of the session.
        errors: the kinds of all errors that its operations ended with; none where everything was right.
        done: operations that succeeded.
        fired: what the target did wrong.
        seconds: of the session's own clock.
    """

    seed: int
    errors: list[str] = field(default_factory=list)
    done: int = 0
    fired: list[str] = field(default_factory=list)
    seconds: float = 0.0


# --- what a disk may hold ---


@dataclass(slots=True)
class _Model:
    """What each block may hold, as versions of it: one, or several where nobody knows whether a write happened.

    Attributes:
        now: what a read may find.
        stable: what may be there after a power cut.
    """

    lun: int
    length: int
    now: list[set[int]]
    stable: list[set[int]]

    @classmethod
    def of(cls, lun: int, blocks: int, length: int) -> "_Model":
        return cls(lun, length, [{0} for _ in range(blocks)], [{0} for _ in range(blocks)])

    def block(self, lba: int, version: int) -> bytes:
        """Bytes that tell where and when they belong."""
        return struct.pack(">IIQ", self.lun, version, lba) * (self.length // 16)

    def content(self, lba: int, blocks: int, version: int) -> bytes:
        return b"".join(self.block(lba + index, version) for index in range(blocks))

    def begin(self, lba: int, blocks: int, version: int) -> None:
        for index in range(lba, lba + blocks):
            self.now[index].add(version)
            self.stable[index].add(version)

    def end(self, lba: int, blocks: int, version: int, *, stable: bool) -> None:
        for index in range(lba, lba + blocks):
            self.now[index] = {version}
            if stable:
                self.stable[index] = {version}

    def flushed(self) -> None:
        self.stable = [set(versions) for versions in self.now]

    def check(self, data: bytes | bytearray, lba: int, *, stable: bool = False, where: str) -> None:
        """Fail if a block of ``data``, which begins at ``lba``, isn't one that may be there."""
        for index in range(len(data) // self.length):
            found = bytes(data[index * self.length : (index + 1) * self.length])
            versions = (self.stable if stable else self.now)[lba + index]
            if not any(found == self.block(lba + index, version) for version in versions):
                raise BrokenPromiseError(
                    f"{where}: block {lba + index} of LUN {self.lun} should be version {sorted(versions)}, "
                    f"but holds {found[:32].hex()}..."
                )


# --- one session ---


def run_session(seed: int) -> Outcome:
    """One session, in an event loop of its own.

    Raises:
        BrokenPromiseError: it did what no session may do; the text has the seed.
    """
    outcome = Outcome(seed)
    before = _descriptors()
    with _repeatable(seed), _cpu_limited(seed), _strictly() as complaints:
        try:
            trio.run(_session, seed, outcome, clock=trio.testing.MockClock(autojump_threshold=_AUTOJUMP))
        except BrokenPromiseError as error:
            raise BrokenPromiseError(f"seed {seed}: {error} (the target: {outcome.fired})") from error
        except BaseExceptionGroup as error:
            if (found := _promise_in(error)) is not None:
                raise BrokenPromiseError(f"seed {seed}: {found} (the target: {outcome.fired})") from found
            raise
    if complaints:
        raise BrokenPromiseError(f"seed {seed}: {complaints[0]}")
    if (left := _descriptors() - before) > 0:
        raise BrokenPromiseError(f"seed {seed}: {left} descriptors were left open")
    return outcome


def _promise_in(error: BaseException) -> BrokenPromiseError | None:
    if isinstance(error, BaseExceptionGroup):
        return next((found for one in error.exceptions if (found := _promise_in(one)) is not None), None)
    return error if isinstance(error, BrokenPromiseError) else None


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """Whatever is random follows from the seed: the order of tasks too."""
    own = random.Random(seed)
    state = random.getstate()
    random.seed(seed)
    login._challenges.clear()
    with (
        mock.patch.object(login, "secrets", SimpleNamespace(token_bytes=own.randbytes)),
        mock.patch("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", new=True),
        mock.patch("trio._core._run._r", new=random.Random(seed)),
    ):
        yield
    random.setstate(state)


@contextlib.contextmanager
def _cpu_limited(seed: int) -> Iterator[None]:
    """An endless loop is a failure, and not the end of the runner; however busy the machine is."""

    def expired(_number: int, _frame: FrameType | None) -> None:
        raise BrokenPromiseError(f"seed {seed} takes more than {_CPU_LIMIT:g} seconds of CPU")

    old = signal.signal(signal.SIGPROF, expired)
    signal.setitimer(signal.ITIMER_PROF, _CPU_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


@contextlib.contextmanager
def _strictly() -> Iterator[list[str]]:
    """What nobody could raise is heard, and the log is not: a target that goes wrong gives much to say."""
    complaints: list[str] = []

    def hear(unraisable: "sys.UnraisableHookArgs") -> None:
        complaints.append(f"unraisable: {unraisable.err_msg} {unraisable.exc_value!r} {unraisable.object!r}")

    hook, sys.unraisablehook = sys.unraisablehook, hear
    package = logging.getLogger("iscsifuse")
    level = package.level
    package.setLevel(logging.CRITICAL)
    try:
        yield complaints
    finally:
        sys.unraisablehook = hook
        package.setLevel(level)


async def _session(seed: int, outcome: Outcome) -> None:
    draw = random.Random(seed)
    models = [_Model.of(0, 256, 512), _Model.of(1, 64, 4096)]
    disks = [
        Disk.from_bytes(model.content(0, len(model.now), 0), block_length=model.length, lun=model.lun)
        for model in models
    ]
    config, settings = _configure(draw, disks, seed=seed)
    async with LoopbackTarget(config).serve() as target:
        await trio.testing.wait_all_tasks_blocked()  # it listens
        settled = trio.lowlevel.current_statistics().tasks_living
        try:
            with trio.fail_after(_LONGEST):
                await _use(target, settings, draw, models, outcome)
        except trio.TooSlowError:
            raise BrokenPromiseError(f"it didn't end within {_LONGEST:g} seconds of its clock") from None
        finally:
            outcome.seconds = trio.current_time()
            outcome.fired += [f"{fired.rule} ({fired.opcode.name})" for fired in config.script.log[:20]]
        await _check_tasks(target, settled)
        for model, disk in zip(models, disks, strict=True):
            model.check(disk.contents(), 0, where="on the disk at the end")
            disk.power_cut()
            model.check(disk.contents(), 0, stable=True, where="on the disk after a power cut")


def _configure(draw: random.Random, disks: list[Disk], *, seed: int) -> tuple[TargetConfig, SessionSettings]:
    digests = draw.random() < 0.6
    chap = draw.random() < 0.3
    keys = TargetKeys(
        initial_r2t=draw.random() < 0.5,
        immediate_data=draw.random() < 0.5,
        max_burst_length=draw.choice((512, 4096, 16384, 1 << 20)),
        first_burst_length=draw.choice((4096, 16384)),
        max_outstanding_r2t=draw.choice((1, 4)),
        max_recv_data_segment_length=draw.choice((None, 512, 4096, 262144)),
        default_time2wait=draw.choice((0, 0, 1)),
        alias=draw.choice(("", "mutant")),
    )
    config = TargetConfig(
        nodes=[TargetNode(name=TARGET, disks=disks)],
        keys=keys,
        chap=ChapPolicy(users={"us": b"our secret"}, target_name="them", target_secret=b"their secret")
        if chap
        else None,
        script=Script(*mutations(seed), seed=seed),
        window=draw.choice((1, 2, 16, 128)),
        initial_stat_sn=draw.choice((1, 0xFFFFFFF0)),
        status_in_data=draw.random() < 0.5,
        reverse_r2t=draw.random() < 0.2,
        reorder=seed if draw.random() < 0.3 else None,
        text_chunk=draw.choice((0, 16)),
        login_attention=draw.choice(tuple(LoginAttention)),
        nop_interval=draw.choice((0.0, 2.0)),
        record=False,
    )
    settings = SessionSettings(
        initiator_name="iqn.2026-11.com.example:us",
        header_digest=digests,
        data_digest=digests,
        chap=ChapCredentials(
            user="us",
            secret=b"our secret",
            target_user="them",
            target_secret=b"their secret",
        )
        if chap
        else None,
        timeout=draw.choice((2.0, 8.0)),
        login_timeout=5.0,
        reconnect_timeout=draw.choice((0.0, 4.0, 20.0)),
        read_only=False,
    )
    return config, settings


async def _use(
    target: LoopbackTarget,
    settings: SessionSettings,
    draw: random.Random,
    models: list[_Model],
    outcome: Outcome,
) -> None:
    """What a mount does, without one."""
    portal = Portal(target.host, target.port)
    with _errors(outcome):
        if draw.random() < 0.3:
            found = await discover(portal, settings)
            if [one.name for one in found] != [TARGET]:
                raise BrokenPromiseError(f"the wrong targets were discovered: {found}")
            outcome.done += 1
    with _errors(outcome):
        async with open_nexus(TARGET, [portal], settings) as nexus:
            units = [LogicalUnit(nexus, one) for one in await scan(nexus) if one.usable]
            for unit in units:
                known = models[unit.lun]
                if (unit.block_length, unit.block_count) != (known.length, len(known.now)):
                    raise BrokenPromiseError(f"LUN {unit.lun} has {unit.block_count} of {unit.block_length} bytes")
            for number in range(1, _OPERATIONS + 1):
                if units:
                    await _operate(units, draw, models, outcome, number=number)


async def _operate(
    units: list[LogicalUnit],
    draw: random.Random,
    models: list[_Model],
    outcome: Outcome,
    *,
    number: int,
) -> None:
    """A flush, or some reads and writes side by side, of which none overlaps another one."""
    if draw.random() < 0.25:
        unit = draw.choice(units)
        with _errors(outcome):
            await unit.flush()
            models[unit.lun].flushed()
            outcome.done += 1
        return
    count = draw.randint(1, _BATCH)
    async with trio.open_nursery() as nursery:
        for part in range(count):
            unit = draw.choice(units)
            model = models[unit.lun]
            share = len(model.now) // count
            lba = part * share + draw.randrange(share)
            blocks = draw.randint(1, (part + 1) * share - lba)
            if draw.random() < 0.5:
                nursery.start_soon(_read, unit, model, lba, blocks, outcome)
            else:
                fua = draw.random() < 0.2
                nursery.start_soon(_write, unit, model, lba, blocks, number * _BATCH + part, fua, outcome)


async def _read(unit: LogicalUnit, model: _Model, lba: int, blocks: int, outcome: Outcome) -> None:
    buffer = bytearray(b"\xee" * (blocks * model.length))
    with _errors(outcome):
        await unit.read_into(memoryview(buffer), lba=lba)
        model.check(buffer, lba, where="read")
        outcome.done += 1


async def _write(
    unit: LogicalUnit, model: _Model, lba: int, blocks: int, version: int, fua: bool, outcome: Outcome
) -> None:
    data = model.content(lba, blocks, version)
    model.begin(lba, blocks, version)
    with _errors(outcome):
        await unit.write(memoryview(data), lba=lba, fua=fua)
        model.end(lba, blocks, version, stable=fua and unit.description.dpofua)
        outcome.done += 1


@contextlib.contextmanager
def _errors(outcome: Outcome) -> Iterator[None]:
    """Note an error of ours; any other one is a broken promise."""
    try:
        yield
    except IscsifuseError as error:
        outcome.errors.append(type(error).__name__)
        if not str(error) or "\n" in str(error):
            raise BrokenPromiseError(f"an error that isn't one sentence: {error!r}") from error
    except (BrokenPromiseError, trio.Cancelled, BaseExceptionGroup):
        raise
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        raise BrokenPromiseError(f"an error of another kind: {error!r}\n{trace}") from error


async def _check_tasks(target: LoopbackTarget, settled: int) -> None:
    """Once the target's own connections are gone, as many tasks live as before."""
    target.drop_connections()
    for _ in range(200):
        left = trio.lowlevel.current_statistics().tasks_living - settled
        if left == 0:
            return
        await trio.sleep(0.05)
    raise BrokenPromiseError(f"{left} tasks were left")


# --- many ---


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz.sessions")
    parser.add_argument("--count", type=int, default=1000, help="sessions (1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--seed", type=int, help="just this one, and say what happened")
    options = parser.parse_args()
    if options.seed is not None:
        print(run_session(options.seed))
        return
    began, cpu = time.monotonic(), time.process_time()
    errors: Counter[str] = Counter()
    broken = wrong = right = done = 0
    memory = 0
    longest = Outcome(-1)
    for number, seed in enumerate(range(options.first, options.first + options.count), 1):
        try:
            outcome = run_session(seed)
        except Exception as error:
            broken += 1
            print(f"seed {seed}: {error!r}", flush=True)
            continue
        wrong += bool(outcome.fired)
        right += not outcome.errors
        done += outcome.done
        errors.update(outcome.errors)
        longest = max(longest, outcome, key=lambda one: one.seconds)
        if number == _WARM_UP:
            memory = _resident()
        if number % 1000 == 0:
            print(f"{number} sessions, {time.monotonic() - began:.0f} s", flush=True)
    gc.collect()
    grown = _resident() - memory if memory else 0
    print(
        f"{options.count} sessions: in {wrong} the target went wrong; {right} without an error, {broken} BROKEN\n"
        f"{done} operations succeeded; errors: {', '.join(f'{n} {name}' for name, n in errors.most_common())}\n"
        f"{time.monotonic() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU; the longest, seed "
        f"{longest.seed}, took {longest.seconds:.0f} s of its clock; memory grew by {grown / (1 << 20):.1f} MiB",
        flush=True,
    )
    sys.exit(broken > 0 or grown > _MOST_MEMORY)


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
