"""What `--deterministic` costs: the same steps through two workers of one model, in turns, with and without it.

    python -m load_tests.deterministic_cost --model DIR [--device cpu] [--rows 1 16] [--prompt 256] [--output FILE]

The ratio of medians is the result: both sides meet the same machine. Alone each runs without a control plane, steps
one after another.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from gpu_worker.__main__ import load_runner
from gpu_worker.config import WorkerSettings
from gpu_worker.runner_api import Runner
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from load_tests.results import RESULTS_DIRECTORY, append_result, measurement_facts

CONTEXT_TOKENS = 128
WARM_STEPS = 3


def load(args: argparse.Namespace, *, deterministic: bool) -> Runner:
    settings: dict[str, Any] = {"cpu_kv_cache_gib": 0.5, "gpu_memory_utilization": 0.40}
    return load_runner(
        WorkerSettings(
            model=args.model,
            device=args.device,
            dtype=args.dtype,
            load_format=args.load_format,
            num_threads=args.num_threads,
            max_model_len=args.max_model_len,
            max_num_seqs=max(args.rows),
            deterministic=deterministic,
            **settings,
        )
    )


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, length)]


def timed_step(driver: StepDriver) -> float:
    begun = time.perf_counter()
    driver.step()
    return (time.perf_counter() - begun) * 1e3


def decode_ms(runners: Sequence[Runner], num_rows: int, num_steps: int) -> list[float]:
    """Median milliseconds of a decode step with each runner."""
    drivers = [StepDriver(runner) for runner in runners]
    for driver in drivers:
        for row in range(num_rows):
            driver.add(row, prompt(CONTEXT_TOKENS, driver.facts.vocab_size, row), greedy())
            driver.step({row: CONTEXT_TOKENS})
        for _ in range(WARM_STEPS):
            driver.step()
    times: list[list[float]] = [[] for _ in drivers]
    for _ in range(num_steps):
        for index, driver in enumerate(drivers):
            times[index].append(timed_step(driver))
    return [median(one) for one in times]


def prefill_ms(runners: Sequence[Runner], length: int, repeats: int) -> list[float]:
    """Median milliseconds of a prompt in one step."""
    drivers = [StepDriver(runner) for runner in runners]
    times: list[list[float]] = [[] for _ in drivers]
    for number in range(repeats + 1):
        for index, driver in enumerate(drivers):
            driver.add(0, prompt(length, driver.facts.vocab_size, number), greedy())
            times[index].append(timed_step(driver))
            driver.drop(0)
    return [median(one[1:]) for one in times]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m load_tests.deterministic_cost", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS_DIRECTORY / "deterministic.jsonl")
    args = parser.parse_args(argv)
    facts = measurement_facts("load_tests.deterministic_cost", argv)
    runners = [load(args, deterministic=deterministic) for deterministic in (False, True)]
    described = runners[0].describe()
    measured = [(f"decode b{rows}", decode_ms(runners, rows, args.steps)) for rows in args.rows]
    measured.append((f"prefill {args.prompt}", prefill_ms(runners, args.prompt, args.repeats)))
    print(f"{'work':<16}{'usual ms':>12}{'deterministic ms':>18}{'ratio':>8}")
    for work, (usual, deterministic) in measured:
        ratio = deterministic / usual
        print(f"{work:<16}{usual:>12.2f}{deterministic:>18.2f}{ratio:>8.2f}")
        result = {"model": described.model, "dtype": described.dtype, "device": described.devices[0], "work": work}
        result |= {"usual_ms": round(usual, 3), "deterministic_ms": round(deterministic, 3), "ratio": round(ratio, 3)}
        append_result(args.output, {**facts, "scenario": "deterministic_cost", **result})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
