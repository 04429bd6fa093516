"""Llama 4's language model: attention in chunks with rope, now and then a layer that sees everything without, and
layers of which every token takes one expert and the shared one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpu_worker.model_spec import LayerSpec, ModelSpec, MoeSpec, QueryScaling
from gpu_worker.models.family import ModelFamily, NameRules
from gpu_worker.models.hf_config import FULL, HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.moe import stack_unless_each
from gpu_worker.models.registry import register
from gpu_worker.models.smollm3 import rope_flags

CHUNKED = "chunked_attention"
_FEED = "model.layers.{i}.feed_forward"
LLAMA4_NAMES: NameRules = LLAMA_NAMES | {
    "layers.{i}.mlp.gate_up": {"gate": f"{_FEED}.gate_proj", "up": f"{_FEED}.up_proj"},
    "layers.{i}.mlp.down": {"": f"{_FEED}.down_proj"},
    "layers.{i}.mlp.router": {"": f"{_FEED}.router"},
    "layers.{i}.mlp.experts": {"": f"{_FEED}.experts"},
    # Of quantized releases, and GGUF files.
    "layers.{i}.mlp.experts.{e}.gate_up": {
        "gate": f"{_FEED}.experts.{{e}}.gate_proj",
        "up": f"{_FEED}.experts.{{e}}.up_proj",
    },
    "layers.{i}.mlp.experts.{e}.down": {"": f"{_FEED}.experts.{{e}}.down_proj"},
    "layers.{i}.mlp.shared.gate_up": {
        "gate": f"{_FEED}.shared_expert.gate_proj",
        "up": f"{_FEED}.shared_expert.up_proj",
    },
    "layers.{i}.mlp.shared.down": {"": f"{_FEED}.shared_expert.down_proj"},
}


@register("Llama4ForCausalLM")
class Llama4(ModelFamily):
    name_rules = LLAMA4_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        # One expert a token, in all releases: its score multiplies what it reads.
        config.refuse("num_experts_per_tok", 1)
        if config.fields.get("no_rope_layers") == []:  # as the first releases have it: the default
            config = HfConfig({**config.fields, "no_rope_layers": None}, config.file)
        attention_bias = config.boolean("attention_bias", False)
        inner = config.integer("intermediate_size")
        return config.decoder(
            architecture,
            _layers(config),
            norm_eps=config.number("rms_norm_eps", 1e-5),
            intermediate_size=config.integer("intermediate_size_mlp", 16_384),
            max_position_embeddings=config.integer("max_position_embeddings", 131_072),
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            qk_norm="rotated" if config.boolean("use_qk_norm", True) else None,
            query_scaling=_query_scaling(config),
            moe=MoeSpec(
                num_experts=config.integer("num_local_experts", 16),
                num_chosen=1,
                intermediate_size=inner,
                scoring="sigmoid",
                scales_inputs=True,
                storage="each" if stack_unless_each(config) == "each" else "transposed",
                activation=config.text("hidden_act", "silu"),
                shared_intermediate_size=inner,
            ),
        )


def _layers(config: HfConfig) -> tuple[LayerSpec, ...]:
    rope = replace(config.rope(config.heads()[2], 500_000.0), interleaved=True)
    rotated = rope_flags(config)
    chunk = config.optional_integer("attention_chunk_size", 8192)
    kinds = config.fields.get("layer_types") or [CHUNKED if flag else FULL for flag in rotated]
    step = config.integer("interleave_moe_layer_step", 1)
    mixtures: Any = config.fields.get("moe_layers")
    if mixtures is None:
        mixtures = range(step - 1, len(rotated), step)
    if len(kinds) != len(rotated) or not set(kinds) <= {CHUNKED, FULL}:
        raise config.error("layer_types", f"must have {CHUNKED} or {FULL} for each of {len(rotated)} layers")
    return tuple(
        LayerSpec(
            rope if flag else None,
            attention_chunk=chunk if kind == CHUNKED else None,
            is_moe=number in mixtures,
        )
        for number, (flag, kind) in enumerate(zip(rotated, kinds, strict=True))
    )


def _query_scaling(config: HfConfig) -> QueryScaling | None:
    # A number in the first releases.
    if not config.fields.get("attn_temperature_tuning", True):
        return None
    return QueryScaling(
        config.number("attn_scale", 0.1), config.integer("floor_scale", 8192), first=1, unrotated_only=True
    )
