"""Mixtral, Qwen2-MoE and Qwen3-MoE."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from gpu_worker.model_spec import LayerSpec, ModelSpec, MoeSpec
from gpu_worker.models.family import ModelFamily, NameRules
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.qwen import QWEN3_NAMES
from gpu_worker.models.registry import register

QWEN_MOE_NAMES: NameRules = QWEN3_NAMES | {
    # All of a layer's in one, or each by itself.
    "layers.{i}.mlp.experts": {"": "model.layers.{i}.mlp.experts"},
    "layers.{i}.mlp.router": {"": "model.layers.{i}.mlp.gate"},
    "layers.{i}.mlp.experts.{e}.gate_up": {
        "gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
        "up": "model.layers.{i}.mlp.experts.{e}.up_proj",
    },
    "layers.{i}.mlp.experts.{e}.down": {"": "model.layers.{i}.mlp.experts.{e}.down_proj"},
    "layers.{i}.mlp.shared.gate_up": {
        "gate": "model.layers.{i}.mlp.shared_expert.gate_proj",
        "up": "model.layers.{i}.mlp.shared_expert.up_proj",
    },
    "layers.{i}.mlp.shared.down": {"": "model.layers.{i}.mlp.shared_expert.down_proj"},
    "layers.{i}.mlp.shared_gate": {"": "model.layers.{i}.mlp.shared_expert_gate"},
}

SHARED_EXPERTS_NAMES: NameRules = {
    "layers.{i}.mlp.shared.gate_up": {
        "gate": "model.layers.{i}.mlp.shared_experts.gate_proj",
        "up": "model.layers.{i}.mlp.shared_experts.up_proj",
    },
    "layers.{i}.mlp.shared.down": {"": "model.layers.{i}.mlp.shared_experts.down_proj"},
}
"""For families that have several in one, and no gate before it."""


MIXTRAL_NAMES: NameRules = {
    "layers.{i}.mlp.router": {"": "model.layers.{i}.block_sparse_moe.gate"},
    "layers.{i}.mlp.experts.{e}.gate_up": {
        "gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
        "up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    },
    "layers.{i}.mlp.experts.{e}.down": {"": "model.layers.{i}.block_sparse_moe.experts.{e}.w2"},
}


@register("MixtralForCausalLM")
class Mixtral(ModelFamily):
    name_rules = LLAMA_NAMES | MIXTRAL_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        rope = config.rope(config.heads()[2], 1_000_000.0)
        layers = config.layers(rope, config.optional_integer("sliding_window"))
        return config.decoder(
            architecture,
            tuple(replace(layer, is_moe=True) for layer in layers),
            norm_eps=config.number("rms_norm_eps", 1e-5),
            max_position_embeddings=config.integer("max_position_embeddings", 131072),
            moe=MoeSpec(
                num_experts=config.integer("num_local_experts", 8),
                num_chosen=config.integer("num_experts_per_tok", 2),
                intermediate_size=config.integer("intermediate_size"),
                renormalize=True,
                activation=config.text("hidden_act", "silu"),
            ),
        )


@register("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
class QwenMoe(ModelFamily):
    name_rules = QWEN_MOE_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        is_qwen3 = architecture == "Qwen3MoeForCausalLM"
        head_dim = config.heads()[2]
        window = config.integer("sliding_window", 4096) if config.boolean("use_sliding_window", False) else None
        first_full = config.integer("max_window_layers", 28)
        # As in transformers: Qwen2-MoE alternates below max_window_layers, Qwen3-MoE has windows everywhere.
        layers = config.layers(
            config.rope(head_dim), window, lambda layer: is_qwen3 or (layer % 2 == 0 and layer < first_full)
        )
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            with_experts(config, layers),
            max_position_embeddings=config.integer("max_position_embeddings", 32768),
            qkv_bias=attention_bias if is_qwen3 else config.boolean("qkv_bias", True),
            attention_output_bias=attention_bias and is_qwen3,
            qk_norm="head" if is_qwen3 else None,
            moe=MoeSpec(
                # Recent versions of transformers save the field under Mixtral's name.
                num_experts=config.integer("num_experts", config.optional_integer("num_local_experts") or ...),
                num_chosen=config.integer("num_experts_per_tok", 8 if is_qwen3 else 4),
                intermediate_size=config.integer("moe_intermediate_size"),
                renormalize=config.boolean("norm_topk_prob", False),
                storage=expert_storage(config),
                activation=config.text("hidden_act", "silu"),
                shared_intermediate_size=0 if is_qwen3 else config.integer("shared_expert_intermediate_size"),
                has_shared_gate=not is_qwen3,
            ),
        )


def expert_storage(config: HfConfig) -> Literal["each", "stacked"]:
    """Qwen3-VL has all experts of a layer in one tensor, `multimodal.py` says so; not where they are quantized."""
    return "stacked" if config.boolean("joins_experts", False) and not config.is_quantized() else "each"


def stack_unless_each(config: HfConfig) -> Literal["each", "stacked"]:
    """For families that have all experts of a layer in one tensor; GGUF files, and quantized ones, have each alone."""
    return "each" if config.is_quantized() or config.text("expert_storage", "") == "each" else "stacked"


def with_experts(config: HfConfig, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """Every `decoder_sparse_step`-th layer, but for those listed as dense."""
    dense = config.fields.get("mlp_only_layers") or []
    step = config.integer("decoder_sparse_step", 1)
    return tuple(
        replace(layer, is_moe=number not in dense and (number + 1) % step == 0) for number, layer in enumerate(layers)
    )
