"""Debian's istgt as a second target, written by other people than tgt's (package ``istgt``).

istgt reads its configuration once, at its start: declare targets first (`add_target`), then `start`. It tells more
than tgt about what an initiator does wrong: `said` is its log. A target's LUNs share vendor, product and block size.
"""

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from support.ports import HOST, free_port, is_listening, wait_until
from support.process import ServerProcess
from support.server import TargetServer

__all__ = ["IstgtError", "IstgtServer"]

_GLOBAL = {
    "Timeout": "30",
    "NopInInterval": "20",
    "DiscoveryAuthMethod": "None",
    "MaxSessions": "16",
    "MaxConnections": "4",
    "MaxR2T": "32",
    "MaxOutstandingR2T": "16",
    "DefaultTime2Wait": "2",
    "DefaultTime2Retain": "60",
    "FirstBurstLength": "262144",
    "MaxBurstLength": "1048576",
    "MaxRecvDataSegmentLength": "262144",
    "InitialR2T": "Yes",
    "ImmediateData": "Yes",
    "DataPDUInOrder": "Yes",
    "DataSequenceInOrder": "Yes",
    "ErrorRecoveryLevel": "0",
}


class IstgtError(Exception):
    """istgt failed; the text is its log."""


@dataclass(frozen=True, slots=True)
class _Target:
    name: str
    lines: list[str] = field(default_factory=list)
    account: str | None = None


class IstgtServer(TargetServer):
    """An istgt on 127.0.0.1. Use it as a context manager once its targets are declared."""

    PROGRAM = "istgt"
    ERROR = IstgtError

    def __init__(self, folder: Path, *, params: Mapping[str, str] | None = None) -> None:
        """Prepare a server that keeps its files in ``folder``; ``params`` replace or add to its Global section."""
        super().__init__()
        self.folder = folder
        self.log = folder / "istgt.log"
        self._params = {**_GLOBAL, **(params or {})}
        self._targets: list[_Target] = []

    def add_target(
        self,
        name: str,
        luns: Mapping[int, Path],
        *,
        block_size: Literal[512, 1024, 2048, 4096] = 512,
        readonly: bool = False,
        chap: tuple[str, str] | None = None,
        mutual: tuple[str, str] | None = None,
        digest: Literal["Auto", "Header", "Data", "Header Data"] = "Auto",
        vendor: str = "ISTGT",
        product: str = "iSCSI Disk",
        serial: str | None = None,
        queue_depth: int = 32,
        params: Mapping[str, str] | None = None,
    ) -> None:
        """Declare a target, before `start`.

        Args:
            name: its iqn.
            luns: backing files by LUN (0 to 15); their sizes are multiples of ``block_size`` bytes.
            block_size: bytes per block.
            readonly: write-protected.
            chap: user and secret that an initiator has to know.
            mutual: user and secret by which the target proves itself; needs ``chap``.
            digest: the digests that istgt insists on; Auto leaves them to the initiator.
            vendor: INQUIRY's vendor, at most 8 characters.
            product: INQUIRY's product, at most 16 characters.
            serial: serial number of LUN 0, at most 16 characters; that of others ends in ``L<n>``.
            queue_depth: commands in flight; 0 turns queuing off.
            params: further lines of the LogicalUnit section.
        """
        if self._process is not None:
            raise IstgtError("targets have to be declared before istgt is started")
        number = len(self._targets) + 1
        serial = serial or f"{10000000 + number}"
        lines = [
            f"TargetName {name}",
            "Mapping PortalGroup1 InitiatorGroup1",
            f"UseDigest {digest}",
            "UnitType Disk",
            f"ReadOnly {'Yes' if readonly else 'No'}",
            f"BlockLength {block_size}",
            f"QueueDepth {queue_depth}",
            f'UnitInquiry "{vendor}" "{product}" "0001" "{serial}"',
            *(f"{key} {value}" for key, value in (params or {}).items()),
            *(f'LUN{lun} Storage "{path.resolve()}" Auto' for lun, path in sorted(luns.items())),
        ]
        if chap is None:
            lines.append("AuthMethod None")
            account = None
        else:
            lines += [f"AuthMethod CHAP{' Mutual' if mutual else ''}", f"AuthGroup AuthGroup{number}"]
            account = " ".join(f'"{word}"' for word in (*chap, *(mutual or ())))
        self._targets.append(_Target(name, lines, account))

    def set_params(self, params: Mapping[str, str]) -> None:
        """Replace or add to the Global section; it counts from the next `start` or `restart` on."""
        self._params.update(params)

    def start(self) -> None:
        """Start istgt, and return once it listens."""
        for attempt in range(5):
            if attempt and not self._was_started:
                self.port = free_port()
            if self._launch():
                return
        raise IstgtError(f"istgt doesn't start:\n{self.said()}")

    def _launch(self) -> bool:
        self._write_configuration()
        self.log.unlink(missing_ok=True)
        process = ServerProcess(
            ["istgt", "-D", "-c", str(self.folder / "istgt.conf")], folder=self.folder, log=self.log
        )
        try:
            wait_until(lambda: not process.is_running or is_listening(self.port), timeout=10, what="istgt to listen")
        except TimeoutError:
            process.kill()
            raise
        if not process.is_running:
            return False
        self._process = process
        self._was_started = True
        return True

    def _write_configuration(self) -> None:
        accounts = self.folder / "auth.conf"
        accounts.touch(mode=0o600)
        accounts.write_text(
            "".join(
                f"[AuthGroup{number}]\n  Auth {target.account}\n"
                for number, target in enumerate(self._targets, 1)
                if target.account
            )
        )
        files = {
            "NodeBase": '"iqn.2004-04.com.example"',
            "PidFile": f'"{self.folder / "istgt.pid"}"',
            "AuthFile": f'"{accounts}"',
            "MediaDirectory": f'"{self.folder}"',
            "LogFacility": '"local7"',
        }
        sections = {
            "Global": [f"{key} {value}" for key, value in {**files, **self._params}.items()],
            # Without this section istgt doesn't start; nobody uses it here.
            "UnitControl": ["AuthMethod None", f"Portal UC1 {HOST}:{free_port()}", f"Netmask {HOST}"],
            "PortalGroup1": [f"Portal DA1 {self.portal}"],
            "InitiatorGroup1": ['InitiatorName "ALL"', "Netmask ALL"],
        }
        for number, target in enumerate(self._targets, 1):
            sections[f"LogicalUnit{number}"] = target.lines
        text = "".join(f"[{title}]\n" + "".join(f"  {line}\n" for line in lines) for title, lines in sections.items())
        (self.folder / "istgt.conf").write_text(text)

    def said(self) -> str:
        """istgt's log: logins, logouts, and what it disliked."""
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        """End istgt. It may take its time over SIGTERM (its workers poll), and is then killed."""
        process, self._process = self._process, None
        if process is None:
            return
        process.cont()
        process.signal(signal.SIGTERM)
        process.wait(timeout=0.3)
        process.kill()
