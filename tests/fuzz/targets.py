"""What can be fuzzed, by name."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz import connection, discovery, login, pdu, scsi, text, url

__all__ = ["CORPUS", "TARGETS", "FuzzTarget"]

CORPUS = Path(__file__).with_name("corpus")
"""A folder of seeds for each target; see ``make_corpus``."""

_CPU_LIMIT = 2.0


@dataclass(frozen=True, slots=True)
class FuzzTarget:
    """One decoder, or a few that belong together.

    Attributes:
        name: also of its folder in the corpus.
        check: fails where a promise is broken.
        max_length: bytes of the longest input that is worth trying.
    """

    name: str
    check: Callable[[bytes], None]
    max_length: int = 512

    def run(self, data: bytes) -> None:
        """Check some bytes, in bounded time: seconds of this thread's, however busy the machine is."""
        began = time.thread_time()
        self.check(data)
        spent = time.thread_time() - began
        assert spent < _CPU_LIMIT, f"{len(data)} bytes took {spent:.1f} seconds"

    def seeds(self) -> list[Path]:
        """The files of its corpus."""
        return sorted((CORPUS / self.name).iterdir())


_ALL = (
    FuzzTarget("pdu", pdu.check, 4096),
    FuzzTarget("connection", connection.check, 4096),
    FuzzTarget("text", text.check_text, 4096),
    FuzzTarget("negotiation", text.check_negotiation, 2048),
    FuzzTarget("login", login.check_login, 4096),
    FuzzTarget("chap", login.check_chap, 2048),
    FuzzTarget("sendtargets", discovery.check, 4096),
    FuzzTarget("url", url.check, 512),
    FuzzTarget("sense", scsi.check_sense, 300),
    FuzzTarget("inquiry", scsi.check_inquiry, 300),
    FuzzTarget("vpd", scsi.check_vpd, 1024),
    FuzzTarget("report_luns", scsi.check_report_luns, 1024),
    FuzzTarget("capacity", scsi.check_capacity, 64),
    FuzzTarget("mode", scsi.check_mode, 600),
    FuzzTarget("lba_status", scsi.check_lba_status, 600),
    FuzzTarget("cdb", scsi.check_cdb, 600),
)
TARGETS = {target.name: target for target in _ALL}
