"""Targets that answer from a table, in place of discovery, sessions and scans."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from iscsifuse.errors import IscsifuseError
from iscsifuse.initiator.identity import Identity
from iscsifuse.initiator.inventory import LunDescription
from iscsifuse.initiator.settings import DiscoveredTarget, Portal, SessionSettings, TargetPortal
from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.scsi.capacity import Capacity
from iscsifuse.scsi.inquiry import Inquiry

PORTAL = Portal("10.0.0.1", 3260)


def target(name: str, *portals: tuple[str, int, int]) -> DiscoveredTarget:
    places = portals or (("10.0.0.1", 3260, 1),)
    return DiscoveredTarget(name, tuple(TargetPortal(Portal(host, port), tag) for host, port, tag in places))


def disk(lun: int, *, blocks: int = 131072, block_length: int = 512, **changes: Any) -> LunDescription:
    values: dict[str, Any] = {
        "lun": lun,
        "address": lun.to_bytes(2, "big") + bytes(6),
        "inquiry": Inquiry(vendor="ACME", product="Turbo Disk", revision="1.0", version=6, cmdque=True),
        "capacity": Capacity(last_lba=blocks - 1, block_length=block_length),
    }
    identity = Identity(serial=changes.pop("serial", f"SN{lun}"), designators=changes.pop("designators", ()))
    return LunDescription(**{**values, "identity": identity, **changes})


def controller(lun: int) -> LunDescription:
    inquiry = Inquiry(device_type=0x0C, vendor="ACME", product="Controller", revision="1.0")
    return LunDescription(lun=lun, address=bytes(8), inquiry=inquiry)


@dataclass
class FakeNexus:
    target_name: str
    portal: Portal
    negotiated: NegotiatedParameters = field(default_factory=NegotiatedParameters)


@dataclass
class FakeWorld:
    """What there is: targets, what each has (or why it can't be logged in to), and what was asked for."""

    targets: Sequence[DiscoveredTarget] | IscsifuseError = ()
    luns: Mapping[str, Sequence[LunDescription] | IscsifuseError] = field(default_factory=dict)
    asked: list[tuple[str, tuple[Portal, ...]]] = field(default_factory=list)
    settings: SessionSettings | None = None

    async def discover(self, portal: Portal, settings: SessionSettings) -> list[DiscoveredTarget]:
        self.settings = settings
        self.asked.append(("discovery", (portal,)))
        if isinstance(self.targets, IscsifuseError):
            raise self.targets
        return list(self.targets)

    @asynccontextmanager
    async def open_nexus(
        self, name: str, portals: Sequence[Portal], settings: SessionSettings
    ) -> AsyncIterator[FakeNexus]:
        self.settings = settings
        self.asked.append((name, tuple(portals)))
        luns = self.luns[name]
        if isinstance(luns, IscsifuseError):
            raise luns
        yield FakeNexus(name, portals[0])

    async def scan(self, nexus: FakeNexus, *, only: Collection[int] | None = None) -> list[LunDescription]:
        luns = self.luns[nexus.target_name]
        assert not isinstance(luns, IscsifuseError)
        return [unit for unit in luns if only is None or unit.lun in only]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("iscsifuse.initiator.discovery.discover", self.discover)
        monkeypatch.setattr("iscsifuse.initiator.nexus.open_nexus", self.open_nexus)
        monkeypatch.setattr("iscsifuse.initiator.inventory.scan", self.scan)


def untouched_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD", "TARGET_USERNAME", "TARGET_PASSWORD"):
        monkeypatch.delenv(f"LIBISCSI_CHAP_{name}", raising=False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
