"""All that a mount needs to know, as one value: what the command line fills in and the daemon carries out."""

from dataclasses import dataclass, field
from pathlib import Path

from iscsifuse.initiator.settings import Portal, SessionSettings

__all__ = ["MountPlan"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MountPlan:
    """One mount.

    Attributes:
        source: the URL without its password, for /proc/mounts, logs and messages.
        portal: where to log in, or to discover.
        target_name: one target, or None for every target that the portal offers.
        lun: one LUN of that target, or None for every disk.
        luns: the ``lun=`` list: only these numbers are mounted; empty means all.
        mountpoint: an absolute path: an empty directory, or a regular file where the URL names one LUN.
        session: how to log in.
        read_write: whether the disks may be written to.
        foreground: stay in front.
        allow_other: let other users use the mount.
        uid: owner of the files, or None for the user who mounts.
        gid: group of the files, or None.
        mode: permission bits of the files, or None for 0400 (0600 where writable).
        cache_size: bytes that all block caches of the mount may use together.
        read_ahead: bytes of the largest read-ahead window; 0 for none.
        write_behind: acknowledge writes from memory (True) or after the target's status.
        direct_io: no caching at all, in the kernel or here.
        verbosity: 0, 1 (-v) or 2 (-vv).
    """

    source: str
    portal: Portal
    target_name: str | None
    lun: int | None
    mountpoint: Path
    session: SessionSettings
    luns: tuple[int, ...] = field(default=())
    read_write: bool = False
    foreground: bool = False
    allow_other: bool = False
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    cache_size: int = 64 * MIB
    read_ahead: int = 8 * MIB
    write_behind: bool = True
    direct_io: bool = False
    verbosity: int = 0
