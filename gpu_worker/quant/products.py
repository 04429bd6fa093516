"""How finished weights multiply: dense ones by torch, packed ones by whatever kernels the device offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch

from gpu_worker.layers.ops import LayerOps, QuantizedRows, RowQuant
from gpu_worker.quant import none
from gpu_worker.quant.activations import ActivationQuant, StaticScale, quantize_input, simulate
from gpu_worker.quant.weights import QuantizedWeight, ScaledWeight, dequantized


class Product(ABC):
    """y = x W^T + b for one finished weight."""

    @abstractmethod
    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [num_tokens, K] -> [num_tokens, N]."""

    def writes_into(self) -> bool:
        """As `LinearMethod` says of itself."""
        return False

    def apply_into(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        out.copy_(self.apply(x, bias))

    def row_quant(self) -> RowQuant | None:
        """What `apply` makes of each row first, where `apply_quantized` takes such rows; else None."""
        return None

    def apply_quantized(self, rows: QuantizedRows, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """`apply` of rows that were quantized by `row_quant`, the product in `dtype`."""
        raise NotImplementedError

    def apply_quantized_gated(
        self, rows: QuantizedRows, bias: torch.Tensor | None, dtype: torch.dtype, activation: str
    ) -> torch.Tensor | None:
        """act(gate) * up of `apply_quantized`, [num_tokens, N / 2]; None: that is not one launch, or slower."""
        return None

    def apply_quantized_into(self, rows: QuantizedRows, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        out.copy_(self.apply_quantized(rows, bias, out.dtype))

    @abstractmethod
    def num_bytes(self) -> int: ...


class PackedKernels(Protocol):
    """Kernels that multiply by packed weights (`gpu_worker.cuda.packed_linears`)."""

    def product(
        self,
        weight: QuantizedWeight,
        activations: ActivationQuant | None,
        static: StaticScale | None,
        dtype: torch.dtype,
    ) -> Product | None:
        """None: this form has no kernel; it is dequantized instead."""
        ...


class DenseProduct(Product):
    """Dequantized into the model's dtype."""

    def __init__(
        self,
        weight: QuantizedWeight,
        activations: ActivationQuant | None,
        static: StaticScale | None,
        dtype: torch.dtype,
        ops: LayerOps,
    ) -> None:
        self._ops, self._activations, self._static = ops, activations, static
        dense = dequantized(weight, dtype)  # [N, K]
        self._packed = none.PackedWeight(dense) if none.can_pack(dense, ops) else None
        self._weight = dense if self._packed is None else dense.new_empty(0)
        self._num_bytes = dense.numel() * dense.element_size() if self._packed is None else self._packed.num_bytes()

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._activations is not None:
            x = simulate(x, self._activations, self._static)
        if self._packed is not None:
            return self._packed.multiply(x, bias)
        return self._ops.linear(x, self._weight, bias)

    def num_bytes(self) -> int:
        return self._num_bytes


class ScaledProduct(Product):
    """8-bit values of inputs and weights multiplied as they are, the scales applied to the product.

    The model's dtype holds every 8-bit value exactly, so nothing is rounded before the sum. For weights with one scale
    an output and inputs with one scale a token.
    """

    def __init__(
        self,
        weight: ScaledWeight,
        activations: ActivationQuant,
        static: StaticScale | None,
        dtype: torch.dtype,
        ops: LayerOps,
    ) -> None:
        self._ops, self._activations, self._static = ops, activations, static
        values = weight.values.to(dtype)  # [N, K]
        self._scales = weight.scales_by_output()[:, 0].contiguous()  # [N]
        self._sums = values.float().sum(1) if not activations.symmetric or static is not None else None  # [N]
        self._packed = none.PackedWeight(values) if none.can_pack(values, ops) else None
        self._values = values if self._packed is None else values.new_empty(0)
        stored = values.numel() * values.element_size() if self._packed is None else self._packed.num_bytes()
        self._num_bytes = stored + 4 * weight.num_outputs

    @staticmethod
    def serves(weight: QuantizedWeight, activations: ActivationQuant | None) -> bool:
        return (
            isinstance(weight, ScaledWeight)
            and weight.is_per_output
            and activations is not None
            and activations.granularity != "group"
        )

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        quantized = quantize_input(x, self._activations, self._static)
        if self._packed is not None:
            product = self._packed.multiply(quantized.values, None).float()
        else:
            product = self._ops.linear(quantized.values, self._values, None).float()
        if quantized.zeros is not None and self._sums is not None:
            product = product - quantized.zeros * self._sums
        product = product * quantized.scales * self._scales
        return (product if bias is None else product + bias.float()).to(x.dtype)

    def num_bytes(self) -> int:
        return self._num_bytes


def make_product(
    weight: QuantizedWeight,
    activations: ActivationQuant | None,
    static: StaticScale | None,
    dtype: torch.dtype,
    ops: LayerOps,
    kernels: PackedKernels | None,
) -> Product:
    """The best that there is for a weight on its device."""
    if kernels is not None:
        packed = kernels.product(weight, activations, static, dtype)
        if packed is not None:
            return packed
    if activations is not None and isinstance(weight, ScaledWeight) and ScaledProduct.serves(weight, activations):
        return ScaledProduct(weight, activations, static, dtype, ops)
    return DenseProduct(weight, activations, static, dtype, ops)
