"""Scenarios against a server that is a formula: the headline must be the formula's own numbers."""

from __future__ import annotations

import argparse
import asyncio

import pytest

from load_tests.driver import PhaseResult
from load_tests.records import RequestRecord
from load_tests.scenarios import SCENARIOS, PhaseFailed, scenario_parameters
from load_tests.workload import Phase, TokenIdSource

PREFILL_S, TOKEN_S = 0.5, 0.01


class FormulaServer:
    """Answers a phase's requests at once: first token after PREFILL_S, then one every TOKEN_S."""

    def __init__(self, error: str | None = None) -> None:
        self.phases: list[Phase] = []
        self._error = error
        self._seen_prefixes: set[tuple[int, ...]] = set()

    async def run(self, phase: Phase) -> PhaseResult:
        self.phases.append(phase)
        records = [
            RequestRecord(
                sent_s=0.0,
                arrivals_s=[PREFILL_S + TOKEN_S * token for token in range(request.max_tokens)],
                num_prompt_tokens=len(request.prompt_ids),
                num_tokens=request.max_tokens,
                num_cached_tokens=self._cached(request.prompt_ids),
                error=self._error,
            )
            for request in phase.requests
        ]
        return PhaseResult(records, wall_s=1.0, driver_cpu_s=0.0)

    def _cached(self, prompt_ids: list[int]) -> int:
        """The first 16 tokens, if they were sent before."""
        prefix = tuple(prompt_ids[:16])
        known = prefix in self._seen_prefixes
        self._seen_prefixes.add(prefix)
        return 16 if known else 0


def run(name: str, server: FormulaServer, *flags: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    SCENARIOS[name].add_arguments(parser)
    args = parser.parse_args(flags)
    return asyncio.run(SCENARIOS[name].run(args, TokenIdSource(0, 10_000), server.run))  # type: ignore[return-value]


def _prompts(phases: list[Phase]) -> list[tuple[int, ...]]:
    return [tuple(request.prompt_ids) for phase in phases for request in phase.requests]


def test_decode_takes_the_difference_and_never_sends_a_prompt_twice() -> None:
    server = FormulaServer()
    headline = run("decode", server, "--batch-size", "3", "--repeats", "4")
    assert headline["ms_per_token"] == pytest.approx(10.0)
    assert [phase.name for phase in server.phases] == [*["warm-up"] * 2, *["short", "long"] * 4]
    assert {request.max_tokens for phase in server.phases[0::2] for request in phase.requests} == {1}
    assert {request.max_tokens for phase in server.phases[1::2] for request in phase.requests} == {129}
    prompts = _prompts(server.phases)
    assert {len(prompt) for prompt in prompts} == {1024}
    assert len(set(prompts)) == len(prompts) == 30


def test_decode_of_one_sequence_runs_longer() -> None:
    server = FormulaServer()
    run("decode", server, "--repeats", "2")
    assert [phase.requests[0].max_tokens for phase in server.phases[2:]] == [1, 257] * 2


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_one_run_alone_is_no_measurement(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(name, FormulaServer(), "--repeats", "1")
    assert "must be at least 2" in capsys.readouterr().err


def test_decode_makes_no_number_of_failed_requests() -> None:
    with pytest.raises(PhaseFailed, match="2 of 2 requests failed, the first with: out of blocks"):
        run("decode", FormulaServer("out of blocks"), "--batch-size", "2")


def test_prefill_reports_one_and_many() -> None:
    server = FormulaServer()
    headline = run("prefill", server, "--input-len", "2000", "--batch-size", "5", "--repeats", "2")
    assert headline["ttft_ms"] == pytest.approx(500.0)
    assert headline["prompt_tokens_per_s"] == pytest.approx(5 * 2000 / 0.5)
    assert all(request.max_tokens == 1 for phase in server.phases for request in phase.requests)


def test_nano_sends_the_published_lengths_at_once() -> None:
    server = FormulaServer()
    run("nano", server)
    phase = server.phases[-1]
    assert phase.max_concurrency is None
    assert sum(len(request.prompt_ids) for request in phase.requests) == 142_827
    assert sum(request.max_tokens for request in phase.requests) == 133_966
    assert {request.send_at_s for request in phase.requests} == {0.0}


def test_random_has_the_same_lengths_and_times_each_run_but_other_ids() -> None:
    flags = ("--num-requests", "20", "--range-ratio", "0.5", "--rate", "4", "--max-concurrency", "3")
    shapes, ids = [], []
    for seed in (1, 2):
        server = FormulaServer()
        parser = argparse.ArgumentParser()
        SCENARIOS["random"].add_arguments(parser)
        asyncio.run(SCENARIOS["random"].run(parser.parse_args(flags), TokenIdSource(seed, 1000), server.run))
        phase = server.phases[-1]
        assert phase.max_concurrency == 3
        shapes.append([(len(request.prompt_ids), request.max_tokens, request.send_at_s) for request in phase.requests])
        ids.append(_prompts([phase]))
    assert shapes[0] == shapes[1]
    assert shapes[0][-1][2] == pytest.approx(5.0)
    assert not set(ids[0]) & set(ids[1])


def test_shared_prefix_reports_hits_of_each_phase() -> None:
    headline = run(
        "shared-prefix",
        FormulaServer(),
        *("--num-groups", "4", "--per-group", "5", "--prefix-len", "16", "--suffix-len", "16", "--output-len", "2"),
    )
    assert headline["apart_hit_rate"] == 0
    assert headline["shared_hit_rate"] == pytest.approx(0.5 * 4 / 5)  # the first of each group computes it
    assert headline["warm_hit_rate"] == pytest.approx(0.5)
    assert headline["warm_ttft_p50_ms"] == pytest.approx(500.0)


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_no_request_is_longer_than_the_scenario_says(name: str) -> None:
    parser = argparse.ArgumentParser()
    SCENARIOS[name].add_arguments(parser)
    args = parser.parse_args([])
    server = FormulaServer()
    asyncio.run(SCENARIOS[name].run(args, TokenIdSource(0, 1000), server.run))
    longest = max(len(request.prompt_ids) + request.max_tokens for phase in server.phases for request in phase.requests)
    assert longest <= SCENARIOS[name].longest_sequence(args)


def test_parameters_are_the_scenarios_own_flags() -> None:
    args = argparse.Namespace(num_requests=5, length_seed=0, timeout_s=3, grpc="x")
    assert scenario_parameters(args, SCENARIOS["nano"]) == {"num_requests": 5, "length_seed": 0}
