"""What the commands that talk to targets share: settings from a command line, and which targets a URL means."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from iscsifuse.cli.initiator_name import default_initiator_name
from iscsifuse.cli.options import Options, resolve
from iscsifuse.cli.secrets import ask_on_terminal, credentials
from iscsifuse.cli.url import IscsiUrl
from iscsifuse.cli.words import note
from iscsifuse.errors import NothingFoundError
from iscsifuse.initiator.settings import Portal, SessionSettings

__all__ = ["TargetPlace", "find_targets", "session_settings", "settings_of"]


@dataclass(frozen=True, slots=True)
class TargetPlace:
    """A target, and the portals at which to try to log in to it, the best one first."""

    name: str
    portals: tuple[Portal, ...]


def session_settings(url: IscsiUrl, options: Options) -> SessionSettings:
    """How to log in: what the options say, else the URL, else the defaults. Asks for a secret where that is needed.

    Raises:
        UsageError: names or secrets that can't be used; a SecretError where one is missing.
    """
    # What wasn't said is left to SessionSettings' own defaults.
    said = {
        name: value
        for name in ("timeout", "login_timeout", "reconnect_timeout")
        if (value := getattr(options, name)) is not None
    }
    return SessionSettings(
        initiator_name=options.initiator_name or default_initiator_name(),
        header_digest=_first(options.header_digest, url.header_digest),
        data_digest=_first(options.data_digest, url.data_digest),
        chap=credentials(url, options, environment=os.environ, warn=note, ask=ask_on_terminal),
        read_only=not options.read_write,
        **said,
    )


def settings_of(namespace: argparse.Namespace, url: IscsiUrl) -> SessionSettings:
    """The settings of a command that only looks."""
    return session_settings(url, resolve(namespace.settings))


async def find_targets(url: IscsiUrl, settings: SessionSettings) -> Sequence[TargetPlace]:
    """The target that a URL names, or all that its portal offers, in its order.

    Raises:
        NothingFoundError: the portal offers no target.
        IscsifuseError: whatever discovery raises.
    """
    if url.target_name is not None:
        return [TargetPlace(url.target_name, (url.portal,))]
    from iscsifuse.initiator.discovery import discover
    from iscsifuse.mount.assembly import portals_of

    found = await discover(url.portal, settings)
    if not found:
        raise NothingFoundError(f"{url.portal} offers no target to {settings.initiator_name}")
    return [TargetPlace(target.name, portals_of(target, url.portal)) for target in found]


def _first(chosen: bool | None, fallback: bool | None) -> bool:
    return bool(fallback) if chosen is None else chosen
