"""fio writes and verifies, Wireshark listens, and both agree with the backing file and with our own statistics."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.capture import Capture
from support.cli import Mounted
from support.disks import sha256
from support.ports import wait_until
from support.store import ONE, Store

pytestmark = [pytest.mark.fuse, pytest.mark.tgt]

JOBS = {
    "buffered and unaligned": ["--bsrange=512-1M", "--bs_unaligned", "--ioengine=psync"],
    "direct": ["--bsrange=512-256k", "--blockalign=512", "--direct=1", "--ioengine=libaio", "--iodepth=8"],
}


def fio(file: Path, *options: str, mib: int) -> None:
    """Eight jobs, each of which writes and verifies so many MiB of its own."""
    done = subprocess.run(
        [
            *("fio", "--name=verify", "--filename=" + str(file).replace(":", "\\:"), "--rw=randrw", "--numjobs=8"),
            *(f"--size={mib}m", "--offset_increment=32m", "--verify=crc32c", "--verify_fatal=1", "--end_fsync=1"),
            *("--randseed=20261121", "--group_reporting", "--minimal", *options),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
        cwd=file.parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr


def settled(mounted: Mounted) -> dict[str, Any]:
    """The status, once nothing is read ahead any more: such a command is on the line, but not counted yet."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found.append(mounted.status_file())
        return all(session["in_flight"] == session["queued"] == 0 for session in found[-1]["sessions"])

    wait_until(look, timeout=20, what="the commands under way")
    return found[-1]


@pytest.mark.capture
@pytest.mark.parametrize("mib", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_fio_verifies_and_the_dissector_counts_the_same(
    store: Store, tmp_path: Path, start_capture: Callable[[int], Capture], mib: int
) -> None:
    recording = start_capture(store.server.port)
    with Mounted(store.server.url(ONE), tmp_path / "m", "--rw") as mounted:
        for options in JOBS.values():
            fio(mounted.lun(2), *options, mib=mib)
            assert sha256(mounted.lun(2)) == sha256(store.empty)
        commands = settled(mounted)["commands"]
        recording.stop()
    assert recording.malformed() == []
    assert recording.command_counts() == {row["opcode"]: row["calls"] for row in commands}
    # Service response times are kept for disks only (LUN 0 answered one INQUIRY and REPORT LUNS), and for GOOD only.
    answered = {row["opcode"]: row["calls"] - row["errors"] for row in commands}
    times = recording.answered_counts()
    assert {code: times[code] for code in (0x28, 0x2A, 0x35)} == {code: answered[code] for code in (0x28, 0x2A, 0x35)}


@pytest.mark.parametrize(
    ("options", "mib"),
    [
        (("-o", "cache_size=2M"), 3),
        *(
            pytest.param(("-o", option), 12, marks=pytest.mark.slow)
            for option in ("write=through", "direct_io", "cache_size=2M")
        ),
    ],
)
def test_fio_verifies_with_other_caches(store: Store, tmp_path: Path, options: tuple[str, ...], mib: int) -> None:
    with Mounted(store.server.url(ONE), tmp_path / "m", "--rw", *options) as mounted:
        fio(mounted.lun(2), "--bsrange=512-256k", "--bs_unaligned", "--ioengine=psync", mib=mib)
        assert sha256(mounted.lun(2)) == sha256(store.empty)
