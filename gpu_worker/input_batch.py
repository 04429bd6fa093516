"""The persistent table of rows, and what a step's forward pass reads from it.

A row keeps its token ids (prompt, what was generated, what is sampled here), its block table, how many of its tokens
are computed, and its sampler. A sampled token goes straight into the table, so that the next step may run it without
its value ever having been sent back. What disagrees with the table is a `RowFault` of that row, and the row is
forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpu_worker.attention.api import StepMetadata
from gpu_worker.runner_api import RowAdd, RowFault, RowFaultCode, StepBatch
from gpu_worker.sampler import RowSampler

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What rows are checked against."""

    max_num_seqs: int
    max_model_len: int
    block_size: int
    num_blocks: int
    first_block_id: int
    vocab_size: int
    max_num_logprobs: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's forward pass: runs with one token first, otherwise in the step's order."""

    token_ids: IntArray  # [num_tokens]
    metadata: StepMetadata
    sampled_rows: IntArray  # [num_sampled], in the step's run order
    sampled_tokens: IntArray  # [num_sampled]: which of the step's tokens is the last of its run
    sampled_positions: IntArray  # [num_sampled]: index of the token to be drawn in its sequence


class InputBatch:
    """The rows of one session."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        max_blocks = -(-limits.max_model_len // limits.block_size)
        num_rows = limits.max_num_seqs
        # One token more than a sequence may have: the last step samples a token that is never run.
        self._tokens = np.zeros((num_rows, limits.max_model_len + 1), dtype=np.int32)
        self._block_tables = np.zeros((num_rows, max_blocks), dtype=np.int64)
        self._num_blocks = np.zeros(num_rows, dtype=np.int64)
        self._lengths = np.zeros(num_rows, dtype=np.int64)
        self._computed = np.zeros(num_rows, dtype=np.int64)
        self._samplers: list[RowSampler | None] = [None] * num_rows

    def clear(self) -> None:
        """Forget every row."""
        for row in range(self._limits.max_num_seqs):
            self._forget(row)

    def _forget(self, row: int) -> None:
        # A row of length 0 is not occupied.
        self._samplers[row] = None
        self._lengths[row] = self._computed[row] = self._num_blocks[row] = 0

    def forget(self, row: int) -> list[int]:
        """Forget a row that failed; the blocks it held."""
        blocks = self._block_tables[row, : self._num_blocks[row]].tolist()
        self._forget(row)
        return blocks

    def sampler(self, row: int) -> RowSampler:
        sampler = self._samplers[row]
        if sampler is None:
            raise KeyError(f"row {row} is not occupied")
        return sampler

    def append(self, row: int, token_id: int) -> None:
        """A token was drawn for a row."""
        self._tokens[row, self._lengths[row]] = token_id
        self._lengths[row] += 1
        self.sampler(row).append(token_id)

    def apply(self, batch: StepBatch) -> tuple[StepInputs | None, list[RowFault]]:
        """Drop, add, check the runs, and build the inputs of those that are sound (None: there are none)."""
        faults: list[RowFault] = []
        for row in batch.drop_rows.tolist():
            self._forget(row)
        for add in batch.adds:
            fault = self._add(add)
            if fault is not None:
                self._forget(add.row)
                faults.append(fault)
        rejected = {fault.row for fault in faults}
        sound = self._check_runs(batch, rejected, faults)
        return self._build(batch, sound), faults

    def _add(self, add: RowAdd) -> RowFault | None:
        limits, row = self._limits, add.row
        num_tokens, num_blocks = len(add.token_ids), len(add.block_ids)
        if self._lengths[row]:
            return RowFault(row, RowFaultCode.POSITION_MISMATCH, f"row {row} is added, but it was not dropped before")
        largest = int(add.token_ids.max())
        if largest >= limits.vocab_size:
            return RowFault(
                row,
                RowFaultCode.BAD_TOKEN,
                f"row {row}: token id {largest} at position {int(add.token_ids.argmax())} is not below vocab_size "
                f"{limits.vocab_size}",
            )
        message = self._block_problem(add.block_ids, 0)
        if message is not None:
            return RowFault(row, RowFaultCode.BAD_BLOCK, f"row {row}: {message}")
        if add.sampling.num_logprobs is not None and add.sampling.num_logprobs > limits.max_num_logprobs:
            return RowFault(
                row,
                RowFaultCode.UNSUPPORTED,
                f"row {row}: num_logprobs {add.sampling.num_logprobs} is above max_num_logprobs "
                f"{limits.max_num_logprobs}",
            )
        self._tokens[row, :num_tokens] = add.token_ids
        self._block_tables[row, :num_blocks] = add.block_ids
        self._num_blocks[row] = num_blocks
        self._lengths[row] = num_tokens
        self._computed[row] = add.num_computed_tokens
        self._samplers[row] = RowSampler(
            add.sampling, self._tokens[row, :num_tokens], add.num_prompt_tokens, limits.vocab_size
        )
        return None

    def _block_problem(self, block_ids: npt.NDArray[np.uint32], num_held: int) -> str | None:
        """What is wrong with blocks that are appended to a table of `num_held`."""
        limits = self._limits
        if num_held + len(block_ids) > self._block_tables.shape[1]:
            return (
                f"{num_held + len(block_ids)} blocks of {limits.block_size} tokens are more than max_model_len "
                f"{limits.max_model_len} needs"
            )
        if len(block_ids):
            lowest, highest = int(block_ids.min()), int(block_ids.max())
            if lowest < limits.first_block_id or highest >= limits.num_blocks:
                wrong = lowest if lowest < limits.first_block_id else highest
                return f"block {wrong} is outside of {limits.first_block_id} <= block < {limits.num_blocks}"
        return None

    def _check_runs(self, batch: StepBatch, rejected: set[int], faults: list[RowFault]) -> IntArray:
        """Indices of the runs that can be computed, their new blocks appended."""
        if not len(batch.run_rows):
            return np.zeros(0, dtype=np.int64)
        rows = batch.run_rows.astype(np.int64)
        starts = batch.run_start_positions.astype(np.int64)
        stops = starts + batch.run_num_tokens
        is_unsound = self._lengths[rows] == 0
        self._append_blocks(batch, rows, is_unsound, rejected, faults)
        wrong = (
            (starts != self._computed[rows])
            | (stops > self._lengths[rows])
            | (batch.run_samples & (stops != self._lengths[rows]))
            | (stops > self._limits.max_model_len)
            | (stops > self._num_blocks[rows] * self._limits.block_size)
        )
        for index in np.flatnonzero(wrong | is_unsound).tolist():
            row = int(rows[index])
            is_unsound[index] = True
            if row not in rejected:
                rejected.add(row)
                faults.append(self._explain(row, int(starts[index]), int(stops[index])))
            self._forget(row)
        return np.flatnonzero(~is_unsound)

    def _append_blocks(
        self,
        batch: StepBatch,
        rows: IntArray,
        is_unsound: npt.NDArray[np.bool_],
        rejected: set[int],
        faults: list[RowFault],
    ) -> None:
        if not len(batch.new_block_ids):
            return
        ends = np.cumsum(batch.run_num_new_blocks, dtype=np.int64)
        for index in np.flatnonzero(batch.run_num_new_blocks).tolist():
            if is_unsound[index]:
                continue
            row, end = int(rows[index]), int(ends[index])
            new = batch.new_block_ids[end - int(batch.run_num_new_blocks[index]) : end]
            held = int(self._num_blocks[row])
            message = self._block_problem(new, held)
            if message is not None:
                is_unsound[index] = True
                rejected.add(row)
                faults.append(RowFault(row, RowFaultCode.BAD_BLOCK, f"row {row}: {message}"))
                continue
            self._block_tables[row, held : held + len(new)] = new
            self._num_blocks[row] += len(new)

    def _explain(self, row: int, start: int, stop: int) -> RowFault:
        """The fault of a run that disagrees with the table."""
        length, computed = int(self._lengths[row]), int(self._computed[row])
        capacity = int(self._num_blocks[row]) * self._limits.block_size
        mismatch = RowFaultCode.POSITION_MISMATCH
        if length == 0:
            return RowFault(row, RowFaultCode.UNKNOWN_ROW, f"row {row} runs, but it is not occupied")
        if start != computed:
            return RowFault(row, mismatch, f"row {row} runs from position {start}, but {computed} tokens are computed")
        if stop > length:
            return RowFault(row, mismatch, f"row {row} runs up to position {stop}, but it has only {length} tokens")
        if stop > self._limits.max_model_len:
            limit = self._limits.max_model_len
            return RowFault(row, mismatch, f"row {row} runs up to position {stop}, beyond max_model_len {limit}")
        if stop > capacity:
            return RowFault(
                row,
                RowFaultCode.BAD_BLOCK,
                f"row {row} runs up to position {stop}, but its {int(self._num_blocks[row])} blocks hold {capacity} "
                "tokens",
            )
        return RowFault(row, mismatch, f"row {row} samples after position {stop}, but it has {length} tokens already")

    def _build(self, batch: StepBatch, sound: IntArray) -> StepInputs | None:
        if not len(sound):
            return None
        num_tokens = batch.run_num_tokens[sound].astype(np.int64)
        is_longer = num_tokens != 1
        num_decodes = len(sound) - int(is_longer.sum())
        order = np.argsort(is_longer, kind="stable")  # runs with one token first
        runs, counts = sound[order], num_tokens[order]
        rows = batch.run_rows[runs].astype(np.int64)
        starts = batch.run_start_positions[runs].astype(np.int64)
        contexts = starts + counts
        ends = np.cumsum(counts)
        if num_decodes == len(runs):
            token_rows, positions = rows, starts
        else:
            token_rows = np.repeat(rows, counts)  # [num_tokens]
            positions = np.arange(int(ends[-1])) + np.repeat(starts - (ends - counts), counts)
        max_blocks = -(-int(contexts.max()) // self._limits.block_size)
        self._computed[rows] = contexts
        samples = np.flatnonzero(batch.run_samples[runs])
        samples = samples[np.argsort(runs[samples])]  # back to the step's run order
        return StepInputs(
            token_ids=self._tokens[token_rows, positions].astype(np.int64),
            metadata=StepMetadata(
                num_decodes=num_decodes,
                query_lengths=counts,
                context_lengths=contexts,
                block_tables=self._block_tables[rows, :max_blocks],
                positions=positions,
            ),
            sampled_rows=rows[samples],
            sampled_tokens=ends[samples] - 1,
            sampled_positions=contexts[samples],
        )
