"""SmolLM3: a Llama in which every fourth layer has no position encoding."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.registry import register


@register("SmolLM3ForCausalLM")
class SmolLM3(ModelFamily):
    name_rules = LLAMA_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        has_rope = rope_flags(config)
        window = config.optional_integer("sliding_window") if config.boolean("use_sliding_window", False) else None
        layers = config.layers(config.rope(config.heads()[2], 2_000_000.0), window, lambda layer: not has_rope[layer])
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            tuple(layer if flag else replace(layer, rope=None) for layer, flag in zip(layers, has_rope, strict=True)),
            max_position_embeddings=config.integer("max_position_embeddings", 32768),
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            mlp_bias=config.boolean("mlp_bias", False),
            tie_word_embeddings=config.boolean("tie_word_embeddings", True),
        )


def rope_flags(config: HfConfig) -> list[bool]:
    """Which layers are rotated: `no_rope_layers` has 1 for those that *are*, whatever its name."""
    num_layers = config.integer("num_hidden_layers")
    flags = config.fields.get("no_rope_layers")
    if flags is None:
        interval = config.integer("no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if not isinstance(flags, list) or len(flags) != num_layers:
        raise config.error("no_rope_layers", f"must have one entry for each of num_hidden_layers {num_layers}")
    return [bool(flag) for flag in flags]
