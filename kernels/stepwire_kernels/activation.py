"""Gated activations over a packed gate-up projection.

    out[t, i] = act(packed[t, i]) * packed[t, I + i]

packed: [num_tokens, 2 * I] (gate first, then up); out: [num_tokens, I]; act is SiLU, GELU (erf) or GELU (tanh).
Arithmetic in float32. GPT-OSS clamps both: gate to at most 7, up to -7 .. 7, and

    out[t, i] = gate * sigmoid(1.702 * gate) * (up + 1)                                              ("swiglu_oai")

`gated_activation_quantized` rounds out to packed's dtype and then to 8 bits with a scale a token (`quantize_input.py`).

Source: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016;
GPT-OSS model card, 2025.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.quantize_input import Quantized, quantized_rows, store_quantized

Activation = Literal["silu", "gelu", "gelu_tanh", "swiglu_oai"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "swiglu_oai")


def num_outputs_of(name: str, weight: torch.Tensor, activation: Activation | None) -> int:
    """Outputs of a product with this weight [N, K]: half of N with an activation. Raises `ValueError`."""
    if activation is None:
        return weight.shape[0]
    if activation not in ACTIVATIONS or weight.shape[0] % 2:
        raise ValueError(
            f"{name}: a gate needs gate's rows and as many of up, and one of {', '.join(ACTIVATIONS)}; got "
            f"{weight.shape[0]} rows and {activation!r}"
        )
    return weight.shape[0] // 2


@triton.jit
def activate(gate, up, KIND: tl.constexpr):
    """act(gate) * up of float32 tensors."""
    if KIND == "silu":
        return gate * tl.sigmoid(gate) * up
    elif KIND == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2u), which saturates without overflow.
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2.0 * inner) * up
    else:
        clamped = tl.where(gate > 7.0, 7.0, gate)
        return clamped * tl.sigmoid(1.702 * clamped) * (tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0)


@triton.jit
def _gated(row_ptr, cols, mask, num_cols, KIND: tl.constexpr):
    """Columns of a row of act(gate) * up, float32."""
    gate = tl.load(row_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(row_ptr + cols + num_cols, mask=mask, other=0.0).to(tl.float32)
    return activate(gate, up, KIND)


@triton.jit
def _gated_activation_kernel(
    packed_ptr,
    out_ptr,
    num_cols,
    packed_stride,
    out_stride,
    KIND: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = cols < num_cols
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    out = _gated(packed_ptr + token * packed_stride, cols, mask, num_cols, KIND)
    tl.store(out_ptr + token * out_stride + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_quantized_kernel(
    packed_ptr,
    values_ptr,
    static_ptr,
    scales_ptr,
    num_cols,
    packed_stride,
    KIND: tl.constexpr,
    IS_STATIC: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A program a token: its scale needs all columns."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_COLS)
    mask = cols < num_cols
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    out = _gated(packed_ptr + token * packed_stride, cols, mask, num_cols, KIND)
    out = out.to(packed_ptr.dtype.element_ty).to(tl.float32)
    values_at = values_ptr + token * num_cols + cols
    store_quantized(out, mask, static_ptr, values_at, scales_ptr + token, IS_STATIC)


def gated_activation(
    packed: torch.Tensor,
    kind: Activation,
    *,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Return act(gate) * up, [num_tokens, I].

    Raises:
        ValueError: an odd number of columns, an unknown activation, or a last dimension that is not contiguous.
    """
    num_tokens, num_cols = _sizes(packed, kind)
    if out is None:
        out = torch.empty((num_tokens, num_cols), dtype=packed.dtype, device=packed.device)  # [num_tokens, I]
    if num_tokens == 0:
        return out
    block = min(1024, triton.next_power_of_2(num_cols))
    _gated_activation_kernel[(triton.cdiv(num_cols, block), num_tokens)](
        packed,
        out,
        num_cols,
        packed.stride(0),
        out.stride(0),
        KIND=kind,
        BLOCK_COLS=block,
        USE_PDL=pdl,
        num_warps=max(1, min(4, block // 256)),
        **launch_options(pdl),
    )
    return out


def gated_activation_quantized(
    packed: torch.Tensor,
    kind: Activation,
    dtype: torch.dtype,
    *,
    static_scale: torch.Tensor | None = None,
    pdl: bool = False,
) -> Quantized:
    """`gated_activation` in `dtype` (float8_e4m3fn or int8): values [num_tokens, I] and scales [num_tokens, 1].

    Raises:
        ValueError: as `gated_activation`.
    """
    num_tokens, num_cols = _sizes(packed, kind)
    values, scales = quantized_rows(num_tokens, num_cols, 1, dtype, packed.device)
    if num_tokens == 0:
        return values, scales
    block = triton.next_power_of_2(num_cols)
    _gated_quantized_kernel[(num_tokens,)](
        packed,
        values,
        packed if static_scale is None else static_scale,
        scales,
        num_cols,
        packed.stride(0),
        KIND=kind,
        IS_STATIC=static_scale is not None,
        BLOCK_COLS=block,
        USE_PDL=pdl,
        num_warps=max(1, min(16, block // 512)),
        **launch_options(pdl),
    )
    return values, scales


def _sizes(packed: torch.Tensor, kind: str) -> tuple[int, int]:
    num_tokens, width = packed.shape
    if kind not in ACTIVATIONS:
        raise ValueError(f"gated_activation: unknown activation {kind!r}; choose one of {', '.join(ACTIVATIONS)}")
    if width % 2 or packed.stride(1) != 1:
        raise ValueError(f"gated_activation: packed must be [num_tokens, 2 * I] with contiguous columns, got {width}")
    return num_tokens, width // 2
