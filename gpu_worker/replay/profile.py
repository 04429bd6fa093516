"""`stepwire replay --profile`: torch.profiler over the replayed steps, and the table that is printed of it."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gpu_worker.replay.kernel_table import PARTS
from gpu_worker.replay.timeline import RANGE_PREFIX, StepTimes, read_steps
from gpu_worker.runner import TorchRunner
from gpu_worker.runner_api import PendingStep, Runner, StepBatch, TokenMask, UsesPauses, WorkerFacts

NUM_NAMES = 12
_DIGITS = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class StepClass:
    """Steps that are alike."""

    kind: str  # decode, mixed or prefill
    rows: str = ""

    @classmethod
    def of(cls, batch: StepBatch) -> StepClass | None:
        """None for a step that runs nothing."""
        counts = batch.run_num_tokens
        if not len(counts):
            return None
        if (counts == 1).all():
            return cls("decode", _rows_range(len(counts)))
        return cls("mixed" if (counts == 1).any() else "prefill")

    def __str__(self) -> str:
        return f"{self.kind} {self.rows}".strip()


def _rows_range(num_rows: int) -> str:
    """1, 2, 3-4, 5-8, 9-16, ..."""
    top = 1 << (num_rows - 1).bit_length()
    return str(top) if top <= 2 else f"{top // 2 + 1}-{top}"


class ProfiledRunner:
    """Implements `Runner` around another one: every step is a range of the profiler's timeline, on the main thread."""

    def __init__(self, inner: Runner, trace: Path | None) -> None:
        self._inner, self._trace = inner, trace
        self.classes: list[StepClass | None] = []
        self.num_tokens: list[int] = []
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available() and any("cuda" in device for device in inner.describe().devices):
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, acc_events=True)
        self._is_running = False
        if isinstance(inner, TorchRunner):
            annotate_layers(inner)

    def describe(self) -> WorkerFacts:
        return self._inner.describe()

    def execute(self, batch: StepBatch, wait_for_mask: Callable[[], TokenMask]) -> PendingStep:
        if not self._is_running:
            self._profiler.start()
            self._is_running = True
        number = len(self.classes)
        self.classes.append(StepClass.of(batch))
        self.num_tokens.append(batch.num_tokens)
        with record_function(f"{RANGE_PREFIX}step {number}"):
            return self._inner.execute(batch, wait_for_mask)

    def has_pause_work(self) -> bool:
        """Graphs are captured before the first step only: a capture in the profile would be nobody's time."""
        return isinstance(self._inner, UsesPauses) and not self._is_running and self._inner.has_pause_work()

    def idle(self) -> bool:
        return isinstance(self._inner, UsesPauses) and not self._is_running and self._inner.idle()

    def reset(self) -> None:
        self._inner.reset()

    def close(self) -> None:
        self._inner.close()

    def read_steps(self) -> list[StepTimes]:
        """End the profile and read it. Takes seconds for a GPU's kernels, longer than a server's end may."""
        if not self._is_running:
            return []
        self._profiler.stop()
        self._is_running = False
        with tempfile.TemporaryDirectory() as directory:
            path = self._trace or Path(directory) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            return read_steps(json.loads(path.read_text())["traceEvents"])


def annotate_layers(runner: TorchRunner) -> None:
    """Put a range around what each layer of this runner does; its name is the layer's path without numbers."""
    model, attention = runner.model, runner.attention
    for path, layer in model.weighted():
        if hasattr(layer, "apply"):
            _annotate(layer, "apply", f"layer {_DIGITS.sub('.', path)}")
    _annotate(model, "logits", "layer head")
    _annotate(attention, "plan", "input attention plan")
    _annotate(attention, "run", "attention.run")
    _annotate(runner, "build_inputs", "input rows")
    _annotate(runner, "draw", "sampler")


def _annotate(target: Any, method: str, name: str) -> None:
    function = getattr(target, method)

    @functools.wraps(function)
    def annotated(*arguments: Any, **options: Any) -> Any:
        with record_function(RANGE_PREFIX + name):
            return function(*arguments, **options)

    setattr(target, method, annotated)


@dataclass(slots=True)
class ClassTimes:
    """Means over the steps of one class, in microseconds a step."""

    steps: int = 0
    tokens: int = 0
    wall_us: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    gaps_us: float = 0.0
    idle_before_us: float = 0.0
    names: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def summarize(
    steps: Iterable[StepTimes], classes: list[StepClass | None], num_tokens: list[int]
) -> dict[str, ClassTimes]:
    """By class: decodes first, by their rows."""
    found: dict[StepClass, ClassTimes] = {}
    for step in steps:
        kind = classes[step.number]
        if kind is None:
            continue
        times = found.setdefault(kind, ClassTimes())
        times.steps += 1
        times.tokens += num_tokens[step.number]
        times.wall_us += step.ended_us - step.begun_us
        times.gaps_us += step.gaps_us
        times.idle_before_us += step.idle_before_us
        for part, us in step.parts.items():
            times.parts[part] += us
        for name, us in step.names.items():
            times.names[name] += us
    for times in found.values():
        times.wall_us /= times.steps
        times.gaps_us /= times.steps
        times.idle_before_us /= times.steps
        times.parts = {part: us / times.steps for part, us in times.parts.items()}
        times.names = {name: us / times.steps for name, us in times.names.items()}
    order = sorted(found, key=lambda one: (one.kind, int(one.rows.partition("-")[0] or 0)))
    return {str(kind): found[kind] for kind in order}


def to_json(summary: dict[str, ClassTimes], agreement: str) -> str:
    classes = [
        {
            "class": name,
            "steps": times.steps,
            "tokens": times.tokens,
            "us_per_step": {
                "wall": round(times.wall_us, 2),
                **{part: round(us, 2) for part, us in times.parts.items()},
                "gaps": round(times.gaps_us, 2),
                "idle_before": round(times.idle_before_us, 2),
            },
            "operations_us": {key: round(us, 2) for key, us in _longest(times)},
        }
        for name, times in summary.items()
    ]
    return json.dumps({"classes": classes, "replay": agreement}, indent=2)


def to_table(summary: dict[str, ClassTimes]) -> str:
    """Microseconds a step."""
    heads = ("steps", "tokens", "wall", *PARTS, "gaps", "idle before")
    lines = [f"{'microseconds a step':<20}" + "".join(f"{head:>12}" for head in heads)]
    for name, times in summary.items():
        numbers = (times.wall_us, *(times.parts[part] for part in PARTS), times.gaps_us, times.idle_before_us)
        lines.append(f"{name:<20}{times.steps:>12}{times.tokens:>12}" + "".join(f"{us:>12.1f}" for us in numbers))
    for name, times in summary.items():
        lines += ["", f"{name}: what took longest"]
        lines += [f"{us:>12.1f}  {operation[:90]}" for operation, us in _longest(times)]
    return "\n".join(lines)


def _longest(times: ClassTimes) -> list[tuple[str, float]]:
    return sorted(times.names.items(), key=lambda item: -item[1])[:NUM_NAMES]
