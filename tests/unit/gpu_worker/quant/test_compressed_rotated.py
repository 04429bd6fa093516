"""Schemes by name alone, and weights that were rotated before they were packed, as compressed-tensors has both.

The files are made by `tests/fixtures/quant/make_compressed_rotated.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.scheme import read_quantization
from tests.unit.gpu_worker.quant.exported import TOKENS, assert_same_tokens, reference_logits
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "quant"
ROTATED = FIXTURES / "compressed_rotated"
PRESETS: dict[str, Any] = json.loads((FIXTURES / "compressed_tensors_presets.json").read_text())
NOT_STORED_SO = ("UNQUANTIZED", "MXFP6A16", "MXFP6A8", "MXFP4XFP8")
UP = "model.layers.3.mlp.up_proj"


def stored(groups: dict[str, Any], kind: str) -> WeightFormat | None:
    fields = {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["lm_head"]}
    quant = read_quantization(HfConfig({"quantization_config": fields}))
    assert quant is not None and quant.format_of("lm_head") is None
    return quant.format_of(UP)


def format_name(scheme: dict[str, Any]) -> str:
    """What the tool packs such weights in."""
    weights, inputs = scheme["weights"], scheme["input_activations"]
    if weights["type"] == "float":
        if weights["num_bits"] == 8:
            return "mxfp8-quantized" if weights["group_size"] == 32 else "float-quantized"
        return "nvfp4-pack-quantized" if weights["group_size"] == 16 else "mxfp4-pack-quantized"
    return "int-quantized" if inputs is not None and weights["num_bits"] == 8 else "pack-quantized"


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(NOT_STORED_SO)))
def test_a_scheme_by_its_name_is_what_the_tool_makes_of_it(name: str) -> None:
    scheme = PRESETS[name]
    kind = format_name(scheme)
    expected = stored({"group_0": scheme}, kind)
    assert expected is not None
    assert stored({name: ["Linear"]}, kind) == expected
    assert stored({name.lower(): [UP]}, kind) == expected


def test_modules_that_are_named_as_not_quantized() -> None:
    assert stored({"UNQUANTIZED": [UP], "W4A16": ["re:.*down_proj"]}, "pack-quantized") is None
    with pytest.raises(ModelConfigError, match="the scheme 'MXFP6A16' by its name alone"):
        stored({"MXFP6A16": ["Linear"]}, "mxfp6-pack-quantized")


def test_rotated_weights_compute_what_the_model_did_before(tmp_path: Path) -> None:
    """Both the tool's own unpacking, and, up to what int8 rounds, the model that was not rotated yet."""
    fields = json.loads((ROTATED / "config.json").read_text())["quantization_config"]
    assert set(fields["transform_config"]["config_groups"]) == {"R1", "R2"}
    logits = QuantizedModel(ROTATED).logits(TOKENS)
    expected = reference_logits(ROTATED, load_file(ROTATED / "dequantized.safetensors"), tmp_path)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    before, after = load_file(ROTATED / "unrotated.safetensors"), load_file(ROTATED / "dequantized.safetensors")
    down = "model.layers.0.mlp.down_proj.weight"
    assert (before[down].float() - after[down]).norm() > 0.5 * before[down].float().norm()
    (tmp_path / "before").mkdir()
    shutil.copy(ROTATED / "unrotated.safetensors", tmp_path / "before" / "model.safetensors")
    shutil.copy(tmp_path / "config.json", tmp_path / "before" / "config.json")
    assert_same_tokens(logits, QuantizedModel(tmp_path / "before").logits(TOKENS), least_cosine=0.99)


@pytest.mark.parametrize("location", ["input", "output", "q_attn", "k_cache", None])
def test_what_turns_at_run_time_is_refused_by_its_place(location: str | None, tmp_path: Path) -> None:
    shutil.copytree(ROTATED, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    groups = config["quantization_config"]["transform_config"]["config_groups"]
    groups["R2"]["apply"][1]["location"] = location
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelConfigError, match=f"a transform_config at the location {location!r}.*supported are awq"):
        QuantizedModel(tmp_path)
