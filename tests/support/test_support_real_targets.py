"""The helpers against the real thing: targets answer libiscsi's tools, and the dissector agrees on what was said."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from support.capture import Capture, CaptureError
from support.disks import random_file, sparse
from support.istgt import IstgtServer
from support.ports import HOST, is_listening, wait_until
from support.tgt import TgtError, TgtServer

DISK = "iqn.2004-04.com.example:disk"
LOCKED = "iqn.2004-04.com.example:locked"
JOE = ("joe", "abcdefghijkl")
TGT = ("tgt", "mnopqrstuvwx")
TIB = 1 << 40
MIB = 1 << 20

needs_libiscsi = pytest.mark.skipif(shutil.which("iscsi-inq") is None, reason="libiscsi-bin isn't installed")


def tool(name: str, *arguments: str, succeeds: bool = True, env: Mapping[str, str] | None = None) -> str:
    """Output of one of libiscsi's tools; they loop for ever over some answers, so none gets more than 20 s."""
    done = subprocess.run(
        [name, *arguments],
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- tgt ---


@needs_libiscsi
def test_tgt_serves_what_it_was_told_to(tgt_server: TgtServer, tmp_path: Path) -> None:
    tgt_server.add_target(DISK, params={"InitialR2T": "No"})
    large = sparse(tmp_path / "large", 3 * TIB)
    tgt_server.add_lun(DISK, 1, large, block_size=4096, vendor="ACME", product="Big Disk", serial="S1", thin=True)
    tgt_server.add_lun(DISK, 257, random_file(tmp_path / "small", MIB), readonly=True)

    assert tgt_server.param(DISK, "InitialR2T") == "No"
    listing = tool("iscsi-ls", "-s", tgt_server.url())
    assert f"Target:{DISK} Portal:{tgt_server.portal},1" in listing
    assert "Lun:1 " in listing
    capacity = tool("iscsi-readcapacity16", tgt_server.url(DISK, 1))
    assert f"Total size:{3 * TIB}" in capacity
    assert "LENGTH IN BYTES:4096" in capacity
    assert "LBPME:1" in capacity
    inquiry = tool("iscsi-inq", tgt_server.url(DISK, 1))
    assert "Vendor:ACME" in inquiry
    assert "Product:Big Disk" in inquiry


@needs_libiscsi
def test_tgt_asks_for_chap(tgt_server: TgtServer, tmp_path: Path) -> None:
    tgt_server.add_target(LOCKED, chap=JOE, mutual=TGT)
    tgt_server.add_lun(LOCKED, 1, sparse(tmp_path / "disk", MIB))
    url = tgt_server.url(LOCKED, 1)
    tool("iscsi-inq", url, succeeds=False)
    mine = {"LIBISCSI_CHAP_USERNAME": JOE[0], "LIBISCSI_CHAP_PASSWORD": JOE[1]}
    tool("iscsi-inq", url, env=mine)
    theirs = {"LIBISCSI_CHAP_TARGET_USERNAME": TGT[0], "LIBISCSI_CHAP_TARGET_PASSWORD": TGT[1]}
    tool("iscsi-inq", url, env=mine | theirs)
    wrong = theirs | {"LIBISCSI_CHAP_TARGET_PASSWORD": "another password"}
    tool("iscsi-inq", url, succeeds=False, env=mine | wrong)


@needs_libiscsi
def test_tgt_comes_back_as_it_was(tgt_server: TgtServer, tmp_path: Path) -> None:
    tgt_server.add_target(DISK)
    tgt_server.add_lun(DISK, 1, sparse(tmp_path / "disk", MIB))
    port = tgt_server.port
    tgt_server.kill()
    assert not is_listening(port)
    with pytest.raises(TgtError):
        tgt_server.offline(DISK, 1)
    tgt_server.restart()
    assert tgt_server.port == port
    assert f"Total size:{MIB}" in tool("iscsi-readcapacity16", tgt_server.url(DISK, 1))
    tgt_server.offline(DISK, 1)
    assert "NOT READY" in tool("iscsi-readcapacity16", tgt_server.url(DISK, 1), succeeds=False)
    tgt_server.online(DISK, 1)
    tool("iscsi-readcapacity16", tgt_server.url(DISK, 1))
    tgt_server.withdraw_lun(DISK, 1)
    tool("iscsi-readcapacity16", tgt_server.url(DISK, 1), succeeds=False)
    tgt_server.bring_back_lun(DISK, 1)
    tool("iscsi-readcapacity16", tgt_server.url(DISK, 1))
    tgt_server.delete_lun(DISK, 1)
    tool("iscsi-readcapacity16", tgt_server.url(DISK, 1), succeeds=False)
    tgt_server.delete_target(DISK)
    tool("iscsi-inq", tgt_server.url(DISK, 0), succeeds=False)


@needs_libiscsi
def test_tgt_shows_and_closes_connections(tgt_server: TgtServer, tmp_path: Path) -> None:
    tgt_server.add_target(DISK)
    tgt_server.add_lun(DISK, 1, sparse(tmp_path / "disk", 64 * MIB))
    command = ["iscsi-perf", "-t", "60", tgt_server.url(DISK, 1)]
    load = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: bool(tgt_server.connections()), timeout=10, what="a connection")
        (connection,) = tgt_server.connections()
        assert connection.tid == 1
        assert "iscsi-perf" in connection.initiator
        assert connection.address == HOST
        load.send_signal(signal.SIGSTOP)  # or it would come back at once
        tgt_server.close_connection(connection)
        wait_until(lambda: not tgt_server.connections(), timeout=10, what="the connection to go")
    finally:
        load.kill()
        load.wait()


def test_tgt_can_be_paused(tgt_server: TgtServer) -> None:
    tgt_server.pause()
    with socket.create_connection((HOST, tgt_server.port), timeout=5):
        state = Path(f"/proc/{tgt_server.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "T"
    tgt_server.cont()
    tgt_server.add_target(DISK)


@pytest.mark.tgt
def test_tgt_takes_another_port_when_its_own_is_taken(tmp_path: Path) -> None:
    server = TgtServer(tmp_path)
    with socket.create_server((HOST, server.port)) as thief:
        with server:
            assert server.port != thief.getsockname()[1]
            assert is_listening(server.port)
        assert not is_listening(server.port)
    with pytest.raises(TgtError):
        _ = server.pid


# --- istgt ---


@needs_libiscsi
def test_istgt_serves_what_it_was_told_to(istgt_server: IstgtServer, tmp_path: Path) -> None:
    large, small = sparse(tmp_path / "large", 3 * TIB), sparse(tmp_path / "small", MIB)
    istgt_server.add_target(DISK, {0: large, 3: small}, block_size=4096, vendor="ACME", product="Big Disk")
    istgt_server.add_target(LOCKED, {0: small}, chap=JOE, mutual=TGT, readonly=True)
    istgt_server.add_target(f"{DISK}-digest", {0: small}, digest="Header")
    istgt_server.start()

    assert f"Total size:{3 * TIB}" in tool("iscsi-readcapacity16", istgt_server.url(DISK, 0))
    assert "LENGTH IN BYTES:4096" in tool("iscsi-readcapacity16", istgt_server.url(DISK, 3))
    assert "Vendor:ACME" in tool("iscsi-inq", istgt_server.url(DISK, 3))
    tool("iscsi-inq", istgt_server.url(f"{DISK}-digest", 0))
    assert "HeaderDigest=on" in istgt_server.said()

    url = istgt_server.url(LOCKED, 0)
    keys = {"LIBISCSI_CHAP_USERNAME": JOE[0], "LIBISCSI_CHAP_PASSWORD": JOE[1]}
    tool("iscsi-inq", url, succeeds=False, env=keys)
    keys |= {"LIBISCSI_CHAP_TARGET_USERNAME": TGT[0], "LIBISCSI_CHAP_TARGET_PASSWORD": TGT[1]}
    tool("iscsi-inq", url, env=keys)

    port = istgt_server.port
    istgt_server.restart()
    assert istgt_server.port == port
    tool("iscsi-inq", istgt_server.url(DISK, 0))


# --- the dissector ---


@needs_libiscsi
def test_the_dissector_counts_what_was_sent(
    tgt_server: TgtServer, tmp_path: Path, start_capture: Callable[[int], Capture]
) -> None:
    tgt_server.add_target(DISK)
    tgt_server.add_lun(DISK, 1, sparse(tmp_path / "disk", 16 * MIB))
    recording = start_capture(tgt_server.port)
    tool("iscsi-test-cu", "-d", "--test=SCSI.Write16.Simple", tgt_server.url(DISK, 1))
    recording.stop()

    assert recording.malformed() == []
    assert recording.unrecognised() == []
    commands = recording.command_counts()
    assert commands[0x8A] == 512  # 1 to 256 blocks at both ends of the disk
    assert recording.answered_counts()[0x8A] == 512
    pdus = recording.pdu_counts()
    assert pdus[0x01] == sum(commands.values())
    assert pdus[0x05] > 0
    logins = recording.login_keys()
    assert [text.from_initiator for text in logins] == [True, False] * pdus[0x03]
    assert logins[0].keys["TargetName"] == DISK
    assert logins[1].keys["TargetPortalGroupTag"] == "1"


def test_the_dissector_notices_what_is_wrong(tgt_server: TgtServer, start_capture: Callable[[int], Capture]) -> None:
    recording = start_capture(tgt_server.port)
    # A SCSI Response with sense data that is cut off; and something that is no PDU at all.
    short_sense = bytes([0x21, 0x80, 0x00, 0x02, 0, 0, 0, 4]) + bytes(40) + bytes([0, 18, 0x70, 0])
    for rubbish in (short_sense, b"GET / HTTP/1.0\r\n\r\n" * 9):
        with contextlib.suppress(ConnectionError), socket.create_connection((HOST, tgt_server.port)) as connection:
            connection.sendall(rubbish)
            connection.recv(1)
    recording.stop()
    assert len(recording.malformed()) == 1
    assert any("HTTP" in line for line in recording.unrecognised())


@pytest.mark.capture
def test_a_recording_that_lost_packets_is_refused(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as listener:
        recording = Capture(tmp_path / "small.pcap", port=listener.getsockname()[1], buffer_mib=1)
        recording.start()
        with socket.create_connection(listener.getsockname()) as near, listener.accept()[0] as far:
            assert recording.pid is not None
            os.kill(recording.pid, signal.SIGSTOP)
            block = bytes(MIB)
            for _ in range(16):
                near.sendall(block)
                assert len(far.recv(MIB, socket.MSG_WAITALL)) == MIB
            os.kill(recording.pid, signal.SIGCONT)
        with pytest.raises(CaptureError, match="packets were lost"):
            recording.stop()
