"""The seam between a model's attention layers and what computes attention over the paged KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class KVHeads:
    """The heads of one layer's keys and values on one rank."""

    num_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """A model's attention on one rank. A layer is one that caches keys and values; others may read what it caches."""

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
    kv_heads: tuple[KVHeads, ...] = ()
    """One a layer where layers differ; none at all: they are `num_kv_heads` of `head_dim` everywhere."""
    shares_kv: bool = False
    """Some layers read what others have cached."""
    remakes_values: bool = False
    """Values are normed before they are cached, or are keys: a projection does not have them as they are."""

    @property
    def has_chunks(self) -> bool:
        return any(chunk is not None for chunk in self.chunks)

    def by_heads(self) -> list[tuple[AttentionSpec, list[int]]]:
        """The attention of each kind of KV heads, and the numbers of its layers; kinds as layers have them first."""
        if not self.kv_heads:
            return [(self, list(range(len(self.windows))))]
        kinds = []
        for heads in dict.fromkeys(self.kv_heads):
            layers = [layer for layer, own in enumerate(self.kv_heads) if own == heads]
            spec = replace(
                self,
                num_kv_heads=heads.num_heads,
                head_dim=heads.head_dim,
                windows=tuple(self.windows[layer] for layer in layers),
                chunks=tuple(self.chunks[layer] for layer in layers) if self.chunks else (),
                kv_heads=(),
            )
            kinds.append((spec, layers))
        return kinds


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
        where they are in the cache, because the kernel that applied rope has written them or because they are those of
        another layer; v is None too where keys are values (`value_dim`). sinks: float32 [num_heads]. Returns
        [num_tokens, num_heads * head_dim (or value_dim)].
        """
        ...


BackendT = TypeVar("BackendT", bound=AttentionBackend[Any], covariant=True)


@dataclass(frozen=True, slots=True)
class MixedHeads(Generic[BackendT]):
    """The attention of a model whose layers have KV heads of several kinds: a backend for each.

    A layer runs in its kind's backend, and is numbered among that kind's layers (`kv_places.KVPlace`).
    """

    kinds: tuple[BackendT, ...]

    def plan(self, step: Any) -> None:
        """As `AttentionBackend.plan`."""
        for backend in self.kinds:
            backend.plan(step)


def for_each_kind(
    spec: AttentionSpec, make: Callable[[AttentionSpec, list[int]], BackendT]
) -> BackendT | MixedHeads[BackendT]:
    """A model's attention, of which `make` makes the backend of one kind of KV heads and of the layers that have it."""
    kinds = tuple(make(kind, layers) for kind, layers in spec.by_heads())
    return kinds[0] if len(kinds) == 1 else MixedHeads(kinds)


ModelAttention = AttentionBackend[Any] | MixedHeads[Any]


def backends_of(attention: BackendT | MixedHeads[BackendT]) -> tuple[BackendT, ...]:
    """One for each kind of KV heads."""
    return attention.kinds if isinstance(attention, MixedHeads) else (attention,)


@runtime_checkable
class ChoosesTokens(Protocol):
    """An attention backend whose layers attend to some tokens alone, which an indexer chooses."""

    def choose(self, queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, layer: int) -> None:
        """Write the indexer's keys of this step into the cache, and choose for this layer's `run` and for those after.

        A token's score is the sum over heads of weight * relu(query . key). queries [num_tokens, heads, key_dim],
        keys [num_tokens, key_dim], both after rope; weights float32 [num_tokens, heads].
        """
        ...
