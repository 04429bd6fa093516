"""Qwen2, Qwen2.5 (bias on q, k, v) and Qwen3 (no bias, RMSNorm on every query and key head)."""

from __future__ import annotations

from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.family import ModelFamily, NameRules
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.registry import register

QWEN3_NAMES: NameRules = LLAMA_NAMES | {
    "layers.{i}.attention.query_norm": {"": "model.layers.{i}.self_attn.q_norm"},
    "layers.{i}.attention.key_norm": {"": "model.layers.{i}.self_attn.k_norm"},
}


@register("Qwen2ForCausalLM", "Qwen3ForCausalLM")
class Qwen(ModelFamily):
    name_rules = QWEN3_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        is_qwen3 = architecture == "Qwen3ForCausalLM"
        head_dim = config.heads()[2]
        if is_qwen3 and config.fields.get("head_dim") is None:
            head_dim = 128  # the class default in transformers, not hidden / heads
        # Without use_sliding_window the field sliding_window means nothing; with it, the lower layers stay full.
        window = config.integer("sliding_window", 4096) if config.boolean("use_sliding_window", False) else None
        first_windowed = config.integer("max_window_layers", 28)
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            config.layers(config.rope(head_dim), window, lambda layer: layer >= first_windowed),
            head_dim=head_dim,
            max_position_embeddings=config.integer("max_position_embeddings", 32768),
            qkv_bias=attention_bias if is_qwen3 else True,
            attention_output_bias=attention_bias and is_qwen3,
            qk_norm="head" if is_qwen3 else None,
        )
