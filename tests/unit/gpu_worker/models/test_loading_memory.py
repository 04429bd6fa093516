"""Host memory while a real model is loaded."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_worker.device import cpu_computes_bfloat16
from tests.unit.gpu_worker.models import loading_memory

ROOT = Path(__file__).resolve().parents[4]
# SmolLM2's embedding as the head multiplies it.
LARGEST_TENSOR = 49152 * 576 * (2 if cpu_computes_bfloat16() else 4)
# Tables of the rotation, small tensors, the interpreter's own, and what the allocator keeps of packed tensors.
OVERHEAD = 64 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
# Tensors that are quantized come one after another as those that are not.
@pytest.mark.parametrize("quantization", ["auto", pytest.param("int8", marks=pytest.mark.slow)])
def test_loading_peaks_at_the_model_and_about_one_tensor(quantization: str, smollm2_dir: Path) -> None:
    memory = measured(smollm2_dir, quantization)
    assert memory["weights"] > 250 << 20
    assert memory["peak"] <= memory["weights"] + LARGEST_TENSOR + OVERHEAD
    assert memory["after"] <= memory["weights"] + OVERHEAD


def measured(*arguments: object) -> dict[str, int]:
    output = subprocess.run(
        [sys.executable, "-m", loading_memory.__name__, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "proto", "kernels"))},
        capture_output=True,
        text=True,
        check=True,
        timeout=400,
    ).stdout
    memory: dict[str, int] = json.loads(output.splitlines()[-1])
    return memory


HIDDEN, INNER, EXPERTS, LAYERS = 2048, 1024, 32, 4
PLAIN = ["lm_head", *(f"{name}_proj" for name in "qkvo"), "mlp.gate"]
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [128, 128], "modules_to_not_convert": PLAIN},
    "awq": {"bits": 4, "group_size": 128, "zero_point": True, "modules_to_not_convert": ["self_attn", "mlp.gate."]},
}


def _expert_tensors(method: str, n: int, k: int) -> dict[str, tuple[str, list[int]]]:
    if method == "fp8":
        return {"weight": ("F8_E4M3", [n, k]), "weight_scale_inv": ("F32", [n // 128, k // 128])}
    packed: dict[str, tuple[str, list[int]]] = {
        "qweight": ("I32", [k, n // 8]), "qzeros": ("I32", [k // 128, n // 8]), "scales": ("F16", [k // 128, n])
    }  # fmt: skip
    return packed


def _save_sparse_mixture(directory: Path, method: str) -> int:
    """Qwen3-MoE of 0.8 billion zeros, which take no room on the disk; the file's length."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "moe_intermediate_size": INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 64,
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": method, **CONFIGS[method]},
    }
    (directory / "config.json").write_text(json.dumps(config))
    tensors: dict[str, tuple[str, list[int]]] = {
        f"{name}.weight": ("BF16", [64, HIDDEN]) for name in ("model.embed_tokens", "lm_head")
    }
    tensors["model.norm.weight"] = ("BF16", [HIDDEN])
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        sizes = {"q_proj": [256, HIDDEN], "k_proj": [64, HIDDEN], "v_proj": [64, HIDDEN], "o_proj": [HIDDEN, 256]}
        tensors |= {f"{at}.self_attn.{name}.weight": ("BF16", size) for name, size in sizes.items()}
        tensors |= {f"{at}.self_attn.{name}_norm.weight": ("BF16", [64]) for name in "qk"}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = ("BF16", [HIDDEN])
        tensors[f"{at}.mlp.gate.weight"] = ("BF16", [EXPERTS, HIDDEN])
        for expert in range(EXPERTS):
            for name, n, k in (("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)):
                for tensor, stored in _expert_tensors(method, n, k).items():
                    tensors[f"{at}.mlp.experts.{expert}.{name}_proj.{tensor}"] = stored
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin = end
        end += math.prod(shape) * {"F8_E4M3": 1, "BF16": 2, "F16": 2}.get(dtype, 4)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return end


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", CONFIGS)
def test_experts_that_are_held_together_need_one_layer_more(method: str, tmp_path: Path) -> None:
    """On a GPU that layer is on the device: the host holds an expert's tensors at a time."""
    num_bytes = _save_sparse_mixture(tmp_path, method)
    memory = measured(tmp_path, "auto", "packed")
    assert 0.9 * num_bytes < memory["weights"] < 1.2 * num_bytes
    assert memory["peak"] <= memory["weights"] * (1 + 1 / LAYERS) + 2 * OVERHEAD
    assert memory["after"] <= memory["weights"] + OVERHEAD
