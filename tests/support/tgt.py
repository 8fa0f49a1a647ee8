"""Debian's tgtd as a target to test against (package ``tgt``).

Every server has a management socket of its own (``TGT_IPC_SOCKET``, relative to its folder: the paths of Unix
sockets are short), so that any number of them can run beside each other, beside the system's own, and without root.
tgtd ignores SIGTERM as long as it has targets, and carries on when its port is taken: both are dealt with here.

LUN 0 of each target is tgt's own controller; disks start at LUN 1.
"""

import contextlib
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from support.ports import free_port, is_listening, wait_until
from support.process import ServerProcess, sbin_path
from support.server import TargetServer

__all__ = ["TgtConnection", "TgtError", "TgtServer"]

_IPC = "ipc"  # tgtd appends ".<control port>"


class TgtError(Exception):
    """tgtd or tgtadm failed; the text is theirs."""


@dataclass(frozen=True, slots=True)
class TgtConnection:
    """One initiator's connection, as tgtd sees it."""

    tid: int
    sid: int
    cid: int
    initiator: str
    address: str


class TgtServer(TargetServer):
    """A tgtd on 127.0.0.1. Use it as a context manager, or call `start` and `stop`.

    The configuration survives `restart`: what `add_target` and the like did is done again, in the same order.
    """

    PROGRAM = "tgtd"
    ERROR = TgtError

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        """Prepare a server that keeps its files in ``folder``; ``threads``: I/O threads per LUN."""
        super().__init__()
        self.folder = folder
        self.log = folder / "tgtd.log"
        self._threads = threads
        self._tids: dict[str, int] = {}
        self._accounts: set[str] = set()
        self._journal: list[tuple[str, ...]] = []

    def start(self) -> None:
        """Start tgtd, and return once it listens and is configured as before."""
        for attempt in range(5):
            if attempt and not self._was_started:
                self.port = free_port()
            if self._launch():
                break
        else:
            raise TgtError(f"tgtd found no free port:\n{self.log.read_text()}")
        # Binding comes last, as with tgt-admin: nobody shall log in to a target whose disks are still to come.
        simple = not any("delete" in words for words in self._journal)
        for arguments in sorted(self._journal, key=lambda words: simple and "bind" in words):
            self._tgtadm(*arguments)

    def _launch(self) -> bool:
        for stale in self.folder.glob(f"{_IPC}.*"):
            stale.unlink()
        self.log.unlink(missing_ok=True)
        threads = () if self._threads is None else ("-t", str(self._threads))
        process = ServerProcess(
            ["tgtd", "-f", "-C", "0", *threads, "--iscsi", f"portal={self.portal}"],
            folder=self.folder,
            log=self.log,
            env={"TGT_IPC_SOCKET": _IPC},
        )
        try:
            wait_until(
                lambda: (
                    not process.is_running
                    or "unable to bind server socket" in process.said()
                    or ((self.folder / f"{_IPC}.0").exists() and is_listening(self.port))
                ),
                timeout=10,
                what="tgtd to listen",
            )
        except TimeoutError:
            process.kill()
            raise
        if not process.is_running:
            raise TgtError(f"tgtd ended at once:\n{process.said()}")
        if "unable to bind server socket" in process.said():
            process.kill()
            return False
        self._process = process
        self._was_started = True
        return True

    def stop(self) -> None:
        """End tgtd: in good order where it still answers, else by SIGKILL. Nothing happens when it isn't running."""
        process, self._process = self._process, None
        if process is None:
            return
        process.cont()
        try:
            for tid in self._tids.values():
                self._tgtadm_quietly("--op", "delete", "--mode", "target", "--tid", str(tid), "--force")
            self._tgtadm_quietly("--op", "delete", "--mode", "system")
            process.wait(timeout=2)
        finally:
            process.kill()

    # --- its targets ---

    def add_target(
        self,
        name: str,
        *,
        tid: int | None = None,
        chap: tuple[str, str] | None = None,
        mutual: tuple[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> int:
        """Offer a target to every initiator.

        Args:
            name: its iqn.
            tid: tgt's number for it; the next free one if None.
            chap: user and secret that an initiator has to know.
            mutual: user and secret by which the target proves itself.
            params: iSCSI parameters by name (``InitialR2T``: ``No``), as `set_param` sets them.

        Returns:
            The tid.
        """
        number = tid or max(self._tids.values(), default=0) + 1
        self._do("--op", "new", "--mode", "target", "--tid", str(number), "--targetname", name)
        self._tids[name] = number
        for account, outgoing in ((chap, ()), (mutual, ("--outgoing",))):
            if account is None:
                continue
            user, secret = account
            if user not in self._accounts:
                self._do("--op", "new", "--mode", "account", "--user", user, "--password", secret)
                self._accounts.add(user)
            self._do("--op", "bind", "--mode", "account", "--tid", str(number), "--user", user, *outgoing)
        for key, value in (params or {}).items():
            self.set_param(name, key, value)
        self._do("--op", "bind", "--mode", "target", "--tid", str(number), "--initiator-address", "ALL")
        return number

    def delete_target(self, name: str) -> None:
        """Withdraw a target, whoever uses it."""
        self._do("--op", "delete", "--mode", "target", "--tid", str(self._tids[name]), "--force")
        del self._tids[name]

    def set_param(self, name: str, key: str, value: str) -> None:
        """Set one of a target's iSCSI parameters, for sessions to come."""
        tid = str(self._tids[name])
        self._do("--op", "update", "--mode", "target", "--tid", tid, "--name", key, "--value", value)

    def param(self, name: str, key: str) -> str:
        """One of a target's iSCSI parameters."""
        shown = self._tgtadm("--op", "show", "--mode", "target", "--tid", str(self._tids[name]))
        return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)[key]

    def add_lun(
        self,
        target: str,
        lun: int,
        backing: Path,
        *,
        block_size: int = 512,
        readonly: bool = False,
        vendor: str | None = None,
        product: str | None = None,
        serial: str | None = None,
        thin: bool = False,
        bstype: str = "rdwr",
        bsoflags: str | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        """Add a disk; ``backing`` is a file whose size is a multiple of ``block_size`` bytes.

        Args:
            target: the iqn.
            lun: 1 or more (0 is tgt's controller).
            backing: a regular file, sparse or not.
            block_size: bytes per block.
            readonly: write-protected.
            vendor: INQUIRY's vendor, at most 8 characters.
            product: INQUIRY's product, at most 16 characters.
            serial: serial number (VPD page 80h), at most 32 characters.
            thin: thin provisioning: LBPME, UNMAP, WRITE SAME.
            bstype: tgt's backing store: ``rdwr``, ``aio``, ``null``.
            bsoflags: ``sync`` or ``direct``.
            params: further parameters, as `set_lun_params`.
        """
        address = ("--mode", "logicalunit", "--tid", str(self._tids[target]), "--lun", str(lun))
        flags = () if bsoflags is None else ("--bsoflags", bsoflags)
        store = ("--bstype", bstype, *flags, "--backing-store", str(backing.resolve()))
        self._do("--op", "new", *address, *store, f"--blocksize={block_size}")
        wanted = {
            "vendor_id": vendor,
            "product_id": product,
            "scsi_sn": serial,
            "thin_provisioning": "1" if thin else None,
            "readonly": "1" if readonly else None,
        }
        self.set_lun_params(target, lun, {k: v for k, v in wanted.items() if v is not None} | dict(params or {}))

    def set_lun_params(self, target: str, lun: int, params: Mapping[str, str]) -> None:
        """Set parameters of a LUN: ``readonly``, ``online``, ``removable``, ``sense_format``, ``mode_page`` ..."""
        address = ("--mode", "logicalunit", "--tid", str(self._tids[target]), "--lun", str(lun))
        for key, value in params.items():
            self._do("--op", "update", *address, "--params", f"{key}={value}")

    def offline(self, target: str, lun: int) -> None:
        """Take the medium away: NOT READY, medium not present."""
        self.set_lun_params(target, lun, {"online": "0"})

    def online(self, target: str, lun: int) -> None:
        """Bring the medium back."""
        self.set_lun_params(target, lun, {"online": "1"})

    def delete_lun(self, target: str, lun: int) -> None:
        """Remove a LUN; tgt refuses as long as commands run on it."""
        self._do("--op", "delete", "--mode", "logicalunit", "--tid", str(self._tids[target]), "--lun", str(lun))

    def withdraw_lun(self, target: str, lun: int) -> None:
        """Take a LUN away for a while: `bring_back_lun`, and a restart, have it there again as it was."""
        self._tgtadm("--op", "delete", "--mode", "logicalunit", "--tid", str(self._tids[target]), "--lun", str(lun))

    def bring_back_lun(self, target: str, lun: int) -> None:
        """Undo `withdraw_lun`."""
        address = ("--mode", "logicalunit", "--tid", str(self._tids[target]), "--lun", str(lun))
        for arguments in self._journal:
            if arguments[2:8] == address:
                self._tgtadm(*arguments)

    # --- its sessions ---

    def page_faults(self) -> int:
        """How many pages the kernel has had to give it so far, without any I/O."""
        return int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[7])

    def connections(self) -> list[TgtConnection]:
        """Who is connected, of all targets."""
        found = []
        for tid in self._tids.values():
            shown = self._tgtadm("--op", "show", "--mode", "conn", "--tid", str(tid))
            for session, rest in re.findall(r"^Session: (\d+)\n((?:[ \t]+.*\n?)*)", shown, re.MULTILINE):
                for cid, initiator, address in re.findall(
                    r"Connection: (\d+)\s+Initiator: (\S*).*\n\s+IP Address: (\S*)", rest
                ):
                    found.append(TgtConnection(tid, int(session), int(cid), initiator, address))
        return found

    def close_connection(self, connection: TgtConnection) -> None:
        """Close one connection, as an administrator would."""
        where = ("--tid", str(connection.tid), "--sid", str(connection.sid), "--cid", str(connection.cid))
        self._tgtadm("--op", "delete", "--mode", "conn", *where)

    # --- tgtadm ---

    def _do(self, *arguments: str) -> None:
        self._tgtadm(*arguments)
        self._journal.append(arguments)

    def _tgtadm(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tgtadm", "-C", "0", "--lld", "iscsi", *arguments],
            cwd=self.folder,
            env={"PATH": sbin_path(), "TGT_IPC_SOCKET": _IPC},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        if done.returncode:
            raise TgtError(f"tgtadm {' '.join(arguments)}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def _tgtadm_quietly(self, *arguments: str) -> None:
        with contextlib.suppress(TgtError, subprocess.TimeoutExpired):  # SIGKILL comes next
            self._tgtadm(*arguments)
