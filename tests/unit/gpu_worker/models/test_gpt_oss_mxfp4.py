"""GPT-OSS as it is published: experts in MXFP4, against transformers' model on the weights that it unpacks itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss import GptOssConfig

from gpu_worker.config import WorkerSettings
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.runner import TorchRunner
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.models.test_families import PagedModel, check_logits
from tests.unit.gpu_worker.models.tiny_checkpoints import Tiny, save_model

HIDDEN, INNER, EXPERTS = 64, 32, 6
TINY = Tiny(
    GptOssConfig,
    {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 4,
        "head_dim": 16,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": 11,
    },
)


@pytest.fixture
def published(tmp_path: Path) -> Any:
    """The checkpoint in `tmp_path`; transformers' model with the experts that the packed ones stand for."""
    reference = save_model(TINY, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(11)
    for layer, block in enumerate(reference.model.layers):
        for name, rows, columns in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            blocks = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), generator=generator).to(torch.uint8)
            scales = torch.randint(121, 125, (EXPERTS, rows, columns // 32), generator=generator).to(torch.uint8)
            assert tensors.pop(prefix).shape == (EXPERTS, columns, rows)
            tensors[f"{prefix}_blocks"], tensors[f"{prefix}_scales"] = blocks, scales
            unpacked = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
            getattr(block.mlp.experts, name).data.copy_(unpacked)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return reference


def test_logits_equal_transformers(published: Any, tmp_path: Path) -> None:
    check_logits(published, tmp_path)


def test_the_runner_generates_with_it(published: Any, tmp_path: Path) -> None:
    settings = WorkerSettings(model=tmp_path, device="cpu", dtype="float32", cpu_kv_cache_gib=0.01, num_threads=1)
    driver = StepDriver(TorchRunner.load(settings))
    prompt = list(range(5, 22))
    driver.add(0, prompt, greedy())
    for _ in range(24):
        driver.step()
    tokens = driver.rows[0].tokens
    with torch.inference_mode():
        logits = published(torch.tensor([tokens])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens[len(prompt) :]


def test_scales_that_do_not_fit_their_blocks_are_refused(published: Any, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj_scales"
    save_file(tensors | {name: tensors[name][:, :-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="gate_up_proj"):
        PagedModel(tmp_path)
