"""The decoder that model families are composed from: attention, block, trunk. Flags are fields of `ModelSpec`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gpu_worker.attention.api import AttentionBackend
from gpu_worker.layers.embedding import Embedding, OutputHead, VocabTable
from gpu_worker.layers.linear import BuildContext, RowParallelLinear, qkv_parallel
from gpu_worker.layers.mlp import GatedMLP
from gpu_worker.layers.norm import RMSNorm
from gpu_worker.layers.rope import RotaryTables, StepRotation
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import ModelSpec
from gpu_worker.parallel import Share


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What a forward pass needs beside its hidden states; the attention backend has planned the step already."""

    attention: AttentionBackend
    rotation: StepRotation


class Attention:
    """Grouped-query self-attention of one layer."""

    def __init__(self, spec: ModelSpec, layer: int, path: str, build: BuildContext) -> None:
        heads = build.parallel.heads(spec.num_heads, spec.num_kv_heads)
        self._layer = layer
        self._num_heads, self._num_kv_heads, self._head_dim = heads.query.size, heads.kv.size, spec.head_dim
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

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "qkv", self.qkv
        yield "output", self.output
        if self.query_norm is not None and self.key_norm is not None:
            yield "query_norm", self.query_norm
            yield "key_norm", self.key_norm

    def apply(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]."""
        num_tokens, num_rotated = x.shape[0], self._num_heads + self._num_kv_heads
        qkv = self.qkv.apply(x).view(num_tokens, -1, self._head_dim)  # [num_tokens, heads + 2 * kv_heads, head_dim]
        if self.query_norm is not None and self.key_norm is not None:
            q = self.query_norm.apply(qkv[:, : self._num_heads])
            k = self.key_norm.apply(qkv[:, self._num_heads : num_rotated])
            rotated = context.rotation.apply(torch.cat((q, k), dim=1))
        else:
            rotated = context.rotation.apply(qkv[:, :num_rotated])  # [num_tokens, heads + kv_heads, head_dim]
        q, k, v = rotated[:, : self._num_heads], rotated[:, self._num_heads :], qkv[:, num_rotated:]
        return self.output.apply(context.attention.run(q, k, v, self._layer))


class DecoderBlock:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, spec: ModelSpec, layer: int, build: BuildContext) -> None:
        path = f"layers.{layer}"
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

    def apply(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """x [num_tokens, hidden], overwritten and returned."""
        x.add_(self.attention.apply(self.attention_norm.apply(x), context))
        return x.add_(self.mlp.apply(self.mlp_norm.apply(x)))


class Decoder:
    """Embedding, blocks, final norm, output head."""

    def __init__(self, spec: ModelSpec, max_position: int, build: BuildContext) -> None:
        self.spec = spec
        self.dtype = build.dtype
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
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend
    ) -> torch.Tensor:
        """token_ids, positions [num_tokens] -> the blocks' output [num_tokens, hidden], before the final norm."""
        context = ForwardContext(attention, self.tables.gather(positions, self.dtype))
        x = self.embedding.lookup(token_ids)  # [num_tokens, hidden]
        for block in self.blocks:
            x = block.apply(x, context)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [num_rows, hidden] of the rows to be sampled -> [num_rows, vocab_size]."""
        return self.head.logits(self.final_norm.apply(hidden))
