"""Linear layers whose weights stay packed in a few bits: y = x @ W^T + bias, activations in 16 or 32 bits.

One layout and one kernel for every format that gives a group of inputs a scale (GPTQ, AWQ, compressed-tensors, GGUF
blocks, NVFP4, MXFP4; `gpu_worker.quant.repack` brings them here):

    W[n, k] = row_scale[n] * (scale[g, n] * value(code[n, k]) - minimum[g, n]),    g = k // group_size

    value:    code - offset, or the e2m1 float of a code, doubled
    scale:    scales[g, n], times outer_scales[k // 256, n] where a format has two levels
    minimum:  scale * zeros[g, n], or minima[g, n] times outer_minima[k // 256, n]

Codes lie in tiles: `words` int32 [K / (plane * per_word), N, plane], per_word = 32 / bits. Field j of word i of a tile
is input `tile * plane * per_word + j * plane + i`: one shift and one mask unpack a run of `plane` neighbouring inputs
for a matrix product, all with one scale, and a program's words are contiguous in memory. A format of 5 or 6 bits has
its upper bits apart, `high_words` int8 or int16 of the same shape: bits `high_bits * j` and up belong to field j.

Few tokens: scales multiply partial sums, so that products are of small exact integers; K is split over programs where N
does not fill the device, and the last program of a tile adds the parts in order. Many tokens: weights are rounded to
the activations' type in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.gemm import LinearWorkspace
from stepwire_kernels.split_k import add_up_parts

OUTER_GROUP = 256
# From this many tokens on, scaling every partial sum costs more than scaling every weight.
FOLD_FROM_TOKENS = 33
# With these exponent bits a bfloat16 whose low mantissa bits are a code of 4 bits is 128 + code.
MAGIC_BITS = 0x4300
MAGIC_VALUE = 128


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in the layout of this file. Tensors that a format lacks are None."""

    words: torch.Tensor  # int32 [tiles, N, plane]
    high_words: torch.Tensor | None  # int8 or int16 [tiles, N, plane]
    scales: torch.Tensor  # float16, bfloat16, float32, float8_e4m3fn, int8, or uint8 exponents (`exponents`), [G, N]
    zeros: torch.Tensor | None  # uint8 [G, N]: times the scale
    minima: torch.Tensor | None  # any type of scales [G, N]
    outer_scales: torch.Tensor | None  # float16 [K / 256, N]
    outer_minima: torch.Tensor | None  # float16 [K / 256, N]
    row_scales: torch.Tensor | None  # float32 [N]
    num_inputs: int
    group_size: int
    bits: int
    """Of the codes in `words`: 4 or 8."""
    high_bits: int = 0
    offset: int = 0
    is_e2m1: bool = False
    exponents: bool = False

    @property
    def num_outputs(self) -> int:
        return self.words.shape[1]

    @property
    def plane(self) -> int:
        return self.words.shape[2]

    def tensors(self) -> list[torch.Tensor]:
        return [value for value in vars(self).values() if isinstance(value, torch.Tensor)]

    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


@dataclass(frozen=True)
class PackedTuning:
    """Launch shape. `split_k` 0: enough parts to fill the device."""

    block_n: int = 64
    split_k: int = 0
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _codes(words, high, J: tl.constexpr, BITS: tl.constexpr, HIGH_BITS: tl.constexpr, IS_E2M1: tl.constexpr):
    """The integers of field J: int32 [BLOCK_N, PLANE]."""
    code = (words >> (J * BITS)) & ((1 << BITS) - 1)
    if HIGH_BITS > 0:
        upper = (high.to(tl.int32) >> (J * HIGH_BITS)) & ((1 << HIGH_BITS) - 1)
        code = code | (upper << BITS)
    if IS_E2M1:
        # Magnitudes 0 1 2 3 4 6 8 12, doubled to be integers, as digits of one constant (0xC8643210).
        magnitude = (-0x379BCDF0 >> ((code & 7) * 4)) & 15
        code = tl.where((code & 8) != 0, -magnitude, magnitude)
    return code


@triton.jit
def _scale(at, mask, EXPONENTS: tl.constexpr):
    raw = tl.load(at, mask=mask)  # rows beyond the weight stay undefined: they are not stored
    if EXPONENTS:
        return (raw.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return raw.to(tl.float32)


@triton.jit
def _packed_kernel(
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
    x_stride,
    out_stride,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    IS_E2M1: tl.constexpr,
    EXPONENTS: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PLANE: tl.constexpr,
    FIELDS: tl.constexpr,
    FIELDS_PER_GROUP: tl.constexpr,
    OUTER_FIELDS: tl.constexpr,
    FOLD: tl.constexpr,
    USE_MAGIC: tl.constexpr,
    MAGIC: tl.constexpr,
    MAGIC_OFFSET: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    column = tl.program_id(0)
    split = tl.program_id(1)
    first_token = tl.program_id(2) * BLOCK_M
    rows = column * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    tokens = first_token + tl.arange(0, BLOCK_M)
    token_mask = tokens < num_tokens
    lanes = tl.arange(0, PLANE)
    tiles_each = tl.cdiv(num_tiles, SPLIT_K)
    first = split * tiles_each
    last = tl.minimum(first + tiles_each, num_tiles)
    word_at = words_ptr + rows.to(tl.int64)[:, None] * PLANE + lanes[None, :]
    high_at = high_ptr + rows.to(tl.int64)[:, None] * PLANE + lanes[None, :]
    x_rows = x_ptr + tokens.to(tl.int64)[None, :] * x_stride
    words_a_tile = tl.cast(N, tl.int64) * PLANE
    x_type = x_ptr.dtype.element_ty
    RUN: tl.constexpr = FIELDS_PER_GROUP if FIELDS_PER_GROUP < FIELDS else FIELDS
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for tile in tl.range(first, last, num_stages=NUM_STAGES):
        tile_start = tile * words_a_tile
        words = tl.load(word_at + tile_start, mask=row_mask[:, None], other=0, eviction_policy="evict_first")
        high = words
        if HIGH_BITS > 0:
            high = tl.load(high_at + tile_start, mask=row_mask[:, None], other=0).to(tl.int32)
        for run in tl.static_range(FIELDS // RUN):
            field = tile * FIELDS + run * RUN
            group = field // FIELDS_PER_GROUP
            scale = _scale(scales_ptr + group * N + rows, row_mask, EXPONENTS)  # [BLOCK_N]
            if HAS_OUTER:
                outer = field // OUTER_FIELDS
                scale *= tl.load(outer_scales_ptr + outer * N + rows, mask=row_mask, other=0.0).to(tl.float32)
            minimum = scale * OFFSET
            if HAS_ZEROS:
                minimum += scale * tl.load(zeros_ptr + group * N + rows, mask=row_mask, other=0).to(tl.float32)
            if HAS_MINIMA:
                low = tl.load(minima_ptr + group * N + rows, mask=row_mask, other=0).to(tl.float32)
                if HAS_OUTER:
                    low *= tl.load(outer_minima_ptr + outer * N + rows, mask=row_mask, other=0.0).to(tl.float32)
                minimum += low
            part = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            total = tl.zeros([BLOCK_M], dtype=tl.float32)
            for step in tl.static_range(RUN):
                k = (field + step) * PLANE + lanes
                x = tl.load(
                    x_rows + k[:, None], mask=(k < K)[:, None] & token_mask[None, :], other=0.0
                )  # [PLANE, BLOCK_M]
                code = _codes(words, high, run * RUN + step, BITS, HIGH_BITS, IS_E2M1)
                if FOLD:
                    weight = code.to(tl.float32) * scale[:, None] - minimum[:, None]
                    acc = tl.dot(weight.to(x_type), x, acc, input_precision="ieee")
                else:
                    if USE_MAGIC:
                        value = (code | MAGIC).to(tl.int16).to(x_type, bitcast=True)
                    else:
                        value = code.to(tl.float32).to(x_type)
                    part = tl.dot(value, x, part, input_precision="ieee")
                    total += tl.sum(x.to(tl.float32), axis=0)
            if not FOLD:
                if USE_MAGIC:
                    minimum += scale * MAGIC_OFFSET
                acc += scale[:, None] * part - minimum[:, None] * total[None, :]
    place = tl.program_id(2) * tl.num_programs(0) + column
    acc, finishes = add_up_parts(acc, partial_ptr, counters_ptr, place, split, SPLIT_K)
    if finishes:
        if HAS_ROW_SCALES:
            acc *= tl.load(row_scales_ptr + rows, mask=row_mask, other=0.0)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        out_at = out_ptr + tokens.to(tl.int64)[None, :] * out_stride + rows[:, None]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


def _default_tuning(num_tokens: int) -> PackedTuning:
    if num_tokens <= 32:
        return PackedTuning()
    return PackedTuning(block_n=128, num_warps=8 if num_tokens > 64 else 4)


def _num_splits(tuning: PackedTuning, columns: int, num_tiles: int, block_m: int, room: LinearWorkspace) -> int:
    """Parts of K: enough programs for some waves of a large device, as far as the workspace goes."""
    wanted = tuning.split_k or min(16, max(1, 528 // columns))
    words = columns * tuning.block_n * block_m
    fitting = room.partial.numel() // max(words, 1) if columns <= room.counters.numel() else 1
    return max(1, min(wanted, num_tiles, fitting))


def packed_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    *,
    tuning: PackedTuning | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """x [num_tokens, K] -> [num_tokens, N] in x's dtype.

    Raises:
        ValueError: x does not fit the weight, or its columns are not contiguous.
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
    tuning = tuning or _default_tuning(num_tokens)
    block_m = min(128, max(16, triton.next_power_of_2(num_tokens)))
    columns, token_blocks = triton.cdiv(n, tuning.block_n), triton.cdiv(num_tokens, block_m)
    fields = 32 // weight.bits
    num_tiles = weight.words.shape[0]
    splits = _num_splits(tuning, columns * token_blocks, num_tiles, block_m, workspace)
    fold = num_tokens >= FOLD_FROM_TOKENS
    magic = x.dtype == torch.bfloat16 and weight.bits == 4 and not weight.high_bits and not weight.is_e2m1 and not fold
    _packed_kernel[(columns, splits, token_blocks)](
        x,
        weight.words,
        weight.words if weight.high_words is None else weight.high_words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.scales if weight.minima is None else weight.minima,
        weight.scales if weight.outer_scales is None else weight.outer_scales,
        weight.scales if weight.outer_minima is None else weight.outer_minima,
        weight.scales if weight.row_scales is None else weight.row_scales,
        x if bias is None else bias,
        out,
        workspace.partial,
        workspace.counters,
        num_tokens,
        n,
        k,
        num_tiles,
        x.stride(0),
        out.stride(0),
        BITS=weight.bits,
        HIGH_BITS=weight.high_bits,
        IS_E2M1=weight.is_e2m1,
        EXPONENTS=weight.exponents,
        OFFSET=weight.offset,
        HAS_ZEROS=weight.zeros is not None,
        HAS_MINIMA=weight.minima is not None,
        HAS_OUTER=weight.outer_scales is not None,
        HAS_ROW_SCALES=weight.row_scales is not None,
        HAS_BIAS=bias is not None,
        PLANE=weight.plane,
        FIELDS=fields,
        FIELDS_PER_GROUP=weight.group_size // weight.plane,
        OUTER_FIELDS=OUTER_GROUP // weight.plane,
        FOLD=fold,
        USE_MAGIC=magic,
        MAGIC=MAGIC_BITS,
        MAGIC_OFFSET=MAGIC_VALUE,
        SPLIT_K=splits,
        BLOCK_M=block_m,
        BLOCK_N=tuning.block_n,
        NUM_STAGES=tuning.num_stages,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out


def unpack(weight: PackedWeight) -> torch.Tensor:
    """The twin's weight: float64 [N, K], by the formula at the top."""
    per_word = 32 // weight.bits
    shifts = torch.arange(per_word, dtype=torch.int32, device=weight.words.device)[:, None, None, None]
    codes = (weight.words[None] >> (shifts * weight.bits)) & ((1 << weight.bits) - 1)  # [per_word, tiles, N, plane]
    if weight.high_words is not None:
        upper = (weight.high_words.int()[None] >> (shifts * weight.high_bits)) & ((1 << weight.high_bits) - 1)
        codes = codes | (upper << weight.bits)
    codes = codes.permute(2, 1, 0, 3).flatten(1)[:, : weight.num_inputs]  # [N, K]
    values = codes.double() - weight.offset
    if weight.is_e2m1:
        magnitudes = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12], dtype=torch.float64, device=codes.device)
        values = magnitudes[(codes & 7).long()] * torch.where(codes & 8 > 0, -1.0, 1.0).double()
    inputs = torch.arange(weight.num_inputs, device=codes.device)
    groups, outer = inputs // weight.group_size, inputs // OUTER_GROUP
    raw = torch.exp2(weight.scales.double() - 127) if weight.exponents else weight.scales.double()
    scales = raw[groups].T  # [N, K]
    minima = torch.zeros_like(scales)
    if weight.outer_scales is not None:
        scales = scales * weight.outer_scales.double()[outer].T
    if weight.zeros is not None:
        minima = scales * weight.zeros.double()[groups].T
    if weight.minima is not None:
        minima = weight.minima.double()[groups].T
        if weight.outer_minima is not None:
            minima = minima * weight.outer_minima.double()[outer].T
    dense = scales * values - minima
    return dense if weight.row_scales is None else dense * weight.row_scales.double()[:, None]
