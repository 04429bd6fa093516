"""Every family with its linears quantized, beside the same model with the weights that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.gpu_worker.models.tiny_checkpoints import TINY, save_tiny
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

# One checkpoint of each class.
FAMILIES = list({tiny.config_class: name for name, tiny in reversed(TINY.items())}.values())
# What tools leave plain, whether or not they list it; experts that are one tensor a layer are no linears at all.
LEFT_OUT = ("embed_tokens", "lm_head", "norm", ".gate.", "router", "shared_expert_gate", "weights_proj")
TOKENS = list(range(3, 35))
QUANTIZATION = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "int"},
        }
    },
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "quant_method": "compressed-tensors",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_linears_compute_what_their_weights_stand_for(name: str, tmp_path: Path) -> None:
    check_quantized(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("qwen3-next", "in_proj_ba"),
        ("qwen3.5", "in_proj_b."),
        ("qwen3.5", "in_proj_a."),
        ("qwen3.5", "in_proj_z"),
        ("qwen3.5-moe", "linear_attn"),
    ],
)
def test_parts_of_a_layer_with_states_may_be_left_out(name: str, left_out: str, tmp_path: Path) -> None:
    check_quantized(name, tmp_path, left_out, ignore=[f"re:.*{left_out.rstrip('.')}($|\\..*)"])


def check_quantized(name: str, tmp_path: Path, *left_out: str, ignore: list[str] | None = None) -> None:
    save_tiny(name, tmp_path)
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for tensor, weight in load_file(tmp_path / "model.safetensors").items():
        if weight.dim() != 2 or not tensor.endswith(".weight") or any(part in tensor for part in LEFT_OUT + left_out):
            # Layers that keep no packed weights get them in bfloat16, which has to hold these exactly.
            packed[tensor] = plain[tensor] = weight.bfloat16().float()
            continue
        scale = torch.exp2((weight.abs().amax(1, keepdim=True) / 127).log2().ceil())
        values = (weight / scale).round().clamp(-127, 127)
        packed |= {tensor: values.to(torch.int8), f"{tensor}_scale": scale}
        plain[tensor] = values * scale
    assert len(packed) > len(plain)
    save_file(plain, tmp_path / "model.safetensors", {"format": "pt"})
    expected = QuantizedModel(tmp_path).logits(TOKENS)
    save_file(packed, tmp_path / "model.safetensors", {"format": "pt"})
    quantization = QUANTIZATION | {"ignore": ["lm_head", *(ignore or [])]}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    got = QuantizedModel(tmp_path).logits(TOKENS)
    assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()
