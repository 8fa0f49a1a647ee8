"""``iscsifuse discover``: which targets a portal offers, and where.

The lines are those of ``iscsiadm -m discovery -t sendtargets``, to the letter: scripts read them.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from iscsifuse.cli.options import add_flags

if TYPE_CHECKING:
    from iscsifuse.initiator.settings import DiscoveredTarget

__all__ = ["DESCRIPTION", "HELP", "as_json", "as_lines", "configure", "run"]

HELP = "list the targets that a portal offers"
DESCRIPTION = "Asks a portal for its targets (SendTargets), and prints a line for each portal of each of them."


def configure(parser: argparse.ArgumentParser) -> None:
    """Gives the parser its arguments."""
    parser.add_argument("url", metavar="URL", help="iscsi://host[:port]/, or host[:port]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_flags(parser, mount=False)


def run(namespace: argparse.Namespace) -> int:
    """Carries it out; returns the exit status."""
    import trio

    from iscsifuse.cli.connect import settings_of
    from iscsifuse.cli.url import parse
    from iscsifuse.cli.words import json_text, note, say
    from iscsifuse.errors import NothingFoundError
    from iscsifuse.initiator.discovery import discover

    url = parse(namespace.url, portal_only=True)
    targets = trio.run(discover, url.portal, settings_of(namespace, url))
    if namespace.json:
        say(json_text({"portal": str(url.portal), "targets": as_json(targets)}))
    else:
        for line in as_lines(targets):
            say(line)
    if not targets:
        note(f"{url.portal} offers no target")
        return NothingFoundError.exit_code
    return 0


def as_lines(targets: "Sequence[DiscoveredTarget]") -> list[str]:
    """``10.0.0.1:3260,1 iqn.2004-04.com.example:disk``; IPv6 addresses in brackets."""
    from iscsifuse.iscsi.names import printable

    return [printable(f"{place} {target.name}") for target in targets for place in target.portals]


def as_json(targets: "Sequence[DiscoveredTarget]") -> list[dict[str, object]]:
    """The same as data."""
    return [
        {
            "target": target.name,
            "portals": [
                {"host": place.portal.host, "port": place.portal.port, "tag": place.tag} for place in target.portals
            ],
        }
        for target in targets
    ]
