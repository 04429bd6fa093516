"""8-bit inputs for a linear: values and scales of every token, or of every 128 inputs of a token.

    scale  = max(absmax / limit, 1e-12)             limit: 448 (float8_e4m3fn), 127.5 (int8)
    values = cast(clamp(x / scale))                 int8: rounded to nearest even, clamped to -128 .. 127

x: [num_tokens, K] in 16 or 32 bits; values: [num_tokens, K]; scales: float32 [num_tokens, ceil(K / group_size)]. With a
static scale only the cast is done. Definition: compressed-tensors' dynamic activation quantization.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream

Quantized = tuple[torch.Tensor, torch.Tensor]
"""Values and scales."""
FLOAT8_LIMIT = 448.0
INT8_LIMIT = 127.5
MIN_SCALE = 1e-12
# 1.5 * 2^23: adding it to a small float32 leaves no bits behind the point, rounded to nearest even.
ROUNDING = 12582912.0


# For kernels, which read no other globals.
_FLOAT8_LIMIT = tl.constexpr(FLOAT8_LIMIT)
_INT8_LIMIT = tl.constexpr(INT8_LIMIT)
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_ROUNDING = tl.constexpr(ROUNDING)


@triton.jit
def float8_scale(top):
    """The scale of float8 values whose largest magnitude is `top`."""
    return tl.maximum(top / _FLOAT8_LIMIT, _MIN_SCALE)


@triton.jit
def as_float8(scaled, dtype):
    """Values divided by their scale, as float8."""
    return tl.minimum(tl.maximum(scaled, -_FLOAT8_LIMIT), _FLOAT8_LIMIT).to(dtype)


@triton.jit
def store_quantized(x, mask, static_ptr, values_at, scale_at, IS_STATIC: tl.constexpr):
    """float32 values that share a scale, zero where they are masked; `static_ptr`: at the scale, if it is given."""
    IS_INT: tl.constexpr = values_at.dtype.element_ty == tl.int8
    if IS_STATIC:
        scale = tl.load(static_ptr)
    else:
        top = tl.max(tl.abs(x), axis=0)
        scale = tl.maximum(top / _INT8_LIMIT, _MIN_SCALE) if IS_INT else float8_scale(top)
    tl.store(scale_at, scale)
    scaled = x / scale
    if IS_INT:
        whole = (tl.minimum(tl.maximum(scaled, -200.0), 200.0) + _ROUNDING) - _ROUNDING
        values = tl.minimum(tl.maximum(whole, -128.0), 127.0).to(tl.int8)
    else:
        values = as_float8(scaled, values_at.dtype.element_ty)
    tl.store(values_at, values, mask=mask)


@triton.jit
def _quantize_kernel(
    x_ptr,
    static_ptr,
    values_ptr,
    scales_ptr,
    num_cols,
    x_stride,
    values_stride,
    scales_stride,
    IS_STATIC: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * GROUP
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    cols = start + tl.arange(0, BLOCK)
    mask = cols < tl.minimum(num_cols, start + GROUP)
    x = tl.load(x_ptr + token * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    store_quantized(
        x,
        mask,
        static_ptr,
        values_ptr + token * values_stride + cols,
        scales_ptr + token * scales_stride + tl.program_id(1),
        IS_STATIC,
    )


def quantized_rows(num_tokens: int, num_cols: int, groups: int, dtype: torch.dtype, device: torch.device) -> Quantized:
    """Memory for values and scales."""
    values = torch.empty((num_tokens, num_cols), dtype=dtype, device=device)  # [num_tokens, K]
    return values, torch.empty((num_tokens, groups), dtype=torch.float32, device=device)  # [num_tokens, groups]


def quantize_input(
    x: torch.Tensor,
    dtype: torch.dtype,
    *,
    group_size: int | None = None,
    static_scale: torch.Tensor | None = None,
    pdl: bool = False,
) -> Quantized:
    """(values [num_tokens, K] in `dtype`, scales float32 [num_tokens, groups]); `group_size` None: a scale a token.

    Raises:
        ValueError: columns of x are not contiguous, or `dtype` is neither float8_e4m3fn nor int8.
    """
    num_tokens, num_cols = x.shape
    if x.stride(1) != 1 or dtype not in (torch.float8_e4m3fn, torch.int8):
        raise ValueError(f"quantize_input: takes x with contiguous columns and float8_e4m3fn or int8, got {dtype}")
    group = group_size or num_cols
    groups = triton.cdiv(num_cols, group)
    values, scales = quantized_rows(num_tokens, num_cols, groups, dtype, x.device)
    if num_tokens == 0:
        return values, scales
    block = triton.next_power_of_2(group)
    _quantize_kernel[(num_tokens, groups)](
        x,
        scales if static_scale is None else static_scale,
        values,
        scales,
        num_cols,
        x.stride(0),
        values.stride(0),
        scales.stride(0),
        IS_STATIC=static_scale is not None,
        GROUP=group,
        BLOCK=block,
        USE_PDL=pdl,
        num_warps=16 if block >= 8192 else 8 if block >= 4096 else 4 if block >= 512 else 1,
        **launch_options(pdl),
    )
    return values, scales
