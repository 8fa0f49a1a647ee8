"""From a plan to disks: discover, log in everywhere at once, look what is there, put a cache on each disk.

One task holds one target. It logs in, scans, offers its disks, then waits for the end of the mount, and logs out.
Whether a target could be used is settled exactly once, by its disks or by its failure; ``open`` waits for them all.

What isn't a reason to mount nothing: a target that can't be logged in to, a disk that isn't ready, a name that must
not become a directory. It is told as a warning, and the mount is ``partial``. If nothing is left at all, the first
failure is what the user hears.

**New LUNs.** A target tells of a change of its list (UNIT ATTENTION 3Fh/0Eh) with the next command to any of its
disks. Then it is asked for its LUNs again, and new disks are offered (``Assembly.on_new``); likewise after each new
login, since a target that was restarted tells of nothing. In a mount where nobody does anything there is no next
command, so each disk is sent a TEST UNIT READY every ``LOOK_EVERY`` seconds, which also makes a disk that grew known.
A mount of one LUN stays one. A target that had no disk when it was mounted isn't logged in to, and gets none.
"""

import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address

import trio

from iscsifuse.cache import BlockFile, BufferPool, CacheSettings, block_file
from iscsifuse.errors import FormatError, IscsifuseError, NothingFoundError
from iscsifuse.initiator.discovery import discover
from iscsifuse.initiator.groups import plain_errors
from iscsifuse.initiator.inventory import LunDescription, scan
from iscsifuse.initiator.logical_unit import LogicalUnit
from iscsifuse.initiator.nexus import Nexus, open_nexus
from iscsifuse.initiator.quirks import hear_tgtd, make_room_in_tgtd
from iscsifuse.initiator.session import Session
from iscsifuse.initiator.settings import DiscoveredTarget, Portal
from iscsifuse.initiator.statistics import CommandStatistics
from iscsifuse.iscsi.names import validate_iscsi_name
from iscsifuse.mount.breakdown import Breakdown
from iscsifuse.mount.plan import MountPlan
from iscsifuse.mount.report import SessionReporter
from iscsifuse.mount.tree import Disk

__all__ = ["Assembly", "assemble", "portals_of"]

log = logging.getLogger(__name__)

LOOK_EVERY = 10.0
"""Seconds between two looks at disks that nobody may be using."""
SCAN_PAUSE = 1.0
"""Seconds between two answers to a target that keeps telling of changes."""
_LOGINS_AT_ONCE = 16
_LOGOUT_LIMIT = 10.0
"""Seconds for all sessions together to end."""


@dataclass(slots=True, kw_only=True)
class Assembly:
    """Everything that a mount stands on.

    Attributes:
        disks: in the order of a listing.
        partial: something that was asked for isn't there.
        sessions: one for each target that is in use.
        statistics: of all sessions.
        details: more about each disk, for the status.
        on_change: called after the size or the medium of a disk changed; its cache has been dropped already.
        on_new: called when a disk was added to ``disks``.
        breakdown: whether something that the disks stand on has ended. The others can still be written back then.
    """

    disks: list[Disk] = field(default_factory=list)
    partial: bool = False
    sessions: Sequence[SessionReporter] = ()
    statistics: CommandStatistics = field(default_factory=CommandStatistics)
    details: dict[Disk, Mapping[str, object]] = field(default_factory=dict)
    on_change: Callable[[Disk], None] | None = None
    on_new: Callable[[Disk], None] | None = None
    breakdown: Breakdown = field(default_factory=Breakdown)


@dataclass(slots=True, eq=False)
class _Target:
    """One target of a plan, and what became of it."""

    name: str
    portals: tuple[Portal, ...]
    settled: trio.Event = field(default_factory=trio.Event)
    error: IscsifuseError | None = None
    nexus: Nexus | None = None
    descriptions: list[LunDescription] = field(default_factory=list)
    disks: dict[Disk, LunDescription] = field(default_factory=dict)
    units: list[LogicalUnit] = field(default_factory=list)
    news: trio.Event = field(default_factory=trio.Event)

    def has_news(self) -> None:
        """Its list of LUNs may have changed."""
        self.news.set()

    async def on_session(self, _: Session) -> bool:
        """A guard of its nexus: the list may be another one in a new session."""
        self.has_news()
        return True


def portals_of(target: DiscoveredTarget, typed: Portal) -> tuple[Portal, ...]:
    """Where to log in to a discovered target, the best place first.

    The portal that the user typed comes first if the target says that it is there, or if it is a host name (the
    target lists addresses, so it can't say). Else it comes last: with address translation in between it is the only
    one that works.
    """
    listed = [place.portal for place in target.portals]
    try:
        ip_address(typed.host)
        first = typed in listed
    except ValueError:
        first = True
    places = (typed, *listed) if first else (*listed, typed)
    known = {portal: portal for portal in listed}  # these know their portal groups; what was typed doesn't
    return tuple(dict.fromkeys(known.get(portal, portal) for portal in places))


@asynccontextmanager
async def assemble(plan: MountPlan) -> AsyncIterator[Assembly]:
    """Log in, and offer the disks; log out at the end.

    The caller has written back (``sync``) what the body wrote before it leaves: the caches end first.

    Raises:
        NothingFoundError: no such LUN, no disk, no target.
        IscsifuseError: of discovery or login, where nothing else could be used.

    Cancellation: logs out, bounded in time.
    """
    assembler = _Assembler(plan)
    with plain_errors():
        async with trio.open_nursery() as nursery:
            try:
                await assembler.open(nursery)
                yield assembler.assembly
            finally:
                assembler.closing.set()
                # Logouts that take too long are cut off; what was in the caches is gone by now anyway.
                nursery.cancel_scope.deadline = min(
                    nursery.cancel_scope.deadline, trio.current_time() + _LOGOUT_LIMIT
                )


class _Assembler:
    def __init__(self, plan: MountPlan) -> None:
        self.assembly = Assembly()
        self.closing = trio.Event()
        self._plan = plan
        # The promise of a read-only mount is the initiator's: it doesn't hang on how the plan was made.
        self._session = dataclasses.replace(plan.session, read_only=not plan.read_write)
        self._pool = BufferPool(0 if plan.direct_io else plan.cache_size)
        self._cache = CacheSettings(
            read_ahead=plan.read_ahead, write_behind=plan.write_behind, direct=plan.direct_io, keep_strays=False
        )
        self._logins = trio.Semaphore(_LOGINS_AT_ONCE)

    async def open(self, nursery: trio.Nursery) -> None:
        """Log in everywhere, and fill in the assembly; its errors are those of ``assemble``."""
        targets = await self._targets()
        for target in targets:
            nursery.start_soon(self._hold, target)
        for target in targets:
            await target.settled.wait()
        used = [target for target in targets if target.disks]
        failed = [(target.name, target.error) for target in targets if target.error is not None]
        if not used:
            raise failed[0][1] if failed else self._nothing(targets)
        for name, error in failed:
            self._leave_out(str(error) if name in str(error) else f"{name} is left out: {error}")
        for lun in self._plan.luns:
            if not any(disk.lun == lun for target in used for disk in target.disks):
                self._leave_out(f"no target has a usable disk with LUN {lun}")
        assembly = self.assembly
        assembly.disks = [disk for target in used for disk in target.disks]
        assembly.sessions = [target.nexus for target in used if target.nexus is not None]
        assembly.details = {
            disk: _details(description) for target in used for disk, description in target.disks.items()
        }
        assembly.breakdown.check()

    async def _targets(self) -> list[_Target]:
        plan = self._plan
        if plan.target_name is not None:
            return [_Target(plan.target_name, (plan.portal,))]
        found: dict[str, _Target] = {}
        for target in await discover(plan.portal, self._session):
            try:
                name = validate_iscsi_name(target.name)
            except FormatError as error:
                self._leave_out(f"{plan.portal} offers a target that can't be shown: {error}")
                continue
            found.setdefault(name, _Target(name, portals_of(target, plan.portal)))
        if not found:
            raise NothingFoundError(f"{plan.portal} offers no target to {plan.session.initiator_name}")
        return list(found.values())

    async def _hold(self, target: _Target) -> None:
        """Keep one target logged in until the end of the mount. Ends early if it can't be used."""
        await self._logins.acquire()
        try:
            async with open_nexus(
                target.name, target.portals, self._session, statistics=self.assembly.statistics
            ) as nexus:
                target.nexus = nexus
                chosen = await self._choose(nexus, target)
                if chosen:
                    await self._serve(nexus, target, chosen)
        except Exception as error:
            if target.settled.is_set() and not self.closing.is_set():
                self.assembly.breakdown.note(error)  # Its disks are gone; those of other targets aren't.
            elif not isinstance(error, IscsifuseError):
                raise
            elif target.settled.is_set():
                log.warning("%s", error)
            else:
                target.error = error
        finally:
            self._settle(target)

    async def _serve(self, nexus: Nexus, target: _Target, chosen: Sequence[LunDescription]) -> None:
        """Offer the disks of a target, until the end of the mount."""
        async with trio.open_nursery() as caches:
            for description in chosen:
                await self._offer(nexus, target, description, caches)
            nexus.add_guard(target.on_session)
            caches.start_soon(self._watch, nexus, target, caches)
            self._settle(target)
            await self.closing.wait()
            caches.cancel_scope.cancel()

    def _settle(self, target: _Target) -> None:
        """It is known what becomes of a target; the next one may log in."""
        if not target.settled.is_set():
            target.settled.set()
            self._logins.release()

    async def _watch(self, nexus: Nexus, target: _Target, caches: trio.Nursery) -> None:
        """Keep an eye on what a target has; see the module. No disk shall suffer for a mistake in it."""
        try:
            await self._look_around(nexus, target, caches)
        except Exception:
            log.exception(
                "a mistake of ours: new disks of %s, and new sizes, aren't looked for any more", target.name
            )

    async def _look_around(self, nexus: Nexus, target: _Target, caches: trio.Nursery) -> None:
        # What became new since the scan would be missed where this takes the notice of it away.
        due = await make_room_in_tgtd(nexus, target.disks.values())
        while True:
            if due:
                if self._plan.lun is None:
                    await self._look_for_more(nexus, target, caches)
                await trio.sleep(SCAN_PAUSE)
            with trio.move_on_after(LOOK_EVERY):
                await target.news.wait()
            due = target.news.is_set()
            if due:
                target.news = trio.Event()
                await make_room_in_tgtd(nexus, target.disks.values())  # It may have been started anew.
            else:
                for unit in list(target.units):
                    await unit.look()
                await hear_tgtd(nexus, target.disks.values())

    async def _look_for_more(self, nexus: Nexus, target: _Target, caches: trio.Nursery) -> None:
        """Offer the disks that are new."""
        known = {disk.lun for disk in target.disks}
        try:
            found = await scan(nexus, only=set(self._plan.luns) or None, without=known)
        except IscsifuseError as error:
            log.warning("%s: its LUNs can't be listed again: %s", target.name, error)
            return
        for description in found:
            if not description.usable:
                log.info("%s", _why_not(target.name, description))
                continue
            disk = await self._offer(nexus, target, description, caches)
            if disk is not None:
                log.warning("LUN %d of %s is new; it has %d bytes", disk.lun, disk.target, disk.file.size)
                self.assembly.disks.append(disk)
                self.assembly.details[disk] = _details(description)
                if self.assembly.on_new is not None:
                    self.assembly.on_new(disk)

    async def _offer(
        self, nexus: Nexus, target: _Target, description: LunDescription, caches: trio.Nursery
    ) -> Disk | None:
        """Make a disk of a LUN; None where that can't be."""
        unit = LogicalUnit(nexus, description)
        try:
            file = block_file(unit, pool=self._pool, settings=self._cache)
        except IscsifuseError as error:
            self._leave_out(f"{unit.label} can't be used: {error}")
            return None
        await caches.start(self._run, file)
        if self._plan.read_write and description.write_protected:
            log.warning("%s is write-protected: it can only be read", unit.label)
        disk = Disk(
            target.name, description.lun, file, writable=self._plan.read_write and not description.write_protected
        )
        target.disks[disk] = description
        target.units.append(unit)

        def changed() -> None:
            file.invalidate()
            if self.assembly.on_change is not None:
                self.assembly.on_change(disk)

        unit.on_change = changed
        unit.on_loss = file.lose
        unit.on_deferred = file.report
        unit.on_inventory = target.has_news
        return disk

    async def _run(self, file: BlockFile, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The background work of a disk. Where it breaks down, what others have to write is kept."""
        with self.assembly.breakdown.contained():
            await file.run(task_status=task_status)

    async def _choose(self, nexus: Nexus, target: _Target) -> list[LunDescription]:
        """The LUNs of a target that are to be mounted.

        Raises:
            NothingFoundError: the one LUN that the URL names isn't there, or is no disk.
        """
        plan = self._plan
        if plan.lun is not None:
            found = await scan(nexus, only={plan.lun})
            if not found:
                others = ", ".join(str(one.lun) for one in await scan(nexus)) or "none"
                raise NothingFoundError(f"{target.name} has no LUN {plan.lun}; the LUNs it shows: {others}")
            description = found[0]
            if not description.usable:
                raise NothingFoundError(_why_not(target.name, description))
            return [description]
        target.descriptions = await scan(nexus, only=set(plan.luns) or None)
        chosen = []
        for description in target.descriptions:
            if description.usable:
                chosen.append(description)
            elif description.is_disk:
                self._leave_out(_why_not(target.name, description))
            else:
                log.info("%s", _why_not(target.name, description))
        return chosen

    def _nothing(self, targets: Iterable[_Target]) -> NothingFoundError:
        """Why there is nothing to mount, though every target let us in."""
        plan = self._plan
        place = plan.target_name or str(plan.portal)
        if plan.luns:
            wanted = ", ".join(map(str, plan.luns))
            return NothingFoundError(f"{place} has no usable disk with LUN {wanted}")
        seen = [_why_not(target.name, description) for target in targets for description in target.descriptions]
        return NothingFoundError(f"{place} has no disk" + (f": {'; '.join(seen[:8])}" if seen else ""))

    def _leave_out(self, why: str) -> None:
        log.warning("%s", why)
        self.assembly.partial = True


def _why_not(target: str, description: LunDescription) -> str:
    """Why a LUN isn't shown, as a sentence."""
    label = f"LUN {description.lun} of {target}"
    if not description.is_disk:
        return f"{label} is not a disk, but a {description.type_words}"
    return f"{label} can't be used: {description.problem or 'it does not tell its capacity'}"


def _details(description: LunDescription) -> dict[str, object]:
    inquiry = description.inquiry
    return {
        "block_length": description.block_length,
        "vendor": inquiry.vendor,
        "product": inquiry.product,
        "revision": inquiry.revision,
        "serial": description.serial,
        "write_protected": description.write_protected,
    }
