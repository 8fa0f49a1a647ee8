"""Where CHAP secrets come from.

The first that is found wins:

1. the file of ``chap_secret_file=``;
2. ``$CREDENTIALS_DIRECTORY/chap``, which is how systemd hands one to a service;
3. ``LIBISCSI_CHAP_USERNAME`` and ``LIBISCSI_CHAP_PASSWORD``;
4. the URL, with a warning;
5. a question, on a terminal only.

The user is ``chap_user=``, else the one who belongs to the secret's source, else the URL's. A source that belongs to
another user than ``chap_user=`` is passed over, so that nobody's secret is tried as somebody else's. The target's
secret, for mutual CHAP, comes from ``target_secret_file=``, the environment, the URL or a question likewise.

A file that others can read is refused: who can read it can log in. Where it has an access control list, the group
bits of its mode are the list's mask, so the mode tells of that too.

Secrets are returned, and appear in no message.
"""

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from iscsifuse.cli.options import Options
from iscsifuse.cli.url import IscsiUrl
from iscsifuse.errors import SecretError
from iscsifuse.iscsi.chap import ChapAlgorithm, ChapCredentials, weak_secret

__all__ = ["ask_on_terminal", "credentials", "read_secret_file"]

#: Bytes. A secret has 1024 at most; nobody means a larger file.
MAX_FILE = 4096

_ENVIRONMENT = ("LIBISCSI_CHAP_USERNAME", "LIBISCSI_CHAP_PASSWORD")
_ENVIRONMENT_OF_TARGET = ("LIBISCSI_CHAP_TARGET_USERNAME", "LIBISCSI_CHAP_TARGET_PASSWORD")
_ALGORITHMS = {
    "md5": ChapAlgorithm.MD5,
    "sha1": ChapAlgorithm.SHA1,
    "sha-256": ChapAlgorithm.SHA256,
    "sha3-256": ChapAlgorithm.SHA3_256,
}
#: Where nobody chose. Not SHA-256: widely used targets take its number, 7, for SHA1, and then refuse what we answer.
_USUAL = (ChapAlgorithm.SHA3_256, ChapAlgorithm.SHA1, ChapAlgorithm.MD5)


@dataclass(frozen=True, slots=True)
class _Found:
    """A secret, whom it belongs to (None: to whoever was asked for), and what to call its source."""

    user: str | None
    secret: bytes = field(repr=False)
    source: str


def credentials(
    url: IscsiUrl,
    options: Options,
    *,
    environment: Mapping[str, str],
    warn: Callable[[str], None],
    ask: Callable[[str], str | None],
) -> ChapCredentials | None:
    """Finds what CHAP needs, or None where nobody asked for CHAP.

    Args:
        url: may name a user and hold a password.
        options: may name users and files.
        environment: normally ``os.environ``.
        warn: takes one sentence.
        ask: asks for a secret with this prompt; None where nobody is there to answer.

    Raises:
        SecretError: a secret is missing, or its file can't be used; a secret without a user.
        UsageError: a name or a secret that CHAP can't carry.
    """
    if url.password is not None or url.target_password is not None:
        warn("a password in a URL can be seen by others while it is typed and started; chap_secret_file= is safer")
    own = _own(url, options, environment)
    user = options.chap_user or (own and own.user) or url.user or environment.get(_ENVIRONMENT[0]) or None
    if own is not None and user is None:
        raise SecretError(f"{own.source} holds a CHAP secret, but nothing says whose: add chap_user=")
    wants_target = options.target_user or options.target_secret_file or url.target_user or url.target_password
    if user is None:
        if wants_target:
            raise SecretError("the target can prove who it is only to a user who logs in with CHAP: add chap_user=")
        return None
    if own is None:
        own = _asked(ask, f"CHAP secret of {user}: ", option="chap_secret_file=", whose=f"the CHAP user {user!r}")
    elif url.user not in (None, user):
        warn(f"logging in as {user!r} with the secret from {own.source}, not as {url.user!r} whom the URL names")

    target = _of_target(url, options, environment)
    target_user = options.target_user or (target and target.user) or url.target_user or None
    if target is None and wants_target:
        target = _asked(
            ask, f"CHAP secret of the target {target_user}: ", option="target_secret_file=", whose="the target"
        )
    for found, whose in ((own, user), (target, "the target")):
        if found is not None and weak_secret(found.secret):
            warn(f"the CHAP secret of {whose} has fewer than 12 bytes: who listens to a login can guess it")
    return ChapCredentials(
        user=user,
        secret=own.secret,
        target_user=target_user,
        target_secret=None if target is None else target.secret,
        algorithms=_USUAL if url.auth is None else (_ALGORITHMS[url.auth],),
    )


def ask_on_terminal(prompt: str) -> str | None:
    """Asks without showing what is typed; None where standard input or error is no terminal."""
    import sys
    from getpass import getpass

    if not (sys.stdin and sys.stdin.isatty() and sys.stderr and sys.stderr.isatty()):
        return None
    try:
        return getpass(prompt, stream=sys.stderr)
    except EOFError:
        return None


def read_secret_file(path: Path, *, credential: bool = False) -> bytes:
    """The first line of a file that only we can read.

    Args:
        path: of the file.
        credential: systemd's credentials belong to root and may be readable by root's group (that is how the access
            control list for the service's user looks); the directory around them keeps others out.

    Raises:
        SecretError: it can't be read, others can read it, or there is no secret in it.
    """
    try:
        # Not to wait for the writer of a FIFO: what isn't a regular file is refused anyway.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        _refuse(path, f"can't be read: {error.strerror}")
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            _refuse(path, "is no regular file")
        if status.st_uid not in (0, os.geteuid()):
            _refuse(path, "belongs to another user, who can change it: chown it")
        others = 0o007 if credential and status.st_uid == status.st_gid == 0 else 0o077
        if status.st_mode & others:
            _refuse(path, "can be used by others than its owner: chmod 600 it")
        content = os.read(descriptor, MAX_FILE + 1)
    except OSError as error:
        _refuse(path, f"can't be read: {error.strerror}")
    finally:
        os.close(descriptor)
    if len(content) > MAX_FILE:
        _refuse(path, f"is larger than {MAX_FILE} bytes, which no secret is")
    secret = content.partition(b"\n")[0].removesuffix(b"\r")
    if not secret:
        _refuse(path, "has an empty first line, where the secret should be")
    return secret


def _own(url: IscsiUrl, options: Options, environment: Mapping[str, str]) -> _Found | None:
    if options.chap_secret_file is not None:
        return _Found(None, read_secret_file(Path(options.chap_secret_file)), options.chap_secret_file)
    directory = environment.get("CREDENTIALS_DIRECTORY")
    if directory:
        path = Path(directory, "chap")
        if path.exists():
            return _Found(None, read_secret_file(path, credential=True), str(path))
    found = _environment(environment, _ENVIRONMENT)
    if found is not None and _fits(found.user, options.chap_user):
        return found
    if url.password is not None and _fits(url.user, options.chap_user):
        return _Found(url.user, url.password.encode(), "the URL")
    return None


def _of_target(url: IscsiUrl, options: Options, environment: Mapping[str, str]) -> _Found | None:
    if options.target_secret_file is not None:
        return _Found(None, read_secret_file(Path(options.target_secret_file)), options.target_secret_file)
    found = _environment(environment, _ENVIRONMENT_OF_TARGET)
    if found is not None and _fits(found.user, options.target_user):
        return found
    if url.target_password is not None and _fits(url.target_user, options.target_user):
        return _Found(url.target_user, url.target_password.encode(), "the URL")
    return None


def _environment(environment: Mapping[str, str], names: tuple[str, str]) -> _Found | None:
    user, secret = (environment.get(name) or None for name in names)
    return None if secret is None else _Found(user, os.fsencode(secret), names[1])


def _fits(user: str | None, wanted: str | None) -> bool:
    return user is None or wanted is None or user == wanted


def _asked(ask: Callable[[str], str | None], prompt: str, *, option: str, whose: str) -> _Found:
    answer = ask(prompt)
    if not answer:
        raise SecretError(
            f"there is no secret for {whose}: put it into a file of your own and name that with {option}"
        )
    return _Found(None, answer.encode("utf-8", "surrogateescape"), "the terminal")


def _refuse(path: Path, why: str) -> NoReturn:
    raise SecretError(f"the secret file {path} {why}")
