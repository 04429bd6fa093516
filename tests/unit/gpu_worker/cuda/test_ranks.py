"""Two ranks of the CUDA runner against one CPU runner: the same tokens from the same steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.gpu_worker.cuda.forked_ranks import drive
from tests.unit.gpu_worker.cuda.test_runner import on_cpu, save_model


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        # Spinning under the interpreter, each takes the time that the other one needs.
        pytest.param("llama", "tensor", marks=pytest.mark.slow),
        pytest.param("llama", "dealt", marks=pytest.mark.slow),
        pytest.param("llama", "early", marks=pytest.mark.slow),
        pytest.param("qwen3", "early", marks=pytest.mark.slow),
        ("llama", "pipeline"),
        # One table for embedding and head, of which either stage has a copy.
        pytest.param("qwen3", "pipeline", marks=pytest.mark.slow),
        pytest.param("qwen3", "tensor", marks=pytest.mark.slow),
    ],
)
def test_ranks_draw_what_one_worker_draws(tmp_path: Path, kind: str, mode: str) -> None:
    # Stages split no heads, and the interpreter's time goes with them.
    save_model(tmp_path, kind, num_heads=2 if mode == "pipeline" else 4)
    expected = drive(on_cpu(tmp_path))
    command = [sys.executable, "-m", "tests.unit.gpu_worker.cuda.forked_ranks", str(tmp_path), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(found["rank"] for found in ranks) == [0, 1]
    for found in ranks:
        # Of two layers' four sums the last is left to the rows that are sampled; all steps but one have several rows.
        assert (found["sums_begun"] > 0 and found["sums_begun"] % 3 == 0) == (mode == "early")
        assert (found["tokens"], found["dropped"]) == (expected["tokens"], expected["dropped"])
        assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)
        # The first stage has no logits, and waits for what the last one says of prompts.
        is_told = mode == "pipeline" and found["rank"] == 0
        assert found["awaits_prompts"] == is_told
        assert len(found["prompts"]) == (0 if is_told else 1) and len(expected["prompts"][0]) == 3
        for told in found["prompts"]:
            assert told == pytest.approx(expected["prompts"][0], abs=1e-4)
