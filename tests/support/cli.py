"""The installed ``iscsifuse`` command, as a user runs it: in a process of its own."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.ports import wait_until
from support.process import is_alive, sbin_path

__all__ = ["Mounted", "is_mounted", "program", "run_cli"]


def program(name: str) -> str:
    """The path of one of iscsifuse's console scripts, beside the Python that runs the tests."""
    return str(Path(sys.executable).parent / name)


def run_cli(
    *arguments: str | Path,
    input: str | None = None,  # noqa: A002 - as subprocess.run calls it
    env: Mapping[str, str | None] | None = None,
    timeout: float = 60,
    name: str = "iscsifuse",
) -> subprocess.CompletedProcess[str]:
    """Run ``iscsifuse ARGUMENTS`` to its end; never raises for an exit code.

    Args:
        arguments: its command line.
        input: what it reads from its standard input, which is no terminal.
        env: variables to set, or to remove (None), beside those of the test.
        timeout: seconds after which subprocess.TimeoutExpired is raised.
        name: the console script.

    A daemon that goes to the background must let go of the pipes, or this waits for its end: that is on purpose.
    """
    return subprocess.run(
        [program(name), *map(str, arguments)],
        input=input or "",
        env=_environment(env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _environment(changes: Mapping[str, str | None] | None) -> dict[str, str]:
    merged: dict[str, str | None] = {**os.environ, "PATH": sbin_path(), **(changes or {})}
    return {name: value for name, value in merged.items() if value is not None}


def is_mounted(path: Path) -> bool:
    """Whether something is mounted right there. Doesn't touch the path: a dead mount would answer with an error."""
    wanted = os.path.realpath(path.parent) + "/" + path.name
    with open("/proc/self/mounts", encoding="utf-8") as table:  # noqa: PTH123 - /proc has no use for a Path
        return any(line.split()[1].encode().decode("unicode_escape") == wanted for line in table)


class Mounted:
    """``iscsifuse mount URL POINT OPTIONS`` from ``with`` to ``iscsifuse umount``.

    A mount or umount that fails is an AssertionError with all that was said; what is left is then removed by force.

    Attributes:
        point: the mount point.
        pid: of the daemon, or None for a mount that has no status file (a LUN on a regular file).
    """

    def __init__(
        self,
        url: str,
        point: Path,
        *options: str,
        env: Mapping[str, str | None] | None = None,
        timeout: float = 60,
    ) -> None:
        """Prepare a mount; ``point`` is made (a folder) if it isn't there. ``timeout`` holds for mount and umount."""
        self.point = point
        self.pid: int | None = None
        self._command: tuple[str | Path, ...] = ("mount", url, point, *options)
        self._env = env
        self._timeout = timeout

    def __enter__(self) -> Self:
        if not self.point.exists():
            self.point.mkdir(parents=True)
        try:
            done = run_cli(*self._command, env=self._env, timeout=self._timeout)
            if done.returncode:
                raise AssertionError(f"mount failed with {done.returncode}: {done.stdout}{done.stderr}")
            if not is_mounted(self.point):
                raise AssertionError(f"mount said it succeeded, and nothing is mounted: {done.stdout}{done.stderr}")
            if self.point.is_dir():
                self.pid = self.status_file()["pid"]
        except BaseException:
            self.remove_by_force()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not is_mounted(self.point):
            return
        try:
            self.unmount()
        except (AssertionError, subprocess.TimeoutExpired) as failure:
            self.remove_by_force()
            if value is None:
                raise
            value.add_note(f"and umount failed, too: {failure}")

    def unmount(self, *, lossy: int | None = None) -> subprocess.CompletedProcess[str]:
        """``iscsifuse umount``, which has to succeed and to leave neither mount nor daemon.

        It may tell of writes that failed, if they are of the LUN ``lossy``.
        """
        done = run_cli("umount", self.point, env=self._env, timeout=self._timeout)
        told = lossy is not None and done.returncode == 32 and "but data is lost" in done.stderr
        if done.returncode and not (told and set(re.findall(r"\bLUN (\d+)", done.stderr)) == {str(lossy)}):
            raise AssertionError(f"umount failed with {done.returncode}: {done.stdout}{done.stderr}")
        if is_mounted(self.point):
            raise AssertionError("umount said it succeeded, and the mount is still there")
        if self.pid is not None and is_alive(self.pid):
            raise AssertionError("umount came back before the daemon was gone")
        return done

    def lun(self, number: int, *, target: str | None = None) -> Path:
        """The file of a LUN: in the mount point, or in its target's folder where a whole portal is mounted."""
        return (self.point if target is None else self.point / target) / f"lun-{number}"

    def status_file(self) -> dict[str, Any]:
        """What ``.iscsifuse/status.json`` says; the mount point has to be a folder."""
        with (self.point / ".iscsifuse" / "status.json").open() as file:
            status: dict[str, Any] = json.load(file)
        return status

    def remove_by_force(self) -> None:
        """Take the mount away, and kill the daemon. Doesn't fail where nothing is left."""
        if is_mounted(self.point):
            for command in (("fusermount3", "-u", "-z"), ("umount", "-l")):
                subprocess.run([*command, str(self.point)], capture_output=True, check=False)
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: not is_alive(pid), timeout=5, what="the daemon to die")
