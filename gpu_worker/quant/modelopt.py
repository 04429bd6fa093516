"""`quant_method: modelopt`, and hf_quant_config.json: NVIDIA's ModelOpt (https://github.com/NVIDIA/Model-Optimizer).

FP8 with static scales for inputs, FP8 with a scale for every output and token, FP8 with scales for blocks of weights
alone, MXFP8, NVFP4 whose second scale multiplies, and models that have one of these in some layers and another in
others.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from gpu_worker.quant.activations import ActivationQuant
from gpu_worker.quant.config import ConfigSection, QuantConfig, is_module
from gpu_worker.quant.float4_formats import Float4Format
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.scaled_formats import MXFP8, ScaledFormat

MIXED = "MIXED_PRECISION"
_FORMATS: dict[str, WeightFormat] = {
    "FP8": ScaledFormat(
        "float8",
        "tensor",
        input_scale_name="input_scale",
        activations=ActivationQuant("float8", "tensor", dynamic=False),
    ),
    "FP8_PER_CHANNEL_PER_TOKEN": ScaledFormat(
        "float8", "channel", activations=ActivationQuant("float8", "token", dynamic=True)
    ),
    "FP8_PB_WO": ScaledFormat("float8", "block", (128, 128), scales_keep_dimensions=True),
    "NVFP4": Float4Format("nvfp4", dialect="modelopt"),
    "MXFP8": MXFP8,
    "W4A16_NVFP4": Float4Format("nvfp4", dialect="modelopt"),
}


def read_modelopt(section: ConfigSection) -> QuantConfig:
    inner = section.fields.get("quantization")
    if isinstance(inner, dict):  # as in hf_quant_config.json
        section = ConfigSection(section.fields | inner, section._error)
    algorithm = section.text("quant_algo", "").upper()
    left_out = section.names("exclude_modules", "ignore")
    if not algorithm and "quant_algo" in section.fields:
        # The KV cache alone: its scales are read wherever they are.
        return QuantConfig("modelopt", lambda name: None, "modelopt (KV cache only)")
    if algorithm == MIXED:
        layers = section.fields.get("quantized_layers")
        if not isinstance(layers, dict) or not all(isinstance(fields, dict) for fields in layers.values()):
            raise section.error("quantized_layers", f"is {layers!r:.60}, expected an object of objects")
        formats = {name: _format(section, ConfigSection(fields, section._error)) for name, fields in layers.items()}
    else:
        formats = {"*": _format(section, section)}

    def format_of(name: str) -> WeightFormat | None:
        if is_module(name, left_out) or any(fnmatchcase(name, entry) for entry in left_out):
            return None
        if name in formats:
            return formats[name]
        found = next((stored for entry, stored in formats.items() if fnmatchcase(name, entry)), None)
        return None if name.split(".")[-1] == "lm_head" else found

    return QuantConfig("modelopt", format_of, f"modelopt {algorithm}", otherwise=formats.get("*"))


def _format(section: ConfigSection, layer: ConfigSection) -> WeightFormat:
    algorithm = layer.text("quant_algo", "").upper()
    stored = _FORMATS.get(algorithm)
    if stored is None or layer.fields.get("pre_quant_scale"):
        raise section.refuse(f"modelopt with quant_algo {algorithm or None!r}")
    if isinstance(stored, Float4Format) and (layer.fields.get("group_size") or stored.group_size) != stored.group_size:
        raise section.refuse(f"modelopt {algorithm} with groups of {layer.fields['group_size']}")
    return stored
