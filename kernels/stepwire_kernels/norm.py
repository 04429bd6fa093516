"""Residual add + RMSNorm.

    residual <- residual + x                                   (rounded to the residual's dtype)
    out      <- residual / sqrt(mean(residual^2) + eps) * (weight_offset + weight)

x, residual, out: [num_tokens, hidden]; weight: [hidden]. All arithmetic in float32; the norm reads the *rounded* sum,
as an unfused model would. `weight_offset` is 1 for Gemma, whose checkpoints store the weight minus one.

`add_rms_norm_quantized` rounds out to x's dtype and then to 8 bits with a scale a token (`quantize_input.py`): what a
linear with quantized inputs reads.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.quantize_input import Quantized, quantized_rows, store_quantized


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    static_ptr,
    scales_ptr,
    num_cols,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZES: tl.constexpr,
    IS_STATIC: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_COLS)
    mask = cols < num_cols
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + weight_offset
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    x = tl.load(x_ptr + token * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_at = residual_ptr + token * residual_stride + cols
        total = x + tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / num_cols + eps)
    out = x * scale * weight
    out_at = out_ptr + token * out_stride + cols
    if QUANTIZES:
        out = tl.where(mask, out.to(x_ptr.dtype.element_ty).to(tl.float32), 0.0)
        store_quantized(out, mask, static_ptr, out_at, scales_ptr + token, IS_STATIC)
    else:
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Return the normalised hidden states; `residual` is updated in place (None: plain RMSNorm of x).

    `x` may be `out`. Rows may be strided, columns must be contiguous.

    Raises:
        ValueError: a shape does not match, or a last dimension is not contiguous.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)  # [num_tokens, hidden]
    _launch(x, residual, weight, eps, weight_offset, out, None, None, pdl)
    return out


def add_rms_norm_quantized(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    weight_offset: float = 0.0,
    static_scale: torch.Tensor | None = None,
    pdl: bool = False,
) -> Quantized:
    """`add_rms_norm` in `dtype` (float8_e4m3fn or int8): values [num_tokens, hidden] and scales [num_tokens, 1].

    Raises:
        ValueError: as `add_rms_norm`.
    """
    values, scales = quantized_rows(*x.shape, 1, dtype, x.device)
    _launch(x, residual, weight, eps, weight_offset, values, scales, static_scale, pdl)
    return values, scales


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    pdl: bool,
) -> None:
    num_tokens, hidden = x.shape
    if weight.shape != (hidden,) or (residual is not None and residual.shape != x.shape):
        raise ValueError(
            f"add_rms_norm: x is {tuple(x.shape)}, so weight must be ({hidden},) and residual {tuple(x.shape)}; "
            f"got weight {tuple(weight.shape)}, residual {None if residual is None else tuple(residual.shape)}"
        )
    if x.stride(1) != 1 or out.stride(1) != 1 or (residual is not None and residual.stride(1) != 1):
        raise ValueError("add_rms_norm: the hidden dimension must be contiguous; call .contiguous() first")
    if num_tokens == 0:
        return
    block = triton.next_power_of_2(hidden)
    _add_rms_norm_kernel[(num_tokens,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        x if static_scale is None else static_scale,
        x if scales is None else scales,
        hidden,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        weight_offset,
        HAS_RESIDUAL=residual is not None,
        QUANTIZES=scales is not None,
        IS_STATIC=static_scale is not None,
        BLOCK_COLS=block,
        USE_PDL=pdl,
        num_warps=max(1, min(16, block // 512)),
        **launch_options(pdl),
    )
