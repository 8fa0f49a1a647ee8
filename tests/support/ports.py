"""TCP ports on 127.0.0.1 for servers that a test starts."""

import socket
import time
from collections.abc import Callable

HOST = "127.0.0.1"
_handed_out: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, and that this process wasn't given before.

    Between this call and the server's bind(2) another process may take it; servers say so and are given another.
    """
    while True:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port: int = probe.getsockname()[1]
        if port not in _handed_out:
            _handed_out.add(port)
            return port


def is_listening(port: int) -> bool:
    """Whether somebody accepts connections on ``port`` (asks the kernel, so that no connection is made)."""
    with open("/proc/net/tcp", encoding="ascii") as table:  # noqa: PTH123 - /proc has no use for a Path
        next(table)
        for line in table:
            _, local, _, state, *_ = line.split()
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


def wait_until(condition: Callable[[], bool], *, timeout: float, what: str, step: float = 0.01) -> None:
    """Poll until ``condition()`` holds; TimeoutError with ``what`` in its text when it doesn't in ``timeout`` s."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout:g} s still waiting for {what}")
        time.sleep(step)
