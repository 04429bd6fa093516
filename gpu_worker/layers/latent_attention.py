"""Multi-head latent attention (DeepSeek-V2, 2024), computed on the compressed vectors themselves.

A token's keys and values are linear in one vector c of `kv_rank` numbers, plus one rotated key part that all heads
share. So a head's score q . (W_k c) is (W_k^T q) . c: the query is brought into c's space, attention runs over cached
[c | rotated part] as over one KV head, and the result is taken out by the head's W_v. Nothing is ever decompressed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_worker.layers.attention import ForwardContext
from gpu_worker.layers.indexer import Indexer
from gpu_worker.layers.linear import BuildContext, RowParallelLinear, column_parallel
from gpu_worker.layers.norm import RMSNorm
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import LatentSpec, ModelSpec
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.api import ExpectedTensors, RandomValues, StoredTensor

NORM_EPS = 1e-6
"""Of the norms within attention, whatever `rms_norm_eps` is."""


class HeadProjections(Weighted):
    """`kv_b_proj`: each head's W_k [nope_dim, kv_rank] and W_v [value_dim, kv_rank], one head after another."""

    def __init__(self, heads: Share, latent: LatentSpec, build: BuildContext) -> None:
        self._heads, self._latent = heads, latent
        self._rows = latent.nope_dim + latent.value_dim

        def empty(rows: int) -> torch.Tensor:
            return torch.empty(heads.size, rows, latent.kv_rank, dtype=build.dtype, device=build.device)

        self.keys = empty(latent.nope_dim)  # [heads, nope_dim, kv_rank]
        self.values = empty(latent.value_dim)  # [heads, value_dim, kv_rank]

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        rows = slice(self._heads.start * self._rows, self._heads.stop * self._rows)
        by_head = source.read((rows,)).unflatten(0, (self._heads.size, self._rows))
        self.keys.copy_(by_head[:, : self._latent.nope_dim])
        self.values.copy_(by_head[:, self._latent.nope_dim :])

    def expected(self) -> ExpectedTensors:
        return {("", "weight"): (self._heads.total * self._rows, self._latent.kv_rank)}

    def fill_random(self, source: RandomValues) -> None:
        for tensor in (self.keys, self.values):
            source.fill(tensor, std=self._latent.kv_rank**-0.5)

    def num_bytes(self) -> int:
        return (self.keys.numel() + self.values.numel()) * self.keys.element_size()


class LatentAttention:
    """`indexer`: what chooses the tokens that are attended to; None: all are, or those of a layer before."""

    def __init__(
        self,
        spec: ModelSpec,
        latent: LatentSpec,
        layer: int,
        rope: int,
        path: str,
        build: BuildContext,
        indexer: Indexer | None = None,
    ) -> None:
        heads = build.parallel.share(spec.num_heads, "num_attention_heads")
        self._latent, self._layer, self._rope, self._ops = latent, layer, rope, build.ops
        self._num_heads, self.indexer = heads.size, indexer

        def whole(size: int) -> Share:
            return Share(0, size, size)

        def of_heads(size: int) -> Share:
            return Share(heads.start * size, heads.size * size, heads.total * size)

        query_inputs = spec.hidden_size
        self.query_down, self.query_norm = None, None
        if latent.query_rank is not None:
            query_inputs = latent.query_rank
            self.query_down = column_parallel(
                spec.hidden_size,
                [("", whole(latent.query_rank))],
                bias=spec.qkv_bias,
                path=f"{path}.query_down",
                build=build,
            )
            self.query_norm = RMSNorm(latent.query_rank, NORM_EPS, build)
        self.query = column_parallel(
            query_inputs, [("", of_heads(latent.query_dim))], bias=False, path=f"{path}.query", build=build
        )
        self.latent_down = column_parallel(
            spec.hidden_size,
            [("", whole(latent.cached_dim))],
            bias=spec.qkv_bias,
            path=f"{path}.latent_down",
            build=build,
        )
        self.latent_norm = RMSNorm(latent.kv_rank, NORM_EPS, build)
        self.projections = HeadProjections(heads, latent, build)
        self.output = RowParallelLinear(
            of_heads(latent.value_dim),
            spec.hidden_size,
            bias=spec.attention_output_bias,
            path=f"{path}.output",
            build=build,
        )

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        if self.query_down is not None and self.query_norm is not None:
            yield "query_down", self.query_down
            yield "query_norm", self.query_norm
        yield "query", self.query
        yield "latent_down", self.latent_down
        yield "latent_norm", self.latent_norm
        yield "projections", self.projections
        yield "output", self.output
        if self.indexer is not None:
            for name, part in self.indexer.weighted():
                yield f"indexer.{name}", part

    def apply(self, entered: SublayerInput, context: ForwardContext) -> torch.Tensor:
        """entered [num_tokens, hidden] -> [num_tokens, hidden]."""
        x = entered.rows()
        latent, num_tokens = self._latent, x.shape[0]
        narrow = x
        if self.query_down is not None and self.query_norm is not None:
            narrow = self._ops.add_norm(None, self.query_down.apply(x), self.query_norm)
        if self.indexer is not None:
            self.indexer.choose(x, narrow, context)
        by_head = self.query.apply(narrow).view(num_tokens, self._num_heads, latent.query_dim)
        nope, rotated = by_head.split((latent.nope_dim, latent.rope_dim), dim=-1)
        # [heads, num_tokens, nope_dim] x [heads, nope_dim, kv_rank]
        moved = torch.bmm(nope.transpose(0, 1), self.projections.keys).transpose(0, 1)
        query = torch.cat((moved, rotated), dim=-1)  # [num_tokens, heads, kv_rank + rope_dim]
        if context.query_factors is not None:
            query.mul_(context.query_factors.unsqueeze(-1))
        down = self.latent_down.apply(x)  # [num_tokens, kv_rank + rope_dim]
        compressed = self._ops.add_norm(None, down[:, : latent.kv_rank], self.latent_norm)
        cached = torch.cat((compressed, down[:, latent.kv_rank :]), dim=-1)  # [num_tokens, kv_rank + rope_dim]
        attended = self._ops.attend_latent(
            query, cached, latent, self._layer, context.positions[self._rope], context.attention[0]
        )  # [num_tokens, heads, kv_rank]
        values = torch.bmm(attended.transpose(0, 1), self.projections.values.transpose(1, 2)).transpose(0, 1)
        return self.output.apply(values.reshape(num_tokens, -1))
