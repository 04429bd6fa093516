"""Decode attention straight from the packed projection: rotation, KV write and attention in one kernel, for few rows.

Computes what `rope_kv.rope_and_write_kv` and then `attention_decode.decode_attention` compute, for a step in which
every run is one token; see there for the formulas. A program has one chunk and one KV head. It rotates the queries of
its group itself; that of a run's last chunk also rotates the token's key, writes key and value into the cache, and adds
them to its sums from registers. Every chunk leaves a partial result, which the combining kernel adds up.

Why: a step of few rows is a chain of short kernels, and most of each is waiting for level 2. Here everything that no
earlier layer has written is read before the wait: work list, block ids, cos and sin, and the first tile of keys and
values, whose tokens are all of earlier steps. Where a chunk is one tile, that is all of the KV cache that is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.attention_decode import (
    LOG2_E,
    DecodeWorkspace,
    attend_tile,
    check_attention_inputs,
    combine_chunks,
    load_record,
    soft_cap_scores,
)
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.rope_kv import FP8_MAX, check_rotation_inputs, to_cache
from stepwire_kernels.work_list import ChunkPolicy, WorkList, first_visible

# Measured up to here; beyond, rotation and attention apart are as fast.
MOST_RUNS = 4
MOST_HEADS = 32
MOST_HEAD_DIM = 128
MOST_GROUP = 6
WANTED_PROGRAMS = 768


@dataclass(frozen=True)
class FromQkvTuning:
    """Launch shape: a tile is warp_tokens * num_warps tokens, each warp with its own softmax."""

    warp_tokens: int = 32
    num_warps: int = 1
    num_stages: int = 2


def default_from_qkv_tuning(head_dim: int) -> FromQkvTuning:
    """The launch shape measured best on an H100 for this head dimension."""
    return FromQkvTuning(warp_tokens=64 if head_dim <= 64 else 32)


def takes_from_qkv(num_runs: int, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether this kernel is faster than rotation and attention apart for decodes of so many runs."""
    is_short = num_runs <= MOST_RUNS and num_runs * num_kv_heads <= MOST_HEADS
    return is_short and num_heads <= MOST_GROUP * num_kv_heads and head_dim <= MOST_HEAD_DIM


def from_qkv_chunk_policy(num_kv_heads: int, head_dim: int) -> ChunkPolicy:
    """Chunks as small as a tile where the device has room for so many programs: all of them is read before the wait."""
    tile = default_from_qkv_tuning(head_dim).warp_tokens
    return ChunkPolicy(min_chunk=tile, max_chunks=64, wanted_records=max(1, WANTED_PROGRAMS // num_kv_heads))


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorms of single query and key heads, before rotation."""

    query: torch.Tensor  # [D]
    key: torch.Tensor  # [D]
    eps: float
    offset: float = 0.0
    """Added to both weights."""


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
def _from_qkv_kernel(
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
    HALF: tl.constexpr = ROTARY_DIM // 2
    heads = tl.arange(0, BLOCK_H)
    cols = tl.arange(0, BLOCK_D)
    offsets_n = tl.arange(0, WARPS)[:, None] * WARP_TOKENS + tl.arange(0, WARP_TOKENS)[None, :]
    col_mask = cols < HEAD_DIM
    # Queries, key and value of a token are the columns of one tile: y[c] = x[c] cos + x[partner] signed_sin, where what
    # is not rotated has the angle 0.
    is_key = heads == GROUP
    is_value = heads == GROUP + 1
    rotated = (cols < ROTARY_DIM)[:, None] & ~is_value[None, :]  # [BLOCK_D, BLOCK_H]
    if INTERLEAVED:
        partner = tl.where(cols < ROTARY_DIM, cols ^ 1, cols)
        angle = cols // 2
        sign = tl.where(cols % 2 == 0, -1.0, 1.0)
    else:
        partner = tl.where(cols < ROTARY_DIM, tl.where(cols < HALF, cols + HALF, cols - HALF), cols)
        angle = tl.where(cols < HALF, cols, cols - HALF)
        sign = tl.where(cols < HALF, -1.0, 1.0)
    tile_mask = (heads < GROUP + 2)[None, :] & col_mask[:, None]
    release_downstream(USE_PDL)

    item = tl.program_id(0)
    kv_head = item % NUM_KV_HEADS
    # Everything up to the wait has been written by the step's plan, or by an earlier step.
    if item < tl.load(num_records_ptr) * NUM_KV_HEADS:
        row, token, kv_len, kv_start, kv_end, _ = load_record(records_ptr, item // NUM_KV_HEADS, capacity)
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
        turn = tl.load(positions_ptr + token).to(tl.int64) * HALF + angle
        # [BLOCK_D, BLOCK_H]: what x and y are multiplied by.
        x_factor = tl.load(cos_ptr + turn[:, None], mask=rotated, other=1.0)
        y_factor = tl.load(sin_ptr + turn[:, None], mask=rotated, other=0.0) * sign[:, None]
        if HAS_NORM:
            norm_at = tl.where(is_key, k_norm_ptr, q_norm_ptr)[None, :]
            norm_mask = tile_mask & ~is_value[None, :]
            offset = tl.where(is_value, 0.0, norm_offset)[None, :]
            x_factor *= tl.load(norm_at + cols[:, None], mask=norm_mask, other=1.0).to(tl.float32) + offset
            y_factor *= tl.load(norm_at + partner[:, None], mask=norm_mask, other=1.0).to(tl.float32) + offset
        wait_upstream(USE_PDL)

        head_start = kv_head * GROUP
        head = tl.where(heads < GROUP, head_start + heads, NUM_HEADS + kv_head + (heads - GROUP) * NUM_KV_HEADS)
        token_at = qkv_ptr + token * qkv_stride + head[None, :] * HEAD_DIM
        x = tl.load(token_at + cols[:, None], mask=tile_mask, other=0.0).to(tl.float32)  # [BLOCK_D, BLOCK_H]
        y = tl.load(token_at + partner[:, None], mask=tile_mask, other=0.0).to(tl.float32)
        turned = x * x_factor + y * y_factor
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(x * x, axis=0) / HEAD_DIM + eps)
            turned *= tl.where(is_value, 1.0, scale)[None, :]
        q = turned.to(qkv_ptr.dtype.element_ty)
        q_warps = tl.broadcast_to(q[None, :, :], (WARPS, BLOCK_D, BLOCK_H))

        # The leading dimension is the warp: each keeps a running softmax of its own tokens, and nothing crosses warps
        # before the end of the chunk. Tokens, not heads, are the matrix units' tall side: a group of heads pads to 8.
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
        chunk_top = tl.max(top, axis=0)
        share = tl.exp2(top - chunk_top[None, :])
        chunk_total = tl.sum(total * share, axis=0)
        chunk_acc = tl.sum(acc * share[:, None, :], axis=0)  # [BLOCK_D, BLOCK_H]

        # The token itself, as later steps will find it in the cache.
        own_k = tl.sum(tl.where(is_key[None, :], turned, 0.0), axis=1)  # [BLOCK_D]
        own_v = tl.sum(tl.where(is_value[None, :], turned, 0.0), axis=1)
        stored_k = to_cache(own_k, inverse_k_scale, k_cache_ptr, IS_FP8, FP8_LIMIT)
        stored_v = to_cache(own_v, inverse_v_scale, v_cache_ptr, IS_FP8, FP8_LIMIT)
        cache_row = ((slot // BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
        write_mask = col_mask & is_last & (slot >= 0)
        tl.store(k_cache_ptr + cache_row * HEAD_DIM + cols, stored_k, mask=write_mask)
        tl.store(v_cache_ptr + cache_row * HEAD_DIM + cols, stored_v, mask=write_mask)
        own_score = tl.sum(q.to(tl.float32) * stored_k.to(tl.float32)[:, None], axis=0) * score_scale  # [BLOCK_H]
        if HAS_SOFT_CAP:
            own_score = soft_cap_scores(own_score, soft_cap) * 1.4426950408889634
        own_score = tl.where(is_last, own_score, float("-inf"))
        new_top = tl.maximum(chunk_top, own_score)
        old = tl.exp2(chunk_top - new_top)
        own_share = tl.exp2(own_score - new_top)
        chunk_total = chunk_total * old + own_share
        chunk_acc = chunk_acc * old[None, :] + stored_v.to(tl.float32)[:, None] * own_share[None, :]

        at = (item // NUM_KV_HEADS) * NUM_HEADS + head_start + heads.to(tl.int64)
        query_mask = heads < GROUP
        out_mask = query_mask[None, :] & col_mask[:, None]
        tl.store(partial_out_ptr + at[None, :] * HEAD_DIM + cols[:, None], chunk_acc, mask=out_mask)
        tl.store(partial_sums_ptr + at * 2, new_top, mask=query_mask)
        tl.store(partial_sums_ptr + at * 2 + 1, chunk_total, mask=query_mask)


def attention_from_qkv(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    work: WorkList,
    workspace: DecodeWorkspace,
    softmax_scale: float,
    num_heads: int,
    *,
    norms: HeadNorms | None = None,
    interleaved: bool = False,
    window: int = 0,
    aligned: bool = False,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    tuning: FromQkvTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Write this step's keys and values into the cache and return every token's attention, [num_tokens, num_heads, D].

    qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * D], read only; every run of `work` is one token of it. Positions,
    slots, tables and scales as in `rope_and_write_kv`, the rest as in `decode_attention`.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or that the kernel does not support.
    """
    num_tokens = qkv.shape[0]
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    rotary_dim = 2 * cos.shape[1]
    check_rotation_inputs("attention_from_qkv", qkv, k_cache, v_cache, cos, sin, num_heads)
    if qkv.stride(1) != 1:
        raise ValueError("attention_from_qkv: qkv's columns must be contiguous")
    queries = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))  # [num_tokens, num_heads, D]
    check_attention_inputs("attention_from_qkv", queries, k_cache, v_cache)
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    group = num_heads // num_kv_heads
    tuning = tuning or default_from_qkv_tuning(head_dim)
    tile = tuning.warp_tokens * tuning.num_warps
    max_visible = block_tables.shape[1] * block_size
    num_records = min(work.capacity, work.policy.most_records(work.runs.shape[0], max_visible))
    _from_qkv_kernel[(num_records * num_kv_heads,)](
        qkv,
        k_cache,
        v_cache,
        work.records,
        work.num_records,
        block_tables,
        positions,
        slots,
        cos,
        sin,
        qkv if norms is None else norms.query,
        qkv if norms is None else norms.key,
        workspace.partial_out,
        workspace.partial_sums,
        softmax_scale * k_scale * (1.0 if soft_cap else LOG2_E),
        1.0 / k_scale,
        1.0 / v_scale,
        soft_cap,
        0.0 if norms is None else norms.eps,
        0.0 if norms is None else norms.offset,
        qkv.stride(0),
        block_tables.stride(0),
        work.capacity,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        BLOCK_SIZE=block_size,
        IN_ONE_BLOCK=block_size % tile == 0 and work.policy.min_chunk % tile == 0,
        WINDOW=window,
        ALIGNED=aligned,
        INTERLEAVED=interleaved,
        HAS_NORM=norms is not None,
        HAS_SOFT_CAP=soft_cap > 0,
        IS_FP8=k_cache.dtype == torch.float8_e4m3fn,
        FP8_LIMIT=FP8_MAX,
        BLOCK_H=max(8, triton.next_power_of_2(group + 2)),
        BLOCK_D=triton.next_power_of_2(head_dim),
        WARPS=tuning.num_warps,
        WARP_TOKENS=tuning.warp_tokens,
        NUM_STAGES=tuning.num_stages,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    combine_chunks(work, workspace, out, sinks=sinks, v_scale=v_scale, few_runs=True, pdl=pdl)
    return out
