"""Holds a group of ranks against one rank, on the same model: next-token numbers, greedy tokens, time of a decode step.

    python -m load_tests.gpu.compare_ranks MODEL_DIR [--tensor-parallel-size 2] [--pipeline-parallel-size 1]
        [--device cuda] [--dtype bfloat16] [--quantization fp8] [--load-format dummy] [--limit 0.1] [--at-once]
        [--prompt-scale 1]

Each side runs in a process of its own, one after the other; both `--at-once` take half the time, and times mean
nothing. What is compared does not drift: the log-probability that both give to the same tokens, one step after prompts
of many lengths, in chunks and whole. Exit code 1 where the largest difference is above the limit. With
`--load-format dummy` ranks draw weights of their own: only times compare.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gpu_worker.config import WorkerSettings
from gpu_worker.cuda.early_sums import EarlySums
from gpu_worker.device import resolve_device
from gpu_worker.parallel.group_runner import GroupRunner
from gpu_worker.runner import TorchRunner
from gpu_worker.runner_api import Runner
from load_tests.cpu_worker.step_driver import StepDriver, greedy, sampling

NUM_TOP = 8
PROMPT_LENGTHS = (1, 7, 33, 64, 120, 200, 31, 16)
NUM_GREEDY = 32
# More than `step_program.DEALT_ROWS`; few steps, because rows drift apart where ranks round in another way.
MANY_ROWS, NUM_OF_MANY = 40, 4
TIMED_ROWS = (1, 8)
TIMED_STEPS = 24
WARM_STEPS = 12
IN_FLIGHT_ROWS = 4
MAX_MODEL_LEN = 256


def run_side(settings: WorkerSettings, prompt_scale: int) -> dict[str, Any]:
    """What one layout computes, with prompts so many times as long as `PROMPT_LENGTHS`."""
    lengths = [prompt_scale * length for length in PROMPT_LENGTHS]
    with mock.patch.object(EarlySums, "begin", autospec=True, side_effect=EarlySums.begin) as begin:
        found = run_prompts(load(settings), lengths)
    return found | {"sums_begun_early": begin.call_count}


def run_prompts(runner: Runner, lengths: list[int]) -> dict[str, Any]:
    """As `run_side` says, and the runner is closed."""
    try:
        driver = StepDriver(runner)
        generator = torch.Generator().manual_seed(5)
        vocab_size = driver.facts.vocab_size
        for row, length in enumerate(lengths):
            driver.add(row, torch.randint(0, vocab_size, (length,), generator=generator).tolist(), greedy(NUM_TOP))
        driver.step({row: min(length, 24) for row, length in enumerate(lengths)})
        tops: dict[str, dict[str, float]] = {}
        # What is left of the long prompts, each beside a decode of the short ones.
        result = driver.step()
        assert result.top_token_ids is not None and result.top_logprobs is not None
        for row, ids, values in zip(result.rows, result.top_token_ids, result.top_logprobs, strict=True):
            if lengths[int(row)] > 24:
                tops[str(row)] = dict(zip(map(str, ids.tolist()), values.tolist(), strict=True))
        for _ in range(NUM_GREEDY):
            driver.step()
        tokens = [driver.rows[row].tokens[length:] for row, length in enumerate(lengths)]
        tokens += tokens_of_many(runner)
        times = {str(count): decode_ms(runner, count) for count in TIMED_ROWS}
        return {
            "devices": driver.facts.devices,
            "runner": type(runner.local if isinstance(runner, GroupRunner) else runner).__name__,
            "tops": tops,
            "tokens": tokens,
            "decode_ms": times,
            "in_flight_ms": in_flight_ms(runner),
        }
    finally:
        runner.close()


def tokens_of_many(runner: Runner) -> list[list[int]]:
    """Tokens of so many rows that ranks each draw for some of them, of all kinds of sampling."""
    driver = StepDriver(runner)
    kinds = (greedy(), sampling(seed=1), sampling(seed=2, top_p=0.8), sampling(seed=3, top_k=9), greedy(NUM_TOP))
    lengths = [3 + row % 5 for row in range(MANY_ROWS)]
    for row, length in enumerate(lengths):
        driver.add(row, range(5 + row, 5 + row + length), kinds[row % len(kinds)])
    for _ in range(NUM_OF_MANY):
        driver.step()
    return [driver.rows[row].tokens[length:] for row, length in enumerate(lengths)]


def decode_ms(runner: Runner, num_rows: int) -> float:
    """Median of a decode step, one after the other: the host's part is in it."""
    driver = StepDriver(runner)
    for row in range(num_rows):
        driver.add(row, list(range(1, 17)), greedy())
    times = []
    for _ in range(TIMED_STEPS):
        begun = time.perf_counter()
        driver.step()
        times.append((time.perf_counter() - begun) * 1e3)
    return sorted(times[TIMED_STEPS // 2 :])[TIMED_STEPS // 4]


def in_flight_ms(runner: Runner) -> float:
    """Mean of a decode step with one more in flight than there are stages, each with rows of its own."""
    driver = StepDriver(runner)
    sets = [
        range(first, first + IN_FLIGHT_ROWS)
        for first in range(0, (driver.facts.num_stages + 1) * IN_FLIGHT_ROWS, IN_FLIGHT_ROWS)
    ]
    for rows in sets:
        for row in rows:
            driver.add(row, list(range(1, 17)), greedy())
        driver.step({row: 16 for row in rows})
    pending = [driver.begin({row: 1 for row in rows}) for rows in sets]
    for number in range(WARM_STEPS + TIMED_STEPS):
        if number == WARM_STEPS:
            begun = time.perf_counter()
        turn = number % len(sets)
        driver.finish(pending[turn])
        pending[turn] = driver.begin({row: 1 for row in sets[turn]})
    taken = time.perf_counter() - begun
    for each in (*pending[turn + 1 :], *pending[: turn + 1]):
        driver.finish(each)
    return taken * 1e3 / TIMED_STEPS


def load(settings: WorkerSettings) -> Runner:
    if settings.num_ranks > 1:
        from gpu_worker.parallel.leader import load_group_runner

        return load_group_runner(settings)
    device = resolve_device(settings.device)
    if device.type == "cuda":
        from gpu_worker.cuda.loading import load_cuda_runner

        return load_cuda_runner(settings, device)
    return TorchRunner.load(settings)


def compare(one: dict[str, Any], many: dict[str, Any]) -> dict[str, Any]:
    differences = [
        abs(value - many["tops"][row][token])
        for row, tops in one["tops"].items()
        for token, value in tops.items()
        if token in many["tops"][row]
    ]
    pairs = [
        ours == theirs
        for mine, other in zip(one["tokens"], many["tokens"], strict=True)
        for ours, theirs in zip(mine, other, strict=True)
    ]
    return {
        "devices": many["devices"],
        "num_compared": len(differences),
        "max_logprob_difference": max(differences, default=float("inf")),
        "equal_tokens": sum(pairs) / len(pairs),
        "runner": many["runner"],
        "sums_begun_early": many["sums_begun_early"],
        "decode_ms_one_rank": one["decode_ms"],
        "decode_ms_group": many["decode_ms"],
        "in_flight_ms_one_rank": one["in_flight_ms"],
        "in_flight_ms_group": many["in_flight_ms"],
    }


def _run_side(argv: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "load_tests.gpu.compare_ranks", *argv, "--side"]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    side: dict[str, Any] = json.loads(output.splitlines()[-1])
    return side


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--limit", type=float, default=0.1)
    parser.add_argument(
        "--prompt-scale", type=int, default=1, help="with 10 a step has more tokens than any that has a graph"
    )
    parser.add_argument("--at-once", action="store_true", help="run both layouts at the same time")
    parser.add_argument("--side", action="store_true", help="run one layout and print what it computes")
    arguments = parser.parse_args(argv)
    if arguments.side:
        others = ("limit", "side", "at_once", "prompt_scale")
        fields = {name: value for name, value in vars(arguments).items() if name not in others}
        if arguments.at_once:
            fields["gpu_memory_utilization"] = 0.3
        fields["max_model_len"] = MAX_MODEL_LEN * -(-max(PROMPT_LENGTHS) * arguments.prompt_scale // MAX_MODEL_LEN)
        settings = WorkerSettings(**fields, cpu_kv_cache_gib=0.05)
        print(json.dumps(run_side(settings, arguments.prompt_scale)))
        return 0
    one_rank = ["--tensor-parallel-size=1", "--pipeline-parallel-size=1"]
    with ThreadPoolExecutor(2 if arguments.at_once else 1) as threads:
        one, many = threads.map(_run_side, ([*argv, *one_rank], argv))
    report = compare(one, many)
    print(json.dumps(report, indent=2))
    return 0 if report["max_logprob_difference"] <= arguments.limit else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
