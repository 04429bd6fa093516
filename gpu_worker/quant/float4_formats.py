"""4-bit floats (e2m1) with a scale to every 16 or 32 inputs: compressed-tensors' NVFP4 and MXFP4,
ModelOpt's NVFP4, Quark's MXFP4.

Activations that a W4A4 checkpoint would quantize to 4 bits as well stay as they are: weights alone are what the memory
is saved by, and no result gets worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from gpu_worker.parallel.shares import ParallelError, Share
from gpu_worker.quant.api import OutputSpan, RandomValues
from gpu_worker.quant.formats import FLOAT_SCALES, SCALAR, Rules, Shape, TensorRule, Tensors, WeightFormat, as_scalar
from gpu_worker.quant.weights import Float4Weight, QuantizedWeight


@dataclass(frozen=True, slots=True)
class Float4Format(WeightFormat):
    """`nvfp4`: groups of 16, float8 scales under one float32 divisor; `mxfp4`: groups of 32, scales are powers of 2."""

    kind: Literal["nvfp4", "mxfp4"]
    dialect: Literal["compressed-tensors", "modelopt", "quark"] = "compressed-tensors"
    """ModelOpt's NVFP4 has other names, and a float32 factor where the other has a divisor; Quark has MXFP4 alone."""

    @property
    def marker(self) -> str:
        return "weight_scale"

    @property
    def packed_name(self) -> str:
        return "weight_packed" if self.dialect == "compressed-tensors" else "weight"

    @property
    def group_size(self) -> int:
        return 16 if self.kind == "nvfp4" else 32

    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        scale_dtypes = (torch.float8_e4m3fn,) if self.kind == "nvfp4" else (torch.uint8, torch.float8_e8m0fnu)
        rules = {
            self.packed_name: TensorRule(((num_outputs, num_inputs // 2),), (torch.uint8,)),
            "weight_scale": TensorRule(((num_outputs, -(-num_inputs // self.group_size)),), scale_dtypes),
        }
        if self.dialect == "modelopt":
            rules["weight_scale_2"] = TensorRule(SCALAR, FLOAT_SCALES)
        elif self.kind == "nvfp4":
            rules["weight_global_scale"] = TensorRule(SCALAR, FLOAT_SCALES)
            rules["input_global_scale"] = TensorRule(SCALAR, FLOAT_SCALES, optional=True)
        if self.dialect != "compressed-tensors":
            rules["input_scale"] = TensorRule(SCALAR, FLOAT_SCALES, optional=True)
        return rules

    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        num_outputs, num_bytes = shapes[self.packed_name]
        return num_outputs, num_bytes * 2

    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        if cols.start % self.group_size or cols.size % self.group_size:
            raise ParallelError(
                f"inputs {cols.start} to {cols.stop} of {cols.total} are no whole {self.kind} groups of "
                f"{self.group_size}: use another --tensor-parallel-size, or --enable-expert-parallel for experts"
            )
        if tensor == self.packed_name:
            return (rows.as_slice(), slice(cols.start // 2, cols.stop // 2))
        if tensor == "weight_scale":
            return (rows.as_slice(), slice(cols.start // self.group_size, cols.stop // self.group_size))
        return ()

    def output_span(self, tensor: str) -> OutputSpan | None:
        return OutputSpan(0) if tensor in (self.packed_name, "weight_scale") else None

    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        packed, scales = tensors[self.packed_name], tensors["weight_scale"]
        divisors = torch.ones(rows.size, device=packed.device)
        if self.dialect == "modelopt":
            divisors /= as_scalar(tensors["weight_scale_2"])
        elif self.kind == "nvfp4":
            divisors *= as_scalar(tensors["weight_global_scale"])
        elif scales.dtype != torch.uint8:
            scales = scales.view(torch.uint8)
        return Float4Weight(packed, scales, divisors, self.group_size)

    def random(
        self, num_outputs: int, num_inputs: int, std: float, source: RandomValues, device: torch.device
    ) -> QuantizedWeight:
        values = torch.empty(num_outputs, num_inputs // 2, device=device)
        source.fill(values, std=64.0)
        num_groups = num_inputs // self.group_size
        packed = values.add_(128).clamp_(0, 255).to(torch.uint8)
        # Codes spread over all 16 values have a standard deviation near 2.9.
        if self.kind == "nvfp4":
            scales = torch.full((num_outputs, num_groups), 1.0, device=device).to(torch.float8_e4m3fn)
            return Float4Weight(packed, scales, torch.full((num_outputs,), 2.9 / std, device=device), 16)
        scales = torch.full((num_outputs, num_groups), 127, dtype=torch.uint8, device=device)
        return Float4Weight(packed, scales, torch.full((num_outputs,), 2.9 / std, device=device), 32)
