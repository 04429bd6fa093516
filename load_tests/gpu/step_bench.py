"""Times a CUDA runner's steps at two in flight, beside the floor, vLLM's figure and the goal.

    python -m load_tests.gpu.step_bench [--shape llama-3.1-8b ...] [--mixed 64:512 ...] [--unlike 72 ...] [--profile]

Random weights, random keys and values; contexts of 1,024 tokens, or with `--unlike` of 64 to about 2,000, as requests
have that began at different times: a step must not take as long as if all were as long as the longest. What is
measured is the worker alone: no control plane, no gRPC. The floor counts weights and KV read once at 4.27 TB/s, and
matrix products at 797 TFLOP/s, which an H200 reached; `card_floor` is the same at the rates of this card, measured
before.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from gpu_worker.config import WorkerSettings
from gpu_worker.cuda.loading import load_cuda_runner
from gpu_worker.cuda.ops import TritonOps
from gpu_worker.cuda.runner import CudaRunner
from load_tests.cpu_worker.step_driver import sampling
from load_tests.gpu.pipeline import Pipeline
from load_tests.kernels.cases import unlike_lengths
from load_tests.kernels.measure import Ceilings, measure_ceilings
from load_tests.results import RESULTS_DIRECTORY, append_result, measurement_facts
from load_tests.stack import SHAPES_DIRECTORY

CONTEXT = 1024
DECODE_STEPS = 48
WARM_STEPS = 12


@dataclass(frozen=True)
class Anchor:
    """What a row is compared with; vLLM 0.26.0 measured on one H200. None: not known."""

    floor: float
    vllm: float | None
    goal: float | None


ANCHORS: dict[tuple[str, str], Anchor] = {
    ("llama-3.1-8b", "decode b1 ms"): Anchor(3.52, 4.99, 4.0),
    ("llama-3.1-8b", "decode b32 ms"): Anchor(4.49, 6.24, 5.2),
    ("llama-3.1-8b", "decode b128 ms"): Anchor(7.49, 11.05, 9.0),
    ("llama-3.1-8b", "decode b256 ms"): Anchor(12.85, 18.27, 15.0),
    ("llama-3.1-8b", "prefill 1x1024 ms"): Anchor(20.0, 34.1, 25.0),
    ("llama-3.1-8b", "prefill 8x8192 tok/s"): Anchor(47000, 38757, 41000),
    ("llama-3.2-1b", "decode b1 ms"): Anchor(0.58, 1.43, 0.75),
    ("llama-3.2-1b", "decode b32 ms"): Anchor(0.82, 1.81, 1.1),
    ("qwen3-0.6b", "decode b1 ms"): Anchor(0.30, 1.67, 0.60),
    ("qwen3-0.6b", "decode b32 ms"): Anchor(1.15, 2.70, 1.6),
    ("qwen3-0.6b", "decode b256 ms"): Anchor(7.38, 10.59, 8.7),
    ("qwen3-30b-a3b", "decode b1 ms"): Anchor(1.44, 4.20, 2.0),
    ("qwen3-30b-a3b", "decode b32 ms"): Anchor(13.1, 16.2, 14.5),
    ("qwen3-30b-a3b", "decode b256 ms"): Anchor(20.1, 26.9, 23.0),
    ("llama-3.1-8b fp8", "decode b1 ms"): Anchor(1.9, 3.52, 2.4),
    ("llama-3.1-8b fp8", "decode b32 ms"): Anchor(2.9, 5.36, 3.8),
    ("llama-3.1-8b fp8", "decode b256 ms"): Anchor(10.5, 15.98, 13.0),
    ("llama-3.1-8b fp8", "prefill 8x8192 tok/s"): Anchor(0.0, 56143, 60000),
}


# The H200's, of the same hour as the anchors.
ANCHOR_CEILINGS = Ceilings(read_gb_s=4270, copy_gb_s=4290, bf16_tflop_s=797)


def card_floor(floor: float, work: str, ceilings: Ceilings) -> float:
    """The floor of a card with these ceilings: decodes wait for memory, prompts for products."""
    if work.startswith("decode"):
        return floor * ANCHOR_CEILINGS.read_gb_s / ceilings.read_gb_s
    faster = ceilings.bf16_tflop_s / ANCHOR_CEILINGS.bf16_tflop_s
    return floor * faster if work.endswith("tok/s") else floor / faster


@dataclass(frozen=True)
class Row:
    shape: str
    name: str
    value: float
    details: dict[str, float]


def load(shape: str, max_model_len: int, extra: dict[str, Any]) -> tuple[CudaRunner, float]:
    """The runner, and the seconds from nothing to ready."""
    settings = WorkerSettings(
        model=SHAPES_DIRECTORY / shape,
        device="cuda",
        load_format="dummy",
        max_model_len=max_model_len,
        **extra,
    )
    begun = time.perf_counter()
    runner = load_cuda_runner(settings, torch.device("cuda", 0))
    if not isinstance(runner, CudaRunner):
        raise RuntimeError(f"{shape} runs in plain torch: there is nothing to measure")
    return runner, time.perf_counter() - begun


def fill_cache(runner: CudaRunner, num_blocks: int) -> None:
    """Random keys and values in the first blocks: on zeros the card runs faster than on data."""
    for cache in runner.kv_caches():
        part = cache[: min(num_blocks, cache.shape[0])]
        part.copy_(torch.randn(part.shape, device=part.device, dtype=torch.bfloat16))


def occupy(pipeline: Pipeline, contexts: Sequence[int]) -> None:
    """A row for each context, which is whole blocks."""
    rng = np.random.default_rng(len(contexts))
    for row, context in enumerate(contexts):
        tokens = rng.integers(0, pipeline.facts.vocab_size, context + 1).tolist()
        pipeline.add(row, tokens, sampling(temperature=0.6, seed=row), num_computed=context)


def whole_blocks(lengths: Sequence[int], block_size: int) -> list[int]:
    return [max(1, length // block_size) * block_size for length in lengths]


class MixedLoad:
    """Steps of decodes at these contexts and `num_tokens` (0 is none) of one prompt after another."""

    def __init__(self, runner: CudaRunner, contexts: Sequence[int], num_tokens: int) -> None:
        self.pipeline = Pipeline(runner)
        self._num_rows, self._num_tokens = len(contexts), num_tokens
        self._left = 0
        self._rng = np.random.default_rng(num_tokens)
        occupy(self.pipeline, contexts)

    def launch(self) -> None:
        runs = dict.fromkeys(range(self._num_rows), 1)
        free = self._num_tokens
        row = self._num_rows
        if free and self._left == 0:
            if self.pipeline.holds(row):
                self.pipeline.drop(row)
            # Whole parts: every step holds as many tokens.
            self._left = -(-CONTEXT // free) * free
            tokens = self._rng.integers(0, self.pipeline.facts.vocab_size, self._left).tolist()
            self.pipeline.add(row, tokens, sampling(temperature=0.6, seed=row))
        if free:
            runs[row] = free
            self._left -= free
        self.pipeline.launch(runs, samples=True, silent_row=row if self._left else None)


def measure_steps(
    runner: CudaRunner, shape: str, num_rows: int, num_tokens: int = 0, *, is_unlike: bool = False
) -> Row:
    lengths = unlike_lengths(num_rows) if is_unlike else [CONTEXT] * num_rows
    load = MixedLoad(runner, whole_blocks(lengths, runner.describe().block_size), num_tokens)
    for _ in range(WARM_STEPS + DECODE_STEPS):
        load.launch()
    pipeline = load.pipeline
    pipeline.finish()
    times = [pending.times() for pending in pipeline.pending[WARM_STEPS:]]  # type: ignore[attr-defined]
    wall_ms = (pipeline.finished_s[-1] - pipeline.finished_s[WARM_STEPS - 1]) / DECODE_STEPS * 1e3
    name = f"mixed d{num_rows} p{num_tokens} ms" if num_tokens else f"decode b{num_rows} ms"
    return Row(
        shape,
        f"{name[:-3]} unlike ms" if is_unlike else name,
        wall_ms,
        {
            "device_ms": median(t.forward_ns + t.sample_ns for t in times) / 1e6,
            "idle_us": median(t.idle_ns for t in times) / 1e3,
            "execute_ms": median(pipeline.execute_s[WARM_STEPS:]) * 1e3,
        },
    )


def measure_prefill(runner: CudaRunner, shape: str, num_prompts: int, length: int) -> Row:
    """One prompt: milliseconds from the step to its token. Several: prompt tokens per second, two steps in flight."""
    vocab_size, budget = runner.describe().vocab_size, runner.describe().max_num_batched_tokens
    rng = np.random.default_rng(length)
    samples: list[float] = []
    execute_ms: list[float] = []
    for number in range(5 if num_prompts == 1 else 2):
        pipeline = Pipeline(runner)
        for row in range(num_prompts):
            pipeline.add(row, rng.integers(0, vocab_size, length).tolist(), sampling(temperature=0.6, seed=number))
        begun = time.perf_counter()
        for row in range(num_prompts):
            for start in range(0, length, budget):
                chunk = min(budget, length - start)
                pipeline.launch({row: chunk}, samples=start + chunk == length)
        pipeline.finish()
        samples.append(time.perf_counter() - begun)
        execute_ms.append(median(pipeline.execute_s) * 1e3)
    details = {"execute_ms": execute_ms[-1]}
    if num_prompts == 1:
        return Row(shape, f"prefill 1x{length} ms", median(samples[1:]) * 1e3, details)
    return Row(shape, f"prefill {num_prompts}x{length} tok/s", num_prompts * length / samples[-1], details)


def profile_steps(runner: CudaRunner, num_rows: int, num_tokens: int = 0) -> list[tuple[str, float, int]]:
    """(kernel, microseconds a step, launches a step), the longest first."""
    from torch.profiler import ProfilerActivity, profile

    load = MixedLoad(runner, [CONTEXT] * num_rows, num_tokens)
    for _ in range(6):
        load.launch()
    load.pipeline.finish()
    num_steps = 4
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(num_steps):
            load.launch()
        load.pipeline.finish()
        torch.cuda.synchronize()
    kernels = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return [(event.key[:60], event.self_device_time_total / num_steps, event.count // num_steps) for event in kernels]


def print_table(rows: Sequence[Row]) -> None:
    print(f"{'shape':<18}{'work':<22}{'ours':>10}{'floor':>9}{'vLLM':>9}{'goal':>9}  {'':4} details")
    for row in rows:
        anchor = ANCHORS.get((row.shape, row.name), Anchor(0.0, None, None))
        compared = "".join(f"{value:>9g}" if value else " " * 9 for value in (anchor.floor, anchor.vllm, anchor.goal))
        details = " ".join(f"{name}={value:.4g}" for name, value in row.details.items())
        print(f"{row.shape:<18}{row.name:<22}{row.value:>10.4g}{compared}  {_met(row, anchor):<4} {details}")


def _met(row: Row, anchor: Anchor) -> str:
    if anchor.goal is None:
        return ""
    is_met = row.value >= anchor.goal if row.name.endswith("tok/s") else row.value <= anchor.goal
    return "yes" if is_met else "no"


def measure_shape(shape: str, args: argparse.Namespace) -> list[Row]:
    extra: dict[str, Any] = {
        "kv_cache_dtype": args.kv_cache_dtype,
        "enforce_eager": args.enforce_eager,
        "quantization": args.quantization,
    }
    runner, ready_s = load(shape, 9216, extra)
    if args.quantization != "auto":
        shape = f"{shape} {args.quantization}"
    rows = [Row(shape, "load s", ready_s, {})]
    begun = time.perf_counter()
    num_captures = 0
    while runner.idle():
        num_captures += 1
    captures_s = time.perf_counter() - begun
    free_gib = torch.cuda.mem_get_info()[0] / 2**30
    rows.append(Row(shape, "captures s", captures_s, {"graphs": num_captures, "free_gib": free_gib}))
    # The longest of unlike contexts are about twice as long as the others.
    num_blocks = 2 * CONTEXT // runner.describe().block_size + 2
    fill_cache(runner, max(*args.batch_sizes, *args.unlike) * num_blocks + 2)
    for num_rows in args.batch_sizes:
        rows.append(measure_steps(runner, shape, num_rows))
    for num_rows in args.unlike:
        rows.append(measure_steps(runner, shape, num_rows, is_unlike=True))
    for num_rows, num_tokens in args.mixed:
        rows.append(measure_steps(runner, shape, num_rows, num_tokens))
    if not args.no_prefill:
        rows.append(measure_prefill(runner, shape, 1, 1024))
        rows.append(measure_prefill(runner, shape, 8, 8192))
    if args.profile:
        for num_rows, num_tokens in [*((size, 0) for size in sorted({1, 32, max(args.batch_sizes)})), *args.mixed]:
            print(f"--- {shape} {num_rows} decodes, {num_tokens} prompt tokens: microseconds a step, by kernel")
            for name, us, count in profile_steps(runner, num_rows, num_tokens)[:14]:
                print(f"{us:10.1f} {count:5d} {name}")
    runner.close()
    return rows


def mixed_sizes(text: str) -> tuple[int, int]:
    num_rows, num_tokens = text.split(":")
    return int(num_rows), int(num_tokens)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m load_tests.gpu.step_bench", description=__doc__)
    parser.add_argument("--shape", action="append", choices=sorted(path.name for path in SHAPES_DIRECTORY.iterdir()))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument(
        "--mixed", type=mixed_sizes, nargs="+", default=[], help="D:P, decodes and prompt tokens of a step"
    )
    parser.add_argument("--unlike", type=int, nargs="+", default=[72, 192], help="sizes with contexts of many lengths")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--quantization", default="auto", help="of the weights: fp8 or int8")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print each kernel's share for b1 and the largest batch")
    parser.add_argument("--separate", action="store_true", help="norms and gates in launches of their own")
    parser.add_argument("--output", type=Path, default=RESULTS_DIRECTORY / "gpu_steps.jsonl")
    args = parser.parse_args(argv)
    TritonOps.fuses = not args.separate
    facts = measurement_facts("load_tests.gpu.step_bench", argv)
    ceilings = measure_ceilings()
    facts |= {"read_gb_s": round(ceilings.read_gb_s), "bf16_tflop_s": round(ceilings.bf16_tflop_s)}
    print(f"read {ceilings.read_gb_s:.0f} GB/s, bf16 {ceilings.bf16_tflop_s:.0f} TFLOP/s", flush=True)
    torch.cuda.empty_cache()
    rows: list[Row] = []
    for shape in args.shape or ["llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b"]:
        rows += measure_shape(shape, args)
        gc.collect()  # a runner's parts know each other: without it the next one finds no memory
        torch.cuda.empty_cache()
    for row in rows:
        anchor = ANCHORS.get((row.shape, row.name))
        result = {"shape": row.shape, "work": row.name, "value": row.value, **row.details}
        if anchor is not None:
            result |= {"floor": anchor.floor, "vllm": anchor.vllm, "goal": anchor.goal}
            result["card_floor"] = round(card_floor(anchor.floor, row.name, ceilings), 4)
        append_result(args.output, {**facts, **result})
    print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
