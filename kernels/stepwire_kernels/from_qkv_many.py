"""Decode attention from the packed projection for many rows: the last chunk of a run to finish adds up all of them.

Work list, block ids, cos, sin and norm weights are read before the wait, but nothing of the KV cache: to fetch that
ahead, be it into level 2 alone, makes every step of many rows slower (measured on an H100).

A program computes one chunk of one KV head after the other: those of its share. A run of one chunk has its result at
once. Of a run of several every chunk leaves a partial result and counts itself in; the one that finds all others there
adds them up, in the order of chunks, so that the result does not depend on which one it was. It leaves the counter at
zero for the next launch, or the next replay of a graph.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_kernels.decode_chunk import attend_chunk, load_record, nth_record, records_of
from stepwire_kernels.dependent_launch import release_downstream, wait_upstream
from stepwire_kernels.from_qkv_token import load_factors, load_turned, own_score, store_own
from stepwire_kernels.work_list import first_visible


@triton.jit
def _add_up_chunks(
    partial_out_ptr,
    partial_sums_ptr,
    first_record,
    num_chunks,
    first_head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Top and sum [BLOCK_H] and weighted values [BLOCK_D, BLOCK_H] of all chunks of a run, PARTS at a time."""
    heads = tl.arange(0, BLOCK_H)
    cols = tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_H], -1e30, dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_H], dtype=tl.float32)
    for base in range(0, num_chunks, PARTS):
        chunk = base + tl.arange(0, PARTS)
        at = (first_record + chunk).to(tl.int64)[:, None] * NUM_HEADS + first_head + heads[None, :]  # [PARTS, BLOCK_H]
        mask = (chunk < num_chunks)[:, None] & (heads < GROUP)[None, :]
        # From level 2: other multiprocessors wrote them.
        tops = tl.load(partial_sums_ptr + at * 2, mask=mask, other=-1e30, cache_modifier=".cg")
        sums = tl.load(partial_sums_ptr + at * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg")
        values = tl.load(
            partial_out_ptr + at[:, None, :] * HEAD_DIM + cols[None, :, None],
            mask=mask[:, None, :] & (cols < HEAD_DIM)[None, :, None],
            other=0.0,
            cache_modifier=".cg",
        )  # [PARTS, BLOCK_D, BLOCK_H]
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        weights = tl.exp2(tops - new_top[None, :])
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(sums * weights, axis=0)
        acc = acc * old[None, :] + tl.sum(values * weights[:, None, :], axis=0)
        top = new_top
    return top, total, acc


@triton.jit
def _many_from_qkv_kernel(
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
    shares_ptr,
    HAS_SINKS: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
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
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    TILE_N: tl.constexpr = WARPS * WARP_TOKENS
    heads = tl.arange(0, BLOCK_H)
    cols = tl.arange(0, BLOCK_D)
    query_mask = heads < GROUP
    out_mask = query_mask[None, :] & (cols < HEAD_DIM)[:, None]
    release_downstream(USE_PDL)
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    num_places = tl.num_programs(0) // NUM_KV_HEADS
    first_head = kv_head * GROUP
    first, num_own, first_other, num_items = records_of(
        tl.program_id(0) // NUM_KV_HEADS, num_places, num_records_ptr, shares_ptr
    )
    # What does not change from item to item is computed anew: kept meanwhile, it takes 255 registers instead of 162.
    for item in tl.range(0, num_items, disable_licm=True):
        record = nth_record(item, first, num_own, first_other, num_places)
        row, token, kv_len, kv_start, kv_end, num_chunks = load_record(records_ptr, record, capacity)
        window_start = 0
        if WINDOW > 0:
            window_start = first_visible(kv_len - 1, WINDOW, ALIGNED)
            kv_start = tl.maximum(kv_start, (window_start // TILE_N) * TILE_N)
        is_last = (kv_end == kv_len) & (kv_len > 0)
        cached_end = tl.where(is_last, kv_end - 1, kv_end)
        table = block_tables_ptr + row.to(tl.int64) * table_stride
        block = tl.load(table + kv_start // BLOCK_SIZE, mask=kv_start < cached_end, other=0)
        slot = tl.load(slots_ptr + token).to(tl.int64)
        x_factor, y_factor = load_factors(
            tl.load(positions_ptr + token), cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, norm_offset, heads, cols, GROUP,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, HAS_NORM,
        )  # fmt: skip
        # Waits the first time only.
        wait_upstream(USE_PDL)

        turned = load_turned(
            qkv_ptr + token * qkv_stride, kv_head, first_head, x_factor, y_factor, eps, heads, cols, NUM_HEADS,
            NUM_KV_HEADS, GROUP, HEAD_DIM, ROTARY_DIM, INTERLEAVED, HAS_NORM,
        )  # fmt: skip
        q = turned.to(qkv_ptr.dtype.element_ty)
        stored_k, stored_v = store_own(
            turned, k_cache_ptr, v_cache_ptr, slot, is_last, kv_head, inverse_k_scale, inverse_v_scale, heads, cols,
            NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_SIZE, IS_FP8, FP8_LIMIT,
        )  # fmt: skip
        # The token itself is what the first warp of its run's last chunk begins with: little has to be kept meanwhile.
        joins = (tl.arange(0, WARPS) == 0) & is_last
        score = own_score(q, stored_k, score_scale, soft_cap, HAS_SOFT_CAP)
        top = tl.where(joins[:, None], score[None, :], -1e30)
        total = tl.where(joins[:, None], 1.0, tl.zeros([WARPS, BLOCK_H], dtype=tl.float32))
        value = tl.where(joins[:, None], stored_v[None, :], 0.0)  # [WARPS, BLOCK_D]
        acc = tl.broadcast_to(value[:, :, None], (WARPS, BLOCK_D, BLOCK_H))
        top, total, acc = attend_chunk(
            top, total, acc, q, table, block, kv_head, kv_start, cached_end, window_start, k_cache_ptr, v_cache_ptr,
            score_scale, soft_cap, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, IN_ONE_BLOCK, WINDOW > 0, HAS_SOFT_CAP, WARPS,
            WARP_TOKENS, NUM_STAGES,
        )  # fmt: skip

        finishes = num_chunks == 1
        if num_chunks > 1:
            at = record.to(tl.int64) * NUM_HEADS + first_head + heads
            tl.store(partial_out_ptr + at[None, :] * HEAD_DIM + cols[:, None], acc, mask=out_mask)
            tl.store(partial_sums_ptr + at * 2, top, mask=query_mask)
            tl.store(partial_sums_ptr + at * 2 + 1, total, mask=query_mask)
            counter = counters_ptr + tl.load(records_ptr + record * 8) * NUM_KV_HEADS + kv_head
            first_record = tl.load(records_ptr + record * 8 + 6)
            # Every thread's stores must precede the one atomic that publishes them.
            tl.debug_barrier()
            finishes = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_chunks - 1
            if finishes:
                tl.store(counter, 0)
                top, total, acc = _add_up_chunks(
                    partial_out_ptr, partial_sums_ptr, first_record, num_chunks, first_head, NUM_HEADS, GROUP, HEAD_DIM,
                    BLOCK_H, BLOCK_D, PARTS,
                )  # fmt: skip
        if finishes:
            if HAS_SINKS:
                sink = tl.load(sinks_ptr + first_head + heads, mask=query_mask, other=0.0) * 1.4426950408889634
                # A padding run (kv_len 0) keeps a sum of 0 and so still writes zeros.
                new_top = tl.maximum(top, sink)
                old = tl.exp2(top - new_top)
                total = total * old + tl.exp2(sink - new_top)
                acc = acc * old[None, :]
            result = acc / tl.maximum(total, 1e-30)[None, :] * v_scale
            out_at = out_ptr + token * out_stride + (first_head + heads)[None, :] * HEAD_DIM + cols[:, None]
            tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=out_mask)
