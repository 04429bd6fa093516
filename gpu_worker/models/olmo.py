"""OLMo 2 and 3: norms after attention and MLP only, and over all heads; OLMo 3 has windows. OLMoE."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.model_spec import ModelSpec, MoeSpec
from gpu_worker.models.family import ModelFamily, NameRules
from gpu_worker.models.hf_config import FULL, SLIDING, HfConfig
from gpu_worker.models.moe import QWEN_MOE_NAMES
from gpu_worker.models.qwen import QWEN3_NAMES
from gpu_worker.models.registry import register

POST_NORM_NAMES: NameRules = QWEN3_NAMES | {
    "layers.{i}.attention_post_norm": {"": "model.layers.{i}.post_attention_layernorm"},
    "layers.{i}.mlp_post_norm": {"": "model.layers.{i}.post_feedforward_layernorm"},
}


@register("Olmo2ForCausalLM", "Olmo3ForCausalLM")
class Olmo(ModelFamily):
    name_rules = POST_NORM_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        is_olmo3 = architecture == "Olmo3ForCausalLM"
        head_dim = config.heads()[2]
        theta = 500_000.0 if is_olmo3 else 10_000.0
        rope = config.rope(head_dim, theta, layer_type=FULL)
        # Old configs of OLMo 3 scale the full layers' rope alone.
        plain = HfConfig({name: value for name, value in config.fields.items() if name != "rope_scaling"}, config.file)
        ropes = {FULL: rope, SLIDING: plain.rope(head_dim, theta, layer_type=SLIDING)}
        window = config.optional_integer("sliding_window", 4096) if is_olmo3 else None
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            config.layers(ropes, window, lambda layer: (layer + 1) % 4 != 0),
            norm_eps=config.number("rms_norm_eps", 1e-5),
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            qk_norm="projection",
            pre_norms=False,
            post_norms=True,
        )


@register("OlmoeForCausalLM")
class OlmoMoe(ModelFamily):
    """OLMoE: norms before the sublayers, and a mixture in every layer."""

    name_rules = QWEN_MOE_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        config.refuse("clip_qkv")
        layers = config.layers(config.rope(config.heads()[2]), None)
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            tuple(replace(layer, is_moe=True) for layer in layers),
            norm_eps=config.number("rms_norm_eps", 1e-5),
            max_position_embeddings=config.integer("max_position_embeddings", 4096),
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            qk_norm="projection",
            moe=MoeSpec(
                num_experts=config.integer("num_experts", 64),
                num_chosen=config.integer("num_experts_per_tok", 8),
                intermediate_size=config.integer("intermediate_size", 2048),
                renormalize=config.boolean("norm_topk_prob", False),
                activation=config.text("hidden_act", "silu"),
            ),
        )
