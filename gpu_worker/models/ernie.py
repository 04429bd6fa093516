"""ERNIE 4.5: a Llama with rotated neighbours, and a mixture whose router has a bias for choosing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpu_worker.model_spec import LayerSpec, ModelSpec, MoeSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.moe import QWEN_MOE_NAMES, SHARED_EXPERTS_NAMES
from gpu_worker.models.registry import register


def _read(config: HfConfig, architecture: str, **fields: Any) -> ModelSpec:
    has_bias = config.boolean("use_bias", False)
    return config.decoder(
        architecture,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        max_position_embeddings=config.integer("max_position_embeddings", 131_072),
        qkv_bias=has_bias,
        attention_output_bias=has_bias,
        mlp_bias=has_bias,
        tie_word_embeddings=config.boolean("tie_word_embeddings", True),
        **fields,
    )


def _layers(config: HfConfig) -> tuple[LayerSpec, ...]:
    return config.layers(replace(config.rope(config.heads()[2], 500_000.0), interleaved=True), None)


@register("Ernie4_5ForCausalLM")
class Ernie(ModelFamily):
    name_rules = LLAMA_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        config = HfConfig({"head_dim": 128} | config.fields, config.file)
        return _read(config, architecture, layers=_layers(config))


@register("Ernie4_5_MoeForCausalLM")
class ErnieMoe(ModelFamily):
    name_rules = QWEN_MOE_NAMES | SHARED_EXPERTS_NAMES

    @classmethod
    def canonical_name(cls, name: str) -> str:
        return super().canonical_name(name).replace(".mlp.moe_statics.", ".mlp.gate.")

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        config.refuse("use_bias", False)
        layers = _layers(config)
        first, step = config.count("moe_layer_start_index", 1), config.integer("moe_layer_interval", 1)
        last = config.fields.get("moe_layer_end_index", -1)
        last = len(layers) - 1 if last == -1 else last
        inner = config.integer("moe_intermediate_size", 1536)
        return _read(
            config,
            architecture,
            layers=tuple(
                replace(layer, is_moe=first <= number <= last and (number + 1) % step == 0)
                for number, layer in enumerate(layers)
            ),
            moe=MoeSpec(
                num_experts=config.integer("moe_num_experts", 64),
                num_chosen=config.integer("moe_k", 6),
                intermediate_size=inner,
                renormalize=True,
                has_correction_bias=True,
                activation=config.text("hidden_act", "silu"),
                shared_intermediate_size=inner * config.count("moe_num_shared_experts", 2),
            ),
        )
