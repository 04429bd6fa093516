"""Tiny random checkpoints, made and saved by transformers itself: odd sizes, every switch of a family somewhere."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.cohere import CohereConfig
from transformers.models.cohere2 import Cohere2Config
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v32 import DeepseekV32Config
from transformers.models.ernie4_5 import Ernie4_5Config
from transformers.models.ernie4_5_moe import Ernie4_5_MoeConfig
from transformers.models.exaone4 import Exaone4Config
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gemma4 import Gemma4TextConfig
from transformers.models.gemma4_unified import Gemma4UnifiedForCausalLM, Gemma4UnifiedTextConfig
from transformers.models.glm import GlmConfig
from transformers.models.glm4 import Glm4Config
from transformers.models.glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe_lite import Glm4MoeLiteConfig
from transformers.models.glm_moe_dsa import GlmMoeDsaConfig
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.granite import GraniteConfig
from transformers.models.granitemoe import GraniteMoeConfig
from transformers.models.granitemoehybrid import GraniteMoeHybridConfig
from transformers.models.granitemoeshared import GraniteMoeSharedConfig
from transformers.models.llama import LlamaConfig
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.minimax_m2 import MiniMaxM2Config
from transformers.models.ministral import MinistralConfig
from transformers.models.ministral3 import Ministral3Config
from transformers.models.mistral import MistralConfig
from transformers.models.mistral4 import Mistral4Config, Mistral4ForCausalLM
from transformers.models.mixtral import MixtralConfig
from transformers.models.olmo2 import Olmo2Config
from transformers.models.olmo3 import Olmo3Config
from transformers.models.olmoe import OlmoeConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_next import Qwen3NextConfig
from transformers.models.seed_oss import SeedOssConfig
from transformers.models.smollm3 import SmolLM3Config
from transformers.models.starcoder2 import Starcoder2Config

BASE: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 60,
    "intermediate_size": 90,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Tiny:
    config_class: type
    fields: dict[str, Any] = field(default_factory=dict)
    rewrite_as_v4: bool = False
    """Save config.json with the field names of transformers 4."""
    model_class: Any = None
    """Where it is not the one that transformers has for the config as a causal language model."""

    def config(self, **changes: Any) -> Any:
        """Its own copy: classes write into what they are given."""
        return self.config_class(**deepcopy(BASE | self.fields | changes))


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 5000.0, **parameters}}


LLAMA3 = rope(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)

# Queries grow at every 16th position.
MINISTRAL3 = rope(
    rope_type="yarn",
    factor=16.0,
    original_max_position_embeddings=16,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.3,
)

GEMMA = {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 20}
GEMMA_SCALED = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
}
GEMMA4 = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "global_head_dim": 24,
    "sliding_window": 11,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 5.0,
    "initializer_range": 0.3,
}
# Of the small models: the last four layers attend to the keys of the second and the third.
GEMMA4_SMALL = GEMMA4 | {
    "num_hidden_layers": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2 + ["full_attention"],
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 305,
}
GEMMA4_LARGE = GEMMA4 | {"attention_k_eq_v": True, "num_key_value_heads": 3, "num_global_key_value_heads": 2}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 16} | {
    f"{kind}_factor": [1.0 + 0.3 * i * weight for i in range(5)] for kind, weight in (("short", 1), ("long", 2))
}
MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
# One kind of layer behind the other; two value heads for each key head, or three.
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
}
DELTA_MOE = DELTA | MOE | {"shared_expert_intermediate_size": 50}
GLM_MOE = {
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.6,
    "n_group": 4,
    "topk_group": 2,
}
ERNIE_MOE = {"moe_num_experts": 7, "moe_k": 3, "moe_intermediate_size": 40}
MLA = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
# Few enough that most queries of 40 tokens have a choice. With fewer heads tokens that none sees tie, at a score of 0.
INDEXER = {"index_topk": 8, "index_n_heads": 24, "index_head_dim": 18}
MLA_YARN = rope(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=64,
    mscale=1.0,
    mscale_all_dim=0.8,
)

GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 0.7}
GRANITE_HYBRID = GRANITE | {
    "layer_types": ["full_attention"] * 3,
    "num_local_experts": 0,
    "shared_intermediate_size": 90,
    "mamba_n_heads": 4,
}
# Every third layer sees everything and has no rope; its queries grow at every 16th position.
LLAMA4 = {
    "num_hidden_layers": 4,
    "head_dim": 12,
    "intermediate_size_mlp": 100,
    "num_local_experts": 5,
    "attention_chunk_size": 9,
    "no_rope_layer_interval": 3,
    "floor_scale": 16,
    "attn_scale": 0.3,
    "initializer_range": 0.3,
}

TINY: dict[str, Tiny] = {
    "llama": Tiny(LlamaConfig, {"head_dim": 10, "tie_word_embeddings": False}),
    "llama-tied-bias": Tiny(
        LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 14}
    ),
    "llama3-rope": Tiny(LlamaConfig, LLAMA3),
    "llama3-rope-v4-config": Tiny(LlamaConfig, LLAMA3, rewrite_as_v4=True),
    "llama-linear-rope": Tiny(LlamaConfig, rope(rope_type="linear", factor=2.5)),
    "llama-yarn-rope": Tiny(LlamaConfig, YARN),
    # The class rotates whole heads all the same.
    "llama-partial-rope": Tiny(LlamaConfig, rope(rope_type="default", partial_rotary_factor=0.5)),
    "llama-gelu-mha": Tiny(LlamaConfig, {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 6}),
    "mistral-window": Tiny(MistralConfig, {"sliding_window": 11, "head_dim": 16}),
    "mistral-full": Tiny(MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "ministral": Tiny(
        MinistralConfig,
        {
            "head_dim": 14,
            "sliding_window": 11,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "ministral3": Tiny(Ministral3Config, MINISTRAL3 | {"head_dim": 16}),
    "ministral3-v4-config": Tiny(Ministral3Config, MINISTRAL3 | {"head_dim": 10}, rewrite_as_v4=True),
    "qwen2": Tiny(Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": Tiny(
        Qwen2Config, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_key_value_heads": 3}
    ),
    "qwen2-unused-window-v4-config": Tiny(Qwen2Config, {"sliding_window": 9}, rewrite_as_v4=True),
    "qwen3": Tiny(Qwen3Config, {"head_dim": 18, "tie_word_embeddings": False}),
    "qwen3-bias-v4-config": Tiny(Qwen3Config, {"head_dim": 18, "attention_bias": True}, rewrite_as_v4=True),
    "gemma": Tiny(GemmaConfig, {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": Tiny(Gemma2Config, GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma3": Tiny(Gemma3TextConfig, GEMMA | {"sliding_window_pattern": 3}),
    "gemma2-v4-config": Tiny(Gemma2Config, GEMMA, rewrite_as_v4=True),
    "gemma3-v4-config": Tiny(Gemma3TextConfig, GEMMA | {"sliding_window_pattern": 3}, rewrite_as_v4=True),
    "gemma3-scaled-v4-config": Tiny(
        Gemma3TextConfig, GEMMA | {"sliding_window_pattern": 3} | GEMMA_SCALED, rewrite_as_v4=True
    ),
    "gemma4": Tiny(Gemma4TextConfig, GEMMA4_SMALL),
    "gemma4-one-kind-of-heads": Tiny(
        Gemma4TextConfig,
        GEMMA4_SMALL | {"global_head_dim": 16, "num_kv_shared_layers": 2, "tie_word_embeddings": False},
    ),
    "gemma4-large": Tiny(Gemma4TextConfig, GEMMA4_LARGE),
    "gemma4-moe": Tiny(
        Gemma4TextConfig,
        GEMMA4_LARGE | {"enable_moe_block": True, "num_experts": 7, "top_k_experts": 3, "moe_intermediate_size": 40},
    ),
    "gemma4-unified": Tiny(Gemma4UnifiedTextConfig, GEMMA4_LARGE, model_class=Gemma4UnifiedForCausalLM),
    "phi3": Tiny(Phi3Config, {"sliding_window": 11, "hidden_act": "silu"}),
    "phi3-longrope-partial": Tiny(
        Phi3Config,
        {
            "num_attention_heads": 4,
            "hidden_size": 80,
            "original_max_position_embeddings": 16,
            "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5} | LONG,
        },
    ),
    "phi3-longrope-v4-config": Tiny(
        Phi3Config,
        {
            "num_attention_heads": 4,
            "hidden_size": 40,
            "original_max_position_embeddings": 16,
            "rope_parameters": {"rope_theta": 5000.0} | LONG,
        },
        rewrite_as_v4=True,
    ),
    "smollm3": Tiny(SmolLM3Config, {"num_hidden_layers": 5}),
    "smollm3-v4-config": Tiny(SmolLM3Config, {"no_rope_layers": [0, 1, 1]}, rewrite_as_v4=True),
    "olmo2": Tiny(Olmo2Config),
    "olmo3": Tiny(Olmo3Config, {"num_hidden_layers": 5, "sliding_window": 11}),
    "olmo3-v4-config": Tiny(Olmo3Config, {"num_hidden_layers": 5, "sliding_window": 11}, rewrite_as_v4=True),
    "olmoe": Tiny(OlmoeConfig, {"num_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 40}),
    "seed-oss": Tiny(SeedOssConfig, {"head_dim": 14}),
    "seed-oss-v4-config": Tiny(SeedOssConfig, {"head_dim": 10, "attention_out_bias": True}, rewrite_as_v4=True),
    "exaone4": Tiny(Exaone4Config, {"sliding_window": None, "layer_types": ["full_attention"] * 3} | LLAMA3),
    "exaone4-windows": Tiny(Exaone4Config, {"num_hidden_layers": 5, "sliding_window": 11, "head_dim": 14}),
    "glm": Tiny(GlmConfig, {"head_dim": 16}),
    "glm4": Tiny(Glm4Config, {"head_dim": 16}),
    "glm4-v4-config": Tiny(Glm4Config, {"head_dim": 16}, rewrite_as_v4=True),
    "glm4-moe": Tiny(Glm4MoeConfig, GLM_MOE | {"use_qk_norm": True, "attention_bias": True}),
    "glm4-moe-air-v4-config": Tiny(Glm4MoeConfig, GLM_MOE, rewrite_as_v4=True),
    "ernie": Tiny(Ernie4_5Config, {"head_dim": 14}),
    "ernie-bias-v4-config": Tiny(Ernie4_5Config, {"head_dim": 14, "use_bias": True}, rewrite_as_v4=True),
    "ernie-moe": Tiny(Ernie4_5_MoeConfig, ERNIE_MOE),
    "ernie-moe-some-layers": Tiny(
        Ernie4_5_MoeConfig,
        ERNIE_MOE
        | {"num_hidden_layers": 5, "moe_layer_interval": 2, "moe_layer_end_index": 3, "moe_num_shared_experts": 0},
    ),
    "granite": Tiny(GraniteConfig, GRANITE),
    "granite4-dense": Tiny(GraniteMoeHybridConfig, GRANITE_HYBRID | {"position_embedding_type": "rope"}),
    "granite4-dense-nope": Tiny(GraniteMoeHybridConfig, GRANITE_HYBRID | {"tie_word_embeddings": True}),
    "granite-moe": Tiny(GraniteMoeConfig, GRANITE | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "granite-moe-shared": Tiny(
        GraniteMoeSharedConfig,
        GRANITE | {"num_local_experts": 6, "num_experts_per_tok": 3, "shared_intermediate_size": 50},
    ),
    "cohere": Tiny(CohereConfig, {"logit_scale": 0.6, "layer_norm_eps": 1e-4}),
    "cohere-plus": Tiny(CohereConfig, {"use_qk_norm": True, "tie_word_embeddings": False, "logit_scale": 0.8}),
    "cohere2": Tiny(Cohere2Config, {"num_hidden_layers": 5, "sliding_window": 11, "logit_scale": 0.6}),
    "starcoder2": Tiny(Starcoder2Config, {"sliding_window": 11}),
    "starcoder2-no-bias": Tiny(Starcoder2Config, {"use_bias": False, "tie_word_embeddings": False}),
    "mixtral": Tiny(MixtralConfig, {"num_local_experts": 5, "sliding_window": 11}),
    "qwen2-moe": Tiny(
        Qwen2MoeConfig,
        MOE | {"shared_expert_intermediate_size": 50, "mlp_only_layers": [1], "num_hidden_layers": 4},
    ),
    "qwen3-moe": Tiny(Qwen3MoeConfig, MOE | {"head_dim": 18, "norm_topk_prob": True, "decoder_sparse_step": 2}),
    "qwen3-moe-not-normalised": Tiny(Qwen3MoeConfig, MOE | {"head_dim": 18}),
    "qwen3-next": Tiny(Qwen3NextConfig, DELTA_MOE | {"linear_num_value_heads": 6, "linear_value_head_dim": 32}),
    "qwen3-next-some-layers": Tiny(
        Qwen3NextConfig,
        {name: value for name, value in DELTA_MOE.items() if name != "layer_types"}
        | {"num_hidden_layers": 5, "mlp_only_layers": [2], "norm_topk_prob": False, "linear_conv_kernel_dim": 3},
    ),
    "qwen3.5": Tiny(Qwen3_5TextConfig, DELTA | {"linear_key_head_dim": 32, "tie_word_embeddings": True}),
    "qwen3.5-bias": Tiny(
        Qwen3_5TextConfig, DELTA | {"attention_bias": True, "linear_num_value_heads": 6} | rope(rope_type="default")
    ),
    "qwen3.5-moe": Tiny(Qwen3_5MoeTextConfig, DELTA_MOE),
    "llama4": Tiny(Llama4TextConfig, LLAMA4 | {"interleave_moe_layer_step": 2}),
    "llama4-scout-v4-config": Tiny(Llama4TextConfig, LLAMA4 | LLAMA3, rewrite_as_v4=True),
    "llama4-plain": Tiny(
        Llama4TextConfig, LLAMA4 | {"use_qk_norm": False, "attn_temperature_tuning": False, "attention_bias": True}
    ),
    "minimax-m2": Tiny(MiniMaxM2Config, {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "minimax-m2-rotary-dim": Tiny(
        MiniMaxM2Config, {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 2, "rotary_dim": 8}
    ),
    "gpt-oss": Tiny(GptOssConfig, {"num_local_experts": 6, "head_dim": 16, "sliding_window": 11}),
    "gpt-oss-v4-config": Tiny(
        GptOssConfig,
        {"num_local_experts": 6, "head_dim": 16, "sliding_window": 11}
        | rope(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            truncate=False,
            beta_fast=32.0,
            beta_slow=1.0,
        ),
        rewrite_as_v4=True,
    ),
    "deepseek-v2": Tiny(DeepseekV2Config, MLA | {"topk_method": "greedy", "n_shared_experts": 2} | MLA_YARN),
    "deepseek-v2-groups": Tiny(
        DeepseekV2Config,
        MLA | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": None},
    ),
    "deepseek-v3": Tiny(DeepseekV3Config, MLA | {"n_group": 4, "topk_group": 2} | MLA_YARN),
    "deepseek-v3-v4-config": Tiny(
        DeepseekV3Config, MLA | {"n_group": 4, "topk_group": 2} | MLA_YARN, rewrite_as_v4=True
    ),
    "deepseek-v3.2": Tiny(DeepseekV32Config, MLA | {"n_group": 4, "topk_group": 2} | INDEXER | MLA_YARN),
    "deepseek-v3.2-v4-config": Tiny(
        DeepseekV32Config, MLA | {"n_group": 4, "topk_group": 2} | INDEXER | MLA_YARN, rewrite_as_v4=True
    ),
    "glm5": Tiny(GlmMoeDsaConfig, MLA | INDEXER),
    "glm5-shared-choices": Tiny(
        GlmMoeDsaConfig,
        MLA | INDEXER | {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "full", "shared"]},
    ),
    "glm4-moe-lite": Tiny(Glm4MoeLiteConfig, MLA),
    "mistral4": Tiny(
        Mistral4Config, MLA | MINISTRAL3 | {"n_group": 4, "topk_group": 2}, model_class=Mistral4ForCausalLM
    ),
    "deepseek-v3-plain-query": Tiny(DeepseekV3Config, MLA | {"n_group": 1, "topk_group": 1, "q_lora_rank": None}),
}


def save_tiny(name: str, directory: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write the checkpoint `name` into `directory`; transformers' own model, in evaluation mode."""
    return save_model(TINY[name], directory, dtype=dtype, **changes)


def save_model(tiny: Tiny, directory: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(1234)
    config = tiny.config(**changes)
    if tiny.model_class is None:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    else:
        model = tiny.model_class(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms start at constants: make every tensor matter.
            constant = parameter.dim() == 1 or parameter.std() == 0
            if constant:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "layer_scalar")):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(directory)
    if tiny.rewrite_as_v4:
        rewrite_as_v4(directory / "config.json")
    return model


def rewrite_as_v4(file: Path) -> None:
    fields = json.loads(file.read_text())
    parameters = fields.pop("rope_parameters")
    if "full_attention" in parameters:
        local, parameters = parameters["sliding_attention"], parameters["full_attention"]
        if fields["model_type"].startswith("gemma3"):
            fields["rope_local_base_freq"] = local["rope_theta"]
            fields["sliding_window_pattern"] = 3
    fields["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    fields["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    fields["torch_dtype"] = fields.pop("dtype", "float32")
    fields.pop("layer_types", None)
    file.write_text(json.dumps(fields))
