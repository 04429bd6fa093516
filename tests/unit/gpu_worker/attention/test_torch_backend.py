"""Paged attention against a dense reference that knows neither blocks nor batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.attention.api import AttentionSpec, StepMetadata
from gpu_worker.attention.torch_backend import TorchAttention, group_by_length


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, spec: AttentionSpec, window: int | None
) -> torch.Tensor:
    """q [num_queries, heads, dim] at positions start.., k and v [num_keys, kv_heads, dim] from position 0; float64."""
    group = spec.num_heads // spec.num_kv_heads
    k = k.double().repeat_interleave(group, dim=1)
    v = v.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    queries = torch.arange(start, start + len(q))[:, None]
    keys = torch.arange(len(k))[None, :]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(q), -1)


@dataclass
class Sequence:
    """One row: its keys and values so far, and how many of them are in the cache before the step."""

    length: int
    num_queries: int
    blocks: list[int]


def run_case(
    sequences: list[Sequence],
    spec: AttentionSpec,
    block_size: int,
    num_blocks: int,
    dtype: torch.dtype = torch.float32,
    stale: float = 0.0,
    seed: int = 0,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer: (what the backend computes, the reference), with the context written by earlier steps."""
    generator = torch.Generator().manual_seed(seed)
    num_layers = len(spec.windows)
    caches = [
        torch.full((2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim), stale, dtype=dtype)
        for _ in range(num_layers)
    ]
    for cache in caches:
        cache[:, 0] = 0
    backend = TorchAttention(spec, caches, dtype)
    assert backend.supports(spec) is None

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    data = [
        [
            (normal(s.length, spec.num_kv_heads, spec.head_dim), normal(s.length, spec.num_kv_heads, spec.head_dim))
            for s in sequences
        ]
        for _ in range(num_layers)
    ]
    queries = [normal(s.num_queries, spec.num_heads, spec.head_dim) for s in sequences]
    width = max(len(s.blocks) for s in sequences)
    tables = np.zeros((len(sequences), width), dtype=np.int64)
    for row, s in enumerate(sequences):
        tables[row, : len(s.blocks)] = s.blocks

    def metadata(rows: list[int], starts: list[int], stops: list[int], num_decodes: int) -> StepMetadata:
        return StepMetadata(
            num_decodes=num_decodes,
            query_lengths=np.array(stops) - np.array(starts),
            context_lengths=np.array(stops),
            block_tables=tables[rows],
            positions=np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)]),
        )

    # The context comes into the cache row by row, through the backend's own writes.
    for row, s in enumerate(sequences):
        context = s.length - s.num_queries
        if context:
            backend.plan(metadata([row], [0], [context], int(context == 1)))
            for layer in range(num_layers):
                k, v = data[layer][row]
                backend.run(normal(context, spec.num_heads, spec.head_dim), k[:context], v[:context], layer)
    order = sorted(range(len(sequences)), key=lambda row: sequences[row].num_queries != 1)
    starts = [sequences[row].length - sequences[row].num_queries for row in order]
    num_decodes = sum(sequences[row].num_queries == 1 for row in order)
    backend.plan(metadata(order, starts, [sequences[row].length for row in order], num_decodes))
    results = []
    for layer in range(num_layers):
        q = torch.cat([queries[row] for row in order])
        k = torch.cat([data[layer][row][0][-sequences[row].num_queries :] for row in order])
        v = torch.cat([data[layer][row][1][-sequences[row].num_queries :] for row in order])
        got = backend.run(q, k, v, layer)
        expected = torch.cat(
            [
                dense_attention(queries[row], *data[layer][row], start, spec, spec.windows[layer])
                for row, start in zip(order, starts, strict=True)
            ]
        )
        results.append((got.double(), expected))
    return results


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Sequence], AttentionSpec, int, int]:
    block_size = draw(st.sampled_from([1, 3, 4, 16]))
    num_kv_heads = draw(st.integers(1, 3))
    window = st.one_of(st.none(), st.integers(1, 40))
    spec = AttentionSpec(
        num_heads=num_kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([8, 20])),
        scale=draw(st.sampled_from([0.35, 0.05])),
        windows=(draw(window), draw(window)),
        softcap=draw(st.sampled_from([None, 2.0])),
    )
    lengths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=7))
    sequences = [Sequence(length, draw(st.one_of(st.just(1), st.integers(1, length))), []) for length in lengths]
    num_blocks = 1 + sum(-(-s.length // block_size) for s in sequences) + 2
    pool = draw(st.permutations(range(1, num_blocks)))
    for s in sequences:
        count = -(-s.length // block_size)
        s.blocks, pool = list(pool[:count]), pool[count:]
    return sequences, spec, block_size, num_blocks


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([0.0, 1e4]))
def test_any_mixed_batch_equals_dense_attention(
    case: tuple[list[Sequence], AttentionSpec, int, int], stale: float
) -> None:
    sequences, spec, block_size, num_blocks = case
    for got, expected in run_case(sequences, spec, block_size, num_blocks, stale=stale):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 100])
def test_decodes_of_very_different_lengths_are_split_and_still_right(window: int | None) -> None:
    spec = AttentionSpec(4, 2, 16, 0.25, (window,))
    lengths = [3, 900, 17, 1, 450, 901, 64]
    sequences, next_block = [], 1
    for length in lengths:
        count = -(-length // 4)
        sequences.append(Sequence(length, 1, list(range(next_block, next_block + count))))
        next_block += count
    assert len(group_by_length(np.array([-(-length // 4) for length in lengths]), 4)) > 1
    for got, expected in run_case(sequences, spec, 4, next_block):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=40), st.sampled_from([1, 16]))
def test_groups_hold_every_row_once_and_pad_little(num_blocks: list[int], block_size: int) -> None:
    counts = np.array(num_blocks)
    groups = group_by_length(counts, block_size)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(counts)))
    for group in groups:
        padding = counts[group].max() * len(group) - counts[group].sum()
        assert padding * block_size <= 2048 or counts[group].min() * 2 >= counts[group].max()


def test_a_row_with_a_shared_prefix_reads_the_other_row_s_blocks() -> None:
    spec = AttentionSpec(2, 1, 8, 0.3, (None,))
    cache = torch.zeros(2, 8, 1, 4, 8)
    backend = TorchAttention(spec, [cache], torch.float32)
    torch.manual_seed(0)
    k, v = torch.randn(8, 1, 8), torch.randn(8, 1, 8)
    table = np.array([[5, 2, 0]])
    first = StepMetadata(0, np.array([8]), np.array([8]), table, np.arange(8))
    backend.plan(first)
    backend.run(torch.randn(8, 2, 8), k, v, 0)
    # Another row takes both blocks as its prefix and runs three tokens of its own.
    q, own_k, own_v = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    backend.plan(StepMetadata(0, np.array([3]), np.array([11]), np.array([[5, 2, 7]]), np.arange(8, 11)))
    got = backend.run(q, own_k, own_v, 0)
    expected = dense_attention(q, torch.cat((k, own_k)), torch.cat((v, own_v)), 8, spec, None)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_close() -> None:
    spec = AttentionSpec(9, 3, 64, 0.125, (None, 32))
    sequences = [Sequence(50, 1, [1, 2, 3, 4]), Sequence(40, 40, [5, 6, 7]), Sequence(33, 5, [8, 9, 10])]
    for got, expected in run_case(sequences, spec, 16, 12, dtype=torch.bfloat16):
        torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)


def test_heads_that_do_not_divide_are_refused_with_both_numbers() -> None:
    spec = AttentionSpec(4, 2, 8, 1.0, (None,))
    backend = TorchAttention(spec, [torch.zeros(2, 2, 2, 4, 8)], torch.float32)
    reason = backend.supports(AttentionSpec(5, 2, 8, 1.0, (None,)))
    assert reason is not None and "5" in reason and "2" in reason
