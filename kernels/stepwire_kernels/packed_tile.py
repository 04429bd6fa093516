"""Tiles of packed weights as dense ones in registers, in the order in which matrix units take the left operand."""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_kernels.packed_weight import high_pairs, low_pairs, scale_and_minimum, spread_high


@triton.jit
def _operand(f0, f1, f2, f3, ROW_BLOCKS: tl.constexpr):
    """Four fields [32, ROW_BLOCKS, 4, 2] as the left operand [rows, 64 inputs]."""
    joined = tl.join(tl.join(f0, f1), tl.join(f2, f3))  # [lane, block, v, p, s, first or second 32 inputs]
    split = tl.reshape(joined, [8, 4, ROW_BLOCKS, 2, 2, 2, 2, 2])  # [g, t, block, h, r, p, s, half]
    turned = tl.permute(split, [2, 4, 0, 7, 6, 3, 1, 5])  # [block, r, g, half, s, h, t, p]
    return tl.reshape(turned, [ROW_BLOCKS * 16, 64])


@triton.jit
def _low_tile(words, magic, IS_E2M1: tl.constexpr, X: tl.constexpr, ROW_BLOCKS: tl.constexpr):
    f0 = low_pairs(words, 0, magic, IS_E2M1, X)
    f1 = low_pairs(words, 1, magic, IS_E2M1, X)
    f2 = low_pairs(words, 2, magic, IS_E2M1, X)
    f3 = low_pairs(words, 3, magic, IS_E2M1, X)
    return _operand(f0, f1, f2, f3, ROW_BLOCKS)


@triton.jit
def _high_tile(high, magic, HIGH_BITS: tl.constexpr, X: tl.constexpr, ROW_BLOCKS: tl.constexpr):
    f0 = high_pairs(high, 0, HIGH_BITS, magic, X)
    f1 = high_pairs(high, 1, HIGH_BITS, magic, X)
    f2 = high_pairs(high, 2, HIGH_BITS, magic, X)
    f3 = high_pairs(high, 3, HIGH_BITS, magic, X)
    return _operand(f0, f1, f2, f3, ROW_BLOCKS)


@triton.jit
def dense_tile(
    words_at,
    high_at,
    mask,
    scales_ptr,
    zeros_ptr,
    minima_ptr,
    outer_scales_ptr,
    outer_minima_ptr,
    rows,
    row_mask,
    tile,
    N,
    K,
    magic,
    X: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    IS_E2M1: tl.constexpr,
    EXPONENTS: tl.constexpr,
    OFFSET: tl.constexpr,
    MAGIC: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    SUBTRACTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
):
    """One tile of weights in X, [ROW_BLOCKS * 16, 64]."""
    words = tl.load(words_at, mask=mask, other=0, eviction_policy="evict_first")  # [32, ROW_BLOCKS, 4]
    value = _low_tile(words, magic, IS_E2M1, X, ROW_BLOCKS).to(tl.float32)
    if HIGH_BITS > 0:
        high = spread_high(tl.load(high_at, mask=mask, other=0, eviction_policy="evict_first"), HIGH_BITS)
        value += _high_tile(high, magic, HIGH_BITS, X, ROW_BLOCKS).to(tl.float32)
    if IS_E2M1:
        if tl.bfloat16 == X:
            value *= 1.7014118346046923e38  # 2^127
        if tl.float16 == X:
            value *= 32768.0
    RUN: tl.constexpr = 64 if GROUP > 64 else GROUP
    run = (tl.arange(0, 64) // RUN)[None, :]
    scale = tl.zeros([ROW_BLOCKS * 16, 64], dtype=tl.float32)
    minimum = tl.zeros([ROW_BLOCKS * 16, 64], dtype=tl.float32)
    for part in tl.static_range(64 // RUN):
        start = tile * 64 + part * RUN
        own_scale, own_minimum = scale_and_minimum(
            scales_ptr, zeros_ptr, minima_ptr, outer_scales_ptr, outer_minima_ptr, (start // GROUP) * N + rows,
            (start // 256) * N + rows, row_mask & (start < K), OFFSET, MAGIC, EXPONENTS, HAS_ZEROS, HAS_MINIMA,
            HAS_OUTER,
        )  # fmt: skip
        own_scale = tl.where(row_mask & (start < K), own_scale, 0.0)
        own_minimum = tl.where(row_mask & (start < K), own_minimum, 0.0)
        if RUN == 64:
            scale = tl.broadcast_to(own_scale[:, None], (ROW_BLOCKS * 16, 64))
            minimum = tl.broadcast_to(own_minimum[:, None], (ROW_BLOCKS * 16, 64))
        else:
            scale = tl.where(run == part, own_scale[:, None], scale)
            minimum = tl.where(run == part, own_minimum[:, None], minimum)
    value = value * scale
    if SUBTRACTS:
        value = value - minimum
    return value.to(X)
