"""Latent attention with routing in groups and shared experts: DeepSeek-V2 and V3 (and R1, Kimi K2), GLM-4.7-Flash,
Mistral 4; sparse, over tokens that an indexer chooses: DeepSeek-V3.2, GLM-5.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from gpu_worker.layers.rope import yarn_factor
from gpu_worker.model_spec import IndexerSpec, LatentSpec, LayerSpec, ModelSpec, MoeSpec, RopeSpec
from gpu_worker.models.family import ModelFamily, beyond_the_decoder
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import query_scaling
from gpu_worker.models.moe import QWEN_MOE_NAMES, SHARED_EXPERTS_NAMES, stack_unless_each
from gpu_worker.models.registry import register

_ATTENTION = "model.layers.{i}.self_attn"
V2, V3, GLM, MISTRAL = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM", "Mistral4ForCausalLM"
V32, GLM5 = "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"
_GROUPS = {
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "num_experts_per_tok": 8,
}
# Of the classes in transformers.
_DEFAULTS: dict[str, dict[str, Any]] = {
    V2: {"n_shared_experts": 2},
    V3: _GROUPS,
    V32: _GROUPS | {"max_position_embeddings": 163_840, "index_n_heads": 64},
    GLM5: {
        "max_position_embeddings": 202_752,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 2048,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "index_n_heads": 32,
    },
    GLM: {
        "max_position_embeddings": 202_752,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "first_k_dense_replace": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "routed_scaling_factor": 1.8,
        "norm_topk_prob": True,
    },
    MISTRAL: {
        "max_position_embeddings": 1_048_576,
        "q_lora_rank": 1024,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "n_routed_experts": 128,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 2048,
        "norm_topk_prob": True,
    },
}


_SPARSE = (V32, GLM5)
_INDEXER = f"{_ATTENTION}.indexer"


@register(V2, V3, V32, GLM, GLM5, MISTRAL)
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
            "layers.{i}.attention.indexer.query": {"": f"{_INDEXER}.wq_b"},
            "layers.{i}.attention.indexer.key": {"": f"{_INDEXER}.wk"},
            "layers.{i}.attention.indexer.key_norm": {"": f"{_INDEXER}.k_norm"},
            "layers.{i}.attention.indexer.weights": {"": f"{_INDEXER}.weights_proj"},
        }
    )

    @classmethod
    def unused_tensors(cls, spec: ModelSpec) -> str:
        unused = f"{beyond_the_decoder(spec)}|{super().unused_tensors(spec) or '(?!)'}"
        return unused if spec.indexer is not None else rf"{unused}|model\.layers\.\d+\.self_attn\.indexer\."

    @classmethod
    def canonical_name(cls, name: str) -> str:
        # Without a compressed query there is one projection, under another name.
        return re.sub(r"(self_attn)\.q_proj\.", r"\1.q_b_proj.", super().canonical_name(name))

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        config = HfConfig(_DEFAULTS[architecture] | config.fields, config.file)
        latent = LatentSpec(
            query_rank=config.optional_integer("q_lora_rank", 1536),
            kv_rank=config.integer("kv_lora_rank", 512),
            nope_dim=config.integer("qk_nope_head_dim", 128),
            rope_dim=config.integer("qk_rope_head_dim", 64),
            value_dim=config.integer("v_head_dim", 128),
        )
        rope = _rope(config, latent, architecture)
        indexed = _indexed_layers(config, architecture)
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            tuple(
                LayerSpec(rope, is_moe=is_sparse, has_indexer=has_indexer)
                for is_sparse, has_indexer in zip(_sparse_layers(config), indexed, strict=True)
            ),
            num_heads=config.integer("num_attention_heads"),
            # What is cached, and attended to, is one compressed head.
            num_kv_heads=1,
            head_dim=latent.cached_dim,
            latent=latent,
            indexer=_indexer(config, rope, architecture) if architecture in _SPARSE else None,
            softmax_scale=attention_scale(config, rope, latent),
            query_scaling=query_scaling(config),
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            moe=read_routing(config, architecture),
        )


def _sparse_layers(config: HfConfig) -> list[bool]:
    num_layers = config.integer("num_hidden_layers")
    kinds = config.fields.get("mlp_layer_types")
    if kinds is None:
        return [number >= config.count("first_k_dense_replace", 0) for number in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {"dense", "sparse"}:
        raise config.error("mlp_layer_types", f"must have dense or sparse for each of {num_layers} layers")
    return [kind == "sparse" for kind in kinds]


def _indexed_layers(config: HfConfig, architecture: str) -> list[bool]:
    """GLM-5's layers may leave the choice to the one before (`shared`); a pattern has letters for the same."""
    num_layers = config.integer("num_hidden_layers")
    if architecture != GLM5:
        return [architecture == V32] * num_layers
    kinds = config.fields.get("indexer_types") or config.fields.get("index_topk_pattern")
    if kinds is None:
        period, offset = config.count("index_topk_freq", 1), config.count("index_skip_topk_offset", 2)
        return [max(number - offset + 1, 0) % max(period, 1) == 0 for number in range(num_layers)]
    names = {"F": True, "full": True, "S": False, "shared": False}
    chosen = [names.get(str(kind)) for kind in kinds]
    if len(chosen) != num_layers or None in chosen or not chosen[0]:
        raise config.error(
            "indexer_types", f"must have full or shared for each of {num_layers} layers, the first of them full"
        )
    return [bool(kind) for kind in chosen]


def _indexer(config: HfConfig, rope: RopeSpec, architecture: str) -> IndexerSpec:
    """Its halves are rotated as GPT-NeoX has them in DeepSeek-V3.2, whatever the attention's are."""
    return IndexerSpec(
        num_heads=config.integer("index_n_heads"),
        key_dim=config.integer("index_head_dim", 128),
        num_chosen=config.integer("index_topk", 2048),
        rope=replace(rope, interleaved=rope.interleaved and architecture == GLM5),
    )


def _rope(config: HfConfig, latent: LatentSpec, architecture: str) -> RopeSpec:
    rope = config.rope(latent.rope_dim, rotates_partly=True)
    # Of the whole head, where the field is there; that share is `qk_rope_head_dim`.
    rope = replace(rope, rotary_dim=latent.rope_dim)
    return replace(rope, interleaved=architecture == V2 or config.boolean("rope_interleave", True))


def attention_scale(config: HfConfig, rope: RopeSpec, latent: LatentSpec) -> float:
    """YaRN's correction comes squared with the scores here, and not with cos and sin."""
    weight = config.rope_parameters().optional_number("mscale_all_dim") or 0
    correction = yarn_factor(rope.factor, weight) if rope.kind != "default" and weight else 1.0
    return float(latent.query_dim**-0.5 * correction**2)


def read_routing(config: HfConfig, architecture: str) -> MoeSpec:
    is_v2, is_sigmoid = architecture == V2, architecture in (V3, GLM, *_SPARSE)
    if is_v2:
        config.refuse("topk_method", "greedy", "group_limited_greedy")
        config.refuse("norm_topk_prob", False)
    config.refuse("scoring_func", "sigmoid" if is_sigmoid else "softmax")
    is_grouped = not is_v2 or config.text("topk_method", "greedy") == "group_limited_greedy"
    inner = config.integer("moe_intermediate_size")
    return MoeSpec(
        num_experts=config.integer("n_routed_experts"),
        num_chosen=config.integer("num_experts_per_tok"),
        intermediate_size=inner,
        scoring="sigmoid" if is_sigmoid else "softmax",
        renormalize=config.boolean("norm_topk_prob", False),
        scale=config.number("routed_scaling_factor", 1.0),
        num_groups=config.integer("n_group", 1) if is_grouped else 1,
        num_chosen_groups=config.integer("topk_group", 1) if is_grouped else 1,
        group_score="max" if is_v2 else "top2",
        has_correction_bias=is_sigmoid,
        storage=stack_unless_each(config) if architecture == MISTRAL else "each",
        activation=config.text("hidden_act", "silu"),
        shared_intermediate_size=inner * config.count("n_shared_experts", 1),
    )
