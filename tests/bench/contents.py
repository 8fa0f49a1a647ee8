"""Whether bytes are right: what the backing files of the disks hold, before and after."""

import mmap
from pathlib import Path

from bench.shell import WrongBytesError
from support.disks import MIB

__all__ = ["changed_blocks", "fill", "require_pattern", "require_same"]


def fill(path: Path, value: int = 0) -> Path:
    """Write every byte of a file, where it is, so that what is written later finds its memory allocated."""
    block = bytes([value]) * MIB
    left = path.stat().st_size
    with path.open("r+b") as file:
        while left:
            left -= file.write(block[: min(left, MIB)])
    return path


def require_same(path: Path, other: Path, length: int, what: str) -> None:
    """`WrongBytesError` unless the first ``length`` bytes of two files are the same."""
    with path.open("rb") as one, other.open("rb") as two:
        for start in range(0, length, MIB):
            size = min(MIB, length - start)
            if one.read(size) != two.read(size):
                raise WrongBytesError(f"{what}: wrong bytes in the MiB at {start}")


def require_pattern(path: Path, length: int, value: int, what: str) -> None:
    """`WrongBytesError` unless each of the first ``length`` bytes of a file is ``value``."""
    block = bytes([value]) * MIB
    with path.open("rb") as file:
        for start in range(0, length, MIB):
            size = min(MIB, length - start)
            if file.read(size) != block[:size]:
                raise WrongBytesError(f"{what}: wrong bytes in the MiB at {start}")


def changed_blocks(path: Path, *, block: int, pattern: bytes) -> int:
    """How many blocks of a file that was all zeros are ``pattern`` now; `WrongBytesError` if one is neither."""
    zeros = bytes(MIB)
    per_step = MIB // block
    count = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        for start in range(0, len(view), MIB):
            step = view[start : start + MIB]
            if step == zeros[: len(step)]:
                continue
            for index in range(per_step):
                piece = step[index * block : (index + 1) * block]
                if piece == pattern:
                    count += 1
                elif piece.count(0) != len(piece):
                    raise WrongBytesError(f"random writes: wrong bytes in the block at {start + index * block}")
    return count
