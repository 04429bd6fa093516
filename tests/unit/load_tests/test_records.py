"""The numbers that are made of arrivals, against sums done by hand."""

from __future__ import annotations

import pytest

from load_tests.records import RequestRecord, Slo, phase_numbers, spread_ms


def record(sent_s: float, arrivals_s: list[float], num_tokens: int, **more: object) -> RequestRecord:
    return RequestRecord(sent_s=sent_s, arrivals_s=arrivals_s, num_tokens=num_tokens, num_prompt_tokens=10, **more)  # type: ignore[arg-type]


def test_latencies_of_one_request() -> None:
    # Five tokens in three arrivals: two bundles.
    one = record(1.0, [1.5, 1.7, 2.3], 5)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.e2e_s == pytest.approx(1.3)
    assert one.tpot_s == pytest.approx(0.8 / 4)
    assert record(0.0, [1.0], 1).tpot_s is None


def test_numbers_of_a_phase() -> None:
    numbers = phase_numbers([record(1.0, [1.5, 1.7, 2.3], 5), record(1.2, [2.0, 3.0], 2)])
    assert numbers["num_requests"] == 2
    assert numbers["num_failed"] == 0
    assert numbers["wall_s"] == 2.0
    assert numbers["output_tokens_per_s"] == pytest.approx(3.5)
    assert numbers["total_tokens_per_s"] == pytest.approx(13.5)
    assert numbers["requests_per_s"] == pytest.approx(1.0)
    assert numbers["ttft_ms"] == {"mean": 650.0, "p50": 650.0, "p99": pytest.approx(797.0)}
    assert numbers["tpot_ms"]["mean"] == pytest.approx(600.0)
    # Gaps of all requests together: 0.2, 0.6 and 1.0 s.
    assert numbers["itl_ms"]["mean"] == pytest.approx(600.0)
    assert numbers["itl_ms"]["p50"] == pytest.approx(600.0)
    assert numbers["e2e_ms"]["mean"] == pytest.approx(1550.0)
    assert numbers["tokens_per_arrival"] == pytest.approx(1.4)
    assert "cache_hit_rate" not in numbers


def test_failed_requests_are_counted_and_named_but_make_no_latency() -> None:
    numbers = phase_numbers(
        [
            record(0.0, [1.0, 2.0], 2),
            record(0.0, [9.0], 1, error="the stream ended early"),
            record(0.0, [], 0, error="429: queue full"),
            record(0.0, [], 0, error="429: queue full"),
            record(0.0, [], 0),
        ]
    )
    assert numbers["num_requests"] == 5
    assert numbers["num_failed"] == 4
    assert numbers["errors"] == {"429: queue full": 2, "the stream ended early": 1, "ended without a token": 1}
    assert numbers["wall_s"] == 2.0
    assert numbers["num_output_tokens"] == 2


def test_a_phase_in_which_nothing_succeeded_has_no_rates() -> None:
    numbers = phase_numbers([record(0.0, [], 0, error="refused")])
    assert numbers == {"num_requests": 1, "num_failed": 1, "errors": {"refused": 1}}


def test_requests_of_one_token_have_neither_tpot_nor_itl() -> None:
    numbers = phase_numbers([record(0.0, [0.5], 1)])
    assert numbers["tpot_ms"] is None
    assert numbers["itl_ms"] is None


def test_percentiles_are_linear_between_neighbours() -> None:
    assert spread_ms([value / 1000 for value in range(101)]) == {"mean": 50.0, "p50": 50.0, "p99": 99.0}
    assert spread_ms([0.001, 0.002]) == {"mean": 1.5, "p50": 1.5, "p99": 1.99}
    assert spread_ms([]) is None


def test_hit_rate_counts_only_what_servers_said() -> None:
    numbers = phase_numbers([record(0.0, [1.0], 1, num_cached_tokens=5), record(0.0, [1.0], 1, num_cached_tokens=0)])
    assert numbers["num_cached_tokens"] == 5
    assert numbers["cache_hit_rate"] == pytest.approx(0.25)


def test_slo_takes_milliseconds_and_seconds() -> None:
    assert Slo.parse("ttft=200ms, tpot=0.05s,e2e=1500").limits_s == pytest.approx(
        {"ttft": 0.2, "tpot": 0.05, "e2e": 1.5}
    )


@pytest.mark.parametrize("text", ["", "ttft", "ttft=fast", "speed=3", "ttft=-1", "ttft=1ms,,"])
def test_an_slo_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not NAME=NUMBER"):
        Slo.parse(text)


def test_goodput_is_the_share_that_keeps_every_limit() -> None:
    quick = record(0.0, [0.1, 0.2], 2)
    slow_start = record(0.0, [0.9, 1.0], 2)
    slow_after = record(0.0, [0.1, 1.0], 2)
    single = record(0.0, [0.1], 1)  # no TPOT: nothing that could be too slow
    failed = record(0.0, [], 0, error="x")
    numbers = phase_numbers([quick, slow_start, slow_after, single, failed], Slo.parse("ttft=200ms,tpot=200ms"))
    assert numbers["goodput"]["share_of_requests"] == pytest.approx(2 / 5)
    assert numbers["goodput"]["requests_per_s"] == pytest.approx(2.0)
    assert numbers["goodput"]["slo_ms"] == {"ttft": 200.0, "tpot": 200.0}
