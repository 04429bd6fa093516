from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_kernels import reference_steps, step_input
from stepwire_kernels.step_input import (
    RUN_COUNTS,
    RUN_SAMPLES,
    RowState,
    StepInput,
    TableWrite,
    allocate_row_state,
    allocate_step_input,
    pack_step,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_SIZE = 16
NUM_ROWS, MAX_LEN, VOCAB = 5, 2100, 300


def make_rows(device: str = DEVICE) -> RowState:
    return allocate_row_state(NUM_ROWS, MAX_LEN, BLOCK_SIZE, VOCAB, device, max_biases=4)


def to_device(buffer: np.ndarray, device: str = DEVICE) -> torch.Tensor:
    # What follows the buffer on the device is an older, longer step's: it must not matter.
    return torch.cat([torch.from_numpy(buffer), torch.full((50,), 1_000_000, dtype=torch.int32)]).to(device)


def same_rows(left: RowState, right: RowState) -> bool:
    return all(
        torch.equal(getattr(left, name), getattr(right, name))
        for name in ("tokens", "lengths", "block_tables", "parameters", "biases", "token_counts")
    )


def poisoned_step(max_runs: int, max_tokens: int) -> StepInput:
    step = allocate_step_input(max_runs, max_tokens, DEVICE)
    for tensor in vars(step).values():
        tensor.fill_(-77)
    return step


def assert_same_step(step: StepInput, twin: StepInput) -> None:
    for name, tensor in vars(step).items():
        assert torch.equal(tensor, getattr(twin, name)), name


def added_row(row: int, tokens: list[int], blocks: list[int], prompt: int) -> tuple[list[TableWrite], list[int]]:
    table_width = -(-MAX_LEN // BLOCK_SIZE)
    parameters = reference_steps.RowParameters(temperature=0.5, seed=row + 2**40, biases=((3, 1.5),))
    writes = [
        TableWrite(step_input.TABLE_TOKENS, row * MAX_LEN, np.array(tokens, dtype=np.int32)),
        TableWrite(step_input.TABLE_LENGTHS, row, np.array([len(tokens)], dtype=np.int32)),
        TableWrite(step_input.TABLE_BLOCKS, row * table_width, np.array(blocks, dtype=np.int32)),
        TableWrite(step_input.TABLE_PARAMETERS, row * step_input.PARAMETER_WORDS, parameters.words()),
        TableWrite(step_input.TABLE_BIASES, row * 8, parameters.bias_words(4).reshape(-1)),
    ]
    return writes, [row, prompt, len(tokens), 0]


def random_add(rng: np.random.Generator, row: int, length: int) -> tuple[list[TableWrite], list[int]]:
    tokens = rng.integers(0, VOCAB, length).tolist()
    blocks = rng.permutation(np.arange(1, 400))[: -(-length // BLOCK_SIZE) + 1].tolist()
    return added_row(row, tokens, blocks, int(rng.integers(0, length + 1)))


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=4),
    bucket=st.integers(0, 300),
)
def test_mixed_step_matches_twin(seed: int, lengths: list[int], bucket: int) -> None:
    rng = np.random.default_rng(seed)
    rows, twin_rows = make_rows(), make_rows()
    writes: list[TableWrite] = []
    counts, runs = [], []
    for row, length in enumerate(lengths):
        new_writes, count = random_add(rng, row, length)
        writes += new_writes
        counts.append(count)
        start = int(rng.integers(0, length))
        runs.append([row, start, int(rng.integers(1, length - start + 1)), int(rng.integers(0, 4))])
    rng.shuffle(runs)
    buffer = to_device(pack_step(writes, np.array(runs, dtype=np.int32), np.array(counts, dtype=np.int32)))
    rows.token_counts.fill_(9)
    twin_rows.token_counts.fill_(9)
    step_input.apply_delta(buffer, rows, num_programs=3)
    step_input.recount_tokens(buffer, rows, num_programs=2)
    reference_steps.apply_delta(buffer, twin_rows)
    reference_steps.recount_tokens(buffer, twin_rows)
    assert same_rows(rows, twin_rows)

    num_tokens = sum(run[2] for run in runs)
    max_runs = len(runs) + (2 if bucket else 0)
    step, twin = (poisoned_step(max_runs, num_tokens + bucket) for _ in range(2))
    step_input.build_step_input(buffer, rows, step, BLOCK_SIZE, one_token_runs=False)
    reference_steps.build_step_input(buffer, twin_rows, twin, BLOCK_SIZE, one_token_runs=False)
    assert_same_step(step, twin)
    assert int(step.query_starts[-1]) == num_tokens + bucket

    sampled = torch.from_numpy(rng.integers(0, VOCAB, max_runs).astype(np.int32)).to(DEVICE)
    step_input.write_back_tokens(sampled, step, rows)
    reference_steps.write_back_tokens(sampled, twin, twin_rows)
    assert same_rows(rows, twin_rows)


def test_decode_steps_read_what_the_last_step_sampled() -> None:
    rows = make_rows()
    writes, count = added_row(2, [11, 12, 13], [7, 9], prompt=2)
    step = poisoned_step(4, 4)
    runs = np.array([[2, 2, 1, RUN_SAMPLES | RUN_COUNTS]], dtype=np.int32)
    buffer = to_device(pack_step(writes, runs, np.array([count], dtype=np.int32)))
    step_input.apply_delta(buffer, rows)
    step_input.recount_tokens(buffer, rows)
    for number, (expected_id, sampled_id) in enumerate(((13, 21), (21, 22), (22, 21))):
        step_input.build_step_input(buffer, rows, step, BLOCK_SIZE, one_token_runs=True)
        assert step.input_ids.tolist() == [expected_id, 0, 0, 0]
        assert step.positions.tolist() == [2 + number, 0, 0, 0]
        assert step.slots.tolist() == [7 * BLOCK_SIZE + 2 + number, 0, 0, 0]
        assert step.kv_lens.tolist() == [3 + number, 0, 0, 0]
        assert step.query_starts.tolist() == [0, 1, 2, 3, 4]
        assert step.faults.tolist() == [0, 0, 0, 0]
        sampled = torch.tensor([sampled_id, 5, 6, 7], dtype=torch.int32, device=DEVICE)
        step_input.write_back_tokens(sampled, step, rows)
        runs[0, 1] += 1
        buffer = to_device(pack_step([], runs))
        step_input.apply_delta(buffer, rows)
    assert rows.tokens[2, :6].tolist() == [11, 12, 13, 21, 22, 21]
    assert rows.lengths.tolist() == [0, 0, 6, 0, 0]
    seen = {token: int(rows.token_counts[2, token]) for token in (11, 12, 13, 21, 22)}
    prompt = step_input.PROMPT_FLAG
    assert seen == {11: prompt, 12: prompt, 13: 1, 21: 2, 22: 1}
    assert int((rows.token_counts != 0).sum()) == 5


def test_a_run_beyond_the_known_tokens_is_a_fault() -> None:
    rows = make_rows()
    writes, _ = added_row(0, [1, 2, 3], [5], prompt=3)
    runs = np.array([[0, 2, 1, 1], [0, 3, 1, 1]], dtype=np.int32)
    buffer = to_device(pack_step(writes, runs))
    step_input.apply_delta(buffer, rows)
    step = poisoned_step(3, 3)
    step_input.build_step_input(buffer, rows, step, BLOCK_SIZE, one_token_runs=True)
    assert step.faults.tolist() == [0, step_input.FAULT_UNKNOWN_TOKENS, 0]


def test_a_full_row_keeps_its_tokens() -> None:
    rows = make_rows()
    writes, _ = added_row(1, list(range(100)) * 21, [5] * 132, prompt=3)
    buffer = to_device(pack_step(writes, np.array([[1, MAX_LEN - 1, 1, 1]], dtype=np.int32)))
    step_input.apply_delta(buffer, rows)
    step = poisoned_step(1, 1)
    step_input.build_step_input(buffer, rows, step, BLOCK_SIZE, one_token_runs=True)
    before = rows.tokens.clone()
    step_input.write_back_tokens(torch.tensor([9], dtype=torch.int32, device=DEVICE), step, rows)
    assert torch.equal(rows.tokens, before)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="one token a run"):
        step_input.build_step_input(
            to_device(pack_step([], np.zeros((0, 4), dtype=np.int32))),
            make_rows(), poisoned_step(2, 3), BLOCK_SIZE, one_token_runs=True,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"must be \[n, 4\]"):
        pack_step([], np.zeros((1, 3), dtype=np.int32))
