"""Attention of whole steps against its formula in float64: decodes, longer runs and both, over scattered blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_worker.attention.api import AttentionSpec, StepMetadata
from gpu_worker.cpu.attention import CpuAttention
from gpu_worker.cpu.layout import SPAN_KEYS
from gpu_worker.cpu.team import Team
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.norm import RMSNorm, plain_norm
from gpu_worker.layers.ops import AttentionHeads
from gpu_worker.layers.rope import RotaryTables
from gpu_worker.model_spec import RopeSpec
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.quant.none import Unquantized

MAX_POSITION = 1024


@dataclass(frozen=True)
class Case:
    group: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    runs: tuple[tuple[int, int], ...]
    """(context before the step, tokens of the step), runs of one token first."""
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    has_norms: bool = False
    rotary_dim: int | None = None
    interleaved: bool = False
    norms_values: bool = False
    keys_are_values: bool = False
    seed: int = 0

    @property
    def num_heads(self) -> int:
        return self.group * self.num_kv_heads


@st.composite
def cases(draw: Any) -> Case:
    decodes = draw(st.lists(st.tuples(st.integers(0, 2 * SPAN_KEYS + 40), st.just(1)), max_size=5))
    longer = draw(st.lists(st.tuples(st.integers(0, 70), st.integers(2, 45)), max_size=2))
    head_dim = 2 * draw(st.integers(2, 40))
    return Case(
        group=draw(st.integers(1, 5)),
        num_kv_heads=draw(st.integers(1, 3)),
        head_dim=head_dim,
        block_size=draw(st.sampled_from([1, 3, 16, 64])),
        runs=tuple(decodes + longer) or ((5, 1),),
        window=draw(st.none() | st.integers(1, 300)),
        softcap=draw(st.none() | st.just(3.0)),
        has_sinks=draw(st.booleans()),
        has_norms=draw(st.booleans()),
        rotary_dim=draw(st.none() | st.integers(1, head_dim // 2).map(lambda pairs: 2 * pairs)),
        interleaved=draw(st.booleans()),
        norms_values=draw(st.booleans()),
        keys_are_values=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


class Built:
    """A case with its tensors: the cache holds the contexts, NaN where no token is, but for the scratch block."""

    def __init__(self, case: Case, team: Team) -> None:
        self.case = case
        self._generator = torch.Generator().manual_seed(case.seed)
        rope = RopeSpec(theta=1000.0, rotary_dim=case.rotary_dim or case.head_dim, interleaved=case.interleaved)
        self.tables = RotaryTables.build(rope, MAX_POSITION, torch.device("cpu"))
        build = BuildContext(ParallelContext(), Unquantized(), torch.bfloat16, torch.device("cpu"))
        norms = [RMSNorm(case.head_dim, 1e-5, build, weight_offset=0.5) for _ in range(2)]
        for norm in norms:
            norm.weight.copy_(self.random(case.head_dim))
        self.norms = norms if case.has_norms else None
        self.sinks = self.random(case.num_heads).float() if case.has_sinks else None
        self.heads = AttentionHeads(
            0, case.num_heads, case.num_kv_heads, case.head_dim,
            query_norm=norms[0] if case.has_norms else None,
            key_norm=norms[1] if case.has_norms else None,
            sinks=self.sinks,
            value_norm=plain_norm(case.head_dim, 1e-5, build) if case.norms_values else None,
            keys_are_values=case.keys_are_values,
        )  # fmt: skip
        spec = AttentionSpec(
            case.num_heads, case.num_kv_heads, case.head_dim, case.head_dim**-0.5, (case.window,), case.softcap,
            case.has_sinks,
        )  # fmt: skip
        self._fill_cache()
        self.step = self._step()
        self.attention = CpuAttention(spec, [self.cache], torch.bfloat16, team)
        num_tokens = len(self.step.positions)
        self.qkv = self.random(num_tokens, self.heads.num_projected * case.head_dim)

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self._generator).bfloat16()

    def _fill_cache(self) -> None:
        case = self.case
        counts = [-(-(context + count) // case.block_size) for context, count in case.runs]
        ids = torch.randperm(sum(counts), generator=self._generator) + 1
        self.blocks = [part.tolist() for part in ids.split(counts)]
        size = (2, sum(counts) + 1, case.num_kv_heads, case.block_size, case.head_dim)
        self.cache = torch.full(size, float("nan"), dtype=torch.bfloat16)
        self.cache[:, 0] = 0
        self.contexts = []
        for (context, _), blocks in zip(case.runs, self.blocks, strict=True):
            kept = self.random(2, context, case.num_kv_heads, case.head_dim)
            self.contexts.append(kept.double())
            for position in range(context):
                block, offset = blocks[position // case.block_size], position % case.block_size
                self.cache[:, block, :, offset] = kept[:, position]

    def _step(self) -> StepMetadata:
        runs = self.case.runs
        tables = np.zeros((len(runs), max(len(blocks) for blocks in self.blocks) + 1), dtype=np.int64)
        for row, blocks in enumerate(self.blocks):
            tables[row, : len(blocks)] = blocks
        return StepMetadata(
            num_decodes=sum(count == 1 for _, count in runs),
            query_lengths=np.array([count for _, count in runs]),
            context_lengths=np.array([context + count for context, count in runs]),
            block_tables=tables,
            positions=np.concatenate([np.arange(context, context + count) for context, count in runs]),
        )

    def attend(self) -> torch.Tensor:
        self.attention.plan(self.step)
        return self.attention.attend(self.qkv, self.heads, self.tables)

    def rotated(self, x: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
        """x [num_tokens, heads, head_dim] in float64, as the formula has it."""
        x = x.double()
        if norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (norm.weight.double() + 0.5)
        pairs = self.tables.cos.shape[1]
        cos, sin = (table[self.step.positions].double().unsqueeze(1) for table in (self.tables.cos, self.tables.sin))
        first = slice(0, 2 * pairs, 2) if self.case.interleaved else slice(0, pairs)
        second = slice(1, 2 * pairs, 2) if self.case.interleaved else slice(pairs, 2 * pairs)
        out = x.clone()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out

    def values(self) -> torch.Tensor:
        """What is cached of this step's tokens, in float64 [num_tokens, kv_heads, head_dim]."""
        values = self.qkv.view(len(self.qkv), -1, self.case.head_dim)[:, -self.case.num_kv_heads :].double()
        if self.case.norms_values:
            values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-5)
        return values.bfloat16().double()

    def expected(self) -> torch.Tensor:
        case = self.case
        heads = self.qkv.view(len(self.qkv), -1, case.head_dim)
        query_norm, key_norm = self.norms or (None, None)
        q = self.rotated(heads[:, : case.num_heads], query_norm)
        k = self.rotated(heads[:, case.num_heads : case.num_heads + case.num_kv_heads], key_norm)
        v = self.values()
        out, token = [], 0
        for (_, count), context in zip(case.runs, self.contexts, strict=True):
            part = slice(token, token + count)
            token += count
            keys = torch.cat((context[0], k[part].bfloat16().double()))
            values = torch.cat((context[1], v[part]))
            out.append(self._attended(q[part], keys, values))
        return torch.cat(out).flatten(1)

    def _attended(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """q [count, heads, head_dim], the last of keys and values [context + count, kv_heads, head_dim]."""
        case = self.case
        keys, values = (x.repeat_interleave(case.group, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * case.head_dim**-0.5
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        places = torch.arange(len(keys))
        own = places[-len(q) :, None]
        hidden = places > own
        if case.window is not None:
            hidden = hidden | (places <= own - case.window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks.double().view(-1, 1, 1).expand(-1, len(q), 1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = scores.softmax(-1)[..., : len(keys)]
        return torch.einsum("hqk,khd->qhd", weights, values)


def check(case: Case, team: Team) -> None:
    built = Built(case, team)
    expected = built.expected()
    actual = built.attend()
    # What bfloat16 rounds of the result, and of the keys just written.
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=4e-3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_step_equals_the_formula(case: Case, team: Team) -> None:
    check(case, team)


@pytest.mark.parametrize("context", [0, 1, 15, 16, SPAN_KEYS - 2, SPAN_KEYS - 1, SPAN_KEYS, 3 * SPAN_KEYS + 5])
def test_contexts_around_the_ends_of_spans(context: int, team: Team) -> None:
    check(Case(group=3, num_kv_heads=2, head_dim=64, block_size=16, runs=((context, 1), (3, 1))), team)


def test_keys_and_values_lie_in_the_cache_afterwards(team: Team) -> None:
    built = Built(Case(group=2, num_kv_heads=2, head_dim=16, block_size=4, runs=((6, 1), (2, 9))), team)
    built.attend()
    heads = built.qkv.view(len(built.qkv), -1, 16)
    keys = built.rotated(heads[:, 4:6], None).bfloat16()
    for token, (row, position) in enumerate([(0, 6), *((1, place) for place in range(2, 11))]):
        block = built.blocks[row][position // 4]
        assert torch.equal(built.cache[0, block, :, position % 4], keys[token])
        assert torch.equal(built.cache[1, block, :, position % 4], heads[token, 6:])


def test_a_layer_of_queries_alone_reads_what_another_has_cached(team: Team) -> None:
    runs = ((40, 1), (0, 20), (5, 7))
    built = Built(Case(group=2, num_kv_heads=2, head_dim=32, block_size=4, runs=runs, has_norms=True), team)
    whole = built.attend()
    cached = built.cache.clone()
    other = RMSNorm(32, 1e-5, BuildContext(ParallelContext(), Unquantized(), torch.bfloat16, torch.device("cpu")))
    other.weight.fill_(2.0)
    for norm, is_same in ((built.heads.query_norm, True), (other, False)):
        heads = replace(built.heads, query_norm=norm, key_norm=None, reads_cached=True)
        queries = built.qkv[:, : 4 * 32].contiguous()
        assert torch.equal(built.attention.attend(queries, heads, built.tables), whole) == is_same
    assert torch.equal(built.cache.view(torch.int16), cached.view(torch.int16))


def test_a_row_that_is_not_finite_leaves_the_others_alone(team: Team) -> None:
    built = Built(
        Case(group=2, num_kv_heads=1, head_dim=32, block_size=16, runs=((40, 1), (20, 1), (0, 20), (5, 7))), team
    )
    clean = built.attend()
    built.qkv[0] = float("nan")
    built.qkv[2:22] = float("inf")
    spoilt = built.attend()
    assert not spoilt[0].isfinite().any()
    assert not spoilt[2:22].isfinite().any()
    assert torch.equal(spoilt[1], clean[1])
    assert torch.equal(spoilt[22:], clean[22:])
