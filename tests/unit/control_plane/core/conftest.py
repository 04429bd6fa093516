from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from control_plane.core.request import CoreRequest, SamplingParams, SequenceOutput
from control_plane.core.scheduler import Scheduler
from control_plane.core.sequence import RequestState, SequenceState
from control_plane.core.step_plan import StepEvents, StepOutcome, StepPlan


def make_request(number: int, prompt: int | list[int] = 3, max_tokens: int = 4, **fields: object) -> CoreRequest:
    """Request `r<number>`; `prompt` is a length (ids then differ from request to request) or the ids."""
    ids = prompt if isinstance(prompt, list) else [1000 * number + position for position in range(prompt)]
    return CoreRequest(f"r{number}", np.array(ids, np.uint32), SamplingParams(), max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


def outputs_of(events: StepEvents) -> Iterator[tuple[RequestState, SequenceOutput]]:
    """All that came out, in the order in which the engine tells it."""
    yield from events.outputs
    for sequence, token_id in zip(events.sequences, events.token_ids, strict=True):
        yield sequence.request, SequenceOutput(sequence.index, [token_id], 1)


def known_ids(sequence: SequenceState) -> list[int]:
    return sequence.token_ids().tolist()


class Driver:
    """Plans and answers steps: every sampled token is `token`, or what `choose` says."""

    def __init__(
        self, scheduler: Scheduler, depth: int = 2, choose: Callable[[StepPlan, int], int] | None = None
    ) -> None:
        self.scheduler = scheduler
        self.depth = depth
        self.choose = choose or (lambda plan, row: 5)
        self.in_flight: deque[StepPlan] = deque()
        self.plans: list[StepPlan] = []

    def fill(self) -> None:
        while len(self.in_flight) < self.depth and (plan := self.scheduler.plan(0.0)) is not None:
            self.in_flight.append(plan)
            self.plans.append(plan)

    def answer(self) -> StepEvents:
        plan = self.in_flight.popleft()
        rows = [row for row, sample in zip(plan.rows, plan.samples, strict=True) if sample]
        events = self.scheduler.apply(StepOutcome(plan.step_id, rows, [self.choose(plan, row) for row in rows]))
        self.scheduler.check_integrity()
        return events

    def run(self, max_steps: int = 1000) -> list[StepEvents]:
        events = []
        for _ in range(max_steps):
            self.fill()
            if not self.in_flight:
                return events
            events.append(self.answer())
        raise AssertionError("never comes to rest")

    def lose_worker(self) -> StepEvents:
        self.in_flight.clear()
        return self.scheduler.worker_lost()


@pytest.fixture
def request_factory() -> Callable[..., CoreRequest]:
    return make_request
