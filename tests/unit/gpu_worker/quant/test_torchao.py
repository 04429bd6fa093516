"""Checkpoints that transformers saved with torchao, against torchao's own unpacking of them.

The files are made by `tests/fixtures/quant/make_torchao.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.errors import LoadError
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.parallel.shares import ParallelError, Share
from gpu_worker.quant.config import QuantConfig
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.repack import repack
from gpu_worker.quant.scaled_formats import ScaledFormat
from gpu_worker.quant.scheme import read_quantization
from gpu_worker.quant.torchao_formats import TorchaoInt4Format, TorchaoIntxFormat
from gpu_worker.quant.weights import ScaledWeight
from tests.unit.gpu_worker.quant.exported import TOKENS, assert_same_tokens, reference_logits
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "quant" / "torchao"
QUANTIZE_INPUTS = ("int8-dynamic", "float8-dynamic-row", "float8-dynamic-tensor")
WEIGHTS_ALONE = ("int4", "int8", "int8-groups", "float8", "int8-int4", "by-name", "nvfp4", "mxfp8")
FLOATS = ("nvfp4", "mxfp8")
CASES = (*WEIGHTS_ALONE, *QUANTIZE_INPUTS)
# q, k and v in one linear, and gate and up.
FUSED = ("int4-fused", "int8-fused")
DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"


def read(quant_type: Any, **fields: Any) -> QuantConfig:
    whole = {"quant_method": "torchao", "quant_type": quant_type} | fields
    quant = read_quantization(HfConfig({"quantization_config": whole}))
    assert quant is not None
    return quant


def one_config(kind: str, version: int = 2, **fields: Any) -> dict[str, Any]:
    return {"default": {"_type": kind, "_version": version, "_data": fields}}


def of_case(case: str) -> tuple[dict[str, WeightFormat], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Formats by module, stored tensors, and the weights that they stand for."""
    quant = read_quantization(HfConfig.open(FIXTURES / case))
    assert quant is not None
    tensors, expected = (load_file(FIXTURES / case / f"{name}.safetensors") for name in ("model", "dequantized"))
    formats = {name.removesuffix(".weight"): quant.format_of(name.removesuffix(".weight")) for name in expected}
    assert all(formats.values())
    return {name: stored for name, stored in formats.items() if stored is not None}, tensors, expected


def part_of(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    return {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")}


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_tool(case: str) -> None:
    formats, tensors, expected = of_case(case)
    # transformers leaves the head out where nothing else is.
    assert ("lm_head.weight" in expected) == (case == "int8")
    assert ("model.layers.0.self_attn.v_proj.weight" in expected) == (case not in ("int8", "by-name"))
    for module, stored in formats.items():
        weight, own = expected[f"{module}.weight"], part_of(tensors, module)
        rules = stored.rules(*weight.shape)
        assert set(own) == set(rules) - {"_weight_act_per_tensor_scale"}
        for name, tensor in own.items():
            assert tuple(tensor.shape) in rules[name].shapes and tensor.dtype in rules[name].dtypes
        assert stored.size_of({name: tuple(tensor.shape) for name, tensor in own.items()}) == tuple(weight.shape)
        whole = stored.decode(own, *(Share(0, size, size) for size in weight.shape))
        ours = whole.dequantize()
        assert ours.std() > 0.01
        if case == "int4":  # one sum is rounded in another order
            torch.testing.assert_close(ours, weight, rtol=0, atol=1e-7)
        elif case == "nvfp4":  # ours divides by the reciprocal of the tool's factor
            torch.testing.assert_close(ours, weight, rtol=3e-7, atol=0)
        else:
            assert torch.equal(ours, weight)
        if case == "mxfp8":
            assert isinstance(whole, ScaledWeight)
            continue
        assert isinstance(stored, ScaledFormat) or repack(whole) is not None


@pytest.mark.parametrize("case", CASES)
def test_a_share_is_that_part_of_the_whole(case: str) -> None:
    formats, tensors, expected = of_case(case)
    stored, own = formats[DOWN], part_of(tensors, DOWN)
    weight = expected[f"{DOWN}.weight"]
    num_outputs, num_inputs = weight.shape
    shares = [(Share(4, 12, num_outputs), Share(0, num_inputs, num_inputs))]
    shares += [
        (Share(0, num_outputs, num_outputs), Share(start, 16, num_inputs)) for start in (16, 48) if case != "mxfp8"
    ]
    if case in FLOATS:
        shares += [(Share(0, num_outputs, num_outputs), Share(start, 32, num_inputs)) for start in (32, 96, 128)]
    elif case != "int4":
        shares.append((Share(8, 8, num_outputs), Share(24, 24, num_inputs)))
    whole = stored.decode(own, *(Share(0, size, size) for size in weight.shape)).dequantize()
    check_shares(stored, own, whole, shares)
    if case in FLOATS:
        # Outputs on both sides of where a tile ends.
        stored, own = formats[UP], part_of(tensors, UP)
        sizes = expected[f"{UP}.weight"].shape
        whole = stored.decode(own, *(Share(0, size, size) for size in sizes)).dequantize()
        shares = [(Share(start, count, 160), Share(0, 32, 32)) for start, count in ((0, 80), (80, 80), (130, 20))]
        check_shares(stored, own, whole, shares)
    if case == "int4":
        with pytest.raises(ParallelError, match="another --tensor-parallel-size"):
            stored.index("_weight_qdata", (num_outputs, num_inputs // 2), shares[0][0], Share(24, 16, num_inputs))


def check_shares(
    stored: WeightFormat, own: dict[str, torch.Tensor], whole: torch.Tensor, shares: list[tuple[Share, Share]]
) -> None:
    for rows, cols in shares:
        cut = {}
        for name, tensor in own.items():
            index = stored.index(name, tuple(tensor.shape), rows, cols)
            cut[name] = tensor[index] if index else tensor
        assert cut["_weight_qdata"].numel() < own["_weight_qdata"].numel()
        assert torch.equal(stored.decode(cut, rows, cols).dequantize(), whole[rows.as_slice(), cols.as_slice()])


@pytest.mark.parametrize("case", [*CASES, *FUSED])
def test_greedy_tokens_are_those_of_the_dequantized_weights(case: str, tmp_path: Path) -> None:
    expected = reference_logits(FIXTURES / case, load_file(FIXTURES / case / "dequantized.safetensors"), tmp_path)
    logits = QuantizedModel(FIXTURES / case).logits(TOKENS)
    if case in QUANTIZE_INPUTS:
        assert_same_tokens(logits, expected, least_cosine=0.99)
    else:
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_names_go_before_patterns_and_patterns_before_the_default() -> None:
    quant = read_quantization(HfConfig.open(FIXTURES / "by-name"))
    assert quant is not None
    assert quant.format_of(DOWN) == TorchaoIntxFormat(3, 16)
    assert quant.format_of(UP) == TorchaoIntxFormat(8, -1)
    assert isinstance(quant.format_of("model.layers.0.self_attn.q_proj"), ScaledFormat)
    assert quant.format_of("model.layers.0.self_attn.v_proj") is None
    by_weight = {"fqn_to_config": {f"{UP}.weight": None, UP: one_config("Int4WeightOnlyConfig")["default"]}}
    quant = read({"default": {"_type": "FqnToConfig", "_version": 1, "_data": by_weight}})
    assert quant.format_of(UP) is None and quant.format_of(DOWN) is None


def test_what_is_left_out() -> None:
    quant = read(one_config("Int4WeightOnlyConfig", group_size=64), modules_to_not_convert=["self_attn.q_proj"])
    assert quant.format_of(UP) == TorchaoInt4Format(64)
    assert quant.format_of("model.layers.0.self_attn.q_proj") is None and quant.format_of("lm_head") is not None
    assert read(one_config("Int4WeightOnlyConfig")).format_of("lm_head") is None
    quant = read(one_config("Int8WeightOnlyConfig"), include_input_output_embeddings=True)
    assert quant.format_of("lm_head") is not None


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "int8-int4", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{DOWN}._weight_qdata"][3, 5] = 8
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match="_weight_qdata holds values from -8 to 8 that 4 bit integers do not have"):
        QuantizedModel(tmp_path)


def test_weights_that_the_config_does_not_speak_of_are_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "int4", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized in another way than the config says"):
        QuantizedModel(tmp_path)


@pytest.mark.parametrize(
    ("quant_type", "words"),
    [
        ("int4_weight_only", "torchao with quant_type 'int4_weight_only'"),
        (one_config("Int4WeightOnlyConfig", 1), "torchao with Int4WeightOnlyConfig of version 1"),
        (
            one_config(
                "Int4WeightOnlyConfig",
                int4_packing_format={"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"},
            ),
            "Int4WeightOnlyConfig in the int4_packing_format 'tile_packed_to_4d'",
        ),
        (one_config("Float8DynamicActivationInt4WeightConfig"), "int4_packing_format 'preshuffled'"),
        (
            one_config("IntxWeightOnlyConfig", intx_packing_format="opaque_torchao_auto"),
            "IntxWeightOnlyConfig in the intx_packing_format 'opaque_torchao_auto'",
        ),
        (
            one_config("Float8WeightOnlyConfig", weight_dtype={"_type": "torch.dtype", "_data": "float8_e5m2"}),
            "weight_dtype 'float8_e5m2'",
        ),
        (
            one_config("Float8DynamicActivationFloat8WeightConfig", packing_format="sparse_2d_data_2d_metadata"),
            "packing_format 'sparse_2d_data_2d_metadata'",
        ),
        (one_config("AWQConfig"), "torchao with AWQConfig"),
        (
            {
                "default": {
                    "_type": "FqnToConfig",
                    "_data": {"fqn_to_config": {"a": {"_type": "UIntXWeightOnlyConfig"}}},
                }
            },
            "torchao with UIntXWeightOnlyConfig",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_its_name(quant_type: Any, words: str) -> None:
    with pytest.raises(ModelConfigError, match=words) as refusal:
        read(quant_type)
    assert "torchao (int4 in the packing format plain" in str(refusal.value)


@pytest.mark.parametrize("sizes", [None, [128], [128, "128"]])
@pytest.mark.parametrize("of_inputs", [True, False])
def test_blocks_without_two_sizes_are_refused(sizes: Any, of_inputs: bool) -> None:
    blocks = {"_type": "PerBlock", "_data": {} if sizes is None else {"block_size": sizes}}
    sound = {"_type": "PerBlock", "_data": {"block_size": [1, 128]}}
    granularity = [blocks, sound] if of_inputs else [sound, blocks]
    with pytest.raises(ModelConfigError, match=r"has the block_size .*, expected two sizes"):
        read(one_config("Float8DynamicActivationFloat8WeightConfig", granularity=granularity))
