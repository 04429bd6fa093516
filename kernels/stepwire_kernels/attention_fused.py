"""From the packed projection of a few decoding runs to their attention in one launch.

What `rope_kv.py` and `attention_decode.py` do in three, with the same formulas: norms of query and key heads, rotation,
this token's key and value into the cache, attention over all of it, and the sum of the parts that a run is split into.
For steps in which every run has one token (run r is token r) and which are too small to fill the device: there the way
from one kernel to the next is most of the time.

A program owns one KV head and one part of a run's tiles. It rotates its group's queries itself; the program that has
the run's last token writes its key and value before it reads them with the rest. Who ends last among a run's programs
of a head, by a counter that is zero before and after, adds up their parts in order: the sum does not follow who it is.

qkv: [num_runs, (num_heads + 2 * num_kv_heads) * D]; caches: [num_blocks, num_kv_heads, block_size, D]; kv_lens: int32
[num_runs], with this token (0: padding, which gets zeros); run_rows: int32 [num_runs], rows of block_tables; cos, sin:
float32 [max_position, rotary_dim / 2]; sinks: float32 [num_heads]; out: [num_runs, num_heads, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.attention_decode import LOG2_E, check_attention_inputs, soft_cap_scores
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.rope_kv import FP8_MAX, to_cache

MAX_SPLITS = 32
# Programs that fill a device: with fewer, a run is split further.
WANTED_PROGRAMS = 512


@dataclass(frozen=True)
class FusedAttentionTuning:
    """Launch shape: a tile is warp_tokens * num_warps tokens, each warp with its own softmax."""

    warp_tokens: int = 16
    num_warps: int = 4
    num_stages: int = 3
    splits: int | None = None
    """Parts of a run at most; None: by the number of runs and heads."""


@dataclass(frozen=True)
class FusedAttentionWorkspace:
    """Scratch for `max_runs` runs, shared by all layers; `counters` is zero between launches."""

    partial_out: torch.Tensor  # float32 [max_runs, MAX_SPLITS, num_heads, D]
    partial_sums: torch.Tensor  # float32 [max_runs, MAX_SPLITS, num_heads, 2]: running maximum (base 2) and sum
    counters: torch.Tensor  # int32 [max_runs, num_kv_heads]


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm of single heads, one weight for all query heads and one for all key heads."""

    query: torch.Tensor  # [D]
    key: torch.Tensor  # [D]
    eps: float
    weight_offset: float = 0.0


def allocate_fused_attention_workspace(
    max_runs: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str
) -> FusedAttentionWorkspace:
    def floats(*size: int) -> torch.Tensor:
        return torch.empty((max_runs, MAX_SPLITS, num_heads, *size), dtype=torch.float32, device=device)

    counters = torch.zeros((max_runs, num_kv_heads), dtype=torch.int32, device=device)
    return FusedAttentionWorkspace(floats(head_dim), floats(2), counters)


@triton.jit
def _rotated(
    source, heads_at, cols, position, cos_ptr, sin_ptr, norm_ptr, eps, norm_offset,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Heads of a packed row, normed and rotated, float32 [BLOCK_D, heads]; `heads_at`: their first columns, or -1."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    turns = cols < ROTARY_DIM
    if INTERLEAVED:
        pair = tl.where(turns, cols ^ 1, cols)
        column = cols // 2
        first = cols % 2 == 0
    else:
        pair = tl.where(turns, tl.where(cols < HALF, cols + HALF, cols - HALF), cols)
        column = tl.where(cols < HALF, cols, cols - HALF)
        first = cols < HALF
    mask = (heads_at >= 0)[None, :] & (cols < HEAD_DIM)[:, None]
    x = tl.load(source + heads_at[None, :] + cols[:, None], mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(source + heads_at[None, :] + pair[:, None], mask=mask, other=0.0).to(tl.float32)
    table = position * HALF + column
    cos = tl.load(cos_ptr + table, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + table, mask=turns, other=0.0)
    sin = tl.where(first, -sin, sin)
    if HAS_NORM:
        weight = tl.load(norm_ptr + cols, mask=cols < HEAD_DIM, other=0.0).to(tl.float32) + norm_offset
        pair_weight = tl.load(norm_ptr + pair, mask=cols < HEAD_DIM, other=0.0).to(tl.float32) + norm_offset
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / HEAD_DIM + eps)[None, :]
        x = x * scale * weight[:, None]
        partner = partner * scale * pair_weight[:, None]
    return x * cos[:, None] + partner * sin[:, None]


@triton.jit
def _add_up_parts(
    partial_out_ptr, partial_sums_ptr, sinks_ptr, out_at, first_part, num_parts, head_start, cols, v_scale,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_SINKS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one run's attention of a group of heads from its parts, in order; the sink joins the denominator."""
    STEP: tl.constexpr = 4 if SPLITS >= 4 else SPLITS
    numbers = tl.arange(0, BLOCK_G)
    group_mask = numbers < GROUP
    parts = tl.arange(0, SPLITS)
    at = (first_part + parts).to(tl.int64)[:, None] * NUM_HEADS + head_start + numbers[None, :]  # [SPLITS, BLOCK_G]
    mask = (parts < num_parts)[:, None] & group_mask[None, :]
    tops = tl.load(partial_sums_ptr + at * 2, mask=mask, other=-1e30, cache_modifier=".cg")
    sums = tl.load(partial_sums_ptr + at * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, axis=0)  # [BLOCK_G]
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head_start + numbers, mask=group_mask, other=-1e30) * 1.4426950408889634
        top = tl.maximum(top, sink)
    total = tl.sum(sums * tl.exp2(tops - top[None, :]), axis=0)
    if HAS_SINKS:
        total += tl.exp2(sink - top)
    acc = tl.zeros([STEP, BLOCK_G, BLOCK_D], dtype=tl.float32)
    for base in tl.static_range(0, SPLITS, STEP):
        parts = base + tl.arange(0, STEP)
        at = (first_part + parts).to(tl.int64)[:, None] * NUM_HEADS + head_start + numbers[None, :]  # [STEP, BLOCK_G]
        mask = (parts < num_parts)[:, None] & group_mask[None, :]
        tops = tl.load(partial_sums_ptr + at * 2, mask=mask, other=-1e30, cache_modifier=".cg")
        values = tl.load(
            partial_out_ptr + at[:, :, None] * HEAD_DIM + cols[None, None, :],
            mask=mask[:, :, None] & (cols < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )  # [STEP, BLOCK_G, BLOCK_D]
        acc += values * tl.exp2(tops - top[None, :])[:, :, None]
    result = tl.sum(acc, axis=0) / tl.maximum(total, 1e-30)[:, None] * v_scale
    result_at = out_at + (head_start + numbers)[:, None] * HEAD_DIM + cols[None, :]
    tl.store(result_at, result.to(out_at.dtype.element_ty), mask=group_mask[:, None] & (cols < HEAD_DIM)[None, :])


@triton.jit
def _fused_decode_kernel(
    qkv_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    kv_lens_ptr,
    run_rows_ptr,
    block_tables_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    sinks_ptr,
    partial_out_ptr,
    partial_sums_ptr,
    counters_ptr,
    score_scale,
    soft_cap,
    k_scale,
    v_scale,
    eps,
    norm_offset,
    qkv_stride,
    out_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_FP8: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
    WARP_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    TILE: tl.constexpr = WARPS * WARP_TOKENS
    kv_head = tl.program_id(0)
    part = tl.program_id(1)
    run = tl.program_id(2)
    heads = tl.arange(0, BLOCK_H)
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < HEAD_DIM
    offsets = tl.arange(0, WARPS)[:, None] * WARP_TOKENS + tl.arange(0, WARP_TOKENS)[None, :]
    head_start = kv_head * GROUP
    out_at = out_ptr + run.to(tl.int64) * out_stride
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    kv_len = tl.load(kv_lens_ptr + run)
    row = tl.load(run_rows_ptr + run)
    first_tile = 0
    window_start = 0
    if WINDOW > 0:
        window_start = tl.maximum(kv_len - WINDOW, 0)
        first_tile = window_start // TILE
    num_tiles = (kv_len + TILE - 1) // TILE - first_tile
    tiles_each = tl.maximum((num_tiles + SPLITS - 1) // SPLITS, 1)
    num_parts = (num_tiles + tiles_each - 1) // tiles_each
    kv_start = (first_tile + part * tiles_each) * TILE
    kv_end = tl.minimum(kv_start + tiles_each * TILE, kv_len)
    group_mask = (heads < GROUP)[None, :] & col_mask[:, None]
    if (kv_len == 0) & (part == 0):
        zeros = tl.zeros([BLOCK_D, BLOCK_H], dtype=out_ptr.dtype.element_ty)
        tl.store(out_at + (head_start + heads)[None, :] * HEAD_DIM + cols[:, None], zeros, mask=group_mask)
    if part < num_parts:
        table = block_tables_ptr + row.to(tl.int64) * table_stride
        # What the copies of the first tile wait for, on its way with the queries.
        block = tl.load(table + kv_start // BLOCK_SIZE)
        position = (kv_len - 1).to(tl.int64)
        source = qkv_ptr + run.to(tl.int64) * qkv_stride
        if kv_end == kv_len:
            # This token's key and value; the head dimension stands first, as for the queries.
            one = tl.arange(0, 1)
            key_at = one * 0 + (NUM_HEADS + kv_head) * HEAD_DIM
            key = _rotated(
                source, key_at, cols, position, cos_ptr, sin_ptr, k_norm_ptr, eps, norm_offset,
                HEAD_DIM, ROTARY_DIM, INTERLEAVED, HAS_NORM,
            )  # fmt: skip
            value_at = key_at + NUM_KV_HEADS * HEAD_DIM
            value = tl.load(source + value_at[None, :] + cols[:, None], mask=col_mask[:, None], other=0.0)
            last_block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
            cache_row = (last_block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
            cache_at = cache_row * HEAD_DIM + cols[:, None] + one[None, :]
            stored = to_cache(key, 1.0 / k_scale, k_cache_ptr, IS_FP8, FP8_LIMIT)
            tl.store(k_cache_ptr + cache_at, stored, mask=col_mask[:, None])
            stored = to_cache(value.to(tl.float32), 1.0 / v_scale, v_cache_ptr, IS_FP8, FP8_LIMIT)
            tl.store(v_cache_ptr + cache_at, stored, mask=col_mask[:, None])
        q_at = tl.where(heads < GROUP, (head_start + heads) * HEAD_DIM, -1)
        q = _rotated(
            source, q_at, cols, position, cos_ptr, sin_ptr, q_norm_ptr, eps, norm_offset,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, HAS_NORM,
        ).to(qkv_ptr.dtype.element_ty)  # fmt: skip
        q_warps = tl.broadcast_to(q[None, :, :], (WARPS, BLOCK_D, BLOCK_H))
        # Other threads of this program copy what was written above.
        tl.debug_barrier()

        # As in `attention_decode.py`: the leading dimension is the warp, tokens are the matrix units' tall side.
        top = tl.full([WARPS, BLOCK_H], -1e30, dtype=tl.float32)
        total = tl.zeros([WARPS, BLOCK_H], dtype=tl.float32)
        acc = tl.zeros([WARPS, BLOCK_D, BLOCK_H], dtype=tl.float32)
        for start in tl.range(kv_start, kv_end, TILE, num_stages=NUM_STAGES):
            n = start + offsets  # [WARPS, WARP_TOKENS]
            n_mask = n < kv_end
            if BLOCK_SIZE % TILE == 0:
                next_start = start + TILE
                next_block = tl.load(table + next_start // BLOCK_SIZE, mask=next_start < kv_end, other=0)
                kv_rows = (block.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE + offsets
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
            v_at = v_cache_ptr + kv_rows[:, None, :] * HEAD_DIM + cols[None, :, None]
            k = tl.load(k_at, mask=k_mask, other=0.0).to(q.dtype)  # [WARPS, WARP_TOKENS, BLOCK_D]
            v = tl.load(v_at, mask=v_mask, other=0.0).to(q.dtype)  # [WARPS, BLOCK_D, WARP_TOKENS]
            scores = tl.dot(k, q_warps, input_precision="ieee")  # [WARPS, WARP_TOKENS, BLOCK_H]
            if HAS_SOFT_CAP:
                scores = soft_cap_scores(scores * score_scale, soft_cap) * 1.4426950408889634
            else:
                scores = scores * score_scale
            visible = n_mask
            if WINDOW > 0:
                visible = visible & (n >= window_start)
            scores = tl.where(visible[:, :, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_top[:, None, :])
            old = tl.exp2(top - new_top)
            total = total * old + tl.sum(weights, axis=1)
            acc = acc * old[:, None, :]
            acc = tl.dot(v, weights.to(q.dtype), acc, input_precision="ieee")
            top = new_top
            block = next_block
        part_top = tl.max(top, axis=0)
        share = tl.exp2(top - part_top[None, :])
        part_total = tl.sum(total * share, axis=0)
        part_acc = tl.sum(acc * share[:, None, :], axis=0)  # [BLOCK_D, BLOCK_H]

        first_part = run * MAX_PARTS
        at = (first_part + part).to(tl.int64) * NUM_HEADS + head_start + heads
        tl.store(partial_out_ptr + at[None, :] * HEAD_DIM + cols[:, None], part_acc, mask=group_mask)
        tl.store(partial_sums_ptr + at * 2, part_top, mask=heads < GROUP)
        tl.store(partial_sums_ptr + at * 2 + 1, part_total, mask=heads < GROUP)
        # Every thread's stores must precede the one atomic that publishes them.
        tl.debug_barrier()
        counter_at = counters_ptr + run * NUM_KV_HEADS + kv_head
        arrived = tl.atomic_add(counter_at, 1, sem="acq_rel", scope="gpu")
        if arrived == num_parts - 1:
            _add_up_parts(
                partial_out_ptr, partial_sums_ptr, sinks_ptr, out_at, first_part, num_parts, head_start, cols, v_scale,
                NUM_HEADS, GROUP, HEAD_DIM, HAS_SINKS, SPLITS, BLOCK_G, BLOCK_D,
            )  # fmt: skip
            tl.store(counter_at, 0)


def splits_for(num_runs: int, num_kv_heads: int) -> int:
    """Parts of a run at most, so that a few runs fill the device."""
    wanted = triton.next_power_of_2(triton.cdiv(WANTED_PROGRAMS, num_runs * num_kv_heads))
    return max(2, min(MAX_SPLITS, wanted))


def fused_decode_attention(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_lens: torch.Tensor,
    run_rows: torch.Tensor,
    block_tables: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    workspace: FusedAttentionWorkspace,
    softmax_scale: float,
    *,
    norms: HeadNorms | None = None,
    interleaved: bool = False,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
    tuning: FusedAttentionTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """The attention of every run, [num_runs, num_heads, D]; its key and value are in the caches then.

    `window` and `soft_cap` 0 mean none; `k_scale`, `v_scale` matter for a float8 cache.

    Raises:
        ValueError: shapes that do not fit together, or that the kernel does not support.
    """
    num_runs, width = qkv.shape
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    if width % head_dim or num_heads < 1 or qkv.stride(1) != 1:
        raise ValueError(
            f"fused_decode_attention: qkv must be [num_runs, (num_heads + 2 * {num_kv_heads}) * {head_dim}] with "
            f"contiguous columns, got {tuple(qkv.shape)}"
        )
    check_attention_inputs(
        "fused_decode_attention", qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim)), k_cache, v_cache
    )
    if kv_lens.shape != (num_runs,) or run_rows.shape != (num_runs,) or num_runs > workspace.counters.shape[0]:
        raise ValueError(
            f"fused_decode_attention: {num_runs} runs need as many kv_lens and run_rows, and workspace for them; got "
            f"{tuple(kv_lens.shape)}, {tuple(run_rows.shape)} and room for {workspace.counters.shape[0]}"
        )
    if sin.shape != cos.shape or not 0 < 2 * cos.shape[1] <= head_dim or cos.dtype != torch.float32:
        raise ValueError(
            f"fused_decode_attention: cos and sin must be float32 [max_position, rotary_dim / 2], rotary_dim <= "
            f"{head_dim}; got {tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)}"
        )
    if out is None:
        out = torch.empty((num_runs, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    tuning = tuning or default_fused_attention_tuning(head_dim, k_cache.dtype)
    splits = tuning.splits or splits_for(num_runs, num_kv_heads)
    _fused_decode_kernel[(num_kv_heads, splits, num_runs)](
        qkv,
        k_cache,
        v_cache,
        out,
        kv_lens,
        run_rows,
        block_tables,
        cos,
        sin,
        qkv if norms is None else norms.query,
        qkv if norms is None else norms.key,
        workspace.partial_sums if sinks is None else sinks,
        workspace.partial_out,
        workspace.partial_sums,
        workspace.counters,
        softmax_scale * k_scale * (1.0 if soft_cap else LOG2_E),
        soft_cap,
        k_scale,
        v_scale,
        0.0 if norms is None else norms.eps,
        0.0 if norms is None else norms.weight_offset,
        qkv.stride(0),
        out.stride(0),
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=2 * cos.shape[1],
        BLOCK_SIZE=block_size,
        WINDOW=window,
        INTERLEAVED=interleaved,
        HAS_NORM=norms is not None,
        HAS_SOFT_CAP=soft_cap > 0,
        HAS_SINKS=sinks is not None,
        IS_FP8=k_cache.dtype == torch.float8_e4m3fn,
        FP8_LIMIT=FP8_MAX,
        BLOCK_G=triton.next_power_of_2(num_heads // num_kv_heads),
        BLOCK_H=max(8, triton.next_power_of_2(num_heads // num_kv_heads)),
        BLOCK_D=triton.next_power_of_2(head_dim),
        WARPS=tuning.num_warps,
        WARP_TOKENS=tuning.warp_tokens,
        SPLITS=splits,
        MAX_PARTS=MAX_SPLITS,
        NUM_STAGES=tuning.num_stages,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out


def default_fused_attention_tuning(head_dim: int, cache_dtype: torch.dtype) -> FusedAttentionTuning:
    if head_dim > 128 or cache_dtype == torch.float32:
        return FusedAttentionTuning(num_warps=2, num_stages=2)
    return FusedAttentionTuning()
