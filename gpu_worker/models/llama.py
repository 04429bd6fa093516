"""Llama 2, 3, 3.1, 3.2, SmolLM2 and what else calls itself Llama; Mistral and Ministral."""

from __future__ import annotations

from gpu_worker.model_spec import ModelSpec, QueryScaling
from gpu_worker.models.family import ModelFamily, NameRules
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.registry import register

LLAMA_NAMES: NameRules = {
    "embedding": {"": "model.embed_tokens"},
    "layers.{i}.attention_norm": {"": "model.layers.{i}.input_layernorm"},
    "layers.{i}.attention.qkv": {
        "q": "model.layers.{i}.self_attn.q_proj",
        "k": "model.layers.{i}.self_attn.k_proj",
        "v": "model.layers.{i}.self_attn.v_proj",
    },
    "layers.{i}.attention.output": {"": "model.layers.{i}.self_attn.o_proj"},
    "layers.{i}.mlp_norm": {"": "model.layers.{i}.post_attention_layernorm"},
    "layers.{i}.mlp.gate_up": {
        "gate": "model.layers.{i}.mlp.gate_proj",
        "up": "model.layers.{i}.mlp.up_proj",
    },
    "layers.{i}.mlp.down": {"": "model.layers.{i}.mlp.down_proj"},
    "final_norm": {"": "model.norm"},
    "head": {"": "lm_head"},
}


@register("LlamaForCausalLM", "MistralForCausalLM", "MinistralForCausalLM", "Ministral3ForCausalLM")
class Llama(ModelFamily):
    name_rules = LLAMA_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        # Llama has no windows; a Mistral without the field has one (its class default in transformers), null means
        # none.
        window = None
        if architecture in ("MistralForCausalLM", "MinistralForCausalLM"):
            window = config.optional_integer("sliding_window", 4096)
        if architecture == "Ministral3ForCausalLM":
            config = HfConfig({"head_dim": 128} | config.fields, config.file)
            window = config.optional_integer("sliding_window", None)
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            config.layers(config.rope(config.heads()[2]), window),
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            mlp_bias=config.boolean("mlp_bias", False),
            query_scaling=query_scaling(config),
        )


def query_scaling(config: HfConfig) -> QueryScaling | None:
    """Ministral 3's, which its config has among the parameters of rope."""
    rope = config.rope_parameters()
    weight = rope.optional_number("llama_4_scaling_beta")
    return QueryScaling(weight, rope.integer("original_max_position_embeddings")) if weight else None
