"""GPT-OSS: attention sinks, alternating windows, biased experts with a clamped SwiGLU, stored in MXFP4."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.model_spec import ModelSpec, MoeSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.registry import register

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@register("GptOssForCausalLM")
class GptOss(ModelFamily):
    name_rules = LLAMA_NAMES | {
        "layers.{i}.attention.sinks": {"": "model.layers.{i}.self_attn"},
        "layers.{i}.mlp.router": {"": "model.layers.{i}.mlp.router"},
        "layers.{i}.mlp.experts": {"": "model.layers.{i}.mlp.experts"},
        # Of GGUF files.
        "layers.{i}.mlp.experts.{e}.gate_up": {
            "gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
            "up": "model.layers.{i}.mlp.experts.{e}.up_proj",
        },
        "layers.{i}.mlp.experts.{e}.down": {"": "model.layers.{i}.mlp.experts.{e}.down_proj"},
    }

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        config.refuse("swiglu_alpha", 1.702)
        config.refuse("swiglu_limit", 7.0)
        fields = {"head_dim": 64} | config.fields
        if not fields.get("rope_parameters") and not fields.get("rope_scaling"):
            fields["rope_scaling"] = YARN
        config = HfConfig(fields, config.file)
        rope = config.rope(config.integer("head_dim"), 150_000.0)
        layers = config.layers(rope, config.optional_integer("sliding_window", 128), lambda layer: layer % 2 == 0)
        attention_bias = config.boolean("attention_bias", True)
        return config.decoder(
            architecture,
            tuple(replace(layer, is_moe=True) for layer in layers),
            norm_eps=config.number("rms_norm_eps", 1e-5),
            max_position_embeddings=config.integer("max_position_embeddings", 131072),
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            attention_sinks=True,
            moe=MoeSpec(
                num_experts=config.integer("num_local_experts", 128),
                num_chosen=config.integer("num_experts_per_tok", 4),
                intermediate_size=config.integer("intermediate_size"),
                renormalize=True,
                router_bias=True,
                expert_bias=True,
                storage="each" if config.text("expert_storage", "fused") == "each" else "fused",
                activation="swiglu_oai",
            ),
        )
