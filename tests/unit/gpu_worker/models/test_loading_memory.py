"""Host memory while a real model is loaded."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
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


LAYERS = 4


@dataclass(frozen=True)
class Sizes:
    hidden: int
    inner: int
    experts: int


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


def _save_sparse_mixture(directory: Path, method: str, sizes: Sizes, architecture: str) -> int:
    """A mixture of zeros, which take no room on the disk; the file's length."""
    hidden, inner = sizes.hidden, sizes.inner
    config = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": {"Qwen3Moe": "qwen3_moe", "Dots1": "dots1"}[architecture],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "moe_intermediate_size": inner,
        "num_experts": sizes.experts,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": 1,
        "n_group": 1,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 64,
        "pad_token_id": None,
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": method, **CONFIGS[method]},
    }
    (directory / "config.json").write_text(json.dumps(config))
    tensors: dict[str, tuple[str, list[int]]] = {
        f"{name}.weight": ("BF16", [64, hidden]) for name in ("model.embed_tokens", "lm_head")
    }
    tensors["model.norm.weight"] = ("BF16", [hidden])
    experts = [f"experts.{number}" for number in range(sizes.experts)]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        linears = {"q_proj": [256, hidden], "k_proj": [64, hidden], "v_proj": [64, hidden], "o_proj": [hidden, 256]}
        tensors |= {f"{at}.self_attn.{name}.weight": ("BF16", size) for name, size in linears.items()}
        tensors |= {f"{at}.self_attn.{name}_norm.weight": ("BF16", [64]) for name in "qk"}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = ("BF16", [hidden])
        tensors[f"{at}.mlp.gate.weight"] = ("BF16", [sizes.experts, hidden])
        if architecture == "Dots1":
            tensors[f"{at}.mlp.gate.e_score_correction_bias"] = ("F32", [sizes.experts])
        for expert in [*experts, *(["shared_experts"] if architecture == "Dots1" else [])]:
            for name, n, k in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
                for tensor, stored in _expert_tensors(method, n, k).items():
                    tensors[f"{at}.mlp.{expert}.{name}_proj.{tensor}"] = stored
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
    num_bytes = _save_sparse_mixture(tmp_path, method, Sizes(2048, 1024, 32), "Qwen3Moe")
    memory = measured(tmp_path, "auto", "packed")
    assert 0.9 * num_bytes < memory["weights"] < 1.2 * num_bytes
    assert memory["peak"] <= memory["weights"] * (1 + 1 / LAYERS) + 2 * OVERHEAD
    assert memory["after"] <= memory["weights"] + OVERHEAD


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_for_transformers_are_dequantized_one_after_another(tmp_path: Path) -> None:
    """Its own code holds a layer's experts together, of which it gets one at a time."""
    num_bytes = _save_sparse_mixture(tmp_path, "fp8", Sizes(2048, 512, 16), "Dots1")
    memory = measured(tmp_path, "auto")
    assert 1.9 * num_bytes < memory["weights"] < 2.2 * num_bytes
    # Two layers: those together, and what was freed of the ones before lies between others.
    assert memory["peak"] <= memory["weights"] * (1 + 2 / LAYERS) + 2 * OVERHEAD
    assert memory["after"] <= memory["weights"] + OVERHEAD
