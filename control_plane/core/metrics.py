"""Every metric of the core. Gauges and totals are read off the engine when scraped: only histograms cost on a step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from stepwire.v1 import worker_pb2

from control_plane.core.step_plan import StepPlan

if TYPE_CHECKING:
    from control_plane.core.engine import Engine

_STEP_BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_QUEUE_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 300)
_TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_RATE_WINDOW_S = 10.0


class CoreMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.rejections = Counter(
            "stepwire_rejected_requests", "Requests refused at admission.", ["reason"], registry=registry
        )
        self.cancellations = Counter(
            "stepwire_cancelled_requests", "Requests forgotten because their client went away.", registry=registry
        )
        self.worker_connections = Counter(
            "stepwire_worker_connections", "Sessions opened with a worker.", registry=registry
        )
        self.worker_losses = Counter(
            "stepwire_worker_losses",
            "Sessions that ended because the worker died, hung or broke the protocol.",
            registry=registry,
        )
        self._step_seconds = Histogram(
            "stepwire_step_duration_seconds",
            "From sending a step to its result.",
            buckets=_STEP_BUCKETS_S,
            registry=registry,
        )
        self._worker_seconds = Histogram(
            "stepwire_worker_step_seconds",
            "Where a step's time went on the worker.",
            ["stage"],
            buckets=_STEP_BUCKETS_S,
            registry=registry,
        )
        self._stages = {
            stage: self._worker_seconds.labels(stage=stage) for stage in ("queue", "input", "forward", "sample")
        }
        self._step_tokens = Histogram(
            "stepwire_step_tokens", "Tokens run by one step.", buckets=_TOKEN_BUCKETS, registry=registry
        )
        self._queue_seconds = Histogram(
            "stepwire_request_queue_seconds",
            "From arrival until the first step that runs the request.",
            buckets=_QUEUE_BUCKETS_S,
            registry=registry,
        )
        # (time, prompt tokens started) of the last seconds: how fast the queue empties.
        self._started: deque[tuple[float, int]] = deque()

    def watch(self, engine: Engine) -> None:
        """Export the engine's own counts whenever somebody scrapes."""
        self._registry.register(_EngineCollector(engine))

    def note_plan(self, plan: StepPlan, now: float) -> None:
        self._step_tokens.observe(plan.num_tokens)
        for start in plan.starts:
            request = start.sequence.request
            if start.sequence.index == 0 and not start.sequence.output_ids:
                self._queue_seconds.observe(now - request.arrival_s)
                self._started.append((now, start.sequence.num_prompt_tokens))

    def note_result(self, plan: StepPlan, timings: worker_pb2.StepTimings, duration_s: float) -> None:
        self._step_seconds.observe(duration_s)
        stages = self._stages
        stages["queue"].observe(timings.queue_ns * 1e-9)
        stages["input"].observe(timings.input_ns * 1e-9)
        stages["forward"].observe(timings.forward_ns * 1e-9)
        stages["sample"].observe(timings.sample_ns * 1e-9)

    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens taken up per second, over the last seconds."""
        horizon = time.monotonic() - _RATE_WINDOW_S
        while self._started and self._started[0][0] < horizon:
            self._started.popleft()
        return sum(num_tokens for _, num_tokens in self._started) / _RATE_WINDOW_S


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        engine, scheduler = self._engine, self._engine.scheduler
        yield GaugeMetricFamily(
            "stepwire_worker_connected", "Whether a worker is connected.", float(engine.is_connected)
        )
        if engine.worker is not None:
            worker = engine.worker
            info = InfoMetricFamily("stepwire_worker", "The worker in use.")
            info.add_metric(
                [],
                {
                    "model": worker.model,
                    "architecture": worker.architecture,
                    "dtype": worker.dtype,
                    "devices": ", ".join(worker.devices),
                    "version": worker.version,
                },
            )
            yield info
        if scheduler is None:
            return
        counters = scheduler.counters
        gauges = {
            "requests_running": ("Sequences that hold a row.", scheduler.num_running),
            "requests_waiting": ("Requests in the queue.", scheduler.num_waiting_requests),
            "queued_tokens": ("Prompt tokens in the queue.", scheduler.num_waiting_tokens),
            "kv_blocks": ("KV blocks there are.", scheduler.num_usable_blocks),
            "kv_blocks_in_use": ("KV blocks held by running sequences.", scheduler.num_blocks_held),
            "kv_blocks_cached": ("KV blocks whose content the prefix cache knows.", scheduler.num_cached_blocks),
            "kv_usage_ratio": ("Share of KV blocks in use.", scheduler.num_blocks_held / scheduler.num_usable_blocks),
            "steps_in_flight": ("Steps sent and not answered.", scheduler.num_in_flight),
        }
        for name, (help_text, value) in gauges.items():
            yield GaugeMetricFamily(f"stepwire_{name}", help_text, value)
        totals = {
            "prompt_tokens": ("Prompt tokens admitted.", counters.num_prompt_tokens),
            "generation_tokens": ("Tokens generated.", counters.num_generated_tokens),
            "discarded_tokens": ("Tokens sampled after their sequence had ended.", counters.num_discarded_tokens),
            "recomputed_tokens": (
                "Tokens computed again after a preemption or a lost worker.",
                counters.num_recomputed_tokens,
            ),
            "preemptions": ("Sequences taken off the worker for want of blocks.", counters.num_preemptions),
            "prefix_cache_queries": ("Tokens looked up in the prefix cache.", counters.num_prefix_queries),
            "prefix_cache_hits": ("Tokens found in the prefix cache.", counters.num_prefix_hits),
        }
        for name, (help_text, value) in totals.items():
            yield CounterMetricFamily(f"stepwire_{name}", help_text, value)
