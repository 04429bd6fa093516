"""Every metric of the core. Gauges and totals are read off the engine when scraped: a step costs six plain counts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from stepwire.v1 import worker_pb2

from control_plane.core.histograms import LabelledHistogram, LoopHistogram
from control_plane.core.scheduler import Scheduler
from control_plane.core.step_plan import RowStart, StepPlan

if TYPE_CHECKING:
    from control_plane.core.engine import Engine

_STEP_BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_QUEUE_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 300)
_TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_RATE_WINDOW_S = 10.0
_STAGES = ("queue", "input", "forward", "sample")


class CoreMetrics(Collector):
    """What describes a worker group has its number as the label `group`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.rejections = Counter(
            "stepwire_rejected_requests", "Requests refused at admission.", ["reason"], registry=registry
        )
        self.cancellations = Counter(
            "stepwire_cancelled_requests", "Requests forgotten because their client went away.", registry=registry
        )
        self._connections = Counter(
            "stepwire_worker_connections", "Sessions opened with a worker.", ["group"], registry=registry
        )
        self._losses = Counter(
            "stepwire_worker_losses",
            "Sessions that ended because the worker died, hung or broke the protocol.",
            ["group"],
            registry=registry,
        )
        self._departures = Counter(
            "stepwire_worker_departures",
            "Sessions that ended because the worker was told to end.",
            ["group"],
            registry=registry,
        )
        self._step_seconds = LabelledHistogram(
            "stepwire_step_duration_seconds", "From sending a step to its result.", ["group"], _STEP_BUCKETS_S
        )
        self._worker_seconds = LabelledHistogram(
            "stepwire_worker_step_seconds",
            "Where a step's time went on the worker.",
            ["group", "stage"],
            _STEP_BUCKETS_S,
        )
        self._step_tokens = LabelledHistogram(
            "stepwire_step_tokens", "Tokens run by one step.", ["group"], _TOKEN_BUCKETS
        )
        self._queue_seconds = LoopHistogram(
            "stepwire_request_queue_seconds",
            "From arrival until the first step that runs the request.",
            _QUEUE_BUCKETS_S,
        )
        registry.register(self)
        # (time, prompt tokens started) of the last seconds: how fast the queue empties.
        self._started: deque[tuple[float, int]] = deque()
        self._num_started_tokens = 0

    def collect(self) -> Iterable[Metric]:
        for histogram in (self._step_seconds, self._worker_seconds, self._step_tokens, self._queue_seconds):
            yield histogram.collect()

    def watch(self, engine: Engine) -> None:
        """Export the engine's own counts whenever somebody scrapes."""
        self._registry.register(_EngineCollector(engine))

    def of_group(self, number: int) -> GroupMetrics:
        group = str(number)
        return GroupMetrics(
            connections=self._connections.labels(group),
            losses=self._losses.labels(group),
            departures=self._departures.labels(group),
            step_seconds=self._step_seconds.labels(group),
            step_tokens=self._step_tokens.labels(group),
            stages=tuple(self._worker_seconds.labels(group, stage) for stage in _STAGES),
            note_start=self._note_start,
        )

    def forget_group(self, number: int) -> None:
        """The group has left for good: its series end."""
        group = str(number)
        for counter in (self._connections, self._losses, self._departures):
            counter.remove(group)
        for histogram in (self._step_seconds, self._step_tokens):
            histogram.remove(group)
        for stage in _STAGES:
            self._worker_seconds.remove(group, stage)

    def _note_start(self, start: RowStart, now: float) -> None:
        request = start.sequence.request
        if start.sequence.index == 0 and not start.sequence.output_ids:
            self._queue_seconds.observe(now - request.arrival_s)
            self._started.append((now, start.sequence.num_prompt_tokens))
            self._num_started_tokens += start.sequence.num_prompt_tokens

    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens taken up per second, over the last seconds, by all groups together. Asked at each arrival."""
        horizon = time.monotonic() - _RATE_WINDOW_S
        while self._started and self._started[0][0] < horizon:
            self._num_started_tokens -= self._started.popleft()[1]
        return self._num_started_tokens / _RATE_WINDOW_S


@dataclass(frozen=True, slots=True)
class GroupMetrics:
    """One group's share of `CoreMetrics`, with the labels looked up once."""

    connections: Counter
    losses: Counter
    departures: Counter
    step_seconds: LoopHistogram
    step_tokens: LoopHistogram
    stages: tuple[LoopHistogram, ...]  # in the order of _STAGES
    note_start: Callable[[RowStart, float], None]

    def note_plan(self, plan: StepPlan, now: float) -> None:
        self.step_tokens.observe(plan.num_tokens)
        for start in plan.starts:
            self.note_start(start, now)

    def note_result(self, timings: worker_pb2.StepTimings, duration_s: float) -> None:
        self.step_seconds.observe(duration_s)
        queue, load, forward, sample = self.stages
        queue.observe(timings.queue_ns * 1e-9)
        load.observe(timings.input_ns * 1e-9)
        forward.observe(timings.forward_ns * 1e-9)
        sample.observe(timings.sample_ns * 1e-9)


class _EngineCollector(Collector):
    """Reads the groups when somebody scrapes. `_GAUGES` and `_TOTALS` say what of their schedulers is exported."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        groups = self._engine.groups
        connected = GaugeMetricFamily("stepwire_worker_connected", "Whether a worker is connected.", labels=["group"])
        draining = GaugeMetricFamily(
            "stepwire_group_draining", "Whether a group finishes what it has and gets nothing new.", labels=["group"]
        )
        info = InfoMetricFamily("stepwire_worker", "The worker in use.", labels=["group"])
        for group in groups:
            label = [str(group.number)]
            connected.add_metric(label, float(group.is_connected))
            draining.add_metric(label, float(group.is_draining))
            if group.worker is not None:
                info.add_metric(label, _describe(group.worker))
        yield connected
        yield draining
        if info.samples:
            yield info
        schedulers = [(str(group.number), group.scheduler) for group in groups if group.scheduler is not None]
        for family, tables in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _TOTALS)):
            for name, (help_text, read) in tables.items() if schedulers else ():
                metric = family(f"stepwire_{name}", help_text, labels=["group"])
                for label_value, scheduler in schedulers:
                    metric.add_metric([label_value], read(scheduler))
                yield metric


def _describe(worker: worker_pb2.DescribeResponse) -> dict[str, str]:
    return {
        "model": worker.model,
        "architecture": worker.architecture,
        "dtype": worker.dtype,
        "devices": ", ".join(worker.devices),
        "version": worker.version,
    }


_Table = dict[str, tuple[str, Callable[[Scheduler], float]]]

_GAUGES: _Table = {
    "requests_running": ("Sequences that hold a row.", lambda s: s.num_running),
    "requests_waiting": ("Requests in the queue.", lambda s: s.num_waiting_requests),
    "queued_tokens": ("Prompt tokens in the queue.", lambda s: s.num_waiting_tokens),
    "kv_blocks": ("KV blocks there are.", lambda s: s.num_usable_blocks),
    "kv_blocks_in_use": ("KV blocks held by running sequences.", lambda s: s.num_blocks_held),
    "kv_blocks_cached": ("KV blocks whose content the prefix cache knows.", lambda s: s.num_cached_blocks),
    "kv_usage_ratio": ("Share of KV blocks in use.", lambda s: s.num_blocks_held / s.num_usable_blocks),
    "steps_in_flight": ("Steps sent and not answered.", lambda s: s.num_in_flight),
}
_TOTALS: _Table = {
    "prompt_tokens": ("Prompt tokens admitted.", lambda s: s.counters.num_prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda s: s.counters.num_generated_tokens),
    "discarded_tokens": (
        "Tokens sampled after their sequence had ended.",
        lambda s: s.counters.num_discarded_tokens,
    ),
    "recomputed_tokens": (
        "Tokens computed again after a preemption or a lost worker.",
        lambda s: s.counters.num_recomputed_tokens,
    ),
    "preemptions": ("Sequences taken off the worker for want of blocks.", lambda s: s.counters.num_preemptions),
    "prefix_cache_queries": ("Tokens looked up in the prefix cache.", lambda s: s.counters.num_prefix_queries),
    "prefix_cache_hits": ("Tokens found in the prefix cache.", lambda s: s.counters.num_prefix_hits),
}
