"""What steps held, for those who watch: taken down when a result comes, and only while somebody watches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from stepwire.v1 import worker_pb2

from control_plane.core.scheduler import Scheduler
from control_plane.core.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step; `StepSample` in admin.proto says what each field is."""

    step_id: int
    ended_at_s: float
    duration_ns: int
    num_rows: int
    num_prefill_rows: int
    num_prefill_tokens: int
    num_decode_tokens: int
    queue_ns: int
    input_ns: int
    forward_ns: int
    sample_ns: int
    num_running_sequences: int
    num_waiting_requests: int
    num_kv_blocks_in_use: int
    group: int


class StepWatcher:
    """One reader's buffer: the newest `max_steps` records since it last took them."""

    def __init__(self, max_steps: int) -> None:
        self._records: deque[StepRecord] = deque(maxlen=max_steps)
        self._num_lost = 0

    def put(self, record: StepRecord) -> None:
        self._num_lost += len(self._records) == self._records.maxlen
        self._records.append(record)

    def take(self) -> tuple[list[StepRecord], int]:
        """The records, oldest first, and how many before them were lost."""
        records, num_lost = list(self._records), self._num_lost
        self._records.clear()
        self._num_lost = 0
        return records, num_lost


class StepFeed:
    """Everything on the engine's event loop. Without a watcher a step costs one look at an empty list."""

    def __init__(self) -> None:
        self._watchers: list[StepWatcher] = []

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    @contextmanager
    def watch(self, max_steps: int) -> Iterator[StepWatcher]:
        watcher = StepWatcher(max_steps)
        self._watchers.append(watcher)
        try:
            yield watcher
        finally:
            self._watchers.remove(watcher)

    def note(
        self, plan: StepPlan, timings: worker_pb2.StepTimings, duration_s: float, scheduler: Scheduler, group: int
    ) -> None:
        if not self._watchers:
            return
        record = _record(plan, timings, duration_s, scheduler, group)
        for watcher in self._watchers:
            watcher.put(record)


def _record(
    plan: StepPlan, timings: worker_pb2.StepTimings, duration_s: float, scheduler: Scheduler, group: int
) -> StepRecord:
    # A row that runs one token behind its prompt decodes; everything else computes what is known already.
    prefills = [
        num_tokens
        for sequence, start, num_tokens in zip(plan.sequences, plan.start_positions, plan.num_run_tokens, strict=True)
        if num_tokens > 1 or start < sequence.num_prompt_tokens
    ]
    num_prefill_tokens = sum(prefills)
    return StepRecord(
        step_id=plan.step_id,
        ended_at_s=time.time(),
        duration_ns=int(duration_s * 1e9),
        num_rows=len(plan.rows),
        num_prefill_rows=len(prefills),
        num_prefill_tokens=num_prefill_tokens,
        num_decode_tokens=plan.num_tokens - num_prefill_tokens,
        queue_ns=timings.queue_ns,
        input_ns=timings.input_ns,
        forward_ns=timings.forward_ns,
        sample_ns=timings.sample_ns,
        num_running_sequences=scheduler.num_running,
        num_waiting_requests=scheduler.num_waiting_requests,
        num_kv_blocks_in_use=scheduler.num_blocks_held,
        group=group,
    )
