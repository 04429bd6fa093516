"""Linear layers whose weights stay packed in a few bits: y = x @ W^T + bias, activations in 16 or 32 bits.

W is a `PackedWeight` (formats and layout: `packed_weight.py`). Two kernels here, and three of Gluon for what they serve
(`packed_in_flight.py`, `packed_ring.py`, `packed_wgmma.py`):

* up to 16 tokens, `packed_stream.py`: a program owns some rows, its warps share the inputs, and what each has summed is
  added at the end. Scales multiply sums, so that products are of small integers.
* more tokens: a tile of rows and tokens a program; weights are rounded to the activations' type in registers.

Where N does not fill the device, inputs are split over programs too, and the last one of a tile adds the parts in
order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.packed_in_flight import InFlightTuning, in_flight_linear
from stepwire_kernels.packed_launch import format_constants, num_splits, weight_pointers
from stepwire_kernels.packed_ring import RingTuning, ring_linear
from stepwire_kernels.packed_stream import load_ahead, load_words, multiply_ahead, walk_inputs, word_offsets
from stepwire_kernels.packed_tile import dense_tile
from stepwire_kernels.packed_weight import (
    ALIGN_INPUTS,
    MAGIC_BITS,
    PackedWeight,
)
from stepwire_kernels.packed_wgmma import WgmmaTuning, wgmma_linear
from stepwire_kernels.split_k import LinearWorkspace, add_up_parts

MAX_STREAM_TOKENS = 16
# Their values make no difference to the code, and kernels for each would.
UNSPECIALIZED = ("num_tokens", "num_tiles", "tiles_each", "magic")


@dataclass(frozen=True)
class StreamTuning:
    """Launch shape for up to 16 tokens: one or two blocks of 16 rows a program, warps that share the inputs.

    `split_k` 0: enough parts to fill the device. `ahead`: how many times 128 inputs of a warp are loaded before the
    kernel waits for the one ahead of it; where a warp has more, one at a time.
    """

    row_blocks: int = 1
    num_warps: int = 8
    split_k: int = 0
    ahead: int = 0


@dataclass(frozen=True)
class PackedTuning:
    """Launch shape for more tokens. `split_k` 0: enough parts to fill the device."""

    block_n: int = 64
    block_m: int = 64
    split_k: int = 0
    num_warps: int = 4
    num_stages: int = 3


Tuning = StreamTuning | InFlightTuning | RingTuning | PackedTuning | WgmmaTuning
# As tables of launch shapes call them.
KERNEL_NAMES: dict[type, str] = {
    StreamTuning: "stream",
    InFlightTuning: "in_flight",
    RingTuning: "ring",
    PackedTuning: "tile",
    WgmmaTuning: "wgmma",
}


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _stream_kernel(
    x_ptr,
    words_ptr,
    high_ptr,
    scales_ptr,
    zeros_ptr,
    minima_ptr,
    outer_scales_ptr,
    outer_minima_ptr,
    row_scales_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_tokens,
    N,
    K,
    num_tiles,
    tiles_each,
    magic,
    x_stride,
    out_stride,
    HIGH_BITS: tl.constexpr,
    IS_E2M1: tl.constexpr,
    EXPONENTS: tl.constexpr,
    OFFSET: tl.constexpr,
    MAGIC: tl.constexpr,
    X_SCALE: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    SUBTRACTS: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    column = tl.program_id(0)
    split = tl.program_id(1)
    block = column * ROW_BLOCKS
    first_tile = split * WARPS * tiles_each
    tokens = tl.arange(0, BLOCK_M)
    token_mask = tokens < num_tokens
    folded = tl.arange(0, 8)[:, None] + 8 * tl.arange(0, BLOCK_M // 8)[None, :]
    x_rows = x_ptr + folded.to(tl.int64) * x_stride
    # Weights do not depend on earlier kernels: all, or the first of them, are fetched before waiting for those.
    if STEPS > 0:
        words, scales, other_scales = load_ahead(
            words_ptr, high_ptr, scales_ptr, zeros_ptr, minima_ptr, outer_scales_ptr, outer_minima_ptr, block,
            block + 1, N, K, num_tiles, first_tile, tiles_each, HIGH_BITS, OFFSET, MAGIC, EXPONENTS, OUT_SCALE,
            HAS_ZEROS, HAS_MINIMA, HAS_OUTER, GROUP, STEPS, WARPS, ROW_BLOCKS,
        )  # fmt: skip
        release_downstream(USE_PDL)
        wait_upstream(USE_PDL)
        acc, other_acc = multiply_ahead(
            x_rows, folded < num_tokens, words, scales, other_scales, K, num_tiles, first_tile, tiles_each, magic,
            HIGH_BITS, IS_E2M1, X_SCALE, SUBTRACTS, GROUP, EVEN_K, STEPS, WARPS, ROW_BLOCKS, BLOCK_M,
        )  # fmt: skip
    else:
        tile = first_tile + tl.arange(0, WARPS) * tiles_each
        last_tile = tl.minimum(tile + tiles_each, num_tiles)
        at = word_offsets(block, num_tiles, tile, WARPS)
        one, two = load_words(words_ptr + at, tile, last_tile, True, WARPS)
        other_one, other_two = one, two
        if ROW_BLOCKS == 2:
            at += tl.cast(num_tiles, tl.int64) * 128
            other_one, other_two = load_words(words_ptr + at, tile, last_tile, (block + 1) * 16 < N, WARPS)
        release_downstream(USE_PDL)
        wait_upstream(USE_PDL)
        acc, other_acc = walk_inputs(
            x_rows, folded < num_tokens, words_ptr, high_ptr, scales_ptr, zeros_ptr, minima_ptr, outer_scales_ptr,
            outer_minima_ptr, block, block + 1, N, K, num_tiles, first_tile, tiles_each, magic, one, two, other_one,
            other_two, HIGH_BITS, IS_E2M1, EXPONENTS, OFFSET, MAGIC, X_SCALE, OUT_SCALE, HAS_ZEROS, HAS_MINIMA,
            HAS_OUTER, SUBTRACTS, GROUP, EVEN_K, WARPS, ROW_BLOCKS, BLOCK_M,
        )  # fmt: skip
    out_at = out_ptr + tokens.to(tl.int64) * out_stride
    _finish(
        acc, block, split, partial_ptr, counters_ptr, row_scales_ptr, bias_ptr, out_at, token_mask, N, HAS_ROW_SCALES,
        HAS_BIAS, SPLIT_K,
    )  # fmt: skip
    if ROW_BLOCKS == 2:
        _finish(
            other_acc, block + 1, split, partial_ptr, counters_ptr, row_scales_ptr, bias_ptr, out_at, token_mask, N,
            HAS_ROW_SCALES, HAS_BIAS, SPLIT_K,
        )  # fmt: skip


@triton.jit
def _finish(
    acc, block, split, partial_ptr, counters_ptr, row_scales_ptr, bias_ptr, out_at, token_mask, N,
    HAS_ROW_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Add the parts of one row block [16, BLOCK_M] and store it; out_at: pointers [BLOCK_M]."""
    acc, finishes = add_up_parts(acc, partial_ptr, counters_ptr, block, split, SPLIT_K)
    if finishes:
        rows = block * 16 + tl.arange(0, 16)
        row_mask = rows < N
        if HAS_ROW_SCALES:
            acc *= tl.load(row_scales_ptr + rows, mask=row_mask, other=0.0)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        to = out_at[None, :] + rows[:, None]
        tl.store(to, acc.to(out_at.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _tile_kernel(
    x_ptr,
    words_ptr,
    high_ptr,
    scales_ptr,
    zeros_ptr,
    minima_ptr,
    outer_scales_ptr,
    outer_minima_ptr,
    row_scales_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_tokens,
    N,
    K,
    num_tiles,
    tiles_each,
    magic,
    x_stride,
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
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    token_block = tl.program_id(0)
    column = tl.program_id(1)
    split = tl.program_id(2)
    BLOCK_N: tl.constexpr = ROW_BLOCKS * 16
    X: tl.constexpr = x_ptr.dtype.element_ty
    rows = column * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    tokens = token_block * BLOCK_M + tl.arange(0, BLOCK_M)
    token_mask = tokens < num_tokens
    lanes = tl.arange(0, 32)[:, None, None]
    blocks = (column * ROW_BLOCKS + tl.arange(0, ROW_BLOCKS))[None, :, None]
    words_at = blocks.to(tl.int64) * num_tiles * 128 + lanes * 4 + tl.arange(0, 4)[None, None, :]
    block_mask = (blocks * 16 < N) & (lanes >= 0)
    cols = tl.arange(0, 64)
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + cols[None, :]
    first = split * tiles_each
    last = tl.minimum(first + tiles_each, num_tiles)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for tile in tl.range(first, last, num_stages=NUM_STAGES):
        x = tl.load(
            x_rows + tile * 64, mask=token_mask[:, None] & (tile * 64 + cols < K)[None, :], other=0.0
        )  # [BLOCK_M, 64]
        weight = dense_tile(
            words_ptr + words_at + tile * 128, high_ptr + words_at + tile * 128, block_mask, scales_ptr, zeros_ptr,
            minima_ptr, outer_scales_ptr, outer_minima_ptr, rows, row_mask, tile, N, K, magic, X, HIGH_BITS, IS_E2M1,
            EXPONENTS, OFFSET, MAGIC, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, SUBTRACTS, GROUP, ROW_BLOCKS,
        )  # fmt: skip
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    place = token_block * tl.num_programs(1) + column
    acc, finishes = add_up_parts(acc, partial_ptr, counters_ptr, place, split, SPLIT_K)
    if finishes:
        if HAS_ROW_SCALES:
            acc *= tl.load(row_scales_ptr + rows, mask=row_mask, other=0.0)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        out_at = out_ptr + tokens.to(tl.int64)[None, :] * out_stride + rows[:, None]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


def packed_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    *,
    tuning: Tuning,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """x [num_tokens, K] -> [num_tokens, N] in x's dtype.

    Raises:
        ValueError: x does not fit the weight or the tuning, or its columns are not contiguous.
    """
    num_tokens, k = x.shape
    if k != weight.num_inputs or x.stride(1) != 1:
        raise ValueError(
            f"packed_linear: takes x [num_tokens, {weight.num_inputs}] with contiguous columns, got {tuple(x.shape)} "
            f"with strides {x.stride()}"
        )
    n = weight.num_outputs
    if out is None:
        out = torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)  # [num_tokens, N]
    if num_tokens == 0:
        return out
    if isinstance(tuning, StreamTuning):
        if num_tokens > MAX_STREAM_TOKENS:
            raise ValueError(f"packed_linear: {tuning} takes up to {MAX_STREAM_TOKENS} tokens, got {num_tokens}")
        _stream(x, weight, bias, workspace, tuning, out, pdl=pdl)
    elif isinstance(tuning, InFlightTuning):
        in_flight_linear(x, weight, bias, workspace, tuning, out, pdl=pdl)
    elif isinstance(tuning, RingTuning):
        ring_linear(x, weight, bias, workspace, tuning, out, pdl=pdl)
    elif isinstance(tuning, WgmmaTuning):
        wgmma_linear(x, weight, bias, workspace, tuning, out, pdl=pdl)
    else:
        _tile(x, weight, bias, workspace, tuning, out, pdl=pdl)
    return out


def _stream(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    tuning: StreamTuning,
    out: torch.Tensor,
    *,
    pdl: bool,
) -> None:
    n, rows = weight.num_outputs, tuning.row_blocks * 16
    block_m = 8 if x.shape[0] <= 8 else 16
    columns, pairs = triton.cdiv(n, rows), weight.num_tiles // 2
    steps = triton.cdiv(pairs, tuning.num_warps)
    splits = num_splits(tuning.split_k, columns, steps, rows * block_m, workspace)
    steps_each = triton.cdiv(pairs, tuning.num_warps * splits)
    _stream_kernel[(columns, splits)](
        x,
        *weight_pointers(weight),
        weight.scales if weight.row_scales is None else weight.row_scales,
        x if bias is None else bias,
        out,
        workspace.partial,
        workspace.counters,
        x.shape[0],
        n,
        weight.num_inputs,
        weight.num_tiles,
        2 * steps_each,
        MAGIC_BITS[x.dtype],
        x.stride(0),
        out.stride(0),
        **format_constants(weight, x.dtype, streams=True),
        HAS_ROW_SCALES=weight.row_scales is not None,
        HAS_BIAS=bias is not None,
        EVEN_K=weight.num_inputs % ALIGN_INPUTS == 0,
        SPLIT_K=splits,
        STEPS=steps_each if steps_each <= tuning.ahead else 0,
        WARPS=tuning.num_warps,
        ROW_BLOCKS=tuning.row_blocks,
        BLOCK_M=block_m,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        num_stages=1,
        **launch_options(pdl),
    )


def _tile(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    tuning: PackedTuning,
    out: torch.Tensor,
    *,
    pdl: bool,
) -> None:
    n = weight.num_outputs
    columns, token_blocks = triton.cdiv(n, tuning.block_n), triton.cdiv(x.shape[0], tuning.block_m)
    words = tuning.block_n * tuning.block_m
    splits = num_splits(tuning.split_k, columns * token_blocks, weight.num_tiles // 4, words, workspace)
    _tile_kernel[(token_blocks, columns, splits)](
        x,
        *weight_pointers(weight),
        weight.scales if weight.row_scales is None else weight.row_scales,
        x if bias is None else bias,
        out,
        workspace.partial,
        workspace.counters,
        x.shape[0],
        n,
        weight.num_inputs,
        weight.num_tiles,
        triton.cdiv(weight.num_tiles, splits),
        MAGIC_BITS[x.dtype],
        x.stride(0),
        out.stride(0),
        **format_constants(weight, x.dtype, streams=False),
        HAS_ROW_SCALES=weight.row_scales is not None,
        HAS_BIAS=bias is not None,
        SPLIT_K=splits,
        ROW_BLOCKS=tuning.block_n // 16,
        BLOCK_M=tuning.block_m,
        NUM_STAGES=tuning.num_stages,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
