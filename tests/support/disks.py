"""Disk images with known content, made without mounting anything."""

import hashlib
import os
import random
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from support.process import sbin_path

__all__ = ["Partition", "PartitionedImage", "ext4_image", "partitioned_image", "random_file", "sha256", "sparse"]

MIB = 1 << 20
_UUID = "2f6e1a52-8a43-4a0c-9d53-0123456789ab"


def sparse(path: Path, size: int) -> Path:
    """A file of ``size`` bytes that takes no space. Returns its path, as all of these do."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def random_file(path: Path, size: int, seed: int = 0) -> Path:
    """A file of ``size`` bytes that nobody guesses, the same for the same ``seed``."""
    source = random.Random(seed)
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            file.write(source.randbytes(min(MIB, size - start)))
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ext4_image(path: Path, size: int, tree: Mapping[str, bytes]) -> Path:
    """An ext4 file system of ``size`` bytes that holds the files of ``tree`` (names may have folders in them)."""
    sparse(path, size)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name, content in tree.items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        _run("mke2fs", "-q", "-F", "-t", "ext4", "-U", _UUID, "-E", f"hash_seed={_UUID}", "-d", folder, str(path))
    return path


def ntfs_image(path: Path, size: int, tree: Mapping[str, bytes]) -> Path:
    """An NTFS file system of ``size`` bytes that holds the files of ``tree`` (in its root folder)."""
    sparse(path, size)
    _run("mkntfs", "--quiet", "--force", "--fast", "--sector-size", "512", "--partition-start", "0", str(path))
    for name, content in tree.items():
        with tempfile.NamedTemporaryFile(dir=path.parent) as file:
            file.write(content)
            file.flush()
            _run("ntfscp", "--quiet", "--force", str(path), file.name, name)
    return path


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition of an image; ``offset`` and ``size`` in bytes."""

    offset: int
    size: int
    kind: Literal["ext4", "ntfs"]
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class PartitionedImage:
    """A disk with partitions, and what is in them."""

    path: Path
    size: int
    partitions: tuple[Partition, ...]


def partitioned_image(
    path: Path, *, table: Literal["mbr", "gpt"] = "gpt", files: Mapping[str, bytes] | None = None
) -> PartitionedImage:
    """A disk of 64 MiB with an ext4 and an NTFS partition, both holding ``files``.

    Args:
        path: where to make it.
        table: the kind of partition table.
        files: name and content; a short and a long file if None.
    """
    if files is None:
        files = {"hello.txt": b"Hello from a partition.\n", "long.bin": random.Random(1).randbytes(3 * MIB + 17)}
    size = 64 * MIB
    layout: tuple[tuple[Literal["ext4", "ntfs"], int, int], ...] = (
        ("ext4", 1 * MIB, 30 * MIB),
        ("ntfs", 32 * MIB, 30 * MIB),
    )
    types = {
        "mbr": {"ext4": "83", "ntfs": "7"},
        "gpt": {"ext4": "linux", "ntfs": "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"},
    }
    script = f"label: {'dos' if table == 'mbr' else 'gpt'}\n" + "".join(
        f"start={offset // 512}, size={length // 512}, type={types[table][kind]}\n" for kind, offset, length in layout
    )
    sparse(path, size)
    _run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", str(path), script=script)
    make = {"ext4": ext4_image, "ntfs": ntfs_image}
    for kind, offset, length in layout:
        part = make[kind](path.with_name(f"{path.name}.{kind}"), length, files)
        with part.open("rb") as source, path.open("r+b") as disk:
            disk.seek(offset)
            while block := source.read(MIB):
                disk.write(block)
        part.unlink()
    return PartitionedImage(
        path, size, tuple(Partition(offset, length, kind, files) for kind, offset, length in layout)
    )


def _run(*command: str, script: str | None = None) -> None:
    done = subprocess.run(
        command,
        input=script or "",
        env={**os.environ, "PATH": sbin_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} failed: {done.stderr or done.stdout}")
