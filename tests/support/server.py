"""What a real target's process is to a test, whichever program it runs."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import ClassVar, Self

from support.ports import HOST, free_port
from support.process import ServerProcess

__all__ = ["TargetServer"]


class TargetServer(ABC):
    """A target on 127.0.0.1. Use it as a context manager, or call `start` and `stop`."""

    PROGRAM: ClassVar[str]
    ERROR: ClassVar[type[Exception]]

    def __init__(self) -> None:
        self.port = free_port()
        self._process: ServerProcess | None = None
        self._was_started = False  # from then on others rely on the port

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def portal(self) -> str:
        """``127.0.0.1:port``."""
        return f"{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        return self._running().pid

    def url(self, target: str | None = None, lun: int | None = None, *, query: str = "") -> str:
        """The URL of the portal, of a target, or of a LUN."""
        path = "/".join(str(part) for part in (target, lun) if part is not None)
        return f"iscsi://{self.portal}/{path}" + (f"?{query}" if query else "")

    @abstractmethod
    def start(self) -> None:
        """Start it, and return once it listens and is configured as before."""

    @abstractmethod
    def stop(self) -> None:
        """End it, in good order if that works. Nothing happens when it isn't running."""

    def kill(self) -> None:
        """SIGKILL: connections are reset by the kernel, nothing is said good-bye to."""
        self._running().kill()
        self._process = None

    def restart(self) -> None:
        """Kill it if it runs, and start it again: same port, same targets, no session."""
        if self._process is not None:
            self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nothing is answered any more."""
        self._running().pause()

    def cont(self) -> None:
        """SIGCONT: go on where `pause` left it."""
        self._running().cont()

    def _running(self) -> ServerProcess:
        if self._process is None:
            raise self.ERROR(f"{self.PROGRAM} isn't running")
        return self._process
