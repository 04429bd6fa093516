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

from stepwire_kernels.attention_decode import (
    LOG2_E,
    DecodeWorkspace,
    check_attention_inputs,
    combine_chunks,
)
from stepwire_kernels.dependent_launch import launch_options
from stepwire_kernels.from_qkv_few import _few_from_qkv_kernel
from stepwire_kernels.rope_kv import FP8_MAX, check_rotation_inputs
from stepwire_kernels.work_list import ChunkPolicy, WorkList

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
    _few_from_qkv_kernel[(num_records * num_kv_heads,)](
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
