import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from iscsifuse.cli.options import Options
from iscsifuse.cli.secrets import ask_on_terminal, credentials, read_secret_file
from iscsifuse.cli.url import parse
from iscsifuse.errors import SecretError, UsageError
from iscsifuse.iscsi.chap import ChapAlgorithm, ChapCredentials

FILE, SYSTEMD, ENV, URL, TYPED = (f"secret-of-the-{name}" for name in ("file", "systemd", "env", "url", "terminal"))


@dataclass
class Finder:
    folder: Path
    warnings: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    answer: str | None = None

    def __call__(
        self, url: str = "iscsi://h/", environment: Mapping[str, str] | None = None, **options: Any
    ) -> ChapCredentials | None:
        return credentials(
            parse(url), Options(**options), environment=environment or {}, warn=self.warnings.append, ask=self._ask
        )

    def _ask(self, prompt: str) -> str | None:
        self.prompts.append(prompt)
        return self.answer

    def file(self, name: str, text: str = FILE, mode: int = 0o600) -> str:
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)
        return str(path)


@pytest.fixture
def find(tmp_path: Path) -> Finder:
    return Finder(tmp_path)


def pair(found: ChapCredentials | None) -> tuple[str, str] | None:
    return None if found is None else (found.user, found.secret.decode())


def test_nobody_asked_for_chap(find: Finder) -> None:
    assert find() is None
    assert find.warnings == []
    assert find.prompts == []


def test_each_source_wins_over_the_next(find: Finder) -> None:
    find.answer = TYPED
    file = find.file("f")
    find.file("chap", SYSTEMD)
    directory = {"CREDENTIALS_DIRECTORY": str(find.folder)}
    environment = {"LIBISCSI_CHAP_USERNAME": "alice", "LIBISCSI_CHAP_PASSWORD": ENV}
    url = f"iscsi://alice%{URL}@h/"

    assert pair(find(url, {**directory, **environment}, chap_secret_file=file)) == ("alice", FILE)
    assert pair(find(url, {**directory, **environment})) == ("alice", SYSTEMD)
    assert pair(find(url, environment)) == ("alice", ENV)
    assert pair(find(url)) == ("alice", URL)
    assert find.prompts == []
    assert pair(find("iscsi://alice@h/")) == ("alice", TYPED)
    assert find.prompts == ["CHAP secret of alice: "]


@pytest.mark.parametrize(
    ("url", "environment", "options", "expected"),
    [
        ("iscsi://bob@h/", {}, {"chap_user": "alice", "chap_secret_file": "f"}, ("alice", FILE)),
        ("iscsi://bob@h/", {}, {"chap_secret_file": "f"}, ("bob", FILE)),
        ("iscsi://h/", {"LIBISCSI_CHAP_USERNAME": "eve"}, {"chap_secret_file": "f"}, ("eve", FILE)),
        ("iscsi://bob@h/", {"LIBISCSI_CHAP_PASSWORD": ENV}, {}, ("bob", ENV)),
        ("iscsi://h/", {"LIBISCSI_CHAP_PASSWORD": ENV}, {"chap_user": "alice"}, ("alice", ENV)),
        (f"iscsi://bob%{URL}@h/", {"LIBISCSI_CHAP_USERNAME": "eve", "LIBISCSI_CHAP_PASSWORD": ENV}, {}, ("eve", ENV)),
        (
            f"iscsi://bob%{URL}@h/",
            {"LIBISCSI_CHAP_USERNAME": "eve", "LIBISCSI_CHAP_PASSWORD": ENV},
            {"chap_user": "bob"},
            ("bob", URL),
        ),
        (f"iscsi://bob%{URL}@h/", {"LIBISCSI_CHAP_USERNAME": "eve", "LIBISCSI_CHAP_PASSWORD": ""}, {}, ("bob", URL)),
        ("iscsi://h/", {"LIBISCSI_CHAP_USERNAME": "", "LIBISCSI_CHAP_PASSWORD": ""}, {}, None),
        ("iscsi://h/", {"LIBISCSI_CHAP_TARGET_USERNAME": "t", "LIBISCSI_CHAP_TARGET_PASSWORD": ENV}, {}, None),
    ],
)
def test_whose_secret(
    find: Finder,
    url: str,
    environment: dict[str, str],
    options: dict[str, str],
    expected: tuple[str, str] | None,
) -> None:
    find.file("f")
    if "chap_secret_file" in options:
        options = {**options, "chap_secret_file": str(find.folder / "f")}
    assert pair(find(url, environment, **options)) == expected
    assert find.prompts == []


@pytest.mark.parametrize(
    ("url", "environment", "options", "words"),
    [
        ("iscsi://alice@h/", {}, {}, "no secret for the CHAP user 'alice'"),
        ("iscsi://h/", {}, {"chap_user": "alice"}, "no secret for the CHAP user 'alice'"),
        ("iscsi://h/", {"LIBISCSI_CHAP_USERNAME": "alice"}, {}, "no secret for the CHAP user 'alice'"),
        (f"iscsi://bob%{URL}@h/", {}, {"chap_user": "alice"}, "no secret for the CHAP user 'alice'"),
        (
            "iscsi://h/",
            {"LIBISCSI_CHAP_PASSWORD": ENV},
            {},
            "LIBISCSI_CHAP_PASSWORD holds a CHAP secret, but nothing",
        ),
        ("iscsi://h/?target_user=t", {}, {}, "add chap_user="),
        (f"iscsi://a%{URL}@h/", {}, {"target_user": "t"}, "no secret for the target"),
        (f"iscsi://a%{URL}@h/?target_user=t", {}, {}, "no secret for the target"),
    ],
)
def test_missing(find: Finder, url: str, environment: dict[str, str], options: dict[str, str], words: str) -> None:
    with pytest.raises(SecretError) as raised:
        find(url, environment, **options)
    assert words in str(raised.value)
    assert ENV not in str(raised.value)


def test_secret_file_without_a_user(find: Finder) -> None:
    with pytest.raises(SecretError, match="nothing says whose"):
        find(chap_secret_file=find.file("f"))


@pytest.mark.parametrize(
    ("url", "environment", "options", "user", "secret"),
    [
        ("", {}, {"target_user": "t", "target_secret_file": "f"}, "t", FILE),
        ("", {}, {"target_secret_file": "f"}, None, FILE),
        (f"?target_user=t&target_password={URL}", {}, {}, "t", URL),
        (f"?target_password={URL}", {}, {}, None, URL),
        ("", {"LIBISCSI_CHAP_TARGET_USERNAME": "e", "LIBISCSI_CHAP_TARGET_PASSWORD": ENV}, {}, "e", ENV),
        (
            f"?target_user=t&target_password={URL}",
            {"LIBISCSI_CHAP_TARGET_USERNAME": "e", "LIBISCSI_CHAP_TARGET_PASSWORD": ENV},
            {},
            "e",
            ENV,
        ),
        (
            f"?target_user=t&target_password={URL}",
            {"LIBISCSI_CHAP_TARGET_USERNAME": "e", "LIBISCSI_CHAP_TARGET_PASSWORD": ENV},
            {"target_user": "t"},
            "t",
            URL,
        ),
    ],
)
def test_mutual(
    find: Finder,
    url: str,
    environment: dict[str, str],
    options: dict[str, str],
    user: str | None,
    secret: str,
) -> None:
    find.file("f")
    if "target_secret_file" in options:
        options = {**options, "target_secret_file": str(find.folder / "f")}
    found = find(f"iscsi://alice%own-secret-own@h/{url}", environment, **options)
    assert found is not None
    assert (found.target_user, (found.target_secret or b"").decode()) == (user, secret)
    assert found.mutual


def test_mutual_with_one_secret_for_both(find: Finder) -> None:
    with pytest.raises(UsageError, match="must differ"):
        find(f"iscsi://alice%{URL}@h/?target_password={URL}")


def test_mutual_asks_for_both(find: Finder) -> None:
    answers = iter(["own-secret-own", "target-secret"])
    found = credentials(
        parse("iscsi://alice@h/?target_user=t"),
        Options(),
        environment={},
        warn=find.warnings.append,
        ask=lambda _: next(answers),
    )
    assert found is not None
    assert (found.secret, found.target_secret) == (b"own-secret-own", b"target-secret")
    assert find.warnings == []


def test_warns_of_a_password_in_a_url(find: Finder) -> None:
    find(f"iscsi://alice%{URL}@h/")
    [warning] = find.warnings
    assert "can be seen" in warning
    assert URL not in warning


def test_warns_even_if_another_source_wins(find: Finder) -> None:
    find(f"iscsi://alice%{URL}@h/", chap_secret_file=find.file("f"))
    assert len(find.warnings) == 1


@pytest.mark.conformance(35)
@pytest.mark.parametrize(("secret", "weak"), [("elevenbytes", True), ("twelve-bytes", False)])
def test_warns_of_a_short_secret(find: Finder, secret: str, weak: bool) -> None:
    find(chap_user="alice", chap_secret_file=find.file("f", secret))
    assert any("fewer than 12 bytes" in warning for warning in find.warnings) is weak
    assert secret not in "".join(find.warnings)


def test_tells_of_another_user_than_the_url_names(find: Finder) -> None:
    environment = {"LIBISCSI_CHAP_USERNAME": "alice", "LIBISCSI_CHAP_PASSWORD": ENV}
    assert pair(find("iscsi://bob@h/", environment)) == ("alice", ENV)
    [warning] = find.warnings
    assert "'alice'" in warning
    assert "'bob'" in warning


@pytest.mark.parametrize(
    ("auth", "offered"),
    [
        ("md5", (5,)),
        ("sha1", (6, 5)),
        ("sha-256", (7, 5)),
        ("sha3-256", (8, 5)),
    ],
)
def test_algorithm(find: Finder, auth: str, offered: tuple[int, ...]) -> None:
    found = find(f"iscsi://alice%{URL}@h/?auth={auth}")
    assert found is not None
    assert found.offered == offered


@pytest.mark.conformance(27)
def test_usual_algorithms(find: Finder) -> None:
    found = find(f"iscsi://alice%{URL}@h/")
    assert found is not None
    assert found.offered[-1] is ChapAlgorithm.MD5
    # tgt takes 7 for SHA1
    assert ChapAlgorithm.SHA256 not in found.offered


@pytest.mark.conformance("B11")
def test_no_secret_in_a_repr(find: Finder) -> None:
    found = find(f"iscsi://alice%{URL}@h/?target_password=another-secret")
    assert URL not in repr(found)
    assert "another-secret" not in repr(found)


# --- files ---


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"secret\n", b"secret"),
        (b"secret", b"secret"),
        (b"secret\r\n", b"secret"),
        (b" sec ret \n", b" sec ret "),
        (b"secret\nmore\n", b"secret"),
        (b"s\xff\x00\n", b"s\xff\x00"),
        (b"user:secret\n", b"user:secret"),
    ],
)
def test_file_content(tmp_path: Path, content: bytes, secret: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(content)
    path.chmod(0o600)
    assert read_secret_file(path) == secret


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_file_of_our_own(find: Finder, mode: int) -> None:
    assert read_secret_file(Path(find.file("f", mode=mode))) == FILE.encode()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o660, 0o610, 0o601])
def test_file_that_others_can_use(find: Finder, mode: int) -> None:
    with pytest.raises(SecretError, match="chmod 600") as raised:
        read_secret_file(Path(find.file("f", mode=mode)))
    assert FILE not in str(raised.value)


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "accepted"),
    [
        (0o440, 0, 0, True),
        (0o400, 0, 0, True),
        (0o444, 0, 0, False),
        (0o440, 0, 50, False),
        (0o640, None, 0, False),
        (0o400, None, 5, True),
    ],
)
def test_file_of_systemd(
    find: Finder, monkeypatch: pytest.MonkeyPatch, mode: int, uid: int | None, gid: int, accepted: bool
) -> None:
    path = Path(find.file("chap", SYSTEMD))
    monkeypatch.setattr("iscsifuse.cli.secrets.os.geteuid", lambda: 1234)
    monkeypatch.setattr("iscsifuse.cli.secrets.os.fstat", lambda _: _status(mode, 1234 if uid is None else uid, gid))
    if accepted:
        assert read_secret_file(path, credential=True) == SYSTEMD.encode()
    else:
        with pytest.raises(SecretError):
            read_secret_file(path, credential=True)


@pytest.mark.parametrize(("owner", "accepted"), [(0, True), (1234, True), (1235, False)])
def test_file_of_another_user(find: Finder, monkeypatch: pytest.MonkeyPatch, owner: int, accepted: bool) -> None:
    path = Path(find.file("f"))
    monkeypatch.setattr("iscsifuse.cli.secrets.os.geteuid", lambda: 1234)
    monkeypatch.setattr("iscsifuse.cli.secrets.os.fstat", lambda _: _status(0o600, owner, 100))
    if accepted:
        assert read_secret_file(path) == FILE.encode()
    else:
        with pytest.raises(SecretError, match="belongs to another user"):
            read_secret_file(path)


def _status(mode: int, uid: int, gid: int) -> os.stat_result:
    return os.stat_result((stat.S_IFREG | mode, 1, 1, 1, uid, gid, 10, 0, 0, 0))


def test_unusable_files(tmp_path: Path) -> None:
    empty, large, fifo = tmp_path / "empty", tmp_path / "large", tmp_path / "fifo"
    empty.write_bytes(b"\nsecret\n")
    large.write_bytes(b"x" * 4097)
    os.mkfifo(fifo, 0o600)
    for path in (empty, large):
        path.chmod(0o600)
    for path, words in (
        (empty, "empty first line"),
        (large, "larger than 4096"),
        (fifo, "no regular file"),
        (tmp_path, "no regular file"),
        (tmp_path / "none", "can't be read: No such file"),
    ):
        with pytest.raises(SecretError, match=words) as raised:
            read_secret_file(path)
        assert str(path) in str(raised.value)


def test_credentials_directory_without_the_credential(find: Finder) -> None:
    assert find(environment={"CREDENTIALS_DIRECTORY": str(find.folder)}) is None


def test_nobody_at_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert ask_on_terminal("?") is None
    with Path("/dev/null").open() as null:
        monkeypatch.setattr("sys.stdin", null)
        assert ask_on_terminal("?") is None
