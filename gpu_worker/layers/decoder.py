"""The decoder that model families are composed from: attention, block, trunk. Flags are fields of `ModelSpec`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpu_worker.attention.api import AttentionBackend
from gpu_worker.layers.embedding import Embedding, OutputHead, VocabTable
from gpu_worker.layers.linear import BuildContext, RowParallelLinear, qkv_parallel
from gpu_worker.layers.mlp import GatedMLP
from gpu_worker.layers.norm import RMSNorm
from gpu_worker.layers.ops import AttentionHeads, StepPositions
from gpu_worker.layers.rope import RotaryTables
from gpu_worker.layers.weighted import Weighted
from gpu_worker.loading.kv_scales import KVScales
from gpu_worker.model_spec import ModelSpec
from gpu_worker.parallel import Share


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What a forward pass needs beside its hidden states; the attention backend has planned the step already."""

    attention: AttentionBackend[Any]
    positions: StepPositions


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The blocks' output, `residual + output`: not added up yet, because the final norm does that on the way."""

    output: torch.Tensor  # [num_tokens, hidden]
    residual: torch.Tensor  # [num_tokens, hidden]

    def select(self, tokens: torch.Tensor) -> HiddenStates:
        """Only these tokens' states, copied."""
        return HiddenStates(self.output.index_select(0, tokens), self.residual.index_select(0, tokens))


class Attention:
    """Grouped-query self-attention of one layer."""

    def __init__(self, spec: ModelSpec, layer: int, path: str, build: BuildContext) -> None:
        heads = build.parallel.heads(spec.num_heads, spec.num_kv_heads)
        self.qkv = qkv_parallel(
            spec.hidden_size, heads, spec.head_dim, bias=spec.qkv_bias, path=f"{path}.qkv", build=build
        )
        inputs = Share(
            heads.query.start * spec.head_dim, heads.query.size * spec.head_dim, heads.query.total * spec.head_dim
        )
        self.output = RowParallelLinear(
            inputs, spec.hidden_size, bias=spec.attention_output_bias, path=f"{path}.output", build=build
        )
        self.query_norm = RMSNorm(spec.head_dim, spec.norm_eps, build) if spec.qk_norm else None
        self.key_norm = RMSNorm(spec.head_dim, spec.norm_eps, build) if spec.qk_norm else None
        self._ops = build.ops
        self._heads = AttentionHeads(
            layer, heads.query.size, heads.kv.size, spec.head_dim, self.query_norm, self.key_norm
        )

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "qkv", self.qkv
        yield "output", self.output
        if self.query_norm is not None and self.key_norm is not None:
            yield "query_norm", self.query_norm
            yield "key_norm", self.key_norm

    def apply(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]."""
        qkv = self.qkv.apply(x)  # [num_tokens, (heads + 2 * kv_heads) * head_dim]
        return self.output.apply(self._ops.attend(qkv, self._heads, context.positions, context.attention))


class DecoderBlock:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, spec: ModelSpec, layer: int, build: BuildContext) -> None:
        path = f"layers.{layer}"
        self._ops = build.ops
        self.attention_norm = RMSNorm(spec.hidden_size, spec.norm_eps, build)
        self.attention = Attention(spec, layer, f"{path}.attention", build)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm_eps, build)
        self.mlp = GatedMLP(spec, f"{path}.mlp", build)

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "attention_norm", self.attention_norm
        for name, part in self.attention.weighted():
            yield f"attention.{name}", part
        yield "mlp_norm", self.mlp_norm
        for name, part in self.mlp.weighted():
            yield f"mlp.{name}", part

    def apply(self, output: torch.Tensor | None, residual: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """The output of the block before (None: there is none) and the residual, both [num_tokens, hidden].

        Returns this block's output; `residual` is updated in place and lacks only that.
        """
        normed = self._ops.add_norm(output, residual, self.attention_norm)
        attended = self.attention.apply(normed, context)
        return self.mlp.apply(self._ops.add_norm(attended, residual, self.mlp_norm))


class Decoder:
    """Embedding, blocks, final norm, output head."""

    kv_scales: tuple[KVScales, ...] | None = None
    """The checkpoint's scales for a float8 KV cache, one entry a layer; None: it has none."""

    def __init__(self, spec: ModelSpec, max_position: int, build: BuildContext) -> None:
        self.spec = spec
        self.dtype = build.dtype
        self.device = build.device
        self._ops = build.ops
        self.tables = RotaryTables.build(spec.rope, max_position, build.device)
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, build)
        self.blocks = [DecoderBlock(spec, layer, build) for layer in range(spec.num_layers)]
        self.final_norm = RMSNorm(spec.hidden_size, spec.norm_eps, build)
        table: VocabTable = self.embedding
        if not spec.tie_word_embeddings:
            table = VocabTable(spec.vocab_size, spec.hidden_size, build)
        self.head = OutputHead(table, build)

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        """Every layer that holds checkpoint tensors, by its path in this model."""
        yield "embedding", self.embedding
        for index, block in enumerate(self.blocks):
            for name, part in block.weighted():
                yield f"layers.{index}.{name}", part
        yield "final_norm", self.final_norm
        if self.head.table is not self.embedding:
            yield "head", self.head.table

    def finish(self) -> None:
        """Every weight is loaded and finished."""
        self.head.finish()

    def num_bytes(self) -> int:
        """Memory of this rank's weights."""
        return sum(part.num_bytes() for _, part in self.weighted()) + self.head.num_bytes()

    def hidden_states(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend[Any]
    ) -> HiddenStates:
        """token_ids, positions [num_tokens] -> what comes out of the blocks, before the final norm."""
        context = ForwardContext(attention, self._ops.prepare_positions(self.tables, positions, self.dtype))
        residual = self.embedding.lookup(token_ids)  # [num_tokens, hidden]
        output: torch.Tensor | None = None
        for block in self.blocks:
            output = block.apply(output, residual, context)
        if output is None:
            raise ValueError("a decoder needs at least one block: the config's num_hidden_layers is 0")
        return HiddenStates(output, residual)

    def logits(self, hidden: HiddenStates) -> torch.Tensor:
        """Of the rows to be sampled -> [num_rows, vocab_size]; their residual is overwritten."""
        return self.head.logits(self._ops.add_norm(hidden.output, hidden.residual, self.final_norm))
