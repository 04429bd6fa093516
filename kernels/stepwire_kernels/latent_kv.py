"""Rotary embedding of latent attention's queries, and the write of its one cached vector a token.

For every token t at position p = positions[t], with R = kv_rank and the rotation of `rope_kv.py` (all of the vector
behind R turns):

    query[t, head, R:] <- rotate(query[t, head, R:], p)                                          in place
    cache[slot // block_size, 0, slot % block_size, :] = [cached[t, :R], rotate(cached[t, R:], p)] / scale

query: [num_tokens, heads, R + rope_dim]; cached: [num_tokens, R + rope_dim]; cache: [num_blocks, 1, block_size,
R + rope_dim] in the model's dtype or float8_e4m3fn (saturating); cos, sin: float32 [max_position, rope_dim / 2]. A
negative slot writes nothing. Arithmetic in float32.

Source: DeepSeek-AI, "DeepSeek-V2", 2024.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.rope_kv import FP8_MAX, to_cache, tokens_per_program


@triton.jit
def _latent_kv_kernel(
    query_ptr,
    cached_ptr,
    cache_ptr,
    positions_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    num_tokens,
    query_stride,
    cached_stride,
    inverse_scale,
    NUM_HEADS: tl.constexpr,
    KV_RANK: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IS_FP8: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF_COLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    DIM: tl.constexpr = KV_RANK + ROPE_DIM
    head = tl.program_id(0)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    token_mask = tokens < num_tokens
    half = tl.arange(0, HALF_COLS)
    if INTERLEAVED:
        cols1 = KV_RANK + 2 * half
        cols2 = cols1 + 1
    else:
        cols1 = KV_RANK + half
        cols2 = cols1 + ROPE_DIM // 2
    mask = token_mask[:, None] & (half < ROPE_DIM // 2)[None, :]
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    positions = tl.load(positions_ptr + tokens, mask=token_mask, other=0).to(tl.int64)
    table = positions[:, None] * (ROPE_DIM // 2) + half[None, :]
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0)  # [TOKENS, HALF_COLS]
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0)
    if head < NUM_HEADS:
        at = query_ptr + tokens.to(tl.int64)[:, None] * query_stride + head * DIM
        x1 = tl.load(at + cols1[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(at + cols2[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(at + cols1[None, :], (x1 * cos - x2 * sin).to(query_ptr.dtype.element_ty), mask=mask)
        tl.store(at + cols2[None, :], (x2 * cos + x1 * sin).to(query_ptr.dtype.element_ty), mask=mask)
    else:
        slots = tl.load(slots_ptr + tokens, mask=token_mask, other=-1).to(tl.int64)
        # One head: a slot is a row.
        target = cache_ptr + tl.maximum(slots, 0)[:, None] * DIM
        is_written = (token_mask & (slots >= 0))[:, None]
        source = cached_ptr + tokens.to(tl.int64)[:, None] * cached_stride
        x1 = tl.load(source + cols1[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(source + cols2[None, :], mask=mask, other=0.0).to(tl.float32)
        y1 = to_cache(x1 * cos - x2 * sin, inverse_scale, cache_ptr, IS_FP8, FP8_LIMIT)
        y2 = to_cache(x2 * cos + x1 * sin, inverse_scale, cache_ptr, IS_FP8, FP8_LIMIT)
        tl.store(target + cols1[None, :], y1, mask=mask & is_written)
        tl.store(target + cols2[None, :], y2, mask=mask & is_written)
        cols = tl.arange(0, BLOCK_C)
        c_mask = token_mask[:, None] & (cols < KV_RANK)[None, :]
        c = tl.load(source + cols[None, :], mask=c_mask, other=0.0).to(tl.float32)
        stored = to_cache(c, inverse_scale, cache_ptr, IS_FP8, FP8_LIMIT)
        tl.store(target + cols[None, :], stored, mask=c_mask & is_written)


def rotate_and_write_latent(
    query: torch.Tensor,
    cached: torch.Tensor,
    cache: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    scale: float = 1.0,
    pdl: bool = False,
) -> None:
    """Rotate the queries in place and write the cache. positions and slots: int32 [num_tokens].

    `scale` is the layer's dequantization factor and matters for a float8 cache only.

    Raises:
        ValueError: shapes, types or strides that do not fit together; the message names them.
    """
    num_tokens, num_heads, dim = query.shape
    rope_dim = 2 * cos.shape[1]
    if cached.shape != (num_tokens, dim) or cache.shape[1] != 1 or cache.shape[3] != dim or rope_dim >= dim:
        raise ValueError(
            f"rotate_and_write_latent: query {tuple(query.shape)} needs cached ({num_tokens}, {dim}), a cache of one "
            f"head of {dim} and a rotation of fewer, got {tuple(cached.shape)}, {tuple(cache.shape)} and {rope_dim}"
        )
    if query.stride()[1:] != (dim, 1) or cached.stride(1) != 1 or not cache.is_contiguous() or cos.stride(1) != 1:
        raise ValueError(
            "rotate_and_write_latent: query's heads, cached's columns, the cache and cos must be contiguous"
        )
    if num_tokens == 0:
        return
    tokens = tokens_per_program(num_tokens)
    _latent_kv_kernel[(num_heads + 1, triton.cdiv(num_tokens, tokens))](
        query,
        cached,
        cache,
        positions,
        slots,
        cos,
        sin,
        num_tokens,
        query.stride(0),
        cached.stride(0),
        1.0 / scale,
        NUM_HEADS=num_heads,
        KV_RANK=dim - rope_dim,
        ROPE_DIM=rope_dim,
        INTERLEAVED=interleaved,
        IS_FP8=cache.dtype == torch.float8_e4m3fn,
        FP8_LIMIT=FP8_MAX,
        TOKENS=tokens,
        HALF_COLS=triton.next_power_of_2(rope_dim // 2),
        BLOCK_C=triton.next_power_of_2(dim - rope_dim),
        USE_PDL=pdl,
        num_warps=1 if tokens == 1 else 4,
        **launch_options(pdl),
    )
