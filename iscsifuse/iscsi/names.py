"""iSCSI names: which ones may touch a path, a terminal, or another target.

A name comes from the network and ends up as a directory, in a log line and in the next Login Request. So there is
one gate, `validate_iscsi_name`, and for texts that can't be refused (aliases, messages of a target) `printable`.

The gate follows RFC 3722 with two tolerances, both harmless on a path and a terminal and both met in practice:
capital letters (kept as they are, for many targets compare bytes) and the underscore.

Source: RFC 7143 §4.2.7; RFC 3722; RFC 3980.
"""

import hashlib
import re
import stringprep
import unicodedata
from typing import Final

from iscsifuse.errors import FormatError

__all__ = ["MAX_NAME_LENGTH", "make_initiator_name", "printable", "validate_iscsi_name"]

MAX_NAME_LENGTH: Final = 223
"""Bytes of UTF-8. Source: RFC 7143 §4.2.7.1."""

_ASCII: Final = re.compile(r"[A-Za-z0-9.:_\-]*")
_IQN: Final = re.compile(r"iqn\.[0-9]{4}-(?:0[1-9]|1[0-2])\.[A-Za-z0-9].*", re.DOTALL)
_EUI: Final = re.compile(r"eui\.[0-9A-Fa-f]{16}")
_NAA: Final = re.compile(r"naa\.(?:[0-9A-Fa-f]{16}|[0-9A-Fa-f]{32})")

# Beyond ASCII: what stringprep removes (B.1) or prohibits (C.x), what it doesn't know (A.1), and right-to-left
# letters (D.1), which a name that begins with "iqn" may not hold. Source: RFC 3722 §3-6, RFC 3454 §6.
_REFUSED_TABLES: Final = (
    stringprep.in_table_a1,
    stringprep.in_table_b1,
    stringprep.in_table_c11_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
    stringprep.in_table_d1,
)
_IDEOGRAPHIC_FULL_STOP: Final = "\u3002"
_MACHINE_PREFIX: Final = "iqn.2026-11.io.github.iscsifuse:"


def validate_iscsi_name(name: str) -> str:
    """The name itself, if it is one that may be used: on the wire, as a directory, on a terminal.

    Args:
        name: an initiator's or a target's.

    Returns:
        ``name``, unchanged.

    Raises:
        FormatError: one sentence that says what is wrong with it.

    Source: RFC 7143 §4.2.7; RFC 3722 §6.
    """
    length = len(name.encode("utf-8", "surrogatepass"))
    if length > MAX_NAME_LENGTH:
        raise FormatError(f"the iSCSI name {_quoted(name)} has {length} bytes, but {MAX_NAME_LENGTH} is the limit")
    if not _ASCII.fullmatch(name):
        for character in name:
            if not _allowed(character):
                raise FormatError(
                    f"the iSCSI name {_quoted(name)} holds U+{ord(character):04X}, which no name may hold"
                )
        if unicodedata.normalize("NFKC", name) != name:
            raise FormatError(f"the iSCSI name {_quoted(name)} isn't normalized (NFKC)")
    if ".." in name:
        raise FormatError(f"the iSCSI name {_quoted(name)} holds '..'")
    if not (_IQN.fullmatch(name) or _EUI.fullmatch(name) or _NAA.fullmatch(name)):
        raise FormatError(
            f"{_quoted(name)} is no iSCSI name: it should look like iqn.2004-04.com.example:disk, or be eui. or naa. "
            "and hexadecimal digits"
        )
    return name


def _allowed(character: str) -> bool:
    if character.isascii():
        return _ASCII.fullmatch(character) is not None
    return character != _IDEOGRAPHIC_FULL_STOP and not any(refuses(character) for refuses in _REFUSED_TABLES)


def _quoted(name: str) -> str:
    return f"'{printable(name, limit=80)}'"


def printable(text: str, *, limit: int = 1024) -> str:
    """A text of unknown origin, fit for one line of a terminal or a log.

    Control characters, line separators, bidirectional marks, unassigned and private characters and lone surrogates
    come out as escapes; blanks and all visible characters stay.

    Args:
        text: anything.
        limit: characters of ``text`` to show; what is cut off is marked by ``...``.
    """
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:limit]
    )
    return shown if len(text) <= limit else shown + "..."


def make_initiator_name(machine_id: str) -> str:
    """An initiator name that is this machine's own, always the same, and doesn't tell its machine-id.

    Args:
        machine_id: the text of ``/etc/machine-id``; blanks around it don't count.
    """
    digest = hashlib.sha256(f"iscsifuse initiator {machine_id.strip()}".encode("utf-8", "surrogateescape"))
    return _MACHINE_PREFIX + digest.hexdigest()[:12]
