"""Phi-3, Phi-3.5 and Phi-4: projections fused in the checkpoint, longrope, partly rotated heads."""

from __future__ import annotations

from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.registry import register


@register("Phi3ForCausalLM")
class Phi3(ModelFamily):
    name_rules = LLAMA_NAMES | {
        "layers.{i}.attention.qkv": {"q+k+v": "model.layers.{i}.self_attn.qkv_proj"},
        "layers.{i}.mlp.gate_up": {"gate+up": "model.layers.{i}.mlp.gate_up_proj"},
    }

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        fields = dict(config.fields)
        # The field stands outside of rope_scaling, and has a class default.
        fields.setdefault("original_max_position_embeddings", 4096)
        config = HfConfig(fields, config.file)
        return config.decoder(
            architecture,
            config.layers(
                config.rope(config.heads()[2], rotates_partly=True), config.optional_integer("sliding_window")
            ),
            norm_eps=config.number("rms_norm_eps", 1e-5),
            max_position_embeddings=config.integer("max_position_embeddings", 4096),
        )
