"""The engine with a real simulated worker: what goes wrong with one request stays with it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from control_plane.core.engine import Engine
from control_plane.core.engine_config import EngineConfig
from control_plane.core.metrics import CoreMetrics
from control_plane.core.request import CoreRequest, RequestFault, SamplingParams, SequenceOutput
from control_plane.core.worker_link import WorkerAddress

from .launched import ROOT


class Sink:
    """Collects outputs; fails at the one whose number is given."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.token_ids: list[int] = []
        self.fails_at = fails_at
        self.end: asyncio.Future[RequestFault | None] = asyncio.get_running_loop().create_future()

    def on_token(self, index: int, token_id: int) -> None:
        self.on_output(SequenceOutput(index, [token_id], 1))

    def on_output(self, output: SequenceOutput) -> None:
        if len(self.token_ids) == self.fails_at:
            raise RuntimeError("planted")
        self.token_ids += output.token_ids

    def on_end(self, num_cached_tokens: int, fault: RequestFault | None) -> None:
        self.end.set_result(fault)


def request(number: int, max_tokens: int = 40) -> CoreRequest:
    prompt = np.arange(number, number + 9, dtype=np.uint32)
    return CoreRequest(f"r{number}", prompt, SamplingParams(seed=number), max_tokens=max_tokens)


def start_worker(directory: Path, *flags: str) -> subprocess.Popen[bytes]:
    own = ["--runner=simulated", f"--listen=unix:{directory}/w.sock", "--exit-with-parent"]
    return subprocess.Popen([sys.executable, "-m", "gpu_worker", *own, *flags], cwd=ROOT)


@asynccontextmanager
async def running_engine(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = Engine([WorkerAddress(f"unix:{tmp_path}/w.sock")], EngineConfig(), CoreMetrics(CollectorRegistry()))
    running = asyncio.create_task(engine.run())
    try:
        async with asyncio.timeout(120):
            await engine.wait_connected()
        yield engine
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    worker = start_worker(tmp_path)
    async with running_engine(tmp_path) as engine:
        yield engine
    worker.terminate()
    worker.wait()


async def test_an_output_that_cannot_be_delivered_ends_its_request_alone(engine: Engine) -> None:
    sinks = [Sink(), Sink(fails_at=3), Sink()]
    for number, sink in enumerate(sinks):
        engine.submit(request(number), sink)
    async with asyncio.timeout(120):
        ends = [await sink.end for sink in sinks]
    assert ends[0] is None and ends[2] is None
    assert ends[1] is not None and ends[1].code == "INTERNAL"
    assert [len(sink.token_ids) for sink in sinks] == [40, 3, 40]


@pytest.mark.parametrize(("step_ms", "window"), [(0.5, 3), (20.0, 2)])
async def test_short_steps_have_a_third_in_flight(tmp_path: Path, step_ms: float, window: int) -> None:
    seen: set[int] = set()

    class Counting(Sink):
        def on_output(self, output: SequenceOutput) -> None:
            scheduler = engine.groups[0].scheduler
            seen.add(0 if scheduler is None else scheduler.num_in_flight)
            super().on_output(output)

    worker, sink = start_worker(tmp_path, f"--sim-step-ms={step_ms}"), Counting()
    async with running_engine(tmp_path) as engine, asyncio.timeout(120):
        engine.submit(request(0), sink)
        assert await sink.end is None
    assert max(seen) == window and len(sink.token_ids) == 40
    worker.terminate()
    worker.wait()


async def test_nothing_is_left_to_drain_after_the_last_cancel(engine: Engine, tmp_path: Path) -> None:
    engine.submit(request(0, max_tokens=4000), Sink())
    engine.cancel("r0")
    assert await engine.drain(120.0)


@pytest.mark.parametrize(("number", "is_suspect"), [(signal.SIGTERM, False), (signal.SIGKILL, True)])
async def test_nobody_is_suspected_where_workers_are_told_to_end(
    tmp_path: Path, number: signal.Signals, is_suspect: bool
) -> None:
    """Two workers in a row, each in the middle of a request's steps; what is lost that often is suspected."""
    slow, sink = "--sim-step-ms=300", Sink()
    worker = start_worker(tmp_path, slow)
    async with running_engine(tmp_path) as engine, asyncio.timeout(120):
        (group,) = engine.groups
        engine.submit(request(0, max_tokens=20), sink)
        for _ in range(2):
            while group.scheduler is None or group.scheduler.num_in_flight == 0:
                await asyncio.sleep(0.02)
            worker.send_signal(number)
            await engine.wait_lost()
            await asyncio.to_thread(worker.wait)
            worker = start_worker(tmp_path, slow)
            await engine.wait_connected()
        assert group.scheduler is not None
        assert (group.scheduler.num_suspects > 0) == is_suspect
        assert group.metrics.losses._value.get() == 2 * is_suspect
        assert await sink.end is None and len(sink.token_ids) == 20
    worker.kill()
    worker.wait()
