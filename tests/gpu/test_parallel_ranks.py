"""Two GPUs hold one model: what one GPU computes, within the rounding of the element type."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.gpu.test_cuda_runner import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

GROUP = 32
# Shapes of a linear's int32 tensors with 4-bit codes, from its numbers of outputs and inputs.
PACKED_TENSORS: dict[str, Callable[[int, int], dict[str, tuple[int, int]]]] = {
    "awq": lambda n, k: {"qweight": (k, n // 8), "qzeros": (k // GROUP, n // 8)},
    "gptq": lambda n, k: {"qweight": (k // 8, n), "qzeros": (k // GROUP, n // 8)},
}


def pack_linears(directory: Path, method: str) -> None:
    """Random words in place of every block's linears; what they mean is the same for one rank and for two."""
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        n, k = tensors.pop(name).shape
        module = name.removesuffix(".weight")
        for tensor, shape in PACKED_TENSORS[method](n, k).items():
            tensors[f"{module}.{tensor}"] = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
        tensors[f"{module}.scales"] = (torch.rand(k // GROUP, n) * 0.01 + 0.005).half()
    save_file(tensors, directory / "model.safetensors")
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP, "zero_point": True}
    (directory / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("kind", "flags", "limit"),
    [
        ("llama", ["--dtype=float32"], 1e-3),
        ("llama", ["--dtype=bfloat16"], 0.15),
        ("llama", ["--dtype=bfloat16", "--enforce-eager"], 0.15),
        # Sums that are under way while products go on.
        ("llama", ["--dtype=float32", "--prompt-scale=10"], 1e-3),
        ("llama", ["--dtype=bfloat16", "--quantization=fp8"], 0.5),
        ("qwen3", ["--dtype=bfloat16"], 0.15),
        ("awq", ["--dtype=bfloat16"], 0.15),
        ("gptq", ["--dtype=bfloat16"], 0.15),
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
    save_model(tmp_path, "llama" if kind in PACKED_TENSORS else kind)
    if kind in PACKED_TENSORS:
        pack_linears(tmp_path, kind)
    command = [sys.executable, "-m", "load_tests.gpu.compare_ranks", str(tmp_path), *flags, f"--limit={limit}"]
    done = subprocess.run([*command, "--at-once"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["runner"] == "CudaRunner"
    assert bool(report["sums_begun_early"]) == ("--prompt-scale=10" in flags)
    assert len(report["devices"]) >= 2 and report["num_compared"] > 20
    if "--dtype=float32" in flags:
        assert report["equal_tokens"] > 0.97


@pytest.mark.skipif(torch.cuda.device_count() > 3, reason="four ranks would have a device each")
def test_more_ranks_than_devices_are_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    command = [sys.executable, "-m", "gpu_worker", f"--model={tmp_path}", f"--listen=unix:{tmp_path}/w.sock"]
    done = subprocess.run([*command, "--tensor-parallel-size=4"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    num_devices = torch.cuda.device_count()
    assert f"rank {num_devices} (tensor-parallel rank {num_devices} of 4): this node has {num_devices}" in done.stderr
    assert "set a smaller --tensor-parallel-size" in done.stderr
