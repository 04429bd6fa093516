"""Granite 3 and 4: a Llama with a multiplier at every joint.

Of Granite 4's hybrids those without layers that keep a state (micro, 1B, 350M); the others run through transformers."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import FULL, HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.registry import register
from gpu_worker.models.transformers_fallback import TransformersModel


@register("GraniteForCausalLM")
class Granite(ModelFamily):
    name_rules = LLAMA_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            config.layers(config.rope(config.heads()[2]), None),
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            mlp_bias=config.boolean("mlp_bias", False),
            embedding_scale=config.number("embedding_multiplier", 1.0),
            residual_scale=config.number("residual_multiplier", 1.0),
            softmax_scale=config.number("attention_multiplier", 1.0),
            logit_scale=1.0 / config.number("logits_scaling", 1.0),
        )


@register("GraniteMoeHybridForCausalLM")
class GraniteHybrid(ModelFamily):
    name_rules = LLAMA_NAMES | {
        "layers.{i}.mlp.gate_up": {"gate+up": "model.layers.{i}.shared_mlp.input_linear"},
        "layers.{i}.mlp.down": {"": "model.layers.{i}.shared_mlp.output_linear"},
    }

    @classmethod
    def for_config(cls, config: HfConfig) -> type[ModelFamily]:
        kinds = config.fields.get("layer_types") or config.fields.get("layers_block_type") or ["mamba"]
        return cls if set(kinds) <= {"attention", FULL} else TransformersModel

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        config.refuse("num_local_experts", 0)
        config.refuse("position_embedding_type", "rope", "nope")
        spec = Granite.read_config(HfConfig({**config.fields, "layer_types": None}, config.file), architecture)
        layers = spec.layers
        if config.fields.get("position_embedding_type") != "rope":
            layers = tuple(replace(layer, rope=None) for layer in layers)
        return replace(spec, layers=layers, intermediate_size=config.integer("shared_intermediate_size", 1024))
