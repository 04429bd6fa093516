"""Small models of transformers that are written as GGUF, and what llama.cpp's converter writes beside their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

# Four layers: in SmolLM3, OLMo 3 and Cohere 2 the fourth is the other kind.
SIZES = {
    "vocab_size": 40,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
HEAD_DIM, WINDOW, THETA = 64, 11, 50000.0
RMS = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": THETA}
LAYER = {"attention.layer_norm_epsilon": 1e-5, "rope.freq_base": THETA}
ROTATED = {"rope.dimension_count": HEAD_DIM}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
    "rope.scaling.yarn_beta_fast": 24.0,
    "rope.scaling.yarn_beta_slow": 2.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 24.0,
    "beta_slow": 2.0,
    "rope_theta": THETA,
}
PLAIN = {"rope_type": "default", "rope_theta": THETA}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": THETA,
}
LATENT = {
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
LATENT_KEYS = RMS | {
    "attention.head_count_kv": 1,
    "attention.kv_lora_rank": 64,
    "attention.key_length": 96,
    "attention.value_length": 64,
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 64,
    "rope.dimension_count": 32,
    "expert_count": 8,
    "expert_used_count": 2,
    "expert_shared_count": 2,
    "expert_feed_forward_length": 64,
    "leading_dense_block_count": 1,
    "expert_weights_scale": 2.5,
    "vocab_size": 40,
}
LATENT_YARN = {name: value for name, value in YARN.items() if not name.startswith("beta")}
LATENT_YARN_KEYS = {name: value for name, value in YARN_KEYS.items() if "beta" not in name}
LATENT_PARTS = ("k_b_proj.weight", "v_b_proj.weight", "up_proj.weight", "down_proj.weight")
GEMMA4 = {
    "rms_norm_eps": 1e-5,
    "head_dim": 32,
    "global_head_dim": HEAD_DIM,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}
GEMMA4_KEYS = {
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 1_000_000.0,
    "rope.freq_base_swa": 10_000.0,
    "rope.dimension_count": HEAD_DIM,
    "rope.dimension_count_swa": 32,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "attention.key_length_swa": 32,
    "attention.value_length_swa": 32,
    "attention.sliding_window": WINDOW,
    "attention.sliding_window_pattern": [True, False] * 2,
    "attention.shared_kv_layers": 0,
    "embedding_length_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}
GEMMA4_LARGE = GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}


@dataclass(frozen=True)
class Family:
    """One model: its config in transformers beside SIZES, and the keys that llama.cpp's converter writes for it."""

    architecture: str
    config: Callable[..., Any]
    fields: Mapping[str, Any]
    keys: Mapping[str, Any]
    blocks: tuple[str, ...] = field(default=("up_proj.weight", "down_proj.weight"))
    """Ends of names that one of the tests stores quantized, beside those of every family."""
    transformers_reads_it: bool = True
    """What a file is converted to; not where its experts are each by itself, which the release has in one tensor."""


FAMILIES: Mapping[str, Family] = {
    "smollm3": Family(
        "smollm3", transformers.SmolLM3Config, {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5}, RMS | ROTATED
    ),
    "granite": Family(
        "granite",
        transformers.GraniteConfig,
        {
            "rope_parameters": PLAIN,
            "rms_norm_eps": 1e-5,
            "attention_multiplier": 0.1,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.25,
            "logits_scaling": 5.0,
            "tie_word_embeddings": True,
        },
        RMS
        | ROTATED
        | {
            "attention.scale": 0.1,
            "embedding_scale": 3.0,
            "residual_scale": 0.25,
            "logit_scale": 5.0,
            "vocab_size": 40,
        },
    ),
    "granite-4": Family(
        "granite",
        transformers.GraniteConfig,
        {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5, "attention_multiplier": 0.1, "logits_scaling": 5.0},
        RMS
        | ROTATED
        | {
            "attention.scale": 0.1,
            "logit_scale": 5.0,
            "attention.head_count_kv": [2, 2, 2, 2],
            "feed_forward_length": 512,
            "rope.scaling.finetuned": True,
            "expert_count": 0,
        },
    ),
    "granite-biased": Family(
        "granite",
        transformers.GraniteConfig,
        {
            "rope_parameters": PLAIN,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "mlp_bias": True,
            "attention_multiplier": HEAD_DIM**-0.5,
        },
        RMS | ROTATED | {"logit_scale": 1.0},
    ),
    "olmo2": Family("olmo2", transformers.Olmo2Config, {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5}, RMS),
    "olmo3": Family(
        "olmo2",
        transformers.Olmo3Config,
        {
            "rope_parameters": {"full_attention": YARN | {"attention_factor": 1.2}, "sliding_attention": PLAIN},
            "rms_norm_eps": 1e-5,
            "sliding_window": WINDOW,
        },
        RMS
        | YARN_KEYS
        | {
            "rope.scaling.attn_factor": 1.2,
            "attention.sliding_window": WINDOW,
            "attention.sliding_window_pattern": [True, True, True, False],
        },
    ),
    "ministral3": Family(
        "mistral3",
        transformers.Ministral3Config,
        {
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
            "head_dim": HEAD_DIM,
        },
        RMS
        | ROTATED
        | YARN_KEYS
        | {
            "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.1,
        },
    ),
    "mistral-small": Family(
        "mistral3",
        transformers.MistralConfig,
        {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5, "head_dim": 32, "sliding_window": None},
        RMS | {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32},
    ),
    "command-r": Family(
        "command-r",
        transformers.CohereConfig,
        {"rope_parameters": PLAIN, "logit_scale": 0.5},
        LAYER | {"logit_scale": 0.5, "rope.scaling.type": "none"},
    ),
    "command-r-plus": Family(
        "command-r",
        transformers.CohereConfig,
        {"rope_parameters": PLAIN, "logit_scale": 0.5, "use_qk_norm": True},
        LAYER | {"logit_scale": 0.5, "rope.scaling.type": "none"},
    ),
    "cohere2": Family(
        "cohere2",
        transformers.Cohere2Config,
        {"rope_parameters": PLAIN, "logit_scale": 0.5, "sliding_window": WINDOW},
        LAYER
        | ROTATED
        | {"logit_scale": 0.5, "attention.sliding_window": WINDOW, "rope.scaling.type": "none", "vocab_size": 40},
    ),
    "starcoder2": Family(
        "starcoder2",
        transformers.Starcoder2Config,
        {"rope_parameters": PLAIN, "tie_word_embeddings": True, "sliding_window": 4096},
        LAYER,
        ("c_fc.weight", "c_proj.weight"),
    ),
    "seed_oss": Family(
        "seed_oss",
        transformers.SeedOssConfig,
        {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5, "head_dim": HEAD_DIM},
        RMS | {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM},
    ),
    "ernie4_5": Family(
        "ernie4_5",
        transformers.Ernie4_5Config,
        {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5, "head_dim": 32},
        RMS | {"attention.key_length": 32, "attention.value_length": 32},
    ),
    "glm4": Family(
        "glm4",
        transformers.Glm4Config,
        {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}, "rms_norm_eps": 1e-5, "head_dim": HEAD_DIM},
        RMS
        | {
            "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM,
            "rope.dimension_count": HEAD_DIM // 2,
        },
        ("mlp.gate_up_proj.weight", "down_proj.weight"),
    ),
    "gemma4": Family(
        "gemma4",
        transformers.Gemma4TextConfig,
        GEMMA4
        | {
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 40,
        },
        GEMMA4_KEYS
        | {
            "attention.shared_kv_layers": 2,
            "embedding_length_per_layer_input": 16,
            "feed_forward_length": [128, 128, 256, 256],
        },
    ),
    "gemma4-large": Family(
        "gemma4",
        transformers.Gemma4TextConfig,
        GEMMA4_LARGE,
        GEMMA4_KEYS | {"attention.head_count_kv": [2, 1, 2, 1]},
    ),
    "gemma4-moe": Family(
        "gemma4",
        transformers.Gemma4TextConfig,
        GEMMA4_LARGE | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
        GEMMA4_KEYS
        | {
            "attention.head_count_kv": [2, 1, 2, 1],
            "expert_count": 8,
            "expert_used_count": 2,
            "expert_feed_forward_length": 64,
        },
        transformers_reads_it=False,
    ),
    "exaone4": Family(
        "exaone4",
        transformers.Exaone4Config,
        {
            "rope_parameters": PLAIN,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 4,
            "tie_word_embeddings": True,
        },
        RMS,
    ),
    "exaone4-windows": Family(
        "exaone4",
        transformers.Exaone4Config,
        {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5, "sliding_window": WINDOW},
        RMS | {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": [True, True, True, False]},
    ),
    "ernie4_5-moe": Family(
        "ernie4_5-moe",
        transformers.Ernie4_5_MoeConfig,
        {
            "rope_parameters": PLAIN,
            "rms_norm_eps": 1e-5,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_intermediate_size": 64,
            "moe_layer_start_index": 1,
        },
        RMS
        | {
            "expert_count": 8,
            "expert_used_count": 2,
            "expert_shared_count": 2,
            "expert_feed_forward_length": 64,
            "expert_shared_feed_forward_length": 128,
            "leading_dense_block_count": 1,
            "interleave_moe_layer_step": 1,
        },
    ),
    "minimax-m2": Family(
        "minimax-m2",
        transformers.MiniMaxM2Config,
        {
            "rope_parameters": PLAIN | {"partial_rotary_factor": 0.5},
            "rms_norm_eps": 1e-5,
            "head_dim": HEAD_DIM,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        RMS
        | {
            "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM,
            "rope.dimension_count": HEAD_DIM // 2,
            "expert_count": 8,
            "expert_used_count": 2,
            "expert_feed_forward_length": 128,
            "expert_gating_func": 2,
        },
    ),
    "glm-4.5": Family(
        "glm4moe",
        transformers.Glm4MoeConfig,
        {
            "rope_parameters": PLAIN | {"partial_rotary_factor": 0.5},
            "rms_norm_eps": 1e-5,
            "head_dim": HEAD_DIM,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
        RMS
        | {
            "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM,
            "rope.dimension_count": HEAD_DIM // 2,
            "expert_count": 8,
            "expert_used_count": 2,
            "expert_shared_count": 1,
            "expert_feed_forward_length": 64,
            "leading_dense_block_count": 1,
            "expert_gating_func": 2,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
        },
    ),
    "deepseek-v3": Family(
        "deepseek2",
        transformers.DeepseekV3Config,
        {
            **LATENT,
            "q_lora_rank": 64,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "rope_parameters": LATENT_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
        {
            **LATENT_KEYS,
            **LATENT_YARN_KEYS,
            "attention.q_lora_rank": 64,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
        LATENT_PARTS,
    ),
    "deepseek-v2-lite": Family(
        "deepseek2",
        transformers.DeepseekV2Config,
        {
            **LATENT,
            "q_lora_rank": None,
            "rope_parameters": LATENT_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
        {**LATENT_KEYS, **LATENT_YARN_KEYS, "rope.scaling.yarn_log_multiplier": 0.0707},
        LATENT_PARTS,
    ),
    "deepseek-v2-of-2024": Family(
        "deepseek2",
        transformers.DeepseekV2Config,
        {**LATENT, "q_lora_rank": 64, "rope_parameters": PLAIN},
        {
            **{name: value for name, value in LATENT_KEYS.items() if not name.endswith("_mla")},
            "attention.head_count_kv": 4,
            "attention.key_length": 64,
            "attention.q_lora_rank": 64,
        },
    ),
    "youtu": Family(
        "deepseek2",
        transformers.DeepseekV3Config,
        {**LATENT, "q_lora_rank": 64, "first_k_dense_replace": 4, "rope_parameters": PLAIN},
        {
            **{name: value for name, value in LATENT_KEYS.items() if not name.startswith(("expert", "leading"))},
            "attention.q_lora_rank": 64,
            "expert_feed_forward_length": 128,
            "expert_shared_count": 0,
            "leading_dense_block_count": 4,
        },
        LATENT_PARTS,
    ),
    "mistral-large-3": Family(
        "deepseek2",
        transformers.Mistral4Config,
        {
            **LATENT,
            "q_lora_rank": 64,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        },
        {
            **LATENT_KEYS,
            **YARN_KEYS,
            "attention.q_lora_rank": 64,
            "attention.temperature_scale": 0.1,
            "attention.temperature_length": 16,
            "expert_gating_func": 1,
            "expert_weights_norm": True,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
        LATENT_PARTS,
        transformers_reads_it=False,
    ),
    "mistral-small-4": Family(
        "mistral4",
        transformers.Mistral4Config,
        {
            **LATENT,
            "q_lora_rank": 64,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        },
        {
            **LATENT_KEYS,
            **YARN_KEYS,
            "attention.q_lora_rank": 64,
            "attention.temperature_scale": 0.1,
            "expert_weights_norm": True,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
        LATENT_PARTS,
        transformers_reads_it=False,
    ),
    "llama4": Family(
        "llama4",
        transformers.Llama4TextConfig,
        {
            "rope_parameters": LLAMA3,
            "rms_norm_eps": 1e-5,
            "head_dim": HEAD_DIM,
            "intermediate_size": 64,
            "intermediate_size_mlp": 128,
            "num_local_experts": 8,
            "interleave_moe_layer_step": 2,
            "attn_temperature_tuning": True,
        },
        RMS
        | ROTATED
        | {
            "feed_forward_length": 128,
            "expert_feed_forward_length": 64,
            "expert_count": 8,
            "expert_used_count": 1,
            "interleave_moe_layer_step": 2,
            "vocab_size": 40,
        },
        transformers_reads_it=False,
    ),
    "granitemoe": Family(
        "granitemoe",
        transformers.GraniteMoeConfig,
        {
            "rope_parameters": PLAIN,
            "rms_norm_eps": 1e-5,
            "attention_multiplier": 0.1,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.25,
            "logits_scaling": 5.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        RMS
        | ROTATED
        | {
            "attention.scale": 0.1,
            "embedding_scale": 3.0,
            "residual_scale": 0.25,
            "logit_scale": 5.0,
            "expert_count": 8,
            "expert_used_count": 2,
            "vocab_size": 40,
        },
        transformers_reads_it=False,
    ),
}
