"""One logical unit: blocks, and everything that can be wrong with them.

The volatile cache is modelled by its consequences. A write goes to the backing at once, so that reads see it; what
stable storage still holds for a block goes into a journal, once. What makes blocks stable (SYNCHRONIZE CACHE, force
unit access) takes them out of the journal, and :meth:`Disk.power_cut` writes the journal back. Invariant: the backing
with the journal written back is what is on stable storage.

Unit attentions are a log that only grows; each nexus has its own reading position in it (see ``scsi_engine``), so
whoever changes a disk needs to know nobody.

Source: SBC-3 §4.15 (caches), §4.7 (provisioning); SAM-5 §5.14 (unit attention).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from iscsifuse.scsi.lba_status import Extent, Provisioning

__all__ = ["Backing", "BadBlockError", "DeviceType", "Disk", "FileBacking", "MemoryBacking"]

_CHUNK = 1 << 20


class BadBlockError(Exception):
    """A block of the medium can't be read or written; an event of the model, not an error of this program.

    Attributes:
        lba: the first bad block of the range.
    """

    def __init__(self, lba: int) -> None:
        super().__init__(f"block {lba} is bad")
        self.lba = lba


class DeviceType(IntEnum):
    """Peripheral device types that are served. Source: SPC-4 §6.6.2."""

    DISK = 0x00
    CONTROLLER = 0x0C


class Backing(Protocol):
    """Where bytes are kept."""

    def read(self, *, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; what was never written is zeros."""

    def write(self, data: bytes | bytearray | memoryview, *, offset: int) -> None:
        """Put all of ``data`` at ``offset``."""

    def flush(self) -> None:
        """Bring everything to stable storage."""

    def close(self) -> None:
        """Give up what is held."""


class MemoryBacking:
    """Bytes in memory, allocated where they are written: a disk of petabytes costs nothing until it is used."""

    def __init__(self, contents: bytes = b"") -> None:
        self._chunks: dict[int, bytearray] = {}
        self.write(contents, offset=0)

    def read(self, *, offset: int, length: int) -> bytes:
        """See :class:`Backing`."""
        pieces = []
        for index, start, count in _pieces(offset=offset, length=length):
            chunk = self._chunks.get(index)
            pieces.append(bytes(count) if chunk is None else bytes(memoryview(chunk)[start : start + count]))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, data: bytes | bytearray | memoryview, *, offset: int) -> None:
        """See :class:`Backing`."""
        view = memoryview(data)
        done = 0
        for index, start, count in _pieces(offset=offset, length=len(view)):
            chunk = self._chunks.get(index)
            if chunk is None:
                chunk = self._chunks[index] = bytearray(_CHUNK)
            chunk[start : start + count] = view[done : done + count]
            done += count

    def flush(self) -> None:
        """See :class:`Backing`. Memory is as stable as this model gets."""

    def close(self) -> None:
        """See :class:`Backing`. The contents stay readable, for tests that look at them afterwards."""


def _pieces(*, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Chunk index, start in the chunk, and count, for each chunk that a range of bytes touches."""
    end = offset + length
    while offset < end:
        index, start = divmod(offset, _CHUNK)
        count = min(_CHUNK - start, end - offset)
        yield index, start, count
        offset += count


class FileBacking:
    """An image file. Where the image ends in the middle of a block, the rest of the block reads as zeros.

    Attributes:
        size: bytes that the file had when it was opened.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        # A block device has no st_size; its end can be sought.
        self.size = os.lseek(self._fd, 0, os.SEEK_END)

    def read(self, *, offset: int, length: int) -> bytes:
        """See :class:`Backing`."""
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                return data.ljust(length, b"\0")
            data += more
        return data

    def write(self, data: bytes | bytearray | memoryview, *, offset: int) -> None:
        """See :class:`Backing`."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def flush(self) -> None:
        """See :class:`Backing`."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """See :class:`Backing`."""
        os.close(self._fd)


@dataclass(slots=True, kw_only=True, eq=False)
class Disk:
    """A logical unit, changeable while it is served.

    Attributes:
        blocks: capacity in blocks; change it with :meth:`resize`.
        block_length: bytes in a block.
        lun: the number under which it is found.
        backing: where its bytes are.
        serial: unit serial number; also the source of its NAA identifier.
        vendor: at most 8 ASCII characters.
        product: at most 16 ASCII characters.
        revision: at most 4 ASCII characters.
        device_type: a controller answers INQUIRY and TEST UNIT READY, and has no blocks.
        write_protected: WP is set, and what would change the medium gets DATA PROTECT.
        volatile_cache: WCE is set, and a write is stable only after SYNCHRONIZE CACHE or with force unit access.
        journal: keep what :meth:`power_cut` needs (memory for each write that isn't stable).
        thin: UNMAP, WRITE SAME with UNMAP, and GET LBA STATUS; nothing is mapped before it is written.
        max_transfer_blocks: MAXIMUM TRANSFER LENGTH of the block limits page, enforced; 0 is no limit.
        optimal_transfer_blocks: OPTIMAL TRANSFER LENGTH; 0 is not reported.
        physical_exponent: 2^this logical blocks are a physical one.
        bad_blocks: blocks that give MEDIUM ERROR when they are read; writing one cures it.
        bad_writes: blocks that give MEDIUM ERROR when they are written.
        becoming_ready: commands that will still be answered "in process of becoming ready" (04/01).
        stopped: needs START STOP UNIT (04/02).
        descriptor_sense: sense data comes in descriptor format.
        medium_present: without it every command about the medium gets 3A/00.
        attentions: additional sense codes (ASC, ASCQ) that every nexus has to be told, oldest first.
    """

    blocks: int
    block_length: int = 512
    lun: int = 0
    backing: Backing = field(default_factory=MemoryBacking, repr=False)
    serial: str = ""
    vendor: str = "ISCSIFUS"
    product: str = "LOOPBACK DISK"
    revision: str = "1"
    device_type: int = DeviceType.DISK
    write_protected: bool = False
    volatile_cache: bool = True
    journal: bool = True
    thin: bool = False
    max_transfer_blocks: int = 0
    optimal_transfer_blocks: int = 0
    physical_exponent: int = 0
    bad_blocks: set[int] = field(default_factory=set)
    bad_writes: set[int] = field(default_factory=set)
    becoming_ready: int = 0
    stopped: bool = False
    descriptor_sense: bool = False
    medium_present: bool = True
    attentions: list[tuple[int, int]] = field(default_factory=list)
    _journal: dict[int, tuple[bytes, bool]] = field(default_factory=dict, init=False, repr=False)
    _mapped: set[int] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.serial:
            self.serial = f"LOOPBACK{self.lun:08d}"

    @classmethod
    def from_bytes(cls, contents: bytes, *, block_length: int = 512, lun: int = 0) -> "Disk":
        """A disk in memory that holds these bytes, the last block filled up with zeros."""
        blocks = -(-len(contents) // block_length)
        return cls(blocks=blocks, block_length=block_length, lun=lun, backing=MemoryBacking(contents))

    @classmethod
    def from_file(cls, path: Path, *, block_length: int = 512, lun: int = 0, read_only: bool = False) -> "Disk":
        """A disk that is an image file. Without a journal: the file system's cache is its volatile cache.

        Raises:
            OSError: the file can't be opened.
        """
        backing = FileBacking(path, read_only=read_only)
        return cls(
            blocks=-(-backing.size // block_length),
            block_length=block_length,
            lun=lun,
            backing=backing,
            write_protected=read_only,
            journal=False,
        )

    @property
    def size(self) -> int:
        """Bytes."""
        return self.blocks * self.block_length

    @property
    def is_disk(self) -> bool:
        """Whether it has blocks at all."""
        return self.device_type == DeviceType.DISK

    @property
    def unstable_blocks(self) -> int:
        """Blocks that a power cut would take back."""
        return len(self._journal)

    def contents(self, *, lba: int = 0, blocks: int | None = None) -> bytes:
        """What the blocks hold, bad or not; for tests that compare."""
        count = self.blocks - lba if blocks is None else blocks
        return self.backing.read(offset=lba * self.block_length, length=count * self.block_length)

    def stable_contents(self) -> bytes:
        """What all blocks would hold after a power cut."""
        contents = bytearray(self.contents())
        for block, (data, _) in self._journal.items():
            contents[block * self.block_length : (block + 1) * self.block_length] = data
        return bytes(contents)

    def read(self, *, lba: int, blocks: int) -> bytes:
        """The blocks' bytes.

        Raises:
            BadBlockError: one of them is bad.
        """
        _refuse(self.bad_blocks, lba=lba, blocks=blocks)
        return self.backing.read(offset=lba * self.block_length, length=blocks * self.block_length)

    def write(self, data: bytes | bytearray | memoryview, *, lba: int, stable: bool = False) -> None:
        """Change blocks.

        Args:
            data: a multiple of ``block_length`` bytes.
            lba: first block.
            stable: force unit access.

        Raises:
            BadBlockError: one of them can't be written; nothing was changed.
        """
        blocks = len(data) // self.block_length
        if blocks == 0:
            return
        _refuse(self.bad_writes, lba=lba, blocks=blocks)
        if self.bad_blocks:
            self.bad_blocks.difference_update([bad for bad in self.bad_blocks if lba <= bad < lba + blocks])
        self._remember(lba=lba, blocks=blocks)
        self.backing.write(data, offset=lba * self.block_length)
        if self.thin:
            self._mapped.update(range(lba, lba + blocks))
        if stable or not self.volatile_cache:
            self.synchronize(lba=lba, blocks=blocks)

    def unmap(self, *, lba: int, blocks: int) -> None:
        """Give blocks up; they read as zeros from now on (LBPRZ is set)."""
        self._remember(lba=lba, blocks=blocks)
        for start in range(lba, lba + blocks, 2048):
            count = min(2048, lba + blocks - start)
            self.backing.write(bytes(count * self.block_length), offset=start * self.block_length)
        self._mapped.difference_update(range(lba, lba + blocks))

    def synchronize(self, *, lba: int = 0, blocks: int = 0) -> None:
        """Make blocks stable.

        Args:
            lba: first block.
            blocks: how many; 0 is all from ``lba`` on.
        """
        end = lba + blocks if blocks else max(self.blocks, lba)
        if lba == 0 and end >= self.blocks:
            self._journal.clear()
        elif end - lba < len(self._journal):
            for block in range(lba, end):
                self._journal.pop(block, None)
        else:
            for block in [block for block in self._journal if lba <= block < end]:
                del self._journal[block]
        self.backing.flush()

    def power_cut(self) -> int:
        """Lose what isn't stable, and tell every nexus so (29/00).

        Returns:
            How many blocks were lost.
        """
        lost = len(self._journal)
        for block, (data, mapped) in self._journal.items():
            self.backing.write(data, offset=block * self.block_length)
            if mapped:
                self._mapped.add(block)
            else:
                self._mapped.discard(block)
        self._journal.clear()
        self.attentions.append((0x29, 0x00))
        return lost

    def resize(self, blocks: int) -> None:
        """Change the capacity, and tell every nexus so (2A/09)."""
        self.blocks = blocks
        self.attentions.append((0x2A, 0x09))

    def extents(self, *, lba: int, limit: int) -> list[Extent]:
        """Provisioning from a block on.

        Args:
            lba: first block.
            limit: the most extents to return.

        Returns:
            Extents without gaps; all of the disk is one mapped extent where it isn't thin.
        """
        if not self.thin:
            return [Extent(lba=lba, blocks=min(self.blocks - lba, 0xFFFFFFFF), provisioning=Provisioning.MAPPED)]
        found: list[Extent] = []
        mapped = sorted(block for block in self._mapped if lba <= block < self.blocks)
        index = 0
        while lba < self.blocks and len(found) < limit:
            start = lba
            if index < len(mapped) and mapped[index] == lba:
                while index < len(mapped) and mapped[index] == lba:
                    index, lba = index + 1, lba + 1
                kind = Provisioning.MAPPED
            else:
                lba = mapped[index] if index < len(mapped) else self.blocks
                kind = Provisioning.DEALLOCATED
            found.append(Extent(lba=start, blocks=min(lba - start, 0xFFFFFFFF), provisioning=kind))
        return found

    def close(self) -> None:
        """Bring everything to stable storage and close the backing."""
        if not self.write_protected:
            self.backing.flush()
        self.backing.close()

    def _remember(self, *, lba: int, blocks: int) -> None:
        """Put what stable storage holds into the journal, for blocks that aren't in it yet."""
        if not (self.journal and self.volatile_cache):
            return
        size = self.block_length
        before = self.backing.read(offset=lba * size, length=blocks * size)
        for index in range(blocks):
            if lba + index not in self._journal:
                mapped = lba + index in self._mapped
                self._journal[lba + index] = before[index * size : (index + 1) * size], mapped


def _refuse(bad: set[int], *, lba: int, blocks: int) -> None:
    """Raise BadBlockError for the first bad block of a range."""
    if bad:
        first = min((block for block in bad if lba <= block < lba + blocks), default=None)
        if first is not None:
            raise BadBlockError(first)
