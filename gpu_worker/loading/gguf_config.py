"""Builds a Hugging Face `config.json` from the metadata of a GGUF file.

Keys are written in the form that every reader knows (`rope_theta`, `rope_scaling`, `torch_dtype`), which transformers 5
takes as well as its own newer form. What the metadata does not say and the architecture implies (Gemma's window
pattern and local rope base) is written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gpu_worker.loading.gguf_names import MIXTRAL
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.tensor_source import CheckpointError

Config = dict[str, Any]

# Gemma scales queries by head_dim ** -0.5, the 27B models (known by their depth) by (hidden_size / num_heads) ** -0.5.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_GEMMA3_PATTERN = 6  # five layers with a window, then one without
_GEMMA3_LOCAL_ROPE_BASE = 10000.0

# Llama 3.1 and later; the file has only the resulting factor per frequency, so the parameters are tried and compared.
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_CONTEXT = 8192


def build_config(reader: GgufReader, torch_dtype: str) -> Config:
    """The config of the model in `reader`, as if its weights were stored as `torch_dtype`.

    Raises:
        CheckpointError: a key is missing or of another kind, or a rope variant is not known.
    """
    return _ConfigBuilder(reader, torch_dtype).build()


class _ConfigBuilder:
    def __init__(self, reader: GgufReader, torch_dtype: str) -> None:
        self._reader = reader
        self._metadata = reader.file.metadata
        self._tensors = reader.file.tensors
        self._prefix = reader.architecture_name
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
            "phi3": self._add_phi3,
        }
        details[self._prefix](config)
        return config

    def _fail(self, reason: str, tensor: str | None = None) -> CheckpointError:
        advice = "the file is of a variant that is not known: use the safetensors version of the model"
        return CheckpointError(self._reader.path, reason, tensor=tensor, advice=advice)

    def _optional(self, key: str, kind: type, default: Any = None) -> Any:
        name = f"{self._prefix}.{key}"
        if name not in self._metadata:
            return default
        value = self._metadata[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self._fail(f"metadata key {name!r} is {value!r:.60} and not of the kind {kind.__name__}")
        return value

    def _required(self, key: str, kind: type) -> Any:
        value = self._optional(key, kind)
        if value is None:
            raise self._fail(f"lacks the metadata key '{self._prefix}.{key}'")
        return value

    def _shape(self, gguf_name: str) -> tuple[int, ...]:
        if gguf_name not in self._tensors:
            raise self._fail("is missing", gguf_name)
        return self._tensors[gguf_name].shape

    def _common(self) -> Config:
        architecture = self._reader.architecture
        num_heads = self._required("attention.head_count", int)
        hidden_size = self._required("embedding_length", int)
        embedding = self._shape("token_embd.weight")
        if embedding[-1] != hidden_size:
            raise self._fail(f"has rows of {embedding[-1]}, the metadata says {hidden_size}", "token_embd.weight")
        config: Config = {
            "architectures": [architecture.hf_class],
            "model_type": architecture.model_type,
            "torch_dtype": self._torch_dtype,
            "vocab_size": embedding[0],
            "hidden_size": hidden_size,
            "intermediate_size": self._required("feed_forward_length", int),
            "num_hidden_layers": self._required("block_count", int),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._optional("attention.head_count_kv", int, num_heads),
            "head_dim": self._optional("attention.key_length", int) or hidden_size // num_heads,
            "hidden_act": "silu",
            "rms_norm_eps": self._required("attention.layer_norm_rms_epsilon", float),
            "max_position_embeddings": self._required("context_length", int),
            "rope_theta": self._optional("rope.freq_base", float, 10000.0),
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "use_cache": True,
        }
        for key in ("bos", "eos", "padding"):
            token_id = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
            if token_id is not None:
                config[f"{'pad' if key == 'padding' else key}_token_id"] = token_id
        return config

    def _rope_scaling(self) -> Config | None:
        kind = self._optional("rope.scaling.type", str, "none")
        factor = self._optional("rope.scaling.factor", float, 1.0)
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
        if kind == "yarn":
            return {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": self._required("rope.scaling.original_context_length", int),
            }
        if kind not in ("none", "longrope"):  # longrope has its factors in tensors, and is added by its architecture
            raise self._fail(f"scales rope by the unknown kind {kind!r}")
        return None

    def _add_llama(self, config: Config) -> None:
        rope_size = self._optional("rope.dimension_count", int, config["head_dim"])
        if rope_size != config["head_dim"]:
            raise self._fail(f"rotates {rope_size} of {config['head_dim']} dimensions of a head")
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in self._tensors
        if self._reader.architecture is MIXTRAL:
            config["num_local_experts"] = self._required("expert_count", int)
            config["num_experts_per_tok"] = self._required("expert_used_count", int)
            config["sliding_window"] = None
        if "rope_freqs.weight" in self._tensors:
            config["rope_scaling"] = self._llama3_scaling(config)

    def _llama3_scaling(self, config: Config) -> Config:
        """Finds the `llama3` rope parameters whose factors are those in the file."""
        stored = self._rope_factors("rope_freqs.weight", config["head_dim"] // 2)
        factor = round(max(stored), 4)
        expected = [
            _llama3_divisor(config["rope_theta"] ** (-2 * i / config["head_dim"]), factor) for i in range(len(stored))
        ]
        if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(stored, expected, strict=True)):
            raise self._fail("does not hold the factors of Llama 3's rope scaling", "rope_freqs.weight")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
            "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
        }

    def _rope_factors(self, gguf_name: str, count: int) -> list[float]:
        if self._shape(gguf_name) != (count,):
            raise self._fail(f"has the shape {list(self._shape(gguf_name))} and not {[count]}", gguf_name)
        tensor = self._tensors[gguf_name]
        values = tensor.ggml_type.decode(
            self._reader.file.read_rows(gguf_name).reshape(-1, tensor.ggml_type.block_bytes)
        )
        return [float(str(value)) for value in values.flatten().numpy()]

    def _add_qwen(self, config: Config) -> None:
        config["use_sliding_window"] = False

    def _add_qwen_moe(self, config: Config) -> None:
        self._add_qwen(config)
        is_qwen3 = self._prefix == "qwen3moe"
        config["num_experts"] = self._required("expert_count", int)
        config["num_experts_per_tok"] = self._required("expert_used_count", int)
        config["moe_intermediate_size"] = self._shape("blk.0.ffn_gate_exps.weight")[1]
        # The file does not say it; all released models of either have this.
        config["norm_topk_prob"] = is_qwen3
        if is_qwen3:
            return
        config["qkv_bias"] = config.pop("attention_bias")
        config["shared_expert_intermediate_size"] = self._shape("blk.0.ffn_gate_shexp.weight")[0]

    def _add_gpt_oss(self, config: Config) -> None:
        config["num_local_experts"] = self._required("expert_count", int)
        config["num_experts_per_tok"] = self._required("expert_used_count", int)
        config["intermediate_size"] = self._shape("blk.0.ffn_gate_exps.weight")[1]
        config["sliding_window"] = self._required("attention.sliding_window", int)
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
        config["attn_logit_softcapping"] = self._optional("attn_logit_softcapping", float, 50.0)
        config["final_logit_softcapping"] = self._optional("final_logit_softcapping", float, 30.0)
        config["sliding_window"] = self._optional("attention.sliding_window", int, 4096)
        config["query_pre_attn_scalar"] = self._query_scalar(config)
        config["layer_types"] = [
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(config["num_hidden_layers"])
        ]

    def _add_gemma3(self, config: Config) -> None:
        self._add_gemma(config)
        config["sliding_window"] = self._required("attention.sliding_window", int)
        config["sliding_window_pattern"] = _GEMMA3_PATTERN
        config["layer_types"] = [
            "sliding_attention" if (layer + 1) % _GEMMA3_PATTERN else "full_attention"
            for layer in range(config["num_hidden_layers"])
        ]
        # files written before the key existed leave the base out, and all released models have this one
        config["rope_theta"] = self._optional("rope.freq_base", float, 1_000_000.0)
        config["rope_local_base_freq"] = self._optional("rope.freq_base_swa", float, _GEMMA3_LOCAL_ROPE_BASE)
        config["query_pre_attn_scalar"] = self._query_scalar(config)
        config["attn_logit_softcapping"] = None
        config["final_logit_softcapping"] = None

    def _query_scalar(self, config: Config) -> int:
        if config["num_hidden_layers"] == _GEMMA_27B_LAYERS[self._prefix]:
            return int(config["hidden_size"] // config["num_attention_heads"])
        return int(config["head_dim"])

    def _add_phi3(self, config: Config) -> None:
        rope_size = self._optional("rope.dimension_count", int, config["head_dim"])
        if rope_size != config["head_dim"]:
            config["partial_rotary_factor"] = rope_size / config["head_dim"]
        config["original_max_position_embeddings"] = self._optional(
            "rope.scaling.original_context_length", int, config["max_position_embeddings"]
        )
        config["sliding_window"] = self._optional("attention.sliding_window", int) or None
        # the class has pad 32000 by default, which a smaller vocabulary does not have
        config.setdefault("pad_token_id", None)
        if "rope_factors_long.weight" in self._tensors:
            config["rope_scaling"] = {
                "type": "longrope",
                "rope_type": "longrope",
                "short_factor": self._rope_factors("rope_factors_short.weight", rope_size // 2),
                "long_factor": self._rope_factors("rope_factors_long.weight", rope_size // 2),
            }


def _llama3_divisor(frequency: float, factor: float) -> float:
    """By what Llama 3's scaling divides a rope frequency (Llama 3.1 model card; transformers' `rope_type: llama3`)."""
    wavelength = 2 * math.pi / frequency
    if wavelength < _LLAMA3_ORIGINAL_CONTEXT / _LLAMA3_HIGH_FREQ_FACTOR:
        return 1.0
    if wavelength > _LLAMA3_ORIGINAL_CONTEXT / _LLAMA3_LOW_FREQ_FACTOR:
        return factor
    span = _LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR
    smooth = (_LLAMA3_ORIGINAL_CONTEXT / wavelength - _LLAMA3_LOW_FREQ_FACTOR) / span
    return 1 / ((1 - smooth) / factor + smooth)
