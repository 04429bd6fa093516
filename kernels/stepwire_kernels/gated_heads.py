"""Gates of heads: a gated RMSNorm behind the gated delta rule, and gates of attention.

    gated_norm:   out[t, h] = x[t, h] / sqrt(mean(x[t, h]^2) + eps) * weight * silu(z[t, h])
    gate_heads:   x[t, h]   = x[t, h] * sigmoid(g[t, h])
    without_gates: of columns [q_0 | g_0 | q_1 | g_1 | ... | rest] the columns [q_0 | q_1 | ... | rest]

x [num_tokens, heads, dim]; z lies in the projection of a layer, where `DeltaColumns` says. Arithmetic in float32.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; Yang, Kautz and Hatamizadeh, "Gated Delta
Networks", 2024; Qiu et al., "Gated Attention for Large Language Models", 2025.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.delta_runs import DeltaColumns
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream

BLOCK_NUMBERS = 1024


@triton.jit
def _gated_norm_kernel(
    x_ptr,
    mixed_ptr,
    weight_ptr,
    out_ptr,
    num_heads_in_step,
    mixed_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    GATE_AT: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    number = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_DIM)
    weight = tl.load(weight_ptr + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    mask = (number < num_heads_in_step)[:, None] & (dim < DIM)[None, :]
    token, head = (number // NUM_HEADS).to(tl.int64), number % NUM_HEADS
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    at = number.to(tl.int64)[:, None] * DIM + dim[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    column = GATE_AT + head // GROUP * VALUE_STRIDE + head % GROUP * DIM
    gate_at = mixed_ptr + (token * mixed_stride + column)[:, None] + dim[None, :]
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
    out = x * scale[:, None] * weight[None, :] * gate * tl.sigmoid(gate)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def gated_norm(
    x: torch.Tensor,
    mixed: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    columns: DeltaColumns,
    *,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """x [num_tokens, value_heads, value_dim] -> [num_tokens, value_heads * value_dim] in mixed's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    num_tokens, heads, dim = x.shape
    if (heads, dim) != (columns.num_value_heads, columns.value_dim) or weight.shape != (dim,):
        raise ValueError(
            f"gated_norm: {columns.num_value_heads} heads of {columns.value_dim} need as many of x and a weight; got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if not x.is_contiguous() or mixed.stride(1) != 1:
        raise ValueError("gated_norm: x and the projection's columns must be contiguous")
    if out is None:
        out = torch.empty((num_tokens, heads * dim), dtype=mixed.dtype, device=x.device)
    if num_tokens == 0:
        return out
    block_dim = triton.next_power_of_2(dim)
    block = max(1, BLOCK_NUMBERS // block_dim)
    _gated_norm_kernel[(triton.cdiv(num_tokens * heads, block),)](
        x,
        mixed,
        weight,
        out,
        num_tokens * heads,
        mixed.stride(0),
        eps,
        NUM_HEADS=heads,
        GROUP=columns.group_size,
        DIM=dim,
        GATE_AT=columns.gate,
        VALUE_STRIDE=columns.value_stride,
        BLOCK_H=block,
        BLOCK_DIM=block_dim,
        USE_PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out


@triton.jit
def _gate_heads_kernel(
    x_ptr,
    gates_ptr,
    num_cols,
    gate_token_stride,
    gate_head_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < num_cols
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    gate_at = gates_ptr + token * gate_token_stride + col // DIM * gate_head_stride + col % DIM
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    at = x_ptr + token * num_cols + col
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32) * tl.sigmoid(gate)
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=mask)


def gate_heads(x: torch.Tensor, gates: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """x [num_tokens, heads * dim] in place, and returned; gates [num_tokens, heads, dim], of which dim is contiguous.

    Raises:
        ValueError: shapes that do not fit.
    """
    num_tokens, num_cols = x.shape
    if gates.shape[0] != num_tokens or gates.shape[1] * gates.shape[2] != num_cols:
        raise ValueError(f"gate_heads: x {tuple(x.shape)} does not fit gates {tuple(gates.shape)}")
    if not x.is_contiguous() or gates.stride(2) != 1:
        raise ValueError("gate_heads: x and each head's gate must be contiguous")
    if num_tokens:
        block = min(BLOCK_NUMBERS, triton.next_power_of_2(num_cols))
        _gate_heads_kernel[(num_tokens, triton.cdiv(num_cols, block))](
            x,
            gates,
            num_cols,
            gates.stride(0),
            gates.stride(1),
            DIM=gates.shape[2],
            BLOCK=block,
            USE_PDL=pdl,
            num_warps=max(1, block // 256),
            **launch_options(pdl),
        )
    return x


@triton.jit
def _without_gates_kernel(
    columns_ptr,
    out_ptr,
    num_cols,
    columns_stride,
    QUERY_COLS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < num_cols
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    source = tl.where(col < QUERY_COLS, col // DIM * (2 * DIM) + col % DIM, col + QUERY_COLS)
    numbers = tl.load(columns_ptr + token * columns_stride + source, mask=mask, other=0.0)
    tl.store(out_ptr + token * num_cols + col, numbers, mask=mask)


def without_gates(
    columns: torch.Tensor, num_heads: int, head_dim: int, *, out: torch.Tensor | None = None, pdl: bool = False
) -> torch.Tensor:
    """columns [num_tokens, 2 * num_heads * head_dim + rest] -> [num_tokens, num_heads * head_dim + rest].

    Raises:
        ValueError: fewer columns than heads need.
    """
    num_tokens, width = columns.shape
    query_cols = num_heads * head_dim
    if width < 2 * query_cols or columns.stride(1) != 1:
        raise ValueError(f"without_gates: {num_heads} heads of {head_dim} and their gates are not in {width} columns")
    if out is None:
        out = torch.empty((num_tokens, width - query_cols), dtype=columns.dtype, device=columns.device)
    if num_tokens:
        block = min(BLOCK_NUMBERS, triton.next_power_of_2(out.shape[1]))
        _without_gates_kernel[(num_tokens, triton.cdiv(out.shape[1], block))](
            columns,
            out,
            out.shape[1],
            columns.stride(0),
            QUERY_COLS=query_cols,
            DIM=head_dim,
            BLOCK=block,
            USE_PDL=pdl,
            num_warps=max(1, block // 256),
            **launch_options(pdl),
        )
    return out
