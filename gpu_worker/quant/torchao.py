"""`quant_method: torchao`: the configs of torchao (https://github.com/pytorch/ao) that its safetensors files come with.

`quant_type.default` is one config, or `FqnToConfig`: a config for every name or pattern. Releases before 0.13 could
only pickle such models. Layouts that are made for one kind of hardware (`tile_packed_to_4d`, `preshuffled`, `opaque`)
are read by that hardware's kernels alone.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

from gpu_worker.quant.activations import ActivationQuant
from gpu_worker.quant.config import ConfigSection, QuantConfig, _compiled, is_module
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.scaled_formats import ScaledFormat
from gpu_worker.quant.torchao_floats import TorchaoFloatFormat
from gpu_worker.quant.torchao_formats import SCALE, VALUES, ZERO, TorchaoInt4Format, TorchaoIntxFormat

METHOD = "torchao"
BY_NAME = ("FqnToConfig", "ModuleFqnToConfig")
_WEIGHT_ONLY = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")
_WITH_INPUTS = ("Int8DynamicActivationInt8WeightConfig", "Float8DynamicActivationFloat8WeightConfig")
_INTEGERS = ("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig")
_INT4 = ("Int4WeightOnlyConfig", "Float8DynamicActivationInt4WeightConfig")
_NVFP4 = ("NVFP4WeightOnlyConfig", "NVFP4DynamicActivationNVFP4WeightConfig")
_MX: dict[str, Literal["mxfp4", "mxfp8"]] = {"float8_e4m3fn": "mxfp8", "float4_e2m1fn_x2": "mxfp4"}


def read_torchao(section: ConfigSection) -> QuantConfig:
    kinds = section.fields.get("quant_type")
    config = kinds.get("default") if isinstance(kinds, dict) else kinds
    if isinstance(config, str):
        raise section.refuse(f"torchao with quant_type {config!r} (of releases that pickled their weights)")
    if not isinstance(config, dict) or not isinstance(config.get("_type"), str):
        raise section.error("quant_type", f"is {kinds!r:.80}, expected an object with a config as its default")
    left_out = section.names("modules_to_not_convert")
    if config["_type"] not in BY_NAME:
        stored = _read_config(section, config)
        # transformers leaves the head out of its own accord, unless it was told what to leave out.
        if not left_out and not section.boolean("include_input_output_embeddings", False):
            left_out = ["lm_head"]

        def format_of(name: str) -> WeightFormat | None:
            return None if is_module(name, left_out) else stored

        return QuantConfig(METHOD, format_of, f"torchao {config['_type']}", otherwise=stored)
    fields = _data(config)
    by_name = fields.get("fqn_to_config") or fields.get("module_fqn_to_config")
    if not isinstance(by_name, dict) or not by_name:
        raise section.error("quant_type", f"has {by_name!r:.60} in its {config['_type']}, expected configs by name")
    return _read_by_name(section, by_name, left_out)


def _read_by_name(section: ConfigSection, by_name: dict[str, Any], left_out: list[str]) -> QuantConfig:
    """Names of weights go before those of modules, and both before patterns, of which the first counts."""
    formats = {name: None if one is None else _read_config(section, one) for name, one in by_name.items()}
    patterns: list[tuple[re.Pattern[str], WeightFormat | None]] = [
        (_compiled(section, "quant_type", name.removeprefix("re:")), stored)
        for name, stored in formats.items()
        if name.startswith("re:")
    ]
    default = formats.get("_default")

    def format_of(name: str) -> WeightFormat | None:
        if is_module(name, left_out):
            return None
        for known in (f"{name}.weight", name):
            if known in formats:
                return formats[known]
        for pattern, stored in patterns:
            if pattern.fullmatch(f"{name}.weight") or pattern.fullmatch(name):
                return stored
        return None if name.split(".")[-1] in ("lm_head", "embed_tokens") else default

    return QuantConfig(METHOD, format_of, "torchao by names", otherwise=default)


def _data(config: Any) -> dict[str, Any]:
    data = config.get("_data") if isinstance(config, dict) else None
    return data if isinstance(data, dict) else {}


def _name(value: Any) -> str | None:
    """An entry of an enumeration, or a dtype: `{"_type": ..., "_data": NAME}`, or the name alone."""
    name = value.get("_data") if isinstance(value, dict) else value
    return name.lower().removeprefix("torch.") if isinstance(name, str) else None


def _read_config(section: ConfigSection, config: Any) -> WeightFormat:
    kind = config.get("_type") if isinstance(config, dict) else None
    fields = _data(config)
    if kind in _INT4:
        return _read_int4(section, kind, fields, config.get("_version"))
    if kind in _INTEGERS:
        return _read_integers(section, kind, fields)
    if kind in _WEIGHT_ONLY or kind in _WITH_INPUTS:
        return _read_scaled(section, kind, fields)
    if kind in _NVFP4:
        return TorchaoFloatFormat("nvfp4")
    if kind == "MXDynamicActivationMXWeightConfig":
        dtype = _name(fields.get("weight_dtype")) or "float8_e4m3fn"
        if dtype not in _MX or fields.get("block_size", 32) != 32:
            raise section.refuse(f"torchao with {kind} of {dtype} in blocks of {fields.get('block_size')}")
        return TorchaoFloatFormat(_MX[dtype])
    raise section.refuse(f"torchao with {kind}")


def _read_int4(section: ConfigSection, kind: str, fields: dict[str, Any], version: Any) -> WeightFormat:
    # Inputs that would be made float8 stay as they are: no result gets worse.
    is_weight_only = kind == "Int4WeightOnlyConfig"
    if is_weight_only and version == 1:
        raise section.refuse(f"torchao with {kind} of version 1")
    packing = _name(fields.get("int4_packing_format")) or ("plain" if is_weight_only else "preshuffled")
    if packing != "plain":
        raise section.refuse(f"torchao with {kind} in the int4_packing_format {packing!r}")
    if not is_weight_only:
        return TorchaoInt4Format(128)
    return TorchaoInt4Format(ConfigSection(fields, section._error).integer("group_size", 128))


def _read_integers(section: ConfigSection, kind: str, fields: dict[str, Any]) -> WeightFormat:
    packing = _name(fields.get("intx_packing_format")) or "unpacked_to_int8"
    if packing != "unpacked_to_int8":
        raise section.refuse(f"torchao with {kind} in the intx_packing_format {packing!r}")
    dtype = _name(fields.get("weight_dtype")) or "int8"
    match = re.fullmatch(r"int([1-8])", dtype)
    if match is None:
        raise section.refuse(f"torchao with {kind} of the weight_dtype {dtype!r}")
    granularity = fields.get("granularity", fields.get("weight_granularity"))
    return TorchaoIntxFormat(int(match[1]), _group_size(section, kind, granularity))


def _group_size(section: ConfigSection, kind: str, granularity: Any) -> int:
    """-1: one group."""
    data = _data(granularity)
    match granularity.get("_type") if isinstance(granularity, dict) else granularity:
        case "PerGroup":
            return ConfigSection(data, section._error).integer("group_size")
        case "PerAxis" if data.get("axis", 0) == 0:
            return -1
        case "PerRow":
            return -1
        case None:
            return 32
        case other:
            raise section.refuse(f"torchao with {kind} by {other}")


def _read_scaled(section: ConfigSection, kind: str, fields: dict[str, Any]) -> WeightFormat:
    number: Literal["float8", "int8"] = "float8" if kind.startswith("Float8") else "int8"
    for field in ("weight_dtype", "activation_dtype"):
        dtype = _name(fields.get(field))
        if dtype not in (None, "float8_e4m3fn"):
            raise section.refuse(f"torchao with {kind} of the {field} {dtype!r}")
    packing = _name(fields.get("packing_format")) or "plain"
    if packing != "plain":
        raise section.refuse(f"torchao with {kind} in the packing_format {packing!r}")
    granularity = fields.get("granularity")
    if granularity is None and number == "float8" and kind in _WITH_INPUTS:
        granularity = {"_type": "PerTensor"}
    if not isinstance(granularity, list) or len(granularity) != 2:
        granularity = [granularity, granularity]
    of_inputs, of_weights = granularity
    if fields.get("group_size"):
        of_weights = {"_type": "PerGroup", "_data": {"group_size": fields["group_size"]}}
    stored = _by_granularity(section, kind, number, of_weights)
    if kind not in _WITH_INPUTS:
        return stored
    return replace(stored, activations=_inputs(section, kind, number, of_inputs, fields))


def _by_granularity(
    section: ConfigSection, kind: str, number: Literal["float8", "int8"], granularity: Any
) -> ScaledFormat:
    name = granularity.get("_type") if isinstance(granularity, dict) else granularity
    block = (0, 0)
    match name:
        case "PerRow" | None:
            by: Literal["tensor", "channel", "block"] = "channel"
        case "PerTensor":
            by = "tensor"
        case "PerGroup":
            by, block = "block", (1, ConfigSection(_data(granularity), section._error).integer("group_size"))
        case "PerBlock":
            by, block = "block", _block_size(section, granularity)
        case _:
            raise section.refuse(f"torchao with {kind} by {name}")
    # All of these are symmetric: zero points are there, and 0.
    ignored = (ZERO,) if number == "int8" else ()
    return ScaledFormat(number, by, block, scale_name=SCALE, values_name=VALUES, ignored=ignored)


def _block_size(section: ConfigSection, granularity: Any) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    sizes = _data(granularity).get("block_size")
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        raise section.error("quant_type", f"has the block_size {sizes!r:.40}, expected two sizes")
    return sizes[0], sizes[1]


def _inputs(
    section: ConfigSection, kind: str, number: Literal["float8", "int8"], granularity: Any, fields: dict[str, Any]
) -> ActivationQuant:
    name = granularity.get("_type") if isinstance(granularity, dict) else granularity
    if name == "PerBlock":
        return ActivationQuant(number, "group", True, _block_size(section, granularity)[1])
    if name not in ("PerRow", "PerTensor", "PerToken", None):
        raise section.refuse(f"torchao with {kind} and inputs by {name}")
    # A scale a token, whatever else is in the batch.
    symmetric = _name(fields.get("act_mapping_type")) != "asymmetric"
    return ActivationQuant(number, "token", True, symmetric=symmetric)
