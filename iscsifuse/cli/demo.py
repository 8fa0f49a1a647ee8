"""``iscsifuse demo``: the whole thing on one machine, with real processes, as a user would do it.

A small disk is served by the built-in target, mounted, read, written and unmounted. Each command is printed with what
it really said. The exit status is 0 only if every comparison held: what was read is what the target has, what was
written is what the target got, and nothing else changed.
"""

import argparse
import hashlib
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from iscsifuse.cli.demo_stage import Stage

__all__ = ["DESCRIPTION", "HELP", "configure", "run"]

HELP = "show it all on this machine"
DESCRIPTION = (
    "Serves a small disk from the built-in target, mounts it, reads and writes it, and shows what happens. "
    "Touches nothing outside of a temporary folder."
)

#: Bytes: neither a block's start nor a block's length.
_WRITE_OFFSET = 17 * (1 << 20) + 12345
_WRITE_LENGTH = 100_001


def configure(parser: argparse.ArgumentParser) -> None:
    """Gives the parser its arguments."""
    parser.add_argument("--keep", action="store_true", help="leave it mounted, and say how to end it")


def run(namespace: argparse.Namespace) -> int:
    """Carries it out; returns the exit status."""
    from iscsifuse.cli.demo_stage import Stage, require_fuse
    from iscsifuse.cli.words import say

    require_fuse()
    with _terminated():
        stage = Stage()
        kept = False
        try:
            _play(stage)
            if namespace.keep:
                kept = True
                say(f"# It is left mounted on {stage.mountpoint}. To end it:")
                say(f"$ iscsifuse umount {stage.mountpoint} && kill {stage.target_pid} && rm -r {stage.folder}")
            else:
                _unmount(stage)
                say("# Everything that was compared was equal.")
        finally:
            if not kept:
                with _deaf():
                    stage.clear()
    return 0


def _play(stage: "Stage") -> None:
    """Everything up to the moment before unmounting."""
    from iscsifuse.cli.demo_stage import FILE_SYSTEM_SIZE, IMAGE_SIZE, TARGET_NAME
    from iscsifuse.cli.words import say, size

    say(f"# A disk of {size(IMAGE_SIZE)}, served by the built-in target:")
    has_files = stage.make_image()
    if not has_files:
        say("# (mke2fs is missing, so there is a pattern on it, and no file system)")
    before = stage.image.read_bytes()
    stage.start_target()
    url = f"iscsi://{stage.portal}/{TARGET_NAME}"
    disk = stage.mountpoint / "lun-0"

    found = stage.iscsifuse("discover", stage.portal)
    _compare("the discovered target", found.strip(), f"{stage.portal},1 {TARGET_NAME}")
    stage.iscsifuse("ls", f"iscsi://{stage.portal}/")

    say("\n# Mounted, the disk is a file:")
    stage.iscsifuse("mount", "--rw", url, str(stage.mountpoint))
    stage.shell(f"ls -l {stage.mountpoint}")
    _compare("the size of the file", disk.stat().st_size, IMAGE_SIZE)
    if has_files and stage.has("debugfs"):
        # Its first line on standard error is a greeting.
        stage.shell(f"debugfs -R 'cat README.txt' {disk} 2>&1")

    say("\n# What is read is what the target has:")
    read = stage.shell(f"dd if={disk} bs=1M status=none | sha256sum")
    _compare("the checksum of what was read", read.split()[0], hashlib.sha256(before).hexdigest())
    have = stage.shell(f"sha256sum {stage.image.name}")
    _compare("the checksum of the backing file", have.split()[0], read.split()[0])

    say(f"\n# What is written behind the file system ({_WRITE_LENGTH} bytes at {_WRITE_OFFSET}) reaches the target:")
    news = random.Random(1).randbytes(_WRITE_LENGTH)  # noqa: S311 - a pattern, no secret
    (stage.folder / "news").write_bytes(news)
    stage.shell(f"dd if=news of={disk} bs=64K oflag=seek_bytes seek={_WRITE_OFFSET} conv=notrunc,fsync status=none")
    stage.shell(
        f"cmp --ignore-initial=0:{_WRITE_OFFSET} --bytes={_WRITE_LENGTH} news {stage.image.name} && echo equal"
    )
    assert _WRITE_OFFSET >= FILE_SYSTEM_SIZE  # noqa: S101 - two constants that belong together
    after = before[:_WRITE_OFFSET] + news + before[_WRITE_OFFSET + _WRITE_LENGTH :]
    _compare("the backing file, with nothing else changed", _digest(stage.image.read_bytes()), _digest(after))

    say("\n# What the mount tells of itself:")
    stage.iscsifuse("status", str(stage.mountpoint))
    say("")


def _unmount(stage: "Stage") -> None:
    import os

    stage.iscsifuse("umount", str(stage.mountpoint))
    _compare("whether it is still mounted", os.path.ismount(stage.mountpoint), False)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _compare(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        from iscsifuse.cli.demo_stage import DemoError

        raise DemoError(f"{what} is {found!r}, and should be {wanted!r}")


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demonstration as Ctrl-C does: with everything cleared away."""

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deaf() -> Iterator[None]:
    """A second Ctrl-C doesn't stop the clearing away, which is bounded in time."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
