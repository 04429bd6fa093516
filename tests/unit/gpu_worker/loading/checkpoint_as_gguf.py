"""A checkpoint of transformers as a GGUF file: names by the `gguf` package's own map, rows as llama.cpp's converter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import torch

from tests.unit.gpu_worker.loading.synthetic_gguf import minimal_tokenizer, write_metadata

# conversion/llama.py of llama.cpp and the classes made from it: their q and k rows are interleaved for rope.
INTERLEAVED = ("llama", "mistral3", "smollm3", "granite", "granitemoe")


def write_checkpoint(
    path: Path,
    architecture: str,
    model: Any,
    keys: Mapping[str, Any],
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    *,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Writes `model` and gives its state as the file has it, which differs where it is quantized.

    Args:
        keys: metadata under the architecture's prefix, beside sizes that every config names alike.
        kinds: by the end of a tensor's name, the blocks it is stored in; all others are float32.
        extra: tensors by their names in the file, which are not the model's.
    """
    config = model.config
    # Where layers differ, the keys say it.
    config.allow_global_per_layer_attribute_access = True
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        **keys,
    }
    write_metadata(writer, {f"{architecture}.{key}": value for key, value in metadata.items()} | minimal_tokenizer())
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    state = {name: values.detach().clone() for name, values in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    # Views of the state, so that what quantizing makes of them is written into it.
    for name, values in _as_converted(state, config, "attention.key_length_mla" in keys).items():
        gguf_name = _scale_name(name) or names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        kind = next((kind for end, kind in (kinds or {}).items() if name.endswith(end)), None)
        order = _interleaved(architecture, name, config, len(values))
        stored = np.ascontiguousarray(values.numpy()[order])
        if kind is None:
            writer.add_tensor(gguf_name, stored)
            continue
        blocks = gguf.quants.quantize(stored, kind)
        writer.add_tensor(gguf_name, blocks, raw_dtype=kind)
        values[order] = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    for gguf_name, values in (extra or {}).items():
        writer.add_tensor(gguf_name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def _scale_name(name: str) -> str | None:
    """What the package's map does not have: the converter forms these names itself."""
    for end, part in (("router.scale", "ffn_gate_inp"), ("router.per_expert_scale", "ffn_down_exps")):
        if name.endswith(f".{end}"):
            return f"blk.{name.split('.')[2]}.{part}.scale"
    return None


def _as_converted(state: Mapping[str, torch.Tensor], config: Any, is_latent: bool) -> dict[str, torch.Tensor]:
    """What transformers 5 has in one tensor and the file in two: experts' gate and up, latent keys and values."""
    tensors: dict[str, torch.Tensor] = {}
    for name, values in state.items():
        base, _, last = name.rpartition(".")
        if config.model_type == "llama4_text" and base.endswith(".experts"):
            values = values.transpose(1, 2)  # its release has inputs first
        if base.endswith(".experts"):  # the converter merges experts under Qwen's names
            base = base.replace(".block_sparse_moe.", ".mlp.")
        if last == "layer_scalar" or (last == "gate_up_proj" and config.model_type == "gemma4_text"):
            tensors[f"{name}.weight"] = values
        elif last == "gate_up_proj":
            half = values.shape[1] // 2
            tensors |= {f"{base}.gate_proj.weight": values[:, :half], f"{base}.up_proj.weight": values[:, half:]}
        elif base.endswith(".experts"):
            tensors[f"{base}.{last}.weight"] = values
        elif base.endswith(".block_sparse_moe.router"):
            tensors[f"{base}.layer.weight"] = values
        elif last == "e_score_correction_bias":
            # ERNIE's and MiniMax's have other names in their releases, which the package knows.
            parent = re.sub(r"\.mlp$", ".block_sparse_moe", base.replace("gate.moe_statics", "moe_statics"))
            tensors[f"{parent}.e_score_correction.bias"] = values.squeeze()
        elif is_latent and base.endswith(".kv_b_proj"):
            heads = values.view(config.num_attention_heads, -1, values.shape[-1])
            parent = base.removesuffix("kv_b_proj")
            tensors[f"{parent}k_b_proj.weight"] = heads[:, : config.qk_nope_head_dim].transpose(1, 2)
            tensors[f"{parent}v_b_proj.weight"] = heads[:, config.qk_nope_head_dim :]
        else:
            tensors[name] = values
    return tensors


def _interleaved(architecture: str, name: str, config: Any, num_rows: int) -> np.ndarray:
    """Which row of the checkpoint each row of the file is: of a head 0, half, 1, half + 1 and so on."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if architecture not in INTERLEAVED or part not in heads:
        return np.arange(num_rows)
    size = num_rows // heads[part]
    in_head = [index // 2 + (index % 2) * (size // 2) for index in range(size)]
    return np.array([head * size + row for head in range(heads[part]) for row in in_head])
