"""Case B10 as a user meets it: a mount of a target that floods it can be read as far as possible, and taken down."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from iscsifuse.iscsi.pdu import Opcode
from iscsifuse.scsi.sense import Sense, SenseKey
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import Action, Answer
from iscsifuse.testing.config import TargetConfig
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, Rule, all_of, cdb, is_a
from iscsifuse.testing.target import LoopbackTarget
from support.cli import is_mounted, run_cli

pytestmark = pytest.mark.fuse

SIZE = 4 << 20
CONTENT = bytes(range(256)) * (SIZE // 256)
READ = all_of(cdb(0x28, 0x88), is_a(Opcode.SCSI_COMMAND))
ATTENTION = Sense(key=SenseKey.UNIT_ATTENTION, asc=0x29, ascq=0).encode()


@pytest.fixture
def target() -> Iterator[LoopbackTarget]:
    with LoopbackTarget(TargetConfig.of(Disk.from_bytes(CONTENT))).in_thread() as served:
        yield served


@pytest.fixture
def file(target: LoopbackTarget, tmp_path: Path) -> Iterator[Path]:
    """The disk as a file; at the end it is unmounted, promptly whatever the target does."""
    point = tmp_path / "disk.img"
    point.touch()
    mounted = run_cli("mount", target.url(lun=0), point, "-o", "timeout=3,read_ahead=0,reconnect_timeout=5")
    assert mounted.returncode == 0, mounted.stderr
    yield point
    began = time.monotonic()
    unmounted = run_cli("umount", point)
    assert time.monotonic() - began < 15
    assert unmounted.returncode == 0, unmounted.stderr
    assert not is_mounted(point)


def _read(file: Path, *, offset: int) -> bytes:
    with file.open("rb", buffering=0) as opened:
        return os.pread(opened.fileno(), 65536, offset)


@pytest.mark.conformance("B10")
def test_floods_of_pings_leave_a_mount_usable(target: LoopbackTarget, file: Path) -> None:
    """A ping every moment, as fast as it goes → the file can be read, and unmounted."""

    def flood() -> None:
        target.config.nop_interval = 1e-6

    target.call(flood)
    target.call(target.drop_connections)  # the next session pings so
    for number in range(16):
        offset = number << 18
        assert _read(file, offset=offset) == CONTENT[offset : offset + 65536]
    assert target.logins >= 2


@pytest.mark.conformance("B10")
@pytest.mark.parametrize(
    "answer",
    [Answer(Status.BUSY), Answer(Status.CHECK_CONDITION, ATTENTION)],
    ids=["BUSY", "UNIT ATTENTION"],
)
def test_floods_of_statuses_end_in_an_error(target: LoopbackTarget, file: Path, answer: Action) -> None:
    """BUSY or UNIT ATTENTION for ever → EIO within a few deadlines, and it can be unmounted."""
    assert _read(file, offset=0) == CONTENT[:65536]
    target.call(lambda: target.script.add(Rule(IN, answer, READ, times=0)))
    began = time.monotonic()
    with pytest.raises(OSError, match=r"Input/output error") as caught:
        _read(file, offset=1 << 20)
    assert caught.value.errno == 5
    assert time.monotonic() - began < 30
