"""Parsers for the values of options: text in, a value out, or a ValueError that says what is wanted instead.

``int()`` takes ``1_000``, spaces and the digits of other scripts; nothing in here does.
"""

import re
from collections.abc import Callable
from typing import NoReturn

from iscsifuse.errors import IscsifuseError

__all__ = [
    "LUN_RANGE",
    "MAX_LUN",
    "MIB",
    "always",
    "digest",
    "identity",
    "iscsi_name",
    "luns",
    "mode",
    "one_of",
    "seconds",
    "size",
    "text",
]

MIB = 1 << 20
#: The largest LUN that has a number: flat space addressing. Source: SAM-5 §4.7.7.3.
MAX_LUN = 16383
#: One item of a list of LUNs.
LUN_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)

_MAX_ID = (1 << 32) - 2  # the number after it means "no change" to chown(2)
_MAX_SIZE = 1 << 50
_MAX_SECONDS = 7 * 24 * 3600.0
_SIZE = re.compile(r"([0-9]{1,16})([KMG]?)", re.ASCII)
_SECONDS = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,6})?", re.ASCII)
_OCTAL = re.compile(r"0?[0-7]{3}", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,10}", re.ASCII)
_UNITS = {"": 1, "K": 1 << 10, "M": MIB, "G": 1 << 30}


def _wanted(what: str) -> NoReturn:
    raise ValueError(what)


def size(*, minimum: int, words: str) -> Callable[[str], int]:
    """Bytes: ``64M``. ``words`` says what the minimum means."""

    def parse(text: str) -> int:
        match = _SIZE.fullmatch(text)
        value = int(match[1]) * _UNITS[match[2]] if match else -1
        if not minimum <= value <= _MAX_SIZE:
            _wanted(f"a size such as 64M ({words}; K, M and G are powers of 1024)")
        return value

    return parse


def seconds(*, zero: bool) -> Callable[[str], float]:
    """Seconds, with or without a fraction, up to a week; ``zero`` tells whether 0 has a meaning."""

    def parse(text: str) -> float:
        value = float(text) if _SECONDS.fullmatch(text) else -1.0
        if not 0 <= value <= _MAX_SECONDS or (value == 0 and not zero):
            _wanted(f"a number of seconds ({'0 for none' if zero else 'above 0'}, and at most a week)")
        return value

    return parse


def identity(text: str) -> int:
    """A user's or group's number."""
    if not _NUMBER.fullmatch(text) or int(text) > _MAX_ID:
        _wanted("a number, as id(1) prints it")
    return int(text)


def mode(text: str) -> int:
    """Permission bits in octal."""
    if not _OCTAL.fullmatch(text):
        _wanted("three octal digits such as 640")
    return int(text, 8)


def text(text: str) -> str:
    """Anything but nothing."""
    if not text:
        _wanted("a text that isn't empty")
    return text


def iscsi_name(text: str) -> str:
    """An iSCSI name."""
    from iscsifuse.iscsi.names import validate_iscsi_name

    try:
        validate_iscsi_name(text)
    except (IscsifuseError, ValueError) as error:
        _wanted(f"an iSCSI name such as iqn.2004-04.com.example:host ({error})")
    return text


def luns(text: str) -> tuple[int, ...]:
    """LUNs, ascending: ``0,3``, ``1-4``; ``:`` and ``+`` separate as well, for where a comma means something else."""
    found: set[int] = set()
    for part in re.split(r"[,:+]", text):
        match = LUN_RANGE.fullmatch(part)
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if not first <= last <= MAX_LUN:
            _wanted(f"a list of LUNs such as 0,3 or 1-4, each from 0 to {MAX_LUN}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def one_of(**choices: object) -> Callable[[str], object]:
    """A word, and the value that it stands for."""

    def parse(text: str) -> object:
        if text not in choices:
            _wanted(" or ".join(choices))
        return choices[text]

    return parse


def always(value: object) -> Callable[[str], object]:
    """The value of a switch."""
    return lambda _: value


digest = one_of(none=False, crc32c=True)
