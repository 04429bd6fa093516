"""8-bit floats and integers that are multiplied by a scale: native FP8 checkpoints, MXFP8, compressed-tensors' FP8 and
INT8.

W[n, k] = w[n, k] * s, with one scale for the tensor, one for each output, or one for each block of outputs and inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch

from gpu_worker.errors import LoadError
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.activations import ActivationQuant, StaticScale
from gpu_worker.quant.api import OutputSpan, RandomValues
from gpu_worker.quant.formats import (
    FLOAT_SCALES,
    SCALAR,
    Rules,
    Shape,
    TensorRule,
    Tensors,
    WeightFormat,
    as_scalar,
    covering,
)
from gpu_worker.quant.weights import QuantizedWeight, ScaledWeight

SCALE_DTYPES = (*FLOAT_SCALES, torch.float8_e8m0fnu)
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)


@dataclass(frozen=True, slots=True)
class ScaledFormat(WeightFormat):
    """8-bit values and their scales, under the names of a dialect."""

    kind: Literal["float8", "int8"]
    granularity: Literal["tensor", "channel", "block"]
    block: tuple[int, int] = (0, 0)
    scale_name: str = "weight_scale"
    values_name: str = "weight"
    scale_divisor: float = 1.0
    """What stored scales are divided by."""
    input_scale_name: str | None = None
    """The tensor of a static input scale."""
    input_zero_name: str | None = None
    activations: ActivationQuant | None = None
    may_have_stray_bias: bool = False
    scales_keep_dimensions: bool = False
    """Scales of blocks are stored as [rows of blocks, 1, columns of blocks, 1], or [] where there is one block."""
    scales_are_exponents: bool = False
    """Scales are powers of 2, stored as their exponents plus 127 (e8m0)."""
    layout_name: str | None = None
    """A tensor that numbers the order of the values; 0, which is row by row, is the one that is read."""
    ignored: tuple[str, ...] = ()
    """Further tensors that may be there and say nothing, such as zero points of a symmetric format."""

    @property
    def marker(self) -> str:
        return self.scale_name

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.kind == "float8" else torch.int8

    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        match self.granularity:
            case "tensor":
                shapes: tuple[Shape, ...] = (*SCALAR, (1, 1))
            case "channel":
                shapes = ((num_outputs, 1), (num_outputs,))
            case _:
                down, across = -(-num_outputs // self.block[0]), -(-num_inputs // self.block[1])
                shapes = ((down, across),)
                if self.scales_keep_dimensions:
                    shapes = ((down, 1, across, 1), *shapes, *(SCALAR if down * across == 1 else ()))
        rules = {
            self.values_name: TensorRule(((num_outputs, num_inputs),), (self._dtype,)),
            self.scale_name: TensorRule(shapes, EXPONENTS if self.scales_are_exponents else SCALE_DTYPES),
        }
        if self.input_scale_name is not None:
            rules[self.input_scale_name] = TensorRule(SCALAR, FLOAT_SCALES)
        if self.input_zero_name is not None:
            rules[self.input_zero_name] = TensorRule(SCALAR, (*FLOAT_SCALES, torch.int8, torch.int32), optional=True)
        if self.layout_name is not None:
            rules[self.layout_name] = TensorRule(SCALAR, (torch.uint8, torch.int8), optional=True)
        for name in self.ignored:
            rules[name] = TensorRule(
                (*shapes, *SCALAR), (*FLOAT_SCALES, torch.int8, torch.int32, torch.float8_e4m3fn), optional=True
            )
        return rules

    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        num_outputs, num_inputs = shapes[self.values_name]
        return num_outputs, num_inputs

    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        if tensor == self.values_name:
            return (rows.as_slice(), cols.as_slice())
        if tensor != self.scale_name or self.granularity == "tensor":
            return ()
        if self.granularity == "channel":
            return (rows.as_slice(),)
        if len(shape) < 2:
            return ()
        middle = (slice(None),) * (len(shape) // 2 - 1)
        return (covering(rows, self.block[0]), *middle, covering(cols, self.block[1]))

    def output_span(self, tensor: str) -> OutputSpan | None:
        if tensor == self.values_name:
            return OutputSpan(0)
        if tensor not in (self.scale_name, *self.ignored) or self.granularity == "tensor":
            return None
        return OutputSpan(0, Fraction(1, self.block[0]) if self.granularity == "block" else Fraction(1))

    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        values, stored = tensors[self.values_name], tensors[self.scale_name]
        stored = stored.view(torch.float8_e8m0fnu) if self.scales_are_exponents else stored
        scales = stored.float() / self.scale_divisor
        layout = 0 if self.layout_name is None else int(tensors.get(self.layout_name, torch.tensor(0)))
        if layout:
            raise LoadError(
                f"{self.layout_name} is {layout}: the weights lie in the order of one kind of GPU; "
                "save the checkpoint again with a current version of its tool, which stores them row by row"
            )
        if self.granularity == "tensor":
            return ScaledWeight(values, scales.reshape(1, 1).expand(rows.size, 1), 1, cols.size)
        if self.granularity == "channel":
            return ScaledWeight(values, scales.reshape(-1, 1), 1, cols.size)
        if self.scales_keep_dimensions:
            scales = scales.reshape(scales.shape[0] if scales.dim() else 1, -1)
        return _blockwise(values, scales, self.block, rows, cols)

    def static_scale(self, tensors: Tensors) -> StaticScale | None:
        if self.input_scale_name is None:
            return None
        zero = tensors.get(self.input_zero_name) if self.input_zero_name is not None else None
        return StaticScale(as_scalar(tensors[self.input_scale_name]), None if zero is None else as_scalar(zero))

    def random(
        self, num_outputs: int, num_inputs: int, std: float, source: RandomValues, device: torch.device
    ) -> QuantizedWeight:
        values = torch.empty(num_outputs, num_inputs, device=device)
        source.fill(values, std=32.0)
        block_n, block_k = self.block if self.granularity == "block" else (1, num_inputs)
        scales = torch.full((-(-num_outputs // block_n), -(-num_inputs // block_k)), std / 32.0, device=device)
        return ScaledWeight(values.clamp_(-127, 127).to(self._dtype), scales, block_n, block_k)


def _blockwise(
    values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], rows: Share, cols: Share
) -> ScaledWeight:
    """Blocks counted from this rank's first row and column; a share that begins inside a block gets smaller ones."""
    block_n, block_k = block
    if rows.start % block_n:
        of_row = torch.arange(rows.start, rows.stop, device=scales.device) // block_n - rows.start // block_n
        scales, block_n = scales[of_row], 1
    if cols.start % block_k:
        smaller = math.gcd(block_k, cols.start)
        begins = torch.arange(cols.start, cols.stop, smaller, device=scales.device)
        scales, block_k = scales[:, begins // block_k - cols.start // block_k], smaller
    return ScaledWeight(values, scales, block_n, block_k)


MXFP8 = ScaledFormat("float8", "block", (1, 32), scales_are_exponents=True)
"""A power of 2 for every 32 inputs (OCP Microscaling Formats). Inputs, which a W8A8 checkpoint would quantize likewise,
stay as they are."""
