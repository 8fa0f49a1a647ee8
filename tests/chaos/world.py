"""Where it happens: tgtd, a relay before it, and one mount through the relay; four disks, each with its own load.

``raw`` is written by `chaos.writer` and may be taken offline; ``fio`` is written and verified by fio; ``ext4`` has a
file system on a loop device in which both do the same. All of it goes through one session with digests.
"""

import contextlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.cli import Mounted
from support.disks import MIB, sparse
from support.process import is_alive, sbin_path
from support.relay import Relay
from support.tgt import TgtServer

__all__ = ["EXT4", "FIO", "RAW", "Sizes", "World", "run"]

TARGET = "iqn.2026-11.example:chaos"
RAW, FIO, EXT4 = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes."""

    raw: int = 48 * MIB
    fio: int = 64 * MIB
    ext4: int = 128 * MIB
    inside: int = 24 * MIB  # of the writer's file in the file system
    cache: int = 32 * MIB

    @classmethod
    def short(cls) -> "Sizes":
        """For seconds instead of minutes."""
        return cls(raw=8 * MIB, fio=6 * MIB, ext4=32 * MIB, inside=3 * MIB, cache=8 * MIB)


def run(*command: str | Path, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command to its end. Nothing here touches a file of the mount but commands: they can be left behind."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": sbin_path(), "LC_ALL": "C"},
        cwd="/",
    )
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stdout}{done.stderr}"
        )
    return done


class World:
    """All that is under the loads; a context manager that leaves nothing behind.

    Args:
        folder: for everything.
        sizes: of the disks.
        options: more of them for the mount, as after -o.
        distance: seconds of a round trip to the target.

    Attributes:
        server: the target.
        relay: what the connection goes through.
        mounted: the mount.
        inside: where the file system is mounted.
    """

    def __init__(self, folder: Path, sizes: Sizes, *, options: str = "", distance: float = 0.0) -> None:
        self.folder = folder
        self.sizes = sizes
        self.inside = folder / "inside"
        self._options = options
        self._distance = distance
        self._device = ""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            folder = self.folder / "tgtd"
            folder.mkdir()
            self.server = stack.enter_context(TgtServer(folder, threads=4))
            self.server.add_target(TARGET, params={"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"})
            for lun, name, size in (
                (RAW, "raw", self.sizes.raw),
                (FIO, "fio", self.sizes.fio),
                (EXT4, "ext4", self.sizes.ext4),
            ):
                self.server.add_lun(TARGET, lun, sparse(self.backing(name), size), serial=f"CHAOS{lun}")
            self.relay = stack.enter_context(Relay(self.server.port, delay=self._distance / 2))
            options = f"cache_size={self.sizes.cache // MIB}M,reconnect_timeout=120,{self._options}".rstrip(",")
            url = f"iscsi://127.0.0.1:{self.relay.port}/{TARGET}?header_digest=crc32c&data_digest=crc32c"
            self.mounted = stack.enter_context(Mounted(url, self.folder / "m", "--rw", "-o", options, timeout=200))
            self._set_up_ext4(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def backing(self, name: str) -> Path:
        """The file behind a disk."""
        return self.folder / f"{name}.img"

    def lun(self, number: int) -> Path:
        """The file of a disk in the mount."""
        return self.mounted.lun(number)

    def _set_up_ext4(self, stack: contextlib.ExitStack) -> None:
        run("mkfs.ext4", "-q", "-E", "nodiscard", self.lun(EXT4))
        self._device = run("losetup", "--find", "--show", self.lun(EXT4)).stdout.strip()
        stack.callback(lambda: run("losetup", "--detach", self._device, check=False))
        self.inside.mkdir()
        run("mount", "-o", "errors=remount-ro", self._device, self.inside)
        stack.callback(self._leave_ext4)

    def _leave_ext4(self) -> None:
        if f" {self.inside} " in Path("/proc/mounts").read_text():
            run("umount", "-l", self.inside, check=False)

    # -- what the daemon is doing ----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What the mount says of its session; empty where it doesn't answer."""
        with contextlib.suppress(subprocess.TimeoutExpired, json.JSONDecodeError, AssertionError):
            shown = run("cat", self.mounted.point / ".iscsifuse" / "status.json", timeout=30).stdout
            document: dict[str, Any] = json.loads(shown)
            return document
        return {}

    @property
    def is_logged_in(self) -> bool:
        sessions = self.status().get("sessions") or [{}]
        return bool(sessions[0].get("state") == "logged in")

    def footprint(self) -> tuple[int, int, int]:
        """Of the daemon: resident bytes, open descriptors, threads; zeros when it is gone."""
        pid = self.mounted.pid
        assert pid is not None
        if not is_alive(pid):
            return 0, 0, 0
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return int(fields["VmRSS"].split()[0]) * 1024, descriptors, int(fields["Threads"])

    # -- the end ---------------------------------------------------------------------------------------------------

    def unmount(self, patience: float, *, raw_may_fail: bool = False) -> None:
        """The file system, the loop device, the mount: each has to go in good order.

        What the raw disk failed while it was offline is told once more then.
        """
        run("umount", self.inside, timeout=patience)
        run("losetup", "--detach", self._device, timeout=patience)
        self.mounted.unmount(lossy=RAW if raw_may_fail else None)

    @contextlib.contextmanager
    def ext4_as_it_is_on_the_disk(self) -> Any:
        """The file system in the backing file, read-only and without the mount."""
        point = self.folder / "afterwards"
        point.mkdir(exist_ok=True)
        run("mount", "-o", "loop,ro,noload", self.backing("ext4"), point)
        try:
            yield point
        finally:
            run("umount", point)
