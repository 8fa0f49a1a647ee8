"""The URL that names a portal, a target or a LUN.

::

    iscsi://[user[%password]@]host[:port]/[target-iqn[/lun]][?key=value[&key=value]...]

How it is taken apart, in this order: the query at the first ``?``, the path at the first ``/``, the user at the last
``@`` (a host can't contain one), the password at a ``%``. Only then is every part percent-decoded, so that an encoded
separator never separates anything.

The ``%`` before a password is also what starts an escape. It is the first ``%`` that leaves two parts which can both
be decoded: ``user%pa%40ss`` is ``user`` and ``pa@ss``, and ``us%40er%pass`` is ``us@er`` and ``pass``.

No message of this module repeats a password, however wrong the text around it is: text with an ``@`` in it is not
quoted.

Source: the syntax is libiscsi's; RFC 3986 §2.1 for percent-encoding, RFC 6874 for IPv6 zones.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

from iscsifuse.cli.values import MAX_LUN
from iscsifuse.errors import IscsifuseError, UrlError
from iscsifuse.initiator.settings import DEFAULT_PORT, Portal
from iscsifuse.iscsi.names import validate_iscsi_name

__all__ = ["AUTH_METHODS", "DIGESTS", "QUERY_KEYS", "IscsiUrl", "parse"]

AUTH_METHODS = ("md5", "sha1", "sha-256", "sha3-256")
DIGESTS = ("none", "crc32c")
QUERY_KEYS = ("header_digest", "data_digest", "auth", "target_user", "target_password")

_FORM = "iscsi://[user[%password]@]host[:port]/[target[/lun]][?key=value]"
_SCHEME = "iscsi://"
_LUN = re.compile(r"[0-9]{1,5}", re.ASCII)
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_BRACKETED = re.compile(r"\[([^\[\]]*)\](.*)", re.DOTALL)
_MAX_HOST = 253


@dataclass(frozen=True, slots=True, kw_only=True)
class IscsiUrl:
    """What a URL says. ``str()`` and ``repr()`` of it hold no password.

    Attributes:
        portal: where to connect to.
        display: the URL as it was typed, without passwords: for messages, logs and /proc/mounts.
        target_name: an iSCSI name, or None where the URL names a portal only.
        lun: 0..16383, or None where the URL names no LUN.
        user: CHAP name, or None.
        password: CHAP secret, or None.
        auth: the CHAP algorithm asked for, one of :data:`AUTH_METHODS`, or None.
        header_digest: True for crc32c, False for none, None where it isn't said.
        data_digest: likewise.
        target_user: name that the target must prove to have, or None.
        target_password: secret that it must know, or None.
    """

    portal: Portal
    display: str
    target_name: str | None = None
    lun: int | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    auth: str | None = None
    header_digest: bool | None = None
    data_digest: bool | None = None
    target_user: str | None = None
    target_password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.display


def parse(text: str, *, portal_only: bool = False) -> IscsiUrl:
    """Takes a URL apart.

    Args:
        text: what was typed.
        portal_only: only a portal makes sense: a bare ``host[:port]`` is accepted, and a target is refused.

    Raises:
        UrlError: in one sentence, what is wrong with it, and what is right.
    """
    if text[: len(_SCHEME)].lower() == _SCHEME:
        rest = text[len(_SCHEME) :]
    elif portal_only and "://" not in text:
        rest = text
    elif "://" in text:
        raise UrlError(f"{_shown(text)} is no iSCSI URL: it has to begin with iscsi://")
    else:
        raise UrlError(f"{_shown(text)} is no URL: what is wanted is {_FORM}")

    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    userinfo, at, hostport = authority.rpartition("@")
    user, password = _user(userinfo) if at else (None, None)
    host, port = _host_and_port(hostport, whole=text)
    target_name, lun = _path(path)
    if portal_only and target_name is not None:
        raise UrlError(f"only a portal is wanted here: leave {_shown('/' + path)} out")
    values = _query(query)
    return IscsiUrl(
        portal=Portal(host, port),
        display=_display(user=user, hostport=hostport, path=path, query=query),
        target_name=target_name,
        lun=lun,
        user=user,
        password=password,
        auth=_choice(values, "auth", AUTH_METHODS),
        header_digest=_digest(values, "header_digest"),
        data_digest=_digest(values, "data_digest"),
        target_user=_filled(values, "target_user"),
        target_password=_filled(values, "target_password"),
    )


def _user(userinfo: str) -> tuple[str, str | None]:
    if "%" not in userinfo:
        if not userinfo:
            raise UrlError("the URL has no user before its @")
        if ":" in userinfo and not userinfo.lower().startswith(("iqn.", "naa.", "eui.")):
            raise UrlError("in an iSCSI URL the password follows a %, not a colon: write user%password@host")
        if _decoded(userinfo) is None:  # an odd command line: bytes that aren't UTF-8
            raise UrlError("the URL's user can't be sent: it has to be UTF-8 without NUL")
        return userinfo, None
    parts = userinfo.split("%")
    for count in range(1, len(parts)):
        user, password = _decoded("%".join(parts[:count])), _decoded("%".join(parts[count:]))
        if user is None or password is None:
            continue
        if not user:
            raise UrlError("the URL has a password, but no user before it: write user%password@host")
        if not password:
            raise UrlError("the URL's password is empty: leave the % out, or write user%password@host")
        return user, password
    raise UrlError("the URL's user or password can't be decoded: write a % that belongs to it as %25")


def _host_and_port(text: str, *, whole: str) -> tuple[str, int]:
    bracketed = _BRACKETED.fullmatch(text)
    if bracketed:
        host, rest = _ipv6(bracketed[1], whole=whole), bracketed[2]
        if rest and not rest.startswith(":"):
            raise UrlError(f"{_quoted(rest, whole)} after the address in brackets is no :port")
        port_text = rest[1:] if rest else None
    else:
        before, colon, after = text.partition(":")
        if ":" in after:
            raise UrlError(
                f"{_quoted(text, whole)}: an IPv6 address has to be in brackets, as in iscsi://[fe80::1]:3260/"
            )
        host = _host(before, whole=whole)
        port_text = after if colon else None
    return host, DEFAULT_PORT if port_text is None else _port(port_text, whole=whole)


def _ipv6(text: str, *, whole: str) -> str:
    from ipaddress import IPv6Address

    # A zone is written %25eth0 in a URL and %eth0 everywhere else: both are meant.
    decoded = _decoded(text)
    host = text if decoded is None else decoded
    try:
        IPv6Address(host)
    except ValueError:
        raise UrlError(f"{_quoted(text, whole)} is no IPv6 address") from None
    return host


def _host(text: str, *, whole: str) -> str:
    host = _decoded(text)
    if not text:
        raise UrlError(f"the URL names no host: what is wanted is {_FORM}")
    if host is None or len(host) > _MAX_HOST or not all(char.isalnum() or char in ".-_" for char in host):
        raise UrlError(f"{_quoted(text, whole)} is no host name and no address")
    return host


def _port(text: str, *, whole: str) -> int:
    if not _PORT.fullmatch(text) or not 1 <= int(text) <= 65535:
        raise UrlError(f"{_quoted(text, whole)} is no port: what is wanted is a number from 1 to 65535")
    return int(text)


def _path(path: str) -> tuple[str | None, int | None]:
    if not path:
        return None, None
    raw_target, slash, raw_lun = path.partition("/")
    target = _decoded(raw_target)
    if not raw_target or target is None:
        raise UrlError(f"{_shown('/' + path)} names no target: what is wanted is {_FORM}")
    try:
        validate_iscsi_name(target)
    except (IscsifuseError, ValueError) as error:
        why = "" if "@" in path else f": {error}"
        raise UrlError(f"{_shown(raw_target)} is no iSCSI name{why}") from None
    if not slash:
        return target, None
    lun = _decoded(raw_lun)
    if lun is None or not _LUN.fullmatch(lun) or int(lun) > MAX_LUN:
        raise UrlError(f"{_shown(raw_lun)} is no LUN: what is wanted is a decimal number from 0 to {MAX_LUN}")
    return target, int(lun)


def _query(query: str) -> Mapping[str, str]:
    values: dict[str, str] = {}
    for item in query.split("&") if query else ():
        raw_key, equals, raw_value = item.partition("=")
        key, value = _decoded(raw_key), _decoded(raw_value)
        if key not in QUERY_KEYS:
            raise UrlError(f"{_shown(raw_key)} is no key of an iSCSI URL: it may have {', '.join(QUERY_KEYS)}")
        if not equals or value is None:
            raise UrlError(f"the URL's {key} has no value that can be decoded: what is wanted is {key}=value")
        if key in values:
            raise UrlError(f"the URL says {key} twice")
        values[key] = value
    return values


def _choice(values: Mapping[str, str], key: str, allowed: tuple[str, ...]) -> str | None:
    value = values.get(key)
    if value is not None and value not in allowed:
        raise UrlError(f"{_shown(value)} is no {key} of an iSCSI URL: it may be {', '.join(allowed)}")
    return value


def _digest(values: Mapping[str, str], key: str) -> bool | None:
    value = _choice(values, key, DIGESTS)
    return None if value is None else value == "crc32c"


def _filled(values: Mapping[str, str], key: str) -> str | None:
    value = values.get(key)
    if value == "":
        raise UrlError(f"the URL's {key} is empty")
    return value


def _decoded(text: str) -> str | None:
    """Percent-decoded, or None where an escape is malformed, or what it says isn't UTF-8 or isn't text."""
    raw = text.encode("utf-8", "surrogateescape")
    if raw.count(b"%") != len(_ESCAPE.findall(raw)):
        return None
    try:
        decoded = _ESCAPE.sub(lambda match: bytes.fromhex(match[1].decode()), raw).decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in decoded else decoded


def _display(*, user: str | None, hostport: str, path: str, query: str) -> str:
    who = "" if user is None else quote(user, safe=":") + "@"
    kept = [
        item for item in query.split("&") if not item.startswith("target_pass") and "%" not in item.partition("=")[0]
    ]
    asked = "&".join(kept)
    return f"{_SCHEME}{who}{hostport}{'/' + path if path else '/'}{'?' + asked if asked else ''}"


def _quoted(part: str, whole: str) -> str:
    return "what stands before the first /" if "@" in whole or "%" in whole else _shown(part)


def _shown(text: str) -> str:
    if "@" in text or "target_pass" in text:
        return "what was typed"
    cut = text if len(text) <= 100 else text[:100] + "…"
    return repr(cut)
