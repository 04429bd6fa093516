"""What every layer that holds checkpoint tensors offers to the loader."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from gpu_worker.quant.api import ExpectedTensors, OutputSpan, RandomValues, StoredTensor, dtype_problem


class Weighted(ABC):
    """A layer that is filled from checkpoint tensors.

    A checkpoint tensor's name splits into the place of its module, which the model's name rules map to a layer and a
    *part* of it (`q` of a fused qkv; the empty string where nothing is fused), and the tensor's own name (`weight`,
    `bias`).
    """

    @abstractmethod
    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        """Copy this rank's share of one checkpoint tensor.

        It is one of `expected`, names and shapes have been compared.
        """

    @abstractmethod
    def expected(self) -> ExpectedTensors:
        """The checkpoint tensors that fill this layer."""

    def optional(self) -> frozenset[tuple[str, str]]:
        """Which of `expected` a checkpoint may lack."""
        return frozenset()

    def problem(self, part: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """What is wrong with a stored tensor beside its name and shape; None: nothing. Nothing is allocated yet."""
        return dtype_problem(dtype)

    def num_outputs(self, part: str) -> int:
        """Outputs of a part of a fused linear, whole (unsplit)."""
        raise TypeError(f"{type(self).__name__} has no parts that a checkpoint could store in one tensor")

    def output_span(self, part: str, tensor: str) -> OutputSpan | None:
        """Where a stored tensor has the outputs of fused parts; None: it is the same for all of them."""
        return OutputSpan(0)

    @abstractmethod
    def fill_random(self, source: RandomValues) -> None:
        """Random weights that keep activations near unit scale."""

    @abstractmethod
    def num_bytes(self) -> int: ...

    def finish(self) -> None:
        """All tensors are there: bring them into the layout that computes fastest. The default keeps them."""
        return None


class PlainMatrix(Weighted):
    """A weight [outputs, inputs] that is whole on every rank, in one dtype whatever quantizes linears."""

    def __init__(self, num_outputs: int, num_inputs: int, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(num_outputs, num_inputs, dtype=dtype, device=device)

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        self.weight.copy_(source.read())

    def expected(self) -> ExpectedTensors:
        return {("", "weight"): tuple(self.weight.shape)}

    def fill_random(self, source: RandomValues) -> None:
        source.fill(self.weight, std=self.weight.shape[1] ** -0.5)

    def num_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()


class Elsewhere(Weighted):
    """A layer that another rank holds: known to the checkpoint's accounts, and nothing of it is read.

    `layer` is that layer as a whole, built on the meta device.
    """

    def __init__(self, layer: Weighted) -> None:
        self._layer = layer

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        source.read((slice(0, 0),) if source.shape else None)

    def expected(self) -> ExpectedTensors:
        return self._layer.expected()

    def optional(self) -> frozenset[tuple[str, str]]:
        return self._layer.optional()

    def problem(self, part: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        return self._layer.problem(part, tensor, shape, dtype)

    def num_outputs(self, part: str) -> int:
        return self._layer.num_outputs(part)

    def output_span(self, part: str, tensor: str) -> OutputSpan | None:
        return self._layer.output_span(part, tensor)

    def fill_random(self, source: RandomValues) -> None:
        return None

    def num_bytes(self) -> int:
        return 0
