"""What a session can be negotiated to: the cells of the matrix, all of them, and few that cover all pairs.

A cell is the *outcome* of a login. Which side brings it about is part of the cell: the target by its configuration,
against an initiator that would have agreed to more, or the initiator by what it offers to a generous target. Segment
lengths are each side's own, always.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from enum import Enum
from itertools import combinations, product
from typing import Any, Literal

__all__ = [
    "BLOCK_LENGTHS",
    "FACTORS",
    "Cell",
    "Chap",
    "Digests",
    "Lengths",
    "Side",
    "all_cells",
    "all_pairs",
    "covering",
]


class Digests(Enum):
    """CRC32C on headers, data segments."""

    NONE = "no digest"
    HEADER = "header digest"
    DATA = "data digest"
    BOTH = "both digests"

    @property
    def header(self) -> bool:
        return self in (Digests.HEADER, Digests.BOTH)

    @property
    def data(self) -> bool:
        return self in (Digests.DATA, Digests.BOTH)


class Chap(Enum):
    """Who proves who he is."""

    NONE = "no CHAP"
    ONE_WAY = "CHAP"
    MUTUAL = "mutual CHAP"


class Side(Enum):
    """Who sees to it that the outcome is no more than the cell wants."""

    TARGET = "target"
    INITIATOR = "initiator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Bytes, but for ``r2ts``.

    Attributes:
        first_burst: FirstBurstLength.
        max_burst: MaxBurstLength.
        target_segment: MaxRecvDataSegmentLength that the target declares.
        our_segment: the one that we declare.
        r2ts: MaxOutstandingR2T.
    """

    first_burst: int
    max_burst: int
    target_segment: int
    our_segment: int
    r2ts: int

    def __str__(self) -> str:
        return "/".join(map(str, astuple(self)))


def _lengths(first_burst: int, max_burst: int, target_segment: int, our_segment: int, r2ts: int) -> Lengths:
    return Lengths(
        first_burst=first_burst,
        max_burst=max_burst,
        target_segment=target_segment,
        our_segment=our_segment,
        r2ts=r2ts,
    )


BLOCK_LENGTHS: tuple[Literal[512], Literal[4096]] = (512, 4096)
LENGTHS = (
    _lengths(512, 512, 512, 512, 1),  # the least that the standard allows
    _lengths(512, 512, 8192, 262144, 8),
    _lengths(1024, 65536, 512, 1536, 4),
    _lengths(4608, 9216, 1536, 1536, 2),
    _lengths(1001, 3003, 603, 777, 3),  # every PDU is padded, no burst ends with a block
    _lengths(8192, 16384, 65536, 4096, 1),  # a segment has room for more than a burst
    _lengths(3072, 131072, 8192, 8192, 8),
    _lengths(65536, 65536, 65535, 65532, 2),
    _lengths(65536, 262144, 8192, 262144, 1),  # as tgt comes
    _lengths(262144, 262144, 262144, 262144, 8),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One combination; each field is one factor."""

    immediate_data: bool
    initial_r2t: bool
    digests: Digests
    chap: Chap
    block_length: int
    lengths: Lengths
    side: Side

    def __str__(self) -> str:
        return ", ".join(
            (
                f"ImmediateData={'Yes' if self.immediate_data else 'No'}",
                f"InitialR2T={'Yes' if self.initial_r2t else 'No'}",
                f"lengths {self.lengths} by the {self.side.value}",
                f"{self.block_length}-byte blocks",
                self.digests.value,
                self.chap.value,
            )
        )

    def within(self, **lengths: int) -> "Cell":
        """The same with other lengths."""
        return replace(self, lengths=replace(self.lengths, **lengths))


FACTORS: Mapping[str, Sequence[Any]] = {
    "side": tuple(Side),
    "lengths": LENGTHS,
    "immediate_data": (True, False),
    "initial_r2t": (True, False),
    "digests": tuple(Digests),
    "chap": tuple(Chap),
    "block_length": BLOCK_LENGTHS,
}


def all_cells() -> list[Cell]:
    """The whole cross product."""
    return [_cell(numbers) for numbers in product(*(range(len(values)) for values in FACTORS.values()))]


def all_pairs() -> list[Cell]:
    """Few cells in which every two values of any two factors meet; always the same ones."""
    return [_cell(numbers) for numbers in sorted(covering([len(values) for values in FACTORS.values()]))]


def _cell(numbers: Sequence[int]) -> Cell:
    return Cell(**{name: values[number] for (name, values), number in zip(FACTORS.items(), numbers, strict=True)})


_Choice = tuple[int, int]
"""A factor, and the number of one of its values."""


def covering(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of numbers, one for each factor, in which every pair of values of any two factors occurs.

    Greedy: each row begins with a pair that is still open, and then takes for each factor the value that closes most.

    Args:
        sizes: how many values each factor has.
    """
    open_pairs = {
        ((a, first), (b, second))
        for a, b in combinations(range(len(sizes)), 2)
        for first, second in product(range(sizes[a]), range(sizes[b]))
    }
    rows = []
    while open_pairs:
        row: dict[int, int] = dict(min(open_pairs))
        for factor, size in enumerate(sizes):
            if factor not in row:
                closes = [len(_pairs([(factor, value)], row.items()) & open_pairs) for value in range(size)]
                row[factor] = closes.index(max(closes))
        open_pairs -= _pairs(row.items(), row.items())
        rows.append(tuple(row[factor] for factor in range(len(sizes))))
    return rows


def _pairs(some: Iterable[_Choice], others: Iterable[_Choice]) -> set[tuple[_Choice, _Choice]]:
    return {(min(a, b), max(a, b)) for a in some for b in others if a[0] != b[0]}
