"""The scenarios: which phases each one runs, and the numbers that it is known for."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np

from load_tests.driver import PhaseResult
from load_tests.records import RequestRecord
from load_tests.workload import (
    Phase,
    RequestSpec,
    TokenIdSource,
    arrival_times_s,
    equal_requests,
    lengths_around,
    nano_lengths,
    prefixed_requests,
)

Headline = dict[str, float | list[float] | None]
RunPhase = Callable[[Phase], Awaitable[PhaseResult]]


class Scenario(Protocol):
    """`run` returns the headline: the few numbers that the scenario exists for."""

    @property
    def help(self) -> str: ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def longest_sequence(self, args: argparse.Namespace) -> int:
        """Prompt and output together: what the server's context must hold."""
        ...

    async def run(self, args: argparse.Namespace, ids: TokenIdSource, run_phase: RunPhase) -> Headline: ...


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def at_least_two(text: str) -> int:
    """Runs that a number is made of: of one alone nobody can say how far it is from another."""
    if (value := positive_int(text)) < 2:
        raise argparse.ArgumentTypeError("must be at least 2: one run says nothing of how far runs are apart")
    return value


@dataclass(frozen=True)
class Nano:
    help: str = (
        "256 sequences, prompt and output lengths uniform in 100-1,024 (seed 0: 142,827 in, 133,966 out), all at once"
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--num-requests", type=positive_int, default=256, help="sequences (default: %(default)s)")
        parser.add_argument("--length-seed", type=int, default=0, help="seed of the lengths (default: %(default)s)")

    def longest_sequence(self, args: argparse.Namespace) -> int:
        return max(map(sum, nano_lengths(args.length_seed, args.num_requests)))

    async def run(self, args: argparse.Namespace, ids: TokenIdSource, run_phase: RunPhase) -> Headline:
        lengths = nano_lengths(args.length_seed, args.num_requests)
        requests = [RequestSpec(ids.draw(num_prompt), num_output) for num_prompt, num_output in lengths]
        await run_phase(Phase("warm-up", equal_requests(ids, 1, 16, 8)))
        result = await run_phase(Phase("nano", requests))
        return {"output_tokens_per_s": _output_rate(result.records)}


@dataclass(frozen=True)
class Decode:
    help: str = "N prompts of 1,024 tokens; time per further token from the difference between a short and a long run"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--batch-size", type=positive_int, default=1, help="sequences at once (default: %(default)s)"
        )
        parser.add_argument("--input-len", type=positive_int, default=1024, help="prompt tokens (default: %(default)s)")
        parser.add_argument(
            "--output-len", type=positive_int, help="tokens of the long run (default: 129; 257 with batch size 1)"
        )
        parser.add_argument("--repeats", type=at_least_two, default=3, help="pairs of runs (default: %(default)s)")

    def longest_sequence(self, args: argparse.Namespace) -> int:
        return args.input_len + self._output_len(args)

    def _output_len(self, args: argparse.Namespace) -> int:
        return args.output_len or (257 if args.batch_size == 1 else 129)

    async def run(self, args: argparse.Namespace, ids: TokenIdSource, run_phase: RunPhase) -> Headline:
        output_len = self._output_len(args)
        if output_len < 2:
            raise ValueError("--output-len must be at least 2: the short run makes 1 token")

        async def wall_s(name: str, max_tokens: int) -> float:
            requests = equal_requests(ids, args.batch_size, args.input_len, max_tokens)
            return _wall_s((await run_phase(Phase(name, requests))).records)

        # A whole pair that does not count: a GPU worker captures a shape's graph after its first two steps.
        await wall_s("warm-up", 1)
        await wall_s("warm-up", output_len)
        per_token_ms = []
        for _ in range(args.repeats):
            short_s = await wall_s("short", 1)
            per_token_ms.append((await wall_s("long", output_len) - short_s) / (output_len - 1) * 1e3)
        return {"ms_per_token": median(per_token_ms), "ms_per_token_of_each_repeat": per_token_ms}


@dataclass(frozen=True)
class Prefill:
    help: str = "TTFT of one prompt of L tokens, and prompt tokens/s of N of them at once"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--input-len", type=positive_int, default=1024, help="prompt tokens (default: %(default)s)")
        parser.add_argument("--batch-size", type=positive_int, default=8, help="prompts at once (default: %(default)s)")
        parser.add_argument("--repeats", type=at_least_two, default=5, help="runs of each (default: %(default)s)")

    def longest_sequence(self, args: argparse.Namespace) -> int:
        return args.input_len + 1

    async def run(self, args: argparse.Namespace, ids: TokenIdSource, run_phase: RunPhase) -> Headline:
        async def records(name: str, num_requests: int) -> Sequence[RequestRecord]:
            requests = equal_requests(ids, num_requests, args.input_len, 1)
            return (await run_phase(Phase(name, requests))).records

        await records("warm-up", 1)
        await records("warm-up", args.batch_size)
        ttft_ms, tokens_per_s = [], []
        for _ in range(args.repeats):
            ttft_ms.append(_wall_s(await records("one", 1)) * 1e3)
            tokens_per_s.append(args.batch_size * args.input_len / _wall_s(await records("batch", args.batch_size)))
        return {"ttft_ms": median(ttft_ms), "prompt_tokens_per_s": median(tokens_per_s)}


@dataclass(frozen=True)
class Random:
    help: str = "random prompts of about 1,024 tokens with about 128 to generate: open loop (--rate) or closed loop"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--num-requests", type=positive_int, default=1000, help="requests (default: %(default)s)")
        parser.add_argument("--input-len", type=positive_int, default=1024, help="prompt tokens (default: %(default)s)")
        parser.add_argument("--output-len", type=positive_int, default=128, help="new tokens (default: %(default)s)")
        parser.add_argument(
            "--range-ratio", type=float, default=0.0, help="lengths are uniform in LEN * (1 -+ this) (default: 0)"
        )
        parser.add_argument("--rate", type=float, help="requests per second, open loop (default: all at once)")
        parser.add_argument(
            "--burstiness",
            type=float,
            default=1.0,
            help="shape of the gaps between arrivals: 1 is Poisson, below it bursts, above it steadier (default: 1)",
        )
        parser.add_argument("--max-concurrency", type=positive_int, help="most requests open at once: a closed loop")
        parser.add_argument(
            "--length-seed", type=int, default=0, help="seed of lengths and arrival times (default: %(default)s)"
        )

    def longest_sequence(self, args: argparse.Namespace) -> int:
        return int((args.input_len + args.output_len) * (1 + args.range_ratio))

    async def run(self, args: argparse.Namespace, ids: TokenIdSource, run_phase: RunPhase) -> Headline:
        rng = np.random.default_rng(args.length_seed)
        count = args.num_requests
        inputs = lengths_around(args.input_len, args.range_ratio, count, rng)
        outputs = lengths_around(args.output_len, args.range_ratio, count, rng)
        times_s = arrival_times_s(count, args.rate, args.burstiness, rng)
        requests = [
            RequestSpec(ids.draw(num_prompt), num_output, at_s)
            for num_prompt, num_output, at_s in zip(inputs, outputs, times_s, strict=True)
        ]
        await run_phase(Phase("warm-up", equal_requests(ids, min(count, args.max_concurrency or 1), args.input_len, 4)))
        result = await run_phase(Phase("random", requests, args.max_concurrency))
        return {"output_tokens_per_s": _output_rate(result.records)}


@dataclass(frozen=True)
class SharedPrefix:
    help: str = "groups of requests that begin alike: without a common prefix, with one, and once more on a warm cache"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--num-groups", type=positive_int, default=8, help="different prefixes (default: %(default)s)"
        )
        parser.add_argument(
            "--per-group", type=positive_int, default=16, help="requests a prefix (default: %(default)s)"
        )
        parser.add_argument(
            "--prefix-len", type=positive_int, default=1024, help="shared tokens (default: %(default)s)"
        )
        parser.add_argument(
            "--suffix-len", type=positive_int, default=128, help="tokens of a request's own (default: %(default)s)"
        )
        parser.add_argument("--output-len", type=positive_int, default=64, help="new tokens (default: %(default)s)")
        parser.add_argument("--max-concurrency", type=positive_int, default=32, help="open at once (default: 32)")

    def longest_sequence(self, args: argparse.Namespace) -> int:
        return args.prefix_len + args.suffix_len + args.output_len

    async def run(self, args: argparse.Namespace, ids: TokenIdSource, run_phase: RunPhase) -> Headline:
        count = args.num_groups * args.per_group
        apart = equal_requests(ids, count, args.prefix_len + args.suffix_len, args.output_len)
        prefixes = [ids.draw(args.prefix_len) for _ in range(args.num_groups)]

        def together() -> list[RequestSpec]:
            return prefixed_requests(ids, prefixes, args.per_group, args.suffix_len, args.output_len)

        await run_phase(Phase("warm-up", equal_requests(ids, 1, args.prefix_len, 4)))
        headline: Headline = {}
        for name, requests in (("apart", apart), ("shared", together()), ("warm", together())):
            records = (await run_phase(Phase(name, requests, args.max_concurrency))).records
            good = [record for record in records if record.is_ok]
            headline[f"{name}_ttft_p50_ms"] = median(record.ttft_s for record in good) * 1e3 if good else None
            headline[f"{name}_output_tokens_per_s"] = _output_rate(records)
            headline[f"{name}_hit_rate"] = _hit_rate(good)
        return headline


SCENARIOS: dict[str, Scenario] = {
    "nano": Nano(),
    "decode": Decode(),
    "prefill": Prefill(),
    "random": Random(),
    "shared-prefix": SharedPrefix(),
}


class PhaseFailed(Exception):
    """A scenario's number would be wrong, because requests that it is made of failed."""


def _wall_s(records: Sequence[RequestRecord]) -> float:
    """From the first request sent to the last token. Every request counts: one that failed makes no number."""
    failed = [record.error or "ended without a token" for record in records if not record.is_ok]
    if failed:
        raise PhaseFailed(f"{len(failed)} of {len(records)} requests failed, the first with: {failed[0]}")
    return max(record.arrivals_s[-1] for record in records) - min(record.sent_s for record in records)


def _output_rate(records: Sequence[RequestRecord]) -> float | None:
    good = [record for record in records if record.is_ok]
    if not good:
        return None
    wall_s = max(record.arrivals_s[-1] for record in good) - min(record.sent_s for record in records)
    return sum(record.num_tokens for record in good) / wall_s


def _hit_rate(records: Sequence[RequestRecord]) -> float | None:
    """Share of prompt tokens that came from the prefix cache; None where the server does not say."""
    known = [record for record in records if record.num_cached_tokens is not None]
    if not known:
        return None
    return sum(record.num_cached_tokens or 0 for record in known) / sum(record.num_prompt_tokens for record in known)


def scenario_parameters(args: argparse.Namespace, scenario: Scenario) -> dict[str, Any]:
    """The scenario's own flags and their values, for the record."""
    parser = argparse.ArgumentParser(add_help=False)
    scenario.add_arguments(parser)
    return {action.dest: getattr(args, action.dest) for action in parser._actions}
