"""Against a control plane in small: whatever it does is in order, and any one number changed in it is found."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.runner_api import StepBatch, StepError, StepResult
from gpu_worker.simulated import SimulatedRunner
from tests.unit.gpu_worker.simulated_worker import SPEC, execute, tokens_of
from tests.unit.gpu_worker.step_builder import Run, row_add, step, uint32


class SmallControlPlane:
    """Adds, chunks, shares prefixes, preempts and drops at random, by the rules."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.free = list(range(1, SPEC.num_blocks))
        self.rows: dict[int, tuple[list[int], list[int], int]] = {}  # row: tokens, blocks, computed
        self.cached: dict[tuple[int, ...], int] = {}  # prefix: block that holds its end
        self.contents: dict[int, tuple[int, ...]] = {}  # block: prefix whose end it holds
        self.step_id = 0

    def plan(self) -> StepBatch:
        self.step_id += 1
        rng, drops, adds, runs = self.rng, [], [], []
        budget = SPEC.max_num_batched_tokens
        for row in [row for row in self.rows if rng.random() < 0.15]:
            drops.append(row)
            self.free += [block for block in self.rows.pop(row)[1] if block not in self.blocks_in_use()]
        for row in range(SPEC.max_num_seqs):
            if row not in self.rows and len(self.free) >= 6 and rng.random() < 0.4:
                tokens = [1, 2, 3, 4, 5, 6, 7, 8][: rng.integers(0, 9)] + rng.integers(
                    0, 100, rng.integers(1, 9)
                ).tolist()
                blocks = self.cached_prefix(tokens)
                self.free = [block for block in self.free if block not in blocks]
                computed = 4 * len(blocks)
                adds.append(row_add(row, tokens, blocks, num_computed_tokens=computed, seed=int(rng.integers(99))))
                self.rows[row] = (tokens, blocks, computed)
        for row in rng.permutation(list(self.rows)).tolist():
            tokens, blocks, computed = self.rows[row]
            count = min(int(rng.integers(1, len(tokens) - computed + 1)), budget)
            num_new = -(-(computed + count) // 4) - len(blocks)
            if count == 0 or num_new > len(self.free) or len(tokens) >= SPEC.max_model_len or rng.random() < 0.1:
                continue
            taken = [self.free.pop(int(rng.integers(len(self.free)))) for _ in range(num_new)]
            self.cached = {prefix: block for prefix, block in self.cached.items() if block not in taken}
            self.contents = {block: prefix for block, prefix in self.contents.items() if block not in taken}
            runs.append(Run(row, computed, count, computed + count == len(tokens), taken))
            self.rows[row] = (tokens, blocks + taken, computed + count)
            budget -= count
        return step(self.step_id, runs, adds=adds, drops=drops)

    def blocks_in_use(self) -> set[int]:
        return {block for _, blocks, _ in self.rows.values() for block in blocks}

    def cached_prefix(self, tokens: list[int]) -> list[int]:
        blocks: list[int] = []
        while 4 * len(blocks) + 4 < len(tokens) and (block := self.cached.get(tuple(tokens[: 4 * len(blocks) + 4]))):
            blocks.append(block)
        return blocks

    def apply(self, result: StepResult) -> None:
        for row, token in tokens_of(result).items():
            self.rows[row][0].append(token)
        for tokens, blocks, computed in self.rows.values():
            for index in range(computed // 4):
                prefix = tuple(tokens[: 4 * index + 4])
                self.cached.setdefault(prefix, blocks[index])
                self.contents[blocks[index]] = prefix


def play(runner: SimulatedRunner, control_plane: SmallControlPlane, num_steps: int) -> int:
    num_shared = 0
    for _ in range(num_steps):
        batch = control_plane.plan()
        num_shared += sum(add.num_computed_tokens > 0 for add in batch.adds)
        result = execute(runner, batch)
        assert result.faults == []
        control_plane.apply(result)
    assert runner.oracle.audit() == []
    return num_shared


@pytest.mark.parametrize("seed", range(12))
def test_steps_in_order_have_no_findings(seed: int) -> None:
    runner = SimulatedRunner(SPEC)
    num_shared = play(runner, SmallControlPlane(np.random.default_rng(seed)), 150)
    assert runner.oracle.findings.total() == 0
    assert num_shared > 5  # prefixes were shared, so reading them was checked


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["run_start_positions", "run_rows", "new_block_ids", "add_block", "add_token"]),
)
@settings(max_examples=60, deadline=None)
def test_any_one_number_changed_is_found(seed: int, what: str) -> None:
    rng = np.random.default_rng(seed)
    runner, control_plane = SimulatedRunner(SPEC), SmallControlPlane(rng)
    play(runner, control_plane, 10)
    batch = control_plane.plan()
    while not (broken := corrupt(batch, what, rng, control_plane)):
        control_plane.apply(execute(runner, batch))
        batch = control_plane.plan()
    try:
        result = execute(runner, broken)
    except StepError:
        return
    assert result.faults != [] and runner.oracle.findings.total() > 0
    assert runner.oracle.audit() == []


def corrupt(
    batch: StepBatch, what: str, rng: np.random.Generator, control_plane: SmallControlPlane
) -> StepBatch | None:
    """The same step with one number that is wrong; None if the step has no such number."""
    if what.startswith("add_"):
        shared = [add for add in batch.adds if add.num_computed_tokens]
        if not shared:
            return None
        bad = shared[0]
        if what == "add_block":
            block_ids = bad.block_ids.copy()
            index = int(rng.integers(len(block_ids)))
            prefix = tuple(bad.token_ids[: 4 * index + 4].tolist())
            # The same prefix may lie in two blocks, and either is right.
            others = [block for block in control_plane.free if control_plane.contents.get(block) != prefix]
            block_ids[index] = rng.choice([0, 64, *others])
            wrong = dataclasses.replace(bad, block_ids=block_ids)
        else:
            token_ids = bad.token_ids.copy()
            token_ids[rng.integers(bad.num_computed_tokens)] += 1
            wrong = dataclasses.replace(bad, token_ids=token_ids)
        return dataclasses.replace(batch, adds=tuple(wrong if add is bad else add for add in batch.adds))
    values = getattr(batch, what).astype(np.int64)
    if len(values) == 0:
        return None
    index = int(rng.integers(len(values)))
    if what == "run_start_positions":
        values[index] += rng.choice([1, 7]) if values[index] == 0 else -1
    elif what == "run_rows":
        values[index] = rng.integers(SPEC.max_num_seqs)
        row, start = int(getattr(batch, what)[index]), int(batch.run_start_positions[index])
        if values[index] == row:
            return None
        other = control_plane.rows.get(int(values[index]))
        # A row of the same length and age could run there just as well.
        if other is not None and int(values[index]) not in batch.run_rows and other[2] == start:
            return None
    else:
        owner = int(np.repeat(batch.run_rows, batch.run_num_new_blocks)[index])
        others = [b for row, (_, blocks, _) in control_plane.rows.items() if row != owner for b in blocks]
        values[index] = rng.choice([0, 64, *others])
    return dataclasses.replace(batch, **{what: uint32(values)})
