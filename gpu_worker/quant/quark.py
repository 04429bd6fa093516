"""`quant_method: quark` (AMD Quark): float8 and int8 under scales, and MXFP4, layer by layer.

Source: https://quark.docs.amd.com (`QConfig`). Scales of a KV cache come as `output_scale` of the projections that make
keys and values, and are read wherever they are.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from gpu_worker.quant.activations import ActivationQuant
from gpu_worker.quant.config import ConfigSection, QuantConfig, is_module
from gpu_worker.quant.float4_formats import Float4Format
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.scaled_formats import ScaledFormat

METHOD = "quark"
_KINDS = {"fp8_e4m3": "float8", "int8": "int8"}
_GRANULARITIES = {"per_tensor": "tensor", "per_channel": "channel"}
MXFP4 = Float4Format("mxfp4", dialect="quark")


def read_quark(section: ConfigSection) -> QuantConfig:
    export = section.fields.get("export")
    stored_as = export.get("weight_format") if isinstance(export, dict) else None
    if stored_as not in (None, "real_quantized"):
        raise section.refuse(f"quark with the weight_format {stored_as!r}")
    _refuse_turned_inputs(section)
    by_class = section.fields.get("layer_type_quant_config") or {}
    if by_class:
        raise section.refuse(f"quark with layer_type_quant_config for {', '.join(map(str, by_class))}")
    layers = section.fields.get("layer_quant_config") or {}
    if not isinstance(layers, dict):
        raise section.error("layer_quant_config", f"is {layers!r:.60}, expected an object of objects")
    default = _read_layer(section, "global_quant_config", section.fields.get("global_quant_config"))
    formats = {name: _read_layer(section, f"layer_quant_config.{name}", fields) for name, fields in layers.items()}
    left_out = section.names("exclude")

    def format_of(name: str) -> WeightFormat | None:
        if is_module(name, left_out) or any(fnmatchcase(name, entry) for entry in left_out):
            return None
        return next((stored for entry, stored in formats.items() if fnmatchcase(name, entry)), default)

    return QuantConfig(METHOD, format_of, f"quark {_label(default)}")


def _refuse_turned_inputs(section: ConfigSection) -> None:
    """Some rotations are not part of the weights: inputs are turned before a product. What turns them is stored by
    current releases alone."""
    algorithms = section.fields.get("algo_config") or []
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        if not isinstance(algorithm, dict) or algorithm.get("name") not in ("rotation", "quarot"):
            continue
        if algorithm["name"] == "quarot" or algorithm.get("r4", True) or algorithm.get("online_r1_rotation"):
            raise section.refuse("quark with rotations of inputs (algo_config)")


def _label(stored: WeightFormat | None) -> str:
    if isinstance(stored, Float4Format):
        return stored.kind
    return f"{stored.kind} by {stored.granularity}" if isinstance(stored, ScaledFormat) else "in some layers"


def _read_layer(section: ConfigSection, field: str, layer: Any) -> WeightFormat | None:
    if not isinstance(layer, dict):
        raise section.error(field, f"is {layer!r:.60}, expected an object")
    weight, inputs = layer.get("weight"), layer.get("input_tensors")
    if weight is None:
        return None
    if not isinstance(weight, dict) or not isinstance(inputs, dict | None):
        # Two stages: int4 in float8, or scales that are quantized themselves.
        raise section.refuse("quark with weights or inputs of several stages")
    if _is_mxfp4(weight):
        return MXFP4
    dtype, scheme = weight.get("dtype"), weight.get("qscheme")
    if dtype not in _KINDS or scheme not in _GRANULARITIES or (scheme == "per_channel" and weight.get("ch_axis", 0)):
        raise section.refuse(f"quark with {dtype} weights {scheme}")
    if weight.get("symmetric") is False:
        raise section.refuse(f"quark with asymmetric {dtype} weights")
    activations = _read_inputs(section, dtype, inputs)
    is_static = activations is not None and not activations.dynamic
    return ScaledFormat(
        _KINDS[dtype],  # type: ignore[arg-type]
        _GRANULARITIES[scheme],  # type: ignore[arg-type]
        input_scale_name="input_scale" if is_static else None,
        input_zero_name="input_zero_point" if is_static else None,
        activations=activations,
        ignored=("weight_zero_point",),
    )


def _is_mxfp4(weight: dict[str, Any]) -> bool:
    wanted = {"dtype": "fp4", "qscheme": "per_group", "group_size": MXFP4.group_size, "scale_format": "e8m0"}
    # Some configs leave the scheme out, which a group size says as well.
    return all(weight.get(field, "per_group" if field == "qscheme" else None) == wanted[field] for field in wanted)


def _read_inputs(section: ConfigSection, dtype: str, inputs: dict[str, Any] | None) -> ActivationQuant | None:
    if inputs is None:
        return None
    if inputs.get("dtype") != dtype:
        raise section.refuse(f"quark with {dtype} weights and {inputs.get('dtype')} inputs")
    scheme, is_dynamic = inputs.get("qscheme"), inputs.get("is_dynamic") is True
    symmetric = inputs.get("symmetric") is not False
    if is_dynamic and scheme in ("per_tensor", "per_channel", "per_token"):
        # Channels of [tokens, inputs] are tokens; and a scale a token is the finer one, whatever else is in the batch.
        return ActivationQuant(_KINDS[dtype], "token", True, symmetric=symmetric)  # type: ignore[arg-type]
    if not is_dynamic and scheme == "per_tensor":
        return ActivationQuant(_KINDS[dtype], "tensor", False, symmetric=symmetric)  # type: ignore[arg-type]
    raise section.refuse(f"quark with {'dynamic' if is_dynamic else 'static'} inputs {scheme}")
