"""Latent attention over the tokens that an indexer chooses (`layers/indexer.py`), in plain torch on any device.

While no sequence of a step is longer than what is chosen, everything is chosen, and attention is as ever. Otherwise
every query gets a list of slots, and its attention gathers those alone. Whatever grows with queries and context
together is computed in tiles of queries, so that memory does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.attention.api import AttentionSpec, MixedHeads, StepMetadata, for_each_kind
from gpu_worker.attention.torch_backend import TorchAttention, group_by_length
from gpu_worker.kv_cache import KVCache
from gpu_worker.model_spec import IndexerSpec

TILE_BYTES = 128 << 20
"""Of one float32 tensor of a tile; some four are held at a time."""


@dataclass(frozen=True, slots=True)
class _Scored:
    """Rows that are scored together: several that run one token, or one that runs more."""

    queries: torch.Tensor  # [num_rows, num_queries]: which of the step's tokens they are
    positions: torch.Tensor  # [num_rows, num_queries]
    blocks: torch.Tensor  # [num_rows, max_blocks]


class IndexedAttention(TorchAttention):
    """Implements `ChoosesTokens`. `index_keys`: layer that chooses -> [num_blocks, block_size, key_dim]."""

    def __init__(
        self,
        spec: AttentionSpec,
        kv_caches: list[torch.Tensor],
        index_keys: Mapping[int, torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(spec, kv_caches, dtype)
        if spec.num_chosen is None or self._num_planes != 1:
            raise ValueError("tokens are chosen in latent attention alone")
        self._num_chosen = spec.num_chosen
        self._index_keys = dict(index_keys)
        self._scored: list[_Scored] = []
        # What the last layer with an indexer has chosen, until the next one does.
        self._chosen = torch.empty(0, dtype=torch.int32)  # [num_tokens, width] slots
        self._visible = torch.empty(0, dtype=torch.bool)  # [num_tokens, width]

    def plan(self, step: StepMetadata) -> None:
        longest = int(step.context_lengths.max())
        self._scored = []
        if longest <= self._num_chosen:
            super().plan(step)
            return
        self._slots = self._to_device(self._write_slots(step))
        self._scored = list(self._plan_scored(step))
        num_blocks = -(-longest // self._block_size)
        size = (len(step.positions), min(self._num_chosen, num_blocks * self._block_size))
        self._chosen = torch.zeros(size, dtype=torch.int32, device=self._device)
        self._visible = torch.zeros(size, dtype=torch.bool, device=self._device)

    def _plan_scored(self, step: StepMetadata) -> Iterator[_Scored]:
        num_blocks = -(-step.context_lengths // self._block_size)  # [num_rows]
        groups = group_by_length(num_blocks[: step.num_decodes], self._block_size) if step.num_decodes else []
        groups += [np.array([row]) for row in range(step.num_decodes, len(step.query_lengths))]
        first_tokens = np.cumsum(step.query_lengths) - step.query_lengths  # [num_rows]
        for rows in groups:
            columns = np.arange(int(num_blocks[rows].max()))
            # Beyond a row's own blocks the scratch block, whatever follows in the table.
            blocks = np.where(columns < num_blocks[rows, None], step.block_tables[rows][:, : len(columns)], 0)
            queries = first_tokens[rows, None] + np.arange(int(step.query_lengths[rows[0]]))
            yield _Scored(
                queries=self._to_device(queries),
                positions=self._to_device(step.positions[queries]),
                blocks=self._to_device(blocks),
            )

    def choose(self, queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, layer: int) -> None:
        cache = self._index_keys[layer]
        cache.view(-1, cache.shape[-1]).index_copy_(0, self._slots, keys.to(cache.dtype))
        for scored in self._scored:
            num_rows, num_queries = scored.queries.shape
            num_scores = scored.blocks.shape[1] * self._block_size * queries.shape[1]
            for rows in _tiles(num_rows, num_scores):
                blocks = scored.blocks[rows]  # [num_rows, max_blocks]
                # [num_rows, num_keys, key_dim]
                seen = cache.index_select(0, blocks.flatten()).view(len(blocks), -1, cache.shape[-1]).float()
                for tile in _tiles(num_queries, len(blocks) * num_scores):
                    tokens = scored.queries[rows, tile]  # [num_rows, num_queries]
                    scores = _scores(queries[tokens].float(), seen, weights[tokens])
                    self._keep_best(scores, scored.positions[rows, tile], blocks, tokens)

    def _keep_best(
        self, scores: torch.Tensor, positions: torch.Tensor, blocks: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """scores [num_rows, num_queries, num_keys]; positions and tokens [num_rows, num_queries]."""
        key_positions = torch.arange(scores.shape[-1], device=self._device)
        scores.masked_fill_(key_positions > positions.unsqueeze(-1), float("-inf"))
        best = scores.topk(min(self._num_chosen, scores.shape[-1]), sorted=False).indices  # [rows, queries, width]
        held = blocks.unsqueeze(1).expand(-1, best.shape[1], -1).gather(2, best // self._block_size)
        width = best.shape[-1]
        self._chosen[tokens, :width] = (held * self._block_size + best % self._block_size).int()
        self._visible[tokens, :width] = best <= positions.unsqueeze(-1)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: int,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self._scored:
            return super().run(q, k, v, layer, sinks=sinks)
        if k is None or v is not None or sinks is not None:
            raise ValueError("latent attention needs keys, which are its values, and knows no sinks")
        by_token = self._by_token[layer]
        by_token.index_copy_(0, self._slots, k.to(self._cache_dtype).reshape(-1, self._head_dim))
        num_tokens, num_heads, _ = q.shape
        out = torch.empty(num_tokens, num_heads * self._value_dim, dtype=q.dtype, device=q.device)
        num_numbers = self._chosen.shape[1] * max(num_heads, self._head_dim)
        for tile in _tiles(num_tokens, num_numbers):
            chosen = self._chosen[tile]  # [num_queries, width]
            # One KV head: [num_queries, 1, width, head_dim]
            keys = by_token.index_select(0, chosen.flatten()).view(len(chosen), 1, -1, self._head_dim).to(q.dtype)
            visible = self._visible[tile, None, None]
            attended = self._attend(
                q[tile].unsqueeze(1), keys, keys[..., : self._value_dim], visible, None, is_causal=False
            )
            out[tile] = attended.reshape(len(chosen), -1)
        return out


def torch_attention(
    spec: AttentionSpec, cache: KVCache, dtype: torch.dtype
) -> TorchAttention | MixedHeads[TorchAttention]:
    """The attention of a model in plain torch; `dtype` is that of its activations."""
    if spec.num_chosen is not None:
        return IndexedAttention(spec, cache.layers, cache.index_keys, dtype)
    return for_each_kind(spec, lambda kind, layers: TorchAttention(kind, [cache.layers[i] for i in layers], dtype))


def choice_bytes(indexer: IndexerSpec | None, max_num_batched_tokens: int) -> int:
    """What choosing and attending to what was chosen hold during a step."""
    if indexer is None:
        return 0
    num_slots = max_num_batched_tokens * indexer.num_chosen
    return 4 * TILE_BYTES + num_slots * (torch.int32.itemsize + torch.bool.itemsize)


def _scores(queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """queries [num_rows, num_queries, heads, key_dim], keys [num_rows, num_keys, key_dim], weights [.., .., heads] ->
    [num_rows, num_queries, num_keys]."""
    by_head = torch.matmul(queries, keys.transpose(1, 2).unsqueeze(1)).relu_()  # [rows, queries, heads, num_keys]
    return torch.matmul(weights.unsqueeze(-2), by_head).squeeze(-2)


def _tiles(num_queries: int, numbers_each: int) -> Iterator[slice]:
    """Slices of queries, each of which has so many float32 numbers of its own."""
    size = max(1, TILE_BYTES // (4 * numbers_each))
    return (slice(first, min(first + size, num_queries)) for first in range(0, num_queries, size))
