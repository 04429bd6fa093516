"""The seam between a linear and the format of its weights.

A linear owns one `LinearMethod`. Its life: `create` allocates what the checkpoint will fill, `load_shard` copies one
checkpoint tensor's part for this rank, `finish` brings the weights into the layout that `apply` multiplies with. A
format is one file in this package; a `QuantScheme` picks the method for each linear by its checkpoint name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol

import torch

from gpu_worker.layers.ops import QuantizedRows, RowQuant
from gpu_worker.parallel.shares import Share

ExpectedTensors = dict[tuple[str, str], tuple[int, ...] | None]
"""`(part, tensor)` -> whole (unsplit) shape, or None where the format decides it."""

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Element types of weights that are not quantized."""


def dtype_problem(dtype: torch.dtype, allowed: tuple[torch.dtype, ...] = PLAIN_DTYPES) -> str | None:
    """What is wrong with a stored tensor's element type; None: nothing."""
    if dtype in allowed:
        return None
    names = " or ".join(str(one).removeprefix("torch.") for one in allowed)
    return f"is stored as {str(dtype).removeprefix('torch.')}, the model's config asks for {names}"


class OutputSpan(NamedTuple):
    """Where a stored tensor has a linear's outputs, for parts that a checkpoint stores in one."""

    axis: int
    per_output: Fraction = Fraction(1)
    """Entries along the axis for each output: below 1 where several share a word or a block."""


class StoredTensor(Protocol):
    """One tensor of a checkpoint, not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    def read(self, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The tensor, or the part that `index` cuts out. May be a view of a mapped file."""
        ...


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One checkpoint linear inside a fused one: `q` in qkv, `gate` in gate-up, `` where nothing is fused."""

    name: str
    outputs: Share
    """The rows of the checkpoint's weight that this rank holds."""
    start: int
    """Where they begin among this linear's outputs."""


@dataclass(frozen=True, slots=True)
class LinearShape:
    """y = x W^T + b on this rank: W is [num_outputs, inputs.size], fused from `parts`."""

    parts: tuple[LinearPart, ...]
    inputs: Share
    has_bias: bool
    holds_bias: bool = True
    """Whether this rank adds the bias (in a row-parallel linear only the first does)."""

    @property
    def num_outputs(self) -> int:
        return sum(part.outputs.size for part in self.parts)

    def part(self, name: str) -> LinearPart:
        return next(part for part in self.parts if part.name == name)


class LinearMethod(ABC):
    """One linear's weights in one format."""

    @abstractmethod
    def create(self, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate. `dtype` is that of the activations."""

    @abstractmethod
    def load_shard(self, part: str, tensor: str, source: StoredTensor) -> None:
        """Copy this rank's part of one checkpoint tensor (`tensor`: `weight`, `bias`, `qweight`, ...).

        Names and shapes have been compared with `expected` before.
        """

    @abstractmethod
    def expected(self) -> ExpectedTensors:
        """The checkpoint tensors that this linear is made of."""

    def optional(self) -> frozenset[tuple[str, str]]:
        """Which of `expected` a checkpoint may lack."""
        return frozenset()

    def problem(self, part: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """What is wrong with a tensor as the checkpoint stores it, as far as `expected` cannot say it; None: nothing.

        Asked before anything is allocated or read.
        """
        return dtype_problem(dtype)

    def output_span(self, part: str, tensor: str) -> OutputSpan | None:
        """Where a tensor has the outputs; None: it is the same for all of them."""
        return OutputSpan(0)

    @abstractmethod
    def fill_random(self, source: RandomValues) -> None:
        """Fill with values that keep activations near unit scale (load_format dummy)."""

    @abstractmethod
    def finish(self) -> None:
        """Everything is loaded: bring it into the layout that `apply` wants."""

    @abstractmethod
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, inputs.size] -> [num_tokens, num_outputs]."""

    def writes_into(self) -> bool:
        """Whether `apply_into` and `apply_quantized_into` write there by themselves; else they copy."""
        return False

    def apply_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """`apply` into rows of a larger tensor, out [num_tokens, num_outputs]."""
        out.copy_(self.apply(x))

    def plain_weight(self) -> torch.Tensor | None:
        """W [num_outputs, inputs.size] in the model's dtype, where x W^T is all that `apply` computes; else None."""
        return None

    def row_quant(self) -> RowQuant | None:
        """What `apply` makes of each row first, where `apply_quantized` takes such rows; else None."""
        return None

    def apply_quantized(self, rows: QuantizedRows) -> torch.Tensor:
        """`apply` of rows that were quantized by `row_quant`."""
        raise NotImplementedError

    def apply_quantized_gated(self, rows: QuantizedRows, activation: str) -> torch.Tensor | None:
        """act(gate) * up of `apply_quantized`, [num_tokens, outputs / 2]; None: that is not one launch, or slower."""
        return None

    def apply_quantized_into(self, rows: QuantizedRows, out: torch.Tensor) -> None:
        out.copy_(self.apply_quantized(rows))

    @abstractmethod
    def num_bytes(self) -> int:
        """Memory that the weights hold."""


class RandomValues(Protocol):
    def fill(self, target: torch.Tensor, std: float) -> None:
        """Fill with zero-mean values of standard deviation `std`."""
        ...


class QuantScheme(Protocol):
    """Which method a linear gets."""

    @property
    def fused_experts_are_packed(self) -> bool:
        """Whether experts that a checkpoint stores in one tensor are blocks of MXFP4 there."""
        ...

    def linear_method(self, path: str) -> LinearMethod: ...
