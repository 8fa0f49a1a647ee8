"""The status document: what a mount tells of itself, to ``status.json`` and to ``iscsifuse status``.

Everything in it is JSON, in SI units (seconds, bytes), and free of secrets. ``schema`` goes up when a key changes its
meaning or goes away, not when one is added.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from iscsifuse import __version__
from iscsifuse.cache import CacheStats
from iscsifuse.initiator.statistics import CommandStatistics
from iscsifuse.mount.plan import MountPlan
from iscsifuse.mount.tree import Disk, Tree

__all__ = ["SCHEMA", "SessionReporter", "StatusReport", "cache_totals", "command_rows"]

SCHEMA = 1

_SHARED = frozenset({"pool_bytes", "evictions"})
"""Counters of the pool, which every LUN tells alike."""
_CACHE_NAMES = {
    "pool_bytes": "size",
    "cached_bytes": "used",
    "dirty_bytes": "dirty",
    "unsynced_bytes": "unsynced",
    "losses": "disk_resets",
}


class SessionReporter(Protocol):
    """Something with a session to tell of; a Nexus."""

    def report(self) -> Mapping[str, object]:
        """State, JSON-able."""
        ...


def command_rows(statistics: CommandStatistics) -> list[dict[str, object]]:
    """Service response times: a row for each kind of command; seconds, or None where nothing was timed."""
    return [
        {
            "name": row.name,
            "opcode": row.opcode,
            "calls": row.calls,
            "errors": row.errors,
            "lost": row.lost,
            "bytes": row.bytes,
            "min": row.minimum if row.calls else None,
            "avg": row.average if row.calls else None,
            "max": row.maximum if row.calls else None,
        }
        for row in statistics.rows()
    ]


def cache_totals(stats: Iterable[CacheStats]) -> dict[str, int]:
    """The caches of all LUNs together: size, used, dirty, and the sums of all counters."""
    totals: dict[str, int] = {
        _CACHE_NAMES.get(counter.name, counter.name): 0 for counter in dataclasses.fields(CacheStats)
    }
    for one in stats:
        for name, value in dataclasses.asdict(one).items():
            key = _CACHE_NAMES.get(name, name)
            totals[key] = max(totals[key], value) if name in _SHARED else totals[key] + value
    return totals


@dataclass(slots=True, kw_only=True)
class StatusReport:
    """Makes the status document of one mount.

    Attributes:
        plan: what was asked for.
        tree: the files.
        sessions: one for each target.
        statistics: of all sessions together.
        stop_timeout: seconds that the daemon needs at most to end after it was unmounted.
        details: more of a disk: vendor, serial number ...
    """

    plan: MountPlan
    tree: Tree
    sessions: Iterable[SessionReporter]
    statistics: CommandStatistics
    stop_timeout: float
    details: Mapping[Disk, Mapping[str, object]] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def document(self) -> dict[str, object]:
        """The document, as of now."""
        disks = list(self.tree.paths.items())
        return {
            "schema": SCHEMA,
            "pid": os.getpid(),
            "version": __version__,
            "source": self.plan.source,
            "mountpoint": str(self.plan.mountpoint),
            "read_write": self.plan.read_write,
            "write": "behind" if self.plan.write_behind else "through",
            "direct_io": self.plan.direct_io,
            "started": self.started,
            "stop_timeout": self.stop_timeout,
            "sessions": [session.report() for session in self.sessions],
            "luns": [self._lun(disk, path) for disk, path in disks],
            "cache": cache_totals(disk.file.stats() for disk, _ in disks),
            "commands": command_rows(self.statistics),
        }

    def _lun(self, disk: Disk, path: str) -> dict[str, object]:
        return {
            "target": disk.target,
            "lun": disk.lun,
            "path": path,
            "size": disk.file.size,
            "writable": disk.writable,
            **self.details.get(disk, {}),
            "cache": {
                name: value for name, value in dataclasses.asdict(disk.file.stats()).items() if name not in _SHARED
            },
        }

    def as_json(self) -> bytes:
        """The document as the text of ``status.json``."""
        return json.dumps(self.document(), indent=2, default=str).encode() + b"\n"
