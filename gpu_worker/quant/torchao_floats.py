"""`NVFP4Tensor` and `MXTensor` of torchao: small floats whose scales lie in the order that tensor cores of GPUs read.

Tiles of 128 outputs by 4 groups lie one behind another; output 32 j + i of a tile has its four scales at [i, 4 j].
Source: https://github.com/pytorch/ao (`prototype/mx_formats`, `to_blocked`).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch

from gpu_worker.parallel.shares import Share
from gpu_worker.quant.api import OutputSpan, RandomValues
from gpu_worker.quant.float4_formats import Float4Format
from gpu_worker.quant.formats import (
    SCALAR,
    Rules,
    Shape,
    TensorRule,
    Tensors,
    WeightFormat,
    as_scalar,
    check_whole_groups,
    covering,
)
from gpu_worker.quant.scaled_formats import EXPONENTS, MXFP8
from gpu_worker.quant.torchao_formats import SCALE, VALUES
from gpu_worker.quant.weights import Float4Weight, QuantizedWeight, ScaledWeight

SECOND, OF_INPUTS = "_weight_per_tensor_scale", "_weight_act_per_tensor_scale"
TILE_OUTPUTS, TILE_GROUPS, TILE_ROWS = 128, 4, 32


@dataclass(frozen=True, slots=True)
class TorchaoFloatFormat(WeightFormat):
    """Inputs, which would be quantized likewise, stay as they are."""

    kind: Literal["nvfp4", "mxfp4", "mxfp8"]

    @property
    def marker(self) -> str:
        return VALUES

    @property
    def group_size(self) -> int:
        return 16 if self.kind == "nvfp4" else 32

    @property
    def _per_byte(self) -> int:
        return 1 if self.kind == "mxfp8" else 2

    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        groups = -(-num_inputs // self.group_size)
        tiled = (TILE_ROWS * -(-num_outputs // TILE_OUTPUTS), 4 * TILE_GROUPS * -(-groups // TILE_GROUPS))
        types = (torch.float8_e4m3fn,) if self.kind == "mxfp8" else (torch.uint8,)
        rules = {
            VALUES: TensorRule(((num_outputs, num_inputs // self._per_byte),), types),
            SCALE: TensorRule((tiled,), (torch.float8_e4m3fn,) if self.kind == "nvfp4" else EXPONENTS),
        }
        if self.kind == "nvfp4":
            rules[SECOND] = TensorRule(SCALAR, (torch.float32,), optional=True)
            rules[OF_INPUTS] = TensorRule(SCALAR, (torch.float32,), optional=True)
        return rules

    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        num_outputs, num_bytes = shapes[VALUES]
        return num_outputs, num_bytes * self._per_byte

    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        check_whole_groups(cols, self.group_size)
        if tensor == VALUES:
            return (rows.as_slice(), slice(cols.start // self._per_byte, cols.stop // self._per_byte))
        if tensor != SCALE:
            return ()
        tiles = covering(rows, TILE_OUTPUTS)
        return (slice(tiles.start * TILE_ROWS, tiles.stop * TILE_ROWS),)

    def output_span(self, tensor: str) -> OutputSpan | None:
        if tensor not in (VALUES, SCALE):
            return None
        # Parts that begin inside of a tile are of another shape than is asked for, and refused for that.
        return OutputSpan(0, Fraction(1) if tensor == VALUES else Fraction(TILE_ROWS, TILE_OUTPUTS))

    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        values, tiles = tensors[VALUES], tensors[SCALE].contiguous().view(torch.uint8)
        tiles = tiles.view(tiles.shape[0] // TILE_ROWS, -1, TILE_ROWS, 4, TILE_GROUPS)  # [down, across, i, j, 4]
        in_order = tiles.permute(0, 3, 2, 1, 4).reshape(tiles.shape[0] * TILE_OUTPUTS, -1)  # [outputs, groups]
        first = rows.start % TILE_OUTPUTS
        groups = covering(cols, self.group_size)
        scales = in_order[first : first + rows.size, groups].contiguous()
        if self.kind == "mxfp8":
            return ScaledWeight(values, scales.view(torch.float8_e8m0fnu).float(), 1, self.group_size)
        divisors = torch.ones(rows.size, device=values.device)
        if self.kind == "nvfp4":
            scales = scales.view(torch.float8_e4m3fn)
            divisors /= as_scalar(tensors[SECOND]) if SECOND in tensors else 1.0
        return Float4Weight(values, scales, divisors, self.group_size)

    def random(
        self, num_outputs: int, num_inputs: int, std: float, source: RandomValues, device: torch.device
    ) -> QuantizedWeight:
        alike = MXFP8 if self.kind == "mxfp8" else Float4Format(self.kind)
        return alike.random(num_outputs, num_inputs, std, source, device)
