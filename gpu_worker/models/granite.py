"""Granite 3 and 4 (dense): a Llama with a multiplier at every joint."""

from __future__ import annotations

from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.registry import register


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
