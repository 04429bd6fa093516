from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stepwire_kernels.fused_linear import MAX_FUSED_TOKENS, FusedTuning
from stepwire_kernels.scaled_choice import (
    LIBRARY,
    choose_scaled,
    is_mostly_padding,
    load_scaled_table,
    multiply_scaled,
    tile_shape,
)
from stepwire_kernels.split_k import allocate_linear_workspace
from stepwire_kernels.tile_linear import MIN_BLOCK_M, TileLinearTuning

from tests.unit.kernels.checks import assert_close

SIZES = st.integers(1, 1 << 11).map(lambda count: 16 * count)


@given(st.integers(1, 20000), SIZES, SIZES)
def test_a_launch_shape_fits_any_sizes(num_tokens: int, n: int, k: int) -> None:
    shape = tile_shape(num_tokens, n, k)
    assert MIN_BLOCK_M <= shape.block_m <= 128
    # Never more tokens than the next power of two, and K only in parts of which each is worth a program.
    assert shape.block_m < 2 * max(num_tokens, MIN_BLOCK_M)
    assert shape.split_k == 1 or k // shape.split_k >= 1024
    tiles = -(-n // shape.block_n) * -(-num_tokens // shape.block_m)
    assert shape.split_k == 1 or tiles * shape.split_k <= 256


@pytest.mark.parametrize("device_name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_measured_choices_are_of_kernels_that_serve_them(device_name: str) -> None:
    table = load_scaled_table(device_name)
    assert table
    for (num_tokens, _, k), choice in table.items():
        match choice:
            case FusedTuning():
                assert num_tokens <= MAX_FUSED_TOKENS
            case TileLinearTuning():
                assert choice.block_m <= max(MIN_BLOCK_M, num_tokens) and choice.split_k <= k // choice.block_k
            case _:
                assert choice == LIBRARY


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_without_a_gpu_there_is_one_kernel(dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    x, w = ((30 * torch.randn(rows, 96)).clamp(-127, 127).to(dtype) for rows in (3, 20))
    x_scales, w_scales, bias = torch.rand(3, 1) + 0.5, torch.rand(20, 1) + 0.5, torch.randn(20).bfloat16()
    assert choose_scaled(x, w) is None
    workspace = allocate_linear_workspace("cpu", partial_words=1 << 12)
    y = multiply_scaled(x, x_scales, w, w_scales, bias if has_bias else None, workspace, torch.bfloat16)
    twin = (x.double() * x_scales.double()) @ (w.double() * w_scales.double()).T
    assert_close(y, twin + bias.double() if has_bias else twin)


@pytest.mark.parametrize(
    ("block_m", "num_tokens", "expected"),
    [(128, 128, False), (128, 100, False), (128, 90, True), (64, 40, True), (64, 48, False), (32, 17, False)],
)
def test_tiles_that_lack_many_tokens_are_the_librarys(block_m: int, num_tokens: int, expected: bool) -> None:
    assert is_mostly_padding(TileLinearTuning(block_m), num_tokens) is expected
