"""What is refused before or while a model is loaded, and by which name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.layers.decoder import HiddenStates
from gpu_worker.layers.linear import BuildContext
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.checkpoint_places import checkpoint_places
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.loader import fill_random, load_weights, read_spec
from gpu_worker.models.registry import find_family, known_architectures
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.quant.none import Unquantized
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny


def build(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    spec, family = read_spec(directory)
    return family(spec, 64, BuildContext(ParallelContext(), Unquantized(), dtype, torch.device("cpu")))


def edit(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    for name, value in changes.items():
        if value is ...:
            fields.pop(name, None)
        else:
            fields[name] = value
    file.write_text(json.dumps(fields))


def test_an_unknown_architecture_is_refused_with_the_list_that_works(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    edit(tmp_path, architectures=["FancyNetForCausalLM"])
    with pytest.raises(ModelConfigError) as error:
        read_spec(tmp_path)
    message = str(error.value)
    assert "FancyNetForCausalLM" in message
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert name in message and name in known_architectures()


def test_the_first_known_architecture_is_taken() -> None:
    assert find_family(["SomethingElse", "Qwen3ForCausalLM"])[0] == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": ...}, ["hidden_size", "missing"]),
        ({"num_hidden_layers": "many"}, ["num_hidden_layers", "many"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"num_key_value_heads": 4}, ["num_attention_heads", "6", "4"]),
        (
            {"rope_parameters": {"rope_type": "longrope"}, "max_position_embeddings": ...},
            ["rope_type longrope", "original_max"],
        ),
        ({"rope_parameters": {"rope_type": "ntk"}}, ["rope_type", "ntk", "llama3", "dynamic"]),
        ({"rope_parameters": {"rope_type": "dynamic", "alpha": 50.0}}, ["alpha", "50.0"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["short_factor", "list"]),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            ["rope_parameters", "full_attention, sliding_attention", "which"],
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, ["factor", "missing"]),
        ({"dtype": "int8"}, ["dtype", "int8"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "num_hidden_layers"]),
        ({"layer_types": ["linear_attention"] * 3}, ["layer_types", "linear_attention"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config.bits", "missing"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "yes"]),
    ],
    ids=str,
)
def test_a_bad_config_is_refused_by_field(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ModelConfigError) as error:
        read_spec(tmp_path)
    for word in [*words, "config.json"]:
        assert word in str(error.value)


def test_no_config_and_broken_json_say_which_file(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"config\.json.*No such file"):
        HfConfig.open(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(ModelConfigError, match=r"config\.json.*not valid JSON"):
        HfConfig.open(tmp_path)


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    edit(tmp_path, hidden_act="relu6")
    with pytest.raises(ModelConfigError, match=r"relu6.*silu"):
        build(tmp_path)


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    change_tensors(tmp_path, **{"model.layers.1.self_attn.k_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight"):
        load_weights(build(tmp_path), tmp_path)


def test_a_leftover_tensor_is_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    change_tensors(tmp_path, **{"model.layers.0.self_attn.sinks": torch.zeros(6)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.sinks"):
        load_weights(build(tmp_path), tmp_path)


def test_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    change_tensors(tmp_path, **{"model.layers.2.mlp.up_proj.weight": torch.zeros(91, 60)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight.*91.*90"):
        load_weights(build(tmp_path), tmp_path)


def test_every_tensor_of_a_checkpoint_has_one_place(tmp_path: Path) -> None:
    save_tiny("qwen3-bias-v4-config", tmp_path)
    assert set(checkpoint_places(build(tmp_path))) == set(load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights_are_seeded_and_give_finite_logits(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    (tmp_path / "model.safetensors").unlink()

    def embedding_and_logits(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        model = build(tmp_path, dtype)
        fill_random(model, None, seed)
        hidden = torch.randn(4, 60).to(dtype)
        states = HiddenStates(hidden, torch.zeros_like(hidden))
        return model.embedding.weight.clone(), model.logits(states)

    (first, logits), (again, _), (other, _) = (embedding_and_logits(seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.isfinite(logits).all() and 0.1 < logits.float().std() < 10
