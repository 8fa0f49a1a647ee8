"""The status document."""

import json
import os
from dataclasses import replace
from pathlib import Path

from mount_fakes import MemoryFile

from iscsifuse.errors import SessionLostError
from iscsifuse.initiator.settings import Portal, SessionSettings
from iscsifuse.initiator.statistics import CommandStatistics
from iscsifuse.iscsi.tasks import Task
from iscsifuse.mount.plan import MountPlan
from iscsifuse.mount.report import StatusReport, cache_totals, command_rows
from iscsifuse.mount.tree import Disk, Permissions, Tree
from iscsifuse.scsi import cdb as cdbs

TARGET = "iqn.2004-04.com.example:one"
PLAN = MountPlan(
    source="iscsi://san/",
    portal=Portal("san"),
    target_name=TARGET,
    lun=None,
    mountpoint=Path("/mnt/san"),
    session=SessionSettings(initiator_name="iqn.2004-04.com.example:us"),
    read_write=True,
)


class Session:
    def report(self) -> dict[str, object]:
        return {"target": TARGET, "since": 1.5, "place": Path("/x")}


def report() -> StatusReport:
    disks = [Disk(TARGET, lun, MemoryFile(), writable=True) for lun in (1, 2)]
    tree = Tree.of_directory(disks, Permissions(uid=0, gid=0), by_target=False)
    statistics = CommandStatistics()
    for status, seconds in ((0, 0.5), (2, 1.5)):
        task = Task(cdbs.read(lba=0, blocks=1), lun=bytes(8))
        task.received = 0 if status else 100
        task.finish(status=status, residual=0, underflow=False, overflow=False)
        statistics.count(task, seconds)
    lost = Task(cdbs.write(lba=0, blocks=1), lun=bytes(8))
    lost.fail(SessionLostError("gone"))
    statistics.count(lost, 1.0)
    return StatusReport(
        plan=PLAN,
        tree=tree,
        sessions=[Session()],
        statistics=statistics,
        stop_timeout=9,
        details={disks[0]: {"vendor": "IET"}},
        started=123.0,
    )


def test_document() -> None:
    document = json.loads(report().as_json())
    assert document["schema"] == 1
    assert (document["pid"], document["source"], document["mountpoint"]) == (os.getpid(), "iscsi://san/", "/mnt/san")
    assert (document["read_write"], document["write"], document["started"]) == (True, "behind", 123.0)
    assert document["sessions"] == [{"target": TARGET, "since": 1.5, "place": "/x"}]
    first, second = document["luns"]
    assert (first["path"], first["lun"], first["size"], first["vendor"]) == ("lun-1", 1, 4096, "IET")
    assert "vendor" not in second
    assert first["cache"]["hits"] == 3
    assert "pool_bytes" not in first["cache"]
    assert (document["cache"]["size"], document["cache"]["dirty"], document["cache"]["evictions"]) == (1000, 14, 2)


def test_write_through_is_told() -> None:
    made = report()
    made.plan = replace(PLAN, write_behind=False)
    assert made.document()["write"] == "through"


def test_times_are_none_where_there_were_no_calls() -> None:
    read, write = command_rows(report().statistics)
    assert read == {
        "name": "READ(10)",
        "opcode": 0x28,
        "calls": 2,
        "errors": 1,
        "lost": 0,
        "bytes": 100,
        "min": 0.5,
        "avg": 1.0,
        "max": 1.5,
    }
    assert (write["calls"], write["lost"], write["min"], write["avg"], write["max"]) == (0, 1, None, None, None)


def test_no_caches_no_totals() -> None:
    assert set(cache_totals([]).values()) == {0}
