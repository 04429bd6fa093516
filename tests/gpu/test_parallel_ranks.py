"""Two GPUs hold one model: what one GPU computes, within the rounding of the element type."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.test_cuda_runner import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize(
    ("kind", "flags", "limit"),
    [
        ("llama", ["--dtype=float32"], 1e-3),
        ("llama", ["--dtype=bfloat16"], 0.15),
        ("llama", ["--dtype=bfloat16", "--enforce-eager"], 0.15),
        ("llama", ["--dtype=bfloat16", "--quantization=fp8"], 0.5),
        ("qwen3", ["--dtype=bfloat16"], 0.15),
        ("llama", ["--dtype=float32", "--tensor-parallel-size=1", "--pipeline-parallel-size=2"], 1e-3),
        ("qwen3", ["--dtype=bfloat16", "--tensor-parallel-size=1", "--pipeline-parallel-size=2"], 0.15),
        pytest.param(
            "llama",
            ["--dtype=bfloat16", "--tensor-parallel-size=2", "--pipeline-parallel-size=2"],
            0.15,
            marks=pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices"),
        ),
    ],
    ids=str,
)
def test_two_ranks_compute_what_one_does(tmp_path: Path, kind: str, flags: list[str], limit: float) -> None:
    save_model(tmp_path, kind)
    command = [sys.executable, "-m", "load_tests.gpu.compare_ranks", str(tmp_path), *flags, f"--limit={limit}"]
    done = subprocess.run([*command, "--at-once"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["runner"] == "CudaRunner"
    assert len(report["devices"]) >= 2 and report["num_compared"] > 20
