"""Gemma 4, dense and with experts; of checkpoints that see and hear the language model alone."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from gpu_worker.model_spec import LayerInputSpec, LayerSpec, ModelSpec, MoeSpec
from gpu_worker.models.family import ModelFamily, NameRules
from gpu_worker.models.gemma import GEMMA_NAMES
from gpu_worker.models.hf_config import FULL, SLIDING, HfConfig
from gpu_worker.models.moe import stack_unless_each
from gpu_worker.models.registry import register

_LAYER = "model.layers.{i}"
_EXPERT = f"{_LAYER}.experts.{{e}}"
GEMMA4_NAMES: NameRules = GEMMA_NAMES | {
    "layer_inputs.table": {"": "model.embed_tokens_per_layer"},
    "layer_inputs.projection": {"": "model.per_layer_model_projection"},
    "layer_inputs.norm": {"": "model.per_layer_projection_norm"},
    "layers.{i}.mixing.gate": {"": f"{_LAYER}.per_layer_input_gate"},
    "layers.{i}.mixing.output": {"": f"{_LAYER}.per_layer_projection"},
    "layers.{i}.mixing.norm": {"": f"{_LAYER}.post_per_layer_input_norm"},
    "layers.{i}.scale": {"": _LAYER},
    "layers.{i}.mlp.output_norm": {"": f"{_LAYER}.post_feedforward_layernorm_1"},
    "layers.{i}.mlp.experts_norm": {"": f"{_LAYER}.pre_feedforward_layernorm_2"},
    "layers.{i}.mlp.experts_output_norm": {"": f"{_LAYER}.post_feedforward_layernorm_2"},
    "layers.{i}.mlp.router": {"": f"{_LAYER}.router", "scores": f"{_LAYER}.router.proj"},
    "layers.{i}.mlp.experts": {"": f"{_LAYER}.experts"},
    # Of quantized releases, and GGUF files.
    "layers.{i}.mlp.experts.{e}.gate_up": {"gate": f"{_EXPERT}.gate_proj", "up": f"{_EXPERT}.up_proj"},
    "layers.{i}.mlp.experts.{e}.down": {"": f"{_EXPERT}.down_proj"},
}
# Defaults of the class in transformers: nested configs may leave them out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "hidden_size_per_layer_input": 256,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    },
}
UNIFIED = {"max_position_embeddings": 262_144, "sliding_window": 1024, "hidden_size_per_layer_input": 0}
_OF_TRUNK = re.compile(r"(embed_tokens_per_layer|per_layer_(model_projection|projection_norm))\.")


@register(
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForCausalLM",
    "Gemma4UnifiedForConditionalGeneration",
)
class Gemma4(ModelFamily):
    name_rules = GEMMA4_NAMES
    skipped_tensors = r"(model\.)?(vision_tower|audio_tower|vision_embedder|embed_vision|embed_audio)\."

    @classmethod
    def canonical_name(cls, name: str) -> str:
        name = super().canonical_name(name)
        return f"model.{name}" if _OF_TRUNK.match(name) else name

    @classmethod
    def unused_tensors(cls, spec: ModelSpec) -> str:
        """Releases have projections in layers that attend to another's keys, too."""
        sharing = "|".join(str(number) for number, layer in enumerate(spec.layers) if layer.kv_source is not None)
        unused = rf"model\.layers\.({sharing or '(?!)'})\.self_attn\.[kv]_(proj|norm)\."
        return "|".join(filter(None, (super().unused_tensors(spec), unused)))

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        tied = config.boolean("tie_word_embeddings", True)
        # Of the whole without its head, too, which is known by the name of the causal model (`registry`).
        if architecture.endswith("ForConditionalGeneration") or "text_config" in config.fields:
            config = config.nested("text_config")
        # Images' tokens see one another in some releases, which text does not tell.
        config.refuse("use_bidirectional_attention", "vision")
        defaults = DEFAULTS | (UNIFIED if "Unified" in architecture else {})
        given = {name: value for name, value in config.fields.items() if value is not None or name not in defaults}
        config = HfConfig(defaults | given, config.file)
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            _layers(config),
            activation=config.text("hidden_activation", "gelu_pytorch_tanh"),
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            qk_norm="head",
            value_norm=True,
            post_norms=True,
            embedding_scale=config.integer("hidden_size") ** 0.5,
            layer_scales=True,
            layer_inputs=_layer_inputs(config),
            softmax_scale=1.0,
            logit_softcap=config.optional_number("final_logit_softcapping"),
            tie_word_embeddings=config.boolean("tie_word_embeddings", tied),
            moe=_experts(config) if config.boolean("enable_moe_block", False) else None,
        )


def _layers(config: HfConfig) -> tuple[LayerSpec, ...]:
    kinds = config.layer_types(lambda layer: bool((layer + 1) % 6))
    kinds[-1] = FULL  # as in transformers, whatever the config says
    config = HfConfig(config.fields | {"layer_types": kinds}, config.file)
    ropes = {kind: config.rope(_kv_heads(config, kinds.index(kind), kind)[1], layer_type=kind) for kind in set(kinds)}
    layers = []
    for number, layer in enumerate(config.layers(ropes, config.optional_integer("sliding_window", 512))):
        num_kv_heads, head_dim = _kv_heads(config, number, kinds[number])
        layers.append(
            replace(
                layer,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                is_moe=config.boolean("enable_moe_block", False),
                keys_are_values=config.boolean("attention_k_eq_v", False) and kinds[number] == FULL,
            )
        )
    first_sharing = len(kinds) - config.count("num_kv_shared_layers", 0)
    width = config.integer("intermediate_size") * (2 if config.boolean("use_double_wide_mlp", False) else 1)
    for number in range(first_sharing, len(kinds)):
        sources = [source for source in range(first_sharing) if kinds[source] == kinds[number]]
        if not sources:
            raise config.error("num_kv_shared_layers", f"leaves no {kinds[number]} that has keys and values to share")
        layers[number] = replace(layers[number], kv_source=sources[-1], intermediate_size=width)
    return tuple(layers)


def _kv_heads(config: HfConfig, layer: int, kind: str) -> tuple[int, int]:
    """(num_kv_heads, head_dim) of a layer: transformers 5.23 saves each layer's, releases those of full attention."""
    own: dict[str, Any] = {}
    if kind == FULL and config.fields.get("per_layer_config") is None:
        own["head_dim"] = config.integer("global_head_dim", 512)
        if config.boolean("attention_k_eq_v", False):
            own["num_key_value_heads"] = config.optional_integer("num_global_key_value_heads")
    elif config.fields.get("per_layer_config"):
        own = config.nested("per_layer_config").fields.get(str(layer)) or {}
    own = {name: value for name, value in own.items() if value is not None}
    _, num_kv_heads, head_dim = HfConfig(config.fields | own, config.file).heads()
    return num_kv_heads, head_dim


def _layer_inputs(config: HfConfig) -> LayerInputSpec | None:
    size = config.count("hidden_size_per_layer_input", 0)
    if not size:
        return None
    vocab_size = config.integer("vocab_size")
    num_rows = config.integer("vocab_size_per_layer_input", 262_144)
    if num_rows < vocab_size:
        raise config.error("vocab_size_per_layer_input", f"{num_rows} is less than vocab_size {vocab_size}")
    return LayerInputSpec(size, num_rows - vocab_size)


def _experts(config: HfConfig) -> MoeSpec:
    return MoeSpec(
        num_experts=config.integer("num_experts"),
        num_chosen=config.integer("top_k_experts"),
        intermediate_size=config.integer("moe_intermediate_size"),
        renormalize=True,
        storage=stack_unless_each(config),
        activation=config.text("hidden_activation", "gelu_pytorch_tanh"),
        beside_mlp=True,
    )
