from __future__ import annotations

import re
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from control_plane.core.engine import Engine
from control_plane.core.engine_config import EngineConfig
from control_plane.core.histograms import LabelledHistogram, LoopHistogram
from control_plane.core.metrics import CoreMetrics
from control_plane.core.worker_link import WorkerAddress
from control_plane.frontend.metrics import FrontendMetrics


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 5)), max_size=30))
def test_the_histogram_counts_as_prometheus_does(values: list[tuple[float, int]]) -> None:
    registry = CollectorRegistry()
    theirs = Histogram("a_seconds", "A.", buckets=(1, 2.5, 10), registry=registry)
    ours = LoopHistogram("a_seconds", "A.", (1, 2.5, 10))
    for value, count in values:
        ours.observe(value, count)
        for _ in range(count):
            theirs.observe(value)

    def counts(samples: list) -> dict:
        return {(s.name, s.labels.get("le")): s.value for s in samples if s.name.endswith(("_bucket", "_count"))}

    [family] = registry.collect()
    assert counts(ours.collect().samples) == counts(family.samples)
    sums = [
        next(s.value for s in samples if s.name.endswith("_sum"))
        for samples in (ours.collect().samples, family.samples)
    ]
    assert abs(sums[0] - sums[1]) < 1e-6


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["0", "1"]), st.sampled_from(["a", "b"]), st.floats(0, 20)), max_size=30))
def test_the_page_of_labelled_histograms_is_the_same(values: list[tuple[str, str, float]]) -> None:
    names, bounds = ("group", "stage"), (0.001, 1, 2.5, 10)
    registry = CollectorRegistry()
    theirs = Histogram("a_seconds", "A.", names, buckets=bounds, registry=registry)
    ours = LabelledHistogram("a_seconds", "A.", names, bounds)
    for group, stage, value in values:
        ours.labels(group, stage).observe(value)
        theirs.labels(group, stage).observe(value)
    for labels in sorted({each[:2] for each in values})[:1]:
        ours.remove(*labels)
        theirs.remove(*labels)

    class Page(Collector):
        def collect(self) -> Iterable[Metric]:
            return [ours.collect()]

    registry_of_ours = CollectorRegistry()
    registry_of_ours.register(Page())
    pages = [generate_latest(each).decode() for each in (registry, registry_of_ours)]
    lines = [sorted(re.sub(r"(_created\{.*\}) .*", r"\1", page).splitlines()) for page in pages]
    assert lines[0] == lines[1]


def test_names_are_exported_once_and_by_convention() -> None:
    """Core and frontend share a page: a sample that both give would spoil the scrape."""
    registry = CollectorRegistry()
    metrics = FrontendMetrics(registry)
    Engine([WorkerAddress("unix:/nowhere")], EngineConfig(), CoreMetrics(registry))
    metrics.count_end("OK", "stop")
    metrics.count_end("NOT_FOUND")
    text = generate_latest(registry).decode()
    names = [family.name for family in text_string_to_metric_families(text)]
    assert len(names) == len(set(names))
    assert all(name.startswith("stepwire_") for name in names)
    assert 'stepwire_requests_total{code="OK",finish_reason="stop"} 1.0' in text
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        assert f"stepwire_{name}_seconds_bucket" in text
