"""What a checkpoint format says about one linear: its tensors, which part of each a rank reads, what they mean.

A format is a value: two linears of equal formats can be fused. It knows nothing of devices, kernels or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from gpu_worker.parallel.shares import ParallelError, Share
from gpu_worker.quant.activations import ActivationQuant, StaticScale
from gpu_worker.quant.api import PLAIN_DTYPES, OutputSpan, RandomValues
from gpu_worker.quant.weights import QuantizedWeight

Shape = tuple[int, ...]
SCALAR: tuple[Shape, ...] = ((), (1,))
FLOAT_SCALES = PLAIN_DTYPES


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One stored tensor, whole: the shapes and element types it may have."""

    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


Rules = dict[str, TensorRule]
Tensors = dict[str, torch.Tensor]


class WeightFormat(ABC):
    """One way to store a linear. Implementations are frozen dataclasses."""

    activations: ActivationQuant | None = None
    """How the linear's input is quantized; None: it is not."""
    may_have_stray_bias: bool = False
    """Whether writers of this format store a bias (of zeros) for linears that have none."""

    @property
    @abstractmethod
    def marker(self) -> str:
        """The stored tensor by which a linear in this format is told from a plain one."""

    @abstractmethod
    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        """The stored tensors of a [num_outputs, num_inputs] weight, by name."""

    @abstractmethod
    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        """The part of a stored tensor that these rows and columns of the weight need (() for all of it)."""

    @abstractmethod
    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        """The weight's share from the parts that `index` cut out."""

    def output_span(self, tensor: str) -> OutputSpan | None:
        """Where a stored tensor has the outputs; None: it is the same for all of them."""
        return OutputSpan(0)

    def static_scale(self, tensors: Tensors) -> StaticScale | None:
        """The checkpoint's scale for the input."""
        return None

    @abstractmethod
    def random(
        self, num_outputs: int, num_inputs: int, std: float, source: RandomValues, device: torch.device
    ) -> QuantizedWeight:
        """Random values of about this standard deviation."""

    @abstractmethod
    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        """[N, K] of the whole weight, by the shapes of its stored tensors."""


def covering(share: Share, block: int) -> slice:
    """The blocks that a share of a dimension touches."""
    return slice(share.start // block, -(-share.stop // block))


def check_whole_groups(cols: Share, group_size: int) -> None:
    """Raises `ParallelError` where a share of the inputs cuts a group, whose codes or scales cannot be cut."""
    if cols.start % group_size or cols.size % group_size:
        raise ParallelError(
            f"inputs {cols.start} to {cols.stop} of {cols.total} are no whole groups of {group_size}: use another "
            "--tensor-parallel-size, or --enable-expert-parallel for experts"
        )


def as_scalar(tensor: torch.Tensor) -> torch.Tensor:
    """A stored scalar, [] or [1], as float32 []."""
    return tensor.float().reshape(())
