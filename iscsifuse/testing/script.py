"""Faults by rule: *when the nth PDU that goes this way matches, do that*.

A :class:`Rule` names a direction, a predicate, which of the matching PDUs it means, and an action. Each PDU is shown to
every rule in order, so every rule counts; the first rule that is due acts, and only that one. An action is a
value that turns one PDU into *steps* (pass these bytes, wait, close, hang); whoever owns the byte stream carries them
out (``wire``). So nothing here does I/O, and what a script does depends only on its rules, its seed and the PDUs.

::

    Script(
        Rule(OUT, match=is_a(Opcode.R2T), nth=2, action=Change(lambda pdu: replace(pdu, buffer_offset=0xFFFFF000))),
        Rule(IN, match=cdb(Scsi.WRITE_10), action=Answer(Status.BUSY), times=3),
        Rule(OUT, match=cdb(Scsi.READ_10), nth=5, action=Cut(after=17)),
    )

A predicate sees the PDU, and the SCSI command that its ITT belongs to: ``cdb(Scsi.READ_10)`` matches the command on its
way in, and Data-In, R2T and response on their way out.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from iscsifuse.errors import ParameterDataError
from iscsifuse.iscsi.pdu import BHS_LENGTH, Opcode, Pdu, decode, split_lengths
from iscsifuse.iscsi.request import ScsiCommand
from iscsifuse.iscsi.response import DataIn, ScsiResponse
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi import lun as luns

__all__ = [
    "IN",
    "OUT",
    "Action",
    "Answer",
    "Call",
    "Change",
    "ChangeBytes",
    "Channel",
    "Close",
    "Cut",
    "Delay",
    "Direction",
    "Drop",
    "Duplicate",
    "End",
    "Fired",
    "Hang",
    "Inject",
    "Late",
    "Pass",
    "Pause",
    "Rule",
    "Script",
    "Seen",
    "Stall",
    "Step",
    "SwapWithNext",
    "all_of",
    "anything",
    "cdb",
    "has_itt",
    "is_a",
    "lba",
    "lun",
    "sense_segment",
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
class Pass:
    """Step: let this go on.

    Attributes:
        payload: a PDU, or bytes as they travel.
        answer: for a command on its way in: what to answer without executing it.
        late: for a command on its way in: seconds before it is executed.
    """

    payload: Pdu | bytes
    answer: "Answer | None" = None
    late: float = 0.0


@dataclass(frozen=True, slots=True)
class Pause:
    """Step: nothing more goes this way for some seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class End:
    """Step: end the connection, with RST or with FIN."""

    reset: bool


@dataclass(frozen=True, slots=True)
class Hang:
    """Step: nothing more goes this way, and the connection stays open."""


Step = Pass | Pause | End | Hang


class Action(Protocol):
    """What a rule does to one PDU."""

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        """The steps that replace it.

        Args:
            pdu: the PDU that matched.
            encode: makes the bytes that would travel, digests included.
        """


@dataclass(frozen=True, slots=True)
class Change:
    """Another PDU in its place."""

    function: Callable[[Pdu], Pdu]

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        return (Pass(self.function(pdu)),)


@dataclass(frozen=True, slots=True)
class ChangeBytes:
    """Other bytes in its place; digests are not made right again."""

    function: Callable[[bytes], bytes]

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        """See :class:`Action`."""
        return (Pass(self.function(encode(pdu))),)


@dataclass(frozen=True, slots=True)
class Drop:
    """Nothing in its place."""

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        return ()


@dataclass(frozen=True, slots=True)
class Delay:
    """It, and all that follows it, some seconds later."""

    seconds: float

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        return Pause(self.seconds), Pass(pdu)


@dataclass(frozen=True, slots=True)
class Late:
    """A SCSI command on its way in is executed some seconds later; others overtake it."""

    seconds: float

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        return (Pass(pdu, late=self.seconds),)


@dataclass(frozen=True, slots=True)
class Duplicate:
    """It, and as many copies."""

    copies: int = 1

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        return (Pass(pdu),) * (1 + self.copies)


@dataclass(frozen=True, slots=True)
class SwapWithNext:
    """The next PDU that goes this way comes first (whatever a rule makes of that one); without one, it never comes."""

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`. The channel does the holding."""
        return (Pass(pdu),)


@dataclass(frozen=True, slots=True)
class Close:
    """The end of the connection in its place, or right after it."""

    reset: bool = False
    after: bool = False

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        return (Pass(pdu), End(self.reset)) if self.after else (End(self.reset),)


@dataclass(frozen=True, slots=True)
class Cut:
    """Its first bytes, then the end of the connection; on the way in it is as if only these had come."""

    after: int
    reset: bool = False

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        """See :class:`Action`."""
        return Pass(encode(pdu)[: self.after]), End(self.reset)


@dataclass(frozen=True, slots=True)
class Stall:
    """Its first bytes (none, if not told), then silence on an open connection."""

    after: int = 0

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        """See :class:`Action`."""
        return Pass(encode(pdu)[: self.after]), Hang()


@dataclass(frozen=True, slots=True)
class Inject:
    """Other PDUs before and after it; made from it, where a function is given."""

    before: Sequence[Pdu | bytes | Callable[[Pdu], Pdu]] = ()
    after: Sequence[Pdu | bytes | Callable[[Pdu], Pdu]] = ()

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""

        def made(items: Sequence[Pdu | bytes | Callable[[Pdu], Pdu]]) -> list[Step]:
            return [Pass(item if isinstance(item, Pdu | bytes) else item(pdu)) for item in items]

        return *made(self.before), Pass(pdu), *made(self.after)


@dataclass(frozen=True, slots=True)
class Call:
    """It goes on, and something happens first: a power cut, a new capacity, a closed window."""

    function: Callable[[], object]

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        self.function()
        return (Pass(pdu),)


@dataclass(frozen=True, slots=True)
class Answer:
    """This status for a SCSI command.

    On the way in the command is not executed. On the way out, on the PDU that carries its status, it was
    executed, and this is told instead.

    Attributes:
        status: the SAM status.
        sense: sense data, or none.
        response: the iSCSI response code.
    """

    status: int
    sense: bytes = b""
    response: int = 0

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:  # noqa: ARG002
        """See :class:`Action`."""
        if isinstance(pdu, ScsiCommand):
            return (Pass(pdu, answer=self),)
        if isinstance(pdu, ScsiResponse) or (isinstance(pdu, DataIn) and pdu.has_status):
            return (
                Pass(
                    ScsiResponse(
                        itt=pdu.itt,
                        stat_sn=pdu.stat_sn,
                        exp_cmd_sn=pdu.exp_cmd_sn,
                        max_cmd_sn=pdu.max_cmd_sn,
                        response=self.response,
                        status=self.status,
                        data=sense_segment(self.sense),
                    )
                ),
            )
        return (Pass(pdu),)


def sense_segment(sense: bytes) -> bytes:
    """The data segment of a SCSI Response. Source: RFC 7143 §11.4.7.2."""
    return len(sense).to_bytes(2, "big") + sense if sense else b""


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
        if not self.script.active and not self._held:
            return (Pass(pdu),)
        command = self._commands.get(pdu.itt)
        action = self.script.choose(direction, Seen(pdu, command))
        steps = (Pass(pdu),) if action is None else action.steps(pdu, encode)
        held = self._held.pop(direction, None)
        if isinstance(action, SwapWithNext):
            self._held[direction] = list(steps)
            steps = ()
        return steps if held is None else (*steps, *held)


def reparse(payload: bytes) -> Pdu | None:
    """The PDU that these bytes are, without digests; None where they are no whole PDU.

    Raises:
        FormatError: the operation code is unknown.
    """
    if len(payload) < BHS_LENGTH:
        return None
    ahs_length, data_length = split_lengths(payload)
    start = BHS_LENGTH + ahs_length
    if len(payload) < start + data_length:
        return None
    return decode(payload[:BHS_LENGTH], ahs=payload[BHS_LENGTH:start], data=payload[start : start + data_length])
