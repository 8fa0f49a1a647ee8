"""What a user can get wrong, and what can be wrong at the other end: one sentence, the right exit code, no mount."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support.cli import is_mounted, run_cli
from support.ports import free_port
from support.store import ONE, Store
from support.tgt import TgtServer

pytestmark = [pytest.mark.fuse, pytest.mark.tgt]

HTTP = b"HTTP/1.1 400 Bad Request\r\nServer: example\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n"
LIMIT = 3


def assert_one_sentence(said: str, *words: str) -> None:
    lines = said.strip().splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("iscsifuse: ")
    for word in words:
        assert word in lines[0]


def assert_refused(url: str, point: Path, *words: str, codes: tuple[int, int], limit: int = LIMIT) -> None:
    """``mount`` ends with the first code, ``ls`` with the second; both say one sentence with these words."""
    began = time.monotonic()
    mounted = run_cli("mount", url, point, "-o", f"login_timeout={limit}")
    assert time.monotonic() - began < limit + 6
    assert not is_mounted(point)
    assert mounted.returncode == codes[0], mounted.stderr
    assert_one_sentence(mounted.stderr, *words)
    assert mounted.stdout == ""
    listed = run_cli("ls", url, "--login-timeout", str(limit))
    assert listed.returncode == codes[1], listed.stderr
    assert_one_sentence(listed.stderr)


@pytest.fixture
def point(tmp_path: Path) -> Path:
    made = tmp_path / "m"
    made.mkdir()
    return made


@contextmanager
def server(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    """A TCP server that does something odd with each connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(LIMIT + 3)
                with suppress(OSError):
                    behave(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stop.set()
        thread.join()
        listener.close()


def test_a_port_where_nobody_listens(point: Path) -> None:
    assert_refused(f"iscsi://127.0.0.1:{free_port()}/", point, "can't connect", "refused", codes=(32, 4))


def test_a_host_that_does_not_exist(point: Path) -> None:
    assert_refused("iscsi://no-such-host.invalid/", point, "no-such-host.invalid", codes=(32, 4))


def test_no_such_target(store: Store, point: Path) -> None:
    assert_refused(store.server.url("iqn.2026-11.example:nope"), point, "not found", codes=(32, 21))


def test_no_such_lun(store: Store, point: Path) -> None:
    assert_refused(store.server.url(ONE, 9), point, "LUN 9", codes=(32, 21))


def test_a_lun_that_is_no_disk(store: Store, point: Path) -> None:
    done = run_cli("mount", store.server.url(ONE, 0), point)
    assert (done.returncode, is_mounted(point)) == (32, False)
    assert_one_sentence(done.stderr, "controller")


def test_an_unknown_key(store: Store, point: Path) -> None:
    assert_refused(store.server.url(ONE, query="colour=blue"), point, "colour", codes=(1, 1))


@pytest.mark.parametrize("behaviour", ["http", "silent", "closes", "stalls in a header"])
def test_something_that_is_no_target(point: Path, behaviour: str) -> None:
    def behave(connection: socket.socket) -> None:
        connection.recv(4096)
        if behaviour == "http":
            connection.sendall(HTTP)
        elif behaviour == "stalls in a header":
            connection.sendall(bytes([0x23]) + bytes(20))
        if behaviour in ("silent", "stalls in a header"):
            connection.recv(1)

    with server(behave) as port:
        words = ("doesn't speak iSCSI",) if behaviour == "http" else (f"127.0.0.1:{port}",)
        waits = behaviour in ("silent", "stalls in a header")
        assert_refused(f"iscsi://127.0.0.1:{port}/", point, *words, codes=(32, 5), limit=1 if waits else LIMIT)


def test_a_target_that_dies_during_the_login(store: Store, point: Path) -> None:
    """A relay that lets the first answer through and then breaks both sides off."""

    def behave(connection: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", store.server.port), timeout=3) as there:
            there.sendall(connection.recv(4096))
            connection.sendall(there.recv(4096)[:60])

    with server(behave) as port:
        assert_refused(f"iscsi://127.0.0.1:{port}/{ONE}", point, "during the login", codes=(32, 5))


@pytest.mark.parametrize(
    ("where", "code", "word"),
    [("missing", 1, "doesn't exist"), ("full", 1, "not empty"), ("file", 1, "is a file")],
)
def test_mount_points_that_will_not_do(store: Store, tmp_path: Path, where: str, code: int, word: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "file").touch()
    done = run_cli("mount", store.server.url(), tmp_path / where)
    assert (done.returncode, is_mounted(tmp_path / where)) == (code, False)
    assert_one_sentence(done.stderr, word)


def secret_file(path: Path, secret: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(secret + "\n")
    return path


@pytest.mark.parametrize("algorithm", ["md5", "sha1"])
def test_chap_and_mutual_chap(tgt_server: TgtServer, tmp_path: Path, point: Path, algorithm: str) -> None:
    tgt_server.add_target(ONE, chap=("joe", "secret-of-joe-1"), mutual=("disk", "secret-of-disk-1"))
    right = secret_file(tmp_path / "right", "secret-of-joe-1")
    wrong = secret_file(tmp_path / "wrong", "secret-of-someone")
    theirs = secret_file(tmp_path / "theirs", "secret-of-disk-1")
    url = tgt_server.url(ONE, query=f"auth={algorithm}")
    user = ("--chap-user", "joe", "--chap-secret-file")
    both = ("--target-user", "disk", "--target-secret-file")

    assert run_cli("ls", url, *user, right).returncode == 0
    assert run_cli("ls", url, *user, right, *both, theirs).returncode == 0
    # An environment that libiscsi's users know.
    env = {"LIBISCSI_CHAP_USERNAME": "joe", "LIBISCSI_CHAP_PASSWORD": "secret-of-joe-1"}
    assert run_cli("ls", url, env=env).returncode == 0

    for options in ((*user, wrong), (*user, right, *both, wrong), ()):
        refused = run_cli("ls", url, *options)
        assert refused.returncode == 24, (options, refused.stderr)
        assert_one_sentence(refused.stderr)
        assert "secret-of" not in refused.stderr
    done = run_cli("mount", url, point, *user, wrong)
    assert (done.returncode, is_mounted(point)) == (32, False)

    wrong.chmod(0o644)
    refused = run_cli("ls", url, *user, wrong)
    assert refused.returncode == 1
    assert_one_sentence(refused.stderr, "can be used by others")
