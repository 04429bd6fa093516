"""The language models of checkpoints that see images, under the names of both releases of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.llava import LlavaConfig
from transformers.models.mistral3 import Mistral3Config
from transformers.models.pixtral import PixtralVisionConfig
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen3_vl import Qwen3VLConfig

from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.loader import read_spec
from gpu_worker.quant.scheme import make_scheme
from gpu_worker.quant.stored import StoredLinear
from tests.unit.gpu_worker.models.test_families import PagedModel, check_logits
from tests.unit.gpu_worker.models.tiny_checkpoints import BASE, MINISTRAL3

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


def save(kind: str, directory: Path) -> Any:
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(configs(kind), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "language_model" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
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


def test_another_text_part_is_refused_by_name(tmp_path: Path) -> None:
    save("llava", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"]["model_type"] = "phi"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelConfigError, match=r"model_type is 'phi'.*LlavaForConditionalGeneration.*llama, mistral"):
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
