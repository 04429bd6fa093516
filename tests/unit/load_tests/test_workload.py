"""Workloads: lengths as published, ids of a run's own, arrivals at the rate that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_tests.workload import (
    Phase,
    RequestSpec,
    TokenIdSource,
    arrival_times_s,
    lengths_around,
    nano_lengths,
    prefixed_requests,
    split,
)


def test_nano_lengths_are_the_published_ones() -> None:
    lengths = nano_lengths()
    assert len(lengths) == 256
    assert sum(prompt for prompt, _ in lengths) == 142_827
    assert sum(output for _, output in lengths) == 133_966
    assert all(100 <= length <= 1024 for pair in lengths for length in pair)


def test_ids_are_below_the_limit_and_a_seed_repeats_them() -> None:
    drawn = TokenIdSource(7, 50).draw(4000)
    assert min(drawn) == 0
    assert max(drawn) == 49
    assert TokenIdSource(7, 50).draw(4000) == drawn
    assert TokenIdSource(8, 50).draw(4000) != drawn
    assert all(type(token_id) is int for token_id in drawn)  # what protobuf and JSON take fastest


def test_ids_are_never_drawn_twice_in_a_run() -> None:
    source = TokenIdSource(1, 10_000)
    assert source.draw(64) != source.draw(64)


@given(
    mean=st.integers(1, 4000),
    range_ratio=st.floats(0, 0.99),
    count=st.integers(0, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_lengths_stay_in_their_range(mean: int, range_ratio: float, count: int, seed: int) -> None:
    lengths = lengths_around(mean, range_ratio, count, np.random.default_rng(seed))
    assert len(lengths) == count
    assert all(
        length >= 1 and int(mean * (1 - range_ratio)) <= length <= mean * (1 + range_ratio) for length in lengths
    )
    if range_ratio == 0:
        assert set(lengths) <= {mean}


def test_lengths_reach_both_ends() -> None:
    assert {8, 12} <= set(lengths_around(10, 0.2, 500, np.random.default_rng(0)))


@pytest.mark.parametrize("range_ratio", [-0.1, 1.0])
def test_a_range_outside_of_its_limits_is_refused(range_ratio: float) -> None:
    with pytest.raises(ValueError, match="--range-ratio"):
        lengths_around(10, range_ratio, 1, np.random.default_rng(0))


@given(
    count=st.integers(1, 200),
    rate=st.floats(0.1, 1e4),
    burstiness=st.floats(0.1, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_arrivals_ascend_and_have_the_rate(count: int, rate: float, burstiness: float, seed: int) -> None:
    times_s = arrival_times_s(count, rate, burstiness, np.random.default_rng(seed))
    assert times_s == sorted(times_s)
    assert times_s[0] >= 0
    assert times_s[-1] == pytest.approx(count / rate)


@pytest.mark.parametrize(("burstiness", "expected"), [(1.0, 1.0), (0.25, 2.0), (16.0, 0.25)])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float, expected: float) -> None:
    # A Gamma distribution's standard deviation over its mean is 1 / sqrt(shape).
    times_s = arrival_times_s(20_000, 100.0, burstiness, np.random.default_rng(3))
    gaps_s = np.diff(times_s)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(expected, rel=0.05)


def test_without_a_rate_everything_is_sent_at_once() -> None:
    assert arrival_times_s(3, None, 1.0, np.random.default_rng(0)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)])
def test_rates_that_make_no_sense_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        arrival_times_s(3, rate, burstiness, np.random.default_rng(0))


def test_groups_share_their_prefix_and_nothing_else() -> None:
    ids = TokenIdSource(0, 10_000)
    prefixes = [ids.draw(20), ids.draw(20)]
    requests = prefixed_requests(ids, prefixes, per_prefix=3, num_suffix_tokens=5, max_tokens=9)
    assert [request.prompt_ids[:20] for request in requests] == prefixes * 3
    assert len({tuple(request.prompt_ids[20:]) for request in requests}) == 6
    assert all(len(request.prompt_ids) == 25 and request.max_tokens == 9 for request in requests)


@given(count=st.integers(0, 40), parts=st.integers(1, 6), spare=st.none() | st.integers(0, 20))
def test_splitting_deals_out_every_request_and_the_whole_concurrency(count: int, parts: int, spare: int | None) -> None:
    requests = [RequestSpec([index], 1) for index in range(count)]
    concurrency = None if spare is None else parts + spare
    dealt = split(Phase("p", requests, concurrency), parts)
    assert sorted(request.prompt_ids[0] for part in dealt for request in part.requests) == list(range(count))
    sizes = [len(part.requests) for part in dealt]
    assert max(sizes) - min(sizes) <= 1
    limits = [part.max_concurrency for part in dealt]
    if concurrency is None:
        assert limits == [None] * parts
    else:
        assert sum(limit or 0 for limit in limits) == concurrency
        assert all(limits)


def test_a_concurrency_below_the_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="--max-concurrency 2 cannot be shared by 3 processes"):
        split(Phase("p", [], 2), 3)
