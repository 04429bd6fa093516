"""Command R, Command R+ and Command R7B (Cohere 2): parallel blocks under one LayerNorm without bias."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.model_spec import ModelSpec, RopeSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import FULL, SLIDING, HfConfig
from gpu_worker.models.qwen import QWEN3_NAMES
from gpu_worker.models.registry import register


@register("CohereForCausalLM", "Cohere2ForCausalLM")
class Cohere(ModelFamily):
    name_rules = QWEN3_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        is_cohere2 = architecture == "Cohere2ForCausalLM"
        theta = 10_000.0 if is_cohere2 else 500_000.0
        rope = replace(config.rope(config.heads()[2], theta), interleaved=True)
        # Cohere 2: layers that see everything are not told where it stands.
        ropes: dict[str, RopeSpec | None] = {FULL: None if is_cohere2 else rope, SLIDING: rope}
        pattern = config.integer("sliding_window_pattern", 4)
        window = config.optional_integer("sliding_window", 4096) if is_cohere2 else None
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            config.layers(ropes, window, lambda layer: (layer + 1) % pattern != 0),
            norm_eps=config.number("layer_norm_eps", 1e-5),
            max_position_embeddings=config.integer("max_position_embeddings", 8192),
            norm_kind="layer",
            parallel_block=True,
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            qk_norm="each_head" if config.boolean("use_qk_norm", False) and not is_cohere2 else None,
            logit_scale=config.number("logit_scale", 0.0625),
            tie_word_embeddings=config.boolean("tie_word_embeddings", True),
        )
