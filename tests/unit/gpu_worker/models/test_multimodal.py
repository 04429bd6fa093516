"""The language models of checkpoints that see images, under the names of both releases of transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llava import LlavaConfig
from transformers.models.mistral3 import Mistral3Config
from transformers.models.pixtral import PixtralVisionConfig
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen3_vl import Qwen3VLConfig

from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.loader import read_spec
from gpu_worker.models.transformers_fallback import TransformersModel
from gpu_worker.quant.scheme import make_scheme
from gpu_worker.quant.stored import StoredLinear
from tests.unit.gpu_worker.models.test_families import PagedModel, check_logits
from tests.unit.gpu_worker.models.tiny_checkpoints import BASE, LLAMA3, LLAMA4, MINISTRAL3

TEXT = {name: value for name, value in BASE.items() if not name.endswith("implementation")} | {"head_dim": 12}
SECTIONS = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 2, 2]}
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 60, "intermediate_size": 24}


def configs(kind: str) -> Any:
    pixtral = PixtralVisionConfig(**CLIP, image_size=28, patch_size=14, head_dim=8)
    match kind:
        case "mistral3":
            text = {"model_type": "mistral", "sliding_window": None} | TEXT
            return Mistral3Config(text_config=text, vision_config=pixtral, image_token_index=300)
        case "ministral3":
            text = {"model_type": "ministral3"} | TEXT | MINISTRAL3
            return Mistral3Config(text_config=text, vision_config=pixtral, image_token_index=300)
        case "llava":
            text = {"model_type": "llama"} | TEXT
            vision = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14} | CLIP
            return LlavaConfig(text_config=text, vision_config=vision, image_token_index=300)
        case "qwen2.5-vl":
            text = TEXT | {"num_attention_heads": 5, "num_key_value_heads": 1, "rope_parameters": SECTIONS}
            del text["head_dim"]
            return Qwen2_5_VLConfig(text_config=text, vision_config=QWEN_VISION | {"fullatt_block_indexes": [0]})
        case _:
            text = TEXT | {"rope_parameters": SECTIONS}
            return Qwen3VLConfig(text_config=text, vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0]})


class _TextOnly:
    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, token_ids: torch.Tensor) -> Any:
        return self._model(input_ids=token_ids)


class _Scaled:
    def __init__(self, model: Any, scale: float) -> None:
        self._model, self._scale = model, scale

    def __call__(self, token_ids: torch.Tensor) -> Any:
        output = self._model(token_ids)
        output.logits *= self._scale
        return output


def save(kind: str, directory: Path) -> Any:
    return save_config(configs(kind), directory)


def save_config(config: Any, directory: Path) -> Any:
    torch.manual_seed(3)
    kind = AutoModelForMultimodalLM if type(config) in AutoModelForMultimodalLM._model_mapping else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not re.search("vision|visual|audio|projector|connector", name):
                parameter.copy_(torch.randn_like(parameter) * 0.15 + (1 if parameter.dim() == 1 else 0))
    model.save_pretrained(directory)
    return _TextOnly(model)


def rename(directory: Path, *, old: bool, kind: str) -> None:
    """As transformers 4 wrote the names, or as 5 has them in memory."""
    renamed = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        plain = name.removeprefix("language_model.model.").removeprefix("model.language_model.")
        if name.endswith("lm_head.weight"):
            name = "language_model.lm_head.weight" if old and not kind.startswith("qwen") else "lm_head.weight"
        elif plain != name or name.startswith(("model.layers", "model.norm", "model.embed")):
            plain = plain.removeprefix("model.")
            before = "model." if kind.startswith("qwen") else "language_model.model."
            name = (before if old else "model.language_model.") + plain
        renamed[name] = tensor
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})


SMALL_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
MULTI_ROPE = {"rope_parameters": SECTIONS}
PARTIAL_ROPE = {"rope_parameters": SECTIONS | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}
GLM = (
    {name: value for name, value in TEXT.items() if name != "head_dim"}
    | {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    | PARTIAL_ROPE
)
GLM_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 24}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "n_group": 2, "topk_group": 1}
LLAMA4_VISION = SMALL_VISION | {
    "intermediate_size": 64,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}
LATENT = TEXT | {
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    **EXPERTS,
}
del LATENT["head_dim"]
OMNI_AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "output_dim": 60}


# Every second layer keeps a state.
QWEN35 = TEXT | {
    "layer_types": ["linear_attention", "full_attention"],
    "num_hidden_layers": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
QWEN35_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 60}
QUARTER_ROPE = {
    "rope_parameters": SECTIONS | {"partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0], "mrope_interleaved": True}
}
QWEN2_AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}


NO_HEAD_DIM = {name: value for name, value in TEXT.items() if name != "head_dim"}
# Layers for images, which are left out without one.
CROSS = {"cross_attention_layers": [1, 3]}


def others() -> dict[str, Callable[[], Any]]:
    """By `model_type`; saved under the names that the releases have, which transformers brings them back to."""
    pixtral = SMALL_VISION | {"image_size": 28, "patch_size": 14, "head_dim": 8, "model_type": "pixtral"}
    siglip = SMALL_VISION | {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    clip = SMALL_VISION | {"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"}
    idefics = SMALL_VISION | {"image_size": 28, "patch_size": 14}
    thinker = {"vision_config": GLM_VISION | {"out_hidden_size": 60}, "audio_config": OMNI_AUDIO}

    def text(kind: str, **fields: Any) -> dict[str, Any]:
        return {"model_type": kind} | TEXT | fields

    fields: dict[str, dict[str, Any]] = {
        "qwen3_vl_moe": {
            "text_config": TEXT | MOE | MULTI_ROPE,
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]},
        },
        "qwen3_5": {"text_config": QWEN35 | QUARTER_ROPE, "vision_config": QWEN35_VISION},
        "qwen3_5_moe": {
            "text_config": QWEN35 | MOE | QUARTER_ROPE | {"shared_expert_intermediate_size": 40},
            "vision_config": QWEN35_VISION,
        },
        "llama4": {
            "text_config": text("llama4_text", **{name: LLAMA4[name] for name in LLAMA4 if name != "head_dim"}),
            "vision_config": LLAMA4_VISION,
        },
        "glm4v": {"text_config": GLM, "vision_config": GLM_VISION},
        "glm4v_moe": {"text_config": GLM | EXPERTS, "vision_config": GLM_VISION},
        "mistral3": {
            "text_config": {"model_type": "mistral4"} | LATENT | deepcopy(MINISTRAL3),
            "vision_config": pixtral,
        },
        "smolvlm": {"text_config": text("llama"), "vision_config": idefics, "scale_factor": 1},
        "idefics3": {"text_config": text("llama"), "vision_config": idefics, "scale_factor": 1},
        "internvl": {
            "text_config": text("gpt_oss", num_local_experts=6, num_experts_per_tok=2, sliding_window=11),
            "vision_config": SMALL_VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        },
        "llava_onevision": {"text_config": text("qwen2"), "vision_config": siglip},
        "cohere2_vision": {"text_config": text("cohere2", sliding_window=11, logit_scale=0.7), "vision_config": siglip},
        "kimi_k25": {"text_config": {"model_type": "deepseek_v3"} | LATENT, "vision_config": SMALL_VISION},
        "voxtral": {
            "text_config": text("llama"),
            "audio_config": SMALL_VISION | {"num_mel_bins": 8, "max_source_positions": 20},
        },
        "aya_vision": {"text_config": text("cohere2", sliding_window=11, logit_scale=0.7), "vision_config": siglip},
        "mllama": {
            "text_config": {"model_type": "mllama_text_model"}
            | NO_HEAD_DIM
            | {"num_hidden_layers": 5}
            | CROSS
            | LLAMA3,
            "vision_config": SMALL_VISION
            | {"attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 32}
            | {"image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0]},
        },
        "vipllava": {"text_config": text("llama"), "vision_config": clip, "vision_feature_layers": [-1]},
        "llava_next": {"text_config": text("granite", logits_scaling=0.7), "vision_config": siglip},
        "lighton_ocr": {"text_config": text("qwen3"), "vision_config": pixtral},
        "qwen2_audio": {"text_config": text("qwen2"), "audio_config": QWEN2_AUDIO},
        "qwen2_5_omni_thinker": thinker | {"text_config": TEXT | MULTI_ROPE, "audio_config": OMNI_AUDIO},
        "glm46v": {"text_config": {"model_type": "glm4v_text"} | GLM, "vision_config": GLM_VISION},
        "qwen3_omni_moe_thinker": thinker | {"text_config": TEXT | MOE | MULTI_ROPE},
    }
    return {
        name: lambda name=name: CONFIG_MAPPING[name](**fields[name])  # type: ignore[misc]
        for name in fields
        if name in CONFIG_MAPPING
    }


QUICK = ("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "llama4", "glm4v", "mllama", "mistral3", "internvl", "smolvlm")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in others()]
)
def test_the_text_part_under_its_published_names(kind: str, tmp_path: Path) -> None:
    reference = save_config(others()[kind](), tmp_path)
    if kind == "kimi_k25":
        # transformers renames the layers of its vision tower when it saves, and those of the text with them.
        file = tmp_path / "model.safetensors"
        renamed = {name.replace("model.blocks.", "model.layers."): tensor for name, tensor in load_file(file).items()}
        save_file(renamed, file, metadata={"format": "pt"})
    if kind in ("cohere2_vision", "aya_vision", "llava_next"):
        # Their classes in transformers forget the scale that the text part has by itself.
        reference = _Scaled(reference, read_spec(tmp_path)[0].logit_scale)
    check_logits(reference, tmp_path)


# Every size of an encoder that would be large by default.
SHRUNK = SMALL_VISION | {"depth": 1, "num_heads": 2, "embed_dim": 16, "num_layers": 1}


def with_small_parts(kind: str, text: dict[str, Any]) -> Any:
    """A config whose other parts are as their classes have them, but for their sizes."""
    config = CONFIG_MAPPING[kind](text_config=text)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig) and part is not config.get_text_config():
            for name, size in SHRUNK.items():
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, size)
    return config


FURTHER = {
    "aria": {"model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "deepseek_vl": {"model_type": "llama"},
    "deepseek_vl_hybrid": {"model_type": "llama"},
    "exaone4_5": {
        "model_type": "exaone4",
        "sliding_window": 11,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "glmasr": {"model_type": "llama"},
    "granite_speech": {"model_type": "granite"},
    "granite_speech_plus": {"model_type": "granite"},
    "hyperclovax_vision_v2": {"model_type": "hyperclovax"},
    "idefics2": {"model_type": "mistral", "sliding_window": None},
    "janus": {"model_type": "llama"},
    "llava_next_video": {"model_type": "llama"},
    "minicpm_ocr": QWEN35 | {"model_type": "qwen3_5_text"},
    "minicpmv4_6": QWEN35 | {"model_type": "qwen3_5_text"},
    "minicpmv4_7": QWEN35 | {"model_type": "qwen3_5_text"},
    "ovis2": {"model_type": "qwen2"},
    "qwen3_asr": {"model_type": "qwen3"},
    "video_llama_3": {"model_type": "qwen2"},
    "video_llava": {"model_type": "llama"},
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "minicpmv4_6" else pytest.mark.slow) for kind in FURTHER]
)
def test_further_text_parts_under_their_published_names(kind: str, tmp_path: Path) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    check_logits(save_config(with_small_parts(kind, TEXT | FURTHER[kind]), tmp_path), tmp_path)


# Text parts that transformers does not have by themselves, or under names of their own.
WHOLE = {
    "ernie4_5_vl_moe": TEXT
    | MULTI_ROPE
    | {"model_type": "ernie4_5_vl_moe_text", "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [40, 24]},
    "glm_ocr": {"model_type": "glm_ocr_text"} | GLM,
    "hunyuan_vl": TEXT
    | {
        "model_type": "hunyuan_vl_text",
        "rope_parameters": {
            "rope_type": "xdrope",
            "rope_theta": 5000.0,
            "xdrope_section": [2, 2, 2, 0],
            "alpha": 100.0,
            "factor": 1.0,
        },
    },
    # Row after row: sparse attention, with choices that are taken over.
    "minimax_m3_vl": {"model_type": "minimax_m3_vl_text"} | TEXT | {"head_dim": 16},
    "mistral_large4": {"model_type": "mistral_large4_text"} | LATENT,
    # Some of its layers keep states.
    "nemotron_h_omni": {"model_type": "nemotron_h"} | TEXT,
    "paddleocr_vl": {"model_type": "paddleocr_vl_text"} | TEXT | MULTI_ROPE,
    "qianfan_ocr": {"model_type": "qwen3"} | TEXT,
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "hunyuan_vl" else pytest.mark.slow) for kind in WHOLE]
)
def test_what_holds_a_text_part_of_its_own_runs_whole(kind: str, tmp_path: Path) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    reference = save_config(with_small_parts(kind, WHOLE[kind]), tmp_path)
    assert read_spec(tmp_path)[1] is TransformersModel
    check_logits(reference, tmp_path)


def test_an_image_that_is_seen_from_both_sides_is_refused(tmp_path: Path) -> None:
    """PaliGemma attends to a whole prompt at once."""
    save_config(with_small_parts("paligemma", {"model_type": "gemma"} | TEXT), tmp_path)
    with pytest.raises(ModelConfigError, match="given a text in parts it does not compute"):
        PagedModel(tmp_path)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["florence2"]().to_dict() | {"architectures": ["Florence2ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(ModelConfigError, match="an encoder with a decoder"):
        read_spec(tmp_path)


def test_a_model_that_hears_and_speaks_holds_one_that_thinks(tmp_path: Path) -> None:
    """Qwen3-Omni as published: the language model within its thinker, beside what makes sound."""
    reference = save_config(others()["qwen3_omni_moe_thinker"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {f"thinker.{name.removeprefix('thinker.')}": tensor for name, tensor in tensors.items()}
    tensors |= {"talker.a.weight": torch.zeros(2), "code2wav.b.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    thinker = json.loads((tmp_path / "config.json").read_text())
    whole = {"architectures": ["Qwen3OmniMoeForConditionalGeneration"], "thinker_config": thinker}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    check_logits(reference, tmp_path)


GEMMA = TEXT | {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "sliding_window": 11,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 301,
    "final_logit_softcapping": 5.0,
}
GEMMA3N = GEMMA | {
    # The last two layers attend to what earlier ones have cached.
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "intermediate_size": [96] * 6,
    "activation_sparsity_pattern": [0.5] + [0.0] * 5,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}


@pytest.mark.parametrize(("kind", "fields"), [("gemma3n", GEMMA3N)])
def test_a_text_part_without_native_code_runs_through_transformers(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """As published: within a checkpoint whose other parts are not loaded."""
    reference = save_config(CONFIG_MAPPING[kind](text_config=fields).get_text_config(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    tensors |= {"model.vision_tower.a.weight": torch.zeros(2), "model.embed_audio.b.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((tmp_path / "config.json").read_text())
    name = text.pop("architectures")[0].replace("ForCausalLM", "ForConditionalGeneration")
    whole = {"architectures": [name], "model_type": kind, "dtype": "float32", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    spec, family = read_spec(tmp_path)
    assert (spec.architecture, family) == (name, TransformersModel)
    check_logits(reference, tmp_path)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("kind", ["mistral3", "ministral3", "llava", "qwen2.5-vl", "qwen3-vl"])
def test_the_text_part_computes_like_transformers(kind: str, old: bool, tmp_path: Path) -> None:
    reference = save(kind, tmp_path)
    rename(tmp_path, old=old, kind=kind)
    if old and kind == "qwen2.5-vl":
        _unnest(tmp_path / "config.json")
    assert read_spec(tmp_path)[0].architecture.endswith("ForConditionalGeneration")
    check_logits(reference, tmp_path)


def _unnest(file: Path) -> None:
    """Qwen2.5-VL as it was published: the text's fields among the others, rope by type `mrope`."""
    fields = json.loads(file.read_text())
    text = fields.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}
    file.write_text(json.dumps(text | fields | {"model_type": "qwen2_5_vl"}))


@pytest.mark.parametrize("word", ["type", "rope_type"])
def test_who_stretches_a_model_that_sees_keeps_its_sections(word: str, tmp_path: Path) -> None:
    """As the model card of Qwen2.5-VL says: another kind of rope beside them, in a config of transformers 4."""
    save("qwen2.5-vl", tmp_path)
    rename(tmp_path, old=True, kind="qwen2.5-vl")
    _unnest(tmp_path / "config.json")
    fields = json.loads((tmp_path / "config.json").read_text())
    yarn = {word: "yarn", "mrope_section": [2, 2, 2], "factor": 4, "original_max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"rope_scaling": yarn}))
    reference = AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert read_spec(tmp_path)[0].layers[0].rope.kind == "yarn"
    check_logits(reference.eval(), tmp_path)


def test_another_text_part_is_refused_by_name(tmp_path: Path) -> None:
    save("llava", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"]["model_type"] = "own"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelConfigError, match=r"model_type is 'own'.*LlavaForConditionalGeneration.*llama, .*mistral"):
        read_spec(tmp_path)


def test_what_a_quantized_checkpoint_leaves_out_is_in_its_own_names(tmp_path: Path) -> None:
    """And its config may have `quantization_config` in the text part."""
    save("mistral3", tmp_path)
    rename(tmp_path, old=True, kind="mistral3")
    fields = json.loads((tmp_path / "config.json").read_text())
    left_out = "language_model.model.layers.0.self_attn.o_proj"
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    fields["text_config"]["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [left_out, "re:vision_tower.*"],
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tensors = load_file(tmp_path / "model.safetensors")
    name = left_out.replace("0", "1")
    tensors[f"{name}.weight_scale"] = torch.ones(tensors[f"{name}.weight"].shape[0], 1)
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    _, family = read_spec(tmp_path)
    scheme = make_scheme(tmp_path, family.name_rules, canonical_name=family.canonical_name)
    methods = [scheme.linear_method(f"layers.{layer}.attention.output") for layer in (0, 1)]
    assert [isinstance(method, StoredLinear) for method in methods] == [False, True]


def test_images_are_not_a_part_of_the_model(tmp_path: Path) -> None:
    save("mistral3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    without = {name: tensor for name, tensor in tensors.items() if "vision" not in name and "projector" not in name}
    assert len(without) < len(tensors)
    whole = PagedModel(tmp_path).logits([5, 6, 7], 0)
    save_file(without, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(PagedModel(tmp_path).logits([5, 6, 7], 0), whole)


@pytest.mark.parametrize("joined", [False, True])
def test_experts_in_one_tensor_or_each_alone_and_layers_that_look_ahead(joined: bool, tmp_path: Path) -> None:
    """Qwen3.5: releases have one or the other, whatever transformers writes."""
    config = others()["qwen3_5_moe"]()
    reference = save_config(config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        experts = f"model.language_model.layers.{layer}.mlp.experts"
        stacks = {"gate_up_proj": [], "down_proj": []}
        for expert in range(7):
            gate, up, down = (tensors[f"{experts}.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            stacks["gate_up_proj"].append(torch.cat((gate, up)))
            stacks["down_proj"].append(down)
        stacked |= {f"{experts}.{name}": torch.stack(parts) for name, parts in stacks.items()}
    ahead = {"mtp.fc.weight": torch.zeros(2), "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2)}
    save_file((stacked if joined else tensors) | ahead, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_logits(reference, tmp_path)
