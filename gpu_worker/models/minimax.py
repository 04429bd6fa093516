"""MiniMax-M2: partly rotated heads, norms over all of a projection's heads, and a mixture in every layer."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.model_spec import ModelSpec, MoeSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.moe import MIXTRAL_NAMES
from gpu_worker.models.qwen import QWEN3_NAMES
from gpu_worker.models.registry import register


@register("MiniMaxM2ForCausalLM")
class MiniMaxM2(ModelFamily):
    name_rules = QWEN3_NAMES | MIXTRAL_NAMES

    @classmethod
    def canonical_name(cls, name: str) -> str:
        return super().canonical_name(name).replace(".block_sparse_moe.e_score_", ".block_sparse_moe.gate.e_score_")

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        config.refuse("scoring_func", "sigmoid")
        config.refuse("use_qk_norm", True)
        config.refuse("qk_norm_type", "per_layer")
        config.refuse("shared_intermediate_size", 0)
        head_dim = config.integer("head_dim", 128)
        fields = {"head_dim": head_dim, "num_key_value_heads": 8} | config.fields
        if "rotary_dim" in fields:
            fields.setdefault("partial_rotary_factor", config.integer("rotary_dim") / head_dim)
        config = HfConfig(fields, config.file)
        return config.decoder(
            architecture,
            tuple(
                replace(layer, is_moe=True)
                for layer in config.layers(config.rope(head_dim, 5_000_000.0, rotates_partly=True), None)
            ),
            max_position_embeddings=config.integer("max_position_embeddings", 196_608),
            qk_norm="projection",
            moe=MoeSpec(
                num_experts=config.integer("num_local_experts", 256),
                num_chosen=config.integer("num_experts_per_tok", 8),
                intermediate_size=config.integer("intermediate_size"),
                scoring="sigmoid",
                renormalize=True,
                has_correction_bias=True,
                activation=config.text("hidden_act", "silu"),
            ),
        )
