"""Fields of `config.json` for mixtures with shared experts, groups of experts or a bias for choosing them.

Defaults are of the released models: older files lack keys that newer ones have.
"""

from __future__ import annotations

from typing import Any

from gpu_worker.loading.gguf_metadata import CheckedMetadata
from gpu_worker.loading.gguf_names import DEEPSEEK_V2, MISTRAL_LARGE_3, SIGMOID

Config = dict[str, Any]

# By the number of experts: V2 and V3, whose older files leave it out. Kimi K2 and V2-Lite have one group.
_DEEPSEEK_GROUPS = {160: (8, 3), 256: (8, 4)}
_LLAMA4_NO_ROPE_INTERVAL = 4
_LLAMA4_CHUNK = 8192
_MAVERICK_EXPERTS = 128


class MixtureFields(CheckedMetadata):
    """Each method adds to a config that has what all architectures have."""

    def add_deepseek2(self, config: Config) -> None:
        # Files with one compressed head have the sizes of a whole one under keys of their own.
        end = "" if "blk.0.attn_kv_b.weight" in self.tensors else "_mla"
        config.pop("head_dim")
        rope_dim = self.required("rope.dimension_count", int)
        config |= {
            "num_key_value_heads": config["num_attention_heads"],
            "q_lora_rank": self.optional("attention.q_lora_rank", int),
            "kv_lora_rank": self.required("attention.kv_lora_rank", int),
            "qk_rope_head_dim": rope_dim,
            "qk_nope_head_dim": self.required(f"attention.key_length{end}", int) - rope_dim,
            "v_head_dim": self.required(f"attention.value_length{end}", int),
        }
        self._add_latent_routing(config)
        if self.reader.architecture is DEEPSEEK_V2:
            config["topk_method"] = "group_limited_greedy" if config["n_group"] > 1 else "greedy"
        # llama.cpp takes its two weights to be the same, and the file has a tenth of them.
        weight = round(10 * self.optional("rope.scaling.yarn_log_multiplier", float, 0.0), 5)
        if config["rope_scaling"] is not None and weight:
            config["rope_scaling"] |= {"mscale": weight, "mscale_all_dim": weight}

        if self.reader.architecture.hf_class == MISTRAL_LARGE_3.hf_class:
            config["expert_storage"] = "each"
            beta = self.optional("attention.temperature_scale", float, 0.0)
            if config["rope_scaling"] is not None and beta:
                config["rope_scaling"]["llama_4_scaling_beta"] = beta

    def _add_latent_routing(self, config: Config) -> None:
        num_experts = self.optional("expert_count", int, 0)
        if num_experts:
            self.add_routing(config, *_DEEPSEEK_GROUPS.get(num_experts, (1, 1)))
            return
        # Youtu: every layer is dense.
        config |= dict.fromkeys(("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"), 1)
        config |= {"first_k_dense_replace": config["num_hidden_layers"], "moe_intermediate_size": 1}

    def add_routing(self, config: Config, groups: int, chosen_groups: int) -> None:
        """`groups`: where the file does not say."""
        config |= {
            "n_routed_experts": self.required("expert_count", int),
            "num_experts_per_tok": self.required("expert_used_count", int),
            "n_shared_experts": self.required("expert_shared_count", int),
            "moe_intermediate_size": self.required("expert_feed_forward_length", int),
            "first_k_dense_replace": self.required("leading_dense_block_count", int),
            "routed_scaling_factor": self.optional("expert_weights_scale", float, 1.0),
            "norm_topk_prob": self.optional("expert_weights_norm", bool, False),
            "n_group": self.optional("expert_group_count", int, groups),
            "topk_group": self.optional("expert_group_used_count", int, chosen_groups),
        }

    def add_glm4_moe(self, config: Config) -> None:
        self.refuse_all_but_sigmoid()
        config["partial_rotary_factor"] = self.required("rope.dimension_count", int) / config["head_dim"]
        config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in self.tensors
        self.add_routing(config, 1, 1)

    def refuse_all_but_sigmoid(self) -> None:
        if self.optional("expert_gating_func", int, SIGMOID) != SIGMOID:
            raise self.fail("chooses experts by another function than sigmoid (expert_gating_func)")

    def add_llama4(self, config: Config) -> None:
        """What the file leaves out is as llama.cpp has it (`src/models/llama4.cpp`), for the released models."""
        num_experts = self.required("expert_count", int)
        config |= {
            "num_local_experts": num_experts,
            "num_experts_per_tok": self.required("expert_used_count", int),
            "intermediate_size_mlp": config["intermediate_size"],
            "intermediate_size": self.required("expert_feed_forward_length", int),
            "interleave_moe_layer_step": self.required("interleave_moe_layer_step", int),
            "use_qk_norm": num_experts != _MAVERICK_EXPERTS,
            "no_rope_layers": [
                int((layer + 1) % _LLAMA4_NO_ROPE_INTERVAL != 0) for layer in range(config["num_hidden_layers"])
            ],
            "attention_chunk_size": _LLAMA4_CHUNK,
            "attn_temperature_tuning": True,
            "floor_scale": _LLAMA4_CHUNK,
            "attn_scale": 0.1,
            "expert_storage": "each",
        }
        if self.optional("attention.sliding_window", int) == 0:
            raise self.fail("attends to everything in every layer (attention.sliding_window is 0)")

    def add_minimax(self, config: Config) -> None:
        self.refuse_all_but_sigmoid()
        config |= {
            "num_local_experts": self.required("expert_count", int),
            "num_experts_per_tok": self.required("expert_used_count", int),
            "intermediate_size": self.required("expert_feed_forward_length", int),
            "rotary_dim": self.required("rope.dimension_count", int),
            "scoring_func": "sigmoid",
            "use_qk_norm": True,
        }
