"""Granite 3 and 4: a Llama with a multiplier at every joint, and Granite 3's mixtures.

Of Granite 4's hybrids those without layers that keep a state (micro, 1B, 350M); the others run through transformers."""

from __future__ import annotations

import re
from dataclasses import replace

from gpu_worker.model_spec import ModelSpec, MoeSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import FULL, HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.moe import stack_unless_each
from gpu_worker.models.registry import register
from gpu_worker.models.transformers_fallback import TransformersModel

_MIXTURE = "model.layers.{i}.block_sparse_moe"
_STORED = re.compile(r"(.*\.block_sparse_moe\.)(input_linear\.weight|output_linear\.weight|router\.layer\.weight)")
_RENAMED = {
    "input_linear.weight": "experts.gate_up_proj",
    "output_linear.weight": "experts.down_proj",
    "router.layer.weight": "router.weight",
}


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


@register("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM")
class GraniteMoe(ModelFamily):
    name_rules = LLAMA_NAMES | {
        "layers.{i}.mlp.router": {"": f"{_MIXTURE}.router"},
        "layers.{i}.mlp.experts": {"": f"{_MIXTURE}.experts"},
        # Of GGUF files.
        "layers.{i}.mlp.experts.{e}.gate_up": {
            "gate": f"{_MIXTURE}.experts.{{e}}.gate_proj",
            "up": f"{_MIXTURE}.experts.{{e}}.up_proj",
        },
        "layers.{i}.mlp.experts.{e}.down": {"": f"{_MIXTURE}.experts.{{e}}.down_proj"},
        "layers.{i}.mlp.shared.gate_up": {"gate+up": "model.layers.{i}.shared_mlp.input_linear"},
        "layers.{i}.mlp.shared.down": {"": "model.layers.{i}.shared_mlp.output_linear"},
    }

    @classmethod
    def canonical_name(cls, name: str) -> str:
        return _STORED.sub(lambda match: f"{match[1]}{_RENAMED[match[2]]}", super().canonical_name(name))

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        spec = Granite.read_config(config, architecture)
        is_shared = architecture == "GraniteMoeSharedForCausalLM"
        moe = MoeSpec(
            num_experts=config.integer("num_local_experts", 8),
            num_chosen=config.integer("num_experts_per_tok", 2),
            intermediate_size=spec.intermediate_size,
            renormalize=True,
            storage=stack_unless_each(config),
            activation=spec.activation,
            shared_intermediate_size=config.count("shared_intermediate_size", 1024) if is_shared else 0,
        )
        return replace(spec, layers=tuple(replace(layer, is_moe=True) for layer in spec.layers), moe=moe)


@register("GraniteMoeHybridForCausalLM")
class GraniteHybrid(ModelFamily):
    name_rules = LLAMA_NAMES | {
        "layers.{i}.mlp.gate_up": {"gate+up": "model.layers.{i}.shared_mlp.input_linear"},
        "layers.{i}.mlp.down": {"": "model.layers.{i}.shared_mlp.output_linear"},
    }

    @classmethod
    def for_config(cls, config: HfConfig) -> type[ModelFamily]:
        kinds = config.fields.get("layer_types") or config.fields.get("layers_block_type") or ["mamba"]
        is_dense = not config.fields.get("num_local_experts")
        return cls if is_dense and set(kinds) <= {"attention", FULL} else TransformersModel

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        config.refuse("position_embedding_type", "rope", "nope")
        spec = Granite.read_config(HfConfig({**config.fields, "layer_types": None}, config.file), architecture)
        layers = spec.layers
        if config.fields.get("position_embedding_type") != "rope":
            layers = tuple(replace(layer, rope=None) for layer in layers)
        return replace(spec, layers=layers, intermediate_size=config.integer("shared_intermediate_size", 1024))
