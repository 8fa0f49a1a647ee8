"""``iscsifuse info``: everything that one target, or one of its LUNs, tells of itself."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from iscsifuse.cli.options import add_flags
from iscsifuse.errors import NothingFoundError, UsageError

if TYPE_CHECKING:
    from iscsifuse.cli.url import IscsiUrl
    from iscsifuse.initiator.inventory import LunDescription
    from iscsifuse.initiator.settings import SessionSettings

__all__ = ["DESCRIPTION", "HELP", "TargetInfo", "as_json", "as_sections", "configure", "run"]

HELP = "tell all about a target or a LUN"
DESCRIPTION = "Logs in to a target, and shows what it and its LUNs (or the one that the URL names) say of themselves."

_PROVISIONING = {0: "not reported", 1: "resource provisioned", 2: "thin provisioned"}
_ASSOCIATIONS = {0: "", 1: " (of the target port)", 2: " (of the target device)"}
_PORT_GROUPS = {0: "no", 1: "implicit", 2: "explicit", 3: "implicit and explicit"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TargetInfo:
    """What was found out.

    Attributes:
        target_name: of the target.
        portal: where we were logged in.
        keys: what was negotiated, in the standard's spelling.
        luns: the LUNs that were asked for.
    """

    target_name: str
    portal: str
    keys: Mapping[str, str]
    luns: "Sequence[LunDescription]"


def configure(parser: argparse.ArgumentParser) -> None:
    """Gives the parser its arguments."""
    parser.add_argument("url", metavar="URL", help="a target, or one LUN")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_flags(parser, mount=False)


def run(namespace: argparse.Namespace) -> int:
    """Carries it out; returns the exit status."""
    import trio

    from iscsifuse.cli.connect import settings_of
    from iscsifuse.cli.url import parse
    from iscsifuse.cli.words import json_text, say

    url = parse(namespace.url)
    found = trio.run(_look, url, settings_of(namespace, url))
    if url.lun is not None and not found.luns:
        raise NothingFoundError(
            f"the target {found.target_name} has no LUN {url.lun}: iscsifuse ls shows those it has"
        )
    say(json_text(as_json(found)) if namespace.json else as_sections(found))
    return 0


async def _look(url: "IscsiUrl", settings: "SessionSettings") -> TargetInfo:
    from iscsifuse.cli.connect import find_targets
    from iscsifuse.initiator.inventory import scan
    from iscsifuse.initiator.nexus import open_nexus
    from iscsifuse.iscsi.names import printable

    places = await find_targets(url, settings)
    if len(places) > 1:
        names = ", ".join(printable(place.name) for place in places[:5]) + (", …" if len(places) > 5 else "")
        raise UsageError(f"{url} offers {len(places)} targets: add the name of one to the URL ({names})")
    [place] = places
    async with open_nexus(place.name, place.portals, settings) as nexus:
        luns = await scan(nexus, only=None if url.lun is None else (url.lun,))
        return TargetInfo(
            target_name=place.name, portal=str(nexus.portal), keys=nexus.negotiated.as_keys(), luns=luns
        )


def as_sections(found: TargetInfo) -> str:
    """Titles, and indented lines of names and values."""
    from iscsifuse.cli.words import pairs
    from iscsifuse.iscsi.names import printable

    sections: list[tuple[str, Mapping[str, str]]] = [
        (f"Target {found.target_name}", {"portal": found.portal, "LUNs": str(len(found.luns))}),
        ("Negotiated keys", found.keys),
    ]
    for unit in found.luns:
        sections += _unit(unit)
    return "\n\n".join(
        pairs(printable(title), {printable(name): printable(value) for name, value in values.items()})
        for title, values in sections
    )


def as_json(found: TargetInfo) -> dict[str, object]:
    """The same as data; bytes are hexadecimal."""
    return {
        "target": found.target_name,
        "portal": found.portal,
        "keys": dict(found.keys),
        "luns": [_unit_as_json(unit) for unit in found.luns],
    }


def _unit(unit: "LunDescription") -> list[tuple[str, Mapping[str, str]]]:
    from iscsifuse.cli.words import exact_size, yes_no

    name = f"LUN {unit.lun}"
    inquiry = unit.inquiry
    general = {
        "type": unit.type_words,
        "vendor": inquiry.vendor or "-",
        "model": inquiry.product or "-",
        "revision": inquiry.revision or "-",
        "address": unit.address.hex(),
        "SPC version": str(inquiry.version),
        "removable medium": yes_no(inquiry.removable),
        "command queueing": yes_no(inquiry.cmdque),
        "several ports": yes_no(inquiry.multi_port),
        "target port groups": _PORT_GROUPS.get(inquiry.tpgs, "?"),
        "protection information": yes_no(inquiry.protect),
    }
    sections: list[tuple[str, Mapping[str, str]]] = [(f"{name}: INQUIRY", general)]
    if not unit.is_disk:
        return sections
    capacity = unit.capacity
    if unit.problem is not None:
        sections.append((f"{name}: problem", {"it can't be used": unit.problem}))
    if capacity is not None:
        sections.append(
            (
                f"{name}: capacity",
                {
                    "size": exact_size(capacity.size),
                    "blocks": str(capacity.blocks),
                    "block size": f"{capacity.block_length} bytes",
                    "physical block size": f"{capacity.physical_block_length} bytes",
                    "first aligned block": str(capacity.lowest_aligned_lba),
                    "protection type": str(capacity.protection_type),
                },
            )
        )
    caching = unit.caching
    sections.append(
        (
            f"{name}: cache and write protection",
            {
                "write-protected": yes_no(unit.write_protected),
                "write cache": "not reported" if caching is None else "on" if caching.wce else "off",
                "read cache": "not reported" if caching is None else "off" if caching.rcd else "on",
                "FUA and DPO": yes_no(unit.dpofua),
            },
        )
    )
    identity = {"serial (80h)": unit.serial or "-"}
    for number, designator in enumerate(unit.designators):
        identity[f"designator {number} (83h)"] = designator.describe() + _ASSOCIATIONS.get(designator.association, "")
    sections.append((f"{name}: identification", identity))
    return sections + _pages(unit)


def _pages(unit: "LunDescription") -> list[tuple[str, Mapping[str, str]]]:
    from iscsifuse.cli.words import yes_no

    name = f"LUN {unit.lun}"
    sections: list[tuple[str, Mapping[str, str]]] = []
    limits = unit.block_limits
    if limits is not None:
        sections.append(
            (
                f"{name}: block limits (B0h), in blocks; 0 is not reported",
                {
                    "longest transfer": str(limits.max_transfer),
                    "best transfer": str(limits.optimal_transfer),
                    "best multiple": str(limits.optimal_granularity),
                    "longest UNMAP": str(limits.max_unmap_lba_count),
                    "ranges in an UNMAP": str(limits.max_unmap_descriptor_count),
                    "best multiple of UNMAP": str(limits.optimal_unmap_granularity),
                    "longest WRITE SAME": str(limits.max_write_same),
                    "longest COMPARE AND WRITE": str(limits.max_compare_and_write),
                    "longest atomic write": str(limits.max_atomic_transfer),
                },
            )
        )
    traits = unit.characteristics
    if traits is not None:
        rate = {0: "not reported", 1: "none, solid state"}.get(traits.rotation_rate, f"{traits.rotation_rate} rpm")
        sections.append(
            (
                f"{name}: characteristics (B1h)",
                {"rotation": rate, "form factor": traits.form_factor_words() or "not reported"},
            )
        )
    thin = unit.provisioning
    if thin is not None or unit.capacity is not None:
        values = {"managed (LBPME)": yes_no(unit.capacity is not None and unit.capacity.lbpme)}
        if thin is not None:
            values |= {
                "provisioning": _PROVISIONING.get(thin.provisioning_type, f"type {thin.provisioning_type}"),
                "UNMAP": yes_no(thin.lbpu),
                "WRITE SAME(16) unmaps": yes_no(thin.lbpws),
                "WRITE SAME(10) unmaps": yes_no(thin.lbpws10),
                "unmapped blocks read as zeros": yes_no(thin.lbprz),
                "anchored blocks": yes_no(thin.anc_sup),
            }
        sections.append((f"{name}: thin provisioning (B2h)", values))
    return sections


def _unit_as_json(unit: "LunDescription") -> dict[str, object]:
    from iscsifuse.cli.ls import lun_as_json

    return {
        **lun_as_json(unit),
        "address": unit.address.hex(),
        "inquiry": _plain(unit.inquiry),
        "capacity": _plain(unit.capacity),
        "designators": [{**_plain_fields(one), "text": one.describe()} for one in unit.designators],
        "block_limits": _plain(unit.block_limits),
        "characteristics": _plain(unit.characteristics),
        "provisioning": _plain(unit.provisioning),
        "caching": _plain(unit.caching),
        "dpofua": unit.dpofua,
    }


def _plain(value: object) -> object:
    """A dataclass as a JSON object."""
    return _plain_fields(value) if dataclasses.is_dataclass(value) else value


def _plain_fields(value: object) -> dict[str, object]:
    fields = dataclasses.fields(value)  # type: ignore[arg-type] # a dataclass, see _plain
    plain = {}
    for field in fields:
        item = getattr(value, field.name)
        plain[field.name] = item.hex() if isinstance(item, bytes) else item
    return plain
