"""Latent attention over the tokens that an indexer chooses, against a float64 one that looks at a query at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.attention import indexed_backend
from gpu_worker.attention.api import AttentionSpec, StepMetadata
from gpu_worker.attention.indexed_backend import IndexedAttention, torch_attention
from gpu_worker.kv_cache import KVCache, KVCacheShape

BLOCK_SIZE, NUM_BLOCKS, NUM_CHOSEN = 4, 90, 6
NUM_HEADS, HEAD_DIM, VALUE_DIM, INDEX_HEADS, KEY_DIM = 3, 10, 7, 24, 5
SPEC = AttentionSpec(NUM_HEADS, 1, HEAD_DIM, 0.3, (None, None), value_dim=VALUE_DIM, num_chosen=NUM_CHOSEN)
SHAPE = KVCacheShape(2, 1, BLOCK_SIZE, HEAD_DIM, torch.float32, 1, index_layers=(0,), index_dim=KEY_DIM)
# Tokens in the cache, tokens of this step.
RUNS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=5)


class Sequences:
    """Random keys of every token of some rows, and a step that runs the last of them."""

    def __init__(self, runs: list[tuple[int, int]]) -> None:
        self.runs = sorted(runs, key=lambda run: run[1] != 1)
        generator = torch.Generator().manual_seed(3)
        lengths = [before + now for before, now in self.runs]

        def draw(*size: int) -> list[torch.Tensor]:
            return [torch.randn(length, *size, generator=generator) for length in lengths]

        self.keys, self.index_keys = draw(HEAD_DIM), draw(KEY_DIM)
        self.queries, self.index_queries = draw(NUM_HEADS, HEAD_DIM), draw(INDEX_HEADS, KEY_DIM)
        self.weights = draw(INDEX_HEADS)
        tables = np.random.default_rng(5).permutation(np.arange(1, NUM_BLOCKS))
        self.tables = tables[: 11 * len(runs)].reshape(len(runs), 11)

    def step(self, backend: IndexedAttention, spans: dict[int, tuple[int, int]]) -> dict[int, torch.Tensor]:
        """Run these positions of rows, through a layer that chooses and one that takes its choice."""
        order = sorted(spans, key=lambda row: spans[row][1] - spans[row][0] != 1)
        lengths = np.array([spans[row][1] - spans[row][0] for row in order])
        metadata = StepMetadata(
            num_decodes=int((lengths == 1).sum()),
            query_lengths=lengths,
            context_lengths=np.array([spans[row][1] for row in order]),
            block_tables=self.tables[order],
            positions=np.concatenate([np.arange(*spans[row]) for row in order]),
        )

        def part(of_rows: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([of_rows[row][slice(*spans[row])] for row in order])

        backend.plan(metadata)
        backend.choose(part(self.index_queries), part(self.index_keys), part(self.weights), 0)
        first, second = (backend.run(part(self.queries), part(self.keys)[:, None], None, layer) for layer in (0, 1))
        assert torch.equal(first, second)
        return dict(zip(order, first.split(lengths.tolist()), strict=True))

    def expected(self, row: int, position: int) -> torch.Tensor:
        def seen(of_rows: list[torch.Tensor]) -> torch.Tensor:
            return of_rows[row][: position + 1].double()

        by_head = (seen(self.index_keys) @ self.index_queries[row][position].double().T).relu()
        scores = by_head @ self.weights[row][position].double()
        best = scores.topk(min(NUM_CHOSEN, position + 1)).indices
        keys = seen(self.keys)[best]
        weights = (self.queries[row][position].double() @ keys.T * SPEC.scale).softmax(-1)
        return (weights @ keys[:, :VALUE_DIM]).flatten()


def run_all(runs: list[tuple[int, int]]) -> None:
    sequences = Sequences(runs)
    backend = torch_attention(SPEC, KVCache(SHAPE, NUM_BLOCKS, torch.device("cpu")), torch.float32)
    assert isinstance(backend, IndexedAttention)
    for row, (before, _) in enumerate(sequences.runs):
        if before:
            sequences.step(backend, {row: (0, before)})
    got = sequences.step(backend, {row: (before, before + now) for row, (before, now) in enumerate(sequences.runs)})
    for row, (before, now) in enumerate(sequences.runs):
        expected = torch.stack([sequences.expected(row, position) for position in range(before, before + now)])
        assert (got[row] - expected).abs().max() < 1e-5


@given(RUNS)
def test_a_query_attends_to_the_best_alone(runs: list[tuple[int, int]]) -> None:
    run_all(runs)


@pytest.mark.parametrize("tile_bytes", [1, 2_000])
def test_tiles_change_nothing(tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_backend, "TILE_BYTES", tile_bytes)
    run_all([(30, 1), (7, 1), (29, 1), (0, 12), (13, 9), (2, 3)])


def test_rows_of_very_different_lengths_are_scored_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_worker.attention.torch_backend.MAX_PADDING_TOKENS", 4)
    run_all([(40, 1), (1, 1), (2, 1), (0, 1)])


def test_tokens_are_chosen_in_latent_attention_alone() -> None:
    spec = AttentionSpec(2, 1, 8, 0.3, (None,), num_chosen=4)
    with pytest.raises(ValueError, match="latent attention alone"):
        IndexedAttention(spec, [torch.zeros(2, 3, 1, 4, 8)], {}, torch.float32)
