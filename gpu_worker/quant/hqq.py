"""`quant_method: hqq` (https://github.com/mobiusml/hqq): integers of a few bits whose zero points are floats.

W[n, k] = (q[n, k] - zero[n, g]) * scale[n, g], as `loading/hqq_source.py` reads it. Groups along the outputs (axis 0)
are unpacked while they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpu_worker.errors import LoadError
from gpu_worker.loading.hqq_source import CODES, SCALE, ZERO
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.api import RandomValues
from gpu_worker.quant.config import ConfigSection, QuantConfig, is_module
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
from gpu_worker.quant.weights import OffsetWeight, QuantizedWeight

METHOD = "hqq"
BITS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True)
class HqqFormat(WeightFormat):
    """One linear with groups along the inputs."""

    bits: int
    group_size: int
    """-1: one group."""

    @property
    def marker(self) -> str:
        return CODES

    def _group(self, num_inputs: int) -> int:
        return num_inputs if self.group_size == -1 else self.group_size

    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        groups = (num_outputs, -(-num_inputs // self._group(num_inputs)))
        return {
            CODES: TensorRule(((num_outputs, num_inputs),), (torch.uint8,)),
            SCALE: TensorRule((groups,), FLOAT_SCALES),
            ZERO: TensorRule((groups,), FLOAT_SCALES),
        }

    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        num_outputs, num_inputs = shapes[CODES]
        return num_outputs, num_inputs

    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        size = self._group(cols.total)
        if size < cols.total:
            check_whole_groups(cols, size)
        return (rows.as_slice(), cols.as_slice() if tensor == CODES else covering(cols, size))

    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        codes, scales = tensors[CODES], tensors[SCALE].float()
        most = int(codes.max()) if codes.numel() else 0
        if most >= 1 << self.bits:
            raise LoadError(f"{CODES} holds {most}, and the config says {self.bits} bits: they are not of one model")
        group = min(self._group(cols.total), cols.size)
        return OffsetWeight(codes, scales, -tensors[ZERO].float() * scales, group, self.bits)

    def random(
        self, num_outputs: int, num_inputs: int, std: float, source: RandomValues, device: torch.device
    ) -> QuantizedWeight:
        middle, group = 1 << (self.bits - 1), min(self._group(num_inputs), num_inputs)
        values = torch.empty(num_outputs, num_inputs, device=device)
        source.fill(values, std=middle / 3)
        codes = values.add_(middle).round_().clamp_(0, 2 * middle - 1).to(torch.uint8)
        scales = torch.full((num_outputs, -(-num_inputs // group)), 3 * std / middle, device=device)
        return OffsetWeight(codes, scales, -middle * scales, group, self.bits)


def read_hqq(section: ConfigSection) -> QuantConfig:
    """`quant_config`: settings for all linears, or for some by their names without the numbers of layers."""
    settings = section.fields.get("quant_config")
    if not isinstance(settings, dict) or not settings:
        raise section.error("quant_config", f"is {settings!r:.60}, expected an object")
    left_out = section.names("skip_modules")
    if "weight_quant_params" in settings:
        default = _read_settings(section, settings)
        formats: dict[str, WeightFormat | None] = {}
    else:
        default = None
        formats = {name: None if one is None else _read_settings(section, one) for name, one in settings.items()}

    def format_of(name: str) -> WeightFormat | None:
        tag = _tag(name)
        return None if tag in left_out or is_module(name, left_out) else formats.get(tag, default)

    label = "hqq by names" if default is None else f"hqq {default.bits} bit"
    return QuantConfig(METHOD, format_of, label, otherwise=default)


def _tag(name: str) -> str:
    return ".".join(piece for piece in name.split(".") if piece not in ("model", "layers") and not piece.isnumeric())


def _read_settings(section: ConfigSection, settings: Any) -> HqqFormat | None:
    """None: with groups along the outputs."""
    weights = settings.get("weight_quant_params") if isinstance(settings, dict) else None
    if not isinstance(weights, dict):
        raise section.error("quant_config", f"has {settings!r:.60}, expected weight_quant_params")
    for field in ("scale_quant_params", "zero_quant_params"):
        if settings.get(field):
            raise section.refuse(f"hqq with {field}")
    inner = ConfigSection(weights, section._error)
    bits = weights.get("nbits")
    if bits not in BITS:
        raise section.refuse(f"hqq with nbits {bits!r}")
    if not inner.boolean("channel_wise", True):
        raise section.refuse("hqq with channel_wise false")
    axis = inner.integer("axis", 0)
    if axis not in (0, 1):
        raise section.error("axis", f"is {axis}, expected 0 or 1")
    return HqqFormat(int(bits), inner.group_size(-1)) if axis == 1 else None
