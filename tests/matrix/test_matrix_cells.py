"""The matrix is what it says: all pairs are there, and what a cell does fits onto its disk."""

from itertools import combinations, pairwise, product

import pytest
from matrix_cells import FACTORS, all_cells, all_pairs, covering
from matrix_exercise import plan
from matrix_targets import DISK_SIZE


def test_few_cells_cover_all_pairs() -> None:
    cells = all_pairs()
    assert len(cells) == len(set(cells)) == 40  # no fewer can: 10 sets of lengths meet 4 of digests
    for (one, values), (other, more) in combinations(FACTORS.items(), 2):
        met = {(getattr(cell, one), getattr(cell, other)) for cell in cells}
        assert met == set(product(values, more))


def test_all_cells_are_the_cross_product() -> None:
    cells = all_cells()
    assert len(set(cells)) == len(cells) == 2 * 10 * 2 * 2 * 4 * 3 * 2
    assert set(all_pairs()) < set(cells)


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2, 2], [3, 3, 3, 3], [5, 2, 4, 1], [2] * 12])
def test_any_factors_are_covered(sizes: list[int]) -> None:
    rows = covering(sizes)
    assert rows == covering(sizes)
    for a, b in combinations(range(len(sizes)), 2):
        assert {(row[a], row[b]) for row in rows} == set(product(range(sizes[a]), range(sizes[b])))


def test_writes_of_a_cell_lie_apart_and_on_the_disk() -> None:
    for cell in all_pairs():
        block = cell.block_length
        transfers = list(plan(cell))
        for before, after in pairwise(transfers):
            gap = after.offset // block - -(-before.end // block)
            assert gap >= (1 if after is not transfers[-1] else 0), cell
        assert transfers[-1].end == DISK_SIZE
        assert {transfer.is_aligned(block) for transfer in transfers} == {True, False}
        assert max(transfer.length for transfer in transfers) > cell.lengths.max_burst
        assert sum(transfer.length > cell.lengths.first_burst for transfer in transfers) >= 2
