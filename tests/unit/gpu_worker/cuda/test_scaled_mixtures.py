"""Mixtures of 8-bit experts on the CUDA runner: the grouped kernel's log-probabilities are those of the CPU runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig

from gpu_worker.config import WorkerSettings
from gpu_worker.cuda.runner import CudaRunner
from gpu_worker.layers.scaled_experts import ScaledExperts
from gpu_worker.runner import TorchRunner
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.cuda.inline_runner import load_inline
from tests.unit.gpu_worker.cuda.test_mixtures import BASE

HIDDEN, INNER, EXPERTS = 64, 48, 4
FLOAT8 = torch.float8_e4m3fn
Setting = Literal["auto", "fp8", "int8"]


def compressed(number: str, strategy: str, inputs: dict[str, Any] | None, **weights: Any) -> dict[str, Any]:
    kind = {"float": "float-quantized", "int": "int-quantized"}[number]
    group = {
        "targets": ["re:.*experts.*"],
        "weights": {
            "num_bits": 8,
            "type": number,
            "strategy": strategy,
            "symmetric": True,
            "dynamic": False,
            **weights,
        },
        "input_activations": None if inputs is None else {"num_bits": 8, "type": number, "symmetric": True, **inputs},
    }
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}, "ignore": []}


TOKEN = {"strategy": "token", "dynamic": True}
ATTENTION = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8-block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 32],
        "modules_to_not_convert": ["lm_head", *ATTENTION, "model.layers.0.mlp.gate"],
    },
    "fp8-tensor-static": {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "ignored_layers": [*ATTENTION, "model.layers.0.mlp.gate"],
    },
    "ct-fp8-channel": compressed("float", "channel", TOKEN),
    "ct-fp8-weights-only": compressed("float", "channel", None),
    "ct-fp8-static": compressed("float", "tensor", {"strategy": "tensor", "dynamic": False}),
    "ct-int8-channel": compressed("int", "channel", TOKEN),
    "ct-int8-static": compressed("int", "channel", {"strategy": "tensor", "dynamic": False}),
}
QUICK = ("fp8-block",)


def save_eight_bit(directory: Path, name: str | None, inner: int = INNER) -> None:
    """Qwen3-MoE whose experts are stored as `name` says; None: plain."""
    torch.manual_seed(7)
    config = Qwen3MoeConfig(
        **BASE | {"hidden_size": HIDDEN, "num_hidden_layers": 1},
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=inner,
        norm_topk_prob=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    if name is None:
        return
    tensors = load_file(directory / "model.safetensors")
    for full in [full for full in tensors if ".experts." in full]:
        tensors |= _stored(full.removesuffix(".weight"), tensors.pop(full), name)
    save_file(tensors, directory / "model.safetensors")
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"] = CONFIGS[name]
    (directory / "config.json").write_text(json.dumps(fields))


def _stored(module: str, weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    kind = torch.int8 if "int8" in name else FLOAT8
    limit = 127 if kind == torch.int8 else 448
    scale_name = "weight_scale"
    if name == "fp8-block":
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32, 0, -weight.shape[0] % 32))
        scale = padded.unflatten(1, (-1, 32)).unflatten(0, (-1, 32)).abs().amax((1, 3)) / limit
        by_element = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[: weight.shape[0], : weight.shape[1]]
        scale_name = "weight_scale_inv"
    elif name in ("fp8-tensor-static", "ct-fp8-static"):
        by_element = scale = weight.abs().amax() / limit
    else:
        by_element = scale = weight.abs().amax(1, keepdim=True) / limit
    values = weight / by_element
    stored = {
        f"{module}.weight": (values.round() if kind == torch.int8 else values).to(kind),
        f"{module}.{scale_name}": scale.reshape(1) if scale.dim() == 0 and name.startswith("ct") else scale.clone(),
    }
    if "static" in name:
        # gate's and up's are equal, every expert has its own.
        expert = int(module.split(".experts.")[1].split(".")[0])
        step = 0.03 if kind == torch.int8 else 0.01
        stored[f"{module}.input_scale"] = torch.tensor(step * (1 + expert / 4))
    return stored


def compare(directory: Path, setting: Setting = "auto") -> CudaRunner:
    runner = load_inline(directory, quantization=setting)
    settings = WorkerSettings(
        model=directory, device="cpu", dtype="float32", cpu_kv_cache_gib=0.01, quantization=setting
    )
    ours, theirs = StepDriver(runner), StepDriver(TorchRunner.load(settings))
    for driver in (ours, theirs):
        driver.add(0, [3, 17, 9, 60, 31, 8, 44, 2, 12], greedy(num_logprobs=0))
        driver.add(2, [29], greedy(num_logprobs=0))
    for runs in ({0: 9}, {2: 1}, {0: 1, 2: 1}):
        first, second = (driver.step(runs).logprobs for driver in (ours, theirs))
        assert first is not None and second is not None
        # Half way between two 8-bit values the last bit of a sum decides.
        assert abs(first - second).max() < 0.02
    assert [row.tokens for row in ours.rows.values()] == [row.tokens for row in theirs.rows.values()]
    return runner


def experts_of(runner: Any) -> Any:
    return runner._program._model.blocks[0].mlp.experts


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_checkpoints_of_8_bit_experts(tmp_path: Path, name: str) -> None:
    save_eight_bit(tmp_path, name)
    experts = experts_of(compare(tmp_path))
    assert isinstance(experts, ScaledExperts)
    num_weights = EXPERTS * 3 * HIDDEN * INNER
    held = sum(part.num_bytes() for _, part in experts.weighted())
    assert num_weights < held < 1.2 * num_weights


@pytest.mark.parametrize(
    "setting", [pytest.param("fp8", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.slow)]
)
def test_plain_experts_are_quantized_while_they_are_loaded(tmp_path: Path, setting: Setting) -> None:
    save_eight_bit(tmp_path, None)
    assert isinstance(experts_of(compare(tmp_path, setting)), ScaledExperts)


def test_asymmetric_inputs_are_left_to_linears_of_their_own(tmp_path: Path) -> None:
    from gpu_worker.layers.moe import expert_form
    from gpu_worker.models.loader import read_spec
    from gpu_worker.quant.scheme import make_scheme

    save_eight_bit(tmp_path, "ct-int8-channel")
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"]["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    (tmp_path / "config.json").write_text(json.dumps(fields))
    scheme = make_scheme(tmp_path, read_spec(tmp_path)[1].name_rules)
    assert expert_form(scheme, "layers.0.mlp.experts", EXPERTS) is None
