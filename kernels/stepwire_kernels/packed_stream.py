"""Products of few tokens with packed weights: every warp walks its own inputs, and nothing crosses warps until the end.

The leading dimension of the products here is the warp. A warp loads words straight into the registers from which its
matrix instructions take them (`packed_weight.py`), and the inputs of its tokens through the level-1 cache. Codes enter
the products as small integers plus a constant (`MAGIC`); a product of ones with the same inputs says how much of that,
and of the group's zero point, is to be subtracted; scales multiply float32 sums.

One or two blocks of 16 rows (`ROW_BLOCKS`) go through the inputs together. Each has variables of its own, for a tensor
of both would have its scales loaded by other threads than those that multiply by them.

A warp with few inputs has all their words and scales on their way before the kernel ahead has ended (`load_ahead`,
`multiply_ahead`); with more of them, one iteration of 128 inputs ahead (`walk_inputs`).
"""

# ruff: noqa: RUF005 (Triton's compiler knows no stars in tuples)

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_kernels.packed_weight import high_pairs, low_pairs, scale_and_minimum, spread_high


@triton.jit
def _operand(first, second, WARPS: tl.constexpr):
    """Two fields [32, WARPS, 4, 2] as the left operand [WARPS, 16, 32 inputs]."""
    both = tl.join(first, second)  # [lane, warp, v, p, s]
    split = tl.reshape(both, [8, 4, WARPS, 2, 2, 2, 2])  # [g, t, warp, h, r, p, s]
    turned = tl.permute(split, [2, 4, 0, 6, 1, 3, 5])  # [warp, r, g, s, t, h, p]
    return tl.reshape(turned, [WARPS, 16, 32])


@triton.jit
def _multiply(
    part, one, two, high_one, high_two, x, magic, PLACE: tl.constexpr, HIGH_BITS: tl.constexpr, IS_E2M1: tl.constexpr,
    X: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Add the product of 32 of two tiles' 128 inputs, PLACE times 32 from the first on."""
    FIELD: tl.constexpr = 2 * (PLACE % 2)
    words = one if PLACE < 2 else two
    first, second = low_pairs(words, FIELD, magic, IS_E2M1, X), low_pairs(words, FIELD + 1, magic, IS_E2M1, X)
    part = tl.dot(_operand(first, second, WARPS), x, part, input_precision="ieee")
    if HIGH_BITS > 0:
        high = high_one if PLACE < 2 else high_two
        first, second = high_pairs(high, FIELD, HIGH_BITS, magic, X), high_pairs(high, FIELD + 1, HIGH_BITS, magic, X)
        part = tl.dot(_operand(first, second, WARPS), x, part, input_precision="ieee")
    return part


@triton.jit
def _load_inputs(x_at, mask, SCALE: tl.constexpr):
    """16 inputs of every token, [t, token % 8, warp, token // 8, h, p]."""
    x = tl.load(x_at, mask=mask, other=0.0)
    if SCALE != 1.0:
        x = (x.to(tl.float32) * SCALE).to(x.dtype)
    return x


@triton.jit
def _right_operand(first, second, WARPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Two runs of 16 inputs as the right operand, [WARPS, 32, BLOCK_M]."""
    turned = tl.permute(tl.join(first, second), [2, 6, 0, 4, 5, 3, 1])  # [warp, s, t, h, p, token]
    return tl.reshape(turned, [WARPS, 32, BLOCK_M])


@triton.jit
def load_words(at, first_tile, last_tile, in_range, WARPS: tl.constexpr):
    """Two tiles of one row block, [32, WARPS, 4] each; zeros for warps whose first_tile reaches last_tile [WARPS]."""
    mask = (first_tile < last_tile)[None, :, None] & in_range
    one = tl.load(at, mask=mask, other=0, eviction_policy="evict_first")
    two = tl.load(at + 128, mask=mask, other=0, eviction_policy="evict_first")
    return one, two


@triton.jit
def word_offsets(block, num_tiles, first_tile, WARPS: tl.constexpr):
    """Of the words of tiles first_tile [WARPS] of one row block: int64 [32, WARPS, 4]."""
    lanes = tl.arange(0, 32)[:, None, None]
    v = tl.arange(0, 4)[None, None, :]
    return (tl.cast(block, tl.int64) * num_tiles + first_tile[None, :, None]) * 128 + lanes * 4 + v


@triton.jit
def _load_high(high_ptr, at, first_tile, last_tile, in_range, one, two, HIGH_BITS: tl.constexpr, WARPS: tl.constexpr):
    """As `load_words`; the words themselves where there are no high ones."""
    if HIGH_BITS > 0:
        one, two = load_words(high_ptr + at, first_tile, last_tile, in_range, WARPS)
        one, two = spread_high(one, HIGH_BITS), spread_high(two, HIGH_BITS)
    return one, two


@triton.jit
def _load_scales(
    scales_ptr, zeros_ptr, minima_ptr, outer_scales_ptr, outer_minima_ptr, block, start, last, N, COUNT: tl.constexpr,
    OFFSET: tl.constexpr, MAGIC: tl.constexpr, EXPONENTS: tl.constexpr, OUT_SCALE: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_MINIMA: tl.constexpr, HAS_OUTER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(scale, minimum) by turns for COUNT inputs from start [WARPS] on, [WARPS, 16] each; zeros from `last` on."""
    RUN: tl.constexpr = COUNT if GROUP > COUNT else GROUP
    rows = block * 16 + tl.arange(0, 16)
    found = ()
    for run in tl.static_range(COUNT // RUN):
        at = start + run * RUN
        mask = (at < last)[:, None] & (rows < N)[None, :]
        scale, minimum = scale_and_minimum(
            scales_ptr, zeros_ptr, minima_ptr, outer_scales_ptr, outer_minima_ptr,
            (at // GROUP)[:, None] * N + rows[None, :], (at // 256)[:, None] * N + rows[None, :], mask, OFFSET, MAGIC,
            EXPONENTS, HAS_ZEROS, HAS_MINIMA, HAS_OUTER,
        )  # fmt: skip
        # What a masked load gives is not a number that anything may be multiplied by.
        found = found + (tl.where(mask, scale * OUT_SCALE, 0.0), tl.where(mask, minimum, 0.0))
    return found


@triton.jit
def _scaled(acc, part, total, scale, minimum, SUBTRACTS: tl.constexpr):
    """acc + scale * part - minimum * total."""
    acc += scale[:, :, None] * part
    if SUBTRACTS:
        acc -= minimum[:, :, None] * total
    return acc


@triton.jit
def _multiply_pair(
    acc, other_acc, one, two, other_one, other_two, high_one, high_two, other_high_one, other_high_two, scales,
    other_scales, scales_ptr, zeros_ptr, minima_ptr, outer_scales_ptr, outer_minima_ptr, block, other_block, N,
    x_lanes, x_mask, lane_inputs, k, last_input, K, magic, HIGH_BITS: tl.constexpr, IS_E2M1: tl.constexpr,
    EXPONENTS: tl.constexpr, OFFSET: tl.constexpr, MAGIC: tl.constexpr, X_SCALE: tl.constexpr, OUT_SCALE: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_MINIMA: tl.constexpr, HAS_OUTER: tl.constexpr, SUBTRACTS: tl.constexpr,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, AHEAD: tl.constexpr, WARPS: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add what the inputs k [WARPS] to k + 127 bring: two tiles of one or two row blocks.

    `scales` and `other_scales`: what `_load_scales` gives for 128 inputs; without AHEAD they are loaded here.
    """
    X: tl.constexpr = x_lanes.dtype.element_ty
    # Inputs between two scales; groups of 16 lie within the 32 of one product.
    RUN: tl.constexpr = 128 if GROUP > 128 else 32 if GROUP == 16 else GROUP
    SCALES: tl.constexpr = 4 if GROUP == 16 else 2
    ones = tl.full([WARPS, 16, 32], 1.0, dtype=tl.float32).to(X)
    # A warp that is through reads the last inputs again, and multiplies them by scales of zero.
    first_input = k
    if EVEN_K:
        first_input = tl.minimum(k, K - 128)
    x_at = x_lanes + first_input[None, None, :, None, None, None]
    for run in tl.static_range(128 // RUN):
        part = tl.zeros([WARPS, 16, BLOCK_M], dtype=tl.float32)
        other_part = tl.zeros([WARPS, 16, BLOCK_M], dtype=tl.float32)
        total = tl.zeros([WARPS, 16, BLOCK_M], dtype=tl.float32)
        late_part = tl.zeros([WARPS, 16, BLOCK_M], dtype=tl.float32)
        late_other_part = tl.zeros([WARPS, 16, BLOCK_M], dtype=tl.float32)
        late_total = tl.zeros([WARPS, 16, BLOCK_M], dtype=tl.float32)
        for product in tl.static_range(RUN // 32):
            first_mask, second_mask = x_mask, x_mask
            if not EVEN_K:
                inputs = k[None, None, :, None, None, None] + (run * RUN + product * 32) + lane_inputs
                first_mask = x_mask & (inputs < last_input[None, None, :, None, None, None])
                second_mask = x_mask & (inputs + 16 < last_input[None, None, :, None, None, None])
            first = _load_inputs(x_at + (run * RUN + product * 32), first_mask, X_SCALE)
            second = _load_inputs(x_at + (run * RUN + product * 32 + 16), second_mask, X_SCALE)
            x = _right_operand(first, second, WARPS, BLOCK_M)
            if GROUP == 16:
                late = _right_operand(tl.zeros_like(first), second, WARPS, BLOCK_M)
                x = _right_operand(first, tl.zeros_like(second), WARPS, BLOCK_M)
                late_part = _multiply(
                    late_part, one, two, high_one, high_two, late, magic, run * (RUN // 32) + product, HIGH_BITS,
                    IS_E2M1, X, WARPS,
                )  # fmt: skip
                if ROW_BLOCKS == 2:
                    late_other_part = _multiply(
                        late_other_part, other_one, other_two, other_high_one, other_high_two, late, magic,
                        run * (RUN // 32) + product, HIGH_BITS, IS_E2M1, X, WARPS,
                    )  # fmt: skip
                if SUBTRACTS:
                    late_total = tl.dot(ones, late, late_total, input_precision="ieee")
            part = _multiply(
                part, one, two, high_one, high_two, x, magic, run * (RUN // 32) + product, HIGH_BITS, IS_E2M1, X,
                WARPS,
            )  # fmt: skip
            if ROW_BLOCKS == 2:
                other_part = _multiply(
                    other_part, other_one, other_two, other_high_one, other_high_two, x, magic,
                    run * (RUN // 32) + product, HIGH_BITS, IS_E2M1, X, WARPS,
                )  # fmt: skip
            if SUBTRACTS:
                total = tl.dot(ones, x, total, input_precision="ieee")
        if AHEAD:
            own = scales[run * SCALES : run * SCALES + SCALES]
            other_own = other_scales[run * SCALES : run * SCALES + SCALES]
        else:
            # Behind the products: before them they keep registers that words on their way need.
            own = _load_scales(
                scales_ptr, zeros_ptr, minima_ptr, outer_scales_ptr, outer_minima_ptr, block, k + run * RUN, last_input,
                N, RUN, OFFSET, MAGIC, EXPONENTS, OUT_SCALE, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, GROUP,
            )  # fmt: skip
            other_own = own
            if ROW_BLOCKS == 2:
                other_own = _load_scales(
                    scales_ptr, zeros_ptr, minima_ptr, outer_scales_ptr, outer_minima_ptr, other_block, k + run * RUN,
                    last_input, N, RUN, OFFSET, MAGIC, EXPONENTS, OUT_SCALE, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, GROUP,
                )  # fmt: skip
        acc = _scaled(acc, part, total, own[0], own[1], SUBTRACTS)
        if ROW_BLOCKS == 2:
            other_acc = _scaled(other_acc, other_part, total, other_own[0], other_own[1], SUBTRACTS)
        if GROUP == 16:
            acc = _scaled(acc, late_part, late_total, own[2], own[3], SUBTRACTS)
            if ROW_BLOCKS == 2:
                other_acc = _scaled(
                    other_acc, late_other_part, late_total, other_own[2], other_own[3], SUBTRACTS
                )  # fmt: skip
    return acc, other_acc


@triton.jit
def _input_lanes(x_rows, token_mask):
    """(pointers to the first 16 inputs, mask, which inputs they are), [t, token % 8, warp, token // 8, h, p]."""
    t = tl.arange(0, 4)[:, None, None, None, None, None]
    h = tl.arange(0, 2)[None, None, None, None, :, None]
    p = tl.arange(0, 2)[None, None, None, None, None, :]
    lane_inputs = h * 8 + t * 2 + p
    x_lanes = x_rows[None, :, None, :, None, None] + lane_inputs
    return x_lanes, token_mask[None, :, None, :, None, None], lane_inputs


@triton.jit
def walk_inputs(
    x_rows,
    token_mask,
    words_ptr,
    high_ptr,
    scales_ptr,
    zeros_ptr,
    minima_ptr,
    outer_scales_ptr,
    outer_minima_ptr,
    block,
    other_block,
    N,
    K,
    num_tiles,
    first_tile,
    tiles_each,
    magic,
    one,
    two,
    other_one,
    other_two,
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
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    WARPS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sums of row blocks `block` and `other_block` over all warps' inputs: float32 [16, BLOCK_M] each.

    Warp w's tiles are first_tile + w * tiles_each and on, an even number; `one` and `two`, and for the other block
    `other_one` and `other_two`: the first of them, loaded by `load_words`. x_rows and token_mask: [8, BLOCK_M / 8],
    of token i + 8 * j at [i, j]; `magic`: the bits that `low_pairs` wants.
    """
    tile = first_tile + tl.arange(0, WARPS) * tiles_each
    last_tile = tl.minimum(tile + tiles_each, num_tiles)
    last_input = tl.minimum(last_tile * 64, K)
    at = word_offsets(block, num_tiles, tile, WARPS)
    apart = tl.cast(other_block - block, tl.int64) * num_tiles * 128
    is_other = other_block * 16 < N
    x_lanes, x_mask, lane_inputs = _input_lanes(x_rows, token_mask)
    acc = tl.zeros([WARPS, 16, BLOCK_M], dtype=tl.float32)
    other_acc = tl.zeros([WARPS, 16, BLOCK_M], dtype=tl.float32)
    for _step in range(0, tiles_each, 2):
        high = _load_high(high_ptr, at, tile, last_tile, True, one, two, HIGH_BITS, WARPS)
        other_high = high
        if ROW_BLOCKS == 2:
            other_high = _load_high(
                high_ptr, at + apart, tile, last_tile, is_other, other_one, other_two, HIGH_BITS, WARPS
            )
        following = at + 256
        next_one, next_two = load_words(words_ptr + following, tile + 2, last_tile, True, WARPS)
        next_other_one, next_other_two = other_one, other_two
        if ROW_BLOCKS == 2:
            next_other_one, next_other_two = load_words(
                words_ptr + (following + apart), tile + 2, last_tile, is_other, WARPS
            )
        acc, other_acc = _multiply_pair(
            acc, other_acc, one, two, other_one, other_two, high[0], high[1], other_high[0], other_high[1], (), (),
            scales_ptr, zeros_ptr, minima_ptr, outer_scales_ptr, outer_minima_ptr, block, other_block, N, x_lanes,
            x_mask, lane_inputs, tile * 64, last_input, K, magic, HIGH_BITS, IS_E2M1, EXPONENTS, OFFSET, MAGIC, X_SCALE,
            OUT_SCALE, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, SUBTRACTS, GROUP, EVEN_K, False, WARPS, ROW_BLOCKS, BLOCK_M,
        )  # fmt: skip
        one, two, other_one, other_two = next_one, next_two, next_other_one, next_other_two
        tile += 2
        at = following
    return tl.sum(acc, axis=0), tl.sum(other_acc, axis=0)


@triton.jit
def load_ahead(
    words_ptr, high_ptr, scales_ptr, zeros_ptr, minima_ptr, outer_scales_ptr, outer_minima_ptr, block, other_block, N,
    K, num_tiles, first_tile, tiles_each, HIGH_BITS: tl.constexpr, OFFSET: tl.constexpr, MAGIC: tl.constexpr,
    EXPONENTS: tl.constexpr, OUT_SCALE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_MINIMA: tl.constexpr,
    HAS_OUTER: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr, ROW_BLOCKS: tl.constexpr,
):  # fmt: skip
    """All that `multiply_ahead` takes of the weight: 8 tensors of words for each of STEPS, and both blocks' scales."""
    tile = first_tile + tl.arange(0, WARPS) * tiles_each
    last_tile = tl.minimum(tile + tiles_each, num_tiles)
    last_input = tl.minimum(last_tile * 64, K)
    at = word_offsets(block, num_tiles, tile, WARPS)
    apart = tl.cast(other_block - block, tl.int64) * num_tiles * 128
    is_other = other_block * 16 < N
    words = ()
    for step in tl.static_range(STEPS):
        own = load_words(words_ptr + at + step * 256, tile + step * 2, last_tile, True, WARPS)
        other = own
        if ROW_BLOCKS == 2:
            other = load_words(words_ptr + at + (apart + step * 256), tile + step * 2, last_tile, is_other, WARPS)
        words = words + (own[0], own[1], other[0], other[1])
        high = _load_high(
            high_ptr, at + step * 256, tile + step * 2, last_tile, True, own[0], own[1], HIGH_BITS, WARPS
        )  # fmt: skip
        other_high = high
        if ROW_BLOCKS == 2:
            other_high = _load_high(
                high_ptr, at + (apart + step * 256), tile + step * 2, last_tile, is_other, other[0], other[1],
                HIGH_BITS, WARPS,
            )  # fmt: skip
        words = words + (high[0], high[1], other_high[0], other_high[1])
    scales = ()
    other_scales = ()
    for step in tl.static_range(STEPS):
        scales = scales + _load_scales(
            scales_ptr, zeros_ptr, minima_ptr, outer_scales_ptr, outer_minima_ptr, block, (tile + step * 2) * 64,
            last_input, N, 128, OFFSET, MAGIC, EXPONENTS, OUT_SCALE, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, GROUP,
        )  # fmt: skip
        if ROW_BLOCKS == 2:
            other_scales = other_scales + _load_scales(
                scales_ptr, zeros_ptr, minima_ptr, outer_scales_ptr, outer_minima_ptr, other_block,
                (tile + step * 2) * 64, last_input, N, 128, OFFSET, MAGIC, EXPONENTS, OUT_SCALE, HAS_ZEROS, HAS_MINIMA,
                HAS_OUTER, GROUP,
            )  # fmt: skip
    return words, scales, other_scales if ROW_BLOCKS == 2 else scales


@triton.jit
def multiply_ahead(
    x_rows, token_mask, words, scales, other_scales, K, num_tiles, first_tile, tiles_each, magic,
    HIGH_BITS: tl.constexpr, IS_E2M1: tl.constexpr, X_SCALE: tl.constexpr, SUBTRACTS: tl.constexpr,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """As `walk_inputs`, from what `load_ahead` has loaded."""
    # Of one step.
    SCALES: tl.constexpr = 2 * (128 // (128 if GROUP > 128 else GROUP))
    tile = first_tile + tl.arange(0, WARPS) * tiles_each
    last_input = tl.minimum(tl.minimum(tile + tiles_each, num_tiles) * 64, K)
    x_lanes, x_mask, lane_inputs = _input_lanes(x_rows, token_mask)
    acc = tl.zeros([WARPS, 16, BLOCK_M], dtype=tl.float32)
    other_acc = tl.zeros([WARPS, 16, BLOCK_M], dtype=tl.float32)
    for step in tl.static_range(STEPS):
        own = words[8 * step : 8 * step + 8]
        acc, other_acc = _multiply_pair(
            acc, other_acc, own[0], own[1], own[2], own[3], own[4], own[5], own[6], own[7],
            scales[SCALES * step : SCALES * step + SCALES], other_scales[SCALES * step : SCALES * step + SCALES],
            x_rows, x_rows, x_rows, x_rows, x_rows, 0, 0, 0, x_lanes, x_mask, lane_inputs, (tile + step * 2) * 64,
            last_input, K, magic, HIGH_BITS, IS_E2M1, False, 0, 0, X_SCALE, 1.0, False, False, False, SUBTRACTS, GROUP,
            EVEN_K, True, WARPS, ROW_BLOCKS, BLOCK_M,
        )  # fmt: skip
    return tl.sum(acc, axis=0), tl.sum(other_acc, axis=0)
