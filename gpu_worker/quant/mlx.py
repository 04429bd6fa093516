"""What mlx-lm writes (`mlx-community`): integers of a few bits with a scale and an offset to every group of inputs.

W[n, k] = q[n, k] * scales[n, g] + biases[n, g]; q is unsigned and packed along the inputs, low bits first, running on
over words. The table of embeddings and the output head are packed like the linears; the experts of a layer are in one
tensor (`loading/stacked_experts.py`).
Source: https://ml-explore.github.io/mlx (`mlx.core.quantize`), `mlx_lm.utils.quantize_model`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from gpu_worker.loading.stacked_experts import SWITCH, SWITCH_PARTS
from gpu_worker.parallel.shares import ParallelError, Share
from gpu_worker.quant.api import OutputSpan, RandomValues
from gpu_worker.quant.bit_packing import Packing
from gpu_worker.quant.config import ConfigSection, QuantConfig
from gpu_worker.quant.formats import FLOAT_SCALES, Rules, Shape, TensorRule, Tensors, WeightFormat, covering
from gpu_worker.quant.weights import OffsetWeight, QuantizedWeight

METHOD = "mlx"
BITS = (2, 3, 4, 5, 6, 8)
_OF_AN_EXPERT = re.compile(r"(?P<before>.+)\.experts\.\d+\.(?P<part>\w+)")


@dataclass(frozen=True, slots=True)
class MlxFormat(WeightFormat):
    """One linear, or table, of `bits` in groups of `group_size`."""

    bits: int
    group_size: int

    @property
    def marker(self) -> str:
        return "scales"

    @property
    def _packing(self) -> Packing:
        return Packing(self.bits)

    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        groups = (num_outputs, -(-num_inputs // self.group_size))
        return {
            "weight": TensorRule(((num_outputs, self._packing.num_words(num_inputs)),), (torch.uint32,)),
            "scales": TensorRule((groups,), FLOAT_SCALES),
            "biases": TensorRule((groups,), FLOAT_SCALES),
        }

    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        num_outputs, groups = shapes["scales"]
        return num_outputs, groups * self.group_size

    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        if cols.start % self.group_size or cols.size % self.group_size:
            raise ParallelError(
                f"inputs {cols.start} to {cols.stop} of {cols.total} are no whole groups of {self.group_size}: use "
                "another --tensor-parallel-size, or --enable-expert-parallel for experts"
            )
        taken = self._packing.words(cols) if tensor == "weight" else covering(cols, self.group_size)
        return (rows.as_slice(), taken)

    def output_span(self, tensor: str) -> OutputSpan | None:
        return OutputSpan(0, Fraction(1))

    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        codes = self._packing.unpack(tensors["weight"].view(torch.int32), cols)  # [N, K]
        return OffsetWeight(codes, tensors["scales"].float(), tensors["biases"].float(), self.group_size, self.bits)

    def random(
        self, num_outputs: int, num_inputs: int, std: float, source: RandomValues, device: torch.device
    ) -> QuantizedWeight:
        values = torch.empty(num_outputs, num_inputs, device=device)
        middle = 1 << (self.bits - 1)
        source.fill(values, std=middle / 3)
        codes = values.add_(middle).round_().clamp_(0, 2 * middle - 1).to(torch.uint8)
        scales = torch.full((num_outputs, -(-num_inputs // self.group_size)), 3 * std / middle, device=device)
        return OffsetWeight(codes, scales, -middle * scales, self.group_size, self.bits)


def read_mlx(section: ConfigSection) -> QuantConfig:
    """`quantization`: settings for all modules, and for some by name; false leaves one out."""

    def make(fields: dict[str, Any]) -> MlxFormat:
        inner = ConfigSection(fields, section._error)
        mode, bits = inner.text("mode", "affine"), inner.integer("bits")
        if mode != "affine" or bits not in BITS:
            raise section.refuse(f"MLX with the mode {mode!r} and {bits} bits")
        return MlxFormat(bits, inner.integer("group_size"))

    default = make(section.fields)
    formats: dict[str, MlxFormat | None] = {}
    for name, changes in section.fields.items():
        if isinstance(changes, dict):
            formats[name] = make(section.fields | changes)
        elif changes is False:
            formats[name] = None

    def format_of(name: str) -> WeightFormat | None:
        return formats.get(_name_in_mlx(name), default)

    return QuantConfig(METHOD, format_of, f"mlx {default.bits} bit", otherwise=default)


def _name_in_mlx(module: str) -> str:
    """An expert's linear by the name of the tensor that has it."""
    match = _OF_AN_EXPERT.fullmatch(module)
    if match is None:
        return module
    part = next((part for part, other in SWITCH_PARTS.items() if other == match["part"]), match["part"])
    return f"{match['before']}{SWITCH}{part}"
