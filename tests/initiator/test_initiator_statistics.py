import pytest
from initiator_kit import LUN_0, config_of, open_session, serving, settings_of

from iscsifuse.errors import CommandTimeoutError, SessionLostError
from iscsifuse.initiator.statistics import CommandStatistics
from iscsifuse.iscsi.tasks import Task
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import Answer, Close, Late
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, Rule
from iscsifuse.testing.script import cdb as has_cdb


def test_statistics_a_row_adds_up() -> None:
    table = CommandStatistics()
    row = table.row("READ(10)", opcode=0x28)
    assert row.average == 0.0
    for status, moved, seconds in ((Status.GOOD, 512, 0.2), (Status.BUSY, 0, 0.4)):
        task = Task(cdbs.read(lba=0, blocks=1), lun=LUN_0)
        task.started = 7.0
        task.received = moved
        task.finish(status=status, residual=0, underflow=False, overflow=False)
        table.count(task, 7.0 + seconds)
    assert (row.calls, row.errors, row.bytes) == (2, 1, 512)
    assert [row.minimum, row.maximum] == pytest.approx([0.2, 0.4])
    assert row.average == pytest.approx(0.3)


def test_statistics_rows_are_made_once_and_ordered() -> None:
    table = CommandStatistics()
    write = table.row("WRITE(10)", opcode=0x2A)
    table.row("READ(10)", opcode=0x28)
    table.row("GET LBA STATUS", opcode=0x9E)
    table.row("READ CAPACITY(16)", opcode=0x9E)
    assert table.row("WRITE(10)", opcode=0x2A) is write
    assert [row.name for row in table.rows()] == ["READ(10)", "WRITE(10)", "GET LBA STATUS", "READ CAPACITY(16)"]


async def test_statistics_of_a_session() -> None:
    statistics = CommandStatistics()
    config = config_of(Disk(blocks=64, thin=True))
    async with serving(config) as target, open_session(target, statistics=statistics) as session:
        buffer = memoryview(bytearray(1024))
        for _ in range(3):
            await session.execute(cdbs.read(lba=0, blocks=2), lun=LUN_0, buffer_in=buffer, exact=True)
        await session.execute(cdbs.write(lba=1, blocks=1), lun=LUN_0, buffer_out=buffer[:512])
        target.script.add(Rule(IN, match=has_cdb(0x28), action=Answer(Status.BUSY)))
        await session.execute(cdbs.read(lba=0, blocks=2), lun=LUN_0, buffer_in=buffer, exact=True)
        small = memoryview(bytearray(32))
        await session.execute(cdbs.read_capacity_16(), lun=LUN_0, buffer_in=small)
        await session.execute(cdbs.get_lba_status(lba=0, allocation_length=32), lun=LUN_0, buffer_in=small)
    rows = {row.name: row for row in statistics.rows()}
    assert set(rows) == {"READ(10)", "WRITE(10)", "READ CAPACITY(16)", "GET LBA STATUS"}
    read = rows["READ(10)"]
    assert (read.calls, read.errors, read.lost, read.bytes) == (4, 1, 0, 3 * 1024)
    assert 0 < read.minimum <= read.average <= read.maximum < 1
    assert (rows["WRITE(10)"].calls, rows["WRITE(10)"].bytes) == (1, 512)


async def test_statistics_lost_commands_are_no_calls() -> None:
    statistics = CommandStatistics()
    config = config_of(Disk(blocks=64))
    config.script.add(Rule(IN, match=has_cdb(0x28), action=Close()))
    async with serving(config) as target, open_session(target, statistics=statistics) as session:
        with pytest.raises(SessionLostError):
            await session.execute(cdbs.read(lba=0, blocks=1), lun=LUN_0, buffer_in=memoryview(bytearray(512)))
    (row,) = statistics.rows()
    assert (row.calls, row.errors, row.lost, row.bytes) == (0, 0, 1, 0)


@pytest.mark.expect_log("aborting it")
async def test_statistics_timed_out_commands_are_no_calls() -> None:
    statistics = CommandStatistics()
    config = config_of(Disk(blocks=64))
    config.script.add(Rule(IN, match=has_cdb(0x28), action=Late(60)))
    settings = settings_of(timeout=0.1)
    async with serving(config) as target, open_session(target, settings, statistics=statistics) as session:
        with pytest.raises(CommandTimeoutError):
            await session.execute(cdbs.read(lba=0, blocks=1), lun=LUN_0, buffer_in=memoryview(bytearray(512)))
    (row,) = statistics.rows()
    assert (row.calls, row.lost) == (0, 1)
