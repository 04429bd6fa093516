"""`quantization_config` of a checkpoint: which format each of its linears is stored in.

A variant that cannot be read is refused here, from config.json alone, with its name and the list of what works.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from gpu_worker.model_spec import ModelConfigError
from gpu_worker.quant.activations import ActivationQuant
from gpu_worker.quant.affine_formats import AwqFormat, GptqFormat
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.scaled_formats import MXFP8, ScaledFormat

FIELD = "quantization_config"
SUPPORTED = (
    "awq (4 bit, version gemm), gptq (2, 3, 4 or 8 bit, v1 and v2), compressed-tensors (pack-quantized, "
    "int-quantized, float-quantized, naive-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized, "
    "mxfp8-quantized), fp8 (e4m3, a scale per tensor or per block), mxfp8, fbgemm_fp8, modelopt (FP8, "
    "FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, MXFP8, NVFP4, W4A16_NVFP4, MIXED_PRECISION of these), "
    "quark (FP8, INT8, MXFP4), mxfp4, auto-round (in the layouts of GPTQ and AWQ), "
    "torchao (int4 in the packing format plain, int1 to int8 unpacked, int8, float8, MX, NVFP4), "
    "bitsandbytes (nf4, fp4, int8), hqq (1 to 6 and 8 bit), mlx (affine, 2 to 6 and 8 bit, mxfp4, mxfp8, nvfp4), "
    "gguf"
)
GPTQ_BITS = (2, 3, 4, 8)

FormatOf = Callable[[str], WeightFormat | None]


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """How a checkpoint is quantized."""

    method: str
    """`quant_method`, for messages."""
    format_of: FormatOf
    """Module name in the checkpoint (unfused) -> how its weight is stored; None: as it is."""
    label: str = ""
    otherwise: WeightFormat | None = None
    """How a module is stored that the config leaves out, and that has packed tensors all the same."""


class ConfigSection:
    """Typed reading of `quantization_config`; every error names the field."""

    def __init__(self, fields: dict[str, Any], error: Callable[[str, str], ModelConfigError]) -> None:
        self.fields = fields
        self._error = error

    def error(self, field: str, problem: str) -> ModelConfigError:
        return self._error(f"{FIELD}.{field}", problem)

    def refuse(self, what: str) -> ModelConfigError:
        return self._error(FIELD, f"asks for {what}, which is not supported; supported are {SUPPORTED}")

    def integer(self, field: str, default: int | None = None) -> int:
        """Null is as good as missing; some writers have numbers as text, or with a point."""
        value = self.fields.get(field)
        if value is None:
            value = default
        if value is None:
            raise self.error(field, "is missing")
        if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise self.error(field, f"is {value!r}, expected an integer")
        return int(value)

    def group_size(self, default: int | None = None, field: str = "group_size") -> int:
        """-1, or null: one group."""
        if default is None and field in self.fields and self.fields[field] is None:
            return -1
        value = self.integer(field, default)
        if value != -1 and value <= 0:
            raise self.error(field, f"is {value}, expected a number above 0, or -1 for one group")
        return value

    def boolean(self, field: str, default: bool) -> bool:
        value = self.fields.get(field, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(field, f"is {value!r}, expected true or false")
        return value

    def text(self, field: str, default: str) -> str:
        value = self.fields.get(field)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(field, f"is {value!r}, expected a string")
        return value

    def names(self, *fields: str) -> list[str]:
        """All of these lists of names together."""
        found: list[str] = []
        for field in fields:
            value = self.fields.get(field) or []
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise self.error(field, f"is {value!r:.80}, expected a list of names")
            found += value
        return found


def is_module(name: str, entries: Iterable[str]) -> bool:
    """Whether a list names this module, a module around it, or the end of its name."""
    return any(name == entry or name.startswith(f"{entry}.") or name.endswith(f".{entry}") for entry in entries)


def read_gptq(section: ConfigSection) -> QuantConfig:
    # GPTQModel writes both keys; old files have neither, and are v1.
    kind = section.text("checkpoint_format", section.text("format", "gptq")).lower()
    if kind not in ("gptq", "gptq_v2"):
        raise section.refuse(f"gptq with checkpoint_format {kind!r}")
    # Another layout; inputs that are turned before a product; a product of low rank beside it (GPTQModel).
    for field in ("is_marlin_format", "rotation", "adapter"):
        if section.fields.get(field):
            raise section.refuse(f"gptq with {field} {section.fields[field]!r:.60}")
    pack_dtype = section.text("pack_dtype", "int32")
    if pack_dtype != "int32":
        raise section.refuse(f"gptq with pack_dtype {pack_dtype!r}")
    with_head = section.boolean("lm_head", False)
    overrides = section.fields.get("dynamic") or {}
    if not isinstance(overrides, dict):
        raise section.error("dynamic", f"is {overrides!r:.60}, expected an object of patterns")

    def make(bits: int, group_size: int) -> GptqFormat:
        if bits not in GPTQ_BITS:
            raise section.refuse(f"gptq with {bits} bits")
        return GptqFormat(bits, group_size, zeros_minus_one=kind == "gptq")

    default = make(section.integer("bits"), section.group_size())
    rules: list[tuple[re.Pattern[str], GptqFormat | None]] = []
    for pattern, changes in overrides.items():
        expression = _compiled(section, "dynamic", pattern.removeprefix("-:").removeprefix("+:"))
        if pattern.startswith("-:") or changes is False:
            rules.append((expression, None))
            continue
        changes = {} if changes in (None, True) else changes
        if not isinstance(changes, dict):
            raise section.error("dynamic", f"has {changes!r:.60} for {pattern!r}, expected an object")
        inner = ConfigSection(changes, section._error)
        rules.append((expression, make(inner.integer("bits", default.bits), inner.group_size(default.group_size))))

    def format_of(name: str) -> WeightFormat | None:
        if not with_head and name.split(".")[-1] == "lm_head":
            return None
        return next((changed for expression, changed in rules if expression.match(name)), default)

    return QuantConfig("gptq", format_of, f"gptq {default.bits} bit", otherwise=default)


def read_awq(section: ConfigSection) -> QuantConfig:
    # GPTQModel writes all three keys.
    version = section.text("version", section.text("checkpoint_format", section.text("format", "gemm"))).lower()
    if section.text("backend", "") == "llm-awq":
        version = "llm-awq"
    # The kernels that transformers was asked for, which read the same layout.
    if version not in ("gemm", "exllama", "ipex"):
        raise section.refuse(f"awq with version {version!r}")
    order = section.text("pack_method", "reorder")  # Quark's name for AutoAWQ's order of nibbles
    if order != "reorder":
        raise section.refuse(f"awq with pack_method {order!r}")
    bits = section.integer("w_bit" if "w_bit" in section.fields and section.fields.get("bits") is None else "bits")
    if bits != 4:
        raise section.refuse(f"awq with {bits} bits")
    has_old_name = "q_group_size" in section.fields and "group_size" not in section.fields
    group_size = section.group_size(field="q_group_size" if has_old_name else "group_size")
    has_zeros = section.boolean("zero_point", not section.boolean("sym", False))
    stored = AwqFormat(group_size, has_zeros)
    left_out = [*section.names("modules_to_not_convert"), "lm_head"]

    def format_of(name: str) -> WeightFormat | None:
        # AutoAWQ takes an entry for any piece of a name.
        return None if any(entry in name for entry in left_out) else stored

    return QuantConfig("awq", format_of, "awq 4 bit", otherwise=stored)


def read_fp8(section: ConfigSection, stored_names: Collection[str]) -> QuantConfig:
    """The three dialects that share the name: blocks, AutoFP8's and Hugging Face's per-tensor scales."""
    fmt = section.text("fmt", "e4m3")
    if fmt not in ("e4m3", "float8_e4m3", "float8_e4m3fn"):
        raise section.refuse(f"fp8 with fmt {fmt!r}")
    if "weight_scale_semantics" in section.fields:
        raise section.refuse(f"fp8 with weight_scale_semantics {section.fields['weight_scale_semantics']!r}")
    for field in ("expert_dtype", "store_dtype"):
        if section.text(field, "fp8") != "fp8":
            raise section.refuse(f"fp8 with {field} {section.fields[field]!r}")
    scheme = section.text("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise section.refuse(f"fp8 with activation_scheme {scheme!r}")
    block = section.fields.get("weight_block_size")
    if section.text("quant_method", "fp8").lower() == "mxfp8":
        return _read_mxfp8(section, block, stored_names)
    stored = (
        _fp8_blocks(section, block, scheme, stored_names)
        if block is not None
        else _fp8_tensors(section, scheme, stored_names)
    )
    label = f"fp8 {stored.granularity} scales, {scheme} activations"
    return _all_but_left_out(section, "fp8", stored, label)


def _all_but_left_out(section: ConfigSection, method: str, stored: WeightFormat, label: str) -> QuantConfig:
    left_out = section.names("modules_to_not_convert", "ignored_layers")

    def format_of(name: str) -> WeightFormat | None:
        return None if is_module(name, left_out) or name.split(".")[-1] == "lm_head" else stored

    return QuantConfig(method, format_of, label, otherwise=stored)


def _read_mxfp8(section: ConfigSection, block: Any, stored_names: Collection[str]) -> QuantConfig:
    """As blocks of fp8, whose scales are bytes that hold exponents. Inputs stay as they are."""
    if block not in (None, [1, 32]):
        raise section.refuse(f"mxfp8 with weight_block_size {block!r:.40}")
    name = "weight_scale" if _has_plain_scales(stored_names) else "weight_scale_inv"
    return _all_but_left_out(section, "mxfp8", replace(MXFP8, scale_name=name), "mxfp8")


def _fp8_blocks(section: ConfigSection, block: Any, scheme: str, stored_names: Collection[str]) -> ScaledFormat:
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise section.error("weight_block_size", f"is {block!r}, expected two sizes such as [128, 128]")
    if scheme != "dynamic":
        raise section.refuse("fp8 with weight blocks and static activations")
    activations = ActivationQuant("float8", "group", dynamic=True, group_size=block[1])
    scale_name = "weight_scale" if _has_plain_scales(stored_names) else "weight_scale_inv"
    return ScaledFormat("float8", "block", (block[0], block[1]), scale_name=scale_name, activations=activations)


def _has_plain_scales(stored_names: Collection[str]) -> bool:
    """Whether the writer did not call scales by their opposite."""
    return any(name.endswith(".weight_scale") for name in stored_names) and not any(
        name.endswith("_scale_inv") for name in stored_names
    )


def _fp8_tensors(section: ConfigSection, scheme: str, stored_names: Collection[str]) -> ScaledFormat:
    if stored_names:
        is_hugging_face = any(name.endswith(".weight_scale_inv") for name in stored_names)
    else:
        is_hugging_face = "weight_block_size" in section.fields
    scale_name, input_name = (
        ("weight_scale_inv", "activation_scale") if is_hugging_face else ("weight_scale", "input_scale")
    )
    if scheme == "dynamic":
        # A scale a token, whatever else is in the batch.
        return ScaledFormat(
            "float8", "tensor", scale_name=scale_name, activations=ActivationQuant("float8", "token", dynamic=True)
        )
    return ScaledFormat(
        "float8",
        "tensor",
        scale_name=scale_name,
        input_scale_name=input_name,
        activations=ActivationQuant("float8", "tensor", dynamic=False),
    )


def read_fbgemm_fp8(section: ConfigSection) -> QuantConfig:
    """Meta's FBGEMM (Llama 3.1 405B FP8): a scale for every output; inputs get one for every token.

    `activation_scale_ub` cuts inputs off above 1200. Here they are not cut.
    """
    stored = ScaledFormat("float8", "channel", activations=ActivationQuant("float8", "token", dynamic=True))
    left_out = section.names("modules_to_not_convert")

    def format_of(name: str) -> WeightFormat | None:
        return None if is_module(name, left_out) or name.split(".")[-1] == "lm_head" else stored

    return QuantConfig("fbgemm_fp8", format_of, "fbgemm_fp8", otherwise=stored)


def read_mxfp4(section: ConfigSection) -> QuantConfig:
    """GPT-OSS: only fused experts are packed, and those are no linears of their own."""
    return QuantConfig("mxfp4", lambda name: None, "mxfp4 experts")


def _compiled(section: ConfigSection, field: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise section.error(field, f"has {pattern!r}, which is no regular expression ({error})") from error
