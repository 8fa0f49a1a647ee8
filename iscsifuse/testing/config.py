"""What to serve, as values. Anything here can be left at its default but the targets.

Lengths are bytes, times seconds.
"""

from dataclasses import dataclass, field
from enum import Enum

from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import Script

__all__ = [
    "DEFAULT_TARGET_NAME",
    "ChapPolicy",
    "LoginAttention",
    "Redirect",
    "TargetConfig",
    "TargetKeys",
    "TargetNode",
]

DEFAULT_TARGET_NAME = "iqn.2026-11.io.github.iscsifuse:demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetKeys:
    """What this target says about the operational keys. Source: RFC 7143 §13.

    Attributes:
        header_digests: values of HeaderDigest that it takes.
        data_digests: values of DataDigest that it takes.
        initial_r2t: it wants InitialR2T=Yes.
        immediate_data: it takes ImmediateData=Yes.
        max_burst_length: its MaxBurstLength.
        first_burst_length: its FirstBurstLength.
        max_outstanding_r2t: its MaxOutstandingR2T.
        max_recv_data_segment_length: what it declares, or None to declare nothing (8192 then).
        default_time2wait: its DefaultTime2Wait.
        default_time2retain: its DefaultTime2Retain.
        alias: its TargetAlias, or empty.
        extra: pairs to put into its first operational answer, answers to them aren't looked at.
    """

    header_digests: tuple[str, ...] = ("None", "CRC32C")
    data_digests: tuple[str, ...] = ("None", "CRC32C")
    initial_r2t: bool = False
    immediate_data: bool = True
    max_burst_length: int = 1048576
    first_burst_length: int = 262144
    max_outstanding_r2t: int = 4
    max_recv_data_segment_length: int | None = 262144
    default_time2wait: int = 2
    default_time2retain: int = 0
    alias: str = ""
    extra: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChapPolicy:
    """Who may log in.

    Attributes:
        users: secret by name.
        target_name: CHAP_N of the target, for the other direction.
        target_secret: its secret; without one it doesn't prove who it is.
        algorithms: those it knows: 5 MD5, 6 SHA1, 7 SHA-256, 8 SHA3-256.
        required: False lets those in who offer AuthMethod=None only.
        challenge_length: bytes of CHAP_C.
        base64: binary values are sent in base64, not in hexadecimal digits.
    """

    users: dict[str, bytes] = field(repr=False)
    target_name: str = "target"
    target_secret: bytes = field(default=b"", repr=False)
    algorithms: tuple[int, ...] = (5, 6, 7, 8)
    required: bool = True
    challenge_length: int = 24
    base64: bool = False


@dataclass(frozen=True, slots=True)
class Redirect:
    """Where a login is sent instead.

    Attributes:
        address: value of TargetAddress: "host", "host:port" or "host:port,tag".
        permanent: 0102 instead of 0101.
        times: how many logins are redirected; 0 is all of them.
        after_chap: only once the initiator has proved who it is.
    """

    address: str
    permanent: bool = False
    times: int = 0
    after_chap: bool = False


@dataclass(slots=True, kw_only=True)
class TargetNode:
    """One target.

    Attributes:
        name: its iSCSI name.
        disks: its logical units.
        tag: target portal group tag.
        addresses: values of TargetAddress that discovery tells; None is the portals that it is really served on.
        chap: who may log in, or None for the policy of the whole configuration.
        redirect: where logins are sent, or None.
    """

    name: str = DEFAULT_TARGET_NAME
    disks: list[Disk] = field(default_factory=list)
    tag: int = 1
    addresses: tuple[str, ...] | None = None
    chap: ChapPolicy | None = None
    redirect: Redirect | None = None


class LoginAttention(Enum):
    """The unit attention that a new session finds. Source: SAM-5 §5.14, §6.3.

    Attributes:
        STANDARD: power on (29/00) for the first session of an initiator port, nexus loss (29/07) for later ones.
        POWER_ON: power on at every login.
        NONE: none.
    """

    STANDARD = "standard"
    POWER_ON = "power on"
    NONE = "none"


@dataclass(slots=True, kw_only=True)
class TargetConfig:
    """A whole loopback target.

    Attributes:
        nodes: the targets.
        hosts: addresses to listen on.
        port: TCP port of all of them; 0 is a free one.
        keys: the operational keys.
        chap: who may log in, discovery included; None for anybody.
        script: the faults.
        window: commands that may be outstanding in a session.
        initial_stat_sn: of each connection.
        status_in_data: GOOD status of a read comes in its last Data-In.
        reverse_r2t: R2Ts of a command go out last piece first (it still honours MaxOutstandingR2T).
        reorder: a seed; commands that are ready are executed in random order. None is first come, first served.
        latency: seconds that every SCSI command takes at least; commands wait side by side.
        text_chunk: bytes of one Text Response at most; 0 is what the initiator takes.
        login_chunk: bytes of one Login Response at most; a longer text travels in pieces, with C=1.
        login_keys: keys in one Login Response at most; the others follow in the next ones, and T=1 with the last.
            0 is all at once.
        login_attention: the unit attention of a new session.
        nop_interval: seconds between pings to an initiator; 0 is none.
        record: keep a ledger of what was executed (it grows without end).
        hash_data: with a hash of the data.
    """

    nodes: list[TargetNode]
    hosts: tuple[str, ...] = ("127.0.0.1",)
    port: int = 0
    keys: TargetKeys = field(default_factory=TargetKeys)
    chap: ChapPolicy | None = None
    script: Script = field(default_factory=Script)
    window: int = 128
    initial_stat_sn: int = 1
    status_in_data: bool = True
    reverse_r2t: bool = False
    reorder: int | None = None
    latency: float = 0.0
    text_chunk: int = 0
    login_chunk: int = 8192
    login_keys: int = 0
    login_attention: LoginAttention = LoginAttention.STANDARD
    nop_interval: float = 0.0
    record: bool = True
    hash_data: bool = False

    @classmethod
    def of(cls, *disks: Disk, name: str = DEFAULT_TARGET_NAME, keys: TargetKeys | None = None) -> "TargetConfig":
        """One target with these disks."""
        return cls(nodes=[TargetNode(name=name, disks=list(disks))], keys=keys or TargetKeys())
