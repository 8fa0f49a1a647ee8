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
* Only who has put up the bar of an examination takes it down: one that lost its session leaves alone that of the
  next one.

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
_AFTER_LOGIN = object()
"""An examination by the guards, on whichever session."""


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
        self._examining: object = None  # whose bar there is, until that examination tells more
        self._doubted = False  # since the examination that is under way began to look
        self._refreshing = False
        self._capacity_news = 0  # how often a new capacity was announced
        self._capacity_read = 0  # ... when it was read for the last time
        nexus.add_guard(self._prove)
        if nexus.reconnects != unit.description.seen_in:
            self._begin(may_resize=False)  # the session in use began before there was a guard

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
        if self._under_way is None and not self.is_held_back:
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
        self._nexus.prove_soon(partial(self._prove, may_resize=may_resize), then=partial(self._end, under_way))

    def _bar_while_examined(self, examining: object, *, until: float) -> None:
        self._examining = examining
        self._nexus.bar(self._address, SessionLostError(f"{self._unit.label} is being examined"), until=until)

    def _end(self, under_way: trio.Event) -> None:
        if self._examining is under_way:
            self._unbar()  # the session was lost under it; the next one's guards come before any command
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

    async def _prove(self, session: Session, *, may_resize: bool = False) -> bool:
        """Is this the same disk? See the head of this file.

        Args:
            session: where to ask.
            may_resize: whether another capacity is just that: the mount has seen no gap in which more could change.
                Also where the target had announced one.

        Returns:
            Whether that is settled now.
        """
        if self._is_another:
            return True
        unit = self._unit
        wait = not may_resize
        if wait and not self._unproven and self._examining in (None, _AFTER_LOGIN):
            # Others needn't wait for it for long (`guards`), so it may still be examined when the session is used.
            self._bar_while_examined(_AFTER_LOGIN, until=self._nexus.give_up_at)
        commander = unit.make_commander(session, notice=False, limit=PROOF_PATIENCE if wait else None)
        try:
            for _ in range(_MOST_LOOKS):
                await commander.run(cdbs.test_unit_ready())  # It tells what it has to tell.
                self._doubted = False
                news = self._capacity_news
                identity = await examine_identity(VitalProductData(commander))
                capacity = await examine_capacity(commander, version=unit.description.inquiry.version)
                if not self._doubted:
                    break
            else:
                return self._cant_tell(f"{unit.label} can't be examined: it changes all the time", wait=wait)
        except SessionLostError:
            raise
        except IscsifuseError as error:
            gone = isinstance(error, CommandError) and error.asc == _NOT_SUPPORTED
            what = "isn't there any more" if gone else "can't be examined any more"
            return self._cant_tell(f"{unit.label} {what}: {error}", wait=wait)
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
        self._examining = None
        self._nexus.bar(self._address, None)

    def _cant_tell(self, sentence: str, *, wait: bool) -> bool:
        """No command until the unit has proved itself; those that come wait for that as long as for a session."""
        if sentence != self._unproven:
            log.error("%s", sentence)
        gone = not wait and not self._unproven
        self._unproven = sentence
        self._examining = None
        until = self._nexus.give_up_at if wait else 0.0
        self._nexus.bar(self._address, SessionLostError(sentence), until=until)
        if gone and self._unit.on_change is not None:
            self._unit.on_change()
        return False

    def _fail(self, sentence: str) -> None:
        """No command from now on, and nothing of what is cached counts."""
        log.error("%s", sentence)
        self._examining = None
        self._is_another = True
        self._nexus.bar(self._address, IdentityError(sentence))
        if self._unit.on_change is not None:
            self._unit.on_change()
        if self._unit.on_loss is not None:
            self._unit.on_loss()  # To fail in the open, instead of being served for ever from memory.
