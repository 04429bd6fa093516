"""Rows of a worker with several stages: whose turn it is in which step, so that no stage waits for another."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.core.scheduler import Scheduler
from control_plane.core.scheduler_config import SchedulerConfig
from tests.unit.control_plane.core.conftest import Driver, make_request, outputs_of


def scheduler_of(num_stages: int, num_rows: int, budget: int = 4096) -> Scheduler:
    return Scheduler(SchedulerConfig(0, 4096, 4, num_rows, budget, num_stages=num_stages))


@settings(max_examples=60, deadline=None)
@given(
    num_stages=st.integers(2, 6), num_rows=st.integers(1, 40), prompt=st.integers(1, 9), max_tokens=st.integers(8, 20)
)
def test_every_row_has_its_turn_once_in_so_many_steps_as_stages(
    num_stages: int, num_rows: int, prompt: int, max_tokens: int
) -> None:
    scheduler = scheduler_of(num_stages, num_rows)
    for number in range(num_rows):
        scheduler.add_request(make_request(number, prompt, max_tokens), 0.0)
    driver = Driver(scheduler, depth=scheduler.config.wanted_in_flight)
    driver.run()
    # The first step admits everybody, and so must be over before the turns are even; the last ones thin out.
    num_turns = (max_tokens - 3) * min(num_stages, num_rows)
    steady = [plan.rows for plan in driver.plans[1 + num_stages : num_turns]]
    for start in range(len(steady) - num_stages + 1):
        window = steady[start : start + num_stages]
        counts = Counter(row for rows in window for row in rows)
        if num_rows >= num_stages:
            assert set(counts.values()) == {1}, "a row waits for a token of its own"
            assert len(counts) == num_rows, "a row has no turn"
            assert max(map(len, window)) - min(map(len, window)) <= 1, "stages have unequal work"
        else:
            assert len(counts) == num_rows and all(len(rows) == 1 for rows in window)


@settings(max_examples=40, deadline=None)
@given(num_stages=st.integers(1, 4), num_rows=st.integers(1, 12), depth=st.integers(1, 6), budget=st.integers(4, 64))
def test_all_get_all_their_tokens_at_any_depth(num_stages: int, num_rows: int, depth: int, budget: int) -> None:
    scheduler = scheduler_of(num_stages, max(1, num_rows // 2), budget)
    for number in range(num_rows):
        scheduler.add_request(make_request(number, 1 + number, 5), 0.0)
    driver = Driver(scheduler, depth=depth)
    outputs: Counter[str] = Counter()
    for events in driver.run():
        for state, output in outputs_of(events):
            outputs[state.request.request_id] += len(output.token_ids)
    assert set(outputs.values()) == {5} and len(outputs) == num_rows


def test_a_new_sequence_joins_the_turns() -> None:
    scheduler = scheduler_of(2, 8)
    for number in range(4):
        scheduler.add_request(make_request(number, 3, 50), 0.0)
    driver = Driver(scheduler, depth=3)
    for _ in range(8):
        driver.fill()
        driver.answer()
    scheduler.add_request(make_request(4, 30, 50), 0.0)
    for _ in range(12):
        driver.fill()
        driver.answer()
    last = driver.plans[-6:]
    assert all(not set(one.rows) & set(following.rows) for one, following in pairwise(last))
    assert {len(plan.rows) for plan in last} == {2, 3}


def test_prompts_come_before_rows_whose_token_is_still_being_computed() -> None:
    scheduler = scheduler_of(2, 64, budget=16)
    for number in range(12):
        scheduler.add_request(make_request(number, 8, 20), 0.0)
    driver = Driver(scheduler, depth=3)
    driver.fill()
    first, second, third = driver.plans
    assert [plan.num_tokens for plan in driver.plans] == [16, 16, 16]
    assert not set(first.rows) & set(second.rows), "the second step waits for tokens of the first"
    # Its tokens are there when the first stage begins with the third step.
    assert set(first.rows) <= set(third.rows)


def test_who_waits_and_cannot_be_placed_keeps_nobody_waiting() -> None:
    # Blocks for one sequence.
    scheduler = Scheduler(SchedulerConfig(0, 5, 4, 8, 64, num_stages=2, enable_prefix_caching=False))
    for number in range(3):
        scheduler.add_request(make_request(number, 12, 8), 0.0)
    driver = Driver(scheduler, depth=3)
    driver.fill()
    assert [plan.rows for plan in driver.plans] == [[0]] * 3, "a step ahead has nothing to wait for but its own row"
    driver.run()
    assert scheduler.num_requests == 0


@pytest.mark.parametrize("num_stages", [2, 3])
def test_where_sequences_end_the_fuller_steps_give_way(num_stages: int) -> None:
    num_rows = 12 * num_stages
    scheduler = scheduler_of(num_stages, num_rows)
    for number in range(num_rows):
        # Rows are dealt out in their order: of the first step most end soon.
        ends_soon = number < 12 and number % 4
        scheduler.add_request(make_request(number, 3, 8 if ends_soon else 60), 0.0)
    driver = Driver(scheduler, depth=num_stages + 1)
    for _ in range(16 * num_stages):
        driver.fill()
        driver.answer()
    steady = driver.plans[12 * num_stages :]
    num_left = num_rows - 9
    assert {len(plan.rows) for plan in steady} <= {num_left // num_stages, -(-num_left // num_stages)}
    for start in range(len(steady) - num_stages + 1):
        window = [row for plan in steady[start : start + num_stages] for row in plan.rows]
        assert len(window) == len(set(window)), "a row waits for a token of its own"
    gaps = [
        later - earlier
        for row in range(num_rows)
        for earlier, later in pairwise([step for step, plan in enumerate(driver.plans) if row in plan.rows])
    ]
    assert max(gaps) <= num_stages + 1, "nobody sits out twice in a row"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_one_stage_runs_every_row_in_every_step(depth: int) -> None:
    scheduler = scheduler_of(1, 8)
    for number in range(5):
        scheduler.add_request(make_request(number, 3, 6), 0.0)
    driver = Driver(scheduler, depth=depth)
    driver.run()
    assert [len(plan.rows) for plan in driver.plans[:5]] == [5] * 5
