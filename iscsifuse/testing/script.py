"""Faults by rule: *when the nth PDU that goes this way matches, do that*.

A :class:`Rule` names a direction, a predicate, which of the matching PDUs it means, and an action. Each PDU is shown
to every rule in order, so every rule counts; the first rule that is due acts, and only that one. An action (see
``actions``) is a value that turns one PDU into *steps* (pass these bytes, wait, close, hang); whoever owns the byte
stream carries them out (``wire``). So nothing here does I/O, and what a script does depends only on its rules, its
seed and the PDUs.

::

    Script(
        Rule(OUT, Change(lambda r2t: replace(r2t, buffer_offset=2**32 - 4096)), is_a(Opcode.R2T), nth=2),
        Rule(IN, Answer(Status.BUSY), cdb(Scsi.WRITE_10), times=3),
        Rule(OUT, Cut(after=17), cdb(Scsi.READ_10), nth=5),
    )

A predicate sees the PDU, and the SCSI command that its ITT belongs to: ``cdb(Scsi.READ_10)`` matches the command on
its way in, and Data-In, R2T and response on their way out.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from iscsifuse.errors import ParameterDataError
from iscsifuse.iscsi.pdu import Opcode, Pdu
from iscsifuse.iscsi.request import ScsiCommand
from iscsifuse.iscsi.response import DataIn, ScsiResponse
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi import lun as luns
from iscsifuse.testing.actions import Action, Pass, Step, SwapWithNext

__all__ = [
    "IN",
    "OUT",
    "Channel",
    "Direction",
    "Fired",
    "Match",
    "Rule",
    "Script",
    "Seen",
    "all_of",
    "anything",
    "cdb",
    "has_itt",
    "is_a",
    "lba",
    "lun",
]


class Direction(Enum):
    """Which way a PDU travels, as the target sees it."""

    IN = "in"
    OUT = "out"


IN = Direction.IN
OUT = Direction.OUT


@dataclass(frozen=True, slots=True)
class Seen:
    """What a predicate looks at.

    Attributes:
        pdu: the PDU.
        command: the SCSI command that its ITT belongs to (the PDU itself, where it is one), or None.
    """

    pdu: Pdu
    command: ScsiCommand | None


Match = Callable[[Seen], bool]


def anything(seen: Seen) -> bool:  # noqa: ARG001 - a predicate has this signature
    """Matches every PDU."""
    return True


def is_a(*opcodes: Opcode) -> Match:
    """Matches PDUs with one of these operation codes."""
    return lambda seen: seen.pdu.OPCODE in opcodes


def cdb(*opcodes: int) -> Match:
    """Matches what belongs to a SCSI command with one of these operation codes."""
    return lambda seen: seen.command is not None and seen.command.cdb[0] in opcodes


def lun(number: int) -> Match:
    """Matches what belongs to a SCSI command to this logical unit."""
    address = luns.encode(number)
    return lambda seen: seen.command is not None and seen.command.lun == address


def lba(first: int, *, blocks: int = 1) -> Match:
    """Matches what belongs to a command that touches one of these blocks."""

    def match(seen: Seen) -> bool:
        if seen.command is None:
            return False
        try:
            parsed = cdbs.decode(seen.command.cdb)
        except ParameterDataError:
            return False
        return parsed.lba < first + blocks and first < parsed.lba + parsed.blocks

    return match


def has_itt(itt: int) -> Match:
    """Matches PDUs with this Initiator Task Tag."""
    return lambda seen: seen.pdu.itt == itt


def all_of(*matches: Match) -> Match:
    """Matches what all of them match."""
    return lambda seen: all(match(seen) for match in matches)


@dataclass(frozen=True, slots=True)
class Rule:
    """When what happens.

    Attributes:
        direction: ``IN`` from the initiator, ``OUT`` to it.
        action: what to do.
        match: which PDUs count.
        nth: the first of them that is meant, from 1.
        times: how many from there on; 0 is all of them.
        chance: probability that one that is meant is really hit (drawn from the script's seed).
        name: for the log.
    """

    direction: Direction
    action: Action
    match: Match = anything
    nth: int = 1
    times: int = 1
    chance: float = 1.0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Fired:
    """A line of the log: a rule acted.

    Attributes:
        rule: its name, or its number in the script, from 0.
        direction: which way the PDU went.
        opcode: what it was.
        itt: its Initiator Task Tag.
        count: how many matching PDUs the rule had seen then.
    """

    rule: str
    direction: Direction
    opcode: Opcode
    itt: int
    count: int


class Script:
    """The rules of a target, across all of its connections.

    Attributes:
        log: what acted, in order.
    """

    def __init__(self, *rules: Rule, seed: int = 0) -> None:
        self.log: list[Fired] = []
        self._rules: list[tuple[Rule, list[int]]] = []
        self._random = random.Random(seed)  # noqa: S311 - repeatable faults, no secret
        for rule in rules:
            self.add(rule)

    def add(self, rule: Rule) -> None:
        """One more rule; it counts from now on."""
        self._rules.append((rule, [0]))

    def clear(self) -> None:
        """No rule any more."""
        self._rules.clear()

    @property
    def active(self) -> bool:
        """Whether there is any rule."""
        return bool(self._rules)

    def choose(self, direction: Direction, seen: Seen) -> Action | None:
        """The action that is due for this PDU; counts it for every rule that matches."""
        chosen: Action | None = None
        for number, (rule, count) in enumerate(self._rules):
            if rule.direction is not direction or not rule.match(seen):
                continue
            count[0] += 1
            due = count[0] >= rule.nth and (rule.times == 0 or count[0] < rule.nth + rule.times)
            if chosen is None and due and (rule.chance >= 1.0 or self._random.random() < rule.chance):
                chosen = rule.action
                fired = Fired(rule.name or str(number), direction, seen.pdu.OPCODE, seen.pdu.itt, count[0])
                self.log.append(fired)
        return chosen


@dataclass(slots=True)
class Channel:
    """A script's view of one connection: which command an ITT belongs to, and what waits to be overtaken."""

    script: Script
    _commands: dict[int, ScsiCommand] = field(default_factory=dict)
    _held: dict[Direction, list[Step]] = field(default_factory=dict)

    def steps(self, direction: Direction, pdu: Pdu, *, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        """What has to be done with this PDU.

        Args:
            direction: which way it goes.
            pdu: the PDU.
            encode: makes the bytes that would travel, digests included.
        """
        # Commands are remembered even while there is no rule: one may be added before their answers go out.
        if isinstance(pdu, ScsiCommand):
            self._commands[pdu.itt] = pdu
        try:
            return self._steps(direction, pdu, encode)
        finally:
            if isinstance(pdu, ScsiResponse) or (isinstance(pdu, DataIn) and pdu.has_status):
                self._commands.pop(pdu.itt, None)

    def _steps(self, direction: Direction, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        if not self.script.active and not self._held:
            return (Pass(pdu),)
        action = self.script.choose(direction, Seen(pdu, self._commands.get(pdu.itt)))
        steps = (Pass(pdu),) if action is None else action.steps(pdu, encode)
        held = self._held.pop(direction, None)
        if isinstance(action, SwapWithNext):
            self._held[direction] = list(steps)
            steps = ()
        return steps if held is None else (*steps, *held)
