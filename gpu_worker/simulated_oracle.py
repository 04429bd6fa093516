"""A shadow of the worker's rows and KV blocks that finds out where a control plane breaks the contract.

Instead of keys and values every slot of the pool holds a *stamp*: a hash of all tokens up to and with the one whose KV
would lie there, so that equal stamps mean equal prefixes (chance of a miss: 2^-63). A row may read a slot only if
the stamp there is that of its own prefix.

Reads are not compared slot by slot in every step. They are compared when a row is added with tokens that it claims to
be computed; afterwards its slots can only be changed by a write to a block that it holds, and every write is refused
unless the writer is the block's only holder. `audit` compares everything, for tests.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpu_worker.row_table import prompt_logprobs_problem
from gpu_worker.runner_api import RowAdd, RowFault, RowFaultCode, StepBatch, UInt32Array, WorkerFacts

IntArray = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]


def mix64(values: UInt64Array) -> UInt64Array:
    """The finalizer of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(slots=True)
class CheckedStep:
    """The runs of a step that are in order, in run order, and the rows that are not."""

    rows: IntArray  # [num_good_runs]
    samples: BoolArray  # [num_good_runs]
    token_ids: UInt32Array  # [num_good_tokens]: what the runs computed, concatenated
    run_of_token: IntArray  # [num_good_tokens]: index into rows
    faults: list[RowFault]


@dataclass(slots=True)
class _Runs:
    """The runs of a step that are still in order, as the checks go on."""

    rows: IntArray  # [num_runs]
    start: IntArray
    end: IntArray
    samples: BoolArray

    def keep(self, good: BoolArray) -> _Runs:
        return _Runs(self.rows[good], self.start[good], self.end[good], self.samples[good])


class Oracle:
    """Rows and blocks as a worker with these facts would hold them."""

    def __init__(self, facts: WorkerFacts) -> None:
        self._facts = facts
        num_rows, max_len = facts.max_num_seqs, facts.max_model_len
        self._max_row_blocks = -(-max_len // facts.block_size)
        # The hash of a prefix is the sum of token_hash[token] * weight[position] mod 2^64: one cumsum makes them all.
        self._token_hash = mix64(np.arange(1, facts.vocab_size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        self._weights = np.random.default_rng(0x5EED).integers(0, 2**64, size=max_len, dtype=np.uint64) | np.uint64(1)
        self.occupied = np.zeros(num_rows, dtype=np.bool_)
        self.num_tokens = np.zeros(num_rows, dtype=np.int64)
        self.num_computed = np.zeros(num_rows, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(num_rows, dtype=np.int64)
        self.tokens = np.zeros((num_rows, max_len), dtype=np.uint32)
        self._table = np.zeros((num_rows, self._max_row_blocks), dtype=np.int64)
        self._num_row_blocks = np.zeros(num_rows, dtype=np.int64)
        self._prefix_hash = np.zeros(num_rows, dtype=np.uint64)  # of the row's computed tokens
        # Rows that ended with a fault: steps that were in flight may still run or drop them, through nobody's mistake.
        self._failed = np.zeros(num_rows, dtype=np.bool_)
        self._num_holders = np.zeros(facts.num_blocks, dtype=np.int32)  # rows whose table has the block
        self._stamps = np.zeros(facts.num_blocks * facts.block_size, dtype=np.uint64)  # [num_slots], 0: never written
        self.findings: Counter[RowFaultCode] = Counter()

    def reset(self) -> None:
        """A new session: no row is occupied, and no block holds anything. The count of findings stays."""
        for array in (self.occupied, self._failed, self._num_row_blocks, self._num_holders, self._stamps):
            array.fill(0)

    def apply(self, batch: StepBatch) -> CheckedStep:
        """Drop, add, then run all rows together; a row that is not in order is forgotten and reported."""
        faults: list[RowFault] = []
        for row in batch.drop_rows.tolist():
            self._drop(row, faults)
        dropped_in_vain = {fault.row for fault in faults}
        for add in batch.adds:
            if add.row in dropped_in_vain:
                self._failed[add.row] = True
            else:
                self._add(add, faults)
        runs, run_index = self._check_positions(batch, faults)
        runs = self._extend_tables(batch, runs, run_index, faults)
        return self._write(runs, faults)

    def append(self, rows: IntArray, token_ids: UInt32Array) -> None:
        """A sampled token for each of `rows`; the next step may run it."""
        self.tokens[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1

    def forget(self, row: int) -> None:
        """The row ended with a fault."""
        if self.occupied[row]:
            self._release(row)
        self._failed[row] = True

    def audit(self) -> list[str]:
        """Compare every slot that any row may read with the row's prefix, and the holders with the tables. Slow."""
        problems = []
        holders = np.zeros_like(self._num_holders)
        for row in np.flatnonzero(self.occupied).tolist():
            table = self._table[row, : self._num_row_blocks[row]]
            np.add.at(holders, table, 1)
            bad = self._first_unreadable(self.tokens[row, : self.num_computed[row]], table)
            if bad is not None:
                problems.append(f"row {row}: the slot of position {bad} does not hold the row's prefix")
        if not np.array_equal(holders, self._num_holders):
            problems.append("the counts of holders are not those of the tables")
        return problems

    # Drop and add, one row at a time.

    def _drop(self, row: int, faults: list[RowFault]) -> None:
        if self.occupied[row]:
            self._release(row)
        elif not self._failed[row]:
            self._find(faults, row, RowFaultCode.UNKNOWN_ROW, f"row {row} is dropped, but it is not occupied")
        self._failed[row] = False

    def _release(self, row: int) -> None:
        np.subtract.at(self._num_holders, self._table[row, : self._num_row_blocks[row]], 1)
        self.occupied[row] = False
        self._num_row_blocks[row] = 0

    def _add(self, add: RowAdd, faults: list[RowFault]) -> None:
        row, num_tokens, num_computed = add.row, len(add.token_ids), add.num_computed_tokens
        problem = self._check_add(add)
        if problem is not None:
            self._find(faults, row, *problem)
            self.forget(row)
            return
        self.occupied[row] = True
        self._failed[row] = False
        self.tokens[row, :num_tokens] = add.token_ids
        self.num_tokens[row] = num_tokens
        self.num_prompt_tokens[row] = add.num_prompt_tokens
        self.num_computed[row] = num_computed
        self._table[row, : len(add.block_ids)] = add.block_ids
        self._num_row_blocks[row] = len(add.block_ids)
        np.add.at(self._num_holders, add.block_ids, 1)
        hashes = self._prefix_hashes(add.token_ids[:num_computed])
        self._prefix_hash[row] = hashes[-1] if num_computed else 0

    def _check_add(self, add: RowAdd) -> tuple[RowFaultCode, str] | None:
        facts, row = self._facts, add.row
        if self.occupied[row]:
            return RowFaultCode.POSITION_MISMATCH, f"row {row} is added, but it is occupied and was not dropped"
        if add.token_ids.max() >= facts.vocab_size:
            index = int(np.argmax(add.token_ids))
            token = add.token_ids[index]
            return RowFaultCode.BAD_TOKEN, f"token {token} at position {index}: vocab_size is {facts.vocab_size}"
        num_logprobs = add.sampling.num_logprobs
        if num_logprobs is not None and num_logprobs > facts.max_num_logprobs:
            message = f"num_logprobs is {num_logprobs}, and max_num_logprobs {facts.max_num_logprobs}"
            return RowFaultCode.UNSUPPORTED, message
        if add.sampling.num_prompt_logprobs is not None:
            problem = prompt_logprobs_problem(add, facts.max_num_logprobs, is_possible=facts.can_prompt_logprobs)
            if problem is not None:
                return RowFaultCode.UNSUPPORTED, problem
        blocks = add.block_ids
        outside = (blocks < facts.first_block_id) | (blocks >= facts.num_blocks)
        if outside.any():
            return RowFaultCode.BAD_BLOCK, self._range_message(int(blocks[outside][0]))
        if len(np.unique(blocks)) != len(blocks):
            return RowFaultCode.BAD_BLOCK, f"row {row} is added with a block that is twice in its table"
        num_held = len(blocks) * facts.block_size
        if num_held < add.num_computed_tokens:
            claim = f"num_computed_tokens is {add.num_computed_tokens}"
            return RowFaultCode.BAD_BLOCK, f"{claim}, and the table's {len(blocks)} blocks hold {num_held}"
        return self._check_claim(add)

    def _check_claim(self, add: RowAdd) -> tuple[RowFaultCode, str] | None:
        table = add.block_ids.astype(np.int64)
        position = self._first_unreadable(add.token_ids[: add.num_computed_tokens], table)
        if position is None:
            return None
        block, offset = int(table[position // self._facts.block_size]), position % self._facts.block_size
        written = self._stamps[block * self._facts.block_size + offset] != 0
        state = "holds another prefix" if written else "was never written"
        where = f"offset {offset} of block {block} (position {position})"
        return RowFaultCode.BAD_BLOCK, f"num_computed_tokens claims {add.num_computed_tokens}, but {where} {state}"

    def _first_unreadable(self, token_ids: UInt32Array, table: IntArray) -> int | None:
        """The first position whose slot does not hold the prefix that `token_ids` make."""
        if len(token_ids) == 0:
            return None
        block_size = self._facts.block_size
        num_blocks = -(-len(token_ids) // block_size)
        slots = (table[:num_blocks, None] * block_size + np.arange(block_size)).reshape(-1)[: len(token_ids)]
        wrong = self._stamps[slots] != (self._prefix_hashes(token_ids) | np.uint64(1))
        return int(np.argmax(wrong)) if wrong.any() else None

    def _prefix_hashes(self, token_ids: UInt32Array) -> UInt64Array:
        return np.cumsum(self._token_hash[token_ids] * self._weights[: len(token_ids)], dtype=np.uint64)

    # Runs, all rows together.

    def _check_positions(self, batch: StepBatch, faults: list[RowFault]) -> tuple[_Runs, IntArray]:
        """Runs whose row is there and agrees about history, and their indices in the batch."""
        start = batch.run_start_positions.astype(np.int64)
        runs = _Runs(batch.run_rows.astype(np.int64), start, start + batch.run_num_tokens, batch.run_samples)
        index = np.arange(len(runs.rows))
        occupied = self.occupied[runs.rows]
        if not occupied.all():
            for row in runs.rows[~occupied].tolist():
                self._report_unknown(row, faults)
            runs, index = runs.keep(occupied), index[occupied]
        num_tokens = self.num_tokens[runs.rows]
        misplaced = (runs.start != self.num_computed[runs.rows]) | (runs.end > num_tokens)
        misplaced |= runs.samples & (runs.end < num_tokens)
        full = runs.samples & (runs.end >= self._facts.max_model_len) & ~misplaced
        bad = misplaced | full
        if bad.any():
            for i in np.flatnonzero(bad).tolist():
                self._report_position(runs, i, faults)
            runs, index = runs.keep(~bad), index[~bad]
        return runs, index

    def _extend_tables(self, batch: StepBatch, runs: _Runs, index: IntArray, faults: list[RowFault]) -> _Runs:
        """Append the runs' new blocks to their tables; runs whose table then holds all their positions."""
        facts = self._facts
        bad = np.zeros(len(runs.rows), dtype=np.bool_)
        if len(batch.new_block_ids):
            counts = batch.run_num_new_blocks.astype(np.int64)
            first = (np.cumsum(counts) - counts)[index]  # of the run's blocks in new_block_ids
            counts = counts[index]
            owner = np.repeat(np.arange(len(index)), counts)  # [num_new]: index into runs
            nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
            blocks = batch.new_block_ids[first[owner] + nth].astype(np.int64)
            column = self._num_row_blocks[runs.rows[owner]] + nth
            outside = (blocks < facts.first_block_id) | (blocks >= facts.num_blocks)
            wrong = outside | (column >= self._max_row_blocks)
            if wrong.any():
                self._report_new_blocks(runs, owner, blocks, outside, wrong, faults)
                bad[owner[wrong]] = True
                good = ~bad[owner]
                owner, blocks, column = owner[good], blocks[good], column[good]
            self._table[runs.rows[owner], column] = blocks
            np.add.at(self._num_holders, blocks, 1)
            np.add.at(self._num_row_blocks, runs.rows[owner], 1)
        num_held = self._num_row_blocks[runs.rows] * facts.block_size
        short = (num_held < runs.end) & ~bad
        if short.any():
            for i in np.flatnonzero(short).tolist():
                held = f"the table's {num_held[i] // facts.block_size} blocks hold {num_held[i]}"
                message = f"run to position {runs.end[i] - 1}, but {held}"
                self._fault(faults, int(runs.rows[i]), RowFaultCode.BAD_BLOCK, message)
            bad |= short
        return runs.keep(~bad) if bad.any() else runs

    def _write(self, runs: _Runs, faults: list[RowFault]) -> CheckedStep:
        """Compute the runs: stamp their slots, unless another row holds the block."""
        block_size = self._facts.block_size
        run, position = _flatten(runs)
        block = self._table[runs.rows[run], position // block_size]
        shared = self._num_holders[block] > 1
        if shared.any():
            bad_runs = np.unique(run[shared])
            messages = [self._shared_message(runs, i, run, position, block, shared) for i in bad_runs.tolist()]
            for i, message in zip(bad_runs.tolist(), messages, strict=True):
                self._fault(faults, int(runs.rows[i]), RowFaultCode.BAD_BLOCK, message)
            good = np.ones(len(runs.rows), dtype=np.bool_)
            good[bad_runs] = False
            runs, block = runs.keep(good), block[good[run]]
            run, position = _flatten(runs)
        rows, lengths = runs.rows, runs.end - runs.start
        token_ids = self.tokens[rows[run], position]
        hashes = self._prefix_hash[rows][run] + _sums_within(
            self._token_hash[token_ids] * self._weights[position], run, lengths
        )
        self._stamps[block * block_size + position % block_size] = hashes | np.uint64(1)
        self._prefix_hash[rows] = hashes[np.cumsum(lengths) - 1]
        self.num_computed[rows] = runs.end
        return CheckedStep(rows=rows, samples=runs.samples, token_ids=token_ids, run_of_token=run, faults=faults)

    # Findings.

    def _find(self, faults: list[RowFault], row: int, code: RowFaultCode, message: str) -> None:
        self.findings[code] += 1
        faults.append(RowFault(row=row, code=code, message=message))

    def _fault(self, faults: list[RowFault], row: int, code: RowFaultCode, message: str) -> None:
        self._find(faults, row, code, message)
        self.forget(row)

    def _report_unknown(self, row: int, faults: list[RowFault]) -> None:
        message = f"row {row} is not occupied"
        if not self._failed[row]:
            self._find(faults, row, RowFaultCode.UNKNOWN_ROW, message)
        elif all(fault.row != row for fault in faults):
            # It failed in an earlier step, and this one was on its way already: true, but nobody's mistake.
            faults.append(
                RowFault(row=row, code=RowFaultCode.UNKNOWN_ROW, message=f"{message}: it failed in an earlier step")
            )

    def _report_position(self, runs: _Runs, i: int, faults: list[RowFault]) -> None:
        row, start, end = int(runs.rows[i]), int(runs.start[i]), int(runs.end[i])
        num_computed, num_tokens = int(self.num_computed[row]), int(self.num_tokens[row])
        code = RowFaultCode.POSITION_MISMATCH
        if start != num_computed:
            message = f"run starts at position {start}, but the row has {num_computed} computed tokens"
        elif end > num_tokens:
            message = f"run ends before position {end}, but the row has {num_tokens} tokens"
        elif end < num_tokens:
            message = f"run samples at position {end}, but the row has a token there already ({num_tokens} tokens)"
        else:
            code = RowFaultCode.UNSUPPORTED
            message = f"run samples at position {end}, but max_model_len is {self._facts.max_model_len}"
        self._fault(faults, row, code, message)

    def _report_new_blocks(
        self,
        runs: _Runs,
        owner: IntArray,
        blocks: IntArray,
        outside: BoolArray,
        wrong: BoolArray,
        faults: list[RowFault],
    ) -> None:
        for i in np.unique(owner[wrong]).tolist():
            mine = outside & (owner == i)
            if mine.any():
                message = self._range_message(int(blocks[mine][0]))
            else:
                message = f"the table would have more than the {self._max_row_blocks} blocks that max_model_len needs"
            self._fault(faults, int(runs.rows[i]), RowFaultCode.BAD_BLOCK, message)

    def _range_message(self, block: int) -> str:
        return (
            f"block {block} is out of range: {self._facts.first_block_id} to {self._facts.num_blocks - 1} are possible"
        )

    def _shared_message(
        self, runs: _Runs, i: int, run: IntArray, position: IntArray, block: IntArray, shared: BoolArray
    ) -> str:
        first = int(np.flatnonzero(shared & (run == i))[0])
        where, row, bad_block = int(position[first]), int(runs.rows[i]), int(block[first])
        others = [
            other
            for other in np.flatnonzero(self.occupied).tolist()
            if other != row and bad_block in self._table[other, : self._num_row_blocks[other]]
        ]
        if not others:
            return f"block {bad_block} is written at position {where}, but it is twice in the row's own table"
        block_size = self._facts.block_size
        same_slot = (block == bad_block) & (position % block_size == where % block_size) & (run != i)
        if same_slot.any():
            also = int(runs.rows[run[same_slot][0]])
            return (
                f"offset {where % block_size} of block {bad_block} is written by rows {row} and {also} in the same step"
            )
        return f"block {bad_block} is written at position {where}, but row {others[0]} holds it too"


def _flatten(runs: _Runs) -> tuple[IntArray, IntArray]:
    """For every token of the runs: which run it belongs to, and its position in the sequence."""
    lengths = runs.end - runs.start
    run = np.repeat(np.arange(len(lengths)), lengths)
    before = np.cumsum(lengths) - lengths
    return run, runs.start[run] + np.arange(len(run)) - before[run]


def _sums_within(values: UInt64Array, run: IntArray, lengths: IntArray) -> UInt64Array:
    """Cumulative sums that start anew with every run, mod 2^64."""
    sums: UInt64Array = np.cumsum(values, dtype=np.uint64)
    before = np.cumsum(lengths) - lengths
    at_start: UInt64Array = sums[before] - values[before]
    return sums - at_start[run]
