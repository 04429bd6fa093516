"""Decode attention from the packed projection for few rows: all that is old is read before the wait.

A step of few rows is a chain of short kernels, and most of each is waiting for level 2. Here everything that no
earlier layer has written is read before the wait: work list, block ids, cos and sin, and the first tile of keys and
values, whose tokens are all of earlier steps. Where a chunk is one tile, that is all of the KV cache that is read.
Every chunk leaves a partial result. Whoever finishes a run's last chunk adds them up where there are few of them
(ADDS_UP), in their order; else `attention_decode.combine_chunks` does.

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
    """Keys [WARPS, WARP_TOKENS, BLOCK_D] and values [WARPS, BLOCK_D, WARP_TOKENS] from `start` on, zeros from `end`.

    IN_ONE_BLOCK: what a warp reads lies in one block.
    """
    WARPS: tl.constexpr = offsets_n.shape[0]
    WARP_TOKENS: tl.constexpr = offsets_n.shape[1]
    n = start + offsets_n  # [WARPS, WARP_TOKENS]
    n_mask = n < end
    if IN_ONE_BLOCK and WARPS > 1:
        first = start + tl.arange(0, WARPS) * WARP_TOKENS  # [WARPS]
        blocks = tl.load(table + first // BLOCK_SIZE, mask=first < end, other=0).to(tl.int64)
        kv_rows = ((blocks * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + first % BLOCK_SIZE)[:, None]
        kv_rows += tl.arange(0, WARP_TOKENS)[None, :]
    elif IN_ONE_BLOCK:
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
def _add_up_run(
    partial_out_ptr,
    partial_sums_ptr,
    sinks_ptr,
    first_record,
    num_chunks,
    first_head,
    v_scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """A run's attention of the program's heads, [BLOCK_G, BLOCK_D], PARTS chunks at a time."""
    heads = tl.arange(0, BLOCK_G)
    cols = tl.arange(0, BLOCK_D)
    head_mask = heads < GROUP
    top = tl.full([BLOCK_G], -1e30, dtype=tl.float32)
    total = tl.zeros([BLOCK_G], dtype=tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks_ptr + first_head + heads, mask=head_mask, other=0.0) * 1.4426950408889634
        total = tl.full([BLOCK_G], 1.0, dtype=tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    for base in range(0, num_chunks, PARTS):
        chunk = base + tl.arange(0, PARTS)
        at = (first_record + chunk).to(tl.int64)[:, None] * NUM_HEADS + first_head + heads[None, :]  # [PARTS, BLOCK_G]
        mask = (chunk < num_chunks)[:, None] & head_mask[None, :]
        # From level 2: other multiprocessors wrote them.
        tops = tl.load(partial_sums_ptr + at * 2, mask=mask, other=-1e30, cache_modifier=".cg")
        sums = tl.load(partial_sums_ptr + at * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg")
        values = tl.load(
            partial_out_ptr + at[:, :, None] * HEAD_DIM + cols[None, None, :],
            mask=mask[:, :, None] & (cols < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )  # [PARTS, BLOCK_G, BLOCK_D]
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        weights = tl.exp2(tops - new_top[None, :])
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(sums * weights, axis=0)
        acc = acc * old[:, None] + tl.sum(values * weights[:, :, None], axis=0)
        top = new_top
    # A padding run has no tokens, and gets zeros.
    return acc / tl.maximum(total, 1e-30)[:, None] * v_scale


@triton.jit
def _few_from_qkv_kernel(
    out_ptr,
    sinks_ptr,
    counters_ptr,
    v_scale,
    out_stride,
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
    ADDS_UP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr,
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
        record = item // NUM_GROUPS
        row, token, kv_len, kv_start, kv_end, num_chunks = load_record(records_ptr, record, capacity)
        if ADDS_UP:
            run = tl.load(records_ptr + record * 8)
            # All padding of a run names its first token's record.
            first_record = tl.where(num_chunks > 1, tl.load(records_ptr + record * 8 + 6), record)
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

        at = record * NUM_HEADS + first_head + heads.to(tl.int64)
        query_mask = heads < GROUP
        out_mask = query_mask[None, :] & (cols < HEAD_DIM)[:, None]
        tl.store(partial_out_ptr + at[None, :] * HEAD_DIM + cols[:, None], chunk_acc, mask=out_mask)
        tl.store(partial_sums_ptr + at * 2, chunk_top, mask=query_mask)
        tl.store(partial_sums_ptr + at * 2 + 1, chunk_total, mask=query_mask)
        if ADDS_UP:
            # Every thread's stores must precede the one atomic that publishes them.
            tl.debug_barrier()
            finishes = num_chunks <= 1
            if num_chunks > 1:
                counter = counters_ptr + run * NUM_GROUPS + item % NUM_GROUPS
                finishes = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_chunks - 1
                if finishes:
                    tl.store(counter, 0)
            if finishes:
                result = _add_up_run(
                    partial_out_ptr, partial_sums_ptr, sinks_ptr, first_record, num_chunks, first_head, v_scale,
                    NUM_HEADS, GROUP, HEAD_DIM, BLOCK_G, BLOCK_D, PARTS, HAS_SINKS,
                )  # fmt: skip
                own = tl.arange(0, BLOCK_G)
                out_at = out_ptr + token * out_stride + (first_head + own)[:, None] * HEAD_DIM + cols[None, :]
                own_mask = (own < GROUP)[:, None] & (cols < HEAD_DIM)[None, :]
                tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=own_mask)
