"""`quantization_config` as publishers write it: under which key, with which words, and what is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.loader import read_spec
from gpu_worker.quant.activations import ActivationQuant
from gpu_worker.quant.affine_formats import AwqFormat, GptqFormat, PackQuantizedFormat
from gpu_worker.quant.float4_formats import Float4Format
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.mlx import MlxFormat
from gpu_worker.quant.scaled_formats import MXFP8, ScaledFormat
from gpu_worker.quant.scheme import module_format, read_quantization
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny
from tests.unit.gpu_worker.quant.test_published_checkpoints import FLOAT8_TOKENS, compressed, float8, group, int4

UP = "model.layers.3.mlp.up_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
FP8_STATIC = float8() | {"strategy": "tensor"}
FLOAT8_STATIC = ScaledFormat(
    "float8", "tensor", input_scale_name="input_scale", activations=ActivationQuant("float8", "tensor", dynamic=False)
)
NVFP4 = int4(type="float", group_size=16, strategy="tensor_group")
MXFP8_WEIGHTS = int4(type="float", num_bits=8, scale_dtype="torch.uint8")
NVFP4_INPUTS = NVFP4 | {"dynamic": "local"}
"""Scales of groups are measured, the one above them is in the file."""


def stored(config: dict[str, Any], name: str = UP) -> WeightFormat | None:
    quant = read_quantization(HfConfig(config))
    assert quant is not None
    return quant.format_of(name)


WHOLE_CONFIGS: dict[str, tuple[dict[str, Any], WeightFormat | None]] = {
    # Neural Magic, before transformers had compressed-tensors.
    "compression_config": (
        {"compression_config": compressed("pack-quantized", group(int4(), "Linear"), ignore=["lm_head"])},
        PackQuantizedFormat(4, 32, symmetric=True),
    ),
    "awq-in-text_config": ({"text_config": {"quantization_config": AWQ}}, AwqFormat(128)),
    "gptq-in-thinker_config": ({"thinker_config": {"quantization_config": GPTQ}}, GptqFormat(4, 128, True)),
    "modelopt-as-in-its-own-file": (
        {
            "quantization_config": {
                "producer": {"name": "modelopt", "version": "0.23.0"},
                "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
            }
        },
        FLOAT8_STATIC,
    ),
    "modelopt-as-llm-compressor": (
        {
            "quantization_config": {
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}},
                "ignore": ["lm_head", "model.layers.*.mlp.gate", "model.layers.0.self_attn*"],
                "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
                "producer": {"name": "modelopt", "version": "0.35.0"},
                "quant_algo": "nvfp4",
                "quant_method": "modelopt",
            }
        },
        Float4Format("nvfp4", dialect="modelopt"),
    ),
    "modelopt-cache-alone": (
        {
            "quantization_config": {
                "quant_method": "modelopt",
                "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"},
            }
        },
        None,
    ),
    "compressed-cache-alone": (
        {
            "quantization_config": {
                "config_groups": {},
                "ignore": [],
                "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "strategy": "tensor", "type": "float"},
                "quant_method": "compressed-tensors",
                "quantization_status": "compressed",
            }
        },
        None,
    ),
    "compressed-w4a4": (
        {
            "quantization_config": compressed(
                "int-quantized",
                group(int4(), "Linear", input_activations=int4(group_size=None, strategy="token", dynamic=True)),
                ignore=["lm_head"],
            )
        },
        ScaledFormat("int8", "block", (1, 32), ignored=("weight_zero_point",)),
    ),
    # As compressed-tensors 0.20 stores 4-bit weights under 8-bit inputs.
    "compressed-w4afp8": (
        {
            "quantization_config": compressed(
                "int-quantized", group(int4(), "Linear", input_activations=FLOAT8_TOKENS), ignore=["lm_head"]
            )
        },
        ScaledFormat("int8", "block", (1, 32), ignored=("weight_zero_point",)),
    ),
    "compressed-sparse-stored-densely": (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "sparsity_config": {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "2:4"},
            }
        },
        None,
    ),
    "compressed-nvfp4": (
        {
            "quantization_config": compressed(
                "nvfp4-pack-quantized", group(NVFP4, "Linear", input_activations=NVFP4_INPUTS), ignore=["lm_head"]
            )
        },
        Float4Format("nvfp4"),
    ),
    "mlx": (
        {"quantization": {"group_size": 64, "bits": 4, UP: {"group_size": 32, "bits": 6}}},
        MlxFormat(6, 32),
    ),
    "compressed-mxfp8": (
        {
            "quantization_config": compressed(
                "mxfp8-quantized",
                group(MXFP8_WEIGHTS, "Linear", input_activations=MXFP8_WEIGHTS | {"dynamic": True}),
                ignore=["lm_head"],
            )
        },
        MXFP8,
    ),
    "modelopt-mxfp8": (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MXFP8", "group_size": 32, "ignore": []}},
        MXFP8,
    ),
    "compressed-asymmetric-int8-inputs": (
        {
            "quantization_config": compressed(
                "int-quantized",
                group(
                    int4(num_bits=8, group_size=None, strategy="channel"),
                    "Linear",
                    input_activations=int4(
                        num_bits=8, group_size=None, strategy="token", symmetric=False, dynamic=True
                    ),
                ),
                ignore=["lm_head"],
                kv_cache_scheme={
                    "dynamic": False,
                    "num_bits": 8,
                    "strategy": "tensor",
                    "symmetric": True,
                    "type": "float",
                },
            )
        },
        ScaledFormat(
            "int8",
            "channel",
            activations=ActivationQuant("int8", "token", symmetric=False),
            ignored=("weight_zero_point",),
        ),
    ),
    "compressed-early-float8": (
        {
            "quantization_config": compressed(
                "naive-quantized",
                group(FP8_STATIC, "Linear", input_activations=FP8_STATIC),
                ignore=["lm_head"],
                quantization_status="frozen",
                sparsity_config=None,
            )
        },
        ScaledFormat(
            "float8",
            "tensor",
            input_scale_name="input_scale",
            input_zero_name="input_zero_point",
            activations=ActivationQuant("float8", "tensor", dynamic=False),
            ignored=("weight_zero_point",),
        ),
    ),
    "compressed-act-order": (
        {"quantization_config": compressed("pack-quantized", group(int4(actorder="group"), "Linear"), ignore=[])},
        PackQuantizedFormat(4, 32, symmetric=True, may_have_group_index=True),
    ),
    "compressed-static-act-order": (
        {"quantization_config": compressed("pack-quantized", group(int4(actorder="static"), "Linear"), ignore=[])},
        PackQuantizedFormat(4, 32, symmetric=True),
    ),
    "fp8-static-ministral-3": (
        {
            "quantization_config": {
                "activation_scheme": "static",
                "dequantize": False,
                "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
                "quant_method": "fp8",
                "weight_block_size": None,
            }
        },
        ScaledFormat(
            "float8",
            "tensor",
            scale_name="weight_scale_inv",
            input_scale_name="activation_scale",
            activations=ActivationQuant("float8", "tensor", dynamic=False),
        ),
    ),
    "gptq-by-auto-round": (
        {
            "quantization_config": GPTQ
            | {
                "autoround_version": "0.5.1",
                "block_name_to_quantize": "model.layers",
                "checkpoint_format": "gptq",
                "dynamic": {r"+:.*\.(q|k)_proj": {"bits": 8}},
                "provider": "auto-round",
                "sym": True,
            }
        },
        GptqFormat(4, 128, True),
    ),
    "gptq-numbers-as-text": (
        {"quantization_config": GPTQ | {"bits": "4", "group_size": "32"}},
        GptqFormat(4, 32, True),
    ),
    "gptq-null-for-one-group": (
        {"quantization_config": GPTQ | {"bits": 8.0, "group_size": None, "dynamic": None}},
        GptqFormat(8, -1, True),
    ),
    "gptq-left-out-by-false": ({"quantization_config": GPTQ | {"dynamic": {r".*\.up_proj": False}}}, None),
    "gptq-left-out-by-null": ({"quantization_config": GPTQ | {"dynamic": {r"-:.*\.up_proj": None}}}, None),
    "gptq-changed-by-null": (
        {"quantization_config": GPTQ | {"dynamic": {r".*\.up_proj": None}}},
        GptqFormat(4, 128, True),
    ),
    "gptq-without-its-name": (
        {"quantization_config": {"bits": 4, "damp_percent": 0.01, "desc_act": False, "group_size": 128, "sym": True}},
        GptqFormat(4, 128, True),
    ),
    "awq-without-its-name": (
        {"quantization_config": {"q_group_size": 64, "version": "GEMM", "w_bit": 4, "zero_point": True}},
        AwqFormat(64),
    ),
    "awq-null-for-one-group": ({"quantization_config": AWQ | {"bits": "4", "group_size": None}}, AwqFormat(-1)),
    "fp8-as-torch-names-it": (
        {"quantization_config": {"fmt": "float8_e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}},
        ScaledFormat(
            "float8",
            "block",
            (128, 128),
            scale_name="weight_scale_inv",
            activations=ActivationQuant("float8", "group", dynamic=True, group_size=128),
        ),
    ),
    "auto-round-with-nulls": (
        {
            "quantization_config": {
                "act_bits": None,
                "bits": 4,
                "extra_config": {UP: {"act_bits": None, "bits": 8, "data_type": None, "group_size": None}},
                "group_size": 128,
                "packing_format": "auto_round:auto_gptq",
                "quant_method": "auto-round",
            }
        },
        GptqFormat(8, -1, True),
    ),
    "compressed-in-itself": (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "quantization_config": compressed("pack-quantized", group(int4(), "Linear"), ignore=["lm_head"]),
                "sparsity_config": {},
            }
        },
        PackQuantizedFormat(4, 32, symmetric=True),
    ),
    "compressed-attention-besides": (
        {
            "quantization_config": compressed(
                "pack-quantized",
                {"targets": ["LlamaAttention", "re:.*self_attn$"], "input_activations": FP8_STATIC, "weights": None},
                group(int4(), "Linear"),
                ignore=["lm_head"],
            )
        },
        PackQuantizedFormat(4, 32, symmetric=True),
    ),
    "awq-in-capitals": ({"quantization_config": AWQ | {"quant_method": "AWQ", "version": "GEMM"}}, AwqFormat(128)),
    # The kernel that somebody's transformers was to load it with, saved again.
    "awq-for-exllama": ({"quantization_config": AWQ | {"version": "exllama"}}, AwqFormat(128)),
    "gptq-with-static-groups": (
        {"quantization_config": GPTQ | {"desc_act": True, "static_groups": True, "sym": False}},
        GptqFormat(4, 128, True),
    ),
}


@pytest.mark.parametrize("case", WHOLE_CONFIGS)
def test_what_a_published_config_says_of_a_linear(case: str) -> None:
    config, expected = WHOLE_CONFIGS[case]
    assert stored(config) == expected


# R4 of SpinQuant.
TURNS_INPUTS = {
    "config_groups": {
        "R4": {
            "type": "hadamard",
            "apply": [
                {"targets": ["re:.*down_proj$"], "location": "input", "inverse": False, "ignore": []},
                {"targets": ["re:.*down_proj$"], "location": "weight_input", "inverse": True, "ignore": []},
            ],
        }
    }
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "awq-gemv": (AWQ | {"version": "GEMV"}, "awq with version 'gemv'"),
    "awq-gemv-fast": (AWQ | {"format": "gemv_fast"}, "awq with version 'gemv_fast'"),
    "awq-checkpoint-format": (AWQ | {"checkpoint_format": "llm-awq"}, "awq with version 'llm-awq'"),
    "awq-backend": (AWQ | {"version": "gemm", "backend": "llm-awq"}, "awq with version 'llm-awq'"),
    "awq-order": (AWQ | {"pack_method": "order"}, "awq with pack_method 'order'"),
    "gptq-marlin": (GPTQ | {"checkpoint_format": "marlin"}, "gptq with checkpoint_format 'marlin'"),
    "gptq-bitblas": (GPTQ | {"format": "bitblas"}, "gptq with checkpoint_format 'bitblas'"),
    "gptq-old-marlin": (GPTQ | {"is_marlin_format": True}, "gptq with is_marlin_format"),
    "gptq-rotated": (GPTQ | {"rotation": "hadamard"}, "gptq with rotation 'hadamard'"),
    "gptq-adapter": (GPTQ | {"adapter": {"name": "lora", "path": "x", "rank": 64}}, "gptq with adapter"),
    "sparse": (
        compressed("dense", ignore=[], sparsity_config={"format": "sparse-24-bitmask"}),
        "compressed-tensors with a sparsity_config of the format 'sparse-24-bitmask'",
    ),
    "marlin-24": (
        compressed("marlin-24", group(int4(), "Linear"), ignore=[]),
        "compressed-tensors with the format 'marlin-24'",
    ),
    "transforms": (
        compressed("pack-quantized", group(int4(), "Linear"), ignore=[], transform_config=TURNS_INPUTS),
        "compressed-tensors with a transform_config at the location 'input'",
    ),
    "experts-left-out": (
        compressed("pack-quantized", group(int4(), "Linear"), ignore=[], moe_sparsity_config={"method": "novice"}),
        "compressed-tensors with a moe_sparsity_config",
    ),
    "by-name": (
        compressed("pack-quantized", ignore=[], config_groups={"W1A16": ["Linear"]}),
        "compressed-tensors with the scheme 'W1A16' by its name alone",
    ),
    "mxfp6": (
        compressed("mxfp6-pack-quantized", group(float8(), "Linear"), ignore=[]),
        "compressed-tensors with the format 'mxfp6-pack-quantized'",
    ),
    "mxfp8-of-128": (
        compressed("mxfp8-quantized", group(int4(num_bits=8, type="float", group_size=128), "Linear"), ignore=[]),
        "compressed-tensors mxfp8-quantized with 8 bit float in groups of 128",
    ),
    "nvfp4-of-32": (
        compressed("nvfp4-pack-quantized", group(NVFP4 | {"group_size": 32}, "Linear"), ignore=[]),
        "compressed-tensors nvfp4-pack-quantized with 4 bit float in groups of 32",
    ),
    "w4a8-static": (
        compressed("pack-quantized", group(int4(), "Linear", input_activations=FP8_STATIC), ignore=[]),
        "compressed-tensors pack-quantized with static scales for activations",
    ),
    "not-compressed": (
        compressed("pack-quantized", group(int4(), "Linear"), ignore=[], quantization_status="calibration"),
        "compressed-tensors with quantization_status 'calibration'",
    ),
    "fp4-experts": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"},
        "fp8 with expert_dtype 'fp4'",
    ),
    "mxfp8-blocks": (
        {"quant_method": "mxfp8", "weight_block_size": [128, 128]},
        "mxfp8 with weight_block_size [128, 128]",
    ),
    "fp8-stored-otherwise": ({"quant_method": "fp8", "store_dtype": "mxfp4"}, "fp8 with store_dtype 'mxfp4'"),
    "modelopt-awq": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt with quant_algo 'W4A8_AWQ'"),
    "mlx": (
        {"group_size": 64, "bits": 4, "mode": "mxfp4"},
        "MLX with the mode 'mxfp4' and 4 bits in groups of 64",
    ),
    **{
        method: ({"quant_method": method}, f"quant_method '{method}'")
        for method in ("aqlm", "bitnet", "eetq", "exl3", "fp_quant", "higgs", "marlin", "paroquant", "qqq")
    },
    **{
        method: ({"quant_method": method}, f"quant_method '{method}'")
        for method in ("quanto", "sinq", "spqr", "vptq", "nvfp4")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_cannot_be_read_is_refused_with_what_works(case: str, tmp_path: Path) -> None:
    """From config.json alone: there are no weights in the directory."""
    quantization, words = REFUSED[case]
    save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization}))
    with pytest.raises(ModelConfigError) as refusal:
        read_spec(tmp_path)
    for word in (words, str(tmp_path), "awq (4 bit", "gptq (2, 3, 4 or 8 bit", "quark (FP8", "gguf"):
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("file", "fields", "expected"),
    [
        ("quantize_config.json", GPTQ | {"quant_method": None, "bits": "8"}, GptqFormat(8, 128, True)),
        ("quantize_config.json", AWQ, AwqFormat(128)),
        ("quant_config.json", {"q_group_size": 32, "version": "GEMM", "w_bit": 4, "zero_point": True}, AwqFormat(32)),
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}},
            Float4Format("nvfp4", dialect="modelopt"),
        ),
    ],
    ids=["gptq", "awq by gptqmodel", "awq", "modelopt"],
)
def test_what_a_file_beside_the_config_says(
    file: str, fields: dict[str, Any], expected: WeightFormat, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": None}))
    (tmp_path / file).write_text(json.dumps(fields))
    quant = read_quantization(HfConfig.open(tmp_path))
    assert quant is not None and quant.format_of(UP) == expected


@pytest.mark.parametrize(
    ("name", "stored_name", "tensors", "is_packed"),
    [
        ("lm_head", "language_model.lm_head", {"language_model.lm_head.weight"}, False),
        (UP, f"language_model.{UP}", {f"language_model.{UP}.weight_packed"}, True),
        (UP, UP, {f"{UP}.weight"}, False),
        (UP, UP, set(), True),
        ("model.layers.3.mlp.down_proj", "model.language_model.layers.3.mlp.down_proj", set(), False),
    ],
)
def test_a_module_goes_by_its_stored_name_its_own_and_its_tensors(
    name: str, stored_name: str, tensors: set[str], is_packed: bool
) -> None:
    fields = compressed("pack-quantized", group(int4(), UP), ignore=["lm_head"])
    quant = read_quantization(HfConfig({"quantization_config": fields}))
    assert quant is not None
    assert (module_format(quant, name, stored_name, tensors) is not None) is is_packed
