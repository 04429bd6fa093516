"""Histograms that cost little to observe, for what is observed at every step or token.

`prometheus_client`'s own take a lock and walk their buckets on each observation (12 us with cold caches). All of ours
are observed on one event loop, so plain counts do, read off when somebody scrapes; the page shows the same series.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString


class LoopHistogram:
    """A histogram that is only ever observed on one thread."""

    __slots__ = ("_bounds", "_counts", "_created_s", "_help", "_name", "_total")

    def __init__(self, name: str, help: str, bounds: tuple[float, ...]) -> None:
        self._name = name
        self._help = help
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._created_s = time.time()

    def observe(self, value: float, count: int = 1) -> None:
        """`count` observations of the same value."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._total += value * count

    @property
    def bounds(self) -> tuple[float, ...]:
        return self._bounds

    def counts(self) -> list[int]:
        """How many values each bucket has had so far; one more than there are bounds."""
        return list(self._counts)

    def collect(self) -> Metric:
        family = HistogramMetricFamily(self._name, self._help)
        self.add_to(family, (), ())
        return family

    def add_to(self, family: HistogramMetricFamily, names: Sequence[str], values: Sequence[str]) -> None:
        """Add the samples, under these labels."""
        counts = list(accumulate(self._counts))
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        family.add_metric(values, buckets=list(zip(bounds, counts, strict=True)), sum_value=self._total)
        family.add_sample(f"{self._name}_created", dict(zip(names, values, strict=True)), self._created_s)


class LabelledHistogram:
    """One histogram for each set of label values."""

    def __init__(self, name: str, help: str, labels: Sequence[str], bounds: tuple[float, ...]) -> None:
        self._name = name
        self._help = help
        self._labels = tuple(labels)
        self._bounds = bounds
        self._children: dict[tuple[str, ...], LoopHistogram] = {}

    def labels(self, *values: str) -> LoopHistogram:
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = LoopHistogram(self._name, self._help, self._bounds)
        return child

    def remove(self, *values: str) -> None:
        """Its series end."""
        self._children.pop(values, None)

    def collect(self) -> Metric:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        for values, child in list(self._children.items()):
            child.add_to(family, self._labels, values)
        return family
