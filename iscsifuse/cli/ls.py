"""``iscsifuse ls``: every LUN of a portal, of a target, or the one that the URL names.

Targets are logged in to at the same time. One that fails is told of and doesn't keep the others from being listed;
the exit status is that of the first failure only if nothing was listed at all.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iscsifuse.cli.options import add_flags
from iscsifuse.errors import IscsifuseError, NothingFoundError

if TYPE_CHECKING:
    from iscsifuse.cli.connect import TargetPlace
    from iscsifuse.cli.url import IscsiUrl
    from iscsifuse.initiator.inventory import LunDescription
    from iscsifuse.initiator.settings import Portal, SessionSettings

__all__ = ["DESCRIPTION", "HELP", "Listing", "as_json", "as_table", "configure", "list_all", "run"]

HELP = "list LUNs: size, block size, vendor, model, serial"
DESCRIPTION = "Logs in to a target, or to all targets of a portal, and lists their LUNs."

_AT_ONCE = 16
_HEADER = ("TARGET", "LUN", "TYPE", "SIZE", "BLOCK", "VENDOR", "MODEL", "SERIAL", "PROTECTED")
_RIGHT = ("LUN", "SIZE", "BLOCK")


@dataclass(slots=True)
class Listing:
    """What was found of one target.

    Attributes:
        target_name: of the target.
        portal: where we were logged in, or None.
        luns: what it has, in its order.
        error: why there is no list.
    """

    target_name: str
    portal: "Portal | None" = None
    luns: "Sequence[LunDescription]" = ()
    error: IscsifuseError | None = None


def configure(parser: argparse.ArgumentParser) -> None:
    """Gives the parser its arguments."""
    parser.add_argument("url", metavar="URL", help="a portal, a target, or one LUN")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_flags(parser, mount=False)


def run(namespace: argparse.Namespace) -> int:
    """Carries it out; returns the exit status."""
    import trio

    from iscsifuse.cli.connect import settings_of
    from iscsifuse.cli.url import parse
    from iscsifuse.cli.words import json_text, note, say
    from iscsifuse.iscsi.names import printable

    url = parse(namespace.url)
    listings = trio.run(list_all, url, settings_of(namespace, url))
    if namespace.json:
        say(json_text({"targets": [as_json(listing) for listing in listings]}))
    elif any(listing.luns for listing in listings):
        say(as_table(listings))
    failures = [listing.error for listing in listings if listing.error is not None]
    for failure in failures:
        note(printable(str(failure)))
    if any(listing.luns for listing in listings):
        return 0
    if failures:
        return failures[0].exit_code
    note(f"{url} has no LUN to show" if url.lun is None else f"there is no LUN {url.lun} at {url}")
    return NothingFoundError.exit_code


async def list_all(url: "IscsiUrl", settings: "SessionSettings") -> list[Listing]:
    """Logs in to every target that the URL means, and scans it.

    Returns:
        A listing for each, in the order of discovery; failures are in there, and not raised.

    Raises:
        IscsifuseError: discovery failed.
    """
    import trio

    from iscsifuse.cli.connect import find_targets
    from iscsifuse.initiator.groups import plain_errors

    places = await find_targets(url, settings)
    listings = [Listing(place.name) for place in places]
    limit = trio.CapacityLimiter(_AT_ONCE)
    with plain_errors():
        async with trio.open_nursery() as nursery:
            for place, listing in zip(places, listings, strict=True):
                nursery.start_soon(_list_one, place, listing, url.lun, settings, limit)
    return listings


async def _list_one(
    place: "TargetPlace",
    listing: Listing,
    lun: int | None,
    settings: "SessionSettings",
    limit: object,
) -> None:
    from typing import cast

    import trio

    from iscsifuse.initiator.inventory import scan
    from iscsifuse.initiator.nexus import open_nexus

    async with cast("trio.CapacityLimiter", limit):
        try:
            async with open_nexus(place.name, place.portals, settings) as nexus:
                listing.portal = nexus.portal
                listing.luns = await scan(nexus, only=None if lun is None else (lun,))
        except IscsifuseError as error:
            listing.error = error


def as_table(listings: Sequence[Listing]) -> str:
    """One line for each LUN, under a header."""
    from iscsifuse.cli.words import size, table, yes_no
    from iscsifuse.iscsi.names import printable

    rows = []
    for listing in listings:
        for unit in listing.luns:
            known = unit.is_disk and unit.capacity is not None
            inquiry = unit.inquiry
            cells = (
                listing.target_name,
                str(unit.lun),
                unit.type_words,
                size(unit.size) if known else "-",
                str(unit.block_length) if known else "-",
                inquiry.vendor or "-",
                inquiry.product or "-",
                unit.serial or "-",
                yes_no(unit.write_protected) if unit.is_disk else "-",
            )
            rows.append([printable(cell) for cell in cells] + [printable(unit.problem or "")])
    return table((*_HEADER, "NOTE" if any(row[-1] for row in rows) else ""), rows, right=_RIGHT)


def as_json(listing: Listing) -> dict[str, object]:
    """The same as data: sizes in bytes."""
    return {
        "target": listing.target_name,
        "portal": None if listing.portal is None else str(listing.portal),
        "error": None if listing.error is None else str(listing.error),
        "luns": [lun_as_json(unit) for unit in listing.luns],
    }


def lun_as_json(unit: "LunDescription") -> dict[str, object]:
    """One LUN as data; what isn't known is null."""
    known = unit.is_disk and unit.capacity is not None
    return {
        "lun": unit.lun,
        "type": unit.type_words,
        "is_disk": unit.is_disk,
        "size": unit.size if known else None,
        "block_size": unit.block_length if known else None,
        "vendor": unit.inquiry.vendor,
        "model": unit.inquiry.product,
        "revision": unit.inquiry.revision,
        "serial": unit.serial,
        "write_protected": unit.write_protected if unit.is_disk else None,
        "problem": unit.problem,
    }
