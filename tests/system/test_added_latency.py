"""What the bench of added latency sees: every token once, with its delay, whoever reads it."""

from __future__ import annotations

from load_tests.added_latency import MAX_MODEL_LEN, measure_streams, running
from load_tests.stamping_worker import write_stamp_model

STEP_MS = 20.0


def test_delays_of_streams_are_measured_by_several_readers() -> None:
    flags = ("--gateway-processes", "2")
    with running(
        lambda directory: write_stamp_model(directory, MAX_MODEL_LEN), STEP_MS, 3, "load_tests.stamping_worker", flags
    ) as services:
        numbers = measure_streams(services, 1.0, driver_processes=2)
    # A token a step and stream, however slow the machine is; none is read twice.
    assert 0 < numbers["tokens_per_s"] <= 3 * 1000 / STEP_MS + 3
    assert 0 < numbers["added_ms"]["p50"] <= numbers["added_ms"]["p999"]
    assert numbers["tokens_per_read"] > 0
    assert all(numbers["cpu_us_per_token"][name] > 0 for name in ("gateway", "control_plane", "gpu_worker", "driver"))
