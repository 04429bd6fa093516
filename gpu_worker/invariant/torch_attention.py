"""Paged attention in plain torch whose results depend on a sequence's own tokens alone.

Queries stand in tiles of TILE_QUERIES positions, at multiples of it, and keys in chunks of a fixed size: which others a
token shares its tile and chunks with, and where in them it stands, follows from its position. A tile meets its chunks
one by one, in order, in products of one shape; queries that are not in this step are zeros, keys that a query must not
see have weight 0. A token alone, in a batch, in whatever chunk of a prompt: the same sums in the same order.

Source of the running softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.attention.api import AttentionSpec, StepMetadata
from gpu_worker.attention.torch_backend import IntArray, TorchAttention

TILE_QUERIES = 16
CHUNK_TOKENS = 128
# Below any score, and still a number: a chunk without a visible key leaves everything as it is.
LOWEST = -1e30


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some of the keys of one tile."""

    gather: torch.Tensor  # [2 * num_kv_heads * chunk_blocks] rows of the cache's (block, head) view
    hidden: torch.Tensor | None  # bool [group_size * TILE_QUERIES, chunk_tokens]; None: all are seen


@dataclass(frozen=True, slots=True)
class _Tile:
    """Neighbouring queries of one sequence."""

    tokens: slice
    first: int
    """Where the first of them stands in the tile."""
    chunks: dict[int | None, tuple[_Chunk, ...]]
    """By window."""


class TiledTorchAttention(TorchAttention):
    """Implements `AttentionBackend` on a CPU. Caches have two planes: latent attention is not served."""

    def __init__(self, spec: AttentionSpec, kv_caches: list[torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__(spec, kv_caches, dtype)
        self._chunk_blocks = max(1, CHUNK_TOKENS // self._block_size)
        self._chunk_tokens = self._chunk_blocks * self._block_size
        self._tiles: list[_Tile] = []

    def plan(self, step: StepMetadata) -> None:
        self._slots = self._to_device(self._write_slots(step))
        self._tiles = []
        first_token = 0
        for row, num_queries in enumerate(step.query_lengths.tolist()):
            stop = int(step.context_lengths[row])
            position = stop - num_queries
            while position < stop:
                tile_start = position // TILE_QUERIES * TILE_QUERIES
                end = min(stop, tile_start + TILE_QUERIES)
                tokens = slice(first_token, first_token + end - position)
                chunks = {
                    window: self._plan_chunks(step.block_tables[row], tile_start, position, end, window)
                    for window in set(self.spec.windows)
                }
                self._tiles.append(_Tile(tokens, position - tile_start, chunks))
                first_token, position = tokens.stop, end

    def _plan_chunks(
        self, table: IntArray, tile_start: int, start: int, stop: int, window: int | None
    ) -> tuple[_Chunk, ...]:
        """The chunks that the queries at positions start .. stop - 1 see any key of."""
        queries = np.repeat(np.arange(tile_start, tile_start + TILE_QUERIES)[None], self._group_size, 0).reshape(-1, 1)
        first = 0 if window is None else max(start - window + 1, 0) // self._chunk_tokens
        chunks = []
        for number in range(first, -(-stop // self._chunk_tokens)):
            keys = number * self._chunk_tokens + np.arange(self._chunk_tokens)
            hidden = (keys > queries) | (keys >= stop)
            if window is not None:
                hidden |= keys <= queries - window
            columns = number * self._chunk_blocks + np.arange(self._chunk_blocks)
            # Past the row's blocks: the scratch block, which is finite.
            is_known = columns < -(-stop // self._block_size)
            blocks = np.where(is_known, table[np.where(is_known, columns, 0)], 0)
            mask = self._to_device(hidden) if hidden.any() else None
            chunks.append(_Chunk(self._to_device(self._gather_rows(blocks)), mask))
        return tuple(chunks)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: int,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if k is None or v is None:
            raise ValueError("the torch attention backend writes the cache itself: it needs k and v")
        written = torch.cat((k, v)).to(self._cache_dtype)
        self._by_token[layer].index_copy_(0, self._slots, written.reshape(-1, self._head_dim))
        out = torch.empty(q.shape[0], q.shape[1] * self._head_dim, dtype=q.dtype, device=q.device)
        window = self.spec.windows[layer]
        if sinks is not None:
            sinks = sinks.view(self._num_kv_heads, self._group_size, 1)
            # [num_kv_heads, group_size * TILE_QUERIES, 1]
            sinks = sinks.expand(-1, -1, TILE_QUERIES).reshape(self._num_kv_heads, -1, 1)
        for tile in self._tiles:
            out[tile.tokens] = self._attend_tile(q[tile.tokens], tile, window, layer, sinks)
        return out

    def _attend_tile(
        self, q: torch.Tensor, tile: _Tile, window: int | None, layer: int, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """q [num_queries, num_heads, head_dim] -> [num_queries, num_heads * head_dim]."""
        kv_heads, group = self._num_kv_heads, self._group_size
        places = slice(tile.first, tile.first + q.shape[0])
        queries = torch.zeros(kv_heads, group, TILE_QUERIES, self._head_dim)
        queries[:, :, places] = q.view(-1, kv_heads, group, self._head_dim).permute(1, 2, 0, 3).float()
        queries = queries.view(kv_heads, -1, self._head_dim).mul_(self.spec.scale)
        top = torch.full((kv_heads, group * TILE_QUERIES, 1), LOWEST)
        total = torch.zeros_like(top)
        acc = torch.zeros_like(queries)
        for chunk in tile.chunks[window]:
            gathered = self._by_block[layer].index_select(0, chunk.gather).float()
            keys, values = gathered.view(2, kv_heads, self._chunk_tokens, self._head_dim)
            scores = torch.bmm(queries, keys.transpose(1, 2))  # [kv_heads, group * TILE_QUERIES, chunk_tokens]
            if self.spec.softcap is not None:
                scores = scores.div_(self.spec.softcap).tanh_().mul_(self.spec.softcap)
            if chunk.hidden is not None:
                scores.masked_fill_(chunk.hidden, float("-inf"))
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights = scores.sub_(new_top).exp_()
            old = torch.exp(top - new_top)
            total = total.mul_(old).add_(weights.sum(-1, keepdim=True))
            acc = acc.mul_(old).add_(torch.bmm(weights, values))
            top = new_top
        if sinks is not None:
            new_top = torch.maximum(top, sinks)
            old = torch.exp(top - new_top)
            total = total.mul_(old).add_(torch.exp(sinks - new_top))
            acc = acc.mul_(old)
        attended = acc.div_(total).view(kv_heads, group, TILE_QUERIES, self._head_dim)[:, :, places]
        return attended.permute(2, 0, 1, 3).reshape(q.shape[0], -1).to(q.dtype)
