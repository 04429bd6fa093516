"""When the runner captures and replays graphs; the captures themselves need a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import structlog
import torch

from gpu_worker.cuda.runner import GRAPHS_COMPLETE
from gpu_worker.cuda.step_graphs import CapturedStep, GraphCaptureError, GraphKey, GraphKind
from gpu_worker.server import WorkerServer, _Stop
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.cuda.inline_runner import load_inline
from tests.unit.gpu_worker.cuda.test_runner import prompt, save_model


class _Relaunch:
    """A graph on a device without graphs: its replay launches the step again."""

    def __init__(self, launch: Callable[[], torch.Tensor | None]) -> None:
        self._launch = launch
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        self._launch()


class _RelaunchGraphs:
    """`StepGraphs` for the interpreter."""

    def __init__(self, *, fails: bool = False) -> None:
        self.captured: dict[GraphKey, CapturedStep] = {}
        self._fails = fails

    def clear(self) -> None:
        self.captured.clear()

    def get(self, key: GraphKey) -> CapturedStep | None:
        return self.captured.get(key)

    def capture(self, key: GraphKey, launch: Callable[[], torch.Tensor | None]) -> CapturedStep:
        if self._fails:
            raise GraphCaptureError("this device has none")
        self.captured[key] = CapturedStep(_Relaunch(launch), None)
        return self.captured[key]


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_model(directory, "llama", num_heads=2, num_layers=1)
    return directory


def decode(directory: Path, graphs: Any, num_steps: int) -> list[list[int]]:
    runner = load_inline(directory)
    runner._graphs = graphs
    driver = StepDriver(runner)
    driver.add(0, prompt(1, 3), greedy())
    return [driver.step().token_ids.tolist() for _ in range(num_steps)]


def test_a_shape_is_captured_after_its_second_use_and_replayed_from_then_on(llama_dir: Path) -> None:
    graphs = _RelaunchGraphs()
    tokens = decode(llama_dir, graphs, 6)
    assert tokens == decode(llama_dir, None, 6)
    # One prefill, which is no shape for a graph here, and five decodes, of which two are eager.
    [(key, captured)] = graphs.captured.items()
    assert key.kind is GraphKind.PLAIN and key.shape.is_decode and key.shape.num_runs == 1
    assert captured.graph.num_replays == 3  # type: ignore[attr-defined]


def test_a_failed_capture_leaves_the_worker_eager(llama_dir: Path) -> None:
    assert decode(llama_dir, _RelaunchGraphs(fails=True), 5) == decode(llama_dir, None, 5)


def test_pauses_capture_every_shape_once_unless_a_step_is_in_flight(llama_dir: Path) -> None:
    runner = load_inline(llama_dir, max_num_seqs=3)
    graphs: Any = _RelaunchGraphs()
    runner._graphs = graphs
    driver = StepDriver(runner)
    driver.add(0, prompt(2, 3), greedy())
    driver.step()
    num_pauses = 0
    with structlog.testing.capture_logs() as logs:
        while runner.idle():
            num_pauses += 1
    # What measurements wait for is said once.
    assert [entry["graphs"] for entry in logs if entry["event"] == GRAPHS_COMPLETE] == [3]
    assert [key.shape.num_runs for key in graphs.captured] == [1, 2, 3] and num_pauses == 3
    assert not runner.idle()


class _Pausing:
    """Ends the server's wait in its third pause."""

    def __init__(self, server: WorkerServer) -> None:
        self.server, self.num_calls = server, 0

    def has_pause_work(self) -> bool:
        return True

    def idle(self) -> bool:
        self.num_calls += 1
        if self.num_calls == 3:
            self.server._work.put(_Stop())
        return True


def test_the_server_gives_pauses_to_a_runner_that_uses_them() -> None:
    server = WorkerServer("127.0.0.1:0")
    runner: Any = _Pausing(server)
    assert isinstance(server._next_work(runner), _Stop)
    assert runner.num_calls == 3


@pytest.mark.parametrize("what", ["work came a moment ago", "a step is under way"])
def test_a_gap_between_steps_is_no_pause(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = WorkerServer("127.0.0.1:0")
    runner: Any = _Pausing(server)
    server._work.put(_Stop())
    assert isinstance(server._next_work(runner), _Stop)
    if what == "a step is under way":
        monkeypatch.setattr("gpu_worker.server._PAUSE_S", 0.01)
        server._num_launched += 1
    else:
        monkeypatch.setattr("gpu_worker.server._PAUSE_S", 3600.0)
    timer = threading.Timer(0.2, server._work.put, [_Stop()])
    timer.start()
    assert isinstance(server._next_work(runner), _Stop)
    assert runner.num_calls == 0
    # The pause comes once the step is answered and nothing has come for long enough.
    server._num_completed = server._num_launched
    monkeypatch.setattr("gpu_worker.server._PAUSE_S", 0.01)
    assert isinstance(server._next_work(runner), _Stop)
    assert runner.num_calls == 3


class _EndsWhileNobodyLooks:
    """Work for a server of which a step ends in the first wait, and whose next step comes in the second."""

    def __init__(self, server: WorkerServer) -> None:
        self._server = server

    def get(self, timeout: float) -> _Stop:
        if self._server._num_completed == self._server._num_launched:
            return _Stop()
        self._server._num_completed += 1
        raise Empty

    def get_nowait(self) -> _Stop:
        raise Empty


def test_the_end_of_a_long_step_is_no_pause_yet() -> None:
    server = WorkerServer("127.0.0.1:0")
    runner: Any = _Pausing(server)
    work: Any = _EndsWhileNobodyLooks(server)
    server._num_launched, server._work = 1, work
    assert isinstance(server._next_work(runner), _Stop)
    assert runner.num_calls == 0
