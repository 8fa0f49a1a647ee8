"""Discovery: asking for the targets of a portal, and reading what it answers.

::

    Text Request  F=1 TTT=ffffffff  SendTargets=All   →
                                                      ←   Text Response F=0 TTT=x, some of the text
    Text Request  F=1 TTT=x, empty                    →
                                                      ←   Text Response F=1 TTT=ffffffff, the rest

How it thinks:

- `TextExchange` is the sequence of PDUs. It holds until F=1. A Target Transfer Tag with F=0 is the target's handle
  for "there is more" and goes back verbatim, with the LUN. Bytes and PDUs of one exchange are bounded.
- The text is joined up to the last response, whatever the C bits say: tgt cuts a long answer inside of a pair and
  leaves C=0. Where a response ends with a pair, as C=0 promises, joining is the same.
- `parse` is the text. One bad entry must not hide the good ones: what can't be used is dropped and comes back as a
  warning, in one printable sentence.

Source: RFC 7143 §11.10, §11.11, Appendix C.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from iscsifuse.errors import FormatError, ProtocolError
from iscsifuse.iscsi import text
from iscsifuse.iscsi.names import printable, validate_iscsi_name
from iscsifuse.iscsi.pdu import RESERVED_TAG, Pdu
from iscsifuse.iscsi.request import TextRequest
from iscsifuse.iscsi.response import Reject, TextResponse

__all__ = ["DEFAULT_PORT", "TargetAddress", "TargetRecord", "TextExchange", "parse", "parse_address"]

DEFAULT_PORT: Final = 3260
"""Source: RFC 7143 §13.8."""
MAX_EXCHANGES: Final = 65536
"""Responses to one Text Request: a 16 MiB answer in the smallest segments there are (512 bytes), and twice that."""
_MAX_WARNINGS: Final = 100

_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._\-]{0,253}[A-Za-z0-9.])?")
_ADDRESS: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([^\[\]:,]+))(?::([0-9]{1,5}))?(?:,([0-9A-Za-z]+))?")


@dataclass(frozen=True, slots=True)
class TargetAddress:
    """A portal of a target.

    Attributes:
        host: a host name, or an IPv4 or IPv6 address without brackets.
        port: TCP port.
        tag: target portal group tag, or None where the target didn't say.
    """

    host: str
    port: int = DEFAULT_PORT
    tag: int | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.tag is None else f"{host}:{self.port},{self.tag}"


@dataclass(frozen=True, slots=True)
class TargetRecord:
    """A target, and where it can be reached.

    Attributes:
        name: a valid iSCSI name.
        addresses: at least one, none twice, in the target's order.
    """

    name: str
    addresses: tuple[TargetAddress, ...]


def parse_address(value: str) -> TargetAddress:
    """Read ``host[:port][,tag]``; an IPv6 address stands in brackets.

    Args:
        value: of TargetAddress, in a SendTargets answer or in a redirection.

    Raises:
        FormatError: it can't be read that way.

    Source: RFC 7143 §13.8.
    """
    match = _ADDRESS.fullmatch(value)
    if match is None:
        raise FormatError(f"'{printable(value, limit=80)}' is no TargetAddress")
    ipv6, host, port, tag = match.groups()
    if ipv6 is not None:
        try:
            host = str(ipaddress.IPv6Address(ipv6))
        except ValueError as error:
            raise FormatError(f"'{printable(value, limit=80)}' holds no IPv6 address") from error
    elif not _HOST.fullmatch(host):
        raise FormatError(f"'{printable(value, limit=80)}' holds no host name")
    number = DEFAULT_PORT if port is None else text.number(port, low=1, high=65535, key="the port of a TargetAddress")
    group = None if tag is None else text.number(tag, high=65535, key="the tag of a TargetAddress")
    return TargetAddress(host, number, group)


class _Warnings:
    """Warnings that can't grow without end."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._more = 0

    def add(self, message: str) -> None:
        if len(self._texts) < _MAX_WARNINGS:
            self._texts.append(message)
        else:
            self._more += 1

    def all(self) -> list[str]:
        return [*self._texts, f"... and {self._more} more"] if self._more else self._texts


def parse(pairs: Iterable[text.Pair], *, default: TargetAddress) -> tuple[list[TargetRecord], list[str]]:
    """The targets in the answer to SendTargets.

    A target that comes several times is one target with all its addresses. One that gives no address is at the
    portal that was asked. One of whose addresses not a single one can be used is dropped.

    Args:
        pairs: of the whole answer, in order.
        default: the portal that was asked.

    Returns:
        The targets in the target's order, and warnings about all that was dropped.

    Source: RFC 7143 Appendix C.
    """
    targets: dict[str, dict[TargetAddress, None]] = {}
    addressed: set[str] = set()
    warnings = _Warnings()
    current: str | None = None
    for key, value in pairs:
        if key == "TargetName":
            try:
                current = validate_iscsi_name(value)
            except FormatError as error:
                current = ""
                warnings.add(f"a target was left out: {error}")
            else:
                targets.setdefault(current, {})
        elif key != "TargetAddress":
            warnings.add(f"the key {key} doesn't belong to an answer to SendTargets; it was skipped")
        elif current is None:
            warnings.add(f"the address '{printable(value, limit=80)}' came before any target; it was skipped")
        elif current:
            addressed.add(current)
            try:
                targets[current][parse_address(value)] = None
            except FormatError as error:
                warnings.add(f"an address of {current} was left out: {error}")
    records = []
    for name, addresses in targets.items():
        if addresses:
            records.append(TargetRecord(name, tuple(addresses)))
        elif name in addressed:
            warnings.add(f"the target {name} was left out: it gave no address that can be used")
        else:
            records.append(TargetRecord(name, (default,)))
    return records, warnings.all()


class TextExchange:
    """One Text Request and all that follows from it, without the numbering.

    `start` and `receive` give requests whose CmdSN and ExpStatSN are for the connection to fill in (all are
    non-immediate, so each takes a CmdSN of its own).

    Args:
        pairs: what to ask; it has to fit into one PDU of 512 bytes, as ``SendTargets`` does.
        itt: Initiator Task Tag of the whole exchange.
        limit: bytes of text to take from the target at most.

    Source: RFC 7143 §11.10, §11.11.
    """

    def __init__(self, pairs: Iterable[text.Pair], *, itt: int, limit: int = text.SEND_TARGETS_LIMIT) -> None:
        self._data = text.encode(pairs)
        self._itt = itt
        self._assembler = text.Assembler(limit)
        self._pairs: list[text.Pair] = []
        self._responses = 0
        self._done = False

    @property
    def itt(self) -> int:
        """Initiator Task Tag of the exchange."""
        return self._itt

    @property
    def done(self) -> bool:
        """Whether the last response has come."""
        return self._done

    @property
    def pairs(self) -> list[text.Pair]:
        """What the target answered: all of it when `done`, nothing before."""
        return self._pairs if self._done else []

    def start(self) -> TextRequest:
        """The request to send first; its Target Transfer Tag is the reserved one."""
        return TextRequest(itt=self._itt, data=self._data)

    def receive(self, pdu: Pdu) -> TextRequest | None:
        """Take a response.

        Args:
            pdu: a Text Response with our Initiator Task Tag, or the Reject of our request.

        Returns:
            The request to send next, or None when the exchange is done.

        Raises:
            ProtocolError: a Reject, another PDU, or one whose fields contradict each other.
            FormatError: more text than the limit, or text that can't be read.

        Source: RFC 7143 §11.11.1-11.11.4.
        """
        if isinstance(pdu, Reject):
            raise ProtocolError(f"the target rejected the Text Request (reason {pdu.reason:#04x})")
        if not isinstance(pdu, TextResponse) or pdu.itt != self._itt or self._done:
            raise ProtocolError(f"a {type(pdu).__name__} that answers no Text Request")
        self._responses += 1
        if self._responses > MAX_EXCHANGES:
            raise ProtocolError(f"more than {MAX_EXCHANGES} responses to one Text Request")
        if pdu.final and pdu.cont:
            raise ProtocolError("a Text Response that is final and says that its text goes on")
        if not pdu.final and pdu.ttt == RESERVED_TAG:
            raise ProtocolError("a Text Response that is not final, without a Target Transfer Tag to go on with")
        # A tag in a final response has no meaning and is not looked at.
        self._pairs = self._assembler.add(pdu.data, cont=not pdu.final) or []
        if pdu.final:
            self._done = True
            return None
        return TextRequest(itt=self._itt, ttt=pdu.ttt, lun=pdu.lun)
