"""Drives a `Runner` with step batches, as a control plane would: rows, block tables and positions, but no queue.

Used by the benchmark and by the runner's tests; what to run in which step is theirs to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpu_worker.runner_api import PendingStep, RowAdd, RowSampling, Runner, StepBatch, StepResult, TokenMask


def greedy(num_logprobs: int | None = None) -> RowSampling:
    return sampling(temperature=0.0, num_logprobs=num_logprobs)


def sampling(
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    sequence_index: int = 0,
    num_logprobs: int | None = None,
    bias: dict[int, float] | None = None,
    min_tokens: int = 0,
    suppressed: Sequence[int] = (),
    allowed: Sequence[int] = (),
    num_prompt_logprobs: int | None = None,
) -> RowSampling:
    """`RowSampling` with everything off unless asked for."""
    bias = bias or {}
    return RowSampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        sequence_index=sequence_index,
        num_logprobs=num_logprobs,
        bias_token_ids=np.array(list(bias), dtype=np.uint32),
        bias_values=np.array(list(bias.values()), dtype=np.float32),
        min_tokens=min_tokens,
        suppressed_token_ids=np.array(suppressed, dtype=np.uint32),
        allowed_token_ids=np.array(allowed, dtype=np.uint32),
        num_prompt_logprobs=num_prompt_logprobs,
    )


@dataclass(slots=True)
class DrivenRow:
    """What the driver knows of an occupied row."""

    tokens: list[int]
    num_prompt_tokens: int
    num_computed: int
    blocks: list[int]
    num_borrowed: int = 0
    """Leading blocks that belong to another row."""

    @property
    def num_waiting(self) -> int:
        """Tokens that have not been run yet."""
        return len(self.tokens) - self.num_computed


class StepDriver:
    """One session with a runner."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.facts = runner.describe()
        self.rows: dict[int, DrivenRow] = {}
        self._free = list(range(self.facts.num_blocks - 1, self.facts.first_block_id - 1, -1))
        self._adds: list[RowAdd] = []
        self._drops: list[int] = []
        self._step_id = 0
        self.runner.reset()

    def add(
        self,
        row: int,
        tokens: Sequence[int],
        sampling: RowSampling,
        *,
        num_prompt_tokens: int | None = None,
        prefix_of: int | None = None,
        num_shared_tokens: int = 0,
    ) -> None:
        """Occupy a row with the next step; `num_shared_tokens` (whole blocks) are taken from row `prefix_of`."""
        num_shared = num_shared_tokens // self.facts.block_size
        shared = self.rows[prefix_of].blocks[:num_shared] if prefix_of is not None else []
        num_prompt = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
        self.rows[row] = DrivenRow(list(tokens), num_prompt, num_shared_tokens, list(shared), len(shared))
        self._adds.append(
            RowAdd(
                row=row,
                token_ids=np.array(tokens, dtype=np.uint32),
                num_prompt_tokens=num_prompt,
                num_computed_tokens=num_shared_tokens,
                block_ids=np.array(shared, dtype=np.uint32),
                sampling=sampling,
            )
        )

    def drop(self, row: int) -> list[int]:
        """Forget a row with the next step; its tokens so far."""
        driven = self.rows.pop(row)
        # Freed to the far end, so that a row that comes back gets other blocks.
        self._free = driven.blocks[driven.num_borrowed :] + self._free
        self._drops.append(row)
        return driven.tokens

    def step(self, runs: dict[int, int] | None = None, *, mask: TokenMask | None = None) -> StepResult:
        """One step: `runs` says how many tokens of each row, by default all that wait. Rows that end sample."""
        return self.finish(self.begin(runs, mask=mask))

    def finish(self, pending: PendingStep) -> StepResult:
        """Its result, once the rows have got their tokens."""
        result = pending.result()
        for index, row in enumerate(result.rows.tolist()):
            self.rows[row].tokens.append(int(result.token_ids[index]))
        return result

    def begin(self, runs: dict[int, int] | None = None, *, mask: TokenMask | None = None) -> PendingStep:
        """Launch a step; what it samples is known to the rows when it is finished."""
        runs = {row: driven.num_waiting for row, driven in self.rows.items()} if runs is None else runs
        new_blocks: list[list[int]] = []
        starts: list[int] = []
        samples: list[bool] = []
        for row, num_tokens in runs.items():
            driven = self.rows[row]
            stop = driven.num_computed + num_tokens
            needed = -(-stop // self.facts.block_size) - len(driven.blocks)
            taken = [self._free.pop() for _ in range(needed)]
            driven.blocks += taken
            new_blocks.append(taken)
            starts.append(driven.num_computed)
            samples.append(stop == len(driven.tokens))
            driven.num_computed = stop
        self._step_id += 1
        batch = StepBatch(
            step_id=self._step_id,
            bucket=0,
            drop_rows=np.array(self._drops, dtype=np.uint32),
            adds=tuple(self._adds),
            run_rows=np.array(list(runs), dtype=np.uint32),
            run_start_positions=np.array(starts, dtype=np.uint32),
            run_num_tokens=np.array(list(runs.values()), dtype=np.uint32),
            run_samples=np.array(samples, dtype=np.bool_),
            run_num_new_blocks=np.array([len(taken) for taken in new_blocks], dtype=np.uint32),
            new_block_ids=np.array([block for taken in new_blocks for block in taken], dtype=np.uint32),
            mask_rows=np.zeros(0, dtype=np.uint32) if mask is None else mask.rows,
        )
        self._adds, self._drops = [], []
        return self.runner.execute(batch, lambda: _required(mask))


def _required(mask: TokenMask | None) -> TokenMask:
    if mask is None:
        raise ValueError("the runner asked for a token mask, and no row of the step has one")
    return mask
