"""Whose disk answers under a unit's number, and how large it is.

::

    free ──news, a login──> being examined ──the same disk──> free
                                │    ^
                                │    └──news meanwhile: once more
                                ├──another disk──> held back for good
                                └──can't tell──> held back ──asked again, and it is the same──> free

When a session was re-established, the unit is examined before any command is let through. If its designators, its
serial number, its block length or its capacity differ, another disk answers in its place: every command fails from
then on, and stays failed, since a write to the wrong disk can't be taken back. A unit that can't be examined yet is
waited for like a session (``reconnect_timeout``), then its commands fail until it proves itself. The nexus holds the
commands back (`Nexus.bar`), also those that wait in it to be replayed; one that doesn't answer holds up no other.

It is examined, too, when the target says that the list of units (to whichever of them: `Nexus.doubt_all`), the medium
or the unit changed; one that isn't there any more then fails at once, until it is back.

Invariants:

* The bar is there when such a status arrives: what is sent a moment later would already be too late.
* What counts is what was read behind the last news: an examination under which there was some begins again.
* There is one examination at a time, the latest that began: what another one finds out, whose session was lost, or
  whose answers took too long, doesn't count any more. So only it takes down the bar.

**Capacity.** A disk may grow or shrink while it is mounted; the target says so (UNIT ATTENTION 2Ah/09h), the capacity
is read again, and ``on_change`` is called. Until it was read, another capacity is no other disk, also in a session
that came meanwhile.

Source: SPC-4 §7.8; SAM-5 §5.14.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import trio

from iscsifuse.errors import (
    CommandError,
    DigestError,
    IdentityError,
    IscsifuseError,
    ParameterDataError,
    SessionLostError,
    TransferError,
)
from iscsifuse.initiator.commander import Commander, Executor
from iscsifuse.initiator.identity import VitalProductData, examine_identity
from iscsifuse.initiator.inventory import LunDescription, examine_capacity
from iscsifuse.initiator.nexus import Nexus, NexusState
from iscsifuse.initiator.session import Session
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.capacity import Capacity

__all__ = ["Examined", "Proof"]

log = logging.getLogger(__name__)

PROOF_PATIENCE = 2.0
"""Seconds that a unit has to become ready after a new login: other disks wait for it. It is asked again later."""
_MOST_LOOKS = 10
"""How often a unit is examined anew because it told of changes meanwhile, before it is let alone for a while."""
_NOT_SUPPORTED = 0x25


class Examined(Protocol):
    """A logical unit, as its proof sees it; see `LogicalUnit`."""

    label: str
    description: LunDescription
    block_length: int
    block_count: int
    on_change: Callable[[], None] | None
    on_loss: Callable[[], None] | None

    def make_commander(
        self, executor: Executor, *, notice: bool = True, limit: float | None = None, may_start: bool = True
    ) -> Commander:
        """Who tries its commands."""
        ...


class Proof:
    """That a unit is the disk that was mounted. A guard of its nexus.

    Args:
        nexus: the session with its target.
        unit: the unit.
    """

    def __init__(self, nexus: Nexus, unit: Examined) -> None:
        self._nexus = nexus
        self._unit = unit
        self._address = unit.description.address
        self._identity = unit.description.identity
        self._is_another = False
        self._unproven = ""  # why it can't be told whether it is
        self._under_way: trio.Event | None = None  # the end of the examination that news asked for
        self._current: object = None  # the examination that counts, while it is under way
        self._doubted = False  # since that began to look
        self._refreshing = False
        self._capacity_news = 0  # how often a new capacity was announced
        self._capacity_read = 0  # ... when it was read for the last time
        nexus.add_guard(self._guard)
        if nexus.epoch != unit.description.seen_in:
            self._begin(may_resize=False)  # the session in use began, or there was news, before there was a guard

    @property
    def is_held_back(self) -> bool:
        """Whether it is another disk, or it can't be told whether it is."""
        return self._is_another or bool(self._unproven)

    # -- news ------------------------------------------------------------------------------------------------------

    def doubt(self) -> None:
        """From now on it may be another disk that answers: nothing is sent to it before that is known."""
        self._doubted = True
        if self._nexus.state is not NexusState.LOGGED_IN:
            return  # the guards look at the next session before any command
        if self._current is None and not self.is_held_back:
            self._begin(may_resize=True)

    def announce_capacity(self) -> None:
        """The target has announced another capacity."""
        self._capacity_news += 1
        self._doubted = True

    async def wait(self) -> None:
        """Until nothing is being examined because of news."""
        while self._under_way is not None:
            await self._under_way.wait()

    def _begin(self, *, may_resize: bool) -> None:
        """In its own task: whoever wants it may be cancelled, and others wait for its end."""
        under_way = self._under_way = trio.Event()
        self._bar_while_examined(under_way, until=math.inf)
        examine = partial(self._examine, under_way, may_resize=may_resize)
        self._nexus.prove_soon(examine, then=partial(self._end, under_way))

    def _bar_while_examined(self, examination: object, *, until: float) -> None:
        self._current = examination
        self._nexus.bar(self._address, SessionLostError(f"{self._unit.label} is being examined"), until=until)

    def _end(self, under_way: trio.Event) -> None:
        if self._current is under_way:
            self._unbar()  # the session was lost under it; the next one's guards come before any command
        if self._under_way is under_way:
            self._under_way = None
        under_way.set()

    # -- capacity --------------------------------------------------------------------------------------------------

    @property
    def _capacity_is_old(self) -> bool:
        """Whether another capacity was announced than is known. Stays so where it couldn't be read."""
        return self._capacity_read != self._capacity_news

    async def refresh_capacity(self) -> None:
        """Read a capacity that was announced, unless somebody does so already."""
        if self._refreshing:
            return
        # Invariant: _refreshing is set before the first await, so commands that meet the same news don't
        # pile up; what they say while it is being read is not lost.
        self._refreshing = True
        try:
            while self._capacity_is_old and await self._read_capacity():
                pass
        finally:
            self._refreshing = False

    async def _read_capacity(self) -> bool:
        """Whether that worked."""
        news = self._capacity_news
        unit = self._unit
        commander = unit.make_commander(self._nexus, notice=False)
        try:
            capacity = await examine_capacity(commander, version=unit.description.inquiry.version)
        except (CommandError, ParameterDataError, TransferError, DigestError) as error:
            log.warning("%s: its new capacity can't be read: %s", unit.label, error)
            return False
        self._capacity_read = news
        self._resize(capacity)
        return True

    def _resize(self, capacity: Capacity) -> None:
        unit = self._unit
        if capacity.block_length != unit.block_length:
            self._fail(f"{unit.label} changed its block length from {unit.block_length} to {capacity.block_length}")
            return
        log.info("%s: capacity is now %d blocks, was %d", unit.label, capacity.blocks, unit.block_count)
        unit.block_count = capacity.blocks
        if unit.on_change is not None:
            unit.on_change()

    # -- the examination -------------------------------------------------------------------------------------------

    async def _guard(self, session: Session) -> bool:
        """After a login; see `guards`. Takes the place of whatever else looks at it."""
        if self._is_another:
            return True
        examination = object()
        if self._unproven:
            self._current = examination  # and it is held back already
        else:
            # Others needn't wait for it for long (`guards`), so it may still be examined when the session is used.
            self._bar_while_examined(examination, until=self._nexus.give_up_at)
        return await self._prove(session, examination, may_resize=False)

    async def _examine(self, under_way: trio.Event, session: Session, *, may_resize: bool) -> bool:
        """Because of news; called again as long as it can't be told."""
        if self._is_another or self._current not in (None, under_way):
            return True
        self._current = under_way
        return await self._prove(session, under_way, may_resize=may_resize)

    async def _prove(self, session: Session, examination: object, *, may_resize: bool) -> bool:
        """Is this the same disk? See the head of this file.

        Args:
            session: where to ask.
            examination: this one. Nothing comes of it if another one has taken its place meanwhile.
            may_resize: whether another capacity is just that: the mount has seen no gap in which more could change.
                Also where the target had announced one.

        Returns:
            Whether that is settled now.
        """
        unit = self._unit
        wait = not may_resize
        commander = unit.make_commander(session, notice=False, limit=PROOF_PATIENCE if wait else None)
        try:
            for _ in range(_MOST_LOOKS):
                await commander.run(cdbs.test_unit_ready())  # It tells what it has to tell.
                if self._current is not examination:
                    return True  # and what was told is for the other one
                self._doubted = False
                news = self._capacity_news
                identity = await examine_identity(VitalProductData(commander))
                capacity = await examine_capacity(commander, version=unit.description.inquiry.version)
                if not self._doubted or self._current is not examination:
                    break
            else:
                return self._cant_tell(f"{unit.label} can't be examined: it changes all the time", wait=wait)
        except SessionLostError:
            raise
        except IscsifuseError as error:
            if self._current is not examination:
                return True
            gone = isinstance(error, CommandError) and error.asc == _NOT_SUPPORTED
            what = "isn't there any more" if gone else "can't be examined any more"
            return self._cant_tell(f"{unit.label} {what}: {error}", wait=wait)
        if self._current is not examination:
            return True
        if self._identity.is_missing_in(identity):
            return self._cant_tell(f"{unit.label} doesn't say any more who it is", wait=wait)
        if not self._identity.agrees_with(identity):
            self._fail(f"another disk answers where {unit.label} was: its identity is not the one that was mounted")
        elif (capacity.block_length, capacity.blocks) == (unit.block_length, unit.block_count):
            self._capacity_read = news
            self._unbar()
        elif may_resize or self._capacity_is_old:
            self._capacity_read = news
            self._unbar()
            self._resize(capacity)
        else:
            self._fail(
                f"{unit.label} came back with {capacity.blocks} blocks of {capacity.block_length} bytes instead of "
                f"{unit.block_count} of {unit.block_length}"
            )
        if not self._is_another and identity.unread < self._identity.unread:
            self._identity = identity  # it says more than it did at first
        return True

    def _unbar(self) -> None:
        if self._unproven:
            log.warning("%s is there again", self._unit.label)
        self._unproven = ""
        self._current = None
        self._nexus.bar(self._address, None)

    def _cant_tell(self, sentence: str, *, wait: bool) -> bool:
        """No command until the unit has proved itself; those that come wait for that as long as for a session."""
        if sentence != self._unproven:
            log.error("%s", sentence)
        gone = not wait and not self._unproven
        self._unproven = sentence
        self._current = None
        until = self._nexus.give_up_at if wait else 0.0
        self._nexus.bar(self._address, SessionLostError(sentence), until=until)
        if gone and self._unit.on_change is not None:
            self._unit.on_change()
        return False

    def _fail(self, sentence: str) -> None:
        """No command from now on, and nothing of what is cached counts."""
        log.error("%s", sentence)
        self._current = None
        self._is_another = True
        self._nexus.bar(self._address, IdentityError(sentence))
        if self._unit.on_change is not None:
            self._unit.on_change()
        if self._unit.on_loss is not None:
            self._unit.on_loss()  # To fail in the open, instead of being served for ever from memory.
