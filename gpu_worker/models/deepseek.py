"""DeepSeek-V2 and V3 (and R1): latent attention, grouped routing, shared experts; the first layers are dense."""

from __future__ import annotations

import re
from dataclasses import replace

from gpu_worker.layers.rope import yarn_factor
from gpu_worker.model_spec import LatentSpec, ModelSpec, MoeSpec, RopeSpec
from gpu_worker.models.family import ModelFamily, beyond_the_decoder
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.moe import QWEN_MOE_NAMES, SHARED_EXPERTS_NAMES
from gpu_worker.models.registry import register

_ATTENTION = "model.layers.{i}.self_attn"


@register("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
class DeepSeek(ModelFamily):
    name_rules = (
        QWEN_MOE_NAMES
        | SHARED_EXPERTS_NAMES
        | {
            "layers.{i}.attention.query_down": {"": f"{_ATTENTION}.q_a_proj"},
            "layers.{i}.attention.query_norm": {"": f"{_ATTENTION}.q_a_layernorm"},
            "layers.{i}.attention.query": {"": f"{_ATTENTION}.q_b_proj"},
            "layers.{i}.attention.latent_down": {"": f"{_ATTENTION}.kv_a_proj_with_mqa"},
            "layers.{i}.attention.latent_norm": {"": f"{_ATTENTION}.kv_a_layernorm"},
            "layers.{i}.attention.projections": {"": f"{_ATTENTION}.kv_b_proj"},
        }
    )

    @classmethod
    def unused_tensors(cls, spec: ModelSpec) -> str:
        return f"{beyond_the_decoder(spec)}|{super().unused_tensors(spec) or '(?!)'}"

    @classmethod
    def canonical_name(cls, name: str) -> str:
        # Without a compressed query there is one projection, under another name.
        return re.sub(r"(self_attn)\.q_proj\.", r"\1.q_b_proj.", name)

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        is_v3 = architecture == "DeepseekV3ForCausalLM"
        latent = LatentSpec(
            query_rank=config.optional_integer("q_lora_rank", 1536),
            kv_rank=config.integer("kv_lora_rank", 512),
            nope_dim=config.integer("qk_nope_head_dim", 128),
            rope_dim=config.integer("qk_rope_head_dim", 64),
            value_dim=config.integer("v_head_dim", 128),
        )
        rope = replace(
            config.rope(latent.rope_dim), interleaved=config.boolean("rope_interleave", True) if is_v3 else True
        )
        first_moe = config.count("first_k_dense_replace", 0)
        layers = config.layers(rope, None)
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            tuple(replace(layer, is_moe=number >= first_moe) for number, layer in enumerate(layers)),
            num_heads=config.integer("num_attention_heads"),
            # What is cached, and attended to, is one compressed head.
            num_kv_heads=1,
            head_dim=latent.cached_dim,
            latent=latent,
            softmax_scale=attention_scale(config, rope, latent),
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            moe=read_routing(config, is_v3=is_v3),
        )


def attention_scale(config: HfConfig, rope: RopeSpec, latent: LatentSpec) -> float:
    """YaRN's correction comes squared with the scores here, and not with cos and sin."""
    parameters = config.fields.get("rope_parameters") or config.fields.get("rope_scaling") or {}
    weight = parameters.get("mscale_all_dim") or 0
    correction = yarn_factor(rope.factor, weight) if rope.kind != "default" and weight else 1.0
    return float(latent.query_dim**-0.5 * correction**2)


def read_routing(config: HfConfig, *, is_v3: bool) -> MoeSpec:
    if not is_v3:
        config.refuse("topk_method", "greedy", "group_limited_greedy")
        config.refuse("norm_topk_prob", False)
    config.refuse("scoring_func", "sigmoid" if is_v3 else "softmax")
    is_grouped = is_v3 or config.text("topk_method", "greedy") == "group_limited_greedy"
    inner = config.integer("moe_intermediate_size")
    return MoeSpec(
        num_experts=config.integer("n_routed_experts"),
        num_chosen=config.integer("num_experts_per_tok"),
        intermediate_size=inner,
        scoring="sigmoid" if is_v3 else "softmax",
        renormalize=config.boolean("norm_topk_prob", is_v3),
        scale=config.number("routed_scaling_factor", 2.5 if is_v3 else 1.0),
        num_groups=config.integer("n_group", 8 if is_v3 else 1) if is_grouped else 1,
        num_chosen_groups=config.integer("topk_group", 4 if is_v3 else 1) if is_grouped else 1,
        group_score="top2" if is_v3 else "max",
        has_correction_bias=is_v3,
        activation=config.text("hidden_act", "silu"),
        shared_intermediate_size=inner * config.count("n_shared_experts", 1),
    )
