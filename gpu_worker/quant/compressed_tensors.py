"""`quant_method: compressed-tensors`, as llm-compressor writes it: groups of targets, each with its scheme and format.

Source: https://github.com/vllm-project/compressed-tensors (`QuantizationConfig`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gpu_worker.quant.activations import ActivationQuant
from gpu_worker.quant.affine_formats import PackQuantizedFormat
from gpu_worker.quant.compressed_presets import UNQUANTIZED, preset
from gpu_worker.quant.config import ConfigSection, QuantConfig, _compiled
from gpu_worker.quant.float4_formats import Float4Format
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.scaled_formats import MXFP8, ScaledFormat

LINEAR, EMBEDDING = "Linear", "Embedding"
# Queries, keys and values, which are quantized at run time or not: their scales are read wherever they are.
_OF_ATTENTION = re.compile(r"(?i)(attention|attn)\$?$")


@dataclass(frozen=True, slots=True)
class _Names:
    """Module names, given exactly or as `re:` patterns, and classes of modules among them."""

    exact: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, section: ConfigSection, field: str, entries: list[str]) -> _Names:
        patterns = [entry for entry in entries if entry.startswith("re:")]
        return cls(
            frozenset(entry for entry in entries if not entry.startswith("re:")),
            tuple(_compiled(section, field, entry.removeprefix("re:")) for entry in patterns),
        )

    def has(self, name: str) -> bool:
        return name in self.exact or any(pattern.match(name) for pattern in self.patterns)

    def has_class_of(self, name: str) -> bool:
        return (EMBEDDING if name.split(".")[-1] == "embed_tokens" else LINEAR) in self.exact


def read_compressed_tensors(section: ConfigSection) -> QuantConfig:
    inner = section.fields.get("quantization_config")
    if isinstance(inner, dict):  # as transformers 4.45 saved a config that it had read
        section = ConfigSection(section.fields | inner, section._error)
    status = section.text("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise section.refuse(f"compressed-tensors with quantization_status {status!r}")
    sparsity = section.fields.get("sparsity_config")
    # Zeros that are stored like other values need nothing, in whatever pattern they lie.
    sparse_format = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    if sparsity and sparse_format != "dense":
        raise section.refuse(f"compressed-tensors with a sparsity_config of the format {sparse_format!r}")
    _refuse_turned_inputs(section)
    # Experts are fewer in some layers, or constants.
    if section.fields.get("moe_sparsity_config"):
        raise section.refuse("compressed-tensors with a moe_sparsity_config")
    whole_format = section.text("format", "")
    groups = section.fields.get("config_groups")
    if not groups and sparsity:
        return QuantConfig("compressed-tensors", lambda name: None, "compressed-tensors (sparse, stored densely)")
    if not groups and section.fields.get("kv_cache_scheme"):
        return QuantConfig("compressed-tensors", lambda name: None, "compressed-tensors (scales of the KV cache alone)")
    if not isinstance(groups, dict) or not groups:
        raise section.error("config_groups", "is missing or empty")
    schemes: list[tuple[_Names, WeightFormat]] = []
    for group_name, group in groups.items():
        if isinstance(group, list):
            if group_name.upper() == UNQUANTIZED:
                continue
            scheme = preset(group_name)
            if scheme is None:
                raise section.refuse(f"compressed-tensors with the scheme {group_name!r} by its name alone")
            group = {"targets": group, **scheme}
        if not isinstance(group, dict):
            raise section.error(f"config_groups.{group_name}", "is no object")
        inner = ConfigSection(group, section._error)
        targets = inner.names("targets")
        if group.get("weights") is None and targets and all(_OF_ATTENTION.search(target) for target in targets):
            continue
        names = _Names.of(section, f"config_groups.{group_name}.targets", targets)
        schemes.append((names, _read_group(section, group, inner.text("format", whole_format) or whole_format)))
    ignored = _Names.of(section, "ignore", section.names("ignore"))

    def format_of(name: str) -> WeightFormat | None:
        if ignored.has(name):
            return None
        for names, stored in schemes:
            if names.has(name):
                return stored
        return next((stored for names, stored in schemes if names.has_class_of(name)), None)

    return QuantConfig("compressed-tensors", format_of, f"compressed-tensors {whole_format}")


def _refuse_turned_inputs(section: ConfigSection) -> None:
    """Rotations that weights went through before they were quantized are part of them, and undo each other (R1 and R2
    of SpinQuant). What turns inputs, outputs, queries or keys is computed at run time."""
    transforms = section.fields.get("transform_config")
    if not transforms:
        return
    groups = transforms.get("config_groups") if isinstance(transforms, dict) else None
    applied: list[Any] = []
    for group in groups.values() if isinstance(groups, dict) else [None]:
        places = group.get("apply") if isinstance(group, dict) else None
        applied += places if isinstance(places, list) else [None]
    for place in applied:
        location = place.get("location") if isinstance(place, dict) else None
        if location not in ("weight_input", "weight_output"):
            raise section.refuse(f"compressed-tensors with a transform_config at the location {location!r}")


def _read_group(section: ConfigSection, group: dict[str, Any], kind: str) -> WeightFormat:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise section.refuse(f"compressed-tensors {kind!r} with quantized activations and plain weights")
    if group.get("output_activations"):
        raise section.refuse("compressed-tensors with output_activations")
    match kind:
        case "pack-quantized":
            return _read_packed(section, weights, group.get("input_activations"))
        case "nvfp4-pack-quantized" | "mxfp4-pack-quantized":
            return _read_float4(section, weights, kind)
        case "mxfp8-quantized":
            return _read_mxfp8(section, weights)
        case "int-quantized" | "float-quantized" | "naive-quantized":
            return _read_scaled(section, weights, group.get("input_activations"), kind)
        case _:
            raise section.refuse(f"compressed-tensors with the format {kind!r}")


def _strategy(section: ConfigSection, weights: dict[str, Any], known: tuple[str, ...]) -> str:
    strategy = weights.get("strategy")
    if strategy is None:
        # Old files leave it to the group size.
        strategy = "group" if weights.get("group_size") else "tensor"
    if strategy not in known:
        raise section.refuse(f"compressed-tensors weights with the strategy {strategy!r}")
    return str(strategy)


def _read_float4(section: ConfigSection, weights: dict[str, Any], kind: str) -> WeightFormat:
    stored = Float4Format("nvfp4" if kind.startswith("nvfp4") else "mxfp4")
    bits, number, group_size = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    if (bits, number) != (4, "float") or group_size not in (stored.group_size, None):
        raise section.refuse(f"compressed-tensors {kind} with {bits} bit {number} in groups of {group_size}")
    return stored


def _read_mxfp8(section: ConfigSection, weights: dict[str, Any]) -> WeightFormat:
    bits, number, group_size = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    if (bits, number) != (8, "float") or group_size not in (MXFP8.block[1], None):
        raise section.refuse(f"compressed-tensors mxfp8-quantized with {bits} bit {number} in groups of {group_size}")
    return MXFP8


def _read_packed(section: ConfigSection, weights: dict[str, Any], inputs: Any) -> WeightFormat:
    inner = ConfigSection(weights, section._error)
    bits = inner.integer("num_bits")
    if weights.get("type", "int") != "int" or not 2 <= bits <= 8:
        raise section.refuse(f"compressed-tensors pack-quantized with {bits} bit {weights.get('type')}")
    # Inputs that would be quantized to 8 bits at run time (W4A8) stay as they are: no result gets worse.
    if inputs and not (isinstance(inputs, dict) and inputs.get("dynamic") is True):
        raise section.refuse("compressed-tensors pack-quantized with static scales for activations")
    strategy = _strategy(section, weights, ("group", "channel", "tensor"))
    return PackQuantizedFormat(
        bits,
        inner.group_size() if strategy == "group" else -1,
        symmetric=inner.boolean("symmetric", True),
        may_have_group_index=str(weights.get("actorder")).lower().endswith(("group", "dynamic")),
    )


def _read_scaled(section: ConfigSection, weights: dict[str, Any], inputs: Any, kind: str) -> WeightFormat:
    inner = ConfigSection(weights, section._error)
    number = weights.get("type", "int")
    is_float = number == "float"
    bits = inner.integer("num_bits")
    if number not in ("int", "float") or (is_float and bits != 8) or bits > 8:
        raise section.refuse(f"compressed-tensors {kind} with {bits} bit {number}")
    if not inner.boolean("symmetric", True):
        raise section.refuse(f"compressed-tensors {kind} with asymmetric weights")
    strategy = _strategy(section, weights, ("tensor", "channel", "block", "group"))
    block = (0, 0)
    if strategy == "block":
        structure = weights.get("block_structure")
        if isinstance(structure, str):  # "128x128" in early files
            structure = [int(size) for size in structure.split("x")]
        if not isinstance(structure, list) or len(structure) != 2:
            raise section.error("block_structure", f"is {structure!r}, expected two sizes such as [128, 128]")
        block = (int(structure[0]), int(structure[1]))
    if strategy == "group":
        block = (1, inner.group_size())
    activations = _read_activations(section, inputs, "float8" if is_float else "int8")
    is_static = activations is not None and not activations.dynamic
    return ScaledFormat(
        "float8" if is_float else "int8",
        "tensor" if strategy == "tensor" else "channel" if strategy == "channel" else "block",
        block,
        input_scale_name="input_scale" if is_static else None,
        input_zero_name="input_zero_point" if is_static else None,
        activations=activations,
        ignored=("weight_zero_point",),
    )


def _read_activations(section: ConfigSection, inputs: Any, kind: str) -> ActivationQuant | None:
    if not inputs:
        return None
    if not isinstance(inputs, dict):
        raise section.error("config_groups.input_activations", "is no object")
    inner = ConfigSection(inputs, section._error)
    number = "float" if kind == "float8" else "int"
    if kind == "int8" and inputs.get("type") == "float" and inner.boolean("dynamic", False):
        return None  # W4AFP8: inputs stay as they are, which makes no result worse
    is_narrow = inputs.get("type", "int") == "int" and inner.integer("num_bits") < 8
    if kind == "int8" and is_narrow and inner.boolean("dynamic", False):
        return None  # W4A4: as above
    if inputs.get("type", "int") != number or inner.integer("num_bits") != 8:
        raise section.refuse(
            f"compressed-tensors {number} weights with activations of {inputs.get('num_bits')} bit {inputs.get('type')}"
        )
    dynamic = inner.boolean("dynamic", False)
    symmetric = inner.boolean("symmetric", True)
    strategy = inputs.get("strategy") or ("token" if dynamic else "tensor")
    if strategy in ("token", "tensor") and dynamic:
        # A scale a token, whatever else is in the batch.
        return ActivationQuant(kind, "token", True, symmetric=symmetric)  # type: ignore[arg-type]
    if strategy == "tensor":
        return ActivationQuant(kind, "tensor", False, symmetric=symmetric)  # type: ignore[arg-type]
    if strategy in ("group", "block") and dynamic and symmetric:
        group_size = inner.integer("group_size", 128)
        return ActivationQuant(kind, "group", True, group_size)  # type: ignore[arg-type]
    how = "dynamic" if dynamic else "static"
    raise section.refuse(f"compressed-tensors with {how} activations of the strategy {strategy!r}")
