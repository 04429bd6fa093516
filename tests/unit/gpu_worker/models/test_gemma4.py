"""Gemma 4 as it is released: nested configs with the fields of full attention apart, towers beside the text, and
projections in layers that do not use them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma4ForConditionalGeneration, Gemma4UnifiedForConditionalGeneration
from transformers.models.gemma4 import Gemma4Config
from transformers.models.gemma4_unified import Gemma4UnifiedConfig

from gpu_worker.assembly import attention_spec
from gpu_worker.attention.api import KVHeads
from gpu_worker.invariant.coverage import refuse_uncovered
from gpu_worker.kv_cache import KVCache, KVCacheShape
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.model_spec import ModelConfigError, ModelSpec
from gpu_worker.models.gemma4 import Gemma4
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.shares import ParallelContext
from tests.unit.gpu_worker.models.test_families import PagedModel, check_logits
from tests.unit.gpu_worker.models.tiny_checkpoints import BASE, GEMMA4_LARGE, GEMMA4_SMALL, save_tiny
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
PATCHES = {"patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 4, "output_proj_dims": 16}
# Sizes of google/gemma-4-E2B-it.
E2B: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
    "sliding_window": 512,
}


def spec_of(fields: dict[str, Any], architecture: str = "Gemma4ForCausalLM") -> ModelSpec:
    return Gemma4.read_config(HfConfig(fields), architecture)


class _TextOnly:
    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, token_ids: torch.Tensor) -> Any:
        return self._model(input_ids=token_ids, mm_token_type_ids=torch.zeros_like(token_ids))


def save_whole(directory: Path, text: dict[str, Any], *, unified: bool) -> Any:
    """A checkpoint that sees too, with the config's fields as they are released."""
    config_class = Gemma4UnifiedConfig if unified else Gemma4Config
    model_class = Gemma4UnifiedForConditionalGeneration if unified else Gemma4ForConditionalGeneration
    vision = dict(PATCHES if unified else VISION)
    config = config_class(text_config=BASE | text, vision_config=vision, image_token_id=300, audio_config=None)
    torch.manual_seed(3)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    fields = json.loads((directory / "config.json").read_text())
    own = fields["text_config"].pop("per_layer_config")
    # As releases have it, with or without the name.
    fields["text_config"] |= {"per_layer_config": None} if unified else {}
    fields["text_config"] |= {"global_head_dim": text["global_head_dim"]}
    fields["text_config"] |= {"num_global_key_value_heads": text.get("num_global_key_value_heads")}
    assert own
    (directory / "config.json").write_text(json.dumps(fields))
    return _TextOnly(model)


@pytest.mark.parametrize(("text", "unified"), [(GEMMA4_SMALL, False), (GEMMA4_LARGE, False), (GEMMA4_LARGE, True)])
def test_the_text_part_computes_like_transformers(text: dict[str, Any], unified: bool, tmp_path: Path) -> None:
    reference = save_whole(tmp_path, text, unified=unified)
    names = load_file(tmp_path / "model.safetensors")
    assert any("vision" in name for name in names) and any("language_model" in name for name in names)
    check_logits(reference, tmp_path)


def test_what_is_neither_text_nor_a_tower_is_left_over(tmp_path: Path) -> None:
    save_tiny("gemma4-large", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.smell_tower.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no place for: model\.smell_tower\.weight"):
        PagedModel(tmp_path)


def test_projections_of_layers_that_read_another_s_cache_are_left_out(tmp_path: Path) -> None:
    reference = save_tiny("gemma4", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    unused = {f"model.layers.3.self_attn.{name}.weight": torch.full((2, 2), 9.0) for name in ("k_proj", "v_proj")}
    unused["model.layers.6.self_attn.k_norm.weight"] = torch.ones(3)
    save_file(tensors | unused, tmp_path / "model.safetensors")
    check_logits(reference, tmp_path)


def test_a_trunk_saved_alone_has_its_names(tmp_path: Path) -> None:
    reference = save_tiny("gemma4", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    check_logits(reference, tmp_path)


def test_blocks_count_the_layers_that_cache_with_their_own_heads() -> None:
    spec = spec_of(E2B)
    assert [layer.kv_source for layer in spec.layers[14:20]] == [None, 13, 13, 13, 13, 14]
    assert spec.layers[15].intermediate_size == 2 * 6144 and spec.layers[14].intermediate_size is None
    shape = KVCacheShape.of(spec, ParallelContext(), 16, torch.bfloat16)
    assert shape.layer_heads == ((KVHeads(1, 256),) * 4 + (KVHeads(1, 512),)) * 3
    assert shape.block_bytes == 2 * 16 * (12 * 256 + 3 * 512) * 2
    held = KVCache(shape, 3, torch.device("meta")).layers
    assert sum(layer.numel() * layer.element_size() for layer in held) == 3 * shape.block_bytes
    kinds = attention_spec(spec, ParallelContext()).by_heads()
    assert [(kind.head_dim, set(kind.windows), len(layers)) for kind, layers in kinds] == [
        (256, {512}, 12),
        (512, {None}, 3),
    ]


def test_ranks_with_fewer_heads_than_others_have_them_all_the_same() -> None:
    spec = spec_of(E2B | {"num_key_value_heads": 8, "num_global_key_value_heads": 2, "attention_k_eq_v": True})
    shape = KVCacheShape.of(spec, ParallelContext(1, 4), 16, torch.bfloat16)
    assert set(shape.layer_heads) == {KVHeads(2, 256), KVHeads(1, 512)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"vocab_size_per_layer_input": 1000}, "vocab_size_per_layer_input 1000 is less than vocab_size"),
        ({"num_kv_shared_layers": 34}, "num_kv_shared_layers leaves no full_attention"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        spec_of(E2B | changes)


def test_layers_that_share_a_cache_stay_on_one_stage(tmp_path: Path) -> None:
    save_tiny("gemma4", tmp_path, hidden_size_per_layer_input=0)
    stage = ParallelContext(stage=1, stage_layers=(3, 4))
    with pytest.raises(
        ModelConfigError, match=r"layer 3 .* attends to the keys and values of layer 2, .* different sta"
    ):
        QuantizedModel(tmp_path, parallel=stage)
    save_tiny("gemma4", tmp_path)
    with pytest.raises(ModelConfigError, match="gives every layer an embedding of its own"):
        QuantizedModel(tmp_path, parallel=stage)


def test_a_deterministic_server_refuses_it() -> None:
    with pytest.raises(ModelConfigError, match="--deterministic does not cover heads of several kinds"):
        refuse_uncovered(spec_of(E2B), Gemma4)
    fewer = {"global_head_dim": 256, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    fewer |= {"num_key_value_heads": 8, "num_global_key_value_heads": 2, "attention_k_eq_v": True}
    with pytest.raises(ModelConfigError, match="--deterministic does not cover heads of several kinds"):
        refuse_uncovered(spec_of(E2B | fewer), Gemma4)
    alike = spec_of(E2B | {"global_head_dim": 256})
    with pytest.raises(ModelConfigError, match="--deterministic does not cover layers that attend to the keys of othe"):
        refuse_uncovered(alike, Gemma4)


def test_the_whole_config_names_the_family(tmp_path: Path) -> None:
    fields = {"architectures": ["Gemma4ForConditionalGeneration"], "text_config": E2B, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"architectures": ["Gemma4Model"]}))
    assert read_spec(tmp_path)[0].num_layers == 35
    (tmp_path / "config.json").write_text(json.dumps(fields))
    spec, family = read_spec(tmp_path)
    assert issubclass(family, Gemma4) and spec.dtype == torch.bfloat16
    full = [layer.rope for layer in spec.layers if layer.sliding_window is None]
    assert {(rope.kind, rope.rotary_dim, rope.rotated_share) for rope in full if rope} == {("proportional", 512, 0.25)}
