"""What a user may set about sessions, as values. No policy here: who reads them says what they do."""

from dataclasses import dataclass, field

from iscsifuse.iscsi.chap import ChapCredentials

__all__ = ["DEFAULT_PORT", "DiscoveredTarget", "Portal", "SessionSettings", "TargetPortal"]

DEFAULT_PORT = 3260


@dataclass(frozen=True, slots=True)
class Portal:
    """Where a target listens.

    Attributes:
        host: a host name, an IPv4 address, or an IPv6 address without brackets.
        port: TCP port.
        tag: the target portal group that discovery or a redirection said it belongs to, or None; two portals are
            the same whatever their tags.
    """

    host: str
    port: int = DEFAULT_PORT
    tag: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class TargetPortal:
    """One TargetAddress of a discovered target. Source: RFC 7143 §13.8.

    Attributes:
        portal: where it listens.
        tag: target portal group tag, 0..65535.
    """

    portal: Portal
    tag: int

    def __str__(self) -> str:
        return f"{self.portal},{self.tag}"


@dataclass(frozen=True, slots=True)
class DiscoveredTarget:
    """One TargetName of a SendTargets answer, with its portals in the order in which they came."""

    name: str
    portals: tuple[TargetPortal, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """How to log in, and how long to wait for things.

    Attributes:
        initiator_name: an iSCSI name (iqn., eui., naa.).
        header_digest: whether CRC32C is asked for on headers.
        data_digest: whether CRC32C is asked for on data segments.
        chap: credentials, or None to log in without authentication.
        timeout: seconds that one SCSI command may take on a living session.
        login_timeout: seconds for one attempt to connect and log in.
        reconnect_timeout: seconds that I/O waits for a lost session; 0 fails at once, negative waits for ever.
        read_only: hold back every command that could change the medium.
    """

    initiator_name: str
    header_digest: bool = False
    data_digest: bool = False
    chap: ChapCredentials | None = field(default=None, repr=False)
    timeout: float = 60.0
    login_timeout: float = 15.0
    reconnect_timeout: float = 120.0
    read_only: bool = True
