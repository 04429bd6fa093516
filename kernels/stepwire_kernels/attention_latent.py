"""Paged latent attention: all heads attend to one compressed vector a token, whose leading part is its value too.

With u_i = cache[i] (R + rope_dim numbers, R = kv_rank) and i over the tokens that a query sees:

    s_i = softmax_scale * query . u_i                out = sum_i exp(s_i) u_i[:R] / sum_i exp(s_i)

query: [num_tokens, heads, R + rope_dim]; out: [num_tokens, heads, R]; cache: [num_blocks, 1, block_size, R + rope_dim],
model dtype or float8_e4m3fn. Scores and sums are float32.

The matrix rows are heads (of one query token in decode, of several in prefill): a tile of the cache is read once for
all of them and serves as keys and, but for its rotated end, as values. Decode walks the list of `decode_list.py` as
`attention_decode.py` does, with a program for each share and block of heads; prefill has one program for each tile of
the list and each block of heads.

Source: DeepSeek-AI, "DeepSeek-V2", 2024 (the absorbed form); Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.attention_decode import LOG2_E, SHARED_MULTIPROCESSORS, DecodeWorkspace, combine_chunks
from stepwire_kernels.decode_chunk import nth_record, records_of
from stepwire_kernels.decode_list import decode_policy_of
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.device_limits import has_tensor_memory, is_roomy
from stepwire_kernels.work_list import SharePolicy, WorkList

# Beyond this the accumulator of a tile does not fit the registers.
MAX_KV_RANK = 512
MAX_ROPE_DIM = 128
# Tokens of a share: a partial result has kv_rank numbers a head, and is written and read again.
MIN_LATENT_SHARE = 128


@dataclass(frozen=True)
class LatentTuning:
    """Tile shape: matrix rows (heads), and tokens of the cache; `programs_per_sm` matters for decode."""

    block_rows: int = 64
    tile_tokens: int = 32
    num_warps: int = 8
    num_stages: int = 2
    programs_per_sm: int = 1


@triton.jit
def _attend(
    acc,
    total,
    top,
    q_c,
    q_r,
    cache_ptr,
    table,
    kv_from,
    kv_to,
    positions,
    score_scale,
    KV_RANK: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IN_ONE_BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILE_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Fold the cached tokens [kv_from, kv_to) into the running softmax of one tile; tiles lie IN_ONE_BLOCK or not."""
    DIM: tl.constexpr = KV_RANK + ROPE_DIM
    offsets = tl.arange(0, TILE_N)
    cols_c = tl.arange(0, BLOCK_C)
    cols_r = tl.arange(0, BLOCK_R)
    # One tile ahead, so that the copy of a tile never waits for its block id.
    block = tl.load(table + kv_from // BLOCK_SIZE, mask=kv_from < kv_to, other=0)
    for start in tl.range(kv_from, kv_to, TILE_N, num_stages=NUM_STAGES):
        n = start + offsets
        n_mask = n < kv_to
        if IN_ONE_BLOCK:
            following = start + TILE_N
            next_block = tl.load(table + following // BLOCK_SIZE, mask=following < kv_to, other=0)
            rows = block.to(tl.int64) * BLOCK_SIZE + start % BLOCK_SIZE + offsets
        else:
            next_block = block
            blocks = tl.load(table + n // BLOCK_SIZE, mask=n_mask, other=0).to(tl.int64)
            rows = blocks * BLOCK_SIZE + n % BLOCK_SIZE
        at = cache_ptr + rows[:, None] * DIM
        c_mask = n_mask[:, None]
        if KV_RANK < BLOCK_C:
            c_mask = c_mask & (cols_c < KV_RANK)[None, :]
        r_mask = n_mask[:, None]
        if ROPE_DIM < BLOCK_R:
            r_mask = r_mask & (cols_r < ROPE_DIM)[None, :]
        c = tl.load(at + cols_c[None, :], mask=c_mask, other=0.0).to(q_c.dtype)  # [TILE_N, BLOCK_C]
        r = tl.load(at + KV_RANK + cols_r[None, :], mask=r_mask, other=0.0).to(q_c.dtype)  # [TILE_N, BLOCK_R]
        scores = tl.dot(q_r, tl.trans(r), input_precision="ieee")  # [BLOCK_M, TILE_N]
        scores = tl.dot(q_c, tl.trans(c), scores, input_precision="ieee") * score_scale
        visible = n_mask[None, :]
        if CAUSAL:
            visible = visible & (n[None, :] <= positions[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(q_c.dtype), c, acc * old[:, None], input_precision="ieee")
        top = new_top
        block = next_block
    return acc, total, top


@triton.jit
def _load_query(
    at, row_mask, KV_RANK: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Both parts of the queries at pointers [BLOCK_M]."""
    cols_c = tl.arange(0, BLOCK_C)
    cols_r = tl.arange(0, BLOCK_R)
    c_mask = row_mask[:, None] & (cols_c < KV_RANK)[None, :]
    r_mask = row_mask[:, None] & (cols_r < ROPE_DIM)[None, :]
    q_c = tl.load(at[:, None] + cols_c[None, :], mask=c_mask, other=0.0)  # [BLOCK_M, BLOCK_C]
    q_r = tl.load(at[:, None] + KV_RANK + cols_r[None, :], mask=r_mask, other=0.0)  # [BLOCK_M, BLOCK_R]
    return q_c, q_r


@triton.jit
def _decode_kernel(
    q_ptr,
    cache_ptr,
    out_ptr,
    records_ptr,
    num_records_ptr,
    shares_ptr,
    block_tables_ptr,
    partial_out_ptr,
    partial_sums_ptr,
    score_scale,
    value_scale,
    q_stride,
    out_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    KV_RANK: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IN_ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILE_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    rows_m = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_C)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    # The blocks of heads that read the same share are neighbours: all but one find it in the level-2 cache.
    num_places = tl.num_programs(0) // HEAD_BLOCKS
    heads = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_M + rows_m
    head_mask = heads < NUM_HEADS
    first, num_own, first_other, num_items = records_of(
        tl.program_id(0) // HEAD_BLOCKS, num_places, num_records_ptr, shares_ptr
    )
    for item in range(0, num_items):
        index = nth_record(item, first, num_own, first_other, num_places)
        record = records_ptr + index * 8
        row = tl.load(record + 1).to(tl.int64)
        token = tl.load(record + 2).to(tl.int64)
        kv_start = tl.load(record + 4)
        kv_end = tl.load(record + 5)
        num_chunks = tl.load(record + 7)
        q_at = q_ptr + token * q_stride + heads * (KV_RANK + ROPE_DIM)
        q_c, q_r = _load_query(q_at, head_mask, KV_RANK, ROPE_DIM, BLOCK_C, BLOCK_R)
        top = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
        acc, total, top = _attend(
            acc, total, top, q_c, q_r, cache_ptr, block_tables_ptr + row * table_stride, kv_start, kv_end, rows_m,
            score_scale, KV_RANK, ROPE_DIM, BLOCK_SIZE, IN_ONE_BLOCK, BLOCK_C, BLOCK_R, TILE_N, False, NUM_STAGES,
        )  # fmt: skip
        mask = head_mask[:, None] & (cols < KV_RANK)[None, :]
        if num_chunks == 1:
            # A padding run saw nothing: its sum is 0, and so is what it writes.
            result = acc / tl.maximum(total, 1e-30)[:, None] * value_scale
            out_at = out_ptr + token * out_stride + heads[:, None] * KV_RANK + cols[None, :]
            tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            at = index.to(tl.int64) * NUM_HEADS + heads
            tl.store(partial_out_ptr + at[:, None] * KV_RANK + cols[None, :], acc, mask=mask)
            tl.store(partial_sums_ptr + at * 2, top, mask=head_mask)
            tl.store(partial_sums_ptr + at * 2 + 1, total, mask=head_mask)


@triton.jit
def _prefill_kernel(
    q_ptr,
    cache_ptr,
    out_ptr,
    records_ptr,
    num_records_ptr,
    block_tables_ptr,
    score_scale,
    value_scale,
    q_stride,
    out_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    HEADS_EACH: tl.constexpr,
    KV_RANK: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILE_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """`HEADS_EACH` heads of some query tokens: matrix row m is head m % HEADS_EACH of query m // HEADS_EACH."""
    index = tl.program_id(1)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    if index < tl.load(num_records_ptr):
        record = records_ptr + index * 8
        row = tl.load(record + 1).to(tl.int64)
        token = tl.load(record + 2)
        num_queries = tl.load(record + 3)
        position = tl.load(record + 4)
        rows_m = tl.arange(0, BLOCK_M)
        cols = tl.arange(0, BLOCK_C)
        query = rows_m // HEADS_EACH
        heads = tl.program_id(0) * HEADS_EACH + rows_m % HEADS_EACH
        row_mask = (query < num_queries) & (heads < NUM_HEADS)
        tokens = (token + query).to(tl.int64)
        positions = position + tl.minimum(query, num_queries - 1)
        table = block_tables_ptr + row * table_stride
        q_at = q_ptr + tokens * q_stride + heads * (KV_RANK + ROPE_DIM)
        q_c, q_r = _load_query(q_at, row_mask, KV_RANK, ROPE_DIM, BLOCK_C, BLOCK_R)
        top = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
        all_see = ((position + 1) // TILE_N) * TILE_N
        acc, total, top = _attend(
            acc, total, top, q_c, q_r, cache_ptr, table, 0, all_see, positions, score_scale, KV_RANK, ROPE_DIM,
            BLOCK_SIZE, BLOCK_SIZE % TILE_N == 0, BLOCK_C, BLOCK_R, TILE_N, False, NUM_STAGES,
        )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, q_c, q_r, cache_ptr, table, all_see, position + num_queries, positions, score_scale,
            KV_RANK, ROPE_DIM, BLOCK_SIZE, BLOCK_SIZE % TILE_N == 0, BLOCK_C, BLOCK_R, TILE_N, True, NUM_STAGES,
        )  # fmt: skip
        result = acc / tl.maximum(total, 1e-30)[:, None] * value_scale
        out_at = out_ptr + tokens[:, None] * out_stride + heads[:, None] * KV_RANK + cols[None, :]
        mask = row_mask[:, None] & (cols < KV_RANK)[None, :]
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=mask)


def unsupported_latent(kv_rank: int, rope_dim: int, block_size: int) -> str | None:
    """Why the kernels cannot serve these sizes; None: they can."""
    if kv_rank > MAX_KV_RANK or rope_dim > MAX_ROPE_DIM:
        return f"latent vectors of {kv_rank} + {rope_dim} numbers, the kernels take {MAX_KV_RANK} + {MAX_ROPE_DIM}"
    if block_size < 16 or block_size & (block_size - 1):
        return f"block_size {block_size} is not a power of two of at least 16"
    return None


def _check(name: str, q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
    num_tokens, num_heads, dim = q.shape
    if cache.shape[1] != 1 or cache.shape[3] != dim or out.shape[:2] != (num_tokens, num_heads) or out.shape[2] >= dim:
        raise ValueError(
            f"{name}: q {tuple(q.shape)} needs a cache of one head of {dim} and out [{num_tokens}, {num_heads}, "
            f"kv_rank], got {tuple(cache.shape)} and {tuple(out.shape)}"
        )
    reason = unsupported_latent(out.shape[2], dim - out.shape[2], cache.shape[2])
    if reason is not None:
        raise ValueError(f"{name}: {reason}; use the torch backend")
    if q.stride()[1:] != (dim, 1) or out.stride()[1:] != (out.shape[2], 1) or not cache.is_contiguous():
        raise ValueError(f"{name}: the heads of q and out and the cache must be contiguous")


def default_latent_decode_tuning(num_heads: int, dtype: torch.dtype, device: torch.device) -> LatentTuning:
    """The launch shape of decode; to be measured: `python -m load_tests.kernels.sweep latent`."""
    rows = min(64 if is_roomy(device) else 32, max(16, triton.next_power_of_2(num_heads)))
    if dtype == torch.float32:
        return LatentTuning(16, 16, 4, 1, 1)
    if rows < 64:
        return LatentTuning(rows, 32, 4, 2, 2)
    return LatentTuning(rows, 32, 8, 2, 1)


def latent_policy(num_heads: int, tuning: LatentTuning) -> SharePolicy:
    """As many shares as programs run at once.

    With 128 heads a partial result is as large as the cached vectors of 230 tokens.
    """
    programs = SHARED_MULTIPROCESSORS * tuning.programs_per_sm
    num_shares = max(1, programs // triton.cdiv(num_heads, tuning.block_rows))
    return SharePolicy(num_shares, cut=32, min_share=MIN_LATENT_SHARE)


def default_latent_prefill_tuning(dtype: torch.dtype, device: torch.device) -> LatentTuning:
    """The launch shape of prefill; to be measured: `python -m load_tests.kernels.sweep latent`."""
    if dtype == torch.float32:
        return LatentTuning(16, 16, 4, 1, 1)
    if not is_roomy(device):
        return LatentTuning(32, 32, 4, 2, 1)
    return LatentTuning(64, 32 if has_tensor_memory(device) else 64, 8, 2, 1)


def latent_tile_tokens(num_heads: int, tuning: LatentTuning) -> int:
    """Query tokens in one prefill tile: what `build_prefill_list` needs to know."""
    return max(1, tuning.block_rows // num_heads)


def latent_decode_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    work: WorkList,
    workspace: DecodeWorkspace,
    softmax_scale: float,
    out: torch.Tensor,
    *,
    cache_scale: float = 1.0,
    tuning: LatentTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Write the attention of every run in `work` to its token's row of `out` (other rows stay as they are).

    The workspace is that of `allocate_decode_workspace(work, heads, kv_rank)`.

    Raises:
        ValueError: sizes or strides that the kernel does not support.
    """
    _check("latent_decode_attention", q, cache, out)
    num_heads, kv_rank = out.shape[1:]
    rope_dim = q.shape[2] - kv_rank
    tuning = tuning or default_latent_decode_tuning(num_heads, q.dtype, q.device)
    head_blocks = triton.cdiv(num_heads, tuning.block_rows)
    policy, block_size = decode_policy_of(work), cache.shape[2]
    _decode_kernel[(policy.num_shares * head_blocks,)](
        q,
        cache,
        out,
        work.records,
        work.num_records,
        work.shares,
        block_tables,
        workspace.partial_out,
        workspace.partial_sums,
        softmax_scale * cache_scale * LOG2_E,
        cache_scale,
        q.stride(0),
        out.stride(0),
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        HEAD_BLOCKS=head_blocks,
        KV_RANK=kv_rank,
        ROPE_DIM=rope_dim,
        BLOCK_SIZE=block_size,
        IN_ONE_BLOCK=block_size % tuning.tile_tokens == 0 and policy.cut % tuning.tile_tokens == 0,
        BLOCK_M=tuning.block_rows,
        BLOCK_C=max(16, triton.next_power_of_2(kv_rank)),
        BLOCK_R=max(16, triton.next_power_of_2(rope_dim)),
        TILE_N=tuning.tile_tokens,
        NUM_STAGES=tuning.num_stages,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    combine_chunks(work, workspace, out, v_scale=cache_scale, pdl=pdl)
    return out


def latent_prefill_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    work: WorkList,
    softmax_scale: float,
    out: torch.Tensor,
    *,
    cache_scale: float = 1.0,
    tuning: LatentTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Write the attention of every tile in `work` to `out` (rows of other tokens stay as they are).

    `work` must have been built with `latent_tile_tokens(heads, tuning)`.

    Raises:
        ValueError: sizes or strides that the kernel does not support.
    """
    _check("latent_prefill_attention", q, cache, out)
    num_heads, kv_rank = out.shape[1:]
    rope_dim = q.shape[2] - kv_rank
    tuning = tuning or default_latent_prefill_tuning(q.dtype, q.device)
    heads_each = min(num_heads, tuning.block_rows)
    _prefill_kernel[(triton.cdiv(num_heads, heads_each), work.capacity)](
        q,
        cache,
        out,
        work.records,
        work.num_records,
        block_tables,
        softmax_scale * cache_scale * LOG2_E,
        cache_scale,
        q.stride(0),
        out.stride(0),
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        HEADS_EACH=heads_each,
        KV_RANK=kv_rank,
        ROPE_DIM=rope_dim,
        BLOCK_SIZE=cache.shape[2],
        BLOCK_M=tuning.block_rows,
        BLOCK_C=max(16, triton.next_power_of_2(kv_rank)),
        BLOCK_R=max(16, triton.next_power_of_2(rope_dim)),
        TILE_N=tuning.tile_tokens,
        NUM_STAGES=tuning.num_stages,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out
