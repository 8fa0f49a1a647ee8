"""A program that writes a file and knows at any moment what each of its sectors may hold.

A process of its own, since a file of a mount can hang whoever touches it. It never believes that something is there:
it believes what a successful fsync said, and that what it wrote later is either there or not there yet.

**What is checked.** A read must give the last thing written. After an error each sector may hold what the last
successful fsync left or anything written since, until it is written and fsynced again. A read that gave one of these
although nobody reported an error yet must be explained by an error of the next fsync: else a write got lost in
silence. In the end everything is fsynced for good, and what the disk has to hold then is written to a file, for
others to compare with.

Sectors say who they are (which write, which sector), so that what is found instead is known: an old one, one of
another place, or nobody's.
"""

import argparse
import errno
import json
import os
import random
import signal
import struct
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

SECTOR = 512
_HEADER = struct.Struct("<8sQQ")
_MAGIC = b"chaos-01"
_POOL = random.Random(20261121).randbytes(1 << 16)
_LONGEST = 256 * 1024
_BETWEEN_FSYNCS = 24
_EIO = frozenset({errno.EIO, errno.ENOMEDIUM})


def sector_of(write: int, sector: int) -> bytes:
    """What a write puts into a sector; the zeroth write is a disk that was never written."""
    if write == 0:
        return bytes(SECTOR)
    start = (write * 2654435761 + sector * 40503) % (len(_POOL) - SECTOR)
    return _HEADER.pack(_MAGIC, write, sector) + _POOL[start : start + SECTOR - _HEADER.size]


def who(data: bytes) -> str:
    """In words, what a sector holds."""
    if not any(data):
        return "zeros"
    magic, write, sector = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        return f"nobody's: {data[:16].hex()}"
    whole = "" if data == sector_of(write, sector) else ", torn"
    return f"write {write} of sector {sector}{whole}"


@dataclass
class Totals:
    """What the writer did, and what it found."""

    writes: int = 0
    reads: int = 0
    fsyncs: int = 0
    errors_reported: int = 0
    bytes_written: int = 0
    bytes_checked: int = 0
    longest: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Writer:
    """One file, its model, and what was found.

    Attributes:
        totals: for the report.
    """

    def __init__(self, path: Path, *, size: int, seed: int, rate: float, log: Path) -> None:
        self.totals = Totals()
        self._fd = os.open(path, os.O_RDWR)
        self._sectors = size // SECTOR
        self._random = random.Random(seed)
        self._rate = rate
        self._log = log
        self._last = [0] * self._sectors
        self._older: dict[int, set[int]] = {}  # by sector: what it may hold instead
        self._loose: set[int] = set()  # sectors of which an error was reported: they may hold what they like of these
        self._unexplained: list[str] = []
        self._number = 0

    def run(self, seconds: float, stop: "Stop") -> None:
        """Write, read and fsync until the time is over; a limit on the bytes keeps the disk from being the test."""
        end = time.monotonic() + seconds
        pace = time.monotonic()
        since = 0
        while time.monotonic() < end and not stop.asked:
            first, count = self._place()
            if self._random.random() < 0.6:
                self._write(first, count)
                since += 1
            else:
                self._read(first, count)
            if since >= _BETWEEN_FSYNCS or self._random.random() < 0.02:
                self._fsync()
                since = 0
            pace = max(pace + count * SECTOR / self._rate, time.monotonic() - 1)
            time.sleep(max(0.0, pace - time.monotonic()))

    def finish(self, patience: float) -> bool:
        """Fsync until everything is certain; whether that came in time."""
        end = time.monotonic() + patience
        while not (self._fsync() and not self._older):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def expected(self, path: Path) -> None:
        """Write down what the disk has to hold after `finish`."""
        with path.open("wb") as file:
            for sector, write in enumerate(self._last):
                file.write(sector_of(write, sector))

    # -- the three calls ---------------------------------------------------------------------------------------------

    def _place(self) -> tuple[int, int]:
        """Mostly short, in a few hot places as well as everywhere, so that writes overlap."""
        longest = self._random.choice((1, 8, 8, 64, _LONGEST // SECTOR))
        count = min(self._random.randint(1, longest), self._sectors)
        span = self._sectors - count
        if self._random.random() < 0.3:
            span = min(span, 2048)
        return self._random.randint(0, span), count

    def _write(self, first: int, count: int) -> None:
        self._number += 1
        number = self._number
        data = b"".join(sector_of(number, sector) for sector in range(first, first + count))
        for sector in range(first, first + count):
            self._older.setdefault(sector, set()).add(self._last[sector])
            self._last[sector] = number
        began = time.monotonic()
        self.totals.writes += 1
        try:
            done = os.pwrite(self._fd, data, first * SECTOR)
        except OSError as error:
            self._note_error("write", error, began)
            self._loose.update(range(first, first + count))
            return
        self._time(began)
        if done != len(data):
            self._wrong(f"a write of {len(data)} bytes wrote {done}")
        self.totals.bytes_written += done

    def _read(self, first: int, count: int) -> None:
        if self._random.random() < 0.5:  # else the kernel's page cache answers
            os.posix_fadvise(self._fd, first * SECTOR, count * SECTOR, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        self.totals.reads += 1
        data = b""
        # The kernel gives what comes before a page that can't be read; the error is for who asks for the rest.
        while len(data) < count * SECTOR:
            try:
                more = os.pread(self._fd, count * SECTOR - len(data), first * SECTOR + len(data))
            except OSError as error:
                self._note_error("read", error, began)
                break
            if not more:
                self._wrong(f"the file ended at byte {first * SECTOR + len(data)}")
                break
            data += more
        self._time(began)
        self.totals.bytes_checked += len(data)
        for index in range(len(data) // SECTOR):
            sector = first + index
            found = data[index * SECTOR : (index + 1) * SECTOR]
            last = self._last[sector]
            if found == sector_of(last, sector):
                continue
            told = f"a read gave {who(found)} in sector {sector}, not write {last}"
            if any(found == sector_of(write, sector) for write in self._older.get(sector, ())):
                if sector not in self._loose:
                    self._unexplained.append(told)
            else:
                self._wrong(told)

    def _fsync(self) -> bool:
        began = time.monotonic()
        self.totals.fsyncs += 1
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._note_error("fsync", error, began)
            self._loose.update(self._older)
            self._unexplained.clear()
            return False
        self._time(began)
        for told in self._unexplained:
            self._wrong(f"{told}; no error was reported")
        self._unexplained.clear()
        # What an error was reported of is uncertain still, and written anew; all other sectors are certain now.
        for sector in list(self._older):
            if sector not in self._loose:
                del self._older[sector]
        if self._loose:
            again = sorted(self._loose)
            self._loose.clear()
            for first, count in _runs(again):
                self._write(first, count)
        return True

    # -- notes -------------------------------------------------------------------------------------------------------

    def _time(self, began: float) -> None:
        self.totals.longest = max(self.totals.longest, time.monotonic() - began)

    def _note_error(self, what: str, error: OSError, began: float) -> None:
        self._time(began)
        self.totals.errors_reported += 1
        self._say(f"{what}: {error}")
        if error.errno not in _EIO:
            self._wrong(f"{what}: {error}")

    def _wrong(self, what: str) -> None:
        self._say(f"WRONG: {what}")
        if len(self.totals.wrong) < 50:
            self.totals.wrong.append(what)

    def _say(self, what: str) -> None:
        with self._log.open("a") as log:
            log.write(f"{time.time():.3f} {what}\n")


def _runs(sectors: list[int]) -> list[tuple[int, int]]:
    """First and count of what is contiguous, no longer than a write may be."""
    runs: list[tuple[int, int]] = []
    for sector in sectors:
        if runs and runs[-1][0] + runs[-1][1] == sector and runs[-1][1] < _LONGEST // SECTOR:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((sector, 1))
    return runs


class Stop:
    """Set by SIGTERM."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, _number: int, _frame: object) -> None:
        self.asked = True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--expected", type=Path, required=True, help="where to write what has to be there in the end")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="until SIGTERM, if not told")
    parser.add_argument("--rate", type=float, default=4e6, help="bytes per second at most")
    parser.add_argument("--patience", type=float, default=120)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args()
    stop = Stop()
    writer = Writer(options.file, size=options.size, seed=options.seed, rate=options.rate, log=options.log)
    writer.run(options.seconds, stop)
    finished = writer.finish(options.patience)
    if finished:
        writer.expected(options.expected)
    options.report.write_text(json.dumps({**asdict(writer.totals), "finished": finished}))
    return 0 if finished and not writer.totals.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
