"""Mixtures of quantized experts on a GPU: compiled grouped kernels, in graphs, against the CPU runner in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_worker.config import WorkerSettings
from gpu_worker.cuda.loading import load_cuda_runner
from gpu_worker.cuda.runner import CudaRunner
from gpu_worker.runner import TorchRunner
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.cuda.test_packed_mixtures import save_packed_gpt_oss, save_packed_qwen
from tests.unit.gpu_worker.cuda.test_scaled_mixtures import CONFIGS, save_eight_bit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def drive(directory: Path, tolerance: float, setting: Any = "auto") -> None:
    """A prefill, a mixed step, decodes until their graph is used; every drawn token's log-probability."""
    values: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 96, "dtype": "float32", "quantization": setting}
    on_device = WorkerSettings(model=directory, device="cuda", gpu_memory_utilization=0.05, **values)
    runner = load_cuda_runner(on_device, torch.device("cuda", 0))
    assert isinstance(runner, CudaRunner)
    on_cpu = WorkerSettings(model=directory, device="cpu", cpu_kv_cache_gib=0.01, **values)
    drivers = StepDriver(runner), StepDriver(TorchRunner.load(on_cpu))
    for driver in drivers:
        driver.add(0, [3, 17, 9, 36, 31, 8, 34, 2, 12], greedy(num_logprobs=0))
        driver.add(2, [5 + index % 30 for index in range(59)], greedy(num_logprobs=0))
    for runs in ({0: 9}, {0: 1, 2: 59}, *[{0: 1, 2: 1}] * 6):
        results = [driver.step(runs) for driver in drivers]
        first, second = (result.logprobs for result in results)
        assert first is not None and second is not None
        if results[0].token_ids.tolist() != results[1].token_ids.tolist():
            # A near tie: from here on the texts differ, and the log-probabilities of what was drawn still agree.
            assert abs(first - second).max() < tolerance
            return
        assert abs(first - second).max() < tolerance
    assert not runner._capture_failed


@pytest.mark.parametrize("name", CONFIGS)
def test_8_bit_experts(tmp_path: Path, name: str) -> None:
    save_eight_bit(tmp_path, name)
    drive(tmp_path, 0.02)


@pytest.mark.parametrize("setting", ["fp8", "int8"])
def test_experts_quantized_while_they_are_loaded(tmp_path: Path, setting: str) -> None:
    save_eight_bit(tmp_path, None)
    # int8 inputs of all linears: embeddings that differ by 1e-6 move the CPU runner's own by 0.02 to 0.04.
    drive(tmp_path, 0.06 if setting == "int8" else 0.02, setting)


@pytest.mark.parametrize("method", ["awq", "gptq", "mxfp4"])
def test_packed_experts(tmp_path: Path, method: str) -> None:
    if method == "mxfp4":
        save_packed_gpt_oss(tmp_path)
    else:
        save_packed_qwen(tmp_path, method)
    drive(tmp_path, 2e-3)


@pytest.mark.parametrize(
    ("architecture", "gate_up", "down"),
    [("qwen3moe", "Q4_0", "Q8_0"), ("gpt-oss", "MXFP4", "MXFP4"), ("mixtral", "Q5_1", "IQ4_NL")],
)
def test_experts_of_a_gguf_file(tmp_path: Path, architecture: str, gate_up: str, down: str) -> None:
    gguf = pytest.importorskip("gguf")
    from gpu_worker.prepare.preparation import prepare
    from gpu_worker.prepare.progress import SilentProgress
    from tests.unit.gpu_worker.loading.synthetic_gguf import write_gguf

    kinds = {"ffn_gate_exps": gate_up, "ffn_up_exps": gate_up, "ffn_down_exps": down}
    quantized = {
        f"blk.{layer}.{name}.weight": gguf.GGMLQuantizationType[kind]
        for layer in (0, 1)
        for name, kind in kinds.items()
    }
    write_gguf(tmp_path / "m.gguf", architecture, quantized=quantized)
    drive(prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype="packed", progress=SilentProgress()).path, 2e-3)
