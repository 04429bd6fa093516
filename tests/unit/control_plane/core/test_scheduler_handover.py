"""Requests that change schedulers: nothing is lost, nothing runs twice, and suspicion comes along."""

from __future__ import annotations

from array import array
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.core.prefix_cache import extend_chain, root_hash
from control_plane.core.request import FinishReason, TokenIdArray
from control_plane.core.scheduler import Scheduler
from control_plane.core.scheduler_config import SchedulerConfig
from control_plane.core.step_plan import StepEvents, StepPlan

from .conftest import Driver, make_request, outputs_of

CONFIG = SchedulerConfig(first_block_id=1, num_blocks=40, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)


def token(plan: StepPlan, row: int) -> int:
    """What a model would say: it hangs on the sequence and the position, and on nothing else."""
    index = plan.rows.index(row)
    sequence, end = plan.sequences[index], plan.start_positions[index] + plan.num_run_tokens[index]
    return int(sequence.request.request.prompt_ids[0]) * 1000 + sequence.index * 100 + end


def groups(num_groups: int, config: SchedulerConfig = CONFIG) -> list[Driver]:
    arrivals = count()
    return [Driver(Scheduler(config, arrivals), choose=token) for _ in range(num_groups)]


def hand_over(giver: Driver, taker: Driver) -> int:
    states = giver.scheduler.take_waiting()
    for state in states:
        taker.scheduler.adopt(state)
    giver.scheduler.check_integrity()
    taker.scheduler.check_integrity()
    return len(states)


def test_running_requests_stay_and_waiting_ones_go() -> None:
    giver, taker = groups(2)
    for number in range(7):
        giver.scheduler.add_request(make_request(number), 0.0)
    giver.fill()
    assert hand_over(giver, taker) == 3
    assert (giver.scheduler.num_running, giver.scheduler.num_waiting) == (4, 0)
    assert taker.scheduler.num_waiting_requests == 3
    ended = [
        state.request.request_id for driver in (giver, taker) for events in driver.run() for state, _ in events.ended
    ]
    assert sorted(ended) == [f"r{number}" for number in range(7)]


def test_arrivals_keep_their_order_across_schedulers() -> None:
    giver, taker = groups(2, SchedulerConfig(1, 40, 4, max_num_seqs=1, max_num_batched_tokens=16))
    for number in range(6):
        (giver if number % 2 else taker).scheduler.add_request(make_request(number), 0.0)
    hand_over(giver, taker)
    ended = [state.request.request_id for events in taker.run() for state, _ in events.ended]
    assert ended == [f"r{number}" for number in range(6)]


def test_a_sequence_with_tokens_in_flight_stays_until_they_have_come() -> None:
    """Preempted, it has no row any more, but its last steps still answer to this scheduler."""
    tight = SchedulerConfig(1, 8, 4, max_num_seqs=4, max_num_batched_tokens=16)
    giver, taker = groups(2, tight)
    for number in range(3):
        giver.scheduler.add_request(make_request(number, prompt=6, max_tokens=12), 0.0)
    seen = 0
    while giver.scheduler.num_requests:
        giver.fill()
        if giver.scheduler.counters.num_preemptions > seen:
            seen = giver.scheduler.counters.num_preemptions
            hand_over(giver, taker)
        if not giver.in_flight:
            break
        giver.answer()
    hand_over(giver, taker)
    taker.run()
    assert seen and not giver.scheduler.num_requests and not taker.scheduler.num_requests


def test_suspicion_follows_a_request_and_is_tried_alone_elsewhere() -> None:
    first, second = groups(2)
    first.scheduler.add_request(make_request(0, max_tokens=30), 0.0)
    second.scheduler.add_request(make_request(9, max_tokens=30), 0.0)
    for driver in (first, second):
        driver.fill()
    for _ in range(2):
        first.lose_worker()
        assert not second.scheduler.num_suspects
        if first.scheduler.num_suspects:
            break
        first.fill()
    assert first.scheduler.num_suspects == 1
    hand_over(first, second)
    assert (first.scheduler.num_suspects, second.scheduler.num_suspects) == (0, 1)
    while second.in_flight:
        second.answer()
    second.fill()
    assert [s.request.request.request_id for s in second.in_flight[-1].sequences] == ["r0"], "nothing beside it"
    events = second.lose_worker()
    ((state, fault),) = events.ended
    assert state.request.request_id == "r0" and fault is not None and "3 times" in fault.message
    assert next(events.ended for events in second.run() if events.ended)[0][0].request.request_id == "r9"


def test_vacating_blames_nobody() -> None:
    giver, taker = groups(2)
    giver.scheduler.add_request(make_request(0, max_tokens=9), 0.0)
    for _ in range(3):
        giver.in_flight.clear()
        giver.fill()
        giver.scheduler.vacate()
    assert not giver.scheduler.num_suspects
    assert hand_over(giver, taker) == 1
    assert sum(len(list(outputs_of(events))) for events in taker.run()) == 9


def test_cached_and_awaited_blocks_count_for_the_router() -> None:
    (driver,) = groups(1)
    scheduler = driver.scheduler
    request = make_request(0, prompt=18)
    hashes = extend_chain_of(request.prompt_ids)
    assert scheduler.num_cached_tokens(hashes) == 0
    scheduler.add_request(request, 0.0, hashes)
    driver.fill()
    assert scheduler.num_cached_tokens(hashes) == 16, "a running prefill will have them soon"
    assert scheduler.num_prefill_tokens in (0, 2)
    driver.run()
    assert scheduler.num_cached_tokens(hashes) == 16
    assert scheduler.num_cached_tokens(extend_chain_of(make_request(1, prompt=18).prompt_ids)) == 0
    assert scheduler.num_blank_blocks < scheduler.num_usable_blocks


def extend_chain_of(prompt_ids: TokenIdArray) -> list[bytes]:
    hashes: list[bytes] = []
    extend_chain(hashes, root_hash("", ""), array("I", prompt_ids.tobytes()), CONFIG.block_size)
    return hashes


def test_a_scheduler_of_its_own_numbers_its_own_arrivals() -> None:
    scheduler = Scheduler(CONFIG)
    assert [scheduler.add_request(make_request(number), 0.0).arrival for number in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="already in use"):
        scheduler.add_request(make_request(1), 0.0)


actions = st.lists(
    st.tuples(
        st.sampled_from(["add", "step", "lose", "vacate", "give", "cancel"]), st.integers(0, 2), st.integers(0, 40)
    ),
    min_size=5,
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(actions=actions, num_blocks=st.integers(14, 60))
def test_whatever_happens_every_request_says_what_it_would_have_said(
    actions: list[tuple[str, int, int]], num_blocks: int
) -> None:
    """Three groups that work, die, drain and hand requests round."""
    config = SchedulerConfig(1, num_blocks, 4, max_num_seqs=3, max_num_batched_tokens=16)
    drivers = groups(3, config)
    said: dict[tuple[str, int], list[int]] = {}
    ends: dict[str, FinishReason | None] = {}
    cancelled: set[str] = set()
    home: dict[str, Driver] = {}
    wanted: dict[str, range] = {}

    def take(events: StepEvents) -> None:
        for state, output in outputs_of(events):
            key = (state.request.request_id, output.index)
            said.setdefault(key, []).extend(output.token_ids)
        for state, fault in events.ended:
            assert state.request.request_id not in ends, "one end each"
            assert fault is None or "lost" in fault.message
            ends[state.request.request_id] = fault  # type: ignore[assignment]

    def give(giver: Driver, taker: Driver) -> None:
        for state in giver.scheduler.take_waiting():
            taker.scheduler.adopt(state)
            home[state.request.request_id] = taker

    for number, (action, which, amount) in enumerate(actions):
        driver, other = drivers[which], drivers[(which + 1) % 3]
        if action == "add":
            request = make_request(
                number + 1, prompt=1 + amount % 20, max_tokens=1 + amount % 9, num_sequences=1 + amount % 2
            )
            driver.scheduler.add_request(request, 0.0)
            home[request.request_id] = driver
            start = len(request.prompt_ids)
            wanted[request.request_id] = range(start, start + request.max_tokens)
        elif action == "step":
            driver.fill()
            if driver.in_flight:
                take(driver.answer())
        elif action == "lose":
            take(driver.lose_worker())
            give(driver, other)
        elif action == "vacate":
            driver.in_flight.clear()
            driver.scheduler.vacate()
            give(driver, other)
        elif action == "give":
            give(driver, other)
        elif home:
            request_id = sorted(home)[amount % len(home)]
            if request_id not in ends:
                home[request_id].scheduler.cancel(request_id)
                cancelled.add(request_id)
        for each in drivers:
            each.scheduler.check_integrity()
    for driver in drivers:
        for events in driver.run():
            take(events)
    assert set(ends) | cancelled == set(wanted)
    for (request_id, index), tokens in said.items():
        if request_id not in cancelled and ends[request_id] is None:
            base = int(request_id[1:]) * 1_000_000 + index * 100
            assert tokens == [base + position for position in wanted[request_id]]
