"""Weights that AutoRound packed, against its own linears' unpacking of them; and what its config says of each layer.

The file is made by `tests/fixtures/quant/make_auto_round.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.affine_formats import AwqFormat, GptqFormat
from gpu_worker.quant.config import QuantConfig
from gpu_worker.quant.scheme import read_quantization
from tests.unit.gpu_worker.quant.stored_cases import stored_cases

N, K = 64, 128
LAYER = "model.layers.3"
CONFIG: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}


def stored() -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    return stored_cases("auto_round.safetensors", "settings")


def read(fields: dict[str, Any]) -> QuantConfig:
    quant = read_quantization(HfConfig({"quantization_config": fields}))
    assert quant is not None
    return quant


@pytest.mark.parametrize("case", sorted(stored()[0]))
def test_values_are_those_of_the_tool(case: str) -> None:
    kind = read(stored()[0][case]).format_of(f"{LAYER}.mlp.up_proj")
    assert kind is not None
    tensors = {name: tensor for name, tensor in stored()[1][case].items() if name != "unpacked"}
    for name, rule in kind.rules(N, K).items():
        assert rule.optional or (tuple(tensors[name].shape) in rule.shapes and tensors[name].dtype in rule.dtypes)
    ours = kind.decode(tensors, Share(0, N, N), Share(0, K, K)).dequantize()
    assert ours.std() > 0.01
    # The tool multiplies in float16; ours is the product before that rounding.
    assert torch.equal(ours.half(), stored()[1][case]["unpacked"].half())


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        ({}, GptqFormat(4, 128, zeros_minus_one=True)),
        ({"backend": "auto_round:gptq:exllamav2"}, GptqFormat(4, 128, zeros_minus_one=True)),
        ({"backend": "auto_round:exllamav2"}, GptqFormat(4, 128, zeros_minus_one=False)),
        ({"packing_format": "auto_round:gptqmodel"}, GptqFormat(4, 128, zeros_minus_one=False)),
        ({"packing_format": "auto_round:auto_awq"}, AwqFormat(128)),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:awq"}, AwqFormat(128)),
    ],
    ids=str,
)
def test_layouts_by_their_names(packing: dict[str, Any], expected: object) -> None:
    assert read(CONFIG | packing).format_of(f"{LAYER}.mlp.up_proj") == expected


def test_layers_of_their_own() -> None:
    quant = read(
        CONFIG
        | {
            "extra_config": {
                f"{LAYER}.mlp.down_proj": {"bits": 8, "group_size": 32},
                r".*layers\.0\..*": {"bits": 16},
                "lm_head": {"bits": 4, "group_size": 64},
            },
            "modules_to_not_convert": ["mlp.gate$"],
        }
    )
    assert quant.format_of(f"{LAYER}.mlp.down_proj") == GptqFormat(8, 32, zeros_minus_one=True)
    assert quant.format_of(f"{LAYER}.mlp.up_proj") == GptqFormat(4, 128, zeros_minus_one=True)
    assert quant.format_of("lm_head") == GptqFormat(4, 64, zeros_minus_one=True)
    for plain in ("model.layers.0.mlp.down_proj", f"{LAYER}.mlp.gate"):
        assert quant.format_of(plain) is None
    assert read(CONFIG).format_of("lm_head") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, "auto_round:llm_compressor"),
        ({"packing_format": "auto_round:fp8_static", "bits": 8}, "fp8_static"),
        ({"bits": 5}, "auto-round with 5 bits"),
        ({"data_type": "mx_fp"}, "mx_fp"),
        ({"act_bits": 8}, "8 bit inputs"),
        ({"packing_format": "auto_round:auto_awq", "bits": 8}, "AWQ's layout with 8 bits"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_its_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelConfigError, match=words) as refusal:
        read(CONFIG | changes)
    assert "auto-round (in the layouts" in str(refusal.value)
