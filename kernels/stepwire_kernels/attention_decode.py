"""Paged attention for runs of one query token (split-KV flash decoding).

For query head h of a run, with g = h // group its KV head and i over the visible tokens (the last `window` of kv_len):

    s_i = softmax_scale * q_h . k_i          s_i <- soft_cap * tanh(s_i / soft_cap)      (only with a soft cap)
    out_h = sum_i exp(s_i) v_i / (exp(sink_h) + sum_i exp(s_i))                         (sink_h only with sinks)

q, out: [num_tokens, num_heads, D]; caches: [num_blocks, num_kv_heads, block_size, D], model dtype or float8_e4m3fn;
block_tables: int32 [max_rows, max_blocks_per_row]; sinks: float32 [num_heads]. Scores and sums are float32.

A fixed number of programs walks the device-built work list (`decode_list.py`), a share of it each. The heads of a group
share one tile, so KV is read once. A run that lies in several shares leaves partial results, which a second kernel adds
in their order: the result does not depend on which program ends first.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018; sinks: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.decode_chunk import attend_chunk, load_record, nth_record, records_of
from stepwire_kernels.decode_list import decode_policy_of
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.work_list import SharePolicy, WorkList, first_visible

LOG2_E = 1.4426950408889634
SUPPORTED_HEAD_DIMS = (64, 80, 96, 128, 256, 512)
# Heads above are served by tiles that are cut for them.
WIDE_HEAD_DIM = 256
# Runs times KV heads whose chunks may be counted in.
NUM_COUNTERS = 2048
# What shares are cut for: an H100 and an H200 have so many multiprocessors.
SHARED_MULTIPROCESSORS = 132
# Tokens of a share: with fewer, a program's beginning and end take longer than its tokens.
MIN_SHARE = 128


@dataclass(frozen=True)
class DecodeTuning:
    """Launch shape of the decode kernel: a tile is warp_tokens * num_warps tokens, each warp with its own softmax."""

    warp_tokens: int = 16
    num_warps: int = 1
    num_stages: int = 4
    """As many as leave a multiprocessor room for `programs_per_sm` and one more, in 16 bits with 128 a head: programs
    begin while the kernel ahead still holds most multiprocessors, and those that are free would take too many."""
    programs_per_sm: int = 8


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of the decode kernels, shared by all layers."""

    partial_out: torch.Tensor  # float32 [num_partials, num_heads, D]
    partial_sums: torch.Tensor  # float32 [num_partials, num_heads, 2]: running maximum (base 2) and sum
    counters: torch.Tensor  # int32 [NUM_COUNTERS]: zeros between launches


def allocate_decode_workspace(
    work: WorkList, num_heads: int, head_dim: int, *, num_padding: int = 0
) -> DecodeWorkspace:
    """Scratch for any content of `work`, of whose records the last `num_padding` are never anything but padding."""
    device = work.records.device
    # Padding stands behind all pieces and has its zeros at once: 512 tokens of 128 latent heads would be 134 MB.
    num_partials = work.capacity - num_padding
    return DecodeWorkspace(
        partial_out=torch.empty((num_partials, num_heads, head_dim), dtype=torch.float32, device=device),
        partial_sums=torch.empty((num_partials, num_heads, 2), dtype=torch.float32, device=device),
        counters=torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device),
    )


@triton.jit
def _combine_kernel(
    partial_out_ptr,
    partial_sums_ptr,
    out_ptr,
    list_runs_ptr,
    sinks_ptr,
    v_scale,
    out_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ALL_RUNS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Sum one head's partial results of one run, in chunk order; the sink joins the denominator."""
    head = tl.program_id(0)
    run = tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < HEAD_DIM
    release_downstream(USE_PDL)
    # The step's plan, not an earlier layer, has written these.
    token = tl.load(list_runs_ptr + run * 4).to(tl.int64)
    first_item = tl.load(list_runs_ptr + run * 4 + 1)
    num_chunks = tl.load(list_runs_ptr + run * 4 + 2)
    wait_upstream(USE_PDL)
    # Elsewhere a run of one chunk has its result already, and padding its zeros.
    if ALL_RUNS or num_chunks > 1:
        top = -1e30
        total = 0.0
        if HAS_SINKS:
            top = tl.load(sinks_ptr + head) * 1.4426950408889634
            total = 1.0
        acc = tl.zeros([BLOCK_D], dtype=tl.float32)
        for base in range(0, num_chunks, BLOCK_CHUNKS):
            chunk = base + tl.arange(0, BLOCK_CHUNKS)
            mask = chunk < num_chunks
            at = (first_item + chunk).to(tl.int64) * NUM_HEADS + head
            tops = tl.load(partial_sums_ptr + at * 2, mask=mask, other=-1e30)
            sums = tl.load(partial_sums_ptr + at * 2 + 1, mask=mask, other=0.0)
            values = tl.load(
                partial_out_ptr + at[:, None] * HEAD_DIM + cols[None, :],
                mask=mask[:, None] & col_mask[None, :],
                other=0.0,
            )  # [BLOCK_CHUNKS, BLOCK_D]
            new_top = tl.maximum(top, tl.max(tops, axis=0))
            weights = tl.exp2(tops - new_top)
            old = tl.exp2(top - new_top)
            total = total * old + tl.sum(sums * weights, axis=0)
            acc = acc * old + tl.sum(values * weights[:, None], axis=0)
            top = new_top
        result = acc / tl.maximum(total, 1e-30) * v_scale
        out_at = out_ptr + token * out_stride + head * HEAD_DIM + cols
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=col_mask)


@triton.jit
def _decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    records_ptr,
    num_records_ptr,
    shares_ptr,
    block_tables_ptr,
    sinks_ptr,
    partial_out_ptr,
    partial_sums_ptr,
    score_scale,
    v_scale,
    soft_cap,
    q_stride,
    out_stride,
    table_stride,
    capacity,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IN_ONE_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
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
    col_mask = cols < HEAD_DIM
    release_downstream(USE_PDL)
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    num_places = tl.num_programs(0) // NUM_KV_HEADS
    head_start = kv_head * GROUP
    # The step's plan, not an earlier layer, has written lists and tables: they are read before the wait.
    first, num_own, first_other, num_items = records_of(
        tl.program_id(0) // NUM_KV_HEADS, num_places, num_records_ptr, shares_ptr
    )
    # Records are read one item ahead: their latency hides behind the item before.
    record_index = nth_record(0, first, num_own, first_other, num_places)
    row, token, kv_len, kv_start, kv_end, num_chunks = load_record(records_ptr, record_index, capacity)
    wait_upstream(USE_PDL)
    for item in range(0, num_items):
        next_index = nth_record(item + 1, first, num_own, first_other, num_places)
        next_row, next_token, next_kv_len, next_kv_start, next_kv_end, next_num_chunks = load_record(
            records_ptr, next_index, capacity
        )
        q_at = q_ptr + token * q_stride + (head_start + heads)[None, :] * HEAD_DIM + cols[:, None]
        q_mask = (heads < GROUP)[None, :] & col_mask[:, None]
        q = tl.load(q_at, mask=q_mask, other=0.0)  # [BLOCK_D, BLOCK_H]
        table = block_tables_ptr + row.to(tl.int64) * table_stride
        window_start = 0
        if WINDOW > 0:
            window_start = first_visible(kv_len - 1, WINDOW, ALIGNED)
            kv_start = tl.maximum(kv_start, (window_start // TILE_N) * TILE_N)

        top = tl.full([WARPS, BLOCK_H], -1e30, dtype=tl.float32)
        total = tl.zeros([WARPS, BLOCK_H], dtype=tl.float32)
        acc = tl.zeros([WARPS, BLOCK_D, BLOCK_H], dtype=tl.float32)
        block = tl.load(table + kv_start // BLOCK_SIZE, mask=kv_start < kv_end, other=0)
        chunk_top, chunk_total, chunk_acc = attend_chunk(
            top, total, acc, q, table, block, kv_head, kv_start, kv_end, window_start, k_cache_ptr, v_cache_ptr,
            score_scale, soft_cap, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, IN_ONE_BLOCK, WINDOW > 0,
            HAS_SOFT_CAP, WARPS, WARP_TOKENS, NUM_STAGES,
        )  # fmt: skip

        if num_chunks == 1:
            if HAS_SINKS:
                sink = tl.load(sinks_ptr + head_start + heads, mask=heads < GROUP, other=0.0) * 1.4426950408889634
                # A padding run (kv_len 0) keeps a sum of 0 and so still writes zeros.
                new_top = tl.maximum(chunk_top, sink)
                old = tl.exp2(chunk_top - new_top)
                chunk_total = chunk_total * old + tl.exp2(sink - new_top)
                chunk_acc = chunk_acc * old[None, :]
            result = chunk_acc / tl.maximum(chunk_total, 1e-30)[None, :] * v_scale
            out_at = out_ptr + token * out_stride + (head_start + heads)[None, :] * HEAD_DIM + cols[:, None]
            tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=q_mask)
        else:
            at = record_index.to(tl.int64) * NUM_HEADS + head_start + heads
            tl.store(partial_out_ptr + at[None, :] * HEAD_DIM + cols[:, None], chunk_acc, mask=q_mask)
            tl.store(partial_sums_ptr + at * 2, chunk_top, mask=heads < GROUP)
            tl.store(partial_sums_ptr + at * 2 + 1, chunk_total, mask=heads < GROUP)
        record_index, row, token, kv_len = next_index, next_row, next_token, next_kv_len
        kv_start, kv_end, num_chunks = next_kv_start, next_kv_end, next_num_chunks


def check_attention_inputs(name: str, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raise ValueError, saying what to change, for shapes that the attention kernels cannot take."""
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, cache_dim = k_cache.shape
    if head_dim not in SUPPORTED_HEAD_DIMS:
        raise ValueError(
            f"{name}: head dimension {head_dim} is not one of {SUPPORTED_HEAD_DIMS}; use the torch backend"
        )
    if cache_dim != head_dim or v_cache.shape != k_cache.shape or num_heads % num_kv_heads:
        raise ValueError(
            f"{name}: q {tuple(q.shape)} does not fit caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}; "
            "they need one head dimension, and query heads a multiple of KV heads"
        )
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"{name}: block size {block_size} must be a power of two, 16 or more; change --block-size")
    if q.stride(2) != 1 or q.stride(1) != head_dim or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(f"{name}: q's heads and the caches must be contiguous")


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    work: WorkList,
    workspace: DecodeWorkspace,
    softmax_scale: float,
    out: torch.Tensor,
    *,
    window: int = 0,
    aligned: bool = False,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    tuning: DecodeTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Write the attention of every run in `work` to its token's row of `out` (other rows stay as they are).

    `window` and `aligned` must be those `work` was built with; 0 means all tokens, as soft_cap 0 means none.

    Raises:
        ValueError: a head dimension, block size or shape that the kernel does not support.
    """
    check_attention_inputs("decode_attention", q, k_cache, v_cache)
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    tuning = tuning or default_decode_tuning(head_dim, k_cache.dtype)
    block_d = triton.next_power_of_2(head_dim)
    policy, tile = decode_policy_of(work), tuning.warp_tokens * tuning.num_warps
    _decode_kernel[(policy.num_shares * num_kv_heads,)](
        q,
        k_cache,
        v_cache,
        out,
        work.records,
        work.num_records,
        work.shares,
        block_tables,
        q if sinks is None else sinks,
        workspace.partial_out,
        workspace.partial_sums,
        softmax_scale * k_scale * (1.0 if soft_cap else LOG2_E),
        v_scale,
        soft_cap,
        q.stride(0),
        out.stride(0),
        block_tables.stride(0),
        work.capacity,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        IN_ONE_BLOCK=block_size % tile == 0 and policy.cut % tile == 0,
        WINDOW=window,
        ALIGNED=aligned,
        HAS_SOFT_CAP=soft_cap > 0,
        HAS_SINKS=sinks is not None,
        BLOCK_H=max(8, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        WARPS=tuning.num_warps,
        WARP_TOKENS=tuning.warp_tokens,
        NUM_STAGES=tuning.num_stages,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    combine_chunks(work, workspace, out, sinks=sinks, v_scale=v_scale, pdl=pdl)
    return out


def combine_chunks(
    work: WorkList,
    workspace: DecodeWorkspace,
    out: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    v_scale: float = 1.0,
    few_runs: bool = False,
    pdl: bool = False,
) -> None:
    """Add up the partial results of every run of several chunks into its token's row of out [num_tokens, heads, D].

    `few_runs`: those of one chunk too, and zeros for a padding run's only token; more parts are on their way at once.
    """
    _, num_heads, head_dim = workspace.partial_out.shape
    block_d = triton.next_power_of_2(head_dim)
    _combine_kernel[(num_heads, work.runs.shape[0])](
        workspace.partial_out,
        workspace.partial_sums,
        out,
        work.runs,
        workspace.partial_sums if sinks is None else sinks,
        v_scale,
        out.stride(0),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        HAS_SINKS=sinks is not None,
        ALL_RUNS=few_runs,
        BLOCK_CHUNKS=32 if few_runs else 16,
        BLOCK_D=block_d,
        USE_PDL=pdl,
        num_warps=4 if few_runs else max(1, block_d // 256),
        **launch_options(pdl),
    )


def default_decode_tuning(head_dim: int, cache_dtype: torch.dtype) -> DecodeTuning:
    """The launch shape measured best on an H200 for this head dimension and cache dtype."""
    if head_dim > 128 or cache_dtype == torch.float32:
        return DecodeTuning(num_warps=1, num_stages=2, programs_per_sm=6)
    return DecodeTuning()


def decode_policy(num_kv_heads: int, tuning: DecodeTuning) -> SharePolicy:
    """As many shares as programs run at once."""
    programs = SHARED_MULTIPROCESSORS * tuning.programs_per_sm
    return SharePolicy(max(1, programs // num_kv_heads), min_share=MIN_SHARE)
