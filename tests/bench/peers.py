"""The other programs: QEMU's storage daemon, nbdfuse over qemu-nbd, libiscsi without a file, and tmpfs."""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench import shell
from bench.contender import Contender, FileContender, Opened, take_away, wait_for_file
from bench.shell import ContenderError
from bench.stage import Disk, Stage
from support.ports import wait_until
from support.process import sbin_path

__all__ = ["Libiscsi", "Nbdfuse", "QemuStorageDaemon", "Tmpfs"]

_ON = {True: "on", False: "off"}  # QEMU's words


def _missing(*programs: str) -> str | None:
    return next((f"{name} isn't installed" for name in programs if not shutil.which(name, path=sbin_path())), None)


class QemuStorageDaemon(FileContender):
    """``qemu-storage-daemon`` with libiscsi below and a FUSE export above, one export for each disk.

    QEMU 7.2 was tried with and without ``cache.direct=on`` and an iothread: no difference that rounds don't have
    among themselves (libiscsi has no host cache to go around). So it is set up as its manual page does it.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        name: str = "qsd",
        program: Path | None = None,
        iothread: bool = False,
        poll_max_ns: int | None = None,
    ) -> None:
        """Prepare.

        Args:
            stage: where the disks are.
            name: in the table.
            program: another build than the installed one.
            iothread: whether the exports have an iothread.
            poll_max_ns: how long that polls; None is QEMU's default.
        """
        super().__init__(stage)
        self.name = name
        self._program = str(program or "qemu-storage-daemon")
        polling = "" if poll_max_ns is None else f",poll-max-ns={poll_max_ns}"
        self._objects = ["--object", f"iothread,id=io{polling}"] if iothread else []
        self._thread = ",iothread=io" if iothread else ""
        self.how = " ".join(
            [
                f"`{Path(self._program).name}",
                *self._objects,
                "--blockdev driver=iscsi,…",
                f"--export type=fuse,writable=on,growable=off,allow-other=off{self._thread},…`;",
                "evidence: `read-only=on`, `writable=off`",
            ]
        )

    def why_not(self) -> str | None:
        if (reason := _missing(self._program)) is not None:
            return reason
        offered = shell.run([self._program, "--help"], timeout=20, statuses=range(256)).out
        return None if "type=]fuse" in offered or "fuse" in offered else "it was built without FUSE"

    @contextmanager
    def open(self, disks: Sequence[Disk], *, portal: str | None = None, read_only: bool = False) -> Iterator[Opened]:
        where = portal or self.stage.server.portal
        points = [self.stage.new_point("qsd") for _ in disks]
        log = self.stage.new_path("qsd-log")
        command = [self._program, *self._objects]
        for number, (disk, point) in enumerate(zip(disks, points, strict=True)):
            point.touch()
            device = f"transport=tcp,portal={where},target={disk.target},lun={disk.lun}"
            export = f"mountpoint={point},writable={_ON[not read_only]},growable=off,allow-other=off{self._thread}"
            command += ["--blockdev", f"driver=iscsi,node-name=disk{number},read-only={_ON[read_only]},{device}"]
            command += ["--export", f"type=fuse,id=export{number},node-name=disk{number},{export}"]
        with contextlib.ExitStack() as stack:
            for point in points:
                stack.callback(point.unlink)
                stack.callback(take_away, point)
            said = stack.enter_context(log.open("w"))
            began = time.perf_counter()
            daemon = stack.enter_context(shell.start(command, stdout=said, stderr=said))
            for disk, point in zip(disks, points, strict=True):
                wait_for_file(point, disk.size, daemon, log)
            yield Opened(points, [daemon.pid], time.perf_counter() - began)
            daemon.terminate()
            daemon.wait(20)


class Nbdfuse(FileContender):
    """``nbdfuse`` over a Unix socket, to ``qemu-nbd``, which has libiscsi below: a pair for each disk."""

    name = "nbdfuse"
    how = (
        "`nbdfuse FILE nbd+unix:///?socket=…` to `qemu-nbd --persistent --shared=16 --format=raw iscsi://…`; "
        "evidence: both with `-r`"
    )

    def why_not(self) -> str | None:
        return _missing("nbdfuse", "qemu-nbd", "fusermount3")

    @contextmanager
    def open(self, disks: Sequence[Disk], *, portal: str | None = None, read_only: bool = False) -> Iterator[Opened]:
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            points, pids = [], []
            for disk in disks:
                point, own = stack.enter_context(self._pair(disk, portal, read_only))
                points.append(point)
                pids += own
            yield Opened(points, pids, time.perf_counter() - began)

    @contextmanager
    def _pair(self, disk: Disk, portal: str | None, read_only: bool) -> Iterator[tuple[Path, list[int]]]:
        point = self.stage.new_point("nbd")
        socket, log = self.stage.new_path("sock"), self.stage.new_path("nbd-log")
        point.touch()
        access = ["-r"] if read_only else []
        serve = ["qemu-nbd", *access, "--persistent", "--shared=16", "--format=raw", f"--socket={socket}"]
        with contextlib.ExitStack() as stack:
            stack.callback(point.unlink)
            stack.callback(take_away, point)
            said = stack.enter_context(log.open("w"))
            server = stack.enter_context(shell.start([*serve, self.url(disk, portal)], stdout=said, stderr=said))
            try:
                wait_until(
                    lambda: socket.exists() or server.poll() is not None, timeout=20, what="qemu-nbd", step=0.002
                )
            except TimeoutError as error:
                raise ContenderError(str(error)) from error
            if server.poll() is not None:
                raise ContenderError(f"qemu-nbd ended: {log.read_text().strip()}")
            daemon = stack.enter_context(
                shell.start(["nbdfuse", *access, point, f"nbd+unix:///?socket={socket}"], stdout=said, stderr=said)
            )
            wait_for_file(point, disk.size, daemon, log)
            yield point, [server.pid, daemon.pid]
            shell.run(["fusermount3", "-u", point], timeout=20)
            daemon.wait(20)
            server.terminate()
            server.wait(20)


class Libiscsi(Contender):
    """``qemu-img bench``: libiscsi itself, without a file in between.

    It reads in order, or in steps; it throws away what it reads, and writes one byte's value everywhere.
    """

    name = "libiscsi"
    how = "`qemu-img bench -f raw` on the iscsi:// URL: no file, no FUSE"

    def why_not(self) -> str | None:
        return _missing("qemu-img")

    def bench(
        self,
        disk: Disk,
        *,
        depth: int,
        size: int,
        count: int,
        step: int | None = None,
        pattern: int | None = None,
        portal: str | None = None,
    ) -> tuple[float, shell.Ran]:
        """Seconds for ``count`` requests of ``size`` bytes, ``depth`` in flight, and the whole command.

        Args:
            disk: what to read or write, from its beginning.
            depth: requests in flight.
            size: bytes of each.
            count: how many.
            step: bytes from the beginning of one to that of the next; they follow each other if None.
            pattern: the value of each byte that is written; None is to read. The disk is told to flush at the end.
            portal: where to log in instead of at the server itself.
        """
        depth = min(depth, count)
        command = ["qemu-img", "bench", "-f", "raw", "-t", "none", "-d", depth, "-s", size, "-c", count]
        if step is not None:
            command += ["-S", step]
        if pattern is not None:
            command += ["-w", f"--pattern={pattern}", f"--flush-interval={count}"]
        command.append(self._url(disk, portal))
        ran = shell.run([str(word) for word in command], timeout=self.stage.sizes.patience)
        found = re.search(r"Run completed in ([\d.]+) seconds", ran.out)
        if found is None:
            raise ContenderError(f"qemu-img bench said {ran.out.strip()!r}")
        return float(found[1]), ran

    def check(self, disk: Disk, portal: str | None = None) -> None:
        """Read all of a disk, and compare it with its backing file."""
        command = ["qemu-img", "compare", "-f", "raw", "-F", "raw", self._url(disk, portal), str(disk.backing)]
        shell.run(command, timeout=self.stage.sizes.patience)

    def _url(self, disk: Disk, portal: str | None) -> str:
        return f"iscsi://{portal or self.stage.server.portal}/{disk.target}/{disk.lun}"


class Tmpfs(FileContender):
    """The backing file itself: what the reading programs take when there is nothing to wait for."""

    name = "tmpfs"
    how = "the backing file itself, without any target"
    works = frozenset({"warm-read", "sleuthkit", "convert", "e2fsck", "sha256"})

    def why_not(self) -> str | None:
        return None

    @contextmanager
    def open(
        self,
        disks: Sequence[Disk],
        *,
        portal: str | None = None,
        read_only: bool = False,  # noqa: ARG002 - nothing is mounted
    ) -> Iterator[Opened]:
        assert portal is None
        yield Opened([disk.backing for disk in disks], [], 0.0)
