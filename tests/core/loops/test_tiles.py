"""Rows in the order of compiled loops hold what they were made of."""

import pytest
import torch

from avalanche_curv.core.loops.tiles import LANES, ROWS, WIDTH, Tiles


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(("count", "width", "block"), [(1, 1, 2), (5, 700, 4), (8, WIDTH, 8), (3, 2 * WIDTH + 1, 8)])
def test_tiles_hold_their_rows_and_zeros_at_the_ends(count, width, block, short):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    tiles = Tiles.of(rows, block=block, short=short)
    held = torch.cat([*tiles.parts()])
    assert held.shape == (tiles.rank, tiles.width)
    assert not held[count:].any()
    assert not held[:, width:].any()
    largest = rows.abs().max()
    torch.testing.assert_close(held[:count, :width], rows.double(), rtol=0, atol=largest * 2**-16 if short else 0)


def test_they_lie_by_block_by_columns_and_by_rows():
    width = 2 * WIDTH
    rows = torch.arange(2 * ROWS)[:, None] * width + torch.arange(width)[None]
    tiles = Tiles.of(rows.float(), block=ROWS, short=False)
    first = [row * width + column for row in range(ROWS) for column in range(LANES)]
    assert tiles.numbers[: ROWS * LANES].tolist() == first
    assert tiles.numbers[ROWS * WIDTH : ROWS * WIDTH + LANES].tolist() == [*range(WIDTH, WIDTH + LANES)]
    assert tiles.numbers[ROWS * width] == ROWS * width  # the second block
