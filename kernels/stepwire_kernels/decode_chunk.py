"""One chunk of one run: what the kernels of decode attention share (formulas in `attention_decode.py`).

The leading dimension of tiles and sums is the warp: each keeps a running softmax of its own tokens, and nothing crosses
warps before the end of the chunk. Tokens, not heads, are the matrix units' tall side: a group of heads pads to 8.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def soft_cap_scores(scores, soft_cap):
    """soft_cap * tanh(scores / soft_cap), without overflow."""
    return soft_cap * (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0)


@triton.jit
def load_record(records_ptr, index, capacity):
    """The fields of one work item; zeros past the list's end."""
    record = records_ptr + index * 8
    inside = index < capacity
    row = tl.load(record + 1, mask=inside, other=0)
    token = tl.load(record + 2, mask=inside, other=0).to(tl.int64)
    kv_len = tl.load(record + 3, mask=inside, other=0)
    kv_start = tl.load(record + 4, mask=inside, other=0)
    kv_end = tl.load(record + 5, mask=inside, other=0)
    num_chunks = tl.load(record + 7, mask=inside, other=0)
    return row, token, kv_len, kv_start, kv_end, num_chunks


@triton.jit
def records_of(place, num_places, num_records_ptr, shares_ptr):
    """What the program at `place` of `num_places` of a KV head computes (`nth_record`), and how many records that is.

    Its share; and of the padding, which is no part of any, every so-manieth record.
    """
    num_shared = tl.load(num_records_ptr + 1)
    first = tl.load(shares_ptr + place)
    num_own = tl.load(shares_ptr + place + 1) - first
    first_other = num_shared + place
    num_others = (tl.load(num_records_ptr) - first_other + num_places - 1) // num_places
    return first, num_own, first_other, num_own + tl.maximum(num_others, 0)


@triton.jit
def nth_record(n, first, num_own, first_other, num_places):
    """The index of a program's n-th record."""
    return tl.where(n < num_own, first + n, first_other + (n - num_own) * num_places)


@triton.jit
def attend_tile(
    top, total, acc, q_warps, k, v, visible, score_scale, soft_cap, HAS_SOFT_CAP: tl.constexpr
):  # fmt: skip
    """Add one tile to running softmaxes top, total [WARPS, BLOCK_H] and acc [WARPS, BLOCK_D, BLOCK_H]."""
    scores = tl.dot(k.to(q_warps.dtype), q_warps, input_precision="ieee")  # [WARPS, WARP_TOKENS, BLOCK_H]
    if HAS_SOFT_CAP:
        scores = soft_cap_scores(scores * score_scale, soft_cap) * 1.4426950408889634
    else:
        scores = scores * score_scale
    scores = tl.where(visible[:, :, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None, :])
    old = tl.exp2(top - new_top)
    total = total * old + tl.sum(weights, axis=1)
    acc = tl.dot(v.to(q_warps.dtype), weights.to(q_warps.dtype), acc * old[:, None, :], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def merge_warps(top, total, acc):
    """The sums of all warps as one: top and total [BLOCK_H], acc [BLOCK_D, BLOCK_H]."""
    chunk_top = tl.max(top, axis=0)
    share = tl.exp2(top - chunk_top[None, :])
    return chunk_top, tl.sum(total * share, axis=0), tl.sum(acc * share[:, None, :], axis=0)


@triton.jit
def attend_chunk(
    top,
    total,
    acc,
    q,
    table,
    block,
    kv_head,
    kv_start,
    kv_end,
    window_start,
    k_cache_ptr,
    v_cache_ptr,
    score_scale,
    soft_cap,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IN_ONE_BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    WARPS: tl.constexpr,
    WARP_TOKENS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Add the cached tokens from kv_start to kv_end to what the warps have, and merge the warps (`merge_warps`).

    q: [BLOCK_D, BLOCK_H]. `block`: the id in `table` of the block that kv_start lies in; tiles lie IN_ONE_BLOCK or not.
    """
    BLOCK_D: tl.constexpr = q.shape[0]
    BLOCK_H: tl.constexpr = q.shape[1]
    TILE_N: tl.constexpr = WARPS * WARP_TOKENS
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < HEAD_DIM
    offsets_n = tl.arange(0, WARPS)[:, None] * WARP_TOKENS + tl.arange(0, WARP_TOKENS)[None, :]
    q_warps = tl.broadcast_to(q[None, :, :], (WARPS, BLOCK_D, BLOCK_H))
    for start in tl.range(kv_start, kv_end, TILE_N, num_stages=NUM_STAGES):
        n = start + offsets_n  # [WARPS, WARP_TOKENS]
        n_mask = n < kv_end
        if IN_ONE_BLOCK:
            # One tile ahead, so that the copy of a tile never waits for its block id (nor costs the pipeline a stage).
            next_start = start + TILE_N
            next_block = tl.load(table + next_start // BLOCK_SIZE, mask=next_start < kv_end, other=0)
            first_row = (block.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE
            kv_rows = first_row + offsets_n
        else:
            next_block = block
            blocks = tl.load(table + n // BLOCK_SIZE, mask=n_mask, other=0).to(tl.int64)
            kv_rows = (blocks * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + n % BLOCK_SIZE
        k_mask = n_mask[:, :, None]
        v_mask = n_mask[:, None, :]
        if HEAD_DIM < BLOCK_D:
            k_mask = k_mask & col_mask[None, None, :]
            v_mask = v_mask & col_mask[None, :, None]
        k_at = k_cache_ptr + kv_rows[:, :, None] * HEAD_DIM + cols[None, None, :]
        # Loaded transposed: a later transpose would keep this copy out of the asynchronous pipeline.
        v_at = v_cache_ptr + kv_rows[:, None, :] * HEAD_DIM + cols[None, :, None]
        k = tl.load(k_at, mask=k_mask, other=0.0)  # [WARPS, WARP_TOKENS, BLOCK_D]
        v = tl.load(v_at, mask=v_mask, other=0.0)  # [WARPS, BLOCK_D, WARP_TOKENS]
        visible = n_mask
        if HAS_WINDOW:
            visible = visible & (n >= window_start)
        top, total, acc = attend_tile(top, total, acc, q_warps, k, v, visible, score_scale, soft_cap, HAS_SOFT_CAP)
        block = next_block
    return merge_warps(top, total, acc)
