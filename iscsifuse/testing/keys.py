"""Negotiating the operational keys, as a target: what is offered meets what is configured.

``Agreed`` is the result; its defaults are the standard's, which hold for every key that nobody mentioned.
Source: RFC 7143 §6.2, §13.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from iscsifuse.errors import FormatError
from iscsifuse.iscsi import text
from iscsifuse.iscsi.text import Pair
from iscsifuse.testing.config import TargetKeys

__all__ = ["Agreed", "OperationalKeys"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What holds in a session.

    Attributes:
        header_digest: CRC32C of headers, both ways.
        data_digest: CRC32C of data segments, both ways.
        initial_r2t: no unsolicited Data-Out.
        immediate_data: data may come in the command PDU.
        max_burst_length: of a sequence of Data-In or solicited Data-Out.
        first_burst_length: of unsolicited data, immediate data included.
        max_outstanding_r2t: of one task.
        initiator_max_recv: the longest data segment that the initiator takes.
        target_max_recv: the longest data segment that this target takes.
        discovery: this is a discovery session.
    """

    header_digest: bool = False
    data_digest: bool = False
    initial_r2t: bool = True
    immediate_data: bool = True
    max_burst_length: int = 262144
    first_burst_length: int = 65536
    max_outstanding_r2t: int = 1
    initiator_max_recv: int = 8192
    target_max_recv: int = 8192
    discovery: bool = False


_LENGTHS = (512, 0xFFFFFF)
_ANSWERS = ("NotUnderstood", "Irrelevant", "Reject")


class OperationalKeys:
    """One login's negotiation.

    Attributes:
        agreed: the result so far.
        seen: keys that the initiator has offered or declared; a second time is a protocol error.
    """

    def __init__(self, ours: TargetKeys, *, discovery: bool) -> None:
        self._ours = ours
        self.agreed = Agreed(discovery=discovery)
        self.seen: set[str] = set()
        self._declared = False
        self._handlers: dict[str, Callable[[str], str | None]] = {
            "HeaderDigest": lambda value: self._digest("header_digest", value, ours.header_digests),
            "DataDigest": lambda value: self._digest("data_digest", value, ours.data_digests),
            "InitialR2T": self._initial_r2t,
            "ImmediateData": self._immediate_data,
            "MaxBurstLength": lambda value: self._smaller("max_burst_length", value, ours.max_burst_length),
            "FirstBurstLength": lambda value: self._smaller("first_burst_length", value, ours.first_burst_length),
            "MaxOutstandingR2T": self._max_outstanding_r2t,
            "MaxRecvDataSegmentLength": self._max_recv,
            "MaxConnections": lambda value: str(min(1, text.number(value, low=1, high=65535))),
            "ErrorRecoveryLevel": lambda value: str(min(0, text.number(value, high=2))),
            "DefaultTime2Wait": lambda value: str(max(ours.default_time2wait, text.number(value, high=3600))),
            "DefaultTime2Retain": lambda value: str(min(ours.default_time2retain, text.number(value, high=3600))),
            "DataPDUInOrder": _in_order,
            "DataSequenceInOrder": _in_order,
            "IFMarker": lambda _: "No",
            "OFMarker": lambda _: "No",
            "IFMarkInt": lambda _: "Reject",
            "OFMarkInt": lambda _: "Reject",
            "TaskReporting": lambda _: "RFC3720",
            "iSCSIProtocolLevel": lambda _: "1",
            "InitiatorAlias": lambda _: None,
        }

    def answer(self, pairs: list[Pair]) -> list[Pair]:
        """Answers to what the initiator offers, and, the first time, what this target declares.

        Raises:
            FormatError: a value that can't be one, or a key for the second time.
        """
        answers: list[Pair] = []
        for key, value in pairs:
            if key in self.seen:
                raise FormatError(f"{key} comes a second time")
            self.seen.add(key)
            if key in dict(self._ours.extra) or value in _ANSWERS:
                continue  # an answer to what this target, or a script, proposed: none that it has to answer
            handler = self._handlers.get(key)
            if handler is None:
                answers.append((key, "NotUnderstood"))
                continue
            reply = handler(value)
            if reply is not None:
                answers.append((key, reply))
        if not self._declared:
            self._declared = True
            answers += self._declarations()
        return answers

    def _declarations(self) -> list[Pair]:
        declared = list(self._ours.extra)
        if self._ours.max_recv_data_segment_length is not None:
            declared.append(("MaxRecvDataSegmentLength", str(self._ours.max_recv_data_segment_length)))
            self.agreed = replace(self.agreed, target_max_recv=self._ours.max_recv_data_segment_length)
        if self._ours.alias:
            declared.append(("TargetAlias", self._ours.alias))
        return declared

    def _digest(self, name: str, value: str, known: tuple[str, ...]) -> str:
        for choice in value.split(","):
            if choice in known:
                on = choice == "CRC32C"
                self.agreed = (
                    replace(self.agreed, header_digest=on)
                    if name == "header_digest"
                    else replace(self.agreed, data_digest=on)
                )
                return choice
        return "Reject"

    def _initial_r2t(self, value: str) -> str:
        result = text.boolean(value) or self._ours.initial_r2t
        self.agreed = replace(self.agreed, initial_r2t=result)
        return _yes_no(result)

    def _immediate_data(self, value: str) -> str:
        result = text.boolean(value) and self._ours.immediate_data
        self.agreed = replace(self.agreed, immediate_data=result)
        return _yes_no(result)

    def _smaller(self, name: str, value: str, ours: int) -> str:
        low, high = _LENGTHS
        result = min(text.number(value, low=low, high=high), ours)
        if name == "max_burst_length":
            self.agreed = replace(self.agreed, max_burst_length=result)
        else:
            # Never more than MaxBurstLength, whichever of the two comes first.
            known = self.agreed.max_burst_length if "MaxBurstLength" in self.seen else self._ours.max_burst_length
            result = min(result, known, self._ours.max_burst_length)
            self.agreed = replace(self.agreed, first_burst_length=result)
        return str(result)

    def _max_outstanding_r2t(self, value: str) -> str:
        result = min(text.number(value, low=1, high=65535), self._ours.max_outstanding_r2t)
        self.agreed = replace(self.agreed, max_outstanding_r2t=result)
        return str(result)

    def _max_recv(self, value: str) -> None:
        low, high = _LENGTHS
        self.agreed = replace(self.agreed, initiator_max_recv=text.number(value, low=low, high=high))

    def finish(self) -> Agreed:
        """The result: FirstBurstLength never exceeds MaxBurstLength. Source: RFC 7143 §13.14."""
        return replace(
            self.agreed, first_burst_length=min(self.agreed.first_burst_length, self.agreed.max_burst_length)
        )


def _in_order(value: str) -> str:
    """This target wants order, and the result is Yes where one side does; the offer is only read."""
    text.boolean(value)
    return "Yes"


def _yes_no(value: bool) -> str:
    return "Yes" if value else "No"
