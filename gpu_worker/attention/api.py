"""The seam between a model's attention layers and what computes attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """A model's attention on one rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    windows: tuple[int | None, ...]
    """One a layer: tokens that a query sees, itself included; None: all before it."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) before the mask."""
    has_sinks: bool = False
    """`run` is given a logit for every head that joins the softmax's denominator."""
    value_dim: int | None = None
    """Latent attention: a key's leading dimensions that are its value; None: values are vectors of their own."""
    chunks: tuple[int | None, ...] = ()
    """One a layer, or none at all: a query sees the tokens of its own chunk of so many, up to itself."""
    num_chosen: int | None = None
    """Tokens that an indexer leaves a query to attend to; None: there is none."""

    @property
    def has_chunks(self) -> bool:
        return any(chunk is not None for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepMetadata:
    """Which tokens of a step belong to which sequence. Rows with one token come first; row means run here."""

    num_decodes: int
    """Leading rows that run exactly one token: token i of the step is row i."""
    query_lengths: npt.NDArray[np.int64]  # [num_rows]: tokens of this step
    context_lengths: npt.NDArray[np.int64]  # [num_rows]: tokens up to and with this step's last
    block_tables: npt.NDArray[np.int64]  # [num_rows, max_blocks]: padded with block 0
    positions: npt.NDArray[np.int64]  # [num_tokens]
    rows: npt.NDArray[np.int64] | None = None  # [num_rows]: which of the worker's; for models that keep more than KV


StepT_contra = TypeVar("StepT_contra", contravariant=True)


class AttentionBackend(Protocol[StepT_contra]):
    """Writes a step's keys and values into the cache and attends over it.

    What it is told of a step is its own affair: `StepMetadata` where the host plans, less where the device does.
    """

    def supports(self, spec: AttentionSpec) -> str | None:
        """None, or why this backend cannot do it."""
        ...

    def plan(self, step: StepT_contra) -> None:
        """Prepare what all layers of the step share. Called once a step, before any `run`."""
        ...

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: int,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer.

        q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim], after rope; k and v are None
        where the kernel that applied rope has written them into the cache; v is None too where keys are values
        (`value_dim`). sinks: float32 [num_heads]. Returns [num_tokens, num_heads * head_dim (or value_dim)].
        """
        ...


@runtime_checkable
class ChoosesTokens(Protocol):
    """An attention backend whose layers attend to some tokens alone, which an indexer chooses."""

    def choose(self, queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, layer: int) -> None:
        """Write the indexer's keys of this step into the cache, and choose for this layer's `run` and for those after.

        A token's score is the sum over heads of weight * relu(query . key). queries [num_tokens, heads, key_dim],
        keys [num_tokens, key_dim], both after rope; weights float32 [num_tokens, heads].
        """
        ...
