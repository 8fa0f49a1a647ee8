"""Every exception that iscsifuse raises on purpose.

::

    IscsifuseError                      EIO
     ├── UsageError                     EINVAL   what the user typed can't be meant
     │    ├── UrlError
     │    └── SecretError               EACCES   a secret is missing, unreadable or readable by others
     ├── ConnectError                   EHOSTUNREACH  no TCP connection to the portal
     ├── LoginError                     ECONNREFUSED  the target, or we, ended the login phase
     │    ├── LoginTimeoutError         ETIMEDOUT
     │    ├── AuthenticationError       EACCES   CHAP failed, in either direction
     │    │    └── NoChapError          EACCES   ... the target doesn't do CHAP at all
     │    └── NothingFoundError         ENOENT   no such target, no such LUN, no disk at all
     ├── ProtocolError                  EPROTO   the other side broke RFC 7143
     │    ├── FormatError                        a PDU or a text key can't be parsed
     │    ├── NegotiationError                   a key's answer lies outside the offer
     │    └── DigestError                        CRC32C of a header or a data segment is wrong
     ├── SessionLostError               EIO      the session ended under a command; it may be replayed
     ├── CommandTimeoutError            EIO      a command's deadline passed
     ├── ParameterDataError             EIO      SCSI parameter data (INQUIRY, VPD ...) can't be used
     ├── CommandError                   (varies) a SCSI command ended with a status other than GOOD
     │    ├── MediumError               EIO      ... one block of the medium is bad; knows which
     │    ├── DataProtectError          EROFS    ... the medium is write-protected
     │    ├── NoSpaceError              ENOSPC   ... a thin provisioned disk is full
     │    ├── NoMediumError             ENOMEDIUM
     │    └── ReservationConflictError  EBUSY
     ├── TransferError                  EIO      GOOD status, but not every byte was moved
     ├── ReadOnlyError                  EROFS    a command that could change the medium was held back
     ├── IdentityError                  EIO      another disk answers where the mounted one was
     ├── WriteBackError                 EIO      a write that was acknowledged could not be completed
     └── MountError                     EIO      FUSE, the mount point or the daemon failed

``errno`` is what a caller of read(2) or write(2) sees; ``exit_code`` is what a command other than
``mount`` and ``umount`` ends with (those two have mount(8)'s bits).
"""

import errno as _errno
from typing import ClassVar

__all__ = [
    "AuthenticationError",
    "CommandError",
    "CommandTimeoutError",
    "ConnectError",
    "DataProtectError",
    "DigestError",
    "FormatError",
    "IdentityError",
    "IscsifuseError",
    "LoginError",
    "LoginTimeoutError",
    "MediumError",
    "MountError",
    "NegotiationError",
    "NoChapError",
    "NoMediumError",
    "NoSpaceError",
    "NothingFoundError",
    "ParameterDataError",
    "ProtocolError",
    "ReadOnlyError",
    "ReservationConflictError",
    "SecretError",
    "SessionLostError",
    "TransferError",
    "UrlError",
    "UsageError",
    "WriteBackError",
]


class IscsifuseError(Exception):
    """Anything that iscsifuse reports. Its text is one sentence a user can act on."""

    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 2


class UsageError(IscsifuseError):
    """What the user typed can't be meant: an option, a URL, a mount point."""

    errno = _errno.EINVAL
    exit_code = 1


class UrlError(UsageError):
    """A URL that doesn't follow ``iscsi://[user[%password]@]host[:port]/[target[/lun]][?key=value]``."""


class SecretError(UsageError):
    """A secret that is missing, unreadable, or lies in a file that others can read."""

    errno = _errno.EACCES


class ConnectError(IscsifuseError):
    """No TCP connection to the portal: unknown host, refused, unreachable, too slow."""

    errno = _errno.EHOSTUNREACH
    exit_code = 4


class LoginError(IscsifuseError):
    """The login phase ended without a session.

    Attributes:
        status: Status-Class and Status-Detail as one number (0x0201), or None where it wasn't the target that
            said no. Source: RFC 7143 §11.13.5.
    """

    errno = _errno.ECONNREFUSED
    exit_code = 5

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class LoginTimeoutError(LoginError):
    """The login phase took longer than ``login_timeout``."""

    errno = _errno.ETIMEDOUT


class AuthenticationError(LoginError):
    """CHAP failed: the target refused us, or it could not prove who it is."""

    errno = _errno.EACCES
    exit_code = 24


class NoChapError(AuthenticationError):
    """The target answered our CHAP with something else, such as AuthMethod=None."""


class NothingFoundError(LoginError):
    """No such target, no such LUN, or no disk among the LUNs."""

    errno = _errno.ENOENT
    exit_code = 21


class ProtocolError(IscsifuseError):
    """The other side broke RFC 7143; nothing that it sends on this connection is trusted any more."""

    errno = _errno.EPROTO
    exit_code = 5


class FormatError(ProtocolError):
    """A PDU, or a text key inside one, that can't be parsed. Source: RFC 7143 §7.7."""


class NegotiationError(ProtocolError):
    """An answer that lies outside of what was offered. Source: RFC 7143 §6.2."""


class DigestError(ProtocolError):
    """A CRC32C that doesn't match. Source: RFC 7143 §7.8.

    Attributes:
        header: True for the header digest (the stream can't be followed any more), False for a data digest.
    """

    def __init__(self, message: str, *, header: bool) -> None:
        super().__init__(message)
        self.header = header


class SessionLostError(IscsifuseError):
    """The session ended before a command's status came; whether the target executed it is unknown."""


class CommandTimeoutError(IscsifuseError):
    """A command, or the re-establishment of its session, took longer than its deadline."""


class ParameterDataError(IscsifuseError):
    """Parameter data of a SCSI command (INQUIRY, VPD, READ CAPACITY ...) that can't be used."""


class CommandError(IscsifuseError):
    """A SCSI command that ended with a status other than GOOD and was not worth, or not cured by, a retry.

    Attributes:
        status: the SAM status byte.
        sense_key: of the sense data, or None where there was none.
        asc: additional sense code, or None.
        ascq: additional sense code qualifier, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        sense_key: int | None = None,
        asc: int | None = None,
        ascq: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.sense_key = sense_key
        self.asc = asc
        self.ascq = ascq


class MediumError(CommandError):
    """A block that can't be read or written.

    Attributes:
        lba: the first bad block, or None where the target didn't say.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        sense_key: int | None = None,
        asc: int | None = None,
        ascq: int | None = None,
        lba: int | None = None,
    ) -> None:
        super().__init__(message, status=status, sense_key=sense_key, asc=asc, ascq=ascq)
        self.lba = lba


class DataProtectError(CommandError):
    """The medium is write-protected (27h/00h)."""

    errno = _errno.EROFS


class NoSpaceError(CommandError):
    """A thin provisioned disk has no space left (27h/07h)."""

    errno = _errno.ENOSPC


class NoMediumError(CommandError):
    """There is no medium in the device (3Ah)."""

    errno = _errno.ENOMEDIUM


class ReservationConflictError(CommandError):
    """Another initiator holds a reservation."""

    errno = _errno.EBUSY


class TransferError(IscsifuseError):
    """GOOD status, but the target did not move every byte that the command asked for."""


class ReadOnlyError(IscsifuseError):
    """A command that could change the medium was held back, because the session is read-only."""

    errno = _errno.EROFS


class IdentityError(IscsifuseError):
    """Another disk, or a disk of another size, answers where the mounted one was."""


class WriteBackError(IscsifuseError):
    """A write that was acknowledged before could not be completed; its data did not reach the disk."""


class MountError(IscsifuseError):
    """FUSE, the mount point or the daemon failed."""
