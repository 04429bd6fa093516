"""Decode attention straight from the packed projection: rotation, KV write and attention in one kernel.

Computes what `rope_kv.rope_and_write_kv` and then `attention_decode.decode_attention` compute, for a step in which
every run is one token; see there for the formulas. A program has one KV head and a chunk of a run, or several one after
the other. It rotates the queries of its group itself; that of a run's last chunk also rotates the token's key, writes
key and value into the cache, and adds them to its sums from registers (`from_qkv_token.py`).

Two kernels, since two things take the time. A step of few rows waits for level 2, so that as much as can be is read
before the projection is done (`from_qkv_few.py`); many rows read their KV at the memory's rate, and what counts is how
many kernels there are around that, so that the kernel adds up the chunks itself (`from_qkv_many.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from stepwire_kernels.attention_decode import (
    LOG2_E,
    NUM_COUNTERS,
    DecodeWorkspace,
    check_attention_inputs,
    combine_chunks,
)
from stepwire_kernels.decode_list import decode_policy_of
from stepwire_kernels.dependent_launch import launch_options
from stepwire_kernels.from_qkv_few import _few_from_qkv_kernel
from stepwire_kernels.from_qkv_many import _many_from_qkv_kernel
from stepwire_kernels.rope_kv import FP8_MAX, check_rotation_inputs
from stepwire_kernels.work_list import SharePolicy, WorkList

# Runs times KV heads; measured up to here.
MOST_HEADS = NUM_COUNTERS
MOST_HEAD_DIM = 128
MOST_GROUP = 8

# Up to these, reading ahead is worth more than a kernel less.
FEW_RUNS = 4
FEW_HEADS = 32
# Query heads of a program; more do not leave registers for what is read.
FEW_GROUP = 6
FEW_WANTED_PROGRAMS = 768

# Query heads of a group that leave registers for tiles of 32 tokens.
SMALL_GROUP = 5
# Programs of many rows on a multiprocessor, one a share: so many on each of an H100's or H200's.
MANY_PROGRAMS = 6
MANY_WANTED_PROGRAMS = MANY_PROGRAMS * 132
# Shared memory of such a program, which bounds how many a multiprocessor takes. Programs begin while the kernel ahead
# still holds most multiprocessors: were there room for twelve, those that are free would get twelve, and all others
# would wait for them in the end.
MANY_STAGED_BYTES = 32 * 1024
# Tokens of a share of many rows.
MIN_MANY_SHARE = 128
# Of a run of many rows: one program adds them up, two to four at a time. With eight KV heads there are no more shares
# than that; with one there are 792, and a step of one long run would wait for that program longer than for its KV.
MOST_MANY_PIECES = 128


@dataclass(frozen=True)
class FromQkvTuning:
    """Launch shape: a tile is warp_tokens * num_warps tokens, each warp with its own softmax."""

    warp_tokens: int = 32
    num_warps: int = 1
    num_stages: int = 2
    adds_up: bool = False
    """Few rows: whoever finishes a run's last chunk adds up all of them, instead of a launch of its own. Wants few
    chunks, so several warps a tile."""

    @property
    def tile(self) -> int:
        return self.warp_tokens * self.num_warps


def is_few(num_runs: int, num_heads: int, num_kv_heads: int) -> bool:
    """Whether the kernel for few rows takes them."""
    group = num_heads // num_kv_heads
    has_few_heads = num_runs <= FEW_RUNS and num_runs * num_kv_heads <= FEW_HEADS
    return has_few_heads and group <= FEW_GROUP * sharers_of(group)


def sharers_of(group: int) -> int:
    """How many programs of few rows share out a group of query heads: two where it is too large for one and even."""
    return 2 if group > FEW_GROUP and group % 2 == 0 else 1


def default_from_qkv_tuning(
    num_runs: int, num_heads: int, num_kv_heads: int, head_dim: int, item_size: int = 2
) -> FromQkvTuning:
    """The launch shape measured best on an H100 or H200 for so many runs of these heads.

    Many rows: tiles as large as there are registers for, and as many on their way as leave room for `MANY_PROGRAMS`.

    Args:
        item_size: bytes of a number in the cache.
    """
    if is_few(num_runs, num_heads, num_kv_heads):
        return FromQkvTuning(warp_tokens=64 if head_dim <= 64 else 32)
    warp_tokens = 32 if num_heads <= SMALL_GROUP * num_kv_heads or head_dim <= 64 else 16
    tile_bytes = 2 * warp_tokens * triton.next_power_of_2(head_dim) * item_size
    return FromQkvTuning(warp_tokens, num_warps=1, num_stages=1 + max(1, min(4, MANY_STAGED_BYTES // tile_bytes)))


def takes_from_qkv(num_runs: int, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether this is faster than rotation and attention apart for decodes of so many runs."""
    has_room = num_runs * num_kv_heads <= MOST_HEADS and head_dim <= MOST_HEAD_DIM
    return has_room and num_heads <= MOST_GROUP * num_kv_heads


def from_qkv_policy(num_runs: int, num_heads: int, num_kv_heads: int, head_dim: int) -> SharePolicy:
    """Few rows: pieces as small as a tile where the device has room, since all of a tile is read before the wait.

    Many: as many shares as keep every multiprocessor busy.
    """
    tile = default_from_qkv_tuning(num_runs, num_heads, num_kv_heads, head_dim).tile
    if is_few(num_runs, num_heads, num_kv_heads):
        num_groups = num_kv_heads * sharers_of(num_heads // num_kv_heads)
        return SharePolicy(max(1, FEW_WANTED_PROGRAMS // num_groups), cut=tile, min_share=tile)
    num_shares = max(1, MANY_WANTED_PROGRAMS // num_kv_heads)
    return SharePolicy(num_shares, cut=tile, min_share=max(tile, MIN_MANY_SHARE), most_pieces=MOST_MANY_PIECES)


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
    num_runs, (_, num_kv_heads, block_size, head_dim) = work.runs.shape[0], k_cache.shape
    _check_inputs(qkv, k_cache, v_cache, cos, sin, num_heads)
    few = is_few(num_runs, num_heads, num_kv_heads)
    sharers = sharers_of(num_heads // num_kv_heads) if few else 1
    if num_runs * num_kv_heads * sharers > workspace.counters.numel():
        raise ValueError(
            f"attention_from_qkv: {num_runs} runs of {num_kv_heads} KV heads are more than the "
            f"{workspace.counters.numel()} that can be counted; see takes_from_qkv"
        )
    out = torch.empty((qkv.shape[0], num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    tuning = tuning or default_from_qkv_tuning(num_runs, num_heads, num_kv_heads, head_dim, k_cache.element_size())
    group = num_heads // num_kv_heads // sharers
    block_h, block_d = max(8, triton.next_power_of_2(group + 2)), triton.next_power_of_2(head_dim)
    policy = decode_policy_of(work)
    # Tokens that need to lie in one block: a tile's, or of few rows a warp's.
    in_one_block = tuning.warp_tokens if few else tuning.tile
    arguments = (
        out,
        workspace.partial_sums if sinks is None else sinks,
        workspace.counters,
        v_scale,
        out.stride(0),
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
    )
    constants = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": 2 * cos.shape[1],
        "BLOCK_SIZE": block_size,
        "IN_ONE_BLOCK": block_size % in_one_block == 0 and policy.cut % in_one_block == 0,
        "WINDOW": window,
        "ALIGNED": aligned,
        "INTERLEAVED": interleaved,
        "HAS_NORM": norms is not None,
        "HAS_SOFT_CAP": soft_cap > 0,
        "HAS_SINKS": sinks is not None,
        "IS_FP8": k_cache.dtype == torch.float8_e4m3fn,
        "FP8_LIMIT": FP8_MAX,
        "BLOCK_H": block_h,
        "BLOCK_D": block_d,
        "WARPS": tuning.num_warps,
        "WARP_TOKENS": tuning.warp_tokens,
        "NUM_STAGES": tuning.num_stages,
        "USE_PDL": pdl,
        "num_warps": tuning.num_warps,
        **launch_options(pdl),
    }
    if few:
        num_records = min(work.capacity, policy.most_records(num_runs))
        _few_from_qkv_kernel[(num_records * num_kv_heads * sharers,)](
            *arguments,
            SHARERS=sharers,
            ADDS_UP=tuning.adds_up,
            BLOCK_G=triton.next_power_of_2(group),
            PARTS=8,
            **constants,
        )
        if not tuning.adds_up:
            combine_chunks(work, workspace, out, sinks=sinks, v_scale=v_scale, few_runs=True, pdl=pdl)
        return out
    _many_from_qkv_kernel[(policy.num_shares * num_kv_heads,)](
        *arguments,
        work.shares,
        # As many at once as there are registers for, when those of the tiles are free.
        PARTS=max(1, min(4, 4096 * tuning.num_warps // (block_h * block_d))),
        **constants,
    )
    return out


def _check_inputs(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
) -> None:
    check_rotation_inputs("attention_from_qkv", qkv, k_cache, v_cache, cos, sin, num_heads)
    if qkv.stride(1) != 1:
        raise ValueError("attention_from_qkv: qkv's columns must be contiguous")
    head_dim = k_cache.shape[3]
    queries = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))  # [num_tokens, num_heads, D]
    check_attention_inputs("attention_from_qkv", queries, k_cache, v_cache)
