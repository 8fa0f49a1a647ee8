"""One run: loads, faults by a seeded schedule, an end in good order, and a judgement."""

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chaos.faults import Kind
from chaos.load import FioLoad, WriterLoad, compare
from chaos.world import FIO, RAW, World, run
from support.process import is_alive

__all__ = ["Campaign", "Report"]

_HEALS_WITHIN = 60.0
"""Seconds after the last fault within which everything has to flow again."""
_SAMPLE = 2.0
_SETTLED = 0.25  # of the run: until then memory and descriptors may grow


@dataclass
class Report:
    """What came of it.

    Attributes:
        seconds: of faults.
        faults: how many of each kind.
        reconnects: of the session.
        bytes_written: by all loads.
        bytes_verified: while it ran, and in the end.
        bytes_lost: in the end, on the disks.
        longest: seconds of the longest call of a writer.
        errors_reported: to the writer whose disk was taken offline.
        memory: resident bytes of the daemon: after a quarter of the time, and the most after it.
        descriptors: likewise.
        wrong: sentences; none is a success.
    """

    seed: int
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    reconnects: int = 0
    bytes_written: int = 0
    bytes_verified: int = 0
    bytes_lost: int = 0
    longest: float = 0.0
    errors_reported: int = 0
    memory: tuple[int, int] = (0, 0)
    descriptors: tuple[int, int] = (0, 0)
    wrong: list[str] = field(default_factory=list)

    def as_text(self, kinds: Sequence[Kind]) -> str:
        """For people."""
        lines = [
            f"seed {self.seed}, {self.seconds:.0f} s, {self.faults.total()} faults, {self.reconnects} reconnects"
        ]
        lines += [f"  {self.faults[kind.name]:5}  {kind.name:<16} {kind.what}" for kind in kinds]
        lines += [
            f"bytes written   {self.bytes_written:>16,}",
            f"bytes verified  {self.bytes_verified:>16,}",
            f"bytes lost      {self.bytes_lost:>16,}",
            f"longest call    {self.longest:>16.1f} s",
            f"errors reported {self.errors_reported:>16} (to the disk that was taken offline)",
            f"memory          {self.memory[0] >> 20:>16} MiB, then {self.memory[1] >> 20} MiB at most",
            f"descriptors     {self.descriptors[0]:>16}, then {self.descriptors[1]} at most",
        ]
        lines += [f"WRONG: {told}" for told in self.wrong] or ["all is well"]
        return "\n".join(lines)

    def as_json(self) -> str:
        """For programs."""
        return json.dumps({**vars(self), "ok": not self.wrong}, indent=2)


class Campaign:
    """Loads and faults over a world.

    Args:
        world: entered already.
        kinds: the faults that may come.
        seed: of the schedule and of the loads.
    """

    def __init__(self, world: World, kinds: Sequence[Kind], *, seed: int) -> None:
        self.report = Report(seed)
        self._world = world
        self._kinds = kinds
        self._chance = random.Random(seed)
        sizes, folder = world.sizes, world.folder
        self._inside_file = world.inside / "written"
        run("truncate", "-s", str(sizes.inside), self._inside_file)
        writer = WriterLoad
        self._writers = {
            "raw": writer(
                "raw-writer", world.lun(RAW), size=sizes.raw, seed=seed, folder=folder, may_fail=self._takes_offline
            ),
            "ext4": writer(
                "ext4-writer", self._inside_file, size=sizes.inside, seed=seed + 1, folder=folder, may_fail=False
            ),
        }
        self._fios = [
            FioLoad("fio", world.lun(FIO), sizes.fio, seed, folder),
            FioLoad("fio-ext4", world.inside / "fio", sizes.inside, seed + 1, folder, direct=True),
        ]
        self._loads: list[WriterLoad | FioLoad] = [*self._writers.values(), *self._fios]
        self._samples: list[tuple[int, int, int]] = []
        self._over = threading.Event()

    @property
    def _takes_offline(self) -> bool:
        return any(kind.name == "offline" for kind in self._kinds)

    def run(self, seconds: float, *, faults: int = 0) -> Report:
        """Do it.

        Args:
            seconds: how long there are faults.
            faults: go on until there were so many, too.
        """
        sampler = threading.Thread(target=self._sample, daemon=True)
        sampler.start()
        for load in self._fios:
            load.start()
        try:
            self._fault_by_fault(seconds, faults)
            self._end()
        finally:
            self._over.set()
            for each in self._loads:
                each.kill()
            sampler.join(10)
        self._judge_footprint()
        return self.report

    def _fault_by_fault(self, seconds: float, faults: int) -> None:
        began = time.monotonic()
        chance, counts = self._chance, self.report.faults
        pid = self._world.mounted.pid
        assert pid is not None
        told = began
        while time.monotonic() - began < seconds or counts.total() < faults:
            kind = chance.choices(self._kinds, [kind.weight for kind in self._kinds])[0]
            kind.do(self._world, chance)
            counts[kind.name] += 1
            if not is_alive(pid):
                self.report.wrong.append(f"the daemon died of the {counts.total()}. fault, {kind.name}")
                break
            if any(load.wrong for load in self._fios):
                break
            if chance.random() < 0.4:
                time.sleep(chance.uniform(0.02, 0.3))  # the next one comes while this one is being mended
            else:
                self._wait_for_the_session(kind)
                time.sleep(chance.uniform(0.2, 1.5))
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"{told - began:.0f} s, {counts.total()} faults", file=sys.stderr, flush=True)
        self.report.seconds = time.monotonic() - began

    def _wait_for_the_session(self, kind: Kind) -> None:
        deadline = time.monotonic() + _HEALS_WITHIN
        while not self._world.is_logged_in:
            if time.monotonic() > deadline:
                self.report.wrong.append(f"no session {_HEALS_WITHIN:.0f} s after '{kind.name}'")
                return
            time.sleep(0.05)

    def _end(self) -> None:
        """Everything has to come to its end now, in good order."""
        report, world = self.report, self._world
        patience = _HEALS_WITHIN * 2
        for each in self._loads:
            each.stop()
        for name, load in self._writers.items():
            totals, wrong = load.result(patience)
            report.wrong += wrong
            report.bytes_written += totals.get("bytes_written", 0)
            report.bytes_verified += totals.get("bytes_checked", 0)
            report.longest = max(report.longest, totals.get("longest", 0.0))
            if name == "raw":
                report.errors_reported = totals.get("errors_reported", 0)
        for fio in self._fios:
            report.wrong += fio.result(patience)
        status = world.status()
        report.reconnects = status.get("sessions", [{}])[0].get("reconnects", 0)
        if not status:
            report.wrong.append("the mount doesn't answer")
        world.unmount(patience, raw_may_fail=self._takes_offline)
        self._compare_disks()
        report.bytes_written += sum(fio.bytes_written for fio in self._fios)
        report.bytes_verified += sum(fio.bytes_verified for fio in self._fios)

    def _compare_disks(self) -> None:
        """What is on the disks, without us in between."""
        report, world = self.report, self._world
        checked = run("e2fsck", "-fn", world.backing("ext4"), check=False, timeout=300)
        if checked.returncode:
            report.wrong.append(f"e2fsck: {checked.stdout}{checked.stderr}")
        report.wrong += self._fios[0].verify(world.backing("fio"))
        with world.ext4_as_it_is_on_the_disk() as point:
            copy = world.folder / "fio-ext4.copy"  # fio opens for writing, even to verify
            run("cp", point / "fio", copy)
            report.wrong += self._fios[1].verify(copy)
            for name, found in (("raw", world.backing("raw")), ("ext4", point / "written")):
                writer = self._writers[name]
                if not writer.expected.exists():
                    continue
                compared, lost, told = compare(writer.expected, found, what=writer.name)
                report.bytes_verified += compared
                report.bytes_lost += lost
                report.wrong += told

    # -- memory and descriptors ------------------------------------------------------------------------------------

    def _sample(self) -> None:
        while not self._over.wait(_SAMPLE):
            self._samples.append(self._world.footprint())

    def _judge_footprint(self) -> None:
        """After a quarter of the time nothing may grow on and on."""
        samples = [sample for sample in self._samples if sample[0]]
        report = self.report
        if len(samples) < 8:
            return
        settled = int(len(samples) * _SETTLED)
        before, after = samples[: settled + 1], samples[settled:]
        report.memory = (max(sample[0] for sample in before), max(sample[0] for sample in after))
        report.descriptors = (max(sample[1] for sample in before), max(sample[1] for sample in after))
        if report.memory[1] > report.memory[0] + (32 << 20):
            report.wrong.append(f"memory grew from {report.memory[0]} to {report.memory[1]} bytes")
        if report.descriptors[1] > report.descriptors[0] + 16:
            report.wrong.append(f"descriptors grew from {report.descriptors[0]} to {report.descriptors[1]}")


def write_report(report: Report, path: Path) -> None:
    """As JSON."""
    path.write_text(report.as_json() + "\n")
