"""Text requests in the full feature phase: SendTargets, and the splitting of its answer.

An answer that doesn't fit one PDU travels in pieces: C=1, F=0 and a Target Transfer Tag, and an empty request with
that tag fetches the next one. Source: RFC 7143 §11.10, §11.11, Appendix C.
"""

from collections.abc import Callable, Iterator

from iscsifuse.errors import FormatError
from iscsifuse.iscsi import text
from iscsifuse.iscsi.pdu import RESERVED_TAG
from iscsifuse.iscsi.request import TextRequest
from iscsifuse.iscsi.response import TextResponse
from iscsifuse.testing.numbers import Numbers

__all__ = ["TextExchange"]


class TextExchange:
    """The text exchange of a session: one at a time, as the standard has it.

    Args:
        listing: the text that SendTargets with this value is answered with, or None to refuse it.
        limit: bytes of one answer PDU.
        next_ttt: where tags come from.
    """

    def __init__(self, *, listing: Callable[[str], bytes | None], limit: int, next_ttt: Iterator[int]) -> None:
        self._listing = listing
        self._limit = limit
        self._next_ttt = next_ttt
        self._request = bytearray()
        self._pieces: list[bytes] = []
        self._ttt = RESERVED_TAG

    def answer(self, pdu: TextRequest, numbers: Numbers) -> TextResponse:
        """The response to a Text Request."""
        if pdu.ttt == RESERVED_TAG or pdu.ttt != self._ttt:
            # A new exchange: what was left of another is forgotten.
            self._request.clear()
            self._pieces = []
        self._request += pdu.data
        if not pdu.cont and not self._pieces:
            self._pieces = text.split(self._respond(bytes(self._request)), self._limit)
            self._request.clear()
        piece = self._pieces.pop(0) if self._pieces and not pdu.cont else b""
        more = bool(self._pieces)
        final = pdu.final and not more and not pdu.cont
        self._ttt = RESERVED_TAG if final else next(self._next_ttt)
        return TextResponse(
            itt=pdu.itt,
            lun=pdu.lun,
            final=final,
            cont=more,
            ttt=self._ttt,
            stat_sn=numbers.next_stat_sn(),
            exp_cmd_sn=numbers.exp_cmd_sn,
            max_cmd_sn=numbers.max_cmd_sn,
            data=piece,
        )

    def _respond(self, request: bytes) -> bytes:
        try:
            pairs = text.decode(request)
        except FormatError:
            return b""
        answers = []
        for key, value in pairs:
            if key != "SendTargets":
                answers.append(text.encode([(key, "NotUnderstood")]))
                continue
            found = self._listing(value)
            answers.append(text.encode([(key, "Reject")]) if found is None else found)
        return b"".join(answers)
