"""The helpers that need no target: relay, disks, command line."""

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import cli
from support.disks import ext4_image, partitioned_image, random_file, sha256, sparse
from support.ports import HOST, free_port, is_listening, wait_until
from support.process import is_alive, sbin_path
from support.relay import Relay

MIB = 1 << 20


# --- ports ---


def test_a_free_port_is_free_and_given_once() -> None:
    ports = {free_port() for _ in range(50)}
    assert len(ports) == 50
    assert not any(map(is_listening, ports))
    with socket.create_server((HOST, 0)) as server:
        assert is_listening(server.getsockname()[1])


def test_waiting_has_an_end() -> None:
    with pytest.raises(TimeoutError, match="after 0 s still waiting for Godot"):
        wait_until(lambda: False, timeout=0, what="Godot")


# --- relay ---


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that sends back what it is sent."""

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 18):
                    connection.sendall(data)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(connection,)))
            threads[-1].start()

    threads: list[threading.Thread] = []
    listener = socket.create_server((HOST, 0))
    acceptor = threading.Thread(target=accept)
    acceptor.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for thread in (acceptor, *threads):
        thread.join(5)


def connect(relay: Relay) -> socket.socket:
    return socket.create_connection((HOST, relay.port), timeout=10)


def exchange(connection: socket.socket, data: bytes) -> bytes:
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    received = bytearray()
    while len(received) < len(data) and (more := connection.recv(1 << 18)):
        received += more
    sender.join()
    return bytes(received)


def test_a_relay_carries_every_byte_and_the_end(echo_port: int) -> None:
    data = os.urandom(8 * MIB + 1)
    with Relay(echo_port) as relay:
        with connect(relay) as connection:
            assert exchange(connection, data) == data
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        assert (relay.connections, relay.bytes_up, relay.bytes_down) == (1, len(data), len(data))


def test_a_relay_is_as_far_away_as_told(echo_port: int) -> None:
    with Relay(echo_port, delay=0.02) as relay, connect(relay) as connection:
        for _ in range(3):
            started = time.monotonic()
            assert exchange(connection, b"ping") == b"ping"
            assert time.monotonic() - started >= 0.04


def test_a_relay_is_as_narrow_as_told(echo_port: int) -> None:
    with Relay(echo_port, rate=20 * MIB) as relay, connect(relay) as connection:
        started = time.monotonic()
        assert len(exchange(connection, bytes(8 * MIB))) == 8 * MIB
        assert time.monotonic() - started >= 0.39


def test_a_relay_cuts_connections(echo_port: int) -> None:
    with Relay(echo_port) as relay:
        with connect(relay) as connection:
            assert exchange(connection, b"ping") == b"ping"
            relay.cut()
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        with connect(relay) as connection:
            assert exchange(connection, b"ping") == b"ping"
            relay.cut(refuse=True)
        with pytest.raises(ConnectionRefusedError):
            connect(relay)
        relay.resume()
        with connect(relay) as connection:
            assert exchange(connection, b"ping") == b"ping"


def test_a_relay_cuts_at_the_very_byte(echo_port: int) -> None:
    with Relay(echo_port) as relay, connect(relay) as connection:
        assert exchange(connection, b"ping") == b"ping"
        relay.cut_after(down=1000)
        with pytest.raises(ConnectionResetError):
            exchange(connection, bytes(5000))
        assert relay.bytes_down == 4 + 1000


def test_a_relay_that_stalls_loses_nothing(echo_port: int) -> None:
    with Relay(echo_port) as relay, connect(relay) as connection:
        assert exchange(connection, b"ping") == b"ping"
        relay.stall()
        connection.sendall(b"patience")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(8)
        connection.settimeout(10)
        relay.resume()
        assert connection.recv(8, socket.MSG_WAITALL) == b"patience"


def test_a_black_hole_swallows(echo_port: int) -> None:
    with Relay(echo_port) as relay, connect(relay) as connection:
        relay.blackhole()
        connection.sendall(bytes(8 * MIB))  # more than buffers hold: it is being read
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(10)
        relay.resume()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        with connect(relay) as another:
            assert exchange(another, b"ping") == b"ping"


def test_a_relay_damages_the_very_bit(echo_port: int) -> None:
    data = bytes(5000)
    with Relay(echo_port) as relay, connect(relay) as connection:
        assert exchange(connection, b"ping") == b"ping"
        relay.damage_after(1000, down=True, spare=1004)  # 1000 of these are still spared
        for down in (True, False):
            got = exchange(connection, data)
            assert [(at, byte) for at, byte in enumerate(got) if byte] == [(1999 if down else 99, 1 if down else 16)]
            relay.damage_after(100, down=False)
        assert relay.damaged == 2


def test_a_relay_closes_one_direction_and_carries_the_other(echo_port: int) -> None:
    with Relay(echo_port) as relay, connect(relay) as connection:
        assert exchange(connection, b"ping") == b"ping"
        relay.finish(down=True)
        assert connection.recv(1) == b""
        before = relay.bytes_up
        connection.sendall(b"still there")
        wait_until(lambda: relay.bytes_up == before + 11, timeout=5, what="the other direction")


def test_a_relay_to_nowhere_resets() -> None:
    with Relay(free_port()) as relay, pytest.raises(ConnectionResetError), connect(relay) as connection:
        connection.recv(1)


# --- disks ---


def test_files_are_as_large_as_asked_for_and_repeatable(tmp_path: Path) -> None:
    size = 3 * MIB + 5
    first, again, other = (random_file(tmp_path / name, size, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first.stat().st_size == size
    assert sha256(first) == sha256(again) != sha256(other)
    hole = sparse(tmp_path / "hole", 3 << 40)
    assert (hole.stat().st_size, hole.stat().st_blocks) == (3 << 40, 0)


@pytest.mark.skipif(shutil.which("mke2fs", path=sbin_path()) is None, reason="e2fsprogs isn't installed")
def test_an_ext4_image_holds_its_tree(tmp_path: Path) -> None:
    image = ext4_image(tmp_path / "disk", 8 * MIB, {"a.txt": b"alpha\n", "folder/b.txt": b"beta\n"})
    assert image.stat().st_size == 8 * MIB
    env = {**os.environ, "PATH": sbin_path()}
    shown = subprocess.run(["debugfs", "-R", "cat folder/b.txt", image], env=env, capture_output=True, check=True)
    assert shown.stdout == b"beta\n"


@pytest.mark.skipif(
    not all(shutil.which(name, path=sbin_path()) for name in ("mke2fs", "mkntfs", "ntfscp", "sfdisk", "mmls")),
    reason="e2fsprogs, ntfs-3g, fdisk or sleuthkit isn't installed",
)
@pytest.mark.parametrize("table", ["mbr", "gpt"])
def test_a_partitioned_image_reads_as_an_examiner_would(tmp_path: Path, table: str) -> None:
    assert table in ("mbr", "gpt")
    image = partitioned_image(tmp_path / "disk", table="mbr" if table == "mbr" else "gpt")
    assert image.path.stat().st_size == image.size
    layout = subprocess.run(["mmls", image.path], capture_output=True, text=True, check=True).stdout
    for partition in image.partitions:
        sector = partition.offset // 512
        assert re.search(rf"\b0*{sector}\b", layout)
        where = ["-o", str(sector), str(image.path)]
        listing = subprocess.run(["fls", "-r", *where], capture_output=True, text=True, check=True).stdout
        for name, content in partition.files.items():
            found = re.search(rf"r/r ([\d-]+):\t{re.escape(name)}$", listing, re.MULTILINE)
            assert found, listing
            assert subprocess.run(["icat", *where, found[1]], capture_output=True, check=True).stdout == content


# --- the command line ---


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell script in the place of iscsifuse: it mounts a tmpfs, with a sleep for a daemon."""
    script = tmp_path / "stand-in"
    script.write_text(
        """#!/bin/sh
        case $1 in
        mount)
            [ "$4" != --broken ] || { echo "no such target" >&2; exit 32; }
            mount -t tmpfs none "$3" && mkdir "$3/.iscsifuse"
            setsid sleep 4323 </dev/null >/dev/null 2>&1 &
            echo "{\\"pid\\": $!}" > "$3/.iscsifuse/status.json" ;;
        umount)
            [ -z "$STUCK" ] || exit 32
            pid=$(sed 's/[^0-9]//g' "$2/.iscsifuse/status.json")
            kill "$pid"; umount "$2"
            while kill -0 "$pid" 2>/dev/null; do sleep 0.01; done ;;
        *) cat; echo "$GREETING"; exit 21 ;;
        esac
        """
    )
    script.chmod(0o755)
    monkeypatch.setattr(cli, "program", lambda _: str(script))
    return script


@pytest.mark.usefixtures("stand_in")
def test_the_command_line_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREETING", "hi")
    done = cli.run_cli("ls", input="in")
    assert (done.returncode, done.stdout) == (21, "inhi\n")
    assert cli.run_cli("ls", env={"GREETING": None}).stdout == "\n"


@pytest.mark.root
@pytest.mark.usefixtures("stand_in")
def test_a_mount_lasts_as_long_as_its_block(tmp_path: Path) -> None:
    point = tmp_path / "a mount"
    with cli.Mounted("iscsi://host/", point) as mounted:
        assert cli.is_mounted(point)
        assert mounted.pid is not None
        assert mounted.lun(3, target="iqn") == point / "iqn" / "lun-3"
    assert not cli.is_mounted(point)
    assert mounted.pid is not None
    assert not is_alive(mounted.pid)


@pytest.mark.root
@pytest.mark.usefixtures("stand_in")
def test_a_mount_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such target"), cli.Mounted("iscsi://host/", tmp_path, "--broken"):
        pass


@pytest.mark.root
@pytest.mark.usefixtures("stand_in")
def test_an_unmount_that_fails_is_an_error_and_is_forced(tmp_path: Path) -> None:
    point = tmp_path / "mount"
    mounted = cli.Mounted("iscsi://host/", point, env={"STUCK": "1"})
    with pytest.raises(AssertionError, match="umount failed with 32"), mounted:
        pass
    assert not cli.is_mounted(point)
    assert mounted.pid is not None
    assert not is_alive(mounted.pid)
    with pytest.raises(ZeroDivisionError) as raised, mounted:
        _ = 1 // 0
    assert "umount failed" in raised.value.__notes__[0]
