"""What `quantization_config` says of every linear, and which variants are refused by which name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import LLAMA_NAMES
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.activations import ActivationQuant
from gpu_worker.quant.affine_formats import AwqFormat, GptqFormat, PackQuantizedFormat
from gpu_worker.quant.config import QuantConfig
from gpu_worker.quant.none import UnquantizedLinear
from gpu_worker.quant.scaled_formats import ScaledFormat
from gpu_worker.quant.scheme import CheckpointScheme, read_quantization
from gpu_worker.quant.stored import SplitLinear, StoredLinear

LAYER = "model.layers.3"
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FP8_TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def read(fields: dict[str, Any], names: tuple[str, ...] = ()) -> QuantConfig:
    quant = read_quantization(HfConfig({"quantization_config": fields}), names)
    assert quant is not None
    return quant


def compressed(kind: str, **group: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quant_method": "eetq"}, ["eetq", "awq", "gptq", "compressed-tensors", "fp8", "bitsandbytes", "gguf"]),
        ({"quant_method": "vptq"}, ["vptq", "supported: awq"]),
        ({"quant_method": "quanto", "weights": "int8"}, ["quanto", "supported: awq"]),
        ({"quant_method": "eetq"}, ["eetq", "supported: awq"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, ["int4", "nf4"]),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, ["gemv", "awq (4 bit"]),
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, ["awq with 8 bits"]),
        ({"quant_method": "gptq", "bits": 5, "group_size": 128}, ["gptq with 5 bits"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_p"}, ["gptq_p"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, ["group_size", "0"]),
        ({"quant_method": "gptq", "bits": "four", "group_size": 128}, ["bits", "four"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"(": {}}}, ["dynamic", "regular"]),
        ({"quant_method": "fp8", "fmt": "e5m2"}, ["e5m2"]),
        ({"quant_method": "fp8", "weight_scale_semantics": "inverse"}, ["weight_scale_semantics", "inverse"]),
        ({"quant_method": "fp8", "weight_block_size": 128}, ["weight_block_size", "128"]),
        (compressed("marlin-24", weights=INT4), ["marlin-24", "pack-quantized"]),
        (compressed("pack-quantized", weights=FP8), ["pack-quantized", "float"]),
        (compressed("float-quantized", weights=INT4 | {"symmetric": False}), ["asymmetric"]),
        (
            compressed("pack-quantized", weights=INT4) | {"sparsity_config": {"format": "sparse-24"}},
            ["sparsity_config"],
        ),
        (compressed("pack-quantized", weights=INT4) | {"transform_config": {"groups": 1}}, ["transform_config"]),
        (compressed("float-quantized", weights=FP8, output_activations=FP8), ["output_activations"]),
    ],
    ids=str,
)
def test_a_variant_that_does_not_work_is_refused_by_its_name(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelConfigError) as error:
        read(fields)
    for word in ["config.json: quantization_config", *words]:
        assert word in str(error.value)


def test_gptq_overrides_and_exceptions_go_by_pattern() -> None:
    quant = read(
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "dynamic": {r"-:.*\.mlp\..*": {}, r".*\.q_proj": {"bits": 8, "group_size": 32}},
        }
    )
    assert quant.format_of(f"{LAYER}.mlp.up_proj") is None
    assert quant.format_of(f"{LAYER}.self_attn.q_proj") == GptqFormat(8, 32, zeros_minus_one=True)
    assert quant.format_of(f"{LAYER}.self_attn.k_proj") == GptqFormat(4, 128, zeros_minus_one=True)
    assert quant.format_of("lm_head") is None


def test_awq_leaves_out_by_piece_of_the_name() -> None:
    quant = read({"quant_method": "awq", "bits": 4, "group_size": 64, "modules_to_not_convert": ["visual", "k_proj"]})
    assert quant.format_of(f"{LAYER}.self_attn.k_proj") is None
    assert quant.format_of(f"{LAYER}.self_attn.q_proj") == AwqFormat(64)


@pytest.mark.parametrize(
    ("fields", "names", "scale", "input_scale"),
    [
        ({"activation_scheme": "static", "ignored_layers": ["lm_head"]}, (), "weight_scale", "input_scale"),
        ({"activation_scheme": "dynamic"}, ("x.weight_scale",), "weight_scale", None),
        ({"activation_scheme": "static", "weight_block_size": None}, (), "weight_scale_inv", "activation_scale"),
        ({"activation_scheme": "static"}, ("x.weight_scale_inv",), "weight_scale_inv", "activation_scale"),
        ({"activation_scheme": "dynamic", "weight_block_size": [128, 128]}, (), "weight_scale_inv", None),
    ],
    ids=str,
)
def test_the_dialects_of_fp8(fields: dict[str, Any], names: tuple[str, ...], scale: str, input_scale: str) -> None:
    quant = read({"quant_method": "fp8", "modules_to_not_convert": ["mlp.gate"], **fields}, names)
    stored = quant.format_of(f"{LAYER}.mlp.gate_proj")
    assert isinstance(stored, ScaledFormat)
    assert (stored.scale_name, stored.input_scale_name) == (scale, input_scale)
    assert quant.format_of(f"{LAYER}.mlp.gate") is None and quant.format_of("lm_head") is None


def test_fbgemm_has_a_scale_for_every_output() -> None:
    """The tensors of `FbgemmFp8Linear` in transformers: float8 [N, K], float32 [N, 1]."""
    from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear

    linear = FbgemmFp8Linear(64, 48, bias=False)
    left_out = [f"{LAYER}.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    quant = read({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": left_out})
    assert all(quant.format_of(name) is None for name in (*left_out, "lm_head"))
    stored = quant.format_of(f"{LAYER}.mlp.down_proj")
    assert isinstance(stored, ScaledFormat) and stored.activations == ActivationQuant("float8", "token")
    rules = stored.rules(48, 64)
    kept = dict(linear.state_dict())
    assert set(kept) == set(rules)
    for name, tensor in kept.items():
        assert tuple(tensor.shape) in rules[name].shapes and tensor.dtype in rules[name].dtypes
    tensors = {"weight": torch.randn(48, 64).to(torch.float8_e4m3fn), "weight_scale": torch.rand(48, 1)}
    decoded = stored.decode(tensors, Share(0, 48, 48), Share(0, 64, 64)).dequantize()
    assert torch.equal(decoded, tensors["weight"].float() * tensors["weight_scale"])


def test_compressed_tensors_groups_by_name_pattern_and_class() -> None:
    fields = compressed("mixed-precision", format="pack-quantized", weights=INT4)
    fields["config_groups"]["group_1"] = {
        "targets": [r"re:.*down_proj$", f"{LAYER}.self_attn.o_proj"],
        "format": "float-quantized",
        "weights": FP8,
        "input_activations": FP8_TOKENS,
    }
    fields["ignore"].append(r"re:.*layers\.0\..*")
    quant = read(fields)
    assert quant.format_of(f"{LAYER}.mlp.up_proj") == PackQuantizedFormat(4, 128, symmetric=True)
    for name in (f"{LAYER}.mlp.down_proj", f"{LAYER}.self_attn.o_proj"):
        stored = quant.format_of(name)
        assert isinstance(stored, ScaledFormat)
        assert stored.granularity == "channel" and stored.activations == ActivationQuant("float8", "token")
    assert quant.format_of("model.layers.0.mlp.down_proj") is None
    assert quant.format_of("lm_head") is None


def test_a_fused_linear_with_parts_of_different_formats_is_split() -> None:
    fields = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {r".*v_proj": {"bits": 8}}}
    scheme = CheckpointScheme(read(fields), LLAMA_NAMES, ())
    split = scheme.linear_method("layers.3.attention.qkv")
    assert isinstance(split, SplitLinear) and list(split.methods) == ["q", "k", "v"]
    formats = [method.format.bits for method in split.methods.values()]  # type: ignore[attr-defined]
    assert formats == [4, 4, 8]
    assert isinstance(scheme.linear_method("layers.3.mlp.gate_up"), StoredLinear)


def test_a_module_that_gptq_left_plain_without_saying_so_is_read_plainly() -> None:
    fields = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    names = (f"{LAYER}.mlp.down_proj.weight", f"{LAYER}.self_attn.o_proj.qweight")
    scheme = CheckpointScheme(read(fields), LLAMA_NAMES, names)
    assert isinstance(scheme.linear_method("layers.3.mlp.down"), UnquantizedLinear)
    assert isinstance(scheme.linear_method("layers.3.attention.output"), StoredLinear)


@pytest.mark.parametrize(
    ("name", "content", "label"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True}, "gptq 4 bit"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "awq 4 bit"),
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
            "modelopt FP8",
        ),
    ],
)
def test_a_file_of_its_own_says_it_where_the_config_does_not(
    tmp_path: Path, name: str, content: dict[str, Any], label: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(content))
    quant = read_quantization(HfConfig.open(tmp_path))
    assert quant is not None and quant.label == label
    assert quant.format_of("model.layers.0.mlp.up_proj") is not None and quant.format_of("lm_head") is None
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    quant = read_quantization(HfConfig.open(tmp_path))
    assert quant is not None and quant.method == "mxfp4"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quant_method": "eetq"}, "'eetq'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "is_marlin_format": True}, "is_marlin_format"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelConfigError, match=words) as refusal:
        read_quantization(HfConfig({"quantization_config": fields}))
    assert "compressed-tensors (pack-quantized" in str(refusal.value)
