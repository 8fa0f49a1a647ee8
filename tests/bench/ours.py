"""iscsifuse as a contender: root's, and an ordinary user's."""

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import iscsifuse
from bench import shell
from bench.contender import FileContender, Opened, take_away
from bench.host import bury, running_with
from bench.shell import ContenderError
from bench.stage import Disk, Stage
from support.ports import wait_until
from support.process import is_alive

__all__ = ["Iscsifuse", "IscsifuseUser"]

_CLI = ["-m", "iscsifuse.cli"]


class Iscsifuse(FileContender):
    """``iscsifuse mount --rw`` of a target, as root, with its default options."""

    is_ours = True

    def __init__(self, stage: Stage, *, name: str = "iscsifuse", checkout: Path | None = None) -> None:
        """Prepare; ``checkout`` is the folder of another version of the source, to compare with."""
        super().__init__(stage)
        self.name = name
        checked_out = " (another checkout)" if checkout else ""
        self.how = (
            f"`iscsifuse mount --rw`, default options{checked_out}; evidence: one LUN, on a file, without `--rw`"
        )
        self.program: list[str] = [sys.executable, *_CLI]
        if checkout is not None:
            self.program = ["env", f"PYTHONPATH={checkout.resolve()}", *self.program]
        self.prefix: list[str] = []

    def why_not(self) -> str | None:
        if shutil.which("fusermount3") is None:
            return "fusermount3 isn't installed"
        with contextlib.suppress(ContenderError):
            self._cli("--version", timeout=20)
            return None
        return f"{' '.join(self.program)} doesn't run"

    @contextmanager
    def open(
        self,
        disks: Sequence[Disk],
        *,
        portal: str | None = None,
        read_only: bool = False,
        options: Sequence[str] = (),
    ) -> Iterator[Opened]:
        luns = [disk.lun for disk in disks]
        if read_only and len(disks) == 1:  # on a file, where the others export it, too
            with self.mount(self.url(disks[0], portal), *options, on_file=True) as (point, pid, seconds):
                yield Opened([point], [pid], seconds, self.prefix)
            return
        url = self.url(disks[0], portal, lun=False)
        access = [] if read_only else ["--rw"]
        with self.mount(url, *access, "--lun", ",".join(map(str, luns)), *options) as (point, pid, seconds):
            yield Opened([point / f"lun-{lun}" for lun in luns], [pid], seconds, self.prefix)

    @contextmanager
    def mount(
        self, url: str, *options: str, on_file: bool = False, timeout: float = 60
    ) -> Iterator[tuple[Path, int, float]]:
        """Mount for a ``with`` block: the mount point, the daemon's pid, and the seconds that ``mount`` took."""
        point = self.stage.new_point("mnt")
        if on_file:
            point.touch()
        else:
            point.mkdir()
        self.give(point)
        pid = None
        try:
            began = time.perf_counter()
            self._cli("mount", url, point, *options, timeout=timeout)
            seconds = time.perf_counter() - began
            pid = int(self.status(point)["pid"])
            bury(pid)
            yield point, pid, seconds
            self._cli("umount", point, timeout=timeout)
        finally:
            self.remove(point, pid)

    def status(self, point: Path) -> dict[str, Any]:
        """The status of a mount."""
        if point.is_dir():
            shown = shell.run([*self.prefix, "cat", point / ".iscsifuse" / "status.json"], timeout=20).out
        else:
            shown = self._cli("status", "--json", point, timeout=20).out
        status: dict[str, Any] = json.loads(shown)
        return status

    def give(self, point: Path) -> None:
        """Let whoever mounts own the mount point."""

    def remove(self, point: Path, pid: int | None) -> None:
        """By force, if ``umount`` didn't do it."""
        take_away(point)
        if pid is None:
            # It was interrupted, or it failed. A daemon that nobody waits for any more ends, but not at once.
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: not running_with(point), timeout=10, what="the daemon to end")
            take_away(point)
        for left in running_with(point) if pid is None else [pid]:
            _kill(left)
        with contextlib.suppress(OSError):
            if point.is_dir():
                point.rmdir()
            else:
                point.unlink()

    def _cli(self, *arguments: str | Path, timeout: float) -> shell.Ran:
        return shell.run([*self.prefix, *self.program, *arguments], timeout=timeout)


def _kill(pid: int) -> None:
    if is_alive(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not is_alive(pid), timeout=5, what="the daemon to die")


class IscsifuseUser(Iscsifuse):
    """The same as the user ``nobody``, by way of fusermount3.

    It happens in a mount namespace of its own, with a /dev/fuse that everybody may open, as udev makes it: minimal
    systems and containers don't have that, and it isn't ours to change.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage, name="iscsifuse-user")
        self.how = "the same as the user nobody, by fusermount3, without what root can tune"
        self.works = frozenset({"read-1m", "write-1m"})
        self._namespace: subprocess.Popen[str] | None = None
        self._stack = contextlib.ExitStack()

    def why_not(self) -> str | None:
        missing = [name for name in ("unshare", "nsenter", "setpriv") if shutil.which(name) is None]
        if missing:
            return f"{missing[0]} isn't installed"
        try:
            self._enter()
            if not self._can("ls", "--directory", self.stage.folder / "."):
                return f"the user nobody can't look into {self.stage.folder}"
            if (reason := self._choose_program()) is not None:
                return reason
        except (ContenderError, OSError, KeyError) as error:
            return str(error)
        return super().why_not()

    def _enter(self) -> None:
        devices = self.stage.new_path("dev")
        devices.mkdir()
        script = (
            'mount -t tmpfs -o mode=755 none "$0" && mknod -m 666 "$0/fuse" c 10 229 '
            '&& mount --bind "$0/fuse" /dev/fuse && echo made && exec sleep infinity'
        )
        command: list[str | Path] = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, devices]
        process = self._stack.enter_context(shell.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "made\n":
            raise ContenderError(f"no namespace with a /dev/fuse for everybody: {process.stderr.read().strip()}")
        self._namespace = process
        user = pwd.getpwnam("nobody")
        self._ids = (user.pw_uid, user.pw_gid)
        self.prefix = [
            *("nsenter", f"--mount=/proc/{process.pid}/ns/mnt", "--", "setpriv"),
            *(f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"),
            *("env", "-u", "XDG_RUNTIME_DIR", f"HOME={self.stage.folder}"),
        ]

    def _choose_program(self) -> str | None:
        """The .venv as it is, or a copy where the user can't look into its folder."""
        if self._can(*self.program, "--version"):
            return None
        copy = self.stage.new_path("python")
        ignore = shutil.ignore_patterns("__pycache__", "mypy*", "pip*", "ruff*", "hypothesis*")
        shutil.copytree(sysconfig.get_path("purelib"), copy, ignore=ignore)
        shutil.copytree(Path(iscsifuse.__file__).parent, copy / "iscsifuse", dirs_exist_ok=True)
        interpreter = os.path.realpath(sys.executable)
        copied = ["env", f"PYTHONPATH={copy}", "PYTHONDONTWRITEBYTECODE=1", interpreter, *_CLI]
        if not self._can(*copied, "--version"):
            return "the user nobody can run neither .venv nor a copy of its packages"
        self.program = copied
        return None

    def _can(self, *command: str | Path) -> bool:
        """Whether the user can run a command."""
        try:
            shell.run([*self.prefix, *command], timeout=20)
        except ContenderError:
            return False
        return True

    def give(self, point: Path) -> None:
        os.chown(point, *self._ids)

    def remove(self, point: Path, pid: int | None) -> None:
        # The mount is in the namespace, and ends with it at the latest.
        assert self._namespace is not None
        enter = self.prefix[: self.prefix.index("setpriv")]
        listed = Path(f"/proc/{self._namespace.pid}/mounts")
        if listed.exists() and f" {point} " in listed.read_text():
            shell.run([*enter, "umount", "-l", point], timeout=20, statuses=range(256))
        super().remove(point, pid)

    def close(self) -> None:
        self._stack.close()
