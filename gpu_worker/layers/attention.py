"""Grouped-query self-attention of one layer, with the norms of queries and keys that models put before rope."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpu_worker.attention.api import AttentionBackend
from gpu_worker.kv_places import kv_place
from gpu_worker.layers.linear import BuildContext, RowParallelLinear, qkv_parallel
from gpu_worker.layers.norm import EachHeadNorm, ProjectionNorm, RMSNorm, plain_norm
from gpu_worker.layers.ops import AttentionHeads, StepPositions
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import ModelSpec
from gpu_worker.parallel.shares import HeadShare, Share
from gpu_worker.quant.api import ExpectedTensors, RandomValues, StoredTensor
from gpu_worker.state_pool import StatePool


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What a forward pass needs beside its hidden states; the attention backend has planned the step already."""

    attention: tuple[AttentionBackend[Any], ...]
    """One for each kind of KV heads that the model has."""
    positions: tuple[StepPositions, ...]
    """One for each kind of rope that the model has."""
    query_factors: torch.Tensor | None = None  # [num_tokens, 1]
    """What the queries of each token are multiplied by; None: nothing."""
    states: StatePool | None = None
    """Of layers that keep one for each row; it has planned the step as well."""
    layer_inputs: torch.Tensor | None = None  # [num_tokens, num_layers, size]
    """What layers are given beside the residual; None: nothing."""


class Sinks(Weighted):
    """One logit for every query head of this rank."""

    def __init__(self, heads: Share, build: BuildContext) -> None:
        self._heads = heads
        self.logits = torch.empty(heads.size, dtype=torch.float32, device=build.device)  # [num_heads]

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        self.logits.copy_(source.read((self._heads.as_slice(),)))

    def expected(self) -> ExpectedTensors:
        return {("", "sinks"): (self._heads.total,)}

    def fill_random(self, source: RandomValues) -> None:
        source.fill(self.logits, std=1.0)

    def num_bytes(self) -> int:
        return self.logits.numel() * self.logits.element_size()


class Attention:
    """`layer`: its number in the model. `rope` says which of the context's positions are this layer's."""

    def __init__(self, spec: ModelSpec, layer: int, rope: int, path: str, build: BuildContext) -> None:
        own = spec.layers[layer]
        heads = build.parallel.heads(spec.num_heads, spec.num_kv_heads_of(layer))
        head_dim, is_rotated = spec.head_dim_of(layer), own.rope is not None
        reads_cached = own.kv_source is not None
        self._has_gate = spec.attention_gate
        self.qkv = qkv_parallel(
            spec.hidden_size,
            heads,
            head_dim,
            bias=spec.qkv_bias,
            path=f"{path}.qkv",
            build=build,
            parts="q" if reads_cached else "qk" if own.keys_are_values else "qkv",
            query_dim=2 * head_dim if self._has_gate else None,
        )
        inputs = Share(heads.query.start * head_dim, heads.query.size * head_dim, heads.query.total * head_dim)
        self.output = RowParallelLinear(
            inputs, spec.hidden_size, bias=spec.attention_output_bias, path=f"{path}.output", build=build
        )
        self.sinks = Sinks(heads.query, build) if spec.attention_sinks else None
        self._rope = rope
        self._ops = build.ops
        self._num_query_columns, self._num_key_columns = inputs.size, heads.kv.size * head_dim
        scaling = spec.query_scaling
        self._scales_queries = scaling is not None and not (scaling.unrotated_only and is_rotated)
        self._add_norms(spec, head_dim, heads, build, is_rotated=is_rotated, reads_cached=reads_cached)
        place = kv_place(spec, build.parallel, layer)
        self._kind = place.kind
        self._heads = AttentionHeads(
            place.layer,
            heads.query.size,
            heads.kv.size,
            head_dim,
            query_norm=self.head_norms[0],
            key_norm=self.head_norms[1],
            sinks=None if self.sinks is None else self.sinks.logits,
            value_norm=plain_norm(head_dim, spec.norm_eps, build) if spec.value_norm and not reads_cached else None,
            keys_are_values=own.keys_are_values,
            reads_cached=reads_cached,
        )

    def _add_norms(
        self,
        spec: ModelSpec,
        head_dim: int,
        heads: HeadShare,
        build: BuildContext,
        *,
        is_rotated: bool,
        reads_cached: bool,
    ) -> None:
        """Norms of single heads go with rope into one kernel, others come before."""
        self.head_norms: tuple[RMSNorm | None, RMSNorm | None] = (None, None)
        self.wide_norms: tuple[ProjectionNorm | EachHeadNorm, ...] = ()
        self._norms_are_stored = spec.qk_norm != "rotated"
        if spec.qk_norm == "rotated":
            if is_rotated:
                self.head_norms = (plain_norm(head_dim, spec.norm_eps, build),) * 2
        elif spec.qk_norm == "head":
            query, key = (
                RMSNorm(head_dim, spec.norm_eps, build, weight_offset=spec.norm_weight_offset) for _ in range(2)
            )
            self.head_norms = (query, None if reads_cached else key)
        elif spec.qk_norm is not None:
            kind = ProjectionNorm if spec.qk_norm == "projection" else EachHeadNorm
            self.wide_norms = tuple(
                kind(share.size, share.total, share.start, spec, build) for share in (heads.query, heads.kv)
            )

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "qkv", self.qkv
        yield "output", self.output
        norms = self.head_norms if self.head_norms[0] is not None else self.wide_norms
        for name, norm in zip(("query_norm", "key_norm"), norms, strict=False):
            if norm is not None and self._norms_are_stored:
                yield name, norm
        if self.sinks is not None:
            yield "sinks", self.sinks

    def apply(self, x: SublayerInput, context: ForwardContext) -> torch.Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]."""
        qkv = x.through(self.qkv)  # [num_tokens, num_projected * head_dim]
        gates: torch.Tensor | None = None  # [num_tokens, heads, head_dim]
        if self._has_gate:
            num_heads, head_dim = self._heads.num_heads, self._heads.head_dim
            gates = qkv[:, : 2 * self._num_query_columns].unflatten(1, (num_heads, 2, head_dim))[:, :, 1]
            qkv = self._ops.without_gates(qkv, num_heads, head_dim)
        if self.wide_norms:
            query_norm, key_norm = self.wide_norms
            query_norm.apply_(qkv[:, : self._num_query_columns])
            key_norm.apply_(qkv[:, self._num_query_columns :][:, : self._num_key_columns])
        if context.query_factors is not None and self._scales_queries:
            # Before rotation, which it does not change.
            qkv[:, : self._num_query_columns].mul_(context.query_factors)
        attention = context.attention[self._kind]
        attended = self._ops.attend(qkv, self._heads, context.positions[self._rope], attention)
        return self.output.apply(attended if gates is None else self._ops.gate_heads(attended, gates))
