"""GGUF blocks, kept as the file has them. Layouts: `gpu_worker.loading.gguf_blocks`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_worker.loading.gguf_blocks import GGML_TYPES, GgmlType
from gpu_worker.loading.gguf_packed import PACKED_SUFFIX
from gpu_worker.parallel.shares import ParallelError, Share
from gpu_worker.quant.api import RandomValues
from gpu_worker.quant.formats import Rules, Shape, TensorRule, Tensors, WeightFormat
from gpu_worker.quant.weights import GgufWeight, QuantizedWeight

PACKED_NAME = f"weight{PACKED_SUFFIX}"

_BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}


@dataclass(frozen=True, slots=True)
class GgufFormat(WeightFormat):
    """One tensor type of a GGUF file."""

    type_name: str

    @property
    def marker(self) -> str:
        return PACKED_NAME

    @property
    def ggml_type(self) -> GgmlType:
        return _BY_NAME[self.type_name]

    def _row_bytes(self, num_inputs: int) -> int:
        return num_inputs // self.ggml_type.block_elements * self.ggml_type.block_bytes

    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        return {PACKED_NAME: TensorRule(((num_outputs, self._row_bytes(num_inputs)),), (torch.uint8,))}

    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        num_outputs, row_bytes = shapes[PACKED_NAME]
        return num_outputs, row_bytes // self.ggml_type.block_bytes * self.ggml_type.block_elements

    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        elements = self.ggml_type.block_elements
        if cols.start % elements or cols.size % elements:
            raise ParallelError(
                f"inputs {cols.start} to {cols.stop} of {cols.total} are no whole {self.type_name} blocks of "
                f"{elements}: use another --tensor-parallel-size, or --enable-expert-parallel for experts"
            )
        return (rows.as_slice(), slice(self._row_bytes(cols.start), self._row_bytes(cols.stop)))

    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        return GgufWeight(tensors[PACKED_NAME], self.ggml_type)

    def random(
        self, num_outputs: int, num_inputs: int, std: float, source: RandomValues, device: torch.device
    ) -> QuantizedWeight:
        raise NotImplementedError("dummy weights have no GGUF file to take their types from")
