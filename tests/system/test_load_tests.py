"""The driver's own command against a stack that it starts: simulated worker, control plane and gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from load_tests.control_plane import Rows
from load_tests.stack import SHAPES_DIRECTORY, ControlPlaneStack
from tests.system.conftest import ROOT, Stack, wait_until


def run_driver(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEPWIRE_")}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / source) for source in (".", "proto", "kernels"))
    environment["STEPWIRE_SIM_STEP_MS"] = "1"
    return subprocess.run(
        [sys.executable, "-m", "load_tests", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_served_shape_is_measured_over_both_apis(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    done = run_driver(
        *("shared-prefix", "--num-groups", "2", "--per-group", "4", "--prefix-len", "64", "--suffix-len", "16"),
        *("--output-len", "8", "--max-concurrency", "2", "--slo", "ttft=60s", "--out", str(out)),
        *("--serve", f"{SHAPES_DIRECTORY / 'qwen3-0.6b'} --runner simulated --max-model-len 512"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = read(out)
    assert [result["target"]["kind"] for result in results] == ["grpc", "rest"]
    for result in results:
        assert result["target"]["model"] == "qwen3-0.6b"
        assert [phase["name"] for phase in result["phases"]] == ["apart", "shared", "warm"]
        for phase in result["phases"]:
            numbers = phase["numbers"]
            assert (numbers["num_requests"], numbers["num_failed"]) == (8, 0)
            assert numbers["num_prompt_tokens"] == 8 * 80
            assert numbers["num_output_tokens"] == 8 * 8
            assert numbers["goodput"]["share_of_requests"] == 1
            assert set(phase["server"]) == {"gateway", "control_plane", "gpu_worker"}
            assert all(cost["cpu_s"] > 0 for cost in phase["server"].values())
        assert result["headline"]["apart_hit_rate"] == 0
        # 64 of 80 tokens are shared; with two at a time, the first two of a group may miss.
        assert result["headline"]["shared_hit_rate"] >= 0.8 * 4 / 8
        assert result["headline"]["warm_hit_rate"] == pytest.approx(0.8)
        assert result["machine"]["num_cores"] >= 1
        assert result["serve"]["ready_s"] > 0
    # Nobody hits by accident: the second target's prompts were other ones.
    assert results[0]["token_ids"]["seed"] != results[1]["token_ids"]["seed"]


def test_several_streams_and_processes_against_a_running_stack(stack: Stack, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    done = run_driver(
        *("random", "--num-requests", "12", "--input-len", "32", "--output-len", "6", "--rate", "100"),
        *("--grpc", stack.grpc_address, "--streams", "2", "--processes", "2", "--out", str(out), "--json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = read(out)
    # Nothing else is on standard output, and no bar where nobody looks.
    assert json.loads(done.stdout) == result and done.stderr == ""
    numbers = result["phases"][0]["numbers"]
    assert (numbers["num_requests"], numbers["num_failed"], numbers["num_output_tokens"]) == (12, 0, 72)
    assert result["phases"][0]["driver"]["num_processes"] == 2
    assert result["token_ids"]["limit"] < 10_000  # the vocabulary of this stack's model is smaller
    stack.wait_idle()


def test_a_context_that_is_too_short_is_said_before_anything_is_sent(stack: Stack) -> None:
    done = run_driver("prefill", "--input-len", "100000", "--grpc", stack.grpc_address)
    assert done.returncode == 1
    assert "serve it with --max-model-len 100001" in done.stderr


def test_a_target_is_needed() -> None:
    done = run_driver("nano")
    assert done.returncode == 2
    assert "--grpc HOST:PORT, --rest URL, or --serve" in done.stderr


async def test_a_window_of_steady_decoding_counts_its_steps() -> None:
    with ControlPlaneStack(["--sim-step-ms=4", "--sim-max-num-seqs=8"]) as running:
        async with Rows(running, num_rows=8, max_tokens=4000) as rows:
            begun = time.monotonic()
            window = await rows.window(0.5)
            elapsed_s = time.monotonic() - begun
            assert all(not record.ended_s and record.num_tokens > 0 for record in rows.records)
        assert window.num_steps > 0
        # No step is shorter than the worker's; two may have been in flight before.
        assert window.num_steps <= elapsed_s / 0.004 + 2
        assert 0 < window.control_plane.main_thread_s <= window.control_plane.total_s < window.wall_s * 8
        assert window.worker_cpu_s > 0
        # The rows were cancelled: their blocks come back.
        wait_until(lambda: running.metric("stepwire_kv_blocks_in_use") == [0.0], 10, running.log)
