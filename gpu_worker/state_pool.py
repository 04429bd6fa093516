"""What layers of the gated delta rule keep of every row, beside the paged KV cache.

For each such layer: the last inputs of its convolution, [num_rows, conv_width - 1, channels], the oldest first, and a
matrix for every value head, float32 [num_rows, value_heads, key_dim, value_dim]. A row's place is its number in the
worker's table, whatever sequence has it: a run that begins at position 0 begins with zeros, so neither a new sequence
nor one that is computed again needs anything to be cleared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpu_worker.attention.api import StepMetadata
from gpu_worker.model_spec import GatedDeltaSpec, ModelSpec
from gpu_worker.parallel.shares import ParallelContext


@dataclass(frozen=True, slots=True)
class StateShape:
    """The states of one rank."""

    num_layers: int
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    dtype: torch.dtype
    """Of the convolution's inputs; the matrices are float32."""

    @classmethod
    def of(cls, spec: ModelSpec, parallel: ParallelContext, dtype: torch.dtype) -> StateShape | None:
        """None: no layer of the model keeps a state."""
        if spec.gated_delta is None:
            return None
        delta = spec.gated_delta
        heads = delta_heads(delta, parallel)
        num_layers = sum(spec.layers[layer].keeps_state for layer in parallel.layers(spec.num_layers))
        return cls(num_layers, *heads, delta.key_dim, delta.value_dim, delta.conv_width, dtype)

    @property
    def num_channels(self) -> int:
        """Queries, keys and values of a token."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def row_bytes(self) -> int:
        """Of one row, in all layers."""
        matrices = self.num_value_heads * self.key_dim * self.value_dim * torch.float32.itemsize
        return self.num_layers * (matrices + (self.conv_width - 1) * self.num_channels * self.dtype.itemsize)


def delta_heads(spec: GatedDeltaSpec, parallel: ParallelContext) -> tuple[int, int]:
    """Key heads of this rank, and value heads.

    Raises:
        ParallelError: they do not divide by the number of ranks.
    """
    key_heads = parallel.share(spec.num_key_heads, "linear_num_key_heads").size
    return key_heads, key_heads * spec.num_value_heads // spec.num_key_heads


@dataclass(frozen=True, slots=True)
class LayerStates:
    """One layer's part of a pool, for the step that is planned."""

    conv: torch.Tensor  # [num_rows, conv_width - 1, channels]
    matrices: torch.Tensor  # float32 [num_rows, value_heads, key_dim, value_dim]
    step: Any
    """`StepMetadata` where the host plans, `triton_backend.DeviceStep` where the device does."""


class StatePool:
    """The states of one worker's rows."""

    def __init__(self, shape: StateShape, num_rows: int, device: torch.device) -> None:
        self.shape = shape
        conv_size = (num_rows, shape.conv_width - 1, shape.num_channels)
        size = (num_rows, shape.num_value_heads, shape.key_dim, shape.value_dim)
        layers = range(shape.num_layers)
        self._conv = [torch.zeros(conv_size, dtype=shape.dtype, device=device) for _ in layers]
        self._matrices = [torch.zeros(size, dtype=torch.float32, device=device) for _ in layers]
        self._step: Any = None

    def plan(self, step: Any) -> None:
        """Before a step's forward pass; what a step is, is the affair of those who compute with the states.

        Raises:
            RuntimeError: it does not say which rows run.
        """
        self._step = step
        if not isinstance(step, StepMetadata):
            return
        if step.rows is None:
            raise RuntimeError("layers that keep states are not told which rows run")
        begin = step.rows[step.context_lengths == step.query_lengths]
        if len(begin):
            rows = torch.from_numpy(np.ascontiguousarray(begin)).to(self._conv[0].device if self._conv else "cpu")
            for states in (*self._conv, *self._matrices):
                states.index_fill_(0, rows, 0)

    def layer(self, number: int) -> LayerStates:
        """The `number`-th of this rank's layers that keep a state."""
        return LayerStates(self._conv[number], self._matrices[number], self._step)
