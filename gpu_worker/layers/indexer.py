"""The indexer of DeepSeek sparse attention (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556): which tokens a query of
latent attention attends to.

Every token gets one small key. A query scores the tokens before it with several heads, sum over heads of
weight * relu(query . key), and attends to the best `num_chosen`. As in transformers: queries and keys are not
transformed by a Hadamard matrix before (which changes no product) nor rounded to float8, as the published code does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_worker.attention.api import ChoosesTokens
from gpu_worker.layers.attention import ForwardContext
from gpu_worker.layers.linear import BuildContext, column_parallel
from gpu_worker.layers.norm import LayerNorm
from gpu_worker.layers.ops import rotation_of
from gpu_worker.layers.weighted import PlainMatrix, Weighted
from gpu_worker.model_spec import IndexerSpec, ModelConfigError, ModelSpec
from gpu_worker.parallel.shares import Share

NORM_EPS = 1e-6


class HeadWeights(PlainMatrix):
    """What each head's score of a query counts, read off its hidden states; in float32, as in training."""

    def __init__(self, hidden_size: int, num_heads: int, build: BuildContext) -> None:
        super().__init__(num_heads, hidden_size, torch.float32, build.device)
        self._ops = build.ops

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, hidden] -> float32 [num_tokens, heads]."""
        return self._ops.linear(x.float(), self.weight, None)


class Indexer:
    """The same on every rank: all heads of attention share what it chooses. `rope` says which positions are its."""

    def __init__(
        self, spec: ModelSpec, indexer: IndexerSpec, layer: int, rope: int, path: str, build: BuildContext
    ) -> None:
        if spec.latent is None or spec.latent.query_rank is None:
            raise ValueError("an indexer reads the compressed query of latent attention")
        self._spec, self._layer, self._rope = indexer, layer, rope
        sizes = {"query": indexer.num_heads * indexer.key_dim, "key": indexer.key_dim}
        self.query, self.key = (
            column_parallel(inputs, [("", Share(0, size, size))], bias=False, path=f"{path}.{name}", build=build)
            for inputs, (name, size) in zip((spec.latent.query_rank, spec.hidden_size), sizes.items(), strict=True)
        )
        self.key_norm = LayerNorm(indexer.key_dim, NORM_EPS, build, bias=True)
        self.weights = HeadWeights(spec.hidden_size, indexer.num_heads, build)

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "query", self.query
        yield "key", self.key
        yield "key_norm", self.key_norm
        yield "weights", self.weights

    def choose(self, x: torch.Tensor, narrow: torch.Tensor, context: ForwardContext) -> None:
        """x [num_tokens, hidden], narrow [num_tokens, query_rank]: what attention's own queries are made of."""
        attention, heads = context.attention[0], self._spec.num_heads
        if not isinstance(attention, ChoosesTokens):
            raise TypeError(f"{type(attention).__name__} attends to all tokens, and this layer has chosen some")
        rotation = rotation_of(context.positions[self._rope])
        queries = rotation.apply(self.query.apply(narrow).unflatten(1, (heads, -1)))  # [num_tokens, heads, key_dim]
        keys = rotation.apply(self.key_norm.apply(self.key.apply(x)).unsqueeze(1)).squeeze(1)  # [num_tokens, key_dim]
        scale = (heads * self._spec.key_dim) ** -0.5
        attention.choose(queries, keys, self.weights.apply(x).mul_(scale), self._layer)


def check_stage(spec: ModelSpec, first_layer: int) -> None:
    """Raises `ModelConfigError` where a pipeline stage would begin with a layer that another stage chooses for."""
    if spec.indexer is not None and not spec.layers[first_layer].has_indexer:
        raise ModelConfigError(
            f"layer {first_layer} of {spec.architecture} attends to what a layer before it has chosen, and the two are "
            "on different stages: set another --pipeline-parallel-size, or 1"
        )
