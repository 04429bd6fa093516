"""Qwen3-Next and Qwen3.5, dense and with experts: three layers of the gated delta rule, then one of gated attention.

Qwen3-Next stores what a key head of such a layer projects to as neighbours, Qwen3.5 queries, keys, values and gates
apart. Of what else they store, Qwen3.5 sees as well (`multimodal.py`).
"""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.model_spec import GatedDeltaSpec, LayerSpec, ModelSpec, MoeSpec, RopeSpec
from gpu_worker.models.family import ModelFamily, NameRules
from gpu_worker.models.hf_config import FULL, HfConfig
from gpu_worker.models.moe import QWEN_MOE_NAMES, with_experts
from gpu_worker.models.registry import register

NEXT, DENSE, MOE = "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"
STATE = "linear_attention"
_DELTA = "model.layers.{i}.linear_attn"

DELTA_NAMES: NameRules = QWEN_MOE_NAMES | {
    "layers.{i}.delta.conv": {"": f"{_DELTA}.conv1d"},
    "layers.{i}.delta.decay": {"": _DELTA},
    "layers.{i}.delta.norm": {"": f"{_DELTA}.norm"},
    "layers.{i}.delta.output": {"": f"{_DELTA}.out_proj"},
}
# Rules of their own: how a linear is stored is asked of every module that they name.
GROUPED_NAMES: NameRules = {
    "layers.{i}.delta.inputs": {"": f"{_DELTA}.in_proj_qkvz"},
    "layers.{i}.delta.pairs": {"": f"{_DELTA}.in_proj_ba"},
}
SEPARATE_NAMES: NameRules = {
    "layers.{i}.delta.inputs": {"q+k+v": f"{_DELTA}.in_proj_qkv", "z": f"{_DELTA}.in_proj_z"},
    "layers.{i}.delta.pairs": {"b": f"{_DELTA}.in_proj_b", "a": f"{_DELTA}.in_proj_a"},
}


@register(NEXT)
class QwenNext(ModelFamily):
    name_rules = DELTA_NAMES | GROUPED_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        # Defaults of the classes in transformers, which are not those of the families that they descend from.
        config = HfConfig({"head_dim": 256, "partial_rotary_factor": 0.25} | config.fields, config.file)
        layers = _layers(config, config.rope(config.integer("head_dim"), rotates_partly=True))
        moe: MoeSpec | None = None
        if architecture != DENSE:
            layers = with_experts(config, layers) if architecture == NEXT else _all_with_experts(layers)
            moe = _experts(config, architecture)
            if architecture == MOE:
                inner = config.integer("moe_intermediate_size", 512)
                config = HfConfig({"intermediate_size": inner} | config.fields, config.file)
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            layers,
            max_position_embeddings=config.integer("max_position_embeddings", 32768),
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            qk_norm="head",
            norm_weight_offset=1.0,
            attention_gate=True,
            gated_delta=_delta(config, is_grouped=architecture == NEXT),
            moe=moe,
        )


@register(DENSE, MOE)
class Qwen35(QwenNext):
    name_rules = DELTA_NAMES | SEPARATE_NAMES


def _layers(config: HfConfig, rope: RopeSpec) -> tuple[LayerSpec, ...]:
    num_layers, kinds = config.integer("num_hidden_layers"), config.fields.get("layer_types")
    if kinds is None:
        every = config.integer("full_attention_interval", 4)
        kinds = [STATE if (number + 1) % every else FULL for number in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise config.error("layer_types", f"must have one entry for each of num_hidden_layers {num_layers}")
    unknown = {str(kind) for kind in kinds} - {STATE, FULL}
    if unknown:
        raise config.error("layer_types", f"has {sorted(unknown)}, supported are {FULL}, {STATE}")
    # Layers without positions are given the others' rope: it is prepared once for all, and they do not read it.
    return tuple(LayerSpec(rope, keeps_state=kind == STATE) for kind in kinds)


def _delta(config: HfConfig, *, is_grouped: bool) -> GatedDeltaSpec:
    key_heads = config.integer("linear_num_key_heads", 16)
    value_heads = config.integer("linear_num_value_heads", 32)
    if value_heads % key_heads:
        raise config.error(
            "linear_num_value_heads", f"{value_heads} is not a multiple of linear_num_key_heads {key_heads}"
        )
    return GatedDeltaSpec(
        key_heads,
        value_heads,
        config.integer("linear_key_head_dim", 128),
        config.integer("linear_value_head_dim", 128),
        config.integer("linear_conv_kernel_dim", 4),
        is_grouped,
    )


def _all_with_experts(layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    return tuple(replace(layer, is_moe=True) for layer in layers)


def _experts(config: HfConfig, architecture: str) -> MoeSpec:
    is_next = architecture == NEXT
    return MoeSpec(
        num_experts=config.integer("num_experts", config.optional_integer("num_local_experts") or ...),
        num_chosen=config.integer("num_experts_per_tok", 10 if is_next else 8),
        intermediate_size=config.integer("moe_intermediate_size", 512),
        renormalize=config.boolean("norm_topk_prob", True) if is_next else True,
        activation=config.text("hidden_act", "silu"),
        shared_intermediate_size=config.integer("shared_expert_intermediate_size", 512),
        has_shared_gate=True,
    )
