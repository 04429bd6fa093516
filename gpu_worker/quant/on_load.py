"""`--quantization fp8` and `int8`: plain weights become 8-bit ones while they are loaded.

Every output gets its own scale, absmax / 448 (float8) or absmax / 127 (int8); inputs are quantized per token. The
plain weight of one linear at a time is on the device, never the whole model's.
"""

from __future__ import annotations

from typing import Literal

import torch

from gpu_worker.layers.ops import LayerOps, QuantizedRows, RowQuant
from gpu_worker.quant.activations import FLOAT8_MAX, MIN_SCALE, ActivationQuant
from gpu_worker.quant.api import ExpectedTensors, LinearMethod, LinearShape, RandomValues, StoredTensor
from gpu_worker.quant.none import UnquantizedLinear
from gpu_worker.quant.products import PackedKernels, make_product
from gpu_worker.quant.stored import LinearParts
from gpu_worker.quant.weights import ROW_STEP, ScaledWeight

KINDS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


class QuantizingLinear(LinearMethod):
    """Loads as an unquantized linear does, into a weight that is there from its first tensor to `finish` only."""

    def __init__(self, kind: Literal["fp8", "int8"], ops: LayerOps, kernels: PackedKernels | None) -> None:
        self.kind, self._ops, self._kernels = kind, ops, kernels
        self.activations = ActivationQuant("float8" if kind == "fp8" else "int8", "token", dynamic=True)

    def create(self, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self._dtype, self._device = shape, dtype, device
        self._plain: UnquantizedLinear | None = None
        self.bias: torch.Tensor | None = None

    def _loading(self) -> UnquantizedLinear:
        if self._plain is None:
            self._plain = UnquantizedLinear(self._ops)
            self._plain.create(self.shape, self._dtype, self._device)
        return self._plain

    def load_shard(self, part: str, tensor: str, source: StoredTensor) -> None:
        self._loading().load_shard(part, tensor, source)

    def expected(self) -> ExpectedTensors:
        meta = UnquantizedLinear(self._ops)
        meta.create(self.shape, self._dtype, torch.device("meta"))
        return meta.expected()

    def fill_random(self, source: RandomValues) -> None:
        self._loading().fill_random(source)

    def take_parts(self) -> LinearParts:
        """Instead of `finish`, for a caller that multiplies by itself: the quantized weight, which is not kept."""
        plain = self._loading()
        self.bias = plain.bias
        weight = quantize_by_output(plain.weight, KINDS[self.kind])
        self._plain = None
        return [(weight, None)]

    def finish(self) -> None:
        ((weight, _),) = self.take_parts()
        self._product = make_product(weight, self.activations, None, self._dtype, self._ops, self._kernels)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self._product.apply(x, self.bias)

    def writes_into(self) -> bool:
        return self._product.writes_into()

    def apply_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self._product.apply_into(x, self.bias, out)

    def row_quant(self) -> RowQuant | None:
        return self._product.row_quant()

    def apply_quantized(self, rows: QuantizedRows) -> torch.Tensor:
        return self._product.apply_quantized(rows, self.bias, self._dtype)

    def apply_quantized_gated(self, rows: QuantizedRows, activation: str) -> torch.Tensor | None:
        return self._product.apply_quantized_gated(rows, self.bias, self._dtype, activation)

    def apply_quantized_into(self, rows: QuantizedRows, out: torch.Tensor) -> None:
        self._product.apply_quantized_into(rows, self.bias, out)

    def num_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self._product.num_bytes() + bias


def quantize_by_output(weight: torch.Tensor, dtype: torch.dtype) -> ScaledWeight:
    """weight [N, K] in 8 bits with a scale for every row, rounded to nearest."""
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    limit = FLOAT8_MAX if dtype == torch.float8_e4m3fn else 127.0
    scales = torch.empty(weight.shape[0], 1, device=weight.device)
    for start in range(0, weight.shape[0], ROW_STEP):
        rows = slice(start, start + ROW_STEP)
        wide = weight[rows].float()
        scales[rows] = (wide.abs().amax(1, keepdim=True) / limit).clamp(min=MIN_SCALE)
        scaled = wide / scales[rows]
        values[rows] = (scaled if dtype.is_floating_point else scaled.round()).clamp(-limit, limit).to(dtype)
    return ScaledWeight(values, scales, 1, weight.shape[1])
