"""From a result record in page-locked memory to a `StepResult`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from stepwire_kernels.sampler import FAULT_NO_TOKEN
from stepwire_kernels.step_result import (
    RESULT_INPUT_FAULT,
    RESULT_LOGPROB,
    RESULT_SAMPLER_FAULT,
    RESULT_TOKEN,
    RESULT_WORDS,
)

from gpu_worker.cuda.device_rows import NO_LOGPROBS
from gpu_worker.cuda.pooled import PooledRows
from gpu_worker.cuda.timeline import StepTimes, Timeline
from gpu_worker.prompt_logprobs import DescribedRun
from gpu_worker.row_table import IntArray
from gpu_worker.runner_api import RowFault, RowFaultCode, StepResult


@dataclass(frozen=True, slots=True)
class SampledRuns:
    """Which of a step's records belong to whom; in the order of the step."""

    rows: IntArray  # [num_sampled]
    records: IntArray  # [num_sampled]: the row's record in the slot
    generations: IntArray  # [num_sampled]: which of the row's occupants this was
    num_logprobs: IntArray  # [num_sampled]: NO_LOGPROBS where not asked for


NO_RUNS = SampledRuns(*(np.zeros(0, dtype=np.int64) for _ in range(4)))


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """Where things stand in a slot."""

    max_runs: int
    max_top: int


@dataclass(slots=True)
class CudaPendingStep:
    """A launched step; implements `PendingStep`."""

    step_id: int
    slot: int
    sampled: SampledRuns
    faults: list[RowFault]
    layout: RecordLayout
    timeline: Timeline
    on_failed: Callable[[int, int], None]
    """Told (row, generation) of rows that got no token."""
    input_ns: int
    prompts: Sequence[DescribedRun] = ()
    pooled: PooledRows | None = None
    awaits_prompts: bool = False
    """Another stage has the logits of prompts."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _taken: tuple[npt.NDArray[np.int32], StepTimes] | None = None

    def collect(self) -> tuple[npt.NDArray[np.int32], StepTimes]:
        """Block until the step has ended and take its records out of the slot, which is free then. Any thread."""
        with self._lock:
            if self._taken is None:
                times = self.timeline.wait(self.slot)
                self._taken = (self.timeline.results[self.slot].numpy().copy(), times)
            return self._taken

    @property
    def is_over(self) -> bool:
        """Whether its results have been taken."""
        return self._taken is not None

    @property
    def describes_prompts(self) -> bool:
        return bool(self.prompts)

    def times(self) -> StepTimes:
        """Block until the step has ended; when it ran, on the device's clock."""
        return self.collect()[1]

    def result(self) -> StepResult:
        slot, times = self.collect()
        records = slot[: self.layout.max_runs * RESULT_WORDS].reshape(-1, RESULT_WORDS)[self.sampled.records]
        failed = (records[:, RESULT_SAMPLER_FAULT] != 0) | (records[:, RESULT_INPUT_FAULT] != 0)
        faults = list(self.faults)
        for index in np.flatnonzero(failed).tolist():
            row = int(self.sampled.rows[index])
            faults.append(_fault(row, records[index]))
            self.on_failed(row, int(self.sampled.generations[index]))
        kept = ~failed
        num_kept = int(kept.sum())
        result = StepResult(
            step_id=self.step_id,
            rows=self.sampled.rows[kept].astype(np.uint32),
            offsets=np.arange(num_kept + 1, dtype=np.uint32),
            token_ids=records[kept, RESULT_TOKEN].astype(np.uint32),
            awaits_prompts=self.awaits_prompts,
            faults=faults,
            input_ns=self.input_ns,
            forward_ns=times.forward_ns,
            sample_ns=times.sample_ns,
        )
        if self.prompts:
            failed_rows = {fault.row for fault in faults}
            result.prompt_logprobs = [each.result() for each in self.prompts if each.run.row not in failed_rows]
        if self.pooled is not None:
            self.pooled.write(result, self.on_failed)
        if (self.sampled.num_logprobs != NO_LOGPROBS).any():
            self._add_logprobs(result, slot, records, kept)
        return result

    def _add_logprobs(
        self,
        result: StepResult,
        slot: npt.NDArray[np.int32],
        records: npt.NDArray[np.int32],
        kept: npt.NDArray[np.bool_],
    ) -> None:
        layout, asked = self.layout, self.sampled.num_logprobs[kept]
        logprobs = np.ascontiguousarray(records[kept, RESULT_LOGPROB]).view(np.float32)
        result.logprobs = np.where(asked == NO_LOGPROBS, np.float32(np.nan), logprobs)
        num_top = max(int(self.sampled.num_logprobs.max()), 0)
        at, size = layout.max_runs * RESULT_WORDS, layout.max_runs * layout.max_top
        rows = self.sampled.records[kept]
        top_ids = slot[at : at + size].reshape(layout.max_runs, -1)[rows, :num_top]  # [num_kept, num_top]
        top = slot[at + size : at + 2 * size].view(np.float32).reshape(layout.max_runs, -1)[rows, :num_top]
        # The kernel marks places past what a row asked for.
        is_there = top_ids >= 0
        result.top_token_ids = np.where(is_there, top_ids, 0).astype(np.uint32)
        result.top_logprobs = np.where(is_there, top, np.float32(-np.inf))


def _fault(row: int, record: npt.NDArray[np.int32]) -> RowFault:
    if record[RESULT_INPUT_FAULT]:
        message = f"row {row}: the device holds fewer tokens of it than the step runs; add the row again"
        return RowFault(row, RowFaultCode.POSITION_MISMATCH, message)
    if record[RESULT_SAMPLER_FAULT] == FAULT_NO_TOKEN:
        message = "no token may be drawn: the token mask, allowed_token_ids and suppressed_token_ids exclude all"
        return RowFault(row, RowFaultCode.UNSUPPORTED, f"row {row}: {message}")
    message = "the model's logits are not finite: overflow in this dtype, or damaged weights"
    return RowFault(row, RowFaultCode.NOT_FINITE, f"row {row}: {message}")
