"""URLs that a user typed."""

import re
from dataclasses import replace

from fuzz.words import check_message
from iscsifuse.cli.url import parse
from iscsifuse.errors import UrlError
from iscsifuse.iscsi.names import validate_iscsi_name

__all__ = ["check"]

_PLAIN = re.compile(r"[A-Za-z0-9._-]+")
_CANARY = "CanaryThatNobodyMayHear"


def check(data: bytes) -> None:
    """The first byte chooses whether only a portal makes sense, and whether a password is put into the rest."""
    if not data:
        return
    text = data[1:].decode("utf-8", "surrogateescape")
    portal_only = bool(data[0] & 1)
    canary = False
    if data[0] & 2 and _CANARY not in text:
        before, _, after = text.partition("@")
        text = f"{before}%{_CANARY}@{after}"
        canary = True
    try:
        url = parse(text, portal_only=portal_only)
    except UrlError as error:
        check_message(error, secrets=[_CANARY] if canary else [])
        return
    assert url.portal.host
    assert 1 <= url.portal.port <= 65535
    assert url.target_name is None or validate_iscsi_name(url.target_name)
    assert url.lun is None or (url.target_name is not None and 0 <= url.lun <= 16383)
    assert not (portal_only and url.target_name)
    if canary:
        assert _CANARY not in str(url)
        assert _CANARY not in repr(url)
    if url.user is None or _PLAIN.fullmatch(url.user):
        # What is shown in /proc/mounts and in messages means the same, without the secrets.
        shown = parse(url.display, portal_only=portal_only)
        assert shown == replace(url, password=None, target_password=None), "what is shown means something else"
