"""The same prompts alone, in batches, in chunks, after a prefix and after a preemption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gpu_worker.runner_api import Runner, StepResult
from load_tests.cpu_worker.step_driver import StepDriver, sampling

NUM_TOP = 3
LENGTHS = (1, 7, 40, 33, 70, 5)
PREFIX_TOKENS = 64  # whole blocks of 16, 32 or 64
NUM_ROWS = 16


@dataclass
class Trace:
    """What came out for one prompt: tokens, and every log-probability as the bits that it has."""

    tokens: list[int] = field(default_factory=list)
    bits: list[tuple[int, ...]] = field(default_factory=list)


def prompts(vocab_size: int) -> list[list[int]]:
    """NUM_ROWS of them; from the 6th on they begin with the same PREFIX_TOKENS."""
    rng = np.random.default_rng(5)
    prefix = rng.integers(0, vocab_size, PREFIX_TOKENS).tolist()
    made = []
    for number in range(NUM_ROWS):
        own = rng.integers(0, vocab_size, LENGTHS[number % len(LENGTHS)]).tolist()
        made.append(own if number < 6 else prefix + own)
    return made


class Tracer:
    """A driver that keeps what each prompt gives. Every other prompt is sampled, the others are greedy."""

    def __init__(self, runner: Runner) -> None:
        self.driver = StepDriver(runner)
        self.prompts = prompts(self.driver.facts.vocab_size)
        self.traces: dict[int, Trace] = {}

    def add(self, row: int, number: int, *, prefix_of: int | None = None) -> None:
        """Prompt `number` with what it has given so far."""
        trace = self.traces.setdefault(row, Trace())
        prompt = self.prompts[number]
        how = sampling(temperature=0.8 * (number % 2), top_p=0.9, seed=number, num_logprobs=NUM_TOP)
        shared = 0 if prefix_of is None else PREFIX_TOKENS
        self.driver.add(
            row,
            prompt + trace.tokens,
            how,
            num_prompt_tokens=len(prompt),
            prefix_of=prefix_of,
            num_shared_tokens=shared,
        )

    def step(self, runs: dict[int, int] | None = None) -> StepResult:
        result = self.driver.step(runs)
        assert not result.faults
        assert result.logprobs is not None or not len(result.rows)
        for index, row in enumerate(result.rows.tolist()):
            assert result.logprobs is not None and result.top_logprobs is not None and result.top_token_ids is not None
            trace = self.traces[row]
            trace.tokens.append(int(result.token_ids[index]))
            numbers = np.append(result.top_logprobs[index], result.logprobs[index]).astype(np.float32)
            trace.bits.append((*numbers.view(np.uint32).tolist(), *result.top_token_ids[index].tolist()))
        return result

    def run_until(self, num_tokens: int, choose: Callable[[], dict[int, int] | None] = lambda: None) -> None:
        while any(len(trace.tokens) < num_tokens for trace in self.traces.values()):
            self.step(choose())


def alone(runner: Runner, number: int, num_tokens: int) -> Trace:
    tracer = Tracer(runner)
    tracer.add(0, number)
    tracer.run_until(num_tokens)
    return tracer.traces[0]


def batch_with_shared_prefixes(runner: Runner, num_tokens: int) -> dict[int, Trace]:
    """All prompts at once; those that begin alike take the blocks of one of them."""
    tracer = Tracer(runner)
    tracer.add(6, 6)
    tracer.step()
    for row in range(NUM_ROWS):
        if row != 6:
            tracer.add(row, row, prefix_of=6 if row > 6 else None)
    tracer.run_until(num_tokens)
    return tracer.traces


def odd_chunks_and_preemption(runner: Runner, num_tokens: int) -> dict[int, Trace]:
    """Prompts in chunks of odd budgets beside decodes; every few steps a row is thrown out and added anew."""
    tracer = Tracer(runner)
    rng = np.random.default_rng(9)
    for row in range(NUM_ROWS):
        tracer.add(row, row)
    driver = tracer.driver
    num_steps = 0

    def choose() -> dict[int, int]:
        nonlocal num_steps
        num_steps += 1
        if num_steps % 5 == 0:
            victim = int(rng.integers(NUM_ROWS))
            driver.drop(victim)
            tracer.add(victim, victim)
        rows = [row for row in range(NUM_ROWS) if rng.random() < 0.8] or [0]
        return {row: min(driver.rows[row].num_waiting, int(rng.integers(1, 24))) for row in rows}

    tracer.run_until(num_tokens, choose)
    return tracer.traces


def assert_same(traces: dict[int, Trace], reference: dict[int, Trace], num_tokens: int) -> None:
    for row, trace in traces.items():
        assert trace.tokens[:num_tokens] == reference[row].tokens[:num_tokens], f"tokens of prompt {row}"
        assert trace.bits[:num_tokens] == reference[row].bits[:num_tokens], f"log-probabilities of prompt {row}"
