"""Weights as torchao's tensor classes lay them out in safetensors: `Int4Tensor` and `IntxUnpackedToInt8Tensor`.

A weight's tensors lie beside each other as `_weight_qdata`, `_weight_scale` and `_weight_zero_point`.
Source: https://github.com/pytorch/ao (`torchao.prototype.safetensors`, `quantize_/workflows`). `Int8Tensor` and
`Float8Tensor` are a `ScaledFormat` under these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from gpu_worker.errors import LoadError
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.api import OutputSpan, RandomValues
from gpu_worker.quant.formats import (
    FLOAT_SCALES,
    Rules,
    Shape,
    TensorRule,
    Tensors,
    WeightFormat,
    check_whole_groups,
    covering,
)
from gpu_worker.quant.weights import AffineWeight, OffsetWeight, QuantizedWeight

VALUES, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"


@dataclass(frozen=True, slots=True)
class TorchaoInt4Format(WeightFormat):
    """`Int4Tensor`, packing format `plain`: W[n, k] = q[n, k] * scale[g, n] + zero_point[g, n], q in -8 .. 7.

    Two q share a byte, the even input in the low half, as two's complement.
    """

    group_size: int
    bits: int = 4

    @property
    def marker(self) -> str:
        return VALUES

    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        groups = (-(-num_inputs // self.group_size), num_outputs)
        return {
            VALUES: TensorRule(((num_outputs, num_inputs // 2),), (torch.int8, torch.uint8)),
            SCALE: TensorRule((groups,), FLOAT_SCALES),
            ZERO: TensorRule((groups,), FLOAT_SCALES),
        }

    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        num_outputs, num_bytes = shapes[VALUES]
        return num_outputs, num_bytes * 2

    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        check_whole_groups(cols, self.group_size)
        if tensor == VALUES:
            return (rows.as_slice(), slice(cols.start // 2, cols.stop // 2))
        return (covering(cols, self.group_size), rows.as_slice())

    def output_span(self, tensor: str) -> OutputSpan | None:
        return OutputSpan(0 if tensor == VALUES else 1, Fraction(1))

    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        packed = tensors[VALUES].view(torch.uint8)
        # Two's complement with its highest bit turned is the value plus 8.
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1) ^ 8  # [N, K]
        scales, zeros = (tensors[name].float().t().contiguous() for name in (SCALE, ZERO))  # [N, G]
        return OffsetWeight(codes, scales, zeros - 8 * scales, self.group_size, self.bits)

    def random(
        self, num_outputs: int, num_inputs: int, std: float, source: RandomValues, device: torch.device
    ) -> QuantizedWeight:
        values = torch.empty(num_outputs, num_inputs, device=device)
        source.fill(values, std=8 / 3)
        codes = values.add_(8).round_().clamp_(0, 15).to(torch.uint8)
        scales = torch.full((num_outputs, -(-num_inputs // self.group_size)), 3 * std / 8, device=device)
        return OffsetWeight(codes, scales, -8 * scales, self.group_size, self.bits)


@dataclass(frozen=True, slots=True)
class TorchaoIntxFormat(WeightFormat):
    """`IntxUnpackedToInt8Tensor`: W[n, k] = (q[n, k] - zero_point[n, g]) * scale[n, g], every q a byte of its own."""

    bits: int
    group_size: int
    """-1: one group."""

    @property
    def marker(self) -> str:
        return VALUES

    def _group(self, num_inputs: int) -> int:
        return num_inputs if self.group_size == -1 else self.group_size

    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        groups = (num_outputs, -(-num_inputs // self._group(num_inputs)))
        return {
            VALUES: TensorRule(((num_outputs, num_inputs),), (torch.int8,)),
            SCALE: TensorRule((groups,), FLOAT_SCALES),
            ZERO: TensorRule((groups,), (torch.int8, *FLOAT_SCALES), optional=True),
        }

    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        num_outputs, num_inputs = shapes[VALUES]
        return num_outputs, num_inputs

    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        taken = cols.as_slice() if tensor == VALUES else covering(cols, self._group(cols.total))
        return (rows.as_slice(), taken)

    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        group, middle = self._group(cols.total), 1 << (self.bits - 1)
        codes = self._codes(tensors[VALUES], VALUES)  # [N, K]
        scales = tensors[SCALE].float()  # [N, G]
        stored = tensors.get(ZERO)
        if stored is None:
            zeros = torch.full((1, 1), middle, dtype=torch.uint8, device=codes.device)
        else:
            zeros = self._codes(stored, ZERO)
        groups = None
        if cols.start % group:
            groups = torch.arange(cols.start, cols.stop, device=codes.device) // group - cols.start // group
        return AffineWeight(codes, zeros, scales, group, self.bits, groups)

    def _codes(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """uint8, the least value as 0. Raises `LoadError` for what these bits do not hold."""
        middle = 1 << (self.bits - 1)
        shifted = values.to(torch.int16 if values.dtype == torch.int8 else torch.float32) + middle
        least, most = (float(bound) for bound in shifted.aminmax())
        if least < 0 or most >= 2 * middle or (shifted.is_floating_point() and bool((shifted % 1).any())):
            raise LoadError(
                f"{name} holds values from {least - middle:g} to {most - middle:g} that {self.bits} bit integers do "
                "not have: the checkpoint is damaged, or of a variant that is not supported"
            )
        return shifted.to(torch.uint8)

    def random(
        self, num_outputs: int, num_inputs: int, std: float, source: RandomValues, device: torch.device
    ) -> QuantizedWeight:
        middle, group = 1 << (self.bits - 1), self._group(num_inputs)
        values = torch.empty(num_outputs, num_inputs, device=device)
        source.fill(values, std=middle / 3)
        codes = values.add_(middle).round_().clamp_(0, 2 * middle - 1).to(torch.uint8)
        scales = torch.full((num_outputs, -(-num_inputs // group)), 3 * std / middle, device=device)
        zeros = torch.full((1, 1), middle, dtype=torch.uint8, device=device)
        return AffineWeight(codes, zeros, scales, group, self.bits)
