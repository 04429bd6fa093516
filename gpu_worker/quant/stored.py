"""A linear filled from packed tensors: what the checkpoint stores is kept until `finish` and turned into products."""

from __future__ import annotations

import torch

from gpu_worker.layers.ops import TORCH_OPS, LayerOps, QuantizedRows, RowQuant
from gpu_worker.quant.activations import StaticScale
from gpu_worker.quant.api import (
    ExpectedTensors,
    LinearMethod,
    LinearPart,
    LinearShape,
    OutputSpan,
    RandomValues,
    StoredTensor,
    dtype_problem,
)
from gpu_worker.quant.formats import Rules, Tensors, WeightFormat
from gpu_worker.quant.products import PackedKernels, Product, make_product
from gpu_worker.quant.weights import QuantizedWeight, stack

LinearParts = list[tuple[QuantizedWeight, StaticScale | None]]
"""The parts of a fused linear, in their order, each with the checkpoint's scale for its input."""


class StoredLinear(LinearMethod):
    """One format for all parts. Nothing is allocated before a tensor of this linear arrives."""

    def __init__(self, weight_format: WeightFormat, ops: LayerOps = TORCH_OPS, kernels: PackedKernels | None = None):
        self.format = weight_format
        self._ops, self._kernels = ops, kernels
        self._products: list[Product] = []
        self._random: LinearParts = []

    def create(self, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self._dtype, self._device = shape, dtype, device
        self._tensors: dict[str, Tensors] = {part.name: {} for part in shape.parts}
        self.bias: torch.Tensor | None = None
        for part in shape.parts:
            # A share that the format cannot cut is refused now and not after minutes of loading.
            for name, rule in self._rules(part).items():
                self.format.index(name, rule.shapes[0], part.outputs, shape.inputs)

    def _rules(self, part: LinearPart) -> Rules:
        return self.format.rules(part.outputs.total, self.shape.inputs.total)

    def expected(self) -> ExpectedTensors:
        shapes: ExpectedTensors = {}
        for part in self.shape.parts:
            for name, rule in self._rules(part).items():
                shapes[part.name, name] = rule.shapes[0] if len(rule.shapes) == 1 else None
            if self.shape.has_bias or self.format.may_have_stray_bias:
                shapes[part.name, "bias"] = (part.outputs.total,)
        return shapes

    def optional(self) -> frozenset[tuple[str, str]]:
        names = {
            (part.name, name) for part in self.shape.parts for name, rule in self._rules(part).items() if rule.optional
        }
        if self.format.may_have_stray_bias and not self.shape.has_bias:
            names |= {(part.name, "bias") for part in self.shape.parts}
        return frozenset(names)

    def problem(self, part: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        if tensor == "bias":
            return dtype_problem(dtype)
        rule = self._rules(self.shape.part(part))[tensor]
        if tuple(shape) not in rule.shapes:
            wanted = " or ".join(str(list(one)) for one in rule.shapes)
            return f"has the shape {list(shape)}, the model's config asks for {wanted}"
        return dtype_problem(dtype, rule.dtypes)

    def output_span(self, part: str, tensor: str) -> OutputSpan | None:
        return OutputSpan(0) if tensor == "bias" else self.format.output_span(tensor)

    def load_shard(self, part: str, tensor: str, source: StoredTensor) -> None:
        place = self.shape.part(part)
        if tensor == "bias":
            self._load_bias(place, source)
            return
        rule = self._rules(place)[tensor]
        shape = source.shape if len(rule.shapes) > 1 else rule.shapes[0]
        index = self.format.index(tensor, tuple(shape), place.outputs, self.shape.inputs)
        value = source.read(index or None)
        # A copy: what a reader gives may be a view of a mapped file.
        self._tensors[part][tensor] = value.to(self._device, copy=True)

    def _load_bias(self, place: LinearPart, source: StoredTensor) -> None:
        taken = place.outputs.as_slice() if self.shape.holds_bias else slice(0, 0)
        values = source.read((taken,))
        if not self.shape.has_bias and not values.any():
            return  # what old writers stored where the model has none
        if self.bias is None:
            self.bias = torch.zeros(self.shape.num_outputs, dtype=self._dtype, device=self._device)  # [N]
        self.bias[place.start : place.start + values.shape[0]] = values

    def fill_random(self, source: RandomValues) -> None:
        for part in self.shape.parts:
            weight = self.format.random(
                part.outputs.size, self.shape.inputs.size, self.shape.inputs.total**-0.5, source, self._device
            )
            static = None
            if self.format.activations is not None and not self.format.activations.dynamic:
                static = StaticScale(torch.tensor(0.02, device=self._device))
            self._random.append((weight, static))

    def finish(self) -> None:
        parts = self._random or [self._decode(part) for part in self.shape.parts]
        self._tensors.clear()
        for weight, static in _fused(parts):
            self._products.append(
                make_product(weight, self.format.activations, static, self._dtype, self._ops, self._kernels)
            )
        self._random.clear()
        if self.shape.has_bias and self.bias is None:
            self.bias = torch.zeros(self.shape.num_outputs, dtype=self._dtype, device=self._device)

    def take_parts(self) -> LinearParts:
        """Instead of `finish`, for a caller that multiplies by itself: the parts' weights, which are not kept."""
        parts = self._random or [self._decode(part) for part in self.shape.parts]
        self._tensors.clear()
        self._random = []
        return parts

    def _decode(self, part: LinearPart) -> tuple[QuantizedWeight, StaticScale | None]:
        tensors = self._tensors[part.name]
        weight = self.format.decode(tensors, part.outputs, self.shape.inputs)
        return weight, self.format.static_scale(tensors)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if len(self._products) == 1:
            return self._products[0].apply(x, self.bias)
        outputs = torch.cat([product.apply(x, None) for product in self._products], dim=1)
        return outputs if self.bias is None else outputs.add_(self.bias)

    def writes_into(self) -> bool:
        return len(self._products) == 1 and self._products[0].writes_into()

    def apply_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if len(self._products) == 1:
            self._products[0].apply_into(x, self.bias, out)
        else:
            super().apply_into(x, out)

    def row_quant(self) -> RowQuant | None:
        return self._products[0].row_quant() if len(self._products) == 1 else None

    def apply_quantized(self, rows: QuantizedRows) -> torch.Tensor:
        return self._products[0].apply_quantized(rows, self.bias, self._dtype)

    def apply_quantized_gated(self, rows: QuantizedRows, activation: str) -> torch.Tensor | None:
        return self._products[0].apply_quantized_gated(rows, self.bias, self._dtype, activation)

    def apply_quantized_into(self, rows: QuantizedRows, out: torch.Tensor) -> None:
        self._products[0].apply_quantized_into(rows, self.bias, out)

    def num_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return sum(product.num_bytes() for product in self._products) + bias


def _fused(parts: LinearParts) -> LinearParts:
    """All parts as one where groups and input scales agree, else each alone."""
    first = parts[0][1]
    for _, static in parts[1:]:
        if static is not None and first is not None and not static.equals(first):
            return parts
    whole = stack([weight for weight, _ in parts])
    return parts if whole is None else [(whole, first)]


class SplitLinear(LinearMethod):
    """Parts of different formats side by side: one method each, their outputs put together."""

    def __init__(self, methods: dict[str, LinearMethod]) -> None:
        self.methods = methods

    def create(self, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> None:
        # A layer may lack parts that the same linear of others has.
        self.methods = {part.name: self.methods[part.name] for part in shape.parts}
        for part in shape.parts:
            alone = LinearPart(part.name, part.outputs, 0)
            self.methods[part.name].create(
                LinearShape((alone,), shape.inputs, shape.has_bias, shape.holds_bias), dtype, device
            )

    def expected(self) -> ExpectedTensors:
        return {key: value for method in self.methods.values() for key, value in method.expected().items()}

    def optional(self) -> frozenset[tuple[str, str]]:
        return frozenset().union(*(method.optional() for method in self.methods.values()))

    def problem(self, part: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        return self.methods[part].problem(part, tensor, shape, dtype)

    def output_span(self, part: str, tensor: str) -> OutputSpan | None:
        return self.methods[part].output_span(part, tensor)

    def load_shard(self, part: str, tensor: str, source: StoredTensor) -> None:
        self.methods[part].load_shard(part, tensor, source)

    def fill_random(self, source: RandomValues) -> None:
        for method in self.methods.values():
            method.fill_random(source)

    def finish(self) -> None:
        for method in self.methods.values():
            method.finish()

    @property
    def bias(self) -> torch.Tensor | None:
        biases = [method.bias for method in self.methods.values() if isinstance(method, StoredLinear)]
        present = [bias for bias in biases if bias is not None]
        return torch.cat(present) if len(present) == len(self.methods) else None

    def take_parts(self) -> LinearParts:
        """As `StoredLinear.take_parts`; for parts that are all stored."""
        stored = [method for method in self.methods.values() if isinstance(method, StoredLinear)]
        assert len(stored) == len(self.methods)
        return [part for method in stored for part in method.take_parts()]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [method.apply(x) for method in self.methods.values()]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def num_bytes(self) -> int:
        return sum(method.num_bytes() for method in self.methods.values())
