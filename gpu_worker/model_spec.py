"""What a model is, as read from its `config.json`: sizes and switches, no tensors, no ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch


class ModelConfigError(ValueError):
    """A `config.json` that cannot be served. The message names the field, its value and what would work."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of a model (or of one kind of its layers)."""

    theta: float
    rotary_dim: int
    """Leading dimensions of a head that are rotated; the rest passes through."""
    kind: str = "default"
    """default | linear | llama3 | yarn | longrope | proportional"""
    interleaved: bool = False
    """Pairs are neighbours (2i, 2i + 1), not (i, i + rotary_dim / 2)."""
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    """Multiplies cos and sin; None: what the kind prescribes."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisors of each frequency where sequences stay within the original length."""
    long_factors: tuple[float, ...] = ()
    """longrope: those for a server that takes longer ones."""
    rotated_share: float = 1.0
    """proportional: the share of pairs that turn, at the frequencies of a whole head; the others stand still."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    rope: RopeSpec | None
    """None: positions are not encoded in this layer (NoPE)."""
    sliding_window: int | None = None
    """Tokens a query sees, itself included; None: all before it."""
    attention_chunk: int | None = None
    """A query sees the tokens of its own chunk of so many alone, up to itself (Llama 4); None: there are no chunks."""
    is_moe: bool = False
    """The MLP is a mixture of experts, as `ModelSpec.moe` says."""
    has_indexer: bool = False
    """It chooses the tokens that it and the layers behind it without an indexer attend to."""
    keeps_state: bool = False
    """The gated delta rule stands in the place of attention, as `ModelSpec.gated_delta` says; nothing is cached."""
    num_kv_heads: int | None = None
    """None: the model's, as for the two that follow."""
    head_dim: int | None = None
    intermediate_size: int | None = None
    kv_source: int | None = None
    """The layer before it whose keys and values it attends to, with the same heads and the same window; None: it has
    its own."""
    keys_are_values: bool = False
    """A value is its key, as it was projected: before norm and rotation."""


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of experts: how a token's experts are chosen and weighted, and how large they are."""

    num_experts: int
    num_chosen: int
    intermediate_size: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """What the router's logits become."""
    renormalize: bool = False
    """The chosen experts' scores are divided by their sum."""
    scale: float = 1.0
    """Multiplies the weights at last."""
    num_groups: int = 1
    """Experts are chosen from the `num_chosen_groups` best of so many groups."""
    num_chosen_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    """A group is as good as its best expert, or as the sum of its best two."""
    has_correction_bias: bool = False
    """A stored bias joins the scores for choosing, not for weighting."""
    router_bias: bool = False
    expert_bias: bool = False
    storage: Literal["each", "fused", "stacked", "transposed"] = "each"
    """In the checkpoint: expert by expert, or all of a layer in one tensor: transposed with gate and up interleaved
    (`fused`), as linears have them or transposed with gate before up (`stacked`), always transposed (`transposed`)."""
    activation: str = "silu"
    shared_intermediate_size: int = 0
    """An expert that every token takes; 0: there is none."""
    has_shared_gate: bool = False
    """The shared expert's output is multiplied by sigmoid of a learnt projection."""
    scales_inputs: bool = False
    """The weight multiplies what an expert reads, not what it gives (Llama 4); of one chosen expert only."""
    beside_mlp: bool = False
    """A layer has its dense MLP as well: both read the residual through norms of their own, and what the two give,
    normed, is added (Gemma 4). The router reads the residual, normed and scaled, and every expert has a weight of its
    own, by which it counts."""


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2): what is cached is one compressed vector a token."""

    query_rank: int | None
    """Width of the compressed query; None: queries are projected at once."""
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    @property
    def cached_dim(self) -> int:
        return self.kv_rank + self.rope_dim

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True, slots=True)
class IndexerSpec:
    """Sparse attention (DeepSeek-V3.2, 2025): a small scorer chooses the tokens that a query attends to."""

    num_heads: int
    key_dim: int
    """Of its own keys, which are cached beside what attention caches."""
    num_chosen: int
    rope: RopeSpec


@dataclass(frozen=True, slots=True)
class GatedDeltaSpec:
    """Layers of the gated delta rule (Yang et al., 2024) behind a short convolution: what they keep of a sequence is a
    matrix for every value head, and the last inputs of the convolution."""

    num_key_heads: int
    num_value_heads: int
    """A multiple: each key head serves as many neighbours."""
    key_dim: int
    value_dim: int
    conv_width: int
    """Tokens that the convolution sees, the present one included."""
    is_grouped: bool
    """In the checkpoint one linear gives queries, keys, values and gates, key head by key head; else they are apart."""

    @property
    def num_inputs(self) -> int:
        """Queries, keys, values and gates of a token."""
        return 2 * (self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim)


@dataclass(frozen=True, slots=True)
class LayerInputSpec:
    """Per-layer embeddings (Gemma 3n, 2025): a small vector for every token and layer, looked up and projected from
    the token's embedding, that each layer mixes in at its end."""

    size: int
    """Numbers that a layer gets."""
    num_unused: int = 0
    """Stored rows of the table behind those of the vocabulary."""


@dataclass(frozen=True, slots=True)
class QueryScaling:
    """Queries grow with their position: by 1 + weight * log(1 + floor((position + first) / period))."""

    weight: float
    period: int
    first: int = 0
    unrotated_only: bool = False
    """Only in layers without rope."""


QkNorm = Literal["head", "each_head", "projection", "rotated"]
"""RMSNorm over head_dim with one weight for all heads; LayerNorm over head_dim with each head's own weight; RMSNorm
over all heads together; RMSNorm over head_dim without a weight, in layers with rope only. On queries and keys, before
rope (without a weight it is the same after it)."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only model, whole (not one rank's part)."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    """The checkpoint's own, taken where a device is indifferent."""
    activation: str = "silu"
    gated_mlp: bool = True
    """down(act(gate) * up), else down(act(up))."""
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm | None = None
    value_norm: bool = False
    """RMSNorm over head_dim without a weight, on values."""
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_weight_offset: float = 0.0
    """1 where norms multiply by 1 + weight (Gemma)."""
    pre_norms: bool = True
    """Norms before attention and MLP."""
    post_norms: bool = False
    """Norms after attention and MLP, before their output joins the residual."""
    parallel_block: bool = False
    """Attention and MLP read the same norm, and their sum joins the residual."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Multiplies what attention and MLP add to the residual."""
    layer_scales: bool = False
    """A stored number multiplies what each layer gives."""
    layer_inputs: LayerInputSpec | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap)."""
    num_unused_embeddings: int = 0
    """Stored rows of the embedding table behind those of the vocabulary."""
    tie_word_embeddings: bool = False
    softmax_scale: float | None = None
    """Multiplies attention scores; None: head_dim ** -0.5."""
    query_scaling: QueryScaling | None = None
    attention_gate: bool = False
    """What a head attended to is multiplied by sigmoid of a gate, which is stored behind the head's query."""
    attention_softcap: float | None = None
    attention_sinks: bool = False
    """A learnt logit for every head joins the softmax's denominator."""
    has_output_head: bool = True
    """Draws tokens; without it the last hidden states are what the model is for."""
    num_labels: int = 0
    """Outputs of a classification head; 0: it has none."""
    position_offset: int = 0
    """Learnt positions: rows of their table before that of position 0."""
    num_segments: int = 1
    """Texts that the model tells apart in one sequence."""
    moe: MoeSpec | None = None
    latent: LatentSpec | None = None
    indexer: IndexerSpec | None = None
    """Of latent attention; None: a query attends to everything before it."""
    gated_delta: GatedDeltaSpec | None = None
    """Of the layers that keep a state."""
    eos_token_ids: tuple[int, ...] = field(default=())
    row_state_bytes: int = 0
    """What layers keep for a row beside keys and values."""
    row_cache_dim: int = 0
    """Numbers that rows hold of each of their tokens in caches of their own; blocks are counted for them."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def head_dim_of(self, layer: int) -> int:
        """Of this layer's heads."""
        return self.layers[layer].head_dim or self.head_dim

    def num_kv_heads_of(self, layer: int) -> int:
        """Of this layer, or of the one whose keys and values it attends to."""
        return self.layers[layer].num_kv_heads or self.num_kv_heads

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    def layer_weights(self) -> list[int]:
        """Weights of each layer that a token is multiplied with; of experts, those that it chooses."""
        return [self._attention_weights(layer) + self._mlp_weights(own) for layer, own in enumerate(self.layers)]

    def _attention_weights(self, layer: int) -> int:
        own = self.layers[layer]
        if own.keeps_state and self.gated_delta is not None:
            delta = self.gated_delta
            return self.hidden_size * (delta.num_inputs + delta.num_value_heads * (2 + delta.value_dim))
        projections = 0 if own.kv_source is not None else 1 if own.keys_are_values else 2
        query_parts = 3 if self.attention_gate else 2
        num_heads = query_parts * self.num_heads + projections * self.num_kv_heads_of(layer)
        return self.hidden_size * self.head_dim_of(layer) * num_heads

    def _mlp_weights(self, layer: LayerSpec) -> int:
        dense = (3 if self.gated_mlp else 2) * self.hidden_size * (layer.intermediate_size or self.intermediate_size)
        mixed_in = 0 if self.layer_inputs is None else 3 * self.hidden_size * self.layer_inputs.size
        if not layer.is_moe or self.moe is None:
            return dense + mixed_in
        width = self.moe.num_chosen * self.moe.intermediate_size + self.moe.shared_intermediate_size
        experts = 3 * self.hidden_size * width
        return experts + mixed_in + (dense if self.moe.beside_mlp else 0)
