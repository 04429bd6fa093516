"""GLM-4: 9B of 2024; 9B and 32B of 2025, with norms around each sublayer; the mixtures since 4.5."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpu_worker.model_spec import ModelSpec, MoeSpec
from gpu_worker.models.family import ModelFamily, beyond_the_decoder
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.moe import QWEN_MOE_NAMES, SHARED_EXPERTS_NAMES
from gpu_worker.models.registry import register

_DEFAULTS: dict[str, Any] = {"partial_rotary_factor": 0.5}


@register("GlmForCausalLM", "Glm4ForCausalLM")
class Glm(ModelFamily):
    name_rules = LLAMA_NAMES | {
        "layers.{i}.attention_post_norm": {"": "model.layers.{i}.post_self_attn_layernorm"},
        "layers.{i}.mlp_post_norm": {"": "model.layers.{i}.post_mlp_layernorm"},
        "layers.{i}.mlp.gate_up": {"gate+up": "model.layers.{i}.mlp.gate_up_proj"},
    }

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        is_seeing = config.fields.get("model_type") == "glm4v_text"  # whose class has no head_dim
        config = HfConfig(_DEFAULTS | ({} if is_seeing else {"head_dim": 128}) | config.fields, config.file)
        rope = replace(config.rope(config.heads()[2], rotates_partly=True), interleaved=True)
        return config.decoder(
            architecture,
            config.layers(rope, None),
            norm_eps=config.number("rms_norm_eps", 1.5625e-07),
            max_position_embeddings=config.integer("max_position_embeddings", 131_072),
            qkv_bias=config.boolean("attention_bias", True),
            post_norms=architecture == "Glm4ForCausalLM",
        )


@register("Glm4MoeForCausalLM")
class GlmMoe(ModelFamily):
    name_rules = QWEN_MOE_NAMES | SHARED_EXPERTS_NAMES

    @classmethod
    def unused_tensors(cls, spec: ModelSpec) -> str:
        return f"{beyond_the_decoder(spec)}|{super().unused_tensors(spec) or '(?!)'}"

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        # As in transformers, which rounds down.
        head_dim = config.integer("hidden_size") // config.integer("num_attention_heads")
        config = HfConfig(_DEFAULTS | {"head_dim": head_dim} | config.fields, config.file)
        layers = config.layers(config.rope(config.heads()[2], rotates_partly=True), None)
        first_moe = config.count("first_k_dense_replace", 1)
        inner = config.integer("moe_intermediate_size", 1408)
        return config.decoder(
            architecture,
            tuple(replace(layer, is_moe=number >= first_moe) for number, layer in enumerate(layers)),
            norm_eps=config.number("rms_norm_eps", 1e-5),
            max_position_embeddings=config.integer("max_position_embeddings", 131_072),
            qkv_bias=config.boolean("attention_bias", False),
            qk_norm="head" if config.boolean("use_qk_norm", False) else None,
            moe=MoeSpec(
                num_experts=config.integer("n_routed_experts", 128),
                num_chosen=config.integer("num_experts_per_tok", 8),
                intermediate_size=inner,
                scoring="sigmoid",
                renormalize=config.boolean("norm_topk_prob", True),
                scale=config.number("routed_scaling_factor", 1.0),
                num_groups=config.integer("n_group", 1),
                num_chosen_groups=config.integer("topk_group", 1),
                group_score="top2",
                has_correction_bias=True,
                activation=config.text("hidden_act", "silu"),
                shared_intermediate_size=inner * config.count("n_shared_experts", 1),
            ),
        )
