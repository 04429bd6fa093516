"""From torch.profiler's timeline (its chrome trace) to where each step's time went.

On a GPU a kernel belongs to the step in whose `execute` it was launched: the launch and the kernel carry the same
correlation id, a graph's kernels that of the graph's launch. On a CPU the ranges around layers are what is counted,
each without those inside it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from gpu_worker.replay.kernel_table import OTHER, PARTS, part_of

STEP_RANGE = re.compile(r"^stepwire step (\d+)$")
RANGE_PREFIX = "stepwire "
_GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver")


@dataclass(slots=True)
class StepTimes:
    """One step. Microseconds."""

    number: int
    """Counted over the replay, from 0."""
    begun_us: float
    """On the device where there is one, else of `execute`."""
    ended_us: float
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    names: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    gaps_us: float = 0.0
    """Between the step's first and last operation, when none ran."""
    idle_before_us: float = 0.0
    """Since the step before ended."""


def read_steps(events: Iterable[dict[str, Any]]) -> list[StepTimes]:
    """Steps in order, from the events of a chrome trace. Without a kernel in it, the trace is taken for a CPU's."""
    complete = [event for event in events if event.get("ph") == "X"]
    ranges = [
        (float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0)), int(match[1]))
        for event in complete
        if event.get("cat") == "user_annotation" and (match := STEP_RANGE.match(event["name"]))
    ]
    ranges.sort()
    kernels = [event for event in complete if event.get("cat") in _GPU_CATEGORIES]
    steps = _gpu_steps(complete, kernels, ranges) if kernels else _cpu_steps(complete, ranges)
    for former, step in pairwise(steps):
        step.idle_before_us = max(0.0, step.begun_us - former.ended_us)
    return steps


def _gpu_steps(
    complete: list[dict[str, Any]], kernels: list[dict[str, Any]], ranges: Sequence[tuple[float, float, int]]
) -> list[StepTimes]:
    launched_at = {
        event["args"]["correlation"]: float(event["ts"])
        for event in complete
        if event.get("cat") in _LAUNCH_CATEGORIES and "correlation" in event.get("args", {})
    }
    by_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for kernel in kernels:
        launched = launched_at.get(kernel.get("args", {}).get("correlation"))
        number = None if launched is None else _range_at(ranges, launched)
        if number is not None:
            by_step[number].append(kernel)
    steps = []
    for number in sorted(by_step):
        own = sorted(by_step[number], key=lambda event: float(event["ts"]))
        step = StepTimes(number, float(own[0]["ts"]), max(float(one["ts"]) + float(one["dur"]) for one in own))
        busy_until = step.begun_us
        for kernel in own:
            # What runs beside another is counted from where that ends: the parts add up to the step.
            start, stop = float(kernel["ts"]), float(kernel["ts"]) + float(kernel["dur"])
            step.gaps_us += max(0.0, start - busy_until)
            _count(step, kernel["name"], max(0.0, stop - max(start, busy_until)))
            busy_until = max(busy_until, stop)
        steps.append(step)
    return steps


def _cpu_steps(complete: list[dict[str, Any]], ranges: Sequence[tuple[float, float, int]]) -> list[StepTimes]:
    inner = [
        (float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0)), event["name"].removeprefix(RANGE_PREFIX))
        for event in complete
        if event.get("cat") == "user_annotation"
        and event["name"].startswith(RANGE_PREFIX)
        and not STEP_RANGE.match(event["name"])
    ]
    inner.sort(key=lambda one: (one[0], -one[1]))
    steps = {number: StepTimes(number, start, stop) for start, stop, number in ranges}
    open_ranges: list[tuple[float, str, StepTimes]] = []
    for start, stop, name in inner:
        number = _range_at(ranges, start)
        if number is None:
            continue
        step = steps[number]
        while open_ranges and open_ranges[-1][0] <= start:
            open_ranges.pop()
        if open_ranges:
            # Its time is not that of the range around it.
            _count(step, open_ranges[-1][1], start - stop)
        _count(step, name, stop - start)
        open_ranges.append((stop, name, step))
    for step in steps.values():
        rest = step.ended_us - step.begun_us - sum(step.parts.values())
        step.parts[OTHER] += rest
        step.names["between layers"] += rest
    return [steps[number] for number in sorted(steps)]


def _count(step: StepTimes, name: str, us: float) -> None:
    step.parts[part_of(name)] += us
    step.names[name] += us


def _range_at(ranges: Sequence[tuple[float, float, int]], at_us: float) -> int | None:
    index = bisect_right(ranges, (at_us, float("inf"), 0)) - 1
    return ranges[index][2] if index >= 0 and at_us <= ranges[index][1] else None
