"""Linear layers of 8-bit inputs and weights (W8A8, float8_e4m3fn or int8): y = x @ W^T + bias.

    y[t, n] = sum_k x[t, k] * x_scales[t, k / group] * w[n, k] * w_scales[n / block_n, k / group] + bias[n]

x: [num_tokens, K]; w: [N, K]; both 8-bit. Either one scale a token and one an output (group = K), applied to the whole
sum, or scales for every `group` inputs (a multiple of 16 that is a power of two), applied to the sums of each. Sums are
float32 (int32 within a step for int8). The matrix units round sums of float8 products to some 14 bits: products leave
them every step, and few tokens with group scales, for which memory is the limit, are multiplied as float16, which holds
every float8 exactly.

Decoding reads every weight once: the weight is the tall operand, K is split over programs where N does not fill the
device, and the last program of a tile adds the parts in order. Any device and any scales; which kernel multiplies
where there are others: `scaled_choice.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.split_k import LinearWorkspace, add_up_parts

# Up to here the matrix units have time for float16.
MAX_WIDENED_TOKENS = 64


@dataclass(frozen=True)
class ScaledTuning:
    """Launch shape. `split_k` 0: enough parts to fill the device."""

    block_n: int = 64
    block_k: int = 256
    split_k: int = 0
    num_warps: int = 4
    num_stages: int = 4


@triton.jit
def _scaled_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    w_scales_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_tokens,
    N,
    K,
    x_stride,
    x_scales_stride,
    weight_stride,
    w_scales_stride,
    out_stride,
    IS_INT: tl.constexpr,
    GROUPED: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    column = tl.program_id(0)
    split = tl.program_id(1)
    rows = column * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    token_mask = tokens < num_tokens
    lanes = tl.arange(0, BLOCK_K)
    steps_each = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    first = split * steps_each * BLOCK_K
    last = tl.minimum(first + steps_each * BLOCK_K, K)
    weight_rows = weight_ptr + rows.to(tl.int64)[:, None] * weight_stride
    x_rows = x_ptr + tokens.to(tl.int64)[None, :] * x_stride
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=NUM_STAGES):
        k = start + lanes
        k_mask = k < K
        w = tl.load(
            weight_rows + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0, eviction_policy="evict_first"
        )  # [BLOCK_N, BLOCK_K]
        x = tl.load(x_rows + k[:, None], mask=k_mask[:, None] & token_mask[None, :], other=0.0)  # [BLOCK_K, BLOCK_M]
        if IS_INT:
            product = tl.dot(w, x, out_dtype=tl.int32).to(tl.float32)
        elif WIDEN:
            product = tl.dot(w.to(tl.float16), x.to(tl.float16))
        else:
            product = tl.dot(w, x)
        if GROUPED:
            group = start // GROUP
            w_scale = tl.load(
                w_scales_ptr + (rows // SCALE_ROWS) * w_scales_stride + group, mask=row_mask, other=0.0
            )  # [BLOCK_N]
            x_scale = tl.load(x_scales_ptr + tokens * x_scales_stride + group, mask=token_mask, other=0.0)
            product = product * w_scale[:, None] * x_scale[None, :]
        acc += product
    place = tl.program_id(2) * tl.num_programs(0) + column
    acc, finishes = add_up_parts(acc, partial_ptr, counters_ptr, place, split, SPLIT_K)
    if finishes:
        if not GROUPED:
            w_scale = tl.load(w_scales_ptr + (rows // SCALE_ROWS) * w_scales_stride, mask=row_mask, other=0.0)
            x_scale = tl.load(x_scales_ptr + tokens * x_scales_stride, mask=token_mask, other=0.0)
            acc = acc * w_scale[:, None] * x_scale[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        out_at = out_ptr + tokens.to(tl.int64)[None, :] * out_stride + rows[:, None]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


def _default_tuning(num_tokens: int) -> ScaledTuning:
    if num_tokens <= 16:
        return ScaledTuning()
    if num_tokens <= 64:
        return ScaledTuning(block_n=64, block_k=128, num_stages=4)
    return ScaledTuning(block_n=128, block_k=128, num_warps=8, num_stages=3)


def scaled_linear(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    out_dtype: torch.dtype,
    *,
    scale_rows: int = 1,
    group_size: int | None = None,
    tuning: ScaledTuning | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """[num_tokens, N] in `out_dtype`.

    Args:
        x_scales: float32 [num_tokens, groups]; w_scales: float32 [ceil(N / scale_rows), groups].
        group_size: inputs that share a scale; None: all of them.

    Raises:
        ValueError: shapes, types or strides that do not fit together.
    """
    num_tokens, k = x.shape
    n = weight.shape[0]
    groups = 1 if group_size is None else triton.cdiv(k, group_size)
    if weight.shape[1] != k or x.dtype != weight.dtype or x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(
            f"scaled_linear: takes x [num_tokens, K] and weight [N, K] of one 8-bit type with contiguous rows, got "
            f"{tuple(x.shape)} {x.dtype} and {tuple(weight.shape)} {weight.dtype}"
        )
    if x_scales.shape != (num_tokens, groups) or w_scales.shape != (triton.cdiv(n, scale_rows), groups):
        raise ValueError(
            f"scaled_linear: {groups} groups and a scale for {scale_rows} rows need scales of shape "
            f"{(num_tokens, groups)} and {(triton.cdiv(n, scale_rows), groups)}, got {tuple(x_scales.shape)} and "
            f"{tuple(w_scales.shape)}"
        )
    if group_size is not None and (group_size < 16 or group_size & (group_size - 1)):
        raise ValueError(f"scaled_linear: group_size {group_size} is not a power of two of at least 16")
    if out is None:
        out = torch.empty((num_tokens, n), dtype=out_dtype, device=x.device)  # [num_tokens, N]
    if num_tokens == 0:
        return out
    tuning = tuning or _default_tuning(num_tokens)
    block_k = tuning.block_k if group_size is None else min(tuning.block_k, group_size)
    block_m = min(128, max(16, triton.next_power_of_2(num_tokens)))
    columns, token_blocks = triton.cdiv(n, tuning.block_n), triton.cdiv(num_tokens, block_m)
    places = columns * token_blocks
    fitting = workspace.partial.numel() // (places * tuning.block_n * block_m)
    wanted = tuning.split_k or min(16, max(1, 528 // places))
    splits = max(1, min(wanted, triton.cdiv(k, block_k), fitting if places <= workspace.counters.numel() else 1))
    _scaled_kernel[(columns, splits, token_blocks)](
        x,
        x_scales,
        weight,
        w_scales,
        w_scales if bias is None else bias,
        out,
        workspace.partial,
        workspace.counters,
        num_tokens,
        n,
        k,
        x.stride(0),
        x_scales.stride(0),
        weight.stride(0),
        w_scales.stride(0),
        out.stride(0),
        IS_INT=x.dtype == torch.int8,
        GROUPED=group_size is not None,
        GROUP=group_size or 1,
        SCALE_ROWS=scale_rows,
        WIDEN=group_size is not None and num_tokens <= MAX_WIDENED_TOKENS,
        HAS_BIAS=bias is not None,
        SPLIT_K=splits,
        BLOCK_M=block_m,
        BLOCK_N=tuning.block_n,
        BLOCK_K=block_k,
        NUM_STAGES=tuning.num_stages,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out
