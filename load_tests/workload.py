"""What is sent: prompts of random token ids with fixed output lengths, and when.

Ids are drawn afresh for every run and every phase, so that a server's prefix cache never answers a prompt by accident;
lengths follow the scenario's own seed, so that every run does the same amount of work.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The published script draws ids from 0 to this, and its lengths depend on those draws.
NANO_LARGEST_ID = 10_000
NANO_NUM_REQUESTS = 256
NANO_SHORTEST, NANO_LONGEST = 100, 1024


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request: `send_at_s` counts from the start of its phase."""

    prompt_ids: list[int]
    max_tokens: int
    send_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Phase:
    """Requests that are measured together; `max_concurrency` bounds how many of them are open at once."""

    name: str
    requests: list[RequestSpec]
    max_concurrency: int | None = None


class TokenIdSource:
    """Random token ids below `limit`; the same seed gives the same ids."""

    def __init__(self, seed: int, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"token ids are drawn below {limit}: the limit must be at least 1")
        self.limit = limit
        self._rng = np.random.default_rng(seed)

    def draw(self, num_tokens: int) -> list[int]:
        return self._rng.integers(0, self.limit, size=num_tokens).tolist()


def nano_lengths(seed: int = 0, num_requests: int = NANO_NUM_REQUESTS) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of the workload that small engines publish their numbers for.

    The lengths of that script (nano-vllm's bench.py) come from one generator that also draws the ids, so the draws
    are made in its order: seed 0 gives 142,827 prompt and 133,966 output tokens.
    """
    rng = random.Random(seed)
    prompt_lengths = []
    for _ in range(num_requests):
        num_tokens = rng.randint(NANO_SHORTEST, NANO_LONGEST)
        for _ in range(num_tokens):
            rng.randint(0, NANO_LARGEST_ID)
        prompt_lengths.append(num_tokens)
    output_lengths = [rng.randint(NANO_SHORTEST, NANO_LONGEST) for _ in range(num_requests)]
    return list(zip(prompt_lengths, output_lengths, strict=True))


def lengths_around(mean: int, range_ratio: float, num_requests: int, rng: np.random.Generator) -> list[int]:
    """Whole numbers uniform in mean * (1 -+ range_ratio), both ends included; never below 1."""
    if not 0 <= range_ratio < 1:
        raise ValueError(f"--range-ratio is {range_ratio}: it must be at least 0 and below 1")
    low = max(1, int(mean * (1 - range_ratio)))
    high = max(low, int(mean * (1 + range_ratio)))
    return rng.integers(low, high + 1, size=num_requests).tolist()


def arrival_times_s(
    num_requests: int, rate_per_s: float | None, burstiness: float, rng: np.random.Generator
) -> list[float]:
    """When each request is sent, in seconds from the start; all at once without a rate.

    Gaps are Gamma distributed with mean 1 / rate and shape `burstiness`: 1 is a Poisson process, less comes in bursts,
    more is steadier. The gaps are scaled so that the last request is sent at exactly num_requests / rate: short runs
    then have the rate that was asked for.
    """
    if rate_per_s is None:
        return [0.0] * num_requests
    if rate_per_s <= 0 or burstiness <= 0:
        raise ValueError(f"--rate is {rate_per_s} and --burstiness {burstiness}: both must be above 0")
    gaps_s = rng.gamma(burstiness, 1 / (rate_per_s * burstiness), size=num_requests)
    times_s = np.cumsum(gaps_s)
    if num_requests:
        times_s *= num_requests / rate_per_s / times_s[-1]
    return times_s.tolist()


def equal_requests(ids: TokenIdSource, num_requests: int, num_prompt_tokens: int, max_tokens: int) -> list[RequestSpec]:
    """Requests of one size, each with ids of its own."""
    return [RequestSpec(ids.draw(num_prompt_tokens), max_tokens) for _ in range(num_requests)]


def prefixed_requests(
    ids: TokenIdSource, prefixes: Sequence[list[int]], per_prefix: int, num_suffix_tokens: int, max_tokens: int
) -> list[RequestSpec]:
    """`per_prefix` requests that begin with each of the prefixes and end in ids of their own.

    Ordered as users arrive: one of each group, then the next of each group.
    """
    return [
        RequestSpec(prefix + ids.draw(num_suffix_tokens), max_tokens) for _ in range(per_prefix) for prefix in prefixes
    ]


def split(phase: Phase, num_parts: int) -> list[Phase]:
    """Deal a phase's requests out to `num_parts` senders; the concurrency is dealt out with them."""
    limits: list[int | None] = [None] * num_parts
    if phase.max_concurrency is not None:
        if phase.max_concurrency < num_parts:
            raise ValueError(
                f"--max-concurrency {phase.max_concurrency} cannot be shared by {num_parts} processes: "
                "use at most as many --processes"
            )
        limits = [
            phase.max_concurrency // num_parts + (part < phase.max_concurrency % num_parts) for part in range(num_parts)
        ]
    return [Phase(phase.name, phase.requests[part::num_parts], limits[part]) for part in range(num_parts)]
