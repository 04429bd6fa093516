"""Where keys and values are: which of a rank's layers cache any, with what heads, and which read another's."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.attention.api import KVHeads
from gpu_worker.model_spec import ModelConfigError, ModelSpec
from gpu_worker.parallel.shares import ParallelContext


@dataclass(frozen=True, slots=True)
class KVPlace:
    """Where a layer's keys and values are on one rank."""

    kind: int
    """Which of the kinds of KV heads (`AttentionSpec.by_heads`)."""
    layer: int
    """Its number among the layers of that kind that cache."""


def caching_layers(spec: ModelSpec, parallel: ParallelContext) -> list[int]:
    """The layers of this rank that have keys and values of their own.

    Of a stage whose layers all keep states the first: blocks are counted on every stage, and attention planned.
    """
    held = parallel.layers(spec.num_layers)
    own = [layer for layer in held if spec.layers[layer].kv_source is None and not spec.layers[layer].keeps_state]
    return own or [held.start]


def kv_heads(spec: ModelSpec, parallel: ParallelContext) -> tuple[KVHeads, ...]:
    """This rank's KV heads of each of its caching layers."""
    return tuple(_heads_of(spec, parallel, layer) for layer in caching_layers(spec, parallel))


def differing_heads(spec: ModelSpec, parallel: ParallelContext) -> tuple[KVHeads, ...]:
    """`kv_heads` where they are not the model's everywhere, else none."""
    whole = parallel.heads(spec.num_heads, spec.num_kv_heads)
    heads = kv_heads(spec, parallel)
    return () if set(heads) <= {KVHeads(whole.kv.size, spec.head_dim)} else heads


def _heads_of(spec: ModelSpec, parallel: ParallelContext, layer: int) -> KVHeads:
    share = parallel.heads(spec.num_heads, spec.num_kv_heads_of(layer))
    return KVHeads(share.kv.size, spec.head_dim_of(layer))


def kv_place(spec: ModelSpec, parallel: ParallelContext, layer: int) -> KVPlace:
    """Of a layer that this rank holds, and whose keys and values it has (`check_kv_sources`)."""
    source = spec.layers[layer].kv_source
    source = layer if source is None else source
    own = _heads_of(spec, parallel, source)
    kinds = dict.fromkeys(kv_heads(spec, parallel))
    before = [other for other in caching_layers(spec, parallel) if other < source]
    return KVPlace(list(kinds).index(own), sum(_heads_of(spec, parallel, other) == own for other in before))


def check_kv_sources(spec: ModelSpec, parallel: ParallelContext) -> None:
    """Raises `ModelConfigError` where a layer of this pipeline stage attends to keys that another stage has cached."""
    held = parallel.layers(spec.num_layers)
    for layer in held:
        source = spec.layers[layer].kv_source
        if source is not None and source not in held:
            raise ModelConfigError(
                f"layer {layer} of {spec.architecture} attends to the keys and values of layer {source}, and the two "
                "are on different stages: set another --pipeline-parallel-size or --pipeline-parallel-layers, or 1"
            )
