"""Products by tiles: a row's bits with any number of threads, in any batch, from any address."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from gpu_worker.invariant.row_tiles import ALIGNMENT, TILE_ROWS, choose_tile, in_row_tiles

NUM_ROWS = 45
# (inputs, outputs): sizes of models, and some that fill no vector. MKL cuts the sums of (1030, 70) by its threads.
SHAPES = [(64, 96), (100, 37), (1030, 70), (33, 33), (7, 300), (576, 960)]


@pytest.fixture(params=[1, 2, 3, 4])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """More threads than there are cores are as good as any: who cuts the sums does not ask for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_has_the_same_bits_with_any_others_from_any_address(num_threads: int, dtype: torch.dtype) -> None:
    for k, n in SHAPES:
        generator = torch.Generator().manual_seed(k)
        weight, x = (torch.randn(rows, k, generator=generator).to(dtype) for rows in (n, NUM_ROWS))

        def product(rows: torch.Tensor, weight: torch.Tensor = weight) -> torch.Tensor:
            return F.linear(rows, weight)

        tile_rows = choose_tile(product, k, dtype, f"{k} x {n}")
        expected = in_row_tiles(product, x, tile_rows)
        if dtype == torch.float32:
            torch.testing.assert_close(expected, F.linear(x, weight), atol=5e-4, rtol=0)
        for start in range(0, NUM_ROWS, 8):
            for stop in {start + 1, min(start + 1 + 7 * start % 40, NUM_ROWS), NUM_ROWS}:
                # Where they lie, which is anywhere; and in memory of their own.
                for rows in (x[start:stop], x[start:stop].clone()):
                    out = in_row_tiles(product, rows, tile_rows)
                    assert torch.equal(out, expected[start:stop]), f"{k} x {n}, rows {start} to {stop}"


def test_every_tile_is_dense_and_aligned() -> None:
    seen: list[torch.Tensor] = []

    def keep(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows)
        return rows.clone()

    wide = torch.randn(3 * TILE_ROWS, 70)
    for x in (wide[5:9, :33], wide[1 : 1 + TILE_ROWS], wide[3:40, 1:34]):
        for tile_rows in (1, TILE_ROWS):
            assert torch.equal(in_row_tiles(keep, x, tile_rows), x)
    assert all(rows.is_contiguous() and rows.data_ptr() % ALIGNMENT == 0 for rows in seen)
    assert {len(rows) for rows in seen} == {1, TILE_ROWS}
