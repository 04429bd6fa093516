"""Decode attention from the packed projection for few rows: all that is old is read before the wait.

A step of few rows is a chain of short kernels, and most of each is waiting for level 2. Here everything that no
earlier layer has written is read before the wait: work list, block ids, cos and sin, and the first tile of keys and
values, whose tokens are all of earlier steps. Where a chunk is one tile, that is all of the KV cache that is read.
Every chunk leaves a partial result, which `attention_decode.combine_chunks` adds up.

What is read ahead lies in registers, of which a large group's queries leave too few: such a group is shared out among
programs, which all read its keys and values. One of them writes the token's own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_kernels.decode_chunk import attend_tile, load_record, merge_warps
from stepwire_kernels.dependent_launch import release_downstream, wait_upstream
from stepwire_kernels.from_qkv_token import add_own, load_factors, load_turned, store_own
from stepwire_kernels.work_list import first_visible


@triton.jit
def _load_tile(
    table,
    kv_head,
    start,
    end,
    k_cache_ptr,
    v_cache_ptr,
    offsets_n,
    cols,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IN_ONE_BLOCK: tl.constexpr,
):
    """Keys [WARPS, WARP_TOKENS, BLOCK_D] and values [WARPS, BLOCK_D, WARP_TOKENS] from `start` on, zeros from `end`."""
    n = start + offsets_n  # [WARPS, WARP_TOKENS]
    n_mask = n < end
    if IN_ONE_BLOCK:
        block = tl.load(table + start // BLOCK_SIZE, mask=start < end, other=0).to(tl.int64)
        kv_rows = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE + offsets_n
    else:
        blocks = tl.load(table + n // BLOCK_SIZE, mask=n_mask, other=0).to(tl.int64)
        kv_rows = (blocks * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + n % BLOCK_SIZE
    col_mask = cols < HEAD_DIM
    k_at = k_cache_ptr + kv_rows[:, :, None] * HEAD_DIM + cols[None, None, :]
    v_at = v_cache_ptr + kv_rows[:, None, :] * HEAD_DIM + cols[None, :, None]
    k = tl.load(k_at, mask=n_mask[:, :, None] & col_mask[None, None, :], other=0.0)
    v = tl.load(v_at, mask=n_mask[:, None, :] & col_mask[None, :, None], other=0.0)
    return k, v


@triton.jit
def _few_from_qkv_kernel(
    qkv_ptr,
    k_cache_ptr,
    v_cache_ptr,
    records_ptr,
    num_records_ptr,
    block_tables_ptr,
    positions_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    partial_out_ptr,
    partial_sums_ptr,
    score_scale,
    inverse_k_scale,
    inverse_v_scale,
    soft_cap,
    eps,
    norm_offset,
    qkv_stride,
    table_stride,
    capacity,
    NUM_KV_HEADS: tl.constexpr,
    SHARERS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IN_ONE_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_FP8: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
    WARP_TOKENS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """SHARERS: programs that read a chunk of one KV head, each for GROUP of its query heads."""
    NUM_GROUPS: tl.constexpr = NUM_KV_HEADS * SHARERS
    NUM_HEADS: tl.constexpr = NUM_GROUPS * GROUP
    TILE_N: tl.constexpr = WARPS * WARP_TOKENS
    heads = tl.arange(0, BLOCK_H)
    cols = tl.arange(0, BLOCK_D)
    offsets_n = tl.arange(0, WARPS)[:, None] * WARP_TOKENS + tl.arange(0, WARP_TOKENS)[None, :]
    release_downstream(USE_PDL)

    item = tl.program_id(0)
    # Neighbours read the same keys and values.
    kv_head = item % NUM_GROUPS // SHARERS
    first_head = item % NUM_GROUPS * GROUP
    # Everything up to the wait has been written by the step's plan, or by an earlier step.
    if item < tl.load(num_records_ptr) * NUM_GROUPS:
        row, token, kv_len, kv_start, kv_end, _ = load_record(records_ptr, item // NUM_GROUPS, capacity)
        window_start = 0
        if WINDOW > 0:
            window_start = first_visible(kv_len - 1, WINDOW, ALIGNED)
            kv_start = tl.maximum(kv_start, (window_start // TILE_N) * TILE_N)
        is_last = (kv_end == kv_len) & (kv_len > 0)
        cached_end = tl.where(is_last, kv_end - 1, kv_end)
        table = block_tables_ptr + row.to(tl.int64) * table_stride
        k, v = _load_tile(
            table, kv_head, kv_start, cached_end, k_cache_ptr, v_cache_ptr, offsets_n, cols, NUM_KV_HEADS, HEAD_DIM,
            BLOCK_SIZE, IN_ONE_BLOCK,
        )  # fmt: skip
        slot = tl.load(slots_ptr + token).to(tl.int64)
        x_factor, y_factor = load_factors(
            tl.load(positions_ptr + token), cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, norm_offset, heads, cols, GROUP,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, HAS_NORM,
        )  # fmt: skip
        wait_upstream(USE_PDL)

        turned = load_turned(
            qkv_ptr + token * qkv_stride, kv_head, first_head, x_factor, y_factor, eps, heads, cols, NUM_HEADS,
            NUM_KV_HEADS, GROUP, HEAD_DIM, ROTARY_DIM, INTERLEAVED, HAS_NORM,
        )  # fmt: skip
        q = turned.to(qkv_ptr.dtype.element_ty)
        q_warps = tl.broadcast_to(q[None, :, :], (WARPS, BLOCK_D, BLOCK_H))

        top = tl.full([WARPS, BLOCK_H], -1e30, dtype=tl.float32)
        total = tl.zeros([WARPS, BLOCK_H], dtype=tl.float32)
        acc = tl.zeros([WARPS, BLOCK_D, BLOCK_H], dtype=tl.float32)
        n = kv_start + offsets_n
        visible = (n < cached_end) & (n >= window_start)
        top, total, acc = attend_tile(top, total, acc, q_warps, k, v, visible, score_scale, soft_cap, HAS_SOFT_CAP)
        for start in tl.range(kv_start + TILE_N, cached_end, TILE_N, num_stages=NUM_STAGES):
            next_k, next_v = _load_tile(
                table, kv_head, start, cached_end, k_cache_ptr, v_cache_ptr, offsets_n, cols, NUM_KV_HEADS, HEAD_DIM,
                BLOCK_SIZE, IN_ONE_BLOCK,
            )  # fmt: skip
            visible = start + offsets_n < cached_end
            top, total, acc = attend_tile(
                top, total, acc, q_warps, next_k, next_v, visible, score_scale, soft_cap, HAS_SOFT_CAP
            )
        chunk_top, chunk_total, chunk_acc = merge_warps(top, total, acc)

        stored_k, stored_v = store_own(
            turned, k_cache_ptr, v_cache_ptr, slot, is_last & (item % SHARERS == 0), kv_head, inverse_k_scale,
            inverse_v_scale, heads, cols, NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_SIZE, IS_FP8, FP8_LIMIT,
        )  # fmt: skip
        chunk_top, chunk_total, chunk_acc = add_own(
            chunk_top, chunk_total, chunk_acc, q, stored_k, stored_v, is_last, score_scale, soft_cap, HAS_SOFT_CAP
        )

        at = (item // NUM_GROUPS) * NUM_HEADS + first_head + heads.to(tl.int64)
        query_mask = heads < GROUP
        out_mask = query_mask[None, :] & (cols < HEAD_DIM)[:, None]
        tl.store(partial_out_ptr + at[None, :] * HEAD_DIM + cols[:, None], chunk_acc, mask=out_mask)
        tl.store(partial_sums_ptr + at * 2, chunk_top, mask=query_mask)
        tl.store(partial_sums_ptr + at * 2 + 1, chunk_total, mask=query_mask)
