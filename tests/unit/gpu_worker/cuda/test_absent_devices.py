"""The worker on devices that nobody here has: every kernel of its first steps compiles for them, and fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY_ROOT
from tests.unit.gpu_worker.cuda.absent_device import DEVICES, Launch

_DENSE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
_FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_EIGHT_BITS = {"num_bits": 8, "type": "float", "symmetric": True}
_FP8_CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _EIGHT_BITS | {"strategy": "channel", "dynamic": False},
            "input_activations": _EIGHT_BITS | {"strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}
_LLAMA = _DENSE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_MIXTURE = _DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# Sizes of models that people serve, two layers of each.
_GEMMA4 = _DENSE | {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 256,
    "final_logit_softcapping": 30.0,
}
_GEMMA4_EXPERTS = {
    "hidden_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}
_DELTA = _DENSE | {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama, AWQ": _LLAMA | {"quantization_config": _AWQ},
    "llama, FP8 channels": _LLAMA | {"quantization_config": _FP8_CHANNELS},
    "llama, FP8 blocks": _LLAMA | {"quantization_config": _FP8_BLOCKS},
    "heads of 256": _DENSE
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": 2304,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "heads of 256 and 512": _GEMMA4,
    "heads of 256 and 512, experts beside an MLP": _GEMMA4 | _GEMMA4_EXPERTS,
    "gated delta rule": _DELTA,
    "mixture": _MIXTURE,
    "mixture, AWQ": _MIXTURE | {"quantization_config": _AWQ},
    "mixture, FP8 blocks": _MIXTURE | {"quantization_config": _FP8_BLOCKS},
    "latent attention": _DENSE
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
}
# The largest tiles on the smallest shared memory.
QUICK = {("8.9", "heads of 256")}


def compile_on(kind: str, directory: Path, *settings: str) -> list[Launch]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.unit.gpu_worker.cuda.absent_device", kind, str(directory), *settings],
        # Compiled again after a change to a kernel, or to Triton.
        env=environment | {"TRITON_CACHE_DIR": str(REPOSITORY_ROOT / ".stepwire" / "compiled")},
        cwd=REPOSITORY_ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return [Launch(**json.loads(line)) for line in finished.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        pytest.param(kind, model, marks=() if (kind, model) in QUICK else pytest.mark.slow)
        for kind in DEVICES
        for model in MODELS
        # Weights with values in float8 are for devices that have it.
        if not (kind in ("8.0", "8.6") and "FP8" in model)
    ],
)
def test_every_kernel_compiles_and_fits(kind: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[model]))
    launches = compile_on(kind, tmp_path)
    kernels = {launch.kernel for launch in launches}
    assert len(kernels) > 10
    assert kernels >= {"_share_list_kernel", "_decode_kernel", "_combine_kernel", "_prefill_kernel"}
    if MODELS[model] is _DELTA:
        assert kernels >= {
            "_causal_conv_kernel",
            "_delta_token_kernel",
            "_delta_inverse_kernel",
            "_delta_chunks_kernel",
        }
    limit = DEVICES[kind].shared_memory
    unfit = [launch for launch in launches if launch.error is not None or launch.shared_memory > limit]
    assert unfit == []
