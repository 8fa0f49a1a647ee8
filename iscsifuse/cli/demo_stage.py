"""What the demonstration needs around it: a folder, a disk image, a target that serves it, and a broom.

Everything that is started or mounted here is ended by :meth:`Stage.clear`, by its own pid and its own path, whatever
happened before.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from iscsifuse.cli.words import say
from iscsifuse.errors import IscsifuseError, MountError

__all__ = ["FILE_SYSTEM_SIZE", "IMAGE_SIZE", "TARGET_NAME", "DemoError", "Stage", "require_fuse"]

MIB = 1 << 20
#: Bytes. What lies behind the file system may be written to without harm.
FILE_SYSTEM_SIZE = 16 * MIB
IMAGE_SIZE = 24 * MIB
FUSE_DEVICE = Path("/dev/fuse")
TARGET_NAME = "iqn.2004-04.com.example:demo"

_FILES = {
    "README.txt": "This file lives on a disk that is behind an iSCSI target.\n",
    "poem.txt": "A block is read, a block is written,\nand what was sent is what was given.\n",
    "notes/numbers.txt": "".join(f"{number}\n" for number in range(1000)),
}
_START_LIMIT = 20.0
_COMMAND_LIMIT = 120.0
_END_LIMIT = 10.0
_SBIN = os.pathsep.join(("/usr/local/sbin", "/usr/sbin", "/sbin"))


class DemoError(IscsifuseError):
    """A step of the demonstration failed, or a comparison did not hold."""


def require_fuse() -> None:
    """Raises MountError, with what to do about it, where nothing can be mounted."""
    if not FUSE_DEVICE.exists():
        raise MountError(
            f"FUSE is not available here: there is no {FUSE_DEVICE} (modprobe fuse; in a container: "
            "--device /dev/fuse --cap-add SYS_ADMIN)"
        )
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise MountError(f"FUSE is not available here: {FUSE_DEVICE} can't be opened by this user")
    if shutil.which("fusermount3") is None and os.geteuid() != 0:
        raise MountError("fusermount3 is missing; it comes with the package fuse3")


class Stage:
    """A folder, and what runs in it.

    Attributes:
        folder: everything is in there.
        image: the backing file of the disk.
        mountpoint: an empty directory.
        portal: ``127.0.0.1:port`` once the target is started.
        target_pid: of the target, or None.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="iscsifuse-demo-"))
        self.image = self.folder / "disk.img"
        self.mountpoint = self.folder / "mnt"
        self.mountpoint.mkdir()
        self.portal = ""
        self._target: subprocess.Popen[bytes] | None = None
        self._environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        self._environment["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), _SBIN))

    @property
    def target_pid(self) -> int | None:
        """Process id of the target, or None."""
        return None if self._target is None else self._target.pid

    def has(self, program: str) -> bool:
        """Whether a program is installed."""
        return shutil.which(program, path=self._environment["PATH"]) is not None

    def make_image(self) -> bool:
        """Makes the disk: an ext4 file system, with space behind it.

        Returns:
            True; False where there is no mke2fs, and the disk got a pattern instead.
        """
        with self.image.open("wb") as file:
            file.truncate(FILE_SYSTEM_SIZE)
        made = self.has("mke2fs")
        if made:
            content = self.folder / "content"
            for name, text in _FILES.items():
                path = content / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            self.run(["mke2fs", "-q", "-F", "-t", "ext4", "-L", "demo", "-d", str(content), str(self.image)])
        else:
            with self.image.open("wb") as file:
                for block in range(FILE_SYSTEM_SIZE // 512):
                    file.write(f"block {block}\n".encode().ljust(512, b"."))
        with self.image.open("r+b") as file:
            file.truncate(IMAGE_SIZE)
        return made

    def start_target(self) -> None:
        """Serves the image; returns once the target listens, and its portal is known."""
        command = [sys.executable, "-m", "iscsifuse.testing", "--target", TARGET_NAME, str(self.image)]
        said = self.folder / "target.out"
        with said.open("wb") as out, (self.folder / "target.err").open("wb") as err:
            # A session of its own: Ctrl-C is for the demonstration, which then ends the target last.
            self._target = subprocess.Popen(  # noqa: S603 - this program's own
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        deadline = time.monotonic() + _START_LIMIT
        while True:
            line, newline, _ = said.read_text().partition("\n")
            if newline and line.startswith("listening on "):
                self.portal = line.removeprefix("listening on ")
                return
            if self._target.poll() is not None or time.monotonic() > deadline:
                words = (self.folder / "target.err").read_text().strip()
                raise DemoError(f"the loopback target does not start: {words or 'it says nothing'}")
            time.sleep(0.02)

    def iscsifuse(self, *arguments: str, shown: bool = True) -> str:
        """Runs this program as a user would; prints the command and what it said; returns its standard output."""
        command = [sys.executable, "-m", "iscsifuse.cli", *arguments]
        return self.run(command, title=("iscsifuse", *arguments) if shown else None)

    def shell(self, line: str) -> str:
        """Runs a line of a shell in the folder; prints it and what it said; returns its standard output."""
        return self.run(["/bin/sh", "-c", line], title=(line,))

    def run(self, command: Sequence[str], *, title: Sequence[str] | None = None) -> str:
        """Runs a command in the folder, and returns its standard output.

        Args:
            command: program and arguments.
            title: what to print it as; None: neither the command nor what it says is printed.

        Raises:
            DemoError: it failed, or took too long.
        """
        name = " ".join(title or command)
        if title is not None:
            say(f"$ {name}")
            sys.stdout.flush()
        try:
            process = subprocess.Popen(  # noqa: S603 - commands of our own
                command,
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if title is not None else subprocess.PIPE,
            )
        except FileNotFoundError:
            raise DemoError(f"{command[0]} is missing") from None
        try:
            out, err = process.communicate(timeout=_COMMAND_LIMIT)
        except subprocess.TimeoutExpired:
            raise DemoError(f"this took longer than {_COMMAND_LIMIT:g} seconds: {name}") from None
        finally:
            # Asked to end first: a mount that is being made then takes itself back.
            _end(process)
        output = out.decode(errors="backslashreplace")
        if title is not None and output:
            say(output.rstrip("\n"))
        if process.returncode != 0:
            said = (err or b"").decode(errors="backslashreplace").strip()
            raise DemoError(f"this failed with status {process.returncode}: {name}" + (f": {said}" if said else ""))
        return output

    def clear(self) -> None:
        """Unmounts, ends the target, removes the folder. Doesn't fail."""
        if os.path.ismount(self.mountpoint):
            with contextlib.suppress(DemoError):
                self.iscsifuse("umount", str(self.mountpoint), shown=False)
        if os.path.ismount(self.mountpoint):
            with contextlib.suppress(DemoError):
                self.run(["fusermount3", "-u", "-z", str(self.mountpoint)])
        self.end_target()
        if not os.path.ismount(self.mountpoint):
            shutil.rmtree(self.folder, ignore_errors=True)

    def end_target(self) -> None:
        """Ends the target, if it runs."""
        target, self._target = self._target, None
        if target is not None:
            _end(target)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
