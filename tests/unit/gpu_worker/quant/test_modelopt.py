"""Checkpoints that ModelOpt exported, against its own unpacking; and what its config says of each layer.

The files are made by `tests/fixtures/quant/make_modelopt.py`.
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
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.config import QuantConfig
from gpu_worker.quant.float4_formats import Float4Format
from gpu_worker.quant.scaled_formats import ScaledFormat
from gpu_worker.quant.scheme import read_quantization
from tests.unit.gpu_worker.quant.exported import TOKENS, assert_same_tokens, reference_logits
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "quant" / "modelopt"
CASES = ("fp8", "fp8-per-channel", "fp8-blocks")
LAYER = "model.layers.3"


def read(fields: dict[str, Any]) -> QuantConfig:
    quant = read_quantization(HfConfig({"quantization_config": {"quant_method": "modelopt"} | fields}))
    assert quant is not None
    return quant


def decoded(stored: Any, tensors: dict[str, torch.Tensor], size: tuple[int, ...]) -> torch.Tensor:
    rows, cols = (Share(0, one, one) for one in size)
    result: torch.Tensor = stored.decode(tensors, rows, cols).dequantize()
    return result


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_tool(case: str) -> None:
    quant = read_quantization(HfConfig.open(FIXTURES / case))
    assert quant is not None
    tensors, expected = (load_file(FIXTURES / case / f"{name}.safetensors") for name in ("model", "dequantized"))
    assert len(expected) == 7
    for name, weight in expected.items():
        module = name.removesuffix(".weight")
        stored = quant.format_of(module)
        assert isinstance(stored, ScaledFormat)
        own = {kind.removeprefix(f"{module}."): tensor for kind, tensor in tensors.items() if kind.startswith(module)}
        rules = stored.rules(*weight.shape)
        assert set(own) == set(rules)
        for kind, tensor in own.items():
            assert tuple(tensor.shape) in rules[kind].shapes and tensor.dtype in rules[kind].dtypes
        assert torch.equal(decoded(stored, own, tuple(weight.shape)), weight)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_the_dequantized_weights(case: str, tmp_path: Path) -> None:
    expected = reference_logits(FIXTURES / case, load_file(FIXTURES / case / "dequantized.safetensors"), tmp_path)
    assert_same_tokens(QuantizedModel(FIXTURES / case).logits(TOKENS), expected, least_cosine=0.99)


def test_a_share_of_blocks_is_that_part_of_the_whole() -> None:
    """Of two blocks, the second one cut short; and of one, whose scale is a number."""
    quant = read_quantization(HfConfig.open(FIXTURES / "fp8-blocks"))
    tensors, expected = (
        load_file(FIXTURES / "fp8-blocks" / f"{name}.safetensors") for name in ("model", "dequantized")
    )
    shapes = set()
    for name, weight in expected.items():
        stored = quant.format_of(name.removesuffix(".weight")) if quant is not None else None
        assert stored is not None
        own = {kind: tensors[name.replace(".weight", f".{kind}")] for kind in ("weight", "weight_scale")}
        shapes.add(tuple(own["weight_scale"].shape))
        num_outputs, num_inputs = weight.shape
        for row, col in ((0, 0), (num_outputs // 2, 0), (0, num_inputs // 2), (num_outputs - 8, num_inputs - 8)):
            rows, cols = Share(row, num_outputs - row, num_outputs), Share(col, num_inputs - col, num_inputs)
            cut = {}
            for kind, tensor in own.items():
                index = stored.index(kind, tuple(tensor.shape), rows, cols)
                cut[kind] = tensor[index] if index else tensor
            assert torch.equal(stored.decode(cut, rows, cols).dequantize(), weight[row:, col:])
    assert shapes == {(), (2, 1, 1, 1), (1, 1, 2, 1)}


def test_nvfp4_values_are_those_of_the_tool() -> None:
    tensors = load_file(FIXTURES / "nvfp4.safetensors")
    expected = tensors.pop("unpacked")
    stored = read({"quant_algo": "NVFP4"}).format_of(f"{LAYER}.mlp.down_proj")
    assert isinstance(stored, Float4Format)
    rules = stored.rules(*expected.shape)
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) in rules[name].shapes and tensor.dtype in rules[name].dtypes
    assert expected.std() > 0.01
    ours = decoded(stored, tensors, tuple(expected.shape))
    # Ours divides by the reciprocal of the tool's factor.
    torch.testing.assert_close(ours, expected, rtol=3e-7, atol=0)


def test_old_exports_say_it_in_a_file_of_their_own(tmp_path: Path) -> None:
    for name in ("config.json", "hf_quant_config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "fp8" / name, tmp_path / name)
    whole = QuantizedModel(tmp_path).logits([5, 6, 7])
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(QuantizedModel(tmp_path).logits([5, 6, 7]), whole)


def test_mixtures_and_exceptions() -> None:
    quant = read(
        {
            "quant_algo": "MIXED_PRECISION",
            "ignore": ["lm_head", "*.self_attn.o_proj"],
            "quantized_layers": {
                f"{LAYER}.mlp.down_proj": {"quant_algo": "NVFP4", "group_size": 16},
                f"{LAYER}.self_attn*": {"quant_algo": "FP8"},
            },
        }
    )
    assert isinstance(quant.format_of(f"{LAYER}.mlp.down_proj"), Float4Format)
    assert isinstance(quant.format_of(f"{LAYER}.self_attn.q_proj"), ScaledFormat)
    for plain in ("lm_head", f"{LAYER}.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        assert quant.format_of(plain) is None
    quant = read({"quant_algo": "NVFP4", "group_size": 16, "ignore": ["*.self_attn*"]})
    assert quant.format_of(f"{LAYER}.self_attn.q_proj") is None


@pytest.mark.parametrize(
    "fields",
    [
        {"quant_algo": "NVFP4_AWQ"},
        {"quant_algo": "W4A8_AWQ"},
        {"quant_algo": "FP8_PC_PT"},
        {"quant_algo": "NVFP4", "group_size": 32},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "W4A16_AWQ"}}},
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_its_name(fields: dict[str, Any]) -> None:
    layers = fields.get("quantized_layers", {"": fields})
    with pytest.raises(ModelConfigError, match=f"modelopt.*{next(iter(layers.values()))['quant_algo']}") as refusal:
        read(fields)
    assert "FP8_PER_CHANNEL_PER_TOKEN" in str(refusal.value)
