"""Products of tokens with experts whose weights stay packed in a few bits (`packed_weight.py`), a tile at a time.

The formulas and the order of `expert_gemm.py`. Tiles of up to 16 pairs go through the inputs as few tokens of a linear
do (`packed_stream.py`): a program's first row block is gate's and the other one up's. Larger tiles are multiplied by
weights that are made dense in registers (`packed_tile.py`).

gate_up is a stack of weights [2 * inner_rows, H]: gate's I rows, filled up to whole blocks of 16 (`inner_rows`), then
up's. down: a stack of [H, I]. Biases as in `expert_gemm.py`, unpadded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.activation import Activation, activate
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.expert_tiles import ExpertTiles
from stepwire_kernels.packed_launch import format_constants, weight_pointers
from stepwire_kernels.packed_stream import load_words, walk_inputs, word_offsets
from stepwire_kernels.packed_tile import dense_tile
from stepwire_kernels.packed_weight import ALIGN_INPUTS, MAGIC_BITS, TILE_ROWS, PackedWeight

MAX_STREAM_ROWS = 16
UNSPECIALIZED = ("num_tiles", "tiles_each", "magic")


@dataclass(frozen=True)
class PackedExpertTuning:
    """Launch shape of both products. Tiles of up to 16 rows only have `num_warps`, which share the inputs."""

    tile_rows: int
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class PackedExpertWeights:
    """Experts, one behind another; biases contiguous."""

    gate_up: PackedWeight  # [experts, 2 * inner_rows, H]
    down: PackedWeight  # [experts, H, I]
    gate_up_bias: torch.Tensor | None = None  # [experts, 2 * I]
    down_bias: torch.Tensor | None = None  # [experts, H]

    @property
    def num_experts(self) -> int:
        return self.down.words.shape[0]

    @property
    def inner_size(self) -> int:
        return self.down.num_inputs

    @property
    def inner_rows(self) -> int:
        return self.gate_up.num_outputs // 2

    def num_bytes(self) -> int:
        biases = [tensor for tensor in (self.gate_up_bias, self.down_bias) if tensor is not None]
        return (
            self.gate_up.num_bytes()
            + self.down.num_bytes()
            + sum(tensor.numel() * tensor.element_size() for tensor in biases)
        )


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
    order_ptr,
    records_ptr,
    num_cols,
    N,
    K,
    num_tiles,
    tiles_each,
    magic,
    x_stride,
    words_stride,
    groups_stride,
    outer_stride,
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
    IS_GATE_UP: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Gate and up of `num_cols` columns by place, or columns of down by pair."""
    column = tl.program_id(0)
    record = records_ptr + tl.program_id(1) * 4
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    expert = tl.load(record).to(tl.int64)
    first = tl.load(record + 1)
    count = tl.load(record + 2)
    if count > 0:
        if IS_GATE_UP:
            block = column
            other_block = column + N // 32
        else:
            block = column * 2
            other_block = column * 2 + 1
        folded = tl.arange(0, 8)[:, None] + 8 * tl.arange(0, BLOCK_M // 8)[None, :]
        row_at = first + folded
        if IS_GATE_UP:
            row_at = tl.load(order_ptr + row_at, mask=folded < count, other=0) // NUM_CHOSEN
        tile = tl.arange(0, WARPS) * tiles_each
        last_tile = tl.minimum(tile + tiles_each, num_tiles)
        own_words = words_ptr + expert * words_stride
        one, two = load_words(own_words + word_offsets(block, num_tiles, tile, WARPS), tile, last_tile, True, WARPS)
        other_one, other_two = load_words(
            own_words + word_offsets(other_block, num_tiles, tile, WARPS), tile, last_tile, other_block * 16 < N, WARPS
        )
        groups, outer = expert * groups_stride, expert * outer_stride
        acc, other_acc = walk_inputs(
            x_ptr + row_at.to(tl.int64) * x_stride, folded < count, own_words, high_ptr + expert * words_stride,
            scales_ptr + groups, zeros_ptr + groups, minima_ptr + groups, outer_scales_ptr + outer,
            outer_minima_ptr + outer, block, other_block, N, K, num_tiles, 0, tiles_each, magic, one, two, other_one,
            other_two, HIGH_BITS, IS_E2M1, EXPONENTS, OFFSET, MAGIC, X_SCALE, OUT_SCALE, HAS_ZEROS, HAS_MINIMA,
            HAS_OUTER, SUBTRACTS, GROUP, EVEN_K, WARPS, 2, BLOCK_M,
        )  # fmt: skip
        rows = tl.arange(0, BLOCK_M)
        if HAS_ROW_SCALES:
            at = row_scales_ptr + expert * N
            acc *= _row_values(at, block, N)[:, None]
            other_acc *= _row_values(at, other_block, N)[:, None]
        if IS_GATE_UP:
            cols = block * 16 + tl.arange(0, 16)
            mask = (cols < num_cols)[:, None] & (rows < count)[None, :]
            if HAS_BIAS:
                at = bias_ptr + expert * (2 * num_cols)
                acc += _row_values(at, block, num_cols)[:, None]
                other_acc += _row_values(at + num_cols, block, num_cols)[:, None]
            out_at = out_ptr + (first + rows).to(tl.int64)[None, :] * num_cols + cols[:, None]
            tl.store(out_at, activate(acc, other_acc, KIND).to(out_ptr.dtype.element_ty), mask=mask)
        else:
            pairs = tl.load(order_ptr + first + rows, mask=rows < count, other=0).to(tl.int64)
            out_at = out_ptr + pairs * num_cols
            _store_block(acc, out_at, bias_ptr + expert * num_cols, rows < count, block, num_cols, HAS_BIAS)
            _store_block(other_acc, out_at, bias_ptr + expert * num_cols, rows < count, other_block, num_cols, HAS_BIAS)


@triton.jit
def _row_values(at, block, num_rows):
    """float32 [16] of one row block, zeros beyond num_rows."""
    rows = block * 16 + tl.arange(0, 16)
    return tl.load(at + rows, mask=rows < num_rows, other=0.0).to(tl.float32)


@triton.jit
def _store_block(acc, out_at, bias_at, row_mask, block, num_cols, HAS_BIAS: tl.constexpr):
    cols = block * 16 + tl.arange(0, 16)
    if HAS_BIAS:
        acc += _row_values(bias_at, block, num_cols)[:, None]
    mask = (cols < num_cols)[:, None] & row_mask[None, :]
    tl.store(out_at[None, :] + cols[:, None], acc.to(out_at.dtype.element_ty), mask=mask)


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
    order_ptr,
    records_ptr,
    num_cols,
    N,
    K,
    num_tiles,
    magic,
    x_stride,
    words_stride,
    groups_stride,
    outer_stride,
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
    IS_GATE_UP: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    KIND: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    BLOCK_N: tl.constexpr = ROW_BLOCKS * 16
    X: tl.constexpr = x_ptr.dtype.element_ty
    column = tl.program_id(0)
    record = records_ptr + tl.program_id(1) * 4
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    expert = tl.load(record).to(tl.int64)
    first = tl.load(record + 1)
    count = tl.load(record + 2)
    if count > 0:
        rows_m = tl.arange(0, BLOCK_M)
        row_mask = rows_m < count
        pairs = tl.load(order_ptr + first + rows_m, mask=row_mask, other=0).to(tl.int64)
        cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
        lanes = tl.arange(0, 64)
        blocks = (column * ROW_BLOCKS + tl.arange(0, ROW_BLOCKS))[None, :, None]
        words_at = (
            expert * words_stride
            + blocks.to(tl.int64) * num_tiles * 128
            + tl.arange(0, 32)[:, None, None] * 4
            + tl.arange(0, 4)[None, None, :]
        )
        groups, outer = expert * groups_stride, expert * outer_stride
        if IS_GATE_UP:
            x_at = x_ptr + (pairs // NUM_CHOSEN)[:, None] * x_stride + lanes[None, :]
            half = N // 2
        else:
            x_at = x_ptr + (first + rows_m).to(tl.int64)[:, None] * x_stride + lanes[None, :]
            half = N
        col_mask = cols < half
        block_mask = blocks * 16 < half
        apart = tl.cast(half // 16, tl.int64) * num_tiles * 128
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for tile in tl.range(0, num_tiles, num_stages=NUM_STAGES):
            x_mask = row_mask[:, None] & (tile * 64 + lanes < K)[None, :]
            x = tl.load(x_at + tile * 64, mask=x_mask, other=0.0)  # [BLOCK_M, 64]
            w = dense_tile(
                words_ptr + words_at + tile * 128, high_ptr + words_at + tile * 128, block_mask, scales_ptr + groups,
                zeros_ptr + groups, minima_ptr + groups, outer_scales_ptr + outer, outer_minima_ptr + outer, cols,
                col_mask, tile, N, K, magic, X, HIGH_BITS, IS_E2M1, EXPONENTS, OFFSET, MAGIC, HAS_ZEROS, HAS_MINIMA,
                HAS_OUTER, SUBTRACTS, GROUP, ROW_BLOCKS,
            )  # fmt: skip
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
            if IS_GATE_UP:
                v = dense_tile(
                    words_ptr + (words_at + apart) + tile * 128, high_ptr + (words_at + apart) + tile * 128,
                    block_mask, scales_ptr + groups, zeros_ptr + groups, minima_ptr + groups,
                    outer_scales_ptr + outer, outer_minima_ptr + outer, cols + half, col_mask, tile, N, K, magic, X,
                    HIGH_BITS, IS_E2M1, EXPONENTS, OFFSET, MAGIC, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, SUBTRACTS, GROUP,
                    ROW_BLOCKS,
                )  # fmt: skip
                up = tl.dot(v, tl.trans(x), up, input_precision="ieee")
        if HAS_ROW_SCALES:
            at = row_scales_ptr + expert * N + cols
            acc *= tl.load(at, mask=col_mask, other=0.0)[:, None]
            if IS_GATE_UP:
                up *= tl.load(at + half, mask=col_mask, other=0.0)[:, None]
        col_mask = cols < num_cols
        mask = col_mask[:, None] & row_mask[None, :]
        if IS_GATE_UP:
            if HAS_BIAS:
                at = bias_ptr + expert * (2 * num_cols) + cols
                acc += tl.load(at, mask=col_mask, other=0.0).to(tl.float32)[:, None]
                up += tl.load(at + num_cols, mask=col_mask, other=0.0).to(tl.float32)[:, None]
            out_at = out_ptr + (first + rows_m).to(tl.int64)[None, :] * num_cols + cols[:, None]
            tl.store(out_at, activate(acc, up, KIND).to(X), mask=mask)
        else:
            if HAS_BIAS:
                acc += tl.load(bias_ptr + expert * num_cols + cols, mask=col_mask, other=0.0).to(tl.float32)[:, None]
            tl.store(out_ptr + pairs[None, :] * num_cols + cols[:, None], acc.to(X), mask=mask)


def packed_expert_product(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    tiles: ExpertTiles,
    num_cols: int,
    *,
    kind: Activation | None,
    num_chosen: int,
    tuning: PackedExpertTuning,
    pdl: bool = False,
) -> torch.Tensor:
    """With `kind`, the activated inner values [num_pairs, I] of tokens x, by place; without, outputs [num_pairs, H].

    `x` without `kind`: inner values by place; the outputs are by pair, and rows of experts not held stay unwritten.
    """
    num_pairs = x.shape[0] * (num_chosen if kind is not None else 1)
    out = torch.empty((num_pairs, num_cols), dtype=x.dtype, device=x.device)  # [num_pairs, num_cols]
    streams = tiles.tile_rows <= MAX_STREAM_ROWS
    n = weight.num_outputs
    columns = n // 2 if kind is not None else n
    strides = {
        "words_stride": weight.words.stride(0),
        "groups_stride": weight.scales.stride(0),
        "outer_stride": 0 if weight.outer_scales is None else weight.outer_scales.stride(0),
    }
    constants = {
        **format_constants(weight, x.dtype, streams=streams),
        "HAS_ROW_SCALES": weight.row_scales is not None,
        "HAS_BIAS": bias is not None,
        "IS_GATE_UP": kind is not None,
        "NUM_CHOSEN": num_chosen,
        "KIND": kind or "silu",
        "BLOCK_M": tiles.tile_rows,
        "USE_PDL": pdl,
        "num_warps": tuning.num_warps,
    }
    pointers = (
        x,
        *weight_pointers(weight),
        weight.scales if weight.row_scales is None else weight.row_scales,
        x if bias is None else bias,
        out,
        tiles.order,
        tiles.records,
    )
    sizes = {
        "num_cols": num_cols,
        "N": n,
        "K": weight.num_inputs,
        "num_tiles": weight.num_tiles,
        "magic": MAGIC_BITS[x.dtype],
        "x_stride": x.stride(0),
        **strides,
    }
    if streams:
        blocks = triton.cdiv(columns, TILE_ROWS)
        _stream_kernel[(blocks if kind is not None else triton.cdiv(blocks, 2), tiles.capacity)](
            *pointers,
            **sizes,
            **constants,
            tiles_each=2 * triton.cdiv(weight.num_tiles // 2, tuning.num_warps),
            EVEN_K=weight.num_inputs % ALIGN_INPUTS == 0,
            WARPS=tuning.num_warps,
            num_stages=1,
            **launch_options(pdl),
        )
    else:
        _tile_kernel[(triton.cdiv(columns, tuning.block_n), tiles.capacity)](
            *pointers,
            **sizes,
            **constants,
            ROW_BLOCKS=tuning.block_n // TILE_ROWS,
            NUM_STAGES=tuning.num_stages,
            **launch_options(pdl),
        )
    return out
