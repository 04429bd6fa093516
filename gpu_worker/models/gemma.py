"""Gemma, Gemma 2 and Gemma 3 (text; of multimodal Gemma 3 checkpoints the language model alone)."""

from __future__ import annotations

from gpu_worker.model_spec import ModelSpec, RopeSpec
from gpu_worker.models.family import ModelFamily, NameRules
from gpu_worker.models.hf_config import FULL, SLIDING, HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.models.qwen import QWEN3_NAMES
from gpu_worker.models.registry import register

GEMMA_NAMES: NameRules = QWEN3_NAMES | {
    "layers.{i}.attention_post_norm": {"": "model.layers.{i}.post_attention_layernorm"},
    "layers.{i}.mlp_norm": {"": "model.layers.{i}.pre_feedforward_layernorm"},
    "layers.{i}.mlp_post_norm": {"": "model.layers.{i}.post_feedforward_layernorm"},
}


@register("GemmaForCausalLM")
class Gemma1(ModelFamily):
    name_rules = LLAMA_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        config.refuse("use_bidirectional_attention", False)
        config = HfConfig({"head_dim": 256} | config.fields, config.file)
        # Trained with the tanh form of GELU, whatever the first releases' hidden_act says.
        activation = config.text("hidden_activation", config.text("hidden_act", "gelu_pytorch_tanh"))
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            config.layers(config.rope(config.integer("head_dim")), None),
            max_position_embeddings=config.integer("max_position_embeddings", 8192),
            activation="gelu_pytorch_tanh" if activation == "gelu" else activation,
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            norm_weight_offset=1.0,
            embedding_scale=config.integer("hidden_size") ** 0.5,
            tie_word_embeddings=config.boolean("tie_word_embeddings", True),
        )


@register("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
class Gemma(ModelFamily):
    name_rules = GEMMA_NAMES
    skipped_tensors = r"(model\.)?(vision_tower|multi_modal_projector)\."

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        tied = config.boolean("tie_word_embeddings", True)
        if architecture == "Gemma3ForConditionalGeneration":
            config = config.nested("text_config")
        config.refuse("use_bidirectional_attention", False)
        is_gemma2 = architecture == "Gemma2ForCausalLM"
        # Defaults of the classes in transformers: nested configs leave most of them out.
        defaults = {
            "vocab_size": 256_000 if is_gemma2 else 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192 if is_gemma2 else 131_072,
        }
        config = HfConfig(defaults | config.fields, config.file)
        head_dim = config.integer("head_dim")
        pattern = 2 if is_gemma2 else config.integer("sliding_window_pattern", 6)
        rope = config.rope(head_dim, 10_000.0 if is_gemma2 else 1_000_000.0, layer_type=FULL)
        ropes = {FULL: rope, SLIDING: rope if is_gemma2 else local_rope(config, head_dim)}
        attention_bias = config.boolean("attention_bias", False)
        return config.decoder(
            architecture,
            config.layers(ropes, config.optional_integer("sliding_window", 4096), lambda i: bool((i + 1) % pattern)),
            activation=config.text("hidden_activation", "gelu_pytorch_tanh"),
            qkv_bias=attention_bias,
            attention_output_bias=attention_bias,
            qk_norm=None if is_gemma2 else "head",
            norm_weight_offset=1.0,
            post_norms=True,
            embedding_scale=config.integer("hidden_size") ** 0.5,
            softmax_scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
            attention_softcap=config.optional_number("attn_logit_softcapping", 50.0 if is_gemma2 else None),
            logit_softcap=config.optional_number("final_logit_softcapping", 30.0 if is_gemma2 else None),
            tie_word_embeddings=config.boolean("tie_word_embeddings", tied),
        )


def local_rope(config: HfConfig, head_dim: int) -> RopeSpec:
    """The sliding layers' rope: in old configs a base of its own, and never the other layers' scaling."""
    parameters = config.fields.get("rope_parameters") or {}
    if SLIDING in parameters:
        return config.rope(head_dim, 10_000.0, layer_type=SLIDING)
    return RopeSpec(theta=config.number("rope_local_base_freq", 10_000.0), rotary_dim=head_dim)
