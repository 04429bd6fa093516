"""The block of an encoder in BERT's order: norms stand after the sums, x = norm(x + attention(x)), norm(x + mlp(x))."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_worker.layers.attention import Attention, ForwardContext
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.mlp import PlainMLP
from gpu_worker.layers.norm import hidden_norm
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import ModelSpec


class EncoderBlock:
    def __init__(self, spec: ModelSpec, layer: int, build: BuildContext) -> None:
        path = f"layers.{layer}"
        self._ops = build.ops
        self.attention = Attention(spec, layer, 0, f"{path}.attention", build)
        self.mlp = PlainMLP(spec, f"{path}.mlp", build)
        self.attention_norm, self.mlp_norm = hidden_norm(spec, build), hidden_norm(spec, build)

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "attention_norm", self.attention_norm
        yield "mlp_norm", self.mlp_norm
        for name, part in self.attention.weighted():
            yield f"attention.{name}", part
        for name, part in self.mlp.weighted():
            yield f"mlp.{name}", part

    def apply(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]."""
        x = self.attention_norm.apply(x + self.attention.apply(SublayerInput.of(self._ops, x), context))
        return self.mlp_norm.apply(x + self.mlp.apply(SublayerInput.of(self._ops, x)))
