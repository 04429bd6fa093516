"""Packed weights made dense: W [N, K] in 16 or 32 bits, for products of so many tokens that a second pass is little.

A program makes some tiles of some row blocks (`packed_weight.py`). Half a byte a weight is read and two are written:
bound by memory, so the arithmetic is that of `packed_tile.py`, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.linear import linear
from stepwire_kernels.packed_launch import format_constants, weight_pointers
from stepwire_kernels.packed_tile import dense_tile
from stepwire_kernels.packed_weight import MAGIC_BITS, PackedWeight
from stepwire_kernels.split_k import LinearWorkspace


@dataclass(frozen=True)
class DenseTuning:
    """Launch shape: 16 * `row_blocks` rows and 64 * `tiles_each` inputs a program."""

    row_blocks: int = 2
    tiles_each: int = 4
    num_warps: int = 4


@triton.jit(do_not_specialize=("num_tiles", "magic"))
def _dense_kernel(
    words_ptr,
    high_ptr,
    scales_ptr,
    zeros_ptr,
    minima_ptr,
    outer_scales_ptr,
    outer_minima_ptr,
    row_scales_ptr,
    out_ptr,
    N,
    K,
    num_tiles,
    magic,
    out_stride,
    HIGH_BITS: tl.constexpr,
    IS_E2M1: tl.constexpr,
    EXPONENTS: tl.constexpr,
    OFFSET: tl.constexpr,
    MAGIC: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    SUBTRACTS: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    TILES_EACH: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    first_tile = tl.program_id(0) * TILES_EACH
    first_block = tl.program_id(1) * ROW_BLOCKS
    X: tl.constexpr = out_ptr.dtype.element_ty
    lanes = tl.arange(0, 32)[:, None, None]
    blocks = (first_block + tl.arange(0, ROW_BLOCKS))[None, :, None]
    words_at = blocks.to(tl.int64) * num_tiles * 128 + lanes * 4 + tl.arange(0, 4)[None, None, :]
    block_mask = (blocks * 16 < N) & (lanes >= 0)
    rows = first_block * 16 + tl.arange(0, ROW_BLOCKS * 16)
    row_mask = rows < N
    cols = tl.arange(0, 64)
    out_rows = out_ptr + rows.to(tl.int64)[:, None] * out_stride
    row_scale = tl.full([ROW_BLOCKS * 16], 1.0, dtype=tl.float32)
    if HAS_ROW_SCALES:
        row_scale = tl.load(row_scales_ptr + rows, mask=row_mask, other=0.0)
    release_downstream(USE_PDL)
    # The products before this one read what is overwritten here.
    wait_upstream(USE_PDL)
    for step in tl.static_range(TILES_EACH):
        tile = first_tile + step
        at = words_at + tile * 128
        weight = dense_tile(
            words_ptr + at, high_ptr + at, block_mask & (tile < num_tiles), scales_ptr, zeros_ptr, minima_ptr,
            outer_scales_ptr, outer_minima_ptr, rows, row_mask, tile, N, K, magic, tl.float32 if HAS_ROW_SCALES else X,
            HIGH_BITS, IS_E2M1, EXPONENTS, OFFSET, MAGIC, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, SUBTRACTS, GROUP,
            ROW_BLOCKS,
        )  # fmt: skip
        if HAS_ROW_SCALES:
            weight *= row_scale[:, None]
        mask = row_mask[:, None] & (tile * 64 + cols < K)[None, :]
        tl.store(out_rows + (tile * 64 + cols)[None, :], weight.to(X), mask=mask)


def dense_weight(
    weight: PackedWeight,
    out: torch.Tensor,
    *,
    tuning: DenseTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """`weight` in out's type, written to `out` [N, K] and returned.

    Raises:
        ValueError: `out` has another shape, or columns that are not contiguous.
    """
    n, k = weight.num_outputs, weight.num_inputs
    if out.shape != (n, k) or out.stride(1) != 1:
        raise ValueError(f"dense_weight: out must be [{n}, {k}] with contiguous columns, got {tuple(out.shape)}")
    tuning = tuning or DenseTuning()
    # Codes are added to a float of the type in which they are unpacked.
    dtype = torch.float32 if weight.row_scales is not None else out.dtype
    _dense_kernel[(triton.cdiv(weight.num_tiles, tuning.tiles_each), triton.cdiv(n, 16 * tuning.row_blocks))](
        *weight_pointers(weight),
        weight.scales if weight.row_scales is None else weight.row_scales,
        out,
        n,
        k,
        weight.num_tiles,
        MAGIC_BITS[dtype],
        out.stride(0),
        **format_constants(weight, dtype, streams=False),
        HAS_ROW_SCALES=weight.row_scales is not None,
        ROW_BLOCKS=tuning.row_blocks,
        TILES_EACH=tuning.tiles_each,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out


def dense_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    scratch: torch.Tensor,
    *,
    workspace: LinearWorkspace | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """x [num_tokens, K] -> [num_tokens, N] by a dense copy of the weight in `scratch`: at least N * K numbers like x.

    Raises:
        ValueError: `scratch` is too small or of another type.
    """
    n, k = weight.num_outputs, weight.num_inputs
    if scratch.numel() < n * k or scratch.dtype != x.dtype:
        raise ValueError(
            f"dense_linear: needs {n * k} numbers of scratch in {x.dtype}, got {scratch.numel()} in {scratch.dtype}"
        )
    dense = dense_weight(weight, scratch[: n * k].view(n, k), pdl=pdl)
    return linear(x, dense, bias, workspace=workspace, pdl=pdl)
