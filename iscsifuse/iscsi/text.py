"""The ``key=value`` text of login and text PDUs, and the values in it.

::

    InitiatorName=iqn....NUL AuthMethod=CHAP,None NUL

How it thinks:

- What we *send* follows RFC 7143 §6.1 to the letter. What we *receive* is read strictly where a second reading
  could mean something else (numbers, booleans, binary values, key names), and generously where it can't: the NUL
  after the very last pair may be missing, and empty strings between NULs (padding that was counted as data) are
  skipped. Old arrays do both.
- Values are UTF-8. A byte that isn't comes out as a backslash, an x and two hex digits, so that a careless alias
  can't end a login; a target name with a backslash in it is no valid name and goes no further.
- A peer can't make us keep more than a limit: `Assembler` counts every byte of an exchange.

Everything here that reads raises `FormatError` and nothing else, whatever bytes come in.

Source: RFC 7143 §6.1, §6.2.
"""

import base64
import binascii
import re
from collections.abc import Iterable
from typing import Final

from iscsifuse.errors import FormatError

__all__ = [
    "LOGIN_TEXT_LIMIT",
    "MAX_KEY_LENGTH",
    "MAX_PAIRS",
    "MAX_VALUE_LENGTH",
    "SEND_TARGETS_LIMIT",
    "Assembler",
    "Pair",
    "binary",
    "boolean",
    "decode",
    "encode",
    "hex_encode",
    "number",
    "split",
]

Pair = tuple[str, str]

MAX_KEY_LENGTH: Final = 63
MAX_VALUE_LENGTH: Final = 8192
"""Bytes. The standard's simple values end at 255; CHAP_C of 1024 bytes is 2050 characters in hex; and every node
must be able to take 8192 bytes of text. Source: RFC 7143 §6.1, §12.1.3."""
LOGIN_TEXT_LIMIT: Final = 64 * 1024
"""Bytes of text that a target may send during one login."""
SEND_TARGETS_LIMIT: Final = 16 * 1024 * 1024
"""Bytes of text in the answer to one SendTargets: tens of thousands of targets."""
MAX_PAIRS: Final = 131072
"""Pairs in one answer: a dozen addresses for each of ten thousand targets. Bytes alone are no bound, as a pair of
three bytes takes a hundred times as much in memory."""

# '#' stands in the public extension keys of RFC 3720 (X#...); RFC 7143 knows the others.
_PIECE: Final = re.compile(rb"[^\0]+")
_KEY: Final = re.compile(rb"[A-Za-z][A-Za-z0-9.\-+@_#]{0,62}")
_DECIMAL: Final = re.compile(r"0|[1-9][0-9]{0,19}")
_HEX: Final = re.compile(r"0[xX]([0-9A-Fa-f]+)")
_BASE64: Final = re.compile(r"0[bB]([A-Za-z0-9+/]+={0,2})")
_MAX_HEX_NUMBER: Final = 16


def _shorten(text: str) -> str:
    """A value as it may stand in a message."""
    return ascii(text if len(text) <= 40 else text[:40] + "...")


def decode(data: bytes | bytearray | memoryview) -> list[Pair]:
    """The pairs of a text, in their order, repeated keys included.

    Args:
        data: a whole text (of one PDU, or of several joined along their C bits).

    Returns:
        ``(key, value)`` for each pair; the value may be empty.

    Raises:
        FormatError: a pair has no ``=``, its key isn't 1 to 63 allowed characters, its value is longer than
            `MAX_VALUE_LENGTH`, or there are more than `MAX_PAIRS`.

    Source: RFC 7143 §6.1.
    """
    pairs: list[Pair] = []
    for match in _PIECE.finditer(data):
        if len(pairs) == MAX_PAIRS:
            raise FormatError(f"more than {MAX_PAIRS} keys in one text")
        piece = bytes(match[0])
        key, equals, value = piece.partition(b"=")
        if not equals:
            raise FormatError(f"text without '=': {_shorten(piece.decode('ascii', 'backslashreplace'))}")
        if not _KEY.fullmatch(key):
            raise FormatError(f"a key that can't be one: {_shorten(key.decode('ascii', 'backslashreplace'))}")
        if len(value) > MAX_VALUE_LENGTH:
            raise FormatError(
                f"a value of {len(value)} bytes for {key.decode()}, but {MAX_VALUE_LENGTH} is the limit"
            )
        pairs.append((key.decode(), value.decode("utf-8", "backslashreplace")))
    return pairs


def encode(pairs: Iterable[Pair]) -> bytes:
    """The text of these pairs, each one followed by NUL.

    Raises:
        FormatError: a key or a value that the standard doesn't allow, such as one with a NUL in it.

    Source: RFC 7143 §6.1.
    """
    pieces = []
    for key, value in pairs:
        # 'replace' makes a '?' of a lone surrogate, as stands in a string that came from an odd command line.
        name, body = key.encode("utf-8", "replace"), value.encode("utf-8", "replace")
        if not _KEY.fullmatch(name):
            raise FormatError(f"a key that can't be one: {_shorten(key)}")
        if b"\0" in body or len(body) > MAX_VALUE_LENGTH:
            raise FormatError(f"a value for {key} that can't be sent: {_shorten(value)}")
        pieces += [name, b"=", body, b"\0"]
    return b"".join(pieces)


def split(data: bytes, max_length: int) -> list[bytes]:
    """The pieces in which a text travels: all but the last go with C=1. A cut may fall inside of a pair.

    Args:
        data: an encoded text; an empty one makes one empty piece.
        max_length: bytes that the receiver takes in one data segment, at least 1.

    Source: RFC 7143 §6.2, §11.12.2.
    """
    return [data[start : start + max_length] for start in range(0, len(data), max_length)] or [b""]


def number(value: str, *, low: int = 0, high: int = 0xFFFFFFFF, key: str = "a number") -> int:
    """A decimal or hexadecimal number.

    Only ASCII digits count: no sign, blank, underscore, or leading zero.

    Args:
        value: as received.
        low: the least number allowed.
        high: the greatest number allowed.
        key: what the number is of, for the message.

    Raises:
        FormatError: not a number, or out of range.

    Source: RFC 7143 §6.1 (decimal-constant, hex-constant).
    """
    if _DECIMAL.fullmatch(value):
        result = int(value)
    elif (match := _HEX.fullmatch(value)) and len(match[1]) <= _MAX_HEX_NUMBER:
        result = int(match[1], 16)
    else:
        raise FormatError(f"{key} should be a number, not {_shorten(value)}")
    if not low <= result <= high:
        raise FormatError(f"{key} should lie in {low}..{high}, but is {result}")
    return result


def boolean(value: str, *, key: str = "a boolean") -> bool:
    """``Yes`` or ``No``, in this spelling.

    Raises:
        FormatError: anything else.

    Source: RFC 7143 §6.1 (boolean-value).
    """
    if value not in ("Yes", "No"):
        raise FormatError(f"{key} should be Yes or No, not {_shorten(value)}")
    return value == "Yes"


def binary(value: str, max_length: int, *, key: str = "a binary value") -> bytes:
    """The bytes of a hexadecimal (``0x...``) or base64 (``0b...``) constant.

    An odd number of hexadecimal digits is read as a number is: a zero goes in front, ``0x123`` is 01 23.
    Base64 has to be the canonical encoding (padded, no stray bits), so that no two texts mean the same bytes.

    Args:
        value: as received.
        max_length: bytes; a longer constant is refused before it is decoded.
        key: what the value is of, for the message.

    Raises:
        FormatError: not such a constant, empty, or longer than ``max_length``.

    Source: RFC 7143 §6.1 (hex-constant, base64-constant, large-binary-value).
    """
    result = b""
    if match := _HEX.fullmatch(value):
        digits = match[1]
        if len(digits) <= 2 * max_length:
            result = bytes.fromhex(digits if len(digits) % 2 == 0 else "0" + digits)
    elif match := _BASE64.fullmatch(value):
        if len(match[1]) <= (max_length + 2) // 3 * 4:
            result = _base64(match[1], key=key)
    else:
        raise FormatError(f"{key} should be a binary value (0x... or 0b...), not {_shorten(value)}")
    if not 0 < len(result) <= max_length:
        raise FormatError(f"{key} is longer than {max_length} bytes")
    return result


def _base64(text: str, *, key: str) -> bytes:
    try:
        result = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise FormatError(f"{key} isn't valid base64") from error
    if base64.b64encode(result).decode() != text:
        raise FormatError(f"{key} isn't base64 in its canonical form")
    return result


def hex_encode(data: bytes) -> str:
    """``0x`` and two lower-case digits for each byte. Source: RFC 7143 §6.1 (hex-constant)."""
    return "0x" + data.hex()


class Assembler:
    """Joins the pieces of a text that a peer sends with C=1, and counts all it ever sent.

    Args:
        limit: bytes in total, over all texts of the exchange; what exceeds it ends the exchange.

    Source: RFC 7143 §6.2 (logical text data segment).
    """

    __slots__ = ("_limit", "_pieces", "_total")

    def __init__(self, limit: int = LOGIN_TEXT_LIMIT) -> None:
        self._limit = limit
        self._total = 0
        self._pieces = bytearray()

    @property
    def total(self) -> int:
        """Bytes received so far."""
        return self._total

    @property
    def partial(self) -> bool:
        """Whether a text has begun and not ended."""
        return bool(self._pieces)

    def add(self, data: bytes, *, cont: bool) -> list[Pair] | None:
        """Take the data segment of one PDU.

        Args:
            data: without padding.
            cont: the C bit: the text goes on in the next PDU.

        Returns:
            The pairs of the text that ends here, or None while C=1.

        Raises:
            FormatError: more than ``limit`` bytes, or a text that can't be read (see `decode`).
        """
        self._total += len(data)
        if self._total > self._limit:
            raise FormatError(f"more than {self._limit} bytes of text")
        self._pieces += data
        if cont:
            return None
        pairs = decode(self._pieces)
        self._pieces.clear()
        return pairs
