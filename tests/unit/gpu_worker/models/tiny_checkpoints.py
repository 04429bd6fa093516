"""Tiny random checkpoints, made and saved by transformers itself: odd sizes, every switch of a family somewhere."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

BASE: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 60,
    "intermediate_size": 90,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class Tiny:
    config_class: type
    fields: dict[str, Any] = field(default_factory=dict)
    rewrite_as_v4: bool = False
    """Save config.json with the field names of transformers 4."""


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 5000.0, **parameters}}


LLAMA3 = rope(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)

TINY: dict[str, Tiny] = {
    "llama": Tiny(LlamaConfig, {"head_dim": 10, "tie_word_embeddings": False}),
    "llama-tied-bias": Tiny(
        LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 14}
    ),
    "llama3-rope": Tiny(LlamaConfig, LLAMA3),
    "llama3-rope-v4-config": Tiny(LlamaConfig, LLAMA3, rewrite_as_v4=True),
    "llama-linear-rope": Tiny(LlamaConfig, rope(rope_type="linear", factor=2.5)),
    "llama-yarn-rope": Tiny(LlamaConfig, YARN),
    "llama-gelu-mha": Tiny(LlamaConfig, {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 6}),
    "mistral-window": Tiny(MistralConfig, {"sliding_window": 11, "head_dim": 16}),
    "mistral-full": Tiny(MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": Tiny(Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": Tiny(
        Qwen2Config, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_key_value_heads": 3}
    ),
    "qwen2-unused-window-v4-config": Tiny(Qwen2Config, {"sliding_window": 9}, rewrite_as_v4=True),
    "qwen3": Tiny(Qwen3Config, {"head_dim": 18, "tie_word_embeddings": False}),
    "qwen3-bias-v4-config": Tiny(Qwen3Config, {"head_dim": 18, "attention_bias": True}, rewrite_as_v4=True),
}


def save_tiny(name: str, directory: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Write the checkpoint `name` into `directory`; transformers' own model, in evaluation mode."""
    tiny = TINY[name]
    torch.manual_seed(1234)
    model = AutoModelForCausalLM.from_config(tiny.config_class(**(BASE | tiny.fields)), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms start at constants: make every tensor matter.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    if tiny.rewrite_as_v4:
        _rewrite_as_v4(directory / "config.json")
    return model


def _rewrite_as_v4(file: Path) -> None:
    fields = json.loads(file.read_text())
    parameters = fields.pop("rope_parameters")
    fields["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    fields["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    fields["torch_dtype"] = fields.pop("dtype")
    fields.pop("layer_types", None)
    file.write_text(json.dumps(fields))
