"""Builds a Hugging Face `config.json` from the metadata of a GGUF file.

Keys are written in the form that every reader knows (`rope_theta`, `rope_scaling`, `torch_dtype`), which transformers 5
takes as well as its own newer form. What the metadata does not say and the architecture implies (Gemma's window
pattern and local rope base) is written out.
"""

from __future__ import annotations

from collections.abc import Callable

from gpu_worker.loading.gguf_gemma4_config import Gemma4Fields
from gpu_worker.loading.gguf_mixture_config import Config, MixtureFields
from gpu_worker.loading.gguf_names import MIXTRAL, OLMO3
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.llama3_rope import llama3_scaling

# Gemma scales queries by head_dim ** -0.5, the 27B models (known by their depth) by (hidden_size / num_heads) ** -0.5.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_GEMMA3_PATTERN = 6  # five layers with a window, then one without
_GEMMA3_LOCAL_ROPE_BASE = 10000.0

# What the config calls the epsilon of a LayerNorm; of all others it is an RMSNorm's.
_LAYER_NORM_FIELDS = {"command-r": "layer_norm_eps", "cohere2": "layer_norm_eps", "starcoder2": "norm_epsilon"}

# The files do not say these; all released models have them.
_SMOLLM3_NO_ROPE_INTERVAL = 4
_STARCODER2_WINDOW = 4096
# Where the file has no pattern: three layers with a window, then one without (llama.cpp, `src/models/`).
_DEFAULT_PATTERN = 4


def build_config(reader: GgufReader, torch_dtype: str) -> Config:
    """The config of the model in `reader`, as if its weights were stored as `torch_dtype`.

    Raises:
        CheckpointError: a key is missing or of another kind, or a rope variant is not known.
    """
    return _ConfigBuilder(reader, torch_dtype).build()


class _ConfigBuilder(MixtureFields, Gemma4Fields):
    def __init__(self, reader: GgufReader, torch_dtype: str) -> None:
        super().__init__(reader)
        self._torch_dtype = torch_dtype

    def build(self) -> Config:
        config = self._common()
        details: dict[str, Callable[[Config], None]] = {
            "llama": self._add_llama,
            "qwen2": self._add_qwen,
            "qwen3": self._add_qwen,
            "qwen2moe": self._add_qwen_moe,
            "qwen3moe": self._add_qwen_moe,
            "gpt-oss": self._add_gpt_oss,
            "gemma": self._add_gemma,
            "gemma2": self._add_gemma2,
            "gemma3": self._add_gemma3,
            "gemma4": self._add_gemma4,
            "phi3": self._add_phi3,
            "mistral3": self._add_mistral3,
            "smollm3": self._add_smollm3,
            "granite": self._add_granite,
            "olmo2": self._add_olmo2,
            "command-r": self._add_command_r,
            "cohere2": self._add_cohere2,
            "starcoder2": self._add_starcoder2,
            "qwen2vl": self._add_qwen,
            "qwen3vl": self._add_qwen,
            "qwen3vlmoe": self._add_qwen_moe,
            "seed_oss": self._add_seed_oss,
            "ernie4_5": self._add_ernie,
            "ernie4_5-moe": self._add_ernie_moe,
            "glm4": self._add_glm4,
            "exaone4": self._add_exaone4,
            "olmoe": self._add_olmoe,
            "deepseek2": self.add_deepseek2,
            "glm4moe": self.add_glm4_moe,
            "minimax-m2": self.add_minimax,
            "mistral4": self.add_deepseek2,
            "llama4": self._add_llama4,
            "granitemoe": self._add_granite_moe,
        }
        details[self.prefix](config)
        return config

    def _common(self) -> Config:
        architecture = self.reader.architecture
        num_heads = self.required("attention.head_count", int)
        hidden_size = self.required("embedding_length", int)
        embedding = self.shape("token_embd.weight")
        if embedding[-1] != hidden_size:
            raise self.fail(f"has rows of {embedding[-1]}, the metadata says {hidden_size}", "token_embd.weight")
        config: Config = {
            "architectures": [architecture.hf_class],
            "model_type": architecture.model_type,
            "torch_dtype": self._torch_dtype,
            "vocab_size": embedding[0],
            "hidden_size": hidden_size,
            "intermediate_size": self.of_first_layer("feed_forward_length"),
            "num_hidden_layers": self.required("block_count", int) - self.optional("nextn_predict_layers", int, 0),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self.of_first_layer("attention.head_count_kv", num_heads),
            "head_dim": self.optional("attention.key_length", int) or hidden_size // num_heads,
            "hidden_act": "silu",
            **self._norm_eps(),
            "max_position_embeddings": self.required("context_length", int),
            "rope_theta": self.optional("rope.freq_base", float, 10000.0),
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "use_cache": True,
        }
        for key in ("bos", "eos", "padding"):
            token_id = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if token_id is not None:
                config[f"{'pad' if key == 'padding' else key}_token_id"] = token_id
        return config

    def _norm_eps(self) -> Config:
        field = _LAYER_NORM_FIELDS.get(self.prefix)
        if field is not None:
            return {field: self.required("attention.layer_norm_epsilon", float)}
        return {"rms_norm_eps": self.required("attention.layer_norm_rms_epsilon", float)}

    def _rope_scaling(self) -> Config | None:
        kind = self.optional("rope.scaling.type", str, "none")
        factor = self.optional("rope.scaling.factor", float, 1.0)
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
        if kind == "yarn":
            yarn = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": self.required("rope.scaling.original_context_length", int),
            }
            for field, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
                value = self.optional(f"rope.scaling.{key}", float)
                if value is not None:
                    yarn[field] = value
            return yarn
        if kind not in ("none", "longrope"):  # longrope has its factors in tensors, and is added by its architecture
            raise self.fail(f"scales rope by the unknown kind {kind!r}")
        return None

    def _refuse_partial_rope(self, config: Config) -> None:
        rope_size = self.optional("rope.dimension_count", int, config["head_dim"])
        if rope_size != config["head_dim"]:
            raise self.fail(f"rotates {rope_size} of {config['head_dim']} dimensions of a head")

    def _add_llama(self, config: Config) -> None:
        self._refuse_partial_rope(config)
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in self.tensors
        if self.reader.architecture is MIXTRAL:
            config["num_local_experts"] = self.required("expert_count", int)
            config["num_experts_per_tok"] = self.required("expert_used_count", int)
            config["sliding_window"] = None
        if "rope_freqs.weight" in self.tensors:
            config["rope_scaling"] = self._llama3_scaling(config)

    def _llama3_scaling(self, config: Config) -> Config:
        """Finds the `llama3` rope parameters whose factors are those in the file."""
        stored = self.rope_factors("rope_freqs.weight", config["head_dim"] // 2)
        scaling = llama3_scaling(stored, config["rope_theta"])
        if scaling is None:
            raise self.fail("does not hold the factors of Llama 3's rope scaling", "rope_freqs.weight")
        return scaling

    def _add_qwen(self, config: Config) -> None:
        config["use_sliding_window"] = False

    def _add_qwen_moe(self, config: Config) -> None:
        self._add_qwen(config)
        is_qwen3 = self.prefix in ("qwen3moe", "qwen3vlmoe")
        self._add_expert_counts(config)
        config["moe_intermediate_size"] = self.shape("blk.0.ffn_gate_exps.weight")[1]
        # The file does not say it; all released models of either have this.
        config["norm_topk_prob"] = is_qwen3
        if is_qwen3:
            return
        config["qkv_bias"] = config.pop("attention_bias")
        config["shared_expert_intermediate_size"] = self.shape("blk.0.ffn_gate_shexp.weight")[0]

    def _add_expert_counts(self, config: Config) -> None:
        config["num_experts"] = self.required("expert_count", int)
        config["num_experts_per_tok"] = self.required("expert_used_count", int)

    def _add_gpt_oss(self, config: Config) -> None:
        config["num_local_experts"] = self.required("expert_count", int)
        config["num_experts_per_tok"] = self.required("expert_used_count", int)
        config["intermediate_size"] = self.shape("blk.0.ffn_gate_exps.weight")[1]
        config["sliding_window"] = self.required("attention.sliding_window", int)
        config["layer_types"] = [
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(config["num_hidden_layers"])
        ]
        if config["rope_scaling"] is not None:
            config["rope_scaling"] |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
        # gate and up are tensors of their own here, and so is every expert.
        config["expert_storage"] = "each"

    def _add_gemma(self, config: Config) -> None:
        config["hidden_act"] = config["hidden_activation"] = "gelu_pytorch_tanh"

    def _add_gemma2(self, config: Config) -> None:
        self._add_gemma(config)
        config["attn_logit_softcapping"] = self.optional("attn_logit_softcapping", float, 50.0)
        config["final_logit_softcapping"] = self.optional("final_logit_softcapping", float, 30.0)
        config["sliding_window"] = self.optional("attention.sliding_window", int, 4096)
        config["query_pre_attn_scalar"] = self._query_scalar(config)
        config["layer_types"] = [
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(config["num_hidden_layers"])
        ]

    def _add_gemma3(self, config: Config) -> None:
        self._add_gemma(config)
        config["sliding_window"] = self.required("attention.sliding_window", int)
        config["sliding_window_pattern"] = _GEMMA3_PATTERN
        config["layer_types"] = [
            "sliding_attention" if (layer + 1) % _GEMMA3_PATTERN else "full_attention"
            for layer in range(config["num_hidden_layers"])
        ]
        # files written before the key existed leave the base out, and all released models have this one
        config["rope_theta"] = self.optional("rope.freq_base", float, 1_000_000.0)
        config["rope_local_base_freq"] = self.optional("rope.freq_base_swa", float, _GEMMA3_LOCAL_ROPE_BASE)
        config["query_pre_attn_scalar"] = self._query_scalar(config)
        config["attn_logit_softcapping"] = None
        config["final_logit_softcapping"] = None

    def _add_gemma4(self, config: Config) -> None:
        self._add_gemma(config)
        self._add_windows(config)
        self.add_gemma4(config)

    def _query_scalar(self, config: Config) -> int:
        if config["num_hidden_layers"] == _GEMMA_27B_LAYERS[self.prefix]:
            return int(config["hidden_size"] // config["num_attention_heads"])
        return int(config["head_dim"])

    def _add_phi3(self, config: Config) -> None:
        rope_size = self.optional("rope.dimension_count", int, config["head_dim"])
        if rope_size != config["head_dim"]:
            config["partial_rotary_factor"] = rope_size / config["head_dim"]
        config["original_max_position_embeddings"] = self.optional(
            "rope.scaling.original_context_length", int, config["max_position_embeddings"]
        )
        config["sliding_window"] = self.optional("attention.sliding_window", int) or None
        # the class has pad 32000 by default, which a smaller vocabulary does not have
        config.setdefault("pad_token_id", None)
        if "rope_factors_long.weight" in self.tensors:
            config["rope_scaling"] = {
                "type": "longrope",
                "rope_type": "longrope",
                "short_factor": self.rope_factors("rope_factors_short.weight", rope_size // 2),
                "long_factor": self.rope_factors("rope_factors_long.weight", rope_size // 2),
            }

    def _add_mistral3(self, config: Config) -> None:
        """Ministral 3, and Mistral Small, which differs by what its file leaves out."""
        self._add_llama(config)
        config["sliding_window"] = None
        config.setdefault("pad_token_id", None)
        scaling = config["rope_scaling"]
        if scaling is None:
            return
        # The file has mscale_all_dim (src/models/mistral3.cpp takes mscale to be 1); 0: YaRN's own factor.
        all_dims = self.optional("rope.scaling.yarn_log_multiplier", float, 0.0)
        if all_dims:
            scaling |= {"mscale": 1.0, "mscale_all_dim": all_dims}
        beta = self.optional("attention.temperature_scale", float, 0.0)
        if beta:
            scaling["llama_4_scaling_beta"] = beta

    def _add_smollm3(self, config: Config) -> None:
        self._add_llama(config)
        config["no_rope_layers"] = [
            int((layer + 1) % _SMOLLM3_NO_ROPE_INTERVAL != 0) for layer in range(config["num_hidden_layers"])
        ]
        config["use_sliding_window"] = False
        config.setdefault("pad_token_id", None)

    def _add_llama4(self, config: Config) -> None:
        self._refuse_partial_rope(config)
        self.add_llama4(config)
        if "rope_freqs.weight" in self.tensors:
            config["rope_scaling"] = self._llama3_scaling(config)

    def _add_granite_moe(self, config: Config) -> None:
        self._add_granite(config)
        if self.optional("expert_shared_feed_forward_length", int):
            raise self.fail("has an expert that every token takes (expert_shared_feed_forward_length)")
        config["num_local_experts"] = self.required("expert_count", int)
        config["num_experts_per_tok"] = self.required("expert_used_count", int)
        config["expert_storage"] = "each"

    def _add_granite(self, config: Config) -> None:
        """The converter leaves out multipliers that are 0; llama.cpp then scales attention as usual."""
        self._add_llama(config)
        if not self.optional("rope.scaling.finetuned", bool, True):
            raise self.fail("rotates nothing (rope.scaling.finetuned)")
        # Granite 4 has another size in its config, of experts that its dense models do not have.
        experts = "blk.0.ffn_gate_exps.weight"
        config["intermediate_size"] = self.shape(experts if experts in self.tensors else "blk.0.ffn_gate.weight")[-2]
        config["attention_multiplier"] = self.optional("attention.scale", float) or config["head_dim"] ** -0.5
        config["embedding_multiplier"] = self.optional("embedding_scale", float) or 1.0
        config["residual_multiplier"] = self.optional("residual_scale", float) or 1.0
        config["logits_scaling"] = self.required("logit_scale", float)

    def _add_olmo2(self, config: Config) -> None:
        self._refuse_partial_rope(config)
        config.setdefault("pad_token_id", None)
        if self.reader.architecture is not OLMO3:
            return
        self._add_windows(config)
        # Only the layers without a window are stretched.
        theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
        factor = self.optional("rope.scaling.attn_factor", float)
        if scaling is not None and factor is not None:
            scaling["attention_factor"] = factor
        config["rope_parameters"] = {
            "full_attention": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
            "sliding_attention": {"rope_theta": theta, "rope_type": "default"},
        }

    def _add_windows(self, config: Config) -> None:
        """The pattern is a flag for every layer, or after how many a layer has no window."""
        config["sliding_window"] = self.required("attention.sliding_window", int)
        pattern = self.metadata.get(f"{self.prefix}.attention.sliding_window_pattern", _DEFAULT_PATTERN)
        num_layers = config["num_hidden_layers"]
        flags = [(layer + 1) % pattern != 0 for layer in range(num_layers)] if isinstance(pattern, int) else pattern
        if not isinstance(flags, list) or len(flags) != num_layers:
            raise self.fail(f"has the windows {pattern!r:.60} for {num_layers} layers")
        config["layer_types"] = ["sliding_attention" if flag else "full_attention" for flag in flags]

    def _add_command_r(self, config: Config) -> None:
        self._refuse_partial_rope(config)
        config["logit_scale"] = self.required("logit_scale", float)
        config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in self.tensors
        config.setdefault("pad_token_id", None)

    def _add_cohere2(self, config: Config) -> None:
        self._refuse_partial_rope(config)
        config["logit_scale"] = self.required("logit_scale", float)
        self._add_windows(config)
        config.setdefault("pad_token_id", None)

    def _add_starcoder2(self, config: Config) -> None:
        self._refuse_partial_rope(config)
        config["hidden_act"] = "gelu_pytorch_tanh"
        config["use_bias"] = "blk.0.attn_q.bias" in self.tensors
        config["sliding_window"] = self.optional("attention.sliding_window", int, _STARCODER2_WINDOW)

    def _add_seed_oss(self, config: Config) -> None:
        self._refuse_partial_rope(config)
        config["attention_out_bias"] = "blk.0.attn_output.bias" in self.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in self.tensors
        config.setdefault("pad_token_id", None)

    def _add_ernie(self, config: Config) -> None:
        self._refuse_partial_rope(config)
        config["use_bias"] = config.pop("attention_bias")
        config.setdefault("pad_token_id", None)

    def _add_ernie_moe(self, config: Config) -> None:
        self._add_ernie(config)
        config |= {
            "moe_num_experts": self.required("expert_count", int),
            "moe_k": self.required("expert_used_count", int),
            "moe_num_shared_experts": self.required("expert_shared_count", int),
            "moe_intermediate_size": self.required("expert_feed_forward_length", int),
            "moe_layer_start_index": self.required("leading_dense_block_count", int),
            "moe_layer_interval": self.required("interleave_moe_layer_step", int),
            "moe_layer_end_index": -1,
        }

    def _add_glm4(self, config: Config) -> None:
        if "glm4.rope.dimension_sections" in self.metadata:  # GLM-4.1V, whose q and k rows lie in another order
            raise self.fail("is the text part of a model that sees (rope.dimension_sections)")
        config["partial_rotary_factor"] = self.required("rope.dimension_count", int) / config["head_dim"]
        config.setdefault("pad_token_id", None)

    def _add_exaone4(self, config: Config) -> None:
        self._refuse_partial_rope(config)
        if self.optional("attention.sliding_window", int):
            self._add_windows(config)
        else:
            config |= {"sliding_window": None, "layer_types": ["full_attention"] * config["num_hidden_layers"]}
        if "rope_freqs.weight" in self.tensors:
            config["rope_scaling"] = self._llama3_scaling(config)

    def _add_olmoe(self, config: Config) -> None:
        self._refuse_partial_rope(config)
        self._add_expert_counts(config)
        config["intermediate_size"] = self.shape("blk.0.ffn_gate_exps.weight")[1]
        # The file does not say it; the released models have this.
        config["norm_topk_prob"] = False
        config.setdefault("pad_token_id", None)
