"""``python -m iscsifuse.testing [options] IMAGE...``: serve image files over iSCSI on this machine.

Prints one line, ``listening on 127.0.0.1:PORT``, when it is ready, and ends on SIGTERM or SIGINT with everything on
stable storage. Everything else goes to stderr.
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import trio

from iscsifuse.testing.config import DEFAULT_TARGET_NAME, TargetConfig, TargetNode
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.target import LoopbackTarget

__all__ = ["main"]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m iscsifuse.testing", description="Serve image files over iSCSI.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="TCP port, 0 for a free one (default)")
    parser.add_argument("--target", default=DEFAULT_TARGET_NAME, metavar="IQN", help="default: %(default)s")
    parser.add_argument("--read-only", action="store_true", help="refuse every write")
    parser.add_argument("--block-length", type=int, default=512, metavar="BYTES", help="default: %(default)s")
    parser.add_argument("--first-lun", type=int, default=0, metavar="N", help="LUN of the first image (default: 0)")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    return parser.parse_args(arguments)


async def _serve(config: TargetConfig) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with LoopbackTarget(config).serve() as target:
            sys.stdout.write(f"listening on {target.portal}\n")
            sys.stdout.flush()
            async for _ in signals:
                break


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal comes.

    Returns:
        The exit code: 0, or 1 where an image can't be opened or the port can't be listened on.
    """
    options = _parse(arguments)
    disks: list[Disk] = []
    failures: list[str] = []
    try:
        for number, image in enumerate(options.images, options.first_lun):
            disk = Disk.from_file(image, block_length=options.block_length, lun=number, read_only=options.read_only)
            disks.append(disk)
        config = TargetConfig(
            nodes=[TargetNode(name=options.target, disks=disks)],
            hosts=(options.host,),
            port=options.port,
            record=False,
        )
        trio.run(_serve, config)
    except* OSError as group:
        failures = [str(error) for error in _leaves(group)]
    finally:
        for disk in disks:
            disk.close()
    for failure in failures:
        sys.stderr.write(f"iscsifuse.testing: {failure}\n")
    return 1 if failures else 0


def _leaves(group: BaseExceptionGroup[OSError]) -> Iterator[OSError]:
    """The exceptions themselves, however deep their groups are."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


if __name__ == "__main__":
    sys.exit(main())
