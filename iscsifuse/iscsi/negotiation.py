"""The operational keys of a login: what we offer, what an answer may be, what we answer.

How it thinks:

- `KEYS` is RFC 7143 §13 as a table: for each key its kind (which decides what answers are possible), its range, its
  default, and whether it means anything in a discovery session. The code below has a small function for each kind
  and none for single keys, but for the digests' words and the marker keys.
- We offer every key that matters, in one go. So a key that comes from the target is either the *answer* to an
  offer, a *declaration* (which has no answer), or a *proposal* of a key that we had no use for: those are answered
  so that nothing changes (`Irrelevant`, `No`, `Reject`, `NotUnderstood`).
- No key may come twice. A result outside of the offer is a `NegotiationError`.
- Silence and ``Reject`` leave the value in force before, which is the default; where that isn't what we could live
  with (a digest the user requires), the login fails.
- MaxConnections and ErrorRecoveryLevel are the exception: an answer above our 1 and 0 is taken for a proposal that
  crossed ours; the minimum of both is what we offered, so it holds, and nothing can go wrong by it.
- Operational keys belong to the operational stage; one in the security stage is an error, for whatever it would
  set would not have been authenticated. MaxRecvDataSegmentLength is let pass, for it only limits what we send.

Source: RFC 7143 §6.2, §13.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import Final

from iscsifuse.errors import NegotiationError
from iscsifuse.iscsi import text
from iscsifuse.iscsi.names import printable
from iscsifuse.iscsi.parameters import LoginConfig, NegotiatedParameters
from iscsifuse.iscsi.request import Stage

__all__ = ["KEYS", "Key", "Kind", "Negotiation"]

_MAX_SEGMENT: Final = 0xFFFFFF
_PROTOCOL_LEVEL: Final = 1
"""iSCSIProtocolLevel of RFC 7143."""
_NOT_UNDERSTOOD: Final = "NotUnderstood"
_IRRELEVANT: Final = "Irrelevant"
_REJECT: Final = "Reject"
_NONE: Final = "None"
_CRC32C: Final = "CRC32C"
_CONSTANTS: Final = frozenset({_NOT_UNDERSTOOD, _IRRELEVANT, _REJECT})


class Kind(Enum):
    """How a key's value comes about. Source: RFC 7143 §6.2, §13."""

    AND = auto()
    """Boolean: No if either side says No."""
    OR = auto()
    """Boolean: Yes if either side says Yes."""
    MINIMUM = auto()
    MAXIMUM = auto()
    LIST = auto()
    """The first of the offered values that the other side can live with."""
    NUMBER_DECLARED = auto()
    """Each side declares its own number."""
    TEXT_DECLARED = auto()
    """Declared by targets; any text."""
    OURS = auto()
    """Declared by initiators only."""
    MARKER = auto()
    """Obsolete; a boolean."""
    MARKER_INTERVAL = auto()
    """Obsolete; a range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One row of RFC 7143 §13.

    Attributes:
        kind: which decides what may be answered.
        default: the value in force when nothing is said, in its text form; empty for declared names.
        low: the least number.
        high: the greatest number.
        discovery: whether the key means anything in a discovery session.
        security: whether it may come in the security stage ("Any-Stage").
        repeats: whether it may come more than once.
        crossing: an answer above our offer counts as a proposal that crossed ours.
    """

    kind: Kind
    default: str = ""
    low: int = 0
    high: int = 0
    discovery: bool = True
    security: bool = False
    repeats: bool = False
    crossing: bool = False


KEYS: Final[Mapping[str, Key]] = MappingProxyType(
    {
        # RFC 7143 §13.1
        "HeaderDigest": Key(kind=Kind.LIST, default=_NONE),
        "DataDigest": Key(kind=Kind.LIST, default=_NONE),
        # §13.2
        "MaxConnections": Key(kind=Kind.MINIMUM, default="1", low=1, high=65535, discovery=False, crossing=True),
        # §13.3-13.9
        "SendTargets": Key(kind=Kind.OURS),
        "TargetName": Key(kind=Kind.OURS, security=True),
        "InitiatorName": Key(kind=Kind.OURS, security=True),
        "TargetAlias": Key(kind=Kind.TEXT_DECLARED, security=True),
        "InitiatorAlias": Key(kind=Kind.OURS, security=True),
        "TargetAddress": Key(kind=Kind.TEXT_DECLARED, security=True, repeats=True),
        "TargetPortalGroupTag": Key(kind=Kind.NUMBER_DECLARED, high=65535, security=True),
        # §13.10-13.14
        "InitialR2T": Key(kind=Kind.OR, default="Yes", discovery=False),
        "ImmediateData": Key(kind=Kind.AND, default="Yes", discovery=False),
        "MaxRecvDataSegmentLength": Key(
            kind=Kind.NUMBER_DECLARED, default="8192", low=512, high=_MAX_SEGMENT, security=True
        ),
        "MaxBurstLength": Key(kind=Kind.MINIMUM, default="262144", low=512, high=_MAX_SEGMENT, discovery=False),
        "FirstBurstLength": Key(kind=Kind.MINIMUM, default="65536", low=512, high=_MAX_SEGMENT, discovery=False),
        # §13.15-13.20
        "DefaultTime2Wait": Key(kind=Kind.MAXIMUM, default="2", high=3600),
        "DefaultTime2Retain": Key(kind=Kind.MINIMUM, default="20", high=3600),
        "MaxOutstandingR2T": Key(kind=Kind.MINIMUM, default="1", low=1, high=65535, discovery=False),
        "DataPDUInOrder": Key(kind=Kind.OR, default="Yes", discovery=False),
        "DataSequenceInOrder": Key(kind=Kind.OR, default="Yes", discovery=False),
        "ErrorRecoveryLevel": Key(kind=Kind.MINIMUM, default="0", high=2, crossing=True),
        # §13.21-13.24
        "SessionType": Key(kind=Kind.OURS, security=True),
        "TaskReporting": Key(kind=Kind.LIST, default="RFC3720", discovery=False),
        "iSCSIProtocolLevel": Key(kind=Kind.MINIMUM, default="1", high=31, discovery=False),
        # §13.25: older targets still send these
        "IFMarker": Key(kind=Kind.MARKER, default="No", security=True),
        "OFMarker": Key(kind=Kind.MARKER, default="No", security=True),
        "IFMarkInt": Key(kind=Kind.MARKER_INTERVAL, security=True),
        "OFMarkInt": Key(kind=Kind.MARKER_INTERVAL, security=True),
    }
)
"""The keys that the standard defines, but for those of authentication. Source: RFC 7143 §13."""


class Negotiation:
    """What was offered, what was answered, and what follows from both.

    Args:
        config: what to offer.

    Source: RFC 7143 §6.2.
    """

    def __init__(self, config: LoginConfig) -> None:
        self._config = config
        self._offers = dict(_offers(config))
        self._declared = dict(_identity(config))
        self._seen: set[str] = set()
        # What was agreed on or declared, still as text; keys that are not in here keep their default.
        self._results: dict[str, str] = {}
        # Keys that the target calls irrelevant; whether they are can only be said when all is known.
        self._irrelevant: set[str] = set()

    def identity(self) -> list[text.Pair]:
        """The declarations that open a login: who we are, and what we want. Source: RFC 7143 §6.3."""
        return list(self._declared.items())

    def offers(self) -> list[text.Pair]:
        """The keys to offer when the operational stage begins. Source: RFC 7143 §13."""
        return list(self._offers.items())

    @property
    def send_limit(self) -> int:
        """Bytes of text that one of our PDUs may hold during login: the default, or less where the target said so."""
        return min(8192, self._number("MaxRecvDataSegmentLength"))

    def receive(self, pairs: Iterable[text.Pair], *, stage: int) -> list[text.Pair]:
        """Take the keys of one text from the target, but for those of authentication.

        Args:
            pairs: in the order received.
            stage: the stage in which they came (CSG).

        Returns:
            Our answers to what the target proposed.

        Raises:
            NegotiationError: a key came twice, in the wrong stage, from the wrong side, or with a value outside of
                the offer.
            FormatError: a value that is no number or boolean where one should stand, or is out of range.
        """
        answers = []
        for name, value in pairs:
            key = KEYS.get(name)
            if name in self._seen and not (key and key.repeats):
                raise NegotiationError(f"the target sent the key {name} twice")
            self._seen.add(name)
            if key is None:
                answers.append(self._unknown(name, value))
                continue
            if stage == Stage.SECURITY_NEGOTIATION and not key.security:
                raise NegotiationError(f"the target sent {name} before the operational stage")
            answer = self._receive_one(name, key, value)
            if answer is not None:
                answers.append((name, answer))
        return answers

    def _receive_one(self, name: str, key: Key, value: str) -> str | None:
        """The answer to one key, None where none is due."""
        if key.kind is Kind.OURS:
            if self._declared.get(name) != value:
                raise NegotiationError(f"the target sent {name}, which only an initiator may declare here")
            return None
        if key.kind in (Kind.TEXT_DECLARED, Kind.NUMBER_DECLARED):
            if key.kind is Kind.NUMBER_DECLARED:
                value = str(text.number(value, low=key.low, high=key.high, key=name))
            self._results.setdefault(name, value)
            return None
        if name in self._offers:
            self._answered(name, key, value)
            return None
        return self._proposed(name, key, value)

    def _unknown(self, name: str, value: str) -> text.Pair:
        """Our answer to a key that the standard doesn't define. Source: RFC 7143 §6.2."""
        if value in _CONSTANTS:
            raise NegotiationError(f"the target answered the key {name}, which it was not asked for")
        return (name, _NOT_UNDERSTOOD)

    # -- answers of the target to our offers

    def _answered(self, name: str, key: Key, value: str) -> None:
        if value == _NOT_UNDERSTOOD:
            raise NegotiationError(f"the target doesn't understand {name}, which every target must")
        if value == _REJECT:
            return
        if value == _IRRELEVANT:
            self._irrelevant.add(name)
            return
        self._results[name] = _RESULTS[key.kind](name, key, self._offers[name], value)

    # -- proposals of the target

    def _proposed(self, name: str, key: Key, value: str) -> str:
        """Our answer to a key that we didn't offer; it leaves the key as it is. Source: RFC 7143 §6.2, §13.25."""
        if value in _CONSTANTS:
            raise NegotiationError(f"the target answered the key {name}, which it was not asked for")
        if key.kind is Kind.MARKER:
            text.boolean(value, key=name)
            # The standard would rather have Reject, and allows No, which targets of RFC 3720 understand as well.
            return "No"
        if key.kind is Kind.MARKER_INTERVAL:
            return _REJECT
        if self._config.discovery:
            return _IRRELEVANT
        # Left are the two keys of RFC 7143 that we don't offer, because older targets don't know them.
        if key.kind is Kind.LIST:
            return key.default if key.default in value.split(",") else _REJECT
        return str(min(text.number(value, low=key.low, high=key.high, key=name), _PROTOCOL_LEVEL))

    # -- the end

    def result(self, *, auth_method: str = _NONE) -> NegotiatedParameters:
        """What holds from here on.

        Args:
            auth_method: for the record.

        Raises:
            NegotiationError: a digest that the user requires was not agreed on, or a key was called irrelevant
                though it isn't.

        Source: RFC 7143 §6.2, §13.
        """
        for name in ("HeaderDigest", "DataDigest"):
            if self._result(name) != self._offers[name]:
                raise NegotiationError(_no_digest(name))
        initial_r2t = self._result("InitialR2T") == "Yes"
        immediate_data = self._result("ImmediateData") == "Yes"
        self._check_irrelevant(unsolicited=immediate_data or not initial_r2t)
        max_burst_length = self._number("MaxBurstLength")
        tag = self._results.get("TargetPortalGroupTag")
        return NegotiatedParameters(
            header_digest=self._config.header_digest,
            data_digest=self._config.data_digest,
            max_recv_data_segment_length=self._config.max_recv_data_segment_length,
            target_max_recv_data_segment_length=self._number("MaxRecvDataSegmentLength"),
            initial_r2t=initial_r2t,
            immediate_data=immediate_data,
            max_burst_length=max_burst_length,
            # A first burst above the greatest burst is an error of the target's that is easily lived with. §13.14
            first_burst_length=min(self._number("FirstBurstLength"), max_burst_length),
            max_outstanding_r2t=self._number("MaxOutstandingR2T"),
            data_pdu_in_order=self._result("DataPDUInOrder") == "Yes",
            data_sequence_in_order=self._result("DataSequenceInOrder") == "Yes",
            default_time2wait=self._number("DefaultTime2Wait"),
            default_time2retain=self._number("DefaultTime2Retain"),
            error_recovery_level=self._number("ErrorRecoveryLevel"),
            max_connections=self._number("MaxConnections"),
            target_portal_group_tag=None if tag is None else int(tag),
            target_alias=self._results.get("TargetAlias"),
            auth_method=auth_method,
        )

    def _result(self, name: str) -> str:
        return self._results.get(name, KEYS[name].default)

    def _number(self, name: str) -> int:
        return int(self._result(name))

    def _check_irrelevant(self, *, unsolicited: bool) -> None:
        for name in sorted(self._irrelevant):
            if name == "FirstBurstLength" and not unsolicited:
                continue
            # In a discovery session nothing but the digests makes a difference.
            if self._config.discovery and KEYS[name].kind is not Kind.LIST:
                continue
            raise NegotiationError(f"the target calls {name} irrelevant, which it isn't")


def _no_digest(name: str) -> str:
    option = "header_digest" if name == "HeaderDigest" else "data_digest"
    return f"the target doesn't agree to {name}=CRC32C, which {option}=crc32c requires; leave that option out"


def _identity(config: LoginConfig) -> list[text.Pair]:
    pairs = [("InitiatorName", config.initiator_name)]
    if config.initiator_alias is not None:
        pairs.append(("InitiatorAlias", config.initiator_alias))
    if config.target_name is None:
        return [*pairs, ("SessionType", "Discovery")]
    return [*pairs, ("TargetName", config.target_name), ("SessionType", "Normal")]


def _offers(config: LoginConfig) -> list[text.Pair]:
    """Every key with what we want, in the standard's order; those that discovery has no use for left out."""
    wanted = {
        "HeaderDigest": _CRC32C if config.header_digest else _NONE,
        "DataDigest": _CRC32C if config.data_digest else _NONE,
        "MaxConnections": str(config.max_connections),
        "InitialR2T": _yes_no(config.initial_r2t),
        "ImmediateData": _yes_no(config.immediate_data),
        "MaxRecvDataSegmentLength": str(config.max_recv_data_segment_length),
        "MaxBurstLength": str(config.max_burst_length),
        "FirstBurstLength": str(min(config.first_burst_length, config.max_burst_length)),
        "DefaultTime2Wait": str(config.default_time2wait),
        "DefaultTime2Retain": str(config.default_time2retain),
        "MaxOutstandingR2T": str(config.max_outstanding_r2t),
        "DataPDUInOrder": "Yes",
        "DataSequenceInOrder": "Yes",
        "ErrorRecoveryLevel": str(config.error_recovery_level),
    }
    return [(name, value) for name, value in wanted.items() if KEYS[name].discovery or not config.discovery]


def _yes_no(value: bool) -> str:
    return "Yes" if value else "No"


def _outside(name: str, offer: str, value: str) -> NegotiationError:
    return NegotiationError(
        f"the target answered {name}={printable(value, limit=80)}, which lies outside of the offer {name}={offer}"
    )


def _and(name: str, _key: Key, offer: str, value: str) -> str:
    if text.boolean(value, key=name) and offer == "No":
        raise _outside(name, offer, value)
    return value


def _or(name: str, _key: Key, offer: str, value: str) -> str:
    if not text.boolean(value, key=name) and offer == "Yes":
        raise _outside(name, offer, value)
    return value


def _minimum(name: str, key: Key, offer: str, value: str) -> str:
    result = text.number(value, low=key.low, high=key.high, key=name)
    if result > int(offer):
        if not key.crossing:
            raise _outside(name, offer, value)
        return offer
    return str(result)


def _maximum(name: str, key: Key, offer: str, value: str) -> str:
    result = text.number(value, low=key.low, high=key.high, key=name)
    if result < int(offer):
        raise _outside(name, offer, value)
    return str(result)


def _list(name: str, _key: Key, offer: str, value: str) -> str:
    if value != offer:
        if offer == _CRC32C and value == _NONE:
            raise NegotiationError(_no_digest(name))
        raise _outside(name, offer, value)
    return value


_RESULTS: Final = {
    Kind.AND: _and,
    Kind.OR: _or,
    Kind.MINIMUM: _minimum,
    Kind.MAXIMUM: _maximum,
    Kind.LIST: _list,
}
