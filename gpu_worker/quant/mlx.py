"""What mlx-lm writes (`mlx-community`): integers of a few bits with a scale and an offset to every group of inputs.

W[n, k] = q[n, k] * scales[n, g] + biases[n, g]; q is unsigned and packed along the inputs, low bits first, running on
over words. Modes other than `affine` have floats of 4 or 8 bits under scales of one byte (MXFP4, MXFP8, NVFP4).
The table of embeddings and the output head are packed like the linears; the experts of a layer are in one tensor
(`loading/stacked_experts.py`).
Source: https://ml-explore.github.io/mlx (`mlx.core.quantize`), `mlx_lm.utils.quantize_model`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch

from gpu_worker.loading.stacked_experts import SWITCH, SWITCH_PARTS
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.api import OutputSpan, RandomValues
from gpu_worker.quant.bit_packing import Packing
from gpu_worker.quant.config import ConfigSection, QuantConfig
from gpu_worker.quant.float4_formats import Float4Format
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
from gpu_worker.quant.scaled_formats import MXFP8
from gpu_worker.quant.weights import Float4Weight, OffsetWeight, QuantizedWeight, ScaledWeight

METHOD = "mlx"
BITS = (2, 3, 4, 5, 6, 8)
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Bits and group size of each, which are the only ones that it has."""
_OF_AN_EXPERT = re.compile(r"(?P<before>.+)\.experts\.\d+\.(?P<part>\w+)")


@dataclass(frozen=True, slots=True)
class MlxFormat(WeightFormat):
    """One linear, or table, of `bits` in groups of `group_size`."""

    bits: int
    group_size: int

    @property
    def label(self) -> str:
        return f"{self.bits} bit"

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
        check_whole_groups(cols, self.group_size)
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


@dataclass(frozen=True, slots=True)
class MlxFloatFormat(WeightFormat):
    """One linear, or table, of small floats: packed like integers, a byte of scale to every group, no offsets."""

    mode: Literal["mxfp4", "mxfp8", "nvfp4"]

    @property
    def label(self) -> str:
        return self.mode

    @property
    def marker(self) -> str:
        return "scales"

    @property
    def bits(self) -> int:
        return FLOAT_MODES[self.mode][0]

    @property
    def group_size(self) -> int:
        return FLOAT_MODES[self.mode][1]

    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        num_words = -(-num_inputs * self.bits // 32)
        return {
            "weight": TensorRule(((num_outputs, num_words),), (torch.uint32,)),
            "scales": TensorRule(((num_outputs, -(-num_inputs // self.group_size)),), (torch.uint8,)),
        }

    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        num_outputs, num_words = shapes["weight"]
        return num_outputs, num_words * 32 // self.bits

    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        check_whole_groups(cols, self.group_size)
        taken = Packing(self.bits).words(cols) if tensor == "weight" else covering(cols, self.group_size)
        return (rows.as_slice(), taken)

    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        values, scales = tensors["weight"].contiguous().view(torch.uint8), tensors["scales"]
        if self.mode == "mxfp8":
            scales = scales.view(torch.float8_e8m0fnu).float()
            return ScaledWeight(values.view(torch.float8_e4m3fn), scales, 1, self.group_size)
        if self.mode == "nvfp4":
            scales = scales.view(torch.float8_e4m3fn)
        return Float4Weight(values, scales, torch.ones(rows.size, device=values.device), self.group_size)

    def random(
        self, num_outputs: int, num_inputs: int, std: float, source: RandomValues, device: torch.device
    ) -> QuantizedWeight:
        alike = MXFP8 if self.mode == "mxfp8" else Float4Format(self.mode)
        return alike.random(num_outputs, num_inputs, std, source, device)


def read_mlx(section: ConfigSection) -> QuantConfig:
    """`quantization`: settings for all modules, and for some by name; false leaves one out."""

    def make(fields: dict[str, Any]) -> MlxFormat | MlxFloatFormat:
        inner = ConfigSection(fields, section._error)
        mode, bits, group_size = inner.text("mode", "affine"), inner.integer("bits"), inner.integer("group_size")
        if mode in FLOAT_MODES and FLOAT_MODES[mode] == (bits, group_size):
            return MlxFloatFormat(mode)  # type: ignore[arg-type]
        if mode != "affine" or bits not in BITS:
            raise section.refuse(f"MLX with the mode {mode!r} and {bits} bits in groups of {group_size}")
        return MlxFormat(bits, group_size)

    default = make(section.fields)
    formats: dict[str, MlxFormat | MlxFloatFormat | None] = {}
    for name, changes in section.fields.items():
        if isinstance(changes, dict):
            # What is said of one module says its mode as well, or means the usual one.
            formats[name] = make(section.fields | {"mode": "affine"} | changes)
        elif changes is False:
            formats[name] = None

    def format_of(name: str) -> WeightFormat | None:
        return formats.get(_name_in_mlx(name), default)

    return QuantConfig(METHOD, format_of, f"mlx {default.label}", otherwise=default)


def _name_in_mlx(module: str) -> str:
    """An expert's linear by the name of the tensor that has it."""
    match = _OF_AN_EXPERT.fullmatch(module)
    if match is None:
        return module
    part = next((part for part, other in SWITCH_PARTS.items() if other == match["part"]), match["part"])
    return f"{match['before']}{SWITCH}{part}"
