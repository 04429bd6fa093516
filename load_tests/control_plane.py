"""`python -m load_tests.control_plane`: what a step costs the control plane, against a simulated worker.

Real processes, one Session stream with token ids. A window starts when every row decodes and lasts --window-s; windows
of the different cases take turns, and of each case's repeats the half counts in which the rest of the machine was
quieter.
Sections: `steps` (wall and CPU per step of the two cases that have goals), `rows` (CPU per step against rows), `length`
(against tokens generated so far) and `profile` (parts of a step in one process, without gRPC).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import structlog
import uvloop
from rich.console import Console

from load_tests.control_plane_profile import profile
from load_tests.grpc_target import GrpcTarget
from load_tests.process_cpu import CpuReading, idle_cpu_s, read_cpu
from load_tests.records import RequestRecord
from load_tests.results import RESULTS_DIRECTORY, append_result, measurement_facts
from load_tests.scenarios import positive_int
from load_tests.stack import ControlPlaneStack, StackError
from load_tests.target import TargetError, TargetSpec
from load_tests.workload import RequestSpec, TokenIdSource

MODULE = "load_tests.control_plane"
SECTIONS = ("steps", "rows", "length", "profile")
_PROMPT_LEN = 32
_BLOCK_SIZE = 16
_VOCAB_SIZE = 32_000
_SETTLE_TOKENS = 32
_SETTLE_LIMIT_S = 60.0
_STEP_COUNT = "stepwire_step_duration_seconds_count"


@dataclass(frozen=True, slots=True)
class Case:
    """So many rows decode at once, on a worker whose steps take so long. Goals as far as there are any."""

    num_rows: int
    step_ms: float
    goal_wall_ms: float | None = None
    goal_core_cpu_ms: float | None = None


STEP_CASES = (Case(256, 2.0, goal_wall_ms=2.10, goal_core_cpu_ms=1.2), Case(512, 5.0, goal_wall_ms=5.2))
ROW_CASES = tuple(Case(num_rows, 5.0) for num_rows in (32, 64, 128, 256, 384, 512))
LENGTH_CASE = Case(256, 3.0)


@dataclass(frozen=True, slots=True)
class Window:
    """One stretch of steady decoding."""

    num_steps: float
    wall_s: float
    control_plane: CpuReading
    worker_cpu_s: float
    driver_cpu_s: float
    # Cores' worth of CPU that others used meanwhile.
    others_cores: float
    # Median over the rows, at the middle of the window.
    generated_tokens: float

    def numbers(self) -> dict[str, float]:
        per_step_ms = 1e3 / self.num_steps
        return {
            "wall_ms": self.wall_s * per_step_ms,
            "control_plane_cpu_ms": self.control_plane.total_s * per_step_ms,
            "main_thread_cpu_ms": self.control_plane.main_thread_s * per_step_ms,
            "worker_cpu_ms": self.worker_cpu_s * per_step_ms,
            "driver_cpu_ms": self.driver_cpu_s * per_step_ms,
            "others_cores": self.others_cores,
            "generated_tokens": self.generated_tokens,
        }


class Rows:
    """`num_rows` requests that decode until the context manager ends; then they are cancelled."""

    def __init__(self, stack: ControlPlaneStack, num_rows: int, max_tokens: int) -> None:
        self._stack, self._num_rows, self._max_tokens = stack, num_rows, max_tokens
        self._target = GrpcTarget(TargetSpec("grpc", stack.grpc_address))
        self.records: list[RequestRecord] = []

    async def __aenter__(self) -> Rows:
        await self._target.__aenter__()
        ids = TokenIdSource(time.time_ns() % 2**32, _VOCAB_SIZE)
        self.records = [RequestRecord() for _ in range(self._num_rows)]
        # Prompts differ by up to a block, so that rows do not all need a new block in the same step.
        specs = [RequestSpec(ids.draw(_PROMPT_LEN + i % _BLOCK_SIZE), self._max_tokens) for i in range(self._num_rows)]
        self._tasks = [
            asyncio.create_task(self._target.send(self._target.encode(spec), record))
            for spec, record in zip(specs, self.records, strict=True)
        ]
        await self.reach(_SETTLE_TOKENS)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # The end of the stream cancels at the server whatever the client has not.
        await self._target.__aexit__()

    async def reach(self, num_tokens: int) -> None:
        """Wait until every row has generated so many tokens."""
        deadline_s = time.monotonic() + _SETTLE_LIMIT_S
        while min(record.num_tokens for record in self.records) < num_tokens:
            self._check()
            if time.monotonic() > deadline_s:
                raise TargetError(f"{self._num_rows} rows did not reach {num_tokens} tokens in {_SETTLE_LIMIT_S:g} s")
            await asyncio.sleep(0.01)

    def _check(self) -> None:
        errors = [record.error for record in self.records if record.error]
        if errors:
            raise TargetError(f"{len(errors)} of {self._num_rows} requests failed, the first with: {errors[0]}")

    async def window(self, window_s: float) -> Window:
        pids = self._stack.pids()
        before_steps = (await asyncio.to_thread(self._stack.metric, _STEP_COUNT))[0]
        before = (time.monotonic(), time.process_time(), idle_cpu_s())
        plane, worker = read_cpu(pids["control_plane"]), read_cpu(pids["gpu_worker"])
        await asyncio.sleep(window_s / 2)
        generated = median(record.num_tokens for record in self.records)
        await asyncio.sleep(window_s / 2)
        plane, worker = read_cpu(pids["control_plane"]) - plane, read_cpu(pids["gpu_worker"]) - worker
        after = (time.monotonic(), time.process_time(), idle_cpu_s())
        after_steps = (await asyncio.to_thread(self._stack.metric, _STEP_COUNT))[0]
        self._check()
        if any(record.ended_s for record in self.records):
            raise TargetError("rows ended before the window did: the worker's context is too short for --window-s")
        wall_s, driver_s, idle_s = (late - early for late, early in zip(after, before, strict=True))
        own_s = plane.total_s + worker.total_s + driver_s
        return Window(
            num_steps=after_steps - before_steps,
            wall_s=wall_s,
            control_plane=plane,
            worker_cpu_s=worker.total_s,
            driver_cpu_s=driver_s,
            others_cores=max(0.0, (wall_s * _num_cores() - idle_s - own_s) / wall_s),
            generated_tokens=generated,
        )


def _num_cores() -> int:
    # idle_cpu_s counts the whole machine's, whatever this process may run on.
    return sum(line[3].isdigit() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu"))


def quieter_half(windows: Sequence[Window]) -> dict[str, float]:
    """Medians of the windows in which others used less of the machine: at least one."""
    quiet = sorted(windows, key=lambda window: window.others_cores)[: (len(windows) + 1) // 2]
    numbers = [window.numbers() for window in quiet]
    return {name: float(f"{median(entry[name] for entry in numbers):.4g}") for name in numbers[0]}


def fitted_line(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Least squares through (x, y): intercept, slope and the share of y's variance that it explains."""
    x, y = np.array(points, dtype=np.float64).T  # [num_points] each
    slope, intercept = np.polyfit(x, y, 1)
    unexplained = ((y - (intercept + slope * x)) ** 2).sum()
    total = ((y - y.mean()) ** 2).sum()
    return {
        "intercept": float(f"{intercept:.4g}"),
        "slope": float(f"{slope:.4g}"),
        "r_squared": float(f"{1 - unexplained / total:.4g}") if total else 1.0,
    }


@contextlib.contextmanager
def _stack(case: Case, context: int) -> Iterator[ControlPlaneStack]:
    num_blocks = case.num_rows * (-(-context // _BLOCK_SIZE) + 1) + 1
    flags = [
        f"--sim-step-ms={case.step_ms}",
        f"--sim-max-num-seqs={case.num_rows}",
        f"--sim-num-blocks={num_blocks}",
        f"--sim-block-size={_BLOCK_SIZE}",
        f"--sim-max-model-len={context}",
        f"--sim-vocab-size={_VOCAB_SIZE}",
        "--sim-max-num-batched-tokens=8192",
    ]
    with ControlPlaneStack(flags) as stack:
        yield stack


async def _interleaved(cases: Sequence[Case], repeats: int, window_s: float) -> dict[Case, list[Window]]:
    """Windows of all cases in turn. Cases of one step time share a stack; stacks that are not measured are idle."""
    windows: dict[Case, list[Window]] = {case: [] for case in cases}
    with contextlib.ExitStack() as on_exit:
        stacks = {}
        for step_ms in sorted({case.step_ms for case in cases}):
            largest = max((case for case in cases if case.step_ms == step_ms), key=lambda case: case.num_rows)
            # Twice the tokens that the window needs: neighbours make steps longer, never shorter.
            context = _PROMPT_LEN + _BLOCK_SIZE + int(2 * (window_s + 2) * 1e3 / step_ms) + 64
            stacks[step_ms] = (await asyncio.to_thread(on_exit.enter_context, _stack(largest, context)), context)
        for _ in range(repeats):
            for case in cases:
                stack, context = stacks[case.step_ms]
                async with Rows(stack, case.num_rows, context - _PROMPT_LEN - _BLOCK_SIZE) as rows:
                    windows[case].append(await rows.window(window_s))
    return windows


def measure_steps(args: argparse.Namespace) -> dict[str, Any]:
    windows = uvloop.run(_interleaved(STEP_CASES, args.repeats, args.window_s))
    return {"cases": [_describe(case, windows[case]) for case in STEP_CASES]}


def measure_rows(args: argparse.Namespace) -> dict[str, Any]:
    windows = uvloop.run(_interleaved(ROW_CASES, args.repeats, args.window_s))
    cases = [_describe(case, windows[case]) for case in ROW_CASES]
    points = [(case["num_rows"], case["quieter_half"]["control_plane_cpu_ms"]) for case in cases]
    return {"cases": cases, "control_plane_cpu_ms_by_rows": fitted_line(points)}


def measure_length(args: argparse.Namespace) -> dict[str, Any]:
    """Windows one after another while the same rows grow; every repeat grows its own."""

    async def grow() -> list[list[Window]]:
        series = []
        context = _PROMPT_LEN + _BLOCK_SIZE + args.longest + int(2 * args.window_s * 1e3 / LENGTH_CASE.step_ms) + 64
        with _stack(LENGTH_CASE, context) as stack:
            for _ in range(args.repeats):
                async with Rows(stack, LENGTH_CASE.num_rows, context - _PROMPT_LEN - _BLOCK_SIZE) as rows:
                    windows = []
                    for num_tokens in np.linspace(_SETTLE_TOKENS, args.longest, args.length_points).astype(int):
                        await rows.reach(int(num_tokens))
                        windows.append(await rows.window(args.window_s))
                    series.append(windows)
        return series

    points = [quieter_half(windows) for windows in zip(*uvloop.run(grow()), strict=True)]
    line = fitted_line([(point["generated_tokens"], point["control_plane_cpu_ms"]) for point in points])
    return {"num_rows": LENGTH_CASE.num_rows, "points": points, "control_plane_cpu_ms_by_tokens": line}


def measure_profile(args: argparse.Namespace) -> dict[str, Any]:
    by_rows = [profile(num_rows, args.profile_steps) for num_rows in (32, 64, 128, 256, 384, 512)]
    by_length = [profile(256, args.profile_steps, generated) for generated in (0, 1000, 2000, 4000)]
    points = [(float(entry["num_rows"]), entry["core_us"] / 1e3) for entry in by_rows]
    return {"by_rows": by_rows, "by_length": by_length, "core_cpu_ms_by_rows": fitted_line(points)}


_MEASURE: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "steps": measure_steps,
    "rows": measure_rows,
    "length": measure_length,
    "profile": measure_profile,
}


def _describe(case: Case, windows: Sequence[Window]) -> dict[str, Any]:
    numbers = {name: [float(f"{window.numbers()[name]:.4g}") for window in windows] for name in windows[0].numbers()}
    return {
        "num_rows": case.num_rows,
        "step_ms": case.step_ms,
        "goal_wall_ms": case.goal_wall_ms,
        "goal_core_cpu_ms": case.goal_core_cpu_ms,
        "quieter_half": quieter_half(windows),
        "windows": numbers,
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"what to measure, of {', '.join(SECTIONS)} (default: all)"
    )
    parser.add_argument("--repeats", type=positive_int, default=6, help="windows a case (default: %(default)s)")
    parser.add_argument("--window-s", type=float, default=3.0, help="length of a window (default: %(default)s)")
    parser.add_argument("--longest", type=positive_int, default=4096, help="`length`: last point's tokens generated")
    parser.add_argument("--length-points", type=positive_int, default=5, help="`length`: points (default: %(default)s)")
    parser.add_argument("--profile-steps", type=positive_int, default=480, help="`profile`: steps with the clock on")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS_DIRECTORY / "control_plane.jsonl",
        metavar="FILE",
        help="JSON lines to append to (default: load_tests/results/control_plane.jsonl)",
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
