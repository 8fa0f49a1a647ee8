"""What can be fuzzed, by name."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz import connection, discovery, login, pdu, scsi, text, url
from iscsifuse.cli.url import QUERY_KEYS
from iscsifuse.iscsi.chap import CHAP_KEYS
from iscsifuse.iscsi.negotiation import KEYS

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
        words: what a mutation may put in, because nobody would guess it byte by byte.
    """

    name: str
    check: Callable[[bytes], None]
    max_length: int = 512
    words: tuple[bytes, ...] = ()

    def run(self, data: bytes) -> None:
        """Check some bytes, in bounded time: seconds of this thread's, however busy the machine is."""
        began = time.thread_time()
        self.check(data)
        spent = time.thread_time() - began
        assert spent < _CPU_LIMIT, f"{len(data)} bytes took {spent:.1f} seconds"

    def seeds(self) -> list[Path]:
        """The files of its corpus."""
        return sorted((CORPUS / self.name).iterdir())


_KEYS = tuple(f"{key}=".encode() for key in (*KEYS, "AuthMethod", *CHAP_KEYS, "X-com.example.key"))
_VALUES = (
    *(b"Yes", b"No", b"None", b"CRC32C", b"CHAP", b"NotUnderstood", b"Irrelevant", b"Reject"),
    *(b"RFC3720", b"0x", b"0b", b"1", b"512", b"65535", b"16777215", b"4294967295"),
)
_CHAP = (*(f"{key}=".encode() for key in CHAP_KEYS), b"5", b"6", b"7", b"8", b"0x", b"0b", b"255")
_NAMES = (b"iqn.2026-11.com.example:", b"eui.", b"naa.", b"[::1]", b",1", b":3260", b"\xc3\xad")
_URL = (
    *(f"{key}=".encode() for key in QUERY_KEYS),
    *(b"crc32c", b"none", b"md5", b"sha3-256", b"iscsi://", b"%25", b"%40", b"@", b"?", b"&", b"/"),
)

_ALL = (
    FuzzTarget("pdu", pdu.check, 4096),
    FuzzTarget("connection", connection.check, 4096),
    FuzzTarget("text", text.check_text, 4096, words=(*_KEYS, *_VALUES)),
    FuzzTarget("negotiation", text.check_negotiation, 2048, words=(*_KEYS, *_VALUES)),
    FuzzTarget("login", login.check_login, 4096, words=(*_KEYS, *_VALUES)),
    FuzzTarget("chap", login.check_chap, 2048, words=_CHAP),
    FuzzTarget("sendtargets", discovery.check, 4096, words=(*_KEYS, *_NAMES)),
    FuzzTarget("url", url.check, 512, words=(*_URL, *_NAMES)),
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
