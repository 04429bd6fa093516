"""The table of rows: what a step reads from it, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.input_batch import InputBatch, StepInputs
from gpu_worker.row_table import BatchLimits
from gpu_worker.runner_api import RowAdd, RowFaultCode, RowSampling, StepBatch
from load_tests.cpu_worker.step_driver import greedy, sampling

LIMITS = BatchLimits(
    max_num_seqs=6,
    max_model_len=40,
    block_size=4,
    num_blocks=30,
    first_block_id=1,
    vocab_size=1000,
    max_num_logprobs=5,
)


def added(
    row: int, tokens: Sequence[int], blocks: Sequence[int] = (), computed: int = 0, params: RowSampling | None = None
) -> RowAdd:
    return RowAdd(
        row=row,
        token_ids=np.array(tokens, dtype=np.uint32),
        num_prompt_tokens=len(tokens),
        num_computed_tokens=computed,
        block_ids=np.array(blocks, dtype=np.uint32),
        sampling=params or greedy(),
    )


def step(
    *runs: tuple[int, int, int, bool, Sequence[int]], adds: Sequence[RowAdd] = (), drops: Sequence[int] = ()
) -> StepBatch:
    """runs: (row, start, num_tokens, samples, new blocks)."""
    return StepBatch(
        step_id=1,
        bucket=0,
        drop_rows=np.array(drops, dtype=np.uint32),
        adds=tuple(adds),
        run_rows=np.array([run[0] for run in runs], dtype=np.uint32),
        run_start_positions=np.array([run[1] for run in runs], dtype=np.uint32),
        run_num_tokens=np.array([run[2] for run in runs], dtype=np.uint32),
        run_samples=np.array([run[3] for run in runs], dtype=np.bool_),
        run_num_new_blocks=np.array([len(run[4]) for run in runs], dtype=np.uint32),
        new_block_ids=np.array([block for run in runs for block in run[4]], dtype=np.uint32),
        mask_rows=np.zeros(0, dtype=np.uint32),
    )


def apply(rows: InputBatch, batch: StepBatch) -> StepInputs:
    inputs, faults = rows.apply(batch)
    assert not faults
    assert inputs is not None
    return inputs


def test_a_prefill_reads_its_tokens_and_blocks() -> None:
    rows = InputBatch(LIMITS)
    inputs = apply(rows, step((2, 0, 5, True, [7, 3]), adds=[added(2, [10, 11, 12, 13, 14])]))
    assert inputs.token_ids.tolist() == [10, 11, 12, 13, 14]
    assert inputs.metadata.positions.tolist() == [0, 1, 2, 3, 4]
    assert inputs.metadata.num_decodes == 0
    assert inputs.metadata.block_tables.tolist() == [[7, 3]]
    assert inputs.sampled_rows.tolist() == [2]
    assert inputs.sampled_tokens.tolist() == [4]
    assert inputs.sampled_positions.tolist() == [5]


def test_a_sampled_token_runs_in_the_next_step_without_being_sent() -> None:
    rows = InputBatch(LIMITS)
    apply(rows, step((0, 0, 2, True, [1]), adds=[added(0, [5, 6])]))
    rows.append(0, 77)
    inputs = apply(rows, step((0, 2, 1, True, [])))
    assert inputs.token_ids.tolist() == [77]
    assert inputs.metadata.positions.tolist() == [2]
    assert inputs.metadata.context_lengths.tolist() == [3]


def test_single_tokens_go_first_and_samples_keep_the_step_s_order() -> None:
    rows = InputBatch(LIMITS)
    apply(rows, step((1, 0, 1, True, [9]), (3, 0, 1, True, [8]), adds=[added(1, [1]), added(3, [3])]))
    rows.append(1, 11)
    rows.append(3, 33)
    inputs = apply(
        rows,
        step(
            (4, 4, 3, False, [5]),
            (3, 1, 1, True, []),
            (5, 0, 2, True, [6]),
            (1, 1, 1, True, []),
            adds=[added(4, range(100, 108), [4], computed=4), added(5, [50, 51])],
        ),
    )
    assert inputs.metadata.num_decodes == 2
    assert inputs.token_ids.tolist() == [33, 11, 104, 105, 106, 50, 51]
    assert inputs.metadata.positions.tolist() == [1, 1, 4, 5, 6, 0, 1]
    assert inputs.metadata.query_lengths.tolist() == [1, 1, 3, 2]
    assert inputs.metadata.context_lengths.tolist() == [2, 2, 7, 2]
    assert inputs.metadata.block_tables[2].tolist() == [4, 5]
    assert inputs.sampled_rows.tolist() == [3, 5, 1]
    assert inputs.sampled_tokens.tolist() == [0, 6, 1]
    assert inputs.sampled_positions.tolist() == [2, 2, 2]


def test_a_row_that_is_dropped_and_added_again_in_one_step_starts_over() -> None:
    rows = InputBatch(LIMITS)
    apply(rows, step((0, 0, 3, True, [1]), adds=[added(0, [1, 2, 3])]))
    rows.append(0, 4)
    inputs = apply(rows, step((0, 0, 4, True, [2]), adds=[added(0, [1, 2, 3, 4])], drops=[0]))
    assert inputs.token_ids.tolist() == [1, 2, 3, 4]
    assert inputs.metadata.block_tables.tolist() == [[2]]


def test_a_step_of_drops_alone_computes_nothing() -> None:
    rows = InputBatch(LIMITS)
    apply(rows, step((0, 0, 1, True, [1]), adds=[added(0, [1])]))
    assert rows.apply(step(drops=[0])) == (None, [])


PROMPT = [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("batch", "code", "words"),
    [
        (step((1, 0, 1, True, [])), RowFaultCode.UNKNOWN_ROW, ["row 1"]),
        (step((0, 3, 1, True, [])), RowFaultCode.POSITION_MISMATCH, ["position 3", "5 tokens are computed"]),
        (step((0, 5, 2, True, [])), RowFaultCode.POSITION_MISMATCH, ["position 7", "only 6 tokens"]),
        (step((0, 5, 1, True, [30])), RowFaultCode.BAD_BLOCK, ["block 30", "1 <= block < 30"]),
        (step((0, 5, 1, True, [0])), RowFaultCode.BAD_BLOCK, ["block 0"]),
        (step((0, 5, 1, True, range(1, 10))), RowFaultCode.BAD_BLOCK, ["11 blocks", "max_model_len 40"]),
        (step(adds=[added(0, [9])]), RowFaultCode.POSITION_MISMATCH, ["row 0 is added", "not dropped"]),
        (step(adds=[added(2, [4, 1000])]), RowFaultCode.BAD_TOKEN, ["token id 1000", "position 1", "1000"]),
        (step(adds=[added(2, [4], [0])]), RowFaultCode.BAD_BLOCK, ["block 0"]),
        (step((2, 0, 5, True, [4]), adds=[added(2, PROMPT)]), RowFaultCode.BAD_BLOCK, ["1 blocks hold 4 tokens"]),
        (
            step(adds=[added(2, [4], params=sampling(num_logprobs=6))]),
            RowFaultCode.UNSUPPORTED,
            ["num_logprobs 6", "max_num_logprobs 5"],
        ),
        (
            step((2, 0, 3, True, [4]), adds=[added(2, PROMPT)]),
            RowFaultCode.POSITION_MISMATCH,
            ["samples after position 3", "5 tokens"],
        ),
    ],
)
def test_a_disagreement_fails_its_row_alone_and_forgets_it(
    batch: StepBatch, code: RowFaultCode, words: list[str]
) -> None:
    rows = InputBatch(LIMITS)
    apply(rows, step((0, 0, 5, True, [1, 2]), (5, 0, 5, True, [20, 21]), adds=[added(0, PROMPT), added(5, PROMPT)]))
    rows.append(0, 6)
    rows.append(5, 66)
    inputs, faults = rows.apply(batch)
    assert inputs is None
    assert [fault.code for fault in faults] == [code]
    for word in words:
        assert word in faults[0].message
    # The row is forgotten, its neighbour goes on.
    again, later = rows.apply(step((faults[0].row, 5, 1, True, []), (5, 5, 1, True, [])))
    assert [(fault.row, fault.code) for fault in later] == [(faults[0].row, RowFaultCode.UNKNOWN_ROW)]
    assert again is not None and again.token_ids.tolist() == [66]


def test_a_row_whose_add_failed_is_reported_once() -> None:
    rows = InputBatch(LIMITS)
    inputs, faults = rows.apply(step((2, 0, 1, True, [3]), adds=[added(2, [5000])]))
    assert inputs is None and [fault.code for fault in faults] == [RowFaultCode.BAD_TOKEN]


def test_the_last_token_of_the_longest_sequence_can_be_sampled_but_not_run() -> None:
    rows = InputBatch(LIMITS)
    inputs = apply(rows, step((0, 0, 40, True, range(1, 11)), adds=[added(0, range(40))]))
    assert inputs.sampled_positions.tolist() == [40]
    rows.append(0, 3)
    _, faults = rows.apply(step((0, 40, 1, True, [])))
    assert [fault.code for fault in faults] == [RowFaultCode.POSITION_MISMATCH]
    assert "max_model_len 40" in faults[0].message


def test_clear_forgets_everything() -> None:
    rows = InputBatch(LIMITS)
    apply(rows, step((0, 0, 1, True, [1]), adds=[added(0, [1])]))
    rows.clear()
    _, faults = rows.apply(step((0, 1, 1, True, [])))
    assert [fault.code for fault in faults] == [RowFaultCode.UNKNOWN_ROW]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_chunking_reads_every_token_once_in_order(data: st.DataObject) -> None:
    rows = InputBatch(LIMITS)
    lengths = data.draw(st.lists(st.integers(1, 36), min_size=1, max_size=3))
    pool = list(range(1, 30))
    expected = {row: [row * 100 + i for i in range(length)] for row, length in enumerate(lengths)}
    seen: dict[int, list[int]] = {row: [] for row in expected}
    held: dict[int, int] = {row: 0 for row in expected}
    adds = [added(row, [t % 1000 for t in tokens]) for row, tokens in expected.items()]
    while any(len(seen[row]) < len(expected[row]) for row in seen):
        waiting = [row for row in seen if len(seen[row]) < len(expected[row])]
        chosen = data.draw(st.permutations(waiting))[: data.draw(st.integers(1, len(waiting)))]
        runs, sizes = [], {}
        for row in chosen:
            size = data.draw(st.integers(1, len(expected[row]) - len(seen[row])))
            stop = len(seen[row]) + size
            new = [pool.pop() for _ in range(-(-stop // 4) - held[row])]
            held[row] += len(new)
            sizes[row] = size
            runs.append((row, len(seen[row]), size, stop == len(expected[row]), new))
        inputs = apply(rows, step(*runs, adds=adds))
        adds = []
        order = sorted(chosen, key=lambda row: sizes[row] != 1)
        ids = inputs.token_ids.tolist()
        for row in order:
            part, ids = ids[: sizes[row]], ids[sizes[row] :]
            seen[row] += part
        assert not ids
    assert seen == expected
