"""The simulated worker checks every step: each planted error is found, and named."""

from __future__ import annotations

import dataclasses

import pytest

from gpu_worker.runner_api import RowFaultCode, StepBatch, StepError
from gpu_worker.simulated import SimulatedFailure, SimulatedRunner, SimulationSpec
from tests.unit.gpu_worker.simulated_worker import SPEC, execute, faults_of, tokens_of
from tests.unit.gpu_worker.step_builder import Run, row_add, step


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
