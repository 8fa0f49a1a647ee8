"""LUNs of every kind, and what becomes of them while they are mounted, against the loopback target.

The target runs in a thread of the test, so that a test can change it; the mount is the real command and the real
kernel. What comes out is compared with the disks themselves, and the target's validator has to be content.
"""

import errno
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from iscsifuse.iscsi.pdu import Opcode
from iscsifuse.mount.assembly import LOOK_EVERY
from iscsifuse.scsi.cdb import Opcode as Scsi
from iscsifuse.scsi.sense import SenseKey
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import Answer
from iscsifuse.testing.config import LoginAttention, TargetConfig
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.outcome import SenseError
from iscsifuse.testing.script import IN, Rule, Script, all_of, cdb, is_a
from iscsifuse.testing.target import LoopbackTarget
from support.cli import Mounted, run_cli
from support.disks import random_file, sha256
from support.ports import wait_until
from support.store import ONE
from support.tgt import TgtServer

pytestmark = pytest.mark.fuse

KIB = 1 << 10
MIB = 1 << 20
SMALL = ("--rw", "-o", "read_ahead=0")
"""A mount that knows of a disk what was asked for."""
TARGET = TargetConfig.of().nodes[0].name


def content(size: int, *, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def disk(data: bytes, *, lun: int = 0, block_length: int = 512, **changes: Any) -> Disk:
    made = Disk.from_bytes(data, lun=lun, block_length=block_length)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@contextmanager
def serving(*disks: Disk, **changes: Any) -> Iterator[LoopbackTarget]:
    """A target with these disks; nothing that the initiator does may be against the standard."""
    config = TargetConfig.of(*disks)
    for name, value in changes.items():
        setattr(config, name, value)
    with LoopbackTarget(config).in_thread() as target:
        yield target
    assert not target.violations, target.violations


def read_direct(path: Path, size: int = 4096, offset: int = 0) -> bytes:
    """Past the kernel's page cache. Also past ours, and so at the target, where nobody has read before."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def error_of(action: Callable[[], object]) -> int:
    try:
        action()
    except OSError as error:
        return error.errno or 0
    return 0


# --- numbers ---


@pytest.mark.conformance(123)
@pytest.mark.conformance(124)
def test_luns_300_and_16383_without_a_lun_0(tmp_path: Path) -> None:
    """Neither is addressed by one byte, and the target knows no LUN 0 that could be asked for the list."""
    data = {number: content(64 * KIB, seed=number) for number in (300, 16383)}
    with serving(*[disk(each, lun=number) for number, each in data.items()]) as target:
        with Mounted(target.url(target=TARGET), tmp_path / "m", "--rw") as mounted:
            assert sorted(path.name for path in mounted.point.iterdir()) == ["lun-16383", "lun-300"]
            for number, each in data.items():
                assert mounted.lun(number).read_bytes() == each
            with mounted.lun(16383).open("r+b") as file:
                file.write(b"here")
        assert target.disk(16383).contents(blocks=1)[:4] == b"here"
        assert target.disk(300).contents() == data[300]
        with Mounted(target.url(lun=300), tmp_path / "one") as mounted:
            assert mounted.lun(300).read_bytes() == data[300]


# --- blocks ---


@pytest.mark.conformance(120)
@pytest.mark.parametrize("write", ["behind", pytest.param("through", marks=pytest.mark.slow)])
def test_blocks_of_520_bytes(tmp_path: Path, write: str) -> None:
    """No page of the kernel's ends where a block ends."""
    blocks = 5000
    model = bytearray(content(blocks * 520))
    chance = random.Random(520)
    with serving(disk(bytes(model), block_length=520)) as target:
        with Mounted(target.url(lun=0), tmp_path / "m", "--rw", "-o", f"write={write}") as mounted:
            assert mounted.lun(0).stat().st_size == len(model)
            assert mounted.lun(0).read_bytes() == model
            with mounted.lun(0).open("r+b", buffering=0) as file:
                for _ in range(200):
                    offset = chance.randrange(len(model))
                    piece = chance.randbytes(min(chance.choice((1, 519, 520, 521, 9000)), len(model) - offset))
                    os.pwrite(file.fileno(), piece, offset)
                    model[offset : offset + len(piece)] = piece
                os.fsync(file.fileno())
            assert mounted.lun(0).read_bytes() == model
        assert target.disk().contents() == model


@pytest.mark.conformance(120)
@pytest.mark.conformance(121)
@pytest.mark.parametrize(
    "options",
    ["write=behind", *(pytest.param(name, marks=pytest.mark.slow) for name in ("write=through", "direct_io"))],
)
def test_unaligned_writes_of_many_threads_on_4096_byte_blocks(tmp_path: Path, options: str) -> None:
    """Neighbours share blocks, and each one's bytes arrive. The disk takes 8 blocks at a time, no more."""
    pieces, length = 400, 1500  # in every block there are bytes of three or four pieces
    model = bytearray(content(pieces * length + 8192))
    of_its_own = content(pieces * length, seed=1)
    with serving(disk(bytes(model), block_length=4096, max_transfer_blocks=8), reorder=7) as target:
        size = target.disk().size
        model.extend(bytes(size - len(model)))
        with Mounted(target.url(lun=0), tmp_path / "m", "--rw", "-o", options) as mounted:
            descriptor = os.open(mounted.lun(0), os.O_RDWR)

            def write_some(number: int) -> None:
                for piece in range(number, pieces, 8):
                    start = piece * length
                    assert os.pwrite(descriptor, of_its_own[start : start + length], start + 37) == length

            threads = [threading.Thread(target=write_some, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os.fsync(descriptor)
            os.close(descriptor)
            model[37 : 37 + len(of_its_own)] = of_its_own
            assert mounted.lun(0).read_bytes() == model
        assert target.disk().contents() == model
        with Mounted(target.url(lun=0), tmp_path / "m") as mounted:
            assert mounted.lun(0).read_bytes() == model
        transfers = [entry for entry in target.ledger if entry.name.startswith(("READ(", "WRITE("))]
        assert max(entry.blocks for entry in transfers) == 8
        assert {entry.status for entry in transfers} == {0}


# --- protected, not ready, damaged ---


@pytest.mark.conformance(116)
@pytest.mark.conformance(126)
def test_a_write_protected_lun_beside_one_that_is_not(tmp_path: Path) -> None:
    data = content(64 * KIB)
    with serving(disk(data, lun=1, write_protected=True), disk(data, lun=2)) as target:
        with Mounted(target.url(target=TARGET), tmp_path / "m", "--rw") as mounted:
            assert [mounted.lun(number).stat().st_mode & 0o777 for number in (1, 2)] == [0o400, 0o600]
            assert error_of(lambda: mounted.lun(1).open("r+b")) == errno.EROFS
            assert mounted.lun(1).read_bytes() == data
            with mounted.lun(2).open("r+b") as file:
                file.write(b"x")
        assert target.disk(1).contents() == data
        assert target.disk(2).contents() == b"x" + data[1:]
        assert not [entry for entry in target.ledger if entry.lun == 1 and entry.name.startswith("WRITE")]


@pytest.mark.conformance(108)
def test_a_lun_that_becomes_ready_is_waited_for(tmp_path: Path) -> None:
    """Asked again after 0.25, 0.5 and 1 s, and ready then."""
    data = content(64 * KIB)
    with serving(disk(data, becoming_ready=3)) as target:
        began = time.monotonic()
        with Mounted(target.url(lun=0), tmp_path / "m") as mounted:
            assert time.monotonic() - began >= 1.75
            assert mounted.lun(0).read_bytes() == data


@pytest.mark.conformance(108)
def test_a_medium_that_is_taken_away_is_no_medium(tmp_path: Path) -> None:
    with serving(disk(content(64 * KIB), lun=1), disk(content(64 * KIB), lun=2, medium_present=False)) as target:
        refused = run_cli("mount", target.url(lun=2), tmp_path)
        assert refused.returncode == 32
        assert "medium not present" in refused.stderr
        with Mounted(target.url(lun=1), tmp_path / "m") as mounted:
            assert len(read_direct(mounted.lun(1))) == 4096
            target.disk(1).medium_present = False
            assert error_of(lambda: read_direct(mounted.lun(1), offset=8192)) == errno.ENOMEDIUM
            target.disk(1).medium_present = True
            assert len(read_direct(mounted.lun(1), offset=8192)) == 4096


@pytest.mark.conformance(111)
@pytest.mark.parametrize(
    "descriptor_sense",
    [pytest.param(False, id="fixed"), pytest.param(True, id="descriptor", marks=pytest.mark.slow)],
)
def test_one_bad_sector_costs_exactly_its_512_bytes(tmp_path: Path, descriptor_sense: bool) -> None:
    """``dd iflag=direct bs=512 conv=noerror,sync``, as an examiner would: zeros in one place, the rest as it is."""
    data = content(MIB)
    copy = tmp_path / "copy"
    bad = disk(data, bad_blocks={1237}, descriptor_sense=descriptor_sense)
    with serving(bad) as target, Mounted(target.url(lun=0), tmp_path / "m") as mounted:
        with pytest.raises(OSError, match="Input/output error"):
            mounted.lun(0).read_bytes()
        done = subprocess.run(
            ["dd", f"if={mounted.lun(0)}", f"of={copy}", "iflag=direct", "bs=512", "conv=noerror,sync"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stderr.count("Input/output error") == 1, done.stderr
        status = mounted.status_file()["commands"]
        assert next(row["errors"] for row in status if row["name"] == "READ(10)") >= 1
    assert copy.read_bytes() == data[: 1237 * 512] + bytes(512) + data[1238 * 512 :]


# --- what changes while it is mounted ---


@pytest.mark.conformance(107)
def test_a_disk_that_grows(tmp_path: Path) -> None:
    """stat(2) tells the new size, and a descriptor that was open before reads to the new end."""
    data = content(MIB)
    with serving(disk(data)) as target, Mounted(target.url(lun=0), tmp_path / "m", *SMALL) as mounted:
        with mounted.lun(0).open("r+b", buffering=0) as file:
            assert file.read(4096) == data[:4096]
            target.call(lambda: target.disk().resize(4096))
            assert mounted.lun(0).stat().st_size == MIB  # nobody has told yet
            read_direct(mounted.lun(0), offset=MIB // 2)
            wait_until(lambda: mounted.lun(0).stat().st_size == 2 * MIB, timeout=5, what="the file to grow")
            rest = bytearray()
            while piece := file.read(MIB):
                rest += piece
            assert rest == data[4096:] + bytes(MIB)
            os.pwrite(file.fileno(), b"the end", 2 * MIB - 7)
        assert target.disk().contents()[-7:] == b"the end"
        assert mounted.status_file()["luns"][0]["size"] == 2 * MIB


@pytest.mark.slow
@pytest.mark.conformance(107)
def test_a_disk_that_grows_while_nobody_uses_it(tmp_path: Path) -> None:
    """Takes as long as until the next look at it (`LOOK_EVERY`)."""
    with serving(disk(content(64 * KIB))) as target, Mounted(target.url(lun=0), tmp_path / "m") as mounted:
        target.call(lambda: target.disk().resize(256))
        wait_until(
            lambda: mounted.lun(0).stat().st_size == 128 * KIB, timeout=LOOK_EVERY + 10, what="the file to grow"
        )


@pytest.mark.conformance(130)
@pytest.mark.parametrize("options", ["write=behind", "direct_io"])
def test_a_disk_that_shrinks(tmp_path: Path, options: str) -> None:
    """What is gone isn't read from any cache, and isn't zeros."""
    data, half = content(2 * MIB), MIB
    with serving(disk(data)) as target, Mounted(target.url(lun=0), tmp_path / "m", *SMALL, "-o", options) as mounted:
        descriptor = os.open(mounted.lun(0), os.O_RDWR)
        for offset in (0, half - 4096, half, half + 8192):
            assert os.pread(descriptor, 4096, offset) == data[offset : offset + 4096]
        target.call(lambda: target.disk().resize(half // 512))
        read_direct(mounted.lun(0), offset=half // 2)  # the target tells
        wait_until(lambda: mounted.lun(0).stat().st_size == half, timeout=5, what="the file to shrink")
        if options == "direct_io":  # else the kernel knows the size, and doesn't ask
            assert error_of(lambda: os.pread(descriptor, 4096, half)) == errno.EIO
            assert error_of(lambda: os.pread(descriptor, 8192, half - 4096)) == errno.EIO
        else:
            assert os.pread(descriptor, 8192, half - 4096) == data[half - 4096 : half]
        assert error_of(lambda: os.pwrite(descriptor, b"x", half)) == errno.ENOSPC
        os.close(descriptor)
        assert mounted.lun(0).read_bytes() == data[:half]


@pytest.mark.conformance(107)
@pytest.mark.parametrize("by_target", [True, False], ids=["portal", "target"])
def test_a_lun_that_appears_becomes_a_file(tmp_path: Path, by_target: bool) -> None:
    """The files that were there keep their inode numbers, and who has them open notices nothing."""
    first, second = content(256 * KIB), content(96 * KIB, seed=2)
    with serving(disk(first, lun=1)) as target:
        url = target.url() if by_target else target.url(target=TARGET)
        with Mounted(url, tmp_path / "m", *SMALL) as mounted:
            name = TARGET if by_target else None
            before, after = mounted.lun(1, target=name), mounted.lun(5, target=name)
            inode = before.stat().st_ino
            with before.open("r+b", buffering=0) as file:
                assert not after.exists()
                target.call(lambda: target.engine().replace(disk(second, lun=5)))
                read_direct(before)
                wait_until(after.exists, timeout=5, what="the new file")
                assert after.read_bytes() == second
                assert sorted(path.name for path in before.parent.iterdir()) == ["lun-1", "lun-5"]
                file.write(b"still there")
            assert before.stat().st_ino == inode
            with after.open("r+b") as file:
                file.write(b"new")
            status = mounted.status_file()
            assert {lun["path"].rpartition("/")[2]: lun["size"] for lun in status["luns"]} == {
                "lun-1": 256 * KIB,
                "lun-5": 96 * KIB,
            }
        assert target.disk(1).contents()[:11] == b"still there"
        assert target.disk(5).contents() == b"new" + second[3:]


def test_in_a_mount_of_one_lun_nothing_appears(tmp_path: Path) -> None:
    with serving(disk(content(64 * KIB), lun=1)) as target, Mounted(target.url(lun=1), tmp_path / "m") as mounted:
        target.call(lambda: target.engine().replace(disk(content(4096), lun=2)))
        target.call(lambda: target.disk(1).resize(256))
        read_direct(mounted.lun(1))
        wait_until(lambda: mounted.lun(1).stat().st_size == 128 * KIB, timeout=5, what="news of the target's")
        assert [path.name for path in mounted.point.iterdir()] == ["lun-1"]
        assert not [entry for entry in target.ledger if entry.name == "REPORT LUNS"][1:]


@pytest.mark.tgt
@pytest.mark.conformance(107)
def test_a_lun_that_tgtd_adds_and_takes_away(tgt_server: TgtServer, tmp_path: Path) -> None:
    """The same with a target that others wrote."""
    first, second = random_file(tmp_path / "1.img", MIB, seed=1), random_file(tmp_path / "2.img", MIB, seed=2)
    tgt_server.add_target(ONE)
    tgt_server.add_lun(ONE, 1, first)
    with Mounted(tgt_server.url(ONE), tmp_path / "m", "-o", "read_ahead=0") as mounted:
        tgt_server.add_lun(ONE, 2, second)
        read_direct(mounted.lun(1))
        wait_until(mounted.lun(2).exists, timeout=LOOK_EVERY + 10, what="the new file")
        assert sha256(mounted.lun(2)) == sha256(second)
        tgt_server.delete_lun(ONE, 1)
        assert error_of(partial(read_direct, mounted.lun(1), offset=512 * KIB)) == errno.EIO
        assert sha256(mounted.lun(2)) == sha256(second)


# --- what a program is told ---


@pytest.mark.parametrize("write", ["behind", pytest.param("through", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("answer", "number"),
    [
        pytest.param(Answer(Status.BUSY), errno.EIO, marks=pytest.mark.conformance(109), id="busy"),
        pytest.param(
            Answer(Status.RESERVATION_CONFLICT), errno.EBUSY, marks=pytest.mark.conformance(110), id="reserved"
        ),
        pytest.param(
            SenseError(SenseKey.DATA_PROTECT, 0x27), errno.EROFS, marks=pytest.mark.conformance(116), id="protected"
        ),
        pytest.param(
            SenseError(SenseKey.DATA_PROTECT, 0x27, 7), errno.ENOSPC, marks=pytest.mark.conformance(116), id="full"
        ),
    ],
)
def test_a_write_that_the_target_refuses(
    tmp_path: Path, answer: Answer | SenseError, number: int, write: str
) -> None:
    """write(2) fails where it waits for the target, else fsync(2); what was there before is there afterwards."""
    if isinstance(answer, SenseError):
        outcome = answer.outcome()
        answer = Answer(outcome.status, outcome.sense)
    data = content(64 * KIB)
    rule = Rule(IN, answer, all_of(is_a(Opcode.SCSI_COMMAND), cdb(Scsi.WRITE_10)), times=0)
    with serving(disk(data), script=Script(rule)) as target:
        options = ("--rw", "-o", f"write={write}", "-o", "timeout=2")
        with Mounted(target.url(lun=0), tmp_path / "m", *options) as mounted:
            descriptor = os.open(mounted.lun(0), os.O_RDWR)
            failed = error_of(partial(os.pwrite, descriptor, b"!" * 4096, 8192))
            if write == "through":
                assert failed == number
                assert error_of(partial(os.fsync, descriptor)) == 0
            else:
                assert failed == 0
                # Busy with what isn't the program's doing any more: an error of input and output.
                assert error_of(partial(os.fsync, descriptor)) == (errno.EIO if number == errno.EBUSY else number)
            os.close(descriptor)
            # Also the kernel forgets what it was given.
            wait_until(lambda: mounted.lun(0).read_bytes() == data, timeout=5, what="the disk's own content")
            told = run_cli("umount", mounted.point)
            assert told.returncode == (0 if write == "through" else 32), told.stderr
        assert target.disk().contents() == data


@pytest.mark.conformance(107)
def test_a_lun_that_disappears_fails_at_once_and_the_others_go_on(tmp_path: Path) -> None:
    data = content(MIB)
    with serving(disk(data, lun=1), disk(data, lun=2)) as target:
        with Mounted(target.url(target=TARGET), tmp_path / "m", *SMALL) as mounted:
            gone, other = mounted.lun(1), mounted.lun(2)
            with gone.open("rb") as file:
                assert file.read(4096) == data[:4096]
            was = target.disk(1)
            target.call(lambda: target.engine().remove(1))
            began = time.monotonic()
            for offset in (512 * KIB, 512 * KIB, 0):  # what was in memory is gone with it
                assert error_of(partial(read_direct, gone, offset=offset)) == errno.EIO
            wait_until(lambda: error_of(gone.read_bytes) == errno.EIO, timeout=5, what="the pages to be dropped")
            assert time.monotonic() - began < 10  # and not reconnect_timeout
            assert read_direct(other, offset=512 * KIB) == data[512 * KIB :][:4096]
            with other.open("r+b") as file:
                file.write(b"y")
            # It comes back, as the same disk, and works again.
            target.call(lambda: target.engine().replace(was))
            wait_until(lambda: error_of(lambda: read_direct(gone)) == 0, timeout=20, what="the disk to be back")
            assert gone.read_bytes() == data
        assert target.disk(2).contents()[:1] == b"y"


@pytest.mark.conformance(107)
def test_another_disk_under_the_same_number_gets_nothing(tmp_path: Path) -> None:
    mine, other = content(64 * KIB), content(64 * KIB, seed=9)
    with serving(disk(mine, lun=1)) as target, Mounted(target.url(target=TARGET), tmp_path / "m", "--rw") as mounted:
        assert mounted.lun(1).read_bytes() == mine
        target.call(lambda: target.engine().replace(disk(other, lun=1, serial="ANOTHER")))
        with pytest.raises(OSError, match="Input/output error"), mounted.lun(1).open("r+b") as file:
            file.write(b"!" * 4096)
        assert error_of(lambda: read_direct(mounted.lun(1))) == errno.EIO
        told = run_cli("umount", mounted.point)
        assert (told.returncode, told.stderr.count("another disk answers where LUN 1")) == (32, 1)
        assert target.disk(1).contents() == other


# --- a target that comes back before its disks do ---


@pytest.mark.conformance(99)
def test_a_lun_that_is_back_later_than_its_portal_is_waited_for(tmp_path: Path) -> None:
    """Nobody gets an error, neither who waits nor who comes meanwhile; the other LUN isn't held up."""
    data = content(256 * KIB)
    with serving(disk(data, lun=1), disk(data, lun=2), login_attention=LoginAttention.POWER_ON) as target:
        url = target.url(target=TARGET)
        with Mounted(url, tmp_path / "m", "--rw") as mounted:
            results: list[object] = []

            def read(lun: int, offset: int) -> None:
                try:
                    results.append(read_direct(mounted.lun(lun), offset=offset) == data[offset : offset + 4096])
                except OSError as error:
                    results.append(error)

            def restart() -> Disk:
                was = target.engine().disks.pop(1)
                target.drop_connections()
                return was

            was = target.call(restart)
            readers = [threading.Thread(target=read, args=(1, number * 4096)) for number in range(4)]
            for reader in readers:
                reader.start()
            read(2, 0)
            assert results == [True]
            logins = mounted.status_file()["sessions"][0]["reconnects"]
            assert logins == 1
            target.call(lambda: target.engine().replace(was))
            for reader in readers:
                reader.join()
            assert results == [True] * 5


@pytest.mark.conformance(105)
def test_a_lun_that_never_comes_back_is_given_up_in_time(tmp_path: Path) -> None:
    data = content(64 * KIB)
    options = ("--rw", "-o", "reconnect_timeout=3")
    with serving(disk(data, lun=1), disk(data, lun=2)) as target:
        mounted = Mounted(target.url(target=TARGET), tmp_path / "m", *options)

        def restart() -> None:
            del target.engine().disks[1]
            target.drop_connections()

        with mounted:
            target.call(restart)
            began = time.monotonic()
            assert error_of(lambda: read_direct(mounted.lun(1))) == errno.EIO
            assert time.monotonic() - began >= 2
            began = time.monotonic()
            assert error_of(lambda: read_direct(mounted.lun(1))) == errno.EIO  # and later ones at once
            assert time.monotonic() - began < 2
            assert read_direct(mounted.lun(2)) == data[:4096]
