"""Products of packed weights by the Triton kernels: implements `gpu_worker.quant.products.PackedKernels`."""

from __future__ import annotations

import structlog
import torch
from stepwire_kernels.packed_choice import multiply_packed
from stepwire_kernels.quantize_input import quantize_input
from stepwire_kernels.scaled_choice import multiply_gated, multiply_quantizing, multiply_scaled
from stepwire_kernels.split_k import LinearWorkspace, allocate_linear_workspace

from gpu_worker.cuda.kernel_activations import KERNEL_ACTIVATIONS
from gpu_worker.layers.ops import QuantizedRows, RowQuant
from gpu_worker.quant.activations import ActivationQuant, StaticScale
from gpu_worker.quant.products import Product
from gpu_worker.quant.repack import Repacked, repack
from gpu_worker.quant.weights import AffineWeight, QuantizedWeight, ScaledWeight

log = structlog.get_logger(__name__)

MIN_GROUP = 16


class DenseScratch:
    """Where one weight at a time is made dense for many tokens: shared by all linears, the largest of them fits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numbers: torch.Tensor | None = None

    def reserve(self, count: int, dtype: torch.dtype) -> None:
        """Room for `count` numbers of the model's type; before any graph is captured."""
        if self._numbers is None or self._numbers.numel() < count or self._numbers.dtype != dtype:
            self._numbers = None
            self._numbers = torch.empty(count, dtype=dtype, device=self._device)

    def numbers(self, dtype: torch.dtype) -> torch.Tensor | None:
        """All of it; None where there is none of this type."""
        return self._numbers if self._numbers is not None and self._numbers.dtype == dtype else None

    def num_bytes(self) -> int:
        return 0 if self._numbers is None else self._numbers.numel() * self._numbers.element_size()


class PackedLinears:
    """`pdl`: launch kernels before the ones ahead of them have drained (capability 9.0).

    `reads_float8`: capability 8.9; without it weights with values or scales in float8 are left to plain torch.
    """

    def __init__(self, device: torch.device, *, pdl: bool, reads_float8: bool = True) -> None:
        self._pdl, self._reads_float8 = pdl, reads_float8
        self._has_warned = False
        self._workspace = allocate_linear_workspace(device)
        self._scratch = DenseScratch(device)

    def num_bytes(self) -> int:
        """What all products share beside their weights; known once they are made."""
        return self._scratch.num_bytes()

    def product(
        self,
        weight: QuantizedWeight,
        activations: ActivationQuant | None,
        static: StaticScale | None,
        dtype: torch.dtype,
    ) -> Product | None:
        if isinstance(weight, ScaledWeight) and activations is not None:
            if not _has_kernel(weight, activations, static) or not self._can_read(weight.values):
                return None
            return _EightBitProduct(weight, activations, static, self._workspace, pdl=self._pdl)
        if activations is not None:
            return None
        if isinstance(weight, ScaledWeight):
            integers = _as_integers(weight)
            if integers is None:
                return None
            weight = integers
        repacked = repack(weight)
        if repacked is None or not self._can_read(repacked.weight.scales):
            return None
        self._scratch.reserve(repacked.weight.num_outputs * repacked.weight.num_inputs, dtype)
        return _PackedProduct(repacked, self._workspace, self._scratch, pdl=self._pdl)

    def _can_read(self, numbers: torch.Tensor) -> bool:
        if self._reads_float8 or numbers.dtype != torch.float8_e4m3fn:
            return True
        if not self._has_warned:
            log.warning(
                "the kernels cannot read float8 weights on this device: plain torch multiplies them, many times slower",
                needed_capability="8.9",
            )
        self._has_warned = True
        return False


class _PackedProduct(Product):
    """Weights of a few bits, inputs as they are."""

    def __init__(self, repacked: Repacked, workspace: LinearWorkspace, scratch: DenseScratch, *, pdl: bool) -> None:
        self._weight, self._order = repacked.weight, repacked.order
        self._workspace, self._scratch, self._pdl = workspace, scratch, pdl

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._order is not None:
            if self._order.numel() > x.shape[1]:  # places that no input fills read the zero behind the last one
                x = torch.nn.functional.pad(x, (0, 1))
            x = x.index_select(1, self._order)
        scratch = self._scratch.numbers(x.dtype)
        return multiply_packed(x, self._weight, bias, self._workspace, scratch=scratch, pdl=self._pdl)

    def num_bytes(self) -> int:
        order = 0 if self._order is None else self._order.numel() * self._order.element_size()
        return self._weight.num_bytes() + order


class _EightBitProduct(Product):
    """Inputs quantized on the way, 8-bit values multiplied by 8-bit values."""

    def __init__(
        self,
        weight: ScaledWeight,
        activations: ActivationQuant,
        static: StaticScale | None,
        workspace: LinearWorkspace,
        *,
        pdl: bool,
    ) -> None:
        self._values = weight.values
        self._static = None if static is None else static.scale
        self._workspace, self._pdl = workspace, pdl
        self._input_group = activations.group_size if activations.granularity == "group" else None
        num_inputs = weight.num_inputs
        self._group: int | None = None
        scales, self._scale_rows = weight.scales, weight.block_n
        if not weight.is_per_output:
            self._group = weight.block_k
        elif self._input_group is not None:
            self._group = self._input_group
            scales = scales.expand(-1, -(-num_inputs // self._input_group))
        self._scales = scales.contiguous()  # [N / scale_rows, groups]
        self._has_row_scales = self._group is None and self._scale_rows == 1
        self._row_quant = RowQuant(self._values.dtype, self._static) if self._group is None else None

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if bias is None and self._static is None and self._has_row_scales:
            product = multiply_quantizing(x, self._values, self._scales, pdl=self._pdl)
            if product is not None:
                return product
        return self._multiply(self._quantized(x), bias, x.dtype)

    def writes_into(self) -> bool:
        # What the library does with many tokens (`scaled_choice.py`), but for devices and types that it does not serve:
        # there the product is made apart and copied.
        return self._values.dtype == torch.float8_e4m3fn and self._has_row_scales

    def apply_into(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        self._multiply(self._quantized(x), bias, out.dtype, out)

    def _quantized(self, x: torch.Tensor) -> QuantizedRows:
        values, scales = quantize_input(
            x, self._values.dtype, group_size=self._input_group, static_scale=self._static, pdl=self._pdl
        )
        if self._group is not None and self._input_group is None:
            scales = scales.expand(-1, self._scales.shape[1]).contiguous()
        return QuantizedRows(values, scales)

    def row_quant(self) -> RowQuant | None:
        return self._row_quant

    def apply_quantized(self, rows: QuantizedRows, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        return self._multiply(rows, bias, dtype)

    def apply_quantized_into(self, rows: QuantizedRows, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        self._multiply(rows, bias, out.dtype, out)

    def _multiply(
        self, rows: QuantizedRows, bias: torch.Tensor | None, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return multiply_scaled(
            rows.values,
            rows.scales,
            self._values,
            self._scales,
            bias,
            self._workspace,
            dtype,
            scale_rows=self._scale_rows,
            group_size=self._group,
            out=out,
            pdl=self._pdl,
        )

    def apply_quantized_gated(
        self, rows: QuantizedRows, bias: torch.Tensor | None, dtype: torch.dtype, activation: str
    ) -> torch.Tensor | None:
        if bias is not None or not self._has_row_scales:
            return None
        kind = KERNEL_ACTIVATIONS[activation]
        return multiply_gated(
            rows.values, rows.scales, self._values, self._scales, kind, self._workspace, dtype, pdl=self._pdl
        )

    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self._values, self._scales))


def _has_kernel(weight: ScaledWeight, activations: ActivationQuant, static: StaticScale | None) -> bool:
    is_float = weight.values.dtype == torch.float8_e4m3fn
    if is_float != (activations.kind == "float8") or not activations.symmetric:
        return False
    if static is not None and static.zero is not None and bool(static.zero):
        return False
    groups = {group for group in (_weight_group(weight), activations.group_size or None) if group is not None}
    return len(groups) <= 1 and all(group >= MIN_GROUP and group & (group - 1) == 0 for group in groups)


def _weight_group(weight: ScaledWeight) -> int | None:
    return None if weight.is_per_output else weight.block_k


def _as_integers(weight: ScaledWeight) -> AffineWeight | None:
    """int8 weights of an 8-bit linear whose inputs are not quantized, as the packed kernel reads them."""
    if weight.values.dtype != torch.int8:
        return None
    codes = (weight.values.short() + 128).to(torch.uint8)
    zeros = torch.full((1, 1), 128, dtype=torch.uint8, device=weight.device)
    return AffineWeight(codes, zeros, weight.scales_by_output(), min(weight.block_k, weight.num_inputs), 8)
