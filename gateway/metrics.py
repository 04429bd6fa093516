"""Metrics of the gateway, for Prometheus.

Where it is several processes, each writes its values into files that all can read (prometheus_client's multiprocess
mode), and whichever is asked answers for all of them: counters are sums, and go on where a process that died has left
them. What a process is by itself (memory, CPU) has its number as the label `process`.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from gateway.run_directory import RunDirectory

_DURATION_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


_IN_FLIGHT = "stepwire_gateway_http_requests_in_flight"


class _ProcessesCollector(Collector):
    """`process_*` of each of several processes, with its number."""

    def __init__(self, run_directory: RunDirectory) -> None:
        self._run_directory = run_directory

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for number, pid in self._run_directory.processes().items():
            for found in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():  # type: ignore[misc]
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    labels = {**sample.labels, "process": str(number)}
                    family.add_sample(sample.name, labels, sample.value)
        yield from families.values()


class GatewayMetrics:
    """One registry a process; created by `create_app`. `run_directory`: this is one of several processes."""

    def __init__(self, run_directory: RunDirectory | None = None) -> None:
        self._run_directory = run_directory
        self.registry = CollectorRegistry()
        if run_directory is None:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)
        self._sse_events = Counter(
            "stepwire_gateway_sse_events_total", "Server-sent events written.", registry=self.registry
        )
        self._sse_bytes = Counter(
            "stepwire_gateway_sse_bytes_total", "Bytes of server-sent events written.", registry=self.registry
        )
        self._sse_sends = Counter(
            "stepwire_gateway_sse_sends_total",
            "Writes to sockets that carried server-sent events; fewer than events where events were sent together.",
            registry=self.registry,
        )
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
            _IN_FLIGHT, "HTTP requests being answered.", registry=self.registry, multiprocess_mode="livesum"
        )
        self.open_streams = Gauge(
            "stepwire_gateway_open_streams",
            "Server-sent event streams being written.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.client_disconnects = Counter(
            "stepwire_gateway_client_disconnects_total",
            "Requests that were cancelled because their client left.",
            registry=self.registry,
        )
        self.control_plane_connected = Gauge(
            "stepwire_gateway_control_plane_connected",
            "1 while the session with the control plane stands, that of every process.",
            registry=self.registry,
            multiprocess_mode="livemin",
        )
        self.control_plane_reconnects = Counter(
            "stepwire_gateway_control_plane_reconnects_total",
            "Sessions with the control plane after the first one.",
            registry=self.registry,
        )

    def count_streamed(self, num_events: int, num_bytes: int, num_sends: int) -> None:
        """What was written to streams in one turn: a locked counter is too dear for each of them."""
        if num_sends:
            self._sse_events.inc(num_events)
            self._sse_bytes.inc(num_bytes)
            self._sse_sends.inc(num_sends)

    def page(self) -> bytes:
        """What Prometheus is to read, of all processes together."""
        if self._run_directory is None:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(self._run_directory.metrics))  # type: ignore[no-untyped-call]
        registry.register(_ProcessesCollector(self._run_directory))
        PlatformCollector(registry=registry)
        return generate_latest(registry)

    def num_in_flight(self) -> int:
        """HTTP requests being answered, by all processes together."""
        if self._run_directory is None:
            families = list(self.http_requests_in_flight.collect())
        else:
            files = [str(path) for path in self._run_directory.metrics.glob("gauge_livesum_*.db")]
            merged = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
            families = [family for family in merged if family.name == _IN_FLIGHT]
        return int(sum(sample.value for family in families for sample in family.samples))
