"""`--record` of a worker and `stepwire replay`, as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openai
import pytest
from stepwire.v1 import worker_pb2
from stepwire.v1.recording_pb2 import RecordingEntry

from gpu_worker.recording import read_recording, write_entry
from gpu_worker.runner_api import TokenMask
from tests.system.launched import Launched
from tests.system.worker_process import REPOSITORY, WorkerClient, WorkerProcess, WorkerSession
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny
from tests.unit.gpu_worker.step_builder import Run, row_add, step, uint32

# A profiled runner that has something to prepare, and a process that goes on for longer than a server's end may take.
WITH_PAUSES = """
import sys, time
from gpu_worker.replay.__main__ import Replay
from gpu_worker.replay.profile import ProfiledRunner
from gpu_worker.replay.settings import parse_replay
from gpu_worker.server import _LAST_RESORT_S
from gpu_worker.simulated import SimulatedRunner, SimulationSpec

class Pausing(SimulatedRunner):
    left = 3

    def has_pause_work(self):
        return self.left > 0

    def idle(self):
        self.left -= self.left > 0
        return self.left > 0

    def execute(self, batch, wait_for_mask):
        assert self.left == 0, "a step before everything is prepared"
        return super().execute(batch, wait_for_mask)

path, settings = parse_replay(sys.argv[1:])
profiled = ProfiledRunner(Pausing(SimulationSpec.from_settings(settings)), None)
code = Replay(path, settings).run(profiled)
time.sleep(_LAST_RESORT_S + 0.5)
print("alive", code, len(profiled.read_steps()))
"""
FLAGS = ["--runner=simulated", "--log-format=json", "--sim-step-ms=0", "--sim-vocab-size=64"]
NUM_STEPS = 12


def replay(path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "gateway.cli", "replay", str(path), *flags)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEPWIRE_")}
    environment["PYTHONPATH"] = os.pathsep.join([".", "proto", "kernels"])
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def drive(session: WorkerSession, *, read_all: bool = True) -> None:
    """One row, two steps in flight, the 5th step masked; then a row that comes and goes."""
    session.step(step(1, [Run(0, 0, 20)], adds=[row_add(0, range(20), [1, 2], num_logprobs=2)]))
    for step_id in range(2, NUM_STEPS + 1):
        is_masked = step_id == 5
        session.step(step(step_id, [Run(0, 18 + step_id)], mask_rows=[0] if is_masked else []))
        assert session.result().step_id == step_id - 1
        if is_masked:
            words = np.array([[1 << 9, 0]], dtype=np.uint32)
            session.mask(5, TokenMask(rows=uint32([0]), bitmask=words))
    if read_all:
        assert session.result().step_id == NUM_STEPS


def start(listen: str, path: Path, *flags: str) -> WorkerProcess:
    worker = WorkerProcess([*FLAGS, f"--listen={listen}", f"--record={path}", *flags])
    worker.wait_for_event("worker ready")
    return worker


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sessions of one worker that is killed in the third, and one of the next worker, ended by SIGTERM."""
    directory = tmp_path_factory.mktemp("recording")
    listen, path = f"unix:{directory}/w.sock", directory / "steps"
    with start(listen, path) as worker, WorkerClient(listen) as client:
        for name in ("one", "two"):
            session = client.start(name)
            drive(session)
            session.half_close()
            session.end()
        drive(client.start("three"))
        worker.send_signal(signal.SIGKILL)
        worker.wait_for_exit()
    with path.open("ab") as file:
        file.write(b"\x90\x01 what a crash has cut off")
    with start(listen, path) as worker, WorkerClient(listen) as client:
        drive(client.start("four"))
        worker.send_signal(signal.SIGTERM)
        assert worker.wait_for_exit() == 0
    return path


def test_everything_is_written_in_the_order_it_was_in(recording: Path) -> None:
    entries = list(read_recording(recording))
    hellos = [entry.hello.session_id for entry in entries if entry.WhichOneof("entry") == "hello"]
    assert hellos == ["one", "two", "three", "four"]
    first = [(kind, getattr(entry, kind)) for entry in entries if (kind := entry.WhichOneof("entry"))]
    order = [(kind, message.step_id) for kind, message in first if kind in ("step", "mask", "result")]
    assert order[:3] == [("step", 1), ("step", 2), ("result", 1)] or order[:3] == [
        ("step", 1),
        ("result", 1),
        ("step", 2),
    ]
    assert ("mask", 5) in order and order.index(("mask", 5)) > order.index(("result", 4))
    headers = [entry.header for entry in entries if entry.WhichOneof("entry") == "header"]
    assert len(headers) == 2 and headers[0].worker.instance_id != headers[1].worker.instance_id
    # Of a worker that was ended in order, everything is there.
    last = entries[-1]
    assert last.result.step_id == NUM_STEPS


def test_a_replay_agrees(recording: Path) -> None:
    done = replay(recording)
    assert done.returncode == 0, done.stderr
    assert "steps agree" in done.stdout and "4 sessions" in done.stdout
    assert "log-probabilities are the same to the bit" in done.stdout


def rewrite(source: Path, target: Path, change: Callable[[RecordingEntry], None]) -> None:
    with target.open("wb") as file:
        for entry in read_recording(source):
            change(entry)
            write_entry(file, entry)


def test_the_first_step_that_differs_is_named(recording: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def change(entry: RecordingEntry) -> None:
        if entry.WhichOneof("entry") == "result" and entry.result.step_id == 7:
            seen.append(np.frombuffer(entry.result.token_ids, dtype="<u4").item())
            if len(seen) == 2:
                entry.result.token_ids = np.array([(seen[-1] + 1) % 64], dtype="<u4").tobytes()

    rewrite(recording, tmp_path / "changed", change)
    done = replay(tmp_path / "changed")
    assert done.returncode == 1
    expected = f"session 2, step 7, row 0, position 26: expected token {(seen[1] + 1) % 64}, got token {seen[1]}"
    assert expected in done.stdout


def test_a_cut_off_file_replays_up_to_there(recording: Path, tmp_path: Path) -> None:
    data = recording.read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(data[: len(data) // 3])
    done = replay(cut)
    assert done.returncode == 0, done.stderr
    assert "steps agree" in done.stdout and "cut off" in done.stderr


def test_what_does_not_fit_is_said(recording: Path, tmp_path: Path) -> None:
    assert "raise --max-num-seqs" in replay(recording, "--max-num-seqs=2").stderr
    smaller = replay(recording, "--sim-vocab-size=32")
    assert smaller.returncode == 1 and "vocab_size 64, this one has 32" in smaller.stderr
    nothing = replay(tmp_path / "none")
    assert nothing.returncode == 1 and "No such file" in nothing.stderr

    def refuse(entry: RecordingEntry) -> None:
        if entry.WhichOneof("entry") == "step" and entry.step.step_id == 3:
            entry.step.run_rows = np.array([9999], dtype="<u4").tobytes()

    rewrite(recording, tmp_path / "refused", refuse)
    refused = replay(tmp_path / "refused")
    assert refused.returncode == 1 and "the worker ended session 1" in refused.stderr and "9999" in refused.stderr


def test_a_file_that_is_something_else_keeps_a_worker_from_starting(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("these are notes, and no recording of any steps whatsoever")
    with WorkerProcess([*FLAGS, f"--listen=unix:{tmp_path}/w.sock", f"--record={tmp_path}/notes"]) as worker:
        assert worker.wait_for_exit() == 1
    assert "is not a recording" in worker.lines[-1]


def test_unanswered_steps_are_left_out(tmp_path: Path) -> None:
    """A worker that crashes at a step, with one more in flight: both are written, neither is played."""
    listen, path = f"unix:{tmp_path}/w.sock", tmp_path / "steps"
    with start(listen, path, "--sim-crash-at-step=4", "--log-level=debug") as worker, WorkerClient(listen) as client:
        session = client.start()
        session.step(step(1, [Run(0, 0, 4)], adds=[row_add(0, range(4), [1])]))
        assert session.result().step_id == 1
        # The second one waits for its mask until all of them have come.
        for step_id in (2, 3, 4, 5):
            session.step(step(step_id, [Run(0, 2 + step_id)], mask_rows=[0] if step_id == 2 else []))
        for _ in range(5):
            worker.wait_for_event("step queued", then_forget=True)
        session.mask(2, TokenMask(rows=uint32([0]), bitmask=np.array([[1 << 9, 0]], dtype=np.uint32)))
        session.end()
        assert worker.wait_for_exit() == 1
    steps = [entry.step.step_id for entry in read_recording(path) if entry.WhichOneof("entry") == "step"]
    assert steps == [1, 2, 3, 4, 5]
    done = replay(path)
    assert done.returncode == 0, done.stderr
    # A result that the crash overtook was not sent, and is not written either.
    num_results = sum(entry.WhichOneof("entry") == "result" for entry in read_recording(path))
    assert 1 <= num_results <= 3 and f"all {num_results} steps agree" in done.stdout
    assert isinstance(next(read_recording(path)).header.worker, worker_pb2.DescribeResponse)


@pytest.fixture(scope="module")
def model_recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a worker that computes a small model: a prefill, decodes of one and of two rows, a mixed step."""
    directory = tmp_path_factory.mktemp("model")
    save_tiny("qwen3", directory / "tiny")
    listen, path = f"unix:{directory}/w.sock", directory / "steps"
    flags = ["--log-format=json", f"--model={directory}/tiny", "--device=cpu", "--dtype=float32", "--num-threads=1"]
    flags += ["--cpu-kv-cache-gib=0.01", f"--listen={listen}", f"--record={path}"]
    with WorkerProcess(flags) as worker, WorkerClient(listen) as client:
        # It imports torch.
        worker.wait_for_event("worker ready", timeout_s=240)
        session = client.start()
        session.step(step(1, [Run(0, 0, 12)], adds=[row_add(0, range(12), [1, 2], num_logprobs=1)]))
        for step_id in range(2, 6):
            session.step(step(step_id, [Run(0, 10 + step_id)]))
            session.result()
        session.step(step(6, [Run(0, 16), Run(1, 0, 9)], adds=[row_add(1, range(9), [3], seed=3)]))
        for step_id in range(7, 10):
            session.step(step(step_id, [Run(0, 10 + step_id), Run(1, 2 + step_id)]))
            session.result()
        for _ in range(2):
            session.result()
        worker.send_signal(signal.SIGTERM)
        worker.wait_for_exit()
    return path


# A profile of what a server has recorded is in every run: below.
@pytest.mark.slow
def test_a_profile_of_a_model(model_recording: Path, tmp_path: Path) -> None:
    done = replay(model_recording, "--profile", "--json", f"--trace={tmp_path}/trace.json")
    assert done.returncode == 0, done.stderr
    profile = json.loads(done.stdout)
    assert profile["replay"].startswith("all 9 steps agree")
    assert "same to the bit" in profile["replay"]
    classes = {one["class"]: one for one in profile["classes"]}
    assert {name: one["steps"] for name, one in classes.items()} == {
        "decode 1": 4,
        "decode 2": 3,
        "mixed": 1,
        "prefill": 1,
    }
    for one in classes.values():
        times = one["us_per_step"]
        parts = [times[name] for name in ("input", "attention", "linears", "sampler", "other")]
        assert all(part > 0 for part in parts)
        # Each number is rounded to 0.01.
        assert sum(parts) + times["gaps"] == pytest.approx(times["wall"], abs=0.1)
        assert "layer layers.mlp.gate_up" in one["operations_us"]
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) > 100


@pytest.mark.slow
def test_a_profile_as_a_table(model_recording: Path) -> None:
    table = replay(model_recording, "--profile")
    assert table.returncode == 0 and "decode 2" in table.stdout and "all 9 steps agree" in table.stdout


def test_a_profile_is_taken_when_all_is_prepared_and_read_after_the_server_has_ended(recording: Path) -> None:
    done = python("-c", WITH_PAUSES, str(recording), "--profile")
    # Those that were answered: the killed worker's last one may not have been written.
    num_steps = sum(entry.WhichOneof("entry") == "result" for entry in read_recording(recording))
    assert num_steps >= 4 * NUM_STEPS - 1
    assert done.returncode == 0 and f"alive 0 {num_steps}\n" in done.stdout, done.stdout + done.stderr


def test_a_profile_needs_its_flag(recording: Path) -> None:
    done = replay(recording, "--json")
    assert done.returncode == 2 and "--profile" in done.stderr


def complete(served: Launched, prompts: list[list[int]]) -> None:
    client = openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=120)
    for temperature in (0.0, 0.8):
        made = client.completions.create(
            model=client.models.list().data[0].id,
            prompt=prompts,
            max_tokens=8,
            temperature=temperature,
            seed=5,
            logprobs=2,
            extra_body={"ignore_eos": True},
        )
        assert len(made.choices) == len(prompts)
    client.close()


def test_what_a_server_has_recorded_replays(tmp_path: Path) -> None:
    """The flag from `stepwire serve` down to the worker; two prompts at once, greedy and then sampled."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000}
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    path = tmp_path / "steps"
    with Launched(tmp_path / "bare", "--runner=simulated", f"--record={path}") as served:
        complete(served, [[1, 2, 3], list(range(40))])
    done = replay(path)
    assert done.returncode == 0, done.stderr
    assert "steps agree" in done.stdout
    tokens = [entry.result.token_ids for entry in read_recording(path) if entry.WhichOneof("entry") == "result"]
    assert sum(len(ids) // 4 for ids in tokens) == 2 * 2 * 8


@pytest.mark.slow
def test_a_deterministic_server_replays_to_the_bit(tmp_path: Path) -> None:
    """With the settings of the recording: its threads, its dtype."""
    save_tiny("llama", tmp_path / "tiny")
    path = tmp_path / "steps"
    flags = ("--device=cpu", "--dtype=float32", "--cpu-kv-cache-gib=0.05", "--num-threads=2", "--deterministic")
    with Launched(tmp_path / "tiny", *flags, f"--record={path}") as served:
        complete(served, [[1, 2, 3], list(range(40))])
    done = replay(path)
    assert done.returncode == 0, done.stderr
    assert "steps agree" in done.stdout and "log-probabilities are the same to the bit" in done.stdout
