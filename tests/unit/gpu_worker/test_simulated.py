from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.config import parse_settings
from gpu_worker.runner_api import RowFaultCode, SessionEnded, StepBatch, StepError, StepResult, TokenMask
from gpu_worker.simulated import SimulatedFailure, SimulatedRunner, SimulationSpec
from tests.unit.gpu_worker.step_builder import Run, row_add, step, uint32

SPEC = SimulationSpec(
    num_blocks=64,
    block_size=4,
    max_num_seqs=8,
    max_model_len=64,
    max_num_batched_tokens=64,
    vocab_size=100,
)
U64 = 2**64


def no_mask() -> TokenMask:
    raise AssertionError("no row of this step waits for a mask")


def execute(runner: SimulatedRunner, batch: StepBatch, mask: TokenMask | None = None) -> StepResult:
    return runner.execute(batch, no_mask if mask is None else lambda: mask).result()


def tokens_of(result: StepResult) -> dict[int, int]:
    assert result.offsets.tolist() == list(range(len(result.rows) + 1))
    return dict(zip(result.rows.tolist(), result.token_ids.tolist(), strict=True))


def faults_of(result: StepResult) -> list[tuple[int, RowFaultCode, str]]:
    assert not {fault.row for fault in result.faults} & set(result.rows.tolist())
    return [(fault.row, fault.code, fault.message) for fault in result.faults]


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


def test_a_step_queues_behind_the_one_before() -> None:
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


# The oracle: every planted error is found, and named.


def prefilled(spec: SimulationSpec = SPEC) -> SimulatedRunner:
    """Row 0: 8 prompt tokens in blocks 1, 2, one token drawn. Row 1: 3 of its 6 tokens computed, in block 5."""
    runner = SimulatedRunner(spec)
    adds = [row_add(0, range(10, 18), [1, 2]), row_add(1, range(20, 26), [5])]
    result = execute(runner, step(1, [Run(0, 0, 8), Run(1, 0, 3, samples=False)], adds=adds))
    assert result.faults == [] and list(tokens_of(result)) == [0]
    return runner


PREFIX = list(range(10, 18))

PLANTED = {
    "start too early": (
        step(2, [Run(0, 7, 2, new_blocks=[3])]),
        0,
        RowFaultCode.POSITION_MISMATCH,
        "run starts at position 7, but the row has 8 computed tokens",
    ),
    "start too late": (
        step(2, [Run(1, 4, 2, new_blocks=[6])]),
        1,
        RowFaultCode.POSITION_MISMATCH,
        "run starts at position 4, but the row has 3 computed tokens",
    ),
    "more tokens than there are": (
        step(2, [Run(0, 8, 2, new_blocks=[3])]),
        0,
        RowFaultCode.POSITION_MISMATCH,
        "run ends before position 10, but the row has 9 tokens",
    ),
    "sample inside the prompt": (
        step(2, [Run(1, 3, 1)]),
        1,
        RowFaultCode.POSITION_MISMATCH,
        "run samples at position 4, but the row has a token there already",
    ),
    "row that was never added": (
        step(2, [Run(7, 0)]),
        7,
        RowFaultCode.UNKNOWN_ROW,
        "row 7 is not occupied",
    ),
    "row dropped in the same step": (
        step(2, [Run(0, 8, new_blocks=[3])], drops=[0]),
        0,
        RowFaultCode.UNKNOWN_ROW,
        "row 0 is not occupied",
    ),
    "drop of an empty row": (
        step(2, drops=[6]),
        6,
        RowFaultCode.UNKNOWN_ROW,
        "row 6 is dropped, but it is not occupied",
    ),
    "add on an occupied row": (
        step(2, adds=[row_add(0, [1], [9])]),
        0,
        RowFaultCode.POSITION_MISMATCH,
        "row 0 is added, but it is occupied",
    ),
    "table too short": (
        step(2, [Run(0, 8)]),
        0,
        RowFaultCode.BAD_BLOCK,
        "run to position 8, but the table's 2 blocks hold 8",
    ),
    "table too long": (
        step(2, [Run(1, 3, 1, False, list(range(20, 36)))]),
        1,
        RowFaultCode.BAD_BLOCK,
        "more than the 16 blocks",
    ),
    "new block of the worker's own": (
        step(2, [Run(0, 8, new_blocks=[0])]),
        0,
        RowFaultCode.BAD_BLOCK,
        "block 0 is out of range: 1 to 63",
    ),
    "new block past the pool": (
        step(2, [Run(0, 8, new_blocks=[64])]),
        0,
        RowFaultCode.BAD_BLOCK,
        "block 64 is out of range: 1 to 63",
    ),
    "added block past the pool": (
        step(2, adds=[row_add(2, [1], [2**32 - 1])]),
        2,
        RowFaultCode.BAD_BLOCK,
        "block 4294967295 is out of range",
    ),
    "added block of the worker's own": (
        step(2, adds=[row_add(2, [1], [0])]),
        2,
        RowFaultCode.BAD_BLOCK,
        "block 0 is out of range",
    ),
    "write to a block that another row reads": (
        step(2, [Run(0, 8, new_blocks=[5])]),
        0,
        RowFaultCode.BAD_BLOCK,
        "block 5 is written at position 8, but row 1 holds it too",
    ),
    "write to a block of its own prefix": (
        step(2, [Run(0, 8, new_blocks=[1])]),
        0,
        RowFaultCode.BAD_BLOCK,
        "block 1 is written at position 8, but it is twice in the row's own table",
    ),
    "claim of a block that was never written": (
        step(2, adds=[row_add(2, [*PREFIX, 1], [1, 9, 10], num_computed_tokens=8)]),
        2,
        RowFaultCode.BAD_BLOCK,
        r"claims 8, but offset 0 of block 9 \(position 4\) was never written",
    ),
    "claim of a block that is half written": (
        step(2, adds=[row_add(2, [20, 21, 22, 23, 24], [5, 6], num_computed_tokens=4)]),
        2,
        RowFaultCode.BAD_BLOCK,
        r"claims 4, but offset 3 of block 5 \(position 3\) was never written",
    ),
    "claim of another prefix": (
        step(2, adds=[row_add(2, [*PREFIX[:5], 99, *PREFIX[6:], 1], [1, 2, 3], num_computed_tokens=8)]),
        2,
        RowFaultCode.BAD_BLOCK,
        r"offset 1 of block 2 \(position 5\) holds another prefix",
    ),
    "claim of the right tokens at the wrong place": (
        step(2, adds=[row_add(2, [*PREFIX[4:], 1], [2, 3], num_computed_tokens=4)]),
        2,
        RowFaultCode.BAD_BLOCK,
        r"offset 0 of block 2 \(position 0\) holds another prefix",
    ),
    "claim beyond the table": (
        step(2, adds=[row_add(2, [*PREFIX, 1], [1], num_computed_tokens=8)]),
        2,
        RowFaultCode.BAD_BLOCK,
        "num_computed_tokens is 8, and the table's 1 blocks hold 4",
    ),
    "a block twice in an added table": (
        step(2, adds=[row_add(2, [1], [7, 8, 7])]),
        2,
        RowFaultCode.BAD_BLOCK,
        "twice in its table",
    ),
    "a token outside the vocabulary": (
        step(2, adds=[row_add(2, [1, 2, 100], [7])]),
        2,
        RowFaultCode.BAD_TOKEN,
        "token 100 at position 2: vocab_size is 100",
    ),
    "too many logprobs": (
        step(2, adds=[row_add(2, [1], [7], num_logprobs=21)]),
        2,
        RowFaultCode.UNSUPPORTED,
        "num_logprobs is 21, and max_num_logprobs 20",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_oracle_finds(name: str) -> None:
    batch, row, code, message = PLANTED[name]
    runner = prefilled()
    result = execute(runner, batch)
    found = faults_of(result)
    assert [(found_row, found_code) for found_row, found_code, _ in found] == [(row, code)]
    with pytest.raises(ValueError, match=message):
        raise ValueError(found[0][2])
    assert runner.oracle.findings == {code: 1}
    assert runner.oracle.audit() == []
    # The rest of the worker is unharmed: the other row goes on.
    other = 1 - row if row in (0, 1) else 0
    runs = [Run(0, 8, new_blocks=[40])] if other == 0 else [Run(1, 3, 3, new_blocks=[40])]
    after = execute(runner, step(3, runs))
    assert after.faults == [] and list(tokens_of(after)) == [other]


@pytest.mark.parametrize("name", PLANTED)
def test_strict_fails_the_worker_instead(name: str) -> None:
    batch, _, _, message = PLANTED[name]
    with pytest.raises(SimulatedFailure, match=message):
        execute(prefilled(dataclasses.replace(SPEC, strict=True)), batch)


def test_two_rows_that_write_one_slot_both_fail() -> None:
    runner = prefilled()
    adds = [row_add(2, [1, 2], [30]), row_add(3, [3], [30])]
    result = execute(runner, step(2, [Run(2, 0, 2), Run(3, 0), Run(0, 8, new_blocks=[3])], adds=adds))
    assert faults_of(result) == [
        (2, RowFaultCode.BAD_BLOCK, "offset 0 of block 30 is written by rows 2 and 3 in the same step"),
        (3, RowFaultCode.BAD_BLOCK, "offset 0 of block 30 is written by rows 3 and 2 in the same step"),
    ]
    assert list(tokens_of(result)) == [0]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (step(2, [Run(0, 8, new_blocks=[3])], bucket=9), "bucket 9 is not one of the announced"),
        (step(2, [Run(1, 3, 3), Run(0, 8)], bucket=2), "bucket 2 is smaller than the step's 4 tokens"),
        (step(2, [Run(1, 3, 65)], bucket=64), "sums to 68, more than max_num_batched_tokens 64|sums to 65, more than"),
        (step(2, [Run(8, 0)], bucket=2), "rows are below max_num_seqs 8"),
    ],
)
def test_a_step_that_cannot_run_is_refused_as_a_whole(batch: StepBatch, message: str) -> None:
    spec = dataclasses.replace(SPEC, buckets=(2, 64))
    runner = SimulatedRunner(spec)
    adds = [row_add(0, range(10, 18), [1, 2]), row_add(1, range(20, 26), [5])]
    execute(runner, step(1, [Run(0, 0, 8), Run(1, 0, 3, samples=False)], adds=adds, bucket=64))
    with pytest.raises(StepError, match=message):
        execute(runner, batch)
    with pytest.raises(SimulatedFailure, match=message):
        execute(SimulatedRunner(dataclasses.replace(spec, strict=True)), batch)


def test_a_shared_prefix_is_read_but_not_written() -> None:
    runner = prefilled()
    add = row_add(2, [*PREFIX, 50, 51], [1, 2, 3], num_computed_tokens=8)
    result = execute(runner, step(2, [Run(2, 8, 2), Run(0, 8, new_blocks=[4])], adds=[add]))
    assert result.faults == [] and sorted(tokens_of(result)) == [0, 2]
    # The prefix outlives the row that computed it, until its blocks are used again.
    result = execute(
        runner,
        step(3, [Run(3, 4, 5)], adds=[row_add(3, [*PREFIX, 60], [1, 7, 8], num_computed_tokens=4)], drops=[0, 2]),
    )
    assert result.faults == []
    execute(runner, step(4, [Run(4, 0)], adds=[row_add(4, [77], [2])]))
    result = execute(runner, step(5, adds=[row_add(5, [*PREFIX, 60], [1, 2, 9], num_computed_tokens=8)]))
    assert [(row, code) for row, code, _ in faults_of(result)] == [(5, RowFaultCode.BAD_BLOCK)]
    assert runner.oracle.audit() == []


def test_a_sequence_ends_at_max_model_len() -> None:
    runner = SimulatedRunner(SPEC)
    add = row_add(0, [1] * 63, range(1, 17))
    assert execute(runner, step(1, [Run(0, 0, 63)], adds=[add])).faults == []
    result = execute(runner, step(2, [Run(0, 63)]))
    assert faults_of(result) == [(0, RowFaultCode.UNSUPPORTED, "run samples at position 64, but max_model_len is 64")]


def test_steps_in_flight_when_a_row_fails_are_nobodys_mistake() -> None:
    runner = prefilled(dataclasses.replace(SPEC, strict=True, fault_row_token=25))
    result = execute(runner, step(2, [Run(1, 3, 3, new_blocks=[6]), Run(0, 8, new_blocks=[3])]))
    [(row, code, message)] = faults_of(result)
    assert (row, code) == (1, RowFaultCode.NOT_FINITE) and "sim_fault_row_token 25" in message
    assert list(tokens_of(result)) == [0]
    # Sent before the fault was known: it runs the row, then drops it.
    result = execute(runner, step(3, [Run(1, 6), Run(0, 9)]))
    assert [(row, code) for row, code, _ in faults_of(result)] == [(1, RowFaultCode.UNKNOWN_ROW)]
    assert execute(runner, step(4, [Run(0, 10)], drops=[1])).faults == []
    assert runner.oracle.findings.total() == 0
    with pytest.raises(SimulatedFailure, match="row 1 is not occupied"):
        execute(runner, step(5, [Run(1, 6)]))


def test_a_row_whose_add_failed_is_reported_once() -> None:
    runner = SimulatedRunner(SPEC)
    result = execute(runner, step(1, [Run(2, 0)], adds=[row_add(2, [100], [7])]))
    assert [(row, code) for row, code, _ in faults_of(result)] == [(2, RowFaultCode.BAD_TOKEN)]


def test_reset_forgets_rows_and_blocks() -> None:
    runner = prefilled()
    runner.reset()
    add = row_add(0, [*PREFIX, 1], [1, 2, 3], num_computed_tokens=8)
    assert "was never written" in faults_of(execute(runner, step(1, adds=[add])))[0][2]
    assert faults_of(execute(runner, step(2, [Run(1, 3, 3)])))[0][1] == RowFaultCode.UNKNOWN_ROW
    assert execute(runner, step(3, [Run(3, 0)], adds=[row_add(3, [1], [1])])).faults == []
    assert runner.oracle.audit() == []


# Against a control plane in small: whatever it does is in order, and any one number changed in it is found.


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
