"""Small random GGUF files of each architecture, written by the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np

from tests.unit.gpu_worker.quant.packed_cases import random_blocks

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 64, 96, 4, 2, 16, 2, 40


@dataclass
class Sizes:
    """Metadata and tensor shapes (outermost first) of one architecture."""

    keys: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, tuple[int, ...]] = field(default_factory=dict)
    written_as: str = ""
    """`general.architecture`, where it is another name."""


_ATTENTION = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
}
_MLP = {
    "ffn_norm.weight": (HIDDEN,),
    "ffn_gate.weight": (INNER, HIDDEN),
    "ffn_up.weight": (INNER, HIDDEN),
    "ffn_down.weight": (HIDDEN, INNER),
}
_QKV_BIAS = {
    "attn_q.bias": (HEADS * HEAD_DIM,),
    "attn_k.bias": (KV_HEADS * HEAD_DIM,),
    "attn_v.bias": (KV_HEADS * HEAD_DIM,),
}
_QK_NORMS = {"attn_q_norm.weight": (HEAD_DIM,), "attn_k_norm.weight": (HEAD_DIM,)}
_POST_NORMS = {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
# transformers' own loader, the second opinion in the tests, knows no other head size for Qwen3
QWEN3_HEAD_DIM = 128
_QWEN3 = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HEADS * QWEN3_HEAD_DIM, HIDDEN),
    "attn_k.weight": (KV_HEADS * QWEN3_HEAD_DIM, HIDDEN),
    "attn_v.weight": (KV_HEADS * QWEN3_HEAD_DIM, HIDDEN),
    "attn_output.weight": (HIDDEN, HEADS * QWEN3_HEAD_DIM),
    "attn_q_norm.weight": (QWEN3_HEAD_DIM,),
    "attn_k_norm.weight": (QWEN3_HEAD_DIM,),
}
_PHI3 = {
    "attn_norm.weight": (HIDDEN,),
    "attn_qkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_norm.weight": (HIDDEN,),
    "ffn_up.weight": (2 * INNER, HIDDEN),
    "ffn_down.weight": (HIDDEN, INNER),
}

ARCHITECTURES: Mapping[str, Sizes] = {
    "llama": Sizes({"rope.dimension_count": HEAD_DIM}, _ATTENTION | _MLP),
    "qwen2": Sizes({}, _ATTENTION | _QKV_BIAS | _MLP),
    "qwen2vl": Sizes({"rope.dimension_sections": [2, 3, 3, 0]}, _ATTENTION | _QKV_BIAS | _MLP),
    "qwen3": Sizes({"attention.key_length": QWEN3_HEAD_DIM}, _QWEN3 | _MLP),
    "gemma": Sizes({"attention.key_length": HEAD_DIM}, _ATTENTION | _MLP),
    "gemma2": Sizes(
        {
            "attention.key_length": HEAD_DIM,
            "attention.sliding_window": 32,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        _ATTENTION | _MLP | _POST_NORMS,
    ),
    "gemma3": Sizes(
        {"attention.key_length": HEAD_DIM, "attention.sliding_window": 32},
        _ATTENTION | _QK_NORMS | _MLP | _POST_NORMS,
    ),
    "phi3": Sizes({"rope.dimension_count": HEAD_DIM}, _PHI3),
}

EXPERTS, EXPERT_INNER = 4, 32
# The attention kernels know no smaller head.
MIXTURE_HEAD_DIM = 64
_EXPERT_KEYS = {"expert_count": EXPERTS, "expert_used_count": 2, "attention.key_length": MIXTURE_HEAD_DIM}
_WIDE_ATTENTION = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HEADS * MIXTURE_HEAD_DIM, HIDDEN),
    "attn_k.weight": (KV_HEADS * MIXTURE_HEAD_DIM, HIDDEN),
    "attn_v.weight": (KV_HEADS * MIXTURE_HEAD_DIM, HIDDEN),
    "attn_output.weight": (HIDDEN, HEADS * MIXTURE_HEAD_DIM),
}
_WIDE_BIAS = {
    "attn_q.bias": (HEADS * MIXTURE_HEAD_DIM,),
    "attn_k.bias": (KV_HEADS * MIXTURE_HEAD_DIM,),
    "attn_v.bias": (KV_HEADS * MIXTURE_HEAD_DIM,),
}
_WIDE_NORMS = {"attn_q_norm.weight": (MIXTURE_HEAD_DIM,), "attn_k_norm.weight": (MIXTURE_HEAD_DIM,)}
# OLMoE: its heads are as wide as the hidden state together, and q and k are normed over all of them.
_OLMOE_HEADS, _OLMOE_KV_HEADS, _OLMOE_HEAD_DIM = 2, 1, HIDDEN // 2
_OLMOE_KEYS = {
    "expert_count": EXPERTS,
    "expert_used_count": 2,
    "attention.head_count": _OLMOE_HEADS,
    "attention.head_count_kv": _OLMOE_KV_HEADS,
    "feed_forward_length": EXPERT_INNER,
}
_OLMOE_ATTENTION = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HIDDEN, HIDDEN),
    "attn_k.weight": (_OLMOE_KV_HEADS * _OLMOE_HEAD_DIM, HIDDEN),
    "attn_v.weight": (_OLMOE_KV_HEADS * _OLMOE_HEAD_DIM, HIDDEN),
    "attn_output.weight": (HIDDEN, HIDDEN),
    "attn_q_norm.weight": (HIDDEN,),
    "attn_k_norm.weight": (_OLMOE_KV_HEADS * _OLMOE_HEAD_DIM,),
}
_EXPERTS = {
    "ffn_norm.weight": (HIDDEN,),
    "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
    "ffn_gate_exps.weight": (EXPERTS, EXPERT_INNER, HIDDEN),
    "ffn_up_exps.weight": (EXPERTS, EXPERT_INNER, HIDDEN),
    "ffn_down_exps.weight": (EXPERTS, HIDDEN, EXPERT_INNER),
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp.weight": (HIDDEN,),
    "ffn_gate_shexp.weight": (INNER, HIDDEN),
    "ffn_up_shexp.weight": (INNER, HIDDEN),
    "ffn_down_shexp.weight": (HIDDEN, INNER),
}
_GPT_OSS = {
    **{name: shape for name, shape in _EXPERTS.items() if name != "ffn_norm.weight"},
    "post_attention_norm.weight": (HIDDEN,),
    "attn_output.bias": (HIDDEN,),
    "attn_sinks.weight": (HEADS,),
    "ffn_gate_inp.bias": (EXPERTS,),
    "ffn_gate_exps.bias": (EXPERTS, EXPERT_INNER),
    "ffn_up_exps.bias": (EXPERTS, EXPERT_INNER),
    "ffn_down_exps.bias": (EXPERTS, HIDDEN),
}
MIXTURES: Mapping[str, Sizes] = {
    "mixtral": Sizes(
        _EXPERT_KEYS | {"rope.dimension_count": MIXTURE_HEAD_DIM, "feed_forward_length": EXPERT_INNER},
        _WIDE_ATTENTION | _EXPERTS,
        "llama",
    ),
    "qwen2moe": Sizes(_EXPERT_KEYS, _WIDE_ATTENTION | _WIDE_BIAS | _EXPERTS | _SHARED_EXPERT),
    "qwen3moe": Sizes(_EXPERT_KEYS, _WIDE_ATTENTION | _WIDE_NORMS | _EXPERTS),
    "qwen3vlmoe": Sizes(
        _EXPERT_KEYS | {"rope.dimension_sections": [12, 10, 10, 0], "n_deepstack_layers": 3},
        _WIDE_ATTENTION | _WIDE_NORMS | _EXPERTS,
    ),
    "olmoe": Sizes(_OLMOE_KEYS, _OLMOE_ATTENTION | _EXPERTS),
    "gpt-oss": Sizes(
        _EXPERT_KEYS
        | {
            "attention.sliding_window": 11,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
        _WIDE_ATTENTION | _WIDE_BIAS | _GPT_OSS,
    ),
}


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    keys: Mapping[str, Any] | None = None,
    raw_keys: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
    left_out: tuple[str, ...] = (),
    tied: bool = False,
    layers: int = LAYERS,
    seed: int = 0,
    quantized: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    split_max_tensors: int = 0,
) -> dict[str, np.ndarray]:
    """Writes the file and gives its tensors as they are in it.

    Args:
        keys: metadata under the architecture's prefix, beside or instead of the usual.
        raw_keys: metadata by its whole name.
        quantized: tensors to store in blocks, with their type.
        split_max_tensors: above 0, the model is written in files of so many tensors, named by the package.
    """
    sizes = {**ARCHITECTURES, **MIXTURES}[architecture]
    architecture = sizes.written_as or architecture
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    metadata = {
        "context_length": 128,
        "embedding_length": HIDDEN,
        "block_count": layers,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 50000.0,
        **sizes.keys,
        **(keys or {}),
    }
    write_metadata(writer, {f"{architecture}.{key}": value for key, value in metadata.items()})
    write_metadata(writer, minimal_tokenizer() | dict(raw_keys or {}))
    random = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in sizes.layer.items()}
    tensors = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    tensors |= extra_tensors or {}
    tensors = {name: values for name, values in tensors.items() if name not in left_out}
    for name, values in tensors.items():
        kind = (quantized or {}).get(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, _packed(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _packed(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of these values; of types that the package cannot write, blocks of other values."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        rows = values.size // values.shape[-1]
        return random_blocks(kind.name, rows, values.shape[-1]).blocks.numpy().reshape(*values.shape[:-1], -1)


def minimal_tokenizer() -> dict[str, Any]:
    """A byte-level vocabulary of VOCABULARY tokens: two control tokens, letters, and a few merges."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["ab", "abc", "th", "the", "Ġ", "Ġthe", "0", "1", "2", "01", "!", "Ċ"]
    tokens = ["<s>", "</s>", *letters, *words]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["a b", "ab c", "t h", "th e", "Ġ the", "0 1"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def write_metadata(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Each value as the type that llama.cpp's converter writes; None is left out."""
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
