"""The scheduler against a clock: what its choices cost, without a GPU and without a worker.

    python -m load_tests.scheduler_clock [--out FILE]

A scheduler is pure, so that a workload can be played through it, each step taking as long as a model says: linears by
measured points (one H200, Llama-3.1-8B in bfloat16), attention by the bytes and products of its rows, equal halves of
both in two pipeline stages. Requests are all there at the beginning. A result is known `RESULT_MS` after its step has
ended, and a step may begin `STEP_MS` after it was planned.

What is not in it: the host, the network, whatever else a GPU does. It tells policies apart, not servers.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from control_plane.core.request import CoreRequest, SamplingParams
from control_plane.core.scheduler import Scheduler
from control_plane.core.scheduler_config import SchedulerConfig
from control_plane.core.sequence import SequenceState
from control_plane.core.step_plan import StepOutcome, StepPlan
from load_tests.results import RESULTS_DIRECTORY, append_result, measurement_facts
from load_tests.workload import nano_lengths

Lengths = Sequence[tuple[int, int]]
# Linears of all layers: tokens of a step, milliseconds (NOTES, "Contexts of many lengths").
LINEAR_TOKENS = (1, 32, 64, 128, 256, 512, 8192)
LINEAR_MS = (3.75, 4.1, 4.2, 4.4, 5.6, 11.8, 188.4)
KV_BYTES_PER_TOKEN, KV_BYTES_PER_MS = 131_072, 3.75e9
PREFILL_OPERATIONS_PER_MS, ATTENTION_WIDTH = 450e9, 4096 * 32
CONTEXT_PER_PROMPT_TOKEN = 572  # what `policy.context_per_prompt_token` gives for this model
STEP_MS, RESULT_MS, HOP_MS = 0.55, 0.25, 0.02


@dataclass(frozen=True)
class Played:
    total_ms: float
    num_steps: int
    busy: float
    """Share of the time in which a stage computed, over all stages."""


def step_ms(plan: StepPlan) -> float:
    runs = list(zip(plan.start_positions, plan.num_run_tokens, strict=True))
    num_tokens = plan.num_tokens if plan.num_tokens <= 512 else -(-plan.num_tokens // 128) * 128
    linear = float(np.interp(num_tokens, LINEAR_TOKENS, LINEAR_MS))
    kv = sum(start + count for start, count in runs) * KV_BYTES_PER_TOKEN / KV_BYTES_PER_MS
    products = sum(4 * count * (start + count / 2) for start, count in runs if count > 1) * ATTENTION_WIDTH
    return linear + kv + products / PREFILL_OPERATIONS_PER_MS


def play(lengths: Lengths, num_stages: int, mixed_step_tokens: int) -> Played:
    """All of the requests (prompt tokens, output tokens), as fast as they go."""
    scheduler = Scheduler(
        SchedulerConfig(
            0, 40_000, 64, 256, 8192, enable_prefix_caching=False, mixed_step_tokens=mixed_step_tokens,
            context_per_prompt_token=CONTEXT_PER_PROMPT_TOKEN, num_stages=num_stages,
        )
    )  # fmt: skip
    for number, (prompt, output) in enumerate(lengths):
        prompt_ids = np.full(prompt, 5, dtype=np.uint32)
        scheduler.add_request(CoreRequest(str(number), prompt_ids, SamplingParams(), max_tokens=output), 0.0)
    free, busy_ms = [0.0] * num_stages, 0.0
    drawn_at: dict[SequenceState, float] = {}
    in_flight: deque[tuple[float, StepPlan]] = deque()
    now, num_steps = 0.0, 0
    while True:
        while len(in_flight) < num_stages + 1 and (plan := scheduler.plan(now)) is not None:
            num_steps += 1
            of_stage = step_ms(plan) / num_stages
            # A row's newest token must be there; it comes from the last stage.
            ended = max([now + STEP_MS, *(drawn_at.get(sequence, 0.0) for sequence in plan.sequences)])
            for stage in range(num_stages):
                ended = free[stage] = max(ended + (HOP_MS if stage else 0.0), free[stage]) + of_stage
                busy_ms += of_stage
            drawn_at.update((sequence, ended + HOP_MS) for sequence in plan.drawing)
            in_flight.append((ended, plan))
        if not in_flight:
            return Played(now, num_steps, busy_ms / num_stages / now)
        ended, plan = in_flight.popleft()
        now = max(now, ended + RESULT_MS)
        scheduler.apply(StepOutcome(plan.step_id, list(plan.drawing_rows), [7] * len(plan.drawing_rows)))


WORKLOADS: dict[str, Lengths] = {"nano": nano_lengths(), "256 of 1,024 and 129": [(1024, 129)] * 256}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m load_tests.scheduler_clock", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS_DIRECTORY / "scheduler_clock.jsonl")
    args = parser.parse_args(argv)
    facts = measurement_facts("load_tests.scheduler_clock", argv)
    for name, lengths in WORKLOADS.items():
        for num_stages, mixed_step_tokens in ((1, 512), (2, 512), (2, 8192)):
            played = play(lengths, num_stages, mixed_step_tokens)
            row: dict[str, Any] = {
                "workload": name,
                "stages": num_stages,
                "mixed_step_tokens": mixed_step_tokens,
                "seconds": round(played.total_ms / 1e3, 3),
                "tokens_per_second": round(sum(output for _, output in lengths) / played.total_ms * 1e3),
                "busy": round(played.busy, 3),
                "steps": played.num_steps,
            }
            print(row, flush=True)
            append_result(args.out, {**facts, **row})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
