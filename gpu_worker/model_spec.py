"""What a model is, as read from its `config.json`: sizes and switches, no tensors, no ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """default | linear | llama3 | yarn"""
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    """Multiplies cos and sin; None: what the kind prescribes."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    sliding_window: int | None = None
    """Tokens a query sees, itself included; None: all before it."""


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
    rope: RopeSpec
    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    """The checkpoint's own, taken where a device is indifferent."""
    activation: str = "silu"
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over head_dim on every query and key head, before rope."""
    tie_word_embeddings: bool = False
    attention_softcap: float | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5
