"""Fields of `config.json` for Gemma 4, whose layers with windows and without have sizes of their own."""

from __future__ import annotations

from gpu_worker.loading.gguf_metadata import CheckedMetadata
from gpu_worker.loading.gguf_mixture_config import Config

_LOCAL_ROPE_BASE = 10000.0


class Gemma4Fields(CheckedMetadata):
    """What is asked for each layer; `add_gemma4` adds to a config that has what all architectures have."""

    def of_first_layer(self, key: str, default: int | None = None) -> int:
        """A size that may differ from layer to layer where the architecture has layers of several kinds."""
        sizes = self._sizes_of_layers(key)
        if sizes:
            return sizes[0]
        return int(self.required(key, int) if default is None else self.optional(key, int, default))

    def _sizes_of_layers(self, key: str) -> list[int]:
        """One a layer; empty: the file has one for all."""
        sizes = self.metadata.get(f"{self.prefix}.{key}") if self.prefix == "gemma4" else None
        is_listed = isinstance(sizes, list) and all(type(size) is int for size in sizes)
        return [int(size) for size in sizes] if isinstance(sizes, list) and is_listed else []

    def add_gemma4(self, config: Config) -> None:
        """Windows are there already. Sizes under plain keys are those of full attention."""
        kinds, num_shared = config["layer_types"], self.optional("attention.shared_kv_layers", int, 0)
        of_kind = {kind: kinds.index(kind) for kind in ("full_attention", "sliding_attention") if kind in kinds}
        kv_heads = self._sizes_of_layers("attention.head_count_kv")
        widths = self._sizes_of_layers("feed_forward_length")
        if len(of_kind) != 2 or any(sizes and len(sizes) != len(kinds) for sizes in (kv_heads, widths)):
            raise self.fail(f"has no sizes for {len(kinds)} layers with windows and without")
        full, windowed = of_kind["full_attention"], of_kind["sliding_attention"]
        config |= {
            "global_head_dim": config["head_dim"],
            "head_dim": self.required("attention.key_length_swa", int),
            "num_kv_shared_layers": num_shared,
            "use_double_wide_mlp": len(set(widths)) > 1,
            "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in self.tensors,
            "final_logit_softcapping": self.optional("final_logit_softcapping", float),
            "hidden_size_per_layer_input": self.optional("embedding_length_per_layer_input", int, 0),
        }
        if kv_heads:
            config |= {"num_key_value_heads": kv_heads[windowed], "num_global_key_value_heads": kv_heads[full]}
        if config["hidden_size_per_layer_input"]:
            config["vocab_size_per_layer_input"] = self.shape("per_layer_token_embd.weight")[0]
        self._add_gemma4_rope(config)
        num_experts = self.optional("expert_count", int, 0)
        if num_experts:
            config |= {
                "enable_moe_block": True,
                "num_experts": num_experts,
                "top_k_experts": self.required("expert_used_count", int),
                "moe_intermediate_size": self.required("expert_feed_forward_length", int),
                "expert_storage": "each",
            }

    def _add_gemma4_rope(self, config: Config) -> None:
        """Pairs that stand still are divided by 1e30; which do is the share of a head that is rotated."""
        num_pairs = config["global_head_dim"] // 2
        factors = self.rope_factors("rope_freqs.weight", num_pairs)
        num_rotated = factors.count(1.0)
        if any(factor != 1.0 for factor in factors[:num_rotated]) or any(f < 1e29 for f in factors[num_rotated:]):
            raise self.fail("does not say which dimensions of a head are rotated", "rope_freqs.weight")
        if self.optional("rope.dimension_count_swa", int, config["head_dim"]) != config["head_dim"]:
            raise self.fail("rotates heads of layers with windows in part")
        config.pop("rope_scaling")
        config["rope_parameters"] = {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": config.pop("rope_theta"),
                "partial_rotary_factor": num_rotated / num_pairs,
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": self.optional("rope.freq_base_swa", float, _LOCAL_ROPE_BASE),
            },
        }
