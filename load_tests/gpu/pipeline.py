"""Drives a runner with several steps in flight, as the control plane does: no step waits for the tokens before it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from gpu_worker.runner_api import PendingStep, RowAdd, RowSampling, Runner, StepBatch, StepResult, TokenMask


class Pipeline:
    """One session. Results are read in order, each after `depth` steps have been launched."""

    def __init__(self, runner: Runner, depth: int = 2) -> None:
        self.runner = runner
        self.facts = runner.describe()
        self.results: list[StepResult] = []
        self.pending: list[PendingStep] = []
        self.finished_s: list[float] = []
        self.execute_s: list[float] = []
        self._depth = depth
        self._in_flight: deque[PendingStep] = deque()
        self._free = list(range(self.facts.num_blocks - 1, self.facts.first_block_id - 1, -1))
        self._blocks: dict[int, list[int]] = {}
        self._computed: dict[int, int] = {}
        self._adds: list[RowAdd] = []
        self._drops: list[int] = []
        self._step_id = 0
        runner.reset()

    def add(self, row: int, tokens: Sequence[int], sampling: RowSampling, *, num_computed: int = 0) -> None:
        """Occupy a row with the next step; of `num_computed` tokens (whole blocks) the cache is taken as it is."""
        blocks = [self._free.pop() for _ in range(num_computed // self.facts.block_size)]
        self._blocks[row], self._computed[row] = blocks, num_computed
        self._adds.append(
            RowAdd(
                row=row,
                token_ids=np.array(tokens, dtype=np.uint32),
                num_prompt_tokens=len(tokens),
                num_computed_tokens=num_computed,
                block_ids=np.array(blocks, dtype=np.uint32),
                sampling=sampling,
            )
        )

    def holds(self, row: int) -> bool:
        return row in self._computed

    def drop(self, row: int) -> None:
        self._free += self._blocks.pop(row)
        del self._computed[row]
        self._drops.append(row)

    def launch(self, runs: dict[int, int], *, samples: bool, silent_row: int | None = None) -> None:
        """One step with so many tokens of each row; all of its rows but `silent_row` sample, or none."""
        new_blocks: list[list[int]] = []
        starts: list[int] = []
        for row, num_tokens in runs.items():
            start = self._computed[row]
            needed = -(-(start + num_tokens) // self.facts.block_size) - len(self._blocks[row])
            taken = [self._free.pop() for _ in range(needed)]
            self._blocks[row] += taken
            new_blocks.append(taken)
            starts.append(start)
            self._computed[row] = start + num_tokens
        self._step_id += 1
        batch = StepBatch(
            step_id=self._step_id,
            bucket=0,
            drop_rows=np.array(self._drops, dtype=np.uint32),
            adds=tuple(self._adds),
            run_rows=np.array(list(runs), dtype=np.uint32),
            run_start_positions=np.array(starts, dtype=np.uint32),
            run_num_tokens=np.array(list(runs.values()), dtype=np.uint32),
            run_samples=np.array([samples and row != silent_row for row in runs]),
            run_num_new_blocks=np.array([len(taken) for taken in new_blocks], dtype=np.uint32),
            new_block_ids=np.array([block for taken in new_blocks for block in taken], dtype=np.uint32),
            mask_rows=np.zeros(0, dtype=np.uint32),
        )
        self._adds, self._drops = [], []
        begun = time.perf_counter()
        pending = self.runner.execute(batch, _no_mask)
        self.execute_s.append(time.perf_counter() - begun)
        self._in_flight.append(pending)
        self.pending.append(pending)
        while len(self._in_flight) >= self._depth:
            self._read()

    def finish(self) -> None:
        """Read what is still in flight."""
        while self._in_flight:
            self._read()

    def _read(self) -> None:
        result = self._in_flight.popleft().result()
        self.finished_s.append(time.perf_counter())
        if result.faults:
            raise RuntimeError(f"step {result.step_id}: {result.faults[0].message}")
        self.results.append(result)


def _no_mask() -> TokenMask:
    raise RuntimeError("no row of this step has a mask")
