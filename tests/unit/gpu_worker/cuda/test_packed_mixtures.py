"""Mixtures of quantized checkpoints on the CUDA runner: experts stay packed, and tokens are the CPU runner's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from gpu_worker.cuda.runner import CudaRunner
from gpu_worker.layers.packed_experts import PackedExperts, PackedFusedExperts
from gpu_worker.prepare.preparation import prepare
from gpu_worker.prepare.progress import SilentProgress
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.cuda.inline_runner import load_inline
from tests.unit.gpu_worker.cuda.test_mixtures import BASE
from tests.unit.gpu_worker.cuda.test_runner import assert_same, on_cpu

HIDDEN, INNER, EXPERTS, GROUP = 64, 32, 4, 32


def save_packed_qwen(directory: Path, method: str, inner: int = INNER) -> None:
    """Qwen3-MoE whose experts are random words in the layout of `method`; what they mean is the CPU runner's affair."""
    torch.manual_seed(7)
    config = Qwen3MoeConfig(
        **BASE | {"hidden_size": HIDDEN, "num_hidden_layers": 1},
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=inner,
        norm_topk_prob=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        n, k = tensors.pop(name).shape
        module = name.removesuffix(".weight")
        packed = {
            "awq": {"qweight": (k, n // 8), "qzeros": (k // GROUP, n // 8)},
            "gptq": {"qweight": (k // 8, n), "qzeros": (k // GROUP, n // 8)},
        }[method]
        for tensor, shape in packed.items():
            tensors[f"{module}.{tensor}"] = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
        tensors[f"{module}.scales"] = (torch.rand(k // GROUP, n) * 0.04 + 0.01).half()
    save_file(tensors, directory / "model.safetensors")
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP, "zero_point": True}
    (directory / "config.json").write_text(json.dumps(fields))


def compare(directory: Path) -> CudaRunner:
    runner = load_inline(directory)
    ours, theirs = StepDriver(runner), on_cpu(directory)
    for driver in (ours, theirs):
        driver.add(0, [3, 17, 9, 36, 31, 8, 34, 2, 12], greedy(num_logprobs=0))
        driver.add(2, [29], greedy(num_logprobs=0))
    steps: list[dict[int, int] | None] = [{0: 9}, {2: 1}, None]
    for runs in steps:
        results = [driver.step(runs) for driver in (ours, theirs)]
        assert_same(*results)
        logprobs = [result.logprobs for result in results]
        if logprobs[0] is not None and logprobs[1] is not None:
            assert abs(logprobs[0] - logprobs[1]).max() < 1e-3
    assert [row.tokens for row in ours.rows.values()] == [row.tokens for row in theirs.rows.values()]
    return runner


def experts_of(runner: Any) -> Any:
    return runner._program._model.blocks[0].mlp.experts


@pytest.mark.parametrize("method", ["awq", pytest.param("gptq", marks=pytest.mark.slow)])
def test_experts_in_groups(tmp_path: Path, method: str) -> None:
    save_packed_qwen(tmp_path, method)
    experts = experts_of(compare(tmp_path))
    assert isinstance(experts, PackedExperts)
    num_weights = EXPERTS * 3 * HIDDEN * INNER
    held = sum(part.num_bytes() for _, part in experts.weighted())
    # Codes of 64 inputs are filled up to 128; a scale in 16 and a zero point in 8 bits for every 32.
    assert num_weights / 2 < held < 2 * num_weights


def save_packed_gpt_oss(directory: Path, inner: int = INNER) -> None:
    torch.manual_seed(8)
    config = GptOssConfig(
        **BASE | {"hidden_size": HIDDEN, "intermediate_size": inner, "num_hidden_layers": 1},
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        sliding_window=11,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name, rows, columns in (("gate_up_proj", 2 * inner, HIDDEN), ("down_proj", HIDDEN, inner)):
        full = f"model.layers.0.mlp.experts.{name}"
        tensors.pop(full)
        tensors[f"{full}_blocks"] = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16)).to(torch.uint8)
        tensors[f"{full}_scales"] = torch.randint(121, 125, (EXPERTS, rows, columns // 32)).to(torch.uint8)
    save_file(tensors, directory / "model.safetensors")
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(fields))


def test_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    save_packed_gpt_oss(tmp_path)
    experts = experts_of(compare(tmp_path))
    assert isinstance(experts, PackedFusedExperts)
    assert experts.gate_up.packed is not None and experts.gate_up.dense is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "gate_up", "down"),
    [
        ("qwen3moe", "Q4_0", "Q8_0"),
        ("gpt-oss", "MXFP4", "MXFP4"),
        ("mixtral", "Q5_1", "Q4_0"),
        ("mixtral", "Q8_0", "IQ4_NL"),
    ],
)
def test_experts_of_a_gguf_file(tmp_path: Path, architecture: str, gate_up: str, down: str) -> None:
    """Types differ within a layer; of one that has no kernel the layer's experts are held in the model's type."""
    from gguf import GGMLQuantizationType as Kind

    from tests.unit.gpu_worker.loading.synthetic_gguf import write_gguf

    kinds = {"ffn_gate_exps": gate_up, "ffn_up_exps": gate_up, "ffn_down_exps": down}
    quantized = {f"blk.{layer}.{name}.weight": Kind[kind] for layer in (0, 1) for name, kind in kinds.items()}
    write_gguf(tmp_path / "m.gguf", architecture, quantized=quantized)
    directory = prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype="packed", progress=SilentProgress()).path
    experts = experts_of(compare(directory))
    assert isinstance(experts, PackedExperts)
    assert (experts.gate_up.packed is not None) == (down != "IQ4_NL")
