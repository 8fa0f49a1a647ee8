"""``iscsifuse umount``: writes back, logs out, unmounts, and returns once the daemon is gone."""

import argparse

__all__ = ["DESCRIPTION", "HELP", "configure", "run"]

HELP = "write back, log out, and unmount"
DESCRIPTION = (
    "Unmounts, and returns only when everything is written back, the sessions are logged out and the daemon is gone."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Gives the parser its arguments."""
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="where it is mounted")


def run(namespace: argparse.Namespace) -> int:
    """Carries it out; returns the exit status, one of mount(8)'s."""
    from iscsifuse.mount.client import umount

    return umount(namespace.mountpoint)
