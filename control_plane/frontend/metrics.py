"""Every metric of the frontend. The core's, token totals among them, are in control_plane/core/metrics.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from control_plane.core.histograms import LoopHistogram

_TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL_BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_E2E_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300, 600, 1800)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


class FrontendMetrics(Collector):
    def __init__(self, registry: CollectorRegistry) -> None:
        self.time_to_first_token = LoopHistogram(
            "stepwire_time_to_first_token_seconds",
            "From a request's arrival until its first token was handed to its stream.",
            _TTFT_BUCKETS_S,
        )
        self.inter_token_latency = LoopHistogram(
            "stepwire_inter_token_latency_seconds",
            "Between two deltas of a sequence, divided by the tokens of the later one; counted once a token.",
            _ITL_BUCKETS_S,
        )
        self.e2e_latency = LoopHistogram(
            "stepwire_e2e_request_latency_seconds",
            "From a request's arrival until its end, of requests that ended well.",
            _E2E_BUCKETS_S,
        )
        self.prompt_tokens_of_request = LoopHistogram(
            "stepwire_request_prompt_tokens", "Prompt tokens of a request that ended well.", _TOKEN_BUCKETS
        )
        self.generation_tokens_of_request = LoopHistogram(
            "stepwire_request_generation_tokens",
            "Tokens generated for a request that ended well, all its sequences together.",
            _TOKEN_BUCKETS,
        )
        # (code, finish_reason) -> requests
        self.requests: dict[tuple[str, str], int] = defaultdict(int)
        self.num_running_requests = 0
        self.num_open_sessions = 0
        registry.register(self)

    def count_end(self, code: str, finish_reason: str = "") -> None:
        """One request is over; `code` is a google.rpc.Code name."""
        self.requests[code, finish_reason] += 1

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "stepwire_requests", "Requests that are over, by how they ended.", labels=["code", "finish_reason"]
        )
        for labels, count in sorted(self.requests.items()):
            requests.add_metric(labels, count)
        yield requests
        yield GaugeMetricFamily(
            "stepwire_open_requests", "Accepted requests that are not over yet.", value=self.num_running_requests
        )
        yield GaugeMetricFamily("stepwire_open_sessions", "Session streams now open.", value=self.num_open_sessions)
        for histogram in (
            self.time_to_first_token,
            self.inter_token_latency,
            self.e2e_latency,
            self.prompt_tokens_of_request,
            self.generation_tokens_of_request,
        ):
            yield histogram.collect()
