"""The gateway's metrics, on `/metrics` of the port that it serves.

What is counted for every token is counted in plain integers (`StreamTotals`) and read when Prometheus asks: a locked
counter costs more than writing the token does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

_DURATION_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(slots=True)
class StreamTotals:
    """What all server-sent event streams have sent since the process started."""

    num_events: int = 0
    num_bytes: int = 0
    num_sends: int = 0


class _StreamCollector(Collector):
    def __init__(self, totals: StreamTotals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "stepwire_gateway_sse_events", "Server-sent events written.", value=self._totals.num_events
        )
        yield CounterMetricFamily(
            "stepwire_gateway_sse_bytes", "Bytes of server-sent events written.", value=self._totals.num_bytes
        )
        yield CounterMetricFamily(
            "stepwire_gateway_sse_sends",
            "Writes to sockets that carried server-sent events; fewer than events where events were sent together.",
            value=self._totals.num_sends,
        )


class GatewayMetrics:
    """One registry a process; created by `create_app`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.streams = StreamTotals()
        self.registry.register(_StreamCollector(self.streams))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.http_requests = Counter(
            "stepwire_gateway_http_requests_total",
            "HTTP requests answered; code 499 is a client that left before the answer began.",
            ["route", "code"],
            registry=self.registry,
        )
        self.http_request_duration = Histogram(
            "stepwire_gateway_http_request_duration_seconds",
            "From the request's headers to the last byte of its answer.",
            ["route"],
            buckets=_DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self.http_requests_in_flight = Gauge(
            "stepwire_gateway_http_requests_in_flight", "HTTP requests being answered.", registry=self.registry
        )
        self.open_streams = Gauge(
            "stepwire_gateway_open_streams", "Server-sent event streams being written.", registry=self.registry
        )
        self.client_disconnects = Counter(
            "stepwire_gateway_client_disconnects_total",
            "Requests that were cancelled because their client left.",
            registry=self.registry,
        )
        self.control_plane_connected = Gauge(
            "stepwire_gateway_control_plane_connected",
            "1 while the session with the control plane stands.",
            registry=self.registry,
        )
        self.control_plane_reconnects = Counter(
            "stepwire_gateway_control_plane_reconnects_total",
            "Sessions with the control plane after the first one.",
            registry=self.registry,
        )

    def count_streamed(self, num_events: int, num_bytes: int, num_sends: int) -> None:
        self.streams.num_events += num_events
        self.streams.num_bytes += num_bytes
        self.streams.num_sends += num_sends
