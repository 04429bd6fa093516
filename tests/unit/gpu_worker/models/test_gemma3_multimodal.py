"""The language model of multimodal Gemma 3 checkpoints, under the names and config fields of both releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForConditionalGeneration
from transformers.models.gemma3 import Gemma3Config

from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.models.loader import read_spec
from tests.unit.gpu_worker.models.test_families import PagedModel, check_logits
from tests.unit.gpu_worker.models.tiny_checkpoints import BASE, GEMMA, GEMMA_SCALED, rewrite_as_v4

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture
def multimodal(tmp_path: Path) -> Any:
    text = BASE | GEMMA | GEMMA_SCALED | {"sliding_window_pattern": 3}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=300)
    torch.manual_seed(3)
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path)
    return _TextOnly(model)


class _TextOnly:
    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, token_ids: torch.Tensor) -> Any:
        return self._model(input_ids=token_ids, token_type_ids=torch.zeros_like(token_ids))


def _rename(directory: Path, old: bool) -> None:
    """As transformers 4 wrote the names, or as 5 has them in memory."""
    tensors = load_file(directory / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("language_model.model.").removeprefix("model.language_model.")
        if plain == name:  # of the vision side
            renamed[name] = tensor
        else:
            renamed[("language_model.model." if old else "model.language_model.") + plain] = tensor
    assert any("vision" in name for name in renamed) and any("language_model" in name for name in renamed)
    save_file(renamed, directory / "model.safetensors")


@pytest.mark.parametrize("old_names", [True, False])
@pytest.mark.parametrize("old_config", [True, False])
def test_the_text_part_computes_like_transformers(
    multimodal: Any, tmp_path: Path, old_names: bool, old_config: bool
) -> None:
    _rename(tmp_path, old_names)
    if old_config:
        _nested_as_v4(tmp_path / "config.json")
    spec, _ = read_spec(tmp_path)
    assert spec.architecture == "Gemma3ForConditionalGeneration"
    assert [layer.sliding_window for layer in spec.layers] == [11, 11, None, 11]
    check_logits(multimodal, tmp_path)


def test_what_is_neither_text_nor_vision_is_left_over(multimodal: Any, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"audio_tower.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no place for: audio_tower\.weight"):
        PagedModel(tmp_path)


def _nested_as_v4(file: Path) -> None:
    fields = json.loads(file.read_text())
    nested = file.parent / "text_config.json"
    nested.write_text(json.dumps(fields["text_config"]))
    rewrite_as_v4(nested)
    fields["text_config"] = json.loads(nested.read_text())
    nested.unlink()
    fields["torch_dtype"] = fields.pop("dtype", "float32")
    file.write_text(json.dumps(fields))
