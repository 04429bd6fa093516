"""(Per-head q/k RMSNorm) + rotary embedding + write of K and V into the paged cache, one kernel.

For every token t at position p = positions[t], with q, k, v read from the packed projection
qkv[t] = [q heads | k heads | v heads], each head of D values:

    q, k   <- rms_norm(q), rms_norm(k)                                   (only with norm weights)
    v      <- rms_norm(v) without a weight                               (only if values are normed)
    q, k   <- [x1 * cos[p] - x2 * sin[p], x2 * cos[p] + x1 * sin[p], rest]
    k_cache[slot // block_size, head, slot % block_size, :] = k / k_scale     with slot = slots[t]
    v_cache[...]                                            = v / v_scale

(x1, x2) are the two halves of the first `rotary_dim` values ("neox"), or their even and odd members (interleaved);
values from `rotary_dim` on pass through. cos, sin: float32 [max_position, rotary_dim / 2]; caches:
[num_blocks, num_kv_heads, block_size, D] in the model's dtype or float8_e4m3fn (saturating). A negative slot writes
nothing. A projection without v heads has its k heads for them, before norm and rotation; of one of queries alone
nothing is written. Arithmetic in float32.

Source: Su et al., "RoFormer", 2021.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream

FP8_MAX = 448.0  # the largest finite float8_e4m3fn


@triton.jit
def to_cache(value, inverse_scale, cache_ptr, IS_FP8: tl.constexpr, FP8_LIMIT: tl.constexpr):
    """float32 values in the cache's type."""
    if IS_FP8:
        value = tl.minimum(tl.maximum(value * inverse_scale, -FP8_LIMIT), FP8_LIMIT)
    return value.to(cache_ptr.dtype.element_ty)


@triton.jit
def _rope_kv_kernel(
    qkv_ptr,
    q_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    positions_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    num_tokens,
    qkv_stride,
    q_out_stride,
    eps,
    norm_offset,
    inverse_k_scale,
    inverse_v_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NORMS_VALUES: tl.constexpr,
    KEYS_ARE_VALUES: tl.constexpr,
    IS_FP8: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF_COLS: tl.constexpr,
    REST_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    head = tl.program_id(0)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    token_mask = tokens < num_tokens
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    source = qkv_ptr + tokens.to(tl.int64)[:, None] * qkv_stride + head * HEAD_DIM  # [TOKENS, 1]
    slots = tl.load(slots_ptr + tokens, mask=token_mask, other=-1).to(tl.int64)
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    kv_head = tl.where(is_value, head - NUM_HEADS - NUM_KV_HEADS, head - NUM_HEADS)
    safe_slots = tl.maximum(slots, 0)
    cache_row = ((safe_slots // BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + safe_slots % BLOCK_SIZE
    cache_offset = cache_row[:, None] * HEAD_DIM  # [TOKENS, 1]
    write_mask = (token_mask & (slots >= 0))[:, None]

    if is_value:
        cols = tl.arange(0, BLOCK_D)[None, :]
        if KEYS_ARE_VALUES:
            source -= NUM_KV_HEADS * HEAD_DIM
        v = tl.load(source + cols, mask=token_mask[:, None] & (cols < HEAD_DIM), other=0.0).to(tl.float32)
        if NORMS_VALUES:
            v = v * tl.rsqrt(tl.sum(v * v, axis=1) / HEAD_DIM + eps)[:, None]
        stored = to_cache(v, inverse_v_scale, v_cache_ptr, IS_FP8, FP8_LIMIT)
        tl.store(v_cache_ptr + cache_offset + cols, stored, mask=write_mask & (cols < HEAD_DIM))
    else:
        half = tl.arange(0, HALF_COLS)
        half_mask = half < ROTARY_DIM // 2
        if INTERLEAVED:
            cols1 = 2 * half
            cols2 = 2 * half + 1
        else:
            cols1 = half
            cols2 = half + ROTARY_DIM // 2
        tile_mask = token_mask[:, None] & half_mask[None, :]
        x1 = tl.load(source + cols1[None, :], mask=tile_mask, other=0.0).to(tl.float32)  # [TOKENS, HALF_COLS]
        x2 = tl.load(source + cols2[None, :], mask=tile_mask, other=0.0).to(tl.float32)
        rest_cols = ROTARY_DIM + tl.arange(0, REST_COLS)
        rest_mask = token_mask[:, None] & (rest_cols < HEAD_DIM)[None, :]
        if HEAD_DIM > ROTARY_DIM:
            rest = tl.load(source + rest_cols[None, :], mask=rest_mask, other=0.0).to(tl.float32)
        if HAS_NORM:
            norm_ptr = q_norm_ptr if is_query else k_norm_ptr
            square_sum = tl.sum(x1 * x1 + x2 * x2, axis=1)
            if HEAD_DIM > ROTARY_DIM:
                square_sum += tl.sum(rest * rest, axis=1)
            scale = tl.rsqrt(square_sum / HEAD_DIM + eps)[:, None]
            w1 = tl.load(norm_ptr + cols1, mask=half_mask, other=0.0).to(tl.float32) + norm_offset
            w2 = tl.load(norm_ptr + cols2, mask=half_mask, other=0.0).to(tl.float32) + norm_offset
            x1 = x1 * scale * w1[None, :]
            x2 = x2 * scale * w2[None, :]
            if HEAD_DIM > ROTARY_DIM:
                w_rest = tl.load(norm_ptr + rest_cols, mask=rest_cols < HEAD_DIM, other=0.0).to(tl.float32)
                rest = rest * scale * (w_rest + norm_offset)[None, :]
        positions = tl.load(positions_ptr + tokens, mask=token_mask, other=0).to(tl.int64)
        table = positions[:, None] * (ROTARY_DIM // 2) + half[None, :]
        cos = tl.load(cos_ptr + table, mask=tile_mask, other=0.0)
        sin = tl.load(sin_ptr + table, mask=tile_mask, other=0.0)
        y1 = x1 * cos - x2 * sin
        y2 = x2 * cos + x1 * sin
        if is_query:
            target = q_out_ptr + tokens.to(tl.int64)[:, None] * q_out_stride + head * HEAD_DIM
            tl.store(target + cols1[None, :], y1.to(q_out_ptr.dtype.element_ty), mask=tile_mask)
            tl.store(target + cols2[None, :], y2.to(q_out_ptr.dtype.element_ty), mask=tile_mask)
            if HEAD_DIM > ROTARY_DIM:
                tl.store(target + rest_cols[None, :], rest.to(q_out_ptr.dtype.element_ty), mask=rest_mask)
        else:
            cache_at = k_cache_ptr + cache_offset
            k1 = to_cache(y1, inverse_k_scale, k_cache_ptr, IS_FP8, FP8_LIMIT)
            k2 = to_cache(y2, inverse_k_scale, k_cache_ptr, IS_FP8, FP8_LIMIT)
            tl.store(cache_at + cols1[None, :], k1, mask=tile_mask & write_mask)
            tl.store(cache_at + cols2[None, :], k2, mask=tile_mask & write_mask)
            if HEAD_DIM > ROTARY_DIM:
                k_rest = to_cache(rest, inverse_k_scale, k_cache_ptr, IS_FP8, FP8_LIMIT)
                tl.store(cache_at + rest_cols[None, :], k_rest, mask=rest_mask & write_mask)


def tokens_per_program(num_tokens: int) -> int:
    """Tokens whose head one program moves."""
    # Few tokens: one each, for parallelism. Many: enough of them that a program moves some kilobytes.
    if num_tokens <= 64:
        return 1
    return 4 if num_tokens <= 1024 else 16


def check_rotation_inputs(
    name: str,
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    kv_parts: int = 2,
) -> None:
    """Raise ValueError for a projection, caches and tables that do not fit together. kv_parts: keys and values."""
    width = qkv.shape[1]
    _, num_kv_heads, _, head_dim = k_cache.shape
    needed = (num_heads + kv_parts * num_kv_heads) * head_dim
    if width != needed or v_cache.shape != k_cache.shape:
        raise ValueError(
            f"{name}: qkv has {width} columns, but {num_heads} query heads and a cache of shape "
            f"{tuple(k_cache.shape)} / {tuple(v_cache.shape)} need {needed}"
        )
    if (
        2 * cos.shape[1] > head_dim
        or sin.shape != cos.shape
        or cos.dtype != torch.float32
        or sin.dtype != torch.float32
    ):
        raise ValueError(
            f"{name}: cos and sin must be float32 [max_position, rotary_dim / 2], rotary_dim <= {head_dim}; "
            f"got {tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype}"
        )


def rope_and_write_kv(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    norms_values: bool = False,
    keys_are_values: bool = False,
    only_queries: bool = False,
    q_out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Write K and V into the cache and return the rotated queries, [num_tokens, num_heads, D].

    Without `q_out` the queries are rotated in place and the result is a view of `qkv`. `k_scale` and `v_scale` are the
    layer's dequantization factors and matter for a float8 cache only. positions and slots: int32 [num_tokens].
    `keys_are_values`: qkv has no v heads. `only_queries`: nor k heads, and the caches are not touched.

    Raises:
        ValueError: shapes or dtypes that do not fit together; the message names them.
    """
    num_tokens = qkv.shape[0]
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    rotary_dim = 2 * cos.shape[1]
    kv_parts = 0 if only_queries else 1 if keys_are_values else 2
    check_rotation_inputs("rope_and_write_kv", qkv, k_cache, v_cache, cos, sin, num_heads, kv_parts)
    if not only_queries and (q_norm is None) != (k_norm is None):
        raise ValueError("rope_and_write_kv: give both q_norm and k_norm, or neither")
    if qkv.stride(1) != 1 or not (k_cache.is_contiguous() and v_cache.is_contiguous() and cos.is_contiguous()):
        raise ValueError("rope_and_write_kv: qkv's columns, the caches and the cos/sin tables must be contiguous")
    if q_out is None:
        q_out = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))  # [num_tokens, num_heads, D]
    if num_tokens == 0:
        return q_out
    tokens = tokens_per_program(num_tokens)
    is_fp8 = k_cache.dtype == torch.float8_e4m3fn
    num_moved = num_heads if only_queries else num_heads + 2 * num_kv_heads
    _rope_kv_kernel[(num_moved, triton.cdiv(num_tokens, tokens))](
        qkv,
        q_out,
        k_cache,
        v_cache,
        positions,
        slots,
        cos,
        sin,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        num_tokens,
        qkv.stride(0),
        q_out.stride(0),
        norm_eps,
        norm_offset,
        1.0 / k_scale,
        1.0 / v_scale,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        BLOCK_SIZE=block_size,
        INTERLEAVED=interleaved,
        HAS_NORM=q_norm is not None,
        NORMS_VALUES=norms_values,
        KEYS_ARE_VALUES=keys_are_values,
        IS_FP8=is_fp8,
        FP8_LIMIT=FP8_MAX,
        TOKENS=tokens,
        HALF_COLS=triton.next_power_of_2(rotary_dim // 2),
        REST_COLS=triton.next_power_of_2(max(1, head_dim - rotary_dim)),
        BLOCK_D=triton.next_power_of_2(head_dim),
        USE_PDL=pdl,
        num_warps=1 if tokens == 1 else 4,
        **launch_options(pdl),
    )
    return q_out
