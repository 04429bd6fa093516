"""`python -m load_tests.cpu_worker.roads`: the CPU runner's own ways of computing one step, taking turns.

bfloat16 in compiled kernels, bfloat16 in torch, float32 in torch: milliseconds of prompts of several lengths, and of a
step in which every row runs one token. No other process takes part.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from gpu_worker.config import WorkerSettings
from gpu_worker.runner import TorchRunner
from load_tests.cpu_worker.__main__ import default_model, random_prompts
from load_tests.cpu_worker.contestants import run_prompts
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from load_tests.results import RESULTS_DIRECTORY, append_result, measurement_facts

MODULE = "load_tests.cpu_worker.roads"
RESULTS = RESULTS_DIRECTORY / "cpu_roads.jsonl"
ROADS = {
    "bfloat16, compiled": {"dtype": "bfloat16", "cpu_kernels": "on"},
    "bfloat16, torch": {"dtype": "bfloat16", "cpu_kernels": "off"},
    "float32, torch": {"dtype": "float32", "cpu_kernels": "off"},
}
_DECODE_STEPS = 12
# The threads of the road before spin a while after its last operation.
_REST_S = 0.5


@dataclass(frozen=True)
class Work:
    name: str
    num_rows: int
    prompt_tokens: int
    measures_decode: bool = False


WORKS = (
    Work("prompt of 16", 1, 16),
    Work("prompt of 64", 1, 64),
    Work("prompt of 256", 1, 256),
    Work("prompt of 1,024", 1, 1024),
    Work("16 prompts of 64", 16, 64),
    Work("1 row after 64", 1, 64, measures_decode=True),
    Work("1 row after 1,024", 1, 1024, measures_decode=True),
    Work("4 rows after 64", 4, 64, measures_decode=True),
    Work("16 rows after 64", 16, 64, measures_decode=True),
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory (default: SmolLM2-135M-Instruct, prepared once)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="turns of every road; medians are shown")
    parser.add_argument("--note", default="", help="said in the recorded line")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args(argv)
    facts = measurement_facts(MODULE, argv)
    model = args.model or default_model()
    runners = {name: _load(model, args.threads, settings) for name, settings in ROADS.items()}
    times: dict[str, dict[str, list[float]]] = {work.name: {name: [] for name in ROADS} for work in WORKS}
    for turn in range(-1, args.repeats):
        for work in WORKS:
            for name in ROADS if turn % 2 == 0 else reversed(ROADS):
                time.sleep(_REST_S)
                milliseconds = _measure(runners[name], work, turn)
                if turn >= 0:  # the first turn is for caches
                    times[work.name][name].append(round(milliseconds, 2))
    result = {"num_threads": args.threads, "repeats": args.repeats, "note": args.note, "ms_turns": times}
    result["ms"] = {work: {name: median(turns) for name, turns in of.items()} for work, of in times.items()}
    _print(result)
    if not args.no_record:
        append_result(RESULTS, facts | result | {"model": model.name})
    return 0


def _load(model: Path, num_threads: int, changes: dict[str, Any]) -> TorchRunner:
    return TorchRunner.load(
        WorkerSettings(
            model=model, device="cpu", num_threads=num_threads, max_model_len=2048, cpu_kv_cache_gib=0.5, **changes
        )
    )


def _measure(runner: TorchRunner, work: Work, turn: int) -> float:
    """Milliseconds: of all prompts together, or of one later step (the median of some)."""
    driver = StepDriver(runner)
    for row, prompt in enumerate(random_prompts(work.num_rows, work.prompt_tokens, turn)):
        driver.add(row, prompt, greedy())
    prompts_ms = _clocked(lambda: run_prompts(driver))
    if not work.measures_decode:
        return prompts_ms
    return median(_clocked(lambda: driver.step(dict.fromkeys(driver.rows, 1))) for _ in range(_DECODE_STEPS))


def _clocked(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return (time.perf_counter() - begun) * 1e3


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"milliseconds, {result['num_threads']} threads, median of {result['repeats']} turns")
    table.add_column("work")
    for name in ROADS:
        table.add_column(name, justify="right")
    for work, of in result["ms"].items():
        table.add_row(work, *(f"{of[name]:.1f}" for name in ROADS))
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
