"""The language models of checkpoints that see images as well: Mistral 3, LLaVA, Qwen2-VL, Qwen2.5-VL, Qwen3-VL.

Text is served, vision towers are not loaded. Rope with sections for time, height and width (mrope) is plain rope where
all three are the same, as they are for text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import LLAMA_NAMES, Llama
from gpu_worker.models.qwen import QWEN3_NAMES, Qwen
from gpu_worker.models.registry import register

# Defaults of the classes in transformers: nested configs leave most of them out.
_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_MISTRAL = _LLAMA | {"intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
_QWEN2 = _LLAMA | {"vocab_size": 151_936, "intermediate_size": 22_016, "max_position_embeddings": 32_768}

# `model_type` of the text part -> its family, the architecture that it is by itself, and defaults.
_TEXT_PARTS: dict[str, tuple[type[ModelFamily], str, dict[str, Any]]] = {
    "llama": (Llama, "LlamaForCausalLM", _LLAMA),
    "mistral": (Llama, "MistralForCausalLM", _MISTRAL),
    "ministral3": (Llama, "Ministral3ForCausalLM", _MISTRAL | {"vocab_size": 131_072, "num_hidden_layers": 34}),
    "qwen2": (Qwen, "Qwen2ForCausalLM", _QWEN2),
    "qwen2_vl": (Qwen, "Qwen2ForCausalLM", {}),
    "qwen2_vl_text": (Qwen, "Qwen2ForCausalLM", {}),
    "qwen2_5_vl": (Qwen, "Qwen2ForCausalLM", {}),
    "qwen2_5_vl_text": (Qwen, "Qwen2ForCausalLM", {}),
    "qwen3_vl_text": (Qwen, "Qwen3ForCausalLM", {}),
}
LLAVA_KINDS = ("llama", "mistral", "qwen2")


def text_config(config: HfConfig) -> HfConfig:
    """The text part's fields: nested, or among the others (Qwen2-VL in transformers 4); mrope is plain rope."""
    inner = config
    if isinstance(config.fields.get("text_config"), dict):
        inner = config.nested("text_config")
        # The whole model's head is what the whole model's config says of it.
        tied = config.fields.get("tie_word_embeddings")
        if tied is not None:
            inner = HfConfig(inner.fields | {"tie_word_embeddings": tied}, inner.file)
    fields = dict(inner.fields)
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name)
        if isinstance(rope, dict) and (rope.get("type") == "mrope" or "mrope_section" in rope):
            plain = {key: value for key, value in rope.items() if not key.startswith("mrope") and key != "type"}
            fields[name] = plain | {"rope_type": "default"}
    return HfConfig(fields, inner.file)


class _TextPart(ModelFamily):
    skipped_tensors = r"(model\.)?(vision_tower|multi_modal_projector|visual|image_newline)(\.|$)"

    @classmethod
    def canonical_name(cls, name: str) -> str:
        # "language_model.model.layers..." and "language_model.lm_head" (transformers 4), "model.language_model..." (5).
        if name.startswith("language_model."):
            return name.removeprefix("language_model.")
        return name.replace("model.language_model.", "model.", 1)


def _read(config: HfConfig, architecture: str, kinds: tuple[str, ...]) -> ModelSpec:
    config = text_config(config)
    kind = config.fields.get("model_type")
    if kind not in kinds:
        raise config.error(
            "model_type", f"is {kind!r}, which is not supported within {architecture}; supported are {', '.join(kinds)}"
        )
    family, name, defaults = _TEXT_PARTS[kind]
    spec = family.read_config(HfConfig(defaults | config.fields, config.file), name)
    return replace(spec, architecture=architecture)


@register(
    "Mistral3ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
)
class LlamaTextPart(_TextPart):
    name_rules = LLAMA_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        if architecture.startswith("Qwen"):
            return _read(config, architecture, ("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"))
        return _read(
            config, architecture, ("mistral", "ministral3") if architecture.startswith("Mistral3") else LLAVA_KINDS
        )


@register("Qwen3VLForConditionalGeneration")
class Qwen3TextPart(_TextPart):
    name_rules = QWEN3_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        return _read(config, architecture, ("qwen3_vl_text",))
