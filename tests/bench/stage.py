"""Where the work is done: one tgtd with its default settings, and the disks that it offers, all in memory.

Disks are made when the first work asks for them. Each group of disks is a target of its own, so that a mount of one
target shows what the work needs and nothing else.
"""

import contextlib
import os
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.contents import fill
from support.disks import MIB, random_file, sparse
from support.process import sbin_path
from support.tgt import TgtServer

__all__ = ["Disk", "Sizes", "Stage", "many_target"]

_PREFIX = "iqn.2026-11.example:"


@dataclass(frozen=True, slots=True)
class Disk:
    """One LUN, and the file behind it."""

    target: str
    lun: int
    backing: Path
    size: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work there is."""

    full: int  # bytes of the disk that is read and written in order
    fio_seconds: float  # of one measurement of random reads or writes
    files: int  # in the tree that is unpacked and looked into
    icat: int  # how many of them Sleuth Kit reads
    patience: float  # seconds for one command

    @classmethod
    def for_run(cls, *, quick: bool, size: int | None) -> "Sizes":
        """A smoke test's, or a measurement's."""
        if quick:
            return cls(full=size or 32 * MIB, fio_seconds=0.15, files=400, icat=10, patience=30)
        return cls(full=size or 1024 * MIB, fio_seconds=2, files=4000, icat=500, patience=180)

    @property
    def half(self) -> int:
        """Of the work that is slower, so that it takes about as long."""
        return self.full // 2

    @property
    def small_writes(self) -> int:
        """Of writing in pieces of 4 KiB."""
        return self.full // 8

    @property
    def file_system(self) -> int:
        """Of a disk with a file system on it, which has to hold the tree four times, and a journal."""
        return max(self.full, 256 * MIB)


class Stage:
    """The folders, the server and the disks; a context manager that leaves nothing behind."""

    def __init__(self, sizes: Sizes, memory: Path) -> None:
        """Prepare; ``memory`` is the folder, on a tmpfs, that all files go to."""
        self.sizes = sizes
        self._memory = memory
        self._count = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # AppArmor may let fusermount3 mount in /tmp, and not in /dev/shm.
            self.folder, self._points = (self._new_folder(place, stack) for place in (self._memory, None))
            folder = self.folder / "tgtd"
            folder.mkdir()
            self.server = stack.enter_context(TgtServer(folder))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @staticmethod
    def _new_folder(place: Path | None, stack: contextlib.ExitStack) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="iscsifuse-bench-", dir=place)).resolve()
        folder.chmod(0o711)  # one contender is another user
        stack.callback(_remove, folder)
        return folder

    def new_path(self, what: str) -> Path:
        """A path in memory that wasn't given before."""
        self._count += 1
        return self.folder / f"{what}-{self._count}"

    def new_point(self, what: str) -> Path:
        """A path for something to be mounted on that wasn't given before."""
        self._count += 1
        return self._points / f"{what}-{self._count}"

    # --- the disks ---

    def _offer(self, name: str, backing: Path, *, luns: int = 1, digests: bool = False) -> list[Disk]:
        target = _PREFIX + name
        self.server.add_target(target, params={"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"} if digests else None)
        for lun in range(1, luns + 1):
            self.server.add_lun(target, lun, backing)
        return [Disk(target, lun, backing, backing.stat().st_size) for lun in range(1, luns + 1)]

    @cached_property
    def data(self) -> Disk:
        """Random bytes, for reading. What is written elsewhere is taken from its backing file, too."""
        return self._offer("data", random_file(self.folder / "data.img", self.sizes.full))[0]

    @cached_property
    def four(self) -> list[Disk]:
        """Four disks for readers side by side; the same bytes behind each, to save memory."""
        return self._offer("four", self.data.backing, luns=4)

    @cached_property
    def digested(self) -> Disk:
        """The bytes of `data`, from a target that has digests if the initiator wants them."""
        return self._offer("digests", self.data.backing, digests=True)[0]

    @cached_property
    def scratch(self) -> Disk:
        """For writing."""
        return self._offer("scratch", fill(sparse(self.folder / "scratch.img", self.sizes.full)))[0]

    @cached_property
    def blank(self) -> Disk:
        """For a file system to be made on."""
        return self._offer("blank", sparse(self.folder / "blank.img", self.sizes.file_system))[0]

    @cached_property
    def evidence(self) -> Disk:
        """An ext4 file system with the tree in it, four times."""
        image = sparse(self.folder / "evidence.img", self.sizes.file_system)
        tree = self.folder / "tree"
        with tarfile.open(self.tarball) as archive:
            for copy in ("one", "two", "three", "four"):
                archive.extractall(tree / copy)  # noqa: S202 - our own archive; the filter of newer Pythons isn't in all 3.11
        command = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), str(image)]
        subprocess.run(command, check=True, capture_output=True, timeout=120, env={**os.environ, "PATH": sbin_path()})
        shutil.rmtree(tree)
        return self._offer("evidence", image)[0]

    @cached_property
    def tarball(self) -> Path:
        """A source tree: Python's own library, as often as it takes; the same bytes for the same Python."""
        path = self.folder / "tree.tar"
        top = Path(sysconfig.get_path("stdlib"))
        sources = sorted(file for file in top.rglob("*.py") if "site-packages" not in file.parts and file.is_file())
        sources = [file for file in sources if "dist-packages" not in file.parts]
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
            for number in range(self.sizes.files):
                source = sources[number % len(sources)]
                entry = tarfile.TarInfo(f"copy-{number // len(sources)}/{source.relative_to(top)}")
                entry.size = source.stat().st_size
                entry.mode = 0o644
                with source.open("rb") as file:
                    archive.addfile(entry, file)
        return path

    @contextlib.contextmanager
    def fresh(self, disk: Disk) -> Iterator[str]:
        """The portal of another tgtd, which has just been started and has one of the disks, under its name.

        Whoever comes second to a tgtd may profit by what the first one made it do with its memory.
        """
        folder = self.new_path("fresh")
        folder.mkdir()
        try:
            with TgtServer(folder) as server:
                server.add_target(disk.target)
                server.add_lun(disk.target, disk.lun, disk.backing)
                yield server.portal
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def many(self, luns: int) -> Iterator[TgtServer]:
        """Another tgtd with this many sparse disks, 16 to a target; see `many_target` for their names.

        It has one thread for each disk instead of tgtd's sixteen: with hundreds of disks they would be thousands.
        """
        folder = self.new_path("many")
        folder.mkdir()
        try:
            with TgtServer(folder, threads=1) as server:
                for number in range(luns):
                    target = many_target(number // 16)
                    if number % 16 == 0:
                        server.add_target(target)
                    backing = sparse(folder / f"{number}.img", self.sizes.full)
                    server.add_lun(target, number % 16 + 1, backing)
                yield server
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a folder, and nothing that is mounted below it: whoever hung may have left something."""
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        point = line.split()[1]
        if point.startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", point], check=False, capture_output=True, timeout=20)
    shutil.rmtree(folder, ignore_errors=True)


def many_target(number: int) -> str:
    """The name of one of the targets of `Stage.many`, counted from 0.

    Behind its disk ``n`` there is the server's file ``16 * number + n - 1``.
    """
    return f"{_PREFIX}many{number}"
