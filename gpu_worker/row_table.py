"""Which rows are occupied, how far each is computed and which blocks it holds: what a step is checked against.

The token ids are not here: a runner keeps them where it computes. What disagrees with the table is a `RowFault` of that
row, and the row is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpu_worker.runner_api import PoolingFacts, RowAdd, RowFault, RowFaultCode, StepBatch

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
    pooling: PoolingFacts | None = None
    can_prompt_logprobs: bool = False
    keeps_row_states: bool = False


@dataclass(frozen=True, slots=True)
class PromptRun:
    """A run whose positions predict tokens of a prompt whose logprobs are wanted."""

    row: int
    first_token: int  # of the run, among the step's tokens
    start_position: int  # of the first token that is predicted
    targets: IntArray  # [num_predicted]: the prompt's tokens from there on
    num_top: int


class RowTable:
    """The rows of one session. A runner extends it with what it needs to know of a row's tokens and sampling."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        max_blocks = -(-limits.max_model_len // limits.block_size)
        num_rows = limits.max_num_seqs
        self._block_tables = np.zeros((num_rows, max_blocks), dtype=np.int64)
        self._num_blocks = np.zeros(num_rows, dtype=np.int64)
        self._lengths = np.zeros(num_rows, dtype=np.int64)
        self._computed = np.zeros(num_rows, dtype=np.int64)
        # Rows whose prompt's logprobs are wanted: its tokens, and how many alternatives.
        self._wanted_prompts: dict[int, tuple[IntArray, int]] = {}

    def clear(self) -> None:
        """Forget every row."""
        for row in range(self._limits.max_num_seqs):
            self._forget(row)

    def _forget(self, row: int) -> None:
        # A row of length 0 is not occupied.
        self._lengths[row] = self._computed[row] = self._num_blocks[row] = 0
        self._wanted_prompts.pop(row, None)

    def _occupy(self, add: RowAdd) -> None:
        """An add has passed all checks."""
        row = add.row
        self._block_tables[row, : len(add.block_ids)] = add.block_ids
        self._num_blocks[row] = len(add.block_ids)
        self._lengths[row] = len(add.token_ids)
        self._computed[row] = add.num_computed_tokens
        num_top = add.sampling.num_prompt_logprobs
        if num_top is not None:
            self._wanted_prompts[row] = (add.token_ids[: add.num_prompt_tokens].astype(np.int64), num_top)

    def prompt_runs(
        self, rows: IntArray, starts: IntArray, counts: IntArray, first_tokens: IntArray
    ) -> tuple[PromptRun, ...]:
        """Those of a step's runs that tell of a prompt; all arrays [num_runs]."""
        if not self._wanted_prompts:
            return ()
        runs = []
        for index in np.flatnonzero(np.isin(rows, list(self._wanted_prompts))).tolist():
            row, start = int(rows[index]), int(starts[index])
            prompt, num_top = self._wanted_prompts[row]
            targets = prompt[start + 1 : start + 1 + int(counts[index])]
            if len(targets):
                runs.append(PromptRun(row, int(first_tokens[index]), start + 1, targets, num_top))
        return tuple(runs)

    def _append_to_table(self, row: int, num_held: int, block_ids: npt.NDArray[np.uint32]) -> None:
        self._block_tables[row, num_held : num_held + len(block_ids)] = block_ids
        self._num_blocks[row] += len(block_ids)

    def _unsupported(self, add: RowAdd) -> str | None:
        """Why this runner cannot do what a sound add asks for; None: it can."""
        pooling = self._limits.pooling
        if add.pooling is not None and pooling is None:
            return "asks for a vector, and this worker draws tokens only"
        if add.num_computed_tokens and self._limits.keeps_row_states:
            return f"begins at token {add.num_computed_tokens}, and this worker keeps states that no row can take over"
        if add.pooling is None and pooling is not None and pooling.only:
            return "asks for tokens, and this worker gives vectors only"
        if add.sampling.num_logprobs is not None and add.sampling.num_logprobs > self._limits.max_num_logprobs:
            return f"num_logprobs {add.sampling.num_logprobs} is above max_num_logprobs {self._limits.max_num_logprobs}"
        if add.sampling.num_prompt_logprobs is not None:
            return prompt_logprobs_problem(
                add, self._limits.max_num_logprobs, is_possible=self._limits.can_prompt_logprobs
            )
        return None

    def blocks(self, row: int) -> IntArray:
        """The blocks that a row holds, in position order."""
        return self._block_tables[row, : self._num_blocks[row]].copy()

    def forget(self, row: int) -> list[int]:
        """Forget a row that failed; the blocks it held."""
        blocks: list[int] = self.blocks(row).tolist()
        self._forget(row)
        return blocks

    def take(self, batch: StepBatch, faults: list[RowFault]) -> IntArray:
        """Drop, add, and check the runs: indices of those that are sound, their new blocks appended."""
        for row in batch.drop_rows.tolist():
            self._forget(row)
        for add in batch.adds:
            fault = self._add(add)
            if fault is not None:
                self._forget(add.row)
                faults.append(fault)
        return self._check_runs(batch, {fault.row for fault in faults}, faults)

    def _add(self, add: RowAdd) -> RowFault | None:
        limits, row = self._limits, add.row
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
        message = self._unsupported(add)
        if message is not None:
            return RowFault(row, RowFaultCode.UNSUPPORTED, f"row {row}: {message}")
        self._occupy(add)
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
        if self._limits.pooling is not None and self._limits.pooling.whole_prompts:
            wrong |= (starts != 0) | (stops != self._lengths[rows])
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
            self._append_to_table(row, held, new)

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
        pooling = self._limits.pooling
        if pooling is not None and pooling.whole_prompts and (start != 0 or stop != length):
            message = f"row {row} runs tokens {start} to {stop} of {length}, and whole prompts are run only"
            return RowFault(row, RowFaultCode.UNSUPPORTED, message)
        return RowFault(row, mismatch, f"row {row} samples after position {stop}, but it has {length} tokens already")


def prompt_logprobs_problem(add: RowAdd, max_num_logprobs: int, *, is_possible: bool) -> str | None:
    """Why a row that wants its prompt's logprobs cannot have them; None: it can."""
    wanted = add.sampling.num_prompt_logprobs
    if not is_possible:
        return "asks for its prompt's logprobs, and this worker did not announce CAPABILITY_PROMPT_LOGPROBS"
    if wanted is not None and wanted > max_num_logprobs:
        return f"num_prompt_logprobs {wanted} is above max_num_logprobs {max_num_logprobs}"
    if add.num_computed_tokens:
        return f"num_prompt_logprobs is set, and {add.num_computed_tokens} tokens are computed: it must be none"
    return None
