from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker import simulated
from gpu_worker.config import parse_settings
from gpu_worker.runner_api import RowFaultCode, SessionEnded, TokenMask
from gpu_worker.simulated import SimulatedFailure, SimulatedRunner, SimulationSpec
from tests.unit.gpu_worker.simulated_worker import SPEC, execute, faults_of, no_mask, tokens_of
from tests.unit.gpu_worker.step_builder import Run, row_add, step, uint32

U64 = 2**64

# An independent reading of the documentation, in plain integers.


def mix(value: int) -> int:
    value ^= value >> 30
    value = value * 0xBF58476D1CE4E5B9 % U64
    value ^= value >> 27
    value = value * 0x94D049BB133111EB % U64
    return value ^ (value >> 31)


def expected_hash(seed: int, sequence_index: int, position: int) -> int:
    golden = 0x9E3779B97F4A7C15
    key = mix((seed + golden * (sequence_index + 1)) % U64)
    return mix((key + golden * (position + 1)) % U64)


def expected_token(seed: int, sequence_index: int, position: int, candidates: list[int]) -> int:
    return candidates[expected_hash(seed, sequence_index, position) % len(candidates)]


def generate(
    runner: SimulatedRunner,
    num_tokens: int,
    prompt: list[int],
    mask: Callable[[int], set[int]] | None = None,
    **sampling,
) -> list[int]:
    """Tokens of one sequence alone, until it faults or has enough."""
    add = row_add(0, prompt, range(1, 17), **sampling)
    tokens: list[int] = []
    position, count = 0, len(prompt)
    for index in range(num_tokens):
        batch = step(
            index + 1,
            [Run(0, position, count)],
            adds=[add] if index == 0 else [],
            drops=[0] if index == 0 and runner.oracle.occupied[0] else [],
            mask_rows=[0] if mask else [],
        )
        allowed = (
            TokenMask(rows=uint32([0]), bitmask=bits([mask(index)], runner.describe().vocab_size)) if mask else None
        )
        result = execute(runner, batch, allowed)
        assert result.faults == []
        tokens.append(tokens_of(result)[0])
        position, count = position + count, 1
    assert runner.oracle.audit() == []
    return tokens


def bits(allowed: list[set[int]], vocab_size: int) -> np.ndarray:
    words = np.zeros((len(allowed), (vocab_size + 31) // 32), dtype=np.uint32)
    for row, token_ids in enumerate(allowed):
        for token in token_ids:
            words[row, token // 32] |= np.uint32(1 << (token % 32))
    return words


# Tokens.


@given(st.integers(0, U64 - 1), st.integers(0, 2**32 - 1), st.sampled_from([None, 0, 41, 99]))
@settings(max_examples=30)
def test_tokens_are_those_of_the_documentation(seed: int, sequence_index: int, eos: int | None) -> None:
    runner = SimulatedRunner(dataclasses.replace(SPEC, eos_token_id=eos))
    tokens = generate(runner, 6, [1, 2, 3], seed=seed, sequence_index=sequence_index)
    candidates = [token for token in range(100) if token != eos]
    assert tokens == [expected_token(seed, sequence_index, 3 + i, candidates) for i in range(6)]


@pytest.mark.parametrize("seed", range(20))
def test_a_row_depends_on_nothing_but_its_key(seed: int) -> None:
    """Other rows, the order of runs, chunks and the row's number change nothing."""
    rng = np.random.default_rng(seed)
    rows, lengths = rng.permutation(8).tolist(), rng.integers(1, 8, size=8).tolist()
    runner = SimulatedRunner(SPEC)
    adds = [row_add(row, [7] * lengths[i], [1 + 2 * i, 2 + 2 * i], seed=i) for i, row in enumerate(rows)]
    position = [0] * 8
    drawn: dict[int, int] = {}
    step_id = 0
    while len(drawn) < 8:
        step_id += 1
        runs = []
        for i in rng.permutation(8).tolist():
            if i in drawn or rng.random() < 0.5:
                continue
            count = int(rng.integers(1, lengths[i] - position[i] + 1))
            position[i] += count
            runs.append(Run(rows[i], position[i] - count, count, position[i] == lengths[i]))
        result = execute(runner, step(step_id, runs, adds=adds if step_id == 1 else []))
        assert result.faults == []
        drawn |= {rows.index(row): token for row, token in tokens_of(result).items()}
    assert drawn == {i: expected_token(i, 0, lengths[i], list(range(100))) for i in range(8)}


def test_a_resumed_sequence_continues_as_it_would_have() -> None:
    through = generate(SimulatedRunner(SPEC), 9, [5, 6], seed=3)
    resumed = generate(SimulatedRunner(SPEC), 4, [5, 6, *through[:5]], seed=3, num_prompt_tokens=2)
    assert resumed == through[5:]


def test_ends_of_sequence_come_as_often_as_asked() -> None:
    spec = dataclasses.replace(SPEC, max_num_seqs=1000, num_blocks=1001, max_num_batched_tokens=1000, eos_token_id=7)
    for probability in (0.0, 0.1, 1.0):
        runner = SimulatedRunner(dataclasses.replace(spec, eos_probability=probability))
        adds = [row_add(row, [1], [row + 1], seed=row) for row in range(1000)]
        result = execute(runner, step(1, [Run(row, 0) for row in range(1000)], adds=adds))
        num_ends = int((result.token_ids == 7).sum())
        # 1000 draws: 10 standard deviations around the mean.
        assert abs(num_ends - 1000 * probability) <= 10 * math.sqrt(1000 * probability * (1 - probability))
    assert len(np.unique(execute_uniform(spec))) > 95  # every other token is drawn too


def execute_uniform(spec: SimulationSpec) -> np.ndarray:
    adds = [row_add(row, [1], [row + 1], seed=row) for row in range(1000)]
    return execute(SimulatedRunner(spec), step(1, [Run(row, 0) for row in range(1000)], adds=adds)).token_ids


def test_allowed_tokens() -> None:
    tokens = generate(SimulatedRunner(SPEC), 20, [1], seed=5, allowed_token_ids=uint32([90, 10, 55]))
    assert tokens == [expected_token(5, 0, 1 + i, [10, 55, 90]) for i in range(20)]
    assert set(tokens) == {10, 55, 90}


def test_suppressed_tokens_until_min_tokens_are_generated() -> None:
    suppressed = uint32([token for token in range(100) if token != 4])
    options = {"seed": 1, "suppressed_token_ids": suppressed, "min_tokens": 5}
    tokens = generate(SimulatedRunner(SPEC), 8, [1, 2], **options)
    free = [expected_token(1, 0, 2 + i, list(range(100))) for i in range(8)]
    assert tokens == [4] * 5 + free[5:]
    # Tokens that were generated before a resume count.
    resumed = generate(SimulatedRunner(SPEC), 5, [1, 2, *tokens[:3]], num_prompt_tokens=2, **options)
    assert resumed == tokens[3:]


def test_biases() -> None:
    biases = {"bias_token_ids": uint32([3, 8, 9]), "bias_values": np.array([2, 5, 5], dtype=np.float32)}
    assert generate(SimulatedRunner(SPEC), 3, [1], **biases) == [8, 8, 8]
    assert generate(SimulatedRunner(SPEC), 3, [1], **biases, allowed_token_ids=uint32([3, 4])) == [3, 3, 3]
    banned = {"bias_token_ids": uint32(range(99)), "bias_values": np.full(99, -np.inf, dtype=np.float32)}
    assert generate(SimulatedRunner(SPEC), 3, [1], **banned) == [99, 99, 99]


def test_token_mask_reaches_its_rows_only() -> None:
    runner = SimulatedRunner(dataclasses.replace(SPEC, eos_token_id=2))
    adds = [row_add(row, [1], [row + 1], seed=row) for row in range(4)]
    batch = step(1, [Run(row, 0) for row in range(4)], adds=adds, mask_rows=[1, 3])
    mask = TokenMask(rows=uint32([3, 1]), bitmask=bits([{64}, {2, 31, 99}], 100))
    tokens = tokens_of(execute(runner, batch, mask))
    free = [token for token in range(100) if token != 2]
    assert tokens[0] == expected_token(0, 0, 1, free)
    assert tokens[2] == expected_token(2, 0, 1, free)
    assert tokens[3] == 64
    assert tokens[1] == expected_token(1, 0, 1, [31, 99])  # the end-of-sequence token only by its probability


def test_a_mask_of_only_the_end_of_sequence_token_draws_it() -> None:
    runner = SimulatedRunner(dataclasses.replace(SPEC, eos_token_id=2))
    assert generate(runner, 3, [1], mask=lambda index: {2} if index == 2 else {50}) == [50, 50, 2]


def test_a_row_that_may_draw_nothing_fails_alone() -> None:
    runner = SimulatedRunner(SPEC)
    adds = [row_add(0, [1], [1]), row_add(1, [1], [2], allowed_token_ids=uint32([5]))]
    batch = step(1, [Run(0, 0), Run(1, 0)], adds=adds, mask_rows=[1])
    result = execute(runner, batch, TokenMask(rows=uint32([1]), bitmask=bits([{6}], 100)))
    assert [(row, code) for row, code, _ in faults_of(result)] == [(1, RowFaultCode.NOT_FINITE)]
    assert list(tokens_of(result)) == [0]
    assert runner.oracle.findings.total() == 0


def test_logprobs_as_documented() -> None:
    runner = SimulatedRunner(SPEC)
    wanted = [None, 0, 3, 1, None, 2]
    adds = [row_add(row, [1], [row + 1], seed=row, num_logprobs=count) for row, count in enumerate(wanted)]
    result = execute(runner, step(1, [Run(row, 0) for row in range(6)], adds=adds))
    assert result.logprobs is not None and result.top_token_ids is not None and result.top_logprobs is not None
    assert result.top_token_ids.shape == result.top_logprobs.shape == (6, 3)
    for row, token in tokens_of(result).items():
        rank = expected_hash(row, 0, 1) >> 62
        if wanted[row] is None:
            assert math.isnan(result.logprobs[row])
        else:
            assert result.logprobs[row] == pytest.approx(-math.log(2) * (rank + 1))
        assert result.top_token_ids[row].tolist() == [(token - rank + i) % 100 for i in range(3)]
        np.testing.assert_allclose(result.top_logprobs[row], [-math.log(2) * (i + 1) for i in range(3)], rtol=1e-6)


def test_no_logprob_arrays_where_no_row_asks() -> None:
    result = execute(SimulatedRunner(SPEC), step(1, [Run(0, 0)], adds=[row_add(0, [1], [1])]))
    assert result.logprobs is None and result.top_token_ids is None and result.top_logprobs is None


# The device's timeline.


def test_a_step_queues_behind_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    # A millisecond passes from one look at the clock to the next, whatever else this machine is doing.
    clock = SimpleNamespace(monotonic_ns=itertools.count(10**12, 10**6).__next__, sleep=lambda seconds: None)
    monkeypatch.setattr(simulated, "time", clock)
    spec = dataclasses.replace(SPEC, step_ms=20.0, token_us=100.0, row_us=1000.0, buckets=(8, 64))
    runner = SimulatedRunner(spec)
    first = runner.execute(step(1, [Run(0, 0, 3)], adds=[row_add(0, [1, 2, 3], [1])], bucket=8), no_mask)
    second = runner.execute(step(2, [Run(0, 3)], bucket=8), no_mask)
    nothing = runner.execute(step(3, drops=[0]), no_mask)
    assert first.end_ns is not None and second.end_ns is not None
    # The second was launched while the first was on the device, and both take 20 ms + 8 tokens with padding + 1 row.
    assert second.end_ns - first.end_ns == 21_800_000
    assert nothing.end_ns == second.end_ns
    assert first.result().forward_ns == 21_800_000


def test_a_late_mask_delays_its_step() -> None:
    runner = SimulatedRunner(dataclasses.replace(SPEC, step_ms=1.0))
    mask = TokenMask(rows=uint32([0]), bitmask=bits([{5}], 100))
    came_ns = 0

    def wait() -> TokenMask:
        nonlocal came_ns
        runner._device_free_ns -= 10**9  # as if the forward pass had long been over
        came_ns = time.monotonic_ns()
        return mask

    pending = runner.execute(step(1, [Run(0, 0)], adds=[row_add(0, [1], [1])], mask_rows=[0]), wait)
    assert pending.end_ns is not None and pending.end_ns >= came_ns


# Planted failures, and where the spec comes from.


def test_planted_failures_happen_once_in_the_life_of_the_runner() -> None:
    def steps(spec: SimulationSpec) -> SimulatedRunner:
        runner = SimulatedRunner(spec)
        execute(runner, step(1))
        return runner

    with pytest.raises(SimulatedFailure, match="sim_crash_at_step is 2"):
        execute(steps(dataclasses.replace(SPEC, crash_at_step=2)), step(2))
    runner = steps(dataclasses.replace(SPEC, drop_stream_at_step=2))
    with pytest.raises(SessionEnded, match="sim_drop_stream_at_step is 2"):
        execute(runner, step(2))
    runner.reset()
    assert execute(runner, step(1)).step_id == 1
    assert execute(runner, step(2)).step_id == 2
    runner = steps(dataclasses.replace(SPEC, out_of_order_at_step=2))
    assert [execute(runner, step(2)).step_id, execute(runner, step(3)).step_id] == [3, 3]
    assert steps(dataclasses.replace(SPEC, hang_at_step=2)).execute(step(2), no_mask).end_ns is None
    runner = SimulatedRunner(dataclasses.replace(SPEC, delay_at_step=1, delay_s=100.0))
    pending = runner.execute(step(1, [Run(0, 0)], adds=[row_add(0, [1], [1])]), no_mask)
    assert pending.pending_result.forward_ns == 100 * 10**9


def test_poison_fails_the_worker_when_it_is_run() -> None:
    runner = SimulatedRunner(dataclasses.replace(SPEC, poison_token=66))
    add = row_add(0, [1, 2, 66], [1])
    assert execute(runner, step(1, [Run(0, 0, 2, samples=False)], adds=[add])).faults == []
    with pytest.raises(SimulatedFailure, match="ran sim_poison_token 66"):
        execute(runner, step(2, [Run(0, 2)]))


def test_fault_row_token_leaves_the_batch_alone() -> None:
    """`run_samples` may be a read-only view of the message."""
    runner = SimulatedRunner(dataclasses.replace(SPEC, fault_row_token=66))
    batch = step(1, [Run(0, 0), Run(1, 0)], adds=[row_add(0, [66], [1]), row_add(1, [1], [2])])
    batch.run_samples.flags.writeable = False
    result = execute(runner, batch)
    assert [row for row, _, _ in faults_of(result)] == [0] and list(tokens_of(result)) == [1]
    assert batch.run_samples.tolist() == [True, True]


def test_spec_from_settings_and_model_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 321, "eos_token_id": [7, 8]}))
    given_ = parse_settings(["--runner", "simulated", "--model", os.fspath(tmp_path), "--max-num-seqs", "3"])
    spec = SimulationSpec.from_settings(given_)
    assert (spec.vocab_size, spec.eos_token_id, spec.max_num_seqs, spec.model) == (321, 7, 3, os.fspath(tmp_path))
    own = parse_settings(
        ["--runner=simulated", f"--model={tmp_path}", "--max-num-seqs=3", "--sim-max-num-seqs=4", "--sim-vocab-size=50"]
    )
    spec = SimulationSpec.from_settings(own)
    assert (spec.vocab_size, spec.max_num_seqs) == (50, 4)


def test_every_simulation_setting_reaches_the_spec() -> None:
    changed = {
        "num_blocks": "77", "block_size": "8", "max_num_seqs": "5", "max_model_len": "99", "buckets": "4,32",
        "max_num_batched_tokens": "17", "vocab_size": "55", "eos_probability": "0.5", "eos_token_id": "3",
        "step_ms": "1.5", "token_us": "2.5", "row_us": "3.5", "crash_at_step": "11", "hang_at_step": "12",
        "drop_stream_at_step": "13", "delay_at_step": "14", "delay_s": "15.5", "out_of_order_at_step": "16",
        "fault_row_token": "18", "poison_token": "19",
    }  # fmt: skip
    argv = ["--runner=simulated", "--sim-strict", *(f"--sim-{n.replace('_', '-')}={v}" for n, v in changed.items())]
    spec, default = SimulationSpec.from_settings(parse_settings(argv)), SimulationSpec()
    same = [f.name for f in dataclasses.fields(spec) if getattr(spec, f.name) == getattr(default, f.name)]
    assert same == ["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": 100}, "sim_eos_token_id is 100: it must be below sim_vocab_size 100"),
        ({"buckets": (8, 32)}, "sim_buckets end at 32, so steps of sim_max_num_batched_tokens 64 fit none"),
    ],
)
def test_impossible_specs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEC, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["{", '{"vocab_size": "many"}'])
def test_a_broken_model_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"--model: .*config\.json"):
        SimulationSpec.from_settings(parse_settings(["--runner=simulated", f"--model={tmp_path}"]))
