"""What a login asks for, and what it got.

`LoginConfig` is the user's side: every field is what we offer, and the comment at each default says why.
`NegotiatedParameters` is what both sides agreed on; the full feature phase obeys it and nothing else.

Lengths are bytes, times seconds.

Source: RFC 7143 §13.
"""

from dataclasses import dataclass

from iscsifuse.iscsi.chap import ChapCredentials
from iscsifuse.iscsi.names import printable

__all__ = [
    "DEFAULT_MAX_RECV_DATA_SEGMENT_LENGTH",
    "LoginConfig",
    "NegotiatedParameters",
]

DEFAULT_MAX_RECV_DATA_SEGMENT_LENGTH = 8192
"""Of a side that declared none. Source: RFC 7143 §13.12."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginConfig:
    """What to ask the target for.

    Attributes:
        initiator_name: who we are.
        target_name: which target, or None for a discovery session.
        header_digest: True *requires* CRC32C (only that is offered; a target without it fails the login), False
            offers none.
        data_digest: likewise, for data segments.
        chap: True authentication when given: CHAP only is offered, so that nothing can talk us out of it.
        initiator_alias: a name for the target's administrator, or None.
        max_recv_data_segment_length: ours, declared. 256 KiB makes payload PDUs large and cheap; more gains nothing,
            as one Data-In PDU is received into its buffer piece by piece anyway.
        initial_r2t: No: the first burst of a write need not wait for the target.
        immediate_data: Yes: small writes are one PDU.
        max_burst_length: the longest Data-In or solicited Data-Out sequence. The greatest multiple of 512 the key can
            say: a write buffer exists in full before its command is sent, so a long burst costs us nothing and
            saves round trips; the target lowers it to what suits its own memory.
        first_burst_length: what may go unsolicited. 256 KiB, as other initiators ask; beyond that an R2T
            costs little, and targets have to reserve this much for each command.
        max_outstanding_r2t: 8: with a target that has small bursts (64 KiB is common) one command can keep half a
            megabyte in flight. Each costs us a few numbers only.
        default_time2wait: 0: the result is the greater of both sides, and only the target knows what it needs.
        default_time2retain: 0: at error recovery level 0 no task survives its connection.
        max_connections: 1, all that is implemented.
        error_recovery_level: 0, all that is implemented.
    """

    initiator_name: str
    target_name: str | None
    header_digest: bool = False
    data_digest: bool = False
    chap: ChapCredentials | None = None
    initiator_alias: str | None = None
    max_recv_data_segment_length: int = 262144
    initial_r2t: bool = False
    immediate_data: bool = True
    max_burst_length: int = 16776192
    first_burst_length: int = 262144
    max_outstanding_r2t: int = 8
    default_time2wait: int = 0
    default_time2retain: int = 0
    max_connections: int = 1
    error_recovery_level: int = 0

    @property
    def discovery(self) -> bool:
        """Whether this is a discovery session."""
        return self.target_name is None


@dataclass(frozen=True, slots=True, kw_only=True)
class NegotiatedParameters:
    """What holds in the full feature phase.

    Attributes:
        header_digest: whether PDUs carry a CRC32C of their headers, both ways.
        data_digest: whether data segments carry one, both ways.
        max_recv_data_segment_length: the longest data segment that the target may send.
        target_max_recv_data_segment_length: the longest data segment that we may send.
        initial_r2t: unsolicited Data-Out PDUs are not allowed.
        immediate_data: data in the command PDU is allowed.
        max_burst_length: the longest sequence of solicited Data-Out or of Data-In.
        first_burst_length: the most unsolicited data of one command, immediate data included; never more than
            ``max_burst_length``.
        max_outstanding_r2t: R2Ts of one task that may be unanswered at once.
        data_pdu_in_order: data within a sequence comes at rising offsets.
        data_sequence_in_order: sequences come at rising offsets.
        default_time2wait: seconds to wait before a new login after the connection was lost.
        default_time2retain: seconds after that for which tasks are kept.
        error_recovery_level: 0.
        max_connections: 1.
        target_portal_group_tag: of the portal that answered, or None where it didn't say.
        target_alias: as the target sent it, or None; `as_keys` makes it fit for a terminal.
        auth_method: ``None`` or ``CHAP``.
    """

    header_digest: bool = False
    data_digest: bool = False
    max_recv_data_segment_length: int = DEFAULT_MAX_RECV_DATA_SEGMENT_LENGTH
    target_max_recv_data_segment_length: int = DEFAULT_MAX_RECV_DATA_SEGMENT_LENGTH
    initial_r2t: bool = True
    immediate_data: bool = True
    max_burst_length: int = 262144
    first_burst_length: int = 65536
    max_outstanding_r2t: int = 1
    data_pdu_in_order: bool = True
    data_sequence_in_order: bool = True
    default_time2wait: int = 2
    default_time2retain: int = 20
    error_recovery_level: int = 0
    max_connections: int = 1
    target_portal_group_tag: int | None = None
    target_alias: str | None = None
    auth_method: str = "None"

    def as_keys(self) -> dict[str, str]:
        """The parameters in the standard's spelling, for people and for JSON.

        ``MaxRecvDataSegmentLength`` is ours; the target's has ``Target`` in front of it, which is no key of the
        standard's but the only way to show both. What the target didn't say is left out.

        Source: RFC 7143 §13.
        """
        keys = {
            "AuthMethod": self.auth_method,
            "HeaderDigest": _digest(self.header_digest),
            "DataDigest": _digest(self.data_digest),
            "MaxRecvDataSegmentLength": str(self.max_recv_data_segment_length),
            "TargetMaxRecvDataSegmentLength": str(self.target_max_recv_data_segment_length),
            "InitialR2T": _yes_no(self.initial_r2t),
            "ImmediateData": _yes_no(self.immediate_data),
            "MaxBurstLength": str(self.max_burst_length),
            "FirstBurstLength": str(self.first_burst_length),
            "MaxOutstandingR2T": str(self.max_outstanding_r2t),
            "DataPDUInOrder": _yes_no(self.data_pdu_in_order),
            "DataSequenceInOrder": _yes_no(self.data_sequence_in_order),
            "DefaultTime2Wait": str(self.default_time2wait),
            "DefaultTime2Retain": str(self.default_time2retain),
            "ErrorRecoveryLevel": str(self.error_recovery_level),
            "MaxConnections": str(self.max_connections),
        }
        if self.target_portal_group_tag is not None:
            keys["TargetPortalGroupTag"] = str(self.target_portal_group_tag)
        if self.target_alias is not None:
            keys["TargetAlias"] = printable(self.target_alias)
        return keys


def _yes_no(value: bool) -> str:
    return "Yes" if value else "No"


def _digest(value: bool) -> str:
    return "CRC32C" if value else "None"
