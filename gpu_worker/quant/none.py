"""Weights as they are: float32, bfloat16 or float16, not quantized."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpu_worker.device import cpu_computes_bfloat16
from gpu_worker.layers.ops import TORCH_OPS, LayerOps
from gpu_worker.quant.api import ExpectedTensors, LinearMethod, LinearShape, RandomValues, StoredTensor

# oneDNN picks a blocked layout for a weight by the number of rows it expects. Measured on an AMX Xeon (torch 2.13): the
# layout for 16 rows is within 5 % of the best at every count from 1 to 512.
PACK_FOR_NUM_ROWS = 16


class UnquantizedLinear(LinearMethod):
    """y = x W^T + b. On a CPU the weight is kept in oneDNN's blocked layout, which is 2 to 3 times faster."""

    def __init__(self, ops: LayerOps = TORCH_OPS) -> None:
        self._ops = ops

    def create(self, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self._packed: PackedWeight | None = None
        # Untouched pages of an empty tensor cost nothing on the host, so all linears may be created before any is
        # loaded.
        self.weight = torch.empty(shape.num_outputs, shape.inputs.size, dtype=dtype, device=device)  # [out, in]
        self.bias = torch.zeros(shape.num_outputs, dtype=dtype, device=device) if shape.has_bias else None  # [out]

    def load_shard(self, part: str, tensor: str, source: StoredTensor) -> None:
        place = self.shape.part(part)
        rows = slice(place.start, place.start + place.outputs.size)
        if tensor == "weight":
            self.weight[rows] = source.read((place.outputs.as_slice(), self.shape.inputs.as_slice()))
        elif tensor == "bias" and self.bias is not None:
            # A rank that does not add the bias takes nothing of it, but takes note of it: the loader counts what is
            # read.
            taken = place.outputs.as_slice() if self.shape.holds_bias else slice(0, 0)
            self.bias[rows][: taken.stop - taken.start] = source.read((taken,))
        else:
            raise KeyError(tensor)

    def expected(self) -> ExpectedTensors:
        shapes: ExpectedTensors = {}
        for part in self.shape.parts:
            shapes[part.name, "weight"] = (part.outputs.total, self.shape.inputs.total)
            if self.shape.has_bias:
                shapes[part.name, "bias"] = (part.outputs.total,)
        return shapes

    def fill_random(self, source: RandomValues) -> None:
        source.fill(self.weight, std=self.shape.inputs.total**-0.5)

    def finish(self) -> None:
        if can_pack(self.weight, self._ops):
            self._packed = PackedWeight(self.weight)
            # It holds the weight from here on.
            del self.weight

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is not None:
            return self._packed.multiply(x, self.bias)
        return self._ops.linear(x, self.weight, self.bias)

    def writes_into(self) -> bool:
        return self._packed is None

    def apply_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if self._packed is not None:
            super().apply_into(x, out)
        else:
            self._ops.linear_into(x, self.weight, self.bias, out)

    def plain_weight(self) -> torch.Tensor | None:
        return self.weight if self._packed is None and self.bias is None else None

    def num_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        if self._packed is not None:
            return self._packed.num_bytes() + bias
        return self.weight.numel() * self.weight.element_size() + bias


class Unquantized:
    """The scheme of a checkpoint without quantization."""

    fused_experts_are_packed = False

    def __init__(self, ops: LayerOps = TORCH_OPS) -> None:
        self._ops = ops

    def linear_method(self, path: str) -> LinearMethod:
        return UnquantizedLinear(self._ops)


def can_pack(weight: torch.Tensor, ops: LayerOps) -> bool:
    """Whether a weight that `ops` multiply is better kept as `PackedWeight`."""
    return (
        not ops.multiplies_plain(weight)
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
    )


_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


class PackedWeight:
    """A weight [out, in] on a CPU, in the layouts that it multiplies fastest with.

    oneDNN's blocked layout serves any number of rows. Where the CPU does not multiply bfloat16 matrices, the blocked
    copy of a bfloat16 weight is in float32, and the plain one stays for single rows: those are bound by memory, which
    then reads half as much. SmolLM2-135M's linears on a Zen 3 with two cores: 22 ms for one row and 77 for 16; with
    float32 alone 41 ms for one row, with torch's bfloat16 alone 72 ms for four rows.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._single_row: torch.Tensor | None = None  # [out, in]
        if weight.dtype == torch.bfloat16 and not cpu_computes_bfloat16():
            self._single_row, weight = weight, weight.float()
        self._blocked = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_FOR_NUM_ROWS)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [num_rows, in], bias [out] -> x W^T + b, [num_rows, out] in x's dtype."""
        if self._single_row is None:
            return _linear_pointwise(x, self._blocked, bias, "none", [], "")  # type: ignore[misc]
        if x.shape[0] == 1:
            return F.linear(x, self._single_row, bias)
        wide_bias = None if bias is None else bias.float()
        return _linear_pointwise(x.float(), self._blocked, wide_bias, "none", [], "").to(x.dtype)  # type: ignore[misc]

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether `weight` itself is kept, not a copy of it."""
        return self._single_row is weight

    def num_bytes(self) -> int:
        plain = 0 if self._single_row is None else self._single_row.numel() * self._single_row.element_size()
        return plain + self._blocked.numel() * self._blocked.element_size()
