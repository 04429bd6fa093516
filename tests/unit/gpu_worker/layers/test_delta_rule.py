"""The gated delta rule and its convolution: steps of any layout against a float64 recurrence, a token at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpu_worker.attention.api import StepMetadata
from gpu_worker.layers import delta_rule
from gpu_worker.layers.delta_rule import NORM_EPS, DeltaLayout
from gpu_worker.model_spec import GatedDeltaSpec
from gpu_worker.parallel.shares import ParallelContext, ParallelError
from gpu_worker.state_pool import LayerStates, StatePool, StateShape, delta_heads

NUM_ROWS = 4
WIDTH = 4
KEY_HEADS, GROUP, KEY_DIM, VALUE_DIM = 2, 3, 8, 5
SHAPE = StateShape(1, KEY_HEADS, KEY_HEADS * GROUP, KEY_DIM, VALUE_DIM, WIDTH, torch.float32)
LAYOUT = DeltaLayout.of(KEY_HEADS, GROUP, KEY_DIM, VALUE_DIM, is_grouped=False)
# Tokens of each row in each of some steps; a row that has none does not run.
Steps = list[list[int]]


def metadata(counts: list[int], done: list[int]) -> tuple[StepMetadata, list[int]]:
    """A step as the runner lays it out, runs of one token first; and its rows in that order."""
    rows = sorted((row for row in range(len(counts)) if counts[row]), key=lambda row: counts[row] != 1)
    lengths = np.array([counts[row] for row in rows], dtype=np.int64)
    contexts = np.array([done[row] + counts[row] for row in rows], dtype=np.int64)
    unread = np.zeros((len(rows), 1), dtype=np.int64)
    return StepMetadata(int((lengths == 1).sum()), lengths, contexts, unread, unread[:0, 0], np.array(rows)), rows


@dataclass
class Rows:
    """Rows with inputs of their own, run step by step."""

    inputs: list[torch.Tensor]  # [num_tokens, ...] each
    pool: StatePool = field(default_factory=lambda: StatePool(SHAPE, NUM_ROWS, torch.device("cpu")))

    def __post_init__(self) -> None:
        self.done = [0] * NUM_ROWS
        self.out: list[list[torch.Tensor]] = [[] for _ in range(NUM_ROWS)]

    def step(self, counts: list[int], run: object) -> None:
        step, rows = metadata(counts, self.done)
        self.pool.plan(step)
        given_rows = [self.inputs[row][self.done[row] : self.done[row] + counts[row]] for row in rows]
        parts = run(torch.cat(given_rows), self.pool.layer(0)).split([counts[row] for row in rows])  # type: ignore[operator]
        for row, part in zip(rows, parts, strict=True):
            self.out[row].append(part)
            self.done[row] += counts[row]


def poisoned(pool: StatePool) -> StatePool:
    """Whatever rows before have left: it must not be read."""
    pool.plan(None)
    states = pool.layer(0)
    states.conv.fill_(float("nan"))
    states.matrices.fill_(float("nan"))
    return pool


steps_of_rows = st.lists(
    st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 64, 65, 130]), min_size=NUM_ROWS, max_size=NUM_ROWS).filter(any),
    min_size=1,
    max_size=5,
)
examples = settings(max_examples=25, deadline=None)


def recurrence(qkv: torch.Tensor, beta: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """Of one row from nothing on, in float64: [num_tokens, value_heads, value_dim]."""
    qkv, beta, alpha = qkv.double(), beta.double(), log_decay.double().exp()
    keys = KEY_HEADS * KEY_DIM
    query, key = (
        part.unflatten(-1, (KEY_HEADS, KEY_DIM)).repeat_interleave(GROUP, 1) for part in qkv[:, : 2 * keys].chunk(2, -1)
    )
    query, key = (part / (part.square().sum(-1, keepdim=True) + NORM_EPS).sqrt() for part in (query, key))
    value = qkv[:, 2 * keys :].unflatten(-1, (-1, VALUE_DIM))
    state = torch.zeros(KEY_HEADS * GROUP, KEY_DIM, VALUE_DIM, dtype=torch.float64)
    out = []
    for t in range(len(qkv)):
        for head in range(len(state)):
            old = alpha[t, head] * state[head]
            change = beta[t, head] * (value[t, head] - old.T @ key[t, head])
            state[head] = old + torch.outer(key[t, head], change)
        out.append(torch.einsum("hkv,hk->hv", state, query[t]) * KEY_DIM**-0.5)
    return torch.stack(out)


@examples
@given(steps_of_rows, st.integers(0, 2**31), st.sampled_from([0.01, 0.3, 8.0]), st.sampled_from([0.0, 1.0, 30.0]))
@example([[130, 1, 0, 65], [1, 1, 7, 1]], 1, 0.0, 30.0)
def test_steps_compute_the_recurrence(steps: Steps, seed: int, rate: float, alike: float) -> None:
    """`rate`: how fast heads forget; `alike`: how near all keys of a row are to one another."""
    generator = torch.Generator().manual_seed(seed)
    num_channels = LAYOUT.num_channels

    def inputs(num_tokens: int) -> torch.Tensor:
        x = torch.randn(num_tokens, num_channels + 2 * LAYOUT.num_value_heads, generator=generator)
        keys = KEY_HEADS * KEY_DIM
        x[:, keys : 2 * keys] += alike
        return x

    totals = [sum(step[row] for step in steps) for row in range(NUM_ROWS)]
    rows = Rows([inputs(total) for total in totals])
    poisoned(rows.pool)

    def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv, beta, decay = x.split([num_channels, LAYOUT.num_value_heads, LAYOUT.num_value_heads], dim=-1)
        return qkv, beta.sigmoid(), -rate * decay.abs()

    def run(x: torch.Tensor, states: LayerStates) -> torch.Tensor:
        return delta_rule.gated_delta_rule(*split(x), LAYOUT, states)

    for counts in steps:
        rows.step(counts, run)
    for row, total in enumerate(totals):
        if total:
            expected = recurrence(*split(rows.inputs[row]))
            torch.testing.assert_close(torch.cat(rows.out[row]).double(), expected, rtol=1e-4, atol=2e-5)


@examples
@given(steps_of_rows, st.integers(0, 2**31))
def test_steps_convolve_as_the_whole_sequence(steps: Steps, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_channels = SHAPE.num_channels
    weight = torch.randn(num_channels, WIDTH, generator=generator)
    totals = [sum(step[row] for step in steps) for row in range(NUM_ROWS)]
    rows = Rows([torch.randn(total, num_channels, generator=generator) for total in totals])
    poisoned(rows.pool)
    for counts in steps:
        rows.step(counts, lambda x, states: delta_rule.convolve(x, weight, states))
    for row, total in enumerate(totals):
        if not total:
            continue
        x = rows.inputs[row].double()
        expected = torch.zeros_like(x)
        for t in range(total):
            for back in range(min(WIDTH, t + 1)):
                expected[t] += x[t - back] * weight[:, WIDTH - 1 - back].double()
        expected = expected * torch.sigmoid(expected)
        torch.testing.assert_close(torch.cat(rows.out[row]).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_grouped", [False, True])
def test_columns_are_where_the_layout_says(is_grouped: bool) -> None:
    """Every column carries (kind, head, place in the head) as one number."""
    layout = DeltaLayout.of(KEY_HEADS, GROUP, KEY_DIM, VALUE_DIM, is_grouped=is_grouped)
    values = GROUP * VALUE_DIM

    def numbers(kind: int, head: int, size: int) -> list[int]:
        return [kind * 10_000 + head * 100 + place for place in range(size)]

    parts = [[numbers(kind, head, size) for head in range(KEY_HEADS)]
             for kind, size in enumerate((KEY_DIM, KEY_DIM, values, values))]  # fmt: skip
    pairs = [[numbers(kind, head, GROUP) for head in range(KEY_HEADS)] for kind in range(2)]

    def columns(kinds: list[list[list[int]]]) -> torch.Tensor:
        if is_grouped:
            kinds = [list(kind) for kind in zip(*kinds, strict=True)]
        flat = [number for kind in kinds for head in kind for number in head]
        return torch.tensor([[-1, *flat], [-1, *flat]])[:, 1:]

    mixed = columns(parts)
    assert layout.num_channels == SHAPE.num_channels
    expected = [number for kind in parts[:3] for head in kind for number in head]
    assert layout.channels(mixed).tolist() == [expected] * 2
    gates = [number for head in parts[3] for number in head]
    assert layout.gates(mixed).flatten(1).tolist() == [gates] * 2
    beta, decay = layout.strengths(columns(pairs))
    assert [beta[1].tolist(), decay[1].tolist()] == [[number for head in kind for number in head] for kind in pairs]


def test_heads_that_do_not_divide_are_refused() -> None:
    spec = GatedDeltaSpec(6, 12, 8, 8, 4, is_grouped=True)
    assert delta_heads(spec, ParallelContext(1, 3)) == (2, 4)
    with pytest.raises(ParallelError, match=r"linear_num_key_heads 6 does not divide by tensor_parallel_size 4"):
        delta_heads(spec, ParallelContext(1, 4))


def test_a_step_has_to_say_which_rows_run() -> None:
    pool, one = StatePool(SHAPE, 1, torch.device("cpu")), np.ones(1, dtype=np.int64)
    with pytest.raises(RuntimeError, match="not told which rows run"):
        pool.plan(StepMetadata(1, one, one, one[:, None], one))
