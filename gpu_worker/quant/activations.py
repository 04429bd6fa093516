"""Quantization of what goes into a linear, where a format defines it (W8A8).

A value becomes an element of 8 bits, x ~ (values - zero) * scale. Scales: one per token, measured (dynamic); one per
token and group of inputs, measured; or one for all, from the checkpoint (static). An 8-bit integer scale is
absmax / 127.5 with values clamped to -128 .. 127, a float8 scale absmax / 448, as compressed-tensors defines them
(`calculate_qparams`, https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

FLOAT8_MAX = 448.0
INT8_STEPS = 255.0
# A token of zeros: any scale does, as long as it is not 0.
MIN_SCALE = 1e-12


@dataclass(frozen=True, slots=True)
class ActivationQuant:
    """How a format quantizes a linear's input."""

    kind: Literal["float8", "int8"]
    granularity: Literal["token", "tensor", "group"] = "token"
    dynamic: bool = True
    group_size: int = 0
    symmetric: bool = True


@dataclass(frozen=True, slots=True)
class QuantizedInput:
    """x ~ (values - zeros) * scales."""

    values: torch.Tensor  # [num_tokens, K], the 8-bit values in x's element type
    scales: torch.Tensor  # float32 [num_tokens, 1], [num_tokens, K / group_size] or []
    zeros: torch.Tensor | None  # float32, shaped like scales


def quantize_input(x: torch.Tensor, quant: ActivationQuant, static: StaticScale | None) -> QuantizedInput:
    """x [num_tokens, K] to what a kernel would multiply; values stay in x's dtype, which holds all of them exactly."""
    wide = x.float()
    if quant.granularity == "group":
        wide = _grouped(wide, quant.group_size)
    zeros: torch.Tensor | None = None
    if not quant.dynamic and static is not None:
        scales, zeros = static.scale, static.zero
    elif quant.symmetric:
        limit = FLOAT8_MAX if quant.kind == "float8" else INT8_STEPS / 2
        absmax = wide.abs().amax() if quant.granularity == "tensor" else wide.abs().amax(-1, keepdim=True)
        scales = (absmax / limit).clamp(min=MIN_SCALE)
    else:
        low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
        scales = ((high - low) / INT8_STEPS).clamp(min=MIN_SCALE)
        zeros = (-128 - (low / scales).round()).clamp(-128, 127)
    values = wide / scales
    if quant.kind == "float8":
        values = values.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    else:
        values = (values.round() if zeros is None else (values + zeros).round()).clamp(-128, 127).to(x.dtype)
    if quant.granularity == "group":
        return QuantizedInput(values.flatten(1)[:, : x.shape[1]], scales.squeeze(-1), zeros)
    return QuantizedInput(values, scales, zeros)


def simulate(x: torch.Tensor, quant: ActivationQuant, static: StaticScale | None) -> torch.Tensor:
    """x after quantization and back, in its own dtype."""
    quantized = quantize_input(x, quant, static)
    values, scales = quantized.values.float(), quantized.scales
    if quant.granularity == "group":
        scales = scales.repeat_interleave(quant.group_size, 1)[:, : x.shape[1]]
    if quantized.zeros is not None:
        values = values - quantized.zeros
    return (values * scales).to(x.dtype)


@dataclass(frozen=True, slots=True)
class StaticScale:
    """A checkpoint's scale for a linear's input."""

    scale: torch.Tensor  # float32 []
    zero: torch.Tensor | None = None  # float32 []

    def equals(self, other: StaticScale) -> bool:
        zeros = [torch.zeros_like(one.scale) if one.zero is None else one.zero for one in (self, other)]
        return torch.equal(self.scale, other.scale) and torch.equal(zeros[0], zeros[1])


def _grouped(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """[num_tokens, K] -> [num_tokens, groups, group_size]; a last, short group is filled with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % group_size)).unflatten(1, (-1, group_size))
