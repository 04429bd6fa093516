"""The language models of checkpoints that see images or hear as well: LLaVA, Mistral 3, Qwen-VL and Qwen-Omni,
InternVL, Idefics and SmolVLM, GLM-V, Llama 4, Kimi K2.5, Voxtral and others.

Text is served, towers for everything else are not loaded. What computes is the family of the text part, whatever holds
it. Rope with sections for time, height and width (mrope) is plain rope where all three are the same, as they are for
text.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.cohere import Cohere
from gpu_worker.models.deepseek import MISTRAL, V3, DeepSeek
from gpu_worker.models.exaone import Exaone
from gpu_worker.models.family import ModelFamily, NameRules
from gpu_worker.models.glm import Glm, GlmMoe
from gpu_worker.models.gpt_oss import GptOss
from gpu_worker.models.granite import Granite
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import Llama
from gpu_worker.models.llama4 import Llama4
from gpu_worker.models.mllama import Mllama
from gpu_worker.models.moe import QwenMoe
from gpu_worker.models.qwen import Qwen
from gpu_worker.models.qwen_next import Qwen35
from gpu_worker.models.registry import register
from gpu_worker.models.served_config import LANGUAGE_HEAD, LANGUAGE_MODEL, is_known_part
from gpu_worker.models.smollm3 import SmolLM3
from gpu_worker.models.text_part_defaults import TEXT_DEFAULTS, WHOLE_DEFAULTS
from gpu_worker.models.transformers_fallback import TransformersModel

# By `model_type` of the text part: what computes it, and the architecture that it would be by itself.
TEXT_PARTS: dict[str, tuple[type[ModelFamily], str]] = {
    "cohere": (Cohere, "CohereForCausalLM"),
    "cohere2": (Cohere, "Cohere2ForCausalLM"),
    "deepseek_v3": (DeepSeek, V3),
    "exaone4": (Exaone, "Exaone4ForCausalLM"),
    "glm4": (Glm, "Glm4ForCausalLM"),
    "glm4v_moe_text": (GlmMoe, "Glm4MoeForCausalLM"),
    "glm4v_text": (Glm, "Glm4ForCausalLM"),
    "gpt_oss": (GptOss, "GptOssForCausalLM"),
    "granite": (Granite, "GraniteForCausalLM"),
    "llama": (Llama, "LlamaForCausalLM"),
    "llama4_text": (Llama4, "Llama4ForCausalLM"),
    "ministral3": (Llama, "Ministral3ForCausalLM"),
    "mistral": (Llama, "MistralForCausalLM"),
    "mistral4": (DeepSeek, MISTRAL),
    "mllama_text_model": (Mllama, "MllamaForCausalLM"),
    "qwen2": (Qwen, "Qwen2ForCausalLM"),
    "qwen2_5_omni_text": (Qwen, "Qwen2ForCausalLM"),
    "qwen2_5_vl": (Qwen, "Qwen2ForCausalLM"),
    "qwen2_5_vl_text": (Qwen, "Qwen2ForCausalLM"),
    "qwen2_vl": (Qwen, "Qwen2ForCausalLM"),
    "qwen2_vl_text": (Qwen, "Qwen2ForCausalLM"),
    "qwen3": (Qwen, "Qwen3ForCausalLM"),
    "qwen3_5_moe_text": (Qwen35, "Qwen3_5MoeForCausalLM"),
    "qwen3_5_text": (Qwen35, "Qwen3_5ForCausalLM"),
    "qwen3_moe": (QwenMoe, "Qwen3MoeForCausalLM"),
    "qwen3_omni_moe_text": (QwenMoe, "Qwen3MoeForCausalLM"),
    "qwen3_vl_moe_text": (QwenMoe, "Qwen3MoeForCausalLM"),
    "qwen3_vl_text": (Qwen, "Qwen3ForCausalLM"),
    "smollm3": (SmolLM3, "SmolLM3ForCausalLM"),
}
# What a checkpoint holds beside its language model, under whatever prefix.
_OTHERS = (
    r"(model\.|thinker\.)?(vision_tower|vision_model|vision_encoder|visual|audio_tower|multi_modal_projector|mm_projector|"
    r"vision_projection|connector|image_newline|projector|aligner|merger|visual_embeddings_table|image_tower|video_tower|"
    r"encoder|vqmodel|generation_\w+|high_res_vision_\w+)(\.|$)|(talker|token2wav|code2wav)\."
)
# Where its tensors are: published names, and those that transformers 5 has in memory.
_PREFIXES = re.compile(rf"{LANGUAGE_MODEL}|^(thinker\.)?model\.")
_HEADS = re.compile(LANGUAGE_HEAD)


def text_config(config: HfConfig) -> HfConfig:
    """The text part's fields: nested, or among the others (Qwen2-VL in transformers 4); mrope is plain rope in text."""
    outer = config.nested("thinker_config") if isinstance(config.fields.get("thinker_config"), dict) else config
    inner = outer
    if isinstance(outer.fields.get("text_config"), dict):
        inner = outer.nested("text_config")
        inner = HfConfig(WHOLE_DEFAULTS.get(outer.fields.get("model_type", ""), {}) | inner.fields, inner.file)
        # The whole model's head is what the whole model's config says of it.
        tied = outer.fields.get("tie_word_embeddings")
        if tied is not None:
            inner = HfConfig(inner.fields | {"tie_word_embeddings": tied}, inner.file)
    fields = dict(inner.fields)
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name)
        if isinstance(rope, dict) and (rope.get("type") == "mrope" or "mrope_section" in rope):
            plain = {key: value for key, value in rope.items() if not key.startswith("mrope")}
            # Who stretches the model names the kind in its place, and keeps the sections.
            kinds = {plain.pop(key, None) for key in ("rope_type", "type")} - {None, "mrope", "default"}
            fields[name] = plain | {"rope_type": next(iter(kinds), "default")}
    return HfConfig(fields, inner.file)


def _completed(fields: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Rope comes whole from one of the two: its parameters have two names."""
    has_rope = any(fields.get(name) for name in ("rope_parameters", "rope_scaling"))
    left_out = "rope_parameters" if has_rope else None
    given = fields if has_rope else {name: value for name, value in fields.items() if name != "rope_parameters"}
    return {name: value for name, value in defaults.items() if name != left_out} | given


@cache
def text_part(family: Any, kind: str) -> type[ModelFamily]:
    """The family of a text part, for checkpoints that hold it among other things; by itself `family` computes it."""
    causal, defaults = TEXT_PARTS[kind][1], TEXT_DEFAULTS.get(kind, {})

    class TextPart(family):
        skipped_tensors = f"{_OTHERS}|{family.skipped_tensors or '(?!)'}"

        @classmethod
        def canonical_name(cls, name: str) -> str:
            name, count = _HEADS.subn("lm_head.", name)
            name = name if count else _PREFIXES.sub("model.", name)
            return str(family.canonical_name(name))

        @staticmethod
        def read_config(config: HfConfig, architecture: str) -> ModelSpec:
            text = text_config(config)
            spec = family.read_config(HfConfig(_completed(text.fields, defaults), text.file), causal)
            return replace(spec, architecture=architecture)

    TextPart.__name__ = TextPart.__qualname__ = f"{family.__name__}TextPart"
    return TextPart


@register(
    "AriaForConditionalGeneration",
    "AyaVisionForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "DeepseekVLForConditionalGeneration",
    "DeepseekVLHybridForConditionalGeneration",
    "Exaone4_5_ForConditionalGeneration",
    "Glm46VForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "GlmAsrForConditionalGeneration",
    "GraniteSpeechForConditionalGeneration",
    "GraniteSpeechPlusForConditionalGeneration",
    "HyperCLOVAXVisionV2ForConditionalGeneration",
    "Idefics2ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "JanusForConditionalGeneration",
    "KimiK25ForConditionalGeneration",
    "Kimi_K25ForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "LightOnOcrForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "MiniCPMOcrForConditionalGeneration",
    "MiniCPMV4_6ForConditionalGeneration",
    "MiniCPMV4_7ForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "Ovis2ForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5OmniForConditionalGeneration",
    "Qwen2_5OmniModel",
    "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3ASRForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "VideoLlama3ForConditionalGeneration",
    "VideoLlavaForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
    "VoxtralForConditionalGeneration",
)
class Multimodal(ModelFamily):
    """Stands for what its config names as the text part."""

    name_rules: ClassVar[NameRules] = {}

    @classmethod
    def for_config(cls, config: HfConfig) -> type[ModelFamily]:
        text = text_config(config)
        kind = text.fields.get("model_type")
        if kind in TEXT_PARTS:
            defaults = TEXT_DEFAULTS.get(kind, {})
            inner: Any = TEXT_PARTS[kind][0].for_config(HfConfig(_completed(text.fields, defaults), text.file))
            return text_part(inner, kind)
        if not is_known_part(kind):
            raise text.error(
                "model_type",
                f"is {kind!r}, which is not supported within {', '.join(config.architectures())}; supported are "
                f"{', '.join(TEXT_PARTS)}, and those that an installed transformers has as causal language models",
            )
        return TransformersModel

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        return Multimodal.for_config(config).read_config(config, architecture)
