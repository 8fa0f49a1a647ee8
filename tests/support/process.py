"""A server in a process of its own: started in the foreground, watched, stopped by its pid."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.ports import wait_until


def sbin_path() -> str:
    """PATH with the folders that Debian leaves out for users, where tgtd, mkntfs and losetup live."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie doesn't, and is its parent's business."""
    try:
        return _state(Path(f"/proc/{pid}")) not in "ZX"
    except OSError:
        return False


def _state(process: Path) -> str:
    """The letter that ps shows for a process or a thread, given its folder in /proc."""
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


class ServerProcess:
    """One daemon that stays in the foreground, in its own process group, with all that it says in a file."""

    def __init__(
        self, command: Sequence[str], *, folder: Path, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "PATH": sbin_path(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def said(self) -> str:
        """Everything that the server wrote so far."""
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group; nothing happens when it is gone already."""
        if self.is_running:
            os.killpg(self.pid, number)

    def pause(self) -> None:
        """SIGSTOP, and return once every thread stands still."""
        self.signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        wait_until(lambda: {_state(task) for task in tasks.iterdir()} == {"T"}, timeout=5, what="the process to stop")

    def cont(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def wait(self, *, timeout: float) -> bool:
        """Whether the server ended within ``timeout`` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it at once (SIGKILL works on a stopped process, too)."""
        self.signal(signal.SIGKILL)
        self._process.wait()
