"""StarCoder2: LayerNorm with bias, biases on every linear, an MLP without gate."""

from __future__ import annotations

from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.registry import register


@register("Starcoder2ForCausalLM")
class StarCoder2(ModelFamily):
    name_rules = LLAMA_NAMES | {
        "layers.{i}.mlp.up": {"": "model.layers.{i}.mlp.c_fc"},
        "layers.{i}.mlp.down": {"": "model.layers.{i}.mlp.c_proj"},
    }

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        bias = config.boolean("use_bias", True)
        return config.decoder(
            architecture,
            config.layers(config.rope(config.heads()[2]), config.optional_integer("sliding_window")),
            max_position_embeddings=config.integer("max_position_embeddings", 4096),
            norm_eps=config.number("norm_epsilon", 1e-5),
            norm_kind="layer",
            norm_bias=True,
            activation=config.text("hidden_act", "gelu_pytorch_tanh"),
            gated_mlp=False,
            qkv_bias=bias,
            attention_output_bias=bias,
            mlp_bias=bias,
            tie_word_embeddings=config.boolean("tie_word_embeddings", True),
        )
