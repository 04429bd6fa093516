"""Weights as they are: float32, bfloat16 or float16, not quantized."""

from __future__ import annotations

import torch

from gpu_worker.layers.ops import TORCH_OPS, LayerOps
from gpu_worker.quant.api import ExpectedTensors, LinearMethod, LinearShape, RandomValues, StoredTensor

# oneDNN picks a blocked layout for a weight by the number of rows it expects. Measured on an AMX Xeon (torch 2.13): the
# layout for 16 rows is within 5 % of the best at every count from 1 to 512.
PACK_FOR_NUM_ROWS = 16


class UnquantizedLinear(LinearMethod):
    """y = x W^T + b. On a CPU in bfloat16 the weight is kept in oneDNN's blocked layout (2 to 3 times faster)."""

    def __init__(self, ops: LayerOps = TORCH_OPS) -> None:
        self._ops = ops

    def create(self, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self._packed: torch.Tensor | None = None
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
        if can_pack(self.weight):
            self._packed = pack(self.weight)
            # The blocked copy replaces the plain one: the weight is held once.
            del self.weight

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is not None:
            return packed_linear(x, self._packed, self.bias)
        return self._ops.linear(x, self.weight, self.bias)

    def num_bytes(self) -> int:
        shape = self.shape
        element = (self._packed if self._packed is not None else self.weight).element_size()
        return (shape.num_outputs * shape.inputs.size + (shape.num_outputs if shape.has_bias else 0)) * element


class Unquantized:
    """The scheme of a checkpoint without quantization."""

    def __init__(self, ops: LayerOps = TORCH_OPS) -> None:
        self._ops = ops

    def linear_method(self, path: str) -> LinearMethod:
        return UnquantizedLinear(self._ops)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether a weight may be kept in oneDNN's blocked layout."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(weight: torch.Tensor) -> torch.Tensor:
    """weight [out, in] in the layout that `packed_linear` takes."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACK_FOR_NUM_ROWS)


_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[misc]
