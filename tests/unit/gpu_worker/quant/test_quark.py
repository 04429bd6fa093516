"""Checkpoints that AMD's Quark exported, against its own unpacking; and what its config says of each layer.

The files are made by `tests/fixtures/quant/make_quark.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.activations import ActivationQuant
from gpu_worker.quant.config import QuantConfig
from gpu_worker.quant.quark import MXFP4
from gpu_worker.quant.scaled_formats import ScaledFormat
from gpu_worker.quant.scheme import read_quantization
from tests.unit.gpu_worker.quant.exported import TOKENS, assert_same_tokens, reference_logits
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "quant" / "quark"
CASES = ("fp8-kv", "ptpc-fp8", "int8", "mxfp4", "mxfp4-attention-fp8")
LAYER = "model.layers.3"
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True}
FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0"}


ROTATION = {"name": "rotation", "r1": True, "r2": True, "r3": False, "r4": False, "online_r1_rotation": None}


def read(**fields: Any) -> QuantConfig:
    quant = read_quantization(HfConfig({"quantization_config": {"quant_method": "quark"} | fields}))
    assert quant is not None
    return quant


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_tool(case: str) -> None:
    quant = read_quantization(HfConfig.open(FIXTURES / case))
    assert quant is not None
    tensors, expected = (load_file(FIXTURES / case / f"{name}.safetensors") for name in ("model", "dequantized"))
    assert len(expected) == 7
    for name, weight in expected.items():
        module = name.removesuffix(".weight")
        stored = quant.format_of(module)
        assert stored is not None
        own = {kind.removeprefix(f"{module}."): tensor for kind, tensor in tensors.items() if kind.startswith(module)}
        own.pop("output_scale", None)
        rules = stored.rules(*weight.shape)
        assert set(own) <= set(rules)
        assert {kind for kind, rule in rules.items() if not rule.optional} <= set(own)
        for kind, tensor in own.items():
            assert tuple(tensor.shape) in rules[kind].shapes and tensor.dtype in rules[kind].dtypes
        rows, cols = (Share(0, size, size) for size in weight.shape)
        # The tool multiplies in the scale's bfloat16.
        ours = stored.decode(own, rows, cols).dequantize()
        assert torch.equal(ours.bfloat16(), weight.bfloat16())


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_the_dequantized_weights(case: str, tmp_path: Path) -> None:
    expected = reference_logits(FIXTURES / case, load_file(FIXTURES / case / "dequantized.safetensors"), tmp_path)
    assert_same_tokens(QuantizedModel(FIXTURES / case).logits(TOKENS), expected, least_cosine=0.98)


def test_scales_of_the_kv_cache_are_those_of_its_projections() -> None:
    tensors = load_file(FIXTURES / "fp8-kv" / "model.safetensors")
    scales = QuantizedModel(FIXTURES / "fp8-kv").model.kv_scales
    assert scales is not None
    names = [f"model.layers.0.self_attn.{one}_proj.output_scale" for one in "kv"]
    assert [scales[0].key, scales[0].value] == [float(tensors[name]) for name in names]


def test_layers_go_by_pattern_and_exceptions_by_name_or_pattern() -> None:
    quant = read(
        global_quant_config={"weight": FP4, "input_tensors": FP4 | {"is_dynamic": True}},
        layer_quant_config={"*self_attn*": {"weight": FP8, "input_tensors": FP8}},
        exclude=["lm_head", "*.mlp.gate", f"{LAYER}.mlp.up_proj"],
        export={"kv_cache_group": [], "weight_format": "real_quantized", "pack_method": "reorder"},
    )
    assert quant.format_of(f"{LAYER}.mlp.down_proj") == MXFP4
    stored = quant.format_of(f"{LAYER}.self_attn.q_proj")
    assert isinstance(stored, ScaledFormat) and stored.activations == ActivationQuant("float8", "tensor", dynamic=False)
    for name in ("lm_head", f"{LAYER}.mlp.gate", f"{LAYER}.mlp.up_proj"):
        assert quant.format_of(name) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"global_quant_config": {"weight": [FP8, {"dtype": "int4"}], "input_tensors": FP8}}, "several stages"),
        ({"global_quant_config": {"weight": {"dtype": "int4", "qscheme": "per_group"}}}, "int4 weights per_group"),
        ({"global_quant_config": {"weight": FP4 | {"group_size": 16}}}, "fp4 weights per_group"),
        ({"global_quant_config": {"weight": {"dtype": "fp6_e3m2", "qscheme": "per_group"}}}, "fp6_e3m2"),
        ({"global_quant_config": {"weight": FP8 | {"qscheme": "per_channel", "ch_axis": 1}}}, "per_channel"),
        ({"global_quant_config": {"weight": FP8, "input_tensors": {"dtype": "int8"}}}, "int8 inputs"),
        ({"global_quant_config": {"weight": FP8, "input_tensors": FP8 | {"qscheme": "per_group"}}}, "inputs per_group"),
        ({"global_quant_config": {"weight": FP8}, "export": {"weight_format": "fake_quantized"}}, "fake_quantized"),
        # By amd-quark 0.13: "r4" turns the inputs of down projections.
        ({"global_quant_config": {"weight": FP8}, "algo_config": [ROTATION | {"r4": True}]}, "rotations of inputs"),
        ({"algo_config": [ROTATION | {"online_r1_rotation": True}]}, "rotations of inputs"),
        ({"algo_config": [{"name": "quarot"}]}, "rotations of inputs"),
        ({"global_quant_config": {"weight": FP8}, "layer_type_quant_config": {"Conv2d": {}}}, "Conv2d"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_its_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelConfigError, match=f"quark with .*{words}") as refusal:
        read(**fields)
    assert "quark (FP8, INT8, MXFP4)" in str(refusal.value)


def test_rotations_within_the_weights_are_read() -> None:
    for algorithms in ([ROTATION], [{"name": "smooth"}, {"name": "gptq"}], None):
        quant = read(global_quant_config={"weight": FP8}, algo_config=algorithms)
        assert isinstance(quant.format_of(f"{LAYER}.mlp.up_proj"), ScaledFormat)


def test_a_weight_without_its_scale_is_refused(tmp_path: Path) -> None:
    from gpu_worker.loading.tensor_source import CheckpointError

    shutil.copy(FIXTURES / "mxfp4" / "config.json", tmp_path / "config.json")
    tensors = load_file(FIXTURES / "mxfp4" / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj\.weight"):
        QuantizedModel(tmp_path)
