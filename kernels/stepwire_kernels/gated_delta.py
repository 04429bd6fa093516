"""The gated delta rule: of every value head a matrix S [key_dim, value_dim] a row, that each token reads and changes.

    S <- alpha S;   d = beta (v - S^T k);   S <- S + k d^T;   o = S^T q / sqrt(key_dim)

with q and k of length 1, beta = sigmoid(b), alpha = exp(-exp(log_rate) * softplus(a + bias)). One launch takes the
runs of one token, a program for each part of a head's values; longer runs go through `gated_delta_chunks.py`.

qkv [num_tokens, channels]: queries and keys of all key heads, values of all value heads, side by side; pairs
[num_tokens, 2 * value_heads]: b and a, where `DeltaColumns` says; matrices float32 [num_rows, value_heads, key_dim,
value_dim]. A run whose row has no tokens before it begins with zeros, whatever its matrices hold. Padding tokens get
zeros and change nothing. All arithmetic in float32.

Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.delta_runs import DeltaColumns, DeltaRuns, load_unit, log_decay_of, unsupported_heads
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.gated_delta_chunks import delta_chunks

BLOCK_VALUES = 32


@triton.jit
def _delta_token_kernel(
    qkv_ptr,
    pairs_ptr,
    log_rate_ptr,
    bias_ptr,
    matrices_ptr,
    out_ptr,
    query_starts_ptr,
    kv_lens_ptr,
    run_rows_ptr,
    qkv_stride,
    pairs_stride,
    query_scale,
    NUM_KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DECAY_AT: tl.constexpr,
    STRENGTH_STRIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    run = tl.program_id(0)
    head = tl.program_id(1)
    values = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    keys = tl.arange(0, KEY_DIM)
    group = head // GROUP
    log_rate = tl.load(log_rate_ptr + head)
    bias = tl.load(bias_ptr + head)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    token = tl.load(query_starts_ptr + run).to(tl.int64)
    length = tl.load(query_starts_ptr + run + 1) - token
    kv_len = tl.load(kv_lens_ptr + run)
    if length == 1:
        out_at = out_ptr + (token * (NUM_KEY_HEADS * GROUP) + head) * VALUE_DIM + values
        if kv_len == 0:
            tl.store(out_at, tl.zeros([BLOCK_V], dtype=tl.float32).to(out_ptr.dtype.element_ty))
        else:
            row = qkv_ptr + token * qkv_stride
            # As tiles of one row, so that they become units as those of many tokens do.
            one = tl.zeros([1], dtype=tl.int32) == 0
            places = (group * KEY_DIM + keys)[None, :]
            q = tl.sum(load_unit(row + places, one, KEY_DIM), axis=0) * query_scale
            k = tl.sum(load_unit(row + NUM_KEY_HEADS * KEY_DIM + places, one, KEY_DIM), axis=0)
            v = tl.load(row + 2 * NUM_KEY_HEADS * KEY_DIM + head * VALUE_DIM + values).to(tl.float32)
            pair = pairs_ptr + token * pairs_stride + group * STRENGTH_STRIDE + head % GROUP
            beta = tl.sigmoid(tl.load(pair).to(tl.float32))
            alpha = tl.exp(log_decay_of(tl.load(pair + DECAY_AT).to(tl.float32) + bias, log_rate))
            number = tl.load(run_rows_ptr + run).to(tl.int64) * (NUM_KEY_HEADS * GROUP) + head
            matrix_at = matrices_ptr + number * (KEY_DIM * VALUE_DIM) + keys[:, None] * VALUE_DIM + values[None, :]
            matrix = tl.load(matrix_at, mask=(keys[:, None] >= 0) & (kv_len > 1), other=0.0) * alpha
            change = beta * (v - tl.sum(matrix * k[:, None], axis=0))
            matrix += k[:, None] * change[None, :]
            tl.store(matrix_at, matrix)
            tl.store(out_at, tl.sum(matrix * q[:, None], axis=0).to(out_ptr.dtype.element_ty))


def gated_delta(
    qkv: torch.Tensor,
    pairs: torch.Tensor,
    log_rate: torch.Tensor,
    bias: torch.Tensor,
    matrices: torch.Tensor,
    columns: DeltaColumns,
    runs: DeltaRuns,
    *,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Return [num_tokens, value_heads, value_dim] in qkv's dtype; `matrices` are updated in place.

    log_rate, bias: float32 [value_heads].

    Raises:
        ValueError: shapes that do not fit, or heads of sizes that the kernels do not take.
    """
    heads, sizes = columns.num_value_heads, (columns.key_dim, columns.value_dim)
    reason = unsupported_heads(*sizes)
    if reason is not None:
        raise ValueError(f"gated_delta: {reason}")
    if qkv.shape[1] != columns.num_channels or pairs.shape[1] != 2 * heads or matrices.shape[1:] != (heads, *sizes):
        raise ValueError(
            f"gated_delta: {heads} heads of {sizes} need qkv [tokens, {columns.num_channels}], pairs [tokens, "
            f"{2 * heads}] and matrices [rows, {heads}, {sizes[0]}, {sizes[1]}]; got {tuple(qkv.shape)}, "
            f"{tuple(pairs.shape)} and {tuple(matrices.shape)}"
        )
    if qkv.stride(1) != 1 or pairs.stride(1) != 1 or not matrices.is_contiguous() or matrices.dtype != torch.float32:
        raise ValueError("gated_delta: columns must be contiguous, and matrices float32 and contiguous")
    num_tokens = qkv.shape[0]
    if out is None:
        size = (num_tokens, heads, columns.value_dim)
        out = torch.empty(size, dtype=qkv.dtype, device=qkv.device)  # [num_tokens, value_heads, value_dim]
    if num_tokens == 0:
        return out
    if runs.has_longer:
        delta_chunks(qkv, pairs, log_rate, bias, matrices, columns, runs, out, pdl=pdl)
    if runs.has_single:
        block = min(BLOCK_VALUES, columns.value_dim)
        _delta_token_kernel[(runs.num_runs, heads, columns.value_dim // block)](
            qkv,
            pairs,
            log_rate,
            bias,
            matrices,
            out,
            runs.query_starts,
            runs.kv_lens,
            runs.run_rows,
            qkv.stride(0),
            pairs.stride(0),
            columns.key_dim**-0.5,
            NUM_KEY_HEADS=columns.num_key_heads,
            GROUP=columns.group_size,
            KEY_DIM=columns.key_dim,
            VALUE_DIM=columns.value_dim,
            DECAY_AT=columns.decay,
            STRENGTH_STRIDE=columns.strength_stride,
            BLOCK_V=block,
            USE_PDL=pdl,
            num_warps=4,
            **launch_options(pdl),
        )
    return out
