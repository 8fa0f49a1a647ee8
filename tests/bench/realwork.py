"""What people do with such files: make a file system, look into one, copy, check, compute a sum."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

from bench import shell
from bench.contender import SPARE, Contender, FileContender, Opened
from bench.contents import require_same
from bench.shell import ContenderError, WrongBytesError
from bench.work import SECONDS, Metric, Work
from support.disks import sha256
from support.ports import wait_until

__all__ = ["Convert", "FsCheck", "LoopExt4", "Sha256", "SleuthKit"]


class LoopExt4(Work):
    """From losetup to losetup: make an ext4 file system, mount it, unpack a tree, sync, unmount, detach."""

    name = "loop-ext4"
    title = "losetup, mkfs.ext4, mount, unpack a source tree, sync, umount, detach"
    metrics = (SECONDS,)

    def prepare(self) -> None:
        assert self.stage.blank.size
        assert self.stage.tarball.exists()

    def measure(self, contender: Contender) -> Mapping[str, float]:
        assert isinstance(contender, FileContender)
        disk = self.stage.blank
        shell.run(["fallocate", "--punch-hole", "--length", str(disk.size), disk.backing], timeout=self.patience)
        inside = self.stage.new_point("inside")
        inside.mkdir()
        try:
            with contender.open([disk]) as opened, contextlib.ExitStack() as stack:
                opened.forget(
                    room=3 * self.stage.tarball.stat().st_size + SPARE
                )  # two file systems, and a page cache
                seconds = self._unpack(opened, inside, stack)
            self._compare(disk.backing, inside)
            self.was_checked = True
        finally:
            with contextlib.suppress(OSError):  # It shall not take the place of what is under way.
                inside.rmdir()
        return {"time": seconds}

    def _unpack(self, opened: Opened, inside: Path, stack: contextlib.ExitStack) -> float:
        def do(*words: str | Path) -> str:
            return shell.run(words, timeout=self.patience).out.strip()

        # Beforehand, for a command that is interrupted may have done its work: a file system that stayed mounted
        # would write to the disk when the next contender has it. Both do no harm when all went well.
        stack.callback(_detach, opened.path)
        stack.callback(shell.run, ["umount", "-l", inside], timeout=20, statuses=range(256))
        began = time.perf_counter()
        device = do("losetup", "--find", "--show", opened.path)
        do("mkfs.ext4", "-q", "-F", device)
        do("mount", "-t", "ext4", device, inside)
        do("tar", "--extract", f"--file={self.stage.tarball}", f"--directory={inside}")
        do("sync", "--file-system", inside)
        do("umount", inside)
        do("losetup", "--detach", device)
        attached = Path("/sys/block", Path(device).name, "loop")  # udev may have it open for another moment
        try:
            wait_until(lambda: not attached.exists(), timeout=20, what=f"{device} to be free", step=0.002)
        except TimeoutError as error:
            raise ContenderError(str(error)) from error
        seconds = time.perf_counter() - began
        stack.pop_all()  # nothing is left to undo, and the device may be somebody else's already
        return seconds

    def _compare(self, backing: Path, inside: Path) -> None:
        try:
            shell.run(["e2fsck", "-fn", backing], timeout=self.patience)
            shell.run(["mount", "-o", "loop,ro", backing, inside], timeout=self.patience)
            try:
                shell.run(
                    ["tar", "--compare", f"--file={self.stage.tarball}", f"--directory={inside}"],
                    timeout=self.patience,
                )
            finally:
                shell.run(["umount", inside], timeout=self.patience)
        except ContenderError as error:
            raise WrongBytesError(f"the file system isn't right afterwards: {error}") from error


def _detach(path: Path) -> None:
    """Detach whatever loop device stands on a file."""
    listed = shell.run(["losetup", "--noheadings", "--output", "NAME", "--associated", path], timeout=20)
    for device in listed.out.split():
        shell.run(["losetup", "--detach", device], timeout=20, statuses=range(256))


class SleuthKit(Work):
    """The list of all files of a file system, and then the content of many of them, by fls and icat."""

    name = "sleuthkit"
    title = "Sleuth Kit: fls -r -m /, then icat of many files"
    metrics = (SECONDS, Metric("fls", "s", higher_is_better=False), Metric("icat", "s", higher_is_better=False))

    def prepare(self) -> None:
        backing = self.stage.evidence.backing
        self._inodes = self.stage.folder / "inodes"
        self._expected = [self.stage.folder / name for name in ("expected-fls", "expected-icat")]
        shell.run(["fls", "-r", "-m", "/", backing], output=self._expected[0], timeout=self.patience)
        lines = [line.split("|") for line in self._expected[0].read_text().splitlines()]
        files = [fields[2] for fields in lines if fields[3].startswith("r/r")]
        step = max(1, len(files) // self.stage.sizes.icat)
        self._inodes.write_text("\n".join(files[::step][: self.stage.sizes.icat]) + "\n")
        self._icat(backing, self._expected[1])

    def _icat(self, image: Path, output: Path) -> float:
        command: list[str | Path] = ["xargs", f"--arg-file={self._inodes}", "-n", "1", "icat", image]
        return shell.run(command, output=output, timeout=self.patience).seconds

    def measure(self, contender: Contender) -> Mapping[str, float]:
        assert isinstance(contender, FileContender)
        listed, content = self.stage.new_path("fls"), self.stage.new_path("icat")
        try:
            with contender.open([self.stage.evidence], read_only=True) as opened:
                opened.forget()
                ran = shell.run(["fls", "-r", "-m", "/", opened.path], output=listed, timeout=self.patience)
                icat = self._icat(opened.path, content)
            for got, expected in zip((listed, content), self._expected, strict=True):
                _require_equal(got.read_bytes(), expected.read_bytes(), got.name)
            self.was_checked = True
        finally:
            listed.unlink(missing_ok=True)
            content.unlink(missing_ok=True)
        return {"time": ran.seconds + icat, "fls": ran.seconds, "icat": icat}


class Convert(Work):
    """``qemu-img convert`` of the whole disk into a file."""

    name = "convert"
    title = "qemu-img convert to a raw file on tmpfs"
    metrics = (SECONDS,)

    def prepare(self) -> None:
        assert self.stage.data.size

    def measure(self, contender: Contender) -> Mapping[str, float]:
        assert isinstance(contender, FileContender)
        disk = self.stage.data
        copy = self.stage.new_path("converted")
        try:
            with contender.open([disk], read_only=True) as opened:
                opened.forget(room=2 * disk.size + SPARE)
                command: list[str | Path] = ["qemu-img", "convert", "-f", "raw", "-O", "raw", opened.path, copy]
                seconds = shell.run(command, timeout=self.patience).seconds
            require_same(copy, disk.backing, disk.size, "qemu-img convert")
            self.was_checked = True
        finally:
            copy.unlink(missing_ok=True)
        return {"time": seconds}


class FsCheck(Work):
    """``e2fsck -fn`` of a file system with many files."""

    name = "e2fsck"
    title = "e2fsck -fn of a file system with many files"
    metrics = (SECONDS,)

    def prepare(self) -> None:
        self._expected = self._check(self.stage.evidence.backing)[1]

    def _check(self, image: Path) -> tuple[float, bytes]:
        ran = shell.run(["e2fsck", "-fn", image], timeout=self.patience)
        return ran.seconds, ran.out.replace(str(image), "").encode()

    def measure(self, contender: Contender) -> Mapping[str, float]:
        assert isinstance(contender, FileContender)
        with contender.open([self.stage.evidence], read_only=True) as opened:
            opened.forget()
            seconds, said = self._check(opened.path)
        _require_equal(said, self._expected, "what e2fsck said")
        self.was_checked = True
        return {"time": seconds}


class Sha256(Work):
    """``sha256sum`` of the whole disk."""

    name = "sha256"
    title = "sha256sum of the whole disk"
    metrics = (SECONDS,)

    def prepare(self) -> None:
        self._expected = sha256(self.stage.data.backing)

    def measure(self, contender: Contender) -> Mapping[str, float]:
        assert isinstance(contender, FileContender)
        with contender.open([self.stage.data], read_only=True) as opened:
            opened.forget()
            ran = shell.run(["sha256sum", opened.path], timeout=self.patience)
        _require_equal(ran.out.split()[0].encode(), self._expected.encode(), "sha256sum")
        self.was_checked = True
        return {"time": ran.seconds}


def _require_equal(got: bytes, expected: bytes, what: str) -> None:
    if got != expected:
        raise WrongBytesError(f"{what}: not the same as from the backing file")
