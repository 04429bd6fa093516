"""`python -m load_tests.groups`: what several worker groups cost one control plane, and what they bring.

Real processes, one Session stream with token ids. `cpu` takes the CPU time of the control plane per step with 1, 2, 4
and 8 simulated groups whose rows all decode; its wall time says little on a machine that has fewer cores than the case
has processes. `scaling` sends the same requests per group to one group and to two, in turns, and compares output tokens
per second; steps take long enough that the workers wait for their own clocks and for nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import structlog
import uvloop
from rich.console import Console

from load_tests.control_plane import Rows, Window, fitted_line, quieter_half
from load_tests.grpc_target import GrpcTarget
from load_tests.records import RequestRecord
from load_tests.results import RESULTS_DIRECTORY, append_result, measurement_facts
from load_tests.scenarios import positive_int
from load_tests.stack import ControlPlaneStack, StackError
from load_tests.target import TargetError, TargetSpec
from load_tests.workload import RequestSpec, TokenIdSource

MODULE = "load_tests.groups"
SECTIONS = ("cpu", "scaling")
NUM_GROUPS = (1, 2, 4, 8)
_VOCAB_SIZE = 32_000
_PROMPT_LEN = 32
_OUTPUT_LEN = 64
_SCALING_GOAL = 1.95


def _flags(num_rows: int, step_ms: float, context: int) -> list[str]:
    num_blocks = num_rows * (-(-context // 16) + 2) + 1
    return [
        f"--sim-step-ms={step_ms}",
        f"--sim-max-num-seqs={num_rows}",
        f"--sim-num-blocks={num_blocks}",
        "--sim-block-size=16",
        f"--sim-max-model-len={context}",
        f"--sim-vocab-size={_VOCAB_SIZE}",
        "--sim-max-num-batched-tokens=8192",
    ]


def measure_cpu(args: argparse.Namespace) -> dict[str, Any]:
    """Cases in turn, each in a stack of its own: eight idle workers would still take of the others' time."""
    windows: dict[int, list[Window]] = {num_groups: [] for num_groups in NUM_GROUPS}
    context = 64 + int(2 * (args.window_s + 6) * 1e3 / args.step_ms)

    async def measure(num_groups: int) -> None:
        with ControlPlaneStack(_flags(args.rows, args.step_ms, context), num_groups=num_groups) as stack:
            async with Rows(stack, num_groups * args.rows, context - 64) as rows:
                windows[num_groups].append(await rows.window(args.window_s))

    for _ in range(args.repeats):
        for num_groups in NUM_GROUPS:
            uvloop.run(measure(num_groups))
    cases = []
    for num_groups, measured in windows.items():
        quiet = quieter_half(measured)
        cases.append(
            {
                "num_groups": num_groups,
                "rows_per_group": args.rows,
                "step_ms": args.step_ms,
                "control_plane_cpu_ms_per_step": quiet["control_plane_cpu_ms"],
                "steps_per_s": float(f"{median(window.num_steps / window.wall_s for window in measured):.4g}"),
                "control_plane_cores": float(
                    f"{median(window.control_plane.total_s / window.wall_s for window in measured):.4g}"
                ),
                "others_cores": quiet["others_cores"],
            }
        )
    points = [(case["num_groups"], case["control_plane_cpu_ms_per_step"]) for case in cases]
    return {"cases": cases, "control_plane_cpu_ms_per_step_by_groups": fitted_line(points)}


def measure_scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Output tokens per second of two groups over one group's: medians of turns."""
    context = 256
    rates: dict[int, list[float]] = {1: [], 2: []}

    async def measure(num_groups: int) -> None:
        with ControlPlaneStack(_flags(args.rows, args.scaling_step_ms, context), num_groups=num_groups) as stack:
            rates[num_groups].append(await _output_rate(stack, num_groups * args.rows * args.waves))

    for _ in range(args.repeats):
        for num_groups in rates:
            uvloop.run(measure(num_groups))
    one, two = (median(rates[num_groups]) for num_groups in (1, 2))
    return {
        "rows_per_group": args.rows,
        "requests_per_group": args.rows * args.waves,
        "prompt_tokens": _PROMPT_LEN,
        "output_tokens": _OUTPUT_LEN,
        "step_ms": args.scaling_step_ms,
        "output_tokens_per_s": {str(n): [float(f"{rate:.5g}") for rate in values] for n, values in rates.items()},
        "ratio": float(f"{two / one:.4g}"),
        "goal_ratio": _SCALING_GOAL,
    }


async def _output_rate(stack: ControlPlaneStack, num_requests: int) -> float:
    """All requests at once, each with a prompt of its own; tokens over the time until the last one has ended."""
    ids = TokenIdSource(time.time_ns() % 2**32, _VOCAB_SIZE)
    target = GrpcTarget(TargetSpec("grpc", stack.grpc_address))
    await target.__aenter__()
    try:
        requests = [target.encode(RequestSpec(ids.draw(_PROMPT_LEN), _OUTPUT_LEN)) for _ in range(num_requests)]
        records = [RequestRecord() for _ in requests]
        started_s = time.monotonic()
        await asyncio.gather(*(target.send(request, record) for request, record in zip(requests, records, strict=True)))
        wall_s = time.monotonic() - started_s
    finally:
        await target.__aexit__()
    errors = [record.error for record in records if record.error]
    if errors:
        raise TargetError(f"{len(errors)} of {num_requests} requests failed, the first with: {errors[0]}")
    return sum(record.num_tokens for record in records) / wall_s


_MEASURE: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"cpu": measure_cpu, "scaling": measure_scaling}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"what to measure, of {', '.join(SECTIONS)} (default: all)"
    )
    parser.add_argument("--repeats", type=positive_int, default=3, help="turns of every case (default: %(default)s)")
    parser.add_argument("--window-s", type=float, default=3.0, help="`cpu`: length of a window (default: %(default)s)")
    parser.add_argument("--rows", type=positive_int, default=32, help="rows of each group (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=20.0, help="`cpu`: what a step takes (default: %(default)s)")
    parser.add_argument(
        "--scaling-step-ms", type=float, default=30.0, help="`scaling`: what a step takes (default: %(default)s)"
    )
    parser.add_argument(
        "--waves", type=positive_int, default=4, help="`scaling`: requests a row (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS_DIRECTORY / "groups.jsonl",
        metavar="FILE",
        help="JSON lines to append to (default: load_tests/results/groups.jsonl)",
    )
    parser.add_argument("--label", default="", help="a word for this run, kept in the result")
    args = parser.parse_args(argv)
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"there is no section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    # Requests are logged one by one otherwise.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    console = Console()
    try:
        for section in args.sections or SECTIONS:
            facts = measurement_facts(MODULE, argv)
            measured = _MEASURE[section](args)
            append_result(args.out, facts | {"section": section, "label": args.label} | measured)
            console.rule(section)
            console.print_json(data=measured)
    except (StackError, TargetError) as error:
        print(f"python -m {MODULE}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
