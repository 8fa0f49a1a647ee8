"""The target against initiators that others wrote: libiscsi's tools, QEMU, and Wireshark's dissector as the judge."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from iscsifuse.iscsi.pdu import Opcode
from iscsifuse.testing.actions import Call
from iscsifuse.testing.config import DEFAULT_TARGET_NAME, ChapPolicy, TargetConfig, TargetKeys
from iscsifuse.testing.disk import DeviceType, Disk
from iscsifuse.testing.script import IN, Rule, is_a
from iscsifuse.testing.target import LoopbackTarget
from support.capture import Capture

libiscsi = pytest.mark.skipif(not shutil.which("iscsi-ls"), reason="libiscsi's tools aren't installed")
conformance_unit = pytest.mark.skipif(not shutil.which("iscsi-test-cu"), reason="iscsi-test-cu isn't installed")
qemu = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img isn't installed")

SIZE = 4 << 20
KEYS = {
    "generous": TargetKeys(),
    "no unsolicited data": TargetKeys(initial_r2t=True, immediate_data=False),
    "immediate data only": TargetKeys(initial_r2t=True),
    "unsolicited Data-Out only": TargetKeys(immediate_data=False),
    "small": TargetKeys(
        max_recv_data_segment_length=512, first_burst_length=1024, max_burst_length=4096, max_outstanding_r2t=1
    ),
}


def run(*command: str, ok: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout


def pattern(length: int = SIZE) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in range(length // 8))


def honest(violations: list[str]) -> list[str]:
    """Without what libiscsi is known for.

    It takes the StatSN of an R2T, which isn't used up (RFC 7143 §11.8), for one that is; and it names the next stage
    of a login in requests that don't ask for it.
    """
    known = r"ExpStatSN \d+, but only|NSG \d without T"
    return [sentence for sentence in violations if not re.search(known, sentence)]


@libiscsi
def test_listing() -> None:
    config = TargetConfig.of(
        Disk(blocks=0, device_type=DeviceType.CONTROLLER), Disk(blocks=8192, lun=1), Disk(blocks=1 << 33, lun=300)
    )
    target = LoopbackTarget(config)
    with target.in_thread():
        text = run("iscsi-ls", "-s", target.url())
        capacity = run("iscsi-readcapacity16", target.url(lun=1))
    assert re.findall(r"Lun:(\d+) +Type:(\w+)(?: \(Size:(\w+)\))?", text) == [
        ("0", "STORAGE_ARRAY_CONTROLLER", ""),
        ("1", "DIRECT_ACCESS", "3M"),  # it takes the address of the last block for the number of blocks
        ("16684", "DIRECT_ACCESS", "1T"),  # and shows flat addresses as they are, and at most 2^32 blocks
    ]
    assert f"Target:{DEFAULT_TARGET_NAME} Portal:{target.portal},1" in text
    assert "Total size:4194304" in capacity
    assert honest(target.violations) == []


@libiscsi
@pytest.mark.parametrize("page", ["0x00", "0x80", "0x83", "0xb0", "0xb1", "0xb2"])
def test_vital_product_data(page: str) -> None:
    target = LoopbackTarget(TargetConfig.of(Disk(blocks=8, thin=True)))
    with target.in_thread():
        run("iscsi-inq", "-e", "1", "-c", page, target.url(lun=0))


@libiscsi
@pytest.mark.parametrize("way", ["user%secret of some length", "user%wrong", ""])
def test_chap(way: str) -> None:
    config = TargetConfig.of(Disk(blocks=8))
    config.chap = ChapPolicy(
        users={"user": b"secret of some length"}, target_name="me", target_secret=b"mutual secret"
    )
    target = LoopbackTarget(config)
    right = "wrong" not in way and bool(way)
    with target.in_thread():
        url = target.url(lun=0).replace("://", f"://{way}@" if way else "://")
        run("iscsi-inq", url, ok=right)
        run("iscsi-inq", f"{url}?target_user=me&target_password=mutual secret", ok=right)
        if right:
            run("iscsi-inq", f"{url}?target_user=me&target_password=another one", ok=False)
    assert honest(target.violations) == []


@qemu
@pytest.mark.parametrize("digest", ["none", "crc32c"])
@pytest.mark.parametrize("name", KEYS)
def test_an_image_goes_there_and_back(name: str, digest: str, tmp_path: Path) -> None:
    target = LoopbackTarget(TargetConfig.of(Disk(blocks=SIZE // 512), keys=KEYS[name]))
    image = tmp_path / "image"
    image.write_bytes(pattern())
    seen: list[bool] = []
    look = Call(lambda: seen.append(target.sessions[-1].agreed.header_digest))
    target.script.add(Rule(IN, look, is_a(Opcode.SCSI_COMMAND), times=0))
    with target.in_thread():
        # In a URL this QEMU doesn't survive a digest.
        lun = {
            "driver": "iscsi",
            "transport": "tcp",
            "portal": target.portal,
            "target": DEFAULT_TARGET_NAME,
            "lun": 0,
            "header-digest": digest,
        }
        url = "json:" + json.dumps({"driver": "raw", "file": lun})
        run("qemu-img", "convert", "-n", str(image), url)
        assert "identical" in run("qemu-img", "compare", str(image), url)
        run("qemu-img", "convert", "-O", "raw", url, str(tmp_path / "back"))
    assert target.disk().contents() == pattern()
    assert (tmp_path / "back").read_bytes() == pattern()
    assert honest(target.violations) == []
    # Where digests were asked for, they were really there, and neither side found a wrong one.
    assert set(seen) == {digest == "crc32c"}


@qemu
@pytest.mark.parametrize("block_length", [512, 4096])
@pytest.mark.parametrize("reorder", [None, 1])
def test_many_commands_at_once(block_length: int, reorder: int | None) -> None:
    config = TargetConfig.of(Disk.from_bytes(pattern(), block_length=block_length))
    config.reorder, config.window, config.latency = reorder, 8, 0.001
    target = LoopbackTarget(config)
    with target.in_thread():
        bench = ("qemu-img", "bench", "-f", "raw", "-d", "32", "-s", "8192", "-c", "400")
        run(*bench, target.url(lun=0))
        assert target.disk().contents() == pattern()
        run(*bench, "-w", "--pattern=65", target.url(lun=0))
    assert target.disk().contents(blocks=3 * 4096 // block_length) == b"A" * 12288
    assert honest(target.violations) == []


# Test suites of libiscsi. What they do wrong on purpose shows among the violations, so those aren't looked at.
SUITES = [
    "SCSI.Inquiry",
    "SCSI.Mandatory",
    "SCSI.ModeSense6",
    "SCSI.Read6",
    "SCSI.Read10",
    "SCSI.Read16",
    "SCSI.ReadCapacity10",
    "SCSI.ReadCapacity16",
    "SCSI.StartStopUnit",
    "SCSI.TestUnitReady",
    "SCSI.Unmap",
    "SCSI.GetLBAStatus",
    "SCSI.Verify16",
    "SCSI.Write10",
    "SCSI.Write16",
    "SCSI.WriteSame16",
    "SCSI.WriteVerify16",
    "iSCSI.iSCSIResiduals",
    "iSCSI.iSCSIdatasn",
]


def failures(output: str) -> list[str]:
    summary = re.search(r"tests +(\d+) +(\d+) +(\d+) +(\d+)", output)
    assert summary, output
    assert int(summary[2]) > 0
    return re.findall(r"Suite (\w+, Test \w+) had failures", output)


@conformance_unit
@pytest.mark.parametrize("suite", SUITES)
def test_suites_of_libiscsi(suite: str) -> None:
    target = LoopbackTarget(TargetConfig.of(Disk(blocks=131072, thin=True)))
    with target.in_thread():
        output = run("iscsi-test-cu", "-d", "-n", "-t", suite, target.url(lun=0))
    assert failures(output) == []


@conformance_unit
@pytest.mark.slow
@pytest.mark.parametrize("disk", [Disk(blocks=131072), Disk(blocks=16384, block_length=4096)], ids=["512", "4096"])
def test_all_of_libiscsi(disk: Disk) -> None:
    target = LoopbackTarget(TargetConfig.of(disk))
    with target.in_thread():
        output = run("iscsi-test-cu", "-d", "-n", "-t", "ALL", target.url(lun=0))
    assert failures(output) == []


@qemu
@libiscsi
@pytest.mark.capture
@pytest.mark.parametrize("name", ["generous", "small"])
def test_the_dissector_finds_nothing_malformed(
    name: str, tmp_path: Path, start_capture: Callable[[int], Capture]
) -> None:
    target = LoopbackTarget(TargetConfig.of(Disk(blocks=256), keys=KEYS[name]))
    image = tmp_path / "image"
    image.write_bytes(pattern(256 * 512))
    with target.in_thread():
        recording = start_capture(target.port)
        run("iscsi-ls", "-s", target.url())
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), target.url(lun=0))
        recording.stop()
    assert recording.malformed() == []
    assert recording.pdu_counts()[0x23] == recording.pdu_counts()[0x03] >= 3
    executed = [entry for entry in target.ledger if entry.name in ("WRITE(10)", "WRITE(16)")]
    counts = recording.command_counts()
    assert counts.get(0x2A, 0) + counts.get(0x8A, 0) == len(executed) > 0


# --- python -m iscsifuse.testing ---


def serve(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "iscsifuse.testing", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@qemu
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_images_are_served_until_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    images = [tmp_path / "one", tmp_path / "two"]
    for image in images:
        image.write_bytes(bytes(SIZE))
    (tmp_path / "source").write_bytes(pattern())
    with serve("--target", "iqn.2000-01.org.example:x", *map(str, images)) as process:
        assert process.stdout
        assert process.stderr
        line = process.stdout.readline()
        assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+\n", line)
        url = f"iscsi://{line.split()[-1]}/iqn.2000-01.org.example:x/1"
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(tmp_path / "source"), url)
        process.send_signal(number)
        assert process.wait(10) == 0
        assert (process.stdout.read(), process.stderr.read()) == ("", "")
    assert images[1].read_bytes() == pattern()
    assert images[0].read_bytes() == bytes(SIZE)


@libiscsi
def test_images_may_be_protected(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    image.chmod(0o400)
    with serve("--read-only", "--block-length", "4096", "--first-lun", "1", str(image)) as process:
        assert process.stdout
        url = f"iscsi://{process.stdout.readline().split()[-1]}"
        text = run("iscsi-ls", "-s", url)
        assert "Lun:1 " in text
        text = run("iscsi-readcapacity16", f"{url}/{DEFAULT_TARGET_NAME}/1")
        assert "LOGICAL BLOCK LENGTH IN BYTES:4096" in text
        process.terminate()
        assert process.wait(10) == 0


@pytest.mark.parametrize("arguments", [["/nowhere/image"], ["--host", "192.0.2.1", __file__]])
def test_what_cannot_be_served(arguments: list[str]) -> None:
    with serve(*arguments) as process:
        assert process.stdout
        assert process.stderr
        assert process.wait(20) == 1
        assert process.stdout.read() == ""
        said = process.stderr.read()
    assert said.startswith("iscsifuse.testing: ")
    assert said.count("\n") == 1
