"""Masks of the core: each stands for exactly the tokens before it, through preemption, loss and two steps in flight."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
import pytest

from control_plane.core.request import FinishReason
from control_plane.core.scheduler import Scheduler
from control_plane.core.scheduler_config import SchedulerConfig
from control_plane.core.step_codec import encode_step
from control_plane.core.step_plan import StepPlan
from control_plane.core.token_masks import FilledMasks, MaskFiller

from .conftest import Driver, make_request

VOCAB_SIZE = 64


class Counting:
    """A grammar whose n-th token must be n, and which is over after `length` of them."""

    def __init__(self, length: int) -> None:
        self.length = length

    def start(self) -> CountingMatcher:
        return CountingMatcher(self.length)


class CountingMatcher:
    def __init__(self, length: int) -> None:
        self.length = length
        self.count = 0
        self.error = ""

    def accept(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if token_id != self.count:
                self.error = f"got {token_id}, expected {self.count}"
            self.count += 1

    def fill_mask(self, out: npt.NDArray[np.uint32]) -> None:
        out[self.count // 32] |= np.uint32(1 << self.count % 32)

    @property
    def is_over(self) -> bool:
        return self.count >= self.length


class MaskedDriver(Driver):
    """Draws what the mask allows; rows without one draw 5."""

    def __init__(self, scheduler: Scheduler, depth: int = 2) -> None:
        super().__init__(scheduler, depth, self._draw)
        self.filler = MaskFiller()
        self.filled: FilledMasks | None = None
        self.finished: list[FinishReason | None] = []

    def answer(self):  # type: ignore[no-untyped-def]
        plan = self.in_flight[0]
        self.filled = None
        if plan.mask_rows:
            done: Future[FilledMasks] = Future()
            self.filler.begin(plan, VOCAB_SIZE, lambda future: done.set_result(future.result()))
            self.filled = done.result(10)
            assert not self.filled.failed
            for sequence in self.filled.over:
                events = self.scheduler.finish_matched(sequence)
                self.finished += [output.finish_reason for _, output in events.outputs]
        return super().answer()

    def _draw(self, plan: StepPlan, row: int) -> int:
        if self.filled is None or row not in self.filled.rows:
            return 5
        bits = np.unpackbits(self.filled.bitmask[self.filled.rows.index(row)].view(np.uint8), bitorder="little")
        (token_id,) = np.flatnonzero(bits)
        return int(token_id)


def config(**fields: int) -> SchedulerConfig:
    defaults = dict(first_block_id=1, num_blocks=101, block_size=4, max_num_seqs=8, max_num_batched_tokens=64)
    return SchedulerConfig(**(defaults | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [13, 101])
def test_every_token_is_the_one_that_its_mask_allows(depth: int, num_blocks: int) -> None:
    """With 12 blocks of 4 for four sequences of 20 tokens some are preempted, and go on where they were."""
    driver = MaskedDriver(Scheduler(config(num_blocks=num_blocks)), depth)
    held = [
        driver.scheduler.add_request(make_request(number, 4, max_tokens=30, grammar=Counting(16)), 0.0)
        for number in range(3)
    ]
    free = driver.scheduler.add_request(make_request(3, 4, max_tokens=16), 0.0)
    driver.run()
    assert (driver.scheduler.counters.num_preemptions > 0) == (num_blocks == 13)
    for state in held:
        assert state.sequences[0].output_ids.tolist() == list(range(16))
    assert free.sequences[0].output_ids.tolist() == [5] * 16
    assert driver.finished == [FinishReason.STOP] * 3


def test_a_lost_worker_changes_nothing() -> None:
    driver = MaskedDriver(Scheduler(config()))
    request = make_request(0, 4, max_tokens=30, grammar=Counting(12), num_sequences=2)
    state = driver.scheduler.add_request(request, 0.0)
    for _ in range(5):
        driver.fill()
        driver.answer()
    driver.fill()
    driver.lose_worker()
    driver.run()
    assert [sequence.output_ids.tolist() for sequence in state.sequences] == [list(range(12))] * 2


def test_only_rows_with_a_grammar_that_sample_wait() -> None:
    scheduler = Scheduler(config(max_num_batched_tokens=8))
    scheduler.add_request(make_request(0, 4), 0.0)
    scheduler.add_request(make_request(1, 10, grammar=Counting(3)), 0.0)
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    assert first is not None and second is not None
    assert first.mask_rows == [] and len(second.mask_rows) <= 1  # the first chunk of its prompt samples nothing
    assert encode_step(first, []).step.mask_rows == b""


def test_a_matcher_that_breaks_is_its_own_requests_fault() -> None:
    class Broken(CountingMatcher):
        def fill_mask(self, out: npt.NDArray[np.uint32]) -> None:
            raise RuntimeError("no")

    class BrokenGrammar:
        def start(self) -> Broken:
            return Broken(5)

    scheduler = Scheduler(config())
    scheduler.add_request(make_request(0, 4, grammar=BrokenGrammar()), 0.0)
    scheduler.add_request(make_request(1, 4, grammar=Counting(5)), 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    done: Future[FilledMasks] = Future()
    MaskFiller().begin(plan, VOCAB_SIZE, lambda future: done.set_result(future.result()))
    filled = done.result(10)
    assert [reason for _, reason in filled.failed] == ["RuntimeError: no"]
    assert filled.rows == [plan.rows[1]] and filled.bitmask.shape == (1, 2)
