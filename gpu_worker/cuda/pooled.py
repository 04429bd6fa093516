"""Vectors of pooled rows on their way from the device to a `StepResult`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.cuda.step_layout import StepLayout
from gpu_worker.pooling import PooledRun
from gpu_worker.row_table import IntArray
from gpu_worker.runner_api import RowFault, RowFaultCode, StepBatch, StepResult


def pooled_runs(layout: StepLayout, batch: StepBatch) -> list[PooledRun]:
    """The runs of a step in the device's order; every row of a worker that pools is worth a vector."""
    counts = layout.runs[:, 2].astype(np.int64)
    first_tokens = np.cumsum(counts) - counts
    last_rows = set(batch.run_rows[batch.run_samples].tolist())
    return [
        PooledRun(int(row), int(first), int(count), int(start), int(row) in last_rows)
        for (row, start, count, _), first in zip(layout.runs.tolist(), first_tokens, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class PooledRows:
    """One step's vectors, in page-locked memory once the device has come so far."""

    rows: IntArray  # [num_pooled]
    generations: IntArray  # [num_pooled]: which of the row's occupants this was
    values: torch.Tensor  # float32 [num_pooled, dimensions]

    @classmethod
    def begin_copy(cls, rows: Sequence[int], generations: IntArray, values: torch.Tensor) -> PooledRows:
        """Start the copy to the host, in the stream of the step."""
        if values.device.type != "cpu":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
        return cls(np.array(rows, dtype=np.int64), generations, values)

    def write(self, result: StepResult, on_failed: Callable[[int, int], None]) -> None:
        """Into the result of the step, which has ended. A row without a finite vector fails."""
        values = self.values.numpy()
        is_finite = np.asarray(np.isfinite(values).all(axis=1))  # [num_pooled]
        for index in np.flatnonzero(~is_finite).tolist():
            row = int(self.rows[index])
            result.faults.append(RowFault(row, RowFaultCode.NOT_FINITE, f"row {row}: its vector is not finite"))
            on_failed(row, int(self.generations[index]))
        if is_finite.any():
            result.pooled_rows = self.rows[is_finite].astype(np.uint32)
            result.pooled_values = values[is_finite]
