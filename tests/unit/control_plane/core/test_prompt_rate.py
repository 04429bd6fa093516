"""How fast the queue empties: a sum over the last seconds that costs the same however many requests came."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from control_plane.core import metrics as core_metrics
from control_plane.core.metrics import CoreMetrics


def start(num_tokens: int, index: int = 0) -> SimpleNamespace:
    request = SimpleNamespace(arrival_s=0.0)
    return SimpleNamespace(
        sequence=SimpleNamespace(request=request, index=index, output_ids=[], num_prompt_tokens=num_tokens)
    )


def test_prompt_tokens_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(core_metrics.time, "monotonic", lambda: now)
    metrics = CoreMetrics(CollectorRegistry())
    note = metrics.of_group(0).note_start
    for second in range(30):
        now = 100.0 + second
        note(start(50), now)  # type: ignore[arg-type]
        note(start(1000, index=1), now)  # type: ignore[arg-type]
    # Those of the last ten seconds, both ends in; a request's other sequences read nothing.
    assert metrics.prompt_tokens_per_s() == 11 * 50 / 10
    now += 11
    assert metrics.prompt_tokens_per_s() == 0
