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
from gpu_worker.row_table import BatchLimits, IntArray, RowTable
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


class InputBatch(RowTable):
    """The rows of one session, with their tokens and samplers on the host."""

    def __init__(self, limits: BatchLimits) -> None:
        super().__init__(limits)
        num_rows = limits.max_num_seqs
        # One token more than a sequence may have: the last step samples a token that is never run.
        self._tokens = np.zeros((num_rows, limits.max_model_len + 1), dtype=np.int32)
        self._samplers: list[RowSampler | None] = [None] * num_rows

    def _forget(self, row: int) -> None:
        super()._forget(row)
        self._samplers[row] = None

    def _occupy(self, add: RowAdd) -> None:
        super()._occupy(add)
        tokens = self._tokens[add.row, : len(add.token_ids)]
        tokens[:] = add.token_ids
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
