"""Causal paged attention for runs of several query tokens (prefill, chunked prefill, cached prefix).

The formula of `attention_decode.py`, for every query token of a run: the token at absolute position p sees cache tokens
max(0, p - window + 1) .. p, or with an aligned window those of its own window up to p. The run's K and V, this step's
included, are in the paged cache already.

q, out: [num_tokens, num_heads, D], the runs packed one after another; caches:
[num_blocks, num_kv_heads, block_size, D].

One program = one tile of the device-built list (`work_list.build_prefill_list`) for one KV head. Its matrix rows are
(query token, head of the group) pairs, so a short run still fills the tile; KV tiles outside the window or above the
diagonal are never read, and only the tiles on an edge are masked. When a KV tile lies inside one block it is contiguous
and, on a GPU with tensor-copy hardware, loaded through a tensor descriptor.

Source: Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from stepwire_kernels.attention_decode import LOG2_E, WIDE_HEAD_DIM, check_attention_inputs
from stepwire_kernels.decode_chunk import soft_cap_scores
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.device_limits import is_roomy, shared_memory
from stepwire_kernels.work_list import WorkList, first_visible

# Of the largest tile of heads of 512.
WIDE_TILE_BYTES = 192 * 1024


@dataclass(frozen=True)
class PrefillTuning:
    """Tile shape of the prefill kernel."""

    block_rows: int = 64
    tile_tokens: int = 64
    num_warps: int = 4
    num_stages: int = 3
    use_descriptors: bool = True
    warp_specialize: bool = False


def prefill_tile_tokens(num_heads: int, num_kv_heads: int, tuning: PrefillTuning) -> int:
    """Query tokens in one tile: what `build_prefill_list` needs to know."""
    return max(1, tuning.block_rows // (num_heads // num_kv_heads))


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
    k_source,
    v_source,
    table,
    kv_head,
    kv_from,
    kv_to,
    positions,
    last_position,
    score_scale,
    soft_cap,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_N: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """Fold the KV tokens [kv_from, kv_to) into the running softmax of one query tile."""
    offsets_n = tl.arange(0, TILE_N)
    cols = tl.arange(0, BLOCK_D)
    # One tile ahead, so that the copy of a tile never waits for its block id (nor costs the pipeline a stage).
    block = tl.load(table + kv_from // BLOCK_SIZE, mask=kv_from < kv_to, other=0)
    for start in tl.range(kv_from, kv_to, TILE_N, num_stages=NUM_STAGES, warp_specialize=WARP_SPECIALIZE):
        n = start + offsets_n
        next_start = start + TILE_N
        next_block = tl.load(table + next_start // BLOCK_SIZE, mask=next_start < kv_to, other=0)
        if USE_DESCRIPTORS:
            first_row = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE
            k = k_source.load([first_row, 0]).to(q.dtype)  # [TILE_N, BLOCK_D]
        else:
            if BLOCK_SIZE % TILE_N == 0:
                kv_rows = (block.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE + offsets_n
            else:
                blocks = tl.load(table + n // BLOCK_SIZE, mask=n <= last_position, other=0).to(tl.int64)
                kv_rows = (blocks * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + n % BLOCK_SIZE
            kv_at = kv_rows[:, None] * HEAD_DIM + cols[None, :]
            kv_mask = (cols < HEAD_DIM)[None, :] & (n >= 0)[:, None]
            if MASKED:
                kv_mask = kv_mask & (n <= last_position)[:, None]
            k = tl.load(k_source + kv_at, mask=kv_mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, TILE_N]
        if HAS_SOFT_CAP:
            scores = soft_cap_scores(scores * score_scale, soft_cap) * 1.4426950408889634
            if MASKED:
                visible = n[None, :] <= positions[:, None]
                if WINDOW > 0:
                    visible = visible & (n[None, :] >= first_visible(positions, WINDOW, ALIGNED)[:, None])
                scores = tl.where(visible, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_top[:, None])
        else:
            if MASKED:
                visible = n[None, :] <= positions[:, None]
                if WINDOW > 0:
                    visible = visible & (n[None, :] >= first_visible(positions, WINDOW, ALIGNED)[:, None])
                scores = tl.where(visible, scores, float("-inf"))
            # The scale is positive, so the maximum may be taken first; scale and subtraction are then one operation.
            new_top = tl.maximum(top, tl.max(scores, axis=1) * score_scale)
            weights = tl.exp2(scores * score_scale - new_top[:, None])
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(weights, axis=1)
        acc = acc * old[:, None]
        if USE_DESCRIPTORS:
            v = v_source.load([first_row, 0])
            if MASKED:
                # A block's unused tail may hold anything, and 0 * NaN is NaN.
                v = tl.where((n <= last_position)[:, None], v, 0.0)
            v = v.to(q.dtype)
        else:
            v = tl.load(v_source + kv_at, mask=kv_mask, other=0.0).to(q.dtype)
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision="ieee")
        top = new_top
        block = next_block
    return acc, total, top


@triton.jit
def _prefill_kernel(
    q_ptr,
    k_source,
    v_source,
    out_ptr,
    records_ptr,
    num_records_ptr,
    block_tables_ptr,
    sinks_ptr,
    score_scale,
    v_scale,
    soft_cap,
    q_stride,
    out_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_N: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    num_tiles = tl.load(num_records_ptr)
    # Head-major: the programs that run together share one head's KV, which then stays in the level-2 cache.
    kv_head = tl.program_id(0) // tl.maximum(num_tiles, 1)
    if kv_head < NUM_KV_HEADS and num_tiles > 0:
        record = records_ptr + (tl.program_id(0) % num_tiles) * 8
        row = tl.load(record + 1)
        token = tl.load(record + 2)
        num_queries = tl.load(record + 3)
        position = tl.load(record + 4)
        table = block_tables_ptr + row.to(tl.int64) * table_stride

        rows_m = tl.arange(0, BLOCK_M)
        cols = tl.arange(0, BLOCK_D)
        query = rows_m // GROUP
        head = kv_head * GROUP + rows_m % GROUP
        row_mask = query < num_queries
        tokens = (token + query).to(tl.int64)
        positions = position + tl.minimum(query, num_queries - 1)
        last_position = position + num_queries - 1
        io_mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
        q_at = q_ptr + tokens[:, None] * q_stride + head[:, None] * HEAD_DIM + cols[None, :]
        q = tl.load(q_at, mask=io_mask, other=0.0)  # [BLOCK_M, BLOCK_D]

        kv_from = 0
        full_from = 0
        if WINDOW > 0:
            kv_from = (first_visible(position, WINDOW, ALIGNED) // TILE_N) * TILE_N
            full_from = ((first_visible(last_position, WINDOW, ALIGNED) + TILE_N - 1) // TILE_N) * TILE_N
        kv_to = last_position + 1
        full_to = ((position + 1) // TILE_N) * TILE_N

        top = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        diagonal_from = tl.maximum(kv_from, full_to)
        if WINDOW > 0:
            left_to = tl.maximum(kv_from, tl.minimum(full_from, kv_to))
            acc, total, top = _attend(
                acc, total, top, q, k_source, v_source, table, kv_head, kv_from, left_to, positions, last_position,
                score_scale, soft_cap, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, ALIGNED, HAS_SOFT_CAP, BLOCK_D,
                TILE_N, USE_DESCRIPTORS, True, NUM_STAGES, False,
            )  # fmt: skip
            kv_from = left_to
            # left_to is a tile edge unless it is kv_to itself, after which nothing is left.
            diagonal_from = tl.maximum(left_to, full_to)
        acc, total, top = _attend(
            acc, total, top, q, k_source, v_source, table, kv_head, kv_from, full_to, positions, last_position,
            score_scale, soft_cap, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, ALIGNED, HAS_SOFT_CAP, BLOCK_D,
            TILE_N, USE_DESCRIPTORS, False, NUM_STAGES, WARP_SPECIALIZE,
        )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, q, k_source, v_source, table, kv_head, diagonal_from, kv_to, positions, last_position,
            score_scale, soft_cap, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, ALIGNED, HAS_SOFT_CAP, BLOCK_D,
            TILE_N, USE_DESCRIPTORS, True, NUM_STAGES, False,
        )  # fmt: skip

        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head) * 1.4426950408889634
            new_top = tl.maximum(top, sink)
            old = tl.exp2(top - new_top)
            total = total * old + tl.exp2(sink - new_top)
            acc = acc * old[:, None]
        result = acc / tl.maximum(total, 1e-30)[:, None] * v_scale
        out_at = out_ptr + tokens[:, None] * out_stride + head[:, None] * HEAD_DIM + cols[None, :]
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=io_mask)


def _descriptor(cache: torch.Tensor, tile_tokens: int) -> TensorDescriptor:
    num_blocks, num_kv_heads, block_size, head_dim = cache.shape
    rows = num_blocks * num_kv_heads * block_size
    block_shape = [tile_tokens, triton.next_power_of_2(head_dim)]
    return TensorDescriptor(cache, [rows, head_dim], [head_dim, 1], block_shape)


def _has_tensor_copy(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    work: WorkList,
    softmax_scale: float,
    out: torch.Tensor,
    *,
    window: int = 0,
    aligned: bool = False,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    tuning: PrefillTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Write the attention of every tile in `work` to `out` (rows of other tokens stay as they are).

    `work` must have been built with `prefill_tile_tokens(num_heads, num_kv_heads, tuning)`; `window` and `aligned` as
    in `build_decode_list`.

    Raises:
        ValueError: a head dimension, block size or shape that the kernel does not support.
    """
    check_attention_inputs("prefill_attention", q, k_cache, v_cache)
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    tuning = tuning or default_prefill_tuning(head_dim, k_cache.dtype, q.device)
    use_descriptors = (
        tuning.use_descriptors and block_size % tuning.tile_tokens == 0 and _has_tensor_copy(q.device)
        # A descriptor's rows are addressed with 32 bits.
        and k_cache.numel() // head_dim < 2**31
    )  # fmt: skip
    _prefill_kernel[(work.capacity * num_kv_heads,)](
        q,
        _descriptor(k_cache, tuning.tile_tokens) if use_descriptors else k_cache,
        _descriptor(v_cache, tuning.tile_tokens) if use_descriptors else v_cache,
        out,
        work.records,
        work.num_records,
        block_tables,
        q if sinks is None else sinks,
        softmax_scale * k_scale * (1.0 if soft_cap else LOG2_E),
        v_scale,
        soft_cap,
        q.stride(0),
        out.stride(0),
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=window,
        ALIGNED=aligned,
        HAS_SOFT_CAP=soft_cap > 0,
        HAS_SINKS=sinks is not None,
        BLOCK_M=tuning.block_rows,
        BLOCK_D=triton.next_power_of_2(head_dim),
        TILE_N=tuning.tile_tokens,
        USE_DESCRIPTORS=use_descriptors,
        NUM_STAGES=tuning.num_stages,
        WARP_SPECIALIZE=tuning.warp_specialize,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out


def default_prefill_tuning(head_dim: int, cache_dtype: torch.dtype, device: torch.device) -> PrefillTuning:
    """The tile shape measured best on an H200 for this head dimension and cache dtype, or one that fits."""
    if head_dim > WIDE_HEAD_DIM:
        return _wide_tuning(cache_dtype, device)
    if cache_dtype == torch.float32:
        return PrefillTuning(block_rows=64, tile_tokens=32, num_warps=4, num_stages=1, use_descriptors=False)
    if not is_roomy(device):
        # A loop over descriptors holds a tile more than one over pointers.
        small = PrefillTuning(use_descriptors=False)
        return replace(small, tile_tokens=32, num_stages=2) if head_dim > 128 else small
    if head_dim > 128:
        return PrefillTuning(block_rows=128, tile_tokens=64, num_warps=8, num_stages=2)
    return PrefillTuning()


def _wide_tuning(cache_dtype: torch.dtype, device: torch.device) -> PrefillTuning:
    """For heads of 512: what registers and shared memory have room for, as compiled; not measured.

    Sums take half of the registers, and whatever spills is read in every tile. A descriptor's box is no wider than 256.
    """
    if cache_dtype == torch.float32:
        return PrefillTuning(block_rows=16, tile_tokens=16, num_warps=4, num_stages=1, use_descriptors=False)
    if cache_dtype.itemsize == 1 or not is_roomy(device):
        return PrefillTuning(block_rows=32, tile_tokens=16, num_warps=4, num_stages=2, use_descriptors=False)
    if shared_memory(device) < WIDE_TILE_BYTES:
        return PrefillTuning(block_rows=32, tile_tokens=32, num_warps=4, num_stages=2, use_descriptors=False)
    return PrefillTuning(block_rows=64, tile_tokens=32, num_warps=8, num_stages=2, use_descriptors=False)
