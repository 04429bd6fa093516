"""What the scheduler promises beyond correctness: no work done twice, order, who gives way, who is tried alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.core.policy import BACKGROUND_PRIORITY, BACKLOG_STEPS, context_per_prompt_token, mixed_step_size
from control_plane.core.request import CoreRequest, FinishReason
from control_plane.core.scheduler import Scheduler
from control_plane.core.scheduler_config import SchedulerConfig
from control_plane.core.step_plan import ProtocolError, RowFailure, StepOutcome, StepPlan

from .conftest import Driver, known_ids, make_request, outputs_of


def config(**fields: object) -> SchedulerConfig:
    defaults = dict(first_block_id=1, num_blocks=101, block_size=4, max_num_seqs=8, max_num_batched_tokens=64)
    return SchedulerConfig(**(defaults | fields))  # type: ignore[arg-type]


def tokens_of(plan: StepPlan, number: int) -> int:
    return sum(
        count
        for sequence, count in zip(plan.sequences, plan.num_run_tokens, strict=True)
        if sequence.request.request.request_id == f"r{number}"
    )


def total_tokens(driver: Driver, number: int) -> int:
    return sum(tokens_of(plan, number) for plan in driver.plans)


def test_a_prefix_is_computed_once_even_when_both_arrive_together() -> None:
    driver = Driver(Scheduler(config()))
    prompt = list(range(30))
    for number in range(2):
        driver.scheduler.add_request(make_request(number, [*prompt, 77 + number], max_tokens=2), 0.0)
    driver.run()
    assert total_tokens(driver, 0) == 31 + 1
    # 7 full blocks of 4 are shared; the other 3 tokens and the first output are run.
    assert total_tokens(driver, 1) == 3 + 1
    assert driver.scheduler.counters.num_prefix_hits == 28


def test_a_longer_shared_prefix_is_followed_block_by_block() -> None:
    driver = Driver(Scheduler(config()))
    driver.scheduler.add_request(make_request(0, list(range(40)), max_tokens=1), 0.0)
    driver.run()
    driver.scheduler.add_request(make_request(1, [*range(17), 99, 98, 97, 96], max_tokens=1), 0.0)
    driver.run()
    assert total_tokens(driver, 1) == 21 - 16


def test_generated_tokens_are_cached_for_the_next_turn_of_a_conversation() -> None:
    driver = Driver(Scheduler(config()))
    state = driver.scheduler.add_request(make_request(0, 6, max_tokens=11), 0.0)
    driver.run()
    history = known_ids(state.sequences[0])
    driver.scheduler.add_request(make_request(1, [*history, 9], max_tokens=1), 0.0)
    driver.run()
    # Of 6 + 11 tokens the last was never run: 16 computed, 4 full blocks.
    assert total_tokens(driver, 1) == 18 - 16


def test_salts_and_tenants_do_not_share() -> None:
    driver = Driver(Scheduler(config()))
    prompt = list(range(20))
    for number, fields in enumerate([{}, {"cache_salt": "x"}, {"tenant": "x"}, {"tenant": "x", "cache_salt": "x"}]):
        driver.scheduler.add_request(make_request(number, prompt, max_tokens=1, **fields), 0.0)
        driver.run()
        assert total_tokens(driver, number) == 20


@pytest.mark.parametrize("caching", [True, False])
def test_sequences_of_a_request_share_their_prompt_even_without_caching(caching: bool) -> None:
    driver = Driver(Scheduler(config(enable_prefix_caching=caching)))
    driver.scheduler.add_request(make_request(0, 21, max_tokens=3, num_sequences=3), 0.0)
    driver.run()
    assert total_tokens(driver, 0) == 21 + 2 + 2 * (1 + 2)
    if not caching:
        driver.scheduler.add_request(make_request(1, [position for position in range(21)], max_tokens=1), 0.0)
        driver.run()
        assert total_tokens(driver, 1) == 21


def test_nobody_takes_over_what_a_worker_with_states_has_computed() -> None:
    driver = Driver(Scheduler(config(enable_prefix_caching=False, shares_blocks=False)))
    driver.scheduler.add_request(make_request(0, 21, max_tokens=3, num_sequences=3), 0.0)
    driver.run()
    assert total_tokens(driver, 0) == 3 * (21 + 2)
    assert all(start.num_computed_tokens == 0 for plan in driver.plans for start in plan.starts)


def test_nothing_is_run_past_max_tokens() -> None:
    driver = Driver(Scheduler(config()), depth=3)
    driver.scheduler.add_request(make_request(0, 5, max_tokens=7), 0.0)
    driver.run()
    assert total_tokens(driver, 0) == 5 + 6
    assert driver.scheduler.counters.num_discarded_tokens == 0


def test_a_stop_token_is_noticed_late_and_what_follows_is_thrown_away() -> None:
    driver = Driver(Scheduler(config()), depth=2)
    driver.scheduler.add_request(make_request(0, 5, max_tokens=50, stop_token_ids=frozenset({5})), 0.0)
    outputs = [output for events in driver.run() for _, output in outputs_of(events)]
    assert [(output.token_ids, output.num_tokens, output.finish_reason) for output in outputs] == [
        ([], 1, FinishReason.STOP)
    ]
    assert driver.scheduler.counters.num_discarded_tokens == 1


def test_min_tokens_outlasts_stop_tokens() -> None:
    driver = Driver(Scheduler(config()))
    driver.scheduler.add_request(make_request(0, 5, max_tokens=9, min_tokens=3, stop_token_ids=frozenset({5})), 0.0)
    outputs = [output for events in driver.run() for _, output in outputs_of(events)]
    assert [output.token_ids for output in outputs] == [[5], [5], [5], []]


def test_decodes_ride_with_chunks_of_a_long_prompt() -> None:
    driver = Driver(Scheduler(config(max_num_batched_tokens=16)), depth=1)
    driver.scheduler.add_request(make_request(0, 4, max_tokens=30), 0.0)
    driver.fill()
    driver.answer()
    driver.scheduler.add_request(make_request(1, 50, max_tokens=1), 0.0)
    driver.run()
    chunks = [tokens_of(plan, 1) for plan in driver.plans if tokens_of(plan, 1)]
    assert chunks == [15, 15, 15, 5]
    assert all(tokens_of(plan, 0) == 1 for plan in driver.plans[1:5])


def test_priority_decides_who_waits() -> None:
    driver = Driver(Scheduler(config(policy="priority", max_num_seqs=1)), depth=1)
    order = []
    for number, priority in enumerate([5, 0, -3, 0]):
        driver.scheduler.add_request(make_request(number, 3, max_tokens=2, priority=priority), 0.0)
    for events in driver.run():
        order += [state.request.request_id for state, _ in events.ended]
    assert order == ["r2", "r1", "r3", "r0"]


def test_the_latest_gives_way_and_comes_back_first() -> None:
    # 6 usable blocks of 4: two sequences of 8 tokens fit, and grow until one has to go.
    driver = Driver(Scheduler(config(num_blocks=7)), depth=1)
    for number in range(3):
        driver.scheduler.add_request(make_request(number, 8, max_tokens=8), 0.0)
    ended = [state.request.request_id for events in driver.run() for state, _ in events.ended]
    assert driver.scheduler.counters.num_preemptions >= 1
    assert ended == ["r0", "r1", "r2"]


def test_cancel_frees_rows_and_blocks_once_the_step_in_flight_is_back() -> None:
    driver = Driver(Scheduler(config()), depth=2)
    for number in range(4):
        driver.scheduler.add_request(make_request(number, 9, max_tokens=40), 0.0)
    driver.fill()
    for number in range(4):
        driver.scheduler.cancel(f"r{number}")
    assert driver.scheduler.num_running == 0 and driver.scheduler.num_blocks_held > 0
    while driver.in_flight:
        driver.answer()
    assert driver.scheduler.num_blocks_held == 0


def test_a_row_fault_ends_its_request_alone() -> None:
    scheduler = Scheduler(config())
    for number in range(2):
        scheduler.add_request(make_request(number, 3, max_tokens=2, num_sequences=2 - number), 0.0)
    driver = Driver(scheduler, depth=1)
    driver.fill()
    plan = driver.in_flight.popleft()
    bad, *good = plan.rows
    events = scheduler.apply(StepOutcome(plan.step_id, good, [5, 5], failures=[RowFailure(bad, "NOT_FINITE", "nan")]))
    assert [(state.request.request_id, fault.code) for state, fault in events.ended if fault] == [("r0", "INTERNAL")]
    scheduler.check_integrity()
    ended = [(state.request.request_id, fault) for events in driver.run() for state, fault in events.ended]
    assert ended == [("r1", None)]


@pytest.mark.parametrize("rows, step_id", [([0, 1], 1), ([], 1), ([0], 2)])
def test_an_answer_to_something_else_is_refused(rows: list[int], step_id: int) -> None:
    scheduler = Scheduler(config())
    scheduler.add_request(make_request(0), 0.0)
    scheduler.plan(0.0)
    with pytest.raises(ProtocolError):
        scheduler.apply(StepOutcome(step_id, rows, [5] * len(rows)))


def test_innocent_requests_run_together_again_after_two_losses() -> None:
    driver = Driver(Scheduler(config()), depth=2)
    for number in range(4):
        driver.scheduler.add_request(make_request(number, 5, max_tokens=40), 0.0)
    for _ in range(2):
        driver.fill()
        driver.answer()
        driver.fill()
        driver.lose_worker()
    driver.plans.clear()
    ended = [fault for events in driver.run() for _, fault in events.ended]
    assert ended == [None] * 4
    widths = [len(plan.rows) for plan in driver.plans]
    assert widths[0] == 1 and max(widths) == 4
    assert widths.index(4) < 4 * 8, "suspicion lasts too long"


def test_a_resumed_sequence_is_added_with_all_its_tokens() -> None:
    driver = Driver(Scheduler(config()), depth=2)
    driver.scheduler.add_request(make_request(0, 5, max_tokens=9), 0.0)
    for _ in range(3):
        driver.fill()
        driver.answer()
    driver.lose_worker()
    plan = driver.scheduler.plan(0.0)
    assert plan is not None and plan.step_id == 1 and plan.drop_rows == []
    assert known_ids(plan.starts[0].sequence) == [0, 1, 2, 3, 4, 5, 5, 5]
    assert plan.starts[0].num_computed_tokens == 0 and plan.num_run_tokens == [8]


def test_duplicate_request_ids_are_refused() -> None:
    scheduler = Scheduler(config())
    scheduler.add_request(make_request(0), 0.0)
    with pytest.raises(ValueError, match="r0"):
        scheduler.add_request(CoreRequest("r0", np.array([1], np.uint32), make_request(0).sampling, max_tokens=1), 0.0)


def test_suspects_take_turns_on_a_pool_that_holds_few_of_them() -> None:
    """Each is tried with the whole worker to itself, or the next in turn would never find room."""
    driver = Driver(Scheduler(config(num_blocks=41)), depth=2)
    for number in range(4):
        driver.scheduler.add_request(make_request(number, 36, max_tokens=80), 0.0)
    for _ in range(2):
        driver.fill()
        driver.answer()
        driver.fill()
        driver.lose_worker()
    driver.plans.clear()
    ended = [fault for events in driver.run() for _, fault in events.ended]
    assert ended == [None] * 4


def test_a_loss_is_blamed_on_nobody_who_was_not_alone() -> None:
    """The next suspect starts only when nothing of the one before is in flight."""
    driver = Driver(Scheduler(config()), depth=3)
    for number in range(3):
        driver.scheduler.add_request(make_request(number, 5, max_tokens=30), 0.0)
    for _ in range(2):
        driver.fill()
        driver.lose_worker()
    for _ in range(30):
        driver.fill()
        if not any(sequence.num_losses for plan in driver.in_flight for sequence in plan.sequences):
            break
        assert len({sequence for plan in driver.in_flight for sequence in plan.sequences}) == 1
        driver.answer()


def test_what_a_failed_row_computed_is_not_shared() -> None:
    scheduler = Scheduler(config())
    driver = Driver(scheduler, depth=1)
    prompt = list(range(20))
    scheduler.add_request(make_request(0, prompt, max_tokens=9), 0.0)
    driver.fill()
    driver.answer()
    assert scheduler.num_cached_blocks == 5
    driver.fill()
    plan = driver.in_flight.popleft()
    scheduler.apply(StepOutcome(plan.step_id, [], [], failures=[RowFailure(plan.rows[0], "NOT_FINITE", "nan")]))
    scheduler.check_integrity()
    assert scheduler.num_cached_blocks == 0 and scheduler.num_blocks_held == 0


def test_what_a_failed_row_generated_is_not_shared() -> None:
    scheduler = Scheduler(config())
    driver = Driver(scheduler, depth=1)
    scheduler.add_request(make_request(0, 8, max_tokens=30), 0.0)
    for _ in range(10):
        driver.fill()
        driver.answer()
    assert scheduler.num_cached_blocks == 2
    driver.fill()
    plan = driver.in_flight.popleft()
    scheduler.apply(StepOutcome(plan.step_id, [], [], failures=[RowFailure(plan.rows[0], "NOT_FINITE", "nan")]))
    assert scheduler.num_cached_blocks == 0


@pytest.mark.parametrize("num_failing", [1, 2])
@pytest.mark.parametrize("alike", [True, False])
def test_what_the_siblings_of_a_failed_row_generated_is_not_shared(num_failing: int, alike: bool) -> None:
    scheduler = Scheduler(config())
    driver = Driver(scheduler, depth=1, choose=lambda plan, row: 5 if alike else 5 + row)
    scheduler.add_request(make_request(0, 8, max_tokens=30, num_sequences=2), 0.0)
    for _ in range(14):
        driver.fill()
        driver.answer()
    assert scheduler.num_cached_blocks >= 2
    driver.fill()
    plan = driver.in_flight.popleft()
    failures = [RowFailure(row, "NOT_FINITE", "nan") for row in plan.rows[:num_failing]]
    others = plan.rows[num_failing:]
    scheduler.apply(StepOutcome(plan.step_id, others, [5] * len(others), failures=failures))
    assert scheduler.num_cached_blocks == 0


@pytest.mark.parametrize("cancels", [True, False])
def test_generated_blocks_are_named_together_and_the_rest_at_the_end(cancels: bool) -> None:
    scheduler = Scheduler(config())
    driver = Driver(scheduler, depth=1)
    scheduler.add_request(make_request(0, 8, max_tokens=30), 0.0)
    num_cached = []
    for _ in range(30 if not cancels else 29):
        driver.fill()
        driver.answer()
        num_cached.append(scheduler.num_cached_blocks)
    if cancels:
        scheduler.cancel("r0")
        num_cached.append(scheduler.num_cached_blocks)
    # After so many answers 7 + so many tokens are computed.
    assert num_cached == [2] * 16 + [6] * 13 + [9]


def test_who_waits_for_a_prefix_starts_once_it_is_computed() -> None:
    driver = Driver(Scheduler(config()), depth=1)
    for number in range(2):
        driver.scheduler.add_request(make_request(number, [*range(20), number], max_tokens=5), 0.0)
    driver.fill()
    driver.answer()
    driver.fill()
    first, second = driver.plans
    assert [start.sequence.request.request.request_id for start in first.starts] == ["r0"]
    assert [start.num_computed_tokens for start in second.starts] == [20]


def test_tokens_of_what_was_preempted_and_then_cancelled_are_thrown_away() -> None:
    scheduler = Scheduler(config(max_num_seqs=1))
    driver = Driver(scheduler, depth=3)
    scheduler.add_request(make_request(0, max_tokens=30, priority=BACKGROUND_PRIORITY), 0.0)
    driver.fill()
    driver.answer()
    scheduler.add_request(make_request(1), 0.0)
    driver.fill()
    assert scheduler.counters.num_preemptions == 1
    assert [sequence.request.request.request_id for sequence in driver.answer().sequences] == ["r0"]
    scheduler.cancel("r0")
    assert not list(outputs_of(driver.answer()))
    assert scheduler.counters.num_discarded_tokens == 1


def test_a_step_does_not_grow_past_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.core.scheduler._MAX_START_TOKENS", 50)
    driver = Driver(Scheduler(config(max_num_batched_tokens=1000)), depth=1)
    for number in range(6):
        driver.scheduler.add_request(make_request(number, 30, max_tokens=2), 0.0)
    driver.run()
    assert [len(plan.starts) for plan in driver.plans[:4]] == [2, 2, 2, 0]


def test_an_answer_that_does_not_fit_leaves_the_step_in_flight() -> None:
    """Whoever was in the batch is known when the worker is given up."""
    scheduler = Scheduler(config())
    state = scheduler.add_request(make_request(0), 0.0)
    scheduler.plan(0.0)
    with pytest.raises(ProtocolError):
        scheduler.apply(StepOutcome(1, [7], [5]))
    scheduler.worker_lost()
    assert state.sequences[0].num_losses == 1


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("scarce", [{"max_num_seqs": 3}, {"num_blocks": 17}])
def test_background_work_makes_way_whatever_the_policy(policy: str, scarce: dict[str, int]) -> None:
    """Three batch requests fill the worker; one that comes later is served at once, and they end all the same."""
    driver = Driver(Scheduler(config(policy=policy, enable_prefix_caching=False, **scarce)))
    for number in range(3):
        driver.scheduler.add_request(make_request(number, 15, max_tokens=30, priority=BACKGROUND_PRIORITY), 0.0)
    for _ in range(3):
        driver.fill()
        driver.answer()
    assert driver.scheduler.num_running == 3
    driver.scheduler.add_request(make_request(9, 15, max_tokens=3), 0.0)
    ended: list[str] = []
    num_steps_of_its_own = 0
    while len(ended) < 4:
        driver.fill()
        if "r9" not in ended:
            num_steps_of_its_own += 1
        ended += [state.request.request_id for state, _ in driver.answer().ended]
    assert ended[0] == "r9" and sorted(ended[1:]) == ["r0", "r1", "r2"]
    # The steps in flight when it came, one for its prompt, two for its tokens, and those that free its place.
    assert num_steps_of_its_own <= 8
    assert 1 <= driver.scheduler.counters.num_preemptions <= 4


def test_background_work_stays_where_there_is_room() -> None:
    driver = Driver(Scheduler(config()))
    driver.scheduler.add_request(make_request(0, 15, max_tokens=30, priority=BACKGROUND_PRIORITY), 0.0)
    driver.fill()
    driver.scheduler.add_request(make_request(1, 15, max_tokens=3), 0.0)
    driver.run()
    assert driver.scheduler.counters.num_preemptions == 0


def generating(driver: Driver, num_requests: int, max_tokens: int) -> None:
    """Let so many requests of one prompt token come as far as their second token."""
    for number in range(num_requests):
        driver.scheduler.add_request(make_request(number, [number], max_tokens=max_tokens), 0.0)
    driver.fill()
    driver.answer()


def test_a_prompt_is_spread_over_steps_in_which_others_generate() -> None:
    driver = Driver(Scheduler(config(num_blocks=2001, max_num_batched_tokens=4096)))
    generating(driver, 4, max_tokens=20)
    first = len(driver.plans)
    driver.scheduler.add_request(make_request(9, 1300, max_tokens=2), 0.0)
    driver.run()
    # 512 with the four that generate.
    steps = [tokens_of(plan, 9) for plan in driver.plans[first : first + 3]]
    assert steps == [508, 508, 284]
    assert all(len(plan.rows) == 5 for plan in driver.plans[first : first + 3])


def test_a_small_rest_of_a_prompt_is_no_step_of_its_own() -> None:
    driver = Driver(Scheduler(config(num_blocks=2001, max_num_batched_tokens=4096)))
    generating(driver, 4, max_tokens=20)
    first = len(driver.plans)
    driver.scheduler.add_request(make_request(9, 1100, max_tokens=2), 0.0)
    driver.run()
    assert [tokens_of(plan, 9) for plan in driver.plans[first : first + 2]] == [508, 592]


def test_a_prompt_that_nobody_generates_beside_is_run_at_once() -> None:
    driver = Driver(Scheduler(config(num_blocks=2001, max_num_batched_tokens=4096)))
    driver.scheduler.add_request(make_request(0, 3000, max_tokens=2), 0.0)
    driver.run()
    assert tokens_of(driver.plans[0], 0) == 3000


def test_a_burst_of_prompts_gets_larger_steps() -> None:
    driver = Driver(Scheduler(config(num_blocks=9001, max_num_seqs=64, max_num_batched_tokens=4096)))
    generating(driver, 4, max_tokens=60)
    first = len(driver.plans)
    for number in range(20, 50):
        driver.scheduler.add_request(make_request(number, 1000, max_tokens=2), 0.0)
    driver.run()
    sizes = [sum(plan.num_run_tokens) for plan in driver.plans[first:]]
    # A thirty-second of 30,000 tokens, then of what is left, and never less than 512 while there are as many.
    assert sizes[0] == 1024
    assert sizes[: sizes.index(512)] == sorted(sizes[: sizes.index(512)], reverse=True)


def test_prompts_may_cost_a_step_what_its_context_does() -> None:
    """A small model with much context: many small steps would read that context as many times."""
    costly = config(num_blocks=2001, max_num_batched_tokens=4096, context_per_prompt_token=2)
    driver = Driver(Scheduler(costly))
    driver.scheduler.add_request(make_request(0, 3000, max_tokens=9), 0.0)
    driver.fill()
    driver.answer()
    driver.scheduler.add_request(make_request(1, 3000, max_tokens=9), 0.0)
    driver.run()
    # Half of the 3,000 tokens of context beside it, and up to a multiple of 128.
    assert tokens_of(driver.plans[2], 1) == 1535


@given(st.integers(1, 600), st.integers(0, 9000), st.integers(1, 100_000), st.integers(1, 4096))
def test_a_mixed_step_takes_some_of_what_waits(num_decodes: int, cost: int, backlog: int, at_least: int) -> None:
    part = mixed_step_size(num_decodes, cost, backlog, at_least) - num_decodes
    wanted = max(256, at_least - num_decodes, cost, backlog / BACKLOG_STEPS)
    assert min(backlog, wanted) <= part <= max(wanted, min(backlog, 1.25 * (wanted + 128))) + 128


def test_what_context_costs_is_known_from_the_worker() -> None:
    # Llama-3.1-8B in bfloat16: 6.98e9 weights in its layers and 128 KiB of KV for each token.
    assert context_per_prompt_token(6_979_321_856, 131_072) == 532
    assert context_per_prompt_token(0, 131_072) == context_per_prompt_token(6_979_321_856, 0) == 0
