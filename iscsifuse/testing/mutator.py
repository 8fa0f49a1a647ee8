"""A target that goes wrong at random: its valid answers are changed, doubled, swapped, lost or cut off on their way.

`mutations` turns a seed into the rules of a script. The same seed gives the same rules, so whatever an initiator
makes of them can be looked at again.

Two kinds of change have to be told apart, so that every answer of an initiator's can be judged:

- *Damage*, as a bad network does it: bits and bytes that change on the way. Digests are never made right again.
  Where a PDU has no digests (or not both), nobody could notice that its data is damaged, or that it belongs to
  another command; there the data segment, the tag and the status stay as they are. Login Responses may be damaged
  anyhow, for no data depends on them; the data of a Text Response stays, or an initiator would log in to somebody
  else.
- *Lies*, as a broken target tells them: PDUs that are well-formed, digests and all, and wrong in a number or a flag.
  Not among them is what can't be found out: data of another command, or success that was none.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from iscsifuse.iscsi.digest import DIGEST_LENGTH
from iscsifuse.iscsi.pdu import BHS_LENGTH, RESERVED_TAG, Opcode, Pdu
from iscsifuse.iscsi.response import (
    R2T,
    AsyncMessage,
    DataIn,
    LoginResponse,
    LogoutResponse,
    NopIn,
    Reject,
    ScsiResponse,
    TargetPdu,
    TaskManagementResponse,
    TextResponse,
)
from iscsifuse.testing.actions import (
    Action,
    Change,
    Close,
    Cut,
    Delay,
    Drop,
    Duplicate,
    Inject,
    Pass,
    Stall,
    Step,
    SwapWithNext,
)
from iscsifuse.testing.script import OUT, Match, Rule, anything, is_a

__all__ = ["Damage", "mutations"]

_Bytes = Callable[[bytes], bytes]
_Made = tuple[str, Action]

_STATUS_BYTE = 3
_TAG = range(16, 20)
_UNNOTICED = frozenset({_STATUS_BYTE, *_TAG})
"""Bytes of a header whose damage would be taken for the truth: success, or an answer to another command."""
_UNNOTICED_IN_TEXT = _UNNOTICED | frozenset({5, 6, 7, *range(20, 24)})
"""Lengths and Target Transfer Tag, too: a list of targets that was cut is a list."""
_BITS_32 = 0xFFFFFFFF
_GOOD = 0


def mutations(seed: int) -> list[Rule]:
    """Rules that change what a target sends.

    Args:
        seed: any number.

    Returns:
        One rule to five; most of them act once.
    """
    draw = random.Random(seed)  # noqa: S311 - repeatable faults, no secret
    rules = []
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 5))):
        kind, action = draw.choice(_MAKERS)(draw)
        whom, match, range_of_nth = draw.choice(_WHOM)
        nth = draw.randint(1, range_of_nth)
        times, chance = draw.choice(((1, 1.0), (1, 1.0), (1, 1.0), (3, 1.0), (0, 0.03), (0, 0.3)))
        name = f"{kind}: {whom} from the {nth}., {times or 'all'} of them, chance {chance}"
        rules.append(Rule(OUT, action, match, nth=nth, times=times, chance=chance, name=name))
    return rules


_WHOM: Sequence[tuple[str, Match, int]] = (
    ("anything", anything, 80),
    ("anything", anything, 30),
    ("Data-In", is_a(Opcode.DATA_IN), 30),
    ("SCSI Response", is_a(Opcode.SCSI_RESPONSE), 15),
    ("R2T", is_a(Opcode.R2T), 6),
    ("Login Response", is_a(Opcode.LOGIN_RESPONSE), 6),
    ("Text Response", is_a(Opcode.TEXT_RESPONSE), 1),
    ("Logout Response", is_a(Opcode.LOGOUT_RESPONSE), 2),
)


# --- damage ---


@dataclass(frozen=True, slots=True)
class Damage:
    """Other bytes in its place; digests are not made right again.

    Attributes:
        anywhere: what is done to a PDU whose damage can be noticed, since it has both digests or is a Login Response.
        header: what is done to the header of another one: 48 bytes, of which status and tag are put right again.
        without_data: whether ``header`` may change the length, too, so that it is for PDUs without data only.
    """

    anywhere: _Bytes
    header: _Bytes
    without_data: bool = False

    def steps(self, pdu: Pdu, encode: Callable[[Pdu], bytes]) -> Sequence[Step]:
        """See :class:`Action`."""
        raw = encode(pdu)
        if _is_noticed(pdu, raw):
            return (Pass(self.anywhere(raw)),)
        head, rest = raw[:BHS_LENGTH], raw[BHS_LENGTH:]
        if self.without_data:
            return (Pass(raw if rest else self.header(head)),)
        damaged = bytearray(self.header(head))
        for place in _UNNOTICED_IN_TEXT if isinstance(pdu, TextResponse) else _UNNOTICED:
            damaged[place] = head[place]
        return (Pass(bytes(damaged) + rest),)


def _is_noticed(pdu: Pdu, raw: bytes) -> bool:
    digests = DIGEST_LENGTH * (2 if pdu.data else 1)
    return isinstance(pdu, LoginResponse) or len(raw) - len(pdu.encode()) == digests


def _flip(draw: random.Random) -> _Made:
    places = [draw.getrandbits(32) for _ in range(draw.randint(1, 3))]

    def flip(raw: bytes) -> bytes:
        damaged = bytearray(raw)
        for place in places:
            damaged[place // 8 % len(raw)] ^= 1 << place % 8
        return bytes(damaged)

    return f"{len(places)} bits flipped", Damage(flip, flip)


def _overwrite(draw: random.Random) -> _Made:
    place, noise = draw.getrandbits(32), draw.randbytes(draw.choice((1, 2, 4, 16)))

    def overwrite(raw: bytes) -> bytes:
        start = place % len(raw)
        return (raw[:start] + noise + raw[start + len(noise) :])[: len(raw)]

    return f"{len(noise)} bytes of noise", Damage(overwrite, overwrite)


def _wrong_lengths(draw: random.Random) -> _Made:
    lengths = draw.choice(
        (
            draw.randbytes(4),
            b"\0" + draw.randbytes(3),
            b"\0\0" + draw.randbytes(2),
            draw.randbytes(1) + bytes(3),
            b"\0\xff\xff\xff",
            bytes(4),
        )
    )

    def change(raw: bytes) -> bytes:
        return raw[:4] + lengths + raw[8:]

    return f"lengths {lengths.hex()}", Damage(change, change)


def _truncate(draw: random.Random) -> _Made:
    place = draw.getrandbits(32)
    return "truncated", Damage(
        lambda raw: raw[: place % len(raw)], lambda head: head[: place % len(head)], without_data=True
    )


def _lengthen(draw: random.Random) -> _Made:
    place, noise = draw.getrandbits(32), draw.randbytes(draw.choice((1, 4, 48, 100)))

    def insert(raw: bytes) -> bytes:
        start = place % (len(raw) + 1)
        return raw[:start] + noise + raw[start:]

    return f"{len(noise)} bytes too many", Damage(insert, insert, without_data=True)


# --- lies ---


def _lie(draw: random.Random) -> _Made:
    """One field of one PDU; whichever PDU it meets has some of these."""
    names = draw.sample(sorted(_LIES), 12)
    seed = draw.getrandbits(32)

    def lie(pdu: Pdu) -> Pdu:
        own = {field.name for field in fields(pdu)}
        name = next((name for name in names if name in own and not _is_unnoticed(pdu, name)), "stat_sn")
        if name not in own:
            return pdu
        changes: dict[str, Any] = {name: _LIES[name](random.Random(seed), getattr(pdu, name))}  # noqa: S311 - see above
        return replace(pdu, **changes)

    return f"wrong {names[0]} or the like", Change(lie)


def _is_unnoticed(pdu: Pdu, name: str) -> bool:
    """Whether a lie in this field might be taken for the truth.

    A command that has failed might look better than it is; and who goes on with another tag in the middle of a list
    of targets is told that the list is at its end.
    """
    return (name == "status" and isinstance(pdu, ScsiResponse) and pdu.status != _GOOD) or (
        name == "ttt" and isinstance(pdu, TextResponse)
    )


_Number = Callable[[random.Random, int], int]


def _near(draw: random.Random, value: int) -> int:
    """A number close by, at the edge of something, or anywhere."""
    delta = draw.choice((1, -1, 2, -2, 512, -512, 4096, 1 << 31, draw.getrandbits(32), -value))
    return (value + delta) & _BITS_32


def _byte(draw: random.Random, value: int) -> int:
    return (value + draw.randint(1, 255)) & 0xFF


def _other(draw: random.Random, value: int) -> int:  # noqa: ARG001
    return not value


def _bad_status(draw: random.Random, value: int) -> int:  # noqa: ARG001
    # CONDITION MET (04h) is a success, which a target may not claim for a command that isn't done.
    return draw.choice((0x02, 0x08, 0x18, 0x28, 0x30, 0x40, 0xFF, 0x01))


def _status_class(draw: random.Random, value: int) -> int:  # noqa: ARG001
    return draw.choice((1, 2, 3, 4, 255))


def _stage(draw: random.Random, value: int) -> int:
    return (value + draw.randint(1, 3)) & 3


_LIES: dict[str, _Number] = {
    "stat_sn": _near,
    "exp_cmd_sn": _near,
    "max_cmd_sn": _near,
    "data_sn": _near,
    "r2t_sn": _near,
    "exp_data_sn": _near,
    "buffer_offset": _near,
    "desired_data_transfer_length": _near,
    "residual_count": _near,
    "ttt": _near,
    "response": _byte,
    "status": _bad_status,
    "final": _other,
    "cont": _other,
    "transit": _other,
    "has_status": _other,
    "underflow": _other,
    "overflow": _other,
    "csg": _stage,
    "nsg": _stage,
    "status_class": _status_class,
    "status_detail": _byte,
    "version_active": _byte,
    "tsih": lambda draw, value: _near(draw, value) & 0xFFFF,
    "time2wait": lambda draw, value: _near(draw, value) & 0xFFFF,
}


# --- what else can go wrong ---


def _inject(draw: random.Random) -> _Made:
    seed = draw.getrandbits(32)
    kind = draw.choice(_INTRUDERS)

    def made(pdu: Pdu) -> Pdu:
        own = random.Random(seed)  # noqa: S311 - see above
        intruder = kind(own, pdu)
        if not isinstance(pdu, TargetPdu):
            return intruder
        return replace(intruder, stat_sn=pdu.stat_sn, exp_cmd_sn=pdu.exp_cmd_sn, max_cmd_sn=pdu.max_cmd_sn)

    if draw.random() < 0.5:
        return "a PDU before", Inject(before=(made,))
    return "a PDU after", Inject(after=(made,))


_INTRUDERS: Sequence[Callable[[random.Random, Pdu], TargetPdu]] = (
    lambda draw, pdu: NopIn(ttt=draw.getrandbits(32), data=draw.randbytes(draw.randrange(40))),  # noqa: ARG005
    lambda draw, pdu: NopIn(itt=draw.choice((pdu.itt, 3, RESERVED_TAG)), ttt=draw.choice((RESERVED_TAG, 1))),
    lambda draw, pdu: AsyncMessage(  # noqa: ARG005
        event=draw.choice((0, 1, 2, 3, 4, 5, 255, 77)),
        parameter1=draw.randrange(4),
        parameter2=draw.choice((0, 1, 0xFFFF)),
        parameter3=draw.choice((0, 2, 0xFFFF)),
    ),
    lambda draw, pdu: Reject(reason=draw.randrange(16), data=pdu.header()),
    lambda draw, pdu: R2T(
        itt=pdu.itt,
        ttt=draw.getrandbits(16),
        r2t_sn=draw.randrange(2),
        buffer_offset=512 * draw.randrange(4),
        desired_data_transfer_length=draw.choice((0, 1, 512, 4096, _BITS_32)),
    ),
    lambda draw, pdu: TaskManagementResponse(itt=pdu.itt, response=draw.randrange(6)),
    lambda draw, pdu: LogoutResponse(itt=pdu.itt, time2wait=draw.randrange(3)),
    lambda draw, pdu: TextResponse(itt=pdu.itt, ttt=draw.getrandbits(8), final=bool(draw.randrange(2))),
    lambda draw, pdu: LoginResponse(itt=pdu.itt, transit=bool(draw.randrange(2)), csg=1, nsg=3),
    lambda draw, pdu: ScsiResponse(itt=(pdu.itt + 1000) & _BITS_32, status=draw.choice((0, 2, 8))),
    lambda draw, pdu: DataIn(
        itt=(pdu.itt + 1000) & _BITS_32, data=draw.randbytes(draw.randrange(600)), has_status=bool(draw.randrange(2))
    ),
)


def _garbage(draw: random.Random) -> _Made:
    noise = draw.randbytes(draw.choice((1, 47, 48, 49, 500)))
    if draw.random() < 0.5:
        return "garbage before", Inject(before=(noise,))
    return "garbage after", Inject(after=(noise,))


_MAKERS: Sequence[Callable[[random.Random], _Made]] = (
    _flip,
    _flip,
    _flip,
    _overwrite,
    _wrong_lengths,
    _truncate,
    _lengthen,
    _lie,
    _lie,
    _lie,
    _lie,
    _inject,
    _inject,
    _garbage,
    lambda draw: ("doubled", Duplicate(draw.randint(1, 3))),
    lambda draw: ("swapped with the next", SwapWithNext()),  # noqa: ARG005
    lambda draw: ("lost", Drop()),  # noqa: ARG005
    lambda draw: ("late", Delay(draw.choice((0.01, 0.5, 3.0, 20.0)))),
    lambda draw: ("closed", Close(reset=bool(draw.randrange(2)), after=bool(draw.randrange(2)))),
    lambda draw: ("cut", Cut(after=draw.randrange(200), reset=bool(draw.randrange(2)))),
    lambda draw: ("stalled", Stall(after=draw.randrange(200))),
)
