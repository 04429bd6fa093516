"""Seed-OSS: a Llama with biases on q, k and v."""

from __future__ import annotations

from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.registry import register


@register("SeedOssForCausalLM")
class SeedOss(ModelFamily):
    name_rules = LLAMA_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        config = HfConfig({"head_dim": 128} | config.fields, config.file)
        return config.decoder(
            architecture,
            config.layers(config.rope(config.heads()[2]), None),
            max_position_embeddings=config.integer("max_position_embeddings", 524_288),
            qkv_bias=config.boolean("attention_bias", True),
            attention_output_bias=config.boolean("attention_out_bias", False),
            mlp_bias=config.boolean("mlp_bias", False),
        )
