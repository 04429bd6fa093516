"""Every causal language model of transformers: it computes like transformers, or it is refused with a reason.

What must not be is a model that runs and gives other logits. Configs are the classes' own with small sizes; a class
that cannot be built that way is left out, and so is nothing else.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.loader import read_spec
from tests.unit.gpu_worker.models.test_families import PagedModel

MAX_PARAMETERS = 60_000_000
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "num_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"), 2),
    "vocab_size": 301,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "shared_expert_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 11,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 301,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
    "first_k_dense_replace": 1,
}
# What some classes want beside that, or in its place.
_ONE_ATTENDS = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _ONE_ATTENDS,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 4, "mamba_d_head": 32},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": _ONE_ATTENDS,
    "qwen3_next": _ONE_ATTENDS,
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5000.0}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 5000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "routed_scaling_factor": 1.3},
    "fuyu": {
        "text_config": {
            "model_type": "persimmon",
            "vocab_size": 301,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.15,
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 11},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 2, "qk_rope_head_dim": 16, "zero_expert_num": 3, "q_lora_rank": 32},
    "mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "zamba": {
        "num_hidden_layers": 9,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_d_state": 16,
        "use_mamba_kernels": False,
        "initializer_range": 0.1,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 12},
}
# Sizes that hang together otherwise: `test_families.py` has these.
ELSEWHERE = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")


def architectures() -> dict[str, str]:
    """Class -> one of the model types that it is for."""
    found: dict[str, str] = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in [names] if isinstance(names, str) else names:
            found.setdefault(name, model_type)
    return {name: model_type for name, model_type in sorted(found.items()) if name not in ELSEWHERE}


def small_model(model_type: str) -> Any:
    """A random model of small sizes, or None: there is none of its class."""
    config_class = CONFIG_MAPPING[model_type]
    fields: set[str] = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        fields |= set(getattr(base, "__annotations__", {}))
    own_names = getattr(config_class, "attribute_map", {})
    sizes = {own_names.get(name, name): value for name, value in SIZES.items() if own_names.get(name, name) in fields}
    if "kv_lora_rank" in fields:  # latent attention has keys for every head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    try:
        config = config_class(**(sizes | OWN_SIZES.get(model_type, {})))
        config.is_decoder = True
        with torch.device("meta"):
            count = sum(one.numel() for one in AutoModelForCausalLM.from_config(config).parameters())
        if count > MAX_PARAMETERS:
            return None
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception:  # whatever a class says to sizes that are not its own
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.std() == 0:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures())
def test_it_computes_like_transformers_or_is_refused(architecture: str, tmp_path: Path) -> None:
    model = small_model(architectures()[architecture])
    if model is None or type(model).__name__ != architecture:
        pytest.skip(f"{architecture} has no model of these sizes")
    model.save_pretrained(tmp_path)
    try:
        read_spec(tmp_path)
        paged = PagedModel(tmp_path)
    except (ModelConfigError, CheckpointError) as refusal:
        assert len(str(refusal)) > 40
        return
    tokens = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(7)).tolist()
    try:
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    except RuntimeError as error:
        pytest.skip(f"transformers cannot run it ({error})")
    steps = [(0, 17), (17, 36), *((start, start + 1) for start in range(36, 40))]
    got = torch.cat([paged.logits(tokens[start:stop], start) for start, stop in steps])
    # Where the router nearly ties, a random mixture's own rounding may be seen.
    bound = 1e-4 * expected.abs().max()
    error = (got - expected).abs().max()
    assert error <= bound or error <= 3 * own_rounding(model, tokens, expected)


def own_rounding(model: Any, tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    """How far float32 takes transformers' own computation from that in float64."""
    model.config._experts_implementation = "eager"
    with torch.inference_mode():
        exact = model.double()(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return (logits - exact).abs().max()
