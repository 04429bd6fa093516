"""A decoded token as `attention_from_qkv` has it: its queries, key and value are the columns of one tile.

Column h < GROUP is query head h of the program's group, GROUP the key and GROUP + 1 the value of its KV head: one load,
one rotation, and no conversions of the layout of cos and sin.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_kernels.decode_chunk import soft_cap_scores
from stepwire_kernels.rope_kv import to_cache


@triton.jit
def rotary_partner(cols, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(partner, angle, sign) of every column: y[c] = x[c] cos[angle] + x[partner] sign sin[angle] where it rotates."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    if INTERLEAVED:
        partner = tl.where(cols < ROTARY_DIM, cols ^ 1, cols)
        angle = cols // 2
        sign = tl.where(cols % 2 == 0, -1.0, 1.0)
    else:
        partner = tl.where(cols < ROTARY_DIM, tl.where(cols < HALF, cols + HALF, cols - HALF), cols)
        angle = tl.where(cols < HALF, cols, cols - HALF)
        sign = tl.where(cols < HALF, -1.0, 1.0)
    return partner, angle, sign


@triton.jit
def load_factors(
    position,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    norm_offset,
    heads,
    cols,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """[BLOCK_D, BLOCK_H] each: what a column's value and its partner's are multiplied by, norm weights included.

    What is not rotated has the angle 0.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    partner, angle, sign = rotary_partner(cols, ROTARY_DIM, INTERLEAVED)
    is_value = heads == GROUP + 1
    rotated = (cols < ROTARY_DIM)[:, None] & ~is_value[None, :]
    turn = position.to(tl.int64) * HALF + angle
    x_factor = tl.load(cos_ptr + turn[:, None], mask=rotated, other=1.0)
    y_factor = tl.load(sin_ptr + turn[:, None], mask=rotated, other=0.0) * sign[:, None]
    if HAS_NORM:
        norm_at = tl.where(heads == GROUP, k_norm_ptr, q_norm_ptr)[None, :]
        norm_mask = ((heads < GROUP + 2) & ~is_value)[None, :] & (cols < HEAD_DIM)[:, None]
        offset = tl.where(is_value, 0.0, norm_offset)[None, :]
        x_factor *= tl.load(norm_at + cols[:, None], mask=norm_mask, other=1.0).to(tl.float32) + offset
        y_factor *= tl.load(norm_at + partner[:, None], mask=norm_mask, other=1.0).to(tl.float32) + offset
    return x_factor, y_factor


@triton.jit
def load_turned(
    token_ptr,
    kv_head,
    first_head,
    x_factor,
    y_factor,
    eps,
    heads,
    cols,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """float32 [BLOCK_D, BLOCK_H] of the token whose projection is at `token_ptr`; columns of padding are zeros.

    `first_head`: the first of the program's GROUP query heads, all of which read KV head `kv_head`.
    """
    partner, _, _ = rotary_partner(cols, ROTARY_DIM, INTERLEAVED)
    mask = (heads < GROUP + 2)[None, :] & (cols < HEAD_DIM)[:, None]
    head = tl.where(heads < GROUP, first_head + heads, NUM_HEADS + kv_head + (heads - GROUP) * NUM_KV_HEADS)
    at = token_ptr + head[None, :] * HEAD_DIM
    x = tl.load(at + cols[:, None], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(at + partner[:, None], mask=mask, other=0.0).to(tl.float32)
    turned = x * x_factor + y * y_factor
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / HEAD_DIM + eps)
        turned *= tl.where(heads == GROUP + 1, 1.0, scale)[None, :]
    return turned


@triton.jit
def store_own(
    turned,
    k_cache_ptr,
    v_cache_ptr,
    slot,
    writes,
    kv_head,
    inverse_k_scale,
    inverse_v_scale,
    heads,
    cols,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_FP8: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
):
    """Write the token's key and value to its slot, where it `writes`; both float32 [BLOCK_D], rounded as later steps
    will find them.
    """
    # Rounded as a tile: Triton 3.6 moves vectors of 8 bits from one layout to another within a single warp, and what
    # arrives is wrong (seen on an H100); so no such vector is needed in two layouts.
    inverse = tl.where(heads == GROUP, inverse_k_scale, inverse_v_scale)[None, :]
    rounded = to_cache(turned, inverse, k_cache_ptr, IS_FP8, FP8_LIMIT).to(tl.float32)
    own_k = tl.sum(tl.where((heads == GROUP)[None, :], rounded, 0.0), axis=1)
    own_v = tl.sum(tl.where((heads == GROUP + 1)[None, :], rounded, 0.0), axis=1)
    cache_row = ((slot // BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    mask = (cols < HEAD_DIM) & writes & (slot >= 0)
    tl.store(k_cache_ptr + cache_row * HEAD_DIM + cols, own_k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_cache_ptr + cache_row * HEAD_DIM + cols, own_v.to(v_cache_ptr.dtype.element_ty), mask=mask)
    return own_k, own_v


@triton.jit
def own_score(q, stored_k, score_scale, soft_cap, HAS_SOFT_CAP: tl.constexpr):
    """What the token's queries [BLOCK_D, BLOCK_H] make of its key [BLOCK_D], base 2: [BLOCK_H]."""
    score = tl.sum(q.to(tl.float32) * stored_k[:, None], axis=0) * score_scale
    if HAS_SOFT_CAP:
        score = soft_cap_scores(score, soft_cap) * 1.4426950408889634
    return score


@triton.jit
def add_own(
    top, total, acc, q, stored_k, stored_v, joins, score_scale, soft_cap, HAS_SOFT_CAP: tl.constexpr
):  # fmt: skip
    """Add the token itself to running softmaxes top, total [BLOCK_H] and acc [BLOCK_D, BLOCK_H], where it `joins`."""
    score = own_score(q, stored_k, score_scale, soft_cap, HAS_SOFT_CAP)
    score = tl.where(joins, score, float("-inf"))
    new_top = tl.maximum(top, score)
    old = tl.exp2(top - new_top)
    share = tl.exp2(score - new_top)
    # What a padding token's value holds, its share of zero does not make zero.
    value = tl.where(joins, stored_v, 0.0)
    return new_top, total * old + share, acc * old[None, :] + value[:, None] * share[None, :]
