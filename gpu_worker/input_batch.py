"""The persistent table of rows on the host, and what a step's forward pass reads from it.

A row keeps its token ids (prompt, what was generated, what is sampled here), its block table, how many of its tokens
are computed, and its sampler. A sampled token goes straight into the table, so that the next step may run it without
its value ever having been sent back. What disagrees with the table is a `RowFault` of that row, and the row is
forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_worker.attention.api import StepMetadata
from gpu_worker.pooling import PooledRun
from gpu_worker.row_table import BatchLimits, IntArray, PromptRun, RowTable
from gpu_worker.runner_api import RowAdd, RowFault, StepBatch
from gpu_worker.sampler import RowSampler


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's forward pass: runs with one token first, otherwise in the step's order."""

    token_ids: IntArray  # [num_tokens]
    metadata: StepMetadata
    sampled_rows: IntArray  # [num_sampled], in the step's run order
    sampled_tokens: IntArray  # [num_sampled]: which of the step's tokens is the last of its run
    sampled_positions: IntArray  # [num_sampled]: index of the token to be drawn in its sequence
    pooled: tuple[PooledRun, ...] = ()
    """Runs of rows that are worth a vector, in the step's run order."""
    prompts: tuple[PromptRun, ...] = ()
    """Runs that tell of a prompt whose logprobs are wanted, in the step's run order."""
    segments: IntArray | None = None  # [num_tokens]: which text of a pair a token is of; None: there are no pairs


class InputBatch(RowTable):
    """The rows of one session, with their tokens and samplers on the host."""

    def __init__(self, limits: BatchLimits) -> None:
        super().__init__(limits)
        num_rows = limits.max_num_seqs
        # One token more than a sequence may have: the last step samples a token that is never run.
        self._tokens = np.zeros((num_rows, limits.max_model_len + 1), dtype=np.int32)
        self._samplers: list[RowSampler | None] = [None] * num_rows
        self._pools = np.zeros(num_rows, dtype=np.bool_)
        self._second_starts = np.zeros(num_rows, dtype=np.int64)  # 0: the row's tokens are one text

    def _forget(self, row: int) -> None:
        super()._forget(row)
        self._samplers[row] = None
        self._pools[row] = False
        self._second_starts[row] = 0

    def _occupy(self, add: RowAdd) -> None:
        super()._occupy(add)
        tokens = self._tokens[add.row, : len(add.token_ids)]
        tokens[:] = add.token_ids
        if add.pooling is not None:
            self._pools[add.row] = True
            self._second_starts[add.row] = add.pooling.second_text_start
            return
        self._samplers[add.row] = RowSampler(add.sampling, tokens, add.num_prompt_tokens, self._limits.vocab_size)

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
        sound = self.take(batch, faults)
        return self._build(batch, sound), faults

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
        pools = self._pools[rows]
        samples = np.flatnonzero(batch.run_samples[runs] & ~pools)
        samples = samples[np.argsort(runs[samples])]  # back to the step's run order
        return StepInputs(
            token_ids=self._tokens[token_rows, positions].astype(np.int64),
            metadata=StepMetadata(
                num_decodes=num_decodes,
                query_lengths=counts,
                context_lengths=contexts,
                block_tables=self._block_tables[rows, :max_blocks],
                positions=positions,
                rows=rows,
            ),
            sampled_rows=rows[samples],
            sampled_tokens=ends[samples] - 1,
            sampled_positions=contexts[samples],
            pooled=tuple(
                PooledRun(
                    row=int(rows[index]),
                    first_token=int(ends[index] - counts[index]),
                    num_tokens=int(counts[index]),
                    start_position=int(starts[index]),
                    is_last=bool(batch.run_samples[runs[index]]),
                )
                for index in sorted(np.flatnonzero(pools).tolist(), key=lambda index: int(runs[index]))
            ),
            prompts=self._prompts(runs, rows, starts, counts, ends - counts),
            segments=self._segments(token_rows, positions),
        )

    def _prompts(
        self, runs: IntArray, rows: IntArray, starts: IntArray, counts: IntArray, first_tokens: IntArray
    ) -> tuple[PromptRun, ...]:
        order = np.argsort(runs)
        return self.prompt_runs(rows[order], starts[order], counts[order], first_tokens[order])

    def _segments(self, token_rows: IntArray, positions: IntArray) -> IntArray | None:
        second_starts = self._second_starts[token_rows]  # [num_tokens]
        if not second_starts.any():
            return None
        return ((second_starts > 0) & (positions >= second_starts)).astype(np.int64)
