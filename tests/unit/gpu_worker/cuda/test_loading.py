"""Which models the CUDA runner leaves to plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_worker.assembly import Sizes, attention_spec, held_kv_scales, without_idle_indexer
from gpu_worker.attention.triton_backend import unsupported_attention
from gpu_worker.config import WorkerSettings
from gpu_worker.cuda.loading import _packed_experts, _token_counts_of_tiles
from gpu_worker.loading.kv_scales import KVScales
from gpu_worker.models.gemma4 import Gemma4
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.shares import ParallelContext
from tests.unit.gpu_worker.cuda.test_mixtures import KINDS


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a chip can do is asked of torch, which finds none here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a chip")


def reason(
    directory: Path, kind: str, quantization: str = "auto", max_model_len: int = 96, **fields: Any
) -> str | None:
    config = KINDS[kind]().to_dict() | fields
    config["architectures"] = [type(KINDS[kind]()).__name__.replace("Config", "ForCausalLM")]
    (directory / "config.json").write_text(json.dumps(config, default=str))
    spec, family = read_spec(directory)
    spec = without_idle_indexer(spec, Sizes(64, max_model_len, 1, 1))
    settings = WorkerSettings(model=directory, load_format="dummy", quantization=quantization)  # type: ignore[arg-type]
    return unsupported_attention(attention_spec(spec, ParallelContext()), 64) or _packed_experts(
        settings, directory, spec, family, torch.device("cuda", 0)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_plain_mixtures_are_served(tmp_path: Path, kind: str) -> None:
    assert reason(tmp_path, kind) is None


def test_tokens_are_chosen_in_plain_torch_alone(tmp_path: Path) -> None:
    said = reason(tmp_path, "deepseek-v3.2", max_model_len=97)
    assert said is not None and "contexts above 96" in said and "--max-model-len 96" in said


def test_gpt_oss_is_served_as_it_is_released(tmp_path: Path) -> None:
    assert reason(tmp_path, "gpt-oss", quantization_config={"quant_method": "mxfp4"}) is None


def test_experts_in_4_bit_groups_are_served(tmp_path: Path) -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    assert reason(tmp_path, "qwen3-moe", quantization_config=awq) is None
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    assert reason(tmp_path, "mixtral", quantization_config=gptq) is None


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def test_8_bit_experts_are_served(tmp_path: Path) -> None:
    assert reason(tmp_path, "mixtral", "int8") is None
    assert reason(tmp_path, "qwen3-moe", quantization_config=FP8) is None


def test_float8_experts_need_a_chip_that_multiplies_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    refusal = reason(tmp_path, "qwen3-moe", quantization_config=FP8)
    assert refusal is not None and "a chip has compute capability 8.0, and the kernels need 8.9" in refusal
    assert reason(tmp_path, "mixtral", "int8") is None


def test_warming_up_meets_every_launch_shape_of_the_experts(tmp_path: Path) -> None:
    assert reason(tmp_path, "qwen3-moe", num_experts=128, num_experts_per_tok=8) is None
    spec, _ = read_spec(tmp_path)
    assert _token_counts_of_tiles(spec, 8192, torch.bfloat16) == (32, 256, 512, 1024)
    assert _token_counts_of_tiles(spec, 300, torch.bfloat16) == (32, 256)


def test_scales_of_a_float8_cache_are_those_of_the_layers_that_cache_here() -> None:
    """Neither those of another stage's layers, nor of layers that read another's cache."""
    fields = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    fields |= {"hidden_size_per_layer_input": 0}
    scales = tuple(KVScales(float(layer)) for layer in range(4))
    spec = Gemma4.read_config(HfConfig(fields), "Gemma4ForCausalLM")
    second = ParallelContext(stage=1, stage_layers=(2, 2))
    assert held_kv_scales(spec, scales, second) == [KVScales(2.0), KVScales(3.0)]
    sharing = Gemma4.read_config(HfConfig(fields | {"num_kv_shared_layers": 2}), "Gemma4ForCausalLM")
    assert held_kv_scales(sharing, scales, ParallelContext()) == [KVScales(0.0), KVScales(1.0)]
    assert held_kv_scales(spec, None, second) is None
